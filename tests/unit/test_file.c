/* SPDX-License-Identifier: Apache-2.0 */
/* Guards: reading is bounded, never hangs on a FIFO, follows no link into a mapping, and failure
 * names the file. */
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

#include "base/file.h"
#include "base/banned.h"

static char dir[] = "/tmp/td-file-XXXXXX";

static char *put(const char *name, const char *text, size_t n)
{
    char *path = td_path_join(dir, name);
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    assert_int_equal(fwrite(text, 1, n, f), n);
    fclose(f);
    return path;
}

static int set_up(void **state)
{
    return mkdtemp(dir) ? 0 : -1;
}

static int tear_down(void **state)
{
    return rmdir(dir);
}

static void read_fails(const char *path, size_t max, int code)
{
    td_err e = {0};
    char *data = (char *)1;
    size_t n = 77;
    assert_int_equal(td_file_read(path, max, &data, &n, &e), code);
    assert_ptr_equal(data, (char *)1); /* outputs unchanged */
    assert_int_equal(n, 77);
    assert_non_null(strstr(e.text, path));
}

static void test_read(void **state)
{
    td_err e = {0};
    char *path = put("a", "hello", 5), *data = NULL;
    size_t n = 0;
    assert_int_equal(td_file_read(path, 5, &data, &n, &e), 0);
    assert_int_equal(n, 5);
    assert_string_equal(data, "hello");
    free(data);
    read_fails(path, 4, -EFBIG);
    unlink(path);
    read_fails(path, 100, -ENOENT);
    read_fails(dir, 100, -EISDIR);
    free(path);
    path = put("empty", "", 0);
    assert_int_equal(td_file_read(path, 0, &data, &n, &e), 0);
    assert_int_equal(n, 0);
    assert_string_equal(data, "");
    free(data);
    unlink(path);
    free(path);
}

/* Bug class: a size of 0 from stat (procfs) is not the size, and the bound must still hold. */
static void test_size_unknown(void **state)
{
    td_err e = {0};
    char *data = NULL;
    size_t n = 0;
    assert_int_equal(td_file_read("/proc/self/status", 1 << 20, &data, &n, &e), 0);
    assert_true(n > 100 && memcmp(data, "Name:", 5) == 0);
    free(data);
    read_fails("/proc/self/status", 100, -EFBIG);
}

static void test_fifo_does_not_hang(void **state)
{
    char *path = td_path_join(dir, "fifo");
    assert_int_equal(mkfifo(path, 0600), 0);
    alarm(10);
    read_fails(path, 100, -EINVAL);
    alarm(0);
    unlink(path);
    free(path);
    read_fails("/dev/null", 100, -EINVAL);
}

static void test_map(void **state)
{
    td_err e = {0};
    const void *data = NULL;
    size_t n = 0;
    char *path = put("m", "mapped", 6), *link = td_path_join(dir, "link"), *empty = put("e", "", 0);
    assert_int_equal(td_file_map(path, &data, &n, &e), 0);
    assert_int_equal(n, 6);
    assert_memory_equal(data, "mapped", 6);
    td_file_unmap(data, n);
    assert_int_equal(symlink(path, link), 0);
    assert_int_equal(td_file_map(link, &data, &n, &e), -ELOOP);
    assert_non_null(strstr(e.text, link));
    assert_int_equal(td_file_map_whole(link, 6, &data, &n, &e), 0);
    assert_memory_equal(data, "mapped", 6);
    td_file_unmap(data, n);
    assert_int_equal(td_file_map_whole(path, 5, &data, &n, &e), -EFBIG);
    assert_int_equal(td_file_map(empty, &data, &n, &e), 0);
    assert_null(data);
    assert_int_equal(n, 0);
    td_file_unmap(data, n);
    unlink(link);
    unlink(path);
    unlink(empty);
    free(link);
    free(path);
    free(empty);
}

static void test_join(void **state)
{
    char *a = td_path_join("x", "y"), *b = td_path_join("x/", "y");
    assert_string_equal(a, "x/y");
    assert_string_equal(b, "x/y");
    free(a);
    free(b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_read),
                                       cmocka_unit_test(test_size_unknown),
                                       cmocka_unit_test(test_fifo_does_not_hang),
                                       cmocka_unit_test(test_map), cmocka_unit_test(test_join)};
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
