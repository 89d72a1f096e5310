/* SPDX-License-Identifier: Apache-2.0 */
/* Guards: routers and workers of any version name the same prefix alike, and no tenant can name
 * another's. Expected values: Python's hashlib.blake2b by the formulas of base/prefix.h. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <string.h>

#include "base/hash.h"
#include "base/prefix.h"
#include "base/banned.h"

static uint8_t secret[100];

static void key_of(size_t n, const char *tenant, const char *salt, uint8_t key[32])
{
    for (size_t i = 0; i < sizeof secret; i++)
        secret[i] = (uint8_t)i;
    td_prefix_key(secret, n, tenant, strlen(tenant), salt, strlen(salt), key);
}

static void test_key(void **state)
{
    uint8_t key[32];
    char text[65];
    key_of(32, "acme", "salt", key);
    assert_string_equal(td_hex(key, 32, text),
                        "a98e7b3d700959b4d0dfa3e9f6aafba6a8be23450071a49222ee931b470402b4");
    key_of(100, "acme", "", key);
    assert_string_equal(td_hex(key, 32, text),
                        "9a2287193c60bba06ab11b8235fa319f908058d19b41dd038b454b3f21f22f83");
}

static void test_chain(void **state)
{
    uint8_t key[32], out[3 * 16], one[16];
    uint32_t ids[130];
    char text[33];
    for (uint32_t i = 0; i < 130; i++)
        ids[i] = 1000 + i;
    key_of(32, "acme", "salt", key);
    memset(out, 0xee, sizeof out);
    assert_int_equal(td_prefix_chain(key, ids, 130, out), 2);
    assert_string_equal(td_hex(out, 16, text), "01eead5d09bf3abc428fe87fe0471195");
    assert_string_equal(td_hex(out + 16, 16, text), "0ae13cdb141069bfa818a36ac25d54bd");
    assert_int_equal(out[32], 0xee);
    td_prefix_next(key, out, ids + 64, one);
    assert_memory_equal(one, out + 16, 16);
    assert_int_equal(td_prefix_chain(key, ids, 63, out), 0);
    assert_int_equal(td_prefix_chain(key, ids, 64, out), 1);
}

static void test_tenants_are_apart(void **state)
{
    uint8_t a[32], b[32];
    key_of(32, "acme", "salt", a);
    key_of(32, "acm", "esalt", b);
    assert_memory_not_equal(a, b, 32);
    key_of(33, "acme", "salt", b);
    assert_memory_not_equal(a, b, 32);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_key), cmocka_unit_test(test_chain),
                                       cmocka_unit_test(test_tenants_are_apart)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
