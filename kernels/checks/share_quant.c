/* SPDX-License-Identifier: Apache-2.0 */
/* Guards the shares of 4 and 8 ranks where weights are in FP8 or MXFP4: GLM-5.2's widths are right
 * against float64; a rank that holds some rows, or whole canonical slices of the columns, with its
 * own part of the scales has the bits of the whole, with operands in each form that the backend
 * knows. FP8 shares begin at a scale's block in both directions: others cannot be cut
 * (td_weight_src) and engine/shapes.c refuses them. Hidden width and number of rows are cut so that
 * an emulation ends. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/checks/inside.h"
#include "kernels/kplan.h"

#include "base/banned.h"

static const td_weight_format formats[] = {TD_W_FP8, TD_W_MXFP4};
enum { FORMATS = 2 };

/* What operands that meet these weights become: BF16, int8, e4m3. */
enum form { PLAIN, INT8, E4M3, FORMS };

static int has_form(td_check *c, td_weight_format f, enum form form)
{
    c->i8 = form == INT8;
    c->fp8 = form == E4M3;
    return form == PLAIN || (f == TD_W_MXFP4 && (form == INT8 ? c->be->act_i8 : c->be->act_fp8));
}

static double *values(td_check *c, size_t n)
{
    double *v = malloc(n * sizeof *v);
    if (!v)
        td_check_fail(c, "out of memory");
    return v;
}

/* One row of width k meets n outputs; td_check_products_of_a_share() says which widths. */
static void product(td_check *c, td_weight_format f, uint32_t n, uint32_t k)
{
    double *w = values(c, (size_t)n * k);
    float *a = td_check_random(c, k, 1), *out = td_check_floats(c, n);
    td_tensor *t = td_check_codes(c, f, 1, n, k, w);
    td_queue *q = td_check_queue(c, TD_BF16, 1);
    td_step st = {.n_rows = 1};
    td_gemm g = {
        .a = a, .a_stride = k, .n_heads = 1, .n_out = 1, .w = {t}, .out = {out}, .out_stride = {n}};
    c->be->gemm(q, &st, &g);
    for (uint32_t i = 0; i < n; i++) {
        double v = 0, size = 0;
        for (uint32_t j = 0; j < k; j++) {
            v += (double)a[j] * w[(size_t)i * k + j];
            size += fabs((double)a[j] * w[(size_t)i * k + j]);
        }
        td_check_near(c, (double)out[i], v, 1e-6 * size, "product", i);
    }
    c->be->weight_free(t);
    c->be->close(q);
    free(w);
    td_check_guards(c, 0);
}

void td_check_quantised_products_of_a_share(td_check *c)
{
    /* hidden; o_proj on 1, 4, 8 ranks (2048: q_b's too); an expert's down on 4 and 8; dense on 8 */
    static const uint32_t widths[] = {6144, 16384, 4096, 2048, 512, 256, 1536};
    for (int f = 0; f < FORMATS; f++)
        for (size_t i = 0; i < sizeof widths / sizeof *widths; i++)
            product(c, formats[f], 20, widths[i]);
}

/* out: [slices][rows][n], or [rows][n] when slices is 0. */
static void run_part(td_check *c, const td_check_quant *x, const uint32_t part[4], const float *a,
                     uint32_t rows, uint32_t slices, float *out)
{
    td_tensor *t = td_check_quant_part(c, x, part[0], part[1], part[2], part[3]);
    td_queue *q = td_check_queue(c, TD_BF16, 1);
    td_step st = {.n_rows = rows};
    td_gemm g = {.a = a + part[2],
                 .a_stride = x->k,
                 .n_heads = 1,
                 .epilogue = slices ? TD_EPI_PARTIAL : TD_EPI_F32,
                 .n_out = 1,
                 .w = {t},
                 .out = {out},
                 .out_stride = {part[1]},
                 .slices = slices};
    c->be->gemm(q, &st, &g);
    TD_MUST_EQUAL(c, c->be->finish(q), 0);
    c->be->weight_free(t);
    c->be->close(q);
}

/* o_proj and down: a rank has columns, whole slices of 256. */
static void columns_case(td_check *c, td_weight_format f)
{
    enum { K = 2048, N = 24, ROWS = 3, S = 8 };
    td_check_quant x;
    td_check_quant_draw(c, f, 1, N, K, &x, NULL);
    float *a = td_check_random(c, ROWS * K, 1), *whole = td_check_floats(c, S * ROWS * N),
          *part = td_check_floats(c, S * ROWS * N);
    run_part(c, &x, (uint32_t[4]){0, N, 0, K}, a, ROWS, S, whole);
    for (uint32_t ranks = 2; ranks <= 8; ranks *= 2)
        for (uint32_t r = 0; r < ranks; r++) {
            uint32_t own = K / ranks, slices = S / ranks;
            run_part(c, &x, (uint32_t[4]){0, N, r * own, own}, a, ROWS, slices, part);
            TD_MUST_MATCH(c, part, whole + (size_t)r * slices * ROWS * N,
                          sizeof *part * slices * ROWS * N);
        }
    td_check_quant_done(&x);
    td_check_guards(c, 0);
}

/* q_b, gate and up: a rank has rows. 1024 of them, 256 and 128 on 4 and 8 ranks. */
static void rows_case(td_check *c, td_weight_format f)
{
    enum { K = 160, N = 1024, ROWS = 2 };
    td_check_quant x;
    td_check_quant_draw(c, f, 1, N, K, &x, NULL);
    float *a = td_check_random(c, ROWS * K, 1), *whole = td_check_floats(c, ROWS * N),
          *part = td_check_floats(c, ROWS * N);
    run_part(c, &x, (uint32_t[4]){0, N, 0, K}, a, ROWS, 0, whole);
    for (uint32_t ranks = 4; ranks <= 8; ranks *= 2)
        for (uint32_t r = 0; r < ranks; r++) {
            uint32_t own = N / ranks;
            run_part(c, &x, (uint32_t[4]){r * own, own, 0, K}, a, ROWS, 0, part);
            for (uint32_t t = 0; t < ROWS; t++)
                TD_MUST_MATCH(c, part + (size_t)t * own, whole + (size_t)t * N + r * own,
                              sizeof *part * own);
        }
    td_check_quant_done(&x);
    td_check_guards(c, 0);
}

void td_check_a_rank_has_its_part_of_quantised_weights(td_check *c)
{
    for (int f = 0; f < FORMATS; f++)
        for (enum form form = PLAIN; form < FORMS; form++) {
            if (!has_form(c, formats[f], form))
                continue;
            columns_case(c, formats[f]);
            rows_case(c, formats[f]);
        }
}

enum { ROWS = 2, D = 32, I = 2048, E = 3, TOP = 2 };

/* Experts of GLM-5.2's inner width. */
typedef struct experts {
    td_check_quant gate, up, down;
    double *gates, *ups, *downs; /* what they stand for */
    const float *a, *weights;
    const uint32_t *ids;
} experts;

static experts draw_experts(td_check *c, td_weight_format f)
{
    size_t all = (size_t)E * I * D;
    uint32_t *ids = td_check_words(c, ROWS * TOP);
    experts x = {.gates = values(c, all),
                 .ups = values(c, all),
                 .downs = values(c, all),
                 .a = td_check_random(c, ROWS * D, 1),
                 .weights = td_check_random(c, ROWS * TOP, 0),
                 .ids = ids};
    for (uint32_t i = 0; i < ROWS * TOP; i++)
        ids[i] = (i * 2 + i / TOP) % E;
    td_check_quant_draw(c, f, E, I, D, &x.gate, x.gates);
    td_check_quant_draw(c, f, E, I, D, &x.up, x.ups);
    td_check_quant_draw(c, f, E, D, I, &x.down, x.downs);
    return x;
}

static void drop_experts(experts *x)
{
    td_check_quant_done(&x->gate);
    td_check_quant_done(&x->up);
    td_check_quant_done(&x->down);
    free(x->gates);
    free(x->ups);
    free(x->downs);
}

/* Rank r of ranks: its rows of gate and up, its columns of down. partial [slices][ROWS][D]. */
static void run_experts(td_check *c, const experts *x, uint32_t r, uint32_t ranks, float *partial)
{
    uint32_t own = I / ranks;
    td_tensor *w[] = {td_check_quant_part(c, &x->gate, r * own, own, 0, D),
                      td_check_quant_part(c, &x->up, r * own, own, 0, D),
                      td_check_quant_part(c, &x->down, 0, D, r * own, own)};
    td_queue *q = td_check_queue(c, TD_BF16, 1);
    td_step st = {.n_rows = ROWS};
    td_moe m = {.a = x->a,
                .experts = x->ids,
                .weights = x->weights,
                .n_experts = E,
                .top_k = TOP,
                .gate = w[0],
                .up = w[1],
                .down = w[2],
                .slices = td_kplan_slices(I) / ranks,
                .act = td_check_floats(c, td_moe_act_elems(ROWS, TOP, own, 0)),
                .partial = partial};
    c->be->moe(q, &st, &m);
    TD_MUST_EQUAL(c, c->be->finish(q), 0);
    for (int i = 0; i < 3; i++)
        c->be->weight_free(w[i]);
    c->be->close(q);
}

/* y[n] += row t's expert number j, size[n] the magnitudes that were added. Activations are rounded
 * to BF16 as the kernels do: what is left are sums, and a rounding that falls on the other side
 * costs 2^-8 of its term. */
static void add_expert(const experts *x, uint32_t t, uint32_t j, double *act, double *y,
                       double *size)
{
    size_t base = (size_t)x->ids[t * TOP + j] * I * D;
    for (uint32_t i = 0; i < I; i++) {
        double g = 0, u = 0;
        for (uint32_t k = 0; k < D; k++) {
            g += (double)x->a[t * D + k] * x->gates[base + i * D + k];
            u += (double)x->a[t * D + k] * x->ups[base + i * D + k];
        }
        act[i] = (double)td_check_bf16((float)(g / (1 + exp(-g)) * u));
    }
    for (uint32_t n = 0; n < D; n++)
        for (uint32_t i = 0; i < I; i++) {
            double p = (double)x->weights[t * TOP + j] * act[i] * x->downs[base + n * I + i];
            y[n] += p;
            size[n] += fabs(p);
        }
}

static void experts_near(td_check *c, const experts *x, const float *partial)
{
    double *act = values(c, I);
    for (uint32_t t = 0; t < ROWS; t++) {
        double y[D] = {0}, size[D] = {0};
        for (uint32_t j = 0; j < TOP; j++)
            add_expert(x, t, j, act, y, size);
        for (uint32_t n = 0; n < D; n++) {
            double got = 0;
            for (uint32_t s = 0; s < td_kplan_slices(I); s++)
                got += (double)partial[(s * ROWS + t) * D + n];
            td_check_near(c, got, y[n], 1e-3 * size[n], "moe", t * D + n);
        }
    }
    free(act);
}

static void experts_case(td_check *c, td_weight_format f)
{
    experts x = draw_experts(c, f);
    uint32_t slices = td_kplan_slices(I);
    float *whole = td_check_floats(c, (size_t)slices * ROWS * D),
          *part = td_check_floats(c, (size_t)slices * ROWS * D);
    run_experts(c, &x, 0, 1, whole);
    if (!c->i8 && !c->fp8) /* other operands: only the bits, their values are held elsewhere */
        experts_near(c, &x, whole);
    for (uint32_t ranks = 4; ranks <= 8; ranks *= 2)
        for (uint32_t r = 0; r < ranks; r += ranks - 1) { /* the first and the last */
            size_t n = (size_t)slices / ranks * ROWS * D;
            run_experts(c, &x, r, ranks, part);
            TD_MUST_MATCH(c, part, whole + r * n, n * sizeof *part);
        }
    drop_experts(&x);
    td_check_guards(c, 0);
}

void td_check_quantised_experts_of_a_share(td_check *c)
{
    for (int f = 0; f < FORMATS; f++)
        for (enum form form = PLAIN; form < FORMS; form++)
            if (has_form(c, formats[f], form))
                experts_case(c, formats[f]);
}
