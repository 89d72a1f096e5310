/* SPDX-License-Identifier: Apache-2.0 */
/* Guards quantised experts: FP8 and MXFP4, each with operands in every form, beside a shared expert
 * of another width; some experts have no row and some more than a register tile. Slices of FP8 end
 * within a scale's block. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/checks/inside.h"
#include "kernels/kplan.h"

#include "base/banned.h"

enum { E = 7, K = 2, SLICES = 2, ROWS_MAX = 30, WIDTH_MAX = 320 };

/* One kind of expert: its matrices and what they stand for. */
typedef struct mlp {
    uint32_t d, inner;
    td_tensor *gate, *up, *down;
    double *gates, *ups, *downs;
} mlp;

static mlp new_mlp(td_check *c, td_weight_format format, uint32_t n, uint32_t d, uint32_t inner)
{
    size_t size = sizeof(double) * n * d * inner;
    mlp m = {d, inner, .gates = malloc(size), .ups = malloc(size), .downs = malloc(size)};
    if (!m.gates || !m.ups || !m.downs)
        td_check_fail(c, "out of memory");
    m.gate = td_check_codes(c, format, n, inner, d, m.gates);
    m.up = td_check_codes(c, format, n, inner, d, m.ups);
    m.down = td_check_codes(c, format, n, d, inner, m.downs);
    return m;
}

static void drop_mlp(td_check *c, mlp *m)
{
    td_tensor *all[] = {m->gate, m->up, m->down};
    for (size_t i = 0; i < 3; i++)
        c->be->weight_free(all[i]);
    free(m->gates);
    free(m->ups);
    free(m->downs);
}

static double dot(const double *a, const double *w, uint32_t k)
{
    double s = 0;
    for (uint32_t i = 0; i < k; i++)
        s += a[i] * w[i];
    return s;
}

/* How far down's operand may be off: rounded to BF16, then to int8 of its group. */
static double operand_error(const double *act, uint32_t i, td_dtype type, int i8)
{
    double most = 0;
    for (uint32_t j = i / 32 * 32; i8 && j < i / 32 * 32 + 32; j++)
        most = fabs(act[j]) > most ? fabs(act[j]) : most;
    return fabs(act[i]) * (type == TD_BF16 ? 0.004 : 2e-5) + 1e-6 + most * 1.01 / 254;
}

/* sum[d] += weight * expert e of a row, and how far that may be off. */
static void add_expert(const mlp *m, size_t e, const double *a, double weight, td_dtype type,
                       int i8, double *sum, double *error)
{
    double act[WIDTH_MAX];
    size_t first = e * m->d * m->inner;
    for (uint32_t i = 0; i < m->inner; i++) {
        double g = dot(a, m->gates + first + (size_t)i * m->d, m->d);
        act[i] = g / (1 + exp(-g)) * dot(a, m->ups + first + (size_t)i * m->d, m->d);
    }
    for (uint32_t n = 0; n < m->d; n++) {
        const double *down = m->downs + first + (size_t)n * m->inner;
        sum[n] += weight * dot(act, down, m->inner);
        for (uint32_t i = 0; i < m->inner; i++)
            error[n] += fabs(weight * down[i]) * operand_error(act, i, type, i8);
    }
}

typedef struct run {
    td_dtype type;
    int i8;
    const mlp *own, *shared;
    const float *a, *weights;
    const uint32_t *experts;
} run;

static void check_row(td_check *c, const run *r, uint32_t t, const float *out)
{
    uint32_t d = r->own->d;
    double x[WIDTH_MAX], sum[WIDTH_MAX] = {0}, error[WIDTH_MAX] = {0};
    for (uint32_t i = 0; i < d; i++)
        x[i] = (double)r->a[(size_t)t * d + i];
    if (r->i8)
        td_check_int8(r->a + (size_t)t * d, d, x);
    for (uint32_t k = 0; k < K; k++)
        add_expert(r->own, r->experts[t * K + k], x, (double)r->weights[t * K + k], r->type, r->i8,
                   sum, error);
    add_expert(r->shared, 0, x, 1, r->type, r->i8, sum, error);
    for (uint32_t n = 0; n < d; n++)
        td_check_near(c, (double)out[n], sum[n], c->wider * error[n], "experts", (size_t)t * d + n);
}

static void rows_case(td_check *c, run r, uint32_t rows, uint32_t threads)
{
    uint32_t d = r.own->d, *experts = td_check_words(c, (size_t)rows * K);
    float *a = td_check_random(c, (size_t)rows * d, 1),
          *weights = td_check_random(c, (size_t)rows * K, 0),
          *partial = td_check_floats(c, (size_t)SLICES * rows * d),
          *out = td_check_floats(c, (size_t)rows * d), *alone = td_check_floats(c, d);
    float *act = td_check_floats(c, td_moe_act_elems(rows, K, r.own->inner, r.shared->inner));
    for (uint32_t t = 0; t < rows; t++) { /* most rows meet in expert 0, none in 6 */
        experts[t * K] = t % 5 == 4 ? 2 : 0;
        experts[t * K + 1] = t % 7 == 3 ? 1 : 3 + t % 3;
    }
    r.a = a;
    r.weights = weights;
    r.experts = experts;
    td_queue *q = td_check_queue(c, r.type, threads);
    td_step st = {.n_rows = rows};
    td_moe m = {.a = a,
                .experts = experts,
                .weights = weights,
                .n_experts = E,
                .top_k = K,
                .gate = r.own->gate,
                .up = r.own->up,
                .down = r.own->down,
                .shared_gate = r.shared->gate,
                .shared_up = r.shared->up,
                .shared_down = r.shared->down,
                .slices = SLICES,
                .act = act,
                .partial = partial};
    c->be->moe(q, &st, &m);
    c->be->reduce_slices(q, &st, partial, SLICES, d, out);
    for (uint32_t t = 0; t < rows; t++)
        check_row(c, &r, t, out + (size_t)t * d);
    st.n_rows = 1; /* the first row alone gives the same bits */
    c->be->moe(q, &st, &m);
    c->be->reduce_slices(q, &st, partial, SLICES, d, alone);
    TD_MUST_MATCH(c, alone, out, d * sizeof *alone);
    c->be->close(q);
    td_check_guards(c, 0);
}

void td_check_quantised_experts_match_float64(td_check *c)
{
    static const struct shape {
        td_weight_format format;
        uint32_t d, inner, shared_inner;
    } shapes[] = {{TD_W_MXFP4, 96, 64, 128}, {TD_W_FP8, 75, 192, 320}};
    static const uint32_t rows[] = {1, 3, 13, ROWS_MAX};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        const struct shape *s = &shapes[i];
        mlp own = new_mlp(c, s->format, E, s->d, s->inner),
            shared = new_mlp(c, s->format, 1, s->d, s->shared_inner);
        for (int form = 0; form < 3; form++) { /* f32, BF16, int8 */
            c->i8 = form == 2;
            run r = {.type = form ? TD_BF16 : TD_F32, .own = &own, .shared = &shared};
            r.i8 = c->i8 && c->be->act_i8 && s->format == TD_W_MXFP4;
            for (size_t n = 0; n < sizeof rows / sizeof *rows; n++)
                rows_case(c, r, rows[n], 1 + n % 2);
        }
        drop_mlp(c, &own);
        drop_mlp(c, &shared);
    }
    c->i8 = 0;
}
