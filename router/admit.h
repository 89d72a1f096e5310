/* SPDX-License-Identifier: Apache-2.0 */
/* The router's waiting room: bounded, first come first served inside a tenant and priority, tenants
 * in turn, higher priority first; requests that already run somewhere and must move wait in front
 * of all. Pure, no allocation after init: entries are embedded in the caller's requests. */
#ifndef TD_ROUTER_ADMIT_H
#define TD_ROUTER_ADMIT_H

#include <stdint.h>

#include "base/list.h"
#include "base/rand.h"

enum { TD_ADMIT_BANDS = 3, TD_ADMIT_RETRY_MIN_MS = 1000, TD_ADMIT_RETRY_MAX_MS = 30000 };

typedef struct td_admit_entry {
    td_list link; /* in its tenant's line, or in the line of moved requests */
    struct td_admit_tenant *line;
    int queued;
    uint64_t tenant;     /* hash of the tenant's name */
    int priority;        /* < 0 low, 0 normal, > 0 high */
    uint64_t expires_us; /* leaves the queue then */
    uint64_t not_before_us;
} td_admit_entry;

typedef struct td_admit {
    td_list moved;
    td_list bands[TD_ADMIT_BANDS]; /* lines of tenants, next in turn first */
    td_list spare;
    struct td_admit_tenant *lines;
    uint32_t max, n, n_moved;
    td_rng rng;
} td_admit;

/* max: entries that may wait. seed: of the retry jitter. 0 or -ENOMEM. */
int td_admit_init(td_admit *a, uint32_t max, uint64_t seed);
void td_admit_done(td_admit *a);

/* Queue a new request. The entry's tenant, priority and expires_us are set by the caller. 0, or
 * -ENOSPC when full. */
int td_admit_push(td_admit *a, td_admit_entry *e);
/* Queue a request that must move; never refused (it was admitted once). */
void td_admit_push_moved(td_admit *a, td_admit_entry *e);
/* Leave; harmless when not queued. Keeps the tenant's turn. */
void td_admit_remove(td_admit *a, td_admit_entry *e);
/* The request whose turn it is, or NULL. Ones that are not due yet (not_before_us) let others pass.
 * It stays queued. */
td_admit_entry *td_admit_next(td_admit *a, uint64_t now_us);
/* Served: leave, and the tenant goes to the end of the turn. */
void td_admit_take(td_admit *a, td_admit_entry *e);
/* Moved requests, each of which may be placed on its own: the one behind prev (NULL: the first), or
 * NULL. */
td_admit_entry *td_admit_moved_after(td_admit *a, td_admit_entry *prev, uint64_t now_us);
/* One queued entry that has expired, or NULL. It stays queued: remove it. */
td_admit_entry *td_admit_expired(td_admit *a, uint64_t now_us);
/* When the next entry expires or comes due; UINT64_MAX when none. */
uint64_t td_admit_wake_us(const td_admit *a, uint64_t now_us);
/* How long a refused client should wait, milliseconds, 1..30 s: longer when the queue is fuller,
 * and jittered. */
uint32_t td_admit_retry_ms(td_admit *a);
/* Entries in the queue, moved ones included. */
uint32_t td_admit_len(const td_admit *a);

#endif
