/* SPDX-License-Identifier: Apache-2.0 */
/* The decode worker's calls: makes jobs of Reserve calls, streams tickets and tokens back, one
 * BATCH an engine step. What the router's credit does not allow is kept and coalesced (at most
 * max_tokens of a choice). Loop thread only. */
#ifndef TD_DECODE_WORKER_DESK_H
#define TD_DECODE_WORKER_DESK_H

#include "net/loop.h"
#include "worker/desk.h"

typedef struct td_decode_desk {
    td_worker_desk base;
    td_list dirty;  /* jobs with something to send, or ended */
    td_loop **loop; /* borrowed; there when calls come */
    td_after after; /* runs the desk's turn */
    uint64_t step;
} td_decode_desk;

/* The service's part; the rest of d is zero. */
void td_decode_desk_init(td_decode_desk *d, td_loop **loop);

#endif
