/* SPDX-License-Identifier: Apache-2.0 */
/* A small pool of pinned threads under the lane. Work is cut into items that any thread may take,
 * so a result may depend on its item only. Each thread goes through its own run of items in order,
 * then takes the others' from their ends. Idle threads spin 20 microseconds, then sleep on a futex;
 * the caller, waiting for the last items, 200. Where threads are pinned, one that waits changes
 * places with one that has work and gets no time on its core. */
#ifndef TD_KERNELS_REF_POOL_H
#define TD_KERNELS_REF_POOL_H

#include <stdint.h>

typedef struct td_pool td_pool;

/* n_threads >= 1, the caller is thread 0. cores NULL: no pinning. 0, -ENOMEM, -EAGAIN. */
int td_pool_open(uint32_t n_threads, const int *cores, uint32_t n_cores, td_pool **ret_pool);
void td_pool_close(td_pool *p);
uint32_t td_pool_threads(const td_pool *p);

/* Call fn(arg, item, thread) once for each item of 0..n_items-1; returns when all are done. */
typedef void (*td_pool_fn)(void *arg, uint32_t item, uint32_t thread);
void td_pool_run(td_pool *p, td_pool_fn fn, void *arg, uint32_t n_items);

#endif
