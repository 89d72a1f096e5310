/* SPDX-License-Identifier: Apache-2.0 */
/* Which prompt tokens a prefill step computes. Pure: a function of the queue's picture; no clock,
 * no allocation.
 *
 * First come, first served: the step's rows go to the oldest job until its prompt is computed, what
 * is left to the next ones, so that short prompts behind a long one fill its last chunk but never
 * delay it. A job starts only when every block it will ever need can be had at once: it takes those
 * of its first timeline and is promised the others, so that no two jobs hold some and wait for each
 * other's. None that has not started overtakes the first job that waits for blocks; who has started
 * goes on. The tokens of a job do not depend on how it was cut (promise 1). */
#ifndef TD_PREFILL_WORKER_BATCH_H
#define TD_PREFILL_WORKER_BATCH_H

#include <stdint.h>

typedef struct td_prefill_policy {
    uint32_t max_rows; /* prompt tokens in one step, all jobs together (--chunk); >= 1 */
    uint32_t max_seqs; /* jobs in one step; >= 1 */
} td_prefill_policy;

/* One queued job, oldest first. */
typedef struct td_prefill_view {
    uint64_t
        n_left; /* tokens still to compute; 0: nothing to do in this step (it waits for its push) */
    uint32_t blocks_needed; /* not started: blocks that it takes or is promised when it starts */
    int started;
} td_prefill_view;

typedef struct td_prefill_pick {
    uint32_t job;      /* index into the views */
    uint32_t n_tokens; /* >= 1 */
} td_prefill_pick;

/* n views; blocks_free: what the pool can give now and nobody was promised. ret_picks has room for
 * max_seqs. Jobs that are picked and not started are to be started by the caller, in pick order;
 * one that cannot start after all is skipped with all behind it. Returns the number of picks. */
uint32_t td_prefill_plan(const td_prefill_policy *p, const td_prefill_view *views, uint32_t n,
                         uint64_t blocks_free, td_prefill_pick *ret_picks);

#endif
