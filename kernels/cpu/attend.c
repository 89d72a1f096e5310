/* SPDX-License-Identifier: Apache-2.0 */
/* Attention (numerics, rule 5) by blocks: a few rows at following positions meet each tile of 64
 * ranks together, with all heads that share its keys. The tile is gathered from the pool and
 * widened once (FP8 becomes BF16 first), while the next one is on its way. What a row gets never
 * depends on who shares its block: each score, sum and value is a chain of its own. */
#include "kernels/cpu/attend.h"

#include <math.h>

#include "kernels/math.h"

#include "base/banned.h"

enum {
    SPLIT = TD_KPLAN_ATTN_TILE * TD_KPLAN_ATTN_SPLIT,
    /* of a block's queries and outputs: they stay in the second cache with the tile */
    QUERY_FLOATS = 36864,
};

/* An item is a block of rows and a part of the heads: some groups of heads that share keys (GQA),
 * or some of the heads that all share them (MLA: one group). */
typedef struct attend_job {
    cpu_queue *c;
    const cpu_attend *f;
    const td_step *s;
    const td_attend_mla *mla; /* one of the two */
    const td_attend_gqa *gqa;
    td_dtype kv;
    uint64_t layer_offset;
    td_kv_row row;
    uint32_t key_dims, value_dims, n_heads;
    uint32_t n_parts, part_groups, group_heads;
    float scale;
    const uint32_t *starts; /* block i has rows [starts[i], starts[i + 1]) */
    uint32_t most;          /* rows of a block */
} attend_job;

/* Running state of queries: max, sum, un-normalised output. */
typedef struct states {
    float *m, *l, *o;
} states;

/* Where the pool keeps the ranks of a tile: n rows, the rest repeats the last. scales: FP8. */
typedef struct tile {
    const uint8_t *rows[ATTEND_TILE];
    const float *scales[ATTEND_TILE];
    uint32_t n;
} tile;

/* What one group of heads meets: keys and values, BF16 or f32, begin at so many bytes behind each
 * row's begin. */
typedef struct face {
    const uint8_t *rows[ATTEND_TILE];
    size_t key_at, value_at;
    td_dtype type;
} face;

/* One item's share of the thread's work space. Query (g * n_rows + i) * n_heads + h is head h of
 * group g in row i. */
typedef struct block {
    uint32_t t, n_rows, group0, n_groups, head0, n_heads;
    float *keys; /* a block of dims, turned */
    float *values, *q, *p, *alpha;
    uint8_t *unpacked; /* FP8: a group's rows as BF16 */
    uint32_t *n;       /* ranks of the tile at hand that a query sees */
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

static void find_row(const attend_job *j, uint32_t t, uint32_t pos, tile *x, uint32_t i)
{
    ref_kv at = ref_kv_at(j->s, t, pos, j->layer_offset, j->kv, &j->row);
    x->rows[i] = at.row;
    x->scales[i] = at.scales;
}

static void find_tile(const attend_job *j, uint32_t t, uint32_t rank, tile *ret_tile)
{
    uint32_t n = length(j, t) - rank;
    n = n < ATTEND_TILE ? n : ATTEND_TILE;
    if (dense(j, t)) { /* a tile is a block of the pool */
        find_row(j, t, rank, ret_tile, 0);
        for (uint32_t i = 1; i < n; i++) {
            ret_tile->rows[i] = ret_tile->rows[0] + i * (size_t)j->row.bytes;
            ret_tile->scales[i] = ret_tile->scales[0] + i * j->row.n_scales;
        }
    } else {
        const uint32_t *list = j->mla->selected + (size_t)t * j->mla->topk + rank;
        for (uint32_t i = 0; i < n; i++)
            find_row(j, t, list[i], ret_tile, i);
    }
    for (uint32_t i = n; i < ATTEND_TILE; i++)
        ret_tile->rows[i] = ret_tile->rows[n - 1];
    ret_tile->n = n;
}

/* Bytes from a row's begin to a group's keys and values. */
static size_t key_at(const attend_job *j, uint32_t group)
{
    return (size_t)group * j->key_dims * td_dtype_bytes(j->kv);
}

static size_t value_at(const attend_job *j, uint32_t group)
{
    return j->gqa ? key_at(j, j->gqa->n_kv_heads + group) : 0;
}

/* Ask for a tile before it is wanted: its rows lie far apart, and nothing else tells the processor
 * what comes. To the second cache: rows of 4 KiB would meet in few sets of the first. */
static void fetch(const attend_job *j, const tile *x, uint32_t group)
{
    size_t head = key_at(j, 1), key = key_at(j, group), value = value_at(j, group);
    for (uint32_t i = 0; i < x->n; i++) {
        for (size_t k = 0; k < head; k += 64) {
            __builtin_prefetch(x->rows[i] + key + k, 0, 2);
            if (j->gqa)
                __builtin_prefetch(x->rows[i] + value + k, 0, 2);
        }
        if (j->row.n_scales)
            __builtin_prefetch(x->scales[i], 0, 2);
    }
}

/* A part of n elements and its scales, as BF16. */
static void unpack_part(const attend_job *j, const uint8_t *src, const float *scales, uint32_t n,
                        uint8_t *dst)
{
    for (uint32_t i = 0; i < n; i += TD_KV_SCALE_GROUP)
        j->f->unpack(src + i, scales[i / TD_KV_SCALE_GROUP],
                     n - i < TD_KV_SCALE_GROUP ? n - i : TD_KV_SCALE_GROUP, dst + 2ul * i);
}

/* BF16 of a row: latent, then rope dims; or keys, then values. */
static size_t unpacked_stride(const attend_job *j)
{
    size_t n = j->gqa ? 2ul * j->key_dims : j->key_dims;
    return attend_stride((n + 17) / 2) * sizeof(float);
}

static void unpack_group(const attend_job *j, const block *b, const tile *x, uint32_t group)
{
    uint32_t first = j->gqa ? j->key_dims : j->value_dims, part = td_kv_part_scales(j->kv, first);
    uint32_t second = j->gqa ? j->value_dims : j->key_dims - first;
    uint32_t value = j->gqa ? j->gqa->n_kv_heads + group : 1; /* parts before it: all as long */
    for (uint32_t i = 0; i < x->n; i++) {
        uint8_t *dst = b->unpacked + i * unpacked_stride(j);
        unpack_part(j, x->rows[i] + (size_t)group * first, x->scales[i] + group * part, first, dst);
        unpack_part(j, x->rows[i] + (size_t)value * first, x->scales[i] + value * part, second,
                    dst + 2ul * first);
    }
}

static void open_face(const attend_job *j, const block *b, const tile *x, uint32_t group, face *ret)
{
    if (j->kv != TD_F8E4M3) {
        memcpy(ret->rows, x->rows, sizeof ret->rows);
        ret->key_at = key_at(j, group);
        ret->value_at = value_at(j, group);
        ret->type = j->kv;
        return;
    }
    unpack_group(j, b, x, group);
    for (uint32_t i = 0; i < ATTEND_TILE; i++)
        ret->rows[i] = b->unpacked + (i < x->n ? i : x->n - 1) * unpacked_stride(j);
    ret->key_at = 0;
    ret->value_at = j->gqa ? 2ul * j->key_dims : 0;
    ret->type = TD_BF16;
}

/* Rows as rows of f32. */
static void load_values(const attend_job *j, const block *b, const face *x, uint32_t n)
{
    uint32_t dims = j->value_dims;
    for (uint32_t i = 0; i < n; i++) {
        float *dst = b->values + i * b->out_stride;
        if (x->type == TD_BF16)
            j->f->widen(x->rows[i] + x->value_at, dst, dims);
        else
            memcpy(dst, x->rows[i] + x->value_at, dims * sizeof *dst);
        memset(dst + dims, 0, (attend_pad(dims) - dims) * sizeof *dst);
    }
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

/* Do so few queries meet values where they lie? */
static int in_place(const attend_job *j, const face *x, uint32_t n_q)
{
    return j->f->few_values && x->type == TD_BF16 && n_q <= ATTEND_FEW && j->value_dims % 16 == 0;
}

/* The queries [q0, q0 + n_q) of a group meet a tile whose values are loaded. */
static void meet(const attend_job *j, const block *b, const face *x, uint32_t q0, uint32_t n_q,
                 const states *st)
{
    const uint32_t *n = b->n + q0 % (b->n_rows * b->n_heads);
    float *p = b->p, *alpha = b->alpha, *o = st->o + q0 * b->out_stride;
    attend_scores(j->f, x->rows, x->key_at, j->key_dims, x->type, b->keys, b->q + q0 * b->q_stride,
                  b->q_stride, n_q, j->scale, p);
    j->f->shift(p, n, n_q, st->m + q0, alpha);
    td_exp_n(p, p, (size_t)n_q * ATTEND_TILE);
    td_exp_n(alpha, alpha, n_q);
    j->f->total(p, n_q, alpha, st->l + q0);
    uint32_t blocks = (j->value_dims + 15) / 16;
    if (in_place(j, x, n_q))
        j->f->few_values(p, n, n_q, alpha, x->rows, x->value_at, blocks, o, b->out_stride);
    else
        j->f->values(p, n, n_q, alpha, b->values, b->out_stride, blocks, o, b->out_stride);
}

/* Ranks from r0 on that each query of a group sees. */
static void count_ranks(const attend_job *j, const block *b, uint32_t row0, uint32_t r0)
{
    for (uint32_t i = row0; i < b->n_rows; i++) {
        uint32_t n = length(j, b->t + i) - r0;
        n = n < ATTEND_TILE ? n : ATTEND_TILE;
        for (uint32_t h = 0; h < b->n_heads; h++)
            b->n[i * b->n_heads + h] = n;
    }
}

/* x[0] is the tile at r0, already asked for; x[1] becomes the one behind it. */
static void add_tile(const attend_job *j, const block *b, uint32_t r0, const states *st, tile x[2])
{
    uint32_t row0 = first_row(j, b, r0), all = b->n_rows * b->n_heads, skip = row0 * b->n_heads;
    uint32_t last = b->t + b->n_rows - 1, next = r0 + ATTEND_TILE;
    count_ranks(j, b, row0, r0);
    for (uint32_t g = 0; g < b->n_groups; g++) {
        face f;
        open_face(j, b, &x[0], b->group0 + g, &f);
        if (!in_place(j, &f, all - skip))
            load_values(j, b, &f, x[0].n);
        if (g + 1 < b->n_groups) {
            fetch(j, &x[0], b->group0 + g + 1);
        } else if (next < length(j, last)) {
            find_tile(j, last, next, &x[1]);
            fetch(j, &x[1], b->group0);
        }
        meet(j, b, &f, g * all + skip, all - skip, st);
    }
}

/* f(j, b, query) for each query of rows [row0, n_rows). */
typedef void (*query_fn)(const attend_job *j, const block *b, uint32_t q);

static void each_query(const attend_job *j, const block *b, uint32_t row0, query_fn f)
{
    for (uint32_t g = 0; g < b->n_groups; g++)
        for (uint32_t i = row0 * b->n_heads; i < b->n_rows * b->n_heads; i++)
            f(j, b, g * b->n_rows * b->n_heads + i);
}

static void reset(const block *b, const states *st, uint32_t q)
{
    st->m[q] = -INFINITY;
    st->l[q] = 0.0f;
    memset(st->o + q * b->out_stride, 0, b->out_stride * sizeof *st->o);
}

static void reset_sum(const attend_job *j, const block *b, uint32_t q)
{
    reset(b, &b->sum, q);
}

static void reset_cur(const attend_job *j, const block *b, uint32_t q)
{
    reset(b, &b->cur, q);
}

static void merge(const attend_job *j, const block *b, uint32_t q)
{
    float *m = &b->sum.m[q], max = *m > b->cur.m[q] ? *m : b->cur.m[q];
    float x = td_exp(*m - max), y = td_exp(b->cur.m[q] - max);
    *m = max;
    b->sum.l[q] = b->sum.l[q] * x + b->cur.l[q] * y;
    j->f->merge(b->sum.o + q * b->out_stride, x, b->cur.o + q * b->out_stride, y,
                (uint32_t)attend_pad(j->value_dims));
}

/* Splits meet left to right; the first is the sum. */
static void attend_block(const attend_job *j, const block *b)
{
    uint32_t last = b->t + b->n_rows - 1, n = length(j, last);
    tile x[2];
    find_tile(j, last, 0, &x[0]);
    fetch(j, &x[0], b->group0);
    for (uint32_t s0 = 0; s0 < n; s0 += SPLIT) {
        uint32_t row0 = first_row(j, b, s0), s1 = n - s0 < SPLIT ? n : s0 + SPLIT;
        each_query(j, b, row0, s0 ? reset_cur : reset_sum);
        for (uint32_t r0 = s0; r0 < s1; r0 += ATTEND_TILE) {
            add_tile(j, b, r0, s0 ? &b->cur : &b->sum, x);
            x[0] = x[1];
        }
        if (s0)
            each_query(j, b, row0, merge);
    }
}

/* ---- items ---- */

/* Index of a query's row and head within [T][H]. */
static size_t place(const attend_job *j, const block *b, uint32_t q)
{
    uint32_t h = q % b->n_heads, i = q / b->n_heads % b->n_rows, g = q / b->n_heads / b->n_rows;
    return (size_t)(b->t + i) * j->n_heads + b->head0 + g * b->n_heads + h;
}

static void load_query(const attend_job *j, const block *b, uint32_t at)
{
    size_t from = place(j, b, at);
    float *q = b->q + at * b->q_stride;
    if (j->gqa) {
        memcpy(q, j->gqa->q + from * j->key_dims, j->key_dims * sizeof *q);
        return;
    }
    const td_attend_mla *a = j->mla;
    memcpy(q, a->q_lat + from * a->latent, a->latent * sizeof *q);
    memcpy(q + a->latent, a->q + from * (a->nope + a->rope_dims) + a->nope,
           a->rope_dims * sizeof *q);
}

static void store_output(const attend_job *j, const block *b, uint32_t q)
{
    float *out = (j->mla ? j->mla->o_lat : j->gqa->o) + place(j, b, q) * j->value_dims;
    j->f->divide(b->sum.o + q * b->out_stride, b->sum.l[q], out, j->value_dims);
    for (uint32_t d = 0; j->gqa && j->c->q.o.act == TD_BF16 && d < j->value_dims; d++)
        out[d] = ref_round(TD_BF16, out[d]);
}

static size_t work_floats(const attend_job *j)
{
    size_t k = attend_stride(j->key_dims), o = attend_stride(j->value_dims);
    size_t q = (size_t)j->most * j->part_groups * j->group_heads;
    size_t unpacked = j->kv == TD_F8E4M3 ? ATTEND_TILE * unpacked_stride(j) / sizeof(float) : 0;
    return ATTEND_TURNED + ATTEND_TILE * o + unpacked + q * (k + ATTEND_TILE + 2 * o + 6) + 16;
}

static states take_states(float **p, size_t n, size_t out_stride)
{
    states st = {.o = *p, .m = *p + n * out_stride, .l = *p + n * (out_stride + 1)};
    *p += n * (out_stride + 2);
    return st;
}

static uint32_t least(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

static block open_block(const attend_job *j, uint32_t item, float *work)
{
    uint32_t part = item % j->n_parts;
    const uint32_t *start = j->starts + item / j->n_parts;
    block b = {.t = start[0], .n_rows = start[1] - start[0]};
    b.group0 = j->gqa ? part * j->part_groups : 0;
    b.n_groups = j->gqa ? least(j->part_groups, j->gqa->n_kv_heads - b.group0) : 1;
    b.head0 = j->gqa ? b.group0 * j->group_heads : part * j->group_heads;
    b.n_heads = j->gqa ? j->group_heads : least(j->group_heads, j->n_heads - b.head0);
    b.q_stride = attend_stride(j->key_dims);
    b.out_stride = attend_stride(j->value_dims);
    size_t n = (size_t)b.n_groups * b.n_rows * b.n_heads;
    b.keys = work;
    b.values = b.keys + ATTEND_TURNED;
    b.q = b.values + ATTEND_TILE * b.out_stride;
    if (j->kv == TD_F8E4M3) {
        b.unpacked = (uint8_t *)b.q;
        b.q += ATTEND_TILE * unpacked_stride(j) / sizeof(float);
    }
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
    each_query(j, &b, 0, load_query);
    attend_block(j, &b);
    each_query(j, &b, 0, store_output);
}

/* ---- launch plan ---- */

static uint32_t most_rows(const attend_job *j, uint32_t heads)
{
    uint32_t rows = QUERY_FLOATS / (heads * (j->key_dims + j->value_dims));
    return rows > ATTEND_TILE ? ATTEND_TILE : rows ? rows : 1;
}

/* Cut the step's rows into blocks of at most j->most, which becomes the longest; returns how many.
 */
static uint32_t cut_rows(attend_job *j, uint32_t *starts)
{
    uint32_t n = 0, longest = 1;
    for (uint32_t t = 0; t < j->s->n_rows; t++) {
        if (t == 0 || t - starts[n - 1] == j->most || !attend_follows(j->s, t - 1) ||
            !dense(j, t - 1) || !dense(j, t))
            starts[n++] = t;
        longest = t + 1 - starts[n - 1] > longest ? t + 1 - starts[n - 1] : longest;
    }
    starts[n] = j->s->n_rows;
    j->starts = starts;
    j->most = longest;
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
        td_cpu_run(j->c, attend_item, j, n_blocks * j->n_parts, cost(j));
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
                    .part_groups = 1};
    j.row = td_kv_row_mla(a->kv, a->latent, a->rope_dims);
    j.most = most_rows(&j, a->n_heads);
    uint32_t n = cut_rows(&j, c->lists), threads = q->o.n_threads;
    /* few blocks are spread over threads by heads, though each then gathers the tile */
    uint32_t parts = n >= 4 * threads || n % threads == 0 ? 1 : threads;
    j.group_heads = (a->n_heads + parts - 1) / parts;
    j.n_parts = (a->n_heads + j.group_heads - 1) / j.group_heads;
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
                    .group_heads = a->n_heads / a->n_kv_heads};
    j.row = td_kv_row_gqa(a->kv, a->n_kv_heads, a->dims);
    j.most = most_rows(&j, j.group_heads);
    uint32_t n = cut_rows(&j, c->lists), threads = q->o.n_threads;
    /* many groups to an item read the pool's rows in long pieces; but threads want items, and the
     * cache has its bound */
    uint32_t wanted = threads == 1 ? 1 : 4 * threads, parts = (wanted + n - 1) / n;
    uint32_t room = QUERY_FLOATS / (j.most * j.group_heads * 2 * a->dims);
    j.part_groups = (a->n_kv_heads + parts - 1) / parts;
    j.part_groups = least(j.part_groups, room ? room : 1);
    j.n_parts = (a->n_kv_heads + j.part_groups - 1) / j.part_groups;
    launch(&j, n);
}
