/* SPDX-License-Identifier: Apache-2.0 */
/* Attention (numerics, rule 5) by blocks: a few rows at following positions meet each tile of 64
 * ranks together, with all heads that share its keys. The tile is gathered from the pool and
 * widened once. What a row gets never depends on who shares its block: each score, sum and value is
 * a chain of its own. */
#include <math.h>

#include "kernels/cpu/attend.h"
#include "kernels/math.h"

#include "base/banned.h"

enum {
    SPLIT = TD_KPLAN_ATTN_TILE * TD_KPLAN_ATTN_SPLIT,
    QUERIES = 32, /* of a block: their outputs stay in the second cache beside the tile */
    AHEAD = 6,    /* rows of the pool asked for before they are read */
};

typedef struct attend_job {
    cpu_queue *c;
    const cpu_attend *f;
    const td_step *s;
    const td_attend_mla *mla; /* one of the two */
    const td_attend_gqa *gqa;
    td_dtype kv;
    uint64_t layer_offset;
    size_t row_bytes;
    uint32_t key_dims, value_dims, n_heads, group_heads, n_groups;
    float scale;
    const uint32_t *starts; /* block i has rows [starts[i], starts[i + 1]) */
} attend_job;

/* Running state of queries: max, sum, un-normalised output. */
typedef struct states {
    float *m, *l, *o;
} states;

/* One item's share of the thread's work space. Query i * group_heads + h is head h of row i. */
typedef struct block {
    uint32_t t, n_rows, group, first_head, n_heads, n_queries;
    float *keys; /* turned */
    float *values, *q, *p, *alpha;
    uint32_t *n; /* ranks of the tile at hand that a query sees */
    states sum, cur;
    size_t q_stride, out_stride; /* values lie as outputs do */
} block;

const cpu_attend *td_cpu_attend_of(const cpu_queue *c)
{
    return c->kernels == &td_cpu_avx2 ? &td_cpu_attend_avx2 : &td_cpu_attend_avx512;
}

/* Ranks in row t's list. */
static uint32_t length(const attend_job *j, uint32_t t)
{
    return j->mla && j->mla->selected ? j->mla->n_selected[t] : j->s->positions[t] + 1;
}

/* The list is 0, 1, 2, ... : rank = position. */
static int dense(const attend_job *j, uint32_t t)
{
    return length(j, t) == j->s->positions[t] + 1;
}

/* ---- tiles ---- */

/* Where the pool keeps ranks [rank, rank + n) of row t; the rest repeats the last. */
static void find_rows(const attend_job *j, uint32_t t, uint32_t rank, uint32_t n,
                      const uint8_t *ret_rows[ATTEND_TILE])
{
    if (dense(j, t)) { /* a tile is a block of the pool */
        const uint8_t *row = ref_kv_row(j->s, t, rank, j->layer_offset, j->row_bytes);
        for (uint32_t i = 0; i < n; i++)
            ret_rows[i] = row + i * j->row_bytes;
    } else {
        const uint32_t *list = j->mla->selected + (size_t)t * j->mla->topk;
        for (uint32_t i = 0; i < n; i++)
            ret_rows[i] = ref_kv_row(j->s, t, list[rank + i], j->layer_offset, j->row_bytes);
    }
    for (uint32_t i = n; i < ATTEND_TILE; i++)
        ret_rows[i] = ret_rows[n - 1];
}

/* Rows of the pool as rows of f32. */
static void load_values(const attend_job *j, const block *b, const uint8_t *const *rows, uint32_t n)
{
    size_t bytes = j->value_dims * td_dtype_bytes(j->kv);
    for (uint32_t i = 0; i < n; i++) {
        float *dst = b->values + i * b->out_stride;
        for (size_t at = 0; i + AHEAD < n && at < bytes; at += 64)
            __builtin_prefetch(rows[i + AHEAD] + at);
        if (j->kv == TD_BF16)
            j->f->widen(rows[i], dst, j->value_dims);
        else
            memcpy(dst, rows[i], bytes);
        for (size_t d = j->value_dims; d < attend_pad(j->value_dims); d++)
            dst[d] = 0.0f;
    }
}

static void load_tile(const attend_job *j, const block *b, uint32_t t, uint32_t rank, uint32_t n)
{
    const uint8_t *rows[ATTEND_TILE];
    size_t head = j->key_dims * td_dtype_bytes(j->kv);
    find_rows(j, t, rank, n, rows);
    for (uint32_t i = 0; j->gqa && i < ATTEND_TILE; i++)
        rows[i] += b->group * head;
    j->f->turn(rows, j->key_dims, j->kv == TD_BF16, b->keys);
    for (uint32_t i = 0; j->gqa && i < ATTEND_TILE; i++)
        rows[i] += j->n_groups * head;
    load_values(j, b, rows, n);
}

/* ---- one tile, one split, one block ---- */

/* First row of the block that sees rank r0; rows behind it see more. */
static uint32_t first_row(const attend_job *j, const block *b, uint32_t r0)
{
    uint32_t i = 0;
    while (length(j, b->t + i) <= r0)
        i++;
    return i;
}

static void add_tile(const attend_job *j, const block *b, uint32_t r0, const states *st)
{
    uint32_t row0 = first_row(j, b, r0), q0 = row0 * b->n_heads, n_q = b->n_queries - q0, len = 0;
    for (uint32_t i = row0; i < b->n_rows; i++) {
        len = length(j, b->t + i) - r0;
        len = len < ATTEND_TILE ? len : ATTEND_TILE;
        for (uint32_t h = 0; h < b->n_heads; h++)
            b->n[i * b->n_heads + h] = len;
    }
    load_tile(j, b, b->t + b->n_rows - 1, r0, len);
    float *p = b->p + (size_t)q0 * ATTEND_TILE, *alpha = b->alpha + q0;
    j->f->dots(b->q + q0 * b->q_stride, b->q_stride, n_q, b->keys, j->key_dims, j->scale, p);
    j->f->shift(p, b->n + q0, n_q, st->m + q0, alpha);
    td_exp_n(p, p, (size_t)n_q * ATTEND_TILE);
    td_exp_n(alpha, alpha, n_q);
    j->f->total(p, n_q, alpha, st->l + q0);
    j->f->values(p, b->n + q0, n_q, alpha, b->values, b->out_stride, (j->value_dims + 15) / 16,
                 st->o + q0 * b->out_stride, b->out_stride);
}

static void reset(const block *b, uint32_t q0, const states *st)
{
    for (uint32_t i = q0; i < b->n_queries; i++) {
        st->m[i] = -INFINITY;
        st->l[i] = 0.0f;
    }
    memset(st->o + q0 * b->out_stride, 0, (b->n_queries - q0) * b->out_stride * sizeof *st->o);
}

static void merge(const attend_job *j, const block *b, uint32_t q0)
{
    for (uint32_t i = q0; i < b->n_queries; i++) {
        float *m = &b->sum.m[i], max = *m > b->cur.m[i] ? *m : b->cur.m[i];
        float x = td_exp(*m - max), y = td_exp(b->cur.m[i] - max);
        *m = max;
        b->sum.l[i] = b->sum.l[i] * x + b->cur.l[i] * y;
        j->f->merge(b->sum.o + i * b->out_stride, x, b->cur.o + i * b->out_stride, y,
                    (uint32_t)attend_pad(j->value_dims));
    }
}

/* Splits meet left to right; the first is the sum. */
static void attend_block(const attend_job *j, const block *b)
{
    uint32_t n = length(j, b->t + b->n_rows - 1);
    for (uint32_t s0 = 0; s0 < n; s0 += SPLIT) {
        const states *st = s0 ? &b->cur : &b->sum;
        uint32_t q0 = first_row(j, b, s0) * b->n_heads, s1 = n - s0 < SPLIT ? n : s0 + SPLIT;
        reset(b, q0, st);
        for (uint32_t r0 = s0; r0 < s1; r0 += ATTEND_TILE)
            add_tile(j, b, r0, st);
        if (s0)
            merge(j, b, q0);
    }
}

/* ---- items ---- */

static void load_query(const attend_job *j, uint32_t t, uint32_t head, float *q)
{
    size_t at = (size_t)t * j->n_heads + head;
    if (j->gqa) {
        memcpy(q, j->gqa->q + at * j->key_dims, j->key_dims * sizeof *q);
    } else {
        const td_attend_mla *a = j->mla;
        memcpy(q, a->q_lat + at * a->latent, a->latent * sizeof *q);
        memcpy(q + a->latent, a->q + at * (a->nope + a->rope_dims) + a->nope,
               a->rope_dims * sizeof *q);
    }
}

static void store_output(const attend_job *j, const block *b, uint32_t i, uint32_t h)
{
    uint32_t q = i * b->n_heads + h;
    float *out = (j->mla ? j->mla->o_lat : j->gqa->o) +
                 ((size_t)(b->t + i) * j->n_heads + b->first_head + h) * j->value_dims;
    j->f->divide(b->sum.o + q * b->out_stride, b->sum.l[q], out, j->value_dims);
    for (uint32_t d = 0; j->gqa && j->c->q.o.act == TD_BF16 && d < j->value_dims; d++)
        out[d] = ref_round(TD_BF16, out[d]);
}

/* Queries of a block. */
static size_t room(const attend_job *j)
{
    uint32_t rows = QUERIES / j->group_heads ? QUERIES / j->group_heads : 1;
    return (size_t)rows * j->group_heads;
}

static size_t work_floats(const attend_job *j)
{
    size_t k = attend_stride(j->key_dims), o = attend_stride(j->value_dims), q = room(j);
    return attend_turned(j->key_dims) + ATTEND_TILE * o + q * (k + ATTEND_TILE + 2 * o + 6) + 16;
}

static states take_states(float **p, size_t n, size_t out_stride)
{
    states st = {.o = *p, .m = *p + n * out_stride, .l = *p + n * (out_stride + 1)};
    *p += n * (out_stride + 2);
    return st;
}

static block open_block(const attend_job *j, uint32_t item, float *work)
{
    size_t n = room(j);
    block b = {.group = item % j->n_groups, .q_stride = attend_stride(j->key_dims)};
    const uint32_t *start = j->starts + item / j->n_groups;
    b.t = start[0];
    b.n_rows = start[1] - start[0];
    b.first_head = b.group * j->group_heads;
    b.n_heads = j->n_heads - b.first_head;
    b.n_heads = b.n_heads < j->group_heads ? b.n_heads : j->group_heads;
    b.n_queries = b.n_rows * b.n_heads;
    b.out_stride = attend_stride(j->value_dims);
    b.keys = work;
    b.values = b.keys + attend_turned(j->key_dims);
    b.q = b.values + ATTEND_TILE * b.out_stride;
    b.p = b.q + n * b.q_stride;
    work = b.p + n * ATTEND_TILE;
    b.sum = take_states(&work, n, b.out_stride);
    b.cur = take_states(&work, n, b.out_stride);
    b.alpha = work;
    b.n = (uint32_t *)(work + n);
    return b;
}

static void attend_item(void *arg, uint32_t item, uint32_t thread)
{
    const attend_job *j = arg;
    block b = open_block(j, item, cpu_work(j->c, thread));
    for (uint32_t i = 0; i < b.n_rows; i++)
        for (uint32_t h = 0; h < b.n_heads; h++)
            load_query(j, b.t + i, b.first_head + h, b.q + (i * b.n_heads + h) * b.q_stride);
    attend_block(j, &b);
    for (uint32_t i = 0; i < b.n_rows; i++)
        for (uint32_t h = 0; h < b.n_heads; h++)
            store_output(j, &b, i, h);
}

/* ---- launch plan ---- */

/* Cut the step's rows into blocks; returns how many. */
static uint32_t cut_rows(const attend_job *j, uint32_t most, uint32_t *starts)
{
    uint32_t n = 0;
    for (uint32_t t = 0; t < j->s->n_rows; t++)
        if (t == 0 || t - starts[n - 1] == most || !attend_follows(j->s, t - 1) ||
            !dense(j, t - 1) || !dense(j, t))
            starts[n++] = t;
    starts[n] = j->s->n_rows;
    return n;
}

static size_t cost(const attend_job *j)
{
    size_t n = 0;
    for (uint32_t t = 0; t < j->s->n_rows; t++)
        n += length(j, t);
    return n * j->n_heads * (j->key_dims + j->value_dims);
}

static void launch(attend_job *j, uint32_t n_blocks)
{
    if (td_cpu_need_work(j->c, work_floats(j)) >= 0)
        td_cpu_run(j->c, attend_item, j, n_blocks * j->n_groups, cost(j));
}

void td_cpu_attend_mla(td_queue *q, const td_step *s, const td_attend_mla *a)
{
    cpu_queue *c = cpu_queue_of(q);
    if (!s->n_rows || td_cpu_need_lists(c, s->n_rows + 1ul) < 0)
        return;
    attend_job j = {.c = c,
                    .f = td_cpu_attend_of(c),
                    .s = s,
                    .mla = a,
                    .kv = a->kv,
                    .layer_offset = a->layer_offset,
                    .scale = a->scale,
                    .key_dims = a->latent + a->rope_dims,
                    .value_dims = a->latent,
                    .n_heads = a->n_heads,
                    .starts = c->lists};
    j.row_bytes = j.key_dims * td_dtype_bytes(a->kv);
    uint32_t most = QUERIES / a->n_heads ? QUERIES / a->n_heads : 1, threads = q->o.n_threads;
    uint32_t n = cut_rows(&j, most, c->lists);
    /* few blocks are spread over threads by heads, though each then gathers the tile */
    uint32_t groups = n >= 4 * threads || n % threads == 0 ? 1 : threads;
    j.group_heads = (a->n_heads + groups - 1) / groups;
    j.n_groups = (a->n_heads + j.group_heads - 1) / j.group_heads;
    launch(&j, n);
}

void td_cpu_attend_gqa(td_queue *q, const td_step *s, const td_attend_gqa *a)
{
    cpu_queue *c = cpu_queue_of(q);
    if (!s->n_rows || td_cpu_need_lists(c, s->n_rows + 1ul) < 0)
        return;
    attend_job j = {.c = c,
                    .f = td_cpu_attend_of(c),
                    .s = s,
                    .gqa = a,
                    .kv = a->kv,
                    .layer_offset = a->layer_offset,
                    .scale = a->scale,
                    .key_dims = a->dims,
                    .value_dims = a->dims,
                    .n_heads = a->n_heads,
                    .group_heads = a->n_heads / a->n_kv_heads,
                    .n_groups = a->n_kv_heads,
                    .starts = c->lists};
    j.row_bytes = 2ul * a->n_kv_heads * a->dims * td_dtype_bytes(a->kv);
    uint32_t most = QUERIES / j.group_heads ? QUERIES / j.group_heads : 1;
    launch(&j, cut_rows(&j, most, c->lists));
}
