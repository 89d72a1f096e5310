/* SPDX-License-Identifier: Apache-2.0 */
/* Guards: a map agrees with a plain array through any sequence of puts and deletes, and tombstones
 * do not fill it. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "base/map.h"
#include "base/rand.h"
#include "base/banned.h"

enum { KEYS = 500 };

static void test_against_array(void **state)
{
    td_map m;
    td_map_init(&m);
    char *model[KEYS] = {0};
    static char values[8];
    td_rng rng = {.seed = 1};
    for (int i = 0; i < 40000; i++) {
        size_t k = (size_t)td_rng_below(&rng, KEYS);
        uint64_t key = k * 0x100000000ull; /* low bits equal: the mix must spread them */
        if (td_rng_below(&rng, 2)) {
            char *v = &values[td_rng_below(&rng, sizeof values)];
            void *old = NULL;
            assert_int_equal(td_map_put(&m, key, v, &old), 0);
            assert_ptr_equal(old, model[k]);
            model[k] = v;
        } else {
            assert_ptr_equal(td_map_del(&m, key), model[k]);
            model[k] = NULL;
        }
        size_t any = (size_t)td_rng_below(&rng, KEYS);
        assert_ptr_equal(td_map_get(&m, any * 0x100000000ull), model[any]);
    }
    size_t n = 0, it = 0;
    for (size_t k = 0; k < KEYS; k++)
        n += model[k] != NULL;
    assert_int_equal(m.n, n);
    uint64_t key;
    void *v;
    while (td_map_next(&m, &it, &key, &v)) {
        assert_ptr_equal(v, model[key >> 32]);
        assert_ptr_equal(td_map_del(&m, key), v);
        n--;
    }
    assert_int_equal(n, 0);
    assert_int_equal(m.n, 0);
    td_map_done(&m);
}

/* Bug class: ids that come and go for days must not grow the table or make a miss walk for ever. */
static void test_churn_stays_small(void **state)
{
    td_map m;
    td_map_init(&m);
    int x;
    assert_null(td_map_get(&m, 1));
    assert_null(td_map_del(&m, 1));
    for (uint64_t i = 0; i < 100000; i++) {
        assert_int_equal(td_map_put(&m, i, &x, NULL), 0);
        if (i >= 10)
            assert_non_null(td_map_del(&m, i - 10));
    }
    assert_true(m.cap <= 64);
    assert_true(m.used < m.cap);
    td_map_done(&m);
}

static void test_strings(void **state)
{
    static char text[5000][8];
    td_strmap m;
    td_strmap_init(&m);
    uint64_t v = 99;
    assert_false(td_strmap_get(&m, "x", 1, &v));
    for (uint64_t i = 0; i < 5000; i++) {
        int n = snprintf(text[i], sizeof text[i], "k%d", (int)i);
        assert_int_equal(td_strmap_put(&m, text[i], (size_t)n, i), 0);
        assert_int_equal(td_strmap_put(&m, text[i], (size_t)n, 7), -EEXIST);
    }
    for (uint64_t i = 0; i < 5000; i++) {
        assert_true(td_strmap_get(&m, text[i], strlen(text[i]), &v));
        assert_int_equal(v, i);
    }
    assert_false(td_strmap_get(&m, "k5000", 5, &v));
    assert_true(td_strmap_get(&m, "k12345", 3, &v)); /* the length counts, not a NUL */
    assert_int_equal(v, 12);
    td_strmap_done(&m);
}

/* Bug: the empty key with a NULL view looked like a free slot. */
static void test_empty_key(void **state)
{
    td_strmap m;
    td_strmap_init(&m);
    uint64_t v = 0;
    assert_int_equal(td_strmap_reserve(&m, 100), 0);
    size_t cap = m.cap;
    assert_int_equal(td_strmap_put(&m, NULL, 0, 5), 0);
    assert_int_equal(td_strmap_put(&m, "", 0, 6), -EEXIST);
    assert_true(td_strmap_get(&m, NULL, 0, &v));
    assert_int_equal(v, 5);
    assert_int_equal(td_strmap_put(&m, "a\0b", 3, 1), 0);
    assert_int_equal(td_strmap_put(&m, "a\0c", 3, 2), 0);
    assert_int_equal(m.cap, cap);
    td_strmap_done(&m);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_against_array), cmocka_unit_test(test_churn_stays_small),
        cmocka_unit_test(test_strings), cmocka_unit_test(test_empty_key)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
