/* SPDX-License-Identifier: Apache-2.0 */
#include "kernels/math.h"

#include <immintrin.h>

#include "base/banned.h"

#define TD_BODY(name) name##_v2
#define TD_BODY_TARGET
#include "kernels/math_body.inc"

#define TD_BODY(name)  name##_fma
#define TD_BODY_TARGET __attribute__((target("avx2,fma")))
#include "kernels/math_body.inc"

static int has_fma(void)
{
    return __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx2");
}

void td_exp_n(const float *x, float *y, size_t n)
{
    (has_fma() ? exp_n_fma : exp_n_v2)(x, y, n);
}

float td_exp(float x)
{
    td_exp_n(&x, &x, 1);
    return x;
}

void td_silu_mul_n(const float *x, const float *u, float *y, size_t n)
{
    (has_fma() ? silu_mul_n_fma : silu_mul_n_v2)(x, u, y, n);
}

float td_sigmoid(float x)
{
    return 1.0f / (1.0f + td_exp(-x));
}

uint64_t td_exp_weights(const float *x, float max, uint64_t *w, size_t n)
{
    return (has_fma() ? exp_weights_fma : exp_weights_v2)(x, max, w, n);
}

double td_exp_d(double x)
{
    return (has_fma() ? exp_d_fma : exp_d_v2)(x);
}

void td_sincos(double x, float *ret_sin, float *ret_cos)
{
    (has_fma() ? sincos_fma : sincos_v2)(x, ret_sin, ret_cos);
}

/* x = m * 2^e with m in [sqrt(1/2), sqrt 2): log m = 2 atanh((m-1)/(m+1)), an odd series in s with
 * |s| <= 0.172. */
double td_ln(double x)
{
    uint64_t bits;
    __builtin_memcpy(&bits, &x, 8);
    int e = (int)(bits >> 52) - 1023;
    bits = (bits & 0xfffffffffffffull) | 0x3ff0000000000000ull;
    double m;
    __builtin_memcpy(&m, &bits, 8);
    if (m > 1.4142135623730951) {
        m *= 0.5;
        e++;
    }
    double s = (m - 1.0) / (m + 1.0), z = s * s, p = 0.0;
    for (int k = 23; k >= 1; k -= 2)
        p = p * z + 1.0 / k;
    return (double)e * 6.93147180559945286227e-01 + 2.0 * s * p;
}

void td_rope_freqs(double theta, uint32_t rope_dims, float *ret_inv_freq)
{
    double ln = td_ln(theta);
    for (uint32_t i = 0; i < rope_dims / 2; i++) {
        float p = (float)td_exp_d((double)((float)(2 * i) / (float)rope_dims) * ln);
        ret_inv_freq[i] = 1.0f / p;
    }
}

void td_rope_row(const float *inv_freq, uint32_t pairs, uint32_t position, float *ret_cos,
                 float *ret_sin)
{
    for (uint32_t i = 0; i < pairs; i++) {
        float angle = (float)position * inv_freq[i];
        td_sincos((double)angle, &ret_sin[i], &ret_cos[i]);
    }
}

uint32_t td_fp_flush(void)
{
    uint32_t old = _mm_getcsr();
    _mm_setcsr(old | 0x8040u);
    return old;
}

void td_fp_restore(uint32_t old)
{
    _mm_setcsr(old);
}
