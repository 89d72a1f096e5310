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

#define TD_VEC(name)  name##_avx2
#define TD_VEC_TARGET __attribute__((target("avx2,fma")))
#define MF            __m256
#define MF_(op)       _mm256_##op
#define MI            __m256i
#define MF_LANES      8
#define MF_TO_MI      _mm256_castps_si256
#define MI_TO_MF      _mm256_castsi256_ps
#define MF_UNLESS_BELOW(x, bound, y)                                                               \
    _mm256_and_ps(_mm256_cmp_ps(x, bound, _CMP_NLT_UQ), y) /* NaN is not below */
#define MF_NEGATIVE(v) _mm256_xor_ps(v, _mm256_set1_ps(-0.0f))
/* whole numbers up to 2^32 are the low bits of 2^52 + themselves */
#define MF_TO_U64(v, a, b)                                                                         \
    do {                                                                                           \
        const __m256d magic_ = _mm256_set1_pd(4503599627370496.0);                                 \
        __m256d a_ = _mm256_cvtps_pd(_mm256_castps256_ps128(v)),                                   \
                b_ = _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));                                 \
        a_ = _mm256_add_pd(_mm256_floor_pd(a_), magic_);                                           \
        b_ = _mm256_add_pd(_mm256_floor_pd(b_), magic_);                                           \
        (a) = _mm256_castpd_si256(_mm256_xor_pd(a_, magic_));                                      \
        (b) = _mm256_castpd_si256(_mm256_xor_pd(b_, magic_));                                      \
    } while (0)
#define MI_ZERO        _mm256_setzero_si256()
#define MI_STORE(p, v) _mm256_storeu_si256((__m256i *)(p), v)
#include "kernels/math_vec.inc"

#define TD_VEC(name)  name##_avx512
#define TD_VEC_TARGET __attribute__((target("avx512f,avx512dq,avx2,fma")))
#define MF            __m512
#define MF_(op)       _mm512_##op
#define MI            __m512i
#define MF_LANES      16
#define MF_TO_MI      _mm512_castps_si512
#define MI_TO_MF      _mm512_castsi512_ps
#define MF_UNLESS_BELOW(x, bound, y)                                                               \
    _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, bound, _CMP_NLT_UQ), y)
#define MF_NEGATIVE(v) _mm512_xor_ps(v, _mm512_set1_ps(-0.0f))
#define MF_TO_U64(v, a, b)                                                                         \
    do {                                                                                           \
        (a) = _mm512_cvttps_epi64(_mm512_castps512_ps256(v));                                      \
        (b) = _mm512_cvttps_epi64(_mm512_extractf32x8_ps(v, 1));                                   \
    } while (0)
#define MI_ZERO        _mm512_setzero_si512()
#define MI_STORE(p, v) _mm512_storeu_si512(p, v)
#include "kernels/math_vec.inc"

static int has_fma(void)
{
    return __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx2");
}

/* The widest vectors; short arrays fit no vector. */
#define PICK(name)                                                                                 \
    (!has_fma()                                                                ? name##_v2         \
     : __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") ? name##_avx512     \
                                                                               : name##_avx2)

void td_exp_n(const float *x, float *y, size_t n)
{
    PICK(exp_n)(x, y, n);
}

float td_exp(float x)
{
    td_exp_n(&x, &x, 1);
    return x;
}

void td_silu_mul_n(const float *x, const float *u, float *y, size_t n)
{
    PICK(silu_mul_n)(x, u, y, n);
}

float td_sigmoid(float x)
{
    return 1.0f / (1.0f + td_exp(-x));
}

uint64_t td_exp_weights(const float *x, float max, uint64_t *w, size_t n)
{
    return PICK(exp_weights)(x, max, w, n);
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
