/* SPDX-License-Identifier: Apache-2.0 */
/* Promises 2, 3 and 5 on real workers: whatever ends a request early (cancel, deadline, refusal, a
 * frozen or killed peer, a lost router), its call gets exactly one typed status, its blocks come
 * back on both sides, and other requests go on. */
#include "tests/edge/cluster.h"

#define MODEL TD_SOURCE_DIR "/tests/goldens/models/glm-shared"

static cluster cl;
static request rq[48];
static uint32_t serial;

static request *fresh(uint32_t i, size_t n_prompt, uint32_t max_tokens)
{
    request *r = &rq[i];
    td_rng rng = {.seed = 5 + serial};
    memset(r, 0, sizeof *r);
    r->n_prompt = n_prompt;
    for (size_t k = 0; k < n_prompt; k++)
        r->prompt[k] = (uint32_t)td_rng_below(&rng, 250);
    r->max_tokens = max_tokens;
    r->temperature = 0.8f;
    r->repetition_penalty = 1;
    r->seed = serial;
    memset(r->prefix_key, (int)(serial % 250), 32);
    snprintf(r->id, sizeof r->id, "f%u", serial++);
    return r;
}

typedef struct loads {
    int done;
    uint32_t kv_blocks, kv_free, kv_reserved, running;
} loads;

static void on_loads(void *arg, td_call *c, td_str message)
{
    loads *l = arg;
    (void)c;
    Tandem__V1__LoadsReply *m =
        tandem__v1__loads_reply__unpack(NULL, message.len, (const uint8_t *)message.ptr);
    assert_non_null(m);
    l->kv_blocks = m->load->kv_blocks;
    l->kv_free = m->load->kv_free;
    l->kv_reserved = m->load->kv_reserved;
    l->running = m->load->running;
    tandem__v1__loads_reply__free_unpacked(m, NULL);
}

static void on_loads_status(void *arg, td_call *c, const td_status *s)
{
    (void)c;
    assert_int_equal(s->code, TD_OK);
    ((loads *)arg)->done = 1;
}

static loads get_loads(int role)
{
    loads l = {0};
    td_call *c;
    td_call_spec spec = {.session = cl.session[role],
                         .method = "tandem.v1.Engine/GetLoads",
                         .message = "",
                         .timeout_us = 10 * TD_S,
                         .ops = {on_loads, on_loads_status},
                         .arg = &l};
    assert_int_equal(td_call_start(&spec, &c), 0);
    while (!l.done)
        cluster_turn(&cl);
    return l;
}

/* Nothing is left behind; waits a moment, for blocks come back by messages. */
static void must_be_idle(int role)
{
    loads l = {0};
    for (uint64_t end = td_now_us() + 5 * TD_S; td_now_us() < end;) {
        l = get_loads(role);
        if (l.kv_free == l.kv_blocks && l.kv_reserved == 0 && l.running == 0)
            return;
        cluster_turn(&cl);
    }
    fail_msg("worker %d: %u of %u blocks free, %u reserved, %u running", role, l.kv_free,
             l.kv_blocks, l.kv_reserved, l.running);
}

static void must_work(void)
{
    request *r = fresh(0, 70, 8);
    request_start(&cl, r);
    request_wait(&cl, r);
    request_must_succeed(r);
    assert_int_equal(r->n_tokens[0], 8);
}

static void wait_until(const int *flag)
{
    for (uint64_t end = td_now_us() + 30 * TD_S; !*flag;) {
        if (td_now_us() > end)
            fail_msg("it does not happen");
        cluster_turn(&cl);
    }
}

static void test_cancel_while_decoding(void **state)
{
    (void)state;
    request *r = fresh(1, 100, 1500);
    r->max_tokens = 1000; /* far more than can be done before the cancel arrives */
    request_start(&cl, r);
    wait_until(&r->committed);
    td_call_cancel(r->call[1], "test");
    request_wait(&cl, r);
    assert_int_equal(r->code[1], TD_CANCELLED);
    must_be_idle(1);
    must_be_idle(0);
    must_work();
}

static void test_cancel_while_waiting_for_blocks(void **state)
{
    (void)state;
    request *r = fresh(1, 100, 8);
    r->no_prefill = 1;
    request_start(&cl, r);
    wait_until(&r->got_ticket);
    assert_int_not_equal(get_loads(1).kv_reserved, 0);
    td_call_cancel(r->call[1], "test");
    request_wait(&cl, r);
    assert_int_equal(r->code[1], TD_CANCELLED);
    must_be_idle(1);
}

static void test_ticket_expires(void **state)
{
    (void)state;
    request *r = fresh(1, 100, 8);
    r->no_prefill = 1;
    r->timeout_us = 300 * TD_MS;
    request_start(&cl, r);
    request_wait(&cl, r);
    assert_int_equal(r->code[1], TD_DEADLINE_EXCEEDED);
    must_be_idle(1);
}

/* Full says full, early; too large says so for good; what was admitted still ends well. */
static void test_admission(void **state)
{
    (void)state;
    request *big = fresh(1, 64 * 30, 64);
    big->no_prefill = 1;
    request_start(&cl, big);
    wait_until(&big->got_ticket);
    request *more = fresh(2, 64 * 20, 8);
    request_start(&cl, more);
    request_wait(&cl, more);
    assert_int_equal(more->code[1], TD_RESOURCE_EXHAUSTED);
    must_work(); /* a small one fits beside it */
    td_call_cancel(big->call[1], "test");
    request_wait(&cl, big);
    request *never = fresh(3, 1000, 1000 + 48); /* 32 blocks fit, 41 never do */
    never->n = 2;
    request_start(&cl, never);
    request_wait(&cl, never);
    assert_int_equal(never->code[1], TD_OUT_OF_RANGE);
    request *context = fresh(4, 1500, 1000);
    request_start(&cl, context);
    request_wait(&cl, context);
    assert_int_equal(context->code[1], TD_OUT_OF_RANGE);
    must_be_idle(1);
}

static void must_refuse(request *r, uint32_t code, const char *part)
{
    request_start(&cl, r);
    request_wait(&cl, r);
    assert_int_equal(r->code[1], code);
    if (!strstr(r->why[1], part))
        fail_msg("\"%s\" does not name %s", r->why[1], part);
}

static void test_bad_requests(void **state)
{
    (void)state;
    request *r = fresh(1, 5, 8);
    r->prompt[3] = 1u << 30;
    must_refuse(r, TD_INVALID_ARGUMENT, "prompt");
    r = fresh(1, 0, 8);
    must_refuse(r, TD_INVALID_ARGUMENT, "prompt");
    r = fresh(1, 5, 0);
    must_refuse(r, TD_INVALID_ARGUMENT, "max_tokens");
    r = fresh(1, 5, 8);
    r->n = 17;
    must_refuse(r, TD_INVALID_ARGUMENT, "n:");
    r = fresh(1, 5, 8);
    r->temperature = -1;
    must_refuse(r, TD_INVALID_ARGUMENT, "temperature");
    must_be_idle(1);
    must_work();
}

static void test_same_attempt_twice(void **state)
{
    (void)state;
    request *r = fresh(1, 5, 8), *again = fresh(2, 5, 8);
    r->no_prefill = again->no_prefill = 1;
    memcpy(again->id, r->id, sizeof r->id);
    request_start(&cl, r);
    wait_until(&r->got_ticket);
    must_refuse(again, TD_ALREADY_EXISTS, "request_id");
    td_call_cancel(r->call[1], "test");
    request_wait(&cl, r);
}

static void other_layout(request *r, Tandem__V1__Ticket *t)
{
    (void)r;
    t->layout_hash.data[0] ^= 1;
}

static void other_profile(request *r, Tandem__V1__Ticket *t)
{
    (void)r;
    t->profile_id.data[0] ^= 1;
}

static void other_model(request *r, Tandem__V1__Ticket *t)
{
    (void)r;
    t->model_hash.data[31] ^= 1;
}

static void too_much_held(request *r, Tandem__V1__Ticket *t)
{
    (void)r;
    t->held_blocks = 100;
}

static void other_ticket(request *r, Tandem__V1__Ticket *t)
{
    (void)r;
    t->id.data[0] ^= 1;
}

static void wildcard(request *r, Tandem__V1__Ticket *t)
{
    (void)r;
    memcpy(t->endpoint.data, "tcp://*", TD_MIN(t->endpoint.len, 7u));
}

static void test_bad_tickets(void **state)
{
    (void)state;
    static const struct {
        void (*change)(request *, Tandem__V1__Ticket *);
        uint32_t code;
        const char *names; /* refused by name, before anything is computed */
    } bad[] = {{other_layout, TD_FAILED_PRECONDITION, "another KV layout"},
               {other_profile, TD_FAILED_PRECONDITION, "another numerics profile"},
               {other_model, TD_FAILED_PRECONDITION, "another model"},
               {too_much_held, TD_INVALID_ARGUMENT, "held_blocks"},
               {other_ticket, TD_ABORTED, NULL},
               {wildcard, TD_INVALID_ARGUMENT, NULL}};
    for (size_t i = 0; i < TD_ARRAY_LEN(bad); i++) {
        request *r = fresh(1, 300, 8);
        r->on_ticket = bad[i].change;
        request_start(&cl, r);
        request_wait(&cl, r);
        if (r->code[0] != bad[i].code)
            fail_msg("case %zu: %s: %s", i, td_code_name(r->code[0]), r->why[0]);
        if (bad[i].names && (!strstr(r->why[0], bad[i].names) || r->first_seen[0]))
            fail_msg("case %zu: %d tokens, \"%s\" does not name \"%s\"", i, r->first_seen[0],
                     r->why[0], bad[i].names);
        assert_int_equal(r->committed, 0);
    }
    must_be_idle(0);
    must_be_idle(1);
    must_work();
}

/* Requests that fail beside requests that do not: nobody hears of the other. */
static void test_others_go_on(void **state)
{
    (void)state;
    for (int round = 0; round < 3; round++) {
        for (uint32_t i = 0; i < 24; i++) {
            request *r = fresh(i, 10 + i * 3, 20);
            if (i % 4 == 3)
                r->on_ticket = other_layout;
            request_start(&cl, r);
        }
        for (uint32_t i = 2; i < 24; i += 4)
            td_call_cancel(rq[i].call[1], "test");
        for (uint32_t i = 0; i < 24; i++) {
            request_wait(&cl, &rq[i]);
            if (i % 4 < 2) {
                if (rq[i].code[1] == TD_RESOURCE_EXHAUSTED)
                    continue; /* full says full */
                request_must_succeed(&rq[i]);
                assert_int_equal(rq[i].n_tokens[0], 20);
            } else if (i % 4 == 2) {
                assert_int_not_equal(rq[i].code[1], TD_OK);
            } else {
                assert_int_not_equal(rq[i].code[0] | rq[i].code[1], TD_OK);
            }
        }
        must_be_idle(0);
        must_be_idle(1);
    }
}

/* The router goes and comes back: what it had asked for ends, nothing is kept for it. */
static void test_router_lost(void **state)
{
    (void)state;
    request *r = fresh(1, 100, 1000);
    request_start(&cl, r);
    wait_until(&r->committed);
    uint32_t before = td_session_number(cl.session[1]);
    td_session_close(cl.session[1], "test");
    request_wait(&cl, r);
    assert_int_equal(r->code[1], TD_UNAVAILABLE);
    for (uint64_t end = td_now_us() + 30 * TD_S;
         !cl.session[1] || td_session_number(cl.session[1]) == before;) {
        assert_true(td_now_us() < end);
        cluster_turn(&cl);
    }
    must_be_idle(1);
    must_work();
}

static void freeze(request *r, Tandem__V1__Ticket *t)
{
    (void)t;
    kill(r->c->pid[1], SIGSTOP);
}

/* The decode worker freezes while blocks are on their way: a cancelled prefill gives its blocks
 * back all the same, by closing the connection that holds their frames. */
static void test_frozen_peer(void **state)
{
    (void)state;
    request *r = fresh(1, 64 * 30, 8);
    r->on_ticket = freeze;
    request_start(&cl, r);
    wait_until(&r->first_seen[0]);
    assert_int_equal(r->open[0], 1); /* no ack: the call stays open */
    uint64_t start = td_now_us();
    td_call_cancel(r->call[0], "test");
    while (r->open[0])
        cluster_turn(&cl);
    assert_true(td_now_us() - start < 5 * TD_S);
    must_be_idle(0);
    kill(cl.pid[1], SIGCONT);
    request_wait(&cl, r);
    must_be_idle(1);
    must_work();
}

/* Killed instead: the push ends UNAVAILABLE, and a new process at the same address takes the next
 * request. */
static void test_killed_peer(void **state)
{
    (void)state;
    char kv[128];
    request *r = fresh(1, 64 * 20, 8);
    r->on_ticket = freeze;
    request_start(&cl, r);
    wait_until(&r->first_seen[0]);
    td_call *prefill = r->call[0];
    kill(cl.pid[1], SIGKILL);
    waitpid(cl.pid[1], NULL, 0);
    (void)prefill;
    wait_session(&cl, 1, 0);
    request_wait(&cl, r);
    assert_int_not_equal(r->code[0], TD_OK);
    assert_int_equal(r->code[1], TD_UNAVAILABLE);
    must_be_idle(0);
    snprintf(kv, sizeof kv, "ipc://%s/kv.sock", cl.dir);
    start_decode(&cl, MODEL, kv, "40");
    must_work();
}

static int setup(void **state)
{
    (void)state;
    char kv[128];
    cluster_open(&cl);
    snprintf(kv, sizeof kv, "ipc://%s/kv.sock", cl.dir);
    start_decode(&cl, MODEL, kv, "40");
    start_prefill(&cl, MODEL, "64", "60");
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    stop_worker(&cl, 0);
    stop_worker(&cl, 1);
    cluster_close(&cl);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_cancel_while_decoding),
        cmocka_unit_test(test_cancel_while_waiting_for_blocks),
        cmocka_unit_test(test_ticket_expires),
        cmocka_unit_test(test_admission),
        cmocka_unit_test(test_bad_requests),
        cmocka_unit_test(test_same_attempt_twice),
        cmocka_unit_test(test_bad_tickets),
        cmocka_unit_test(test_others_go_on),
        cmocka_unit_test(test_router_lost),
        cmocka_unit_test(test_frozen_peer),
        cmocka_unit_test(test_killed_peer),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
