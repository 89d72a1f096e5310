/* SPDX-License-Identifier: Apache-2.0 */
/* Guards promise 1: tokens and logits of a sequence are byte-equal whatever else is in the step,
 * however the prompt is cut, however many threads run, whether its prefix came from the cache,
 * wherever its blocks lie, and when its blocks were copied from another engine's pool as a handoff
 * does. Each axis against the base run (alone, whole prompt, one thread). TD_ALL=1 takes the long
 * forms. */
#include "tests/engine_util.h"

#include "base/hash.h"

enum { STEPS = 6, PROMPT_MAX = 1000, VOCAB_MAX = 256, ROWS = 1024 };

static const char *const models[] = {
    TD_SOURCE_DIR "/tests/goldens/models/glm-shared",
    TD_SOURCE_DIR "/tests/goldens/models/glm-groups",
    TD_SOURCE_DIR "/tests/goldens/models/qwen3",
    TD_SOURCE_DIR "/tests/goldens/models/qwen3-mxfp4-fp8",
    TD_SOURCE_DIR "/tests/goldens/models/glm-mxfp4-all",
    TD_SOURCE_DIR "/tests/goldens/models/glm-fp8",
};
enum { PLAIN = 3, FEW = 4 }; /* models with BF16 weights; models for the second instruction set */
static const uint32_t lengths[] = {1,  31, 32, 33,
                                   63, 64, 65, 1000}; /* index_topk of the models is 32 */

/* What a run leaves: every sampled id and a digest of every logits row. */
typedef struct trace {
    uint32_t ids[STEPS];
    uint8_t rows[STEPS][16];
} trace;

static int all(void)
{
    const char *e = getenv("TD_ALL");
    return e && e[0] == '1';
}

static const char *isa = "auto";
static int kv_fp8;

static test_engine open_model(const char *dir, td_dtype type, uint32_t threads)
{
    return test_open((test_setup){.dir = dir,
                                  .isa = isa,
                                  .type = type,
                                  .act_i8 = 1,
                                  .kv_fp8 = kv_fp8,
                                  .threads = threads,
                                  .max_rows = ROWS,
                                  .max_seqs = 48,
                                  .n_blocks = 200});
}

static td_sampling sampling_of(uint64_t seed)
{
    return (td_sampling){
        .temperature = 0.8f, .top_p = 0.95f, .top_k = 40, .repetition_penalty = 1.1f, .seed = seed};
}

static td_seq *start(test_engine *t, uint32_t length, uint64_t seed)
{
    uint32_t ids[PROMPT_MAX];
    test_random_ids(seed, t->info->vocab_size, ids, length);
    return test_seq(t, ids, length, length, sampling_of(seed), STEPS + 1);
}

static void record(trace *tr, int step, uint32_t id, const float *logits, uint32_t vocab)
{
    tr->ids[step] = id;
    td_xxh128(logits, vocab * sizeof *logits, tr->rows[step]);
}

/* Steps [from, STEPS) of a sequence whose prompt may be partly computed. */
static void finish_alone(test_engine *t, td_seq *s, uint32_t chunk, int from, trace *tr)
{
    float logits[VOCAB_MAX];
    for (int i = from; i < STEPS; i++) {
        uint32_t id = test_prefill(t, s, chunk, logits);
        record(tr, i, id, logits, t->info->vocab_size);
        td_seq_append(s, id);
    }
}

static trace run_alone(test_engine *t, uint32_t length, uint64_t seed, uint32_t chunk)
{
    trace tr = {0};
    td_seq *s = start(t, length, seed);
    finish_alone(t, s, chunk, 0, &tr);
    td_seq_free(s);
    return tr;
}

static void assert_same(const trace *want, const trace *got, const char *axis, uint32_t length,
                        uint32_t value)
{
    if (memcmp(want, got, sizeof *want) != 0)
        fail_msg("%s %u changes the output of a prompt of %u tokens", axis, value, length);
}

typedef void (*axis_fn)(const char *dir, td_dtype type, test_engine *t, const trace *base);

/* FP8 rows: an MLA and a grouped-query model. */
static int skipped(size_t model, td_dtype type, int few)
{
    if (all())
        return kv_fp8 && type == TD_F32;
    return (type == TD_F32 && (model || few || kv_fp8)) || (kv_fp8 && model != 0 && model != 2);
}

/* Base traces of every length, then one axis. */
static void with_models(axis_fn fn, int few)
{
    size_t n = few && !all() ? FEW : sizeof models / sizeof *models;
    for (size_t m = 0; m < n; m++)
        for (td_dtype type = TD_F32; type <= TD_BF16; type++) {
            if (skipped(m, type, few))
                continue;
            test_engine t = open_model(models[m], type, 1);
            trace base[sizeof lengths / sizeof *lengths];
            for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++)
                base[i] = run_alone(&t, lengths[i], i + 1, ROWS);
            fn(models[m], type, &t, base);
            test_close(&t);
        }
}

/* The best kernels of this machine, then AVX2 as a smaller machine would run them; TD_ALL=1: each.
 */
static void with_base(axis_fn fn)
{
    const char *best = td_backend_get("auto")->isa;
    isa = best;
    with_models(fn, 0);
    kv_fp8 = 1;
    with_models(fn, 1);
    kv_fp8 = 0;
    for (int i = 0; i < TEST_ISAS; i++) {
        isa = test_isas[i];
        if (strcmp(isa, best) != 0 && (all() || strcmp(isa, "avx2") == 0) && test_has_isa(isa))
            with_models(fn, 1);
    }
}

#define FOR_LENGTHS(i) for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++)

static void chunk_axis(const char *dir, td_dtype type, test_engine *t, const trace *base)
{
    static const uint32_t chunks[] = {1, 7, 64, 512};
    for (size_t c = 0; c < sizeof chunks / sizeof *chunks; c++)
        FOR_LENGTHS(i)
        {
            if (chunks[c] >= lengths[i] && c)
                continue;
            trace got = run_alone(t, lengths[i], i + 1, chunks[c]);
            assert_same(&base[i], &got, "chunk", lengths[i], chunks[c]);
        }
}

static void thread_axis(const char *dir, td_dtype type, test_engine *t, const trace *base)
{
    for (uint32_t n = 2; n <= 3; n++) {
        test_engine other = open_model(dir, type, n);
        FOR_LENGTHS(i)
        {
            trace got = run_alone(&other, lengths[i], i + 1, i % 2 ? 64 : ROWS);
            assert_same(&base[i], &got, "threads", lengths[i], n);
        }
        test_close(&other);
    }
}

/* One subject among random mates: all prompts chunked side by side, then all decode together; mates
 * come and go. */
static trace run_batch(test_engine *t, uint32_t length, uint64_t seed, uint32_t batch, td_rng *rng)
{
    trace tr = {0};
    td_seq *s[48];
    float logits[VOCAB_MAX];
    uint32_t at = (uint32_t)td_rng_below(rng, batch);
    int steps = 0;
    for (uint32_t i = 0; i < batch; i++) {
        s[i] = start(t, i == at ? length : 1 + (uint32_t)td_rng_below(rng, 90),
                     i == at ? seed : td_rng_next(rng));
        size_t n;
        td_seq_ids(s[i], &n);
        assert_int_equal(td_seq_reserve(s[i], n + STEPS), 0);
    }
    while (steps < STEPS) {
        td_step_item items[48];
        td_sample out[48];
        uint32_t owner[48], n_items = 0, n_out = 0, rows = 0;
        for (uint32_t i = 0; i < batch; i++) {
            size_t n;
            td_seq_ids(s[i], &n);
            uint32_t left = (uint32_t)(n - td_seq_computed(s[i])),
                     len = 1 + (uint32_t)td_rng_below(rng, 150);
            len = len < left ? len : left;
            if (rows + len > ROWS)
                continue;
            rows += len;
            int last = len == left;
            items[n_items++] = (td_step_item){.seq = s[i],
                                              .n_tokens = len,
                                              .n_samples = (uint32_t)last,
                                              .want_logits = last && i == at,
                                              .ret_logits = logits};
            if (last)
                owner[n_out++] = i;
        }
        assert_int_equal(td_engine_step(t->engine, items, n_items, out), 0);
        for (uint32_t k = 0; k < n_out; k++) {
            uint32_t i = owner[k];
            if (i == at)
                record(&tr, steps++, out[k].id, logits, t->info->vocab_size);
            size_t n;
            td_seq_ids(s[i], &n);
            if (i == at || n < td_seq_n_prompt(s[i]) + STEPS)
                td_seq_append(s[i], out[k].id);
            else { /* a mate that is done makes room for another */
                td_seq_free(s[i]);
                s[i] = start(t, 1 + (uint32_t)td_rng_below(rng, 40), td_rng_next(rng));
                td_seq_ids(s[i], &n);
                assert_int_equal(td_seq_reserve(s[i], n + STEPS), 0);
            }
        }
    }
    for (uint32_t i = 0; i < batch; i++)
        td_seq_free(s[i]);
    return tr;
}

static void batch_axis(const char *dir, td_dtype type, test_engine *t, const trace *base)
{
    static const uint32_t quick[] = {2, 3, 5, 16},
                          full[] = {2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 33};
    const uint32_t *sizes = all() ? full : quick;
    size_t n = all() ? sizeof full / sizeof *full : sizeof quick / sizeof *quick;
    td_rng rng = {77, 0};
    for (size_t b = 0; b < n; b++)
        FOR_LENGTHS(i)
        {
            trace got = run_batch(t, lengths[i], i + 1, sizes[b], &rng);
            assert_same(&base[i], &got, "batch", lengths[i], sizes[b]);
        }
}

/* A hit at every block boundary: the cache is primed with a prompt that shares b blocks. */
static void cache_axis(const char *dir, td_dtype type, test_engine *t, const trace *base)
{
    uint32_t ids[PROMPT_MAX];
    FOR_LENGTHS(i)
    {
        uint32_t blocks = (lengths[i] - 1) / 64, step = all() || blocks < 4 ? 1 : 5;
        for (uint32_t b = 1; b <= blocks; b += step) {
            td_kv_flush(td_engine_pool(t->engine));
            test_random_ids(i + 1, t->info->vocab_size, ids, b * 64);
            td_seq *prime = test_seq(t, ids, b * 64, b * 64, (td_sampling){0}, 1);
            test_prefill(t, prime, 100, NULL);
            td_seq_free(prime);
            trace got = {0};
            td_seq *s = start(t, lengths[i], i + 1);
            assert_int_equal(td_seq_attach_prefix(s), b * 64);
            finish_alone(t, s, 64, 0, &got);
            td_seq_free(s);
            assert_same(&base[i], &got, "cached blocks", lengths[i], b);
        }
    }
}

/* Eviction: other prompts push the cached prefix out; what is left of it (nothing, or a part) must
 * still be right. */
static void eviction_axis(const char *dir, td_dtype type, test_engine *t, const trace *base)
{
    size_t i = sizeof lengths / sizeof *lengths - 1;
    td_kv_stats st;
    for (int round = 0; round < 2; round++) {
        trace got = {0};
        td_seq *s = start(t, lengths[i], i + 1);
        size_t hit = td_seq_attach_prefix(s);
        finish_alone(t, s, 512, 0, &got);
        td_seq_free(s);
        assert_same(&base[i], &got, "eviction, tokens left in the cache:", lengths[i],
                    (uint32_t)hit);
        for (uint64_t k = 0; k < 14; k++) {
            td_seq *other = start(t, 960, 500 + k);
            test_prefill(t, other, ROWS, NULL);
            td_seq_free(other);
        }
    }
    td_kv_pool_stats(td_engine_pool(t->engine), &st);
    assert_true(st.evictions > 0);
}

/* Blocks in random order: hold random others back while the subject allocates. */
static void permutation_axis(const char *dir, td_dtype type, test_engine *t, const trace *base)
{
    td_kv_pool *pool = td_engine_pool(t->engine);
    td_block held[100];
    td_rng rng = {5, 0};
    td_kv_flush(pool);
    FOR_LENGTHS(i)
    {
        assert_int_equal(td_kv_alloc(pool, 100, held), 0);
        for (uint32_t k = 99; k > 0; k--) {
            uint32_t j = (uint32_t)td_rng_below(&rng, k + 1);
            td_block x = held[k];
            held[k] = held[j];
            held[j] = x;
        }
        for (uint32_t k = 0; k < 100; k++)
            td_kv_unref(pool, held[k]);
        trace got = run_alone(t, lengths[i], i + 1, 64);
        assert_same(&base[i], &got, "block permutation", lengths[i], (uint32_t)i);
        td_kv_flush(pool);
    }
}

/* Prefill on one engine, copy the blocks' bytes, decode on another: what a handoff does, for every
 * length and chunk. */
static void handoff_axis(const char *dir, td_dtype type, test_engine *t, const trace *base)
{
    static const uint32_t chunks[] = {7, 64, ROWS};
    test_engine other = open_model(dir, type, 1);
    td_block hold[13];
    assert_int_equal(td_kv_alloc(td_engine_pool(other.engine), 13, hold), 0);
    for (size_t c = 0; c < sizeof chunks / sizeof *chunks; c++)
        FOR_LENGTHS(i)
        {
            float logits[VOCAB_MAX];
            trace got = {0};
            td_seq *p = start(t, lengths[i], i + 1);
            uint32_t id = test_prefill(t, p, chunks[c], logits);
            record(&got, 0, id, logits, t->info->vocab_size);
            td_seq *d = start(&other, lengths[i], i + 1);
            size_t n, n_d;
            assert_int_equal(td_seq_reserve(d, lengths[i]), 0);
            const td_block *from = td_seq_blocks(p, &n), *to = td_seq_blocks(d, &n_d);
            assert_int_equal(n, n_d);
            for (size_t b = 0; b < n; b++)
                memcpy(td_kv_data(td_engine_pool(other.engine), to[b]),
                       td_kv_data(td_engine_pool(t->engine), from[b]), t->info->kv.block_bytes);
            td_seq_free(p);
            td_seq_set_computed(d, lengths[i]);
            td_seq_append(d, id);
            finish_alone(&other, d, 1, 1, &got);
            td_seq_free(d);
            assert_same(&base[i], &got, "handoff at chunk", lengths[i], chunks[c]);
        }
    for (int k = 0; k < 13; k++)
        td_kv_unref(td_engine_pool(other.engine), hold[k]);
    test_close(&other);
}

/* Fork: choices of one prompt equal sequences that were prefilled on their own. */
static void fork_axis(const char *dir, td_dtype type, test_engine *t, const trace *base)
{
    FOR_LENGTHS(i)
    {
        float logits[VOCAB_MAX];
        trace got = {0};
        td_seq *s = start(t, lengths[i], i + 1), *f = NULL, *g = NULL;
        uint32_t id = test_prefill(t, s, 64, logits);
        assert_int_equal(td_seq_fork(s, 5, &g), 0);
        assert_int_equal(td_seq_fork(s, 0, &f), 0);
        td_seq_append(g, (id + 1) % t->info->vocab_size);
        test_prefill(t, g, 64, NULL); /* a sibling that writes its own partial block */
        record(&got, 0, id, logits, t->info->vocab_size);
        td_seq_append(f, id);
        finish_alone(t, f, 64, 1, &got);
        td_seq_free(s);
        td_seq_free(g);
        td_seq_free(f);
        assert_same(&base[i], &got, "fork", lengths[i], 0);
    }
}

/* Logprobs ride along: they may not change what is sampled. Prompt logprobs neither. */
static void logprob_axis(const char *dir, td_dtype type, test_engine *t, const trace *base)
{
    FOR_LENGTHS(i)
    {
        uint32_t ids[PROMPT_MAX];
        td_logprob *lp = calloc(PROMPT_MAX, sizeof *lp);
        td_sampling sampling = sampling_of(i + 1);
        sampling.logprobs = 1;
        sampling.n_top = 5;
        test_random_ids(i + 1, t->info->vocab_size, ids, lengths[i]);
        td_seq *s = test_seq(t, ids, lengths[i], lengths[i], sampling, STEPS + 1);
        assert_int_equal(td_seq_reserve(s, lengths[i]), 0);
        float logits[VOCAB_MAX];
        td_sample out = {0};
        td_step_item it = {.seq = s,
                           .n_tokens = lengths[i],
                           .n_samples = 1,
                           .want_logits = 1,
                           .ret_logits = logits,
                           .ret_prompt_lp = lp,
                           .prompt_top = 2};
        assert_int_equal(td_engine_step(t->engine, &it, 1, &out), 0);
        trace got = {0};
        record(&got, 0, out.id, logits, t->info->vocab_size);
        assert_true(out.lp.logprob <= 0.0f && out.lp.n_top == 5);
        for (uint32_t k = 0; k + 1 < lengths[i]; k++)
            assert_true(lp[k].logprob <= 1e-6f && lp[k].n_top == 2 && lp[k].top[0] >= lp[k].top[1]);
        td_seq_append(s, out.id);
        finish_alone(t, s, 64, 1, &got);
        td_seq_free(s);
        free(lp);
        assert_same(&base[i], &got, "logprobs", lengths[i], 5);
    }
}

static void chunks_change_nothing(void **state)
{
    with_base(chunk_axis);
}

static void threads_change_nothing(void **state)
{
    with_base(thread_axis);
}

static void batch_mates_change_nothing(void **state)
{
    with_base(batch_axis);
}

static void cache_hits_change_nothing(void **state)
{
    with_base(cache_axis);
}

static void eviction_changes_nothing(void **state)
{
    with_base(eviction_axis);
}

static void block_order_changes_nothing(void **state)
{
    with_base(permutation_axis);
}

static void handoff_changes_nothing(void **state)
{
    with_base(handoff_axis);
}

static void fork_changes_nothing(void **state)
{
    with_base(fork_axis);
}

static void logprobs_change_nothing(void **state)
{
    with_base(logprob_axis);
}

int main(void)
{
    setenv("TD_KV_POISON", "1", 1); /* a stale read is a NaN */
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(chunks_change_nothing),      cmocka_unit_test(threads_change_nothing),
        cmocka_unit_test(batch_mates_change_nothing), cmocka_unit_test(cache_hits_change_nothing),
        cmocka_unit_test(eviction_changes_nothing),   cmocka_unit_test(block_order_changes_nothing),
        cmocka_unit_test(handoff_changes_nothing),    cmocka_unit_test(fork_changes_nothing),
        cmocka_unit_test(logprobs_change_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
