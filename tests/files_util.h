/* SPDX-License-Identifier: Apache-2.0 */
/* Temporary folders and copies of model files, for tests that damage them. */
#ifndef TD_TESTS_FILES_UTIL_H
#define TD_TESTS_FILES_UTIL_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/file.h"

/* dir/name with these bytes. */
static inline void test_write_file(const char *dir, const char *name, const void *bytes, size_t n)
{
    char path[1024];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    assert_int_equal(fwrite(bytes, 1, n, f), n);
    assert_int_equal(fclose(f), 0);
}

/* The bytes of dir/name; caller frees. */
static inline char *test_read_file(const char *dir, const char *name, size_t *ret_n)
{
    char path[1024], *bytes = NULL;
    td_err err = {0};
    snprintf(path, sizeof path, "%s/%s", dir, name);
    if (td_file_read(path, 1 << 28, &bytes, ret_n, &err) < 0)
        fail_msg("%s", err.text);
    return bytes;
}

static inline void test_copy_file(const char *from, const char *to, const char *name)
{
    size_t n = 0;
    char *bytes = test_read_file(from, name, &n);
    test_write_file(to, name, bytes, n);
    free(bytes);
}

#endif
