/* SPDX-License-Identifier: Apache-2.0 */
/* Attention and the indexer: rows are taken in groups whose partial results fit a scratch. */
#include <errno.h>

#include "kernels/gpu/inside.h"
#include "kernels/kplan.h"
#include "kernels/kv_row.h"

#include "base/banned.h"

enum { HEADS = 16, VALUE_DIMS_MAX = 512 };
#define PARTS_MAX ((size_t)256 << 20) /* bytes of partial results */

static uint32_t ceil_div(uint32_t a, uint32_t b)
{
    return a / b + (a % b != 0);
}

static uint32_t rows_that_fit(const td_step *s, size_t row_bytes)
{
    size_t n = PARTS_MAX / row_bytes;
    return n < 1 ? 1 : n < s->n_rows ? (uint32_t)n : s->n_rows;
}

/* FP8 rows are BF16 there, and each has scales. */
static size_t attend_lds(uint32_t key_dims, td_dtype kv)
{
    size_t tiles = ceil_div(key_dims, 32) + TD_KPLAN_ATTN_TILE / 32 + 128 / 16,
           size = kv == TD_F32 ? sizeof(float) : 2,
           pointers = (kv == TD_F8E4M3 ? 2 : 1) * sizeof(void *);
    return TD_KPLAN_ATTN_TILE * (pointers + HEADS * sizeof(float)) + HEADS * sizeof(float) +
           tiles * TD_K_TILE * size;
}

/* May 8 elements (FP8: 16) be loaded at once, from every row? */
static uint32_t rows_aligned(const td_step *s, const td_k_attend *a, size_t size)
{
    uint64_t all = (uintptr_t)s->kv_base | s->block_bytes | a->layer_offset |
                   (a->row_elems | a->key_at | a->value_at | a->group_step) * size;
    return all % 16 == 0 && (a->key_dims | a->value_dims | a->key_part) % (size == 1 ? 16 : 8) == 0;
}

/* Where the scales of FP8 rows lie. */
static void find_scales(td_k_attend *a, td_kv_row row, uint32_t key_part, uint32_t group_scales,
                        uint32_t value_scale)
{
    a->scales_at = row.scales_at;
    a->n_scales = row.n_scales;
    a->key_part = key_part;
    a->group_scales = group_scales;
    a->value_scale = value_scale;
}

static kernel_id attend_kernel(td_dtype kv)
{
    return kv == TD_F8E4M3 ? K_attend_f8 : kv == TD_BF16 ? K_attend_bf16 : K_attend_f32;
}

static void attend(td_queue *q, const td_step *s, td_k_attend *a, td_dtype kv, uint32_t list_max)
{
    size_t size = td_dtype_bytes(kv);
    if (!td_gpu_pool_type(q, kv, 1))
        return;
    if (a->value_dims > VALUE_DIMS_MAX) {
        td_gpu_fail(q, -E2BIG);
        return;
    }
    a->step = td_gpu_step(q, s);
    a->vec = rows_aligned(s, a, size);
    a->n_splits = ceil_div(list_max, TD_KPLAN_ATTN_TILE * TD_KPLAN_ATTN_SPLIT);
    size_t heads = (size_t)a->n_heads * a->n_splits,
           row = heads * (a->value_dims + 2) * sizeof(float);
    uint32_t group = rows_that_fit(s, row);
    float *parts = td_gpu_scratch(q, &q->attend, group * row);
    if (!parts)
        return;
    a->part_ml = parts;
    a->part_o = parts + 2ul * group * heads;
    for (a->row0 = 0; a->row0 < s->n_rows; a->row0 += group) {
        a->n_rows = s->n_rows - a->row0 < group ? s->n_rows - a->row0 : group;
        uint64_t blocks =
            (uint64_t)a->n_rows * a->n_splits * a->n_groups * ceil_div(a->group_heads, HEADS);
        td_gpu_launch(q, attend_kernel(kv), blocks, attend_lds(a->key_dims, kv), a, sizeof *a);
        td_gpu_launch(q, K_attend_merge, (uint64_t)a->n_rows * a->n_heads, 0, a, sizeof *a);
    }
}

void td_gpu_attend_mla(td_queue *q, const td_step *s, const td_attend_mla *m)
{
    uint32_t row = m->latent + m->rope_dims, width = m->nope + m->rope_dims,
             list = m->selected && m->topk < s->max_context ? m->topk : s->max_context;
    td_k_attend a = {.q0 = m->q_lat,
                     .q0_dims = m->latent,
                     .q0_row = m->n_heads * m->latent,
                     .q0_head = m->latent,
                     .q1 = m->q,
                     .q1_dims = m->rope_dims,
                     .q1_row = m->n_heads * width,
                     .q1_head = width,
                     .q1_at = m->nope,
                     .scale = m->scale,
                     .n_heads = m->n_heads,
                     .n_groups = 1,
                     .group_heads = m->n_heads,
                     .key_dims = row,
                     .value_dims = m->latent,
                     .row_elems = row,
                     .layer_offset = m->layer_offset,
                     .selected = m->selected,
                     .n_selected = m->n_selected,
                     .topk = m->topk,
                     .out = m->o_lat};
    find_scales(&a, td_kv_row_mla(m->kv, m->latent, m->rope_dims), m->latent, 0, 0);
    attend(q, s, &a, m->kv, list);
}

void td_gpu_attend_gqa(td_queue *q, const td_step *s, const td_attend_gqa *m)
{
    td_k_attend a = {.q0 = m->q,
                     .q0_dims = m->dims,
                     .q0_row = m->n_heads * m->dims,
                     .q0_head = m->dims,
                     .scale = m->scale,
                     .n_heads = m->n_heads,
                     .n_groups = m->n_kv_heads,
                     .group_heads = m->n_heads / m->n_kv_heads,
                     .key_dims = m->dims,
                     .value_dims = m->dims,
                     .row_elems = 2 * m->n_kv_heads * m->dims,
                     .value_at = m->n_kv_heads * m->dims,
                     .group_step = m->dims,
                     .layer_offset = m->layer_offset,
                     .out = m->o,
                     .round_out = q->o.act == TD_BF16};
    uint32_t scales = td_kv_part_scales(m->kv, m->dims);
    find_scales(&a, td_kv_row_gqa(m->kv, m->n_kv_heads, m->dims), m->dims, scales,
                m->n_kv_heads * scales);
    attend(q, s, &a, m->kv, s->max_context);
}

void td_gpu_index_select(td_queue *q, const td_step *s, const td_index_select *m)
{
    size_t size = td_dtype_bytes(m->index);
    if (!td_gpu_pool_type(q, m->index, 0))
        return;
    uint32_t head_tiles = ceil_div(m->n_heads, HEADS), steps = ceil_div(m->dims, 32);
    td_k_index a = {.step = td_gpu_step(q, s),
                    .q = m->q,
                    .weight = m->weight,
                    .scale = m->scale,
                    .n_heads = m->n_heads,
                    .dims = m->dims,
                    .topk = m->topk,
                    .layer_offset = m->layer_offset,
                    .selected = m->selected,
                    .n_selected = m->n_selected,
                    .margin = m->margin,
                    .error = q->dev_error};
    a.vec = ((uintptr_t)s->kv_base | s->block_bytes | a.layer_offset | m->dims * size) % 16 == 0 &&
            m->dims % 8 == 0;
    a.n_blocks = s->max_context > m->topk ? ceil_div(s->max_context, 64) : 0;
    a.stride = a.n_blocks * 64;
    uint32_t group = a.stride ? rows_that_fit(s, a.stride * sizeof(float)) : s->n_rows;
    a.scores = td_gpu_scratch(q, &q->scores, (size_t)group * a.stride * sizeof(float) + 4);
    if (!a.scores)
        return;
    size_t lds = (size_t)head_tiles * (HEADS * 64 * sizeof(float) + steps * TD_K_TILE * size);
    for (; a.row0 < s->n_rows; a.row0 += group) {
        a.n_rows = s->n_rows - a.row0 < group ? s->n_rows - a.row0 : group;
        td_gpu_launch(q, m->index == TD_BF16 ? K_index_score_bf16 : K_index_score_f32,
                      (uint64_t)a.n_rows * a.n_blocks, lds, &a, sizeof a);
        td_gpu_launch(q, K_index_pick, a.n_rows, TD_K_LDS_PICK, &a, sizeof a);
    }
}
