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

static inline td_queue *open_queue(td_dtype act, uint32_t threads)
{
    td_queue *q = NULL;
    td_err err = {0};
    td_backend_options o = {.act = act,
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

static inline void near(double got, double want, double tolerance, const char *what, size_t at)
{
    if (!(fabs(got - want) <= tolerance))
        fail_msg("%s[%zu] is %.9g, float64 says %.9g (tolerance %g)", what, at, got, want,
                 tolerance);
}

#endif
