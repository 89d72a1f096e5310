/* SPDX-License-Identifier: Apache-2.0 */
/* The prefill worker's calls: makes jobs of Prefill calls, answers them when the lane has. Loop
 * thread only. */
#ifndef TD_PREFILL_WORKER_DESK_H
#define TD_PREFILL_WORKER_DESK_H

#include "base/list.h"
#include "base/ring.h"
#include "handoff/host.h"
#include "net/loop.h"
#include "net/metrics.h"
#include "rpc/rpc.h"

enum { TD_PREFILL_JOBS_MAX = 1024 };

typedef struct td_prefill_desk {
    td_host *host; /* borrowed */
    td_ring *to_lane, *from_lane;
    td_list jobs;
    uint32_t n_jobs, max_context;
    int draining;
    void (*on_idle)(void *arg); /* draining and no job is left */
    void (*on_dead)(void *arg); /* the engine is beyond use */
    void *arg;
    td_counter *requests, *failed; /* NULL without metrics */
} td_prefill_desk;

/* td_rpc_ops.on_call; arg is the desk. */
void td_prefill_desk_call(void *arg, td_call *c, td_str method, td_str message);
/* Messages from the lane: call when its ring's descriptor is readable. */
void td_prefill_desk_turn(td_prefill_desk *d);
/* Refuse new calls; on_idle runs when the last job has ended (now, if there is none). */
void td_prefill_desk_drain(td_prefill_desk *d);

#endif
