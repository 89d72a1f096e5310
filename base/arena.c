/* SPDX-License-Identifier: Apache-2.0 */
#include "base/arena.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "base/bug.h"
#include "base/banned.h"

enum { ALIGN = 16, CHUNK_BYTES_MIN = 4096 };

struct td_arena_chunk {
    struct td_arena_chunk *next;
    size_t used, cap;
    _Alignas(ALIGN) unsigned char data[];
};

void td_arena_init(td_arena *a, size_t limit_bytes)
{
    *a = (td_arena){.limit_bytes = limit_bytes};
}

void td_arena_done(td_arena *a)
{
    while (a->head) {
        struct td_arena_chunk *next = a->head->next;
        free(a->head);
        a->head = next;
    }
    td_arena_init(a, a->limit_bytes);
}

void td_arena_reset(td_arena *a)
{
    struct td_arena_chunk *keep = a->head;
    if (keep) {
        a->head = keep->next;
        td_arena_done(a);
        keep->next = NULL;
        keep->used = 0;
        a->head = keep;
        a->used_bytes = keep->cap;
    }
    a->failed = 0;
}

static struct td_arena_chunk *grow(td_arena *a, size_t n)
{
    size_t cap = TD_MAX(n, (size_t)CHUNK_BYTES_MIN);
    if (a->head)
        cap = TD_MAX(cap, TD_MIN(a->head->cap * 2, (size_t)1 << 20));
    if (a->limit_bytes && cap > a->limit_bytes - TD_MIN(a->used_bytes, a->limit_bytes))
        cap = n; /* no room for the comfortable size: exactly what is asked */
    if (a->limit_bytes && cap > a->limit_bytes - TD_MIN(a->used_bytes, a->limit_bytes))
        return NULL;
    struct td_arena_chunk *c = malloc(sizeof *c + cap);
    if (!c)
        return NULL;
    c->next = a->head;
    c->used = 0;
    c->cap = cap;
    a->head = c;
    a->used_bytes += cap;
    return c;
}

void *td_arena_alloc(td_arena *a, size_t n)
{
    if (a->failed || n > SIZE_MAX / 4) { /* no sum below can overflow */
        a->failed = 1;
        return NULL;
    }
    n = (n + ALIGN - 1) & ~(size_t)(ALIGN - 1);
    if (n == 0)
        n = ALIGN;
    struct td_arena_chunk *c = a->head;
    if (!c || c->cap - c->used < n)
        c = grow(a, n);
    if (!c) {
        a->failed = 1;
        return NULL;
    }
    void *p = c->data + c->used;
    c->used += n;
    memset(p, 0, n);
    return p;
}

void *td_arena_alloc_array(td_arena *a, size_t n, size_t size)
{
    size_t bytes;
    if (__builtin_mul_overflow(n, size, &bytes)) {
        a->failed = 1;
        return NULL;
    }
    return td_arena_alloc(a, bytes);
}

char *td_arena_strndup(td_arena *a, const char *s, size_t n)
{
    char *p = n == SIZE_MAX ? NULL : td_arena_alloc(a, n + 1);
    if (p && n)
        memcpy(p, s, n);
    return p;
}

int td_arena_failed(const td_arena *a)
{
    return a->failed;
}
