/* SPDX-License-Identifier: Apache-2.0 */
#include "worker/worker.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "base/bug.h"
#include "base/cleanup.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/prefix.h"
#include "base/rand.h"
#include "engine/options.h"
#include "base/banned.h"

enum { RING_ITEMS = 8192, ALONE_US = 3000000 };

/* ---- service ---- */

static void on_idle(void *arg)
{
    td_loop_stop(((td_worker *)arg)->loop);
}

static void on_dead(void *arg)
{
    td_worker *w = arg;
    const char *device = td_device_error(w->device);
    td_log(TD_LOG_ERROR, "engine_dead",
           "why=\"steps fail one after another%s%s; the supervisor starts a new process\"",
           *device ? ": " : "", device);
    w->status = 1;
    td_loop_stop(w->loop);
}

static void on_drain(void *arg)
{
    td_worker *w = arg;
    td_log(TD_LOG_INFO, "draining", "jobs=%u", w->desk->n_jobs);
    td_rpc_goaway(w->rpc, "the worker is shutting down",
                  (uint32_t)td_opt_int(&w->options, TD_OPT_ID_DRAIN) * 1000);
    td_worker_desk_drain(w->desk);
}

static void on_stop(void *arg)
{
    td_loop_stop(((td_worker *)arg)->loop);
}

/* SIGHUP: the allow-list has changed. */
static void on_hangup(void *arg)
{
    td_err err = {0};
    if (td_link_reload(((td_worker *)arg)->link, &err) < 0)
        td_log(TD_LOG_ERROR, "reload_failed", "why=\"%s\"", err.text);
    else
        td_log(TD_LOG_INFO, "reloaded", "what=curve-peers");
}

/* An engine that has work and makes no step for long is stuck: withhold the watchdog ping. */
static int is_healthy(void *arg)
{
    td_worker *w = arg;
    uint64_t step = atomic_load(&w->host.load.step), now = td_now_us();
    int busy = atomic_load(&w->host.load.running) > 0;
    if (step != w->seen_step || !busy || !w->seen_us) {
        w->seen_step = step;
        w->seen_us = now;
    }
    return now - w->seen_us < 60 * TD_S;
}

/* ---- rpc ---- */

/* Workers may come before the router; but a mistyped --control must not pass for patience. */
static void still_alone(void *arg)
{
    td_worker *w = arg;
    td_log(
        TD_LOG_WARN, "no_router",
        "control=%s text=\"no router answers there so far; is one running with this --control?\"",
        td_rpc_endpoint(w->rpc));
}

static void on_up(void *arg, td_session *s)
{
    td_worker *w = arg;
    td_timer_del(TD_TAKE(w->alone));
    w->desk->session = s;
    td_log(TD_LOG_INFO, "router_up", "session=%u", td_session_number(s));
}

static void on_down(void *arg, td_session *s, const char *reason)
{
    td_worker *w = arg;
    td_timer_del(TD_TAKE(w->alone)); /* the reason is told here */
    if (w->desk->session == s)
        w->desk->session = NULL;
    int orderly = w->desk->draining || td_session_is_draining(s);
    td_log(orderly ? TD_LOG_INFO : TD_LOG_WARN, "router_down", "why=\"%s\"", reason ? reason : "");
}

static void on_call(void *arg, td_call *c, td_str method, td_str message)
{
    td_worker_desk_call(((td_worker *)arg)->desk, c, method, message);
}

static void get_load(void *arg, struct Tandem__V1__Load *load)
{
    td_host_fill_load(&((td_worker *)arg)->host, load);
}

/* A launch whose plan nobody measured may be slow: each shape is said once. */
static void name_untuned(td_worker *w)
{
    char text[200];
    for (size_t n = td_tuning_untuned(w->tuning); w->n_untuned < n; w->n_untuned++)
        if (td_tuning_untuned_text(w->tuning, w->n_untuned, text, sizeof text))
            td_log(TD_LOG_WARN, "untuned",
                   "shape=\"%s\" why=\"no tuned launch plan; tandem tune measures one\"", text);
}

static void on_lane(void *arg, int fd, int events)
{
    td_worker *w = arg;
    (void)fd;
    (void)events;
    td_worker_desk_turn(w->desk);
    name_untuned(w);
}

/* ---- metrics ---- */

void td_worker_follow(td_counter *c, uint64_t v)
{
    td_counter_add(c, v - td_counter_get(c));
}

static void update_metrics(td_worker *w)
{
    td_host_load *l = &w->host.load;
    td_gauge_set(w->g_running, atomic_load(&l->running));
    td_gauge_set(w->g_waiting, atomic_load(&l->waiting));
    td_gauge_set(w->g_free, atomic_load(&l->kv_free));
    td_gauge_set(w->g_up, w->desk->session != NULL);
    td_worker_follow(w->c_tokens, atomic_load(&l->tokens_total));
    td_worker_follow(w->c_untuned, td_tuning_untuned(w->tuning));
    w->kind->update_metrics(w);
}

static void write_drops(td_worker *w, td_strbuf *out)
{
    const _Atomic uint64_t *drops = w->kind->drops(w);
    td_strbuf_adds(out, "# HELP tandem_kv_dropped_total KV frames refused, by reason\n# TYPE "
                        "tandem_kv_dropped_total counter\n");
    for (int d = TD_DROP_NONE + 1; d < TD_DROP_MAX; d++)
        td_strbuf_addf(out, "tandem_kv_dropped_total{reason=\"%s\"} %llu\n",
                       td_drop_name((td_drop)d), (unsigned long long)atomic_load(&drops[d]));
}

static void on_request(void *arg, td_http_req *req)
{
    td_worker *w = arg;
    td_strbuf out;
    td_strbuf_init(&out);
    td_http_header type = {"Content-Type", "text/plain; version=0.0.4; charset=utf-8"};
    int status = 200;
    if (strcmp(td_http_path(req), "/metrics") == 0) {
        update_metrics(w);
        td_metrics_write(w->metrics, &out);
        write_drops(w, &out);
        td_link_write_metrics(w->link, &out);
        td_metrics_write_process(&out);
    } else if (strcmp(td_http_path(req), "/health") == 0) {
        status = w->desk->draining ? 503 : 200;
        td_strbuf_adds(&out, w->desk->draining ? "draining\n" : "ok\n");
    } else {
        status = 404;
        td_strbuf_adds(&out, "not found: /metrics and /health are here\n");
    }
    td_http_reply(req, status, &type, 1, out.data, out.len);
    td_strbuf_done(&out);
}

/* One metric of the kind: its name begins with the role's. */
static void name_of(const td_worker *w, const char *what, char *ret_name, size_t size)
{
    snprintf(ret_name, size, "%s_%s", w->kind->decode ? "decode" : "prefill", what);
}

static int make_metrics(td_worker *w)
{
    td_metrics *m = w->metrics;
    char name[64];
    int decode = w->kind->decode;
    name_of(w, "running", name, sizeof name);
    w->g_running = td_gauge_new(
        m, name, "", decode ? "Sequences in the current step" : "Prompts in the current step");
    name_of(w, "waiting", name, sizeof name);
    w->g_waiting = td_gauge_new(
        m, name, "", decode ? "Tickets whose blocks have not all arrived" : "Prompts queued");
    name_of(w, "tokens_total", name, sizeof name);
    w->c_tokens = td_counter_new(m, name, "", decode ? "Tokens emitted" : "Prompt tokens computed");
    name_of(w, "requests_total", name, sizeof name);
    w->desk->requests =
        td_counter_new(m, name, "", decode ? "Reserve calls accepted" : "Prefill calls accepted");
    name_of(w, "failed_total", name, sizeof name);
    w->desk->failed = td_counter_new(
        m, name, "", decode ? "Reserve calls that failed" : "Prefill calls that failed");
    w->g_free = td_gauge_new(m, "kv_free_blocks", "", "KV blocks free or evictable");
    w->c_untuned = td_counter_new(m, "untuned_launches_total", "",
                                  "Kinds of GPU launches that had no tuned plan");
    w->g_up = td_gauge_new(m, "router_up", "", "1 while a router is connected");
    if (!w->g_running || !w->g_waiting || !w->c_tokens || !w->desk->requests || !w->desk->failed ||
        !w->g_free || !w->g_up || !w->c_untuned)
        return -ENOMEM;
    return w->kind->open_metrics(w, m);
}

static int open_metrics(td_worker *w, td_err *err)
{
    const char *listen = td_opt_str(&w->options, TD_OPT_ID_METRICS_LISTEN);
    if (!*listen)
        return 0;
    int r = td_metrics_new(&w->metrics);
    if (r == 0)
        r = make_metrics(w);
    if (r < 0)
        return td_err_set(err, r, "metrics: out of memory");
    td_http_config c = {
        .listen = listen, .fd = -1, .max_conns = 64, .on_request = on_request, .arg = w};
    r = td_http_server_open(w->loop, &c, &w->http, err);
    if (r == 0)
        td_log(TD_LOG_INFO, "metrics", "listen=%s", td_http_server_addr(w->http));
    return r;
}

/* ---- start ---- */

static void on_link_event(void *arg, const td_link_event *e)
{
    (void)arg;
    td_log(e->is_error ? TD_LOG_WARN : TD_LOG_INFO, e->name, "%s", e->text);
}

static int open_link(td_worker *w, td_err *err)
{
    const td_options *o = &w->options;
    const char *network = td_opt_str(o, TD_OPT_ID_KV_PRIVATE);
    int is_private = strcmp(td_opt_str(o, TD_OPT_ID_KV_LINK), "private") == 0;
    if (*network && !is_private)
        return td_err_set(
            err, -EINVAL,
            "kv-private = %s does nothing with kv-link = curve: set kv-link = private, "
            "or leave it out",
            network);
    td_link_config lc = {.secret = td_opt_str(o, TD_OPT_ID_CURVE_SECRET),
                         .peers = td_opt_str(o, TD_OPT_ID_CURVE_PEERS),
                         .self = w->kind->decode ? TD_ROLE_DECODE : TD_ROLE_PREFILL,
                         .kv_private = is_private ? network : NULL,
                         .on_event = on_link_event};
    int r = td_link_open(&lc, &w->link, err);
    if (r == 0 && (r = td_signal_add(w->loop, SIGHUP, on_hangup, w)) < 0)
        td_err_set(err, r, "loop: %s", td_errno_text(r));
    return r;
}

static void on_progress(void *arg, const char *stage, double fraction)
{
    td_worker *w = arg;
    char text[128];
    snprintf(text, sizeof text, "loading: %s %.0f %%", stage, fraction * 100);
    td_service_status(w->service, text);
}

static int open_device(td_worker *w, td_err *err)
{
    td_device_spec spec = td_device_spec_from(&w->options);
    int r = td_device_open(&spec, &w->device, err);
    if (r < 0)
        return r;
    if (strcmp(spec.word, "cpu") != 0)
        td_log(td_device_is_fallback(w->device) ? TD_LOG_WARN : TD_LOG_INFO, "device",
               "asked=%s took=\"%s\"", spec.word, td_device_text(w->device));
    return 0;
}

static uint32_t max_rows_of(const td_worker *w)
{
    uint32_t max_seqs = (uint32_t)td_opt_int(&w->options, TD_OPT_ID_MAX_SEQS);
    return (uint32_t)td_opt_int(&w->options, TD_OPT_ID_CHUNK) +
           (w->kind->extra_seqs ? max_seqs : 0);
}

static int open_tuning(td_worker *w, const char *dir, td_err *err)
{
    const td_options *o = &w->options;
    int r = td_tuning_open(td_device_backend(w->device), td_opt_str(o, TD_OPT_ID_TUNED), &w->tuning,
                           err);
    if (r < 0 || !td_opt_bool(o, TD_OPT_ID_STRICT))
        return r;
    int act_fp8 = strcmp(td_opt_str(o, TD_OPT_ID_ACT_MXFP4), "fp8") == 0;
    return td_tuning_require(w->tuning, dir, max_rows_of(w), act_fp8, err);
}

static int open_engine(td_worker *w, td_err *err)
{
    const td_options *o = &w->options;
    const char *dir = td_opt_str(o, TD_OPT_ID_MODEL);
    if (!*dir)
        return td_err_set(err, -EINVAL,
                          "--model: missing; give the directory that holds config.json");
    if (*td_opt_str(o, TD_OPT_ID_CORES)) {
        int n = td_cores_parse(td_opt_str(o, TD_OPT_ID_CORES), w->cores, TD_WORKER_CORES_MAX, err);
        if (n < 0)
            return n;
        w->n_cores = (uint32_t)n;
    }
    int r = open_device(w, err);
    r = r < 0 ? r : open_tuning(w, dir, err);
    if (r < 0)
        return r;
    td_model_options mo = td_model_options_from(o, w->device);
    mo.cores = w->n_cores ? w->cores : NULL;
    mo.n_cores = w->n_cores;
    mo.progress = on_progress;
    mo.progress_arg = w;
    r = td_model_open(dir, &mo, &w->model, err);
    if (r < 0)
        return r;
    uint32_t max_seqs = (uint32_t)td_opt_int(o, TD_OPT_ID_MAX_SEQS), more = w->kind->extra_seqs;
    td_engine_limits limits = {.max_rows = max_rows_of(w),
                               .max_seqs = max_seqs + more,
                               .n_blocks = (uint32_t)td_opt_int(o, TD_OPT_ID_KV_BLOCKS),
                               .kv_bytes = (uint64_t)td_opt_int(o, TD_OPT_ID_KV_MEMORY) << 20,
                               .staging_bytes = (uint64_t)td_opt_int(o, TD_OPT_ID_KV_STAGING)
                                                << 20};
    r = td_engine_open(w->model, &limits, &w->engine, err);
    if (r == 0 && td_kv_pool_memfd(td_engine_pool(w->engine)) < 0 &&
        strcmp(td_opt_str(o, TD_OPT_ID_KV_TRANSPORT), "shm") == 0)
        return td_err_set(
            err, -EINVAL,
            "--kv-transport shm: the memory of --device %s cannot be shared; use auto",
            td_opt_str(o, TD_OPT_ID_DEVICE));
    return r;
}

static int open_rings(td_worker *w, td_err *err)
{
    td_ring **rings[] = {&w->loop_lane, &w->lane_loop, &w->lane_mover, &w->mover_lane};
    for (size_t i = 0; i < TD_ARRAY_LEN(rings); i++) {
        int r = td_ring_new(RING_ITEMS, rings[i]);
        if (r < 0)
            return td_err_set(err, r, "ring: %s", td_errno_text(r));
    }
    return 0;
}

int td_worker_first_core(const td_worker *w)
{
    return w->n_cores ? w->cores[0] : -1;
}

td_worker_lane_config td_worker_lane_config_of(td_worker *w)
{
    return (td_worker_lane_config){.engine = w->engine,
                                   .load = &w->host.load,
                                   .from_loop = w->loop_lane,
                                   .to_loop = w->lane_loop,
                                   .from_mover = w->mover_lane,
                                   .to_mover = w->lane_mover};
}

static int open_host(td_worker *w, td_err *err)
{
    const td_model_info *info = td_engine_info(w->engine);
    td_kv_stats stats;
    td_kv_pool_stats(td_engine_pool(w->engine), &stats);
    uint32_t staging = td_kv_staging(td_engine_pool(w->engine));
    td_host_config hc = {.decode = w->kind->decode,
                         .name = td_opt_str(&w->options, TD_OPT_ID_NAME),
                         .info = info,
                         .epoch = w->epoch,
                         .kv_blocks = stats.n_blocks,
                         .max_seqs = (uint32_t)td_opt_int(&w->options, TD_OPT_ID_MAX_SEQS),
                         .max_context = (uint32_t)TD_MIN((uint64_t)info->max_context,
                                                         (uint64_t)staging * TD_BLOCK_TOKENS),
                         .shm = w->kind->shm_offer ? w->kind->shm_offer(w) : NULL,
                         .kv_endpoint = w->kind->kv_endpoint ? w->kind->kv_endpoint(w) : NULL,
                         .kv_private = td_link_kv_private(w->link)};
    if (w->kind->decode && td_link_keys(w->link) && !td_link_kv_private(w->link))
        hc.kv_key = td_link_keys(w->link)->public_key;
    int r = td_host_init(&w->host, &hc);
    if (r < 0)
        return td_err_set(err, r, "worker: out of memory");
    atomic_store(&w->host.load.kv_free, stats.n_blocks);
    w->desk->host = &w->host;
    w->desk->to_lane = w->loop_lane;
    w->desk->from_lane = w->lane_loop;
    w->desk->max_context = info->max_context;
    w->desk->on_idle = on_idle;
    w->desk->on_dead = on_dead;
    w->desk->arg = w;
    td_list_init(&w->desk->jobs);
    return 0;
}

static int open_lane(td_worker *w, td_err *err)
{
    int r = w->kind->open_lane(w, err);
    w->lane_open = r == 0;
    return r;
}

static int open_rpc(td_worker *w, td_err *err)
{
    td_rpc_config c = {
        .endpoint = td_opt_str(&w->options, TD_OPT_ID_CONTROL),
        .dial = 1,
        .link = w->link,
        .door = TD_DOOR_CONTROL,
        .hello = w->host.hello,
        .ops = {.on_up = on_up, .on_down = on_down, .on_call = on_call, .get_load = get_load},
        .arg = w};
    memcpy(c.epoch, w->host.epoch, 16);
    int r = td_rpc_open(w->loop, &c, &w->rpc, err);
    if (r == 0 &&
        (r = td_io_add(w->loop, td_ring_fd(w->lane_loop), TD_IO_READ, on_lane, w, &w->lane_io)) < 0)
        td_err_set(err, r, "loop: %s", td_errno_text(r));
    return r;
}

static int start(td_worker *w, td_err *err)
{
    static const td_service_ops ops = {.drain = on_drain, .stop = on_stop, .healthy = is_healthy};
    td_random_bytes(w->epoch, sizeof w->epoch);
    int r = td_loop_new(&w->loop);
    if (r == 0)
        r = td_service_new(w->loop, &ops, w,
                           (uint64_t)td_opt_int(&w->options, TD_OPT_ID_DRAIN) * TD_S, &w->service);
    if (r < 0)
        return td_err_set(err, r, "loop: %s", td_errno_text(r));
    if ((r = open_link(w, err)) < 0 || (r = open_engine(w, err)) < 0 ||
        (r = open_rings(w, err)) < 0 || (r = w->kind->open_mover(w, err)) < 0 ||
        (r = open_host(w, err)) < 0 || (r = open_lane(w, err)) < 0 ||
        (r = open_metrics(w, err)) < 0 || (r = open_rpc(w, err)) < 0)
        return r;
    if (w->n_cores && (r = td_core_pin(w->cores[0])) < 0)
        return td_err_set(err, r, "--cores: cannot pin to core %d: %s", w->cores[0],
                          td_errno_text(r));
    return 0;
}

/* Calls end first, then the threads that serve them: the desk must hear of every job's end. */
static void stop(td_worker *w)
{
    td_http_server_close(w->http);
    td_timer_del(w->alone);
    if (w->lane_open) {
        while (!w->kind->stop_lane(w)) {
            td_worker_desk_turn(w->desk);
            usleep(200);
        }
        td_worker_desk_turn(w->desk);
    }
    w->kind->close_mover(w);
    if (w->rpc)
        td_rpc_close(w->rpc);
    td_link_close(w->link);
    td_io_del(w->lane_io);
    td_host_done(&w->host);
    td_ring_free(w->loop_lane);
    td_ring_free(w->lane_loop);
    td_ring_free(w->lane_mover);
    td_ring_free(w->mover_lane);
    td_engine_free(w->engine);
    td_model_free(w->model);
    td_tuning_close(w->tuning);
    td_device_close(w->device);
    td_metrics_free(w->metrics);
    td_service_free(w->service);
    td_loop_free(w->loop);
    td_options_done(&w->options);
}

static int run(td_worker *w)
{
    td_err err = {0};
    char text[128];
    if (start(w, &err) < 0) {
        td_log(TD_LOG_ERROR, "start_failed", "why=\"%s\"", err.text);
        return 1;
    }
    snprintf(text, sizeof text, "ready, %u KV blocks", w->host.kv_blocks);
    td_service_ready(w->service, text);
    td_log(TD_LOG_INFO, "ready", "name=%s control=%s%s%s kv_blocks=%u", w->host.name,
           td_rpc_endpoint(w->rpc), w->host.kv_endpoint[0] ? " kv=" : "", w->host.kv_endpoint,
           w->host.kv_blocks);
    if (!w->desk->session)
        td_timer_add(w->loop, ALONE_US, 0, still_alone, w, &w->alone);
    td_loop_run(w->loop);
    return w->status;
}

int td_worker_main(td_worker *w, int argc, char **argv)
{
    td_err err = {0};
    td_log_level level = TD_LOG_INFO;
    const td_worker_kind *k = w->kind;
    if (td_options_parse(&w->options, k->sections, argc, argv, &err) < 0 ||
        td_options_at_most(&w->options, 0, &err) < 0) {
        fprintf(stderr, "%s: %s\n", w->program, err.text);
        return 2;
    }
    if (w->options.help) {
        char usage[160];
        snprintf(usage, sizeof usage, "%s %s", w->program, k->usage);
        td_options_help(&w->options, usage, w->options.help_word, stdout);
        td_options_done(&w->options);
        return 0;
    }
    (void)td_log_level_parse(td_opt_str(&w->options, TD_OPT_ID_LOG_LEVEL), &level);
    td_log_init(level,
                strcmp(td_opt_str(&w->options, TD_OPT_ID_LOG_FORMAT), "json") == 0 ? TD_LOG_JSON
                                                                                   : TD_LOG_TEXT,
                k->log_name);
    int status = run(w);
    stop(w);
    return status;
}
