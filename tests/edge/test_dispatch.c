/* SPDX-License-Identifier: Apache-2.0 */
/* The router's dispatch over real rpc on ipc://, against the workers of dispatch.h. Guards promise
 * 2 (whole streams) where the pure life cycle meets sockets, the refusal of workers that hold
 * something else, and "503 while a role is missing, serving again when it is back". */
#include "tests/edge/dispatch.h"

#include "base/banned.h"

/* ---- tests ---- */

static void happy_path(void **state)
{
    client c;
    start_pair();
    assert_int_equal(submit(&c, 2, 10), TD_ERROR_NONE);
    assert_int_equal(c.ends, 0); /* never from inside submit */
    WAIT(c.ends);
    assert_int_equal(c.error, TD_ERROR_NONE);
    for (int i = 0; i < 2; i++) {
        assert_int_equal(c.n[i], 10);
        assert_int_equal(c.finish[i], 2);
    }
    assert_int_equal(c.usage.completion_tokens, 20);
    assert_int_equal(c.usage.transfer_bytes, 4096);
    assert_int_equal(c.usage.cached_tokens, 1);
    assert_int_equal(c.usage.attempts, 1);
    assert_true(c.flushes >= 2 && c.flushes <= 20); /* per step, not per token */
    WAIT(all_idle());
    for (int i = 0; i < 20; i++)
        td_loop_run_once(loop, 1000);
    assert_int_equal(c.ends, 1);
    assert_int_equal(D.calls[0].cancelled, 0); /* D ended by itself */
    assert_int_equal(metric("generation_tokens_total"), 20);
    assert_int_equal(metric("kv_transfer_bytes_total"), 4096);
    assert_int_equal(metric("requests_ended_total{error=\"none\"}"), 1);
    assert_int_equal(metric("time_to_first_token_seconds_count"), 1);
    assert_int_equal(metric("requests_running"), 0);
}

/* logprobs travel with their tokens, the prompt's come first, and D's may wait for P's reply */
static void logprobs_and_late_reply(void **state)
{
    client c;
    td_gen_spec spec = {
        .n = 2, .max_tokens = 6, .logprobs = 1, .top_logprobs = 2, .prompt_logprobs = 1};
    start_pair();
    for (P.late = 0; P.late < 2; P.late++) {
        assert_int_equal(submit_spec(&c, &spec, NULL), TD_ERROR_NONE);
        WAIT(c.ends);
        assert_int_equal(c.error, TD_ERROR_NONE);
        assert_int_equal(c.n[0], 6);
        assert_int_equal(c.n[1], 6);
        assert_int_equal(c.n_prompt, 1);
    }
}

static void deadline(void **state)
{
    client c;
    td_gen_spec spec = {.n = 1, .max_tokens = 6, .timeout_us = 50 * TD_MS};
    P.hold = 1;
    start_pair();
    uint64_t start = td_now_us();
    assert_int_equal(submit_spec(&c, &spec, NULL), TD_ERROR_NONE);
    WAIT(c.ends);
    assert_int_equal(c.error, TD_ERROR_DEADLINE);
    assert_true(td_now_us() - start >= 50 * TD_MS);
    WAIT(P.calls[0].cancelled && D.calls[0].cancelled);
}

/* a worker that resamples another token: an error, never a changed answer */
static void nondeterminism(void **state)
{
    client c;
    P.lies = 1;
    start_pair();
    D.stop_at = 4;
    assert_int_equal(submit(&c, 1, 9), TD_ERROR_NONE);
    worker_dial(&D2);
    WAIT(c.ends);
    assert_int_equal(c.error, TD_ERROR_NONDETERMINISM);
    assert_int_equal(c.n[0], 4);
    assert_int_equal(metric("nondeterminism_total"), 1);
}

static void many_in_turn(void **state)
{
    client c[3];
    start_pair();
    for (int round = 0; round < 2; round++) {
        for (int i = 0; i < 3; i++)
            assert_int_equal(submit(&c[i], 1, 5), TD_ERROR_NONE);
        for (int i = 0; i < 3; i++) {
            WAIT(c[i].ends);
            assert_int_equal(c[i].error, TD_ERROR_NONE);
            assert_int_equal(c[i].n[0], 5);
        }
    }
}

/* one token: P alone, D is not asked */
static void prefill_alone(void **state)
{
    client c;
    start_pair();
    assert_int_equal(submit(&c, 2, 1), TD_ERROR_NONE);
    WAIT(c.ends);
    assert_int_equal(c.error, TD_ERROR_NONE);
    assert_int_equal(c.n[0], 1);
    assert_int_equal(c.n[1], 1);
    assert_int_equal(D.n_calls, 0);
}

/* 503 with Retry-After while a role is missing, serving again when it is back */
static void roles_come_and_go(void **state)
{
    client c;
    uint32_t retry;
    assert_int_not_equal(submit_as(&c, 1, 5, NULL, &retry), TD_ERROR_NONE);
    start_pair();
    worker_close(&D); /* idle: no farewell is needed */
    WAIT(get_state().n_decode == 0);
    assert_int_equal(get_state().ready, 0);
    assert_int_equal(submit_as(&c, 1, 5, NULL, &retry), TD_ERROR_NO_DECODE);
    assert_in_range(retry, 1000, 30000);
    assert_int_equal(td_error_get(TD_ERROR_NO_DECODE)->http, 503);
    worker_open(&D, "d1", 1);
    worker_dial(&D);
    WAIT(both_ready());
    assert_int_equal(submit(&c, 1, 5), TD_ERROR_NONE);
    WAIT(c.ends);
    assert_int_equal(c.error, TD_ERROR_NONE);
    worker_close(&P);
    WAIT(get_state().n_prefill == 0);
    assert_int_equal(submit_as(&c, 1, 5, NULL, &retry), TD_ERROR_NO_PREFILL);
    assert_in_range(retry, 1000, 30000);
    worker_open(&P, "p1", 0);
    worker_dial(&P);
    WAIT(both_ready());
    assert_int_equal(submit(&c, 1, 5), TD_ERROR_NONE);
    WAIT(c.ends);
    assert_int_equal(c.n[0], 5);
}

static void cancel_reaches_both(void **state)
{
    client c;
    start_pair();
    P.hold = 1;
    assert_int_equal(submit(&c, 1, 5), TD_ERROR_NONE);
    WAIT(P.n_calls == 1 && D.n_calls == 1);
    td_gen_cancel(c.gen);
    assert_int_equal(c.ends, 0); /* from the loop */
    WAIT(c.ends);
    assert_int_equal(c.error, TD_ERROR_CANCELLED);
    WAIT(P.calls[0].cancelled && D.calls[0].cancelled);
    P.hold = 0;
    assert_int_equal(submit(&c, 1, 5), TD_ERROR_NONE);
    WAIT(c.ends);
    assert_int_equal(c.error, TD_ERROR_NONE);
}

/* the only decode worker dies while a request waits: a typed 503, not silence */
static void lost_with_nobody_left(void **state)
{
    client c;
    start_pair();
    P.hold = 1;
    assert_int_equal(submit(&c, 1, 5), TD_ERROR_NONE);
    WAIT(P.n_calls == 1);
    worker_close(&D);
    WAIT(c.ends);
    assert_true(c.error == TD_ERROR_NO_DECODE || c.error == TD_ERROR_WORKER_LOST);
    assert_in_range(c.retry_ms, 1000, 30000);
    WAIT(P.calls[0].cancelled); /* the other leg was let go at once */
}

/* D dies mid-stream: the other one goes on where the client was, nothing twice, nothing lost */
static void recovery(void **state)
{
    client c;
    start_pair();
    D.stop_at = 4;
    assert_int_equal(submit(&c, 2, 9), TD_ERROR_NONE);
    worker_dial(&D2);
    WAIT(c.ends);
    assert_int_equal(c.error, TD_ERROR_NONE);
    assert_int_equal(c.n[0], 9);
    assert_int_equal(c.n[1], 9);
    assert_int_equal(c.usage.attempts, 2);
    assert_int_equal(D2.n_calls, 1);
    assert_int_equal(D2.calls[0].reserve->attempt, 2);
    assert_int_equal(D2.calls[0].reserve->request->n_emitted, 2);
    assert_int_equal(metric("redispatch_total{pool=\"decode\"}"), 1);
    assert_int_equal(metric("nondeterminism_total"), 0);
}

static void malformed_reply_is_retried(void **state)
{
    client c;
    start_pair();
    P.malformed = 1;
    assert_int_equal(submit(&c, 1, 5), TD_ERROR_NONE);
    WAIT(c.ends);
    assert_int_equal(c.error, TD_ERROR_NONE);
    assert_int_equal(c.n[0], 5);
    assert_int_equal(metric("redispatch_total{pool=\"prefill\"}"), 1);
}

/* A prefill worker that answers PINGs and does nothing with a request in hand loses it, long before
 * the deadline: by --stall-timeout. */
static void stalled_prefill_loses_it(void **state)
{
    client c;
    P.hold = 1;
    start_pair();
    assert_int_equal(submit(&c, 1, 5), TD_ERROR_NONE);
    WAIT(P.n_calls == 1);
    P.hold = 0;
    uint64_t start = td_now_us();
    WAIT(c.ends);
    assert_true(td_now_us() - start >= 250 * TD_MS);
    assert_int_equal(c.error, TD_ERROR_NONE);
    assert_int_equal(c.n[0], 5);
    assert_int_equal(c.usage.attempts, 2);
    assert_int_equal(P.calls[0].cancelled, 1);
    assert_int_equal(metric("redispatch_total{pool=\"prefill\"}"), 1);
}

/* A decode worker that prefills by itself: no prefill worker is asked, every token is its own, and
 * the usage tells. A recovery may go to a prefill worker after all. */
static void decode_prefills(void **state)
{
    client c;
    start_pair();
    D.local = 1;
    assert_int_equal(submit(&c, 2, 10), TD_ERROR_NONE);
    WAIT(c.ends);
    assert_int_equal(c.error, TD_ERROR_NONE);
    assert_int_equal(c.n[0], 10);
    assert_int_equal(c.n[1], 10);
    assert_int_equal(P.n_calls, 0);
    assert_int_equal(c.usage.local_tokens, 1);
    assert_int_equal(c.usage.cached_tokens, 2);
    assert_int_equal(c.usage.prefill_us, 55);
    assert_int_equal(c.usage.transfer_bytes, 0);
    assert_int_equal(metric("local_prefills_total"), 1);
    assert_int_equal(metric("local_prefill_tokens_total"), 1);
    assert_int_equal(metric("cached_tokens_total"), 2);
    D.stop_at = 4; /* dies; D2 goes on with a handoff */
    assert_int_equal(submit(&c, 1, 9), TD_ERROR_NONE);
    worker_dial(&D2);
    WAIT(c.ends);
    assert_int_equal(c.error, TD_ERROR_NONE);
    assert_int_equal(c.n[0], 9);
    assert_int_equal(c.usage.attempts, 2);
    assert_int_equal(P.n_calls, 1);
    D2.local = 1;
    /* prompt log-probabilities are never left to it */
    td_gen_spec spec = {
        .n = 1, .max_tokens = 6, .logprobs = 1, .top_logprobs = 2, .prompt_logprobs = 1};
    assert_int_equal(submit_spec(&c, &spec, NULL), TD_ERROR_NONE);
    WAIT(c.ends);
    assert_int_equal(c.error, TD_ERROR_NONE);
    assert_int_equal(c.n_prompt, 1);
    assert_int_equal(P.n_calls, 2);
}

/* More than was allowed: the worker is broken, and the request goes elsewhere. */
static void too_much_local(void **state)
{
    client c;
    start_pair();
    D.local = 4;
    worker_dial(&D2);
    WAIT(D2.up);
    assert_int_equal(submit(&c, 1, 9), TD_ERROR_NONE);
    WAIT(c.ends);
    assert_int_equal(c.error, TD_ERROR_NONE);
    assert_int_equal(c.n[0], 9);
    assert_int_equal(c.usage.attempts, 2);
    assert_int_equal(c.usage.local_tokens, 0);
    assert_int_equal(metric("redispatch_total{pool=\"decode\"}"), 1);
}

/* ends inside a delivery: the other choice loses nothing */
static void client_ends_choice(void **state)
{
    client c;
    start_pair();
    assert_int_equal(submit(&c, 2, 8), TD_ERROR_NONE);
    c.stop_after = 1;
    WAIT(c.ends);
    assert_int_equal(c.error, TD_ERROR_NONE);
    assert_int_equal(c.n[0], 1);
    assert_int_equal(c.n[1], 8);
    assert_int_equal(submit(&c, 1, 8), TD_ERROR_NONE);
    c.stop_after = 1; /* the only choice: everything is cancelled, and it is no error */
    D.hold = 0;
    WAIT(c.ends);
    assert_int_equal(c.error, TD_ERROR_NONE);
    assert_int_equal(c.n[0], 1);
}

static void unlike_workers_are_refused(void **state)
{
    uint8_t other[32];
    memset(other, 0xab, sizeof other);
    D2.hello.tokenizer_hash.data = other;
    start_pair();
    worker_dial(&D2);
    WAIT(D2.refused[0]);
    assert_non_null(strstr(D2.refused, "tokenizer hash"));
    assert_non_null(strstr(D2.refused, "abababab")); /* both are named */
    assert_non_null(strstr(D2.refused, "01010101"));
    worker_close(&D2);
    worker_open(&D2, "d2", 1);
    D2.hello.profile_id.data = other;
    worker_dial(&D2);
    WAIT(D2.refused[0]);
    assert_non_null(strstr(D2.refused, "profile"));
    assert_non_null(strstr(D2.refused, "--device"));
    assert_int_equal(get_state().n_decode, 1);
    assert_true(metric("refused_workers_total") >= 2);
}

static void set_profile(worker *w, const char *text)
{
    w->hello.has_profile = 1;
    w->hello.profile = (ProtobufCBinaryData){strlen(text), (uint8_t *)(uintptr_t)text};
}

/* Guards: workers that compute on unlike devices never feed each other, and the reason is theirs,
 * not two hashes. */
static void a_gpu_does_not_feed_a_cpu(void **state)
{
    uint8_t other[16];
    memset(other, 0xab, sizeof other);
    set_profile(&P, "act=bf16\nbackend=cpu\nisa=avx2\nkv=bf16\n");
    set_profile(&D, "act=bf16\nbackend=cpu\nisa=avx2\nkv=bf16\n");
    start_pair();
    set_profile(&D2, "act=bf16\nbackend=hip\nisa=gfx942\nkv=bf16\n");
    D2.hello.profile_id.data = other;
    worker_dial(&D2);
    WAIT(D2.refused[0]);
    assert_non_null(strstr(D2.refused, "d2: its profile has backend=hip isa=gfx942,"));
    assert_non_null(strstr(D2.refused, "the pool's backend=cpu isa=avx2:"));
    assert_non_null(strstr(D2.refused, "--device"));
    assert_int_equal(get_state().n_decode, 1);
}

static void queue_is_bounded(void **state)
{
    client c[3];
    uint32_t retry;
    D.hello.kv_blocks = 2; /* room for one: (3 + 120 - 1) / 64 -> 2 */
    P.hold = 1;
    start_pair();
    assert_int_equal(submit(&c[0], 1, 120), TD_ERROR_NONE);
    WAIT(P.n_calls == 1);
    assert_int_equal(submit(&c[1], 1, 120), TD_ERROR_NONE);
    assert_int_equal(submit_as(&c[2], 1, 120, NULL, &retry), TD_ERROR_QUEUE_FULL);
    assert_in_range(retry, 1000, 30000);
    assert_int_equal(get_state().n_queued, 1);
    assert_int_equal(submit(&c[2], 1, 130),
                     TD_ERROR_CONTEXT_LENGTH); /* larger than the whole pool */
    td_gen_cancel(c[0].gen);
    P.hold = 0;
    WAIT(c[0].ends && P.n_calls == 2); /* the room goes to who waits */
    td_gen_cancel(c[1].gen);
    WAIT(c[1].ends);
}

static void same_id_twice(void **state)
{
    client a, b;
    P.hold = 1;
    start_pair();
    assert_int_equal(submit_as(&a, 1, 5, "same", NULL), TD_ERROR_NONE);
    assert_int_equal(submit_as(&b, 1, 5, "same", NULL), TD_ERROR_CONFLICT);
    td_gen_cancel(a.gen);
    WAIT(a.ends);
}

static void on_idle(void *arg)
{
    (*(int *)arg)++;
}

static void drain(void **state)
{
    client c;
    int idle = 0;
    P.hold = 1;
    start_pair();
    assert_int_equal(submit(&c, 1, 5), TD_ERROR_NONE);
    WAIT(P.n_calls == 1);
    td_dispatch_drain(dispatch, on_idle, &idle);
    client late;
    assert_int_equal(submit(&late, 1, 5), TD_ERROR_DRAINING);
    td_loop_run_once(loop, 20000);
    assert_int_equal(idle, 0);
    prefill_answer(&P.calls[0]);
    WAIT(c.ends);
    assert_int_equal(c.error, TD_ERROR_NONE); /* what runs is finished */
    WAIT(idle == 1);
}

/* close ends everything before it returns */
static void close_ends_all(void **state)
{
    client c[2];
    P.hold = 1;
    start_pair();
    assert_int_equal(submit(&c[0], 1, 5), TD_ERROR_NONE);
    assert_int_equal(submit(&c[1], 1, 500), TD_ERROR_NONE);
    WAIT(P.n_calls >= 1);
    td_dispatch_close(dispatch);
    dispatch = NULL;
    for (int i = 0; i < 2; i++) {
        assert_int_equal(c[i].ends, 1);
        assert_int_equal(c[i].error, TD_ERROR_DRAINING);
    }
}

int main(void)
{
#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
    const struct CMUnitTest tests[] = {
        T(happy_path),
        T(logprobs_and_late_reply),
        T(deadline),
        T(nondeterminism),
        T(many_in_turn),
        T(prefill_alone),
        T(roles_come_and_go),
        T(cancel_reaches_both),
        T(lost_with_nobody_left),
        T(recovery),
        T(malformed_reply_is_retried),
        T(client_ends_choice),
        cmocka_unit_test_setup_teardown(stalled_prefill_loses_it, setup_watchful, teardown),
        cmocka_unit_test_setup_teardown(decode_prefills, setup_local, teardown),
        cmocka_unit_test_setup_teardown(too_much_local, setup_local, teardown),
        T(unlike_workers_are_refused),
        T(a_gpu_does_not_feed_a_cpu),
        cmocka_unit_test_setup_teardown(queue_is_bounded, setup_small_queue, teardown),
        T(same_id_twice),
        T(drain),
        T(close_ends_all),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
