/* SPDX-License-Identifier: Apache-2.0 */
/* The few vector words that the kernel bodies speak, for the instruction set of the file that
 * includes this: one zmm, or two ymm for each panel of 16 outputs. Include only from a file that
 * CMake compiles for AVX2 or AVX-512. */
#ifndef TD_KERNELS_CPU_VEC_H
#define TD_KERNELS_CPU_VEC_H

#ifdef __AVX2__

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

/* Loops over register tiles must be gone before registers are given out. Sanitizers check every
 * step of them, and would compile for minutes. */
#ifdef TD_SANITIZED
#define TD_UNROLL
#define TD_INLINE static inline
#elif defined(__clang__)
#define TD_UNROLL _Pragma("clang loop unroll(full)")
#define TD_INLINE static inline __attribute__((always_inline))
#else
#define TD_UNROLL _Pragma("GCC unroll 32")
#define TD_INLINE static inline __attribute__((always_inline))
#endif

#ifdef __AVX512F__

enum { VEC = 16 };
typedef __m512 vec;

TD_INLINE vec vec_zero(void)
{
    return _mm512_setzero_ps();
}

TD_INLINE vec vec_load(const void *p)
{
    return _mm512_load_ps(p);
}

TD_INLINE vec vec_loadu(const void *p)
{
    return _mm512_loadu_ps(p);
}

TD_INLINE void vec_store(void *p, vec v)
{
    _mm512_store_ps(p, v);
}

TD_INLINE vec vec_all(float f)
{
    return _mm512_set1_ps(f);
}

TD_INLINE vec vec_add(vec a, vec b)
{
    return _mm512_add_ps(a, b);
}

TD_INLINE vec vec_fma(vec a, vec b, vec c)
{
    return _mm512_fmadd_ps(a, b, c);
}

TD_INLINE vec vec_mul(vec a, vec b)
{
    return _mm512_mul_ps(a, b);
}

/* Of 16 pairs of BF16: the first of each, the second of each, exactly. */
TD_INLINE vec vec_even(const void *p)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_load_si512(p), 16));
}

TD_INLINE vec vec_odd(const void *p)
{
    return _mm512_castsi512_ps(
        _mm512_and_si512(_mm512_load_si512(p), _mm512_set1_epi32((int)0xffff0000u)));
}

typedef __m512i ivec;

TD_INLINE ivec ivec_load(const void *p)
{
    return _mm512_load_si512(p);
}

TD_INLINE ivec ivec_all(uint32_t x)
{
    return _mm512_set1_epi32((int)x);
}

TD_INLINE ivec ivec_and(ivec a, ivec b)
{
    return _mm512_and_si512(a, b);
}

TD_INLINE ivec ivec_add(ivec a, ivec b)
{
    return _mm512_add_epi32(a, b);
}

/* Each byte (0..15) becomes table[byte]. */
TD_INLINE ivec ivec_look_up(const int8_t table[16], ivec bytes)
{
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)table)),
                               bytes);
}

TD_INLINE vec vec_of_ints(ivec a)
{
    return _mm512_cvtepi32_ps(a);
}

/* Sums of two products of u8 and s8, in 16 bits; of two 16-bit lanes, in 32. */
TD_INLINE ivec ivec_pairs8(ivec u8, ivec s8)
{
    return _mm512_maddubs_epi16(u8, s8);
}

TD_INLINE ivec ivec_pairs16(ivec a)
{
    return _mm512_madd_epi16(a, _mm512_set1_epi16(1));
}

TD_INLINE ivec ivec_add16(ivec a, ivec b)
{
    return _mm512_add_epi16(a, b);
}

/* 2^(code - 127) of one e8m0 code a lane; code 0 is 0, code 255 infinity. */
TD_INLINE vec vec_e8m0(const uint8_t *codes)
{
    __m512i u = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)codes));
    return _mm512_castsi512_ps(_mm512_slli_epi32(u, 23));
}

/* e2m1 in the low four bits of each lane; what stands above does not matter. */
TD_INLINE vec vec_e2m1(ivec codes)
{
    const __m512 values = _mm512_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f,
                                         -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f);
    return _mm512_permutexvar_ps(codes, values);
}

/* e4m3 in the low eight bits of each lane, nothing above; codes of NaN read as 480. */
TD_INLINE vec vec_e4m3(ivec codes)
{
    __m512i m = _mm512_slli_epi32(_mm512_and_si512(codes, _mm512_set1_epi32(0x7f)), 20);
    __m512i sign = _mm512_slli_epi32(_mm512_and_si512(codes, _mm512_set1_epi32(0x80)), 24);
    __m512i bits = _mm512_add_epi32(m, _mm512_set1_epi32(120 << 23));
    /* exponent 0: m * 2^-9 = 2^-6 (1 + m / 8) - 2^-6 */
    __mmask16 low = _mm512_testn_epi32_mask(codes, _mm512_set1_epi32(0x78));
    __m512 f =
        _mm512_castsi512_ps(_mm512_mask_add_epi32(bits, low, bits, _mm512_set1_epi32(1 << 23)));
    f = _mm512_mask_sub_ps(f, low, f, _mm512_set1_ps(0.015625f));
    return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(f), sign));
}

#else

enum { VEC = 8 };
typedef __m256 vec;

TD_INLINE vec vec_zero(void)
{
    return _mm256_setzero_ps();
}

TD_INLINE vec vec_load(const void *p)
{
    return _mm256_load_ps(p);
}

TD_INLINE vec vec_loadu(const void *p)
{
    return _mm256_loadu_ps(p);
}

TD_INLINE void vec_store(void *p, vec v)
{
    _mm256_store_ps(p, v);
}

TD_INLINE vec vec_all(float f)
{
    return _mm256_set1_ps(f);
}

TD_INLINE vec vec_add(vec a, vec b)
{
    return _mm256_add_ps(a, b);
}

TD_INLINE vec vec_fma(vec a, vec b, vec c)
{
    return _mm256_fmadd_ps(a, b, c);
}

TD_INLINE vec vec_mul(vec a, vec b)
{
    return _mm256_mul_ps(a, b);
}

typedef __m256i ivec;

TD_INLINE ivec ivec_load(const void *p)
{
    return _mm256_load_si256(p);
}

TD_INLINE ivec ivec_all(uint32_t x)
{
    return _mm256_set1_epi32((int)x);
}

TD_INLINE ivec ivec_and(ivec a, ivec b)
{
    return _mm256_and_si256(a, b);
}

TD_INLINE ivec ivec_add(ivec a, ivec b)
{
    return _mm256_add_epi32(a, b);
}

TD_INLINE ivec ivec_look_up(const int8_t table[16], ivec bytes)
{
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table)),
                               bytes);
}

TD_INLINE vec vec_of_ints(ivec a)
{
    return _mm256_cvtepi32_ps(a);
}

TD_INLINE ivec ivec_pairs8(ivec u8, ivec s8)
{
    return _mm256_maddubs_epi16(u8, s8);
}

TD_INLINE ivec ivec_pairs16(ivec a)
{
    return _mm256_madd_epi16(a, _mm256_set1_epi16(1));
}

TD_INLINE ivec ivec_add16(ivec a, ivec b)
{
    return _mm256_add_epi16(a, b);
}

TD_INLINE vec vec_e8m0(const uint8_t *codes)
{
    __m256i u = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)codes));
    return _mm256_castsi256_ps(_mm256_slli_epi32(u, 23));
}

TD_INLINE vec vec_e2m1(ivec codes)
{
    const __m256 values = _mm256_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f);
    __m256i sign = _mm256_slli_epi32(_mm256_and_si256(codes, _mm256_set1_epi32(8)), 28);
    return _mm256_xor_ps(_mm256_permutevar8x32_ps(values, codes), _mm256_castsi256_ps(sign));
}

TD_INLINE vec vec_e4m3(ivec codes)
{
    __m256i m = _mm256_slli_epi32(_mm256_and_si256(codes, _mm256_set1_epi32(0x7f)), 20);
    __m256i sign = _mm256_slli_epi32(_mm256_and_si256(codes, _mm256_set1_epi32(0x80)), 24);
    __m256 f = _mm256_castsi256_ps(_mm256_add_epi32(m, _mm256_set1_epi32(120 << 23)));
    __m256i low = _mm256_cmpeq_epi32(_mm256_and_si256(codes, _mm256_set1_epi32(0x78)),
                                     _mm256_setzero_si256());
    __m256 small =
        _mm256_sub_ps(_mm256_castsi256_ps(_mm256_add_epi32(m, _mm256_set1_epi32(121 << 23))),
                      _mm256_set1_ps(0.015625f));
    f = _mm256_blendv_ps(f, small, _mm256_castsi256_ps(low));
    return _mm256_or_ps(f, _mm256_castsi256_ps(sign));
}

TD_INLINE vec vec_even(const void *p)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_load_si256(p), 16));
}

TD_INLINE vec vec_odd(const void *p)
{
    return _mm256_castsi256_ps(
        _mm256_and_si256(_mm256_load_si256(p), _mm256_set1_epi32((int)0xffff0000u)));
}

#endif

typedef uint32_t uvec __attribute__((vector_size(VEC * 4)));

TD_INLINE ivec ivec_right(ivec a, int bits)
{
    return (ivec)((uvec)a >> (uint32_t)bits);
}

/* Vectors to a panel. */
enum { VECS = 16 / VEC };

#endif
#endif
