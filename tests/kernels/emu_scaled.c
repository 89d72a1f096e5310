/* SPDX-License-Identifier: Apache-2.0 */
/* Guards MXFP4 weights that meet FP8 operands in the scaled matrix instruction: the checks of
 * kernels/checks/scaled.c on each launch plan and lane order, none of which changes a bit; a whole
 * model gives the same bytes however its prompt is cut; devices without it refuse and are not
 * checked. */
#include <errno.h>

#include "tests/engine_util.h"
#include "tests/kernels/checks_util.h"

#include "base/bug.h"

/* Bits of the first launch plan in the first lane order. */
static uint64_t first_bits[CHECKS_MAX];

static void each_plan_passes_with_the_same_bits(void **state)
{
    td_check_target t = {.backend = under, .matrix = MATRIX};
    uint32_t n = 0, passed = 0;
    for (const td_check_case *k = td_check_cases; k->name; k++, n++) {
        if (strcmp(k->group, "scaled") != 0)
            continue;
        for (td_gpu_plan plan = TD_GPU_PLAN_FEW; plan <= TD_GPU_PLAN_MANY; plan++) {
            td_check_result r;
            td_gpu_backend_plan(plan);
            td_check_run(k, &t, &r);
            td_gpu_backend_plan(TD_GPU_PLAN_AUTO);
            if (r.failed || r.skipped)
                fail_msg("%s: %s", k->name, r.text);
            if (!first_bits[n])
                first_bits[n] = r.bits;
            assert_int_equal(r.bits, first_bits[n]);
            passed++;
        }
    }
    assert_int_equal(passed, 2 * 5);
}

/* Silence would look like a pass. */
static void without_it_checks_say_so(void **state)
{
    td_check_target t = {.backend = under, .matrix = MATRIX};
    uint32_t skipped = 0;
    for (const td_check_case *k = td_check_cases; k->name; k++) {
        td_check_result r;
        if (strcmp(k->group, "scaled") != 0)
            continue;
        td_check_run(k, &t, &r);
        assert_true(r.skipped && !r.failed && r.n == 0);
        assert_non_null(strstr(r.text, "no scaled matrix instruction"));
        skipped++;
    }
    assert_int_equal(skipped, 5);
}

/* Waves of 32 stand for a device without the instruction. */
static void only_devices_that_have_it_offer_it(void **state)
{
    assert_int_equal(under->act_fp8, emulated->wave == 64);
    assert_string_equal(td_gpu_backend_error(), "");
}

enum { PROMPT = 40, VOCAB = 256 };

/* Logits behind a prompt. */
static void run_model(const td_backend *be, int fp8, uint32_t chunk, float logits[VOCAB])
{
    td_model_options o = {.isa = "auto",
                          .backend = be,
                          .act = TD_BF16,
                          .act_fp8 = fp8,
                          .kv = TD_BF16,
                          .index = TD_BF16,
                          .n_threads = 1,
                          .n_ranks = 1};
    td_engine_limits l = {.max_rows = 64, .max_seqs = 2, .n_blocks = 8};
    test_engine t = {0};
    td_err err = {0};
    if (td_model_open(TD_SOURCE_DIR "/tests/goldens/models/glm-mxfp4", &o, &t.model, &err) < 0 ||
        td_engine_open(t.model, &l, &t.engine, &err) < 0)
        fail_msg("%s", err.text);
    t.info = td_model_get_info(t.model);
    assert_non_null(strstr(t.info->profile, fp8 ? "act.mxfp4=fp8g32\n" : "act.mxfp4=bf16\n"));
    assert_int_equal(t.info->vocab_size, VOCAB);
    uint32_t ids[PROMPT];
    test_random_ids(3, VOCAB, ids, PROMPT);
    td_seq *s = test_seq(&t, ids, PROMPT, PROMPT, (td_sampling){.temperature = 0.0f}, 2);
    test_prefill(&t, s, chunk, logits);
    td_seq_free(s);
    test_close(&t);
}

/* 3 bits of mantissa where BF16 has 7: operands are off by 2^-5 at most, sums of many by less. */
static void a_whole_model_is_near_and_pure(void **state)
{
    static float first[VOCAB];
    static int have;
    float want[VOCAB], whole[VOCAB], cut[VOCAB];
    run_model(&td_backend_ref, 0, PROMPT, want);
    run_model(under, 1, PROMPT, whole);
    run_model(under, 1, 7, cut);
    assert_memory_equal(cut, whole, sizeof whole);
    if (!have)
        memcpy(first, whole, sizeof whole);
    have = 1;
    assert_memory_equal(first, whole, sizeof whole);
    double worst = 0, size = 0;
    for (int i = 0; i < VOCAB; i++) {
        worst = fmax(worst, fabs((double)whole[i] - (double)want[i]));
        size = fmax(size, fabs((double)want[i]));
    }
    if (!(worst / size > 1e-3 && worst / size < 0.1))
        fail_msg("logits are off by %g of the largest", worst / size);
}

static void refuses(td_dtype act, const td_backend *be, const char *how)
{
    td_model_options o = {.isa = "ref", .backend = be, .act = act, .act_fp8 = 1, .n_ranks = 1};
    td_model *m = NULL;
    td_err err = {0};
    o.kv = o.index = TD_F32;
    assert_int_equal(td_model_open(TD_SOURCE_DIR "/tests/goldens/models/glm-mxfp4", &o, &m, &err),
                     -ENOTSUP);
    assert_non_null(strstr(err.text, "--act-mxfp4 fp8"));
    assert_non_null(strstr(err.text, how));
}

static void others_refuse_by_name(void **state)
{
    refuses(TD_BF16, NULL, "bf16 on ref");
    refuses(TD_BF16, under, "bf16 on emu32");
    refuses(TD_F32, under, "f32 on emu32");
}

int main(void)
{
    const struct CMUnitTest all[] = {
        cmocka_unit_test(only_devices_that_have_it_offer_it),
        cmocka_unit_test(each_plan_passes_with_the_same_bits),
        cmocka_unit_test(a_whole_model_is_near_and_pure),
    };
    const struct CMUnitTest none[] = {
        cmocka_unit_test(only_devices_that_have_it_offer_it),
        cmocka_unit_test(others_refuse_by_name),
        cmocka_unit_test(without_it_checks_say_so),
    };
    int failed = 0;
    for (uint32_t order = 0; order < 3; order += EMULATIONS_APART / 2 + 1) {
        open_emulation(64, order, &under);
        failed += cmocka_run_group_tests_name("wave 64", all, NULL, NULL);
        close_emulation();
    }
    open_emulation(32, 0, &under);
    failed += cmocka_run_group_tests_name("wave 32", none, NULL, NULL);
    close_emulation();
    return failed;
}
