/* SPDX-License-Identifier: Apache-2.0 */
/* Rows of the KV pool: written and read part by part (kernels/kv_row.h). */
#include <float.h>

#include "kernels/formats.h"
#include "kernels/ref/ref.h"

#include "base/banned.h"

static uint32_t magnitude_bits(float x)
{
    uint32_t u;
    memcpy(&u, &x, 4);
    return u & 0x7fffffffu;
}

static float float_of(uint32_t u)
{
    float x;
    memcpy(&x, &u, 4);
    return x;
}

/* A NaN is the greatest of all, so it is not lost. */
static float largest(const float *x, uint32_t n)
{
    uint32_t most = 0;
    for (uint32_t i = 0; i < n; i++)
        most = magnitude_bits(x[i]) > most ? magnitude_bits(x[i]) : most;
    return float_of(most);
}

/* td_f32_to_e4m3(x / scale) without a branch, so that the compiler takes several at once. */
static uint8_t encode(float x, float scale)
{
    float v = x / scale;
    uint32_t u;
    memcpy(&u, &v, 4);
    uint32_t sign = u >> 24 & 0x80u, a = u & 0x7fffffffu, max = 0x43e00000u; /* 448 */
    a = a < max ? a : max;
    uint32_t small = magnitude_bits(float_of(a) + 16384.0f) & 15u; /* below 2^-6 */
    uint32_t normal = ((a + 0x7ffffu + (a >> 20 & 1u)) >> 20) - (120u << 3);
    return (uint8_t)(sign | (a < 0x3c800000u ? small : normal));
}

static void store_group(uint8_t *dst, float *scale, const float *src, uint32_t n)
{
    float s = largest(src, n) / (float)TD_E4M3_MAX;
    *scale = s < FLT_MIN ? 0.0f : s;
    if (!(*scale > 0.0f && *scale <= FLT_MAX)) { /* nothing, or a NaN that the scale tells */
        memset(dst, 0, n);
        return;
    }
    for (uint32_t i = 0; i < n; i++)
        dst[i] = encode(src[i], s);
}

static uint32_t group_len(uint32_t left)
{
    return left < TD_KV_SCALE_GROUP ? left : TD_KV_SCALE_GROUP;
}

void td_ref_kv_store(const ref_kv *at, uint32_t elem, uint32_t scale, const float *src, uint32_t n)
{
    if (at->type != TD_F8E4M3) {
        td_ref_store(at->row + elem * td_dtype_bytes(at->type), src, n, at->type);
        return;
    }
    for (uint32_t i = 0; i < n; i += TD_KV_SCALE_GROUP)
        store_group(at->row + elem + i, at->scales + scale++, src + i, group_len(n - i));
}

void td_ref_kv_load(const ref_kv *at, uint32_t elem, uint32_t scale, float *dst, uint32_t n)
{
    if (at->type != TD_F8E4M3) {
        td_ref_load(dst, at->row + elem * td_dtype_bytes(at->type), n, at->type);
        return;
    }
    for (uint32_t i = 0; i < n; i++)
        dst[i] = ref_round(TD_BF16, td_e4m3_to_f32(at->row[elem + i]) *
                                        at->scales[scale + i / TD_KV_SCALE_GROUP]);
}
