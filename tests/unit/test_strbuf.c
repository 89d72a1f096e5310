/* SPDX-License-Identifier: Apache-2.0 */
/* Guards: buffers that grow from untrusted input stay inside their bound, and every escaped string
 * is valid JSON. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/rand.h"
#include "base/strbuf.h"
#include "base/banned.h"

static void test_append(void **state)
{
    td_strbuf b = TD_STRBUF_INIT;
    assert_string_equal(b.data, "");
    td_strbuf_adds(&b, "a");
    td_strbuf_addc(&b, 'b');
    td_strbuf_add(&b, "cd", 2);
    td_strbuf_add(&b, NULL, 0);
    td_strbuf_addf(&b, "%d-%s", 7, "x");
    td_strbuf_add_u64(&b, UINT64_MAX);
    td_strbuf_add_u64(&b, 0);
    assert_string_equal(b.data, "abcd7-x184467440737095516150");
    assert_int_equal(b.len, strlen(b.data));
    td_strbuf_drop(&b, 4);
    assert_int_equal(strncmp(b.data, "7-x", 3), 0);
    td_strbuf_reset(&b);
    assert_string_equal(b.data, "");
    td_strbuf_done(&b);
    td_strbuf_done(&b);
}

/* Formatting changes its path at the size of the stack buffer. */
static void test_addf_every_length(void **state)
{
    char want[1000];
    for (int n = 0; n < 999; n++) {
        td_strbuf b = TD_STRBUF_INIT;
        td_strbuf_adds(&b, "<");
        td_strbuf_addf(&b, "%*d", n, 5);
        snprintf(want, sizeof want, "<%*d", n, 5);
        assert_string_equal(b.data, want);
        td_strbuf_done(&b);
    }
}

static void test_bound_is_sticky(void **state)
{
    td_strbuf b = TD_STRBUF_INIT;
    b.max_bytes = 10;
    td_strbuf_adds(&b, "0123456789");
    assert_false(b.failed);
    td_strbuf_addc(&b, 'x');
    assert_true(b.failed);
    assert_string_equal(b.data, "0123456789");
    td_strbuf_drop(&b, 5);
    td_strbuf_addc(&b,
                   'x'); /* there is room again, but the failure stands: a hole would be worse */
    assert_string_equal(b.data, "56789");
    assert_null(td_strbuf_take(&b, NULL));
    /* bug: freeing forgot the bound */
    td_strbuf_done(&b);
    assert_int_equal(b.max_bytes, 10);
    td_strbuf_addf(&b, "%0300d", 1);
    assert_true(b.failed);
    td_strbuf_done(&b);
}

static void test_take(void **state)
{
    td_strbuf b = TD_STRBUF_INIT;
    size_t n = 9;
    char *p = td_strbuf_take(&b, &n);
    assert_string_equal(p, "");
    assert_int_equal(n, 0);
    free(p);
    td_strbuf_adds(&b, "abc");
    p = td_strbuf_take(&b, &n);
    assert_string_equal(p, "abc");
    assert_int_equal(n, 3);
    assert_int_equal(b.len, 0);
    free(p);
}

static void escapes_to(const char *in, size_t n, const char *want)
{
    td_strbuf b = TD_STRBUF_INIT;
    td_strbuf_add_json(&b, in, n);
    assert_string_equal(b.data, want);
    td_strbuf_done(&b);
}

static void test_json_escapes(void **state)
{
    escapes_to("a\"b\\c/", 6, "a\\\"b\\\\c/");
    escapes_to("\b\f\n\r\t", 5, "\\b\\f\\n\\r\\t");
    escapes_to("\0\x01\x1f\x7f", 4, "\\u0000\\u0001\\u001f\\u007f");
    escapes_to("\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80", 9, "\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80");
    escapes_to("x\xffy\xc3", 4, "x\xef\xbf\xbdy\xef\xbf\xbd");
    escapes_to("\xed\xa0\x80", 3, "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd"); /* a surrogate */
}

/* Any bytes give JSON that jansson reads, and valid UTF-8 comes back as it was. */
static void test_json_round_trip(void **state)
{
    td_rng rng = {.seed = 4};
    for (int round = 0; round < 3000; round++) {
        char in[40];
        size_t n = (size_t)td_rng_below(&rng, sizeof in);
        for (size_t i = 0; i < n; i++)
            in[i] = (char)td_rng_below(&rng, round % 2 ? 128 : 256);
        td_strbuf b = TD_STRBUF_INIT;
        td_strbuf_adds(&b, "[\"");
        td_strbuf_add_json(&b, in, n);
        td_strbuf_adds(&b, "\"]");
        json_t *v = json_loadb(b.data, b.len, JSON_ALLOW_NUL, NULL);
        assert_non_null(v);
        const json_t *s = json_array_get(v, 0);
        if (td_utf8_valid(in, n)) {
            assert_int_equal(json_string_length(s), n);
            if (n)
                assert_memory_equal(json_string_value(s), in, n);
        }
        json_decref(v);
        td_strbuf_done(&b);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_append),          cmocka_unit_test(test_addf_every_length),
        cmocka_unit_test(test_bound_is_sticky), cmocka_unit_test(test_take),
        cmocka_unit_test(test_json_escapes),    cmocka_unit_test(test_json_round_trip)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
