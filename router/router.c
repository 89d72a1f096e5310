/* SPDX-License-Identifier: Apache-2.0 */
#include "router/router.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/file.h"
#include "base/hash.h"
#include "base/log.h"
#include "base/rand.h"
#include "base/secret.h"
#include "base/version.h"
#include "net/service.h"
#include "router/dispatch.h"
#include "router/edge.h"
#include "router/inference.h"
#include "router/keys.h"
#include "base/banned.h"

enum {
    EXIT_RUNTIME = 1,
    EXIT_CONFIG = 2,
    SECRET_BYTES_MIN = 32,
    SECRET_BYTES_MAX = 4096,
    JOBS_PER_QUEUE = 2
};

typedef struct router {
    const td_options *opt;
    td_loop *loop;
    td_service *service;
    td_metrics *metrics;
    td_card *card;
    td_keys *keys;
    td_link *link;
    td_text_pool *pool;
    td_dispatch *dispatch;
    td_edge *edge;
    td_inference *inference;
    td_timer *status_timer;
    char *secret;
    size_t secret_bytes;
    int was_ready;
} router;

static int load_secret(router *r, td_err *reterr_err)
{
    const char *path = td_opt_str(r->opt, TD_OPT_ID_PREFIX_SECRET);
    if (!*path) {
        r->secret_bytes = SECRET_BYTES_MIN;
        r->secret = malloc(r->secret_bytes);
        if (!r->secret)
            return td_err_set(reterr_err, -ENOMEM, "prefix secret: out of memory");
        td_random_bytes(r->secret, r->secret_bytes);
        return 0;
    }
    int e = td_file_read(path, SECRET_BYTES_MAX, &r->secret, &r->secret_bytes, reterr_err);
    if (e == 0 && r->secret_bytes < SECRET_BYTES_MIN)
        e = td_err_set(reterr_err, -EINVAL,
                       "%s: %zu bytes; at least %d are needed (head -c 32 /dev/urandom)", path,
                       r->secret_bytes, SECRET_BYTES_MIN);
    return e;
}

static int parse_hash(const char *hex, uint8_t out[32], td_err *reterr_err)
{
    if (td_unhex(hex, out, 32) < 0)
        return td_err_set(reterr_err, -EINVAL, "--model-hash: 64 hexadecimal digits are needed");
    return 0;
}

static void on_link_event(void *arg, const td_link_event *e)
{
    (void)arg;
    td_log(e->is_error ? TD_LOG_WARN : TD_LOG_INFO, e->name, "%s", e->text);
}

/* SIGHUP: the allow-list has changed. */
static void on_hangup(void *arg)
{
    td_err err = {0};
    if (td_link_reload(((router *)arg)->link, &err) < 0)
        td_log(TD_LOG_ERROR, "reload_failed", "error=\"%s\"", err.text);
    else
        td_log(TD_LOG_INFO, "reloaded", "what=curve-peers");
}

static int open_link(router *r, td_err *reterr_err)
{
    td_link_config c = {.secret = td_opt_str(r->opt, TD_OPT_ID_CURVE_SECRET),
                        .peers = td_opt_str(r->opt, TD_OPT_ID_CURVE_PEERS),
                        .self = TD_ROLE_ROUTER,
                        .on_event = on_link_event};
    int e = td_link_open(&c, &r->link, reterr_err);
    if (e == 0 && (e = td_signal_add(r->loop, SIGHUP, on_hangup, r)) < 0)
        td_err_set(reterr_err, e, "event loop: %s", td_errno_text(e));
    return e;
}

static int open_dispatch(router *r, td_err *reterr_err)
{
    td_dispatch_config c = {.control = td_opt_str(r->opt, TD_OPT_ID_CONTROL),
                            .link = r->link,
                            .max_queue = (uint32_t)td_opt_int(r->opt, TD_OPT_ID_MAX_QUEUE),
                            .vocab_size = r->card->vocab_size,
                            .max_context = r->card->max_context,
                            .metrics = r->metrics,
                            .strict = td_opt_bool(r->opt, TD_OPT_ID_STRICT),
                            .stall_us = (uint64_t)td_opt_int(r->opt, TD_OPT_ID_STALL) * 1000000u,
                            .local_tokens = (uint32_t)td_opt_int(r->opt, TD_OPT_ID_LOCAL_PREFILL)};
    if (c.strict && c.local_tokens)
        return td_err_set(reterr_err, -EINVAL,
                          "--local-prefill-tokens %u: --strict allows no prefill on a decode "
                          "worker; leave one of them out",
                          c.local_tokens);
    memcpy(c.config_hash, r->card->config_hash, 32);
    memcpy(c.tokenizer_hash, r->card->tokenizer_hash, 32);
    const char *hash = td_opt_str(r->opt, TD_OPT_ID_MODEL_HASH);
    if (*hash) {
        c.have_model_hash = 1;
        int e = parse_hash(hash, c.model_hash, reterr_err);
        if (e < 0)
            return e;
    }
    return td_dispatch_open(r->loop, &c, &r->dispatch, reterr_err);
}

static int open_edge(router *r, td_err *reterr_err)
{
    const td_options *o = r->opt;
    td_edge_config c = {.listen = td_opt_str(o, TD_OPT_ID_LISTEN),
                        .listen_fd = td_service_inherited(0),
                        .card = r->card,
                        .dispatch = r->dispatch,
                        .pool = r->pool,
                        .metrics = r->metrics,
                        .keys = r->keys,
                        .link = r->link,
                        .prefix_secret = (const uint8_t *)r->secret,
                        .prefix_secret_bytes = r->secret_bytes,
                        .max_body_bytes = (size_t)td_opt_int(o, TD_OPT_ID_MAX_BODY),
                        .max_conns = (uint32_t)td_opt_int(o, TD_OPT_ID_MAX_CONNS),
                        .max_conns_per_addr = (uint32_t)td_opt_int(o, TD_OPT_ID_MAX_CONNS_PER_ADDR),
                        .keepalive_s = (uint32_t)td_opt_int(o, TD_OPT_ID_KEEPALIVE),
                        .timeout_us = (uint64_t)td_opt_int(o, TD_OPT_ID_DEADLINE) * 1000000u,
                        .strict = td_opt_bool(o, TD_OPT_ID_STRICT),
                        .version = td_build()};
    return td_edge_open(r->loop, &c, &r->edge, reterr_err);
}

static int open_inference(router *r, td_err *reterr_err)
{
    const char *endpoint = td_opt_str(r->opt, TD_OPT_ID_RPC_LISTEN);
    if (!*endpoint)
        return 0;
    td_inference_config c = {.endpoint = endpoint,
                             .link = r->link,
                             .card = r->card,
                             .dispatch = r->dispatch,
                             .pool = r->pool,
                             .prefix_secret = (const uint8_t *)r->secret,
                             .prefix_secret_bytes = r->secret_bytes,
                             .timeout_us =
                                 (uint64_t)td_opt_int(r->opt, TD_OPT_ID_DEADLINE) * 1000000u,
                             .strict = td_opt_bool(r->opt, TD_OPT_ID_STRICT)};
    return td_inference_open(r->loop, &c, &r->inference, reterr_err);
}

static int open_all(router *r, td_err *reterr_err)
{
    const td_options *o = r->opt;
    const char *keys = td_opt_str(o, TD_OPT_ID_API_KEYS);
    int e = td_card_open(td_opt_str(o, TD_OPT_ID_MODEL), td_opt_str(o, TD_OPT_ID_MODEL_NAME),
                         &r->card, reterr_err);
    if (e == 0 && *keys)
        e = td_keys_load(keys, &r->keys, reterr_err);
    if (e == 0)
        e = open_link(r, reterr_err);
    if (e == 0)
        e = load_secret(r, reterr_err);
    if (e == 0 && (e = td_metrics_new(&r->metrics)) < 0)
        td_err_set(reterr_err, e, "metrics: out of memory");
    if (e == 0)
        e = td_text_pool_new(r->loop, (uint32_t)td_opt_int(o, TD_OPT_ID_TEXT_THREADS),
                             (uint32_t)td_opt_int(o, TD_OPT_ID_MAX_QUEUE) * JOBS_PER_QUEUE,
                             &r->pool, reterr_err);
    if (e == 0)
        e = open_dispatch(r, reterr_err);
    if (e == 0)
        e = open_edge(r, reterr_err);
    return e == 0 ? open_inference(r, reterr_err) : e;
}

/* Generations end first, then what waits for text, then the doors. */
static void close_all(router *r)
{
    td_timer_del(r->status_timer);
    if (r->dispatch)
        td_dispatch_close(r->dispatch);
    td_text_pool_free(r->pool);
    td_inference_close(r->inference);
    td_edge_close(r->edge);
    td_link_close(r->link);
    td_service_free(r->service);
    td_card_free(r->card);
    td_keys_free(r->keys);
    td_metrics_free(r->metrics);
    if (r->secret)
        td_secret_wipe(r->secret, r->secret_bytes);
    free(r->secret);
    td_loop_free(r->loop);
}

static void on_idle(void *arg)
{
    router *r = arg;
    td_loop_stop(r->loop);
}

static void drain(void *arg)
{
    router *r = arg;
    td_log(TD_LOG_INFO, "draining", "running=%u", td_edge_running(r->edge));
    td_edge_drain(r->edge);
    if (r->inference)
        td_inference_drain(r->inference);
    td_dispatch_drain(r->dispatch, on_idle, r);
}

static void stop(void *arg)
{
    (void)arg; /* the loop stops; close_all() ends what is left with typed errors */
}

static void update_status(void *arg)
{
    router *r = arg;
    td_dispatch_state st;
    td_dispatch_get_state(r->dispatch, &st);
    if (st.ready != r->was_ready)
        td_log(TD_LOG_INFO, st.ready ? "pool_ready" : "pool_not_ready", "prefill=%u decode=%u",
               st.n_prefill, st.n_decode);
    r->was_ready = st.ready;
    char text[160];
    snprintf(text, sizeof text, "%u prefill, %u decode workers; %u running, %u queued",
             st.n_prefill, st.n_decode, st.n_running, st.n_queued);
    td_service_status(r->service, text);
}

static void announce(router *r)
{
    td_log(TD_LOG_INFO, "listening",
           "http=%s control=%s rpc=%s model=%s context=%u keys=%s curve=%s", td_edge_addr(r->edge),
           td_dispatch_endpoint(r->dispatch),
           r->inference ? td_inference_endpoint(r->inference) : "off", r->card->name,
           r->card->max_context, r->keys ? "on" : "off", td_link_keys(r->link) ? "on" : "off");
    td_service_ready(r->service, "waiting for workers");
}

int td_router_run(const td_options *options)
{
    router r = {.opt = options};
    td_err err = {0};
    int status = 0;
    if (td_loop_new(&r.loop) < 0) {
        td_log(TD_LOG_ERROR, "start_failed", "error=\"event loop\"");
        return EXIT_RUNTIME;
    }
    static const td_service_ops ops = {.drain = drain, .stop = stop};
    int e = open_all(&r, &err);
    if (e == 0)
        e = td_service_new(r.loop, &ops, &r,
                           (uint64_t)td_opt_int(options, TD_OPT_ID_DRAIN) * 1000000u, &r.service);
    if (e == 0)
        e = td_timer_add(r.loop, 100000, 500000, update_status, &r, &r.status_timer);
    if (e < 0) {
        td_log(TD_LOG_ERROR, "start_failed", "error=\"%s\"",
               err.code ? err.text : td_errno_text(e));
        status = e == -EINVAL || e == -ENOENT || e == -EPERM ? EXIT_CONFIG : EXIT_RUNTIME;
    } else {
        announce(&r);
        if (td_loop_run(r.loop) < 0)
            status = EXIT_RUNTIME;
        td_log(TD_LOG_INFO, "stopped", "running=%u", td_edge_running(r.edge));
    }
    close_all(&r);
    return status;
}

int td_router_main(const char *program, int argc, char **argv)
{
    td_options o;
    td_err err = {0};
    if (td_options_parse(&o, TD_ROUTER_SECTIONS, argc, argv, &err) < 0 ||
        td_options_at_most(&o, 0, &err) < 0) {
        fprintf(stderr, "%s: %s\n", program, err.text);
        return EXIT_CONFIG;
    }
    int status = 0;
    if (o.help) {
        char usage[160];
        snprintf(usage, sizeof usage, "%s --model DIR [options]", program);
        td_options_help(&o, usage, o.help_word, stdout);
    } else {
        td_log_level level = TD_LOG_INFO;
        td_log_level_parse(td_opt_str(&o, TD_OPT_ID_LOG_LEVEL), &level);
        td_log_init(level,
                    strcmp(td_opt_str(&o, TD_OPT_ID_LOG_FORMAT), "json") == 0 ? TD_LOG_JSON
                                                                              : TD_LOG_TEXT,
                    "router");
        status = td_router_run(&o);
    }
    td_options_done(&o);
    return status;
}
