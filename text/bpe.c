/* SPDX-License-Identifier: Apache-2.0 */
#include "text/bpe.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/bug.h"
#include "base/pages.h"
#include "base/banned.h"

enum { NONE = -1, PREFETCH = 16 };

struct td_bpe_symbol {
    uint32_t id;
    int32_t prev, next;
    uint32_t alive;
};

struct td_bpe_entry {
    uint32_t rank, pos, id;
};

static size_t slot_of(uint32_t left, uint32_t right)
{
    uint64_t h = ((uint64_t)left << 32 | right) * 0x9E3779B97F4A7C15ull;
    return (size_t)(h ^ h >> 29);
}

static void put(td_merges *m, const td_merge *e)
{
    size_t at = slot_of(e->left, e->right) & m->mask;
    while (m->slots[at].rank && (m->slots[at].left != e->left || m->slots[at].right != e->right))
        at = (at + 1) & m->mask;
    m->slots[at] = *e;
}

int td_merges_init(td_merges *m, const td_merge *list, size_t n)
{
    size_t cap = 16;
    while (cap / 3 < n / 2) /* at most two thirds full */
        cap *= 2;
    m->slots = td_pages_alloc(cap * sizeof *m->slots);
    if (!m->slots)
        return -ENOMEM;
    m->mask = cap - 1;
    for (size_t i = 0; i < n; i++) {
        if (i + PREFETCH < n)
            __builtin_prefetch(
                &m->slots[slot_of(list[i + PREFETCH].left, list[i + PREFETCH].right) & m->mask], 1);
        put(m, &list[i]);
    }
    return 0;
}

void td_merges_done(td_merges *m)
{
    td_pages_free(m->slots, (m->mask + 1) * sizeof *m->slots);
    *m = (td_merges){0};
}

const td_merge *td_merges_get(const td_merges *m, uint32_t left, uint32_t right)
{
    size_t at = slot_of(left, right) & m->mask;
    while (m->slots[at].rank) {
        if (m->slots[at].left == left && m->slots[at].right == right)
            return &m->slots[at];
        at = (at + 1) & m->mask;
    }
    return NULL;
}

void td_bpe_work_done(td_bpe_work *w)
{
    free(w->symbols);
    free(w->heap);
    *w = (td_bpe_work){0};
}

static int reserve(td_bpe_work *w, size_t n)
{
    if (n <= w->cap)
        return 0;
    size_t cap = TD_MAX(n, w->cap * 2);
    free(w->symbols);
    free(w->heap);
    w->symbols = malloc(cap * sizeof *w->symbols);
    /* n-1 pairs at first; a merge takes one entry out and puts at most two in */
    w->heap = malloc(cap * 2 * sizeof *w->heap);
    w->cap = w->symbols && w->heap ? cap : 0;
    return w->cap ? 0 : -ENOMEM;
}

static int before(const struct td_bpe_entry *a, const struct td_bpe_entry *b)
{
    return a->rank != b->rank ? a->rank < b->rank : a->pos < b->pos;
}

static void push(td_bpe_work *w, struct td_bpe_entry e)
{
    size_t at = w->n_heap++;
    while (at && before(&e, &w->heap[(at - 1) / 2])) {
        w->heap[at] = w->heap[(at - 1) / 2];
        at = (at - 1) / 2;
        w->n_ops++;
    }
    w->heap[at] = e;
    w->n_ops++;
}

static struct td_bpe_entry pop(td_bpe_work *w)
{
    struct td_bpe_entry top = w->heap[0], last = w->heap[--w->n_heap];
    size_t at = 0, child;
    while ((child = at * 2 + 1) < w->n_heap) {
        if (child + 1 < w->n_heap && before(&w->heap[child + 1], &w->heap[child]))
            child++;
        if (!before(&w->heap[child], &last))
            break;
        w->heap[at] = w->heap[child];
        at = child;
        w->n_ops++;
    }
    w->heap[at] = last;
    w->n_ops++;
    return top;
}

static void push_pair(const td_merges *m, td_bpe_work *w, int32_t pos)
{
    const struct td_bpe_symbol *s = &w->symbols[pos];
    if (s->next == NONE)
        return;
    const td_merge *e = td_merges_get(m, s->id, w->symbols[s->next].id);
    if (e)
        push(w, (struct td_bpe_entry){e->rank, (uint32_t)pos, e->id});
}

/* Entries are not removed when a neighbour changes; one is stale when its pair no longer gives the
 * same token. */
static void merge_top(const td_merges *m, td_bpe_work *w)
{
    struct td_bpe_entry top = pop(w);
    struct td_bpe_symbol *s = &w->symbols[top.pos];
    if (!s->alive || s->next == NONE)
        return;
    struct td_bpe_symbol *right = &w->symbols[s->next];
    const td_merge *e = td_merges_get(m, s->id, right->id);
    if (!e || e->id != top.id)
        return;
    s->id = top.id;
    s->next = right->next;
    right->alive = 0;
    if (s->next != NONE)
        w->symbols[s->next].prev = (int32_t)top.pos;
    if (s->prev != NONE)
        push_pair(m, w, s->prev);
    push_pair(m, w, (int32_t)top.pos);
}

int td_bpe_encode(const td_merges *m, const uint32_t byte_id[256], const char *piece, size_t n,
                  td_bpe_work *w, td_ids *out)
{
    if (n == 1) {
        td_ids_add(out, byte_id[(unsigned char)piece[0]]);
        return 0;
    }
    if (n == 0)
        return 0;
    if (n > INT32_MAX || reserve(w, n) < 0)
        return -ENOMEM;
    for (size_t i = 0; i < n; i++)
        w->symbols[i] = (struct td_bpe_symbol){byte_id[(unsigned char)piece[i]], (int32_t)i - 1,
                                               i + 1 < n ? (int32_t)i + 1 : NONE, 1};
    w->n_heap = 0;
    for (size_t i = 0; i + 1 < n; i++)
        push_pair(m, w, (int32_t)i);
    while (w->n_heap)
        merge_top(m, w);
    for (int32_t i = 0; i != NONE; i = w->symbols[i].next)
        td_ids_add(out, w->symbols[i].id);
    return 0;
}
