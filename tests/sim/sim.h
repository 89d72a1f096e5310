/* SPDX-License-Identifier: Apache-2.0 */
/* A whole cluster in one thread on a virtual clock: one router, a few prefill and decode workers,
 * clients, and a network that loses, doubles, reorders, delays and corrupts what it carries. The
 * decisions are those of the product: router/life.h, router/sched.h, router/admit.h, rpc/stream.h,
 * handoff/ticket.h, handoff/plan.h and the workers' batch.h; the shells round them are written
 * here. The model is fake: token = hash(seed, choice, position), so any lost, doubled, reordered or
 * wrong token is seen at once, and a failure is one seed number.
 *
 * sim.c: clock, event queue, faults, run of one seed. sim_net.c: control connections (rpc/stream.h
 * at both ends). sim_router.c, sim_prefill.c, sim_decode.c: the shells. sim_client.c: clients and
 * the oracle. */
#ifndef TD_TESTS_SIM_H
#define TD_TESTS_SIM_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "base/list.h"
#include "base/prefix.h"
#include "base/rand.h"
#include "decode-worker/batch.h"
#include "handoff/plan.h"
#include "handoff/ticket.h"
#include "prefill-worker/batch.h"
#include "router/admit.h"
#include "router/life.h"
#include "router/sched.h"
#include "rpc/stream.h"

enum {
    SIM_P_MAX = 3,
    SIM_D_MAX = 3,
    SIM_WORKERS_MAX = SIM_P_MAX + SIM_D_MAX,
    SIM_REQUESTS_MAX = 40,
    SIM_CHOICES_MAX = 3,
    SIM_BLOCKS_MAX = 160, /* of a pool */
    SIM_GROUPS = 2,
    SIM_SPAN_MAX = 48, /* blocks of one request on one worker */
    SIM_TOKENS_MAX = 48,
    SIM_VOCAB = 50000,
    SIM_STREAMS_MAX = 64
};

/* Faults, as bits: each seed enables a random subset (swarm). */
enum {
    SIM_F_DROP = 1 << 0,      /* control frames vanish */
    SIM_F_DUP = 1 << 1,       /* control and KV messages arrive twice */
    SIM_F_REORDER = 1 << 2,   /* control and KV messages overtake */
    SIM_F_DELAY = 1 << 3,     /* long delays now and then */
    SIM_F_MALFORM = 1 << 4,   /* control frames whose body cannot be read */
    SIM_F_KV_DROP = 1 << 5,   /* KV messages vanish */
    SIM_F_KV_FLIP = 1 << 6,   /* KV payload bits flip */
    SIM_F_CUT = 1 << 7,       /* a control connection breaks */
    SIM_F_PARTITION = 1 << 8, /* one direction of a worker's link is silent */
    SIM_F_CRASH = 1 << 9,     /* a worker dies and comes back with a new epoch */
    SIM_F_FREEZE = 1 << 10,   /* a worker stops for a while and goes on */
    SIM_F_SLOW = 1 << 11,     /* a worker computes 20 times slower for a while */
    SIM_F_KV_FULL = 1 << 12,  /* decode pool blocks are taken by somebody else */
    SIM_F_CANCEL = 1 << 13,   /* clients leave */
    SIM_F_STOP = 1 << 14,     /* clients end choices (stop strings) */
    SIM_F_READER = 1 << 15,   /* the router consumes a stream slowly */
    SIM_F_DEADLINE = 1 << 16, /* short deadlines */
    SIM_F_DRAIN = 1 << 17,    /* a worker says GOAWAY, finishes and restarts */
    SIM_F_STUCK = 1 << 18,    /* a prefill worker answers PINGs and makes no step for a while */
    SIM_F_ALL = (1 << 19) - 1,
    SIM_F_NOISE = SIM_F_DELAY | SIM_F_SLOW | SIM_F_READER, /* late, and nothing worse */
    /* faults after which a request may end in an error although its client was patient */
    SIM_F_HARM = SIM_F_ALL & ~(SIM_F_CANCEL | SIM_F_STOP | SIM_F_READER | SIM_F_DEADLINE |
                               SIM_F_DELAY | SIM_F_SLOW)
};

/* Seeded bugs, in these shells, that the oracle must find. */
typedef enum sim_bug {
    SIM_BUG_NONE,
    SIM_BUG_INDEX,        /* the router takes D's runs one index too far */
    SIM_BUG_DOUBLE_END,   /* a terminal twice */
    SIM_BUG_NO_END,       /* a terminal lost */
    SIM_BUG_DOUBLE_FIRST, /* P's first tokens delivered twice */
    SIM_BUG_NO_CANCEL,    /* cancels are not sent to workers */
    SIM_BUG_NO_HOLD,      /* D's runs before P's reply are dropped */
    SIM_BUG_NO_CRC,       /* the copy's checksum is taken from the header */
    SIM_BUG_NO_FENCE,     /* late segments are copied although their ticket has ended */
    SIM_BUG_LEAK_DECODE,  /* blocks of a cancelled reservation stay taken */
    SIM_BUG_LEAK_PREFILL, /* pins stay after a failed push */
    SIM_BUG_EARLY_FREE,   /* pins are dropped with frames in flight */
    SIM_BUG_RESUME,       /* a recovery carries one id too few */
    SIM_BUG_TIMER,        /* the deadline timer fires late */
    SIM_BUG_LOCAL_INDEX,  /* a local prefill keeps its first token back */
    SIM_BUG_LOCAL_ROWS,   /* a local prefill leaves its last chunk out */
    SIM_BUG_MAX
} sim_bug;
const char *sim_bug_name(sim_bug b);

/* What happened over all seeds: a test that meets no fault proves nothing. */
typedef struct sim_tally {
    uint64_t events, requests, tokens, ok, errors[TD_ERROR_MAX], refused;
    uint64_t redispatches, resumes_ok, stale, no_room, held, gaps, late, fenced, drops[TD_DROP_MAX],
        silences, crashes, coalesced, shared_blocks, held_blocks, closed_peers, commit_retries,
        stalls, local_prefills, local_resumes;
} sim_tally;

typedef struct sim sim;

/* ---- messages: bodies are immutable and counted ---- */

typedef struct sim_run {
    uint32_t choice, index, n, finish;
    uint32_t ids[SIM_TOKENS_MAX];
} sim_run;

typedef struct sim_ticket {
    td_ticket_key key;
    td_ticket_terms terms;
    uint32_t decode; /* worker index */
    uint64_t credit_bytes, timeout_us;
    uint32_t held; /* leading blocks that the decode worker has in its cache */
} sim_ticket;

typedef struct sim_request {
    uint32_t id;
    uint64_t seed;
    uint32_t n_prompt, n, max_tokens;
    uint32_t
        n_emitted[SIM_CHOICES_MAX]; /* as far as open[] says; 0 everywhere on a first attempt */
    uint8_t open[SIM_CHOICES_MAX];
    int resume;
} sim_request;

enum { SIM_RESERVE = 1, SIM_PREFILL, SIM_EVENT, SIM_REPLY, SIM_STATUS, SIM_LOAD, SIM_BATCH };

typedef struct sim_body {
    uint32_t refs;
    uint8_t kind; /* SIM_RESERVE ... */
    sim_request request;
    uint32_t attempt, local; /* local: allowed (RESERVE), prefilled by the decode worker (EVENT) */
    int has_ticket, committed;
    sim_ticket ticket;
    uint32_t n_runs;
    sim_run runs[SIM_CHOICES_MAX];
    td_error error;
    /* load */
    uint32_t running, used_blocks;
    uint64_t waiting_tokens, step;
    /* batch */
    uint32_t n_items;
    struct {
        uint64_t stream;
        uint32_t sequence;
        struct sim_body *body;
    } items[SIM_STREAMS_MAX];
} sim_body;

sim_body *sim_body_new(sim *s, int kind);
sim_body *sim_body_ref(sim_body *b);
void sim_body_unref(sim *s, sim_body *b);

/* ---- connections ---- */

enum { SIM_ROUTER_END = 0, SIM_WORKER_END = 1 };

typedef struct sim_conn {
    td_list link;
    uint32_t number; /* session */
    uint32_t worker;
    uint64_t boot;          /* which life of the worker */
    td_streams *streams[2]; /* NULL: not up or gone */
    uint64_t fifo_us[2];    /* towards that end */
    uint64_t tick_us[2];    /* scheduled */
    td_streams *dead[2];    /* freed with the connection: steps may be on the stack */
    int draining;
} sim_conn;

/* ---- workers ---- */

typedef struct sim_pool {
    uint32_t n, n_free;
    uint32_t refs[SIM_BLOCKS_MAX];
    uint32_t flight[SIM_BLOCKS_MAX]; /* frames of it that the network holds */
    uint64_t content[SIM_BLOCKS_MAX][SIM_GROUPS];
} sim_pool;

void sim_pool_init(sim_pool *p, uint32_t n);
/* All or nothing; 1 = taken. */
int sim_pool_take(sim_pool *p, uint32_t n, uint32_t *ret_blocks);
void sim_pool_put(sim *s, sim_pool *p, uint32_t block);

/* A job of a prefill worker. */
typedef struct sim_job {
    td_list link;
    uint64_t stream; /* of the Prefill call; 0 = ended */
    sim_conn *conn;
    sim_request request;
    uint32_t attempt;
    int has_ticket, started, computed, cancelled, replied;
    sim_ticket ticket;
    td_handoff_plan plan;
    uint64_t n_left;
    uint32_t n_blocks, blocks[SIM_SPAN_MAX];
    td_ticket_out out;
    int pushing;
    uint32_t next_block, next_group, in_flight;
} sim_job;

/* A reservation of a decode worker, and the sequences that grow out of it. */
typedef struct sim_res {
    td_list link;
    uint64_t stream; /* of the Reserve call; 0 = ended */
    sim_conn *conn;
    sim_request request;
    uint32_t attempt, slot;
    td_handoff_plan plan;
    td_ticket_in in;
    td_in_block in_blocks[SIM_SPAN_MAX];
    td_in_first first[SIM_CHOICES_MAX];
    uint32_t memory[SIM_SPAN_MAX * SIM_GROUPS * 2];
    uint32_t n_blocks[SIM_CHOICES_MAX], blocks[SIM_CHOICES_MAX][SIM_SPAN_MAX];
    uint32_t n_rows[SIM_CHOICES_MAX];  /* rows pushed for the choice */
    uint32_t next[SIM_CHOICES_MAX];    /* index of the next token */
    uint8_t runnable[SIM_CHOICES_MAX]; /* committed and not finished */
    uint32_t n_seqs;
    int committed, released;
    uint32_t held;
    uint32_t local, n_left;           /* prompt tokens prefilled here, and those still to compute */
    sim_run pending[SIM_CHOICES_MAX]; /* computed and not sent: out of credit */
    int committed_owed;
} sim_res;

typedef struct sim_worker {
    uint32_t index;
    int is_decode, up;
    uint64_t boot; /* counts lives; epoch is made of it */
    uint8_t epoch[16];
    uint64_t frozen_until, slow_until, stuck_until, dark_until[2]; /* dark: towards that end */
    uint64_t n_steps;
    uint64_t ready_at;
    sim_conn *conn; /* of this life, NULL between */
    sim_pool pool;
    td_list jobs; /* sim_job or sim_res */
    int lane_busy;
    uint32_t cursor, n_slots, ghost, ghost_blocks[SIM_BLOCKS_MAX];
    uint64_t kv_fifo_us[SIM_WORKERS_MAX];
    uint32_t kv_gen[SIM_WORKERS_MAX]; /* connection to that decode worker: frames of an older one
                                         are gone */
    td_prefill_policy prefill_policy;
    td_decode_policy decode_policy;
    uint64_t step_us;
    uint64_t due_us; /* scheduled ticket timer */
    uint64_t generation;
} sim_worker;

/* ---- router ---- */

typedef struct sim_held {
    struct sim_held *next;
    uint32_t attempt;
    int is_status;
    sim_run run;
} sim_held;

typedef struct sim_gen sim_gen;

typedef struct sim_leg {
    td_list link;
    sim_gen *gen;
    td_leg kind;
    uint32_t attempt, worker_slot;
    uint64_t worker_id, stream;
    sim_conn *conn; /* NULL: planned */
    uint32_t seqs, blocks, tokens;
    int slow;
} sim_leg;

struct sim_gen {
    td_admit_entry entry;
    td_life life;
    sim_request request;
    int live, ended, depth;
    uint32_t want_end_choices;
    sim_leg *leg[2];
    uint64_t pair[2];
    uint32_t n_legs;
    uint64_t failed[TD_LIFE_REDISPATCH_MAX + 1];
    uint32_t n_failed;
    sim_held *held, **held_end;
    uint64_t arm_us;
    const sim_ticket *ticket;
    /* the client's view: the oracle */
    uint32_t got[SIM_CHOICES_MAX];
    uint8_t finished[SIM_CHOICES_MAX], stopped[SIM_CHOICES_MAX];
    uint32_t stop_after[SIM_CHOICES_MAX]; /* 0 = never */
    int patient;                          /* no short deadline, no leaving */
    uint64_t submitted_us, end_us;
    td_error error;
};

typedef struct sim_peer {
    td_sched_worker sched;
    uint32_t worker;
    sim_conn *conn;
    uint64_t seen_step, progress_us;
} sim_peer;

typedef struct sim_router {
    td_admit admit;
    td_list legs;
    sim_gen gens[SIM_REQUESTS_MAX];
    uint32_t n_gens;
    sim_peer peers[SIM_WORKERS_MAX];
    const td_sched_worker *view[SIM_WORKERS_MAX];
    uint32_t n_peers;
    uint64_t next_peer;
    int pumping, pump_owed;
    uint64_t wake_us;
} sim_router;

/* ---- the world ---- */

typedef struct sim_event sim_event;
typedef void (*sim_fn)(sim *s, sim_event *e);
struct sim_event {
    uint64_t at, order;
    sim_fn fn;
    uint32_t worker;
    uint64_t a, b;
    void *p;
};

typedef struct sim_options {
    sim_bug bug;
    int verbose;
} sim_options;

struct sim {
    uint64_t seed, now, order;
    td_rng rng;
    uint32_t faults;
    uint64_t faults_end_us;
    sim_options options;
    sim_event *heap;
    size_t n_heap, cap_heap;
    sim_worker workers[SIM_WORKERS_MAX];
    uint32_t n_workers, n_prefill;
    sim_router router;
    td_list conns;
    uint32_t next_session;
    uint64_t n_bodies; /* alive */
    uint64_t n_kv;     /* KV messages in the network */
    int early_reply;   /* P replies before the push is acked */
    uint32_t local;    /* conditional split: most tokens that a decode worker prefills; 0: never */
    int failed;
    char text[300];
    sim_tally *tally;
};

/* Run one seed. 0, or -1 with text in ret_text. tally is added to. */
int sim_run_seed(uint64_t seed, const sim_options *options, sim_tally *tally, char *ret_text,
                 size_t text_bytes);

/* sim.c */
void sim_fail(sim *s, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
void sim_log(sim *s, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* Run what->fn at that time, or now when it has passed. */
void sim_at(sim *s, uint64_t at, const sim_event *what);
uint64_t sim_below(sim *s, uint64_t n);
/* 1 in n, while faults last and the seed has this one. */
int sim_fault(sim *s, uint32_t fault, uint32_t one_in);
uint64_t sim_hash(uint64_t a, uint64_t b, uint64_t c, uint64_t d);

/* The fake model. */
uint32_t sim_token(uint64_t seed, uint32_t choice, uint32_t index);
uint32_t sim_length(const sim_request *r, uint32_t choice); /* tokens until it ends */
uint32_t sim_finish(const sim_request *r, uint32_t choice,
                    uint32_t index); /* 0 none, 1 stop, 2 length: at this token */
/* What the rows of a block hold; emitted rows differ by choice. */
uint64_t sim_content(const sim_request *r, uint32_t choice, uint32_t block, uint32_t rows,
                     uint32_t group);
int sim_plan(const sim_request *r, td_handoff_plan *ret_plan, uint32_t *ret_choices);
void sim_chain(const sim_request *r, uint32_t choice, uint32_t block, uint8_t ret_chain[16]);
td_ticket_terms sim_terms(void);

/* sim_net.c */
void sim_dial(sim *s, sim_worker *w);
void sim_step(sim *s, sim_conn *c, int end, const td_stream_event *ev, sim_body *body);
void sim_conn_lost(sim *s, sim_conn *c, int end);
void sim_net_close(sim *s);
/* Free what an event that will not run carries. */
void sim_net_discard(sim *s, const sim_event *e);
void sim_net_free(sim *s);
/* Ends of calls, on a worker. */
void sim_finish_call(sim *s, sim_conn *c, uint64_t stream, uint32_t code, td_error error);
int sim_send(sim *s, sim_conn *c, uint64_t stream, sim_body *body);
int sim_send_batched(sim *s, sim_conn *c, uint64_t stream, const sim_body *body,
                     uint32_t *ret_sequence);
/* As sim_step() on an end that is up; OPEN's stream and SEND's sequence come back. */
int sim_step_r(sim *s, sim_conn *c, int end, const td_stream_event *ev, sim_body *body,
               uint64_t *ret_stream, uint32_t *ret_sequence);
/* One message on the KV network between workers; takes body-like data by value. */
typedef struct sim_kv {
    enum { SIM_KV_SEGMENT = 1, SIM_KV_COMMIT, SIM_KV_ACK } kind;
    uint32_t from, to, gen;
    uint64_t from_boot;
    int copy; /* a duplicate: holds no frame of the sender */
    td_ticket_key key;
    td_ticket_terms terms;
    uint32_t group, n_runs;
    td_kv_run runs[SIM_SPAN_MAX];
    uint32_t src[SIM_SPAN_MAX]; /* blocks of the sender: read on arrival, as without a copy */
    uint64_t payload[SIM_SPAN_MAX];
    uint64_t bytes;
    uint32_t digests[SIM_SPAN_MAX], n_digests, n_tokens, choices[SIM_CHOICES_MAX],
        ids[SIM_CHOICES_MAX], n_first;
    td_ack_state ack;
    uint32_t code;
} sim_kv;
void sim_kv_send(sim *s, const sim_kv *m);

/* sim_router.c */
void sim_router_open(sim *s);
void sim_router_close(sim *s);
void sim_router_submit(sim *s, sim_gen *g);
void sim_router_event(sim *s, sim_gen *g, const td_life_event *ev);
int sim_router_hello(sim *s, sim_conn *c);
void sim_router_down(sim *s, sim_conn *c, td_down why);
void sim_router_goaway(sim *s, sim_conn *c);
/* 1: the worker behind it gets requests. */
int sim_router_serves(sim *s, const sim_conn *c);
void sim_router_data(sim *s, sim_conn *c, uint64_t stream, sim_leg *leg, const sim_body *b);
void sim_router_status(sim *s, sim_conn *c, sim_leg *leg, uint32_t code, const sim_body *b);
void sim_router_load(sim *s, sim_conn *c, const sim_body *b);

/* A worker computes for that request: it must not long after its end, when nothing is in the way of
 * a cancel. */
void sim_working_for(sim *s, uint32_t request);

/* sim_prefill.c, sim_decode.c */
void sim_prefill_boot(sim *s, sim_worker *w);
void sim_prefill_call(sim *s, sim_worker *w, sim_conn *c, uint64_t stream, const sim_body *b);
void sim_prefill_abort(sim *s, sim_worker *w, sim_conn *c, uint64_t stream, uint32_t code);
void sim_prefill_kv(sim *s, sim_worker *w, const sim_kv *m);
/* A frame of block `src` left the network (delivered or lost). */
void sim_prefill_flight(sim *s, sim_worker *w, const sim_kv *m);
void sim_prefill_die(sim *s, sim_worker *w);
void sim_prefill_check(sim *s, sim_worker *w);
void sim_decode_boot(sim *s, sim_worker *w);
void sim_decode_call(sim *s, sim_worker *w, sim_conn *c, uint64_t stream, const sim_body *b);
void sim_decode_abort(sim *s, sim_worker *w, sim_conn *c, uint64_t stream, uint32_t code);
void sim_decode_credit(sim *s, sim_worker *w, sim_conn *c, uint64_t stream);
void sim_decode_kv(sim *s, sim_worker *w, sim_kv *m);
void sim_decode_die(sim *s, sim_worker *w);
void sim_decode_check(sim *s, sim_worker *w);
void sim_worker_load(const sim_worker *w, sim_body *b);

/* sim_client.c */
void sim_client_start(sim *s, uint32_t n);
void sim_client_run(sim *s, sim_gen *g, const sim_run *r);
void sim_client_end(sim *s, sim_gen *g, td_error error);
void sim_client_check_end(sim *s);

#endif
