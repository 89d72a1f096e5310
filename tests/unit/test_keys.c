/* SPDX-License-Identifier: Apache-2.0 */
/* Guards promise 6: keys are read strictly, and nothing but a whole key opens. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "router/keys.h"

static int load(const char *text, int mode, td_keys **ret, td_err *err)
{
    char path[] = "/tmp/td-keys-XXXXXX";
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, text, strlen(text)), (ssize_t)strlen(text));
    fchmod(fd, (mode_t)mode);
    close(fd);
    int r = td_keys_load(path, ret, err);
    unlink(path);
    return r;
}

static void test_checks(void **state)
{
    td_keys *k = NULL;
    td_err err = {0};
    td_str tenant;
    assert_int_equal(
        load("# people\n\nalice sk-0123456789abcdef\n bob\tsk-fedcba9876543210 \n", 0600, &k, &err),
        0);
    assert_int_equal(td_keys_check(k, "Bearer sk-0123456789abcdef", &tenant), 1);
    assert_true(td_str_eq(tenant, "alice"));
    assert_int_equal(td_keys_check(k, "bearer sk-fedcba9876543210", &tenant), 1);
    assert_true(td_str_eq(tenant, "bob"));
    static const char *const bad[] = {NULL,
                                      "",
                                      "Bearer ",
                                      "Bearer sk-0123456789abcde",
                                      "Bearer sk-0123456789abcdef ",
                                      "Basic sk-0123456789abcdef",
                                      "alice"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_int_equal(td_keys_check(k, bad[i], &tenant), 0);
    td_keys_free(k);
}

static void test_refuses(void **state)
{
    td_keys *k = NULL;
    td_err err = {0};
    assert_int_equal(load("alice sk-0123456789abcdef\n", 0644, &k, &err), -EPERM);
    assert_non_null(strstr(err.text, "chmod 600"));
    assert_int_equal(load("alice short\n", 0600, &k, &err), -EINVAL);
    assert_non_null(strstr(err.text, ":1:"));
    assert_int_equal(load("# nothing\n", 0600, &k, &err), -EINVAL);
    assert_int_equal(td_keys_load("/nonexistent/keys", &k, &err), -ENOENT);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_checks),
                                       cmocka_unit_test(test_refuses)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
