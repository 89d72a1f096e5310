/* SPDX-License-Identifier: Apache-2.0 */
#include "base/pages.h"

#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/banned.h"

enum { HUGE_PAGE = 2 << 20 };

/* A mapping is a whole number of huge pages. */
static size_t rounded(size_t bytes)
{
    return (bytes + HUGE_PAGE - 1) & ~(size_t)(HUGE_PAGE - 1);
}

/* Addresses for size bytes, a whole number of huge pages, at such a page's begin: older kernels
 * align to 4 KiB only. */
static char *reserve(size_t size, int prot)
{
    char *p = mmap(NULL, size + HUGE_PAGE, prot, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED)
        return NULL;
    size_t before = -(uintptr_t)p & (HUGE_PAGE - 1);
    if (before)
        munmap(p, before);
    munmap(p + before + size, HUGE_PAGE - before);
    return p + before;
}

void *td_pages_alloc(size_t bytes)
{
    if (bytes < TD_PAGES_MIN)
        return calloc(1, bytes ? bytes : 1);
    if (bytes > SIZE_MAX / 2)
        return NULL;
    char *p = reserve(rounded(bytes), PROT_READ | PROT_WRITE);
    if (p)
        madvise(p, rounded(bytes), MADV_HUGEPAGE); /* refused: small pages do as well */
    return p;
}

void *td_pages_map(int fd, size_t bytes, int prot)
{
    if (bytes > SIZE_MAX / 2) {
        errno = ENOMEM;
        return NULL;
    }
    char *at = bytes < TD_PAGES_MIN ? NULL : reserve(rounded(bytes), PROT_NONE);
    void *p = mmap(at, bytes, prot, MAP_SHARED | (at ? MAP_FIXED : 0), fd, 0);
    if (p == MAP_FAILED) {
        int error = errno;
        if (at)
            munmap(at, rounded(bytes));
        errno = error;
        return NULL;
    }
    size_t page = (size_t)sysconf(_SC_PAGESIZE), used = (bytes + page - 1) / page * page;
    if (at && rounded(bytes) > used)
        munmap(at + used, rounded(bytes) - used);
    if (at)
        madvise(p, bytes, MADV_HUGEPAGE);
    return p;
}

void td_pages_free(void *p, size_t bytes)
{
    if (p && bytes >= TD_PAGES_MIN)
        munmap(p, rounded(bytes));
    else
        free(p);
}
