/* SPDX-License-Identifier: Apache-2.0 */
#include "base/memory.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/bug.h"
#include "base/cleanup.h"
#include "base/file.h"
#include "base/banned.h"

/* UINT64_MAX when there is no such file or no limit in it ("max"). */
static uint64_t read_limit(const char *path)
{
    TD_AUTO_FREE char *text = NULL;
    size_t n;
    char *end;
    if (td_file_read(path, 4096, &text, &n, NULL) < 0)
        return UINT64_MAX;
    unsigned long long v = strtoull(text, &end, 10);
    return end == text ? UINT64_MAX : v;
}

/* The lowest limit of a group and of those above it. */
static uint64_t lowest(const char *mount, const char *sub, const char *group, const char *file)
{
    char at[PATH_MAX], path[2 * PATH_MAX];
    uint64_t limit = UINT64_MAX;
    snprintf(at, sizeof at, "%s", group);
    for (;;) {
        snprintf(path, sizeof path, "%.1000s%s%s/%s", mount, sub, at, file);
        uint64_t v = read_limit(path);
        limit = TD_MIN(limit, v);
        char *slash = strrchr(at, '/');
        if (!slash)
            return limit;
        *slash = 0;
    }
}

uint64_t td_memory_limit_of(uint64_t total, const char *cgroups, const char *mount)
{
    uint64_t limit = total;
    for (const char *line = cgroups; *line;) {
        /* hierarchy:controllers:/group */
        size_t n = strcspn(line, "\n");
        char text[PATH_MAX];
        snprintf(text, sizeof text, "%.*s", (int)TD_MIN(n, sizeof text - 1), line);
        char *controllers = strchr(text, ':'), *group;
        if (controllers && (group = strchr(controllers + 1, ':')) != NULL) {
            *group++ = 0;
            uint64_t v = UINT64_MAX;
            if (strcmp(controllers + 1, "") == 0)
                v = lowest(mount, "", group, "memory.max");
            else if (strcmp(controllers + 1, "memory") == 0)
                v = lowest(mount, "/memory", group, "memory.limit_in_bytes");
            limit = TD_MIN(limit, v);
        }
        line += n + (line[n] == '\n');
    }
    return limit;
}

uint64_t td_memory_limit(void)
{
    TD_AUTO_FREE char *text = NULL;
    size_t n;
    long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
    uint64_t total = pages > 0 && page > 0 ? (uint64_t)pages * (uint64_t)page : UINT64_MAX;
    if (td_file_read("/proc/self/cgroup", 1 << 16, &text, &n, NULL) < 0)
        return total;
    return td_memory_limit_of(total, text, "/sys/fs/cgroup");
}
