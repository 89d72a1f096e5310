/* SPDX-License-Identifier: Apache-2.0 */
/* Conditional split on real processes: a prompt of which the decode worker lacks little is
 * prefilled there and gives byte-identical tokens and log-probabilities (promise 1), it says so and
 * counts it (promise 4), and the streams beside it wait for one chunk at most (promise 5). */
#define MODEL TD_SOURCE_DIR "/tests/goldens/models/glm-shared"

#include "tests/edge/reference.h"

enum { MAX_TOKENS = 12, N = 8, LIMIT = 128, CHUNK = 16 };

static const uint32_t lengths[N] = {1, 31, 32, 33, 63, 64, 65, 128};

static cluster cl;
static request rq[N + 1];
static token want[N + 1][CHOICES][TOKENS_MAX];
static uint32_t serial;

/* The seed decides prompt, sampling and prefix key; prompts of one seed are prefixes of each
 * other. */
static request *make(uint32_t i, uint32_t seed, size_t n_prompt)
{
    request *r = &rq[i];
    td_rng rng = {.seed = 900 + seed};
    memset(r, 0, sizeof *r);
    r->n_prompt = n_prompt;
    for (size_t k = 0; k < n_prompt; k++)
        r->prompt[k] = (uint32_t)td_rng_below(&rng, td_engine_info(engine)->vocab_size);
    r->max_tokens = MAX_TOKENS;
    r->n = 1;
    r->seed = seed;
    r->temperature = seed % 3 ? 0.9f : 0.0f;
    r->top_k = seed % 3 == 1 ? 40 : 0;
    r->repetition_penalty = seed % 2 ? 1.2f : 1.0f;
    r->local_tokens = LIMIT;
    memset(r->prefix_key, (int)seed, 32);
    snprintf(r->id, sizeof r->id, "l%u", serial++);
    return r;
}

static void must_equal(const request *r, token (*expect)[TOKENS_MAX])
{
    request_must_succeed(r);
    for (uint32_t c = 0; c < r->n; c++) {
        assert_int_equal(r->n_tokens[c], r->max_tokens);
        assert_int_equal(r->finish[c], 2);
        for (uint32_t k = r->n_emitted[c]; k < r->max_tokens; k++)
            if (memcmp(&r->tokens[c][k], &expect[c][k], sizeof(token)) != 0)
                fail_msg("prompt of %zu, %u local, choice %u, token %u: id %u, one process gives "
                         "%u",
                         r->n_prompt, r->local, c, k, r->tokens[c][k].id, expect[c][k].id);
    }
}

static void must_be_local(const request *r, uint32_t n)
{
    assert_int_equal(r->local, n);
    assert_int_equal(r->got_ticket, 0);
    assert_int_equal(r->transfer_bytes, 0);
}

static void run(request *r)
{
    request_start(&cl, r);
    request_wait(&cl, r);
}

static void short_prompts(void **state)
{
    (void)state;
    for (uint32_t i = 0; i < N; i++) {
        request *r = make(i, 10 + i, lengths[i]);
        reference(r, 0, want[i][0]);
        run(r);
        must_equal(r, want[i]);
        must_be_local(r, lengths[i]);
    }
    for (uint32_t i = 0; i < N; i++) { /* all at a time, and none of it cached */
        request *r = make(i, 10 + i, lengths[i]);
        memset(r->prefix_key, 200, 32);
        request_start(&cl, r);
    }
    for (uint32_t i = 0; i < N; i++) {
        request_wait(&cl, &rq[i]);
        must_equal(&rq[i], want[i]);
        must_be_local(&rq[i], lengths[i]);
    }
    request *r = make(0, 30, LIMIT + 1); /* one too many */
    reference(r, 0, want[0][0]);
    run(r);
    must_equal(r, want[0]);
    assert_int_equal(r->local, 0);
    assert_int_equal(r->got_ticket, 1);
}

/* A long prompt goes through a prefill worker, the next turn of the same talk does not. */
static void short_suffix(void **state)
{
    (void)state;
    static const uint32_t more[] = {1, 20, 63, 64, 65, 84};
    for (uint32_t i = 0; i < TD_ARRAY_LEN(more); i++) {
        request *r = make(0, 40 + i, 300);
        reference(r, 0, want[0][0]);
        run(r);
        must_equal(r, want[0]);
        assert_int_equal(r->got_ticket, 1);
        r = make(0, 40 + i, 300 + more[i]);
        reference(r, 0, want[0][0]);
        run(r);
        must_equal(r, want[0]);
        must_be_local(r, 300 + more[i] - 256);
    }
}

static void choices(void **state)
{
    (void)state;
    for (uint32_t i = 0; i < 3; i++) {
        request *r = make(0, 52 + 3 * i, 32 * (i + 1));
        r->n = CHOICES;
        for (uint32_t c = 0; c < CHOICES; c++)
            reference(r, c, want[0][c]);
        run(r);
        must_equal(r, want[0]);
        must_be_local(r, 32 * (i + 1));
    }
}

static request *recover(uint32_t at)
{
    request *r = make(0, 70, 60);
    r->attempt = 2;
    r->n_emitted[0] = at;
    for (uint32_t k = 0; k < at; k++)
        r->emitted[0][k] = want[0][0][k].id;
    return r;
}

/* Whatever was emitted before, the rest is the same; what does not come out again is told. */
static void recovery(void **state)
{
    (void)state;
    reference(make(0, 70, 60), 0, want[0][0]);
    for (uint32_t at = 1; at < MAX_TOKENS; at++) {
        request *r = recover(at);
        run(r);
        must_equal(r, want[0]);
        assert_true(r->local > 0);
    }
    request *r = recover(5);
    r->emitted[0][4] ^= 1;
    run(r);
    assert_int_equal(r->code[1], TD_DATA_LOSS);
    assert_non_null(strstr(r->why[1], "differs"));
    assert_int_equal(r->n_decoded[0], 0);
    r = make(0, 71, 60); /* several choices go to a prefill worker */
    r->n = 2;
    r->attempt = 2;
    for (uint32_t c = 0; c < 2; c++) {
        reference(r, c, want[0][c]);
        r->n_emitted[c] = 2;
        r->emitted[c][0] = want[0][c][0].id;
        r->emitted[c][1] = want[0][c][1].id;
    }
    run(r);
    must_equal(r, want[0]);
    assert_int_equal(r->got_ticket, 1);
}

/* Prompt log-probabilities are the prefill worker's. */
static void prompt_logprobs(void **state)
{
    (void)state;
    request *r = make(0, 80, 40);
    r->want_prompt = 1;
    run(r);
    request_must_succeed(r);
    assert_int_equal(r->got_ticket, 1);
    assert_int_equal(r->n_prompt_lp, 39);
}

static void wait_until(const uint32_t *flag)
{
    for (uint64_t end = td_now_us() + 30 * TD_S; !*flag;) {
        assert_true(td_now_us() < end);
        cluster_turn(&cl);
    }
}

static uint32_t stream_had, stream_has; /* tokens of rq[0] when the prompt began and was whole */

static void note_begin(request *r)
{
    (void)r;
    stream_had = rq[0].n_decoded[0];
}

static void note_whole(request *r)
{
    (void)r;
    stream_has = rq[0].n_decoded[0];
}

/* A stream gets a token with each chunk of the prompt beside it. */
static void streams_are_not_stalled(void **state)
{
    (void)state;
    enum { LONG = 960 };
    request *stream = make(0, 90, 40), *prompt = make(1, 91, LONG);
    stream->max_tokens = 800; /* more than it gets */
    prompt->local_tokens = LONG;
    reference(prompt, 0, want[1][0]);
    request_start(&cl, stream);
    wait_until(&stream->n_decoded[0]);
    prompt->on_local = note_begin;
    prompt->on_committed = note_whole;
    request_start(&cl, prompt);
    request_wait(&cl, prompt);
    /* some of the tokens may come behind "committed" in its message */
    if (stream_has - stream_had < LONG / CHUNK / 2)
        fail_msg("%u tokens beside %u chunks", stream_has - stream_had, LONG / CHUNK);
    must_equal(prompt, want[1]);
    must_be_local(prompt, LONG);
    if (stream->call[1])
        td_call_cancel(stream->call[1], "test");
    request_wait(&cl, stream);
}

/* Cancelled in the middle: nothing is kept, and the place is free for the next. */
static void cancelled(void **state)
{
    (void)state;
    for (int i = 0; i < 6; i++) {
        request *r = make(0, 100, 1700);
        r->local_tokens = 1700;
        r->max_tokens = 300; /* more than it gets, should it come to that */
        memset(r->prefix_key, 100 + i, 32);
        request_start(&cl, r);
        wait_until(&r->local);
        for (int k = 0; k < i; k++)
            cluster_turn(&cl);
        assert_non_null(r->call[1]);
        td_call_cancel(r->call[1], "test");
        request_wait(&cl, r);
        assert_int_equal(r->code[1], TD_CANCELLED);
    }
    request *r = make(0, 10, lengths[0]);
    reference(r, 0, want[0][0]);
    run(r);
    must_equal(r, want[0]);
}

static int setup(void **state)
{
    (void)state;
    char kv[128];
    reference_open();
    cluster_open(&cl);
    snprintf(kv, sizeof kv, "ipc://%s/kv.sock", cl.dir);
    cl.decode_chunk = "16";
    start_decode(&cl, MODEL, kv, "34");
    start_prefill(&cl, MODEL, "64", "60");
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    stop_worker(&cl, 0);
    stop_worker(&cl, 1);
    cluster_close(&cl);
    reference_close();
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(short_prompts),   cmocka_unit_test(short_suffix),
        cmocka_unit_test(choices),         cmocka_unit_test(recovery),
        cmocka_unit_test(prompt_logprobs), cmocka_unit_test(streams_are_not_stalled),
        cmocka_unit_test(cancelled),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
