/* SPDX-License-Identifier: Apache-2.0 */
/* Inside of the reference backend: plain C for x86-64-v2, the specification that other backends are
 * checked against. Lanes lie across outputs and K is walked in a fixed order; sums multiply, then
 * add. Operands are kept as f32 whose values were rounded to act; weights as f32 panels of 16
 * outputs, [N/16][K][16], the last panel filled with zeros. */
#ifndef TD_KERNELS_REF_REF_H
#define TD_KERNELS_REF_REF_H

#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

#include "kernels/kernels.h"
#include "kernels/kplan.h"
#include "kernels/kv_row.h"
#include "kernels/ref/pool.h"

enum { LANES = 16 };

typedef float v4 __attribute__((vector_size(16)));

struct td_tensor {
    uint32_t slabs, n, k, n_panels; /* a vector has k = 0 */
    td_weight_format format;        /* of the checkpoint; ref keeps the decoded values */
    float *data;
    uint64_t bytes;
};

struct td_queue {
    td_backend_options o;
    td_pool *pool;
    _Atomic int error;
    float *thread_scratch; /* n_threads * thread_floats */
    size_t thread_floats;
    float *scores; /* index scores: rows of max_context */
    size_t score_floats;
};

static inline const float *ref_panel(const td_tensor *w, uint32_t slab, uint32_t panel)
{
    return w->data + ((size_t)slab * w->n_panels + panel) * w->k * LANES;
}

static inline float *ref_scratch(td_queue *q, uint32_t thread)
{
    return q->thread_scratch + (size_t)thread * q->thread_floats;
}

static inline void ref_fail(td_queue *q, int code)
{
    int none = 0;
    atomic_compare_exchange_strong(&q->error, &none, code);
}

static inline float ref_bf16_to_f32(uint16_t b)
{
    uint32_t u = (uint32_t)b << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

/* To nearest even; NaN stays NaN. */
static inline uint16_t ref_f32_to_bf16(float f)
{
    uint32_t u;
    memcpy(&u, &f, 4);
    uint32_t r = (u + 0x7fffu + (u >> 16 & 1)) >> 16;
    return (uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16 | 0x40) : r);
}

static inline float ref_round(td_dtype t, float f)
{
    return t == TD_BF16 ? ref_bf16_to_f32(ref_f32_to_bf16(f)) : f;
}

/* Fixed tree over 16 lane sums: vectors pairwise, then lanes pairwise. */
static inline float ref_join(const v4 s[4])
{
    v4 v = (s[0] + s[1]) + (s[2] + s[3]);
    return (v[0] + v[1]) + (v[2] + v[3]);
}

/* sum a[i] * b[i]: element i in lane i mod 16. */
static inline float ref_dot(const float *a, const float *b, uint32_t n)
{
    v4 s[4] = {{0}};
    uint32_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < 4; j++) {
            v4 x, y;
            memcpy(&x, a + i + 4 * j, 16);
            memcpy(&y, b + i + 4 * j, 16);
            s[j] = s[j] + x * y;
        }
    for (; i < n; i++)
        s[i % LANES / 4][i % 4] += a[i] * b[i];
    return ref_join(s);
}

static inline float ref_sum(const float *a, uint32_t n)
{
    v4 s[4] = {{0}};
    uint32_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < 4; j++) {
            v4 x;
            memcpy(&x, a + i + 4 * j, 16);
            s[j] = s[j] + x;
        }
    for (; i < n; i++)
        s[i % LANES / 4][i % 4] += a[i];
    return ref_join(s);
}

/* Rotate the first 2 * pairs values of x in place. */
void td_ref_rope(float *x, td_rope_form form, const float *cos, const float *sin);
/* Where position pos of row t's sequence has its row of row_bytes. */
static inline uint8_t *ref_kv_row(const td_step *s, uint32_t t, uint32_t pos, uint64_t layer_offset,
                                  size_t row_bytes)
{
    uint32_t block = s->tables[(size_t)s->seq_of[t] * s->table_stride + pos / 64];
    return s->kv_base + block * s->block_bytes + layer_offset + (pos % 64) * row_bytes;
}
void td_ref_store(uint8_t *dst, const float *src, uint32_t n, td_dtype t);
void td_ref_load(float *dst, const uint8_t *src, uint32_t n, td_dtype t);

/* One row of keys or values in the pool. */
typedef struct ref_kv {
    td_dtype type;
    uint8_t *row;
    float *scales; /* where the type has some */
} ref_kv;

static inline ref_kv ref_kv_at(const td_step *s, uint32_t t, uint32_t pos, uint64_t layer_offset,
                               td_dtype type, const td_kv_row *r)
{
    return (ref_kv){type, ref_kv_row(s, t, pos, layer_offset, r->bytes),
                    (float *)(void *)ref_kv_row(s, t, pos, layer_offset + r->scales_at,
                                                r->n_scales * sizeof(float))};
}

/* A part of n elements that begins at the row's element elem and scale scale (kernels/kv_row.h). */
void td_ref_kv_store(const ref_kv *at, uint32_t elem, uint32_t scale, const float *src, uint32_t n);
void td_ref_kv_load(const ref_kv *at, uint32_t elem, uint32_t scale, float *dst, uint32_t n);
/* y = rmsnorm(x) * w before rounding. */
void td_ref_rmsnorm(const float *x, const float *w, float eps, uint32_t n, float *y);

/* out[t][n] for n in a panel: dots of rows rows[0..n_rows) of a with one panel over [k0, k1). Used
 * by gemm, moe, route. */
typedef struct ref_rows {
    const float *a;
    size_t stride;
    const uint32_t *list; /* NULL: rows 0 .. n-1 */
    uint32_t n;
} ref_rows;

static inline uint32_t ref_row(const ref_rows *r, uint32_t i)
{
    return r->list ? r->list[i] : i;
}
/* One or two rows against one panel. */
void td_ref_dot1(const float *a, const float *panel, uint32_t k0, uint32_t k1, float out[LANES]);
void td_ref_dot2(const float *a, const float *b, const float *panel, uint32_t k0, uint32_t k1,
                 float out[2 * LANES]);

/* Cut n units into at most 4 items a thread; returns units per item (>= 1). */
static inline uint32_t ref_grain(const td_queue *q, uint32_t n)
{
    uint32_t parts = q->o.n_threads == 1 ? 1 : 4 * q->o.n_threads;
    uint32_t g = (n + parts - 1) / parts;
    return g ? g : 1;
}

/* Life and memory, shared by backends whose queue begins with a td_queue. init: on failure nothing
 * is kept. */
int td_ref_queue_init(td_queue *q, const td_backend_options *options, td_err *reterr_err);
void td_ref_queue_done(td_queue *q);
int td_ref_finish(td_queue *q);
void *td_ref_mem_alloc(td_queue *q, size_t bytes);
void td_ref_mem_free(td_queue *q, void *p);
void td_ref_copy(td_queue *q, void *dst, const void *src, size_t bytes);
/* Experts, weights and margin of row t, whose scores are there. */
void td_ref_choose(const td_route *a, uint32_t t);

void td_ref_embed(td_queue *q, const td_step *s, const td_tensor *table, float *x);
void td_ref_add_norm(td_queue *q, const td_step *s, float *x, const float *delta,
                     const td_tensor *w, float eps, uint32_t width, float *out, float *out_f32);
void td_ref_gemm(td_queue *q, const td_step *s, const td_gemm *g);
void td_ref_mla_write(td_queue *q, const td_step *s, const td_mla_write *a);
void td_ref_index_write(td_queue *q, const td_step *s, const td_index_write *a);
void td_ref_index_select(td_queue *q, const td_step *s, const td_index_select *a);
void td_ref_attend_mla(td_queue *q, const td_step *s, const td_attend_mla *a);
void td_ref_gqa_write(td_queue *q, const td_step *s, const td_gqa_write *a);
void td_ref_attend_gqa(td_queue *q, const td_step *s, const td_attend_gqa *a);
void td_ref_route(td_queue *q, const td_step *s, const td_route *a);
void td_ref_moe(td_queue *q, const td_step *s, const td_moe *a);
void td_ref_reduce_slices(td_queue *q, const td_step *s, const float *partial, uint32_t slices,
                          uint32_t n, float *out);
void td_ref_logits(td_queue *q, const td_step *s, const float *h, const td_tensor *head,
                   float *logits);
void td_ref_sample(td_queue *q, struct td_sample_row *rows, uint32_t n);

#endif
