/* SPDX-License-Identifier: Apache-2.0 */
/* Promise 5: an admitted stream never runs out of blocks, for admission counted the worst case;
 * what does not fit is refused. Every admitted sequence runs. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "decode-worker/batch.h"

static const td_decode_policy policy = {
    .max_seqs = 4, .max_admitted = 8, .n_blocks = 20, .max_context = 1024};

static void test_worst_case(void **state)
{
    (void)state;
    /* the last emitted token is never computed: 64 + 1 - 1 rows are one block */
    td_decode_need a = {.n_prompt = 64, .max_tokens = 1};
    assert_int_equal(td_decode_blocks(&policy, &a, 1, 1, 0), 1);
    a.max_tokens = 2;
    assert_int_equal(td_decode_blocks(&policy, &a, 1, 1, 0), 2);
    assert_int_equal(td_decode_blocks(&policy, &a, 1, 1, 1), 1);
    /* three choices share the two full blocks of the prompt, each has its own partial one and what
     * follows */
    td_decode_need n[3] = {{.n_prompt = 130, .max_tokens = 64},
                           {.n_prompt = 130, .max_tokens = 64},
                           {.n_prompt = 130, .max_tokens = 64}};
    assert_int_equal(td_decode_blocks(&policy, n, 3, 1, 0), 4 + 2 + 2);
    assert_int_equal(td_decode_blocks(&policy, n, 3, 1, 2), 2 + 2 + 2);
    assert_int_equal(td_decode_blocks(&policy, n, 3, 0, 1), 3 * 3);
}

static void test_admission(void **state)
{
    (void)state;
    td_decode_need a = {.n_prompt = 64 * 9, .max_tokens = 65};
    uint64_t need = td_decode_blocks(&policy, &a, 1, 1, 0);
    assert_int_equal(need, 10);
    assert_int_equal(td_decode_admit(&policy, &a, 1, need, need, 10, 0), TD_DECODE_ADMIT);
    assert_int_equal(td_decode_admit(&policy, &a, 1, need, need, 9, 0), TD_DECODE_FULL);
    assert_int_equal(td_decode_admit(&policy, &a, 1, need, need, 20, 8), TD_DECODE_FULL);
    assert_int_equal(td_decode_admit(&policy, &a, 1, need, 21, 20, 0), TD_DECODE_TOO_BIG);
    a.max_tokens = 1024 - 64 * 9 + 1;
    assert_int_equal(td_decode_admit(&policy, &a, 1, 16, 16, 20, 0), TD_DECODE_TOO_BIG);
    td_decode_need nine[9] = {{.n_prompt = 1, .max_tokens = 1}};
    assert_int_equal(td_decode_admit(&policy, nine, 9, 9, 9, 20, 0), TD_DECODE_TOO_BIG);
}

static void test_everyone_runs(void **state)
{
    (void)state;
    uint32_t cursor = 0, picks[4], ran[7] = {0};
    assert_int_equal(td_decode_plan(&policy, 3, &cursor, picks), 3);
    for (int step = 0; step < 7; step++) {
        assert_int_equal(td_decode_plan(&policy, 7, &cursor, picks), 4);
        for (int i = 0; i < 4; i++) {
            ran[picks[i]]++;
            for (int j = 0; j < i; j++)
                assert_int_not_equal(picks[i], picks[j]);
        }
    }
    for (int i = 0; i < 7; i++)
        assert_int_equal(ran[i], 4);
    assert_int_equal(td_decode_plan(&policy, 0, &cursor, picks), 0);
}

/* Conditional split: at most the limit, whole-block hits counted, never with several timelines. */
static void test_local(void **state)
{
    (void)state;
    assert_int_equal(td_decode_local(0, 1, 1, 0), 0);
    assert_int_equal(td_decode_local(10, 1, 10, 0), 10);
    assert_int_equal(td_decode_local(10, 1, 11, 0), 0);
    assert_int_equal(td_decode_local(10, 1, 64 * 5 + 10, 5), 10);
    assert_int_equal(td_decode_local(10, 1, 64 * 5 + 10, 4), 0);
    assert_int_equal(td_decode_local(1000, 2, 10, 0), 0);
}

/* A step never holds more prompt tokens than a chunk: running streams wait for no more than that.
 */
static void test_local_rows(void **state)
{
    (void)state;
    td_decode_policy p = policy;
    uint32_t left[TD_DECODE_LOCAL_MAX] = {50, 50, 7, 1}, tokens[TD_DECODE_LOCAL_MAX];
    p.local_rows = 64;
    assert_int_equal(td_decode_plan_local(&p, left, 0, tokens), 0);
    assert_int_equal(td_decode_plan_local(&p, left, 4, tokens), 2);
    assert_int_equal(tokens[0], 50);
    assert_int_equal(tokens[1], 14);
    left[0] = 64;
    assert_int_equal(td_decode_plan_local(&p, left, 4, tokens), 1);
    left[0] = left[1] = 3;
    assert_int_equal(td_decode_plan_local(&p, left, 4, tokens), 4);
    assert_int_equal(tokens[2], 7);
    assert_int_equal(tokens[3], 1);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_local),         cmocka_unit_test(test_local_rows),
        cmocka_unit_test(test_worst_case),    cmocka_unit_test(test_admission),
        cmocka_unit_test(test_everyone_runs),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
