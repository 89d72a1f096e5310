/* SPDX-License-Identifier: Apache-2.0 */
/* The prefill worker's calls: makes jobs of Prefill calls, answers them when the lane has. Loop
 * thread only. */
#ifndef TD_PREFILL_WORKER_DESK_H
#define TD_PREFILL_WORKER_DESK_H

#include "worker/desk.h"

typedef struct td_prefill_desk {
    td_worker_desk base;
} td_prefill_desk;

/* The service's part; the rest of d is zero. */
void td_prefill_desk_init(td_prefill_desk *d);

#endif
