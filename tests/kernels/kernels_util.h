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
#include "kernels/checks/inside.h"
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

/* A check called c, for what checks and tests draw alike. */
#define BEGIN_CHECK(c)                                                                             \
    td_check_target c##_target = {.backend = under};                                               \
    td_check_result c##_result;                                                                    \
    td_check c;                                                                                    \
    td_check_begin(&(c), &c##_target, &c##_result);                                                \
    if (setjmp((c).out) != 0)                                                                      \
    fail_msg("%s", c##_result.text)

/* A BF16 matrix keeps only values that are exact in it. */
static inline td_tensor *weight_as(td_weight_format format, const float *w, uint32_t slabs,
                                   uint32_t n, uint32_t k)
{
    BEGIN_CHECK(c);
    return td_check_weight_as(&c, format, w, slabs, n, k);
}

/* A quantised matrix of random codes, and the values they stand for. */
static inline td_tensor *weight_random(td_weight_format format, uint32_t n, uint32_t k,
                                       double *ret_values)
{
    BEGIN_CHECK(c);
    c.rng = rng;
    td_tensor *w = td_check_codes(&c, format, 1, n, k, ret_values);
    rng = c.rng;
    return w;
}

/* Sums by matrix instructions, whose tree is the hardware's (numerics, rule 5)? */
#ifdef TD_TEST_EMU
enum { MATRIX = 1 };
#else
enum { MATRIX = 0 };
#endif

static inline void near(double got, double want, double tolerance, const char *what, size_t at)
{
    if (!(fabs(got - want) <= tolerance))
        fail_msg("%s[%zu] is %.9g, float64 says %.9g (tolerance %g)", what, at, got, want,
                 tolerance);
}

#endif
