/* SPDX-License-Identifier: Apache-2.0 */
/* Guards the engine on the GPU backend: whole models in the emulation give the reference's logits
 * within tolerance, a prompt cut in two and a sequence whose blocks moved to another engine give
 * the bytes of one run, and lane orders change none. */
#include "tests/engine_util.h"

#include <math.h>

#include "tests/kernels/emu_util.h"

/* 40 tokens are more than the models' index_topk of 32: some positions are left out. */
enum { PROMPT = 40, STEPS = 4, VOCAB = 256 };

static const char *const models[] = {
    TD_SOURCE_DIR "/tests/goldens/models/glm-shared",
    TD_SOURCE_DIR "/tests/goldens/models/glm-groups",
    TD_SOURCE_DIR "/tests/goldens/models/qwen3",
    TD_SOURCE_DIR "/tests/goldens/models/glm-mxfp4",
    TD_SOURCE_DIR "/tests/goldens/models/glm-fp8",
};
enum { MODELS = sizeof models / sizeof *models, DENSE = 3 }; /* behind DENSE: packed weights */

typedef struct trace {
    uint32_t ids[STEPS];
    float logits[STEPS][VOCAB];
} trace;

static const td_backend *under;

static test_engine open_model(int m, td_dtype type, const td_backend *be)
{
    return test_open((test_setup){.dir = models[m],
                                  .backend = be,
                                  .type = type,
                                  .threads = 1,
                                  .max_rows = 64,
                                  .max_seqs = 2,
                                  .n_blocks = 8});
}

static td_seq *start(test_engine *t)
{
    uint32_t ids[PROMPT];
    test_random_ids(3, t->info->vocab_size, ids, PROMPT);
    return test_seq(t, ids, PROMPT, PROMPT,
                    (td_sampling){.temperature = 0.7f, .top_p = 0.9f, .seed = 5}, STEPS + 1);
}

/* Steps [from, STEPS); forced: take these ids instead of the drawn ones. */
static void go_on(test_engine *t, td_seq *s, uint32_t chunk, int from, const trace *forced,
                  trace *tr)
{
    for (int i = from; i < STEPS; i++) {
        tr->ids[i] = test_prefill(t, s, chunk, tr->logits[i]);
        td_seq_append(s, forced ? forced->ids[i] : tr->ids[i]);
    }
}

static void run(int m, td_dtype type, const td_backend *be, uint32_t chunk, const trace *forced,
                trace *tr)
{
    test_engine t = open_model(m, type, be);
    td_seq *s = start(&t);
    go_on(&t, s, chunk, 0, forced, tr);
    td_seq_free(s);
    test_close(&t);
}

/* Largest |difference| of a row by its largest |logit|. */
static double error_of(const float *got, const float *want)
{
    double worst = 0, size = 0;
    for (int i = 0; i < VOCAB; i++) {
        worst = fmax(worst, fabs((double)got[i] - (double)want[i]));
        size = fmax(size, fabs((double)want[i]));
    }
    return worst / size;
}

static void logits_match_the_reference(void **state)
{
    static const double bounds[] = {[TD_F32] = 2e-5, [TD_BF16] = 2e-2};
    for (int m = 0; m < MODELS; m++)
        for (td_dtype type = m < DENSE ? TD_F32 : TD_BF16; type <= TD_BF16; type++) {
            trace want = {0}, got = {0};
            run(m, type, &td_backend_ref, PROMPT, NULL, &want);
            run(m, type, under, PROMPT, &want, &got);
            for (int i = 0; i < STEPS; i++) {
                double e = error_of(got.logits[i], want.logits[i]);
                if (!(e <= bounds[type]))
                    fail_msg("%s %s, step %d: error %g, at most %g", models[m], td_dtype_name(type),
                             i, e, bounds[type]);
            }
        }
}

/* Blocks leave and enter through page-locked memory, as a handoff moves them. deferred: no copy is
 * made before somebody waits for it, and until then nobody may be told so. */
static void hand_over(test_engine *p, td_seq *from, test_engine *d, td_seq *to, int deferred)
{
    size_t n, n_d;
    uint64_t left, entered;
    td_kv_pool *out = td_engine_pool(p->engine), *in = td_engine_pool(d->engine);
    const td_block *a = td_seq_blocks(from, &n), *b = td_seq_blocks(to, &n_d);
    assert_int_equal(n, n_d);
    assert_true(td_kv_pool_memfd(out) < 0); /* shared memory cannot lend it */
    assert_int_equal(td_kv_stage(out, a, (uint32_t)n), 0);
    assert_int_equal(td_kv_stage(in, b, (uint32_t)n), 0);
    assert_int_equal(td_kv_export(out, a, (uint32_t)n, &left), 0);
    if (deferred) {
        assert_false(td_kv_copied(out, left));
        assert_int_equal(td_kv_wait(out), 0);
    }
    assert_true(td_kv_copied(out, left));
    for (size_t i = 0; i < n; i++)
        memcpy(td_kv_data(in, b[i]), td_kv_data(out, a[i]), p->info->kv.block_bytes);
    td_kv_unstage(out, a, (uint32_t)n);
    assert_int_equal(td_kv_import(in, b, (uint32_t)n, &entered), 0);
    if (deferred) {
        assert_false(td_kv_copied(in, entered));
        assert_int_equal(td_kv_wait(in), 0);
    }
    assert_true(td_kv_copied(in, entered));
    td_kv_unstage(in, b, (uint32_t)n);
}

/* Prefill here, decode on another engine. */
static void run_split(int m, int deferred, trace *tr)
{
    test_engine p = open_model(m, TD_BF16, under), d = open_model(m, TD_BF16, under);
    td_seq *from = start(&p), *to = start(&d);
    tr->ids[0] = test_prefill(&p, from, PROMPT, tr->logits[0]);
    assert_int_equal(td_seq_reserve(to, PROMPT), 0);
    hand_over(&p, from, &d, to, deferred);
    td_seq_free(from);
    td_seq_set_computed(to, PROMPT);
    td_seq_append(to, tr->ids[0]);
    go_on(&d, to, 1, 1, NULL, tr);
    td_seq_free(to);
    test_close(&p);
    test_close(&d);
}

static void cuts_splits_and_lane_orders_keep_every_byte(void **state)
{
    static trace first[2][DENSE];
    static int have[2][DENSE];
    int wave = emulated->wave == 64;
    for (int m = 0; m < DENSE; m++) {
        trace whole = {0}, cut = {0}, split = {0};
        run(m, TD_BF16, under, PROMPT, NULL, &whole);
        run(m, TD_BF16, under, 7, NULL, &cut);
        run_split(m, 0, &split);
        assert_memory_equal(&cut, &whole, sizeof whole);
        assert_memory_equal(&split, &whole, sizeof whole);
        if (!have[wave][m])
            first[wave][m] = whole;
        have[wave][m] = 1;
        assert_memory_equal(&first[wave][m], &whole, sizeof whole);
    }
}

/* Logprobs, visits and forks read and copy what lies on the device. */
static void rows_are_seen_from_the_host(void **state)
{
    test_engine t = open_model(0, TD_BF16, under);
    uint32_t ids[PROMPT];
    td_seq *f = NULL;
    td_sample drawn[2];
    td_logprob prompt[PROMPT] = {0};
    float logits[VOCAB];
    test_random_ids(3, t.info->vocab_size, ids, PROMPT);
    td_seq *s = test_seq(&t, ids, PROMPT, PROMPT, (td_sampling){.logprobs = 1, .n_top = 2}, 4);
    assert_int_equal(td_seq_reserve(s, PROMPT), 0);
    td_step_item it = {.seq = s,
                       .n_tokens = PROMPT,
                       .n_samples = 1,
                       .want_logits = 1,
                       .ret_logits = logits,
                       .ret_prompt_lp = prompt,
                       .prompt_top = 1};
    assert_int_equal(td_engine_step(t.engine, &it, 1, drawn), 0);
    td_logprob want;
    td_sampler_logprob(logits, VOCAB, drawn[0].id, 2, &want);
    assert_memory_equal(&drawn[0].lp.logprob, &want.logprob, sizeof want.logprob);
    assert_memory_equal(drawn[0].lp.top_ids, want.top_ids, 2 * sizeof *want.top_ids);
    for (int i = 0; i + 1 < PROMPT; i++)
        assert_true(prompt[i].logprob < 0.0f && prompt[i].n_top == 1);
    /* greedy: a fork goes the same way */
    assert_int_equal(td_seq_fork(s, 1, &f), 0);
    td_seq_append(s, drawn[0].id);
    td_seq_append(f, drawn[0].id);
    td_step_item both[] = {{.seq = s, .n_tokens = 1, .n_samples = 1},
                           {.seq = f, .n_tokens = 1, .n_samples = 1}};
    assert_int_equal(td_engine_step(t.engine, both, 2, drawn), 0);
    assert_int_equal(drawn[0].id, drawn[1].id);
    assert_memory_equal(&drawn[0].lp.logprob, &drawn[1].lp.logprob, sizeof(float));
    td_seq_free(f);
    td_seq_free(s);
    test_close(&t);
}

enum { TOGETHER = 3 };

static void open_three(test_engine *t, td_seq **s)
{
    *t = test_open((test_setup){.dir = models[1],
                                .backend = under,
                                .type = TD_BF16,
                                .threads = 1,
                                .max_rows = 64,
                                .max_seqs = 4,
                                .n_blocks = 8});
    for (uint32_t i = 0; i < TOGETHER; i++) {
        uint32_t ids[PROMPT], n = 5 + 17 * i;
        test_random_ids(i, t->info->vocab_size, ids, n);
        s[i] = test_seq(t, ids, n, n, (td_sampling){.temperature = 1.0f, .seed = i}, STEPS + 1);
    }
}

/* One decode step of the sequences [at, at + n). */
static void decode(test_engine *t, td_seq **s, uint32_t at, uint32_t n, float logits[][VOCAB])
{
    td_step_item items[TOGETHER];
    td_sample drawn[TOGETHER];
    for (uint32_t i = 0; i < n; i++) {
        size_t n_ids;
        td_seq_ids(s[at + i], &n_ids);
        assert_int_equal(td_seq_reserve(s[at + i], n_ids), 0);
        items[i] = (td_step_item){.seq = s[at + i],
                                  .n_tokens = 1,
                                  .n_samples = 1,
                                  .want_logits = 1,
                                  .ret_logits = logits[at + i]};
    }
    assert_int_equal(td_engine_step(t->engine, items, n, drawn), 0);
    for (uint32_t i = 0; i < n; i++)
        td_seq_append(s[at + i], drawn[i].id);
}

/* A decode step is a graph, also of fewer rows than its class has; one that was recorded stays
 * right when a prompt makes the scratches move. */
static void decode_steps_are_graphs(void **state)
{
    static float alone[STEPS][TOGETHER][VOCAB], together[STEPS][TOGETHER][VOCAB];
    test_engine t;
    td_seq *s[TOGETHER];
    for (int way = 0; way < 2; way++) {
        uint64_t before = td_emu_gpu_graphs(emulated);
        open_three(&t, s);
        for (uint32_t i = 0; i < TOGETHER; i++)
            td_seq_append(s[i], test_prefill(&t, s[i], way ? 64 : 3, NULL));
        for (int k = 0; k < STEPS - 1; k++) {
            for (uint32_t i = 0; way == 0 && i < TOGETHER; i++)
                decode(&t, s, i, 1, alone[k]);
            if (way == 1)
                decode(&t, s, 0, TOGETHER, together[k]);
            if (k == 0) { /* more rows than any step had */
                uint32_t ids[60];
                test_random_ids(9, t.info->vocab_size, ids, 60);
                td_seq *more = test_seq(&t, ids, 60, 60, (td_sampling){0}, 1);
                test_prefill(&t, more, 60, NULL);
                td_seq_free(more);
            }
        }
        for (uint32_t i = 0; i < TOGETHER; i++)
            td_seq_free(s[i]);
        test_close(&t);
        /* some prompts end in a chunk of one row: that is a decode step too */
        assert_true(td_emu_gpu_graphs(emulated) - before >=
                    (STEPS - 1) * (way ? 1 : (uint64_t)TOGETHER));
    }
    assert_memory_equal(together, alone, sizeof alone);
}

/* Staged blocks are counted, and what is staged twice is copied once. */
static void staging_is_bounded(void **state)
{
    test_engine t = open_model(0, TD_BF16, under);
    td_kv_pool *pool = td_engine_pool(t.engine);
    td_block b[8];
    uint64_t first, again;
    assert_int_equal(td_kv_staging(pool), 8);
    assert_int_equal(td_kv_alloc(pool, 8, b), 0);
    assert_int_equal(td_kv_stage(pool, b, 6), 0);
    assert_int_equal(td_kv_staging_free(pool), 2);
    assert_int_equal(td_kv_export(pool, b, 6, &first), 0);
    assert_int_equal(td_kv_stage(pool, b + 4, 4), 0);
    assert_int_equal(td_kv_staging_free(pool), 0);
    assert_int_equal(td_kv_export(pool, b + 4, 2, &again), 0);
    assert_int_equal(again, first);
    assert_int_equal(td_kv_export(pool, b + 4, 4, &again), 0);
    assert_true(again > first);
    td_kv_unstage(pool, b, 6);
    assert_int_equal(td_kv_staging_free(pool), 4); /* two are staged still */
    td_kv_unstage(pool, b + 4, 4);
    assert_int_equal(td_kv_staging_free(pool), 8);
    for (int i = 0; i < 8; i++)
        td_kv_unref(pool, b[i]);
    test_close(&t);
}

/* Guards against a result that is read before it was waited for: nothing runs earlier. The last
 * test of a device: it stays so. */
static void nothing_is_read_too_early(void **state)
{
    trace whole = {0}, split = {0};
    run(0, TD_BF16, under, PROMPT, NULL, &whole);
    td_emu_gpu_defer(emulated);
    run(0, TD_BF16, under, 7, NULL, &split);
    assert_memory_equal(&split, &whole, sizeof whole);
    run_split(0, 1, &split);
    assert_memory_equal(&split, &whole, sizeof whole);
    rows_are_seen_from_the_host(state);
}

static void its_profile_is_its_own(void **state)
{
    test_engine e = open_model(0, TD_BF16, under), r = open_model(0, TD_BF16, &td_backend_ref);
    assert_memory_not_equal(e.info->profile_id, r.info->profile_id, sizeof e.info->profile_id);
    assert_non_null(strstr(e.info->profile, emulated->wave == 64 ? "isa=emu64" : "isa=emu32"));
    test_close(&e);
    test_close(&r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(logits_match_the_reference),
        cmocka_unit_test(cuts_splits_and_lane_orders_keep_every_byte),
        cmocka_unit_test(its_profile_is_its_own),
        cmocka_unit_test(rows_are_seen_from_the_host),
        cmocka_unit_test(decode_steps_are_graphs),
        cmocka_unit_test(staging_is_bounded),
        cmocka_unit_test(nothing_is_read_too_early),
    };
    RUN_EMULATED(tests);
}
