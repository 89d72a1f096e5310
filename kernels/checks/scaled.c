/* SPDX-License-Identifier: Apache-2.0 */
/* Guards MXFP4 weights that meet FP8 operands in the scaled matrix instruction (kernels/hip/
 * scaled.hpp): the operand is rounded as the OCP rule says and each k meets its own weight and
 * scale, products and experts match float64 on ragged shapes, a row alone has the bits of its
 * company, a rank's slices are those of the whole, NaN stays NaN. Devices without the instruction
 * have nothing of this. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/checks/inside.h"
#include "kernels/formats.h"

#include "base/banned.h"

static void need_it(td_check *c)
{
    if (!c->be->act_fp8)
        td_check_skip(c, "no scaled matrix instruction: --act-mxfp4 fp8 is refused here");
    c->fp8 = 1;
}

static void *need(td_check *c, void *p)
{
    if (!p)
        td_check_fail(c, "out of memory");
    return p;
}

static td_gemm product(const float *a, uint32_t k, const td_tensor *w, uint32_t n, float *out)
{
    return (td_gemm){
        .a = a, .a_stride = k, .n_heads = 1, .n_out = 1, .w = {w}, .out = {out}, .out_stride = {n}};
}

/* Rows whose magnitudes differ by far, as activations do. */
static float *operands(td_check *c, uint32_t rows, uint32_t k)
{
    float *a = td_check_random(c, (size_t)rows * k, 1);
    for (size_t i = 0; i < (size_t)rows * k; i++)
        a[i] = ldexpf(a[i], (int)td_rng_below(&c->rng, 12) - (int)(i / 32 % 5) * 4);
    return a;
}

/* [K][K] with a single 1 in each row. */
static td_tensor *identity(td_check *c, uint32_t k)
{
    td_tensor *w = NULL;
    uint8_t *codes = need(c, calloc(k, k / 2)), *scales = need(c, malloc((size_t)k * k / 32));
    memset(scales, 127, (size_t)k * k / 32);
    for (uint32_t i = 0; i < k; i++)
        codes[(size_t)i * k / 2 + i / 2] = i % 2 ? 0x20 : 0x02; /* 1.0 */
    td_weight_src src = {
        .dtype = TD_U8, .base = codes, .scales = scales, .n_stride = k / 2, .k_stride = 1};
    TD_MUST_EQUAL(c, c->be->weight_new(TD_W_MXFP4, 1, k, k, &w), 0);
    c->be->weight_fill(w, 0, 0, k, &src);
    free(codes);
    free(scales);
    return w;
}

/* It reads the operand back: exactly the rule's values, each at its k. */
void td_check_operands_are_rounded_by_the_rule(td_check *c)
{
    enum { K = 256, T = 3 };
    need_it(c);
    float *a = operands(c, T, K), *out = td_check_floats(c, T * K);
    static const float edges[32] = {464.0f,    -464.0f,  448.0f,   479.9f,    0x1p-9f,   0x1.8p-9f,
                                    0x1p-10f,  17.0f,    19.0f,    -18.0f,    0x1.fp-7f, 0x1.fep-7f,
                                    0x1p-126f, 0x1p-40f, -0x1p-9f, 0x1.8p-10f};
    for (uint32_t i = 0; i < 32; i++) {
        a[i] = edges[i];
        a[32 + i] = 0.0f;
        a[64 + i] = ldexpf(edges[i], 119); /* the largest scale */
        a[96 + i] = ldexpf(edges[i], -116);
        a[128 + i] = i ? 0.0f : 0x1.fffffep+127f;
    }
    td_tensor *w = identity(c, K);
    td_queue *q = td_check_queue(c, TD_BF16, 1);
    td_step st = {.n_rows = T};
    td_gemm g = product(a, K, w, K, out);
    c->be->gemm(q, &st, &g);
    TD_MUST_EQUAL(c, c->be->finish(q), 0);
    double want[K];
    for (uint32_t t = 0; t < T; t++) {
        td_ocp_fp8_values(a + t * K, K, want);
        for (uint32_t i = 0; i < K; i++)
            td_check_near(c, (double)out[t * K + i], want[i], 0.0, "operand", t * K + i);
    }
    c->be->weight_free(w);
    c->be->close(q);
    td_check_guards(c, 0);
}

/* A group's sum is rounded once (more on hardware), then K / 32 sums of groups. */
static void near_row(td_check *c, const double *x, const double *w, const float *out, uint32_t n,
                     uint32_t k, size_t at)
{
    for (uint32_t i = 0; i < n; i++) {
        double want = 0, size = 0;
        for (uint32_t j = 0; j < k; j++) {
            want += x[j] * w[(size_t)i * k + j];
            size += fabs(x[j] * w[(size_t)i * k + j]);
        }
        td_check_near(c, (double)out[i], want, c->wider * size * 6e-8 * (k / 32 + 4.0), "scaled",
                      at + i);
    }
}

/* Every ninth row alone has the same bits. */
static void matches_float64(td_check *c, uint32_t rows, uint32_t n, uint32_t k)
{
    double *w = need(c, malloc(sizeof *w * n * k)), *x = need(c, malloc(sizeof *x * k));
    float *a = operands(c, rows, k), *out = td_check_floats(c, (size_t)rows * n),
          *gated = td_check_floats(c, (size_t)rows * n), *alone = td_check_floats(c, n);
    td_tensor *t = td_check_codes(c, TD_W_MXFP4, 1, n, k, w);
    td_queue *q = td_check_queue(c, TD_BF16, 1);
    td_step st = {.n_rows = rows};
    td_gemm g = product(a, k, t, n, out);
    c->be->gemm(q, &st, &g);
    st.n_rows = 1;
    for (uint32_t r = 0; r < rows; r++) {
        td_ocp_fp8_values(a + (size_t)r * k, k, x);
        near_row(c, x, w, out + (size_t)r * n, n, k, (size_t)r * n);
        if (r % 9)
            continue;
        g = product(a + (size_t)r * k, k, t, n, alone);
        c->be->gemm(q, &st, &g);
        TD_MUST_MATCH(c, alone, out + (size_t)r * n, n * sizeof *alone);
    }
    st.n_rows = rows;
    g = product(a, k, t, n, gated); /* gate and up alike: silu(x) x */
    g.epilogue = TD_EPI_SILU_MUL;
    g.w[1] = t;
    c->be->gemm(q, &st, &g);
    for (size_t i = 0; i < (size_t)rows * n; i++) {
        double v = (double)out[i];
        td_check_near(c, (double)gated[i], v / (1 + exp(-v)) * v, 0.004 * v * v + 1e-30, "silu", i);
    }
    td_check_bits(c, out, sizeof *out * rows * n);
    td_check_bits(c, gated, sizeof *gated * rows * n);
    c->be->weight_free(t);
    c->be->close(q);
    free(w);
    free(x);
    td_check_guards(c, 0);
}

void td_check_scaled_products_match_float64(td_check *c)
{
    static const uint32_t shapes[][3] = {{1, 1, 32},   {2, 17, 64},   {3, 50, 288}, {5, 33, 320},
                                         {17, 20, 96}, {70, 70, 160}, {40, 33, 416}};
    need_it(c);
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        matches_float64(c, shapes[i][0], shapes[i][1], shapes[i][2]);
}

/* E matrices and what their codes stand for. */
typedef struct matrices {
    td_tensor *t;
    double *w;
} matrices;

static matrices new_matrices(td_check *c, uint32_t e, uint32_t n, uint32_t k)
{
    matrices m = {.w = need(c, malloc(sizeof *m.w * e * n * k))};
    m.t = td_check_codes(c, TD_W_MXFP4, e, n, k, m.w);
    return m;
}

enum { D = 96, E = 5, K = 3, I = 128, SLICES = 4, PARTS = 6 };
enum { GATE, UP, DOWN, SHARED_GATE, SHARED_UP, SHARED_DOWN };

/* One expert's answer for row a, with both operands rounded. slack: what it may be off, as
 * activations that lie near a border may round either way. */
static void expert_answer(const float *a, const matrices *m, uint32_t e, double weight, double *y,
                          double *slack)
{
    double x[D], act[I];
    float half[I];
    td_ocp_fp8_values(a, D, x);
    for (uint32_t i = 0; i < I; i++) {
        double g = 0, u = 0;
        for (uint32_t k = 0; k < D; k++) {
            g += x[k] * m[GATE].w[((size_t)e * I + i) * D + k];
            u += x[k] * m[UP].w[((size_t)e * I + i) * D + k];
        }
        half[i] = td_check_bf16((float)(g / (1 + exp(-g)) * u));
    }
    td_ocp_fp8_values(half, I, act);
    for (uint32_t n = 0; n < D; n++)
        for (uint32_t i = 0; i < I; i++) {
            double p = weight * act[i] * m[DOWN].w[((size_t)e * D + n) * I + i];
            y[n] += p;
            slack[n] += fabs(p) * 1e-3;
        }
}

static void experts_case(td_check *c, const matrices *m, uint32_t rows)
{
    float *a = td_check_random(c, (size_t)rows * D, 1),
          *w = td_check_random(c, (size_t)rows * K, 0),
          *partial = td_check_floats(c, (size_t)SLICES * rows * D),
          *act = td_check_floats(c, td_moe_act_elems(rows, K, I, I));
    uint32_t *ids = td_check_words(c, (size_t)rows * K);
    for (uint32_t i = 0; i < rows * K; i++)
        ids[i] = (i + i / 7) % E;
    td_queue *q = td_check_queue(c, TD_BF16, 1);
    td_step st = {.n_rows = rows};
    td_moe x = {.a = a,
                .experts = ids,
                .weights = w,
                .n_experts = E,
                .top_k = K,
                .gate = m[GATE].t,
                .up = m[UP].t,
                .down = m[DOWN].t,
                .shared_gate = m[SHARED_GATE].t,
                .shared_up = m[SHARED_UP].t,
                .shared_down = m[SHARED_DOWN].t,
                .slices = SLICES,
                .act = act,
                .partial = partial};
    c->be->moe(q, &st, &x);
    TD_MUST_EQUAL(c, c->be->finish(q), 0);
    for (uint32_t t = 0; t < rows; t += 11) {
        double y[D] = {0}, slack[D] = {0};
        for (uint32_t k = 0; k < K; k++)
            expert_answer(a + (size_t)t * D, m, ids[t * K + k], (double)w[t * K + k], y, slack);
        expert_answer(a + (size_t)t * D, m + SHARED_GATE, 0, 1.0, y, slack);
        for (uint32_t n = 0; n < D; n++) {
            double got = 0;
            for (uint32_t s = 0; s < SLICES; s++)
                got += (double)partial[((size_t)s * rows + t) * D + n];
            td_check_near(c, got, y[n], slack[n], "expert", t * D + n);
        }
    }
    td_check_bits(c, partial, sizeof *partial * SLICES * rows * D);
    c->be->close(q);
    td_check_guards(c, 0);
}

void td_check_scaled_experts_match_float64(td_check *c)
{
    need_it(c);
    matrices m[PARTS];
    for (int i = 0; i < PARTS; i++)
        m[i] = i % 3 == DOWN ? new_matrices(c, i < 3 ? E : 1, D, I)
                             : new_matrices(c, i < 3 ? E : 1, I, D);
    experts_case(c, m, 4);
    experts_case(c, m, 70);
    for (int i = 0; i < PARTS; i++) {
        c->be->weight_free(m[i].t);
        free(m[i].w);
    }
}

/* Numerics, rule 12, with slices of 96 and 32 k: no instruction crosses a slice's end. */
void td_check_a_rank_has_its_scaled_slices(td_check *c)
{
    enum { OUT = 24, ROWS = 3, S = 8 };
    need_it(c);
    for (uint32_t k = 256; k <= 768; k += 512) {
        td_check_quant codes;
        td_check_quant_draw(c, TD_W_MXFP4, 1, OUT, k, &codes, NULL);
        float *a = operands(c, ROWS, k), *whole = td_check_floats(c, S * ROWS * OUT),
              *part = td_check_floats(c, S * ROWS * OUT);
        td_queue *q = td_check_queue(c, TD_BF16, 1);
        td_step st = {.n_rows = ROWS};
        for (uint32_t ranks = 1; ranks <= 8; ranks *= 2)
            for (uint32_t r = 0; r < ranks; r++) {
                uint32_t own = k / ranks;
                td_tensor *t = td_check_quant_part(c, &codes, 0, OUT, r * own, own);
                td_gemm g = product(a + (size_t)r * own, k, t, OUT, ranks == 1 ? whole : part);
                g.epilogue = TD_EPI_PARTIAL;
                g.slices = S / ranks;
                c->be->gemm(q, &st, &g);
                TD_MUST_MATCH(c, g.out[0], whole + (size_t)r * g.slices * ROWS * OUT,
                              sizeof *part * g.slices * ROWS * OUT);
                c->be->weight_free(t);
            }
        c->be->close(q);
        td_check_quant_done(&codes);
        td_check_bits(c, whole, sizeof *whole * S * ROWS * OUT);
        td_check_guards(c, 0);
    }
}

void td_check_scaled_nan_stays_nan(td_check *c)
{
    enum { OUT = 20, WIDTH = 160 };
    need_it(c);
    double *values = need(c, malloc(sizeof *values * OUT * WIDTH));
    float *a = operands(c, 3, WIDTH), *out = td_check_floats(c, 3ul * OUT);
    td_tensor *w = td_check_codes(c, TD_W_MXFP4, 1, OUT, WIDTH, values);
    a[WIDTH + 40] = NAN;
    a[2 * WIDTH + 159] = -INFINITY;
    td_queue *q = td_check_queue(c, TD_BF16, 1);
    td_step st = {.n_rows = 3};
    td_gemm g = product(a, WIDTH, w, OUT, out);
    c->be->gemm(q, &st, &g);
    for (uint32_t n = 0; n < OUT; n++)
        TD_MUST(c, !isnan(out[n]) && isnan(out[OUT + n]) && isnan(out[2 * OUT + n]));
    c->be->weight_free(w);
    c->be->close(q);
    free(values);
    td_check_guards(c, 0);
}
