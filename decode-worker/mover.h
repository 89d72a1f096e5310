/* SPDX-License-Identifier: Apache-2.0 */
/* The decode worker's mover thread: owns the KV socket, checks and copies what arrives into
 * RESERVED blocks. */
#ifndef TD_DECODE_WORKER_MOVER_H
#define TD_DECODE_WORKER_MOVER_H

#include "base/err.h"
#include "base/ring.h"
#include "handoff/receive.h"

enum { TD_DECODE_CREDIT_BYTES = 16 << 20 }; /* of a ticket: payload that may be on the way */

typedef struct td_decode_mover td_decode_mover;

typedef struct td_decode_mover_config {
    td_receive_config receive; /* ops and arg are set by the mover */
    td_ring *from_lane, *to_lane;
    int core; /* to pin to; -1 = none */
} td_decode_mover_config;

/* Binds the KV socket, then starts the thread. */
int td_decode_mover_start(const td_decode_mover_config *config, td_decode_mover **ret_mover,
                          td_err *reterr_err);
/* After the lane has ended: every grant is settled. Joins. */
void td_decode_mover_stop(td_decode_mover *m);
const char *td_decode_mover_endpoint(const td_decode_mover *m);
/* As td_receive_door(), td_receive_no_door(). */
const td_shm_door *td_decode_mover_door(const td_decode_mover *m);
const char *td_decode_mover_no_door(const td_decode_mover *m);
const td_receive_stats *td_decode_mover_stats(const td_decode_mover *m);

#endif
