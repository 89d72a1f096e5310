/* SPDX-License-Identifier: Apache-2.0 */
/* Router and the bookkeeping of experts. Nothing here depends on the order in which blocks run. */
#include "kernels/hip/math.hpp"
#include "kernels/hip/tile.hpp"

/* A wave per expert: where its pairs begin (how many chose a lower expert), then the pairs in
 * order. */
K_KERNEL(moe_sort, td_k_moe_sort)
{
    uint32_t e = k_block() * K_WAVES + k_wave(), n = a.step->n_rows * a.top_k;
    if (e >= a.n_experts)
        return;
    uint32_t lower = 0, count = 0;
    for (uint32_t i0 = 0; i0 < n; i0 += K_WAVE) {
        uint32_t i = i0 + k_lane(), id = i < n ? a.experts[i] : a.n_experts;
        lower += k_popcount(k_ballot(id < e));
    }
    for (uint32_t i0 = 0; i0 < n; i0 += K_WAVE) {
        uint32_t i = i0 + k_lane();
        bool mine = i < n && a.experts[i] == e;
        uint64_t set = k_ballot(mine);
        if (mine)
            a.to.pairs[lower + count + k_popcount(set & ((1ull << k_lane()) - 1))] = i;
        count += k_popcount(set);
    }
    if (k_lane() == 0) {
        a.to.firsts[e] = lower;
        a.to.counts[e] = count;
    }
}

/* One block: cut every expert's pairs into tiles of tile_rows. */
K_KERNEL(moe_tiles, td_k_moe_sort)
{
    uint32_t *tiles = k_lds<uint32_t>(); /* [E] */
    for (uint32_t e = k_tid(); e < a.n_experts; e += K_THREADS)
        tiles[e] = (a.to.counts[e] + a.tile_rows - 1) / a.tile_rows;
    k_sync();
    for (uint32_t e = k_tid(); e < a.n_experts; e += K_THREADS) {
        uint32_t at = 0;
        for (uint32_t i = 0; i < e; i++)
            at += tiles[i];
        for (uint32_t i = 0; i < tiles[e]; i++) {
            a.to.tiles[2 * (at + i)] = e;
            a.to.tiles[2 * (at + i) + 1] = i * a.tile_rows;
        }
        if (e == a.n_experts - 1)
            *a.to.n_tiles = at + tiles[e];
    }
}

/* A block has one row of one slice: experts in top-k order, then the shared expert. */
K_KERNEL(moe_combine, td_k_moe_combine)
{
    uint32_t n_rows = a.step->n_rows, t = k_block() / a.n_slices, s = k_block() % a.n_slices;
    if (t >= n_rows)
        return;
    const float *w = a.weights + (size_t)t * a.top_k;
    const float *y = a.y + ((size_t)s * n_rows + t) * a.top_k * a.n;
    float *out = a.partial + ((size_t)(a.slice0 + s) * n_rows + t) * a.n;
    for (uint32_t i = k_tid(); i < a.n; i += K_THREADS) {
        float sum = w[0] * y[i];
        for (uint32_t k = 1; k < a.top_k; k++)
            sum += w[k] * y[(size_t)k * a.n + i];
        out[i] = a.shared ? sum + out[i] : sum;
    }
}

/* The greatest by (value, lower id), as every lane of the wave sees it. */
struct best {
    float v;
    uint32_t id;
};

K_DEV best wave_best(best b)
{
    for (uint32_t o = K_WAVE / 2; o > 0; o /= 2) {
        best x = {k_shuffle_xor(b.v, o), k_shuffle_u32(b.id, k_lane() ^ o)};
        if (x.v > b.v || (x.v == b.v && x.id < b.id))
            b = x;
    }
    return b;
}

enum { NOBODY = 0xffffffffu };

/* Best of n values that are not in taken (a bit each). id NOBODY: nothing is left. */
K_DEV best best_left(const float *v, uint32_t n, const uint32_t *taken)
{
    best b = {-k_inf(), NOBODY};
    for (uint32_t i = k_lane(); i < n; i += K_WAVE)
        if (!(taken[i / 32] >> i % 32 & 1) && (b.id == NOBODY || v[i] > b.v)) {
            b.v = v[i];
            b.id = i;
        }
    return wave_best(b);
}

/* Ids of the k greatest into top, best first; returns the best one left out. LDS: taken. */
K_DEV best take_best(const float *v, uint32_t n, uint32_t k, uint32_t *top, uint32_t *taken)
{
    for (uint32_t i = k_lane(); i < (n + 31) / 32; i += K_WAVE)
        taken[i] = 0;
    k_wave_sync();
    for (uint32_t i = 0; i < k; i++) {
        best b = best_left(v, n, taken);
        k_wave_sync();
        if (k_lane() == 0 && b.id < n) {
            top[i] = b.id;
            taken[b.id / 32] |= 1u << b.id % 32;
        }
        k_wave_sync();
    }
    return best_left(v, n, taken);
}

K_DEV float choice_margin(const float *v, uint32_t n, uint32_t last, best next)
{
    float largest = 0.0f, inf = k_inf();
    for (uint32_t i = k_lane(); i < n; i += K_WAVE) {
        float abs = v[i] < 0.0f ? -v[i] : v[i];
        largest = abs < inf && abs > largest ? abs : largest;
    }
    for (uint32_t o = K_WAVE / 2; o > 0; o /= 2) {
        float x = k_shuffle_xor(largest, o);
        largest = x > largest ? x : largest;
    }
    bool finite = next.id < n && next.v < inf && next.v > -inf;
    return finite && largest > 0.0f ? (v[last] - next.v) / largest : inf;
}

struct route_lds {
    float biased[TD_K_EXPERTS_MAX], group[TD_K_EXPERTS_MAX];
    uint32_t taken[TD_K_EXPERTS_MAX / 32], kept[TD_K_EXPERTS_MAX], top[TD_K_CHOSEN_MAX];
};

static_assert(sizeof(route_lds) <= TD_K_LDS_ROUTE, "the host asks for enough LDS");

/* Keep the experts of the best groups; the others get -inf. */
K_DEV float limit_groups(const td_k_route &a, route_lds *l)
{
    uint32_t size = a.n_experts / a.n_groups;
    for (uint32_t g = k_lane(); g < a.n_groups; g += K_WAVE) {
        const float *v = l->biased + (size_t)g * size;
        float first = v[0], second = -k_inf();
        for (uint32_t i = 1; i < size; i++) {
            if (v[i] > first) {
                second = first;
                first = v[i];
            } else if (v[i] > second) {
                second = v[i];
            }
        }
        l->group[g] = size < 2 ? first : first + second;
    }
    k_wave_sync();
    best next = take_best(l->group, a.n_groups, a.top_groups, l->kept, l->taken);
    float margin = choice_margin(l->group, a.n_groups, l->kept[a.top_groups - 1], next);
    for (uint32_t e = k_lane(); e < a.n_experts; e += K_WAVE) {
        uint32_t g = e / size;
        if (!(l->taken[g / 32] >> g % 32 & 1))
            l->biased[e] = -k_inf();
    }
    k_wave_sync();
    return margin;
}

/* A block has one row; its first wave chooses. */
K_KERNEL(route_choose, td_k_route)
{
    uint32_t t = k_block();
    if (t >= a.step->n_rows)
        return;
    route_lds *l = k_lds<route_lds>();
    float *s = a.scores + (size_t)t * a.n_experts;
    for (uint32_t e = k_tid(); e < a.n_experts; e += K_THREADS) {
        s[e] = k_sigmoid(s[e]);
        l->biased[e] = s[e] + a.bias[e];
    }
    k_sync();
    if (k_wave() != 0)
        return;
    float margin = a.n_groups > 1 ? limit_groups(a, l) : k_inf();
    best next = take_best(l->biased, a.n_experts, a.top_k, l->top, l->taken);
    float own = choice_margin(l->biased, a.n_experts, l->top[a.top_k - 1], next);
    if (a.margin && k_lane() == 0)
        a.margin[t] = own < margin ? own : margin;
    float sum = 0.0f;
    for (uint32_t i = 0; i < a.top_k; i++)
        sum += s[l->top[i]];
    for (uint32_t i = k_lane(); i < a.top_k; i += K_WAVE) {
        float w = s[l->top[i]];
        a.experts[(size_t)t * a.top_k + i] = l->top[i];
        a.weights[(size_t)t * a.top_k + i] = (a.norm ? w / (sum + 1e-20f) : w) * a.scale;
    }
}
