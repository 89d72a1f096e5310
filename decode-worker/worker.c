/* SPDX-License-Identifier: Apache-2.0 */
#include "decode-worker/worker.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "decode-worker/desk.h"
#include "decode-worker/lane.h"
#include "decode-worker/mover.h"
#include "worker/worker.h"
#include "base/banned.h"

typedef struct decode {
    td_worker w;
    td_decode_desk desk;
    td_decode_lane *lane;
    td_decode_mover *mover;
    td_gauge *g_reserved;
    td_counter *c_bytes, *c_local, *c_ahead, *c_waited;
    td_gauge *g_pools;
    td_counter *c_shm_bytes, *c_shm_refused[TD_SHM_REFUSALS];
} decode;

static int open_mover(td_worker *w, td_err *err)
{
    const td_model_info *info = td_engine_info(w->engine);
    td_decode_mover_config mc = {
        .receive = {.endpoint = td_opt_str(&w->options, TD_OPT_ID_KV_LISTEN),
                    .pool = td_engine_pool(w->engine),
                    .link = w->link,
                    .transport =
                        td_kv_transport_of(td_opt_str(&w->options, TD_OPT_ID_KV_TRANSPORT)),
                    .strict = td_opt_bool(&w->options, TD_OPT_ID_STRICT)},
        .from_lane = w->lane_mover,
        .to_lane = w->mover_lane,
        .core = td_worker_first_core(w)};
    memcpy(mc.receive.model_hash, info->model_hash, 32);
    memcpy(mc.receive.profile_id, info->profile_id, 16);
    memcpy(mc.receive.epoch, w->epoch, 16);
    decode *d = (decode *)w;
    int r = td_decode_mover_start(&mc, &d->mover, err);
    if (r == 0 && *td_decode_mover_no_door(d->mover))
        td_log(TD_LOG_WARN, "kv_shm_off", "why=\"%s\"", td_decode_mover_no_door(d->mover));
    return r;
}

static const td_shm_offer *shm_offer(const td_worker *w)
{
    const td_shm_door *door = td_decode_mover_door(((const decode *)w)->mover);
    return door ? td_shm_door_offer(door) : NULL;
}

static void close_mover(td_worker *w)
{
    decode *d = (decode *)w;
    if (w->loop)
        td_loop_after_del(w->loop, &d->desk.after);
    td_decode_mover_stop(d->mover);
}

static const char *kv_endpoint(const td_worker *w)
{
    return td_decode_mover_endpoint(((const decode *)w)->mover);
}

static int open_lane(td_worker *w, td_err *err)
{
    td_worker_lane_config lc = td_worker_lane_config_of(w);
    uint32_t max_seqs = (uint32_t)td_opt_int(&w->options, TD_OPT_ID_MAX_SEQS);
    td_decode_policy policy = {.max_seqs = max_seqs,
                               /* half of them may wait for their prompts */
                               .max_admitted = 2 * max_seqs,
                               .n_blocks = w->host.kv_blocks,
                               .max_context = w->desk->max_context,
                               .local_rows = (uint32_t)td_opt_int(&w->options, TD_OPT_ID_CHUNK)};
    return td_decode_lane_start(&lc, &policy, &((decode *)w)->lane, err);
}

static int stop_lane(td_worker *w)
{
    return td_decode_lane_stop(((decode *)w)->lane);
}

/* How many prefill workers lend their pools, and who was turned away. */
static int open_shm_metrics(decode *d, td_metrics *m)
{
    char label[48];
    d->g_pools = td_gauge_new(m, "kv_shm_pools", "", "Pools of prefill workers that are mapped");
    d->c_shm_bytes = td_counter_new(m, "kv_received_shm_bytes_total", "",
                                    "KV payload bytes taken through shared memory");
    int ok = d->g_pools && d->c_shm_bytes;
    for (int i = TD_SHM_TAKEN + 1; i < TD_SHM_REFUSALS; i++) {
        snprintf(label, sizeof label, "reason=\"%s\"", td_shm_refusal_name((td_shm_refusal)i));
        d->c_shm_refused[i] = td_counter_new(m, "kv_shm_refused_total", label,
                                             "Connections for shared memory that were refused");
        ok = ok && d->c_shm_refused[i];
    }
    return ok ? 0 : -ENOMEM;
}

static void update_shm_metrics(decode *d)
{
    const td_shm_door *door = td_decode_mover_door(d->mover);
    td_worker_follow(d->c_shm_bytes, atomic_load(&td_decode_mover_stats(d->mover)->shm_bytes));
    if (!door)
        return;
    const td_shm_door_stats *s = td_shm_door_get_stats(door);
    td_gauge_set(d->g_pools, atomic_load(&s->pools));
    for (int i = TD_SHM_TAKEN + 1; i < TD_SHM_REFUSALS; i++)
        td_worker_follow(d->c_shm_refused[i], atomic_load(&s->refused[i]));
}

static int open_metrics(td_worker *w, td_metrics *m)
{
    decode *d = (decode *)w;
    d->g_reserved = td_gauge_new(m, "kv_reserved_blocks", "", "KV blocks of open tickets");
    d->c_bytes = td_counter_new(m, "kv_received_bytes_total", "", "KV payload bytes taken");
    d->c_local = td_counter_new(m, "decode_local_prefill_tokens_total", "",
                                "Prompt tokens prefilled here instead of on a prefill worker");
    d->c_ahead = td_counter_new(m, "decode_steps_ahead_total", "",
                                "Steps of a device that were queued while the one before ran");
    d->c_waited =
        td_counter_new(m, "decode_steps_waited_total", "",
                       "Steps of a device that were queued when the one before had ended");
    return d->g_reserved && d->c_bytes && d->c_local && d->c_ahead && d->c_waited
               ? open_shm_metrics(d, m)
               : -ENOMEM;
}

static void update_metrics(td_worker *w)
{
    decode *d = (decode *)w;
    td_gauge_set(d->g_reserved, atomic_load(&w->host.load.kv_reserved));
    update_shm_metrics(d);
    td_worker_follow(d->c_ahead, td_decode_lane_steps_ahead(d->lane));
    td_worker_follow(d->c_waited, td_decode_lane_steps_waited(d->lane));
    td_worker_follow(d->c_local, td_decode_lane_local_tokens(d->lane));
    td_worker_follow(d->c_bytes, atomic_load(&td_decode_mover_stats(d->mover)->bytes));
}

static const _Atomic uint64_t *drops(const td_worker *w)
{
    return td_decode_mover_stats(((const decode *)w)->mover)->drops;
}

int td_decode_worker_main(const char *program, int argc, char **argv)
{
    static const td_worker_kind kind = {.usage =
                                            "--model DIR --control ENDPOINT --kv-listen ENDPOINT",
                                        .log_name = "decode",
                                        .sections = TD_SEC_COMMON | TD_SEC_DECODE,
                                        .decode = 1,
                                        .extra_seqs = TD_DECODE_LOCAL_MAX,
                                        .open_mover = open_mover,
                                        .kv_endpoint = kv_endpoint,
                                        .shm_offer = shm_offer,
                                        .open_lane = open_lane,
                                        .stop_lane = stop_lane,
                                        .close_mover = close_mover,
                                        .open_metrics = open_metrics,
                                        .update_metrics = update_metrics,
                                        .drops = drops};
    decode *d = calloc(1, sizeof *d);
    if (!d)
        return 1;
    td_decode_desk_init(&d->desk, &d->w.loop);
    d->w.kind = &kind;
    d->w.program = program;
    d->w.desk = &d->desk.base;
    int status = td_worker_main(&d->w, argc, argv);
    free(d);
    return status;
}
