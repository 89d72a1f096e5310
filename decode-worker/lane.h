/* SPDX-License-Identifier: Apache-2.0 */
/* The decode worker's engine thread: owns engine and KV pool; admits as decode-worker/batch.h says,
 * grants tickets, runs one token of every running sequence a step, and with them a chunk of the
 * prompts that it prefills by itself. On a device it is a step behind (engine.h): a step is laid
 * out while the one before runs, and its tokens leave while the next one does. */
#ifndef TD_DECODE_WORKER_LANE_H
#define TD_DECODE_WORKER_LANE_H

#include "decode-worker/batch.h"
#include "worker/lane.h"

typedef struct td_decode_lane td_decode_lane;

int td_decode_lane_start(const td_worker_lane_config *config, const td_decode_policy *policy,
                         td_decode_lane **ret_lane, td_err *reterr_err);
/* As td_worker_lane_stop(); at 1, l is freed. */
int td_decode_lane_stop(td_decode_lane *l);

/* Steps of a device that were queued while the one before ran, and those that were not: the first
 * ones, and where the host had to know something first. Any thread. */
uint64_t td_decode_lane_steps_ahead(const td_decode_lane *l);
uint64_t td_decode_lane_steps_waited(const td_decode_lane *l);
/* Prompt tokens prefilled here since the start; any thread. */
uint64_t td_decode_lane_local_tokens(const td_decode_lane *l);

#endif
