/* SPDX-License-Identifier: Apache-2.0 */
/* Promise: what a process may use is the lowest limit above it, in either form of control groups;
 * odd files change nothing. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/bug.h"
#include "base/memory.h"
#include "base/banned.h"

static char mount[] = "/tmp/tandem-test-XXXXXX";

static const struct {
    const char *name, *text;
} files[] = {{"/a", NULL},
             {"/a/b", NULL},
             {"/memory", NULL},
             {"/memory/c", NULL},
             {"/memory.max", "max\n"},
             {"/a/memory.max", "5000\n"},
             {"/a/b/memory.max", "7000\n"},
             {"/memory/memory.limit_in_bytes", "9223372036854771712\n"},
             {"/memory/c/memory.limit_in_bytes", "3000\n"}};

static int make(void **state)
{
    char path[200];
    if (!mkdtemp(mount))
        return -1;
    for (size_t i = 0; i < TD_ARRAY_LEN(files); i++) {
        snprintf(path, sizeof path, "%s%s", mount, files[i].name);
        FILE *f = files[i].text ? fopen(path, "w") : NULL;
        if (files[i].text ? !f || fputs(files[i].text, f) < 0 || fclose(f) != 0
                          : mkdir(path, 0700) != 0)
            return -1;
    }
    return 0;
}

static int clear(void **state)
{
    char path[200];
    for (size_t i = TD_ARRAY_LEN(files); i-- > 0;) {
        snprintf(path, sizeof path, "%s%s", mount, files[i].name);
        remove(path);
    }
    return rmdir(mount);
}

static void lowest_wins(void **state)
{
    static const struct {
        const char *cgroups;
        uint64_t want;
    } cases[] = {
        {"0::/a/b\n", 5000},
        {"0::/a/b", 5000},
        {"0::/a\n", 5000},
        {"0::/\n", 100000},
        {"9:name=systemd:/\n4:memory:/c\n0::/\n", 3000},
        {"4:memory:/\n", 100000},
        {"0::/nowhere/b\n", 100000},
        {"", 100000},
        {"nonsense\n:::\n0:\n0::a\n", 100000},
    };
    for (size_t i = 0; i < TD_ARRAY_LEN(cases); i++)
        assert_int_equal(td_memory_limit_of(100000, cases[i].cgroups, mount), cases[i].want);
    assert_int_equal(td_memory_limit_of(1000, "0::/a/b\n", mount), 1000);
}

static void here(void **state)
{
    uint64_t limit = td_memory_limit();
    assert_true(limit > 1 << 20 && limit <= (uint64_t)sysconf(_SC_PHYS_PAGES) * 65536);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(lowest_wins),
        cmocka_unit_test(here),
    };
    return cmocka_run_group_tests(tests, make, clear);
}
