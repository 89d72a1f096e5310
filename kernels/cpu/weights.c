/* SPDX-License-Identifier: Apache-2.0 */
/* Packing: from the checkpoint's rows to panels of 16 outputs in huge pages. F32: [k][16]. BF16:
 * [k / 2][16][2], so that 64 bytes are two k of 16 outputs. Outputs past n and the odd k are
 * zero. */
#include <emmintrin.h>
#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "base/bug.h"
#include "kernels/cpu/cpu.h"

#include "base/banned.h"

enum { HUGE_PAGE = 2 << 20 };

/* Zeroed. From half a huge page on, a mapping of its own that starts on one: the tail beyond the
 * last whole huge page stays small pages, so little is wasted. */
static uint8_t *take_bytes(size_t bytes, size_t *ret_map)
{
    *ret_map = 0;
    if (bytes < HUGE_PAGE / 2) {
        size_t n = (bytes + 63) / 64 * 64;
        uint8_t *p = aligned_alloc(64, n ? n : 64);
        if (p)
            memset(p, 0, n ? n : 64);
        return p;
    }
    size_t n = (bytes + 4095) / 4096 * 4096;
    uint8_t *raw =
        mmap(NULL, n + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (raw == MAP_FAILED)
        return NULL;
    size_t skip = (HUGE_PAGE - (uintptr_t)raw % HUGE_PAGE) % HUGE_PAGE;
    if (skip)
        munmap(raw, skip);
    munmap(raw + skip + n, HUGE_PAGE - skip);
    madvise(raw + skip, n, MADV_HUGEPAGE); /* a wish: without it pages are small and it is slower */
    *ret_map = n;
    return raw + skip;
}

static void give_bytes(uint8_t *p, size_t map)
{
    if (map)
        munmap(p, map);
    else
        free(p);
}

int td_cpu_weight_new(td_weight_format format, uint32_t n_slabs, uint32_t n, uint32_t k,
                      td_tensor **ret_w)
{
    cpu_tensor *w = calloc(1, sizeof *w);
    if (!w)
        return -ENOMEM;
    w->v = (td_tensor){.slabs = n_slabs, .n = n, .k = k, .n_panels = (n + LANES - 1) / LANES};
    w->v.format = format;
    w->format = format == TD_W_BF16 ? TD_W_BF16 : TD_W_F32;
    size_t steps = w->format == TD_W_F32 ? k : ((size_t)k + 1) / 2, bytes;
    w->panel_bytes = steps * 64;
    if (__builtin_mul_overflow((size_t)w->v.n_panels * n_slabs, w->panel_bytes, &bytes) ||
        bytes > SIZE_MAX / 4 || !(w->packed = take_bytes(bytes, &w->map_bytes))) {
        free(w);
        return -ENOMEM;
    }
    w->v.bytes = bytes;
    *ret_w = &w->v;
    return 0;
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
    return s->dtype == TD_BF16 ? ref_bf16_to_f32(h) : td_ref_f16_to_f32(h);
}

static void fill_f32(uint8_t *dst, const td_weight_src *s, size_t at, uint32_t k)
{
    float *out = (float *)dst;
    for (uint32_t i = 0; i < k; i++)
        out[(size_t)i * LANES] = element(s, at + i * s->k_stride);
}

static void fill_bf16(uint8_t *dst, const td_weight_src *s, size_t at, uint32_t k)
{
    for (uint32_t i = 0; i < k; i++)
        memcpy(dst + (size_t)(i / 2) * 64 + (i & 1) * 2,
               (const char *)s->base + (at + i * s->k_stride) * 2, 2);
}

/* 16 rows of words side by side: dst[j][16] = row[j]. */
static void fill_16(uint8_t *dst, const uint8_t *src, size_t row_bytes, uint32_t words)
{
    uint32_t j = 0;
    for (; j + 4 <= words; j += 4)
        for (uint32_t r = 0; r < LANES; r += 4) {
            const uint8_t *p = src + r * row_bytes + (size_t)j * 4;
            __m128i a = _mm_loadu_si128((const __m128i *)p),
                    b = _mm_loadu_si128((const __m128i *)(p + row_bytes)),
                    c = _mm_loadu_si128((const __m128i *)(p + 2 * row_bytes)),
                    d = _mm_loadu_si128((const __m128i *)(p + 3 * row_bytes));
            __m128i ab = _mm_unpacklo_epi32(a, b), cd = _mm_unpacklo_epi32(c, d),
                    ab2 = _mm_unpackhi_epi32(a, b), cd2 = _mm_unpackhi_epi32(c, d);
            __m128i *to = (__m128i *)(dst + (size_t)j * 64 + r * 4ul);
            _mm_store_si128(to, _mm_unpacklo_epi64(ab, cd));
            _mm_store_si128(to + 4, _mm_unpackhi_epi64(ab, cd));
            _mm_store_si128(to + 8, _mm_unpacklo_epi64(ab2, cd2));
            _mm_store_si128(to + 12, _mm_unpackhi_epi64(ab2, cd2));
        }
    for (; j < words; j++)
        for (uint32_t r = 0; r < LANES; r++)
            memcpy(dst + (size_t)j * 64 + r * 4ul, src + r * row_bytes + (size_t)j * 4, 4);
}

/* Whole panels of rows that lie as wide as they are go in words; returns rows done. */
static uint32_t fill_panels(cpu_tensor *w, uint8_t *slab, uint32_t n0, uint32_t n_rows,
                            const td_weight_src *s, size_t at)
{
    size_t size = td_dtype_bytes(s->dtype);
    uint32_t done = 0, per_word = s->dtype == TD_F32 ? 1 : 2;
    if (n0 % LANES || s->k_stride != 1 || w->v.k % per_word ||
        s->dtype != (w->format == TD_W_F32 ? TD_F32 : TD_BF16))
        return 0;
    for (; done + LANES <= n_rows; done += LANES)
        fill_16(slab + (n0 + done) / LANES * w->panel_bytes,
                (const uint8_t *)s->base + (at + done * s->n_stride) * size, s->n_stride * size,
                w->v.k / per_word);
    return done;
}

void td_cpu_weight_fill(td_tensor *tensor, uint32_t slab, uint32_t n0, uint32_t n_rows,
                        const td_weight_src *src)
{
    cpu_tensor *w = (cpu_tensor *)tensor;
    int quantised = w->v.format == TD_W_FP8 || w->v.format == TD_W_MXFP4;
    TD_BUG_ON(slab >= w->v.slabs || n0 + n_rows > w->v.n);
    TD_BUG_ON(quantised ? !src->scales : src->dtype > TD_F16);
    TD_BUG_ON(w->format == TD_W_BF16 && src->dtype != TD_BF16);
    uint8_t *base = w->packed + (size_t)slab * w->v.n_panels * w->panel_bytes;
    size_t at = slab * src->slab_stride;
    for (uint32_t i = fill_panels(w, base, n0, n_rows, src, at); i < n_rows; i++) {
        uint8_t *dst = base + (n0 + i) / LANES * w->panel_bytes + (n0 + i) % LANES * 4;
        if (quantised)
            td_ref_decode_row(src, at + i * src->n_stride, n0 + i, w->v.k, LANES, (float *)dst);
        else
            (w->format == TD_W_F32 ? fill_f32 : fill_bf16)(dst, src, at + i * src->n_stride,
                                                           w->v.k);
    }
}

int td_cpu_vector_new(uint32_t n, const td_weight_src *src, td_tensor **ret_w)
{
    cpu_tensor *w = calloc(1, sizeof *w);
    size_t bytes = ((size_t)n * sizeof(float) + 63) / 64 * 64;
    if (!w)
        return -ENOMEM;
    w->v = (td_tensor){.slabs = 1, .n = n, .n_panels = (n + LANES - 1) / LANES, .bytes = bytes};
    w->packed = take_bytes(bytes, &w->map_bytes);
    if (!w->packed) {
        free(w);
        return -ENOMEM;
    }
    w->v.data = (float *)w->packed;
    for (uint32_t i = 0; i < n; i++)
        w->v.data[i] = element(src, i * src->n_stride);
    *ret_w = &w->v;
    return 0;
}

void td_cpu_weight_free(td_tensor *tensor)
{
    cpu_tensor *w = (cpu_tensor *)tensor;
    if (!w)
        return;
    give_bytes(w->packed, w->map_bytes);
    free(w);
}

uint64_t td_cpu_weight_bytes(const td_tensor *w)
{
    return w->bytes;
}

void td_cpu_weight_row(const td_tensor *tensor, uint32_t n, float *ret_row)
{
    const cpu_tensor *w = cpu_tensor_of(tensor);
    const uint8_t *src = w->packed + n / LANES * w->panel_bytes + n % LANES * 4;
    if (w->format == TD_W_F32) {
        for (uint32_t k = 0; k < w->v.k; k++)
            memcpy(ret_row + k, src + (size_t)k * 64, 4);
        return;
    }
    for (uint32_t k = 0; k < w->v.k; k++) {
        uint16_t h;
        memcpy(&h, src + (size_t)(k / 2) * 64 + (k & 1) * 2, 2);
        ret_row[k] = ref_bf16_to_f32(h);
    }
}
