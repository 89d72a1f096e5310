/* SPDX-License-Identifier: Apache-2.0 */
/* Routes of the HTTP edge. Closed by default: a route needs a key unless its row says open. */
#include "router/edge_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/bug.h"
#include "base/clock.h"
#include "base/hash.h"
#include "base/log.h"
#include "base/rand.h"
#include "router/shape.h"
#include "base/banned.h"

typedef void (*handler)(td_edge *e, td_http_req *req, td_str tenant);

/* ---- answers ---- */

void td_edge_make_id(const char *prefix, char out[48])
{
    uint8_t raw[12];
    char hex[25];
    td_random_bytes(raw, sizeof raw);
    snprintf(out, 48, "%s%s", prefix, td_hex(raw, sizeof raw, hex));
}

static uint32_t jittered_retry_ms(void)
{
    uint16_t r;
    td_random_bytes(&r, sizeof r);
    return 1000 + r % 2000;
}

static const char *allowed(const char *path);

void td_edge_fail(td_edge *e, td_http_req *req, const char *request_id, td_error error,
                  const char *text, const char *param, uint32_t retry_after_ms)
{
    const td_error_info *info = td_error_get(error);
    td_strbuf body;
    td_strbuf_init(&body);
    td_shape_error(&body, error, text, param);
    td_http_header h[5] = {{"Content-Type", "application/json"}};
    size_t n = 1;
    char seconds[16], id[48];
    if (!request_id) {
        td_edge_make_id("req-", id);
        request_id = id;
    }
    h[n++] = (td_http_header){"X-Request-Id", request_id};
    if (info->retryable && (info->http == 429 || info->http == 503)) {
        uint32_t ms = retry_after_ms ? retry_after_ms : jittered_retry_ms();
        snprintf(seconds, sizeof seconds, "%u", TD_MIN(30u, TD_MAX(1u, (ms + 999) / 1000)));
        h[n++] = (td_http_header){"Retry-After", seconds};
    }
    if (info->http == 405)
        h[n++] = (td_http_header){"Allow", allowed(td_http_path(req))};
    if (info->http == 501) /* clients would try a 501 again */
        h[n++] = (td_http_header){"x-should-retry", "false"};
    td_counter_add(e->errors, 1);
    td_http_reply(req, info->http, h, n, body.data, body.len);
    td_strbuf_done(&body);
}

void td_edge_reply(td_http_req *req, const char *request_id, const td_strbuf *body)
{
    char id[48];
    if (!request_id) {
        td_edge_make_id("req-", id);
        request_id = id;
    }
    td_http_header h[] = {{"Content-Type", "application/json"}, {"X-Request-Id", request_id}};
    td_http_reply(req, 200, h, TD_ARRAY_LEN(h), body->data, body->len);
}

void td_edge_context(const td_edge *e, td_str tenant, td_request_context *ret_ctx)
{
    td_dispatch_state st;
    td_dispatch_get_state(e->cfg.dispatch, &st);
    uint32_t context = e->cfg.card->max_context;
    if (st.max_context)
        context = TD_MIN(context, st.max_context);
    *ret_ctx = (td_request_context){.card = e->cfg.card,
                                    .max_context = context,
                                    .prefix_secret = e->cfg.prefix_secret,
                                    .prefix_secret_bytes = e->cfg.prefix_secret_bytes,
                                    .tenant = tenant,
                                    .strict = e->cfg.strict};
}

/* ---- small routes ---- */

static void add_model(td_edge *e, td_strbuf *b)
{
    const td_card *c = e->cfg.card;
    td_request_context ctx;
    td_edge_context(e, (td_str){"", 0}, &ctx);
    td_strbuf_adds(b, "{\"id\":\"");
    td_strbuf_add_json(b, c->name, strlen(c->name));
    td_strbuf_addf(b,
                   "\",\"object\":\"model\",\"created\":%lld,\"owned_by\":\"tandem\",\"root\":\"",
                   (long long)c->created);
    td_strbuf_add_json(b, c->name, strlen(c->name));
    td_strbuf_addf(
        b, "\",\"parent\":null,\"max_model_len\":%u,\"meta\":{\"n_ctx\":%u,\"n_vocab\":%u}}",
        ctx.max_context, ctx.max_context, c->vocab_size);
}

static void get_models(td_edge *e, td_http_req *req, td_str tenant)
{
    td_strbuf b;
    td_strbuf_init(&b);
    const char *rest = td_http_path(req) + strlen("/v1/models");
    if (*rest == '/' && strcmp(rest + 1, e->cfg.card->name) != 0) {
        td_strbuf_addf(&b, "model %.100s is not served here; this server has %s", rest + 1,
                       e->cfg.card->name);
        td_edge_fail(e, req, NULL, TD_ERROR_MODEL_NOT_FOUND, b.data, "model", 0);
    } else if (*rest == '/') {
        add_model(e, &b);
        td_edge_reply(req, NULL, &b);
    } else {
        td_strbuf_adds(&b, "{\"object\":\"list\",\"data\":[");
        add_model(e, &b);
        td_strbuf_adds(&b, "]}");
        td_edge_reply(req, NULL, &b);
    }
    td_strbuf_done(&b);
}

static void get_health(td_edge *e, td_http_req *req, td_str tenant)
{
    td_dispatch_state st;
    td_dispatch_get_state(e->cfg.dispatch, &st);
    td_strbuf b;
    td_strbuf_init(&b);
    if (st.ready && !e->draining) {
        td_strbuf_addf(&b,
                       "{\"status\":\"ok\",\"prefill_workers\":%u,\"decode_workers\":%u,"
                       "\"running\":%u,\"queued\":%u}",
                       st.n_prefill, st.n_decode, st.n_running, st.n_queued);
        td_edge_reply(req, NULL, &b);
    } else {
        td_error error = e->draining         ? TD_ERROR_DRAINING
                         : st.n_prefill == 0 ? TD_ERROR_NO_PREFILL
                                             : TD_ERROR_NO_DECODE;
        td_strbuf_addf(&b, "%s: %u prefill and %u decode workers are ready",
                       td_error_get(error)->text, st.n_prefill, st.n_decode);
        td_edge_fail(e, req, NULL, error, b.data, NULL, 0);
    }
    td_strbuf_done(&b);
}

static void get_ping(td_edge *e, td_http_req *req, td_str tenant)
{
    td_strbuf b;
    td_strbuf_init(&b);
    td_strbuf_adds(&b, "{}");
    td_edge_reply(req, NULL, &b);
    td_strbuf_done(&b);
}

static void get_version(td_edge *e, td_http_req *req, td_str tenant)
{
    td_dispatch_state st;
    td_dispatch_get_state(e->cfg.dispatch, &st);
    char profile[33], model[65];
    td_strbuf b;
    td_strbuf_init(&b);
    td_strbuf_addf(
        &b,
        "{\"version\":\"%s\",\"wire\":\"tandem.v1\",\"profile_id\":\"%s\",\"model_hash\":\"%s\"}",
        e->cfg.version, td_hex(st.profile_id, 16, profile), td_hex(st.model_hash, 32, model));
    td_edge_reply(req, NULL, &b);
    td_strbuf_done(&b);
}

static void get_metrics(td_edge *e, td_http_req *req, td_str tenant)
{
    td_strbuf b;
    td_strbuf_init(&b);
    td_dispatch_update_metrics(e->cfg.dispatch);
    td_gauge_set(e->connections, td_http_server_conns(e->http));
    td_counter_add(e->refused, td_http_server_refused(e->http) - td_counter_get(e->refused));
    td_metrics_write(e->cfg.metrics, &b);
    if (e->cfg.link)
        td_link_write_metrics(e->cfg.link, &b);
    td_metrics_write_process(&b);
    td_http_header h[] = {{"Content-Type", "text/plain; version=0.0.4; charset=utf-8"}};
    td_http_reply(req, 200, h, 1, b.data, b.len);
    td_strbuf_done(&b);
}

/* ---- tokenize, detokenize: answered from the text pool ---- */

typedef struct text_request {
    td_edge *edge;
    td_http_req *req; /* NULL: the client left */
} text_request;

static void text_closed(void *arg, td_http_req *req)
{
    ((text_request *)arg)->req = NULL;
}

static void text_reply(text_request *t, td_text_job *job)
{
    td_strbuf b;
    td_strbuf_init(&b);
    if (job->api == TD_API_DETOKENIZE) {
        td_strbuf_adds(&b, "{\"prompt\":\"");
        td_strbuf_add_json(&b, job->params.detokenized.ptr, job->params.detokenized.len);
        td_strbuf_adds(&b, "\"}");
    } else {
        const td_prompt *p = &job->params.prompts[0];
        td_strbuf_addf(&b, "{\"count\":%u,\"max_model_len\":%u,\"tokens\":[", p->n_ids,
                       job->ctx.max_context);
        for (uint32_t i = 0; i < p->n_ids; i++) {
            td_strbuf_adds(&b, i ? "," : "");
            td_strbuf_add_u64(&b, p->ids[i]);
        }
        td_strbuf_adds(&b, "]}");
    }
    td_edge_reply(t->req, NULL, &b);
    td_strbuf_done(&b);
}

static void text_done(void *arg, td_text_job *job)
{
    text_request *t = arg;
    if (t->req && job->result < 0)
        td_edge_fail(t->edge, t->req, NULL, job->error.error, job->error.text, job->error.param, 0);
    else if (t->req)
        text_reply(t, job);
    t->edge->n_running--;
    td_text_job_free(job);
    free(t);
}

static void start_text(td_edge *e, td_http_req *req, td_api api, td_str tenant)
{
    td_request_context ctx;
    td_edge_context(e, tenant, &ctx);
    text_request *t = calloc(1, sizeof *t);
    td_text_job *job = td_text_job_new(api, &ctx, td_http_body(req));
    if (!t || !job) {
        free(t);
        td_text_job_free(job);
        td_edge_fail(e, req, NULL, TD_ERROR_OVERLOADED, "out of memory", NULL, 0);
        return;
    }
    *t = (text_request){e, req};
    job->done = text_done;
    job->arg = t;
    if (td_text_pool_submit(e->cfg.pool, job) < 0) {
        free(t);
        td_text_job_free(job);
        td_edge_fail(e, req, NULL, TD_ERROR_QUEUE_FULL, NULL, NULL, 0);
        return;
    }
    e->n_running++;
    td_http_on_close(req, text_closed, t);
}

static void post_tokenize(td_edge *e, td_http_req *req, td_str tenant)
{
    start_text(e, req, TD_API_TOKENIZE, tenant);
}

static void post_detokenize(td_edge *e, td_http_req *req, td_str tenant)
{
    start_text(e, req, TD_API_DETOKENIZE, tenant);
}

static void post_chat(td_edge *e, td_http_req *req, td_str tenant)
{
    td_generate_start(e, req, TD_API_CHAT, tenant);
}

static void post_completions(td_edge *e, td_http_req *req, td_str tenant)
{
    td_generate_start(e, req, TD_API_COMPLETIONS, tenant);
}

/* ---- routing ---- */

static const struct route {
    const char *method, *path;
    int prefix; /* path/… too */
    int open;   /* no key needed */
    handler fn;
} routes[] = {
    {"GET", "/health", 0, 1, get_health},
    {"GET", "/ping", 0, 1, get_ping},
    {"GET", "/version", 0, 0, get_version},
    {"GET", "/metrics", 0, 0, get_metrics},
    {"GET", "/v1/models", 1, 0, get_models},
    {"POST", "/v1/chat/completions", 0, 0, post_chat},
    {"POST", "/v1/completions", 0, 0, post_completions},
    {"POST", "/tokenize", 0, 0, post_tokenize},
    {"POST", "/detokenize", 0, 0, post_detokenize},
};

static int path_matches(const struct route *r, const char *path)
{
    size_t n = strlen(r->path);
    return strncmp(r->path, path, n) == 0 && (path[n] == 0 || (r->prefix && path[n] == '/'));
}

static const char *allowed(const char *path)
{
    for (size_t i = 0; i < TD_ARRAY_LEN(routes); i++)
        if (path_matches(&routes[i], path))
            return strcmp(routes[i].method, "GET") == 0 ? "GET, HEAD" : routes[i].method;
    return "";
}

static void unknown_path(td_edge *e, td_http_req *req, int path_known)
{
    char text[200];
    if (path_known)
        snprintf(text, sizeof text, "%s does not take %s", td_http_path(req), td_http_method(req));
    else
        snprintf(
            text, sizeof text, "no route %.20s %.100s%s", td_http_method(req), td_http_path(req),
            strcmp(td_http_path(req), "/") == 0 ? "; the API is under /v1, e.g. /v1/models" : "");
    td_edge_fail(e, req, NULL, path_known ? TD_ERROR_METHOD_NOT_ALLOWED : TD_ERROR_NOT_FOUND, text,
                 NULL, 0);
}

static void on_request(void *arg, td_http_req *req)
{
    td_edge *e = arg;
    const char *path = td_http_path(req), *method = td_http_method(req);
    const struct route *r = NULL;
    int path_known = 0;
    for (size_t i = 0; i < TD_ARRAY_LEN(routes) && !r; i++) {
        if (!path_matches(&routes[i], path))
            continue;
        path_known = 1;
        if (strcmp(routes[i].method, method) == 0 ||
            (strcmp(method, "HEAD") == 0 && strcmp(routes[i].method, "GET") == 0))
            r = &routes[i];
    }
    td_str tenant = {"", 0};
    if (!(r && r->open) && e->cfg.keys &&
        !td_keys_check(e->cfg.keys, td_http_header_get(req, "Authorization"), &tenant)) {
        td_edge_fail(e, req, NULL, TD_ERROR_UNAUTHENTICATED, NULL, NULL, 0);
        return;
    }
    if (!r) {
        unknown_path(e, req, path_known);
        return;
    }
    td_counter_add(e->requests_total[r - routes < 8 ? r - routes : 7], 1);
    if (e->draining && strcmp(method, "POST") == 0)
        td_edge_fail(e, req, NULL, TD_ERROR_DRAINING, NULL, NULL, 0);
    else
        r->fn(e, req, tenant);
}

/* ---- life ---- */

static void make_metrics(td_edge *e)
{
    td_metrics *m = e->cfg.metrics;
    for (size_t i = 0; i < TD_ARRAY_LEN(e->requests_total); i++) {
        char labels[64];
        snprintf(labels, sizeof labels, "path=\"%s\"",
                 i < 7 ? routes[i].path : "/tokenize,/detokenize");
        e->requests_total[i] =
            td_counter_new(m, "http_requests_total", labels, "Requests by route.");
    }
    e->errors = td_counter_new(m, "http_errors_total", "", "Requests answered with an error body.");
    e->ignored_fields =
        td_counter_new(m, "ignored_fields_total", "", "Requests with unknown body fields.");
    e->connections = td_gauge_new(m, "http_connections", "", "Open HTTP connections.");
    e->refused = td_counter_new(m, "http_connections_refused_total", "",
                                "Connections refused because there were too many.");
    e->cancelled =
        td_counter_new(m, "requests_cancelled_total", "", "Requests whose client left early.");
}

static void tick(void *arg)
{
    td_generate_tick(arg);
}

int td_edge_open(td_loop *l, const td_edge_config *config, td_edge **ret_edge, td_err *reterr_err)
{
    td_edge *e = calloc(1, sizeof *e);
    if (!e)
        return td_err_set(reterr_err, -ENOMEM, "edge: out of memory");
    e->loop = l;
    e->cfg = *config;
    td_list_init(&e->requests);
    make_metrics(e);
    td_http_config h = {.listen = config->listen_fd >= 0 ? NULL : config->listen,
                        .fd = config->listen_fd,
                        .max_body_bytes = config->max_body_bytes,
                        .max_conns = config->max_conns,
                        .max_conns_per_peer = config->max_conns_per_addr,
                        .allow_nonloopback = config->keys != NULL,
                        .on_request = on_request,
                        .arg = e};
    int r = td_http_server_open(l, &h, &e->http, reterr_err);
    if (r == 0) {
        r = td_timer_add(l, TD_S, TD_S, tick, e, &e->tick);
        if (r < 0)
            td_err_set(reterr_err, r, "edge: timer: %s", td_errno_text(r));
    }
    if (r < 0) {
        td_edge_close(e);
        return r;
    }
    *ret_edge = e;
    return 0;
}

const char *td_edge_addr(const td_edge *e)
{
    return td_http_server_addr(e->http);
}

void td_edge_drain(td_edge *e)
{
    e->draining = 1;
    td_http_server_stop_listening(e->http);
}

uint32_t td_edge_running(const td_edge *e)
{
    return e->n_running;
}

void td_edge_close(td_edge *e)
{
    if (!e)
        return;
    td_generate_abort_all(e);
    td_timer_del(e->tick);
    if (e->http)
        td_http_server_close(e->http);
    free(e);
}
