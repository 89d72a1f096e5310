/* SPDX-License-Identifier: Apache-2.0 */
/* The ticket at both ends of a handoff: what may be received, when blocks become visible, when they
 * may be freed. Pure: step(state, event, now) -> actions; no clock, thread, socket, log or
 * allocation. One ticket belongs to one thread.
 *
 * Invariants: blocks are delivered once, and only after every (block, group) was verified and the
 * commit's digests agree; blocks are given back exactly once, delivered or released, never both; a
 * frame that does not name ticket, attempt, generation and both boot epochs changes nothing; a
 * repeated commit gets the same answer; the pushing end is done only when the ticket is acked or
 * failed and no frame of it is in flight.
 *
 * A lease is held by three things: its deadline, the Reserve call (the caller's heartbeat; when it
 * ends, TD_IN_CANCEL) and the two boot epochs. */
#ifndef TD_HANDOFF_TICKET_H
#define TD_HANDOFF_TICKET_H

#include <stddef.h>
#include <stdint.h>

typedef struct td_ticket_key {
    uint8_t id[16];
    uint32_t attempt, generation;
    uint8_t decode_epoch[16];
    uint8_t prefill_epoch[16]; /* zeros in a grant: bound by the first good frame */
} td_ticket_key;

/* What both ends must agree on before a byte of payload is looked at. */
typedef struct td_ticket_terms {
    uint8_t model_hash[32], profile_id[16], layout_hash[16];
} td_ticket_terms;

/* Why a frame was refused: counted by reason. Reasons up to TD_DROP_DUPLICATE leave the ticket as
 * it is (late or stale frames); the others fence it, for its owner is broken or lying. */
typedef enum td_drop {
    TD_DROP_NONE,
    TD_DROP_UNKNOWN, /* no such ticket (used by shells) */
    TD_DROP_MAC,     /* private link: not from its peer, or repeated (used by shells) */
    TD_DROP_ATTEMPT,
    TD_DROP_GENERATION,
    TD_DROP_EPOCH,     /* either boot epoch */
    TD_DROP_STATE,     /* the ticket has ended */
    TD_DROP_DUPLICATE, /* these rows were verified before */
    TD_DROP_FORMAT,    /* frame cannot be read (used by shells when the ticket is known) */
    TD_DROP_MODEL,
    TD_DROP_PROFILE,
    TD_DROP_LAYOUT,
    TD_DROP_RANGE,  /* block, group or row count outside the grant */
    TD_DROP_CHAIN,  /* prefix hash of a block differs */
    TD_DROP_CREDIT, /* more bytes than granted */
    TD_DROP_CRC,
    TD_DROP_DIGEST, /* commit does not describe what arrived */
    TD_DROP_POOL,   /* the shared pool is not known (any more), or the run does not lie in it */
    TD_DROP_FIRST,  /* first tokens missing, doubled or not those of the request */
    TD_DROP_MAX
} td_drop;

const char *td_drop_name(td_drop d); /* "crc", "epoch", ...; for metrics and texts */
/* td_code of a ticket that failed for this reason: DATA_LOSS, FAILED_PRECONDITION or
 * INVALID_ARGUMENT. */
uint32_t td_drop_code(td_drop d);

/* One run of a segment: rows of one block in one group. */
typedef struct td_kv_run {
    uint32_t block; /* index in the ticket's block space, see handoff/plan.h */
    uint32_t rows;  /* 1..64 */
    uint32_t crc;   /* CRC32C of the rows' bytes in wire order */
    int has_chain;
    uint8_t chain[16]; /* prefix hash of a full block */
    /* a run in a shared pool: where the group's range of its block begins there, and the run's
     * bytes; checked against the pool when it is copied */
    uint64_t offset;
    uint32_t length;
} td_kv_run;

/* ---- the decode worker's end ---- */

typedef enum td_in_state {
    TD_IN_GRANTED, /* nothing arrived */
    TD_IN_RECEIVING,
    TD_IN_VERIFIED,  /* every row is here and verified; no commit yet */
    TD_IN_COMMITTED, /* delivered; commits are answered with the same ack */
    TD_IN_FENCED,    /* a refused frame ended it */
    TD_IN_EXPIRED,
    TD_IN_CANCELLED
} td_in_state;

/* One block the grant expects. */
typedef struct td_in_block {
    uint32_t rows; /* 1..64, or 0: held already, must not be sent */
    int has_chain; /* full block: its prefix hash must match */
    uint8_t chain[16];
} td_in_block;

typedef struct td_in_first {
    uint32_t choice;
    int has_id; /* a recovery: the id must be this one */
    uint32_t id;
} td_in_first;

typedef struct td_ticket_in {
    td_ticket_key key;
    td_ticket_terms terms;
    td_in_state state;
    uint32_t n_blocks, n_groups, n_left; /* n_left: (block, group) pairs still missing */
    uint64_t credit_bytes;               /* most bytes between two acks */
    uint64_t received_bytes, n_segments;
    uint64_t deadline_us, granted_us, first_us, done_us;
    td_drop why;               /* what fenced it */
    uint32_t code;             /* td_code it ended with */
    const td_in_block *blocks; /* borrowed: [n_blocks] */
    const td_in_first *first;  /* borrowed: [n_first] the choices a commit must name */
    uint32_t n_first;
    uint32_t n_tokens; /* rows over all blocks incl. held ones: the commit must say the same */
    uint32_t *crc;     /* [n_blocks][n_groups], in the caller's memory */
    uint8_t *seen;     /* [n_blocks][n_groups] */
    int bound;
} td_ticket_in;

typedef struct td_in_grant {
    td_ticket_key key; /* prefill_epoch ignored */
    td_ticket_terms terms;
    const td_in_block *blocks;
    uint32_t n_blocks, n_groups;
    const td_in_first *first;
    uint32_t n_first, n_tokens;
    uint64_t credit_bytes, deadline_us;
} td_in_grant;

/* Bytes of memory a grant of that size needs. */
size_t td_ticket_in_bytes(uint32_t n_blocks, uint32_t n_groups);
/* Start a grant. memory: td_ticket_in_bytes() bytes, aligned to 4, the caller's until the ticket is
 * forgotten. */
void td_ticket_in_init(td_ticket_in *t, const td_in_grant *grant, void *memory, uint64_t now_us);

typedef enum td_in_kind {
    TD_IN_SEGMENT_HEAD, /* the description of a segment: may its payload be copied? */
    TD_IN_SEGMENT_BODY, /* the same segment, payload copied: crcs holds what was computed while
                           copying */
    TD_IN_COMMIT,
    TD_IN_BAD_FRAME, /* a frame of this ticket from its bound sender that cannot be read */
    TD_IN_TICK,
    TD_IN_CANCEL /* the Reserve call ended; code is the reason's td_code */
} td_in_kind;

typedef struct td_in_event {
    td_in_kind kind;
    const td_ticket_key *key;     /* HEAD, BODY, COMMIT, BAD_FRAME: as the frame says */
    const td_ticket_terms *terms; /* HEAD, BODY, COMMIT */
    uint32_t group;               /* HEAD, BODY */
    const td_kv_run *runs;        /* HEAD, BODY: [n_runs] */
    const uint32_t *crcs;         /* BODY: [n_runs] */
    uint32_t n_runs;
    uint64_t bytes;          /* HEAD, BODY: payload */
    const uint32_t *digests; /* COMMIT: [n_digests], one per block that was to be sent, in order */
    uint32_t n_digests, n_tokens;
    const uint32_t *choices, *ids; /* COMMIT: [n_first] */
    uint32_t n_first;
    uint32_t code; /* CANCEL */
    td_drop why;   /* BAD_FRAME: what is wrong with it; NONE = FORMAT */
} td_in_event;

typedef struct td_in_actions {
    td_drop drop; /* not NONE: this frame was refused; count it */
    int copy;     /* HEAD: copy the payload into the blocks */
    int ack;      /* tell the sender state, received_bytes and code */
    int deliver;  /* once: blocks and first tokens go to the lane */
    int release;  /* once: the ticket failed with t->code; its blocks go back unverified */
} td_in_actions;

void td_ticket_in_step(td_ticket_in *t, const td_in_event *e, uint64_t now_us,
                       td_in_actions *ret_actions);
/* 1 when no frame can change it any more (COMMITTED, FENCED, EXPIRED, CANCELLED). */
int td_ticket_in_ended(const td_ticket_in *t);

/* Digest of a block: CRC32C over the CRCs of its groups, u32 little-endian, in group order. */
uint32_t td_ticket_digest(const uint32_t *group_crcs, uint32_t n_groups);

/* ---- the prefill worker's end ---- */

typedef enum td_out_state {
    TD_OUT_WAITING, /* nothing sent */
    TD_OUT_PUSHING,
    TD_OUT_COMMIT_SENT,
    TD_OUT_ACKED,
    TD_OUT_FAILED
} td_out_state;

typedef struct td_ticket_out {
    td_ticket_key key;
    td_out_state state;
    uint64_t credit_bytes, sent_bytes, received_bytes; /* received: as acked */
    uint64_t deadline_us, progress_us, commit_us, failed_us;
    uint32_t n_commits;
    uint32_t in_flight; /* frames libzmq still holds */
    int by_ref;  /* the peer reads our blocks until it has acked them, or lost the right to */
    int settled; /* by_ref: it has ended the ticket, or lost the right: it reads no more */
    int queued;  /* segments wait to be sent */
    int closing, done;
    uint32_t code;
} td_ticket_out;

/* How long the pushing end waits. */
enum {
    TD_OUT_COMMIT_RETRY_US = 500000, /* ask again (the commit is its own query) */
    TD_OUT_SILENCE_US =
        5000000, /* neither connection nor ack although something waits for it: the peer is gone */
    TD_OUT_DRAIN_US = 1000000 /* failed, blocks still read by somebody: close the connection */
};

void td_ticket_out_init(td_ticket_out *t, const td_ticket_key *key, uint64_t credit_bytes,
                        uint64_t deadline_us, uint64_t now_us);
/* 1 when a segment of so many payload bytes may be sent now. */
int td_ticket_out_may_send(const td_ticket_out *t, uint64_t bytes);

typedef enum td_ack_state {
    TD_ACK_RECEIVING = 1,
    TD_ACK_COMMITTED = 2,
    TD_ACK_FAILED = 3,
    TD_ACK_UNKNOWN = 4
} td_ack_state;

typedef enum td_out_kind {
    TD_OUT_QUEUED,      /* segments wait to be sent */
    TD_OUT_SENT,        /* a segment of `bytes` went out; queued: others wait still */
    TD_OUT_COMMIT,      /* every segment went out and the commit was sent */
    TD_OUT_ACK,         /* from the peer: key, ack, received_bytes, code */
    TD_OUT_FLIGHT,      /* in_flight frames are left now */
    TD_OUT_CANCEL,      /* code: why */
    TD_OUT_PEER_CLOSED, /* our connection was closed and the right to read our blocks withdrawn:
                           nothing more can be sent, what is left is in_flight */
    TD_OUT_TICK
} td_out_kind;

typedef struct td_out_event {
    td_out_kind kind;
    const td_ticket_key *key; /* ACK */
    td_ack_state ack;
    uint64_t bytes;     /* SENT: payload; ACK: received_bytes */
    uint32_t code;      /* ACK with FAILED, CANCEL */
    uint32_t in_flight; /* FLIGHT, PEER_CLOSED */
    int queued;         /* SENT */
} td_out_event;

typedef struct td_out_actions {
    td_drop drop;    /* an ack that is not ours: count it */
    int send_commit; /* send the commit again */
    int close_peer;  /* once: close the connection with LINGER 0, then report PEER_CLOSED when the
                        frames came back */
    int done;        /* once: blocks may be unpinned; t->code is the outcome (0 = acked) */
} td_out_actions;

void td_ticket_out_step(td_ticket_out *t, const td_out_event *e, uint64_t now_us,
                        td_out_actions *ret_actions);

/* Soonest time at which TICK can do something; UINT64_MAX = never. */
uint64_t td_ticket_in_due(const td_ticket_in *t);
uint64_t td_ticket_out_due(const td_ticket_out *t);

#endif
