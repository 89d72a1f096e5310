/* SPDX-License-Identifier: Apache-2.0 */
/* The split changes nothing (promise 1): prefill on one process and decode on another gives
 * byte-identical tokens and log-probabilities (the chosen token's and the 20 most likely ones, as
 * float bits) to one process, whatever the chunk size, the mates, the transport, what was cached,
 * and where a recovery took over. */
#define MODEL TD_SOURCE_DIR "/tests/goldens/models/glm-shared"

#include "tests/edge/reference.h"

enum { N_LENGTHS = 8, MAX_TOKENS = 12, N_MATES = 8, N_ALL = N_LENGTHS + N_MATES };

static request requests[N_ALL];
static token want[N_ALL][CHOICES][TOKENS_MAX];
static cluster cl;

static void make_requests(void)
{
    uint32_t topk = td_engine_info(engine)->index_topk, vocab = td_engine_info(engine)->vocab_size;
    const size_t lengths[N_LENGTHS] = {1, topk - 1, topk, topk + 1, 63, 64, 65, 1000};
    td_rng rng = {.seed = 7};
    for (uint32_t i = 0; i < N_ALL; i++) {
        request *r = &requests[i];
        r->n_prompt = i < N_LENGTHS ? lengths[i] : 1 + td_rng_below(&rng, 150);
        for (size_t k = 0; k < r->n_prompt; k++)
            r->prompt[k] = (uint32_t)td_rng_below(&rng, vocab);
        r->max_tokens = MAX_TOKENS;
        r->seed = 1000 + i;
        r->temperature = i % 3 == 0 ? 0.0f : 0.9f;
        r->top_k = i % 3 == 1 ? 40 : 0;
        r->repetition_penalty = i % 4 == 2 ? 1.2f : 1.0f;
        reference(r, 0, want[i][0]);
    }
}

/* The same request again, as a client would send it: nothing of the last run is left. */
static request *fresh(uint32_t i, uint8_t salt)
{
    static uint32_t serial;
    request *r = &requests[i], keep = *r;
    memset(r, 0, sizeof *r);
    memcpy(r->prompt, keep.prompt, sizeof r->prompt);
    r->n_prompt = keep.n_prompt;
    r->max_tokens = keep.max_tokens;
    r->seed = keep.seed;
    r->temperature = keep.temperature;
    r->top_k = keep.top_k;
    r->repetition_penalty = keep.repetition_penalty;
    memset(r->prefix_key, salt, sizeof r->prefix_key);
    snprintf(r->id, sizeof r->id, "r%u-%u", i, serial++);
    return r;
}

static void must_equal(const request *r, uint32_t choice, const token *expect, const char *what)
{
    request_must_succeed(r);
    assert_int_equal(r->first_seen[choice], 1);
    assert_int_equal(r->n_tokens[choice], r->max_tokens);
    assert_int_equal(r->finish[choice], 2);
    for (uint32_t k = 0; k < r->max_tokens; k++) {
        if (memcmp(&r->tokens[choice][k], &expect[k], sizeof(token)) != 0)
            fail_msg(
                "%s: prompt of %zu, choice %u, token %u: id %u logprob %a, one process gives %u %a",
                what, r->n_prompt, choice, k, r->tokens[choice][k].id,
                (double)r->tokens[choice][k].logprob, expect[k].id, (double)expect[k].logprob);
    }
}

static void run_alone(uint8_t salt, const char *what)
{
    for (uint32_t i = 0; i < N_LENGTHS; i++) {
        request *r = fresh(i, salt);
        request_start(&cl, r);
        request_wait(&cl, r);
        must_equal(r, 0, want[i][0], what);
    }
}

/* n requests at a time, each of the lengths at least once, mates and order by seed. */
static void run_batches(uint8_t salt, const char *what)
{
    td_rng rng = {.seed = salt};
    for (uint32_t done = 0; done < N_ALL;) {
        uint32_t order[N_ALL];
        for (uint32_t i = 0; i < N_ALL; i++)
            order[i] = i;
        for (uint32_t i = N_ALL - 1; i > 0; i--) {
            uint32_t k = (uint32_t)td_rng_below(&rng, i + 1), t = order[i];
            order[i] = order[k];
            order[k] = t;
        }
        uint32_t n = done == 0 ? N_ALL : 2 + (uint32_t)td_rng_below(&rng, N_ALL - 1);
        for (uint32_t i = 0; i < n; i++)
            request_start(&cl, fresh(order[i], salt));
        for (uint32_t i = 0; i < n; i++) {
            request_wait(&cl, &requests[order[i]]);
            must_equal(&requests[order[i]], 0, want[order[i]][0], what);
        }
        done += n;
        salt++;
    }
}

static void test_chunks_and_transports(void **state)
{
    (void)state;
    static const char *const chunks[] = {"2048", "64", "7", "1"};
    static const struct {
        const char *name, *transport;
        int tcp;
    } ways[] = {{"ipc", "zmq", 0}, {"tcp", "zmq", 1}, {"shm", "shm", 0}, {"shm, tcp", "shm", 1}};
    for (size_t w = 0; w < TD_ARRAY_LEN(ways); w++) {
        char kv[128];
        if (ways[w].tcp)
            snprintf(kv, sizeof kv, "tcp://127.0.0.1:0");
        else
            snprintf(kv, sizeof kv, "ipc://%s/kv.sock", cl.dir);
        /* zmq and shm never fall back: the blocks went as the name says */
        setenv("TANDEM_PREFILL_KV_TRANSPORT", ways[w].transport, 1);
        setenv("TANDEM_DECODE_KV_TRANSPORT", ways[w].transport, 1);
        start_decode(&cl, MODEL, kv, "200");
        for (size_t i = 0; i < TD_ARRAY_LEN(chunks); i++) {
            char what[64];
            snprintf(what, sizeof what, "%s, chunk %s", ways[w].name, chunks[i]);
            start_prefill(&cl, MODEL, chunks[i], "200");
            run_alone((uint8_t)(100 + 10 * i), what);
            run_batches((uint8_t)(10 * i), what);
            stop_worker(&cl, 0);
        }
        stop_worker(&cl, 1);
    }
    unsetenv("TANDEM_PREFILL_KV_TRANSPORT");
    unsetenv("TANDEM_DECODE_KV_TRANSPORT");
}

/* If the decode worker holds a prefix, only the rest is sent; and the tokens stay the same. */
static void test_held_prefix_is_not_sent(void **state)
{
    (void)state;
    char kv[128];
    snprintf(kv, sizeof kv, "ipc://%s/kv.sock", cl.dir);
    start_decode(&cl, MODEL, kv, "200");
    start_prefill(&cl, MODEL, "64", "200");
    uint64_t block_bytes = td_engine_info(engine)->kv.block_bytes;
    request *r = fresh(N_LENGTHS - 1, 77);
    request_start(&cl, r);
    request_wait(&cl, r);
    must_equal(r, 0, want[N_LENGTHS - 1][0], "cold");
    assert_int_equal(r->held, 0);
    assert_int_equal(r->sent_blocks, 16);
    uint64_t cold = r->transfer_bytes;
    assert_int_equal(cold, block_bytes * 15 + block_bytes / 64 * (1000 - 15 * 64));
    r = fresh(N_LENGTHS - 1, 77);
    request_start(&cl, r);
    request_wait(&cl, r);
    must_equal(r, 0, want[N_LENGTHS - 1][0], "warm");
    assert_int_equal(r->cached, 15 * 64);
    assert_int_equal(r->held, 15);
    assert_int_equal(r->sent_blocks, 1);
    assert_int_equal(r->transfer_bytes, cold - 15 * block_bytes);
    /* another tenant's key: nothing is shared */
    r = fresh(N_LENGTHS - 1, 78);
    request_start(&cl, r);
    request_wait(&cl, r);
    must_equal(r, 0, want[N_LENGTHS - 1][0], "another key");
    assert_int_equal(r->held, 0);
    assert_int_equal(r->cached, 0);
    /* a prompt that is a whole number of blocks still sends its last one */
    for (int i = 0; i < 2; i++) {
        r = fresh(5, 79);
        request_start(&cl, r);
        request_wait(&cl, r);
        must_equal(r, 0, want[5][0], "64 tokens");
        assert_int_equal(r->sent_blocks, 1);
    }
}

/* n choices: one prefill, n first tokens, one ticket; each choice as if alone. */
static void test_choices(void **state)
{
    (void)state;
    static const uint32_t which[] = {0, 5, 6};
    for (size_t k = 0; k < TD_ARRAY_LEN(which); k++) {
        uint32_t i = which[k];
        requests[i].temperature = 0.9f;
        request *r = fresh(i, 80);
        r->n = CHOICES;
        for (uint32_t c = 0; c < CHOICES; c++)
            reference(r, c, want[i][c]);
        request_start(&cl, r);
        request_wait(&cl, r);
        for (uint32_t c = 0; c < CHOICES; c++)
            must_equal(r, c, want[i][c], "choices");
    }
}

/* One recovery path: whatever was emitted before, the rest is the same, and the recomputed token is
 * told for comparison. */
static void test_recovery_at_every_token(void **state)
{
    (void)state;
    for (uint32_t i = 2; i < N_LENGTHS; i += 5) {
        for (uint32_t at = 1; at < MAX_TOKENS; at++) {
            request *r = fresh(i, (uint8_t)(120 + at % 3));
            reference(r, 0, want[i][0]);
            r->attempt = 2;
            r->n_emitted[0] = at;
            for (uint32_t k = 0; k < at; k++)
                r->emitted[0][k] = want[i][0][k].id;
            request_start(&cl, r);
            request_wait(&cl, r);
            request_must_succeed(r);
            assert_int_equal(r->n_tokens[0], MAX_TOKENS);
            for (uint32_t k = at - 1; k < MAX_TOKENS; k++)
                assert_memory_equal(&r->tokens[0][k], &want[i][0][k], sizeof(token));
        }
    }
    /* a token that was told to the client and is not what comes out now: a typed error, never a
     * wrong continuation */
    request *r = fresh(2, 130);
    r->attempt = 2;
    r->n_emitted[0] = 2;
    r->emitted[0][0] = want[2][0][0].id;
    r->emitted[0][1] = want[2][0][1].id ^ 1;
    request_start(&cl, r);
    request_wait(&cl, r);
    /* the leg that hears of it first ends the other */
    assert_true(r->code[0] == TD_DATA_LOSS || r->code[1] == TD_DATA_LOSS);
    assert_true(r->code[1] == TD_DATA_LOSS || r->code[1] == TD_CANCELLED);
    assert_int_equal(r->committed, 0);
    assert_int_equal(r->n_decoded[0], 0);
}

/* n choices, some finished, the others at different places: each goes on as if nothing had
 * happened. */
static void test_recovery_of_choices(void **state)
{
    (void)state;
    static const uint32_t which[] = {0, 5, 6},
                          at[CHOICES] = {1, 0, 9, 4}; /* choice 1 had finished */
    for (size_t k = 0; k < TD_ARRAY_LEN(which); k++) {
        uint32_t i = which[k];
        requests[i].temperature = 0.9f;
        request *r = fresh(i, (uint8_t)(150 + k));
        r->n = CHOICES;
        r->attempt = 2;
        for (uint32_t c = 0; c < CHOICES; c++) {
            reference(r, c, want[i][c]);
            r->n_emitted[c] = at[c];
            for (uint32_t e = 0; e < at[c]; e++)
                r->emitted[c][e] = want[i][c][e].id;
        }
        request_start(&cl, r);
        request_wait(&cl, r);
        request_must_succeed(r);
        for (uint32_t c = 0; c < CHOICES; c++) {
            assert_int_equal(r->n_tokens[c], at[c] ? MAX_TOKENS : 0);
            for (uint32_t e = at[c] ? at[c] - 1 : MAX_TOKENS; e < MAX_TOKENS; e++)
                assert_memory_equal(&r->tokens[c][e], &want[i][c][e], sizeof(token));
        }
    }
}

/* Prompt log-probabilities come from the prefill worker, which then takes no prefix hit. */
static void test_prompt_logprobs(void **state)
{
    (void)state;
    td_err err = {0};
    td_seq *s;
    td_sample sample;
    static td_logprob expect[2048];
    for (uint32_t i = 4; i < N_LENGTHS; i++) {
        request *r = fresh(i, 160);
        td_seq_spec spec = {.ids = r->prompt,
                            .n_ids = r->n_prompt,
                            .n_prompt = r->n_prompt,
                            .max_tokens = 1,
                            .sampling = {.top_p = 1, .repetition_penalty = 1}};
        if (td_seq_new(engine, &spec, &s, &err) < 0)
            fail_msg("%s", err.text);
        assert_int_equal(td_seq_reserve(s, r->n_prompt), 0);
        td_step_item item = {
            .seq = s, .n_tokens = (uint32_t)r->n_prompt, .n_samples = 1, .ret_prompt_lp = expect};
        assert_int_equal(td_engine_step(engine, &item, 1, &sample), 0);
        td_seq_free(s);
        for (int again = 0; again < 2; again++) {
            r = fresh(i, 160);
            reference(r, 0, want[i][0]);
            r->want_prompt = 1;
            request_start(&cl, r);
            request_wait(&cl, r);
            must_equal(r, 0, want[i][0], "prompt logprobs");
            assert_int_equal(r->cached, 0);
            assert_int_equal(r->n_prompt_lp, r->n_prompt - 1);
            for (uint32_t k = 0; k < r->n_prompt_lp; k++)
                assert_memory_equal(&r->prompt_lp[k], &expect[k].logprob, sizeof(float));
        }
    }
}

/* max_tokens 1: nothing is reserved, the prefill worker answers alone. */
static void test_prefill_alone(void **state)
{
    (void)state;
    request *r = fresh(6, 140);
    r->max_tokens = 1;
    r->n = 1;
    r->attempt = 1;
    r->c = &cl;
    start_prefill_call(r, NULL);
    request_wait(&cl, r);
    assert_int_equal(r->code[0], TD_OK);
    assert_int_equal(r->n_tokens[0], 1);
    assert_int_equal(r->finish[0], 2);
    r->max_tokens = MAX_TOKENS;
    reference(r, 0, want[6][0]);
    assert_memory_equal(&r->tokens[0][0], &want[6][0][0], sizeof(token));
}

static void stop_workers(void)
{
    for (int role = 0; role < 2; role++)
        if (cl.session[role])
            stop_worker(&cl, role);
}

/* FP8 rows: the values of a partial block travel with their scales, over either transport. */
static void test_fp8_rows(void **state)
{
    (void)state;
    char kv[128];
    snprintf(kv, sizeof kv, "ipc://%s/kv.sock", cl.dir);
    stop_workers();
    reference_close();
    reference_open_kv(TD_F8E4M3);
    for (uint32_t i = 0; i < N_LENGTHS; i++)
        reference(&requests[i], 0, want[i][0]);
    static const char *const ways[] = {"zmq", "shm"};
    setenv("TANDEM_PREFILL_KV", "fp8", 1);
    setenv("TANDEM_DECODE_KV", "fp8", 1);
    for (size_t w = 0; w < TD_ARRAY_LEN(ways); w++) {
        setenv("TANDEM_PREFILL_KV_TRANSPORT", ways[w], 1);
        setenv("TANDEM_DECODE_KV_TRANSPORT", ways[w], 1);
        start_decode(&cl, MODEL, kv, "200");
        start_prefill(&cl, MODEL, "64", "200");
        run_alone((uint8_t)(170 + w), ways[w]);
        stop_workers();
    }
}

static int setup(void **state)
{
    (void)state;
    reference_open();
    make_requests();
    cluster_open(&cl);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    stop_workers();
    cluster_close(&cl);
    reference_close();
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_chunks_and_transports),
        cmocka_unit_test(test_held_prefix_is_not_sent), /* its workers serve the tests after it */
        cmocka_unit_test(test_choices),
        cmocka_unit_test(test_recovery_at_every_token),
        cmocka_unit_test(test_recovery_of_choices),
        cmocka_unit_test(test_prompt_logprobs),
        cmocka_unit_test(test_prefill_alone),
        cmocka_unit_test(test_fp8_rows), /* its workers are others */
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
