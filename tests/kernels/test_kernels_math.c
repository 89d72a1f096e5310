/* SPDX-License-Identifier: Apache-2.0 */
/* Guards rule 9 of the numerics: own exp, sin, cos, log are accurate, and the copy compiled for FMA
 * instructions gives the bits of the portable one. Includes the source to reach both. */
#include "tests/kernels/kernels_util.h"

#include "kernels/math.c"

static double ulp_of(float f)
{
    return fabs((double)nextafterf(f, INFINITY) - (double)f);
}

static void exp_is_within_one_ulp(void **state)
{
    for (double x = -87.0; x < 88.5; x += 0.00173) {
        float f = (float)x, want = (float)exp((double)f);
        if (fabs((double)td_exp(f) - exp((double)f)) > 1.01 * ulp_of(want))
            fail_msg("exp(%g) = %.9g", (double)f, (double)td_exp(f));
    }
    assert_true(td_exp(0.0f) == 1.0f); /* the sampler's greatest weight is exactly 2^32 */
    assert_true(td_exp(-200.0f) == 0.0f);
    assert_true(td_exp(-INFINITY) == 0.0f);
    assert_true(isinf(td_exp(100.0f)));
    assert_true(isinf(td_exp(INFINITY)));
    assert_true(isnan(td_exp(NAN)));
}

static void sine_and_cosine_are_correctly_rounded_almost(void **state)
{
    for (int i = 0; i < 200000; i++) {
        float x = (float)((double)(td_rng_next(&rng) >> 20) / 17592186044416.0 * 1048576.0), s, c;
        td_sincos((double)x, &s, &c);
        near((double)s, sin((double)x), 6.1e-8, "sin", (size_t)i);
        near((double)c, cos((double)x), 6.1e-8, "cos", (size_t)i);
    }
}

static void log_and_rope_frequencies(void **state)
{
    for (double x = 1e-9; x < 1e15; x *= 1.0173)
        near(td_ln(x), log(x), 4e-16 * (1 + fabs(log(x))), "log", 0);
    float f[32];
    td_rope_freqs(8e6, 64, f);
    for (int i = 0; i < 32; i++)
        near((double)f[i], pow(8e6, -2.0 * i / 64), 1.2e-7 * pow(8e6, -2.0 * i / 64), "freq",
             (size_t)i);
    near((double)td_sigmoid(0.3f), 1 / (1 + exp(-0.3)), 1e-7, "sigmoid", 0);
    assert_true(td_sigmoid(-200.0f) == 0.0f && td_sigmoid(200.0f) == 1.0f);
}

/* One instruction set's copy of what runs over arrays. */
typedef struct copy {
    void (*exp)(const float *, float *, size_t);
    void (*silu)(const float *, const float *, float *, size_t);
    uint64_t (*weights)(const float *, float, uint64_t *, size_t);
} copy;

/* 61: whole vectors and a tail of every width. */
enum { COUNT = 61 };

static void equals_portable(const copy *c)
{
    float x[COUNT], u[COUNT], a[COUNT], b[COUNT];
    uint64_t wa[COUNT], wb[COUNT];
    for (int round = 0; round < 20000; round++) {
        for (int i = 0; i < COUNT; i++) {
            uint32_t bits = (uint32_t)td_rng_next(&rng); /* every float there is */
            memcpy(&x[i], &bits, 4);
            u[i] = value(0);
        }
        exp_n_v2(x, a, COUNT);
        c->exp(x, b, COUNT);
        assert_memory_equal(a, b, sizeof a);
        for (int i = 0; i < COUNT; i++)
            x[i] = value(0) * 30.0f;
        x[7] = 30.0f; /* the greatest weight: 2^32, one more than 32 bits hold */
        silu_mul_n_v2(x, u, a, COUNT);
        c->silu(x, u, b, COUNT);
        assert_memory_equal(a, b, sizeof a);
        assert_int_equal(exp_weights_v2(x, 30.0f, wa, COUNT), c->weights(x, 30.0f, wb, COUNT));
        assert_memory_equal(wa, wb, sizeof wa);
        assert_int_equal(wa[7], 1ull << 32);
    }
}

static void every_copy_gives_the_same_bits(void **state)
{
    static const copy fma = {exp_n_fma, silu_mul_n_fma, exp_weights_fma},
                      avx2 = {exp_n_avx2, silu_mul_n_avx2, exp_weights_avx2},
                      avx512 = {exp_n_avx512, silu_mul_n_avx512, exp_weights_avx512};
    if (!has_fma())
        skip();
    equals_portable(&fma);
    equals_portable(&avx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq"))
        equals_portable(&avx512);
    else
        printf("not tested: this processor has no avx512\n");
    for (int round = 0; round < 20000; round++) {
        float a[2], b[2], x = value(0) * 30.0f;
        sincos_v2((double)x * 1e4, &a[0], &a[1]);
        sincos_fma((double)x * 1e4, &b[0], &b[1]);
        assert_memory_equal(a, b, sizeof a);
        double p = exp_d_v2((double)x), q = exp_d_fma((double)x);
        assert_memory_equal(&p, &q, sizeof p);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(exp_is_within_one_ulp),
        cmocka_unit_test(sine_and_cosine_are_correctly_rounded_almost),
        cmocka_unit_test(log_and_rope_frequencies),
        cmocka_unit_test(every_copy_gives_the_same_bits),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
