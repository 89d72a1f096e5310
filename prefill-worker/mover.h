/* SPDX-License-Identifier: Apache-2.0 */
/* The prefill worker's mover thread: owns the KV sockets, checksums and sends what the lane has
 * finished. */
#ifndef TD_PREFILL_WORKER_MOVER_H
#define TD_PREFILL_WORKER_MOVER_H

#include "base/err.h"
#include "base/ring.h"
#include "handoff/push.h"

typedef struct td_prefill_mover td_prefill_mover;

typedef struct td_prefill_mover_config {
    td_pusher_config push; /* ops and arg are set by the mover */
    td_ring *from_lane, *to_lane;
    int core; /* to pin to; -1 = none */
} td_prefill_mover_config;

int td_prefill_mover_start(const td_prefill_mover_config *config, td_prefill_mover **ret_mover,
                           td_err *reterr_err);
/* After the lane has ended: every job is through. Joins. */
void td_prefill_mover_stop(td_prefill_mover *m);
const td_push_stats *td_prefill_mover_stats(const td_prefill_mover *m);

#endif
