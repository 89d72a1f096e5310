/* SPDX-License-Identifier: Apache-2.0 */
/* Compiled twice by math.c: TD_BODY(name) names the copy, TD_BODY_TARGET is its instruction set. No
 * include guard. */

/* Cephes' expf polynomial on [-ln2/2, ln2/2]; n by the rounding-constant trick, so that every step
 * is exact or one rounding. */
TD_BODY_TARGET static inline float TD_BODY(exp1)(float x)
{
    const float round = 12582912.0f; /* 1.5 * 2^23 */
    float c = x > 89.0f ? 89.0f : x;
    c = c < -88.0f ? -88.0f : c;
    float t = __builtin_fmaf(c, 1.44269504088896341f, round);
    float n = t - round;
    float r = __builtin_fmaf(n, -0.693359375f, c);
    r = __builtin_fmaf(n, 2.12194440e-4f, r);
    float p = 1.9875691500e-4f;
    p = __builtin_fmaf(p, r, 1.3981999507e-3f);
    p = __builtin_fmaf(p, r, 8.3334519073e-3f);
    p = __builtin_fmaf(p, r, 4.1665795894e-2f);
    p = __builtin_fmaf(p, r, 1.6666665459e-1f);
    p = __builtin_fmaf(p, r, 5.0000001201e-1f);
    p = __builtin_fmaf(p, r * r, r) + 1.0f;
    /* two steps of scaling: 2^128 has no f32, 2^-127 would be denormal */
    uint32_t bits;
    __builtin_memcpy(&bits, &t, 4);
    int32_t k = (int32_t)(bits - 0x4b400000u); /* n sits in the low bits behind the constant's */
    int32_t h = k >> 1;
    uint32_t sa = (uint32_t)(h + 127) << 23, sb = (uint32_t)(k - h + 127) << 23;
    float a, b;
    __builtin_memcpy(&a, &sa, 4);
    __builtin_memcpy(&b, &sb, 4);
    float y = p * a * b;
    return x < -87.3f ? 0.0f : y;
}

TD_BODY_TARGET static void TD_BODY(exp_n)(const float *x, float *y, size_t n)
{
    for (size_t i = 0; i < n; i++)
        y[i] = TD_BODY(exp1)(x[i]);
}

TD_BODY_TARGET static void TD_BODY(silu_mul_n)(const float *x, const float *u, float *y, size_t n)
{
    for (size_t i = 0; i < n; i++)
        y[i] = x[i] / (1.0f + TD_BODY(exp1)(-x[i])) * u[i];
}

TD_BODY_TARGET static uint64_t TD_BODY(exp_weights)(const float *x, float max, uint64_t *w,
                                                    size_t n)
{
    uint64_t sum = 0;
    for (size_t i = 0; i < n; i++) {
        w[i] = (uint64_t)(int64_t)(TD_BODY(exp1)(x[i] - max) * 4294967296.0f);
        sum += w[i];
    }
    return sum;
}

/* Taylor series after reduction by ln 2 in two parts: |r| <= 0.347, 14 terms give full double
 * precision. */
TD_BODY_TARGET static double TD_BODY(exp_d)(double x)
{
    const double round = 6755399441055744.0; /* 1.5 * 2^52 */
    double n = __builtin_fma(x, 1.4426950408889634074, round) - round;
    double r = __builtin_fma(n, -6.93147180369123816490e-01, x);
    r = __builtin_fma(n, -1.90821492927058770002e-10, r);
    static const double c[] = {1.0 / 6227020800.0,
                               1.0 / 479001600.0,
                               1.0 / 39916800.0,
                               1.0 / 3628800.0,
                               1.0 / 362880.0,
                               1.0 / 40320.0,
                               1.0 / 5040.0,
                               1.0 / 720.0,
                               1.0 / 120.0,
                               1.0 / 24.0,
                               1.0 / 6.0,
                               0.5,
                               1.0,
                               1.0};
    double p = c[0];
    for (int i = 1; i < 14; i++)
        p = __builtin_fma(p, r, c[i]);
    uint64_t s = (uint64_t)((int64_t)n + 1023) << 52;
    double scale;
    __builtin_memcpy(&scale, &s, 8);
    return p * scale;
}

/* Reduction by pi/2 in three parts, then Taylor series on [-pi/4, pi/4]. */
TD_BODY_TARGET static void TD_BODY(sincos)(double x, float *ret_sin, float *ret_cos)
{
    const double round = 6755399441055744.0;
    double n = __builtin_fma(x, 0.63661977236758134308, round) - round;
    double r = __builtin_fma(n, -1.57079632673412561417e+00, x);
    r = __builtin_fma(n, -6.07710050630396597660e-11, r);
    r = __builtin_fma(n, -2.02226624879595063154e-21, r);
    double z = r * r;
    double s = -1.0 / 1307674368000.0;
    s = __builtin_fma(s, z, 1.0 / 6227020800.0);
    s = __builtin_fma(s, z, -1.0 / 39916800.0);
    s = __builtin_fma(s, z, 1.0 / 362880.0);
    s = __builtin_fma(s, z, -1.0 / 5040.0);
    s = __builtin_fma(s, z, 1.0 / 120.0);
    s = __builtin_fma(s, z, -1.0 / 6.0);
    s = __builtin_fma(s * z, r, r);
    double c = -1.0 / 87178291200.0;
    c = __builtin_fma(c, z, 1.0 / 479001600.0);
    c = __builtin_fma(c, z, -1.0 / 3628800.0);
    c = __builtin_fma(c, z, 1.0 / 40320.0);
    c = __builtin_fma(c, z, -1.0 / 720.0);
    c = __builtin_fma(c, z, 1.0 / 24.0);
    c = __builtin_fma(c, z, -0.5);
    c = __builtin_fma(c, z, 1.0);
    int q = (int)((int64_t)n & 3);
    double a = q & 1 ? c : s, b = q & 1 ? s : c;
    *ret_sin = (float)(q & 2 ? -a : a);
    *ret_cos = (float)((q == 1 || q == 2) ? -b : b);
}

#undef TD_BODY
#undef TD_BODY_TARGET
