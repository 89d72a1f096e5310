/* SPDX-License-Identifier: Apache-2.0 */
/* The prefill queue is first come, first served, steps are bounded, and nobody starves behind a
 * prompt that waits for blocks. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "prefill-worker/batch.h"

static void test_fills_in_order(void **state)
{
    (void)state;
    td_prefill_policy p = {.max_rows = 64, .max_seqs = 8};
    td_prefill_view v[] = {{.n_left = 100, .started = 1},
                           {.n_left = 10, .blocks_needed = 1},
                           {.n_left = 90, .blocks_needed = 2}};
    td_prefill_pick k[8];
    assert_int_equal(td_prefill_plan(&p, v, 3, 10, k), 1);
    assert_true(k[0].job == 0 && k[0].n_tokens == 64);
    v[0].n_left = 36;
    assert_int_equal(td_prefill_plan(&p, v, 3, 10, k), 3);
    assert_true(k[0].n_tokens == 36 && k[1].n_tokens == 10 && k[2].n_tokens == 18);
    p.max_seqs = 2;
    assert_int_equal(td_prefill_plan(&p, v, 3, 10, k), 2);
}

static void test_computed_jobs_wait_aside(void **state)
{
    (void)state;
    td_prefill_policy p = {.max_rows = 16, .max_seqs = 4};
    td_prefill_view v[] = {{.n_left = 0, .started = 1}, {.n_left = 5, .blocks_needed = 1}};
    td_prefill_pick k[4];
    assert_int_equal(td_prefill_plan(&p, v, 2, 1, k), 1);
    assert_true(k[0].job == 1 && k[0].n_tokens == 5);
}

static void test_nobody_overtakes_who_waits_for_blocks(void **state)
{
    (void)state;
    td_prefill_policy p = {.max_rows = 512, .max_seqs = 8};
    td_prefill_view v[] = {{.n_left = 30, .started = 1},
                           {.n_left = 300, .blocks_needed = 5},
                           {.n_left = 10, .blocks_needed = 1}};
    td_prefill_pick k[8];
    assert_int_equal(td_prefill_plan(&p, v, 3, 4, k), 1);
    assert_int_equal(td_prefill_plan(&p, v, 3, 5, k), 2); /* the third has no block left */
    assert_int_equal(td_prefill_plan(&p, v, 3, 6, k), 3);
}

/* Whatever the chunk, every job is computed wholly and the oldest ends first. */
static void test_progress(void **state)
{
    (void)state;
    for (uint32_t rows = 1; rows < 70; rows += 6) {
        td_prefill_policy p = {.max_rows = rows, .max_seqs = 2};
        td_prefill_view v[] = {{.n_left = 65, .started = 1},
                               {.n_left = 1, .started = 1},
                               {.n_left = 128, .started = 1}};
        td_prefill_pick k[2];
        uint32_t n, total = 0;
        while ((n = td_prefill_plan(&p, v, 3, 0, k)) > 0) {
            uint32_t sum = 0;
            for (uint32_t i = 0; i < n; i++) {
                assert_true(k[i].n_tokens >= 1 && k[i].n_tokens <= v[k[i].job].n_left);
                v[k[i].job].n_left -= k[i].n_tokens;
                sum += k[i].n_tokens;
            }
            assert_true(sum <= rows);
            total += sum;
        }
        assert_int_equal(total, 65 + 1 + 128);
    }
}

/* A recovery whose second timeline waits for blocks stands in front of a job that holds them: that
 * job must go on, or both wait for ever. */
static void test_who_holds_blocks_goes_on(void **state)
{
    (void)state;
    td_prefill_policy p = {.max_rows = 64, .max_seqs = 8};
    td_prefill_view v[] = {{.n_left = 30, .blocks_needed = 5},
                           {.n_left = 20, .started = 1},
                           {.n_left = 10, .blocks_needed = 1}};
    td_prefill_pick k[8];
    assert_int_equal(td_prefill_plan(&p, v, 3, 2, k), 1);
    assert_true(k[0].job == 1 && k[0].n_tokens == 20);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_fills_in_order),
        cmocka_unit_test(test_computed_jobs_wait_aside),
        cmocka_unit_test(test_nobody_overtakes_who_waits_for_blocks),
        cmocka_unit_test(test_who_holds_blocks_goes_on),
        cmocka_unit_test(test_progress),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
