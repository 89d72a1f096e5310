/* SPDX-License-Identifier: Apache-2.0 */
/* The lightning indexer: scores by matrix instruction, exact top-k by radix selection (numerics,
 * rule 5). Counting uses integer atomics only: their order cannot be seen. */
#include "kernels/hip/tile.hpp"

/* A block has one row and 64 keys, a wave 16 of them. Dims by matrix steps, then heads in order. */
template <class T> K_DEV void index_score(const td_k_index &a)
{
    uint32_t row = k_block() / a.n_blocks, t = a.row0 + row, p0 = k_block() % a.n_blocks * 64;
    const td_step *s = a.step;
    if (t >= s->n_rows || k_global(s->positions)[t] < a.topk || p0 > k_global(s->positions)[t])
        return; /* everything is selected, or the keys lie in the future */
    uint32_t n = k_global(s->positions)[t] + 1 - p0, steps = (a.dims + 31) / 32;
    uint32_t head_tiles = (a.n_heads + 15) / 16;
    float *sums = k_lds<float>(); /* [heads][64] */
    T *q = reinterpret_cast<T *>(sums + (size_t)head_tiles * 16 * 64);
    for (uint32_t i = k_tid(); i < head_tiles * 16 * steps * 32; i += K_THREADS) {
        uint32_t head = i / (steps * 32), d = i % (steps * 32);
        float x = head < a.n_heads && d < a.dims ? a.q[((size_t)t * a.n_heads + head) * a.dims + d]
                                                 : 0.0f;
        q[(head / 16 * steps + d / 32) * TD_K_TILE + tile_at(head % 16, d % 32)] = k_cast<T>::of(x);
    }
    k_sync();
    uint32_t block =
        k_global(s->tables)[(size_t)k_global(s->seq_of)[t] * s->table_stride + p0 / 64];
    const T *keys =
        reinterpret_cast<const T *>(k_global(s->kv_base) + block * s->block_bytes + a.layer_offset);
    for (uint32_t ht = 0; ht < head_tiles; ht++) {
        k_acc c = acc_zero();
        for (uint32_t kt = 0; kt < steps; kt++) {
            k_frag<T> key;
            K_UNROLL
            for (uint32_t i = 0; i < FRAG_ROWS; i++) {
                uint32_t at = k_wave() * 16 + tile_row(k_lane(), i);
                key.r[i] = at < n ? k_load8(keys + (size_t)at * a.dims, kt * 32 + tile_k(k_lane()),
                                            a.dims, a.vec)
                                  : k_zero8<T>();
            }
            c = k_mma(tile_load(q + (ht * steps + kt) * TD_K_TILE), key, c);
        }
        K_UNROLL
        for (uint32_t r = 0; r < ACC; r++)
            sums[(ht * 16 + acc_row(k_lane(), r)) * 64 + k_wave() * 16 + acc_col(k_lane(), r)] =
                c.v[r];
    }
    k_sync();
    uint32_t i = k_tid();
    if (i >= 64 || i >= n)
        return;
    float sum = 0.0f;
    for (uint32_t h = 0; h < a.n_heads; h++) {
        float dot = sums[h * 64 + i], w = a.weight[(size_t)t * a.n_heads + h] * a.scale;
        sum += w * (dot < 0.0f ? 0.0f : dot); /* NaN stays NaN */
    }
    a.scores[(size_t)row * a.stride + p0 + i] = sum + 0.0f; /* -0 equals +0 */
    if (sum != sum)
        *a.error = 1;
}

K_KERNEL(index_score_bf16, td_k_index)
{
    index_score<k_bf16>(a);
}

K_KERNEL(index_score_f32, td_k_index)
{
    index_score<float>(a);
}

K_DEV uint32_t key_of(float f)
{
    uint32_t b = k_bits(f);
    return b & 0x80000000u ? ~b : b | 0x80000000u;
}

K_DEV float value_of(uint32_t key)
{
    return k_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

enum { BINS = 2048 };

struct pick_lds {
    uint32_t hist[BINS], wave_sums[K_WAVES], digit, left, ties;
    float wave_floats[2 * K_WAVES];
};

static_assert(sizeof(pick_lds) <= TD_K_LDS_PICK, "the host asks for enough LDS");

/* The digit in which the k-th greatest lies, and how many of k are left inside it. One wave: bins
 * from the top, 64 or 32 at a time. */
K_DEV void find_digit(pick_lds *l, uint32_t k)
{
    if (k_wave() != 0)
        return;
    for (uint32_t top = BINS; top > 0; top -= K_WAVE) {
        uint32_t bin = top - 1 - k_lane(), mine = l->hist[bin], upto = mine;
        for (uint32_t o = 1; o < K_WAVE; o *= 2) {
            uint32_t other = k_shuffle_u32(upto, (k_lane() - o) % K_WAVE);
            upto += k_lane() >= o ? other : 0;
        }
        uint32_t all = k_shuffle_u32(upto, K_WAVE - 1);
        if (all >= k) {
            if (upto >= k && upto - mine < k) {
                l->digit = bin;
                l->left = k - (upto - mine);
            }
            return;
        }
        k -= all;
    }
}

/* Key of the k-th greatest of n scores by digits of 11, 11, 10 bits; l->left: how many with it. */
K_DEV uint32_t kth_key(pick_lds *l, const float *v, uint32_t n, uint32_t k)
{
    uint32_t high = 0, mask = 0;
    for (int d = 0; d < 3; d++) {
        uint32_t shift = d == 0 ? 21 : d == 1 ? 10 : 0, bins = d == 2 ? 1024 : 2048;
        for (uint32_t i = k_tid(); i < BINS; i += K_THREADS)
            l->hist[i] = 0;
        k_sync();
        for (uint32_t i = k_tid(); i < n; i += K_THREADS) {
            uint32_t key = key_of(v[i]);
            if ((key & mask) == high)
                k_add_u32(&l->hist[key >> shift & (bins - 1)], 1);
        }
        k_sync();
        find_digit(l, k);
        k_sync();
        high |= l->digit << shift;
        mask |= (bins - 1) << shift;
        k = l->left;
    }
    return high;
}

/* Distance of the k-th to the best one left out, by the largest |score|. */
K_DEV float pick_margin(pick_lds *l, const float *v, uint32_t n, uint32_t thr, uint32_t ties)
{
    float largest = 0.0f, next = -k_inf();
    uint32_t equal = 0;
    for (uint32_t i = k_tid(); i < n; i += K_THREADS) {
        float abs = v[i] < 0.0f ? -v[i] : v[i];
        largest = abs > largest ? abs : largest;
        equal += key_of(v[i]) == thr;
        next = key_of(v[i]) < thr && v[i] > next ? v[i] : next;
    }
    for (uint32_t o = K_WAVE / 2; o > 0; o /= 2) {
        float x = k_shuffle_xor(largest, o), y = k_shuffle_xor(next, o);
        equal += k_shuffle_u32(equal, k_lane() ^ o);
        largest = x > largest ? x : largest;
        next = y > next ? y : next;
    }
    if (k_lane() == 0) {
        l->wave_floats[k_wave()] = largest;
        l->wave_floats[K_WAVES + k_wave()] = next;
        l->wave_sums[k_wave()] = equal;
    }
    k_sync();
    equal = 0;
    for (int w = 0; w < K_WAVES; w++) {
        largest = l->wave_floats[w] > largest ? l->wave_floats[w] : largest;
        next = l->wave_floats[K_WAVES + w] > next ? l->wave_floats[K_WAVES + w] : next;
        equal += l->wave_sums[w];
    }
    k_sync();
    next = equal > ties ? value_of(thr) : next;
    return largest > 0.0f ? (value_of(thr) - next) / largest : 0.0f;
}

/* How many of the waves and lanes before this thread have set p; *ret_all: how many of the block.
 */
K_DEV uint32_t rank_in_block(pick_lds *l, bool p, uint32_t *ret_all)
{
    uint64_t set = k_ballot(p), below = (1ull << k_lane()) - 1;
    if (k_lane() == 0)
        l->wave_sums[k_wave()] = k_popcount(set);
    k_sync();
    uint32_t before = k_popcount(set & below), all = 0;
    for (uint32_t w = 0; w < K_WAVES; w++) {
        before += w < k_wave() ? l->wave_sums[w] : 0;
        all += l->wave_sums[w];
    }
    k_sync();
    *ret_all = all;
    return before;
}

/* A block has one row. Ascending by position, ties to the lower one. */
K_KERNEL(index_pick, td_k_index)
{
    uint32_t row = k_block(), t = a.row0 + row;
    if (t >= a.step->n_rows)
        return;
    pick_lds *l = k_lds<pick_lds>();
    uint32_t n = k_global(a.step->positions)[t] + 1, *out = a.selected + (size_t)t * a.topk;
    if (n <= a.topk) {
        for (uint32_t i = k_tid(); i < n; i += K_THREADS)
            out[i] = i;
        if (k_tid() == 0) {
            a.n_selected[t] = n;
            if (a.margin)
                a.margin[t] = k_inf();
        }
        return;
    }
    const float *v = a.scores + (size_t)row * a.stride;
    uint32_t thr = kth_key(l, v, n, a.topk), ties = l->left, have = 0, tied = 0;
    if (a.margin) {
        float margin = pick_margin(l, v, n, thr, ties);
        if (k_tid() == 0)
            a.margin[t] = margin;
    }
    for (uint32_t i0 = 0; i0 < n; i0 += K_THREADS) {
        uint32_t i = i0 + k_tid(), key = i < n ? key_of(v[i]) : 0, all;
        bool tie = i < n && key == thr;
        uint32_t nth = tied + rank_in_block(l, tie, &all);
        tied += all;
        bool take = i < n && (key > thr || (tie && nth < ties));
        uint32_t at = have + rank_in_block(l, take, &all);
        have += all;
        if (take)
            out[at] = i;
    }
    if (k_tid() == 0)
        a.n_selected[t] = have;
}
