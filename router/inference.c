/* SPDX-License-Identifier: Apache-2.0 */
#include "router/inference.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/bug.h"
#include "base/cleanup.h"
#include "base/clock.h"
#include "base/hash.h"
#include "base/log.h"
#include "base/rand.h"
#include "proto/inference.pb-c.h"
#include "router/choice.h"
#include "router/edge_internal.h"
#include "rpc/codec.h"
#include "rpc/rpc.h"
#include "base/banned.h"

enum { MESSAGE_BYTES_MAX = 16 << 20, MESSAGES_MAX = 4096 };

struct td_inference {
    td_loop *loop;
    td_inference_config cfg;
    td_rpc *rpc;
    td_codec codec;
    td_list calls;
    uint32_t n_running;
    int draining;
};

/* One Generate call: alive until its call, its job and its generation are done with. */
typedef struct generate {
    td_inference *owner;
    td_list node;
    td_call *call; /* NULL once finished */
    td_text_job *job;
    td_gen *gen;
    td_choice choice;
    int have_choice, parsing, in_gen, blocked;
    char id[48], fingerprint[24];
    td_strbuf text, reasoning; /* waiting for credit */
    td_ids ids;
    td_gen_usage usage;
    td_after after;
} generate;

static void release(generate *g)
{
    if (g->call || g->parsing || g->in_gen)
        return;
    td_loop_after_del(g->owner->loop, &g->after);
    if (g->have_choice)
        td_choice_done(&g->choice);
    td_strbuf_done(&g->text);
    td_strbuf_done(&g->reasoning);
    td_ids_done(&g->ids);
    td_text_job_free(g->job);
    td_list_del(&g->node);
    g->owner->n_running--;
    free(g);
}

static void finish(generate *g, td_error error, const char *text, uint32_t retry_after_ms)
{
    if (!g->call)
        return;
    const td_error_info *info = td_error_get(error);
    td_status st = {.code = error ? (uint32_t)info->status : TD_OK,
                    .error = error ? info->name : "",
                    .message = error ? (text && *text ? text : info->text) : "",
                    .retry_after_ms = retry_after_ms};
    td_log(TD_LOG_INFO, "rpc_request", "request_id=%s status=%s tokens=%llu", g->id,
           error ? info->name : "ok",
           (unsigned long long)(g->have_choice ? g->choice.n_tokens : 0));
    td_call *c = TD_TAKE(g->call);
    td_call_finish(c, &st);
}

/* ---- output ---- */

static int gather(generate *g)
{
    td_choice *c = &g->choice;
    td_strbuf_add(&g->text, c->content_text.data, c->content_text.len);
    td_strbuf_add(&g->reasoning, c->reasoning_text.data, c->reasoning_text.len);
    for (size_t i = 0; i < c->ids.n; i++)
        td_ids_add(&g->ids, c->ids.data[i]);
    td_choice_clear(c);
    return g->text.failed || g->reasoning.failed || g->ids.failed ? -ENOMEM : 0;
}

/* Send what waits; without credit it stays and grows (text streams compress well). Last: with the
 * figures. */
static int send_reply(generate *g, int last)
{
    Tandem__V1__GenerateReply m = TANDEM__V1__GENERATE_REPLY__INIT;
    m.text = g->text.len ? g->text.data : NULL;
    m.reasoning = g->reasoning.len ? g->reasoning.data : NULL;
    if (g->ids.n) {
        m.has_ids = 1;
        m.ids = (ProtobufCBinaryData){g->ids.n * 4, (uint8_t *)g->ids.data};
    }
    if (last) {
        m.finish_reason = (char *)(g->choice.finish ? g->choice.finish : "stop");
        m.has_prompt_tokens = m.has_completion_tokens = m.has_cached_tokens = m.has_seed = 1;
        m.prompt_tokens = g->usage.prompt_tokens;
        m.completion_tokens = (uint32_t)g->choice.n_tokens;
        m.cached_tokens = g->usage.cached_tokens;
        m.has_local_prefill_tokens = g->usage.local_tokens > 0;
        m.local_prefill_tokens = g->usage.local_tokens;
        m.seed = g->job->params.seed;
        m.system_fingerprint = g->fingerprint;
    }
    size_t n = tandem__v1__generate_reply__get_packed_size(&m);
    uint8_t *bytes = malloc(n ? n : 1);
    if (!bytes)
        return -ENOMEM;
    tandem__v1__generate_reply__pack(&m, bytes);
    int r = td_call_send(g->call, bytes, n);
    free(bytes);
    if (r == 0) {
        td_strbuf_reset(&g->text);
        td_strbuf_reset(&g->reasoning);
        g->ids.n = 0;
    }
    return r;
}

static void pump(void *arg)
{
    generate *g = arg;
    if (!g->call || !g->have_choice)
        return;
    int r = gather(g);
    if (r < 0) {
        finish(g, TD_ERROR_OVERLOADED, "out of memory", 0);
        if (g->gen)
            td_gen_cancel(g->gen);
        release(g);
        return;
    }
    int last = g->choice.finished && !g->in_gen;
    if (!last && !g->text.len && !g->reasoning.len && !g->ids.n)
        return;
    r = send_reply(g, last);
    if (r == -EAGAIN)
        return; /* on_credit calls again */
    if (r < 0)
        finish(g, TD_ERROR_OVERLOADED, "out of memory", 0);
    else if (last)
        finish(g, TD_ERROR_NONE, NULL, 0);
    release(g);
}

static void on_credit(void *arg, td_call *c)
{
    pump(arg);
}

static void on_run(void *arg, const td_gen_run *run)
{
    generate *g = arg;
    if (!g->call)
        return;
    int r = td_choice_add(&g->choice, run);
    if (r == 1)
        td_gen_end_choice(g->gen, 0);
    if (r < 0) {
        finish(g, TD_ERROR_OVERLOADED, "out of memory", 0);
        td_gen_cancel(g->gen);
    }
    td_loop_after(g->owner->loop, &g->after);
}

static void on_end(void *arg, td_error error, const char *text, uint32_t retry_after_ms,
                   const td_gen_usage *usage)
{
    generate *g = arg;
    g->gen = NULL;
    g->in_gen = 0;
    if (usage)
        g->usage = *usage;
    if (error)
        finish(g, error, text, retry_after_ms);
    if (g->call)
        td_loop_after(g->owner->loop, &g->after);
    else
        release(g);
}

static const td_gen_ops gen_ops = {.on_run = on_run, .on_end = on_end};

static void on_cancel(void *arg, td_call *c)
{
    generate *g = arg;
    if (g->gen)
        td_gen_cancel(g->gen);
    finish(g, TD_ERROR_CANCELLED, NULL, 0);
    if (!g->gen)
        release(g); /* otherwise on_end does */
}

/* ---- start ---- */

static void submit(generate *g)
{
    const td_params *p = &g->job->params;
    td_gen_spec spec = {.request_id = td_str_of(g->id),
                        .prompt = p->prompts[0].ids,
                        .n_prompt = p->prompts[0].n_ids,
                        .n = 1,
                        .max_tokens = p->limit,
                        .min_tokens = (uint32_t)p->min_tokens,
                        .ignore_eos = p->ignore_eos,
                        .temperature = (float)p->temperature,
                        .top_p = (float)p->top_p,
                        .min_p = (float)p->min_p,
                        .repetition_penalty = (float)p->repetition_penalty,
                        .top_k = (uint32_t)p->top_k,
                        .seed = p->seed,
                        .timeout_us =
                            TD_MIN(td_call_remaining_us(g->call), g->owner->cfg.timeout_us),
                        .client_deadline = 1};
    memcpy(spec.prefix_key, p->prefix_key, sizeof spec.prefix_key);
    td_dispatch_state st;
    td_dispatch_get_state(g->owner->cfg.dispatch, &st);
    char hex[33];
    snprintf(g->fingerprint, sizeof g->fingerprint, "td-%.16s", td_hex(st.profile_id, 16, hex));
    td_error error = TD_ERROR_INTERNAL;
    uint32_t retry = 0;
    td_err err = {0};
    if (td_dispatch_submit(g->owner->cfg.dispatch, &spec, &gen_ops, g, &g->gen, &error, &retry,
                           &err) < 0)
        finish(g, error, err.text, retry);
    else
        g->in_gen = 1;
}

static void parsed(void *arg, td_text_job *job)
{
    generate *g = arg;
    g->parsing = 0;
    if (g->call && job->result < 0) {
        finish(g, job->error.error, job->error.text, 0);
    } else if (g->call) {
        g->have_choice = 1;
        if (td_choice_init(&g->choice, g->owner->cfg.card, &job->params, job->api, 0) < 0)
            finish(g, TD_ERROR_OVERLOADED, "out of memory", 0);
        else
            submit(g);
    }
    release(g);
}

static int add_messages(td_text_job *job, const Tandem__V1__GenerateRequest *m)
{
    job->input = json_array();
    for (size_t i = 0; i < m->n_messages; i++) {
        json_t *o = json_pack("{s:s, s:s}", "role", m->messages[i]->role, "content",
                              m->messages[i]->content);
        if (!o || json_array_append_new(job->input, o) < 0)
            return -EINVAL; /* not UTF-8 */
    }
    return 0;
}

static const char *copy_text(td_text_job *job, const char *s)
{
    return s && *s ? td_arena_strndup(&job->arena, s, strlen(s)) : NULL;
}

static int fill_prompt(td_text_job *job, const Tandem__V1__GenerateRequest *m,
                       const char **ret_text)
{
    td_params *p = &job->params;
    if ((m->n_messages > 0) + (m->prompt != NULL) + m->has_ids != 1) {
        *ret_text = "give exactly one of messages, prompt, ids";
        return -EINVAL;
    }
    *ret_text = "messages is not valid UTF-8";
    if (m->n_messages)
        return m->n_messages > MESSAGES_MAX ? -EINVAL : add_messages(job, m);
    *ret_text =
        "ids must be 4 bytes each, below the vocabulary; prompt must be UTF-8 and not empty";
    if (m->has_ids) {
        size_t n = m->ids.len / 4;
        uint32_t *ids = td_arena_alloc_array(&job->arena, n + 1, 4);
        if (!ids || n == 0 || m->ids.len % 4)
            return -EINVAL;
        memcpy(ids, m->ids.data, n * 4);
        for (size_t i = 0; i < n; i++)
            if (ids[i] >= job->ctx.card->vocab_size)
                return -EINVAL;
        p->prompts[p->n_prompts++] = (td_prompt){ids, (uint32_t)n, {"", 0}};
        return 0;
    }
    job->input = json_string(m->prompt); /* checked UTF-8; tokenized in the text pool */
    return job->input && *m->prompt ? 0 : -EINVAL;
}

/* Ranges are those of the HTTP table; an out-of-range field is named. */
static int fill_params(td_text_job *job, const Tandem__V1__GenerateRequest *m,
                       const char **ret_text)
{
    td_params *p = &job->params;
    td_params_init(job->ctx.card, p);
    p->return_token_ids = 1;
    p->model = copy_text(job, m->model);
    p->cache_salt = copy_text(job, m->cache_salt);
    if (m->has_max_tokens)
        p->max_tokens = m->max_tokens;
    if (m->has_temperature)
        p->temperature = (double)m->temperature;
    if (m->has_top_p)
        p->top_p = (double)m->top_p;
    if (m->has_min_p)
        p->min_p = (double)m->min_p;
    if (m->has_top_k)
        p->top_k = m->top_k;
    if (m->has_seed)
        p->seed = m->seed;
    p->min_tokens = m->min_tokens;
    p->ignore_eos = m->ignore_eos;
    if (!m->thinking)
        p->reasoning_effort = "none";
    *ret_text = "temperature must be 0 to 2, top_p above 0 to 1, min_p 0 to 1";
    if (!(p->temperature >= 0 && p->temperature <= 2 && p->top_p > 0 && p->top_p <= 1 &&
          p->min_p >= 0 && p->min_p <= 1))
        return -EINVAL;
    *ret_text = "at most 16 stops of 1 to 256 bytes";
    if (m->n_stop > TD_STOPS_MAX)
        return -EINVAL;
    for (size_t i = 0; i < m->n_stop; i++) {
        size_t n = strlen(m->stop[i]);
        if (n == 0 || n > TD_STOP_BYTES_MAX)
            return -EINVAL;
        p->stops[p->n_stops++] = (td_str){td_arena_strndup(&job->arena, m->stop[i], n), n};
    }
    return fill_prompt(job, m, ret_text);
}

static void refuse(td_call *c, td_error error, const char *text)
{
    const td_error_info *info = td_error_get(error);
    td_status st = {
        .code = (uint32_t)info->status, .error = info->name, .message = text ? text : info->text};
    td_call_finish(c, &st);
}

/* Who proved a key is a tenant of his own. The copy outlives his session. */
static int set_tenant(td_text_job *job, const char *name)
{
    size_t n = strlen(name);
    const char *copy = td_arena_strndup(&job->arena, name, n);
    job->ctx.tenant = (td_str){copy, copy ? n : 0};
    return copy ? 0 : -ENOMEM;
}

static generate *generate_new(td_inference *inf, td_call *c, const Tandem__V1__GenerateRequest *m)
{
    td_request_context ctx = {.card = inf->cfg.card,
                              .prefix_secret = inf->cfg.prefix_secret,
                              .prefix_secret_bytes = inf->cfg.prefix_secret_bytes,
                              .tenant = {"", 0},
                              .strict = inf->cfg.strict};
    td_dispatch_state st;
    td_dispatch_get_state(inf->cfg.dispatch, &st);
    ctx.max_context = inf->cfg.card->max_context;
    if (st.max_context)
        ctx.max_context = TD_MIN(ctx.max_context, st.max_context);
    generate *g = calloc(1, sizeof *g);
    td_text_job *job =
        td_text_job_new(m->n_messages ? TD_API_CHAT : TD_API_COMPLETIONS, &ctx, (td_str){"", 0});
    if (!g || !job) {
        free(g);
        td_text_job_free(job);
        return NULL;
    }
    const td_peer *peer = td_session_peer(td_call_session(c));
    if (peer && set_tenant(job, peer->name) < 0) {
        free(g);
        td_text_job_free(job);
        return NULL;
    }
    /* the body's bytes are the request's: the arena must hold what they become */
    job->arena.limit_bytes += (size_t)MESSAGE_BYTES_MAX * 2;
    *g = (generate){.owner = inf, .call = c, .job = job, .parsing = 1};
    td_strbuf_init(&g->text);
    td_strbuf_init(&g->reasoning);
    g->after = (td_after){.fn = pump, .arg = g};
    td_edge_make_id("rpc-", g->id);
    td_list_add(&inf->calls, &g->node);
    inf->n_running++;
    return g;
}

static void start_generate(td_inference *inf, td_call *c, td_str message)
{
    Tandem__V1__GenerateRequest *m = NULL;
    td_err err = {0};
    if (TD_UNPACK(&inf->codec, tandem__v1__generate_request, message.ptr, message.len, &m, &err) <
        0) {
        refuse(c, TD_ERROR_INVALID_REQUEST, err.text);
        return;
    }
    generate *g = generate_new(inf, c, m);
    const char *text = NULL;
    if (!g) {
        refuse(c, TD_ERROR_OVERLOADED, "out of memory");
    } else {
        td_text_job *job = g->job;
        job->rpc = 1;
        job->done = parsed;
        job->arg = g;
        td_error error = TD_ERROR_NONE;
        if (fill_params(job, m, &text) < 0)
            error = TD_ERROR_INVALID_VALUE;
        else if (td_text_pool_submit(inf->cfg.pool, job) < 0)
            error = TD_ERROR_QUEUE_FULL;
        if (error) {
            g->parsing = 0;
            finish(g, error, text, 0);
            release(g);
        } else {
            td_call_on_cancel(c, on_cancel, g);
            td_call_on_credit(c, on_credit, g);
        }
    }
}

static void send_and_finish(td_call *c, const ProtobufCMessage *m)
{
    uint8_t buf[1024];
    size_t n = protobuf_c_message_get_packed_size(m);
    if (n > sizeof buf) {
        refuse(c, TD_ERROR_INTERNAL, NULL);
        return;
    }
    protobuf_c_message_pack(m, buf);
    td_call_send(c, buf, n);
    td_call_finish(c, NULL);
}

static void answer_models(td_inference *inf, td_call *c)
{
    Tandem__V1__ModelsReply m = TANDEM__V1__MODELS_REPLY__INIT;
    char *name = inf->cfg.card->name;
    m.n_names = 1;
    m.names = &name;
    m.has_max_context = 1;
    m.max_context = inf->cfg.card->max_context;
    send_and_finish(c, &m.base);
}

static void answer_health(td_inference *inf, td_call *c)
{
    td_dispatch_state st;
    td_dispatch_get_state(inf->cfg.dispatch, &st);
    Tandem__V1__HealthReply m = TANDEM__V1__HEALTH_REPLY__INIT;
    m.status = st.ready && !inf->draining ? TANDEM__V1__HEALTH_REPLY__SERVING__SERVING
                                          : TANDEM__V1__HEALTH_REPLY__SERVING__NOT_SERVING;
    send_and_finish(c, &m.base);
}

static void on_call(void *arg, td_call *c, td_str method, td_str message)
{
    td_inference *inf = arg;
    if (td_str_eq(method, "tandem.v1.Health/Check")) {
        answer_health(inf, c);
    } else if (td_str_eq(method, "tandem.v1.Inference/Models")) {
        answer_models(inf, c);
    } else if (!td_str_eq(method, "tandem.v1.Inference/Generate")) {
        refuse(c, TD_ERROR_UNSUPPORTED,
               "this endpoint has tandem.v1.Inference/Generate, Models and tandem.v1.Health/Check");
    } else if (inf->draining) {
        refuse(c, TD_ERROR_DRAINING, NULL);
    } else {
        start_generate(inf, c, message);
    }
}

/* ---- life ---- */

int td_inference_open(td_loop *l, const td_inference_config *config, td_inference **ret_inference,
                      td_err *reterr_err)
{
    td_inference *inf = calloc(1, sizeof *inf);
    if (!inf)
        return td_err_set(reterr_err, -ENOMEM, "rpc: out of memory");
    inf->loop = l;
    inf->cfg = *config;
    td_list_init(&inf->calls);
    td_codec_init(&inf->codec);
    td_rpc_config rc = {.endpoint = config->endpoint,
                        .link = config->link,
                        .door = TD_DOOR_CLIENT,
                        .max_message_bytes = MESSAGE_BYTES_MAX,
                        .ops = {.on_call = on_call},
                        .arg = inf};
    td_random_bytes(rc.epoch, sizeof rc.epoch);
    int r = td_rpc_open(l, &rc, &inf->rpc, reterr_err);
    if (r < 0) {
        td_codec_done(&inf->codec);
        free(inf);
        return r;
    }
    *ret_inference = inf;
    return 0;
}

const char *td_inference_endpoint(const td_inference *i)
{
    return td_rpc_endpoint(i->rpc);
}

void td_inference_drain(td_inference *i)
{
    i->draining = 1;
}

uint32_t td_inference_running(const td_inference *i)
{
    return i->n_running;
}

void td_inference_close(td_inference *i)
{
    if (!i)
        return;
    td_rpc_close(i->rpc); /* every call is cancelled */
    td_codec_done(&i->codec);
    free(i);
}
