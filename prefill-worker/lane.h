/* SPDX-License-Identifier: Apache-2.0 */
/* The prefill worker's engine thread: owns engine, KV pool and queue; runs steps as
 * prefill-worker/batch.h says, hands finished rows to the mover, samples first tokens. */
#ifndef TD_PREFILL_WORKER_LANE_H
#define TD_PREFILL_WORKER_LANE_H

#include "base/err.h"
#include "base/ring.h"
#include "engine/engine.h"
#include "handoff/host.h"
#include "prefill-worker/batch.h"

typedef struct td_prefill_lane td_prefill_lane;

typedef struct td_prefill_lane_config {
    td_engine *engine; /* borrowed; the lane's alone until td_prefill_lane_stop() */
    td_host_load *load;
    td_prefill_policy policy;
    td_ring *from_loop, *to_loop, *from_mover, *to_mover;
} td_prefill_lane_config;

int td_prefill_lane_start(const td_prefill_lane_config *config, td_prefill_lane **ret_lane,
                          td_err *reterr_err);
/* Jobs that are left end UNAVAILABLE. The mover must still run. Does not block: 1 the thread has
 * ended and l is freed, 0 read to_loop and call again. */
int td_prefill_lane_stop(td_prefill_lane *l);

#endif
