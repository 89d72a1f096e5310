/* SPDX-License-Identifier: Apache-2.0 */
/* Matrix products: one core (one or two rows against a panel of 16 outputs), five users. */
#include <errno.h>
#include <math.h>

#include "kernels/math.h"
#include "kernels/ref/int8.h"
#include "kernels/ref/ref.h"

#include "base/banned.h"

/* acc[r][0..15] += chain over [k0, k1): a block's chain starts at zero (K plan). R rows share each
 * load of the panel. */
#define DOT_BLOCK(R, rows, acc)                                                                    \
    do {                                                                                           \
        for (int r_ = 0; r_ < (R); r_++)                                                           \
            for (int j_ = 0; j_ < 4; j_++)                                                         \
                acc[r_][j_] = (v4){0};                                                             \
        for (uint32_t k_ = at; k_ < end; k_++) {                                                   \
            const v4 *w_ = (const v4 *)(panel + (size_t)k_ * LANES);                               \
            for (int r_ = 0; r_ < (R); r_++) {                                                     \
                float x_ = rows[r_][k_];                                                           \
                v4 b_ = {x_, x_, x_, x_};                                                          \
                for (int j_ = 0; j_ < 4; j_++)                                                     \
                    acc[r_][j_] = acc[r_][j_] + b_ * w_[j_];                                       \
            }                                                                                      \
        }                                                                                          \
    } while (0)

#define DOT_BODY(R)                                                                                \
    v4 acc[R][4], sum[R][4];                                                                       \
    uint32_t at = k0, end = k1 - at > TD_KPLAN_GEMM_BLOCK ? at + TD_KPLAN_GEMM_BLOCK : k1;         \
    DOT_BLOCK(R, rows, acc);                                                                       \
    memcpy(sum, acc, sizeof sum);                                                                  \
    for (at = end; at < k1; at = end) {                                                            \
        end = k1 - at > TD_KPLAN_GEMM_BLOCK ? at + TD_KPLAN_GEMM_BLOCK : k1;                       \
        DOT_BLOCK(R, rows, acc);                                                                   \
        for (int r = 0; r < (R); r++)                                                              \
            for (int j = 0; j < 4; j++)                                                            \
                sum[r][j] = sum[r][j] + acc[r][j];                                                 \
    }                                                                                              \
    memcpy(out, sum, sizeof sum)

void td_ref_dot1(const float *a, const float *panel, uint32_t k0, uint32_t k1, float out[LANES])
{
    const float *const rows[1] = {a};
    DOT_BODY(1);
}

void td_ref_dot2(const float *a, const float *b, const float *panel, uint32_t k0, uint32_t k1,
                 float out[2 * LANES])
{
    const float *const rows[2] = {a, b};
    DOT_BODY(2);
}

/* Rows i and, when there is one, i + 1 of the set; returns how many. */
static uint32_t dot_pair(const td_queue *q, const ref_rows *r, uint32_t i, const td_tensor *w,
                         uint32_t slab, uint32_t panel, uint32_t k0, uint32_t k1, float *out)
{
    const float *a = r->a + ref_row(r, i) * r->stride;
    if (i + 1 == r->n) {
        td_ref_meet1(q, a, w, slab, panel, k0, k1, out);
        return 1;
    }
    td_ref_meet2(q, a, r->a + ref_row(r, i + 1) * r->stride, w, slab, panel, k0, k1, out);
    return 2;
}

static uint32_t lanes_of(const td_tensor *w, uint32_t panel)
{
    uint32_t left = w->n - panel * LANES;
    return left < LANES ? left : LANES;
}

typedef struct gemm_job {
    td_queue *q;
    const td_gemm *g;
    uint32_t n_rows, grain, units; /* units: panels of one head */
} gemm_job;

static void put(td_dtype round, float *dst, const float *src, uint32_t n)
{
    if (round == TD_F32)
        memcpy(dst, src, n * sizeof *dst);
    else
        for (uint32_t i = 0; i < n; i++)
            dst[i] = ref_round(round, src[i]);
}

/* One panel of one output, all rows. */
static void gemm_plain(const gemm_job *j, uint32_t head, uint32_t o, uint32_t panel,
                       const ref_rows *rows)
{
    const td_gemm *g = j->g;
    const td_tensor *w = g->w[o];
    uint32_t lanes = lanes_of(w, panel);
    td_dtype round = g->epilogue == TD_EPI_OPERAND ? j->q->o.act : TD_F32;
    float *out = g->out[o] + (size_t)head * g->out_head + (size_t)panel * LANES;
    for (uint32_t i = 0, n; i < rows->n; i += n) {
        _Alignas(16) float y[2 * LANES];
        n = dot_pair(j->q, rows, i, w, head, panel, 0, w->k, y);
        for (uint32_t r = 0; r < n; r++)
            put(round, out + (size_t)ref_row(rows, i + r) * g->out_stride[o], y + r * LANES, lanes);
    }
}

static void gemm_silu(const gemm_job *j, uint32_t head, uint32_t panel, const ref_rows *rows)
{
    const td_gemm *g = j->g;
    uint32_t lanes = lanes_of(g->w[0], panel);
    float *out = g->out[0] + (size_t)head * g->out_head + (size_t)panel * LANES;
    for (uint32_t i = 0, n; i < rows->n; i += n) {
        _Alignas(16) float y[2 * LANES], u[2 * LANES];
        n = dot_pair(j->q, rows, i, g->w[0], head, panel, 0, g->w[0]->k, y);
        dot_pair(j->q, rows, i, g->w[1], head, panel, 0, g->w[1]->k, u);
        td_silu_mul_n(y, u, y, (size_t)n * LANES);
        for (uint32_t r = 0; r < n; r++)
            put(j->q->o.act, out + (size_t)ref_row(rows, i + r) * g->out_stride[0], y + r * LANES,
                lanes);
    }
}

static void gemm_partial(const gemm_job *j, uint32_t panel, const ref_rows *rows)
{
    const td_gemm *g = j->g;
    const td_tensor *w = g->w[0];
    uint32_t lanes = lanes_of(w, panel), step = w->k / g->slices;
    for (uint32_t i = 0; i < rows->n; i += 2)
        for (uint32_t s = 0; s < g->slices; s++) {
            _Alignas(16) float y[2 * LANES];
            uint32_t n = dot_pair(j->q, rows, i, w, 0, panel, s * step, (s + 1) * step, y);
            float *out = g->out[0] + (size_t)s * j->n_rows * w->n + (size_t)panel * LANES;
            for (uint32_t r = 0; r < n; r++)
                memcpy(out + (size_t)(i + r) * w->n, y + r * LANES, lanes * sizeof *y);
        }
}

static void gemm_unit(const gemm_job *j, uint32_t head, uint32_t unit, const ref_rows *rows)
{
    const td_gemm *g = j->g;
    if (g->epilogue == TD_EPI_SILU_MUL) {
        gemm_silu(j, head, unit, rows);
        return;
    }
    if (g->epilogue == TD_EPI_PARTIAL) {
        gemm_partial(j, unit, rows);
        return;
    }
    uint32_t o = 0;
    while (unit >= g->w[o]->n_panels)
        unit -= g->w[o++]->n_panels;
    gemm_plain(j, head, o, unit, rows);
}

/* Two rows rounded into scratch, then every panel of the head: a is rounded once for each head.
 * What becomes int8 is rounded there alone. */
static void gemm_round_head(const gemm_job *j, uint32_t head, float *scratch)
{
    const td_gemm *g = j->g;
    uint32_t k = g->w[0]->k;
    td_dtype round = ref_is_i8(j->q, g->w[0]) ? TD_F32 : j->q->o.act;
    for (uint32_t t = 0; t < j->n_rows; t += 2) {
        uint32_t n = t + 1 < j->n_rows ? 2 : 1;
        for (uint32_t r = 0; r < n; r++) {
            const float *a = g->a + (size_t)(t + r) * g->a_stride + (size_t)head * g->a_head;
            put(round, scratch + (size_t)r * k, a, k);
        }
        /* the two rows are rows 0 and 1 of the scratch: move the outputs by t rows instead */
        ref_rows rows = {.a = scratch, .stride = k, .n = n};
        gemm_job one = *j;
        td_gemm moved = *g;
        for (uint32_t o = 0; o < g->n_out; o++)
            moved.out[o] = g->out[o] + (size_t)t * g->out_stride[o];
        one.g = &moved;
        for (uint32_t u = 0; u < j->units; u++)
            gemm_unit(&one, head, u, &rows);
    }
}

static void gemm_item(void *arg, uint32_t item, uint32_t thread)
{
    const gemm_job *j = arg;
    const td_gemm *g = j->g;
    if (g->a_round) {
        gemm_round_head(j, item, ref_scratch(j->q, thread));
        return;
    }
    uint32_t per_head = (j->units + j->grain - 1) / j->grain, head = item / per_head;
    uint32_t u0 = item % per_head * j->grain,
             u1 = u0 + j->grain < j->units ? u0 + j->grain : j->units;
    ref_rows rows = {.a = g->a + (size_t)head * g->a_head, .stride = g->a_stride, .n = j->n_rows};
    for (uint32_t u = u0; u < u1; u++)
        gemm_unit(j, head, u, &rows);
}

void td_ref_gemm(td_queue *q, const td_step *s, const td_gemm *g)
{
    gemm_job j = {.q = q, .g = g, .n_rows = s->n_rows};
    uint32_t n_w = g->epilogue == TD_EPI_SILU_MUL ? 1 : g->n_out;
    for (uint32_t o = 0; o < n_w; o++)
        j.units += g->w[o]->n_panels;
    j.grain = ref_grain(q, j.units * g->n_heads);
    uint32_t per_head = (j.units + j.grain - 1) / j.grain;
    td_pool_run(q->pool, gemm_item, &j, g->a_round ? g->n_heads : g->n_heads * per_head);
}

typedef struct logits_job {
    td_queue *q;
    const td_tensor *head;
    ref_rows rows;
    float *out;
    uint32_t grain;
} logits_job;

static void logits_item(void *arg, uint32_t item, uint32_t thread)
{
    const logits_job *j = arg;
    const td_tensor *w = j->head;
    uint32_t p1 = (item + 1) * j->grain < w->n_panels ? (item + 1) * j->grain : w->n_panels;
    for (uint32_t p = item * j->grain; p < p1; p++) {
        uint32_t lanes = lanes_of(w, p);
        for (uint32_t i = 0, n; i < j->rows.n; i += n) {
            _Alignas(16) float y[2 * LANES];
            n = dot_pair(j->q, &j->rows, i, w, 0, p, 0, w->k, y);
            for (uint32_t r = 0; r < n; r++) {
                float *out = j->out + (size_t)(i + r) * w->n + (size_t)p * LANES;
                memcpy(out, y + r * LANES, lanes * sizeof *y);
                for (uint32_t l = 0; l < lanes; l++)
                    if (isnan(out[l]))
                        ref_fail(j->q, -EIO);
            }
        }
    }
}

void td_ref_logits(td_queue *q, const td_step *s, const float *h, const td_tensor *head,
                   float *logits)
{
    logits_job j = {.q = q, .head = head, .out = logits, .grain = ref_grain(q, head->n_panels)};
    j.rows = (ref_rows){h, head->k, s->logit_rows, s->n_logits};
    td_pool_run(q->pool, logits_item, &j, (head->n_panels + j.grain - 1) / j.grain);
}
