/* SPDX-License-Identifier: Apache-2.0 */
/* Weights into the kernels' tiles (kernels/hip/args.h) and onto the device. */
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "base/bug.h"
#include "kernels/formats.h"
#include "kernels/gpu/inside.h"

#include "base/banned.h"

/* The loader's threads take turns at the device. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* Bytes of a tile. */
static size_t tile_bytes(td_weight_format f)
{
    static const uint8_t bits[TD_WEIGHT_FORMATS] = {
        [TD_W_F32] = 32, [TD_W_BF16] = 16, [TD_W_FP8] = 8, [TD_W_MXFP4] = 4};
    return TD_K_TILE * bits[f] / 8u;
}

static uint32_t tiles_of(uint32_t n, uint32_t size)
{
    return n / size + (n % size != 0);
}

static td_tensor *tensor_new(td_tensor like)
{
    td_gpu *g = td_gpu_device();
    td_tensor *w = malloc(sizeof *w);
    if (!w)
        return NULL;
    *w = like;
    w->data = g->ops->mem_alloc(g, w->bytes);
    w->scales = w->data && w->scale_bytes ? g->ops->mem_alloc(g, w->scale_bytes) : NULL;
    if (w->data && (w->scales || !w->scale_bytes))
        return w;
    td_gpu_weight_free(w);
    return NULL;
}

int td_gpu_weight_new(td_weight_format format, uint32_t n_slabs, uint32_t n, uint32_t k,
                      td_tensor **ret_w)
{
    td_tensor like = {.format = format, .slabs = n_slabs, .n = n, .k = k};
    TD_BUG_ON((unsigned)format >= TD_WEIGHT_FORMATS);
    like.n_tiles = tiles_of(n, TD_K_TILE_N);
    like.k_tiles = tiles_of(k, TD_K_TILE_K);
    size_t tiles = (size_t)like.n_tiles * like.k_tiles;
    if (__builtin_mul_overflow(tiles * tile_bytes(format), (size_t)n_slabs, &like.bytes))
        return -ENOMEM;
    if (format == TD_W_MXFP4)
        like.scale_bytes = n_slabs * tiles * TD_K_TILE_N;
    if (format == TD_W_FP8) {
        like.scale_cols = tiles_of(k, TD_FP8_BLOCK);
        like.scale_bytes =
            (uint64_t)n_slabs * tiles_of(n, TD_FP8_BLOCK) * like.scale_cols * sizeof(float);
    }
    td_tensor *w = tensor_new(like);
    if (!w)
        return -ENOMEM;
    *ret_w = w;
    return 0;
}

static float f16_to_f32(uint16_t h)
{
    uint32_t e = h >> 10 & 31, m = h & 1023u, sign = (uint32_t)(h & 0x8000u) << 16, u;
    float f = (float)m * 5.9604644775390625e-8f; /* 2^-24 */
    if (e == 0)
        return sign ? -f : f;
    u = sign | (e == 31 ? 0x7f800000u : (e + 112) << 23) | m << 13;
    memcpy(&f, &u, 4);
    return f;
}

/* Element at of src as f32; exact. */
static float element(const td_weight_src *src, size_t at)
{
    const char *p = (const char *)src->base + at * td_dtype_bytes(src->dtype);
    uint16_t h;
    uint32_t u;
    float f;
    if (src->dtype == TD_F32) {
        memcpy(&f, p, 4);
        return f;
    }
    memcpy(&h, p, 2);
    if (src->dtype == TD_F16)
        return f16_to_f32(h);
    u = (uint32_t)h << 16;
    memcpy(&f, &u, 4);
    return f;
}

static void put(td_weight_format format, void *tiles, size_t at, float f)
{
    if (format == TD_W_F32) {
        ((float *)tiles)[at] = f;
        return;
    }
    uint32_t u;
    memcpy(&u, &f, 4);
    ((uint16_t *)tiles)[at] = (uint16_t)(u >> 16);
}

/* Row r of a tile row from the source's elements at; k runs on in the layout of TD_K_TILE. */
static void fill_row(const td_tensor *w, const td_weight_src *src, size_t at, uint32_t r,
                     uint8_t *tiles)
{
    const uint8_t *codes = (const uint8_t *)src->base + at;
    for (uint32_t k = 0; k < w->k; k++) {
        size_t to = (size_t)(k / 32) * TD_K_TILE + (k % 32 / 8 * 16 + r) * 8 + k % 8;
        if (w->format == TD_W_FP8)
            tiles[to] = codes[k];
        else if (w->format == TD_W_MXFP4) /* the same byte twice: both elements lie in it */
            tiles[((size_t)(k / 32) * TD_K_TILE + r * 32 + k % 32) / 2] = codes[k / 2];
        else
            put(w->format, tiles, to, element(src, at + k * src->k_stride));
    }
}

/* Bytes on their way to the device. */
typedef struct stage {
    void *stream;
    uint8_t *buffer;
} stage;

/* What a tile row holds already is read back before more of its rows are filled. */
static int begin_part(const stage *st, const void *dst, size_t bytes, int partly)
{
    td_gpu *g = td_gpu_device();
    memset(st->buffer, 0, bytes);
    if (!partly)
        return 0;
    int r = g->ops->download(g, st->stream, st->buffer, dst, bytes);
    return r < 0 ? r : g->ops->stream_wait(g, st->stream);
}

/* Rows n.. of the matrix become rows n mod 16 .. last of their tile row. */
static int fill_tile_row(td_tensor *w, uint32_t slab, uint32_t n, uint32_t last,
                         const td_weight_src *src, size_t at, const stage *st)
{
    td_gpu *g = td_gpu_device();
    uint32_t first = n % TD_K_TILE_N, groups = w->k / TD_MX_GROUP;
    size_t row = (size_t)slab * w->n_tiles + n / TD_K_TILE_N,
           bytes = w->k_tiles * tile_bytes(w->format);
    char *dst = (char *)w->data + row * bytes;
    int r = begin_part(st, dst, bytes, first > 0);
    for (uint32_t i = first; i < last; i++)
        fill_row(w, src, at + (size_t)(i - first) * src->n_stride, i, st->buffer);
    r = r < 0 ? r : g->ops->upload(g, st->stream, dst, st->buffer, bytes);
    if (r < 0 || w->format != TD_W_MXFP4)
        return r;
    bytes = (size_t)w->k_tiles * TD_K_TILE_N;
    dst = (char *)w->scales + row * bytes;
    r = begin_part(st, dst, bytes, first > 0);
    for (uint32_t i = first; i < last; i++) {
        const uint8_t *scales = (const uint8_t *)src->scales + (size_t)(n + i - first) * groups;
        for (uint32_t k = 0; k < groups; k++)
            st->buffer[k * TD_K_TILE_N + i] = scales[k];
    }
    return r < 0 ? r : g->ops->upload(g, st->stream, dst, st->buffer, bytes);
}

static int fill_rows(td_tensor *w, uint32_t slab, uint32_t n0, uint32_t n_rows,
                     const td_weight_src *src, const stage *st)
{
    td_gpu *g = td_gpu_device();
    int r = 0;
    for (uint32_t n = n0; r >= 0 && n < n0 + n_rows;) {
        uint32_t first = n % TD_K_TILE_N, last = TD_K_TILE_N;
        if (n0 + n_rows - n < last - first)
            last = first + n0 + n_rows - n;
        size_t at = slab * src->slab_stride + (size_t)(n - n0) * src->n_stride;
        r = fill_tile_row(w, slab, n, last, src, at, st);
        n += last - first;
    }
    if (w->format == TD_W_FP8 && r >= 0) {
        size_t bytes = w->scale_bytes / w->slabs;
        r = g->ops->upload(g, st->stream, (char *)w->scales + slab * bytes, src->scales, bytes);
    }
    return r < 0 ? r : g->ops->stream_wait(g, st->stream);
}

void td_gpu_weight_fill(td_tensor *w, uint32_t slab, uint32_t n0, uint32_t n_rows,
                        const td_weight_src *src)
{
    int quantised = w->format == TD_W_FP8 || w->format == TD_W_MXFP4;
    TD_BUG_ON(slab >= w->slabs || n0 + n_rows > w->n);
    TD_BUG_ON(quantised ? !src->scales : src->dtype > TD_F16);
    TD_BUG_ON(w->format == TD_W_BF16 && src->dtype != TD_BF16);
    pthread_mutex_lock(&lock);
    td_gpu *g = td_gpu_device();
    stage st = {.buffer = malloc(w->k_tiles * tile_bytes(TD_W_F32))};
    int r = st.buffer ? g->ops->stream_new(g, &st.stream) : -ENOMEM;
    r = r < 0 ? r : fill_rows(w, slab, n0, n_rows, src, &st);
    g->ops->stream_free(g, st.stream);
    free(st.buffer);
    pthread_mutex_unlock(&lock);
    if (r < 0)
        td_gpu_load_failed(r);
}

int td_gpu_vector_new(uint32_t n, const td_weight_src *src, td_tensor **ret_w)
{
    td_gpu *g = td_gpu_device();
    td_tensor like = {.format = TD_W_F32, .slabs = 1, .n = n, .bytes = (uint64_t)n * 4};
    float *buffer = malloc(like.bytes ? like.bytes : 1);
    td_tensor *w = buffer ? tensor_new(like) : NULL;
    void *stream = NULL;
    int r = w ? g->ops->stream_new(g, &stream) : -ENOMEM;
    for (uint32_t i = 0; r >= 0 && i < n; i++)
        buffer[i] = element(src, i * src->n_stride);
    r = r < 0 ? r : g->ops->upload(g, stream, w->data, buffer, like.bytes);
    r = r < 0 ? r : g->ops->stream_wait(g, stream);
    g->ops->stream_free(g, stream);
    free(buffer);
    if (r < 0) {
        td_gpu_weight_free(w);
        return r;
    }
    *ret_w = w;
    return 0;
}

void td_gpu_weight_free(td_tensor *w)
{
    if (!w)
        return;
    td_gpu *g = td_gpu_device();
    g->ops->mem_free(g, w->data);
    g->ops->mem_free(g, w->scales);
    free(w);
}

uint64_t td_gpu_weight_bytes(const td_tensor *w)
{
    return w->bytes + w->scale_bytes;
}
