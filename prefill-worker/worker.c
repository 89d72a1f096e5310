/* SPDX-License-Identifier: Apache-2.0 */
#include "prefill-worker/worker.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "prefill-worker/desk.h"
#include "prefill-worker/lane.h"
#include "prefill-worker/mover.h"
#include "worker/worker.h"
#include "base/banned.h"

typedef struct prefill {
    td_worker w;
    td_prefill_desk desk;
    td_prefill_lane *lane;
    td_prefill_mover *mover;
    td_gauge *g_waiting_tokens;
    td_counter *c_bytes, *c_failed, *c_forced, *c_zmq, *c_shm, *c_fallbacks;
} prefill;

static int open_mover(td_worker *w, td_err *err)
{
    const td_model_info *info = td_engine_info(w->engine);
    td_prefill_mover_config mc = {
        .push = {.pool = td_engine_pool(w->engine),
                 .link = w->link,
                 .transport = td_kv_transport_of(td_opt_str(&w->options, TD_OPT_ID_KV_TRANSPORT)),
                 .strict = td_opt_bool(&w->options, TD_OPT_ID_STRICT)},
        .from_lane = w->lane_mover,
        .to_lane = w->mover_lane,
        .core = td_worker_first_core(w)};
    td_host_id(mc.push.host_id, sizeof mc.push.host_id);
    memcpy(mc.push.model_hash, info->model_hash, 32);
    memcpy(mc.push.profile_id, info->profile_id, 16);
    memcpy(mc.push.epoch, w->epoch, 16);
    return td_prefill_mover_start(&mc, &((prefill *)w)->mover, err);
}

static void close_mover(td_worker *w)
{
    td_prefill_mover_stop(((prefill *)w)->mover);
}

static int open_lane(td_worker *w, td_err *err)
{
    td_worker_lane_config lc = td_worker_lane_config_of(w);
    td_prefill_policy policy = {.max_rows = (uint32_t)td_opt_int(&w->options, TD_OPT_ID_CHUNK),
                                .max_seqs = (uint32_t)td_opt_int(&w->options, TD_OPT_ID_MAX_SEQS)};
    return td_prefill_lane_start(&lc, &policy, &((prefill *)w)->lane, err);
}

static int stop_lane(td_worker *w)
{
    return td_prefill_lane_stop(((prefill *)w)->lane);
}

static int open_metrics(td_worker *w, td_metrics *m)
{
    prefill *p = (prefill *)w;
    p->g_waiting_tokens =
        td_gauge_new(m, "prefill_waiting_tokens", "", "Prompt tokens not computed yet");
    p->c_bytes = td_counter_new(m, "kv_sent_bytes_total", "", "KV payload bytes sent");
    p->c_failed = td_counter_new(m, "kv_pushes_failed_total", "", "Handoffs that failed");
    p->c_forced =
        td_counter_new(m, "kv_forced_closes_total", "", "KV connections closed to get blocks back");
    p->c_zmq = td_counter_new(m, "kv_pushes_total", "transport=\"zmq\"", "Handoffs by transport");
    p->c_shm = td_counter_new(m, "kv_pushes_total", "transport=\"shm\"", "Handoffs by transport");
    p->c_fallbacks = td_counter_new(m, "kv_shm_fallbacks_total", "",
                                    "Decode workers on this host that shared memory did not reach");
    return p->g_waiting_tokens && p->c_bytes && p->c_failed && p->c_forced && p->c_zmq &&
                   p->c_shm && p->c_fallbacks
               ? 0
               : -ENOMEM;
}

static void update_metrics(td_worker *w)
{
    prefill *p = (prefill *)w;
    const td_push_stats *s = td_prefill_mover_stats(p->mover);
    td_gauge_set(p->g_waiting_tokens, (double)atomic_load(&w->host.load.waiting_tokens));
    td_worker_follow(p->c_bytes, atomic_load(&s->bytes));
    td_worker_follow(p->c_failed, atomic_load(&s->failed));
    td_worker_follow(p->c_forced, atomic_load(&s->forced_closes));
    td_worker_follow(p->c_zmq, atomic_load(&s->pushes[0]));
    td_worker_follow(p->c_shm, atomic_load(&s->pushes[1]));
    td_worker_follow(p->c_fallbacks, atomic_load(&s->fallbacks));
}

static const _Atomic uint64_t *drops(const td_worker *w)
{
    return td_prefill_mover_stats(((const prefill *)w)->mover)->drops;
}

int td_prefill_worker_main(const char *program, int argc, char **argv)
{
    static const td_worker_kind kind = {.usage = "--model DIR --control ENDPOINT",
                                        .log_name = "prefill",
                                        .sections = TD_SEC_COMMON | TD_SEC_PREFILL,
                                        .open_mover = open_mover,
                                        .open_lane = open_lane,
                                        .stop_lane = stop_lane,
                                        .close_mover = close_mover,
                                        .open_metrics = open_metrics,
                                        .update_metrics = update_metrics,
                                        .drops = drops};
    prefill *p = calloc(1, sizeof *p);
    if (!p)
        return 1;
    td_prefill_desk_init(&p->desk);
    p->w.kind = &kind;
    p->w.program = program;
    p->w.desk = &p->desk.base;
    int status = td_worker_main(&p->w, argc, argv);
    free(p);
    return status;
}
