/* SPDX-License-Identifier: Apache-2.0 */
/* A worker's mover thread without what it moves: takes the lane's messages, sees the jobs whose
 * blocks the lane wants back, waits for the KV sockets. A service embeds td_worker_mover as the
 * first member of its own mover. */
#ifndef TD_WORKER_MOVER_H
#define TD_WORKER_MOVER_H

#include <pthread.h>

#include "base/err.h"
#include "base/list.h"
#include "base/ring.h"
#include "rpc/bulk.h"
#include "worker/job.h"

enum { TD_WORKER_POLLS_MAX = 256 };

typedef struct td_worker_mover td_worker_mover;

/* All run on the mover's thread. */
typedef struct td_worker_mover_ops {
    void (*from_lane)(td_worker_mover *m, td_msg *msg);
    /* The lane dropped the job: let go of its blocks. Called each turn until the job leaves
     * m->jobs. */
    void (*drop)(td_worker_mover *m, td_worker_job *j, uint32_t code);
    /* Send and receive what is possible. 1: more is to do at once. */
    int (*run)(td_worker_mover *m, uint64_t now_us);
    uint64_t (*due)(td_worker_mover *m, uint64_t now_us); /* when to run again at the latest */
    uint32_t (*polls)(td_worker_mover *m, td_bulk_poll *polls, uint32_t max);
} td_worker_mover_ops;

struct td_worker_mover {
    const td_worker_mover_ops *ops;
    td_ring *from_lane, *to_lane;
    int core;     /* to pin to; -1 = none */
    td_list jobs; /* those whose blocks the mover has; the service adds and removes */
    pthread_t thread;
    atomic_int stop;
};

/* Starts the thread; ops, rings and core are set. */
int td_worker_mover_start(td_worker_mover *m, td_err *reterr_err);
/* Handle what the lane has sent by now. The mover's thread, also inside run(). */
void td_worker_mover_take(td_worker_mover *m);
/* After the lane has ended: returns when every job is through. */
void td_worker_mover_stop(td_worker_mover *m);

#endif
