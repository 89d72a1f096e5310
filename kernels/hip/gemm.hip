/* SPDX-License-Identifier: Apache-2.0 */
/* Matrix products: plain (several outputs, heads, canonical slices), SwiGLU, experts. One core: a
 * block's 4 waves share the rows' operands through LDS, each wave streams its own weights from
 * memory into registers, once. K plan (numerics, rules 1 and 2): matrix steps of 32 k in order,
 * blocks of TD_KPLAN_GEMM_BLOCK k from zero, blocks added left to right; the same for every tile
 * shape. */
#include "kernels/hip/formats.hpp"
#include "kernels/hip/math.hpp"
#include "kernels/hip/scaled.hpp"

enum {
    CHUNK = 64, /* k of a trip through LDS */
    CHUNK_STEPS = CHUNK / TD_K_TILE_K,
    BLOCK_CHUNKS = TD_KPLAN_GEMM_BLOCK / CHUNK
};

/* MT tiles of rows and NB tiles of weights per wave. */
template <class CT, class WT, int MT, int NB> struct gemm_core {
    typedef CT lds_type;
    static const uint32_t ROWS = MT * 16, TILES = NB;
    static const uint32_t UNITS = ROWS * CHUNK / 8; /* 8 elements each */
    static const uint32_t EACH = (UNITS + K_THREADS - 1) / K_THREADS;

    const float *rows[EACH]; /* of this thread's units; NULL: no such row */
    weight_row<WT> weights[NB];
    typedef typename weight_row<WT>::raw raw;
    k_acc sum[MT][NB], part[MT][NB];
    k_vec8<CT> next[EACH];
    uint32_t k, vec, round_a;

    K_DEV_MEMBER void start()
    {
        K_UNROLL
        for (int m = 0; m < MT; m++)
            K_UNROLL
        for (int b = 0; b < NB; b++) {
            sum[m][b] = acc_zero();
            part[m][b] = acc_zero();
        }
    }

    K_DEV_MEMBER static uint32_t unit_row(uint32_t e)
    {
        return (k_tid() + e * K_THREADS) / (CHUNK / 8);
    }

    K_DEV_MEMBER void fetch(uint32_t k0, uint32_t k1)
    {
        K_UNROLL
        for (uint32_t e = 0; e < EACH; e++) {
            uint32_t at = k0 + (k_tid() + e * K_THREADS) % (CHUNK / 8) * 8;
            k_vec8<float> x = k_zero8<float>();
            if (rows[e])
                x = k_load8(rows[e], at, k1 < k ? k1 : k, vec);
            if (round_a) {
                K_UNROLL
                for (int i = 0; i < 8; i++)
                    x.v[i] = k_round(x.v[i]);
            }
            next[e] = k_convert<CT>(x);
        }
    }

    K_DEV_MEMBER void put(CT *lds) const
    {
        K_UNROLL
        for (uint32_t e = 0; e < EACH; e++) {
            uint32_t u = k_tid() + e * K_THREADS, row = u / (CHUNK / 8), k8 = u % (CHUNK / 8) * 8;
            if (u < UNITS)
                *reinterpret_cast<k_vec8<CT> *>(lds + ((k8 / 32 * MT + row / 16) * TD_K_TILE) +
                                                tile_at(row % 16, k8 % 32)) = next[e];
        }
    }

    K_DEV_MEMBER void fetch_weights(uint32_t at, uint32_t end, raw (&w)[CHUNK_STEPS][NB]) const
    {
        K_UNROLL
        for (int s = 0; s < CHUNK_STEPS; s++)
            K_UNROLL
        for (int b = 0; b < NB; b++)
            if (weights[b].tiles && at + s * TD_K_TILE_K < end)
                w[s][b] = weights[b].load(at / TD_K_TILE_K + s);
    }

    /* Where the chunk that begins at ends: none crosses a block of FP8 scales. */
    K_DEV_MEMBER static uint32_t chunk_end(uint32_t at, uint32_t k1)
    {
        uint32_t end = (weight_row<WT>::CHUNK_SCALE ? at / CHUNK * CHUNK : at) + CHUNK;
        return end < k1 ? end : k1;
    }

    /* Add [k0, k1) of the rows times the weights into sum; k0 is a multiple of 32. */
    K_DEV_MEMBER void run(uint32_t k0, uint32_t k1, CT *lds)
    {
        raw w[CHUNK_STEPS][NB];
        fetch(k0, chunk_end(k0, k1));
        for (uint32_t at = k0, n = 0; at < k1; n++) {
            uint32_t end = chunk_end(at, k1);
            k_sync();
            put(lds);
            fetch_weights(at, end, w);
            k_sync();
            if (end < k1)
                fetch(end, chunk_end(end, k1));
            multiply(at, end, w, lds);
            if (weight_row<WT>::CHUNK_SCALE || n % BLOCK_CHUNKS == BLOCK_CHUNKS - 1 || end >= k1)
                close_block(at);
            at = end;
        }
    }

    K_DEV_MEMBER void multiply(uint32_t at, uint32_t end, const raw (&w)[CHUNK_STEPS][NB],
                               const CT *lds)
    {
        K_UNROLL
        for (int s = 0; s < CHUNK_STEPS; s++) {
            if (at + s * TD_K_TILE_K >= end)
                continue;
            k_frag<CT> y[NB];
            K_UNROLL
            for (int b = 0; b < NB; b++)
                y[b] = weight_row<WT>::template operand<CT>(w[s][b]);
            K_UNROLL
            for (int m = 0; m < MT; m++) {
                k_frag<CT> a = tile_load(lds + (s * MT + m) * TD_K_TILE);
                K_UNROLL
                for (int b = 0; b < NB; b++)
                    if (weights[b].tiles)
                        part[m][b] = k_mma(a, y[b], part[m][b]);
            }
        }
    }

    /* A block's sum joins; FP8: times the scale of the block that at lies in. */
    K_DEV_MEMBER void close_block(uint32_t at)
    {
        K_UNROLL
        for (int b = 0; b < NB; b++) {
            if (!weights[b].tiles)
                continue;
            float scale = weights[b].scale_at(at);
            K_UNROLL
            for (int m = 0; m < MT; m++) {
                K_UNROLL
                for (int r = 0; r < ACC; r++)
                    sum[m][b].v[r] +=
                        weight_row<WT>::CHUNK_SCALE ? part[m][b].v[r] * scale : part[m][b].v[r];
                part[m][b] = acc_zero();
            }
        }
    }

    /* put(m, b, row, col, r): every element of this lane. */
    template <class F> K_DEV_MEMBER void each(F put_one) const
    {
        K_UNROLL
        for (int m = 0; m < MT; m++)
            K_UNROLL
        for (int b = 0; b < NB; b++)
            if (weights[b].tiles) {
                K_UNROLL
                for (int r = 0; r < ACC; r++)
                    put_one(m, b, m * 16 + acc_row(k_lane(), r), acc_col(k_lane(), r), r);
            }
    }
};

K_DEV uint32_t k_ceil_div(uint32_t a, uint32_t b)
{
    return (a + b - 1) / b;
}

/* Blocks of a product: row tiles first, so that blocks in flight share weights. */
struct gemm_place {
    uint32_t m0, group, head, slice;
};

K_DEV gemm_place gemm_find(uint32_t id, uint32_t m_tiles, uint32_t groups, uint32_t n_heads)
{
    gemm_place p;
    p.m0 = id % m_tiles;
    id /= m_tiles;
    p.group = id % groups;
    id /= groups;
    p.head = id % n_heads;
    p.slice = id / n_heads;
    return p;
}

template <class C> K_DEV void gemm_rows(C &core, const td_k_gemm &a, uint32_t n, gemm_place p)
{
    core.k = a.w[0].k;
    core.vec = a.vec;
    core.round_a = a.round_a;
    core.start();
    K_UNROLL
    for (uint32_t e = 0; e < C::EACH; e++) {
        uint32_t row = p.m0 * C::ROWS + C::unit_row(e);
        bool have = C::unit_row(e) < C::ROWS && row < n;
        if (have && a.of_logits)
            row = k_global(a.step->logit_rows)[row];
        core.rows[e] = have ? a.a + (size_t)row * a.a_stride + (size_t)p.head * a.a_head : nullptr;
    }
}

template <class C> K_DEV void gemm_plain(const td_k_gemm &a)
{
    const uint32_t NB = C::TILES;
    C core;
    uint32_t n = a.of_logits ? a.step->n_logits : a.step->n_rows, groups = 0;
    for (uint32_t o = 0; o < a.n_out; o++)
        groups += k_ceil_div(a.w[o].n_tiles, K_WAVES * NB);
    gemm_place p = gemm_find(k_block(), k_ceil_div(n, core.ROWS), groups, a.n_heads);
    uint32_t o = 0;
    while (p.group >= k_ceil_div(a.w[o].n_tiles, K_WAVES * NB))
        p.group -= k_ceil_div(a.w[o++].n_tiles, K_WAVES * NB);
    gemm_rows(core, a, n, p);
    uint32_t tile0 = (p.group * K_WAVES + k_wave()) * NB;
    K_UNROLL
    for (uint32_t b = 0; b < NB; b++)
        core.weights[b].find(a.w[o], p.head, tile0 + b);
    uint32_t k = a.w[o].k, step = a.slices > 1 ? k / a.slices : k;
    core.run(p.slice * step, p.slice * step + step, k_lds<typename C::lds_type>());
    float *out = a.out[o] + (size_t)p.head * a.out_head + (size_t)p.slice * n * a.out_stride[o];
    bool nan = false;
    core.each([&](int m, int b, uint32_t row, uint32_t col, int r) {
        float v = core.sum[m][b].v[r];
        row += p.m0 * core.ROWS;
        col += (tile0 + b) * 16;
        if (row >= n || col >= a.w[o].n)
            return;
        nan |= v != v;
        out[(size_t)row * a.out_stride[o] + col] = a.round_out ? k_round(v) : v;
    });
    if (nan && a.error)
        *a.error = 1;
}

/* w[0] gate, w[1] up: a wave has both, so the product stays in registers. C has two tiles. */
template <class C> K_DEV void gemm_silu(const td_k_gemm &a)
{
    C core;
    uint32_t n = a.step->n_rows;
    gemm_place p =
        gemm_find(k_block(), k_ceil_div(n, core.ROWS), k_ceil_div(a.w[0].n_tiles, K_WAVES), 1);
    gemm_rows(core, a, n, p);
    uint32_t tile = p.group * K_WAVES + k_wave();
    core.weights[0].find(a.w[0], 0, tile);
    core.weights[1].find(a.w[1], 0, tile);
    core.run(0, a.w[0].k, k_lds<typename C::lds_type>());
    core.each([&](int m, int b, uint32_t row, uint32_t col, int r) {
        row += p.m0 * core.ROWS;
        col += tile * 16;
        if (b || row >= n || col >= a.w[0].n)
            return;
        float v = k_silu_mul(core.sum[m][0].v[r], core.sum[m][1].v[r]);
        a.out[0][(size_t)row * a.out_stride[0] + col] = a.round_out ? k_round(v) : v;
    });
}

/* A tile of pairs of one expert. */
struct moe_place {
    uint32_t expert, first, n; /* pairs lists.pairs[first .. first + n) */
};

K_DEV bool moe_find(const td_k_moe &a, uint32_t tile, uint32_t rows, moe_place &p)
{
    if (tile >= *a.lists.n_tiles)
        return false;
    p.expert = a.lists.tiles[2 * tile];
    uint32_t within = a.lists.tiles[2 * tile + 1], left = a.lists.counts[p.expert] - within;
    p.first = a.lists.firsts[p.expert] + within;
    p.n = left < rows ? left : rows;
    return true;
}

template <class C> K_DEV void moe_rows(C &core, const td_k_moe &a, const moe_place &p, bool down)
{
    core.k = a.w[0].k;
    core.vec = a.vec;
    core.round_a = 0;
    core.start();
    K_UNROLL
    for (uint32_t e = 0; e < C::EACH; e++) {
        uint32_t row = C::unit_row(e);
        core.rows[e] = nullptr;
        if (row >= p.n)
            continue;
        uint32_t pair = a.lists.pairs[p.first + row], t = pair / a.top_k;
        core.rows[e] =
            a.a + (size_t)t * a.a_stride + (down ? (size_t)(pair % a.top_k) * a.inner : 0);
    }
}

template <class C> K_DEV void moe_up(const td_k_moe &a)
{
    C core;
    moe_place p;
    uint32_t groups = k_ceil_div(a.w[0].n_tiles, K_WAVES);
    if (!moe_find(a, k_block() / groups, core.ROWS, p))
        return;
    moe_rows(core, a, p, false);
    uint32_t tile = k_block() % groups * K_WAVES + k_wave();
    core.weights[0].find(a.w[0], p.expert, tile);
    core.weights[1].find(a.w[1], p.expert, tile);
    core.run(0, a.w[0].k, k_lds<typename C::lds_type>());
    core.each([&](int m, int b, uint32_t row, uint32_t col, int r) {
        col += tile * 16;
        if (b || row >= p.n || col >= a.w[0].n)
            return;
        uint32_t pair = a.lists.pairs[p.first + row];
        float v = k_silu_mul(core.sum[m][0].v[r], core.sum[m][1].v[r]);
        a.out[(size_t)(pair / a.top_k) * a.out_stride + (size_t)(pair % a.top_k) * a.inner + col] =
            a.round_out ? k_round(v) : v;
    });
}

template <class C> K_DEV void moe_down(const td_k_moe &a)
{
    const uint32_t NB = C::TILES;
    C core;
    moe_place p;
    uint32_t groups = k_ceil_div(a.w[0].n_tiles, K_WAVES * NB), id = k_block();
    uint32_t group = id % groups, slice = a.slice0 + id / groups % a.n_slices;
    if (!moe_find(a, id / groups / a.n_slices, core.ROWS, p))
        return;
    moe_rows(core, a, p, true);
    uint32_t tile0 = (group * K_WAVES + k_wave()) * NB;
    K_UNROLL
    for (uint32_t b = 0; b < NB; b++)
        core.weights[b].find(a.w[0], p.expert, tile0 + b);
    uint32_t step = a.w[0].k / a.slices;
    core.run(slice * step, slice * step + step, k_lds<typename C::lds_type>());
    float *out = a.out + (size_t)(slice - a.slice0) * a.step->n_rows * a.top_k * a.out_stride;
    core.each([&](int m, int b, uint32_t row, uint32_t col, int r) {
        col += (tile0 + b) * 16;
        if (row < p.n && col < a.w[0].n)
            out[(size_t)a.lists.pairs[p.first + row] * a.out_stride + col] = core.sum[m][b].v[r];
    });
}

/* Cores of a launch plan: for one matrix, and for a gate and its up. */
template <class CT, class WT> struct few {
    typedef gemm_core<CT, WT, 1, 1> one;
    typedef gemm_core<CT, WT, 1, 2> pair;
};
template <class CT, class WT> struct many {
    typedef gemm_core<CT, WT, 4, 2> one, pair;
};

#define KERNELS(suffix, ...)                                                                       \
    K_KERNEL(gemm_##suffix, td_k_gemm)                                                             \
    {                                                                                              \
        gemm_plain<__VA_ARGS__::one>(a);                                                           \
    }                                                                                              \
    K_KERNEL(gemm_silu_##suffix, td_k_gemm)                                                        \
    {                                                                                              \
        gemm_silu<__VA_ARGS__::pair>(a);                                                           \
    }                                                                                              \
    K_KERNEL(moe_up_##suffix, td_k_moe)                                                            \
    {                                                                                              \
        moe_up<__VA_ARGS__::pair>(a);                                                              \
    }                                                                                              \
    K_KERNEL(moe_down_##suffix, td_k_moe)                                                          \
    {                                                                                              \
        moe_down<__VA_ARGS__::one>(a);                                                             \
    }

KERNELS(few_bb, few<k_bf16, k_bf16>)
KERNELS(few_bm, few<k_bf16, k_mx>)
KERNELS(few_b8, few<k_bf16, k_fp8>)
KERNELS(few_fb, few<float, k_bf16>)
KERNELS(few_ff, few<float, float>)
KERNELS(few_fm, few<float, k_mx>)
KERNELS(few_f8, few<float, k_fp8>)
KERNELS(many_bb, many<k_bf16, k_bf16>)
KERNELS(many_bm, many<k_bf16, k_mx>)
KERNELS(many_b8, many<k_bf16, k_fp8>)

#if defined(K_SCALED)
struct few_scaled {
    typedef mx_core<1, 1, 2> one;
    typedef mx_core<1, 2, 2> pair;
};
struct many_scaled {
    typedef mx_core<4, 2, 1> one, pair;
};
KERNELS(few_xm, few_scaled)
KERNELS(many_xm, many_scaled)
#endif
