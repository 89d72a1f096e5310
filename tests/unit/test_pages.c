/* SPDX-License-Identifier: Apache-2.0 */
/* Promise: memory for tables comes zeroed and is as long as asked, small or large. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "base/bug.h"
#include "base/pages.h"
#include "base/banned.h"

static void zeroed_and_whole(void **state)
{
    static const size_t sizes[] = {
        0, 1, 4096, TD_PAGES_MIN - 1, TD_PAGES_MIN, TD_PAGES_MIN + 1, TD_PAGES_MIN * 2 + 12345};
    for (size_t i = 0; i < TD_ARRAY_LEN(sizes); i++)
        for (int again = 0; again < 2; again++) {
            size_t n = sizes[i];
            unsigned char *p = td_pages_alloc(n);
            assert_non_null(p);
            if (n) {
                assert_int_equal(p[0], 0);
                assert_memory_equal(p, p + 1, n - 1);
                memset(p, 0xA5, n);
            }
            td_pages_free(p, n);
        }
    td_pages_free(NULL, 0);
    td_pages_free(NULL, TD_PAGES_MIN);
}

static void too_much(void **state)
{
    assert_null(td_pages_alloc(SIZE_MAX));
    assert_null(td_pages_alloc(SIZE_MAX / 2));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(zeroed_and_whole),
        cmocka_unit_test(too_much),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
