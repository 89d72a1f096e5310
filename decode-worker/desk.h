/* SPDX-License-Identifier: Apache-2.0 */
/* The decode worker's calls: makes jobs of Reserve calls, streams tickets and tokens back, one
 * BATCH an engine step. What the router's credit does not allow is kept and coalesced (at most
 * max_tokens of a choice). Loop thread only. */
#ifndef TD_DECODE_WORKER_DESK_H
#define TD_DECODE_WORKER_DESK_H

#include "base/list.h"
#include "base/ring.h"
#include "handoff/host.h"
#include "net/loop.h"
#include "net/metrics.h"
#include "rpc/rpc.h"

enum { TD_DECODE_JOBS_MAX = 1024 };

typedef struct td_decode_desk {
    td_host *host; /* borrowed */
    td_ring *to_lane, *from_lane;
    td_list jobs, dirty;
    td_loop *loop;
    td_after after;      /* runs the desk's turn */
    td_session *session; /* NULL: no router */
    uint64_t step;
    uint32_t n_jobs, max_context;
    int draining;
    void (*on_idle)(void *arg); /* draining and no job is left */
    void (*on_dead)(void *arg); /* the engine is beyond use */
    void *arg;
    td_counter *requests, *failed; /* NULL without metrics */
} td_decode_desk;

/* td_rpc_ops.on_call; arg is the desk. */
void td_decode_desk_call(void *arg, td_call *c, td_str method, td_str message);
/* Messages from the lane: call when its ring's descriptor is readable. */
void td_decode_desk_turn(td_decode_desk *d);
/* Refuse new calls; on_idle runs when the last job has ended (now, if there is none). */
void td_decode_desk_drain(td_decode_desk *d);

#endif
