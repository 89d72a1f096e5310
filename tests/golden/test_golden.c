/* SPDX-License-Identifier: Apache-2.0 */
/* Guards: the forward pass is the model that transformers computes (tests/goldens/README.md), in
 * f32 to 2e-5 and in BF16 to 2e-2, at prompts below, at and above index_topk. Would catch: a wrong
 * rope pairing, a missing ReLU, head_dim read as the head's width, swapped nope and rope parts, a
 * bias that leaks into expert weights, a selection of another layer. */
#include "tests/engine_util.h"

#include <dirent.h>

#include "engine/golden.h"

enum { NAME = 256 };

static void check_prompt(const char *name, const td_golden *golden, size_t i, td_golden_kind kind,
                         test_engine *t)
{
    td_golden_outcome o;
    td_err err = {0};
    if (td_golden_follow(golden, i, kind, t->engine, &o, &err) < 0)
        fail_msg("%s", err.text);
    printf("  %-12s %-5s %-12s error %.2e  injections %u (committed %u)\n", name,
           td_golden_kind_name(kind), td_golden_name(golden, i), o.error, o.injections, o.allowed);
    if (getenv("TD_GOLDEN_COUNT")) /* set it once to learn the figures that golden.json commits */
        return;
    if (o.wrong)
        fail_msg("%u differ, the first: %s", o.wrong, o.first_wrong);
    assert_true(o.error <= o.bound);
    assert_true(o.injections <= o.allowed);
    assert_true(td_golden_agrees(&o, 1) && o.rows > 0);
}

static void check_golden(const char *name, const char *isa, td_golden_kind kind)
{
    char path[1024];
    td_err err = {0};
    td_golden *golden = NULL;
    snprintf(path, sizeof path, "%s/tests/goldens/%.200s", TD_SOURCE_DIR, name);
    if (td_golden_open(path, &golden, &err) < 0)
        fail_msg("%s", err.text);
    if (!td_golden_has(golden, kind) && !getenv("TD_GOLDEN_COUNT")) {
        assert_true(kind == TD_GOLDEN_INT8 || strstr(name, "bf16"));
        td_golden_close(golden);
        return;
    }
    snprintf(path, sizeof path, "%s/%s", TD_SOURCE_DIR, td_golden_model(golden));
    test_engine t = test_open((test_setup){.dir = path,
                                           .isa = isa,
                                           .type = kind == TD_GOLDEN_F32 ? TD_F32 : TD_BF16,
                                           .act_i8 = kind == TD_GOLDEN_INT8,
                                           .threads = 1,
                                           .max_rows = TD_GOLDEN_MAX_ROWS,
                                           .max_seqs = 2,
                                           .n_blocks = 64});
    for (size_t i = 0; i < td_golden_prompts(golden); i++)
        check_prompt(name, golden, i, kind, &t);
    test_close(&t);
    td_golden_close(golden);
}

static int by_name(const void *a, const void *b)
{
    return strcmp(a, b);
}

static void check_all(const char *isa, td_golden_kind kind)
{
    if (!test_has_isa(isa))
        return;
    printf(" %s\n", isa);
    char names[64][NAME];
    size_t n = 0;
    DIR *d = opendir(TD_SOURCE_DIR "/tests/goldens");
    assert_non_null(d);
    for (struct dirent *e; (e = readdir(d)) && n < 64;) {
        char path[1024];
        snprintf(path, sizeof path, "%s/tests/goldens/%.200s/golden.json", TD_SOURCE_DIR,
                 e->d_name);
        if (e->d_name[0] != '.' && access(path, R_OK) == 0)
            snprintf(names[n++], NAME, "%s", e->d_name);
    }
    closedir(d);
    assert_true(n >= 5);
    qsort(names, n, NAME, by_name);
    for (size_t i = 0; i < n; i++)
        if (kind != TD_GOLDEN_INT8 || strstr(names[i], "mxfp4"))
            check_golden(names[i], isa, kind);
}

static void goldens_in_f32(void **state)
{
    for (int i = 0; i < TEST_ISAS; i++)
        check_all(test_isas[i], TD_GOLDEN_F32);
}

static void goldens_in_bf16(void **state)
{
    for (int i = 0; i < TEST_ISAS; i++)
        check_all(test_isas[i], TD_GOLDEN_BF16);
}

static void goldens_in_int8(void **state)
{
    for (int i = 0; i < TEST_ISAS; i++)
        check_all(test_isas[i], TD_GOLDEN_INT8);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(goldens_in_f32),
                                       cmocka_unit_test(goldens_in_bf16),
                                       cmocka_unit_test(goldens_in_int8)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
