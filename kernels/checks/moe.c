/* SPDX-License-Identifier: Apache-2.0 */
/* Guards route and moe: the bias chooses but never weighs, groups limit, ties go to the lower id;
 * experts and the shared expert match float64 on every path (few rows, many rows), and rows do not
 * see each other. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/checks/inside.h"
#include "kernels/kplan.h"

#include "base/banned.h"

enum { D = 40, E = 12, K = 3, I = 64, IS = 128, EXPERTS_MAX = 257 };

typedef struct ranked {
    double v;
    uint32_t id;
} ranked;

static int by_rank(const void *a, const void *b)
{
    const ranked *x = a, *y = b;
    if (x->v != y->v)
        return x->v > y->v ? -1 : 1;
    return x->id < y->id ? -1 : 1;
}

static void route_case(td_check *c, uint32_t e_count, uint32_t k_count, uint32_t groups,
                       uint32_t kept, int norm)
{
    enum { T = 20 };
    float *h = td_check_random(c, T * D, 0), *w = td_check_random(c, e_count * D, 0),
          *bias = td_check_random(c, e_count, 0);
    float *scores = td_check_floats(c, T * e_count), *weights = td_check_floats(c, T * k_count),
          *margin = td_check_floats(c, T);
    uint32_t *experts = td_check_words(c, T * k_count);
    td_tensor *tw = td_check_weight(c, w, 1, e_count, D), *tb = td_check_vector(c, bias, e_count);
    td_queue *q = td_check_queue(c, TD_BF16, 2);
    td_step st = {.n_rows = T};
    td_route a = {.h = h,
                  .w = tw,
                  .bias = tb,
                  .n_experts = e_count,
                  .top_k = k_count,
                  .n_groups = groups,
                  .top_groups = kept,
                  .norm = norm,
                  .scale = 2.5f,
                  .scores = scores,
                  .experts = experts,
                  .weights = weights,
                  .margin = margin};
    c->be->route(q, &st, &a);
    for (uint32_t t = 0; t < T; t++) {
        ranked g[EXPERTS_MAX], e[EXPERTS_MAX];
        double s[EXPERTS_MAX], sum = 0;
        uint32_t size = e_count / groups, n = 0;
        for (uint32_t i = 0; i < e_count; i++) {
            double x = 0;
            for (uint32_t d = 0; d < D; d++)
                x += (double)h[t * D + d] * (double)w[i * D + d];
            s[i] = 1 / (1 + exp(-x));
            td_check_near(c, (double)scores[t * e_count + i], s[i], 1e-6, "score", i);
        }
        for (uint32_t i = 0; i < groups; i++) {
            ranked two[EXPERTS_MAX];
            for (uint32_t j = 0; j < size; j++)
                two[j] = (ranked){s[i * size + j] + (double)bias[i * size + j], j};
            qsort(two, size, sizeof *two, by_rank);
            g[i] = (ranked){two[0].v + two[1].v, i};
        }
        qsort(g, groups, sizeof *g, by_rank);
        for (uint32_t i = 0; i < kept; i++)
            for (uint32_t j = 0; j < size; j++)
                e[n++] = (ranked){s[g[i].id * size + j] + (double)bias[g[i].id * size + j],
                                  g[i].id * size + j};
        qsort(e, n, sizeof *e, by_rank);
        for (uint32_t i = 0; i < k_count; i++) {
            TD_MUST_EQUAL(c, experts[t * k_count + i], e[i].id);
            sum += s[e[i].id];
        }
        for (uint32_t i = 0; i < k_count; i++)
            td_check_near(c, (double)weights[t * k_count + i],
                          (norm ? s[e[i].id] / sum : s[e[i].id]) * 2.5, 1e-5, "weight", i);
        TD_MUST(c, margin[t] >= 0.0f);
    }
    c->be->weight_free(tw);
    c->be->weight_free(tb);
    c->be->close(q);
    td_check_guards(c, 0);
}

void td_check_routes_match_float64(td_check *c)
{
    route_case(c, E, K, 1, 1, 1);
    route_case(c, E, K, 4, 2, 1);
    route_case(c, E, K, 3, 1, 1);
    route_case(c, E, K, 1, 1, 0);
    route_case(c, 256, 8, 1, 1, 1); /* GLM-5.2 */
    route_case(c, 257, 9, 1, 1, 1);
}

void td_check_ties_go_to_the_lower_id(td_check *c)
{
    float *h = td_check_floats(c, D), *scores = td_check_floats(c, E),
          *weights = td_check_floats(c, K), w[E * D] = {0}, bias[E] = {0};
    uint32_t *experts = td_check_words(c, K);
    memset(h, 0, D * sizeof *h);
    td_tensor *tw = td_check_weight(c, w, 1, E, D), *tb = td_check_vector(c, bias, E);
    td_queue *q = td_check_queue(c, TD_F32, 1);
    td_step st = {.n_rows = 1};
    td_route a = {.h = h,
                  .w = tw,
                  .bias = tb,
                  .n_experts = E,
                  .top_k = K,
                  .n_groups = 4,
                  .top_groups = 2,
                  .norm = 1,
                  .scale = 1.0f,
                  .scores = scores,
                  .experts = experts,
                  .weights = weights};
    c->be->route(q, &st, &a);
    for (uint32_t i = 0; i < K; i++)
        TD_MUST_EQUAL(c, experts[i], i);
    c->be->weight_free(tw);
    c->be->weight_free(tb);
    c->be->close(q);
    td_check_guards(c, 0);
}

static double mlp(const float *a, const float *gate, const float *up, const float *down,
                  uint32_t inner, uint32_t d)
{
    double y = 0;
    for (uint32_t i = 0; i < inner; i++) {
        double g = 0, u = 0;
        for (uint32_t k = 0; k < D; k++) {
            g += (double)a[k] * (double)gate[i * D + k];
            u += (double)a[k] * (double)up[i * D + k];
        }
        y += g / (1 + exp(-g)) * u * (double)down[d * inner + i];
    }
    return y;
}

static void experts_case(td_check *c, td_weight_format format, td_dtype act_type, double tolerance)
{
    float *gate = td_check_random(c, E * I * D, 1), *up = td_check_random(c, E * I * D, 1),
          *down = td_check_random(c, E * I * D, 1);
    float *sg = td_check_random(c, IS * D, 1), *su = td_check_random(c, IS * D, 1),
          *sd = td_check_random(c, IS * D, 1);
    td_tensor *tg = td_check_weight_as(c, format, gate, E, I, D),
              *tu = td_check_weight_as(c, format, up, E, I, D),
              *td = td_check_weight_as(c, format, down, E, D, I);
    td_tensor *xg = td_check_weight_as(c, format, sg, 1, IS, D),
              *xu = td_check_weight_as(c, format, su, 1, IS, D),
              *xd = td_check_weight_as(c, format, sd, 1, D, IS);
    static const uint32_t rows[] = {1, 3, 4, 11};
    enum { SLICES = 2 };
    TD_MUST_EQUAL(c, td_kplan_slices(I), SLICES);
    for (size_t r = 0; r < 4; r++)
        for (uint32_t threads = 1; threads <= 2; threads++) {
            uint32_t t_max = rows[r];
            float *a = td_check_random(c, (size_t)t_max * D, 1),
                  *w = td_check_random(c, (size_t)t_max * K, 0),
                  *partial = td_check_floats(c, (size_t)SLICES * t_max * D),
                  *out = td_check_floats(c, (size_t)t_max * D);
            float *act = td_check_floats(c, td_moe_act_elems(t_max, K, I, IS));
            uint32_t *experts = td_check_words(c, (size_t)t_max * K);
            for (uint32_t i = 0; i < t_max * K; i++)
                experts[i] = (i * 5 + i / K) % E;
            td_queue *q = td_check_queue(c, act_type, threads);
            td_step st = {.n_rows = t_max};
            td_moe m = {.a = a,
                        .experts = experts,
                        .weights = w,
                        .n_experts = E,
                        .top_k = K,
                        .gate = tg,
                        .up = tu,
                        .down = td,
                        .shared_gate = xg,
                        .shared_up = xu,
                        .shared_down = xd,
                        .slices = SLICES,
                        .act = act,
                        .partial = partial};
            c->be->moe(q, &st, &m);
            c->be->reduce_slices(q, &st, partial, SLICES, D, out);
            for (uint32_t t = 0; t < t_max; t++)
                for (uint32_t d = 0; d < D; d++) {
                    double want = mlp(a + t * D, sg, su, sd, IS, d);
                    for (uint32_t k = 0; k < K; k++) {
                        size_t e = experts[t * K + k];
                        want += (double)w[t * K + k] * mlp(a + t * D, gate + e * I * D,
                                                           up + e * I * D, down + e * I * D, I, d);
                    }
                    td_check_near(c, (double)out[t * D + d], want, tolerance, "moe", t * D + d);
                }
            if (c->be->sums_slices) { /* slices and tree in one: the same bits */
                float *whole = td_check_floats(c, (size_t)t_max * D);
                m.out = whole;
                c->be->moe(q, &st, &m);
                TD_MUST_MATCH(c, whole, out, (size_t)t_max * D * sizeof *out);
                m.out = NULL;
            }
            /* the first row alone gives the same bits */
            float *alone = td_check_floats(c, (size_t)SLICES * D), *first = td_check_floats(c, D);
            st.n_rows = 1;
            m.partial = alone;
            c->be->moe(q, &st, &m);
            c->be->reduce_slices(q, &st, alone, SLICES, D, first);
            TD_MUST_MATCH(c, first, out, D * sizeof *first);
            c->be->close(q);
            td_check_guards(c, 6); /* the weights stay */
        }
    td_tensor *all[] = {tg, tu, td, xg, xu, xd};
    for (size_t i = 0; i < 6; i++)
        c->be->weight_free(all[i]);
    td_check_guards(c, 0);
}

void td_check_experts_match_float64(td_check *c)
{
    experts_case(c, TD_W_F32, TD_F32, 1e-3);
    experts_case(c, TD_W_BF16, TD_F32, 1e-3);
    experts_case(c, TD_W_BF16, TD_BF16, 0.5); /* activations of up to 20, rounded, times 64 */
}
