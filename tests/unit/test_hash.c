/* SPDX-License-Identifier: Apache-2.0 */
/* Guards: KV is never wrong. Checksums and hashes are the published functions, for every length,
 * alignment and split. CRC32C: RFC 3720 B.4. BLAKE2b: Python's hashlib. XXH3-128: xxHash's own
 * tools. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <string.h>

#include "base/hash.h"
#include "base/rand.h"
#include "base/secret.h"
#include "base/banned.h"

static void test_crc_vectors(void **state)
{
    unsigned char b[32];
    memset(b, 0, 32);
    assert_int_equal(td_crc32c(0, b, 32), 0x8a9136aa);
    memset(b, 0xff, 32);
    assert_int_equal(td_crc32c(0, b, 32), 0x62a8ab43);
    for (int i = 0; i < 32; i++)
        b[i] = (unsigned char)i;
    assert_int_equal(td_crc32c(0, b, 32), 0x46dd794e);
    for (int i = 0; i < 32; i++)
        b[i] = (unsigned char)(31 - i);
    assert_int_equal(td_crc32c(0, b, 32), 0x113fdb5c);
    assert_int_equal(td_crc32c(0, "123456789", 9), 0xe3069283);
    assert_int_equal(td_crc32c(0, NULL, 0), 0);
}

/* The polynomial bit by bit. */
static uint32_t crc_slow(uint32_t crc, const unsigned char *p, size_t n)
{
    crc = ~crc;
    for (size_t i = 0; i < n; i++) {
        crc ^= p[i];
        for (int k = 0; k < 8; k++)
            crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78u : 0);
    }
    return ~crc;
}

static unsigned char big[20000], copy[20000 + 64];

/* Lengths around the three lanes of 1,024 bytes and the words of 8; any start; any split. */
static void test_crc_lengths(void **state)
{
    td_rng rng = {.seed = 5};
    for (size_t i = 0; i < sizeof big; i++)
        big[i] = (unsigned char)td_rng_next(&rng);
    for (int round = 0; round < 300; round++) {
        static const size_t near[] = {0, 8, 3072, 6144, 9216};
        size_t at = (size_t)td_rng_below(&rng, 16),
               n = near[td_rng_below(&rng, 5)] + (size_t)td_rng_below(&rng, 40);
        size_t split = (size_t)td_rng_below(&rng, n + 1), to = (size_t)td_rng_below(&rng, 16) + 16;
        uint32_t want = crc_slow(0, big + at, n);
        assert_int_equal(td_crc32c(0, big + at, n), want);
        assert_int_equal(td_crc32c(td_crc32c(0, big + at, split), big + at + split, n - split),
                         want);
        memset(copy, 0xee, sizeof copy);
        assert_int_equal(td_crc32c_copy(0, copy + to, big + at, n), want);
        assert_memory_equal(copy + to, big + at, n);
        assert_int_equal(copy[to - 1], 0xee); /* nothing beside it */
        assert_int_equal(copy[to + n], 0xee);
    }
}

static void hash_is(const td_hash *start, const char *hex)
{
    unsigned char out[32];
    char text[65];
    td_hash h = *start;
    td_hash_final(&h, out);
    assert_string_equal(td_hex(out, h.out_bytes, text), hex);
}

static void test_blake2b(void **state)
{
    td_hash h;
    td_hash_init(&h, NULL, 0, 32);
    hash_is(&h, "0e5751c026e543b2e8ab2eb06099daa1d1e5df47778f7787faab45cdf12fe3a8");
    td_hash_add(&h, "a", 1);
    td_hash_add(&h, NULL, 0);
    td_hash_add(&h, "bc", 2);
    hash_is(&h, "bddd813c634239723171ef3fee98579b94964e3bb1cb3e427262c8c068d52319");
    unsigned char key[32];
    for (int i = 0; i < 32; i++)
        key[i] = (unsigned char)i;
    td_hash_init(&h, key, sizeof key, 16);
    td_hash_add(&h, "abc", 3);
    hash_is(&h, "1a64be47e4729d951c302ee543f97cf3");
}

/* ("ab", "c") and ("a", "bc") are different inputs. */
static void test_fields_do_not_run_together(void **state)
{
    td_hash a, b;
    unsigned char x[16], y[16];
    td_hash_init(&a, NULL, 0, 16);
    td_hash_init(&b, NULL, 0, 16);
    td_hash_add_field(&a, "ab", 2);
    td_hash_add_field(&a, "c", 1);
    td_hash_add_field(&b, "a", 1);
    td_hash_add_field(&b, "bc", 2);
    td_hash_final(&a, x);
    td_hash_final(&b, y);
    assert_memory_not_equal(x, y, 16);
}

static void test_xxh128(void **state)
{
    uint8_t out[16];
    char text[33];
    td_xxh128("", 0, out);
    assert_string_equal(td_hex(out, 16, text), "99aa06d3014798d86001c324468d497f");
    td_xxh128("abc", 3, out);
    assert_string_equal(td_hex(out, 16, text), "06b05ab6733a618578af5f94892f3950");
}

static void test_hex(void **state)
{
    unsigned char out[3];
    char text[7];
    assert_int_equal(td_unhex("00fFa5", out, 3), 0);
    assert_string_equal(td_hex(out, 3, text), "00ffa5");
    static const char *const bad[] = {"", "0", "00fFa", "00fFa55", "00fga5", "0x00ff", " 00ffa5"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_true(td_unhex(bad[i], out, 3) < 0);
}

static void test_secret(void **state)
{
    unsigned char a[40], b[40];
    memset(a, 7, sizeof a);
    for (size_t i = 0; i < sizeof b; i++) {
        memset(b, 7, sizeof b);
        assert_true(td_secret_equal(a, b, sizeof b));
        b[i] ^= 1;
        assert_false(td_secret_equal(a, b, sizeof b));
    }
    td_secret_wipe(a, sizeof a);
    for (size_t i = 0; i < sizeof a; i++)
        assert_int_equal(a[i], 0);
    td_secret_wipe(NULL, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_crc_vectors), cmocka_unit_test(test_crc_lengths),
        cmocka_unit_test(test_blake2b),     cmocka_unit_test(test_fields_do_not_run_together),
        cmocka_unit_test(test_xxh128),      cmocka_unit_test(test_hex),
        cmocka_unit_test(test_secret)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
