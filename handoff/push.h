/* SPDX-License-Identifier: Apache-2.0 */
/* The prefill worker's end of the KV socket: sends finished rows straight from their blocks, by
 * layer group, as credit allows, then the commit. One connection per decode worker; where that is
 * on this host, only places in the shared pool are sent (handoff/shm_line.h). Mover thread only.
 *
 * Blocks given to td_push_add() are read until on_done ran for the push: their owner keeps them
 * pinned and unchanged. on_done runs exactly once per push, never before every frame that refers to
 * its blocks came back from libzmq and the peer has read, or lost the right to read, what it was
 * lent. */
#ifndef TD_HANDOFF_PUSH_H
#define TD_HANDOFF_PUSH_H

#include <stdatomic.h>
#include <stdint.h>

#include "base/err.h"
#include "engine/kv.h"
#include "handoff/shm.h"
#include "handoff/ticket.h"
#include "rpc/bulk.h"

typedef struct td_pusher td_pusher;
typedef struct td_push td_push;

typedef struct td_push_ticket {
    uint8_t id[16], decode_epoch[16];
    uint32_t attempt, generation;
    const char *endpoint;    /* copied */
    const uint8_t *kv_key;   /* 32: public key of the KV socket there; NULL: it has none. Copied */
    const uint8_t *mac_key;  /* 16: the KV link is private, and messages are authenticated; else
                              * NULL. Copied */
    const td_shm_offer *shm; /* NULL: none. Copied */
    const char *host_id;     /* of the decode worker; "": unknown */
    uint64_t credit_bytes, deadline_us;
    void *user;
} td_push_ticket;

typedef struct td_push_block {
    td_block block;
    uint32_t index, rows; /* place in the ticket's block space; 1..64 rows */
    int has_chain;
    uint8_t chain[16];
} td_push_block;

typedef struct td_push_figures {
    uint64_t bytes, transfer_us;
    uint32_t blocks;
} td_push_figures;

typedef struct td_push_ops {
    /* code: a td_code, 0 = committed and acked; reason: for people, "" when none; borrowed. */
    void (*on_done)(void *arg, void *user, uint32_t code, const char *reason,
                    const td_push_figures *figures);
    /* How blocks go to one life of a decode worker, said when it changes and when a connection that
     * had been closed is made again; NULL: nobody asks. why: of ZeroMQ, for people. fallback: 1 =
     * shared memory should have worked; -1 = and must: pushes fail. Those two are said once. */
    void (*on_transport)(void *arg, const char *endpoint, td_kv_transport transport,
                         const char *why, int fallback);
} td_push_ops;

/* Counters, readable from any thread. */
typedef struct td_push_stats {
    _Atomic uint64_t bytes, segments, commits, failed, forced_closes, drops[TD_DROP_MAX];
    _Atomic uint64_t pushes[2]; /* begun to send: over ZeroMQ, through shared memory */
    _Atomic uint64_t fallbacks; /* decode workers on this host that shared memory did not reach */
} td_push_stats;

typedef struct td_pusher_config {
    td_kv_pool *pool; /* borrowed */
    td_link *link;    /* keys; NULL: none. Outlives the pusher */
    uint8_t model_hash[32], profile_id[16], epoch[16];
    td_kv_transport transport; /* SHM: a push to a peer that it does not reach fails */
    int strict;                /* a fallback fails the push */
    char host_id[64];          /* of this host; "": unknown */
    td_push_ops ops;
    void *arg;
} td_pusher_config;

/* -ENOTSUP: the model's block layout does not fit the wire's frames. */
int td_pusher_open(const td_pusher_config *config, td_pusher **ret_pusher, td_err *reterr_err);
/* Every push ends (CANCELLED) first; waits until no frame is in flight. */
void td_pusher_close(td_pusher *p);
const td_push_stats *td_pusher_get_stats(const td_pusher *p);

/* Begin a push. 0; -EEXIST the ticket is in use; -EINVAL, -EACCES ... endpoint refused, with text;
 * -ENOMEM; -ENOBUFS too many decode workers at a time. On failure on_done does not run. */
int td_push_begin(td_pusher *p, const td_push_ticket *ticket, uint64_t now_us, td_push **ret_push,
                  td_err *reterr_err);
/* Rows that are final: index ascending over all calls of a push. Copied. -ENOMEM: the caller
 * cancels. */
int td_push_add(td_push *s, const td_push_block *blocks, uint32_t n, uint64_t now_us);
/* All blocks were added: commit when they are sent. */
int td_push_commit(td_push *s, uint32_t n_tokens, const uint32_t *choices, const uint32_t *ids,
                   uint32_t n, uint64_t now_us);
void td_push_cancel(td_push *s, uint32_t code, uint64_t now_us);

/* Append what to wait for; room for cap. Returns how many. */
uint32_t td_pusher_polls(td_pusher *p, td_bulk_poll *polls, uint32_t cap);
/* Handle acks, send what credit allows, and what is due. Call after every wait and after new work.
 */
void td_pusher_run(td_pusher *p, uint64_t now_us);
/* Soonest time td_pusher_run() has something to do without a message; UINT64_MAX = never. */
uint64_t td_pusher_due(const td_pusher *p, uint64_t now_us);

#endif
