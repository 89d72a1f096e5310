/* SPDX-License-Identifier: Apache-2.0 */
/* The decode worker's engine thread: owns engine and KV pool; admits as decode-worker/batch.h says,
 * grants tickets, runs one token of every running sequence a step. */
#ifndef TD_DECODE_WORKER_LANE_H
#define TD_DECODE_WORKER_LANE_H

#include "base/err.h"
#include "base/ring.h"
#include "decode-worker/batch.h"
#include "engine/engine.h"
#include "handoff/host.h"

typedef struct td_decode_lane td_decode_lane;

typedef struct td_decode_lane_config {
    td_engine *engine; /* borrowed; the lane's alone until td_decode_lane_stop() */
    td_host_load *load;
    td_decode_policy policy;
    td_ring *from_loop, *to_loop, *from_mover, *to_mover;
} td_decode_lane_config;

int td_decode_lane_start(const td_decode_lane_config *config, td_decode_lane **ret_lane,
                         td_err *reterr_err);
/* Jobs that are left end UNAVAILABLE. The mover must still run. Does not block: 1 the thread has
 * ended and l is freed, 0 read to_loop and call again. */
int td_decode_lane_stop(td_decode_lane *l);

#endif
