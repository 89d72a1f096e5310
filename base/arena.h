/* SPDX-License-Identifier: Apache-2.0 */
/* Bump arena with a byte limit and a sticky failure: allocate freely, ask td_arena_failed() once.
 * Memory is zeroed. One thread at a time. */
#ifndef TD_BASE_ARENA_H
#define TD_BASE_ARENA_H

#include <stddef.h>

typedef struct td_arena {
    struct td_arena_chunk *head;
    size_t used_bytes, limit_bytes; /* limit over all chunks */
    int failed;
} td_arena;

/* Start empty; nothing is allocated yet. limit_bytes 0 = no limit. */
void td_arena_init(td_arena *a, size_t limit_bytes);
/* Free everything; the arena may be used again. */
void td_arena_done(td_arena *a);
/* Keep one chunk, forget its contents, clear the failure. */
void td_arena_reset(td_arena *a);
/* Zeroed bytes aligned to 16; NULL (and sticky failure) past the limit or out of memory. n = 0
 * gives a valid pointer. */
void *td_arena_alloc(td_arena *a, size_t n);
/* n × size with overflow check. */
void *td_arena_alloc_array(td_arena *a, size_t n, size_t size);
/* Copy of bytes plus a NUL behind them. */
char *td_arena_strndup(td_arena *a, const char *s, size_t n);
/* 1 after any failed allocation since init or reset. */
int td_arena_failed(const td_arena *a);

#endif
