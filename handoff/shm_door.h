/* SPDX-License-Identifier: Apache-2.0 */
/* The decode worker's end of shared memory: takes prefill workers' pools and gives ranges of them
 * to read. Mover thread only.
 *
 * A pool is mapped read-only, and only if it cannot shrink under the reader (a memfd with
 * F_SEAL_SHRINK: no SIGBUS). Its bytes may change at any time: they are worth something only once
 * they were copied and the copy's CRC agrees. It lives as long as its connection: descriptors are
 * closed as soon as they are mapped, the mapping ends with the peer. At most TD_SHM_POOLS_MAX at a
 * time. */
#ifndef TD_HANDOFF_SHM_DOOR_H
#define TD_HANDOFF_SHM_DOOR_H

#include <stdatomic.h>
#include <stdint.h>
#include <sys/types.h>

#include "base/err.h"
#include "handoff/shm.h"
#include "rpc/bulk.h"

enum { TD_SHM_POOLS_MAX = 64 };

/* Why a connection was refused: counted, and told to the peer where it is one of ours. */
typedef enum td_shm_refusal {
    TD_SHM_TAKEN,
    TD_SHM_BAD_UID,
    TD_SHM_FULL, /* TD_SHM_POOLS_MAX are open */
    TD_SHM_BAD_FORMAT,
    TD_SHM_BAD_NONCE,
    TD_SHM_BAD_EPOCH, /* meant for another life of this worker */
    TD_SHM_BAD_LAYOUT,
    TD_SHM_BAD_FDS,   /* not two descriptors */
    TD_SHM_BAD_SEALS, /* not a memfd that keeps its size */
    TD_SHM_BAD_SIZE,  /* of the descriptor: not what was said */
    TD_SHM_DOUBLE,    /* this pool is open already */
    TD_SHM_NO_MEMORY, /* cannot be mapped */
    TD_SHM_TIMEOUT,   /* connected, and said nothing */
    TD_SHM_REFUSALS
} td_shm_refusal;

const char *td_shm_refusal_name(td_shm_refusal r);

typedef struct td_shm_door td_shm_door;
typedef struct td_shm_pool td_shm_pool;

/* Readable from any thread. */
typedef struct td_shm_door_stats {
    _Atomic uint64_t taken, refused[TD_SHM_REFUSALS];
    _Atomic uint32_t pools; /* open now */
} td_shm_door_stats;

typedef struct td_shm_door_config {
    const char *kv_endpoint; /* the socket lies beside it: td_shm_path() */
    uint8_t epoch[16], layout_hash[16];
    uid_t uid; /* who may come: geteuid() */
} td_shm_door_config;

/* Listen. -errno with text. */
int td_shm_door_open(const td_shm_door_config *config, td_shm_door **ret_door, td_err *reterr_err);
/* Unmaps every pool, removes the socket. NULL is fine. */
void td_shm_door_close(td_shm_door *d);
/* For tickets. Borrowed, constant. */
const td_shm_offer *td_shm_door_offer(const td_shm_door *d);
const td_shm_door_stats *td_shm_door_get_stats(const td_shm_door *d);

/* Append what to wait for. Returns how many, at most cap. */
uint32_t td_shm_door_polls(const td_shm_door *d, td_bulk_poll *polls, uint32_t cap);
/* Ends of connections first, then what arrived, then new ones. Does not block. */
void td_shm_door_run(td_shm_door *d, uint64_t now_us);
/* Soonest time td_shm_door_run() has something to do by itself; UINT64_MAX = never. */
uint64_t td_shm_door_due(const td_shm_door *d);

/* The pool that a segment names; NULL: none such. Valid until td_shm_door_run(). */
const td_shm_pool *td_shm_door_find(const td_shm_door *d, const uint8_t prefill_epoch[16],
                                    uint64_t pool);
/* bytes from offset on; NULL when they do not lie in the pool. */
const uint8_t *td_shm_pool_range(const td_shm_pool *p, uint64_t offset, uint64_t bytes);
/* 1 when its owner may have written over what was read before this call: the copy is void. */
int td_shm_pool_is_withdrawn(const td_shm_pool *p);

#endif
