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

/* Copy the blocks as a handoff does and decode on the other engine. */
static void run_split(int m, trace *tr)
{
    test_engine p = open_model(m, TD_BF16, under), d = open_model(m, TD_BF16, under);
    td_seq *from = start(&p), *to = start(&d);
    size_t n, n_d;
    tr->ids[0] = test_prefill(&p, from, PROMPT, tr->logits[0]);
    assert_int_equal(td_seq_reserve(to, PROMPT), 0);
    const td_block *a = td_seq_blocks(from, &n), *b = td_seq_blocks(to, &n_d);
    assert_int_equal(n, n_d);
    for (size_t i = 0; i < n; i++)
        memcpy(td_kv_data(td_engine_pool(d.engine), b[i]),
               td_kv_data(td_engine_pool(p.engine), a[i]), p.info->kv.block_bytes);
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
        run_split(m, &split);
        assert_memory_equal(&cut, &whole, sizeof whole);
        assert_memory_equal(&split, &whole, sizeof whole);
        if (!have[wave][m])
            first[wave][m] = whole;
        have[wave][m] = 1;
        assert_memory_equal(&first[wave][m], &whole, sizeof whole);
    }
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
    };
    RUN_EMULATED(tests);
}
