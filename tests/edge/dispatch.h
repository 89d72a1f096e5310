/* SPDX-License-Identifier: Apache-2.0 */
/* A router's dispatch, workers that live in the test and speak the protocol, and its clients.
 * Tokens are 1000 * (choice + 1) + index, so that what a client gets is known beforehand. */
#ifndef TD_TESTS_EDGE_DISPATCH_H
#define TD_TESTS_EDGE_DISPATCH_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
#include <cmocka.h>
#include <string.h>

#include "base/clock.h"
#include "net/loop.h"
#include "net/metrics.h"
#include "proto/engine.pb-c.h"
#include "proto/rpc.pb-c.h"
#include "router/dispatch.h"
#include "rpc/rpc.h"

enum { MAX_CALLS = 8, N_CHOICES = 2, N_IDS = 64, WAIT_US = 5000000 };

/* ---- a worker of this test ---- */

typedef struct worker worker;

typedef struct served {
    worker *w;
    td_call *call; /* NULL: finished */
    Tandem__V1__ReserveRequest *reserve;
    Tandem__V1__PrefillRequest *prefill;
    int cancelled, local;
} served;

struct worker {
    td_rpc *rpc;
    td_session *session;
    Tandem__V1__Hello hello;
    uint8_t epoch[16], hash[32];
    char name[16];
    int is_decode, up, hold, malformed; /* hold: do not answer by itself */
    int late;                           /* prefill: D may speak before the reply goes out */
    int lies;                           /* prefill: another token when it resamples */
    uint32_t local;                     /* decode: prefills so much itself when it may; 0 = never */
    td_timer *death, *answer;
    uint32_t stop_at; /* decode: dies (closes) in place of sending this index; 0 = never */
    char refused[300];
    served calls[MAX_CALLS];
    uint32_t n_calls;
};

static td_loop *loop;
static td_metrics *metrics;
static td_dispatch *dispatch;
static char endpoint[64];
static worker P, D, D2;

static uint32_t token(uint32_t choice, uint32_t index)
{
    return 1000 * (choice + 1) + index;
}

static void send_event(served *c, Tandem__V1__DecodeEvent *m)
{
    uint8_t buf[4096];
    size_t n = tandem__v1__decode_event__pack(m, buf);
    assert_int_equal(td_call_send(c->call, buf, n), 0);
}

static void finish(served *c, uint32_t code, const char *message)
{
    td_status st = {.code = code, .error = "", .message = message};
    td_call *call = c->call;
    c->call = NULL;
    td_call_finish(call, &st);
}

static uint32_t emitted_of(const Tandem__V1__Request *r, uint32_t choice, int *ret_open)
{
    *ret_open = r->n_emitted == 0;
    for (size_t i = 0; i < r->n_emitted; i++)
        if (r->emitted[i]->choice == choice) {
            const uint32_t *ids = (const uint32_t *)(const void *)r->emitted[i]->ids.data;
            uint32_t n = (uint32_t)(r->emitted[i]->ids.len / 4);
            *ret_open = 1;
            for (uint32_t k = 0; k < n; k++)
                assert_int_equal(ids[k],
                                 token(choice, k)); /* what was delivered, and nothing else */
            return n;
        }
    return 0;
}

/* A logprob and two alternatives that follow from the id. */
typedef struct scores {
    float logprob, top[2];
    uint32_t ids[2];
    Tandem__V1__TopLogprob m, *list[1];
} scores;

static void score(Tandem__V1__TokenRun *t, scores *s, uint32_t id)
{
    s->logprob = -(float)id;
    s->ids[0] = id;
    s->ids[1] = id + 1;
    s->top[0] = -(float)id;
    s->top[1] = -(float)id - 1;
    tandem__v1__top_logprob__init(&s->m);
    s->m.ids = (ProtobufCBinaryData){8, (uint8_t *)s->ids};
    s->m.logprobs = (ProtobufCBinaryData){8, (uint8_t *)s->top};
    s->list[0] = &s->m;
    t->has_logprobs = 1;
    t->logprobs = (ProtobufCBinaryData){4, (uint8_t *)&s->logprob};
    t->n_top = 1;
    t->top = s->list;
}

/* One BATCH per step with the next token of each choice, as a decode worker sends them; dies at
 * stop_at. 1 = all sent. */
static int decode_step(served *c, uint32_t step)
{
    const Tandem__V1__Request *r = c->reserve->request;
    Tandem__V1__TokenRun runs[N_CHOICES], *ptr[N_CHOICES];
    scores lp[N_CHOICES];
    Tandem__V1__DecodeEvent m = TANDEM__V1__DECODE_EVENT__INIT;
    uint32_t ids[N_CHOICES], last = 0;
    m.runs = ptr;
    for (uint32_t i = 0; i < r->n; i++) {
        int open;
        uint32_t e = emitted_of(r, i, &open), index = (e ? e : !c->local) + step;
        if (!open || index >= r->max_tokens)
            continue;
        if (c->w->stop_at && index >= c->w->stop_at)
            return -1;
        Tandem__V1__TokenRun *t = &runs[m.n_runs];
        tandem__v1__token_run__init(t);
        t->choice = i;
        t->index = index;
        ids[m.n_runs] = token(i, index);
        t->ids = (ProtobufCBinaryData){4, (uint8_t *)&ids[m.n_runs]};
        t->has_finish = index + 1 == r->max_tokens;
        t->finish = TANDEM__V1__FINISH__FINISH_LENGTH;
        if (r->logprobs)
            score(t, &lp[m.n_runs], ids[m.n_runs]);
        ptr[m.n_runs++] = t;
        last |= !t->has_finish;
    }
    if (!m.n_runs)
        return 1;
    uint8_t buf[4096];
    td_batch_begin(c->w->session, step);
    assert_int_equal(td_batch_add(c->call, buf, tandem__v1__decode_event__pack(&m, buf)), 0);
    td_batch_end(c->w->session, NULL);
    return !last;
}

static void worker_close(worker *w);

static void close_later(void *arg)
{
    worker *w = arg;
    td_timer_del(w->death);
    w->death = NULL;
    worker_close(w);
}

/* The blocks have arrived. */
static void decode_commit(served *c)
{
    Tandem__V1__DecodeEvent m = TANDEM__V1__DECODE_EVENT__INIT;
    Tandem__V1__Usage usage = TANDEM__V1__USAGE__INIT;
    m.has_committed = m.committed = 1;
    usage.has_transfer_bytes = usage.has_transfer_us = 1;
    usage.transfer_bytes = c->local ? 0 : 4096;
    usage.transfer_us = c->local ? 0 : 77;
    usage.has_prefill_us = usage.has_cached_tokens = c->local;
    usage.prefill_us = 55;
    usage.cached_tokens = 2;
    m.usage = &usage;
    send_event(c, &m);
    for (uint32_t step = 0;; step++) {
        int r = decode_step(c, step);
        if (r < 0) {
            td_timer_add(loop, 0, 0, close_later, c->w, &c->w->death);
            return;
        }
        if (r)
            break;
    }
    finish(c, TD_OK, "");
}

static void say_local(served *c)
{
    Tandem__V1__DecodeEvent m = TANDEM__V1__DECODE_EVENT__INIT;
    m.has_local = 1;
    m.local = c->w->local;
    c->local = 1;
    send_event(c, &m);
    if (m.local <= c->reserve->local_tokens) /* else it hears that it is broken */
        decode_commit(c);
}

static void grant(served *c)
{
    uint8_t zeros[32] = {0}, id[16] = {0};
    Tandem__V1__Ticket t = TANDEM__V1__TICKET__INIT;
    Tandem__V1__DecodeEvent m = TANDEM__V1__DECODE_EVENT__INIT;
    memcpy(id, &c, sizeof c); /* the fake prefill worker finds the call in it */
    t.id = (ProtobufCBinaryData){16, id};
    t.attempt = c->reserve->attempt;
    t.decode_epoch = (ProtobufCBinaryData){16, c->w->epoch};
    t.layout_hash = t.profile_id = (ProtobufCBinaryData){16, zeros};
    t.model_hash = (ProtobufCBinaryData){32, zeros};
    t.endpoint = (ProtobufCBinaryData){1, (uint8_t *)"-"};
    m.ticket = &t;
    send_event(c, &m);
}

/* The Reserve call whose ticket a Prefill call carries. */
static served *reserved_for(const served *c)
{
    served *d = NULL;
    if (c->prefill->ticket)
        memcpy(&d, c->prefill->ticket->id.data, sizeof d);
    return d;
}

static void prefill_answer(served *c)
{
    const Tandem__V1__Request *r = c->prefill->request;
    Tandem__V1__TokenRun runs[N_CHOICES], *ptr[N_CHOICES];
    scores lp[N_CHOICES], prompt[2];
    Tandem__V1__PromptLogprobs pm = TANDEM__V1__PROMPT_LOGPROBS__INIT;
    Tandem__V1__PrefillReply m = TANDEM__V1__PREFILL_REPLY__INIT;
    uint32_t ids[N_CHOICES];
    uint8_t buf[4096];
    m.first = ptr;
    m.prompt_tokens = (uint32_t)(r->prompt.len / 4);
    m.cached_tokens = 1;
    for (uint32_t i = 0; i < r->n; i++) {
        int open;
        uint32_t e = emitted_of(r, i, &open), index = e ? e - 1 : 0;
        if (!open)
            continue;
        Tandem__V1__TokenRun *t = &runs[m.n_first];
        tandem__v1__token_run__init(t);
        t->choice = i;
        t->index = index;
        ids[m.n_first] = token(i, index) + (e && c->w->lies);
        t->ids = (ProtobufCBinaryData){c->w->malformed ? 3 : 4, (uint8_t *)&ids[m.n_first]};
        t->has_finish = index + 1 == r->max_tokens;
        t->finish = TANDEM__V1__FINISH__FINISH_LENGTH;
        if (r->logprobs)
            score(t, &lp[m.n_first], ids[m.n_first]);
        ptr[m.n_first++] = t;
    }
    Tandem__V1__TopLogprob *prompt_tops[2];
    float prompt_values[2] = {-1, -2};
    for (uint32_t i = 0; i < 2 && r->prompt_logprobs; i++) {
        Tandem__V1__TokenRun unused = TANDEM__V1__TOKEN_RUN__INIT;
        score(&unused, &prompt[i], 40 + i);
        prompt_tops[i] = &prompt[i].m;
        pm.logprobs = (ProtobufCBinaryData){8, (uint8_t *)prompt_values};
        pm.n_top = 2;
        pm.top = prompt_tops;
        m.prompt = &pm;
    }
    c->w->malformed = 0;
    served *d = reserved_for(c);
    size_t n = tandem__v1__prefill_reply__pack(&m, buf);
    assert_int_equal(td_call_send(c->call, buf, n), 0);
    finish(c, TD_OK, "");
    if (d && d->call && !d->cancelled)
        decode_commit(d);
}

static void on_cancel(void *arg, td_call *call)
{
    served *c = arg;
    c->cancelled = 1;
    finish(c, TD_CANCELLED, "cancelled");
}

static void on_late(void *arg)
{
    served *c = arg;
    td_timer_del(c->w->answer);
    c->w->answer = NULL;
    prefill_answer(c);
}

static void on_call(void *arg, td_call *call, td_str method, td_str message)
{
    worker *w = arg;
    assert_true(w->n_calls < MAX_CALLS);
    served *c = &w->calls[w->n_calls++];
    *c = (served){.w = w, .call = call};
    td_call_on_cancel(call, on_cancel, c);
    if (td_str_eq(method, "tandem.v1.Engine/Reserve")) {
        c->reserve =
            tandem__v1__reserve_request__unpack(NULL, message.len, (const uint8_t *)message.ptr);
        assert_non_null(c->reserve);
        if (w->local && c->reserve->local_tokens)
            say_local(c);
        else if (!w->hold)
            grant(c);
    } else {
        assert_true(td_str_eq(method, "tandem.v1.Engine/Prefill"));
        c->prefill =
            tandem__v1__prefill_request__unpack(NULL, message.len, (const uint8_t *)message.ptr);
        assert_non_null(c->prefill);
        if (w->late) {
            decode_commit(reserved_for(c)); /* all of D's words are with the router before P's */
            td_timer_add(loop, 30 * TD_MS, 0, on_late, c, &w->answer);
        } else if (!w->hold) {
            prefill_answer(c);
        }
    }
}

static void on_up(void *arg, td_session *s)
{
    worker *w = arg;
    w->up = 1;
    w->session = s;
}

static void on_down(void *arg, td_session *s, const char *reason)
{
    worker *w = arg;
    w->up = 0;
    snprintf(w->refused, sizeof w->refused, "%s", reason);
}

static void worker_open(worker *w, const char *name, int is_decode)
{
    static uint8_t lives;
    memset(w, 0, sizeof *w);
    snprintf(w->name, sizeof w->name, "%s", name);
    memset(w->epoch, ++lives, 16);
    memset(w->hash, 1, sizeof w->hash);
    w->is_decode = is_decode;
    tandem__v1__hello__init(&w->hello);
    w->hello.major = 1;
    w->hello.role = is_decode ? TANDEM__V1__ROLE__ROLE_DECODE : TANDEM__V1__ROLE__ROLE_PREFILL;
    w->hello.epoch = (ProtobufCBinaryData){16, w->epoch};
    w->hello.has_name = 1;
    w->hello.name = (ProtobufCBinaryData){strlen(w->name), (uint8_t *)w->name};
    w->hello.has_model_hash = w->hello.has_config_hash = w->hello.has_tokenizer_hash = 1;
    w->hello.model_hash = w->hello.config_hash = w->hello.tokenizer_hash =
        (ProtobufCBinaryData){32, w->hash};
    w->hello.has_profile_id = w->hello.has_layout_hash = 1;
    w->hello.profile_id = w->hello.layout_hash = (ProtobufCBinaryData){16, w->hash};
    w->hello.has_block_tokens = w->hello.has_kv_blocks = w->hello.has_max_seqs =
        w->hello.has_max_context = 1;
    w->hello.block_tokens = 64;
    w->hello.kv_blocks = 8;
    w->hello.max_seqs = 8;
    w->hello.max_context = 512;
}

static void worker_dial(worker *w)
{
    td_rpc_config c = {.endpoint = endpoint,
                       .dial = 1,
                       .hello = &w->hello,
                       .ops = {.on_call = on_call, .on_up = on_up, .on_down = on_down},
                       .arg = w};
    td_err err = {0};
    memcpy(c.epoch, w->epoch, 16);
    if (td_rpc_open(loop, &c, &w->rpc, &err) < 0)
        fail_msg("%s", err.text);
}

static void worker_close(worker *w)
{
    if (!w->rpc)
        return;
    for (uint32_t i = 0; i < w->n_calls; i++)
        if (w->calls[i].call)
            finish(&w->calls[i], TD_UNAVAILABLE, "dies");
    td_rpc_close(w->rpc);
    w->rpc = NULL;
    w->up = 0;
    for (uint32_t i = 0; i < w->n_calls; i++) {
        if (w->calls[i].reserve)
            tandem__v1__reserve_request__free_unpacked(w->calls[i].reserve, NULL);
        if (w->calls[i].prefill)
            tandem__v1__prefill_request__free_unpacked(w->calls[i].prefill, NULL);
        w->calls[i].reserve = NULL;
        w->calls[i].prefill = NULL;
    }
}

/* ---- a client of this test ---- */

typedef struct client {
    td_gen *gen;
    uint32_t ids[N_CHOICES][N_IDS], n[N_CHOICES], finish[N_CHOICES];
    int scored;   /* asked for logprobs */
    int n_prompt; /* prompt logprobs seen */
    int ends, flushes;
    uint32_t stop_after; /* ends choice 0 when it has so many */
    td_error error;
    char text[200];
    uint32_t retry_ms;
    td_gen_usage usage;
} client;

static void on_run(void *arg, const td_gen_run *r)
{
    client *c = arg;
    assert_int_equal(c->ends, 0);
    assert_int_equal(r->index, c->n[r->choice]);
    for (size_t i = 0; i < r->n; i++) {
        assert_int_equal(r->ids[i], token(r->choice, r->index + (uint32_t)i));
        c->ids[r->choice][c->n[r->choice]++] = r->ids[i];
        assert_int_equal(r->logprobs != NULL, c->scored);
        if (!c->scored)
            continue;
        assert_true(r->logprobs[i] == -(float)r->ids[i]);
        assert_int_equal(r->top[i].n, 2);
        assert_int_equal(r->top[i].ids[1], r->ids[i] + 1);
        assert_true(r->top[i].logprobs[1] == -(float)r->ids[i] - 1);
    }
    c->finish[r->choice] = (uint32_t)r->finish;
    if (c->stop_after && r->choice == 0 && c->n[0] >= c->stop_after)
        td_gen_end_choice(c->gen, 0);
}

static void on_end(void *arg, td_error error, const char *text, uint32_t retry_after_ms,
                   const td_gen_usage *usage)
{
    client *c = arg;
    c->ends++;
    c->error = error;
    c->retry_ms = retry_after_ms;
    c->usage = *usage;
    snprintf(c->text, sizeof c->text, "%s", text ? text : "");
}

static void on_prompt_logprobs(void *arg, const float *logprobs, const td_gen_top *top, size_t n)
{
    client *c = arg;
    assert_int_equal(n, 2);
    assert_int_equal(c->n[0], 0); /* before any token */
    assert_true(logprobs[0] == -1 && logprobs[1] == -2);
    assert_int_equal(top[1].ids[0], 41);
    c->n_prompt++;
}

static void on_flush(void *arg)
{
    ((client *)arg)->flushes++;
}

static uint32_t n_requests;

static td_error submit_spec(client *c, const td_gen_spec *more, uint32_t *ret_retry)
{
    static const uint32_t prompt[] = {5, 6, 7};
    static const td_gen_ops ops = {.on_run = on_run,
                                   .on_prompt_logprobs = on_prompt_logprobs,
                                   .on_end = on_end,
                                   .on_flush = on_flush};
    char fresh[32];
    snprintf(fresh, sizeof fresh, "r%u", ++n_requests);
    td_gen_spec s = *more;
    if (!s.request_id.len)
        s.request_id = td_str_of(fresh);
    s.tenant = td_str_of("t");
    s.prompt = prompt;
    s.n_prompt = 3;
    s.temperature = s.top_p = s.repetition_penalty = 1;
    s.seed = 1;
    if (!s.timeout_us)
        s.timeout_us = 20 * TD_S;
    td_err err = {0};
    td_error e = TD_ERROR_NONE;
    uint32_t retry = 0;
    memset(c, 0, sizeof *c);
    c->scored = s.logprobs;
    if (td_dispatch_submit(dispatch, &s, &ops, c, &c->gen, &e, &retry, &err) == 0)
        e = TD_ERROR_NONE;
    if (ret_retry)
        *ret_retry = retry;
    return e;
}

static td_error submit_as(client *c, uint32_t n, uint32_t max_tokens, const char *id,
                          uint32_t *ret_retry)
{
    td_gen_spec s = {.n = n, .max_tokens = max_tokens, .request_id = td_str_of(id)};
    return submit_spec(c, &s, ret_retry);
}

static td_error submit(client *c, uint32_t n, uint32_t max_tokens)
{
    return submit_as(c, n, max_tokens, NULL, NULL);
}

#define WAIT(cond)                                                                                 \
    do {                                                                                           \
        uint64_t end_ = td_now_us() + WAIT_US;                                                     \
        while (!(cond) && td_now_us() < end_)                                                      \
            td_loop_run_once(loop, 20000);                                                         \
        if (!(cond))                                                                               \
            fail_msg("waited 5 s for: %s", #cond);                                                 \
    } while (0)

static td_dispatch_state get_state(void)
{
    td_dispatch_state s;
    td_dispatch_get_state(dispatch, &s);
    return s;
}

static int both_ready(void)
{
    return get_state().ready && P.up && D.up;
}

static uint64_t stall_us;
static uint32_t local_tokens;

static int open_with(uint32_t max_queue)
{
    td_dispatch_config c = {.control = endpoint,
                            .max_queue = max_queue,
                            .vocab_size = 100000,
                            .max_context = 512,
                            .stall_us = stall_us,
                            .local_tokens = local_tokens};
    td_err err = {0};
    static int n;
    snprintf(endpoint, sizeof endpoint, "ipc:///tmp/td-dispatch-%d-%d.sock", (int)getpid(), ++n);
    memset(c.config_hash, 1, 32);
    memset(c.tokenizer_hash, 1, 32);
    assert_int_equal(td_loop_new(&loop), 0);
    assert_int_equal(td_metrics_new(&metrics), 0);
    c.metrics = metrics;
    if (td_dispatch_open(loop, &c, &dispatch, &err) < 0)
        fail_msg("%s", err.text);
    worker_open(&P, "p1", 0);
    worker_open(&D, "d1", 1);
    worker_open(&D2, "d2", 1);
    return 0;
}

static int setup(void **state)
{
    return open_with(64);
}

static int setup_small_queue(void **state)
{
    return open_with(1);
}

static int setup_local(void **state)
{
    local_tokens = 3;
    return open_with(64);
}

static int setup_watchful(void **state)
{
    stall_us = 300 * TD_MS;
    return open_with(64);
}

static int teardown(void **state)
{
    stall_us = local_tokens = 0;
    worker_close(&P);
    worker_close(&D);
    worker_close(&D2);
    td_dispatch_close(dispatch);
    td_metrics_free(metrics);
    td_loop_free(loop);
    unlink(endpoint + strlen("ipc://"));
    return 0;
}

static void start_pair(void)
{
    worker_dial(&P);
    worker_dial(&D);
    WAIT(both_ready());
}

static uint64_t metric(const char *line)
{
    td_strbuf b;
    td_strbuf_init(&b);
    td_dispatch_update_metrics(dispatch);
    td_metrics_write(metrics, &b);
    char key[120];
    snprintf(key, sizeof key, "\ntandem_%s ", line);
    const char *p = strstr(b.data, key);
    uint64_t v = p ? strtoull(p + strlen(key), NULL, 10) : UINT64_MAX;
    td_strbuf_done(&b);
    return v;
}

static int all_idle(void)
{
    for (uint32_t i = 0; i < P.n_calls; i++)
        if (P.calls[i].call)
            return 0;
    for (uint32_t i = 0; i < D.n_calls; i++)
        if (D.calls[i].call)
            return 0;
    return 1;
}

#endif
