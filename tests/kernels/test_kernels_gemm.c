/* SPDX-License-Identifier: Apache-2.0 */
/* Guards gemm, reduce_slices, logits, embed and add_norm on every backend (kernels/checks/gemm.c
 * says what), and that the widths of vector instructions change no bit. */
#include "tests/kernels/checks_util.h"

static td_gemm plain_gemm(const float *a, uint32_t k, const td_tensor *w, uint32_t n, float *out)
{
    return (td_gemm){.a = a,
                     .a_stride = k,
                     .n_heads = 1,
                     .epilogue = TD_EPI_F32,
                     .n_out = 1,
                     .w = {w},
                     .out = {out},
                     .out_stride = {n}};
}

static void widths_agree(const char *one, const char *other, td_dtype act, td_weight_format format)
{
    enum { T = 9, N = 75, K = 544 };
    const char *isas[] = {one, other};
    float *out[2], *a = random_floats(T * K, 1), *w = random_floats(N * K, 1);
    double *values = malloc(sizeof *values * N * K);
    td_rng seed = rng;
    for (int i = 0; i < 2; i++) {
        under = td_backend_get(isas[i]);
        rng = seed;
        out[i] = floats(T * N);
        td_queue *q = open_queue(act, 1);
        td_step st = {.n_rows = T};
        td_tensor *t = format > TD_W_BF16 ? weight_random(format, N, K, values)
                                          : weight_as(format, w, 1, N, K);
        td_gemm g = plain_gemm(a, K, t, N, out[i]);
        under->gemm(q, &st, &g);
        under->weight_free(t);
        under->close(q);
    }
    assert_memory_equal(out[0], out[1], T * N * sizeof(float));
    free(values);
    check_guards();
}

/* The trees of AVX2 and AVX-512 are one; AVX-512 with BF16 instructions joins where it does not use
 * them: f32 operands, and int8 ones. */
static void vector_widths_give_equal_bits(void **state)
{
    for (td_weight_format f = TD_W_F32; f < TD_WEIGHT_FORMATS; f++)
        for (under_i8 = 0; under_i8 < 2; under_i8++)
            for (td_dtype act = TD_F32; act <= TD_BF16; act++) {
                int no_dot = act == TD_F32 || f == TD_W_F32 || (f == TD_W_MXFP4 && under_i8);
                if (td_backend_get("avx512"))
                    widths_agree("avx2", "avx512", act, f);
                if (td_backend_get("avx512bf16vnni") && no_dot)
                    widths_agree("avx2", "avx512bf16vnni", act, f);
            }
    under_i8 = 0;
}

/* Scales of MXFP4 are powers of two and int8 sums are exact, so a fused multiply-add rounds what
 * the reference's two steps round: here the reference's bits are everyone's. */
static void int8_has_the_reference_bits(void **state)
{
    under_i8 = 1;
    for (int i = 1; i < ISAS; i++)
        if (td_backend_get(all_isas[i]))
            widths_agree("ref", all_isas[i], TD_BF16, TD_W_MXFP4);
    under_i8 = 0;
}

int main(void)
{
    const struct CMUnitTest widths[] = {cmocka_unit_test(vector_widths_give_equal_bits),
                                        cmocka_unit_test(int8_has_the_reference_bits)};
    int failed = cmocka_run_group_tests(widths, NULL, NULL);
    if (failed)
        return failed;
    RUN_CHECKS("gemm");
}
