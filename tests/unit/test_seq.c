/* SPDX-License-Identifier: Apache-2.0 */
/* Guards a sequence's rules: what is refused at the door, when it ends, what a prefix hit covers,
 * that nothing leaks, and that a step with wrong numbers runs nothing. */
#include "tests/engine_util.h"

#include <errno.h>

static test_engine t;

static int setup(void **state)
{
    t = test_open((test_setup){.dir = TD_SOURCE_DIR "/tests/goldens/models/glm-shared",
                               .type = TD_BF16,
                               .threads = 1,
                               .max_rows = 128,
                               .max_seqs = 4,
                               .n_blocks = 16});
    return 0;
}

static int teardown(void **state)
{
    td_kv_stats s;
    td_kv_pool_stats(td_engine_pool(t.engine), &s);
    int leaked = s.n_used != 0;
    test_close(&t);
    return leaked;
}

static td_seq_spec good(const uint32_t *ids, size_t n)
{
    return (td_seq_spec){.ids = ids,
                         .n_ids = n,
                         .n_prompt = n,
                         .max_tokens = 8,
                         .sampling = {.top_p = 1.0f, .repetition_penalty = 1.0f}};
}

static void refused(td_seq_spec spec, const char *named)
{
    td_seq *s = NULL;
    td_err err = {0};
    assert_int_equal(td_seq_new(t.engine, &spec, &s, &err), -EINVAL);
    if (!strstr(err.text, named))
        fail_msg("\"%s\" does not name %s", err.text, named);
}

static void bad_requests_are_refused_by_name(void **state)
{
    uint32_t ids[4] = {1, 2, 3, 256};
    td_logit_bias bias = {256, 1.0f};
    td_seq_spec s = good(ids, 3);
    s.n_prompt = 0;
    refused(s, "prompt");
    refused(good(ids, 4), "id 256");
    s = good(ids, 3);
    s.max_tokens = 0;
    refused(s, "max_tokens");
    s.max_tokens = 2046;
    refused(s, "context");
    s.max_tokens = UINT64_MAX;
    refused(s, "context");
    s = good(ids, 3);
    s.sampling.temperature = -1.0f;
    refused(s, "temperature");
    s.sampling.temperature = 0.0f / 0.0f;
    refused(s, "temperature");
    s = good(ids, 3);
    s.sampling.top_p = 0.0f;
    refused(s, "top_p");
    s = good(ids, 3);
    s.sampling.min_p = 1.5f;
    refused(s, "min_p");
    s = good(ids, 3);
    s.sampling.repetition_penalty = 0.0f;
    refused(s, "repetition_penalty");
    s = good(ids, 3);
    s.sampling.n_top = 21;
    refused(s, "top_logprobs");
    s = good(ids, 3);
    s.sampling.bias = &bias;
    s.sampling.n_bias = 1;
    refused(s, "logit_bias");
    s = good(ids, 3);
    s.stop_ids = ids + 3;
    s.n_stop_ids = 1;
    refused(s, "stop id");
}

static td_seq *make(td_seq_spec spec)
{
    td_seq *s = NULL;
    td_err err = {0};
    if (td_seq_new(t.engine, &spec, &s, &err) < 0)
        fail_msg("%s", err.text);
    return s;
}

/* eos ids of the model are 0 and 1. */
static void a_sequence_ends_when_it_should(void **state)
{
    uint32_t ids[2] = {5, 6}, stop = 9;
    td_seq_spec spec = good(ids, 2);
    spec.stop_ids = &stop;
    spec.n_stop_ids = 1;
    td_seq *s = make(spec);
    assert_int_equal(td_seq_append(s, 7), TD_FINISH_NONE);
    assert_int_equal(td_seq_append(s, 1), TD_FINISH_STOP);
    td_seq_free(s);
    s = make(spec);
    assert_int_equal(td_seq_append(s, 9), TD_FINISH_STOP);
    td_seq_free(s);
    spec.ignore_eos = 1;
    spec.max_tokens = 3;
    spec.min_tokens = 2;
    s = make(spec);
    assert_int_equal(td_seq_append(s, 0), TD_FINISH_NONE);
    assert_int_equal(td_seq_append(s, 9), TD_FINISH_NONE); /* before min_tokens */
    assert_int_equal(td_seq_append(s, 7), TD_FINISH_LENGTH);
    td_seq_free(s);
    spec.max_tokens = 1;
    s = make(spec);
    assert_int_equal(td_seq_append(s, 7), TD_FINISH_LENGTH);
    td_seq_free(s);
}

/* min_tokens suppresses what would end the text: with a huge bias on eos, eos comes exactly when it
 * is allowed. */
static void min_tokens_suppresses_eos_and_stops(void **state)
{
    uint32_t ids[2] = {5, 6};
    td_logit_bias bias[2] = {{1, 1000.0f}, {9, 900.0f}};
    uint32_t stop = 9;
    td_seq_spec spec = good(ids, 2);
    spec.sampling.bias = bias;
    spec.sampling.n_bias = 2;
    spec.stop_ids = &stop;
    spec.n_stop_ids = 1;
    spec.min_tokens = 3;
    td_seq *s = make(spec);
    for (int i = 0; i < 3; i++) {
        uint32_t id = test_prefill(&t, s, 64, NULL);
        assert_true(id != 1 && id != 9 && id != 0);
        assert_int_equal(td_seq_append(s, id), TD_FINISH_NONE);
    }
    uint32_t id = test_prefill(&t, s, 64, NULL);
    assert_int_equal(id, 1);
    assert_int_equal(td_seq_append(s, id), TD_FINISH_STOP);
    td_seq_free(s);
}

static void prefix_hits_cover_whole_blocks_and_leave_one_id(void **state)
{
    uint32_t ids[130];
    test_random_ids(4, 256, ids, 130);
    td_kv_flush(td_engine_pool(t.engine));
    td_seq *s = make(good(ids, 128));
    test_prefill(&t, s, 128, NULL);
    td_seq_free(s);
    static const size_t lengths[][2] = {{63, 0},   {64, 0},    {65, 64},
                                        {128, 64}, {129, 128}, {130, 128}};
    for (size_t i = 0; i < 6; i++) {
        s = make(good(ids, lengths[i][0]));
        assert_int_equal(td_seq_attach_prefix(s), lengths[i][1]);
        assert_int_equal(td_seq_computed(s), lengths[i][1]);
        td_seq_free(s);
    }
    td_seq_spec other = good(ids, 129); /* another tenant's key finds nothing */
    other.prefix_key[0] = 1;
    s = make(other);
    assert_int_equal(td_seq_attach_prefix(s), 0);
    td_seq_free(s);
    ids[10]++;
    s = make(good(ids, 129)); /* nor does another prompt */
    assert_int_equal(td_seq_attach_prefix(s), 0);
    td_seq_free(s);
}

/* Reserved blocks hold nothing yet: nobody may find them. */
static void only_computed_blocks_are_found(void **state)
{
    uint32_t ids[130];
    td_sample out;
    test_random_ids(11, 256, ids, 130);
    td_seq *s = make(good(ids, 130)), *other = make(good(ids, 130));
    assert_int_equal(td_seq_reserve(s, 130), 0);
    td_step_item it = {.seq = s, .n_tokens = 100};
    assert_int_equal(td_engine_step(t.engine, &it, 1, &out), 0);
    assert_int_equal(td_seq_attach_prefix(other), 64);
    td_seq_free(other);
    td_seq_free(s);
}

static void a_full_pool_says_so_and_changes_nothing(void **state)
{
    uint32_t ids[1000];
    test_random_ids(4, 256, ids, 1000);
    td_seq *a = make(good(ids, 1000)), *b = make(good(ids, 1000)), *f = NULL;
    assert_int_equal(td_seq_reserve(a, 1000), 0);
    assert_int_equal(td_seq_reserve(b, 64), -ENOSPC);
    size_t n;
    td_seq_blocks(b, &n);
    assert_int_equal(n, 0);
    td_seq_set_computed(a, 1000);
    assert_int_equal(td_seq_fork(a, 1, &f), -ENOSPC);
    td_seq_free(a);
    assert_int_equal(td_seq_reserve(b, 64), 0);
    td_seq_free(b);
    td_kv_flush(td_engine_pool(t.engine)); /* the rows were never computed */
}

static void a_wrong_step_runs_nothing(void **state)
{
    uint32_t ids[200];
    td_sample out;
    test_random_ids(4, 256, ids, 200);
    td_seq *s = make(good(ids, 200));
    td_step_item it = {.seq = s, .n_tokens = 10};
    assert_int_equal(td_engine_step(t.engine, &it, 1, &out), -EINVAL); /* no blocks */
    assert_int_equal(td_seq_reserve(s, 200), 0);
    assert_int_equal(td_engine_step(t.engine, &it, 0, &out), -EINVAL);
    it.n_tokens = 0;
    assert_int_equal(td_engine_step(t.engine, &it, 1, &out), -EINVAL);
    it.n_tokens = 129; /* more rows than the engine takes */
    assert_int_equal(td_engine_step(t.engine, &it, 1, &out), -EINVAL);
    it = (td_step_item){.seq = s, .n_tokens = 10, .n_samples = 1}; /* samples before the last id */
    assert_int_equal(td_engine_step(t.engine, &it, 1, &out), -EINVAL);
    it.n_samples = 0;
    td_step_item five[5] = {it, it, it, it, it};
    assert_int_equal(td_engine_step(t.engine, five, 5, &out), -EINVAL);
    assert_int_equal(td_seq_computed(s), 0);
    td_seq_free(s);
}

/* A damaged block (NaN) is an error, never a token. */
static void nan_is_an_error(void **state)
{
    uint32_t ids[40];
    td_sample out;
    test_random_ids(4, 256, ids, 40);
    td_seq *s = make(good(ids, 40));
    assert_int_equal(td_seq_reserve(s, 40), 0);
    td_step_item it = {.seq = s, .n_tokens = 39};
    assert_int_equal(td_engine_step(t.engine, &it, 1, &out), 0);
    size_t n;
    memset(td_kv_data(td_engine_pool(t.engine), td_seq_blocks(s, &n)[0]), 0xff,
           64 * 80); /* latents of layer 0 */
    it = (td_step_item){.seq = s, .n_tokens = 1, .n_samples = 1};
    assert_int_equal(td_engine_step(t.engine, &it, 1, &out), -EIO);
    td_seq_free(s);
    s = make(good(ids, 40)); /* the engine goes on */
    test_prefill(&t, s, 40, NULL);
    td_seq_free(s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(bad_requests_are_refused_by_name),
        cmocka_unit_test(a_sequence_ends_when_it_should),
        cmocka_unit_test(min_tokens_suppresses_eos_and_stops),
        cmocka_unit_test(prefix_hits_cover_whole_blocks_and_leave_one_id),
        cmocka_unit_test(only_computed_blocks_are_found),
        cmocka_unit_test(a_full_pool_says_so_and_changes_nothing),
        cmocka_unit_test(a_wrong_step_runs_nothing),
        cmocka_unit_test(nan_is_an_error),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
