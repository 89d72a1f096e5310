/* SPDX-License-Identifier: Apache-2.0 */
/* Router and experts. */
#include <math.h>

#include "kernels/math.h"
#include "kernels/ref/int8.h"
#include "kernels/ref/ref.h"

#include "base/banned.h"

typedef struct route_job {
    const td_route *a;
    uint32_t width;
} route_job;

/* Is (score x, id i) before (score y, id j)? */
static int before(float x, uint32_t i, float y, uint32_t j)
{
    return x > y || (x == y && i < j);
}

/* Ids of the k greatest of n by (score descending, id ascending) into top; returns the best one
 * left out, or n. */
static uint32_t top_k(const float *v, uint32_t n, uint32_t k, uint32_t *top)
{
    uint32_t have = 0, next = n;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t at = have;
        while (at > 0 && before(v[i], i, v[top[at - 1]], top[at - 1]))
            at--;
        uint32_t out = i;
        if (at < k) {
            out = have == k ? top[k - 1] : n;
            have += have < k;
            for (uint32_t m = have - 1; m > at; m--)
                top[m] = top[m - 1];
            top[at] = i;
        }
        if (out < n && (next == n || before(v[out], out, v[next], next)))
            next = out;
    }
    return next;
}

static float margin_of(const float *v, uint32_t n, uint32_t last, uint32_t next)
{
    float largest = 0.0f;
    for (uint32_t i = 0; i < n; i++)
        if (isfinite(v[i]) && fabsf(v[i]) > largest)
            largest = fabsf(v[i]);
    return next < n && isfinite(v[next]) && largest > 0.0f ? (v[last] - v[next]) / largest
                                                           : INFINITY;
}

enum { EXPERTS_MAX = 1024 };

/* Keep the experts of the best groups; the others get -inf. Returns the margin of the groups'
 * choice. */
static float limit_groups(const td_route *a, float *biased)
{
    float group[EXPERTS_MAX];
    uint32_t kept[EXPERTS_MAX], size = a->n_experts / a->n_groups;
    for (uint32_t g = 0; g < a->n_groups; g++) {
        const float *v = biased + (size_t)g * size;
        uint32_t two[2];
        top_k(v, size, size < 2 ? size : 2, two);
        group[g] = size < 2 ? v[0] : v[two[0]] + v[two[1]];
    }
    uint32_t next = top_k(group, a->n_groups, a->top_groups, kept);
    float margin = margin_of(group, a->n_groups, kept[a->top_groups - 1], next);
    for (uint32_t g = 0; g < a->n_groups; g++) {
        int keep = 0;
        for (uint32_t i = 0; i < a->top_groups; i++)
            keep |= kept[i] == g;
        for (uint32_t e = 0; e < size && !keep; e++)
            biased[(size_t)g * size + e] = -INFINITY;
    }
    return margin;
}

void td_ref_choose(const td_route *a, uint32_t t)
{
    float biased[EXPERTS_MAX];
    const float *s = a->scores + (size_t)t * a->n_experts;
    for (uint32_t e = 0; e < a->n_experts; e++)
        biased[e] = s[e] + a->bias->data[e];
    float margin = a->n_groups > 1 ? limit_groups(a, biased) : INFINITY;
    uint32_t *ids = a->experts + (size_t)t * a->top_k;
    uint32_t next = top_k(biased, a->n_experts, a->top_k, ids);
    float own = margin_of(biased, a->n_experts, ids[a->top_k - 1], next);
    if (a->margin)
        a->margin[t] = own < margin ? own : margin;
    float sum = 0.0f, *w = a->weights + (size_t)t * a->top_k;
    for (uint32_t i = 0; i < a->top_k; i++)
        sum += s[ids[i]];
    for (uint32_t i = 0; i < a->top_k; i++)
        w[i] = (a->norm ? s[ids[i]] / (sum + 1e-20f) : s[ids[i]]) * a->scale;
}

static void route_item(void *arg, uint32_t t, uint32_t thread)
{
    const route_job *j = arg;
    const td_route *a = j->a;
    float *s = a->scores + (size_t)t * a->n_experts;
    for (uint32_t p = 0; p < a->w->n_panels; p++) {
        _Alignas(16) float y[LANES];
        td_ref_dot1(a->h + (size_t)t * j->width, ref_panel(a->w, 0, p), 0, j->width, y);
        for (uint32_t l = 0; l < LANES && p * LANES + l < a->n_experts; l++)
            s[p * LANES + l] = td_sigmoid(y[l]);
    }
    td_ref_choose(a, t);
}

void td_ref_route(td_queue *q, const td_step *s, const td_route *a)
{
    route_job j = {a, a->w->k};
    td_pool_run(q->pool, route_item, &j, s->n_rows);
}

typedef struct moe_job {
    td_queue *q;
    const td_moe *a;
    uint32_t n_rows, inner, shared_inner, act_stride, grain;
} moe_job;

static const float *act_of(const moe_job *j, uint32_t t, uint32_t slot)
{
    return j->a->act + (size_t)t * j->act_stride + (size_t)slot * j->inner;
}

static void gate_up(const moe_job *j, const td_tensor *gate, const td_tensor *up, uint32_t slab,
                    uint32_t panel, uint32_t t, uint32_t slot)
{
    _Alignas(16) float g[LANES], u[LANES];
    const float *a = j->a->a + (size_t)t * gate->k;
    td_ref_meet1(j->q, a, gate, slab, panel, 0, gate->k, g);
    td_ref_meet1(j->q, a, up, slab, panel, 0, up->k, u);
    td_silu_mul_n(g, u, g, LANES);
    uint32_t lanes = gate->n - panel * LANES < LANES ? gate->n - panel * LANES : LANES;
    float *out = (float *)act_of(j, t, slot) + (size_t)panel * LANES;
    for (uint32_t l = 0; l < lanes; l++)
        out[l] = ref_round(j->q->o.act, g[l]);
}

/* Two rows of one expert at a time: each load of the panel serves both. */
static void gate_up_pair(const moe_job *j, const td_tensor *gate, const td_tensor *up,
                         uint32_t slab, uint32_t panel, const uint32_t t[2], const uint32_t slot[2])
{
    _Alignas(16) float g[2 * LANES], u[2 * LANES];
    const float *a = j->a->a + (size_t)t[0] * gate->k, *b = j->a->a + (size_t)t[1] * gate->k;
    td_ref_meet2(j->q, a, b, gate, slab, panel, 0, gate->k, g);
    td_ref_meet2(j->q, a, b, up, slab, panel, 0, up->k, u);
    td_silu_mul_n(g, u, g, 2 * LANES);
    uint32_t lanes = gate->n - panel * LANES < LANES ? gate->n - panel * LANES : LANES;
    for (uint32_t r = 0; r < 2; r++) {
        float *out = (float *)act_of(j, t[r], slot[r]) + (size_t)panel * LANES;
        for (uint32_t l = 0; l < lanes; l++)
            out[l] = ref_round(j->q->o.act, g[r * LANES + l]);
    }
}

/* Every (row, slot) that chose expert e; e = n_experts is the shared expert, which every row has in
 * the slot behind. */
static void up_item(void *arg, uint32_t item, uint32_t thread)
{
    const moe_job *j = arg;
    const td_moe *a = j->a;
    uint32_t panels = a->gate->n_panels, e = item / panels, panel = item % panels;
    const td_tensor *gate = a->gate, *up = a->up;
    uint32_t slab = e, first = 0, last = a->top_k;
    if (e >= a->n_experts) {
        gate = a->shared_gate;
        up = a->shared_up;
        panel = item - a->n_experts * panels;
        slab = 0;
        first = a->top_k;
        last = a->top_k + 1;
    }
    uint32_t t[2], slot[2], n = 0;
    for (uint32_t r = 0; r < j->n_rows; r++)
        for (uint32_t k = first; k < last; k++) {
            if (k < a->top_k && a->experts[(size_t)r * a->top_k + k] != e)
                continue;
            t[n] = r;
            slot[n++] = k;
            if (n == 2) {
                gate_up_pair(j, gate, up, slab, panel, t, slot);
                n = 0;
            }
        }
    if (n)
        gate_up(j, gate, up, slab, panel, t[0], slot[0]);
}

/* One row, one panel of outputs, all slices: experts in top-k order, then the shared expert
 * (numerics, rules 8 and 12). */
static void down_row(const moe_job *j, uint32_t panel, uint32_t t)
{
    const td_moe *a = j->a;
    const td_tensor *down = a->down;
    uint32_t n = down->n, lanes = n - panel * LANES < LANES ? n - panel * LANES : LANES;
    for (uint32_t s = 0; s < a->slices; s++) {
        _Alignas(16) float y[LANES], sum[LANES];
        uint32_t k0 = s * (j->inner / a->slices), k1 = k0 + j->inner / a->slices;
        for (uint32_t k = 0; k < a->top_k; k++) {
            uint32_t e = a->experts[(size_t)t * a->top_k + k];
            float w = a->weights[(size_t)t * a->top_k + k];
            td_ref_meet1(j->q, act_of(j, t, k), down, e, panel, k0, k1, y);
            for (uint32_t l = 0; l < LANES; l++)
                sum[l] = k ? sum[l] + w * y[l] : w * y[l];
        }
        if (a->shared_down) {
            k0 = s * (j->shared_inner / a->slices);
            td_ref_meet1(j->q, act_of(j, t, a->top_k), a->shared_down, 0, panel, k0,
                         k0 + j->shared_inner / a->slices, y);
            for (uint32_t l = 0; l < LANES; l++)
                sum[l] += y[l];
        }
        memcpy(a->partial + ((size_t)s * j->n_rows + t) * n + (size_t)panel * LANES, sum,
               lanes * sizeof *sum);
    }
}

static void down_item(void *arg, uint32_t item, uint32_t thread)
{
    const moe_job *j = arg;
    uint32_t panels = j->a->down->n_panels;
    uint32_t p1 = (item + 1) * j->grain < panels ? (item + 1) * j->grain : panels;
    for (uint32_t p = item * j->grain; p < p1; p++)
        for (uint32_t t = 0; t < j->n_rows; t++)
            down_row(j, p, t);
}

/* A decode step touches few experts: walking only the chosen ones keeps empty items away. */
static void up_row_item(void *arg, uint32_t item, uint32_t thread)
{
    const moe_job *j = arg;
    const td_moe *a = j->a;
    uint32_t slots = a->top_k + (a->shared_gate ? 1 : 0), t = item / slots, k = item % slots;
    const td_tensor *gate = k == a->top_k ? a->shared_gate : a->gate,
                    *up = k == a->top_k ? a->shared_up : a->up;
    uint32_t slab = k == a->top_k ? 0 : a->experts[(size_t)t * a->top_k + k];
    for (uint32_t p = 0; p < gate->n_panels; p++)
        gate_up(j, gate, up, slab, p, t, k);
}

void td_ref_moe(td_queue *q, const td_step *s, const td_moe *a)
{
    moe_job j = {.q = q, .a = a, .n_rows = s->n_rows, .inner = a->gate->n};
    j.shared_inner = a->shared_gate ? a->shared_gate->n : 0;
    j.act_stride = a->top_k * j.inner + j.shared_inner;
    j.grain = ref_grain(q, a->down->n_panels);
    if (s->n_rows < 4)
        td_pool_run(q->pool, up_row_item, &j, s->n_rows * (a->top_k + (a->shared_gate ? 1 : 0)));
    else
        td_pool_run(q->pool, up_item, &j,
                    a->n_experts * a->gate->n_panels +
                        (a->shared_gate ? a->shared_gate->n_panels : 0));
    td_pool_run(q->pool, down_item, &j, (a->down->n_panels + j.grain - 1) / j.grain);
}
