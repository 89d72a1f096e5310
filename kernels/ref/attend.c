/* SPDX-License-Identifier: Apache-2.0 */
/* Attention (numerics, rule 5): an ordered list of positions in tiles of 64 ranks; tiles merge left
 * to right with the running max, splits of 8 tiles merge left to right. One kernel for MLA
 * (absorbed; the value is the latent part of the key row) and GQA (tile row = key | value of one KV
 * head). */
#include <math.h>

#include "kernels/math.h"
#include "kernels/ref/ref.h"

#include "base/banned.h"

enum { TILE = TD_KPLAN_ATTN_TILE, SPLIT = TD_KPLAN_ATTN_TILE * TD_KPLAN_ATTN_SPLIT };

typedef struct attend_job {
    td_queue *q;
    const td_step *s;
    td_dtype kv;
    uint64_t layer_offset;
    td_kv_row row;
    uint32_t key_dims, value_dims, value_at; /* within a tile row of tile_dims */
    uint32_t tile_dims;
    float scale;
    uint32_t n_groups, group_heads,
        n_heads; /* an item: one row, one group of heads that share tile rows */
    const uint32_t *selected, *n_selected;
    uint32_t topk;
    const td_attend_mla *mla; /* one of the two */
    const td_attend_gqa *gqa;
} attend_job;

/* Running state of one head: max, sum, un-normalised output. */
typedef struct head_state {
    float m, l;
    float *o;
} head_state;

static void load_tile(const attend_job *j, uint32_t t, uint32_t group, uint32_t rank, uint32_t n,
                      float *tile)
{
    const uint32_t *sel = j->selected ? j->selected + (size_t)t * j->topk : NULL;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t pos = sel ? sel[rank + i] : rank + i;
        ref_kv at = ref_kv_at(j->s, t, pos, j->layer_offset, j->kv, &j->row);
        float *dst = tile + (size_t)i * j->tile_dims;
        if (j->mla) {
            uint32_t c = j->value_dims, scales = td_kv_part_scales(j->kv, c);
            td_ref_kv_load(&at, 0, 0, dst, c);
            td_ref_kv_load(&at, c, scales, dst + c, j->key_dims - c);
            continue;
        }
        uint32_t dims = j->key_dims, scales = td_kv_part_scales(j->kv, dims);
        uint32_t value = j->n_groups + group;
        td_ref_kv_load(&at, group * dims, group * scales, dst, dims);
        td_ref_kv_load(&at, value * dims, value * scales, dst + dims, dims);
    }
}

/* o[d] = o[d] * alpha + sum over ranks of p[r] * value[r][d], ranks in order. */
static void add_values(const attend_job *j, float alpha, const float *p, const float *tile,
                       uint32_t n, float *o)
{
    const float *v = tile + j->value_at;
    uint32_t d = 0;
    for (; d + LANES <= j->value_dims; d += LANES) {
        v4 acc[4];
        memcpy(acc, o + d, sizeof acc);
        for (int i = 0; i < 4; i++)
            acc[i] = acc[i] * alpha;
        for (uint32_t r = 0; r < n; r++) {
            v4 x[4], w = {p[r], p[r], p[r], p[r]};
            memcpy(x, v + (size_t)r * j->tile_dims + d, sizeof x);
            for (int i = 0; i < 4; i++)
                acc[i] = acc[i] + w * x[i];
        }
        memcpy(o + d, acc, sizeof acc);
    }
    for (; d < j->value_dims; d++) {
        float acc = o[d] * alpha;
        for (uint32_t r = 0; r < n; r++)
            acc += p[r] * v[(size_t)r * j->tile_dims + d];
        o[d] = acc;
    }
}

static void add_tile(const attend_job *j, const float *q, const float *tile, uint32_t n,
                     head_state *h)
{
    float p[TILE], max = h->m;
    for (uint32_t r = 0; r < n; r++) {
        p[r] = ref_dot(q, tile + (size_t)r * j->tile_dims, j->key_dims) * j->scale;
        max = p[r] > max ? p[r] : max;
    }
    for (uint32_t r = 0; r < n; r++)
        p[r] -= max;
    td_exp_n(p, p, n);
    float alpha = td_exp(h->m - max);
    h->l = h->l * alpha + ref_sum(p, n);
    h->m = max;
    add_values(j, alpha, p, tile, n, h->o);
}

static void merge(head_state *a, const head_state *b, uint32_t dims)
{
    float max = a->m > b->m ? a->m : b->m, x = td_exp(a->m - max), y = td_exp(b->m - max);
    a->m = max;
    a->l = a->l * x + b->l * y;
    for (uint32_t d = 0; d < dims; d++)
        a->o[d] = a->o[d] * x + b->o[d] * y;
}

static void reset(head_state *h, uint32_t dims)
{
    h->m = -INFINITY;
    h->l = 0.0f;
    memset(h->o, 0, dims * sizeof *h->o);
}

static void load_query(const attend_job *j, uint32_t t, uint32_t head, float *q)
{
    if (j->gqa) {
        memcpy(q, j->gqa->q + ((size_t)t * j->n_heads + head) * j->key_dims,
               j->key_dims * sizeof *q);
        return;
    }
    const td_attend_mla *a = j->mla;
    size_t row = (size_t)t * j->n_heads + head;
    memcpy(q, a->q_lat + row * a->latent, a->latent * sizeof *q);
    memcpy(q + a->latent, a->q + row * (a->nope + a->rope_dims) + a->nope,
           a->rope_dims * sizeof *q);
}

static void store_output(const attend_job *j, uint32_t t, uint32_t head, const head_state *h)
{
    float *out =
        (j->mla ? j->mla->o_lat : j->gqa->o) + ((size_t)t * j->n_heads + head) * j->value_dims;
    td_dtype round = j->mla ? TD_F32 : j->q->o.act;
    for (uint32_t d = 0; d < j->value_dims; d++)
        out[d] = ref_round(round, h->o[d] / h->l);
}

/* One item's share of the thread's scratch. */
typedef struct group_work {
    uint32_t t, group, first_head, n_heads;
    head_state *sum, *cur; /* over all splits; over the split at hand */
    float *q, *tile;
} group_work;

static group_work share_scratch(const attend_job *j, uint32_t item, float *scratch)
{
    group_work w = {.t = item / j->n_groups, .group = item % j->n_groups};
    w.first_head = w.group * j->group_heads;
    uint32_t left = j->n_heads - w.first_head;
    w.n_heads = left < j->group_heads ? left : j->group_heads;
    w.sum = (head_state *)scratch;
    w.cur = w.sum + w.n_heads;
    w.tile = (float *)(w.cur + w.n_heads);
    w.q = w.tile + (size_t)TILE * j->tile_dims;
    float *o = w.q + (size_t)w.n_heads * j->key_dims;
    for (uint32_t h = 0; h < w.n_heads; h++, o += 2ul * j->value_dims) {
        w.sum[h].o = o;
        w.cur[h].o = o + j->value_dims;
    }
    return w;
}

/* Ranks [s0, s1) of the row's list into cur. */
static void attend_split(const attend_job *j, const group_work *w, uint32_t s0, uint32_t s1)
{
    for (uint32_t h = 0; h < w->n_heads; h++)
        reset(&w->cur[h], j->value_dims);
    for (uint32_t r0 = s0; r0 < s1; r0 += TILE) {
        uint32_t len = s1 - r0 < TILE ? s1 - r0 : TILE;
        load_tile(j, w->t, w->group, r0, len, w->tile);
        for (uint32_t h = 0; h < w->n_heads; h++)
            add_tile(j, w->q + (size_t)h * j->key_dims, w->tile, len, &w->cur[h]);
    }
}

static void attend_item(void *arg, uint32_t item, uint32_t thread)
{
    const attend_job *j = arg;
    group_work w = share_scratch(j, item, ref_scratch(j->q, thread));
    uint32_t n = j->selected ? j->n_selected[w.t] : j->s->positions[w.t] + 1;
    for (uint32_t h = 0; h < w.n_heads; h++)
        load_query(j, w.t, w.first_head + h, w.q + (size_t)h * j->key_dims);
    for (uint32_t s0 = 0; s0 < n; s0 += SPLIT) {
        attend_split(j, &w, s0, n - s0 < SPLIT ? n : s0 + SPLIT);
        for (uint32_t h = 0; h < w.n_heads; h++) {
            head_state first = w.sum[h];
            if (s0)
                merge(&w.sum[h], &w.cur[h], j->value_dims);
            else { /* the first split is the sum: swap the buffers */
                w.sum[h] = w.cur[h];
                w.cur[h].o = first.o;
            }
        }
    }
    for (uint32_t h = 0; h < w.n_heads; h++)
        store_output(j, w.t, w.first_head + h, &w.sum[h]);
}

void td_ref_attend_mla(td_queue *q, const td_step *s, const td_attend_mla *a)
{
    uint32_t row = a->latent + a->rope_dims;
    attend_job j = {
        .q = q, .s = s, .kv = a->kv, .layer_offset = a->layer_offset, .scale = a->scale, .mla = a};
    j.row = td_kv_row_mla(a->kv, a->latent, a->rope_dims);
    j.key_dims = j.tile_dims = row;
    j.value_dims = a->latent;
    j.n_heads = a->n_heads;
    /* launch plan: few rows are spread over threads by heads, many rows by rows */
    uint32_t groups = s->n_rows >= q->o.n_threads ? 1 : q->o.n_threads;
    j.group_heads = (a->n_heads + groups - 1) / groups;
    j.n_groups = (a->n_heads + j.group_heads - 1) / j.group_heads;
    j.selected = a->selected;
    j.n_selected = a->n_selected;
    j.topk = a->topk;
    td_pool_run(q->pool, attend_item, &j, s->n_rows * j.n_groups);
}

void td_ref_attend_gqa(td_queue *q, const td_step *s, const td_attend_gqa *a)
{
    attend_job j = {
        .q = q, .s = s, .kv = a->kv, .layer_offset = a->layer_offset, .scale = a->scale, .gqa = a};
    j.row = td_kv_row_gqa(a->kv, a->n_kv_heads, a->dims);
    j.key_dims = j.value_dims = j.value_at = a->dims;
    j.tile_dims = 2 * a->dims;
    j.n_heads = a->n_heads;
    j.n_groups = a->n_kv_heads;
    j.group_heads = a->n_heads / a->n_kv_heads;
    td_pool_run(q->pool, attend_item, &j, s->n_rows * j.n_groups);
}

typedef struct write_job {
    td_queue *q;
    const td_step *s;
    const td_mla_write *mla;
    const td_gqa_write *gqa;
} write_job;

static void mla_write_item(void *arg, uint32_t t, uint32_t thread)
{
    const write_job *j = arg;
    const td_mla_write *a = j->mla;
    uint32_t row = a->latent + a->rope.dims, width = a->nope + a->rope.dims;
    const float *cos = j->s->rope_cos + (size_t)t * (a->rope.dims / 2);
    const float *sin = j->s->rope_sin + (size_t)t * (a->rope.dims / 2);
    const float *src = a->kv_a + (size_t)t * row;
    float *buf = ref_scratch(j->q, thread);
    td_ref_rmsnorm(src, a->norm->data, a->eps, a->latent, buf);
    memcpy(buf + a->latent, src + a->latent, a->rope.dims * sizeof *buf);
    td_ref_rope(buf + a->latent, a->rope, cos, sin);
    td_kv_row r = td_kv_row_mla(a->kv, a->latent, a->rope.dims);
    ref_kv at = ref_kv_at(j->s, t, j->s->positions[t], a->layer_offset, a->kv, &r);
    td_ref_kv_store(&at, 0, 0, buf, a->latent);
    td_ref_kv_store(&at, a->latent, td_kv_part_scales(a->kv, a->latent), buf + a->latent,
                    a->rope.dims);
    for (uint32_t h = 0; h < a->n_heads; h++)
        td_ref_rope(a->q + ((size_t)t * a->n_heads + h) * width + a->nope, a->rope, cos, sin);
}

void td_ref_mla_write(td_queue *q, const td_step *s, const td_mla_write *a)
{
    write_job j = {.q = q, .s = s, .mla = a};
    td_pool_run(q->pool, mla_write_item, &j, s->n_rows);
}

static void gqa_write_item(void *arg, uint32_t t, uint32_t thread)
{
    const write_job *j = arg;
    const td_gqa_write *a = j->gqa;
    uint32_t dims = a->dims, kv = a->n_kv_heads, scales = td_kv_part_scales(a->kv, dims);
    td_kv_row r = td_kv_row_gqa(a->kv, kv, dims);
    const float *cos = j->s->rope_cos + (size_t)t * (a->rope.dims / 2);
    const float *sin = j->s->rope_sin + (size_t)t * (a->rope.dims / 2);
    ref_kv at = ref_kv_at(j->s, t, j->s->positions[t], a->layer_offset, a->kv, &r);
    float *buf = ref_scratch(j->q, thread);
    for (uint32_t h = 0; h < kv; h++) {
        memcpy(buf, a->k + ((size_t)t * kv + h) * dims, dims * sizeof *buf);
        if (a->k_norm)
            td_ref_rmsnorm(buf, a->k_norm->data, a->eps, dims, buf);
        td_ref_rope(buf, a->rope, cos, sin);
        td_ref_kv_store(&at, h * dims, h * scales, buf, dims);
        td_ref_kv_store(&at, (kv + h) * dims, (kv + h) * scales, a->v + ((size_t)t * kv + h) * dims,
                        dims);
    }
    for (uint32_t h = 0; h < a->n_heads; h++) {
        float *q = a->q + ((size_t)t * a->n_heads + h) * dims;
        if (a->q_norm)
            td_ref_rmsnorm(q, a->q_norm->data, a->eps, dims, q);
        td_ref_rope(q, a->rope, cos, sin);
    }
}

void td_ref_gqa_write(td_queue *q, const td_step *s, const td_gqa_write *a)
{
    write_job j = {.q = q, .s = s, .gqa = a};
    td_pool_run(q->pool, gqa_write_item, &j, s->n_rows);
}
