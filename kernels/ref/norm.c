/* SPDX-License-Identifier: Apache-2.0 */
/* Embedding, norms, rope, rows in and out of the pool. */
#include <math.h>

#include "kernels/math.h"
#include "kernels/ref/ref.h"

#include "base/banned.h"

void td_ref_rope(float *x, td_rope_form form, const float *cos, const float *sin)
{
    uint32_t pairs = form.dims / 2;
    uint32_t step = form.interleave ? 2 : 1, other = form.interleave ? 1 : pairs;
    for (uint32_t i = 0; i < pairs; i++) {
        float *a = x + (size_t)i * step, *b = a + other;
        float a0 = *a, b0 = *b;
        *a = a0 * cos[i] - b0 * sin[i];
        *b = b0 * cos[i] + a0 * sin[i];
    }
}

void td_ref_store(uint8_t *dst, const float *src, uint32_t n, td_dtype t)
{
    if (t == TD_F32) {
        memcpy(dst, src, n * sizeof *src);
        return;
    }
    for (uint32_t i = 0; i < n; i++) {
        uint16_t h = ref_f32_to_bf16(src[i]);
        memcpy(dst + 2ul * i, &h, 2);
    }
}

void td_ref_load(float *dst, const uint8_t *src, uint32_t n, td_dtype t)
{
    if (t == TD_F32) {
        memcpy(dst, src, n * sizeof *dst);
        return;
    }
    const uint16_t *h = __builtin_assume_aligned(src, 2);
    uint32_t *u = (uint32_t *)dst;
    for (uint32_t i = 0; i < n; i++)
        u[i] = (uint32_t)h[i] << 16;
}

void td_ref_rmsnorm(const float *x, const float *w, float eps, uint32_t n, float *y)
{
    float r = 1.0f / sqrtf(ref_dot(x, x, n) / (float)n + eps);
    for (uint32_t i = 0; i < n; i++)
        y[i] = x[i] * r * w[i];
}

typedef struct embed_job {
    const td_step *s;
    const td_tensor *table;
    float *x;
} embed_job;

static void embed_item(void *arg, uint32_t t, uint32_t thread)
{
    const embed_job *j = arg;
    const td_tensor *w = j->table;
    uint32_t id = j->s->ids[t];
    const float *src = ref_panel(w, 0, id / LANES) + id % LANES;
    for (uint32_t k = 0; k < w->k; k++)
        j->x[(size_t)t * w->k + k] = src[(size_t)k * LANES];
}

void td_ref_embed(td_queue *q, const td_step *s, const td_tensor *table, float *x)
{
    embed_job j = {s, table, x};
    td_pool_run(q->pool, embed_item, &j, s->n_rows);
}

typedef struct norm_job {
    td_dtype act;
    float *x, *out, *out_f32;
    const float *delta, *w;
    float eps;
    uint32_t width;
} norm_job;

static void norm_item(void *arg, uint32_t t, uint32_t thread)
{
    const norm_job *j = arg;
    size_t at = (size_t)t * j->width;
    float *x = j->x + at, *out = j->out + at;
    if (j->delta)
        for (uint32_t i = 0; i < j->width; i++)
            x[i] += j->delta[at + i];
    td_ref_rmsnorm(x, j->w, j->eps, j->width, out);
    if (j->out_f32)
        memcpy(j->out_f32 + at, out, j->width * sizeof *out);
    if (j->act == TD_BF16)
        for (uint32_t i = 0; i < j->width; i++)
            out[i] = ref_round(TD_BF16, out[i]);
}

void td_ref_add_norm(td_queue *q, const td_step *s, float *x, const float *delta,
                     const td_tensor *w, float eps, uint32_t width, float *out, float *out_f32)
{
    norm_job j = {q->o.act, x, out, out_f32, delta, w->data, eps, width};
    td_pool_run(q->pool, norm_item, &j, s->n_rows);
}

typedef struct reduce_job {
    const float *p;
    float *out;
    size_t plane; /* elements of one slice */
    uint32_t slices, n;
} reduce_job;

static void reduce_item(void *arg, uint32_t t, uint32_t thread)
{
    const reduce_job *j = arg;
    const float *p = j->p + (size_t)t * j->n;
    float *out = j->out + (size_t)t * j->n;
    size_t s = j->plane;
    for (uint32_t i = 0; i < j->n; i++) {
        const float *e = p + i;
        float v = e[0];
        if (j->slices == 2)
            v = e[0] + e[s];
        if (j->slices == 4)
            v = (e[0] + e[s]) + (e[2 * s] + e[3 * s]);
        if (j->slices == 8)
            v = ((e[0] + e[s]) + (e[2 * s] + e[3 * s])) +
                ((e[4 * s] + e[5 * s]) + (e[6 * s] + e[7 * s]));
        out[i] = v;
    }
}

void td_ref_reduce_slices(td_queue *q, const td_step *s, const float *partial, uint32_t slices,
                          uint32_t n, float *out)
{
    reduce_job j = {partial, out, (size_t)s->n_rows * n, slices, n};
    td_pool_run(q->pool, reduce_item, &j, s->n_rows);
}
