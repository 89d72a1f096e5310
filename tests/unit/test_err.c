/* SPDX-License-Identifier: Apache-2.0 */
/* Guards: an error reaches a person as one whole line, and each row of the error table is one the
 * API may send. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <errno.h>
#include <string.h>

#include "base/err.h"
#include "base/strbuf.h"
#include "base/banned.h"

static void test_set_returns_code(void **state)
{
    td_err e = {0};
    assert_int_equal(td_err_set(&e, -ENOENT, "%s: gone", "a.conf"), -ENOENT);
    assert_int_equal(e.code, -ENOENT);
    assert_string_equal(e.text, "a.conf: gone");
    assert_int_equal(td_err_set(NULL, -EINVAL, "nobody asks"), -EINVAL);
}

static void test_prefix(void **state)
{
    td_err e = {0};
    td_err_set(&e, -EINVAL, "bad");
    assert_int_equal(td_err_prefix(&e, "file %d", 7), -EINVAL);
    assert_string_equal(e.text, "file 7: bad");
    assert_int_equal(td_err_prefix(NULL, "x"), 0);
}

/* Bug: an error that quotes its own text read and wrote the same buffer. */
static void test_quotes_itself(void **state)
{
    td_err e = {0};
    td_err_set(&e, -EINVAL, "inner");
    td_err_set(&e, -EIO, "outer (%s)", e.text);
    assert_string_equal(e.text, "outer (inner)");
}

/* A file name with a newline must not forge a second log line. */
static void test_one_line(void **state)
{
    td_err e = {0};
    td_err_set(&e, -EINVAL, "a\nb\x1b[31mc\x7f");
    assert_string_equal(e.text, "a b [31mc ");
}

/* A cut in the middle of a character would make the whole body invalid JSON. */
static void test_cut_is_whole_utf8(void **state)
{
    td_err e = {0};
    char pad[512];
    for (size_t n = 490; n < 500; n++) {
        memset(pad, 'x', n);
        pad[n] = 0;
        for (int i = 0; i < 3; i++) {
            static const char *const text[] = {"\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9",
                                               "\xe2\x82\xac\xe2\x82\xac\xe2\x82\xac\xe2\x82\xac",
                                               "\xf0\x9f\x98\x80\xf0\x9f\x98\x80\xf0\x9f\x98\x80"};
            td_err_set(&e, -EINVAL, "%s%s", pad, text[i]);
            assert_true(td_utf8_valid(e.text, strlen(e.text)));
            assert_true(strlen(e.text) >= 496);
        }
    }
}

static void test_errno_text(void **state)
{
    assert_string_equal(td_errno_text(-ENOENT), "No such file or directory");
    assert_string_equal(td_errno_text(ENOENT), "No such file or directory");
    assert_non_null(td_errno_text(-99999));
}

static void test_table(void **state)
{
    for (int i = 1; i < TD_ERROR_MAX; i++) {
        const td_error_info *e = td_error_get((td_error)i);
        assert_in_range(e->http, 400, 599);
        assert_in_range(e->status, 1, 16);
        assert_true(*e->name && *e->type && *e->text && *e->remedy);
        /* unique names: looking one up gives its own row */
        assert_int_equal(td_error_by_name(e->name, strlen(e->name)), i);
        /* a server's fault may pass, so the client is told to retry; a client's fault does not */
        if (e->http == 400)
            assert_false(e->retryable);
        if (e->http == 503)
            assert_true(e->retryable);
    }
    assert_ptr_equal(td_error_get((td_error)9999), td_error_get(TD_ERROR_INTERNAL));
    assert_int_equal(td_error_by_name("queue_ful", 9), TD_ERROR_INTERNAL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_set_returns_code),
        cmocka_unit_test(test_prefix),
        cmocka_unit_test(test_quotes_itself),
        cmocka_unit_test(test_one_line),
        cmocka_unit_test(test_cut_is_whole_utf8),
        cmocka_unit_test(test_errno_text),
        cmocka_unit_test(test_table),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
