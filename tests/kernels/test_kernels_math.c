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

static void both_copies_give_the_same_bits(void **state)
{
    if (!has_fma())
        skip();
    float x[64], u[64], a[64], b[64];
    uint64_t wa[64], wb[64];
    for (int round = 0; round < 20000; round++) {
        for (int i = 0; i < 64; i++) {
            uint32_t bits = (uint32_t)td_rng_next(&rng); /* every float there is */
            memcpy(&x[i], &bits, 4);
            u[i] = value(0);
        }
        exp_n_v2(x, a, 64);
        exp_n_fma(x, b, 64);
        assert_memory_equal(a, b, sizeof a);
        for (int i = 0; i < 64; i++)
            x[i] = value(0) * 30.0f;
        silu_mul_n_v2(x, u, a, 64);
        silu_mul_n_fma(x, u, b, 64);
        assert_memory_equal(a, b, sizeof a);
        assert_int_equal(exp_weights_v2(x, 30.0f, wa, 64), exp_weights_fma(x, 30.0f, wb, 64));
        assert_memory_equal(wa, wb, sizeof wa);
        sincos_v2((double)x[0] * 1e4, &a[0], &a[1]);
        sincos_fma((double)x[0] * 1e4, &b[0], &b[1]);
        assert_memory_equal(a, b, 8);
        double p = exp_d_v2((double)x[1]), q = exp_d_fma((double)x[1]);
        assert_memory_equal(&p, &q, 8);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(exp_is_within_one_ulp),
        cmocka_unit_test(sine_and_cosine_are_correctly_rounded_almost),
        cmocka_unit_test(log_and_rope_frequencies),
        cmocka_unit_test(both_copies_give_the_same_bits),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
