/* SPDX-License-Identifier: Apache-2.0 */
/* Guards route and moe: the bias chooses but never weighs, groups limit, ties go to the lower id;
 * experts and the shared expert match float64 on every path (few rows, many rows), and rows do not
 * see each other. */
#include "tests/kernels/kernels_util.h"

enum { D = 40, E = 12, K = 3, I = 64, IS = 128 };

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

static void route_case(uint32_t groups, uint32_t kept, int norm)
{
    enum { T = 20 };
    float *h = random_floats(T * D, 0), *w = random_floats(E * D, 0), *bias = random_floats(E, 0);
    float *scores = floats(T * E), *weights = floats(T * K), *margin = floats(T);
    uint32_t *experts = words(T * K);
    td_tensor *tw = weight(w, 1, E, D), *tb = vector(bias, E);
    td_queue *q = open_queue(TD_BF16, 2);
    td_step st = {.n_rows = T};
    td_route a = {.h = h,
                  .w = tw,
                  .bias = tb,
                  .n_experts = E,
                  .top_k = K,
                  .n_groups = groups,
                  .top_groups = kept,
                  .norm = norm,
                  .scale = 2.5f,
                  .scores = scores,
                  .experts = experts,
                  .weights = weights,
                  .margin = margin};
    under->route(q, &st, &a);
    for (uint32_t t = 0; t < T; t++) {
        ranked g[E], e[E];
        double s[E], sum = 0;
        uint32_t size = E / groups, n = 0;
        for (uint32_t i = 0; i < E; i++) {
            double x = 0;
            for (uint32_t d = 0; d < D; d++)
                x += (double)h[t * D + d] * (double)w[i * D + d];
            s[i] = 1 / (1 + exp(-x));
            near((double)scores[t * E + i], s[i], 1e-6, "score", i);
        }
        for (uint32_t i = 0; i < groups; i++) {
            ranked two[E];
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
        for (uint32_t i = 0; i < K; i++) {
            assert_int_equal(experts[t * K + i], e[i].id);
            sum += s[e[i].id];
        }
        for (uint32_t i = 0; i < K; i++)
            near((double)weights[t * K + i], (norm ? s[e[i].id] / sum : s[e[i].id]) * 2.5, 1e-5,
                 "weight", i);
        assert_true(margin[t] >= 0.0f);
    }
    under->weight_free(tw);
    under->weight_free(tb);
    under->close(q);
    check_guards();
}

static void routes_match_float64(void **state)
{
    route_case(1, 1, 1);
    route_case(4, 2, 1);
    route_case(3, 1, 1);
    route_case(1, 1, 0);
}

static void ties_go_to_the_lower_id(void **state)
{
    float h[D] = {0}, w[E * D] = {0}, bias[E] = {0}, scores[E], weights[K];
    uint32_t experts[K];
    td_tensor *tw = weight(w, 1, E, D), *tb = vector(bias, E);
    td_queue *q = open_queue(TD_F32, 1);
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
    under->route(q, &st, &a);
    for (uint32_t i = 0; i < K; i++)
        assert_int_equal(experts[i], i);
    under->weight_free(tw);
    under->weight_free(tb);
    under->close(q);
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

static void experts_case(td_weight_format format, td_dtype act_type, double tolerance)
{
    float *gate = random_floats(E * I * D, 1), *up = random_floats(E * I * D, 1),
          *down = random_floats(E * I * D, 1);
    float *sg = random_floats(IS * D, 1), *su = random_floats(IS * D, 1),
          *sd = random_floats(IS * D, 1);
    td_tensor *tg = weight_as(format, gate, E, I, D), *tu = weight_as(format, up, E, I, D),
              *td = weight_as(format, down, E, D, I);
    td_tensor *xg = weight_as(format, sg, 1, IS, D), *xu = weight_as(format, su, 1, IS, D),
              *xd = weight_as(format, sd, 1, D, IS);
    static const uint32_t rows[] = {1, 3, 4, 11};
    enum { SLICES = 2 };
    assert_int_equal(td_kplan_slices(I), SLICES);
    for (size_t r = 0; r < 4; r++)
        for (uint32_t threads = 1; threads <= 2; threads++) {
            uint32_t t_max = rows[r];
            float *a = random_floats((size_t)t_max * D, 1),
                  *w = random_floats((size_t)t_max * K, 0),
                  *partial = floats((size_t)SLICES * t_max * D), *out = floats((size_t)t_max * D);
            float *act = floats(td_moe_act_elems(t_max, K, I, IS));
            uint32_t *experts = words((size_t)t_max * K);
            for (uint32_t i = 0; i < t_max * K; i++)
                experts[i] = (i * 5 + i / K) % E;
            td_queue *q = open_queue(act_type, threads);
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
            under->moe(q, &st, &m);
            under->reduce_slices(q, &st, partial, SLICES, D, out);
            for (uint32_t t = 0; t < t_max; t++)
                for (uint32_t d = 0; d < D; d++) {
                    double want = mlp(a + t * D, sg, su, sd, IS, d);
                    for (uint32_t k = 0; k < K; k++) {
                        size_t e = experts[t * K + k];
                        want += (double)w[t * K + k] * mlp(a + t * D, gate + e * I * D,
                                                           up + e * I * D, down + e * I * D, I, d);
                    }
                    near((double)out[t * D + d], want, tolerance, "moe", t * D + d);
                }
            if (under->sums_slices) { /* slices and tree in one: the same bits */
                float *whole = floats((size_t)t_max * D);
                m.out = whole;
                under->moe(q, &st, &m);
                assert_memory_equal(whole, out, (size_t)t_max * D * sizeof *out);
                m.out = NULL;
            }
            /* the first row alone gives the same bits */
            float *alone = floats((size_t)SLICES * D), *first = floats(D);
            st.n_rows = 1;
            m.partial = alone;
            under->moe(q, &st, &m);
            under->reduce_slices(q, &st, alone, SLICES, D, first);
            assert_memory_equal(first, out, D * sizeof *first);
            under->close(q);
            while (n_bufs > 6) { /* the weights stay */
                guarded *g = &bufs[--n_bufs];
                for (size_t i = 0; i < GUARD; i++)
                    assert_int_equal(g->raw[i], 0xa5);
                for (size_t i = GUARD + g->bytes; i < (g->bytes + 63) / 64 * 64 + 2 * GUARD; i++)
                    assert_int_equal(g->raw[i], 0xa5);
                free(g->raw);
            }
        }
    td_tensor *all[] = {tg, tu, td, xg, xu, xd};
    for (size_t i = 0; i < 6; i++)
        under->weight_free(all[i]);
    check_guards();
}

static void experts_match_float64(void **state)
{
    experts_case(TD_W_F32, TD_F32, 1e-3);
    experts_case(TD_W_BF16, TD_F32, 1e-3);
    experts_case(TD_W_BF16, TD_BF16, 0.5); /* activations of up to 20, rounded, times 64 */
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(routes_match_float64),
        cmocka_unit_test(ties_go_to_the_lower_id),
        cmocka_unit_test(experts_match_float64),
    };
    RUN_FOR_EVERY_ISA(tests);
}
