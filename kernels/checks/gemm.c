/* SPDX-License-Identifier: Apache-2.0 */
/* Guards gemm, reduce_slices, logits, embed and add_norm: right against float64 on ragged shapes,
 * nothing written beside the output, and each row's bits free of the number of rows and threads
 * (GEMV = GEMM). */
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/checks/inside.h"
#include "kernels/kplan.h"

#include "base/banned.h"

/* Bound of a chain of k products and sums in f32: k/2 roundings of magnitudes up to the sum of |a
 * w|. */
static double bound(td_check *c, uint32_t k)
{
    return c->wider * 6e-8 * (k + 4) * 0.6;
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

void td_check_plain_and_silu_match_float64(td_check *c)
{
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (int mix = 0; mix < 4; mix++) {
            td_dtype act = mix % 2 ? TD_BF16 : TD_F32;
            td_weight_format format = mix / 2 ? TD_W_BF16 : TD_W_F32;
            shape s = shapes[i];
            td_queue *q = td_check_queue(c, act, 1);
            td_step st = {.n_rows = s.rows};
            float *a = td_check_random(c, (size_t)s.rows * s.k, 1),
                  *w = td_check_random(c, (size_t)s.n * s.k, 1),
                  *u = td_check_random(c, (size_t)s.n * s.k, 1);
            float *out = td_check_floats(c, (size_t)s.rows * s.n),
                  *silu = td_check_floats(c, (size_t)s.rows * s.n);
            td_tensor *tw = td_check_weight_as(c, format, w, 1, s.n, s.k),
                      *tu = td_check_weight_as(c, format, u, 1, s.n, s.k);
            td_gemm g = {.a = a,
                         .a_stride = s.k,
                         .n_heads = 1,
                         .epilogue = TD_EPI_F32,
                         .n_out = 1,
                         .w = {tw},
                         .out = {out},
                         .out_stride = {s.n}};
            c->be->gemm(q, &st, &g);
            g = (td_gemm){.a = a,
                          .a_stride = s.k,
                          .n_heads = 1,
                          .epilogue = TD_EPI_SILU_MUL,
                          .n_out = 1,
                          .w = {tw, tu},
                          .out = {silu},
                          .out_stride = {s.n}};
            c->be->gemm(q, &st, &g);
            for (uint32_t t = 0; t < s.rows; t++)
                for (uint32_t n = 0; n < s.n; n++) {
                    double x = dot(a + t * s.k, w + n * s.k, 0, s.k),
                           y = dot(a + t * s.k, u + n * s.k, 0, s.k);
                    double e = bound(c, s.k), v = x / (1 + exp(-x)) * y;
                    td_check_near(c, (double)out[t * s.n + n], x, e, "gemm", t * s.n + n);
                    td_check_near(c, (double)silu[t * s.n + n], v,
                                  e * (2 + fabs(x) + fabs(y)) +
                                      (act == TD_BF16 ? fabs(v) * 0.004 : 0),
                                  "silu", t * s.n + n);
                    if (act == TD_BF16)
                        TD_MUST(c, td_check_bf16(silu[t * s.n + n]) == silu[t * s.n + n]);
                }
            c->be->weight_free(tw);
            c->be->weight_free(tu);
            c->be->close(q);
            td_check_guards(c, 0);
        }
}

void td_check_heads_round_their_input_once(td_check *c)
{
    enum { T = 5, H = 3, K = 24, N = 20, PAD = 8 };
    for (uint32_t mix = 0; mix < 4; mix++) {
        td_queue *q = td_check_queue(c, TD_BF16, 1 + mix % 2);
        td_step st = {.n_rows = T};
        float *a = td_check_random(c, T * H * (K + PAD), 0), *w = td_check_random(c, H * N * K, 1),
              *out = td_check_floats(c, T * H * N);
        td_tensor *tw = td_check_weight_as(c, mix / 2 ? TD_W_BF16 : TD_W_F32, w, H, N, K);
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
        c->be->gemm(q, &st, &g);
        for (uint32_t t = 0; t < T; t++)
            for (uint32_t h = 0; h < H; h++)
                for (uint32_t n = 0; n < N; n++) {
                    double want = 0;
                    for (uint32_t k = 0; k < K; k++)
                        want += (double)td_check_bf16(a[(t * H + h) * (K + PAD) + k]) *
                                (double)w[(h * N + n) * K + k];
                    td_check_near(c, (double)out[(t * H + h) * N + n], want, bound(c, K), "head",
                                  (t * H + h) * N + n);
                }
        c->be->weight_free(tw);
        c->be->close(q);
        td_check_guards(c, 0);
    }
}

/* Slices are K / S wide chains; their tree equals the sum, and S follows the rule. */
void td_check_slices_and_their_tree(td_check *c)
{
    TD_MUST_EQUAL(c, td_kplan_slices(16384), 8);
    TD_MUST_EQUAL(c, td_kplan_slices(256), 8);
    TD_MUST_EQUAL(c, td_kplan_slices(128), 4);
    TD_MUST_EQUAL(c, td_kplan_slices(96), 1);
    TD_MUST_EQUAL(c, td_kplan_slices(192), 2);
    static const uint32_t widths[] = {96, 64, 128, 256, 768};
    for (size_t i = 0; i < 5; i++) {
        enum { T = 3, N = 21 };
        uint32_t k = widths[i], slices = td_kplan_slices(k);
        td_queue *q = td_check_queue(c, TD_F32, 1);
        td_step st = {.n_rows = T};
        float *a = td_check_random(c, T * (size_t)k, 0), *w = td_check_random(c, N * (size_t)k, 0),
              *p = td_check_floats(c, (size_t)slices * T * N), *out = td_check_floats(c, T * N);
        td_tensor *tw = td_check_weight(c, w, 1, N, k);
        td_gemm g = {.a = a,
                     .a_stride = k,
                     .n_heads = 1,
                     .epilogue = TD_EPI_PARTIAL,
                     .n_out = 1,
                     .w = {tw},
                     .out = {p},
                     .slices = slices};
        c->be->gemm(q, &st, &g);
        c->be->reduce_slices(q, &st, p, slices, N, out);
        if (c->be->sums_slices) { /* the same in one: the same bits */
            float *whole = td_check_floats(c, T * N);
            g.epilogue = TD_EPI_SUM;
            g.out[0] = whole;
            g.out_stride[0] = N;
            c->be->gemm(q, &st, &g);
            TD_MUST_MATCH(c, whole, out, T * N * sizeof *out);
        }
        for (uint32_t t = 0; t < T; t++)
            for (uint32_t n = 0; n < N; n++) {
                for (uint32_t s = 0; s < slices; s++)
                    td_check_near(
                        c, (double)p[(s * T + t) * N + n],
                        dot(a + t * k, w + n * k, s * (k / slices), (s + 1) * (k / slices)),
                        bound(c, k), "slice", s);
                td_check_near(c, (double)out[t * N + n], dot(a + t * k, w + n * k, 0, k),
                              bound(c, k), "tree", t * N + n);
            }
        c->be->weight_free(tw);
        c->be->close(q);
        td_check_guards(c, 0);
    }
}

/* Every count of rows meets other register tiles, and 40 outputs leave ragged panels: the bits of a
 * row may not know. */
static void rows_give_the_same_bits(td_check *c, td_weight_format format, td_dtype act, uint32_t n,
                                    uint32_t k)
{
    enum { T = 40 };
    float *a = td_check_random(c, (size_t)T * k, 1), *w = td_check_random(c, (size_t)n * k, 1),
          *many = td_check_floats(c, (size_t)T * n);
    td_tensor *tw = td_check_weight_as(c, format, w, 1, n, k);
    td_queue *q = td_check_queue(c, act, 1);
    td_step st = {.n_rows = T};
    td_gemm g = {.a = a,
                 .a_stride = k,
                 .n_heads = 1,
                 .epilogue = TD_EPI_F32,
                 .n_out = 1,
                 .w = {tw},
                 .out = {many},
                 .out_stride = {n}};
    c->be->gemm(q, &st, &g);
    c->be->close(q);
    float *out = td_check_floats(c, (size_t)T * n);
    for (uint32_t threads = 1; threads <= 3; threads++) {
        q = td_check_queue(c, act, threads);
        for (uint32_t rows = 1; rows <= T; rows += rows < 14 ? 1 : 9) {
            uint32_t first = T - rows;
            st.n_rows = rows;
            g.a = a + (size_t)first * k;
            g.out[0] = out;
            c->be->gemm(q, &st, &g);
            TD_MUST_MATCH(c, out, many + (size_t)first * n, (size_t)rows * n * sizeof *out);
        }
        c->be->close(q);
    }
    c->be->weight_free(tw);
    td_check_guards(c, 0);
}

void td_check_one_row_gives_the_bits_of_many(td_check *c)
{
    for (int mix = 0; mix < 4; mix++) {
        td_weight_format format = mix / 2 ? TD_W_BF16 : TD_W_F32;
        td_dtype act = mix % 2 ? TD_BF16 : TD_F32;
        rows_give_the_same_bits(c, format, act, 50, 300);
        rows_give_the_same_bits(c, format, act, 300, 333);
    }
}

void td_check_int8(const float *a, uint32_t k, double *ret)
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
static void quantised_case(td_check *c, td_weight_format format, td_dtype act, shape s)
{
    double *w = malloc(sizeof *w * s.n * s.k), *x = malloc(sizeof *x * s.k);
    float *a = td_check_random(c, (size_t)s.rows * s.k, 1),
          *out = td_check_floats(c, (size_t)s.rows * s.n), *alone = td_check_floats(c, s.n);
    td_tensor *t = td_check_codes(c, format, 1, s.n, s.k, w);
    td_queue *q = td_check_queue(c, act, 1);
    td_step st = {.n_rows = s.rows};
    td_gemm g = plain_gemm(a, s.k, t, s.n, out);
    c->be->gemm(q, &st, &g);
    int i8 = c->i8 && act == TD_BF16 && format == TD_W_MXFP4 && c->be->act_i8;
    st.n_rows = 1;
    for (uint32_t r = 0; r < s.rows; r++) {
        for (uint32_t k = 0; k < s.k; k++)
            x[k] = (double)a[r * s.k + k];
        if (i8)
            td_check_int8(a + r * s.k, s.k, x);
        for (uint32_t n = 0; n < s.n; n++) {
            double want = 0, size = 0;
            for (uint32_t k = 0; k < s.k; k++) {
                want += x[k] * w[n * s.k + k];
                size += fabs(x[k] * w[n * s.k + k]);
            }
            td_check_near(c, (double)out[r * s.n + n], want, size * 6e-8 * (s.k + 8.0), "quantised",
                          r * s.n + n);
        }
        g = plain_gemm(a + r * s.k, s.k, t, s.n, alone);
        c->be->gemm(q, &st, &g);
        TD_MUST_MATCH(c, alone, out + r * s.n, s.n * sizeof *alone);
    }
    c->be->weight_free(t);
    c->be->close(q);
    free(w);
    free(x);
    td_check_guards(c, 0);
}

void td_check_quantised_weights_match_float64(td_check *c)
{
    static const shape mx[] = {{1, 1, 32},   {2, 17, 64},  {3, 50, 288}, {5, 33, 320}, {7, 80, 32},
                               {12, 20, 96}, {13, 70, 64}, {26, 33, 96}, {75, 18, 64}},
                       fp8[] = {{1, 1, 1},     {2, 17, 31},  {3, 150, 130}, {5, 33, 300},
                                {7, 200, 129}, {12, 20, 96}, {13, 70, 257}, {26, 33, 40}};
    for (c->i8 = 0; c->i8 < 2; c->i8++)
        for (td_dtype act = TD_F32; act <= TD_BF16; act++) {
            for (size_t i = 0; i < sizeof mx / sizeof *mx; i++)
                quantised_case(c, TD_W_MXFP4, act, mx[i]);
            for (size_t i = 0; i < sizeof fp8 / sizeof *fp8; i++)
                quantised_case(c, TD_W_FP8, act, fp8[i]);
        }
    c->i8 = 0;
}

/* A NaN in the checkpoint or in an operand may not look like a number. */
void td_check_nan_stays_nan(td_check *c)
{
    enum { N = 20, K = 160 };
    uint8_t codes[N * K];
    float scales[2] = {1.0f, 1.0f}, *a = td_check_random(c, 2 * K, 1),
          *out = td_check_floats(c, 2 * N);
    double values[N * K];
    memset(codes, 0x38, sizeof codes);
    codes[17 * K + 140] = 0xff;
    td_weight_src src = {
        .dtype = TD_F8E4M3, .base = codes, .scales = scales, .n_stride = K, .k_stride = 1};
    for (c->i8 = 0; c->i8 < 2; c->i8++) {
        td_tensor *t = NULL, *mx = td_check_codes(c, TD_W_MXFP4, 1, N, K, values);
        TD_MUST_EQUAL(c, c->be->weight_new(TD_W_FP8, 1, N, K, &t), 0);
        c->be->weight_fill(t, 0, 0, N, &src);
        td_queue *q = td_check_queue(c, TD_BF16, 1);
        td_step st = {.n_rows = 2};
        td_gemm g = plain_gemm(a, K, t, N, out);
        c->be->gemm(q, &st, &g);
        for (uint32_t n = 0; n < N; n++)
            TD_MUST(c, isnan(out[n]) == (n == 17));
        float kept = a[K + 40];
        a[K + 40] = NAN;
        g = plain_gemm(a, K, mx, N, out);
        c->be->gemm(q, &st, &g);
        for (uint32_t n = 0; n < N; n++)
            TD_MUST(c, !isnan(out[n]) && isnan(out[N + n]));
        a[K + 40] = kept;
        c->be->weight_free(t);
        c->be->weight_free(mx);
        c->be->close(q);
    }
    c->i8 = 0;
    td_check_guards(c, 0);
}

void td_check_logits_take_the_listed_rows_and_refuse_nan(td_check *c)
{
    enum { T = 6, V = 37, K = 48 };
    uint32_t *rows = td_check_words(c, 3);
    rows[0] = 4;
    rows[1] = 0;
    rows[2] = 5;
    float *h = td_check_random(c, T * K, 0), *w = td_check_random(c, V * K, 0),
          *out = td_check_floats(c, 3 * V);
    td_tensor *tw = td_check_weight(c, w, 1, V, K);
    td_queue *q = td_check_queue(c, TD_F32, 2);
    td_step st = {.n_rows = T, .n_logits = 3, .logit_rows = rows};
    c->be->logits(q, &st, h, tw, out);
    TD_MUST_EQUAL(c, c->be->finish(q), 0);
    for (uint32_t i = 0; i < 3; i++)
        for (uint32_t n = 0; n < V; n++)
            td_check_near(c, (double)out[i * V + n], dot(h + rows[i] * K, w + n * K, 0, K),
                          bound(c, K), "logits", i * V + n);
    h[5 * K + 3] = NAN;
    c->be->logits(q, &st, h, tw, out);
    TD_MUST_EQUAL(c, c->be->finish(q), -EIO);
    TD_MUST_EQUAL(c, c->be->finish(q), 0);
    c->be->weight_free(tw);
    c->be->close(q);
    td_check_guards(c, 0);
}

void td_check_embedding_is_exact_and_norm_matches_float64(td_check *c)
{
    enum { T = 4, V = 19, D = 70 };
    static const uint32_t drawn[T] = {18, 0, 7, 7};
    for (td_dtype act = TD_F32; act <= TD_BF16; act++) {
        uint32_t *ids = td_check_words(c, T);
        memcpy(ids, drawn, sizeof drawn);
        float *w = td_check_random(c, V * D, 1), *x = td_check_floats(c, T * D),
              *delta = td_check_random(c, T * D, 0), *g = td_check_random(c, D, 0),
              *out = td_check_floats(c, T * D), *wide = td_check_floats(c, T * D);
        td_tensor *tw = td_check_weight(c, w, 1, V, D), *tg = td_check_vector(c, g, D);
        td_queue *q = td_check_queue(c, act, 1);
        td_step st = {.n_rows = T, .ids = ids};
        c->be->embed(q, &st, tw, x);
        for (uint32_t t = 0; t < T; t++)
            TD_MUST_MATCH(c, x + t * D, w + ids[t] * D, D * sizeof *x);
        c->be->add_norm(q, &st, x, delta, tg, 1e-5f, D, out, wide);
        for (uint32_t t = 0; t < T; t++) {
            double ms = 0;
            for (uint32_t i = 0; i < D; i++) {
                TD_MUST(c, x[t * D + i] == w[ids[t] * D + i] + delta[t * D + i]);
                ms += (double)x[t * D + i] * (double)x[t * D + i] / D;
            }
            for (uint32_t i = 0; i < D; i++) {
                td_check_near(c, (double)wide[t * D + i],
                              (double)x[t * D + i] / sqrt(ms + 1e-5) * (double)g[i], 2e-6, "norm",
                              i);
                TD_MUST(c, out[t * D + i] == td_check_rounded(act, wide[t * D + i]));
            }
        }
        c->be->weight_free(tw);
        c->be->weight_free(tg);
        c->be->close(q);
        td_check_guards(c, 0);
    }
}

/* Types and views: BF16 and F16 are exact, a transposed view is the transpose. */
void td_check_weights_load_from_every_type_and_view(td_check *c)
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
    float *id = td_check_floats(c, K * K), *out = td_check_floats(c, K * N);
    memset(id, 0, K * K * sizeof *id);
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
            TD_MUST_EQUAL(c, c->be->weight_new(TD_W_F32, 1, N, K, &w), 0);
            c->be->weight_fill(w, 0, 0, 2, &src);
            src.base = (const char *)base[t] + 2 * src.n_stride * td_dtype_bytes(t);
            c->be->weight_fill(w, 0, 2, N - 2, &src);
            td_queue *q = td_check_queue(c, TD_F32, 1);
            td_step st = {.n_rows = K};
            td_gemm g = {.a = id,
                         .a_stride = K,
                         .n_heads = 1,
                         .epilogue = TD_EPI_F32,
                         .n_out = 1,
                         .w = {w},
                         .out = {out},
                         .out_stride = {N}};
            c->be->gemm(q, &st, &g);
            for (int k = 0; k < K; k++)
                for (int n = 0; n < N; n++)
                    TD_MUST(c, out[k * N + n] == (transposed ? want[k * N + n] : want[n * K + k]));
            c->be->weight_free(w);
            c->be->close(q);
        }
    td_check_guards(c, 0);
}

/* Sums that cancel: 2^20 + small - 2^20. What is left is within f32 roundings of the large ones. */
void td_check_cancelling_sums_stay_within_their_roundings(td_check *c)
{
    enum { K = 512, N = 16 };
    float *a = td_check_floats(c, K), *w = td_check_floats(c, N * K), *out = td_check_floats(c, N);
    for (uint32_t k = 0; k < K; k++) {
        a[k] = k % 2 ? -1024.0f : 1024.0f;
        for (uint32_t n = 0; n < N; n++)
            w[n * K + k] = 1024.0f;
    }
    a[5] = 3.0f;
    a[6] = 0.0f;
    td_tensor *tw = td_check_weight_as(c, TD_W_BF16, w, 1, N, K);
    td_queue *q = td_check_queue(c, TD_BF16, 1);
    td_step st = {.n_rows = 1};
    td_gemm g = plain_gemm(a, K, tw, N, out);
    c->be->gemm(q, &st, &g);
    for (uint32_t n = 0; n < N; n++)
        td_check_near(c, (double)out[n], 3072.0, 0.0, "sum",
                      n); /* every partial sum is exact here */
    c->be->weight_free(tw);
    c->be->close(q);
    td_check_guards(c, 0);
}
