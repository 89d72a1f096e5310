/* SPDX-License-Identifier: Apache-2.0 */
/* Ops that have a block for each row, and the sampler. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/gpu/inside.h"
#include "kernels/kv_row.h"
#include "kernels/sample.h"

#include "base/banned.h"

enum { ROOM = 16 }; /* LDS of a block's sum */

void td_gpu_embed(td_queue *q, const td_step *s, const td_tensor *table, float *x)
{
    td_k_embed a = {.step = td_gpu_step(q, s), .table = td_gpu_matrix(table), .x = x};
    td_gpu_launch(q, K_embed, s->n_rows, 0, &a, sizeof a);
}

void td_gpu_add_norm(td_queue *q, const td_step *s, float *x, const float *delta,
                     const td_tensor *w, float eps, uint32_t width, float *out, float *out_f32)
{
    td_k_add_norm a = {.step = td_gpu_step(q, s),
                       .x = x,
                       .delta = delta,
                       .w = w->data,
                       .eps = eps,
                       .width = width,
                       .round = q->o.act == TD_BF16,
                       .out = out,
                       .out_f32 = out_f32};
    td_gpu_launch(q, K_add_norm, s->n_rows, ROOM, &a, sizeof a);
}

void td_gpu_reduce_slices(td_queue *q, const td_step *s, const float *partial, uint32_t slices,
                          uint32_t n, float *out)
{
    td_k_reduce a = {td_gpu_step(q, s), partial, slices, n, out};
    td_gpu_launch(q, K_reduce_slices, s->n_rows, 0, &a, sizeof a);
}

void td_gpu_mla_write(td_queue *q, const td_step *s, const td_mla_write *w)
{
    if (!td_gpu_pool_type(q, w->kv, 1))
        return;
    td_kv_row row = td_kv_row_mla(w->kv, w->latent, w->rope.dims);
    size_t all = w->kv == TD_F8E4M3 ? row.elems * sizeof(float) : 0;
    td_k_mla_write a = {.step = td_gpu_step(q, s),
                        .kv_a = w->kv_a,
                        .norm = w->norm->data,
                        .eps = w->eps,
                        .q = w->q,
                        .n_heads = w->n_heads,
                        .latent = w->latent,
                        .nope = w->nope,
                        .interleave = (uint32_t)w->rope.interleave,
                        .rope_dims = w->rope.dims,
                        .kv = w->kv,
                        .n_scales = row.n_scales,
                        .layer_offset = w->layer_offset,
                        .scales_at = row.scales_at};
    td_gpu_launch(q, K_mla_write, s->n_rows, ROOM + all, &a, sizeof a);
}

void td_gpu_index_write(td_queue *q, const td_step *s, const td_index_write *w)
{
    if (!td_gpu_pool_type(q, w->index, 0))
        return;
    td_k_index_write a = {.step = td_gpu_step(q, s),
                          .k = w->k,
                          .norm = w->norm->data,
                          .bias = w->bias->data,
                          .eps = w->eps,
                          .q = w->q,
                          .n_heads = w->n_heads,
                          .dims = w->dims,
                          .interleave = (uint32_t)w->rope.interleave,
                          .rope_dims = w->rope.dims,
                          .bf16 = w->index == TD_BF16,
                          .layer_offset = w->layer_offset};
    td_gpu_launch(q, K_index_write, s->n_rows, ROOM + w->dims * sizeof(float), &a, sizeof a);
}

void td_gpu_gqa_write(td_queue *q, const td_step *s, const td_gqa_write *w)
{
    if (!td_gpu_pool_type(q, w->kv, 1))
        return;
    td_kv_row row = td_kv_row_gqa(w->kv, w->n_kv_heads, w->dims);
    td_k_gqa_write a = {.step = td_gpu_step(q, s),
                        .q = w->q,
                        .k = w->k,
                        .v = w->v,
                        .q_norm = w->q_norm ? w->q_norm->data : NULL,
                        .k_norm = w->k_norm ? w->k_norm->data : NULL,
                        .eps = w->eps,
                        .n_heads = w->n_heads,
                        .n_kv_heads = w->n_kv_heads,
                        .dims = w->dims,
                        .interleave = (uint32_t)w->rope.interleave,
                        .rope_dims = w->rope.dims,
                        .kv = w->kv,
                        .n_scales = row.n_scales,
                        .layer_offset = w->layer_offset,
                        .scales_at = row.scales_at};
    td_gpu_launch(q, K_gqa_write, s->n_rows, 4ul * w->dims * sizeof(float), &a, sizeof a);
}

static uint64_t fraction(float p)
{
    return (uint64_t)((double)p * 9223372036854775808.0); /* 2^63 */
}

/* Smallest weight that min_p keeps: ceil(min_p * 2^32), at least 1. */
static uint64_t least_weight(float min_p)
{
    if (!(min_p > 0.0f))
        return 1;
    unsigned __int128 p = (unsigned __int128)fraction(min_p) << 32;
    uint64_t least = (uint64_t)((p + (((unsigned __int128)1 << 63) - 1)) >> 63);
    return least ? least : 1;
}

/* Device memory of a draw: rows, ids, edits, then x and w of each row. */
typedef struct draw_room {
    size_t ids, edits, work, row_bytes, bytes;
} draw_room;

static draw_room room_for(const td_sample_row *rows, uint32_t n)
{
    draw_room r = {.ids = (n * sizeof(td_k_draw) + 63) / 64 * 64};
    size_t n_edits = 0, vocab = 0;
    for (uint32_t i = 0; i < n; i++) {
        n_edits += rows[i].n_edits;
        vocab = rows[i].vocab > vocab ? rows[i].vocab : vocab;
    }
    r.edits = r.ids + (n * sizeof(uint32_t) + 63) / 64 * 64;
    r.work = r.edits + (n_edits * sizeof(td_logit_edit) + 63) / 64 * 64;
    r.row_bytes = (vocab + 7) / 8 * 8 * (sizeof(uint64_t) + sizeof(float));
    r.bytes = r.work + n * r.row_bytes;
    return r;
}

static void fill_draws(const td_sample_row *rows, uint32_t n, const draw_room *room, uint32_t *ids,
                       char *host, char *dev)
{
    size_t edits = room->edits;
    for (uint32_t i = 0; i < n; i++) {
        const td_sample_row *r = &rows[i];
        char *work = dev + room->work + i * room->row_bytes;
        td_k_draw d = {.logits = r->logits,
                       .vocab = r->vocab,
                       .top_k = r->top_k,
                       .temperature = r->temperature,
                       .top_p = r->top_p,
                       .min_p = r->min_p,
                       .frequency_penalty = r->frequency_penalty,
                       .presence_penalty = r->presence_penalty,
                       .repetition_penalty = r->repetition_penalty,
                       .random = r->random,
                       .least = least_weight(r->min_p),
                       .top_p_bits = r->top_p < 1.0f ? fraction(r->top_p) : 0,
                       .edits = (const td_logit_edit *)(void *)(dev + edits),
                       .n_edits = r->n_edits,
                       .fed = r->fed,
                       .id = ids + i,
                       .w = (uint64_t *)(void *)work,
                       .x = (float *)(void *)(work + (r->vocab + 7ul) / 8 * 8 * sizeof(uint64_t))};
        memcpy(host + i * sizeof d, &d, sizeof d);
        if (r->n_edits)
            memcpy(host + edits, r->edits, r->n_edits * sizeof *r->edits);
        edits += r->n_edits * sizeof *r->edits;
    }
}

uint32_t *td_gpu_draw(td_queue *q, const td_sample_row *rows, uint32_t n, uint32_t *ids)
{
    draw_room room = room_for(rows, n);
    char *dev = td_gpu_scratch(q, &q->draws, room.bytes), *host = calloc(1, room.work);
    if (!dev || !host) {
        td_gpu_fail(q, -ENOMEM);
        free(host);
        return NULL;
    }
    ids = ids ? ids : (uint32_t *)(void *)(dev + room.ids);
    fill_draws(rows, n, &room, ids, host, dev);
    int r = td_gpu_send(q, dev, host, room.work);
    free(host);
    if (r < 0)
        td_gpu_fail(q, r);
    td_k_sample a = {(const td_k_draw *)(void *)dev};
    td_gpu_launch(q, K_sample, n, TD_K_LDS_SAMPLE, &a, sizeof a);
    return ids;
}

void td_gpu_sample(td_queue *q, td_sample_row *rows, uint32_t n)
{
    td_gpu *g = td_gpu_device();
    uint32_t *dev = td_gpu_draw(q, rows, n, NULL), *ids = calloc(n, sizeof *ids);
    int r = dev && ids ? g->ops->download(g, q->stream, ids, dev, n * sizeof *ids) : -ENOMEM;
    r = r < 0 ? r : g->ops->stream_wait(g, q->stream);
    for (uint32_t i = 0; r >= 0 && i < n; i++)
        rows[i].id = ids[i];
    if (r < 0)
        td_gpu_fail(q, r);
    free(ids);
}
