/* SPDX-License-Identifier: Apache-2.0 */
/* Own exp, sin, cos, log: libm's switch by CPU, these give the same bits everywhere (numerics, rule
 * 9). Every product-sum is an explicit fma(). On a CPU with FMA instructions the same source
 * compiled for them runs instead; fma() is exactly rounded, so both give equal bits. Any thread. */
#ifndef TD_KERNELS_MATH_H
#define TD_KERNELS_MATH_H

#include <stddef.h>
#include <stdint.h>

/* y[i] = e^x[i]; at most 1 ulp off in the normal range; below -87.3 gives 0, above 88.7 infinity;
 * NaN stays. x = y is fine. */
void td_exp_n(const float *x, float *y, size_t n);
float td_exp(float x);
/* y[i] = x[i] / (1 + e^-x[i]) * u[i]  (SwiGLU). */
void td_silu_mul_n(const float *x, const float *u, float *y, size_t n);
/* 1 / (1 + e^-x). */
float td_sigmoid(float x);
/* Natural logarithm of a positive finite number, in double, at most 2 ulp off. */
double td_ln(double x);
double td_exp_d(double x); /* |x| < 700 */
/* sin and cos of x, |x| < 1e8, from a double argument, rounded to f32. */
void td_sincos(double x, float *ret_sin, float *ret_cos);
/* w[i] = (u64)(e^(x[i] - max) * 2^32), the sampler's integer weights; x[i] <= max. Sum of all. */
uint64_t td_exp_weights(const float *x, float max, uint64_t *w, size_t n);

/* Rotation table row of one position as transformers makes it: inv_freq_i = 1 / theta^(2i/R) and
 * the angle are f32. inv_freq [R/2] comes from td_rope_freqs. */
void td_rope_freqs(double theta, uint32_t rope_dims, float *ret_inv_freq);
void td_rope_row(const float *inv_freq, uint32_t pairs, uint32_t position, float *ret_cos,
                 float *ret_sin);

/* Flush denormals on this thread (FTZ and DAZ); returns the old control word for td_fp_restore. */
uint32_t td_fp_flush(void);
void td_fp_restore(uint32_t old);

#endif
