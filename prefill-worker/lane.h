/* SPDX-License-Identifier: Apache-2.0 */
/* The prefill worker's engine thread: owns engine, KV pool and queue; runs steps as
 * prefill-worker/batch.h says, hands finished rows to the mover, samples first tokens. */
#ifndef TD_PREFILL_WORKER_LANE_H
#define TD_PREFILL_WORKER_LANE_H

#include "prefill-worker/batch.h"
#include "worker/lane.h"

typedef struct td_prefill_lane td_prefill_lane;

int td_prefill_lane_start(const td_worker_lane_config *config, const td_prefill_policy *policy,
                          td_prefill_lane **ret_lane, td_err *reterr_err);
/* As td_worker_lane_stop(); at 1, l is freed. */
int td_prefill_lane_stop(td_prefill_lane *l);

#endif
