/* SPDX-License-Identifier: Apache-2.0 */
/* Small floating-point formats of checkpoints and of the KV pool: f16, OCP e4m3fn, e2m1, e8m0 and
 * the MX block of 32 (OCP Microscaling Formats 1.0; FP8: OCP 8-bit Floating Point 1.0). Decoding is
 * exact. Encoding rounds to nearest, ties to the even code, and saturates. Any thread. */
#ifndef TD_KERNELS_FORMATS_H
#define TD_KERNELS_FORMATS_H

#include <stddef.h>
#include <stdint.h>

enum {
    TD_FP8_BLOCK = 128, /* rows and columns of one FP8 scale */
    TD_MX_GROUP = 32,   /* elements of one e8m0 scale */
    TD_E8M0_NAN = 0xff, /* the one code that is no scale */
    TD_E4M3_MAX = 448,  /* largest finite value; there is no infinity */
};

/* Codes 0x7f and 0xff are NaN. */
float td_e4m3_to_f32(uint8_t code);
/* Beyond +-448: +-448. NaN: 0x7f with the sign. */
uint8_t td_f32_to_e4m3(float x);

/* 2^(code - 127); 0xff is NaN. 0 gives 2^-127, a denormal: a thread that flushes denormals reads
 * it as 0. */
float td_e8m0_to_f32(uint8_t code);

/* Code: sign, then 0 0.5 1 1.5 2 3 4 6. Twice the value is the integer 0 1 2 3 4 6 8 12. */
extern const int8_t td_e2m1_doubled[16];
/* Beyond +-6: +-6. What rounds to zero is +0, as Quark writes it. x is not NaN. */
uint8_t td_f32_to_e2m1(float x);

/* Scale of 32 values under Quark's rule "even": the exponent of amax rounded half up at 1.75,
 * minus 2, at least 2^-127; amax 0 gives 2^-126. x is finite. */
uint8_t td_mx_scale_even(const float x[TD_MX_GROUP]);
/* 32 values to 16 bytes, the even element in the low nibble. */
void td_mx_encode(const float x[TD_MX_GROUP], uint8_t scale, uint8_t ret_codes[TD_MX_GROUP / 2]);
void td_mx_decode(const uint8_t codes[TD_MX_GROUP / 2], uint8_t scale, float ret_x[TD_MX_GROUP]);

/* Row n of a quantised matrix [N][k] as checkpoints hold it (td_weight_format): codes are the
 * row's, scales the whole matrix's, unaligned. Element i goes to ret_x[i * stride]. */
void td_fp8_decode_row(const uint8_t *codes, const void *scales, uint32_t n, uint32_t k,
                       size_t stride, float *ret_x);
void td_mx_decode_row(const uint8_t *codes, const void *scales, uint32_t n, uint32_t k,
                      size_t stride, float *ret_x);

/* What OCP Microscaling Formats 1.0, 6.3, makes of k values (whole groups of 32) in e4m3: a scale
 * of 2^(floor(log2(largest magnitude)) - 8), at least 2^-127; elements x / scale to nearest even,
 * at most 448. In float64, as a specification: kernels have their own. */
void td_ocp_fp8_values(const float *x, uint32_t k, double *ret);

/* IEEE half precision; exact. */
float td_f16_to_f32(uint16_t h);

/* Scale of a block of e4m3 whose largest magnitude is amax: amax / 448, 1 for 0. */
float td_fp8_scale(float amax);

#endif
