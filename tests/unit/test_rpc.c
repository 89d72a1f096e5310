/* SPDX-License-Identifier: Apache-2.0 */
/* rpc/rpc.h over real sockets (ipc), both sides on one loop; and a raw DEALER that says what no
 * peer of ours would. */
#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include <zmq.h>

#include <cmocka.h>

#include "base/bug.h"
#include "base/clock.h"
#include "base/rand.h"
#include "proto/rpc.pb-c.h"
#include "rpc/codec.h"
#include "rpc/rpc.h"
#include "rpc/sock.h"
#include "rpc/zmq_ctx.h"

typedef struct side {
    td_rpc *rpc;
    td_session *session; /* the last one that came up */
    unsigned n_up, n_down, n_loads, n_batches;
    char reason[400];
    int refuse;
    /* callee */
    td_call *in[64]; /* calls kept open by "hold" and "flood" */
    unsigned n_in, n_cancelled, n_credit;
    uint32_t seen_attempt;
} side;

typedef struct world {
    td_loop *loop;
    char endpoint[200];
    side a, b; /* a binds, b dials */
    Tandem__V1__Hello hello;
} world;

typedef struct result {
    unsigned n_data, n_status;
    uint32_t code, retry_after_ms;
    char message[200], error[64], last[64];
    size_t bytes;
} result;

static void spin(world *w, int *flag_like, unsigned want, uint64_t timeout_us)
{
    uint64_t end = td_now_us() + timeout_us;
    while ((unsigned)*flag_like < want && td_now_us() < end)
        td_loop_run_once(w->loop, 2000);
}

#define WAIT(w, x, n)                                                                              \
    do {                                                                                           \
        spin((w), (int *)&(x), (n), 5 * TD_S);                                                     \
        assert_int_equal((x), (n));                                                                \
    } while (0)

static void idle(world *w, uint64_t us)
{
    for (uint64_t end = td_now_us() + us; td_now_us() < end;)
        td_loop_run_once(w->loop, 1000);
}

/* ---- the service under test ---- */

static void on_cancelled(void *arg, td_call *c)
{
    side *s = arg;
    s->n_cancelled++;
    td_call_finish(c, &(td_status){.code = TD_OK}); /* must read as the abort's code all the same */
}

static void flood(void *arg, td_call *c)
{
    side *s = arg;
    uintptr_t left = (uintptr_t)td_call_user(c);
    s->n_credit++;
    while (left > 0) {
        char text[16];
        int n = snprintf(text, sizeof text, "%u", (unsigned)left),
            r = td_call_send(c, text, (size_t)n);
        if (r == -EAGAIN)
            break;
        assert_int_equal(r, 0);
        left--;
    }
    td_call_set_user(c, (void *)left);
    if (left == 0)
        td_call_finish(c, NULL);
}

static void on_call(void *arg, td_call *c, td_str method, td_str message)
{
    side *s = arg;
    s->seen_attempt = td_call_attempt(c);
    if (td_str_eq(method, "t/Echo")) {
        assert_int_equal(td_call_send(c, message.ptr, message.len), 0);
        td_call_finish(c, NULL);
    } else if (td_str_eq(method, "t/Flood")) {
        td_call_set_user(c, (void *)(uintptr_t)1000);
        td_call_on_cancel(c, on_cancelled, s);
        td_call_on_credit(c, flood, s);
        flood(s, c);
    } else if (td_str_eq(method, "t/Deaf")) {
        s->in[s->n_in++ % TD_ARRAY_LEN(s->in)] = c;
    } else if (td_str_eq(method, "t/Hold")) {
        td_call_on_cancel(c, on_cancelled, s);
        s->in[s->n_in++ % TD_ARRAY_LEN(s->in)] = c;
    } else {
        td_call_finish(c, &(td_status){.code = TD_NOT_FOUND,
                                       .error = "not_found",
                                       .message = "no such method",
                                       .retry_after_ms = 7});
    }
}

static int on_hello(void *arg, td_session *s, const Tandem__V1__Hello *h, td_err *err)
{
    side *me = arg;
    if (me->refuse)
        return td_err_set(err, -EPERM, "model hash differs: %s", td_session_name(s));
    return 0;
}

static void on_up(void *arg, td_session *s)
{
    side *me = arg;
    me->session = s;
    me->n_up++;
}

static void on_down(void *arg, td_session *s, const char *reason)
{
    side *me = arg;
    if (me->session == s)
        me->session = NULL;
    me->n_down++;
    snprintf(me->reason, sizeof me->reason, "%s", reason);
}

static void on_load(void *arg, td_session *s, const Tandem__V1__Load *load)
{
    assert_int_equal(load->step, 42);
    ((side *)arg)->n_loads++;
}

static void on_batch_end(void *arg, td_session *s)
{
    ((side *)arg)->n_batches++;
}

static void get_load(void *arg, Tandem__V1__Load *load)
{
    load->has_step = 1;
    load->step = 42;
}

static td_rpc_config config_of(world *w, side *s, int dial)
{
    td_rpc_config c = {.endpoint = w->endpoint,
                       .dial = dial,
                       .hello = &w->hello,
                       .ping_ms = 30,
                       .dead_ms = 600,
                       .arg = s};
    c.ops = (td_rpc_ops){on_hello, on_up, on_down, on_call, on_load, on_batch_end, get_load};
    td_random_bytes(c.epoch, sizeof c.epoch);
    return c;
}

static void open_side(world *w, side *s, int dial)
{
    td_rpc_config c = config_of(w, s, dial);
    td_err err = {.code = 0};
    int r = -EADDRINUSE;
    /* the I/O thread closes a listener after td_rpc_close() has returned */
    for (int i = 0; i < 200 && r == -EADDRINUSE; i++) {
        r = td_rpc_open(w->loop, &c, &s->rpc, &err);
        if (r == -EADDRINUSE)
            usleep(5000);
    }
    if (r < 0)
        print_error("%s\n", err.text);
    assert_int_equal(r, 0);
}

static world *world_new(void)
{
    world *w = calloc(1, sizeof *w);
    assert_non_null(w);
    assert_int_equal(td_loop_new(&w->loop), 0);
    char dir[] = "/tmp/td-rpc-XXXXXX";
    assert_non_null(mkdtemp(dir));
    snprintf(w->endpoint, sizeof w->endpoint, "ipc://%s/s", dir);
    tandem__v1__hello__init(&w->hello);
    w->hello.role = TANDEM__V1__ROLE__ROLE_DECODE;
    w->hello.has_name = 1;
    w->hello.name = (ProtobufCBinaryData){.len = 7, .data = (uint8_t *)"decode\n"};
    return w;
}

static world *world_up(void)
{
    world *w = world_new();
    open_side(w, &w->a, 0);
    open_side(w, &w->b, 1);
    WAIT(w, w->a.n_up, 1);
    WAIT(w, w->b.n_up, 1);
    return w;
}

static void world_free(world *w)
{
    td_rpc_close(w->b.rpc);
    td_rpc_close(w->a.rpc);
    td_loop_free(w->loop);
    char *slash = strrchr(w->endpoint, '/');
    unlink(w->endpoint + 6);
    *slash = 0;
    rmdir(w->endpoint + 6);
    free(w);
}

/* ---- the caller ---- */

static void on_data(void *arg, td_call *c, td_str m)
{
    result *r = arg;
    assert_int_equal(r->n_status, 0);
    r->n_data++;
    r->bytes += m.len;
    snprintf(r->last, sizeof r->last, "%.*s", (int)TD_MIN(m.len, (size_t)60), m.len ? m.ptr : "");
}

static void on_status(void *arg, td_call *c, const td_status *st)
{
    result *r = arg;
    r->n_status++;
    r->code = st->code;
    r->retry_after_ms = st->retry_after_ms;
    snprintf(r->message, sizeof r->message, "%s", st->message);
    snprintf(r->error, sizeof r->error, "%s", st->error);
}

static td_call_spec spec_of(side *s, const char *method, result *r)
{
    return (td_call_spec){.session = s->session,
                          .method = method,
                          .message = "hello",
                          .message_bytes = 5,
                          .timeout_us = 5 * TD_S,
                          .request_id = td_str_of("r1"),
                          .attempt = 3,
                          .ops = {on_data, on_status},
                          .arg = r};
}

static td_call *start(side *s, const char *method, result *r)
{
    td_call_spec spec = spec_of(s, method, r);
    td_call *c;
    *r = (result){0};
    assert_int_equal(td_call_start(&spec, &c), 0);
    assert_int_equal(r->n_status, 0); /* never from inside */
    return c;
}

static void expect_echo(world *w, side *from)
{
    result r;
    start(from, "t/Echo", &r);
    WAIT(w, r.n_status, 1);
    assert_int_equal(r.code, TD_OK);
    assert_int_equal(r.n_data, 1);
    assert_string_equal(r.last, "hello");
}

/* ---- tests ---- */

/* Promise: both sides call; a status carries code, error name, text and retry time. */
static void test_call(void **state)
{
    world *w = world_up();
    assert_string_equal(td_session_name(w->a.session), "decode?");
    expect_echo(w, &w->a);
    expect_echo(w, &w->b);
    assert_int_equal(w->a.seen_attempt, 3);
    result r;
    start(&w->b, "t/None", &r);
    WAIT(w, r.n_status, 1);
    assert_int_equal(r.code, TD_NOT_FOUND);
    assert_int_equal(r.retry_after_ms, 7);
    assert_string_equal(r.error, "not_found");
    assert_string_equal(r.message, "no such method");
    spin(w, (int *)&w->a.n_loads, 1, TD_S);
    assert_true(w->a.n_loads > 0); /* PING carries the load */
    world_free(w);
}

/* Not a limit: prints the figure that the design asks for (below 200 us), on an idle machine. */
static void test_latency(void **state)
{
    world *w = world_up();
    result r;
    uint64_t best = UINT64_MAX;
    for (int i = 0; i < 300; i++) {
        uint64_t t = td_now_us();
        start(&w->b, "t/Echo", &r);
        while (!r.n_status)
            td_loop_run_once(w->loop, 10000);
        best = TD_MIN(best, td_now_us() - t);
    }
    print_message("round trip, fastest of 300: %u us\n", (unsigned)best);
    world_free(w);
}

/* Promise: 1000 messages in order through a window of 64; the callee is woken by credit. */
static void test_stream(void **state)
{
    world *w = world_up();
    result r;
    start(&w->a, "t/Flood", &r);
    WAIT(w, r.n_status, 1);
    assert_int_equal(r.code, TD_OK);
    assert_int_equal(r.n_data, 1000);
    assert_string_equal(r.last, "1");
    assert_true(w->b.n_credit > 1000 / 64);
    world_free(w);
}

/* Promise: a reader that consumes nothing gets its window and not one message more; others go on.
 */
static void test_slow_consumer(void **state)
{
    world *w = world_up();
    result r = {0};
    td_call_spec spec = spec_of(&w->a, "t/Flood", &r);
    td_call *c;
    spec.credit = 10;
    spec.manual_credit = 1;
    assert_int_equal(td_call_start(&spec, &c), 0);
    idle(w, 30000);
    assert_int_equal(r.n_data, 10);
    expect_echo(w, &w->a);
    td_call_consume(c, 5);
    WAIT(w, r.n_data, 15);
    td_call_consume(c, 100); /* more than was delivered counts as all of it */
    WAIT(w, r.n_data, 25);
    td_call_cancel(c, "enough");
    td_call_cancel(c, "enough");
    WAIT(w, r.n_status, 1);
    assert_int_equal(r.code, TD_CANCELLED);
    assert_int_equal(w->b.n_cancelled, 1);
    world_free(w);
}

/* Promise: CANCEL reaches the callee, whose OK reads CANCELLED; a deadline passes on both sides. */
static void test_cancel_and_deadline(void **state)
{
    world *w = world_up();
    result r;
    td_call *c = start(&w->a, "t/Hold", &r);
    WAIT(w, w->b.n_in, 1);
    td_call_cancel(c, "test");
    WAIT(w, r.n_status, 1);
    assert_int_equal(r.code, TD_CANCELLED);
    assert_string_equal(r.error, "cancelled");
    assert_int_equal(w->b.n_cancelled, 1);
    td_call_spec spec = spec_of(&w->a, "t/Hold", &r);
    spec.timeout_us = 30000;
    r = (result){0};
    assert_int_equal(td_call_start(&spec, &c), 0);
    WAIT(w, r.n_status, 1);
    assert_int_equal(r.code, TD_DEADLINE_EXCEEDED);
    WAIT(w, w->b.n_cancelled, 2);
    world_free(w);
}

/* Promise: when an incoming call is cancelled, its children are; and the parent's time bounds
 * theirs. */
static void test_children(void **state)
{
    world *w = world_up();
    result parent, child = {0};
    td_call *p = start(&w->a, "t/Hold", &parent), *c;
    WAIT(w, w->b.n_in, 1);
    td_call_spec spec = spec_of(&w->b, "t/Hold", &child); /* b, asked by a, asks a in turn */
    spec.parent = w->b.in[0];
    spec.timeout_us = 3600 * TD_S;
    assert_int_equal(td_call_start(&spec, &c), 0);
    WAIT(w, w->a.n_in, 1);
    assert_true(td_call_remaining_us(w->a.in[0]) <= 5 * TD_S);
    td_call_cancel(p, "test");
    WAIT(w, child.n_status, 1);
    assert_int_equal(child.code, TD_CANCELLED);
    assert_int_equal(w->a.n_cancelled, 1);
    WAIT(w, parent.n_status, 1);
    world_free(w);
}

/* Promise: one BATCH per step carries many streams; a call finished inside it ends after its last
 * message. */
static void test_batch(void **state)
{
    world *w = world_up();
    result r[8];
    for (int i = 0; i < 8; i++)
        start(&w->a, "t/Hold", &r[i]);
    WAIT(w, w->b.n_in, 8);
    unsigned batches = w->a.n_batches;
    td_batch_begin(w->b.session, 1);
    for (int i = 0; i < 8; i++) {
        assert_int_equal(td_batch_add(w->b.in[i], "one", 3), 0);
        assert_int_equal(td_call_send(w->b.in[i], "two", 3), 0);
        if (i % 2)
            td_call_finish(w->b.in[i], &(td_status){.code = TD_OK});
    }
    Tandem__V1__Load load = TANDEM__V1__LOAD__INIT;
    get_load(NULL, &load);
    td_batch_end(w->b.session, &load);
    for (int i = 1; i < 8; i += 2) {
        WAIT(w, r[i].n_status, 1);
        assert_int_equal(r[i].code, TD_OK);
    }
    for (int i = 0; i < 8; i++) {
        assert_int_equal(r[i].n_data, 2);
        assert_string_equal(r[i].last, "two");
    }
    assert_int_equal(w->a.n_batches - batches, 1);
    for (int i = 0; i < 8; i += 2)
        td_call_finish(w->b.in[i], NULL);
    idle(w, 10000);
    world_free(w);
}

/* Promise: death of the peer is UNAVAILABLE on all its calls; the dialler is up again with a new
 * epoch of the binder. */
static void test_peer_death(void **state)
{
    world *w = world_up();
    result r[3];
    for (int i = 0; i < 3; i++)
        start(&w->b, "t/Hold", &r[i]);
    WAIT(w, w->a.n_in, 3);
    td_rpc_close(w->a.rpc); /* its three callees were told, and finished */
    assert_int_equal(w->a.n_cancelled, 3);
    for (int i = 0; i < 3; i++) {
        WAIT(w, r[i].n_status, 1);
        assert_int_equal(r[i].code, TD_UNAVAILABLE);
    }
    assert_int_equal(w->b.n_down, 1);
    assert_null(w->b.session);
    open_side(w, &w->a, 0); /* restarted */
    WAIT(w, w->b.n_up, 2);
    expect_echo(w, &w->b);
    world_free(w);
}

/* A binder in a process of its own, started by a byte on the pipe, to be killed. */
static pid_t binder_process(world *w, int *ret_go)
{
    int fd[2];
    char go;
    assert_int_equal(pipe(fd), 0);
    pid_t pid = fork();
    assert_true(pid >= 0);
    *ret_go = fd[1];
    if (pid > 0) {
        close(fd[0]);
        return pid;
    }
    close(fd[1]);
    if (read(fd[0], &go, 1) != 1)
        _exit(1);
    td_rpc_config c = config_of(w, &w->a, 0);
    td_err err;
    td_loop *loop;
    if (td_loop_new(&loop) < 0 || td_rpc_open(loop, &c, &w->a.rpc, &err) < 0)
        _exit(1);
    _exit(td_loop_run(loop));
}

static void kill_process(pid_t pid, int go)
{
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
    close(go);
}

/* Promise: a binder killed without a word ends its calls with UNAVAILABLE; the next one takes over
 * the stale socket file and the dialler says HELLO to it. */
static void test_killed_binder(void **state)
{
    world *w = world_new();
    int go[2];
    result r;
    pid_t pid[2];
    for (int i = 0; i < 2;
         i++) /* before this process has a ZeroMQ context: it would not survive a fork */
        pid[i] = binder_process(w, &go[i]);
    assert_int_equal(write(go[0], "x", 1), 1);
    open_side(w, &w->b, 1);
    WAIT(w, w->b.n_up, 1);
    start(&w->b, "t/Hold", &r);
    idle(w, 20000);
    kill_process(pid[0], go[0]);
    WAIT(w, r.n_status, 1);
    assert_int_equal(r.code, TD_UNAVAILABLE);
    assert_int_equal(write(go[1], "x", 1), 1);
    WAIT(w, w->b.n_up, 2);
    expect_echo(w, &w->b);
    kill_process(pid[1], go[1]);
    world_free(w);
}

/* Bug guarded: a binder that ends every session at once must not be asked again at the speed of the
 * machine. */
static void test_young_deaths(void **state)
{
    world *w = world_up();
    uint64_t end = td_now_us() + 400 * TD_MS;
    while (td_now_us() < end) {
        if (w->a.session)
            td_session_close(w->a.session, "no");
        td_loop_run_once(w->loop, 1000);
    }
    assert_in_range(w->b.n_up, 3, 6);
    unsigned next = w->b.n_up + 1;
    WAIT(w, w->b.n_up, next);
    world_free(w);
}

/* Promise: over tcp on loopback too; port 0 is resolved. */
static void test_tcp(void **state)
{
    world *w = world_new();
    char ipc[sizeof w->endpoint];
    memcpy(ipc, w->endpoint, sizeof ipc);
    snprintf(w->endpoint, sizeof w->endpoint, "tcp://127.0.0.1:0");
    open_side(w, &w->a, 0);
    snprintf(w->endpoint, sizeof w->endpoint, "%s", td_rpc_endpoint(w->a.rpc));
    open_side(w, &w->b, 1);
    WAIT(w, w->b.n_up, 1);
    expect_echo(w, &w->b);
    memcpy(w->endpoint, ipc, sizeof ipc);
    world_free(w);
}

/* Promise: a session ended by the binding side is told to the dialler, who makes a new one at once.
 */
static void test_closed_session(void **state)
{
    world *w = world_up();
    td_session_close(w->a.session,
                     "test closes it"); /* the dialler hears GOAWAY and says HELLO again */
    WAIT(w, w->b.n_down, 1);
    assert_string_equal(w->b.reason, "test closes it");
    WAIT(w, w->b.n_up, 2);
    expect_echo(w, &w->a);
    world_free(w);
}

/* Promise: calls that the callee still holds when its td_rpc closes may be finished later. */
static void test_finish_after_close(void **state)
{
    world *w = world_up();
    result r;
    start(&w->a, "t/Deaf", &r);
    WAIT(w, w->b.n_in, 1);
    td_rpc_close(w->a.rpc);
    w->a.rpc = NULL;
    assert_int_equal(r.n_status, 1);
    assert_int_equal(r.code, TD_CANCELLED);
    WAIT(w, w->b.n_down, 1);
    td_call *deaf = w->b.in[0];
    assert_int_equal(td_call_is_cancelled(deaf), 1);
    assert_int_equal(td_call_send(deaf, "x", 1), -ECANCELED);
    world_free(w);
    td_call_finish(deaf, NULL);
}

/* Promise: a refused HELLO tells the dialling side why, who comes again and is taken when the
 * reason has gone. */
static void test_refused(void **state)
{
    world *w = world_new();
    w->a.refuse = 1;
    open_side(w, &w->a, 0);
    open_side(w, &w->b, 1);
    WAIT(w, w->b.n_down, 1);
    assert_string_equal(w->b.reason, "refused: model hash differs: decode?");
    assert_int_equal(w->b.n_up, 0);
    w->a.refuse = 0;
    WAIT(w, w->b.n_up, 1);
    expect_echo(w, &w->b);
    world_free(w);
}

/* Promise: after GOAWAY no new calls, the running ones go on. */
static void test_drain(void **state)
{
    world *w = world_up();
    result r, late;
    start(&w->a, "t/Hold", &r);
    WAIT(w, w->b.n_in, 1);
    td_rpc_goaway(w->b.rpc, "drain", 1000);
    idle(w, 10000);
    assert_int_equal(td_session_is_draining(w->a.session), 1);
    td_call_spec spec = spec_of(&w->a, "t/Hold", &late);
    td_call *c;
    assert_int_equal(td_call_start(&spec, &c), -ENOTCONN);
    td_call_finish(w->b.in[0], NULL);
    WAIT(w, r.n_status, 1);
    assert_int_equal(r.code, TD_OK);
    world_free(w);
}

/* Promise: messages past the limit are refused on this side, at call and at send. */
static void test_oversized(void **state)
{
    world *w = world_up();
    result r;
    char *big = calloc(1, (16 << 20) + 1);
    td_call_spec spec = spec_of(&w->a, "t/Echo", &r);
    td_call *c;
    spec.message = big;
    spec.message_bytes = (16 << 20) + 1;
    assert_int_equal(td_call_start(&spec, &c), -E2BIG);
    start(&w->a, "t/Hold", &r);
    WAIT(w, w->b.n_in, 1);
    assert_int_equal(td_call_send(w->b.in[0], big, (16 << 20) + 1), -EMSGSIZE);
    assert_int_equal(td_call_send(w->b.in[0], big, 12 << 20),
                     0); /* one message may overdraw the window */
    WAIT(w, r.n_data, 1);
    assert_int_equal(r.bytes, 12 << 20);
    td_call_finish(w->b.in[0], NULL);
    WAIT(w, r.n_status, 1);
    free(big);
    world_free(w);
}

/* ---- a raw peer ---- */

typedef struct raw {
    void *socket;
    uint32_t session, sequence;
    uint64_t stream;
} raw;

static size_t pack_frame(uint8_t *out, uint8_t type, uint64_t stream, uint32_t seq,
                         uint32_t session, const ProtobufCMessage *body, size_t *ret_body)
{
    td_preamble p = {
        .major = 1, .type = type, .stream = stream, .sequence = seq, .session = session};
    td_preamble_pack(&p, out);
    *ret_body = body ? protobuf_c_message_pack(body, out + TD_PREAMBLE_BYTES) : 0;
    return TD_PREAMBLE_BYTES + *ret_body;
}

static void raw_send(raw *k, const uint8_t *frame, size_t n_preamble, size_t n_body)
{
    assert_true(zmq_send(k->socket, frame, n_preamble, ZMQ_SNDMORE) >= 0);
    assert_true(zmq_send(k->socket, frame + TD_PREAMBLE_BYTES, n_body, 0) >= 0);
}

/* Next frame of a type; others are passed over. Returns the body's bytes, -1 when none came. */
static int raw_recv(world *w, raw *k, uint8_t type, td_preamble *p, uint8_t *body, size_t max)
{
    for (uint64_t end = td_now_us() + 2 * TD_S; td_now_us() < end;) {
        uint8_t pre[64];
        td_loop_run_once(w->loop, 1000);
        int n = zmq_recv(k->socket, pre, sizeof pre, ZMQ_DONTWAIT);
        if (n < 0)
            continue;
        assert_int_equal(td_preamble_unpack(pre, (size_t)n, p), 0);
        n = zmq_recv(k->socket, body, max, ZMQ_DONTWAIT);
        assert_true(n >= 0);
        if (p->type == type)
            return n;
    }
    return -1;
}

static Tandem__V1__Hello raw_hello(uint8_t epoch[16])
{
    Tandem__V1__Hello h = TANDEM__V1__HELLO__INIT;
    td_random_bytes(epoch, 16);
    h.major = 1;
    h.role = TANDEM__V1__ROLE__ROLE_CLIENT;
    h.epoch = (ProtobufCBinaryData){.len = 16, .data = epoch};
    return h;
}

static void raw_open(world *w, raw *k)
{
    *k = (raw){.stream = 2};
    void *context = td_zmq_context_ref();
    k->socket = zmq_socket(context, ZMQ_DEALER);
    assert_int_equal(zmq_connect(k->socket, w->endpoint), 0);
}

static void raw_up(world *w, raw *k)
{
    uint8_t buf[1024], epoch[16];
    size_t n;
    td_preamble p;
    raw_open(w, k);
    Tandem__V1__Hello h = raw_hello(epoch);
    pack_frame(buf, TD_FRAME_HELLO, 0, 0, 0, &h.base, &n);
    raw_send(k, buf, TD_PREAMBLE_BYTES, n);
    int r = raw_recv(w, k, TD_FRAME_WELCOME, &p, buf, sizeof buf);
    assert_true(r > 0);
    Tandem__V1__Welcome *m = tandem__v1__welcome__unpack(NULL, (size_t)r, buf);
    k->session = m->session;
    assert_int_equal(p.session, m->session);
    tandem__v1__welcome__free_unpacked(m, NULL);
}

static void raw_close(raw *k)
{
    int zero = 0;
    zmq_setsockopt(k->socket, ZMQ_LINGER, &zero, sizeof zero);
    zmq_close(k->socket);
    td_zmq_context_unref();
}

static size_t pack_call(raw *k, uint8_t *buf, size_t *n_body)
{
    Tandem__V1__Call m = TANDEM__V1__CALL__INIT;
    m.method = (ProtobufCBinaryData){.len = 6, .data = (uint8_t *)"t/Echo"};
    m.timeout_ms = 1000;
    m.has_credit = 1;
    m.credit = 1;
    m.message = (ProtobufCBinaryData){.len = 3, .data = (uint8_t *)"abc"};
    size_t n = pack_frame(buf, TD_FRAME_CALL, k->stream, 0, k->session, &m.base, n_body);
    k->stream += 2;
    return n;
}

static void raw_expect_echo(world *w, raw *k)
{
    uint8_t buf[1024];
    size_t n;
    td_preamble p;
    /* the binder has no credit for DATA until the dialling side grants some */
    Tandem__V1__Credit c = TANDEM__V1__CREDIT__INIT;
    c.has_bytes = 1;
    c.bytes = 1 << 20;
    if (k->sequence == 0) {
        pack_frame(buf, TD_FRAME_CREDIT, 0, k->sequence++, k->session, &c.base, &n);
        raw_send(k, buf, TD_PREAMBLE_BYTES, n);
    }
    pack_call(k, buf, &n);
    raw_send(k, buf, TD_PREAMBLE_BYTES, n);
    assert_true(raw_recv(w, k, TD_FRAME_DATA, &p, buf, sizeof buf) > 0);
    assert_int_equal(p.stream, k->stream - 2);
    assert_true(raw_recv(w, k, TD_FRAME_STATUS, &p, buf, sizeof buf) > 0);
}

/* Must hold: frames cut at every byte (preamble and body), wrong magic, wrong major, extra and
 * missing parts: each is dropped or answered with a STATUS, and the session goes on serving. */
static void test_cut_frames(void **state)
{
    world *w = world_new();
    open_side(w, &w->a, 0);
    raw k;
    raw_up(w, &k);
    raw_expect_echo(w, &k);
    uint8_t buf[1024];
    size_t n;
    for (size_t cut = 0; cut < TD_PREAMBLE_BYTES; cut++) {
        pack_call(&k, buf, &n);
        raw_send(&k, buf, cut, n);
    }
    size_t total = pack_call(&k, buf, &n) - TD_PREAMBLE_BYTES;
    for (size_t cut = 0; cut < total; cut++) {
        pack_call(&k, buf, &n);
        raw_send(&k, buf, TD_PREAMBLE_BYTES, cut);
        td_preamble p;
        int r = raw_recv(w, &k, TD_FRAME_STATUS, &p, buf, sizeof buf);
        assert_true(r > 0);
        assert_int_equal(p.stream, k.stream - 2);
        Tandem__V1__Status *m = tandem__v1__status__unpack(NULL, (size_t)r, buf);
        assert_int_equal(m->code, TD_INTERNAL);
        tandem__v1__status__free_unpacked(m, NULL);
    }
    for (size_t i = 0; i < 3; i++) { /* magic, major */
        pack_call(&k, buf, &n);
        buf[i] ^= 1;
        raw_send(&k, buf, TD_PREAMBLE_BYTES, n);
    }
    zmq_send(k.socket, "x", 1, 0);
    for (int i = 0; i < 40; i++) /* forty parts */
        zmq_send(k.socket, buf, 24, i < 39 ? ZMQ_SNDMORE : 0);
    raw_expect_echo(w, &k);
    td_rpc_stats st;
    td_rpc_get_stats(w->a.rpc, &st);
    assert_true(st.bad_frames >= TD_PREAMBLE_BYTES + total + 3);
    assert_int_equal(w->a.n_down, 0);
    raw_close(&k);
    world_free(w);
}

/* Must hold: a HELLO cut at every byte is refused with a text, and a whole one is taken after that.
 */
static void test_cut_hello(void **state)
{
    world *w = world_new();
    open_side(w, &w->a, 0);
    raw k;
    raw_open(w, &k);
    uint8_t hello[1024], buf[1024], epoch[16];
    size_t n;
    td_preamble p;
    Tandem__V1__Hello h = raw_hello(epoch);
    pack_frame(hello, TD_FRAME_HELLO, 0, 0, 0, &h.base, &n);
    for (size_t cut = 0; cut < n; cut++) {
        raw_send(&k, hello, TD_PREAMBLE_BYTES, cut);
        assert_true(raw_recv(w, &k, TD_FRAME_STATUS, &p, buf, sizeof buf) > 0);
    }
    assert_int_equal(w->a.n_up, 0);
    raw_send(&k, hello, TD_PREAMBLE_BYTES, n);
    WAIT(w, w->a.n_up, 1);
    raw_close(&k);
    world_free(w);
}

/* Promise: a second HELLO on a connection replaces the session; the old number is fenced; strangers
 * are told. */
static void test_second_hello(void **state)
{
    world *w = world_new();
    open_side(w, &w->a, 0);
    raw k, stranger;
    raw_up(w, &k);
    uint8_t buf[1024], epoch[16];
    size_t n;
    td_preamble p;
    uint32_t old = k.session;
    Tandem__V1__Hello h = raw_hello(epoch);
    pack_frame(buf, TD_FRAME_HELLO, 0, 0, 0, &h.base, &n);
    raw_send(&k, buf, TD_PREAMBLE_BYTES, n);
    assert_true(raw_recv(w, &k, TD_FRAME_WELCOME, &p, buf, sizeof buf) > 0);
    assert_int_not_equal(p.session, old);
    assert_int_equal(w->a.n_down, 1);
    pack_call(&k, buf, &n); /* with the old number */
    raw_send(&k, buf, TD_PREAMBLE_BYTES, n);
    k.session = p.session;
    raw_expect_echo(w, &k);
    raw_open(w, &stranger);
    pack_call(&k, buf, &n);
    raw_send(&stranger, buf, TD_PREAMBLE_BYTES, n);
    int r = raw_recv(w, &stranger, TD_FRAME_STATUS, &p, buf, sizeof buf);
    assert_true(r > 0);
    assert_int_equal(p.stream, 0);
    raw_close(&stranger);
    raw_close(&k);
    world_free(w);
}

/* Promise: a peer that goes silent (no PING) is down after dead_ms; its calls end. */
static void test_silence(void **state)
{
    world *w = world_new();
    open_side(w, &w->a, 0);
    raw k;
    raw_up(w, &k);
    result r;
    start(&w->a, "t/Hold", &r);
    uint64_t t = td_now_us();
    WAIT(w, w->a.n_down, 1);
    assert_true(td_now_us() - t >= 100 * TD_MS);
    assert_string_equal(w->a.reason, "silent for too long");
    assert_int_equal(r.n_status, 1);
    assert_int_equal(r.code, TD_UNAVAILABLE);
    raw_close(&k);
    world_free(w);
}

/* Promise: a frame above the limit costs its sender the connection, and nobody else anything. */
static void test_peer_oversized(void **state)
{
    world *w = world_new();
    open_side(w, &w->a, 0);
    raw k, other;
    raw_up(w, &k);
    raw_up(w, &other);
    size_t n = (16 << 20) + (1 << 17);
    uint8_t *big = calloc(1, n + TD_PREAMBLE_BYTES);
    assert_non_null(big);
    pack_call(&k, big, &(size_t){0});
    raw_send(&k, big, TD_PREAMBLE_BYTES, n);
    free(big);
    idle(w, 30000);
    raw_expect_echo(w, &other);
    td_rpc_stats st;
    td_rpc_get_stats(w->a.rpc, &st);
    assert_true(st.bytes_in < n);
    raw_close(&other);
    raw_close(&k);
    world_free(w);
}

/* ---- endpoints ---- */

/* Promise: wildcard, names, beyond loopback, long and relative paths are refused, each with its
 * reason. */
static void test_endpoints(void **state)
{
    static const struct {
        const char *endpoint;
        int r;
        const char *text;
    } t[] = {
        {"tcp://127.0.0.1:0", 0, ""},
        {"tcp://[::1]:7000", 0, ""},
        {"ipc:///run/tandem/x.sock", 0, ""},
        {"tcp://*:7000", -EINVAL, "wildcard"},
        {"tcp://0.0.0.0:7000", -EINVAL, "wildcard"},
        {"tcp://[::]:7000", -EINVAL, "wildcard"},
        {"tcp://10.0.0.1:7000", -EACCES, "needs keys"},
        {"tcp://[2001:db8::1]:7000", -EACCES, "needs keys"},
        {"tcp://localhost:7000", -EINVAL, "literal"},
        {"tcp://127.0.0.1:70000", -EINVAL, "port"},
        {"tcp://127.0.0.1", -EINVAL, "port"},
        {"tcp://127.0.0.1:*", -EINVAL, "port"},
        {"ipc://@abstract", -EINVAL, "absolute"},
        {"ipc://*", -EINVAL, "absolute"},
        {"ipc:///"
         "01234567890123456789012345678901234567890123456789012345678901234567890123456789012345678"
         "90123456789012345"
         "678901234567890123456789",
         -EINVAL, "107"},
        {"inproc://x", -EINVAL, "not an endpoint"},
    };
    for (size_t i = 0; i < TD_ARRAY_LEN(t); i++) {
        td_err err = {.code = 0};
        assert_int_equal(td_endpoint_check(t[i].endpoint, 0, &err), t[i].r);
        assert_non_null(strstr(err.text, t[i].text));
    }
}

/* Bug guarded: libzmq unlinks the path before it binds, so a second router would silently take a
 * living one's socket. */
static void test_bind_twice(void **state)
{
    world *w = world_new();
    open_side(w, &w->a, 0);
    struct stat st;
    assert_int_equal(stat(w->endpoint + 6, &st), 0);
    assert_int_equal(st.st_mode & 0077, 0);
    td_rpc_config c = config_of(w, &w->b, 0);
    td_err err = {.code = 0};
    assert_int_equal(td_rpc_open(w->loop, &c, &w->b.rpc, &err), -EADDRINUSE);
    assert_non_null(strstr(err.text, "another process listens"));
    open_side(w, &w->b, 1);
    WAIT(w, w->b.n_up, 1);
    expect_echo(w, &w->b);
    world_free(w);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_call),
        cmocka_unit_test(test_latency),
        cmocka_unit_test(test_stream),
        cmocka_unit_test(test_slow_consumer),
        cmocka_unit_test(test_cancel_and_deadline),
        cmocka_unit_test(test_children),
        cmocka_unit_test(test_batch),
        cmocka_unit_test(test_peer_death),
        cmocka_unit_test(test_killed_binder),
        cmocka_unit_test(test_young_deaths),
        cmocka_unit_test(test_tcp),
        cmocka_unit_test(test_closed_session),
        cmocka_unit_test(test_finish_after_close),
        cmocka_unit_test(test_refused),
        cmocka_unit_test(test_drain),
        cmocka_unit_test(test_oversized),
        cmocka_unit_test(test_cut_frames),
        cmocka_unit_test(test_cut_hello),
        cmocka_unit_test(test_second_hello),
        cmocka_unit_test(test_silence),
        cmocka_unit_test(test_peer_oversized),
        cmocka_unit_test(test_endpoints),
        cmocka_unit_test(test_bind_twice),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
