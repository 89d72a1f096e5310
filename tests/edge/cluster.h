/* SPDX-License-Identifier: Apache-2.0 */
/* A prefill and a decode worker as real processes, and a router in the test that speaks rpc to
 * them. */
#ifndef TD_TESTS_EDGE_CLUSTER_H
#define TD_TESTS_EDGE_CLUSTER_H

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/bug.h"
#include "base/clock.h"
#include "base/rand.h"
#include "net/loop.h"
#include "proto/engine.pb-c.h"
#include "proto/rpc.pb-c.h"
#include "rpc/rpc.h"

enum { TOKENS_MAX = 64, TOP = 20, CHOICES = 4 };

typedef struct cluster {
    td_loop *loop;
    td_rpc *rpc;
    td_session *session[2]; /* prefill, decode */
    pid_t pid[2];
    char dir[64];
    const char *decode_chunk; /* NULL: the default */
} cluster;

/* What the client side knows of one token, as bytes: compared with memcmp. */
typedef struct token {
    uint32_t id;
    float logprob;
    uint32_t top_ids[TOP];
    float top[TOP];
} token;

typedef struct request {
    cluster *c;
    char id[32];
    uint32_t prompt[2048];
    size_t n_prompt;
    uint32_t max_tokens, n, attempt, top_k;
    uint64_t seed;
    float temperature, repetition_penalty;
    uint8_t prefix_key[32];
    uint32_t emitted[CHOICES][TOKENS_MAX],
        n_emitted[CHOICES]; /* recovery: of the unfinished choices */
    int want_prompt;        /* prompt logprobs */
    uint32_t local_tokens;  /* what the decode worker may prefill */
    uint64_t timeout_us;
    /* test hooks */
    void (*on_ticket)(struct request *r,
                      Tandem__V1__Ticket *t); /* may change it; returns before Prefill starts */
    void (*on_local)(struct request *r);      /* the decode worker prefills */
    void (*on_committed)(struct request *r);  /* before the tokens of the same message */
    int no_prefill;
    /* result */
    td_call *call[2];
    int open[2], first_seen[CHOICES];
    uint32_t code[2];
    char why[2][200];
    token tokens[CHOICES][TOKENS_MAX];
    uint32_t n_tokens[CHOICES], n_decoded[CHOICES];
    int finish[CHOICES], committed, broken;
    uint64_t transfer_bytes;
    float prompt_lp[2048];
    uint32_t n_prompt_lp;
    uint32_t cached, held, sent_blocks;
    int got_ticket;
    uint32_t local; /* what it does prefill */
} request;

static ProtobufCBinaryData bin(const void *p, size_t n)
{
    return (ProtobufCBinaryData){.len = n, .data = (uint8_t *)(uintptr_t)p};
}

/* ---- processes ---- */

static pid_t spawn(const char *program, char *const argv[])
{
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        char path[512];
        prctl(PR_SET_PDEATHSIG, SIGKILL); /* never outlive a test that fails */
        snprintf(path, sizeof path, "%s/%s", TD_BINARY_DIR, program);
        execv(path, argv);
        fprintf(stderr, "%s: %m\n", path);
        _exit(127);
    }
    return pid;
}

static int cluster_hello(void *arg, td_session *s, const Tandem__V1__Hello *h, td_err *err)
{
    (void)arg;
    (void)err;
    td_session_set_user(s, (void *)(intptr_t)(h->role == TANDEM__V1__ROLE__ROLE_DECODE ? 2 : 1));
    return 0;
}

static void cluster_up(void *arg, td_session *s)
{
    cluster *c = arg;
    c->session[(intptr_t)td_session_user(s) - 1] = s;
}

static void cluster_down(void *arg, td_session *s, const char *reason)
{
    cluster *c = arg;
    (void)reason;
    for (int i = 0; i < 2; i++) {
        if (c->session[i] == s)
            c->session[i] = NULL;
    }
}

static void cluster_open(cluster *c)
{
    memset(c, 0, sizeof *c);
    snprintf(c->dir, sizeof c->dir, "/tmp/tandem-test-XXXXXX");
    assert_non_null(mkdtemp(c->dir));
    assert_int_equal(td_loop_new(&c->loop), 0);
    char endpoint[128];
    td_err err = {0};
    snprintf(endpoint, sizeof endpoint, "ipc://%s/control.sock", c->dir);
    td_rpc_config rc = {
        .endpoint = endpoint,
        .ops = {.on_hello = cluster_hello, .on_up = cluster_up, .on_down = cluster_down},
        .arg = c,
        .dead_ms = 20000};
    td_random_bytes(rc.epoch, 16);
    if (td_rpc_open(c->loop, &rc, &c->rpc, &err) < 0)
        fail_msg("%s", err.text);
}

static void cluster_turn(cluster *c)
{
    td_loop_run_once(c->loop, 20000);
}

static void wait_session(cluster *c, int role, int up)
{
    for (uint64_t end = td_now_us() + 60 * TD_S; (c->session[role] != NULL) != up;) {
        int status;
        if (td_now_us() > end)
            fail_msg("worker %d did not %s", role, up ? "come" : "go");
        if (up && waitpid(c->pid[role], &status, WNOHANG) == c->pid[role])
            fail_msg("worker %d ended with status %d", role, status);
        cluster_turn(c);
    }
}

/* option: the one in which the two differ. */
static void start_worker(cluster *c, int role, const char *model, const char *option,
                         const char *value, const char *blocks)
{
    char control[128];
    snprintf(control, sizeof control, "ipc://%s/control.sock", c->dir);
    const char *argv[] = {role ? "tandem-decode-worker" : "tandem-prefill-worker",
                          "--model",
                          model,
                          "--control",
                          control,
                          option,
                          value,
                          "--kv-blocks",
                          blocks,
                          "--threads",
                          "1",
                          "--log-level",
                          "warn",
                          role && c->decode_chunk ? "--chunk" : NULL,
                          c->decode_chunk,
                          NULL};
    c->pid[role] = spawn(argv[0], (char *const *)(uintptr_t)argv);
    wait_session(c, role, 1);
}

static void start_prefill(cluster *c, const char *model, const char *chunk, const char *blocks)
{
    start_worker(c, 0, model, "--chunk", chunk, blocks);
}

static void start_decode(cluster *c, const char *model, const char *kv, const char *blocks)
{
    start_worker(c, 1, model, "--kv-listen", kv, blocks);
}

/* End a worker as a supervisor does; it must leave cleanly. */
static void stop_worker(cluster *c, int role)
{
    int status = -1;
    kill(c->pid[role], SIGTERM);
    for (uint64_t end = td_now_us() + 60 * TD_S; waitpid(c->pid[role], &status, WNOHANG) == 0;) {
        if (td_now_us() > end)
            fail_msg("worker %d does not end", role);
        cluster_turn(c);
    }
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0)
        fail_msg("worker %d ended with status 0x%x", role, status);
    wait_session(c, role, 0);
}

static void cluster_close(cluster *c)
{
    char path[128];
    td_rpc_close(c->rpc);
    td_loop_free(c->loop);
    snprintf(path, sizeof path, "%s/control.sock", c->dir);
    unlink(path);
    snprintf(path, sizeof path, "%s/kv.sock", c->dir);
    unlink(path);
    snprintf(path, sizeof path, "%s/kv.sock.shm", c->dir); /* of a worker that was killed */
    unlink(path);
    rmdir(c->dir);
}

/* ---- requests ---- */

static void take_run(request *r, const Tandem__V1__TokenRun *m)
{
    uint32_t n = (uint32_t)(m->ids.len / 4);
    if (m->choice >= CHOICES || (m->index + n > TOKENS_MAX && r->max_tokens <= TOKENS_MAX)) {
        r->broken = 1;
        return;
    }
    for (uint32_t i = 0; i < n && m->index + i < TOKENS_MAX; i++) {
        token *t = &r->tokens[m->choice][m->index + i];
        memcpy(&t->id, m->ids.data + i * 4, 4);
        if (m->has_logprobs)
            memcpy(&t->logprob, m->logprobs.data + i * 4, 4);
        if (i < m->n_top && m->top[i]->ids.len <= sizeof t->top_ids) {
            memcpy(t->top_ids, m->top[i]->ids.data, m->top[i]->ids.len);
            memcpy(t->top, m->top[i]->logprobs.data, m->top[i]->logprobs.len);
        }
    }
    if (m->index + n > r->n_tokens[m->choice])
        r->n_tokens[m->choice] = m->index + n;
    if (m->has_finish)
        r->finish[m->choice] = (int)m->finish;
}

/* The decode worker's own tokens: from index 1, or 0 when it prefilled, or behind those emitted
 * before; no gap, none twice. */
static void take_decoded(request *r, const Tandem__V1__TokenRun *m)
{
    uint32_t c = m->choice % CHOICES, from = r->n_emitted[c] ? r->n_emitted[c] : !r->local;
    if (m->index != from + r->n_decoded[c])
        r->broken = 1;
    r->n_decoded[c] += (uint32_t)(m->ids.len / 4);
    take_run(r, m);
}

static void on_status(void *arg, td_call *call, const td_status *s)
{
    request *r = arg;
    int which = call == r->call[1];
    r->open[which] = 0;
    r->code[which] = s->code;
    snprintf(r->why[which], sizeof r->why[which], "%s", s->message ? s->message : "");
    r->call[which] = NULL;
    if (s->code && r->call[!which])
        td_call_cancel(r->call[!which], "the other leg failed");
}

static void on_prefill_data(void *arg, td_call *call, td_str message)
{
    request *r = arg;
    (void)call;
    Tandem__V1__PrefillReply *m =
        tandem__v1__prefill_reply__unpack(NULL, message.len, (const uint8_t *)message.ptr);
    assert_non_null(m);
    r->cached = m->cached_tokens;
    r->sent_blocks = m->sent_blocks;
    if (m->prompt && m->prompt->logprobs.len <= sizeof r->prompt_lp) {
        r->n_prompt_lp = (uint32_t)(m->prompt->logprobs.len / 4);
        memcpy(r->prompt_lp, m->prompt->logprobs.data, m->prompt->logprobs.len);
    }
    for (size_t i = 0; i < m->n_first; i++) {
        uint32_t choice = m->first[i]->choice;
        take_run(r, m->first[i]);
        r->first_seen[choice]++;
    }
    tandem__v1__prefill_reply__free_unpacked(m, NULL);
}

static void fill_request(request *r, Tandem__V1__Request *m, Tandem__V1__SamplingParams *p,
                         Tandem__V1__Emitted *e, Tandem__V1__Emitted **list)
{
    tandem__v1__request__init(m);
    tandem__v1__sampling_params__init(p);
    m->request_id = bin(r->id, strlen(r->id));
    m->prompt = bin(r->prompt, r->n_prompt * 4);
    p->has_temperature = p->has_top_k = p->has_repetition_penalty = 1;
    p->temperature = r->temperature;
    p->top_k = r->top_k;
    p->repetition_penalty = r->repetition_penalty;
    p->seed = r->seed;
    m->sampling = p;
    m->max_tokens = r->max_tokens;
    m->has_ignore_eos = m->has_n = m->has_logprobs = m->has_top_logprobs = 1;
    m->ignore_eos = 1;
    m->n = r->n;
    m->logprobs = 1;
    m->top_logprobs = TOP;
    m->prefix_key = bin(r->prefix_key, 32);
    m->has_prompt_logprobs = 1;
    m->prompt_logprobs = r->want_prompt;
    m->emitted = list;
    for (uint32_t c = 0; c < CHOICES; c++) {
        if (!r->n_emitted[c])
            continue;
        tandem__v1__emitted__init(&e[c]);
        e[c].choice = c;
        e[c].ids = bin(r->emitted[c], r->n_emitted[c] * 4);
        list[m->n_emitted++] = &e[c];
    }
}

static void start_call(request *r, int which, const char *method, const ProtobufCMessage *m,
                       td_call_ops ops)
{
    size_t n = protobuf_c_message_get_packed_size(m);
    uint8_t *bytes = malloc(n);
    protobuf_c_message_pack(m, bytes);
    td_call_spec spec = {.session = r->c->session[which],
                         .method = method,
                         .message = bytes,
                         .message_bytes = n,
                         .timeout_us = r->timeout_us ? r->timeout_us : 60 * TD_S,
                         .request_id = td_str_of(r->id),
                         .attempt = r->attempt,
                         .ops = ops,
                         .arg = r};
    assert_non_null(spec.session);
    assert_int_equal(td_call_start(&spec, &r->call[which]), 0);
    r->open[which] = 1;
    free(bytes);
}

static void start_prefill_call(request *r, Tandem__V1__Ticket *ticket)
{
    Tandem__V1__Request q;
    Tandem__V1__SamplingParams p;
    Tandem__V1__Emitted e[CHOICES], *list[CHOICES];
    Tandem__V1__PrefillRequest m = TANDEM__V1__PREFILL_REQUEST__INIT;
    fill_request(r, &q, &p, e, list);
    m.request = &q;
    m.attempt = r->attempt;
    m.ticket = ticket;
    start_call(r, 0, "tandem.v1.Engine/Prefill", &m.base,
               (td_call_ops){on_prefill_data, on_status});
}

static void on_decode_data(void *arg, td_call *call, td_str message)
{
    request *r = arg;
    (void)call;
    Tandem__V1__DecodeEvent *m =
        tandem__v1__decode_event__unpack(NULL, message.len, (const uint8_t *)message.ptr);
    assert_non_null(m);
    if (m->ticket) {
        r->got_ticket++;
        r->held = m->ticket->held_blocks;
        if (r->on_ticket)
            r->on_ticket(r, m->ticket);
        if (!r->no_prefill)
            start_prefill_call(r, m->ticket);
    }
    if (m->has_local) {
        r->broken |= m->ticket || r->local || r->got_ticket;
        r->local = m->local;
        if (r->on_local)
            r->on_local(r);
    }
    if (m->has_committed && m->committed) {
        r->committed++;
        if (r->on_committed)
            r->on_committed(r);
        r->transfer_bytes = m->usage->transfer_bytes;
    }
    if (m->n_runs && !r->committed)
        r->broken = 1;
    for (size_t i = 0; i < m->n_runs; i++)
        take_decoded(r, m->runs[i]);
    tandem__v1__decode_event__free_unpacked(m, NULL);
}

static void request_start(cluster *c, request *r)
{
    Tandem__V1__Request q;
    Tandem__V1__SamplingParams p;
    Tandem__V1__Emitted e[CHOICES], *list[CHOICES];
    Tandem__V1__ReserveRequest m = TANDEM__V1__RESERVE_REQUEST__INIT;
    r->c = c;
    if (!r->attempt)
        r->attempt = 1;
    if (!r->n)
        r->n = 1;
    fill_request(r, &q, &p, e, list);
    m.request = &q;
    m.attempt = r->attempt;
    m.has_local_tokens = r->local_tokens > 0;
    m.local_tokens = r->local_tokens;
    start_call(r, 1, "tandem.v1.Engine/Reserve", &m.base, (td_call_ops){on_decode_data, on_status});
}

static void request_wait(cluster *c, request *r)
{
    uint64_t end = td_now_us() + 120 * TD_S;
    while (r->open[0] || r->open[1]) {
        if (td_now_us() > end)
            fail_msg("request %s does not end (prefill %d, decode %d, tokens %u)", r->id,
                     r->open[0], r->open[1], r->n_tokens[0]);
        cluster_turn(c);
    }
}

static void request_must_succeed(const request *r)
{
    for (int i = 0; i < 2; i++) {
        if (r->code[i])
            fail_msg("%s: leg %d ended with %s: %s", r->id, i, td_code_name(r->code[i]), r->why[i]);
    }
    assert_int_equal(r->broken, 0);
    assert_int_equal(r->committed, 1);
}

#endif
