/* SPDX-License-Identifier: Apache-2.0 */
/* Attention, one kernel for latent (absorbed) and grouped-query form: an ordered list of positions
 * in tiles of 64 ranks, splits of 8 tiles, up to 16 heads that share keys as the rows of one matrix
 * tile (numerics, rule 5). K plan: q and a tile's weights are rounded to the pool's type, sums are
 * f32. Keys go from memory to registers (each is one wave's), values through LDS, transposed. Rows
 * in FP8 become the BF16 values that kernels/kv_row.h names as they are loaded: the bits are those
 * of the BF16 kernel over such rows. */
#include "kernels/hip/formats.hpp"
#include "kernels/hip/math.hpp"
#include "kernels/kv_row.h"

static const uint32_t TILE = TD_KPLAN_ATTN_TILE, SPLIT = TD_KPLAN_ATTN_TILE * TD_KPLAN_ATTN_SPLIT,
                      HEADS = 16; /* of a block */

enum {
    TPH = K_THREADS / HEADS, /* threads of a head in the softmax */
    KEYS = TILE / TPH,       /* keys of each */
    VALUE_COLS = 128,        /* of a trip through LDS */
    VALUE_TRIPS = 4,         /* value_dims <= 512 */
    WAVE_TILES = VALUE_COLS / 16 / K_WAVES
};

struct attend_place {
    uint32_t row, t, group, head0, n_heads, split;
};

/* Blocks: heads first, then splits, then rows: what reads the same keys runs together. */
K_DEV attend_place attend_find(const td_k_attend &a)
{
    uint32_t id = k_block(), per_group = (a.group_heads + HEADS - 1) / HEADS;
    attend_place p;
    uint32_t part = id % per_group;
    id /= per_group;
    p.group = id % a.n_groups;
    id /= a.n_groups;
    p.split = id % a.n_splits;
    p.row = id / a.n_splits;
    p.t = a.row0 + p.row;
    p.head0 = p.group * a.group_heads + part * HEADS;
    uint32_t end = (p.group + 1) * a.group_heads;
    end = end < a.n_heads ? end : a.n_heads;
    p.n_heads = p.head0 >= end ? 0 : end - p.head0 < HEADS ? end - p.head0 : HEADS;
    return p;
}

K_DEV uint32_t list_length(const td_k_attend &a, uint32_t t)
{
    return a.selected ? a.n_selected[t] : k_global(a.step->positions)[t] + 1;
}

/* What rows of type R are to the matrix instruction. */
template <class R> struct pool_type {
    typedef R operand;
    static const bool SCALED = false;
};
template <> struct pool_type<k_f8> {
    typedef k_bf16 operand;
    static const bool SCALED = true;
};

template <class R> struct attend_lds {
    typedef typename pool_type<R>::operand T;
    T *q, *p, *v;
    float *s, *alpha;
    const R **rows;
    const float **scales; /* FP8: of each row */

    K_DEV_MEMBER attend_lds(uint32_t key_tiles)
    {
        unsigned char *at = k_lds<unsigned char>();
        rows = reinterpret_cast<const R **>(at);
        at += TILE * sizeof *rows;
        scales = reinterpret_cast<const float **>(at);
        at += pool_type<R>::SCALED ? TILE * sizeof *scales : 0;
        s = reinterpret_cast<float *>(at);
        at += HEADS * TILE * sizeof *s;
        alpha = reinterpret_cast<float *>(at);
        at += HEADS * sizeof *alpha;
        q = reinterpret_cast<T *>(at);
        p = q + key_tiles * TD_K_TILE;
        v = p + TILE / 32 * TD_K_TILE;
    }
};

template <class T>
K_DEV void load_query(const td_k_attend &a, const attend_place &p, uint32_t key_tiles, T *q)
{
    for (uint32_t i = k_tid(); i < HEADS * key_tiles * 32; i += K_THREADS) {
        uint32_t head = i / (key_tiles * 32), d = i % (key_tiles * 32);
        float x = 0.0f;
        if (head < p.n_heads && d < a.key_dims) {
            uint32_t h = p.head0 + head, d1 = d - a.q0_dims;
            x = d < a.q0_dims ? a.q0[(size_t)p.t * a.q0_row + (size_t)h * a.q0_head + d]
                              : a.q1[(size_t)p.t * a.q1_row + (size_t)h * a.q1_head + a.q1_at + d1];
        }
        q[d / 32 * TD_K_TILE + tile_at(head, d % 32)] = k_cast<T>::of(x);
    }
}

/* Where the pool rows of ranks [r0, r0 + n) begin. */
template <class R>
K_DEV void find_rows(const td_k_attend &a, uint32_t t, uint32_t r0, uint32_t n,
                     const attend_lds<R> &l)
{
    const td_step *s = a.step;
    for (uint32_t i = k_tid(); i < TILE; i += K_THREADS) {
        l.rows[i] = nullptr;
        if (i >= n)
            continue;
        uint32_t pos = a.selected ? a.selected[(size_t)t * a.topk + r0 + i] : r0 + i;
        uint32_t block =
            k_global(s->tables)[(size_t)k_global(s->seq_of)[t] * s->table_stride + pos / 64];
        const uint8_t *layer = k_global(s->kv_base) + block * s->block_bytes + a.layer_offset;
        l.rows[i] = reinterpret_cast<const R *>(layer) + (size_t)(pos % 64) * a.row_elems;
        if (pool_type<R>::SCALED)
            l.scales[i] = reinterpret_cast<const float *>(layer + a.scales_at) +
                          (size_t)(pos % 64) * a.n_scales;
    }
}

/* A vector of n elements in a pool row. */
template <class R> struct pool_vec {
    const R *at;
    uint32_t n;
    bool vec;

    K_DEV_MEMBER static pool_vec key(const td_k_attend &a, const attend_lds<R> &l, uint32_t rank,
                                     uint32_t group)
    {
        const R *row = k_global(l.rows[rank]);
        return {row ? row + a.key_at + (size_t)group * a.group_step : nullptr, a.key_dims,
                a.vec != 0};
    }
    K_DEV_MEMBER static pool_vec value(const td_k_attend &a, const attend_lds<R> &l, uint32_t rank,
                                       uint32_t group)
    {
        const R *row = k_global(l.rows[rank]);
        return {row ? row + a.value_at + (size_t)group * a.group_step : nullptr, a.value_dims,
                a.vec != 0};
    }
    /* Elements [d, d + 8 V); behind the end, or without a row: 0. */
    template <int V> K_DEV_MEMBER void load(uint32_t d, k_vec8<R> (&x)[V]) const
    {
        K_UNROLL
        for (int v = 0; v < V; v++)
            x[v] = at ? k_load8(at, d + 8 * v, n, vec) : k_zero8<R>();
    }
};

/* FP8: parts of groups of 128 elements, each with a scale. vec: n and the first part are multiples
 * of 16, and rows lie on 16 bytes. */
template <> struct pool_vec<k_f8> {
    const k_f8 *at;
    const float *scales;
    uint32_t n, part;
    bool vec;

    K_DEV_MEMBER static pool_vec key(const td_k_attend &a, const attend_lds<k_f8> &l, uint32_t rank,
                                     uint32_t group)
    {
        const k_f8 *row = k_global(l.rows[rank]);
        if (!row)
            return {nullptr, nullptr, 0, 0, false};
        return {row + a.key_at + (size_t)group * a.group_step,
                k_global(l.scales[rank]) + group * a.group_scales, a.key_dims, a.key_part,
                a.vec != 0};
    }
    K_DEV_MEMBER static pool_vec value(const td_k_attend &a, const attend_lds<k_f8> &l,
                                       uint32_t rank, uint32_t group)
    {
        const k_f8 *row = k_global(l.rows[rank]);
        if (!row)
            return {nullptr, nullptr, 0, 0, false};
        return {row + a.value_at + (size_t)group * a.group_step,
                k_global(l.scales[rank]) + a.value_scale + group * a.group_scales, a.value_dims,
                a.value_dims, a.vec != 0};
    }
    K_DEV_MEMBER float scale(uint32_t d) const
    {
        uint32_t first = (part + TD_KV_SCALE_GROUP - 1) / TD_KV_SCALE_GROUP;
        return scales[d < part ? d / TD_KV_SCALE_GROUP : first + (d - part) / TD_KV_SCALE_GROUP];
    }
    K_DEV_MEMBER static k_bf16 value_of(uint32_t code, float scale)
    {
        return k_to_bf16(k_e4m3_value(code) * scale);
    }
    template <int V> K_DEV_MEMBER void load(uint32_t d, k_vec8<k_bf16> (&x)[V]) const
    {
        if (!vec) {
            K_UNROLL
            for (int i = 0; i < 8 * V; i++) {
                x[i / 8].v[i % 8].u = 0;
                if (d + i < n)
                    x[i / 8].v[i % 8] = value_of(at[d + i].u, scale(d + i));
            }
            return;
        }
        uint32_t codes[2 * V];
        float s = 0.0f;
        K_UNROLL
        for (int i = 0; i < 2 * V; i++)
            codes[i] = 0;
        if (d < n) {
            __builtin_memcpy(codes, __builtin_assume_aligned(at + d, 8 * V), 8 * V);
            s = scale(d);
        }
        K_UNROLL
        for (int i = 0; i < 8 * V; i++)
            x[i / 8].v[i % 8] = value_of(codes[i / 4] >> (i % 4 * 8) & 0xff, s);
    }
};

/* s[head][rank] of the wave's 16 ranks; -inf behind the end of the list. */
template <class R>
K_DEV void scores(const td_k_attend &a, uint32_t group, uint32_t key_tiles, const attend_lds<R> &l)
{
    typedef typename pool_type<R>::operand T;
    pool_vec<R> row[FRAG_ROWS];
    K_UNROLL
    for (uint32_t i = 0; i < FRAG_ROWS; i++)
        row[i] = pool_vec<R>::key(a, l, k_wave() * 16 + tile_row(k_lane(), i), group);
    k_acc c = acc_zero();
    for (uint32_t kt = 0; kt < key_tiles; kt++) {
        k_frag<T> key;
        K_UNROLL
        for (uint32_t i = 0; i < FRAG_ROWS; i++) {
            k_vec8<T> x[1];
            row[i].load(kt * 32 + tile_k(k_lane()), x);
            key.r[i] = x[0];
        }
        c = k_mma(tile_load(l.q + kt * TD_K_TILE), key, c);
    }
    K_UNROLL
    for (uint32_t r = 0; r < ACC; r++) {
        uint32_t rank = k_wave() * 16 + acc_col(k_lane(), r);
        l.s[acc_row(k_lane(), r) * TILE + rank] = l.rows[rank] ? c.v[r] * a.scale : -k_inf();
    }
}

/* Running max and sum of this thread's head; its TPH threads hold the same. */
struct soft_state {
    float m, l;
};

template <class R> K_DEV void soft_tile(soft_state &h, const attend_lds<R> &l)
{
    typedef typename pool_type<R>::operand T;
    uint32_t head = k_tid() / TPH, sub = k_tid() % TPH;
    float e[KEYS], max = h.m, sum = 0.0f;
    K_UNROLL
    for (uint32_t i = 0; i < KEYS; i++) {
        e[i] = l.s[head * TILE + sub * KEYS + i];
        max = e[i] > max ? e[i] : max;
    }
    K_UNROLL
    for (uint32_t o = TPH / 2; o > 0; o /= 2) {
        float other = k_shuffle_xor(max, o);
        max = other > max ? other : max;
    }
    K_UNROLL
    for (uint32_t i = 0; i < KEYS; i++) {
        uint32_t rank = sub * KEYS + i;
        e[i] = k_exp(e[i] - max);
        sum += e[i];
        l.p[rank / 32 * TD_K_TILE + tile_at(head, rank % 32)] = k_cast<T>::of(e[i]);
    }
    K_UNROLL
    for (uint32_t o = TPH / 2; o > 0; o /= 2)
        sum += k_shuffle_xor(sum, o);
    float alpha = k_exp(h.m - max);
    h.l = h.l * alpha + sum;
    h.m = max;
    if (sub == 0)
        l.alpha[head] = alpha;
}

/* Values of 32 ranks x 128 columns, so that 8 ranks of a column are together. */
template <class R>
K_DEV void stage_values(const td_k_attend &a, uint32_t group, uint32_t half, uint32_t col0,
                        const attend_lds<R> &l)
{
    const int V = pool_type<R>::SCALED ? 2 : 1; /* FP8 too loads 16 bytes */
    for (uint32_t u = k_tid(); u < 32 * VALUE_COLS / 8 / V; u += K_THREADS) {
        uint32_t rank = u / (VALUE_COLS / 8 / V), col = u % (VALUE_COLS / 8 / V) * 8 * V;
        k_vec8<typename pool_type<R>::operand> x[V];
        pool_vec<R>::value(a, l, half * 32 + rank, group).load(col0 + col, x);
        K_UNROLL
        for (uint32_t i = 0; i < 8 * V; i++)
            l.v[(col + i) / 16 * TD_K_TILE + tile_at((col + i) % 16, rank)] = x[i / 8].v[i % 8];
    }
}

template <class R>
K_DEV void add_values(const td_k_attend &a, uint32_t group, const attend_lds<R> &l,
                      k_acc (&o)[VALUE_TRIPS][WAVE_TILES])
{
    typedef typename pool_type<R>::operand T;
    float alpha[ACC];
    K_UNROLL
    for (uint32_t r = 0; r < ACC; r++)
        alpha[r] = l.alpha[acc_row(k_lane(), r)];
    K_UNROLL
    for (uint32_t trip = 0; trip < VALUE_TRIPS; trip++) {
        if (trip * VALUE_COLS >= a.value_dims)
            continue;
        K_UNROLL
        for (uint32_t i = 0; i < WAVE_TILES; i++)
            K_UNROLL
        for (uint32_t r = 0; r < ACC; r++)
            o[trip][i].v[r] *= alpha[r];
        K_KEEP_LOOP
        for (uint32_t half = 0; half < TILE / 32; half++) {
            k_sync();
            stage_values(a, group, half, trip * VALUE_COLS, l);
            k_sync();
            k_frag<T> p = tile_load(l.p + half * TD_K_TILE);
            K_UNROLL
            for (uint32_t i = 0; i < WAVE_TILES; i++) {
                uint32_t tile = k_wave() * WAVE_TILES + i;
                if (trip * VALUE_COLS + tile * 16 < a.value_dims)
                    o[trip][i] = k_mma(p, tile_load(l.v + tile * TD_K_TILE), o[trip][i]);
            }
        }
    }
}

/* Un-normalised output, max and sum of this split. */
K_DEV void store_split(const td_k_attend &a, const attend_place &p, const soft_state &h,
                       const k_acc (&o)[VALUE_TRIPS][WAVE_TILES])
{
    K_UNROLL
    for (uint32_t trip = 0; trip < VALUE_TRIPS; trip++)
        K_UNROLL
    for (uint32_t i = 0; i < WAVE_TILES; i++)
        K_UNROLL
    for (uint32_t r = 0; r < ACC; r++) {
        uint32_t head = acc_row(k_lane(), r),
                 col = trip * VALUE_COLS + (k_wave() * WAVE_TILES + i) * 16 + acc_col(k_lane(), r);
        size_t at = ((size_t)p.row * a.n_heads + p.head0 + head) * a.n_splits + p.split;
        if (head < p.n_heads && col < a.value_dims)
            a.part_o[at * a.value_dims + col] = o[trip][i].v[r];
    }
    uint32_t head = k_tid() / TPH;
    size_t at = ((size_t)p.row * a.n_heads + p.head0 + head) * a.n_splits + p.split;
    if (head < p.n_heads && k_tid() % TPH == 0) {
        a.part_ml[2 * at] = h.m;
        a.part_ml[2 * at + 1] = h.l;
    }
}

template <class R> K_DEV void attend(const td_k_attend &a)
{
    attend_place p = attend_find(a);
    if (p.t >= a.step->n_rows || p.n_heads == 0)
        return;
    uint32_t n = list_length(a, p.t), r0 = p.split * SPLIT;
    if (r0 >= n)
        return;
    uint32_t end = n - r0 < SPLIT ? n : r0 + SPLIT, key_tiles = (a.key_dims + 31) / 32;
    attend_lds<R> l(key_tiles);
    k_acc o[VALUE_TRIPS][WAVE_TILES];
    K_UNROLL
    for (uint32_t trip = 0; trip < VALUE_TRIPS; trip++)
        K_UNROLL
    for (uint32_t i = 0; i < WAVE_TILES; i++)
        o[trip][i] = acc_zero();
    soft_state h = {-k_inf(), 0.0f};
    load_query(a, p, key_tiles, l.q);
    for (; r0 < end; r0 += TILE) {
        k_sync();
        find_rows(a, p.t, r0, end - r0 < TILE ? end - r0 : TILE, l);
        k_sync();
        scores(a, p.group, key_tiles, l);
        k_sync();
        soft_tile(h, l);
        k_sync();
        add_values(a, p.group, l, o);
    }
    store_split(a, p, h, o);
}

K_KERNEL(attend_bf16, td_k_attend)
{
    attend<k_bf16>(a);
}

K_KERNEL(attend_f8, td_k_attend)
{
    attend<k_f8>(a);
}

K_KERNEL(attend_f32, td_k_attend)
{
    attend<float>(a);
}

/* A block has one row and head: splits left to right, then the division. */
K_KERNEL(attend_merge, td_k_attend)
{
    uint32_t row = k_block() / a.n_heads, head = k_block() % a.n_heads, t = a.row0 + row;
    if (t >= a.step->n_rows)
        return;
    uint32_t n = (list_length(a, t) + SPLIT - 1) / SPLIT;
    size_t at = (size_t)k_block() * a.n_splits;
    const float *ml = a.part_ml + 2 * at;
    for (uint32_t d = k_tid(); d < a.value_dims; d += K_THREADS) {
        const float *o = a.part_o + at * a.value_dims + d;
        float m = ml[0], l = ml[1], v = o[0];
        for (uint32_t s = 1; s < n; s++) {
            float max = ml[2 * s] > m ? ml[2 * s] : m, x = k_exp(m - max),
                  y = k_exp(ml[2 * s] - max);
            m = max;
            l = l * x + ml[2 * s + 1] * y;
            v = v * x + o[(size_t)s * a.value_dims] * y;
        }
        v /= l;
        a.out[((size_t)t * a.n_heads + head) * a.value_dims + d] = a.round_out ? k_round(v) : v;
    }
}
