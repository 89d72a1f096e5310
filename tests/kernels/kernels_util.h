/* SPDX-License-Identifier: Apache-2.0 */
/* Buffers for the kernel tests: NaN-filled, with guard bytes on both sides; a random source; a
 * small step. */
#ifndef TD_TESTS_KERNELS_UTIL_H
#define TD_TESTS_KERNELS_UTIL_H

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/rand.h"
#include "kernels/formats.h"
#include "kernels/kernels.h"
#include "kernels/kplan.h"

enum { GUARD = 64, BUFS = 64 };

typedef struct guarded {
    uint8_t *raw;
    size_t bytes;
} guarded;

static guarded bufs[BUFS];
static size_t n_bufs;
static td_rng rng = {1, 0};

/* n floats of NaN between guards. */
static inline float *floats(size_t n)
{
    size_t bytes = n * sizeof(float), room = (bytes + 63) / 64 * 64;
    uint8_t *raw = aligned_alloc(64, room + 2 * GUARD);
    assert_non_null(raw);
    assert_true(n_bufs < BUFS);
    memset(raw, 0xa5, room + 2 * GUARD);
    memset(raw + GUARD, 0xff, bytes);
    bufs[n_bufs++] = (guarded){raw, bytes};
    return (float *)(raw + GUARD);
}

static inline uint32_t *words(size_t n)
{
    return (uint32_t *)floats(n);
}

/* Uniform in [-1, 1], exact in BF16 when short. */
static inline float value(int bf16)
{
    float f = (float)((double)(td_rng_next(&rng) >> 11) / 4503599627370496.0 - 1.0);
    uint32_t u;
    memcpy(&u, &f, 4);
    u &= bf16 ? 0xffff0000u : 0xffffffffu;
    memcpy(&f, &u, 4);
    return f;
}

static inline float *random_floats(size_t n, int bf16)
{
    float *f = floats(n);
    for (size_t i = 0; i < n; i++)
        f[i] = value(bf16);
    return f;
}

/* Every guard is whole; then free all. */
static inline void check_guards(void)
{
    for (size_t b = 0; b < n_bufs; b++) {
        const guarded *g = &bufs[b];
        size_t room = (g->bytes + 63) / 64 * 64 + 2 * GUARD;
        for (size_t i = 0; i < room; i++)
            if (i < GUARD || i >= GUARD + g->bytes)
                assert_int_equal(g->raw[i], 0xa5);
        free(g->raw);
    }
    n_bufs = 0;
}

/* Operands that meet MXFP4 weights become int8. */
static int under_i8;
/* Who is under test; the kernel tests run once for each that this machine has. */
static const td_backend *under = &td_backend_ref;
static const char *const all_isas[] = {"ref", "avx2", "avx512", "avx512bf16vnni"};
enum { ISAS = 4 };

/* Run the group for every instruction set that this machine has; what it lacks is named. */
#define RUN_FOR_EVERY_ISA(tests)                                                                   \
    do {                                                                                           \
        int failed_ = 0;                                                                           \
        for (int i_ = 0; i_ < ISAS; i_++) {                                                        \
            under = td_backend_get(all_isas[i_]);                                                  \
            if (under)                                                                             \
                failed_ += cmocka_run_group_tests_name(all_isas[i_], tests, NULL, NULL);           \
            else                                                                                   \
                printf("skipped: this processor has no %s\n", all_isas[i_]);                       \
        }                                                                                          \
        return failed_;                                                                            \
    } while (0)

#ifdef TD_TEST_EMU
#include "tests/kernels/emu_util.h"
#undef RUN_FOR_EVERY_ISA
#define RUN_FOR_EVERY_ISA(tests) RUN_EMULATED(tests)
#endif

static inline td_queue *open_queue(td_dtype act, uint32_t threads)
{
    td_queue *q = NULL;
    td_err err = {0};
    td_backend_options o = {.act = act,
                            .act_i8 = under_i8,
                            .n_threads = threads,
                            .max_rows = 64,
                            .max_context = 4096,
                            .max_heads = 16,
                            .max_row_elems = 256,
                            .max_round_k = 256};
    if (under->open(&o, &q, &err) < 0)
        fail_msg("%s", err.text);
    return q;
}

/* A BF16 matrix keeps only values that are exact in it. */
static inline td_tensor *weight_as(td_weight_format format, const float *w, uint32_t slabs,
                                   uint32_t n, uint32_t k)
{
    td_tensor *t = NULL;
    size_t all = (size_t)slabs * n * k;
    uint16_t *half = malloc(all * sizeof *half);
    assert_non_null(half);
    for (size_t i = 0; i < all; i++)
        memcpy(&half[i], (const char *)&w[i] + 2, 2);
    td_weight_src src = {.dtype = format == TD_W_BF16 ? TD_BF16 : TD_F32,
                         .base = format == TD_W_BF16 ? (const void *)half : w,
                         .slab_stride = (size_t)n * k,
                         .n_stride = k,
                         .k_stride = 1};
    assert_int_equal(under->weight_new(format, slabs, n, k, &t), 0);
    for (uint32_t s = 0; s < slabs; s++)
        under->weight_fill(t, s, 0, n, &src);
    free(half);
    return t;
}

/* A quantised matrix of random codes, and the values they stand for. Scales of MXFP4 from 2^-4 to
 * 2^3. */
static inline td_tensor *weight_random(td_weight_format format, uint32_t n, uint32_t k,
                                       double *ret_values)
{
    td_tensor *t = NULL;
    int mx = format == TD_W_MXFP4;
    uint32_t across = mx ? k / 32 : (k + 127) / 128, down = mx ? n : (n + 127) / 128;
    size_t row = mx ? k / 2 : k;
    uint8_t *codes = malloc(n * row), *e8m0 = malloc((size_t)across * down);
    float *scales = malloc((size_t)across * down * sizeof *scales);
    assert_true(codes && scales && e8m0);
    for (size_t i = 0; i < (size_t)across * down; i++) {
        e8m0[i] = (uint8_t)(123 + td_rng_below(&rng, 8));
        scales[i] = 0.01f + 0.1f * fabsf(value(0));
    }
    for (size_t i = 0; i < n * row; i++) {
        codes[i] = (uint8_t)td_rng_next(&rng);
        if (!mx && (codes[i] & 0x7f) == 0x7f)
            codes[i] ^= 1;
    }
    for (uint32_t i = 0; i < n; i++)
        for (uint32_t j = 0; j < k; j++)
            if (mx) {
                uint8_t c = codes[i * row + j / 2] >> (j % 2 * 4) & 15;
                ret_values[(size_t)i * k + j] =
                    0.5 * td_e2m1_doubled[c] * ldexp(1, e8m0[i * across + j / 32] - 127);
            } else {
                ret_values[(size_t)i * k + j] = (double)td_e4m3_to_f32(codes[i * row + j]) *
                                                (double)scales[i / 128 * across + j / 128];
            }
    td_weight_src src = {.dtype = mx ? TD_U8 : TD_F8E4M3,
                         .base = codes,
                         .scales = mx ? (const void *)e8m0 : scales,
                         .n_stride = row,
                         .k_stride = 1};
    assert_int_equal(under->weight_new(format, 1, n, k, &t), 0);
    under->weight_fill(t, 0, 0, n, &src);
    free(codes);
    free(e8m0);
    free(scales);
    return t;
}

static inline td_tensor *weight(const float *w, uint32_t slabs, uint32_t n, uint32_t k)
{
    return weight_as(TD_W_F32, w, slabs, n, k);
}

static inline td_tensor *vector(const float *w, uint32_t n)
{
    td_tensor *t = NULL;
    td_weight_src src = {.dtype = TD_F32, .base = w, .n_stride = 1};
    assert_int_equal(under->vector_new(n, &src, &t), 0);
    return t;
}

static inline float bf16_of(float f)
{
    uint32_t u;
    memcpy(&u, &f, 4);
    u = (u + 0x7fffu + (u >> 16 & 1)) & 0xffff0000u;
    memcpy(&f, &u, 4);
    return f;
}

static inline float rounded(td_dtype t, float f)
{
    return t == TD_BF16 ? bf16_of(f) : f;
}

/* Attention by BF16 matrix instructions rounds the query and a tile's weights (numerics, rule 5):
 * what the query is then, and how far outputs may be off (weights by 2^-9; values within 1). Sums
 * by matrix instructions have the tree of their hardware: wider is how much more they may err. */
#ifdef TD_TEST_EMU
enum { MATRIX = 1 };
#else
enum { MATRIX = 0 };
#endif
static const double wider __attribute__((unused)) = MATRIX ? 4.0 : 1.0;

static inline float attend_query(td_dtype kv, float q)
{
    return MATRIX ? rounded(kv, q) : q;
}

static inline double attend_bound(td_dtype kv, double bound)
{
    return MATRIX && kv == TD_BF16 ? 0.004 : wider * bound;
}

static inline void near(double got, double want, double tolerance, const char *what, size_t at)
{
    if (!(fabs(got - want) <= tolerance))
        fail_msg("%s[%zu] is %.9g, float64 says %.9g (tolerance %g)", what, at, got, want,
                 tolerance);
}

#endif
