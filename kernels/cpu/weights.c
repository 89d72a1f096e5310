/* SPDX-License-Identifier: Apache-2.0 */
/* Packing: from the checkpoint's rows to panels of 16 outputs in huge pages. 64 bytes are 16
 * outputs and
 * F32: one k.   BF16: two k.   FP8: four k, in bytes.
 * MXFP4: eight k; byte j of an output's four has k = j below and k = 4 + j above.
 * Before a panel's codes stand its scales: FP8 [K/128][16] f32, MXFP4 [K/32][16] e8m0. Outputs past
 * n and k past K are zero. */
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <tmmintrin.h>

#include "base/bug.h"
#include "kernels/cpu/cpu.h"
#include "kernels/formats.h"

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

/* Sizes of a panel. */
static void lay_out(cpu_tensor *w, size_t k)
{
    static const uint8_t k_of_line[TD_WEIGHT_FORMATS] = {
        [TD_W_F32] = 1, [TD_W_BF16] = 2, [TD_W_FP8] = 4, [TD_W_MXFP4] = 8};
    size_t each = k_of_line[w->v.format], scales = 0;
    if (w->v.format == TD_W_FP8)
        scales = (k + TD_FP8_BLOCK - 1) / TD_FP8_BLOCK * LANES * sizeof(float);
    if (w->v.format == TD_W_MXFP4)
        scales = k / TD_MX_GROUP * LANES;
    w->codes_at = (scales + 63) / 64 * 64;
    w->panel_bytes = w->codes_at + (k + each - 1) / each * 64;
}

/* Everything but the bytes. -ENOMEM: also a size that no machine has. */
static int shape_new(td_weight_format format, uint32_t n_slabs, uint32_t n, uint32_t k,
                     cpu_tensor **ret)
{
    cpu_tensor *w = calloc(1, sizeof *w);
    if (!w)
        return -ENOMEM;
    w->v = (td_tensor){
        .slabs = n_slabs, .n = n, .k = k, .n_panels = (n + LANES - 1) / LANES, .format = format};
    size_t bytes;
    lay_out(w, k);
    if (__builtin_mul_overflow((size_t)w->v.n_panels * n_slabs, w->panel_bytes, &bytes) ||
        bytes > SIZE_MAX / 4) {
        free(w);
        return -ENOMEM;
    }
    w->v.bytes = bytes;
    *ret = w;
    return 0;
}

int td_cpu_weight_new(td_weight_format format, uint32_t n_slabs, uint32_t n, uint32_t k,
                      td_tensor **ret_w)
{
    cpu_tensor *w = NULL;
    int r = shape_new(format, n_slabs, n, k, &w);
    if (r < 0)
        return r;
    w->packed = take_bytes(w->v.bytes, &w->map_bytes);
    if (!w->packed) {
        free(w);
        return -ENOMEM;
    }
    *ret_w = &w->v;
    return 0;
}

int td_cpu_weight_map(td_weight_format format, uint32_t n_slabs, uint32_t n, uint32_t k,
                      const void *bytes, uint64_t n_bytes, td_tensor **ret_w)
{
    cpu_tensor *w = NULL;
    int r = shape_new(format, n_slabs, n, k, &w);
    if (r < 0)
        return r;
    if (w->v.bytes != n_bytes || (uintptr_t)bytes % 64) {
        free(w);
        return -EINVAL;
    }
    w->borrowed = 1;
    w->packed = (uint8_t *)(uintptr_t)bytes; /* nobody fills a borrowed one */
    *ret_w = &w->v;
    return 0;
}

const void *td_cpu_weight_packed(const td_tensor *w)
{
    return cpu_tensor_of(w)->packed;
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

/* Nibbles of the low half to the low halves of four bytes. */
static uint32_t spread(uint32_t x)
{
    return (x & 0xfu) | (x & 0xf0u) << 4 | (x & 0xf00u) << 8 | (x & 0xf000u) << 12;
}

/* Output `lane` of a panel from one row: at is in bytes, n the row within the slab. */
static void fill_mxfp4(const cpu_tensor *w, uint8_t *panel, uint32_t lane, const td_weight_src *s,
                       size_t at, uint32_t n)
{
    const uint8_t *codes = (const uint8_t *)s->base + at;
    uint32_t groups = w->v.k / TD_MX_GROUP;
    for (uint32_t i = 0; i < w->v.k / 8; i++) {
        uint32_t x;
        memcpy(&x, codes + (size_t)i * 4, 4);
        x = spread(x) | spread(x >> 16) << 4;
        memcpy(panel + w->codes_at + (size_t)i * 64 + lane * 4ul, &x, 4);
    }
    for (uint32_t g = 0; g < groups; g++)
        panel[(size_t)g * LANES + lane] = ((const uint8_t *)s->scales)[(size_t)n * groups + g];
}

/* The kernels do not know e4m3's NaN: where one is, the scale is NaN. */
static void fill_fp8(const cpu_tensor *w, uint8_t *panel, uint32_t lane, const td_weight_src *s,
                     size_t at, uint32_t n)
{
    const uint8_t *codes = (const uint8_t *)s->base + at;
    uint32_t k = w->v.k, blocks = (k + TD_FP8_BLOCK - 1) / TD_FP8_BLOCK;
    const uint8_t *scales =
        (const uint8_t *)s->scales + (size_t)(n / TD_FP8_BLOCK) * blocks * sizeof(float);
    for (uint32_t b = 0; b < blocks; b++) {
        uint32_t k0 = b * TD_FP8_BLOCK, k1 = k - k0 < TD_FP8_BLOCK ? k : k0 + TD_FP8_BLOCK;
        float scale;
        memcpy(&scale, scales + b * sizeof scale, sizeof scale);
        for (uint32_t i = k0; i < k1; i++) {
            if ((codes[i] & 0x7f) == 0x7f)
                scale = NAN;
            panel[w->codes_at + (size_t)(i / 4) * 64 + lane * 4ul + i % 4] = codes[i];
        }
        memcpy(panel + ((size_t)b * LANES + lane) * sizeof scale, &scale, sizeof scale);
    }
}

/* spread() of four words: their bytes hold elements 01 23 45 67 and shall hold 04 15 26 37. */
static inline __m128i spread_4(__m128i x)
{
    const __m128i nibble = _mm_set1_epi8(15), half = _mm_set1_epi32(0xffff),
                  order = _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
    __m128i even = _mm_and_si128(x, nibble), odd = _mm_and_si128(_mm_srli_epi16(x, 4), nibble);
    even = _mm_and_si128(_mm_or_si128(even, _mm_srli_epi32(even, 12)), half); /* 04 26 */
    odd = _mm_or_si128(odd, _mm_srli_epi32(odd, 12));                         /* 15 37 */
    return _mm_shuffle_epi8(_mm_or_si128(even, _mm_slli_epi32(odd, 16)), order);
}

static inline __m128i load_4(const uint8_t *p, int mxfp4)
{
    __m128i x = _mm_loadu_si128((const __m128i *)p);
    return mxfp4 ? spread_4(x) : x;
}

/* 16 rows of words side by side: dst[j][16] = row[j]. */
static inline void fill_16(uint8_t *dst, const uint8_t *src, size_t row_bytes, uint32_t words,
                           int mxfp4)
{
    uint32_t j = 0;
    for (; j + 4 <= words; j += 4)
        for (uint32_t r = 0; r < LANES; r += 4) {
            const uint8_t *p = src + r * row_bytes + (size_t)j * 4;
            __m128i a = load_4(p, mxfp4), b = load_4(p + row_bytes, mxfp4),
                    c = load_4(p + 2 * row_bytes, mxfp4), d = load_4(p + 3 * row_bytes, mxfp4);
            __m128i ab = _mm_unpacklo_epi32(a, b), cd = _mm_unpacklo_epi32(c, d),
                    ab2 = _mm_unpackhi_epi32(a, b), cd2 = _mm_unpackhi_epi32(c, d);
            __m128i *to = (__m128i *)(dst + (size_t)j * 64 + r * 4ul);
            _mm_store_si128(to, _mm_unpacklo_epi64(ab, cd));
            _mm_store_si128(to + 4, _mm_unpackhi_epi64(ab, cd));
            _mm_store_si128(to + 8, _mm_unpacklo_epi64(ab2, cd2));
            _mm_store_si128(to + 12, _mm_unpackhi_epi64(ab2, cd2));
        }
    for (; j < words; j++)
        for (uint32_t r = 0; r < LANES; r++) {
            uint32_t x;
            memcpy(&x, src + r * row_bytes + (size_t)j * 4, 4);
            x = mxfp4 ? spread(x) | spread(x >> 16) << 4 : x;
            memcpy(dst + (size_t)j * 64 + r * 4ul, &x, 4);
        }
}

/* Scales of 16 rows side by side: dst[g][16] = row[g]. */
static void fill_mx_scales(uint8_t *dst, const uint8_t *src, uint32_t groups)
{
    for (uint32_t g = 0; g < groups; g++, dst += LANES)
        for (uint32_t r = 0; r < LANES; r++)
            dst[r] = src[(size_t)r * groups + g];
}

/* The scale of a block of a row: NaN where a code is. */
static float fp8_scale(const uint8_t *codes, uint32_t n, float scale)
{
    const __m128i nan = _mm_set1_epi8(0x7f);
    __m128i seen = _mm_setzero_si128();
    uint32_t i = 0;
    int bad = 0;
    for (; i + 16 <= n; i += 16) {
        __m128i x = _mm_and_si128(_mm_loadu_si128((const __m128i *)(codes + i)), nan);
        seen = _mm_or_si128(seen, _mm_cmpeq_epi8(x, nan));
    }
    for (; i < n; i++)
        bad |= (codes[i] & 0x7f) == 0x7f;
    return bad || _mm_movemask_epi8(seen) ? NAN : scale;
}

/* Block scales of 16 rows, all of one block row: n is the first of them within the slab. */
static void fill_fp8_scales(uint8_t *panel, const td_weight_src *s, const uint8_t *codes,
                            uint32_t n, uint32_t k)
{
    uint32_t blocks = (k + TD_FP8_BLOCK - 1) / TD_FP8_BLOCK;
    const uint8_t *scales =
        (const uint8_t *)s->scales + (size_t)(n / TD_FP8_BLOCK) * blocks * sizeof(float);
    for (uint32_t b = 0; b < blocks; b++) {
        uint32_t k0 = b * TD_FP8_BLOCK, width = k - k0 < TD_FP8_BLOCK ? k - k0 : TD_FP8_BLOCK;
        float scale, out[LANES];
        memcpy(&scale, scales + b * sizeof scale, sizeof scale);
        for (uint32_t r = 0; r < LANES; r++)
            out[r] = fp8_scale(codes + r * s->n_stride + k0, width, scale);
        memcpy(panel + b * sizeof out, out, sizeof out);
    }
}

/* The panel of rows n..n+15; src is the first one's elements. */
static void fill_panel(const cpu_tensor *w, uint8_t *panel, uint32_t n, const td_weight_src *s,
                       const uint8_t *src)
{
    uint32_t k = w->v.k, groups = k / TD_MX_GROUP;
    size_t row_bytes = s->n_stride * td_dtype_bytes(s->dtype);
    if (w->v.format == TD_W_MXFP4) {
        fill_mx_scales(panel, (const uint8_t *)s->scales + (size_t)n * groups, groups);
        fill_16(panel + w->codes_at, src, row_bytes, k / 8, 1);
        return;
    }
    if (w->v.format == TD_W_FP8)
        fill_fp8_scales(panel, s, src, n, k);
    fill_16(panel + w->codes_at, src, row_bytes, (uint32_t)(k * td_dtype_bytes(s->dtype) / 4), 0);
}

/* Whole panels of rows that lie as wide as they are go in words; returns rows done. */
static uint32_t fill_panels(cpu_tensor *w, uint8_t *slab, uint32_t n0, uint32_t n_rows,
                            const td_weight_src *s, size_t at)
{
    static const td_dtype as_it_is[TD_WEIGHT_FORMATS] = {
        [TD_W_F32] = TD_F32, [TD_W_BF16] = TD_BF16, [TD_W_FP8] = TD_F8E4M3, [TD_W_MXFP4] = TD_U8};
    size_t size = td_dtype_bytes(s->dtype);
    uint32_t done = 0;
    if (n0 % LANES || s->k_stride != 1 || s->dtype != as_it_is[w->v.format] || w->v.k * size % 4)
        return 0;
    for (; done + LANES <= n_rows; done += LANES)
        fill_panel(w, slab + (n0 + done) / LANES * w->panel_bytes, n0 + done, s,
                   (const uint8_t *)s->base + (at + done * s->n_stride) * size);
    return done;
}

void td_cpu_weight_fill(td_tensor *tensor, uint32_t slab, uint32_t n0, uint32_t n_rows,
                        const td_weight_src *src)
{
    cpu_tensor *w = (cpu_tensor *)tensor;
    int quantised = w->v.format == TD_W_FP8 || w->v.format == TD_W_MXFP4;
    TD_BUG_ON(slab >= w->v.slabs || n0 + n_rows > w->v.n);
    TD_BUG_ON(quantised ? !src->scales : src->dtype > TD_F16);
    TD_BUG_ON(w->v.format == TD_W_BF16 && src->dtype != TD_BF16);
    uint8_t *base = w->packed + (size_t)slab * w->v.n_panels * w->panel_bytes;
    size_t first = slab * src->slab_stride;
    for (uint32_t i = fill_panels(w, base, n0, n_rows, src, first); i < n_rows; i++) {
        uint32_t n = n0 + i, lane = n % LANES;
        uint8_t *panel = base + n / LANES * w->panel_bytes;
        size_t at = first + i * src->n_stride;
        if (w->v.format == TD_W_MXFP4)
            fill_mxfp4(w, panel, lane, src, at, n);
        else if (w->v.format == TD_W_FP8)
            fill_fp8(w, panel, lane, src, at, n);
        else
            (w->v.format == TD_W_F32 ? fill_f32 : fill_bf16)(panel + lane * 4ul, src, at, w->v.k);
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
    if (!w->borrowed)
        give_bytes(w->packed, w->map_bytes);
    free(w);
}

uint64_t td_cpu_weight_bytes(const td_tensor *w)
{
    return w->bytes;
}

static void row_of_fp8(const cpu_tensor *w, const uint8_t *panel, uint32_t lane, float *ret_row)
{
    const uint8_t *codes = panel + w->codes_at;
    for (uint32_t k = 0; k < w->v.k; k++) {
        float scale;
        memcpy(&scale, panel + ((size_t)(k / TD_FP8_BLOCK) * LANES + lane) * sizeof scale,
               sizeof scale);
        ret_row[k] = td_e4m3_to_f32(codes[(size_t)(k / 4) * 64 + lane * 4ul + k % 4]) * scale;
    }
}

static void row_of_mxfp4(const cpu_tensor *w, const uint8_t *panel, uint32_t lane, float *ret_row)
{
    const uint8_t *codes = panel + w->codes_at;
    for (uint32_t k = 0; k < w->v.k; k++) {
        uint8_t scale = panel[(size_t)(k / TD_MX_GROUP) * LANES + lane],
                code = codes[(size_t)(k / 8) * 64 + lane * 4ul + k % 4];
        ret_row[k] = 0.5f * (float)td_e2m1_doubled[k % 8 < 4 ? code & 15 : code >> 4] *
                     td_e8m0_to_f32(scale);
    }
}

void td_cpu_weight_row(const td_tensor *tensor, uint32_t n, float *ret_row)
{
    const cpu_tensor *w = cpu_tensor_of(tensor);
    uint32_t lane = n % LANES;
    const uint8_t *panel = w->packed + n / LANES * w->panel_bytes, *src = panel + lane * 4ul;
    if (w->v.format == TD_W_F32) {
        for (uint32_t k = 0; k < w->v.k; k++)
            memcpy(ret_row + k, src + (size_t)k * 64, 4);
        return;
    }
    if (w->v.format != TD_W_BF16) {
        (w->v.format == TD_W_FP8 ? row_of_fp8 : row_of_mxfp4)(w, panel, lane, ret_row);
        return;
    }
    for (uint32_t k = 0; k < w->v.k; k++) {
        uint16_t h;
        memcpy(&h, src + (size_t)(k / 2) * 64 + (k & 1) * 2, 2);
        ret_row[k] = ref_bf16_to_f32(h);
    }
}
