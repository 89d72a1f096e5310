/* SPDX-License-Identifier: Apache-2.0 */
/* The decode worker's end of the KV socket: takes segments, checks them against their tickets
 * (handoff/ticket.h), copies each payload frame, or range of a pool that the sender shares
 * (handoff/shm_door.h), once into its block with the CRC fused, answers with credit. Mover thread
 * only.
 *
 * A granted block is RESERVED: the mover may write it, its owner keeps a reference but neither
 * reads nor frees it until exactly one of on_deliver and on_release ran for the grant. */
#ifndef TD_HANDOFF_RECEIVE_H
#define TD_HANDOFF_RECEIVE_H

#include <stdatomic.h>
#include <stdint.h>

#include "base/err.h"
#include "engine/kv.h"
#include "handoff/shm_door.h"
#include "handoff/ticket.h"
#include "rpc/bulk.h"

typedef struct td_receive td_receive;

typedef struct td_receive_block {
    td_block block;
    td_in_block expect; /* rows 0: held, block unused */
} td_receive_block;

typedef struct td_receive_grant {
    uint8_t ticket[16];
    const uint8_t *mac_key; /* 16, copied: on a private link; NULL elsewhere */
    uint32_t attempt, generation;
    const td_receive_block *blocks; /* the ticket's block space; copied */
    uint32_t n_blocks;
    const td_in_first *first; /* copied */
    uint32_t n_first, n_tokens;
    uint64_t credit_bytes, deadline_us;
    void *user;
} td_receive_grant;

typedef struct td_receive_figures {
    uint64_t bytes, transfer_us; /* payload; first frame to commit */
    uint32_t blocks;
} td_receive_figures;

typedef struct td_receive_ops {
    /* Every row is verified and the commit accepted: ids[i] is the first token of first[i].choice.
     */
    void (*on_deliver)(void *arg, void *user, const uint32_t *ids, uint32_t n,
                       const td_receive_figures *figures);
    /* The ticket failed: code is a td_code, why names the refused frame (TD_DROP_NONE: deadline or
     * cancel). */
    void (*on_release)(void *arg, void *user, uint32_t code, td_drop why);
    /* A frame names a ticket that is not granted. Its sender may have been faster than our own
     * queue: grants that wait there are to be added now. NULL: there are none. */
    void (*on_unknown)(void *arg);
    /* These blocks of a grant have all their rows and are not written any more; nobody may rely on
     * them before on_deliver. Each once. NULL: nobody asks. */
    void (*on_blocks)(void *arg, void *user, const td_block *blocks, uint32_t n);
} td_receive_ops;

/* Counters, readable from any thread. */
typedef struct td_receive_stats {
    _Atomic uint64_t bytes, segments, commits, drops[TD_DROP_MAX];
    _Atomic uint64_t shm_bytes; /* of bytes: through shared memory */
} td_receive_stats;

typedef struct td_receive_config {
    const char *endpoint;
    td_kv_pool *pool; /* borrowed */
    td_link *link;    /* keys; NULL: none. Outlives the receiver. Its KV door may be private: then
                       * every message must be authentic (rpc/mac.h) before it is looked at */
    uint8_t model_hash[32], profile_id[16], epoch[16];
    td_kv_transport transport; /* SHM: segments with payload are refused */
    int strict;                /* AUTO without a door is an error */
    td_receive_ops ops;
    void *arg;
} td_receive_config;

/* Bind. -ENOTSUP: the model's block layout does not fit the wire's frames. May be called on another
 * thread before the mover starts. A door for shared memory that cannot be opened is an error when
 * it is asked for, or strict; else there is none, and td_receive_no_door() says why. */
int td_receive_open(const td_receive_config *config, td_receive **ret_receive, td_err *reterr_err);
/* Every open grant is released (CANCELLED) first. */
void td_receive_close(td_receive *r);
const char *td_receive_endpoint(const td_receive *r);
const td_receive_stats *td_receive_get_stats(const td_receive *r);

/* 0; -ENOMEM; -EEXIST. */
int td_receive_grant_add(td_receive *r, const td_receive_grant *grant, uint64_t now_us);
/* Fence a ticket: on_release runs inside unless it has ended already. */
void td_receive_cancel(td_receive *r, const uint8_t ticket[16], uint32_t code, uint64_t now_us);

/* The door for shared memory: its offer is for tickets. NULL: there is none. */
const td_shm_door *td_receive_door(const td_receive *r);
/* Why there is none although it was wanted; "" otherwise. Borrowed. */
const char *td_receive_no_door(const td_receive *r);

/* The KV socket. */
td_bulk *td_receive_bulk(td_receive *r);
/* Append what to wait for; room for cap. Returns how many. */
uint32_t td_receive_polls(td_receive *r, td_bulk_poll *polls, uint32_t cap);
/* Handle what has arrived and what is due; at most some messages, so that cancels are seen: returns
 * 1 when more wait. */
int td_receive_run(td_receive *r, uint64_t now_us);
/* Soonest time td_receive_run() has something to do without a message; UINT64_MAX = never. */
uint64_t td_receive_due(const td_receive *r);

#endif
