/* SPDX-License-Identifier: Apache-2.0 */
/* The lightning indexer: scores of blocks of rows against tiles of 64 keys, then the exact top-k of
 * each row by counting, never by sorting. */
#include <errno.h>
#include <math.h>

#include "kernels/cpu/attend.h"

#include "base/banned.h"

enum {
    AHEAD = 3,    /* tiles from the word to memory to their use */
    QUERIES = 64, /* rows x heads of a block */
    DIGIT = 21,   /* the first count is by the upper 11 bits */
    DIGITS = 1 << 11,
};

/* Rows are taken in groups whose scores fit the buffer: rows [first, first + n) at stride floats
 * each, cut into blocks; an item is one block by span tiles. */
typedef struct index_job {
    cpu_queue *c;
    const cpu_attend *f;
    const td_step *s;
    const td_index_select *a;
    uint32_t first, n, spans, span;
    size_t stride;
    const uint32_t *starts;
} index_job;

/* An item's share of the thread's work space. */
typedef struct score_block {
    uint32_t t, n_rows, n_queries;
    float *keys, *q, *dots, *w;
    size_t q_stride;
} score_block;

static size_t queries(const td_index_select *a)
{
    return a->n_heads > QUERIES ? a->n_heads : QUERIES;
}

static size_t work_floats(const index_job *j)
{
    size_t k = attend_stride(j->a->dims), q = queries(j->a);
    size_t score = ATTEND_TURNED + q * (k + ATTEND_TILE + 1);
    size_t select = 2 * (j->stride + 16);
    return score > select ? score : select;
}

static score_block open_block(const index_job *j, uint32_t item, float *work)
{
    const uint32_t *start = j->starts + item / j->spans;
    size_t n = queries(j->a);
    score_block b = {.t = start[0], .n_rows = start[1] - start[0]};
    b.n_queries = b.n_rows * j->a->n_heads;
    b.q_stride = attend_stride(j->a->dims);
    b.keys = work;
    b.q = b.keys + ATTEND_TURNED;
    b.dots = b.q + n * b.q_stride;
    b.w = b.dots + n * ATTEND_TILE;
    return b;
}

static void load_queries(const index_job *j, const score_block *b)
{
    const td_index_select *a = j->a;
    size_t at = (size_t)b->t * a->n_heads;
    for (uint32_t i = 0; i < b->n_queries; i++) {
        memcpy(b->q + i * b->q_stride, a->q + (at + i) * a->dims, a->dims * sizeof *b->q);
        b->w[i] = a->weight[at + i] * a->scale;
    }
}

/* Rows of the pool with keys [p0, p0 + n), the last repeated; and a word to memory of what comes
 * AHEAD tiles later. */
static void find_keys(const index_job *j, const score_block *b, uint32_t p0, uint32_t n,
                      const uint8_t *ret_rows[ATTEND_TILE])
{
    const td_index_select *a = j->a;
    size_t bytes = a->dims * td_dtype_bytes(a->index);
    uint32_t later = p0 + AHEAD * ATTEND_TILE;
    ret_rows[0] = ref_kv_row(j->s, b->t, p0, a->layer_offset, bytes);
    for (uint32_t i = 1; i < ATTEND_TILE; i++)
        ret_rows[i] = ret_rows[0] + (i < n ? i : n - 1) * bytes;
    if (later > j->s->positions[b->t + b->n_rows - 1])
        return;
    const uint8_t *next = ref_kv_row(j->s, b->t, later, a->layer_offset, bytes);
    for (size_t at = 0; at < ATTEND_TILE * bytes; at += 64)
        __builtin_prefetch(next + at, 0, 2);
}

/* Scores of the block's rows against keys [p0, p0 + 64). */
static void score_tile(const index_job *j, const score_block *b, uint32_t p0)
{
    const td_index_select *a = j->a;
    uint32_t end = j->s->positions[b->t + b->n_rows - 1] + 1, row0 = 0;
    uint32_t n = end - p0 < ATTEND_TILE ? end - p0 : ATTEND_TILE;
    const uint8_t *rows[ATTEND_TILE];
    while (j->s->positions[b->t + row0] < p0) /* the tile lies in these rows' future */
        row0++;
    find_keys(j, b, p0, n, rows);
    uint32_t q0 = row0 * a->n_heads, n_q = b->n_queries - q0;
    attend_scores(j->f, rows, 0, a->dims, a->index, b->keys, b->q + q0 * b->q_stride, b->q_stride,
                  n_q, 1.0f, b->dots + (size_t)q0 * ATTEND_TILE);
    for (uint32_t i = row0; i < b->n_rows; i++) {
        float out[ATTEND_TILE];
        uint32_t t = b->t + i, left = j->s->positions[t] + 1 - p0;
        left = left < ATTEND_TILE ? left : ATTEND_TILE;
        if (j->f->combine(b->dots + (size_t)i * a->n_heads * ATTEND_TILE, b->w + i * a->n_heads,
                          a->n_heads, left, out))
            ref_fail(&j->c->q, -EIO);
        memcpy(j->c->q.scores + (t - j->first) * j->stride + p0, out, left * sizeof *out);
    }
}

static void score_item(void *arg, uint32_t item, uint32_t thread)
{
    const index_job *j = arg;
    score_block b = open_block(j, item, cpu_work(j->c, thread));
    uint32_t last = j->s->positions[b.t + b.n_rows - 1], tile = item % j->spans * j->span;
    if (last < j->a->topk)
        return; /* these rows select everything */
    load_queries(j, &b);
    for (uint32_t i = 0; i < j->span && (tile + i) * ATTEND_TILE <= last; i++)
        score_tile(j, &b, (tile + i) * ATTEND_TILE);
}

static float value_of(uint32_t key)
{
    uint32_t b = key & 0x80000000u ? key & 0x7fffffffu : ~key;
    float f;
    memcpy(&f, &b, 4);
    return f;
}

/* The greatest digit d such that k values or more have a digit >= d; *k becomes what is still
 * wanted of those with digit d. */
static uint32_t walk(const uint32_t *hist, uint32_t digit, uint32_t *k)
{
    while (digit > 0 && hist[digit] < *k)
        *k -= hist[digit--];
    return digit;
}

/* Key of the k-th greatest of n. The first count leaves few candidates for the other two.
 * *ret_ties: how many with that key are wanted. */
static uint32_t kth_key(const uint32_t *keys, uint32_t n, uint32_t k, uint32_t *cand,
                        uint32_t *ret_ties)
{
    static const uint8_t shifts[2] = {10, 0};
    static const uint16_t sizes[2] = {2048, 1024};
    uint32_t hist[DIGITS] = {0}, odd[DIGITS] = {0}, m = 0, i = 0;
    for (; i + 2 <= n; i += 2) { /* two tables: neighbours often share a digit */
        hist[keys[i] >> DIGIT]++;
        odd[keys[i + 1] >> DIGIT]++;
    }
    if (i < n)
        hist[keys[i] >> DIGIT]++;
    for (uint32_t d = 0; d < DIGITS; d++)
        hist[d] += odd[d];
    uint32_t high = walk(hist, DIGITS - 1, &k);
    for (i = 0; i < n; i++) {
        cand[m] = keys[i];
        m += keys[i] >> DIGIT == high;
    }
    high <<= DIGIT;
    uint32_t mask = (uint32_t)(DIGITS - 1) << DIGIT;
    for (int d = 0; d < 2; d++) {
        memset(hist, 0, sizeof hist);
        for (i = 0; i < m; i++)
            if ((cand[i] & mask) == high)
                hist[cand[i] >> shifts[d] & (sizes[d] - 1u)]++;
        high |= walk(hist, sizes[d] - 1u, &k) << shifts[d];
        mask |= (sizes[d] - 1u) << shifts[d];
    }
    *ret_ties = k;
    return high;
}

/* (k-th best - next) / largest |score|. */
static float margin_of(const float *v, const uint32_t *keys, uint32_t n, uint32_t thr,
                       uint32_t ties)
{
    float largest = 0.0f, next = -INFINITY;
    uint32_t equal = 0;
    for (uint32_t i = 0; i < n; i++) {
        largest = fabsf(v[i]) > largest ? fabsf(v[i]) : largest;
        equal += keys[i] == thr;
        if (keys[i] < thr && v[i] > next)
            next = v[i];
    }
    if (equal > ties)
        next = value_of(thr);
    return largest > 0.0f ? (value_of(thr) - next) / largest : 0.0f;
}

static void select_item(void *arg, uint32_t item, uint32_t thread)
{
    const index_job *j = arg;
    const td_index_select *a = j->a;
    uint32_t t = j->first + item, n = j->s->positions[t] + 1, ties;
    uint32_t *out = a->selected + (size_t)t * a->topk;
    if (n <= a->topk) {
        for (uint32_t i = 0; i < n; i++)
            out[i] = i;
        a->n_selected[t] = n;
        if (a->margin)
            a->margin[t] = INFINITY;
        return;
    }
    const float *v = j->c->q.scores + item * j->stride;
    uint32_t *keys = (uint32_t *)cpu_work(j->c, thread), *cand = keys + j->stride + 16;
    j->f->keys(v, keys, n);
    uint32_t thr = kth_key(keys, n, a->topk, cand, &ties);
    a->n_selected[t] = j->f->pick(keys, n, thr, ties, out, a->topk);
    if (a->margin)
        a->margin[t] = margin_of(v, keys, n, thr, ties);
}

/* Blocks of rows [first, first + n). */
static uint32_t cut_rows(const index_job *j, uint32_t most, uint32_t *starts)
{
    uint32_t n = 0;
    for (uint32_t t = j->first; t < j->first + j->n; t++)
        if (n == 0 || t - starts[n - 1] == most || !attend_follows(j->s, t - 1))
            starts[n++] = t;
    starts[n] = j->first + j->n;
    return n;
}

static void score_group(index_job *j, uint32_t tiles)
{
    const td_index_select *a = j->a;
    uint32_t most = QUERIES / a->n_heads ? QUERIES / a->n_heads : 1;
    uint32_t blocks = cut_rows(j, most, j->c->lists), wanted = 4 * j->c->q.o.n_threads;
    j->spans = blocks >= wanted ? 1 : (wanted + blocks - 1) / blocks;
    j->span = (tiles + j->spans - 1) / j->spans;
    td_cpu_run(j->c, score_item, j, blocks * j->spans,
               (size_t)j->n * tiles * ATTEND_TILE * a->n_heads * a->dims);
}

void td_cpu_index_select(td_queue *q, const td_step *s, const td_index_select *a)
{
    cpu_queue *c = cpu_queue_of(q);
    index_job j = {.c = c, .f = td_cpu_attend_of(c), .s = s, .a = a};
    j.stride = ((size_t)s->max_context + ATTEND_TILE - 1) / ATTEND_TILE * ATTEND_TILE;
    if (j.stride > q->score_floats)
        j.stride = q->score_floats;
    if (td_cpu_need_lists(c, s->n_rows + 1ul) < 0 || td_cpu_need_work(c, work_floats(&j)) < 0)
        return;
    j.starts = c->lists;
    uint32_t group = (uint32_t)(q->score_floats / j.stride);
    uint32_t tiles =
        s->max_context > a->topk ? (s->max_context + ATTEND_TILE - 1) / ATTEND_TILE : 0;
    for (j.first = 0; j.first < s->n_rows; j.first += group) {
        j.n = s->n_rows - j.first < group ? s->n_rows - j.first : group;
        if (tiles)
            score_group(&j, tiles);
        td_cpu_run(c, select_item, &j, j.n, tiles ? (size_t)j.n * s->max_context * 16 : 0);
    }
}
