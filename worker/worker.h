/* SPDX-License-Identifier: Apache-2.0 */
/* The frame of a worker process: options, model, engine, rings between its three threads, the
 * connection to the router, metrics, readiness and an orderly end. What a kind of worker adds is in
 * td_worker_kind; it embeds td_worker as the first member of its own state.
 *
 * Order of a start: keys, engine, rings, mover, HELLO, lane, metrics, router. An end goes the other
 * way: the lane ends every job first, then the mover, then the connection. Loop thread. */
#ifndef TD_WORKER_WORKER_H
#define TD_WORKER_WORKER_H

#include "base/options.h"
#include "base/strbuf.h"
#include "engine/device.h"
#include "engine/engine.h"
#include "engine/tuned.h"
#include "handoff/host.h"
#include "handoff/ticket.h"
#include "net/http.h"
#include "net/loop.h"
#include "net/metrics.h"
#include "net/service.h"
#include "rpc/rpc.h"
#include "worker/desk.h"
#include "worker/lane.h"

enum { TD_WORKER_CORES_MAX = 1024 };

typedef struct td_worker td_worker;

typedef struct td_worker_kind {
    const char *usage, *log_name; /* usage: without the program */
    uint32_t sections;            /* TD_SEC_ */
    int decode;                   /* role in HELLO */
    uint32_t extra_seqs; /* that a step can hold besides --max-seqs running ones; then also --chunk
                            rows besides those */
    int (*open_mover)(td_worker *w, td_err *err);   /* starts it */
    const char *(*kv_endpoint)(const td_worker *w); /* for HELLO; NULL function: none */
    /* Behind open_mover; NULL, or a function that returns it: no shared memory is offered. */
    const td_shm_offer *(*shm_offer)(const td_worker *w);
    int (*open_lane)(td_worker *w, td_err *err); /* starts it */
    int (*stop_lane)(td_worker *w);              /* as td_worker_lane_stop(), and frees */
    void (*close_mover)(td_worker *w);           /* after the lane; also when none was opened */
    int (*open_metrics)(td_worker *w, td_metrics *m); /* -ENOMEM */
    void (*update_metrics)(td_worker *w);
    const _Atomic uint64_t *(*drops)(const td_worker *w); /* [TD_DROP_MAX] */
} td_worker_kind;

struct td_worker {
    const td_worker_kind *kind;
    const char *program;  /* as it was typed */
    td_worker_desk *desk; /* the service's; its ops are set */
    td_options options;
    td_loop *loop;
    td_service *service;
    td_device *device;
    td_tuning *tuning; /* NULL on a CPU */
    size_t n_untuned;  /* named in the log so far */
    td_model *model;
    td_engine *engine;
    td_ring *loop_lane, *lane_loop, *lane_mover, *mover_lane;
    int lane_open;
    td_host host;
    td_link *link;
    td_rpc *rpc;
    td_io *lane_io;
    td_http_server *http;
    td_metrics *metrics;
    td_gauge *g_running, *g_waiting, *g_free, *g_up;
    td_timer *alone; /* from ready until a router was met, or its absence told */
    td_counter *c_tokens, *c_untuned;
    uint8_t epoch[16]; /* drawn before the mover starts: tickets and frames name it */
    int cores[TD_WORKER_CORES_MAX];
    uint32_t n_cores;
    uint64_t seen_step, seen_us;
    int status;
};

/* Run the service until SIGTERM; w is zeroed but for kind and desk. argv without the program's own
 * name. Returns the exit status. */
int td_worker_main(td_worker *w, int argc, char **argv);

/* For the service: */

/* The lane and the mover count; the registry follows. */
void td_worker_follow(td_counter *c, uint64_t v);
/* The core that loop and mover share; -1: none given. */
int td_worker_first_core(const td_worker *w);
/* What the lane of either kind needs. */
td_worker_lane_config td_worker_lane_config_of(td_worker *w);

#endif
