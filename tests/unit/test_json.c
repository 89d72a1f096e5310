/* SPDX-License-Identifier: Apache-2.0 */
/* Guards: everything is bounded. No JSON text costs more than its limits, and nothing that jansson
 * takes is refused. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/json.h"
#include "base/strbuf.h"
#include "base/banned.h"

static int scan(const char *text)
{
    td_err e = {0};
    int r = td_json_scan(text, strlen(text), NULL, &e);
    assert_true(r <= 0 && (r == 0) == (e.text[0] == 0));
    return r;
}

static void test_scan_accepts(void **state)
{
    static const char *const good[] = {"{}",
                                       "[]",
                                       "[1,-2.5e+10,true,false,null,\"x\"]",
                                       "{\"a\":{\"b\":[{}]}}",
                                       " {\n\t\"a\" : \"\\\\\" \r} ",
                                       "[\"]}{[\"]",
                                       "[\"\\u00e9\xc3\xa9\"]"};
    for (size_t i = 0; i < sizeof good / sizeof *good; i++)
        assert_int_equal(scan(good[i]), 0);
}

static void test_scan_refuses(void **state)
{
    static const char *const bad[] = {"[",   "{",    "]",       "}",   "[[]",        "{\"a\":[}",
                                      "[]]", "\x01", "[1 'x']", "[#]", "{\"a\":1}}", "[/**/]"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        json_t *v = NULL;
        td_err e = {0};
        assert_int_equal(td_json_parse(bad[i], strlen(bad[i]), NULL, "body", &v, &e), -EINVAL);
        assert_int_equal(strncmp(e.text, "body: ", 6), 0);
        assert_null(v);
    }
    assert_int_equal(scan("[\"\xff\"]"), -EILSEQ);
    assert_int_equal(scan("[\"\xed\xa0\x80\"]"), -EILSEQ);
    assert_int_equal(scan("[\"\xc0\xaf\"]"), -EILSEQ);
}

static int scan_n(const char *head, const char *unit, size_t n, const char *unit_end,
                  const char *tail, const td_json_limits *l)
{
    td_strbuf b = TD_STRBUF_INIT;
    td_strbuf_adds(&b, head);
    for (size_t i = 0; i < n; i++)
        td_strbuf_adds(&b, unit);
    for (size_t i = 0; i < n; i++)
        td_strbuf_adds(&b, unit_end);
    td_strbuf_adds(&b, tail);
    int r = td_json_scan(b.data, b.len, l, NULL);
    td_strbuf_done(&b);
    return r;
}

static void test_limits(void **state)
{
    const td_json_limits small = {.max_bytes = 100, .max_depth = 3, .max_nodes = 10};
    assert_int_equal(scan_n("", "[", 32, "]", "", NULL), 0);
    assert_int_equal(scan_n("", "[", 33, "]", "", NULL), -E2BIG);
    assert_int_equal(scan_n("", "[", 1000000, "]", "", NULL), -E2BIG);
    assert_int_equal(scan_n("", "{\"a\":", 1000000, "", "", NULL), -E2BIG);
    assert_int_equal(scan_n("[0", ",0", 65534, "", "]", NULL), 0);
    assert_int_equal(scan_n("[0", ",0", 65536, "", "]", NULL), -E2BIG);
    assert_int_equal(scan_n("[{}", ",{}", 65536, "", "]", NULL), -E2BIG);
    assert_int_equal(scan_n("", "[", 3, "]", "", &small), 0);
    assert_int_equal(scan_n("", "[", 4, "]", "", &small), -E2BIG);
    assert_int_equal(scan_n("[0", ",0", 8, "", "]", &small), 0);
    assert_int_equal(scan_n("[0", ",0", 10, "", "]", &small), -E2BIG);
    assert_int_equal(scan_n("[", " ", 98, "", "]", &small), 0);
    assert_int_equal(scan_n("[", " ", 99, "", "]", &small), -E2BIG);
}

/* Brackets inside strings are text; an escape at the very end must not step past it. */
static void test_string_ends(void **state)
{
    static const char *const cut[] = {"\"", "\"\\", "[\"\\\"", "[\"abc", "[\"\\\\\\"};
    for (size_t i = 0; i < sizeof cut / sizeof *cut; i++) {
        json_t *v = NULL;
        char *exact = malloc(strlen(cut[i])); /* no NUL behind: ASan sees a byte too many */
        assert_non_null(exact);
        memcpy(exact, cut[i], strlen(cut[i]));
        assert_true(td_json_parse(exact, strlen(cut[i]), NULL, "x", &v, NULL) < 0);
        free(exact);
    }
    json_t *v = NULL;
    assert_true(td_json_parse("", 0, NULL, "x", &v, NULL) < 0);
}

static void test_strict(void **state)
{
    static const char *const bad[] = {"{\"a\":1,\"a\":2}", "[1,]",  "[01]",  "[NaN]",  "[1] x",
                                      "[\"\\ud800\"]",     "{a:1}", "['a']", "[1e999]"};
    td_err e = {0};
    json_t *v = NULL;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_int_equal(td_json_parse(bad[i], strlen(bad[i]), NULL, "x", &v, &e), -EINVAL);
    assert_int_equal(td_json_parse("{\"a\":1}", 7, NULL, "x", &v, &e), 0);
    json_decref(v);
}

static void test_getters(void **state)
{
    static const char text[] = "{\"i\":5,\"f\":2.5,\"b\":true,\"s\":\"str\",\"z\":null,\"nul\":"
                               "\"a\\u0000b\",\"big\":9007199254740993}";
    json_t *o = NULL;
    td_err e = {0};
    int64_t i = -1;
    double f = -1;
    int b = -1;
    const char *s = NULL;
    assert_int_equal(td_json_parse(text, strlen(text), NULL, "t", &o, &e), 0);
    assert_int_equal(td_json_get_int(o, "t", "i", 0, 10, &i, &e), 1);
    assert_int_equal(i, 5);
    assert_int_equal(td_json_get_int(o, "t", "big", 0, INT64_MAX, &i, &e), 1);
    assert_int_equal(i, 9007199254740993);
    assert_int_equal(td_json_get_int(o, "t", "absent", 0, 10, &i, &e), 0);
    assert_int_equal(td_json_get_int(o, "t", "z", 0, 10, &i, &e), 0);
    assert_int_equal(i, 9007199254740993);
    assert_int_equal(td_json_get_int(o, "t", "i", 6, 10, &i, &e), -EINVAL);
    assert_non_null(strstr(e.text, "t: i "));
    assert_int_equal(td_json_get_int(o, "t", "f", 0, 10, &i, &e), -EINVAL);
    assert_int_equal(td_json_get_int(o, "t", "b", 0, 10, &i, &e), -EINVAL);
    assert_int_equal(td_json_get_num(o, "t", "f", 0, 10, &f, &e), 1);
    assert_true(f == 2.5);
    assert_int_equal(td_json_get_num(o, "t", "i", 0, 10, &f, &e), 1);
    assert_int_equal(td_json_get_num(o, "t", "f", 3, 10, &f, &e), -EINVAL);
    assert_int_equal(td_json_get_num(o, "t", "s", 3, 10, &f, &e), -EINVAL);
    assert_int_equal(td_json_get_bool(o, "t", "b", &b, &e), 1);
    assert_int_equal(b, 1);
    assert_int_equal(td_json_get_bool(o, "t", "i", &b, &e), -EINVAL);
    assert_int_equal(td_json_get_str(o, "t", "s", &s, &e), 1);
    assert_string_equal(s, "str");
    assert_int_equal(td_json_get_str(o, "t", "i", &s, &e), -EINVAL);
    /* bug: "a\0b" would have been taken for "a" */
    assert_int_equal(td_json_get_str(o, "t", "nul", &s, &e), -EINVAL);
    json_decref(o);
}

static void test_load(void **state)
{
    char path[] = "/tmp/td-json-XXXXXX";
    int fd = mkstemp(path);
    json_t *o = NULL;
    td_err e = {0};
    assert_int_equal(write(fd, "{\"a\":\n  oops}", 13), 13);
    close(fd);
    assert_int_equal(td_json_load(path, NULL, &o, &e), -EINVAL);
    assert_non_null(strstr(e.text, path));
    assert_non_null(strstr(e.text, "line 2"));
    unlink(path);
    assert_int_equal(td_json_load(path, NULL, &o, &e), -ENOENT);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_scan_accepts), cmocka_unit_test(test_scan_refuses),
        cmocka_unit_test(test_limits),       cmocka_unit_test(test_string_ends),
        cmocka_unit_test(test_strict),       cmocka_unit_test(test_getters),
        cmocka_unit_test(test_load)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
