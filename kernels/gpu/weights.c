/* SPDX-License-Identifier: Apache-2.0 */
/* Weights into the kernels' tiles (kernels/hip/args.h) and onto the device. */
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "base/bug.h"
#include "kernels/gpu/inside.h"

#include "base/banned.h"

/* The loader's threads take turns at the device. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static size_t element_bytes(td_weight_format f)
{
    return f == TD_W_BF16 ? 2 : 4;
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
    if (!w->data) {
        free(w);
        return NULL;
    }
    return w;
}

int td_gpu_weight_new(td_weight_format format, uint32_t n_slabs, uint32_t n, uint32_t k,
                      td_tensor **ret_w)
{
    if (format != TD_W_F32 && format != TD_W_BF16)
        return -ENOTSUP;
    td_tensor like = {.format = format, .slabs = n_slabs, .n = n, .k = k};
    like.n_tiles = tiles_of(n, TD_K_TILE_N);
    like.k_tiles = tiles_of(k, TD_K_TILE_K);
    size_t tiles = (size_t)like.n_tiles * like.k_tiles;
    if (__builtin_mul_overflow(tiles * TD_K_TILE * element_bytes(format), (size_t)n_slabs,
                               &like.bytes))
        return -ENOMEM;
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

/* Rows [first, last) of a tile row: row r of it from source row r - first + src0. */
static void fill_tiles(const td_tensor *w, const td_weight_src *src, size_t at0, uint32_t first,
                       uint32_t last, void *tiles)
{
    for (uint32_t r = first; r < last; r++) {
        size_t at = at0 + (size_t)(r - first) * src->n_stride;
        for (uint32_t k = 0; k < w->k; k++)
            put(w->format, tiles, (size_t)(k / 32) * TD_K_TILE + (k % 32 / 8 * 16 + r) * 8 + k % 8,
                element(src, at + k * src->k_stride));
    }
}

/* A tile row is 16 rows of the matrix; one that is not filled at once is read back first. */
static int fill_tile_row(td_tensor *w, uint32_t slab, uint32_t tile, uint32_t first, uint32_t last,
                         const td_weight_src *src, size_t at, void *buffer, void *stream)
{
    td_gpu *g = td_gpu_device();
    size_t bytes = (size_t)w->k_tiles * TD_K_TILE * element_bytes(w->format);
    char *dst = (char *)w->data + ((size_t)slab * w->n_tiles + tile) * bytes;
    memset(buffer, 0, bytes);
    int r = 0;
    if (first > 0) {
        r = g->ops->download(g, stream, buffer, dst, bytes);
        r = r < 0 ? r : g->ops->stream_wait(g, stream);
    }
    fill_tiles(w, src, at, first, last, buffer);
    return r < 0 ? r : g->ops->upload(g, stream, dst, buffer, bytes);
}

void td_gpu_weight_fill(td_tensor *w, uint32_t slab, uint32_t n0, uint32_t n_rows,
                        const td_weight_src *src)
{
    TD_BUG_ON(slab >= w->slabs || n0 + n_rows > w->n || src->dtype > TD_F16);
    TD_BUG_ON(w->format == TD_W_BF16 && src->dtype != TD_BF16);
    pthread_mutex_lock(&lock);
    td_gpu *g = td_gpu_device();
    void *stream = NULL;
    void *buffer = malloc((size_t)w->k_tiles * TD_K_TILE * element_bytes(w->format));
    int r = buffer ? g->ops->stream_new(g, &stream) : -ENOMEM;
    for (uint32_t n = n0; r >= 0 && n < n0 + n_rows;) {
        uint32_t tile = n / TD_K_TILE_N, first = n % TD_K_TILE_N, last = TD_K_TILE_N;
        if (n0 + n_rows - n < last - first)
            last = first + n0 + n_rows - n;
        size_t at = slab * src->slab_stride + (size_t)(n - n0) * src->n_stride;
        r = fill_tile_row(w, slab, tile, first, last, src, at, buffer, stream);
        n += last - first;
    }
    if (stream && r >= 0)
        r = g->ops->stream_wait(g, stream);
    g->ops->stream_free(g, stream);
    free(buffer);
    pthread_mutex_unlock(&lock);
    TD_BUG_ON(r < 0); /* a device that fails while loading has no way to say so here */
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
    free(w);
}

uint64_t td_gpu_weight_bytes(const td_tensor *w)
{
    return w->bytes;
}
