/* SPDX-License-Identifier: Apache-2.0 */
#include "base/pages.h"

#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "base/banned.h"

enum { HUGE_PAGE = 2 << 20 };

/* A mapping is a whole number of huge pages. */
static size_t rounded(size_t bytes)
{
    return (bytes + HUGE_PAGE - 1) & ~(size_t)(HUGE_PAGE - 1);
}

void *td_pages_alloc(size_t bytes)
{
    if (bytes < TD_PAGES_MIN)
        return calloc(1, bytes ? bytes : 1);
    if (bytes > SIZE_MAX / 2)
        return NULL;
    size_t size = rounded(bytes);
    char *p =
        mmap(NULL, size + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED)
        return NULL;
    /* older kernels align to 4 KiB only: keep the aligned part */
    size_t before = -(uintptr_t)p & (HUGE_PAGE - 1);
    if (before)
        munmap(p, before);
    munmap(p + before + size, HUGE_PAGE - before);
    madvise(p + before, size, MADV_HUGEPAGE); /* refused: small pages do as well */
    return p + before;
}

void td_pages_free(void *p, size_t bytes)
{
    if (p && bytes >= TD_PAGES_MIN)
        munmap(p, rounded(bytes));
    else
        free(p);
}
