/* SPDX-License-Identifier: Apache-2.0 */
/* What weights are stored as, and how a lane's 8 elements become an operand. BF16 holds every
 * product of an e2m1 element and its scale, and every e4m3 element, exactly; the f32 scale of an
 * FP8 block multiplies the sum over the block instead (K plan). */
#ifndef TD_KERNELS_HIP_FORMATS_HPP
#define TD_KERNELS_HIP_FORMATS_HPP

#include "kernels/hip/tile.hpp"

struct k_mx;  /* MXFP4 */
struct k_fp8; /* e4m3 with block scales */
struct k_f8 { /* e4m3 in the KV pool */
    uint8_t u;
};

/* e2m1 (low 4 bits) times 2^(scale - 127); scale 0xff is NaN. In integers, so that a thread that
 * flushes denormals reads nothing else. */
K_DEV float k_mx_value(uint32_t code, uint32_t scale)
{
    uint32_t m = code & 7, doubled = m < 4 ? m : (2 + (m & 1)) << (m / 2 - 1);
    float s = k_float(scale == 0xff ? 0x7fc00000u : scale ? scale << 23 : 0x400000u);
    float v = 0.5f * (float)doubled * s;
    return code & 8 ? -v : v;
}

K_DEV float k_e4m3_value(uint32_t code)
{
    uint32_t e = code >> 3 & 15, m = code & 7;
    float v = e ? k_float((e + 120) << 23 | m << 20) : (float)m * 0.001953125f; /* 2^-9 */
    v = e == 15 && m == 7 ? k_float(0x7fc00000u) : v;
    return code & 0x80 ? -v : v;
}

/* To nearest even, at most 448 in magnitude. v is no NaN. */
K_DEV uint32_t k_to_e4m3(float v)
{
    uint32_t u = k_bits(v), sign = u >> 24 & 0x80u, a = u & 0x7fffffffu, max = 0x43e00000u;
    a = a < max ? a : max;
    uint32_t small = k_bits(k_float(a) + 16384.0f) & 15u, /* below 2^-6: multiples of 2^-9 */
        normal = ((a + 0x7ffffu + (a >> 20 & 1u)) >> 20) - (120u << 3);
    return sign | (a < 0x3c800000u ? small : normal);
}

/* Byte of element (row, k) in a tile of MXFP4: a row's 32 elements are together, as the scaled
 * matrix instruction takes them. */
K_DEV uint32_t mx_tile_at(uint32_t row, uint32_t k)
{
    return row * (TD_K_TILE_K / 2) + k / 2;
}

/* A tile row of weights as one wave reads it: raw is what lies in registers between load and use.
 * CHUNK_SCALE: the sum over 64 k is multiplied by scale_at(k). */
template <class WT> struct weight_row {
    typedef k_frag<WT> raw;
    static const bool CHUNK_SCALE = false;
    const WT *tiles; /* NULL: no such row */

    K_DEV_MEMBER void find(const td_k_matrix &w, uint32_t slab, uint32_t tile)
    {
        tiles = tile >= w.n_tiles ? nullptr
                                  : static_cast<const WT *>(w.data) +
                                        ((size_t)slab * w.n_tiles + tile) * w.k_tiles * TD_K_TILE;
    }
    K_DEV_MEMBER raw load(uint32_t step) const
    {
        return tile_load(tiles + (size_t)step * TD_K_TILE);
    }
    template <class CT> K_DEV_MEMBER static k_frag<CT> operand(const raw &r)
    {
        return k_convert<CT>(r);
    }
    K_DEV_MEMBER float scale_at(uint32_t) const
    {
        return 1.0f;
    }
};

struct mx_raw {
    uint32_t codes[FRAG_ROWS], scale[FRAG_ROWS];
};

template <> struct weight_row<k_mx> {
    typedef mx_raw raw;
    static const bool CHUNK_SCALE = false;
    const uint8_t *tiles, *scales;

    K_DEV_MEMBER void find(const td_k_matrix &w, uint32_t slab, uint32_t tile)
    {
        size_t at = ((size_t)slab * w.n_tiles + tile) * w.k_tiles;
        bool have = tile < w.n_tiles;
        tiles = have ? static_cast<const uint8_t *>(w.data) + at * (TD_K_TILE / 2) : nullptr;
        scales = static_cast<const uint8_t *>(w.scales) + (have ? at * 16 : 0);
    }
    K_DEV_MEMBER raw load(uint32_t step) const
    {
        raw r;
        K_UNROLL
        for (uint32_t i = 0; i < FRAG_ROWS; i++) {
            uint32_t row = tile_row(k_lane(), i);
            r.codes[i] = *reinterpret_cast<const uint32_t *>(
                tiles + (size_t)step * (TD_K_TILE / 2) + mx_tile_at(row, tile_k(k_lane())));
            r.scale[i] = scales[(size_t)step * 16 + row];
        }
        return r;
    }
    template <class CT> K_DEV_MEMBER static k_frag<CT> operand(const raw &r)
    {
        k_frag<CT> f;
        K_UNROLL
        for (int i = 0; i < FRAG_ROWS; i++)
            K_UNROLL
        for (int k = 0; k < 8; k++)
            f.r[i].v[k] = k_cast<CT>::of(k_mx_value(r.codes[i] >> (4 * k), r.scale[i]));
        return f;
    }
    K_DEV_MEMBER float scale_at(uint32_t) const
    {
        return 1.0f;
    }
};

struct fp8_raw {
    uint32_t codes[FRAG_ROWS][2];
};

template <> struct weight_row<k_fp8> {
    typedef fp8_raw raw;
    static const bool CHUNK_SCALE = true;
    const uint8_t *tiles;
    const float *scales;

    K_DEV_MEMBER void find(const td_k_matrix &w, uint32_t slab, uint32_t tile)
    {
        size_t at = ((size_t)slab * w.n_tiles + tile) * w.k_tiles;
        bool have = tile < w.n_tiles;
        tiles = have ? static_cast<const uint8_t *>(w.data) + at * TD_K_TILE : nullptr;
        uint32_t blocks = (w.n + 127) / 128;
        scales = static_cast<const float *>(w.scales) +
                 (have ? ((size_t)slab * blocks + tile / 8) * w.scale_cols : 0);
    }
    K_DEV_MEMBER raw load(uint32_t step) const
    {
        raw r;
        K_UNROLL
        for (uint32_t i = 0; i < FRAG_ROWS; i++)
            __builtin_memcpy(r.codes[i],
                             tiles + (size_t)step * TD_K_TILE +
                                 tile_at(tile_row(k_lane(), i), tile_k(k_lane())),
                             8);
        return r;
    }
    template <class CT> K_DEV_MEMBER static k_frag<CT> operand(const raw &r)
    {
        k_frag<CT> f;
        K_UNROLL
        for (int i = 0; i < FRAG_ROWS; i++)
            K_UNROLL
        for (int k = 0; k < 8; k++)
            f.r[i].v[k] = k_cast<CT>::of(k_e4m3_value(r.codes[i][k / 4] >> (8 * (k % 4)) & 0xff));
        return f;
    }
    K_DEV_MEMBER float scale_at(uint32_t k) const
    {
        return scales[k / 128];
    }
};

#endif
