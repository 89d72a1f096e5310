/* SPDX-License-Identifier: Apache-2.0 */
/* What a call on its way through a worker's three threads is in either kind of worker. A service's
 * job begins with td_worker_job, so that a pointer to the one is a pointer to the other. The loop
 * makes a job and frees it; between arrive and end the lane owns it. */
#ifndef TD_WORKER_JOB_H
#define TD_WORKER_JOB_H

#include <stdatomic.h>
#include <stdint.h>

#include "base/list.h"
#include "base/err.h"
#include "handoff/request.h"
#include "handoff/wait.h"
#include "rpc/rpc.h"

/* Kinds of td_msg that every worker has; a service's own begin at TD_WORKER_OWN. */
enum td_worker_msg {
    TD_WORKER_WAKE, /* td_msg_wake */
    TD_WORKER_ARRIVE,
    TD_WORKER_END,
    TD_WORKER_FLUSH, /* loop -> lane -> loop */
    TD_WORKER_DEAD,  /* lane -> loop: the engine is beyond use */
    TD_WORKER_OWN
};

typedef struct td_worker_msg_of {
    td_msg head;
    void *job; /* the service's */
} td_worker_msg_of;

typedef struct td_worker_flush {
    td_msg head;
    td_call *call;
    uint32_t blocks;
} td_worker_flush;

typedef struct td_worker_job {
    td_worker_msg_of arrive, end; /* set by the desk */
    _Atomic uint32_t cancel;      /* td_code; loop -> lane */
    _Atomic uint32_t drop;        /* td_code; lane -> mover: let go of its blocks */

    /* loop; read-only for the others */
    td_list loop_node;
    td_call *call;
    td_request request;
    uint32_t attempt;
    uint64_t arrived_us, deadline_us;

    /* lane */
    td_list lane_node;
    uint32_t code; /* td_code at end */
    td_error error;
    char text[200];

    /* mover */
    td_list mover_node;
} td_worker_job;

/* How the job ends, unless that was said before. Lane thread. */
void td_worker_job_set_end(td_worker_job *j, uint32_t code, td_error error, const char *text);

#endif
