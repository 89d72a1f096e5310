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

/* Vectors to a panel. */
enum { VECS = 16 / VEC };

#endif
#endif
