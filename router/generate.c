/* SPDX-License-Identifier: Apache-2.0 */
/* Life of a chat or completion request at the edge:
 *   PARSING   the text pool has the body
 *   RUNNING   one generation per prompt is with the dispatcher
 *   then answered. The object lives until the text pool and every generation have let go of it,
 * even when the client left. */
#include "router/edge_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/hash.h"
#include "base/log.h"
#include "router/shape.h"
#include "base/banned.h"

typedef struct generate generate;

typedef struct leg { /* one prompt */
    generate *owner;
    td_gen *gen; /* NULL before submit and after on_end */
    uint32_t prompt;
} leg;

struct generate {
    td_edge *edge;
    td_list node;
    td_http_req *req; /* NULL: the client left, or the answer is out */
    td_api api;
    char id[80];
    td_str tenant;
    td_text_job *job; /* keeps the parameters */
    leg legs[TD_PROMPTS_MAX];
    uint32_t n_live; /* legs whose on_end is to come */
    td_choice *choices;
    uint32_t n_choices;
    td_shape shape;
    char fingerprint[24];
    td_usage usage;
    td_strbuf out;
    td_after after;
    int parsing, streaming, ended;
    td_error error; /* first failure */
    char error_text[500];
    uint32_t retry_after_ms;
    uint64_t started_us, first_us, written_us;
};

static void release(generate *g)
{
    if (g->parsing || g->n_live || !g->ended)
        return;
    td_loop_after_del(g->edge->loop, &g->after);
    for (uint32_t i = 0; i < g->n_choices; i++)
        td_choice_done(&g->choices[i]);
    free(g->choices);
    td_strbuf_done(&g->out);
    td_text_job_free(g->job);
    td_list_del(&g->node);
    g->edge->n_running--;
    free(g);
}

static const td_params *params(const generate *g)
{
    return &g->job->params;
}

/* ---- output ---- */

static void fail(generate *g, td_error error, const char *text, uint32_t retry_after_ms)
{
    if (g->error)
        return;
    g->error = error;
    g->retry_after_ms = retry_after_ms;
    snprintf(g->error_text, sizeof g->error_text, "%s", text ? text : "");
}

static void cancel_legs(generate *g)
{
    for (uint32_t i = 0; i < TD_PROMPTS_MAX; i++)
        if (g->legs[i].gen)
            td_gen_cancel(g->legs[i].gen);
}

static void write_out(generate *g)
{
    if (g->out.failed) { /* a chunk is lost: the stream must end in an error, not look whole */
        td_strbuf_reset(&g->out);
        fail(g, TD_ERROR_OVERLOADED, "out of memory", 0);
        cancel_legs(g);
        return;
    }
    if (g->req && g->out.len)
        td_http_stream_write(g->req, g->out.data, g->out.len);
    td_strbuf_reset(&g->out);
    g->written_us = td_now_us();
}

static void write_choice(generate *g, td_choice *c)
{
    if (td_choice_pending(c)) {
        td_shape_chunk(&g->out, &g->shape, c, NULL, &g->usage);
        c->role_sent = 1;
        td_choice_clear(c);
    }
    if (c->finished) { /* a chunk of its own, with an empty delta */
        td_shape_chunk(&g->out, &g->shape, c, c->finish, &g->usage);
        c->role_sent = 2;
    }
}

/* End of the loop turn: what the wake-up brought goes out as one write. */
static void flush(void *arg)
{
    generate *g = arg;
    if (!g->streaming || !g->req)
        return;
    for (uint32_t i = 0; i < g->n_choices; i++)
        if (g->choices[i].role_sent != 2) /* 2: its finish chunk is out */
            write_choice(g, &g->choices[i]);
    write_out(g);
}

static void count_usage(generate *g)
{
    g->usage.completion = g->usage.reasoning = 0;
    for (uint32_t i = 0; i < g->n_choices; i++) {
        g->usage.completion += params(g)->drop_generated ? 0 : g->choices[i].n_tokens;
        g->usage.reasoning += g->choices[i].n_reasoning_tokens;
    }
}

static void end_stream(generate *g)
{
    flush(g);
    if (g->error) {
        /* an error is said before the close, and the body ends without its last chunk: proxies see
         * it too */
        td_strbuf_adds(&g->out, "data: ");
        td_shape_error(&g->out, g->error, g->error_text, NULL);
        td_strbuf_adds(&g->out, "\n\n");
        write_out(g);
        td_http_stream_abort(g->req);
        return;
    }
    if (params(g)->include_usage)
        td_shape_usage_chunk(&g->out, &g->shape, &g->usage);
    td_shape_done(&g->out);
    write_out(g);
    if (g->error)
        td_http_stream_abort(g->req);
    else
        td_http_stream_end(g->req);
}

static size_t common_headers(const generate *g, td_http_header *h, char seed[24])
{
    size_t n = 0;
    snprintf(seed, 24, "%llu", (unsigned long long)params(g)->seed);
    h[n++] = (td_http_header){"X-Request-Id", g->id};
    h[n++] = (td_http_header){"x-tandem-seed", seed};
    if (params(g)->ignored.len)
        h[n++] = (td_http_header){"x-tandem-ignored", params(g)->ignored.ptr};
    return n;
}

static void end_whole(generate *g)
{
    if (g->error) {
        td_edge_fail(g->edge, g->req, g->id, g->error, g->error_text, NULL, g->retry_after_ms);
        return;
    }
    td_http_header h[6];
    char seed[24];
    size_t n = common_headers(g, h, seed);
    h[n++] = (td_http_header){"Content-Type", "application/json"};
    td_shape_reply(&g->out, &g->shape, g->choices, g->n_choices, &g->usage);
    if (g->out.failed)
        td_edge_fail(g->edge, g->req, g->id, TD_ERROR_OVERLOADED, "out of memory", NULL, 0);
    else
        td_http_reply(g->req, 200, h, n, g->out.data, g->out.len);
}

static void log_end(const generate *g)
{
    uint64_t now = td_now_us();
    td_log(TD_LOG_INFO, "request",
           "request_id=%s tenant=%.*s status=%s prompt=%llu cached=%llu tokens=%llu ttft_us=%llu "
           "total_us=%llu",
           g->id, (int)g->tenant.len, g->tenant.ptr, g->error ? td_error_get(g->error)->name : "ok",
           (unsigned long long)g->usage.prompt, (unsigned long long)g->usage.cached,
           (unsigned long long)g->usage.completion,
           (unsigned long long)(g->first_us ? g->first_us - g->started_us : 0),
           (unsigned long long)(now - g->started_us));
}

/* Every leg has ended, or nothing was started: answer, if somebody still listens. */
static void end(generate *g)
{
    g->ended = 1;
    if (g->n_choices)
        count_usage(g);
    if (g->req) {
        td_http_on_close(g->req, NULL, NULL);
        if (g->streaming)
            end_stream(g);
        else
            end_whole(g);
        g->req = NULL;
    } else {
        g->error = g->error ? g->error : TD_ERROR_CANCELLED;
    }
    log_end(g);
}

/* ---- from the dispatcher ---- */

static void on_run(void *arg, const td_gen_run *run)
{
    leg *l = arg;
    generate *g = l->owner;
    if (!g->req)
        return;
    if (!g->first_us)
        g->first_us = td_now_us();
    uint32_t at = l->prompt * (uint32_t)params(g)->n + run->choice;
    td_choice *c = &g->choices[at];
    int r = td_choice_add(c, run);
    if (r == 1)
        td_gen_end_choice(l->gen, run->choice);
    if (r < 0) {
        fail(g, TD_ERROR_OVERLOADED, "out of memory", 0);
        cancel_legs(g);
    }
    if (params(g)->continuous_usage)
        count_usage(g);
    if (g->streaming)
        td_loop_after(g->edge->loop, &g->after);
}

static void on_prompt_logprobs(void *arg, const float *logprobs, const td_gen_top *top, size_t n)
{
    leg *l = arg;
    generate *g = l->owner;
    const td_params *p = params(g);
    for (uint32_t i = 0; p->echo && i < (uint32_t)p->n; i++)
        td_choice_echo(&g->choices[l->prompt * (uint32_t)p->n + i], &p->prompts[l->prompt],
                       logprobs, top, n);
}

static void on_end(void *arg, td_error error, const char *text, uint32_t retry_after_ms,
                   const td_gen_usage *usage)
{
    leg *l = arg;
    generate *g = l->owner;
    l->gen = NULL;
    g->n_live--;
    g->usage.prompt += usage ? usage->prompt_tokens : 0;
    g->usage.cached += usage ? usage->cached_tokens : 0;
    g->usage.local += usage ? usage->local_tokens : 0;
    if (error) {
        /* why a pool has no worker is the log's business; the client is told what it can do */
        fail(g, error, td_error_get(error)->http == 503 ? NULL : text, retry_after_ms);
        cancel_legs(g); /* one prompt failed: the answer cannot be whole */
    }
    if (g->n_live == 0) {
        if (!g->ended)
            end(g);
        release(g);
    }
}

static void on_flush(void *arg)
{
    flush(((leg *)arg)->owner);
}

static const td_gen_ops gen_ops = {.on_run = on_run,
                                   .on_prompt_logprobs = on_prompt_logprobs,
                                   .on_end = on_end,
                                   .on_flush = on_flush};

/* ---- start ---- */

static void client_left(void *arg, td_http_req *req)
{
    generate *g = arg;
    td_log(TD_LOG_INFO, td_http_is_slow(req) ? "slow_reader" : "client_left", "request_id=%s",
           g->id);
    g->req = NULL;
    td_counter_add(g->edge->cancelled, 1);
    cancel_legs(g); /* on_end of each follows from the loop */
}

/* What workers know the prompt by. A name that the client chose is made the tenant's own: one key
 * can neither block nor probe another's. */
static void leg_id(const generate *g, uint32_t i, char out[100])
{
    const td_params *p = params(g);
    uint8_t raw[16];
    char hex[33];
    if (!p->request_id && p->n_prompts == 1) {
        snprintf(out, 100, "%.64s", g->id);
        return;
    }
    td_hash h;
    td_hash_init(&h, NULL, 0, sizeof raw);
    td_hash_add_field(&h, g->tenant.ptr, g->tenant.len);
    td_hash_add_field(&h, g->id, strlen(g->id));
    td_hash_add(&h, &i, sizeof i);
    td_hash_final(&h, raw);
    snprintf(out, 100, "%.40s#%.16s", g->id, td_hex(raw, sizeof raw, hex));
}

static int submit(generate *g, uint32_t i)
{
    const td_params *p = params(g);
    char id[100];
    leg_id(g, i, id);
    td_gen_spec spec = {.request_id = td_str_of(id),
                        .tenant = g->tenant,
                        .prompt = p->prompts[i].ids,
                        .n_prompt = p->prompts[i].n_ids,
                        .n = (uint32_t)p->n,
                        .max_tokens = p->limit,
                        .min_tokens = (uint32_t)p->min_tokens,
                        .ignore_eos = p->ignore_eos,
                        .temperature = (float)p->temperature,
                        .top_p = (float)p->top_p,
                        .min_p = (float)p->min_p,
                        .frequency_penalty = (float)p->frequency_penalty,
                        .presence_penalty = (float)p->presence_penalty,
                        .repetition_penalty = (float)p->repetition_penalty,
                        .top_k = (uint32_t)p->top_k,
                        .seed = p->seed,
                        .bias = p->bias,
                        .n_bias = p->n_bias,
                        .stop_ids = p->stop_ids,
                        .n_stop_ids = p->n_stop_ids,
                        .logprobs = p->logprobs,
                        .top_logprobs = (uint32_t)p->top_logprobs,
                        .prompt_logprobs = p->echo && p->logprobs,
                        .priority = (int)p->priority,
                        .timeout_us = g->edge->cfg.timeout_us};
    memcpy(spec.prefix_key, p->prefix_key, sizeof spec.prefix_key);
    g->legs[i] = (leg){.owner = g, .prompt = i};
    td_error error = TD_ERROR_INTERNAL;
    uint32_t retry = 0;
    td_err err = {0};
    int r = td_dispatch_submit(g->edge->cfg.dispatch, &spec, &gen_ops, &g->legs[i], &g->legs[i].gen,
                               &error, &retry, &err);
    if (r < 0)
        fail(g, error, err.text, retry);
    else
        g->n_live++;
    return r;
}

static int make_choices(generate *g)
{
    const td_params *p = params(g);
    uint32_t n = (uint32_t)p->n * p->n_prompts;
    g->choices = calloc(n, sizeof *g->choices);
    for (uint32_t i = 0; g->choices && i < n; i++) {
        g->n_choices = i + 1;
        int r = td_choice_init(&g->choices[i], g->edge->cfg.card, p, g->api, i);
        if (r < 0)
            return r;
        if (p->echo && !p->logprobs)
            td_choice_echo(&g->choices[i], &p->prompts[i / (uint32_t)p->n], NULL, NULL, 0);
    }
    return g->choices ? 0 : -ENOMEM;
}

static void make_shape(generate *g)
{
    const td_params *p = params(g);
    td_dispatch_state st;
    td_dispatch_get_state(g->edge->cfg.dispatch, &st);
    char hex[33];
    snprintf(g->fingerprint, sizeof g->fingerprint, "td-%.16s", td_hex(st.profile_id, 16, hex));
    g->shape = (td_shape){.chat = g->api == TD_API_CHAT,
                          .stream = p->stream,
                          .id = g->id,
                          .model = g->edge->cfg.card->name,
                          .fingerprint = g->fingerprint,
                          .created = td_wall_s(),
                          .seed = p->seed,
                          .card = g->edge->cfg.card,
                          .logprobs = p->logprobs,
                          .usage_null = p->include_usage,
                          .continuous_usage = p->continuous_usage,
                          .token_ids = p->return_token_ids};
}

static void begin_stream(generate *g)
{
    td_http_header h[8];
    char seed[24];
    size_t n = common_headers(g, h, seed);
    h[n++] = (td_http_header){"Content-Type", "text/event-stream; charset=utf-8"};
    h[n++] = (td_http_header){"Cache-Control", "no-cache"};
    h[n++] = (td_http_header){"X-Accel-Buffering", "no"};
    td_http_stream_begin(g->req, 200, h, n);
    g->streaming = 1;
    g->written_us = td_now_us();
}

static void start_running(generate *g)
{
    const td_params *p = params(g);
    if (p->request_id)
        snprintf(g->id, sizeof g->id, "%s", p->request_id);
    if (p->ignored.len)
        td_counter_add(g->edge->ignored_fields, 1);
    make_shape(g);
    if (make_choices(g) < 0) {
        fail(g, TD_ERROR_OVERLOADED, "out of memory", 0);
        return;
    }
    for (uint32_t i = 0; i < p->n_prompts; i++)
        if (submit(g, i) < 0)
            break;
    /* refused before the first byte: the status code can still say so */
    if (g->error)
        cancel_legs(g);
    else if (p->stream)
        begin_stream(g);
}

static void parsed(void *arg, td_text_job *job)
{
    generate *g = arg;
    g->parsing = 0;
    if (g->req && job->result < 0) {
        td_http_on_close(g->req, NULL, NULL);
        td_edge_fail(g->edge, g->req, g->id, job->error.error, job->error.text, job->error.param,
                     0);
        g->req = NULL;
        g->error = job->error.error;
        g->ended = 1;
        log_end(g);
    } else if (g->req) {
        start_running(g);
    }
    if (g->n_live == 0 && !g->ended)
        end(g);
    release(g);
}

void td_generate_start(td_edge *e, td_http_req *req, td_api api, td_str tenant)
{
    td_request_context ctx;
    td_edge_context(e, tenant, &ctx);
    generate *g = calloc(1, sizeof *g);
    td_text_job *job = td_text_job_new(api, &ctx, td_http_body(req));
    if (!g || !job) {
        free(g);
        td_text_job_free(job);
        td_edge_fail(e, req, NULL, TD_ERROR_OVERLOADED, "out of memory", NULL, 0);
        return;
    }
    *g = (generate){.edge = e,
                    .req = req,
                    .api = api,
                    .tenant = tenant,
                    .job = job,
                    .parsing = 1,
                    .started_us = td_now_us()};
    td_strbuf_init(&g->out);
    g->after = (td_after){.fn = flush, .arg = g};
    td_edge_make_id(api == TD_API_CHAT ? "chatcmpl-" : "cmpl-", g->id);
    job->done = parsed;
    job->arg = g;
    if (td_text_pool_submit(e->cfg.pool, job) < 0) {
        td_text_job_free(job);
        td_edge_fail(e, req, g->id, TD_ERROR_QUEUE_FULL, NULL, NULL, 0);
        free(g);
        return;
    }
    td_list_add(&e->requests, &g->node);
    e->n_running++;
    td_http_on_close(req, client_left, g);
}

void td_generate_tick(td_edge *e)
{
    uint64_t now = td_now_us(), silence = e->cfg.keepalive_s * TD_S;
    if (!silence)
        return;
    TD_LIST_FOR (it, &e->requests) {
        generate *g = TD_LIST_ENTRY(it, generate, node);
        if (!g->streaming || !g->req || now - g->written_us < silence)
            continue;
        td_strbuf_adds(&g->out, ": keep-alive\n\n");
        write_out(g);
    }
}

void td_generate_abort_all(td_edge *e)
{
    TD_LIST_FOR (it, &e->requests) {
        generate *g = TD_LIST_ENTRY(it, generate, node);
        fail(g, TD_ERROR_DRAINING, NULL, 0);
        cancel_legs(g);
        if (!g->ended)
            end(g);
        release(g);
    }
}
