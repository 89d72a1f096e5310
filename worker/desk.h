/* SPDX-License-Identifier: Apache-2.0 */
/* A worker's calls: makes a job of each call that its kind of worker serves, answers those that
 * every worker serves (Abort, FlushCache, Drain and what handoff/host.h answers). A service embeds
 * td_worker_desk as the first member of its own desk and fills what is said below. Loop thread
 * only. */
#ifndef TD_WORKER_DESK_H
#define TD_WORKER_DESK_H

#include <protobuf-c/protobuf-c.h>

#include "base/list.h"
#include "base/log.h"
#include "base/ring.h"
#include "handoff/host.h"
#include "net/metrics.h"
#include "rpc/rpc.h"
#include "worker/job.h"

enum { TD_WORKER_JOBS_MAX = 1024 };

typedef struct td_worker_desk td_worker_desk;

typedef struct td_worker_desk_ops {
    const char *method;    /* the call that becomes a job */
    const char *no_method; /* what a caller of an unknown one is told */
    /* A zeroed job with the service's part made ready; NULL: out of memory. */
    td_worker_job *(*job_new)(void);
    /* Unpack the message; set request and attempt of the job, and shorten deadline_us where the
     * message says so. Negative errno with text refuses the call. */
    int (*job_read)(td_worker_desk *d, td_worker_job *j, td_str message, td_err *err);
    void (*job_free)(td_worker_job *j);
    void (*on_cancel)(td_worker_desk *d,
                      td_worker_job *j);          /* the flag is set already; NULL: none */
    void (*on_credit)(void *arg, td_call *c);     /* arg: the desk; NULL: the call never waits */
    void (*on_msg)(td_worker_desk *d, td_msg *m); /* from the lane, but flush and dead */
    void (*on_turn)(td_worker_desk *d); /* every message of a turn is taken; NULL: nothing to do */
} td_worker_desk_ops;

struct td_worker_desk {
    const td_worker_desk_ops *ops; /* the service */
    /* the frame (worker/worker.h) */
    td_host *host; /* borrowed */
    td_ring *to_lane, *from_lane;
    td_session *session; /* NULL: no router */
    uint32_t max_context;
    void (*on_idle)(void *arg); /* draining and no job is left */
    void (*on_dead)(void *arg); /* the engine is beyond use */
    void *arg;
    td_counter *requests, *failed; /* the service; NULL without metrics */
    /* the desk */
    td_list jobs;
    uint32_t n_jobs;
    int draining;
};

/* td_rpc_ops.on_call, but for arg. */
void td_worker_desk_call(td_worker_desk *d, td_call *c, td_str method, td_str message);
/* Messages from the lane: call when its ring's descriptor is readable. */
void td_worker_desk_turn(td_worker_desk *d);
/* Refuse new calls; on_idle runs when the last job has ended (now, if there is none). */
void td_worker_desk_drain(td_worker_desk *d);

/* For the service: */

/* Ask the lane to end the job. */
void td_worker_desk_cancel(td_worker_desk *d, td_worker_job *j, uint32_t code);
/* The lane has ended the job and all its answers are sent: log and count why it failed, if it did,
 * as `event` (level RESOURCE_EXHAUSTED has is `full`, for a worker that is merely full), send the
 * STATUS, free the job. */
void td_worker_desk_end(td_worker_desk *d, td_worker_job *j, const char *event, td_log_level full);
/* A protobuf bytes field that borrows p. */
ProtobufCBinaryData td_worker_bin(const void *p, size_t n);

#endif
