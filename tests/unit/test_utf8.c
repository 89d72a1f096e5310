/* SPDX-License-Identifier: Apache-2.0 */
/* Guards: no invalid UTF-8 enters (overlong forms, surrogates, past U+10FFFF), no character is
 * split on the way out. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <string.h>

#include "base/strbuf.h"
#include "base/banned.h"

/* The definition, written another way: a byte string is one character iff encoding some scalar
 * value gives it. */
static int encode_by_definition(uint32_t cp, unsigned char out[4])
{
    if (cp <= 0x7f) {
        out[0] = (unsigned char)cp;
        return 1;
    }
    if (cp <= 0x7ff) {
        out[0] = (unsigned char)(192 + cp / 64);
        out[1] = (unsigned char)(128 + cp % 64);
        return 2;
    }
    if (cp <= 0xffff) {
        out[0] = (unsigned char)(224 + cp / 4096);
        out[1] = (unsigned char)(128 + cp / 64 % 64);
        out[2] = (unsigned char)(128 + cp % 64);
        return 3;
    }
    out[0] = (unsigned char)(240 + cp / 262144);
    out[1] = (unsigned char)(128 + cp / 4096 % 64);
    out[2] = (unsigned char)(128 + cp / 64 % 64);
    out[3] = (unsigned char)(128 + cp % 64);
    return 4;
}

static void test_every_scalar(void **state)
{
    for (uint32_t cp = 0; cp <= 0x10ffff; cp++) {
        if (cp >= 0xd800 && cp <= 0xdfff)
            continue;
        unsigned char want[4];
        char got[4];
        uint32_t back = 0;
        int n = encode_by_definition(cp, want);
        if (td_utf8_encode(cp, got) != n || memcmp(got, want, (size_t)n) != 0 ||
            td_utf8_decode(got, (size_t)n, &back) != n || back != cp ||
            !td_utf8_valid(got, (size_t)n))
            fail_msg("U+%04X", cp);
        for (int cut = 1; cut < n; cut++)
            if (td_utf8_decode(got, (size_t)cut, &back) > 0 || td_utf8_valid(got, (size_t)cut) ||
                td_utf8_whole(got, (size_t)cut) != 0)
                fail_msg("U+%04X cut at %d", cp, cut);
    }
}

/* All strings of three bytes, and of four with a four-byte lead: as many are valid as there are
 * scalars of that length. */
static void test_counts_of_valid(void **state)
{
    size_t three = 0, four = 0;
    for (uint32_t v = 0; v < 1u << 24; v++) {
        char s[3] = {(char)(v >> 16), (char)(v >> 8), (char)v};
        if ((v >> 16) >= 0x80 && (v >> 16) < 0xf0) {
            uint32_t cp;
            three += td_utf8_decode(s, 3, &cp) == 3;
        }
    }
    assert_int_equal(three, 0x10000 - 0x800 - 0x800);
    for (uint32_t lead = 0xf0; lead <= 0xff; lead++)
        for (uint32_t v = 0; v < 1u << 16; v++) {
            /* the last two bytes are independent of the rest: one pair of good ones and one bad are
             * enough */
            char s[4] = {(char)lead, (char)(v >> 8), (char)v, (char)0x80};
            uint32_t cp;
            four += td_utf8_decode(s, 4, &cp) == 4;
        }
    assert_int_equal(four, 0x100000 / 64);
}

static void test_invalid(void **state)
{
    static const char *const bad[] = {"\x80",
                                      "\xbf",
                                      "\xc0\x80",
                                      "\xc1\xbf",
                                      "\xe0\x80\x80",
                                      "\xe0\x9f\xbf",
                                      "\xed\xa0\x80",
                                      "\xed\xbf\xbf",
                                      "\xf0\x80\x80\x80",
                                      "\xf0\x8f\xbf\xbf",
                                      "\xf4\x90\x80\x80",
                                      "\xf5\x80\x80\x80",
                                      "\xff",
                                      "\xfe",
                                      "\xc3",
                                      "\xe2\x82",
                                      "\xf0\x9f\x98",
                                      "\xc3(",
                                      "\xe2(\xa1"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        uint32_t cp = 77;
        char padded[40];
        size_t n = strlen(bad[i]);
        assert_true(td_utf8_decode(bad[i], n, &cp) < 0);
        assert_int_equal(cp, 77);
        /* at every offset, so that a fast path by words sees it too */
        for (size_t at = 0; at + n <= 20; at++) {
            memset(padded, 'a', sizeof padded);
            memcpy(padded + at, bad[i], n);
            assert_false(td_utf8_valid(padded, 20 + 4));
        }
    }
    assert_true(td_utf8_valid("", 0));
    assert_true(td_utf8_valid("a\0b", 3));
}

static void test_whole(void **state)
{
    assert_int_equal(td_utf8_whole("", 0), 0);
    assert_int_equal(td_utf8_whole("abc", 3), 3);
    assert_int_equal(td_utf8_whole("ab\xe2\x82", 4), 2);
    assert_int_equal(td_utf8_whole("ab\xe2\x82\xac", 5), 5);
    assert_int_equal(td_utf8_whole("\xf0\x9f\x98\x80\xf0\x9f", 6), 4);
    /* invalid bytes are not held back for ever */
    assert_int_equal(td_utf8_whole("ab\xff", 3), 3);
    assert_int_equal(td_utf8_whole("ab\x80\x80\x80\x80", 6), 6);
    assert_int_equal(td_utf8_whole("a\xed\xa0", 3), 3);
    assert_int_equal(td_utf8_whole("a\xc0", 2), 2);
    assert_int_equal(td_utf8_whole("a\xf4\x90", 3), 3);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_scalar), cmocka_unit_test(test_counts_of_valid),
        cmocka_unit_test(test_invalid), cmocka_unit_test(test_whole)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
