/* SPDX-License-Identifier: Apache-2.0 */
/* Guards gemm, reduce_slices, logits, embed and add_norm: right against float64 on ragged shapes,
 * nothing written beside the output, and each row's bits free of the number of rows and threads
 * (GEMV = GEMM). */
#include <errno.h>

#include "tests/kernels/kernels_util.h"

/* Bound of a chain of k products and sums in f32: k/2 roundings of magnitudes up to the sum of |a
 * w|. */
static double bound(uint32_t k)
{
    return wider * 6e-8 * (k + 4) * 0.6;
}

typedef struct shape {
    uint32_t rows, n, k;
} shape;
static const shape shapes[] = {{1, 1, 1},    {1, 16, 32},  {2, 17, 31},   {3, 5, 300},
                               {5, 40, 64},  {7, 33, 513}, {1, 100, 257}, {8, 16, 16},
                               {13, 70, 96}, {1, 150, 64}, {26, 33, 40},  {210, 20, 17}};

static double dot(const float *a, const float *w, uint32_t k0, uint32_t k1)
{
    double s = 0;
    for (uint32_t i = k0; i < k1; i++)
        s += (double)a[i] * (double)w[i];
    return s;
}

static void plain_and_silu_match_float64(void **state)
{
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (int c = 0; c < 4; c++) {
            td_dtype act = c % 2 ? TD_BF16 : TD_F32;
            td_weight_format format = c / 2 ? TD_W_BF16 : TD_W_F32;
            shape s = shapes[i];
            td_queue *q = open_queue(act, 1);
            td_step st = {.n_rows = s.rows};
            float *a = random_floats((size_t)s.rows * s.k, 1),
                  *w = random_floats((size_t)s.n * s.k, 1),
                  *u = random_floats((size_t)s.n * s.k, 1);
            float *out = floats((size_t)s.rows * s.n), *silu = floats((size_t)s.rows * s.n);
            td_tensor *tw = weight_as(format, w, 1, s.n, s.k),
                      *tu = weight_as(format, u, 1, s.n, s.k);
            td_gemm g = {.a = a,
                         .a_stride = s.k,
                         .n_heads = 1,
                         .epilogue = TD_EPI_F32,
                         .n_out = 1,
                         .w = {tw},
                         .out = {out},
                         .out_stride = {s.n}};
            under->gemm(q, &st, &g);
            g = (td_gemm){.a = a,
                          .a_stride = s.k,
                          .n_heads = 1,
                          .epilogue = TD_EPI_SILU_MUL,
                          .n_out = 1,
                          .w = {tw, tu},
                          .out = {silu},
                          .out_stride = {s.n}};
            under->gemm(q, &st, &g);
            for (uint32_t t = 0; t < s.rows; t++)
                for (uint32_t n = 0; n < s.n; n++) {
                    double x = dot(a + t * s.k, w + n * s.k, 0, s.k),
                           y = dot(a + t * s.k, u + n * s.k, 0, s.k);
                    double e = bound(s.k), v = x / (1 + exp(-x)) * y;
                    near((double)out[t * s.n + n], x, e, "gemm", t * s.n + n);
                    near((double)silu[t * s.n + n], v,
                         e * (2 + fabs(x) + fabs(y)) + (act == TD_BF16 ? fabs(v) * 0.004 : 0),
                         "silu", t * s.n + n);
                    if (act == TD_BF16)
                        assert_true(bf16_of(silu[t * s.n + n]) == silu[t * s.n + n]);
                }
            under->weight_free(tw);
            under->weight_free(tu);
            under->close(q);
            check_guards();
        }
}

static void heads_round_their_input_once(void **state)
{
    enum { T = 5, H = 3, K = 24, N = 20, PAD = 8 };
    for (uint32_t c = 0; c < 4; c++) {
        td_queue *q = open_queue(TD_BF16, 1 + c % 2);
        td_step st = {.n_rows = T};
        float *a = random_floats(T * H * (K + PAD), 0), *w = random_floats(H * N * K, 1),
              *out = floats(T * H * N);
        td_tensor *tw = weight_as(c / 2 ? TD_W_BF16 : TD_W_F32, w, H, N, K);
        td_gemm g = {.a = a,
                     .a_stride = H * (K + PAD),
                     .a_head = K + PAD,
                     .a_round = 1,
                     .n_heads = H,
                     .epilogue = TD_EPI_F32,
                     .n_out = 1,
                     .w = {tw},
                     .out = {out},
                     .out_stride = {H * N},
                     .out_head = N};
        under->gemm(q, &st, &g);
        for (uint32_t t = 0; t < T; t++)
            for (uint32_t h = 0; h < H; h++)
                for (uint32_t n = 0; n < N; n++) {
                    double want = 0;
                    for (uint32_t k = 0; k < K; k++)
                        want += (double)bf16_of(a[(t * H + h) * (K + PAD) + k]) *
                                (double)w[(h * N + n) * K + k];
                    near((double)out[(t * H + h) * N + n], want, bound(K), "head",
                         (t * H + h) * N + n);
                }
        under->weight_free(tw);
        under->close(q);
        check_guards();
    }
}

/* Slices are K / S wide chains; their tree equals the sum, and S follows the rule. */
static void slices_and_their_tree(void **state)
{
    assert_int_equal(td_kplan_slices(16384), 8);
    assert_int_equal(td_kplan_slices(256), 8);
    assert_int_equal(td_kplan_slices(128), 4);
    assert_int_equal(td_kplan_slices(96), 1);
    assert_int_equal(td_kplan_slices(192), 2);
    static const uint32_t widths[] = {96, 64, 128, 256, 768};
    for (size_t i = 0; i < 5; i++) {
        enum { T = 3, N = 21 };
        uint32_t k = widths[i], slices = td_kplan_slices(k);
        td_queue *q = open_queue(TD_F32, 1);
        td_step st = {.n_rows = T};
        float *a = random_floats(T * (size_t)k, 0), *w = random_floats(N * (size_t)k, 0),
              *p = floats((size_t)slices * T * N), *out = floats(T * N);
        td_tensor *tw = weight(w, 1, N, k);
        td_gemm g = {.a = a,
                     .a_stride = k,
                     .n_heads = 1,
                     .epilogue = TD_EPI_PARTIAL,
                     .n_out = 1,
                     .w = {tw},
                     .out = {p},
                     .slices = slices};
        under->gemm(q, &st, &g);
        under->reduce_slices(q, &st, p, slices, N, out);
        if (under->sums_slices) { /* the same in one: the same bits */
            float *whole = floats(T * N);
            g.epilogue = TD_EPI_SUM;
            g.out[0] = whole;
            g.out_stride[0] = N;
            under->gemm(q, &st, &g);
            assert_memory_equal(whole, out, T * N * sizeof *out);
        }
        for (uint32_t t = 0; t < T; t++)
            for (uint32_t n = 0; n < N; n++) {
                for (uint32_t s = 0; s < slices; s++)
                    near((double)p[(s * T + t) * N + n],
                         dot(a + t * k, w + n * k, s * (k / slices), (s + 1) * (k / slices)),
                         bound(k), "slice", s);
                near((double)out[t * N + n], dot(a + t * k, w + n * k, 0, k), bound(k), "tree",
                     t * N + n);
            }
        under->weight_free(tw);
        under->close(q);
        check_guards();
    }
}

/* Every count of rows meets other register tiles, and 40 outputs leave ragged panels: the bits of a
 * row may not know. */
static void rows_give_the_same_bits(td_weight_format format, td_dtype act, uint32_t n, uint32_t k)
{
    enum { T = 40 };
    float *a = random_floats((size_t)T * k, 1), *w = random_floats((size_t)n * k, 1),
          *many = floats((size_t)T * n);
    td_tensor *tw = weight_as(format, w, 1, n, k);
    td_queue *q = open_queue(act, 1);
    td_step st = {.n_rows = T};
    td_gemm g = {.a = a,
                 .a_stride = k,
                 .n_heads = 1,
                 .epilogue = TD_EPI_F32,
                 .n_out = 1,
                 .w = {tw},
                 .out = {many},
                 .out_stride = {n}};
    under->gemm(q, &st, &g);
    under->close(q);
    float *out = floats((size_t)T * n);
    for (uint32_t threads = 1; threads <= 3; threads++) {
        q = open_queue(act, threads);
        for (uint32_t rows = 1; rows <= T; rows += rows < 14 ? 1 : 9) {
            uint32_t first = T - rows;
            st.n_rows = rows;
            g.a = a + (size_t)first * k;
            g.out[0] = out;
            under->gemm(q, &st, &g);
            assert_memory_equal(out, many + (size_t)first * n, (size_t)rows * n * sizeof *out);
        }
        under->close(q);
    }
    under->weight_free(tw);
    check_guards();
}

static void one_row_gives_the_bits_of_many(void **state)
{
    for (int c = 0; c < 4; c++) {
        td_weight_format format = c / 2 ? TD_W_BF16 : TD_W_F32;
        td_dtype act = c % 2 ? TD_BF16 : TD_F32;
        rows_give_the_same_bits(format, act, 50, 300);
        rows_give_the_same_bits(format, act, 300, 333);
    }
}

/* What int8 in groups of 32 makes of an operand. */
static void quantise(const float *a, uint32_t k, double *ret)
{
    for (uint32_t g = 0; g < k; g += 32) {
        float most = 0.0f;
        for (uint32_t i = g; i < g + 32; i++)
            most = fabsf(a[i]) > most ? fabsf(a[i]) : most;
        for (uint32_t i = g; i < g + 32; i++)
            ret[i] = (double)rintf(a[i] * (127.0f / most)) * (double)(most / 127.0f);
    }
}

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

/* One quantised shape: right against float64, and each row alone gives the same bits. */
static void quantised_case(td_weight_format format, td_dtype act, shape s)
{
    double *w = malloc(sizeof *w * s.n * s.k), *x = malloc(sizeof *x * s.k);
    float *a = random_floats((size_t)s.rows * s.k, 1), *out = floats((size_t)s.rows * s.n),
          *alone = floats(s.n);
    td_tensor *t = weight_random(format, s.n, s.k, w);
    td_queue *q = open_queue(act, 1);
    td_step st = {.n_rows = s.rows};
    td_gemm g = plain_gemm(a, s.k, t, s.n, out);
    under->gemm(q, &st, &g);
    int i8 = under_i8 && act == TD_BF16 && format == TD_W_MXFP4 && under->act_i8;
    st.n_rows = 1;
    for (uint32_t r = 0; r < s.rows; r++) {
        for (uint32_t k = 0; k < s.k; k++)
            x[k] = (double)a[r * s.k + k];
        if (i8)
            quantise(a + r * s.k, s.k, x);
        for (uint32_t n = 0; n < s.n; n++) {
            double want = 0, size = 0;
            for (uint32_t k = 0; k < s.k; k++) {
                want += x[k] * w[n * s.k + k];
                size += fabs(x[k] * w[n * s.k + k]);
            }
            near((double)out[r * s.n + n], want, size * 6e-8 * (s.k + 8.0), "quantised",
                 r * s.n + n);
        }
        g = plain_gemm(a + r * s.k, s.k, t, s.n, alone);
        under->gemm(q, &st, &g);
        assert_memory_equal(alone, out + r * s.n, s.n * sizeof *alone);
    }
    under->weight_free(t);
    under->close(q);
    free(w);
    free(x);
    check_guards();
}

static void quantised_weights_match_float64(void **state)
{
    static const shape mx[] = {{1, 1, 32},   {2, 17, 64},  {3, 50, 288}, {5, 33, 320}, {7, 80, 32},
                               {12, 20, 96}, {13, 70, 64}, {26, 33, 96}, {75, 18, 64}},
                       fp8[] = {{1, 1, 1},     {2, 17, 31},  {3, 150, 130}, {5, 33, 300},
                                {7, 200, 129}, {12, 20, 96}, {13, 70, 257}, {26, 33, 40}};
    for (under_i8 = 0; under_i8 < 2; under_i8++)
        for (td_dtype act = TD_F32; act <= TD_BF16; act++) {
            for (size_t i = 0; i < sizeof mx / sizeof *mx; i++)
                quantised_case(TD_W_MXFP4, act, mx[i]);
            for (size_t i = 0; i < sizeof fp8 / sizeof *fp8; i++)
                quantised_case(TD_W_FP8, act, fp8[i]);
        }
    under_i8 = 0;
}

/* A NaN in the checkpoint or in an operand may not look like a number. */
static void nan_stays_nan(void **state)
{
    enum { N = 20, K = 160 };
    uint8_t codes[N * K];
    float scales[2] = {1.0f, 1.0f}, *a = random_floats(2 * K, 1), *out = floats(2 * N);
    double values[N * K];
    memset(codes, 0x38, sizeof codes);
    codes[17 * K + 140] = 0xff;
    td_weight_src src = {
        .dtype = TD_F8E4M3, .base = codes, .scales = scales, .n_stride = K, .k_stride = 1};
    for (under_i8 = 0; under_i8 < 2; under_i8++) {
        td_tensor *t = NULL, *mx = weight_random(TD_W_MXFP4, N, K, values);
        assert_int_equal(under->weight_new(TD_W_FP8, 1, N, K, &t), 0);
        under->weight_fill(t, 0, 0, N, &src);
        td_queue *q = open_queue(TD_BF16, 1);
        td_step st = {.n_rows = 2};
        td_gemm g = plain_gemm(a, K, t, N, out);
        under->gemm(q, &st, &g);
        for (uint32_t n = 0; n < N; n++)
            assert_true(isnan(out[n]) == (n == 17));
        float kept = a[K + 40];
        a[K + 40] = NAN;
        g = plain_gemm(a, K, mx, N, out);
        under->gemm(q, &st, &g);
        for (uint32_t n = 0; n < N; n++)
            assert_true(!isnan(out[n]) && isnan(out[N + n]));
        a[K + 40] = kept;
        under->weight_free(t);
        under->weight_free(mx);
        under->close(q);
    }
    under_i8 = 0;
    check_guards();
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

static void logits_take_the_listed_rows_and_refuse_nan(void **state)
{
    enum { T = 6, V = 37, K = 48 };
    uint32_t rows[3] = {4, 0, 5};
    float *h = random_floats(T * K, 0), *w = random_floats(V * K, 0), *out = floats(3 * V);
    td_tensor *tw = weight(w, 1, V, K);
    td_queue *q = open_queue(TD_F32, 2);
    td_step st = {.n_rows = T, .n_logits = 3, .logit_rows = rows};
    under->logits(q, &st, h, tw, out);
    assert_int_equal(under->finish(q), 0);
    for (uint32_t i = 0; i < 3; i++)
        for (uint32_t n = 0; n < V; n++)
            near((double)out[i * V + n], dot(h + rows[i] * K, w + n * K, 0, K), bound(K), "logits",
                 i * V + n);
    h[5 * K + 3] = NAN;
    under->logits(q, &st, h, tw, out);
    assert_int_equal(under->finish(q), -EIO);
    assert_int_equal(under->finish(q), 0);
    under->weight_free(tw);
    under->close(q);
    check_guards();
}

static void embedding_is_exact_and_norm_matches_float64(void **state)
{
    enum { T = 4, V = 19, D = 70 };
    uint32_t ids[T] = {18, 0, 7, 7};
    for (td_dtype act = TD_F32; act <= TD_BF16; act++) {
        float *w = random_floats(V * D, 1), *x = floats(T * D), *delta = random_floats(T * D, 0),
              *g = random_floats(D, 0), *out = floats(T * D), *wide = floats(T * D);
        td_tensor *tw = weight(w, 1, V, D), *tg = vector(g, D);
        td_queue *q = open_queue(act, 1);
        td_step st = {.n_rows = T, .ids = ids};
        under->embed(q, &st, tw, x);
        for (uint32_t t = 0; t < T; t++)
            assert_memory_equal(x + t * D, w + ids[t] * D, D * sizeof *x);
        under->add_norm(q, &st, x, delta, tg, 1e-5f, D, out, wide);
        for (uint32_t t = 0; t < T; t++) {
            double ms = 0;
            for (uint32_t i = 0; i < D; i++) {
                assert_true(x[t * D + i] == w[ids[t] * D + i] + delta[t * D + i]);
                ms += (double)x[t * D + i] * (double)x[t * D + i] / D;
            }
            for (uint32_t i = 0; i < D; i++) {
                near((double)wide[t * D + i], (double)x[t * D + i] / sqrt(ms + 1e-5) * (double)g[i],
                     2e-6, "norm", i);
                assert_true(out[t * D + i] == rounded(act, wide[t * D + i]));
            }
        }
        under->weight_free(tw);
        under->weight_free(tg);
        under->close(q);
        check_guards();
    }
}

/* Types and views: BF16 and F16 are exact, a transposed view is the transpose. */
static void weights_load_from_every_type_and_view(void **state)
{
    enum { N = 5, K = 7 };
    uint16_t half[N * K], brain[N * K];
    float want[N * K];
    for (int i = 0; i < N * K; i++) {
        int v = i - 17; /* exact in both */
        want[i] = (float)v;
        uint32_t u;
        memcpy(&u, &want[i], 4);
        brain[i] = (uint16_t)(u >> 16);
        half[i] = (uint16_t)(v == 0 ? 0
                                    : (u >> 16 & 0x8000u) | (((u >> 23 & 255) - 112) << 10) |
                                          (u >> 13 & 1023));
    }
    float id[K * K] = {0}, out[K * N];
    for (int i = 0; i < K; i++)
        id[i * K + i] = 1.0f;
    const void *base[] = {want, brain, half};
    for (td_dtype t = TD_F32; t <= TD_F16; t++)
        for (int transposed = 0; transposed < 2; transposed++) {
            td_tensor *w = NULL;
            /* transposed: the bytes hold [K][N] of which we want [N][K] */
            td_weight_src src = {.dtype = t,
                                 .base = base[t],
                                 .n_stride = transposed ? 1 : K,
                                 .k_stride = transposed ? N : 1};
            assert_int_equal(under->weight_new(TD_W_F32, 1, N, K, &w), 0);
            under->weight_fill(w, 0, 0, 2, &src);
            src.base = (const char *)base[t] + 2 * src.n_stride * td_dtype_bytes(t);
            under->weight_fill(w, 0, 2, N - 2, &src);
            td_queue *q = open_queue(TD_F32, 1);
            td_step st = {.n_rows = K};
            td_gemm g = {.a = id,
                         .a_stride = K,
                         .n_heads = 1,
                         .epilogue = TD_EPI_F32,
                         .n_out = 1,
                         .w = {w},
                         .out = {out},
                         .out_stride = {N}};
            under->gemm(q, &st, &g);
            for (int k = 0; k < K; k++)
                for (int n = 0; n < N; n++)
                    assert_true(out[k * N + n] == (transposed ? want[k * N + n] : want[n * K + k]));
            under->weight_free(w);
            under->close(q);
        }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(plain_and_silu_match_float64),
        cmocka_unit_test(heads_round_their_input_once),
        cmocka_unit_test(slices_and_their_tree),
        cmocka_unit_test(one_row_gives_the_bits_of_many),
        cmocka_unit_test(logits_take_the_listed_rows_and_refuse_nan),
        cmocka_unit_test(embedding_is_exact_and_norm_matches_float64),
        cmocka_unit_test(weights_load_from_every_type_and_view),
        cmocka_unit_test(quantised_weights_match_float64),
        cmocka_unit_test(nan_stays_nan),
    };
    const struct CMUnitTest widths[] = {cmocka_unit_test(vector_widths_give_equal_bits)};
    int failed = cmocka_run_group_tests(widths, NULL, NULL);
    if (failed)
        return failed;
    RUN_FOR_EVERY_ISA(tests);
}
