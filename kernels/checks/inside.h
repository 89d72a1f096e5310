/* SPDX-License-Identifier: Apache-2.0 */
/* What checks are written with: buffers full of NaN between guard bytes, a random source,
 * comparisons that remember how near they came. A comparison that fails does not return. */
#ifndef TD_KERNELS_CHECKS_INSIDE_H
#define TD_KERNELS_CHECKS_INSIDE_H

#include <setjmp.h>

#include "base/rand.h"
#include "kernels/checks/checks.h"

enum { TD_CHECK_BUFS = 64 };

typedef struct td_check_buf {
    uint8_t *raw;
    size_t bytes;
} td_check_buf;

struct td_check {
    const td_check_target *target;
    const td_backend *be;
    td_rng rng;
    int i8, fp8;  /* operands that meet MXFP4 weights become int8, e4m3 */
    double wider; /* how much more a sum by matrix instructions may err */
    td_check_buf bufs[TD_CHECK_BUFS];
    size_t n_bufs;
    td_check_result *result;
    jmp_buf out;
};

/* Where a check begins and ends; td_check_run() does both. */
void td_check_begin(td_check *c, const td_check_target *t, td_check_result *result);
void td_check_drop(td_check *c); /* frees, looks at nothing */

void td_check_fail(td_check *c, const char *fmt, ...)
    __attribute__((format(printf, 2, 3), noreturn));
/* The backend has nothing of this check: "why". */
void td_check_skip(td_check *c, const char *why) __attribute__((noreturn));
/* |got - want| <= tolerance, or fail; what[at] names it. */
void td_check_near(td_check *c, double got, double want, double tolerance, const char *what,
                   size_t at);
#define TD_MUST(c, cond)                                                                           \
    do {                                                                                           \
        if (!(cond))                                                                               \
            td_check_fail((c), "%s:%d: not so: %s", __FILE_NAME__, __LINE__, #cond);               \
    } while (0)
#define TD_MUST_EQUAL(c, a, b)                                                                     \
    do {                                                                                           \
        long long a_ = (long long)(a), b_ = (long long)(b);                                        \
        if (a_ != b_)                                                                              \
            td_check_fail((c), "%s:%d: %s is %lld, not %lld", __FILE_NAME__, __LINE__, #a, a_,     \
                          b_);                                                                     \
    } while (0)
/* Byte for byte. */
#define TD_MUST_MATCH(c, a, b, n) td_check_match((c), (a), (b), (n), __FILE_NAME__, __LINE__, #a)
void td_check_match(td_check *c, const void *a, const void *b, size_t n, const char *file, int line,
                    const char *what);

/* These bytes go into td_check_result.bits. */
void td_check_bits(td_check *c, const void *p, size_t n);

/* n floats of NaN between guards; words: the same, as integers. */
float *td_check_floats(td_check *c, size_t n);
uint32_t *td_check_words(td_check *c, size_t n);
/* Uniform in [-1, 1], exact in BF16 when bf16. */
float td_check_value(td_check *c, int bf16);
float *td_check_random(td_check *c, size_t n, int bf16);
/* The guards of all buffers but the first `keep` are whole; these are freed. */
void td_check_guards(td_check *c, size_t keep);

td_queue *td_check_queue(td_check *c, td_dtype act, uint32_t threads);
/* f32 values as a matrix; a BF16 one keeps only values that are exact in it. */
td_tensor *td_check_weight_as(td_check *c, td_weight_format format, const float *w, uint32_t slabs,
                              uint32_t n, uint32_t k);
td_tensor *td_check_weight(td_check *c, const float *w, uint32_t slabs, uint32_t n, uint32_t k);
/* Quantised matrices of random codes, and the values they stand for. Scales of MXFP4 from 2^-4 to
 * 2^3. */
td_tensor *td_check_codes(td_check *c, td_weight_format format, uint32_t slabs, uint32_t n,
                          uint32_t k, double *ret_values);
/* Codes of n_slabs matrices [n][k] in FP8 or MXFP4, from which ranks take their shares. */
typedef struct td_check_quant {
    td_weight_format format;
    uint32_t slabs, n, k;
    uint8_t *codes, *e8m0; /* MXFP4: e8m0 [n][k / 32] */
    float *scales;         /* FP8: [n / 128][k / 128], rounded up */
} td_check_quant;
/* Drawn as td_check_codes() does; values: room for what they stand for, or NULL. */
void td_check_quant_draw(td_check *c, td_weight_format format, uint32_t slabs, uint32_t n,
                         uint32_t k, td_check_quant *ret, double *ret_values);
/* Rows n0 .. n0 + n, columns k0 .. k0 + k of every slab. FP8: n0 and k0 are multiples of 128, as a
 * share's first element begins a scale's block (td_weight_src). */
td_tensor *td_check_quant_part(td_check *c, const td_check_quant *q, uint32_t n0, uint32_t n,
                               uint32_t k0, uint32_t k);
void td_check_quant_done(td_check_quant *q);
/* What int8 in groups of 32 makes of k values of an operand. */
void td_check_int8(const float *a, uint32_t k, double *ret);
td_tensor *td_check_vector(td_check *c, const float *w, uint32_t n);

float td_check_bf16(float f);
float td_check_rounded(td_dtype t, float f);
/* Attention by BF16 matrix instructions rounds the query and a tile's weights: what the query is
 * then, and how far outputs may be off (weights by 2^-9; values within 1). */
float td_check_query(const td_check *c, td_dtype kv, float q);
double td_check_attend_bound(const td_check *c, td_dtype kv, double bound);

/* The checks, by file. */
#define TD_CHECK(group, function, name) void td_check_##function(td_check *c);
#include "kernels/checks/list.def"
#undef TD_CHECK

#endif
