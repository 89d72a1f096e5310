/* SPDX-License-Identifier: Apache-2.0 */
#include "kernels/formats.h"

#include <math.h>
#include <string.h>

#include "base/banned.h"

static uint32_t bits_of(float x)
{
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}

static float float_of(uint32_t u)
{
    float x;
    memcpy(&x, &u, 4);
    return x;
}

float td_e4m3_to_f32(uint8_t code)
{
    uint32_t sign = (uint32_t)(code & 0x80u) << 24, e = code >> 3 & 15u, m = code & 7u;
    if (e == 15 && m == 7)
        return float_of(sign | 0x7fc00000u);
    if (e == 0) {
        float x = (float)m * 0.001953125f; /* 2^-9 */
        return sign ? -x : x;
    }
    return float_of(sign | (e + 120) << 23 | m << 20);
}

uint8_t td_f32_to_e4m3(float x)
{
    uint32_t u = bits_of(x), sign = u >> 24 & 0x80u;
    u &= 0x7fffffffu;
    if (u > 0x7f800000u)
        return (uint8_t)(sign | 0x7fu);
    float a = float_of(u);
    if (a >= (float)TD_E4M3_MAX)
        return (uint8_t)(sign | 0x7eu);
    if (a < 0.015625f) { /* below 2^-6: multiples of 2^-9; 2^14 aligns them with the last bit */
        return (uint8_t)(sign | (bits_of(a + 16384.0f) & 15u));
    }
    uint32_t r = u + 0x7ffffu + (u >> 20 & 1u); /* 3 bits of mantissa, ties to even */
    return (uint8_t)(sign | ((r >> 20) - (120u << 3)));
}

float td_e8m0_to_f32(uint8_t code)
{
    if (code == TD_E8M0_NAN)
        return float_of(0x7fc00000u);
    return float_of(code ? (uint32_t)code << 23 : 0x00400000u);
}

const int8_t td_e2m1_doubled[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

uint8_t td_f32_to_e2m1(float x)
{
    /* borders between neighbours; an exact border goes to the even code */
    static const float border[7] = {0.25f, 0.75f, 1.25f, 1.75f, 2.5f, 3.5f, 5.0f};
    float a = fabsf(x);
    uint8_t code = 0;
    while (code < 7 && (a > border[code] || (a == border[code] && (code & 1u))))
        code++;
    return (uint8_t)(code | (code && signbit(x) ? 8u : 0u));
}

uint8_t td_mx_scale_even(const float x[TD_MX_GROUP])
{
    float amax = 0.0f;
    for (int i = 0; i < TD_MX_GROUP; i++)
        amax = fabsf(x[i]) > amax ? fabsf(x[i]) : amax;
    if (amax == 0.0f)
        return 1;
    int e = (int)((bits_of(amax) + 0x200000u) >> 23) - 2;
    return (uint8_t)(e < 0 ? 0 : e > 254 ? 254 : e);
}

void td_mx_encode(const float x[TD_MX_GROUP], uint8_t scale, uint8_t ret_codes[TD_MX_GROUP / 2])
{
    /* division by a power of two: exact but for the denormals that it may give, which are 0 here */
    for (int i = 0; i < TD_MX_GROUP / 2; i++) {
        unsigned lo = td_f32_to_e2m1(ldexpf(x[2 * i], 127 - scale)),
                 hi = td_f32_to_e2m1(ldexpf(x[2 * i + 1], 127 - scale));
        ret_codes[i] = (uint8_t)(lo | hi << 4);
    }
}

void td_mx_decode(const uint8_t codes[TD_MX_GROUP / 2], uint8_t scale, float ret_x[TD_MX_GROUP])
{
    float half = td_e8m0_to_f32(scale) * 0.5f;
    for (int i = 0; i < TD_MX_GROUP / 2; i++) {
        ret_x[2 * i] = (float)td_e2m1_doubled[codes[i] & 15] * half;
        ret_x[2 * i + 1] = (float)td_e2m1_doubled[codes[i] >> 4] * half;
    }
}

float td_fp8_scale(float amax)
{
    return amax > 0.0f ? amax / (float)TD_E4M3_MAX : 1.0f;
}

void td_fp8_decode_row(const uint8_t *codes, const void *scales, uint32_t n, uint32_t k,
                       size_t stride, float *ret_x)
{
    size_t blocks = (k + TD_FP8_BLOCK - 1u) / TD_FP8_BLOCK;
    const uint8_t *row = (const uint8_t *)scales + n / TD_FP8_BLOCK * blocks * sizeof(float);
    for (uint32_t i = 0; i < k; i++) {
        float scale;
        memcpy(&scale, row + i / TD_FP8_BLOCK * sizeof scale, sizeof scale);
        ret_x[i * stride] = td_e4m3_to_f32(codes[i]) * scale;
    }
}

void td_mx_decode_row(const uint8_t *codes, const void *scales, uint32_t n, uint32_t k,
                      size_t stride, float *ret_x)
{
    uint32_t groups = k / TD_MX_GROUP;
    const uint8_t *row = (const uint8_t *)scales + (size_t)n * groups;
    float x[TD_MX_GROUP];
    for (size_t g = 0; g < groups; g++) {
        td_mx_decode(codes + g * (TD_MX_GROUP / 2), row[g], x);
        for (size_t i = 0; i < TD_MX_GROUP; i++)
            ret_x[(g * TD_MX_GROUP + i) * stride] = x[i];
    }
}

float td_f16_to_f32(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, e = h >> 10 & 31u, m = h & 1023u;
    if (e == 0) {
        float x = (float)m * 5.9604644775390625e-8f; /* 2^-24 */
        return sign ? -x : x;
    }
    return float_of(sign | (e == 31 ? 0x7f800000u : (e + 112) << 23) | m << 13);
}

void td_ocp_fp8_values(const float *x, uint32_t k, double *ret)
{
    for (uint32_t g = 0; g < k; g += 32) {
        double most = 0;
        for (uint32_t i = g; i < g + 32; i++)
            most = fmax(most, fabs((double)x[i]));
        /* scale by the exponent of the largest magnitude less 8 (that of 448), elements with 3 bits
         * of mantissa down to 2^-9, ties to even */
        int e = most > 0 ? ilogb(most) - 8 : -127;
        e = e < -127 ? -127 : e;
        for (uint32_t i = g; i < g + 32; i++) {
            double v = ldexp((double)x[i], -e), size = fabs(v);
            int step = size < 0x1p-6 ? -9 : ilogb(size) - 3;
            size = fmin(ldexp(nearbyint(ldexp(size, -step)), step), 448);
            ret[i] = ldexp(copysign(size, v), e);
        }
    }
}
