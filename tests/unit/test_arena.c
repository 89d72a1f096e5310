/* SPDX-License-Identifier: Apache-2.0 */
/* Guards: a request's memory is bounded, and one failed allocation is never lost. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <string.h>

#include "base/arena.h"
#include "base/banned.h"

static void test_zeroed_aligned_disjoint(void **state)
{
    td_arena a;
    td_arena_init(&a, 0);
    unsigned char *p[300];
    for (size_t i = 0; i < 300; i++) {
        p[i] = td_arena_alloc(&a, i * 7);
        assert_non_null(p[i]);
        assert_int_equal((uintptr_t)p[i] % 16, 0);
        for (size_t k = 0; k < i * 7; k++)
            assert_int_equal(p[i][k], 0);
        memset(p[i], (int)(i & 255), i * 7);
    }
    for (size_t i = 0; i < 300; i++)
        for (size_t k = 0; k < i * 7; k++)
            assert_int_equal(p[i][k], i & 255);
    assert_false(td_arena_failed(&a));
    td_arena_done(&a);
}

static void test_limit_is_sticky(void **state)
{
    td_arena a;
    td_arena_init(&a, 10000);
    size_t got = 0;
    while (td_arena_alloc(&a, 100))
        got += 100;
    assert_in_range(got, 8000, 10000);
    assert_true(a.used_bytes <= 10000);
    assert_true(td_arena_failed(&a));
    /* even what would fit is refused: the caller asks once, at the end */
    assert_null(td_arena_alloc(&a, 1));
    td_arena_reset(&a);
    assert_false(td_arena_failed(&a));
    assert_non_null(td_arena_alloc(&a, 100));
    td_arena_done(&a);
    assert_non_null(td_arena_alloc(&a, 100));
    td_arena_done(&a);
}

/* Reset memory is dirty; the next user must still see zeros. */
static void test_reset_zeroes(void **state)
{
    td_arena a;
    td_arena_init(&a, 0);
    memset(td_arena_alloc(&a, 1000), 0xff, 1000);
    td_arena_reset(&a);
    const char *p = td_arena_alloc(&a, 1000);
    for (int i = 0; i < 1000; i++)
        assert_int_equal(p[i], 0);
    td_arena_done(&a);
}

/* Bug: a size near the top of the range wrapped together with the chunk header and got 16 bytes. */
static void test_sizes_that_overflow(void **state)
{
    static const size_t sizes[] = {SIZE_MAX, SIZE_MAX - 15, SIZE_MAX - 16, SIZE_MAX - 31,
                                   SIZE_MAX / 2};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        td_arena a;
        td_arena_init(&a, 0);
        assert_null(td_arena_alloc(&a, sizes[i]));
        assert_true(td_arena_failed(&a));
        td_arena_done(&a);
    }
    td_arena a;
    td_arena_init(&a, 0);
    assert_null(td_arena_alloc_array(&a, SIZE_MAX / 2, 3));
    assert_true(td_arena_failed(&a));
    td_arena_reset(&a);
    assert_null(td_arena_strndup(&a, "x", SIZE_MAX));
    td_arena_done(&a);
}

static void test_strndup(void **state)
{
    td_arena a;
    td_arena_init(&a, 0);
    assert_string_equal(td_arena_strndup(&a, "hello world", 5), "hello");
    assert_string_equal(td_arena_strndup(&a, NULL, 0), "");
    assert_non_null(td_arena_alloc_array(&a, 3, 5));
    td_arena_done(&a);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_zeroed_aligned_disjoint), cmocka_unit_test(test_limit_is_sticky),
        cmocka_unit_test(test_reset_zeroes), cmocka_unit_test(test_sizes_that_overflow),
        cmocka_unit_test(test_strndup)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
