/* SPDX-License-Identifier: Apache-2.0 */
/* Guards: pure output. A draw is the published Philox4x32-10 of (seed, position, choice, purpose)
 * and nothing else. Vectors: Random123 1.14, tests/kat_vectors, "philox4x32 10". */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <string.h>

#include "base/rand.h"
#include "base/banned.h"

static void test_known_answers(void **state)
{
    static const struct {
        uint32_t counter[4], key[2], want[4];
    } kat[] = {
        {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
        {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
         {0xffffffff, 0xffffffff},
         {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
        {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
         {0xa4093822, 0x299f31d0},
         {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
    };
    for (size_t i = 0; i < sizeof kat / sizeof *kat; i++) {
        uint32_t out[4];
        td_philox(kat[i].key, kat[i].counter, out);
        assert_memory_equal(out, kat[i].want, sizeof out);
    }
}

static void test_mapping(void **state)
{
    const uint32_t key[2] = {0x89abcdef, 0x01234567}, counter[4] = {5, 6, TD_RAND_SAMPLE, 0};
    uint32_t out[4];
    td_philox(key, counter, out);
    assert_int_equal(td_rand(0x0123456789abcdefull, 5, 6, TD_RAND_SAMPLE),
                     out[0] | (uint64_t)out[1] << 32);
    assert_int_equal(td_rand(0, 0, 0, 0), 0xe169c58d6627e8d5ull);
}

static void test_below(void **state)
{
    td_rng r = {.seed = 3};
    int seen[7] = {0};
    for (int i = 0; i < 7000; i++) {
        uint64_t v = td_rng_below(&r, 7);
        assert_true(v < 7);
        seen[v]++;
    }
    for (int i = 0; i < 7; i++)
        assert_in_range(seen[i], 850, 1150); /* 5 sigma */
    td_rng a = {.seed = 9}, b = {.seed = 9};
    for (int i = 0; i < 100; i++)
        assert_int_equal(td_rng_next(&a), td_rng_next(&b));
    b.seed = 10;
    assert_true(td_rng_next(&a) != td_rng_next(&b));
}

static void test_kernel_bytes(void **state)
{
    unsigned char a[100000] = {0}, b[64] = {0}, c[64] = {0};
    td_random_bytes(a, sizeof a);
    assert_true(memchr(a + sizeof a - 64, 0xa5, 64) || a[sizeof a - 1] || a[sizeof a - 2] ||
                a[sizeof a - 3]);
    td_random_bytes(b, sizeof b);
    td_random_bytes(c, sizeof c);
    assert_memory_not_equal(b, c, sizeof b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_known_answers),
                                       cmocka_unit_test(test_mapping), cmocka_unit_test(test_below),
                                       cmocka_unit_test(test_kernel_bytes)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
