/* SPDX-License-Identifier: Apache-2.0 */
/* The waiting room: bounded (promise 5), fair between tenants, refusals spread over time. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <cmocka.h>

#include "router/admit.h"
#include "base/banned.h"

static td_admit a;
static td_admit_entry e[8];

static int setup(void **state)
{
    for (int i = 0; i < 8; i++)
        e[i] = (td_admit_entry){.tenant = 1, .expires_us = 1000};
    return td_admit_init(&a, 6, 42);
}

static int teardown(void **state)
{
    td_admit_done(&a);
    return 0;
}

static int next(void)
{
    td_admit_entry *x = td_admit_next(&a, 0);
    if (!x)
        return -1;
    td_admit_take(&a, x);
    return (int)(x - e);
}

static void fifo_and_bound(void **state)
{
    for (int i = 0; i < 6; i++)
        assert_int_equal(td_admit_push(&a, &e[i]), 0);
    assert_true(td_admit_push(&a, &e[6]) < 0); /* full says full */
    td_admit_push_moved(&a, &e[7]);            /* but who runs already is not turned away */
    assert_int_equal(td_admit_len(&a), 7);
    td_admit_remove(&a, &e[2]);
    td_admit_remove(&a, &e[2]);
    static const int want[] = {0, 1, 3, 4, 5, -1};
    for (size_t i = 0; i < sizeof want / sizeof *want; i++)
        assert_int_equal(next(), want[i]);
    assert_ptr_equal(td_admit_moved_after(&a, NULL, 0), &e[7]);
    assert_int_equal(td_admit_push(&a, &e[6]), 0); /* lines are given back */
    assert_int_equal(next(), 6);
}

/* one tenant's hundred requests do not stand before another's first */
static void tenants_take_turns(void **state)
{
    e[3].tenant = 2;
    e[4].tenant = 3;
    for (int i = 0; i < 5; i++)
        td_admit_push(&a, &e[i]);
    static const int want[] = {0, 3, 4, 1, 2};
    for (int i = 0; i < 5; i++)
        assert_int_equal(next(), want[i]);
}

static void priorities(void **state)
{
    e[0].priority = -1;
    e[2].priority = 1;
    for (int i = 0; i < 3; i++)
        td_admit_push(&a, &e[i]);
    assert_int_equal(next(), 2);
    assert_int_equal(next(), 1);
    assert_int_equal(next(), 0);
}

/* looking is not serving: a head that finds no room keeps its place */
static void peek_keeps_turn(void **state)
{
    e[1].tenant = 2;
    td_admit_push(&a, &e[0]);
    td_admit_push(&a, &e[1]);
    for (int i = 0; i < 3; i++)
        assert_ptr_equal(td_admit_next(&a, 0), &e[0]);
}

static void expiry(void **state)
{
    e[1].expires_us = 500;
    e[2].expires_us = 400;
    e[2].not_before_us = 300;
    td_admit_push(&a, &e[0]);
    td_admit_push(&a, &e[1]);
    td_admit_push_moved(&a, &e[2]);
    assert_null(td_admit_expired(&a, 399));
    assert_null(td_admit_moved_after(&a, NULL, 299));
    assert_int_equal(td_admit_wake_us(&a, 0), 300);
    assert_int_equal(td_admit_wake_us(&a, 300), 400);
    assert_ptr_equal(td_admit_expired(&a, 400), &e[2]);
    td_admit_remove(&a, &e[2]);
    assert_ptr_equal(td_admit_expired(&a, 600), &e[1]);
    td_admit_remove(&a, &e[1]);
    assert_null(td_admit_expired(&a, 600));
    td_admit_remove(&a, &e[0]);
    assert_true(td_admit_wake_us(&a, 600) == UINT64_MAX);
}

/* clients refused together must not come back together */
static void retry_is_jittered(void **state)
{
    uint32_t lo = UINT32_MAX, hi = 0;
    for (int i = 0; i < 6; i++)
        td_admit_push(&a, &e[i]);
    for (int i = 0; i < 1000; i++) {
        uint32_t ms = td_admit_retry_ms(&a);
        assert_in_range(ms, TD_ADMIT_RETRY_MIN_MS, TD_ADMIT_RETRY_MAX_MS);
        lo = ms < lo ? ms : lo;
        hi = ms > hi ? ms : hi;
    }
    assert_true(lo < 3000 && hi > 27000);
    while (next() >= 0)
        ;
    for (int i = 0; i < 1000; i++)
        assert_in_range(td_admit_retry_ms(&a), 1000, 2000);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(fifo_and_bound, setup, teardown),
        cmocka_unit_test_setup_teardown(tenants_take_turns, setup, teardown),
        cmocka_unit_test_setup_teardown(priorities, setup, teardown),
        cmocka_unit_test_setup_teardown(peek_keeps_turn, setup, teardown),
        cmocka_unit_test_setup_teardown(expiry, setup, teardown),
        cmocka_unit_test_setup_teardown(retry_is_jittered, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
