/* SPDX-License-Identifier: Apache-2.0 */
/* The decode worker's engine thread: owns engine and KV pool; admits as decode-worker/batch.h says,
 * grants tickets, runs one token of every running sequence a step, and with them a chunk of the
 * prompts that it prefills by itself. */
#ifndef TD_DECODE_WORKER_LANE_H
#define TD_DECODE_WORKER_LANE_H

#include "decode-worker/batch.h"
#include "worker/lane.h"

typedef struct td_decode_lane td_decode_lane;

int td_decode_lane_start(const td_worker_lane_config *config, const td_decode_policy *policy,
                         td_decode_lane **ret_lane, td_err *reterr_err);
/* As td_worker_lane_stop(); at 1, l is freed. */
int td_decode_lane_stop(td_decode_lane *l);

/* Prompt tokens prefilled here since the start; any thread. */
uint64_t td_decode_lane_local_tokens(const td_decode_lane *l);

#endif
