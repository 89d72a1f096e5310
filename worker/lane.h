/* SPDX-License-Identifier: Apache-2.0 */
/* A worker's engine thread without what it computes: takes messages, sees flags, calls the service
 * for one step after another, sleeps when there is nothing to do. A service embeds td_worker_lane
 * as the first member of its own lane. */
#ifndef TD_WORKER_LANE_H
#define TD_WORKER_LANE_H

#include <pthread.h>

#include "base/err.h"
#include "base/list.h"
#include "base/ring.h"
#include "engine/engine.h"
#include "handoff/host.h"
#include "worker/job.h"

typedef struct td_worker_lane td_worker_lane;

/* All run on the lane's thread. */
typedef struct td_worker_lane_ops {
    /* A job came and is in l->jobs. Negative errno with text fails it. */
    int (*arrive)(td_worker_lane *l, td_worker_job *j, td_err *err);
    void (*from_mover)(td_worker_lane *l, td_msg *m);
    /* End a job before its time: td_worker_lane_finish() at once, or when the mover has let go. */
    void (*fail)(td_worker_lane *l, td_worker_job *j, uint32_t code, td_error error,
                 const char *text);
    /* A job that neither ends nor was dropped, each turn; NULL: nothing to see. */
    void (*see)(td_worker_lane *l, td_worker_job *j);
    /* Plan and run one step; how many sequences were in it, 0: nothing to do. */
    uint32_t (*step)(td_worker_lane *l);
    void (*free_job)(td_worker_lane *l, td_worker_job *j); /* sequences and blocks */
} td_worker_lane_ops;

typedef struct td_worker_lane_config {
    td_engine *engine; /* borrowed; the lane's alone until td_worker_lane_stop() */
    td_host_load *load;
    td_ring *from_loop, *to_loop, *from_mover, *to_mover;
} td_worker_lane_config;

struct td_worker_lane {
    const td_worker_lane_ops *ops;
    td_worker_lane_config c;
    td_kv_pool *pool;
    td_list jobs;                /* oldest first */
    uint32_t n_jobs, n_reserved; /* n_reserved: blocks of tickets that are not settled */
    uint64_t n_steps;
    uint32_t bad_steps;
    int must_look; /* set by step(): something ends without a message, so do not sleep for long */
    int have_known;
    uint32_t known_id; /* a first id that a step has computed */
    pthread_t thread;
    atomic_int stop;
};

/* Starts the thread; l is zeroed but for the service's part. */
int td_worker_lane_start(td_worker_lane *l, const td_worker_lane_ops *ops,
                         const td_worker_lane_config *config, td_err *reterr_err);
/* Jobs that are left end UNAVAILABLE. The mover must still run. Does not block: 1 the thread has
 * ended, 0 read to_loop and call again. */
int td_worker_lane_stop(td_worker_lane *l);

/* For the service, on the lane's thread: */

/* Publish free and reserved blocks; before a message leaves, so that who has heard of a ticket or
 * an end sees it in the load too. */
void td_worker_lane_note_blocks(td_worker_lane *l);
/* The job's last: gives back what it holds, tells the loop. */
void td_worker_lane_finish(td_worker_lane *l, td_worker_job *j);
/* Run one step of n items, samples as td_engine_step() wants them. A step that fails is run again
 * item by item: the tokens of an item are the same alone, and so the failure is told only to those
 * whose it is. ret_bad[i]: item i failed (end its job with TD_WORKER_BAD_STEP), its samples are
 * undefined. Returns how many did not fail; call td_worker_lane_count() when that is not 0.
 *
 * When all failed and the engine no longer computes what it has computed before, several times in a
 * row, the process ends, for the supervisor to start a new one: a request that cannot be computed
 * does not end it. */
uint32_t td_worker_lane_run(td_worker_lane *l, const td_step_item *items, uint32_t n,
                            td_sample *samples, uint8_t *ret_bad);
/* The same for the step that was begun first (td_engine_begin()), with its items; of those whose
 * sequence was freed since, seq is NULL: they do not fail, and their samples are undefined. When
 * the step failed nothing is begun any more. */
uint32_t td_worker_lane_end(td_worker_lane *l, const td_step_item *items, uint32_t n,
                            td_sample *samples, uint8_t *ret_bad);
/* A step has made so many tokens. */
void td_worker_lane_count(td_worker_lane *l, uint64_t n_tokens);
#define TD_WORKER_BAD_STEP "the engine failed in this request's step"

#endif
