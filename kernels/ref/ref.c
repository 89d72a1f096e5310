/* SPDX-License-Identifier: Apache-2.0 */
/* Life of the reference backend: queue, memory, weights, the table. */
#include "kernels/ref/ref.h"

#include <errno.h>
#include <stdlib.h>

#include "base/bug.h"
#include "kernels/formats.h"
#include "kernels/ref/int8.h"
#include "kernels/sample.h"

#include "base/banned.h"

static void *zeroed(size_t bytes)
{
    size_t n = (bytes + 63) / 64 * 64;
    void *p = aligned_alloc(64, n ? n : 64);
    if (p)
        memset(p, 0, n ? n : 64);
    return p;
}

static size_t max_size(size_t a, size_t b)
{
    return a > b ? a : b;
}

void td_ref_queue_done(td_queue *q)
{
    td_pool_close(q->pool);
    free(q->thread_scratch);
    free(q->scores);
    *q = (td_queue){0};
}

static void ref_close(td_queue *q)
{
    if (!q)
        return;
    td_ref_queue_done(q);
    free(q);
}

/* Attention: a tile of rows, and per head a query, two accumulators and their states. */
static size_t thread_floats(const td_backend_options *o)
{
    size_t attend = (size_t)TD_KPLAN_ATTN_TILE * (o->max_row_elems + 1) +
                    (size_t)o->max_heads * (3ul * o->max_row_elems + 8);
    size_t n = max_size(attend, 2ul * o->max_round_k);
    return (n + 63) / 16 * 16;
}

int td_ref_queue_init(td_queue *q, const td_backend_options *options, td_err *reterr_err)
{
    *q = (td_queue){.o = *options};
    q->thread_floats = thread_floats(options);
    q->score_floats = max_size(options->max_context, 1u << 18);
    q->thread_scratch = zeroed(options->n_threads * q->thread_floats * sizeof(float));
    q->scores = zeroed(q->score_floats * sizeof(float));
    int r = q->thread_scratch && q->scores
                ? td_pool_open(options->n_threads, options->cores, options->n_cores, &q->pool)
                : -ENOMEM;
    if (r < 0) {
        td_ref_queue_done(q);
        return td_err_set(reterr_err, r, "kernel threads: %s; lower --threads or free memory",
                          td_errno_text(r));
    }
    return 0;
}

static int ref_open(const td_backend_options *options, td_queue **ret_queue, td_err *reterr_err)
{
    td_queue *q = zeroed(sizeof *q);
    if (!q)
        return td_err_set(reterr_err, -ENOMEM, "out of memory for the kernel queue");
    int r = td_ref_queue_init(q, options, reterr_err);
    if (r < 0) {
        free(q);
        return r;
    }
    *ret_queue = q;
    return 0;
}

int td_ref_finish(td_queue *q)
{
    return atomic_exchange(&q->error, 0);
}

void *td_ref_mem_alloc(td_queue *q, size_t bytes)
{
    return zeroed(bytes);
}

void td_ref_mem_free(td_queue *q, void *p)
{
    free(p);
}

void td_ref_copy(td_queue *q, void *dst, const void *src, size_t bytes)
{
    memcpy(dst, src, bytes);
}

static float element(const td_weight_src *s, size_t at)
{
    uint16_t h;
    float f;
    if (s->dtype == TD_F32) {
        memcpy(&f, (const char *)s->base + at * 4, 4);
        return f;
    }
    memcpy(&h, (const char *)s->base + at * 2, 2);
    return s->dtype == TD_BF16 ? ref_bf16_to_f32(h) : td_f16_to_f32(h);
}

static td_tensor *tensor_new(uint32_t slabs, uint32_t n, uint32_t k, size_t floats)
{
    td_tensor *w = zeroed(sizeof(ref_mx));
    if (!w)
        return NULL;
    *w = (td_tensor){.slabs = slabs, .n = n, .k = k, .n_panels = (n + LANES - 1) / LANES};
    w->bytes = floats * sizeof(float);
    w->data = zeroed(w->bytes);
    if (!w->data) {
        free(w);
        return NULL;
    }
    return w;
}

static void ref_weight_free(td_tensor *w)
{
    if (!w)
        return;
    td_ref_mx_free((ref_mx *)w);
    free(w->data);
    free(w);
}

static int ref_weight_new(td_weight_format format, uint32_t n_slabs, uint32_t n, uint32_t k,
                          td_tensor **ret_w)
{
    size_t panels = (n + LANES - 1) / LANES, floats;
    if (__builtin_mul_overflow(panels * LANES * n_slabs, (size_t)k, &floats) ||
        floats > SIZE_MAX / 8)
        return -ENOMEM;
    td_tensor *w = tensor_new(n_slabs, n, k, floats);
    if (!w)
        return -ENOMEM;
    w->format = format;
    if (format == TD_W_MXFP4 && td_ref_mx_alloc((ref_mx *)w) < 0) {
        ref_weight_free(w);
        return -ENOMEM;
    }
    *ret_w = w;
    return 0;
}

static void ref_weight_fill(td_tensor *w, uint32_t slab, uint32_t n0, uint32_t n_rows,
                            const td_weight_src *src)
{
    int quantised = w->format == TD_W_FP8 || w->format == TD_W_MXFP4;
    TD_BUG_ON(slab >= w->slabs || n0 + n_rows > w->n);
    TD_BUG_ON(quantised ? !src->scales : src->dtype > TD_F16);
    for (uint32_t n = n0; n < n0 + n_rows; n++) {
        float *dst = w->data + ((size_t)slab * w->n_panels + n / LANES) * w->k * LANES + n % LANES;
        size_t at = slab * src->slab_stride + (n - n0) * src->n_stride;
        if (quantised) {
            (w->format == TD_W_FP8 ? td_fp8_decode_row : td_mx_decode_row)(
                (const uint8_t *)src->base + at, src->scales, n, w->k, LANES, dst);
            if (w->format == TD_W_MXFP4)
                td_ref_mx_fill((ref_mx *)w, slab, n, (const uint8_t *)src->base + at,
                               (const uint8_t *)src->scales + (size_t)n * (w->k / TD_MX_GROUP));
            continue;
        }
        for (uint32_t k = 0; k < w->k; k++)
            dst[(size_t)k * LANES] = element(src, at + k * src->k_stride);
    }
}

static int ref_vector_new(uint32_t n, const td_weight_src *src, td_tensor **ret_w)
{
    td_tensor *w = tensor_new(1, n, 0, n);
    if (!w)
        return -ENOMEM;
    for (uint32_t i = 0; i < n; i++)
        w->data[i] = element(src, i * src->n_stride);
    *ret_w = w;
    return 0;
}

static uint64_t ref_weight_bytes(const td_tensor *w)
{
    return w->bytes;
}

static void sample_item(void *arg, uint32_t item, uint32_t thread)
{
    td_sample_draw((struct td_sample_row *)arg + item);
}

void td_ref_sample(td_queue *q, struct td_sample_row *rows, uint32_t n)
{
    td_pool_run(q->pool, sample_item, rows, n);
}

const td_backend td_backend_ref = {
    .name = "cpu",
    .isa = "ref",
    .act_i8 = 1,
    .open = ref_open,
    .close = ref_close,
    .finish = td_ref_finish,
    .mem_alloc = td_ref_mem_alloc,
    .mem_free = td_ref_mem_free,
    .copy = td_ref_copy,
    .weight_new = ref_weight_new,
    .weight_fill = ref_weight_fill,
    .vector_new = ref_vector_new,
    .weight_free = ref_weight_free,
    .weight_bytes = ref_weight_bytes,
    .embed = td_ref_embed,
    .add_norm = td_ref_add_norm,
    .gemm = td_ref_gemm,
    .mla_write = td_ref_mla_write,
    .index_write = td_ref_index_write,
    .index_select = td_ref_index_select,
    .attend_mla = td_ref_attend_mla,
    .gqa_write = td_ref_gqa_write,
    .attend_gqa = td_ref_attend_gqa,
    .route = td_ref_route,
    .moe = td_ref_moe,
    .reduce_slices = td_ref_reduce_slices,
    .logits = td_ref_logits,
    .sample = td_ref_sample,
};
