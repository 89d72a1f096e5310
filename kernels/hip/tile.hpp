/* SPDX-License-Identifier: Apache-2.0 */
/* The tile layer: 16 x 16 outputs of a wave, 32 k a step. Kernels never name a lane's elements:
 * they ask tile_row(), tile_k() for operands and acc_row(), acc_col() for results. The order of k
 * inside a step is the architecture's (the K plan); it is the same for A and B, so layouts agree.
 * Wave 64: gfx950 one 16x16x32, gfx942 two 16x16x16 on the halves of each lane's 8 elements; f32
 * eight 16x16x4. Wave 32 (sm_90): four m16n8k16. */
#ifndef TD_KERNELS_HIP_TILE_HPP
#define TD_KERNELS_HIP_TILE_HPP

#include "kernels/hip/args.h"
#include "kernels/hip/port.hpp"

struct k_bf16 {
    uint16_t u;
};

K_DEV float k_to_f32(float f)
{
    return f;
}

K_DEV float k_to_f32(k_bf16 b)
{
    return k_float((uint32_t)b.u << 16);
}

/* To nearest even; NaN stays NaN. */
K_DEV k_bf16 k_to_bf16(float f)
{
    k_bf16 b;
#if defined(__AMDGCN__) /* one instruction on gfx950 */
    __bf16 h = (__bf16)f;
    __builtin_memcpy(&b, &h, 2);
#else
    uint32_t u = k_bits(f), r = (u + 0x7fffu + (u >> 16 & 1)) >> 16;
    b.u = (uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16 | 0x40) : r);
#endif
    return b;
}

K_DEV float k_round(float f)
{
    return k_to_f32(k_to_bf16(f));
}

template <class T> struct k_cast;
template <> struct k_cast<float> {
    K_DEV_MEMBER static float of(float f)
    {
        return f;
    }
};
template <> struct k_cast<k_bf16> {
    K_DEV_MEMBER static k_bf16 of(float f)
    {
        return k_to_bf16(f);
    }
};

/* 8 consecutive elements: what a lane holds of one row for one step. */
template <class T> struct alignas(16) k_vec8 {
    T v[8];
};

template <class To, class From> K_DEV k_vec8<To> k_convert(const k_vec8<From> &x)
{
    k_vec8<To> y;
    K_UNROLL
    for (int i = 0; i < 8; i++)
        y.v[i] = k_cast<To>::of(k_to_f32(x.v[i]));
    return y;
}

template <class T> K_DEV k_vec8<T> k_zero8()
{
    k_vec8<T> y;
    K_UNROLL
    for (int i = 0; i < 8; i++)
        y.v[i] = k_cast<T>::of(0.0f);
    return y;
}

/* Elements [at, at + 8) of a row of n; what lies behind its end is 0. vec (the same in every lane):
 * n is a multiple of 8 and the row lies on 16 bytes. */
template <class T> K_DEV k_vec8<T> k_load8(const T *row, uint32_t at, uint32_t n, bool vec)
{
    k_vec8<T> y = k_zero8<T>();
    if (vec) {
        if (at < n)
            y = *reinterpret_cast<const k_vec8<T> *>(row + at);
        return y;
    }
    for (uint32_t i = 0; i < 8; i++)
        if (at + i < n)
            y.v[i] = row[at + i];
    return y;
}

enum { FRAG_ROWS = K_WAVE == 64 ? 1 : 2, ACC = K_WAVE == 64 ? 4 : 8 };

/* A lane's share of a 16 x 32 operand. */
template <class T> struct k_frag {
    k_vec8<T> r[FRAG_ROWS];
};

struct k_acc {
    float v[ACC];
};

K_DEV uint32_t tile_row(uint32_t lane, uint32_t i)
{
    return K_WAVE == 64 ? lane % 16 : lane / 4 + 8 * i;
}

K_DEV uint32_t tile_k(uint32_t lane)
{
    return 8 * (K_WAVE == 64 ? lane / 16 : lane % 4);
}

K_DEV uint32_t acc_row(uint32_t lane, uint32_t r)
{
    return K_WAVE == 64 ? 4 * (lane / 16) + r : lane / 4 + 8 * (r % 4 / 2);
}

K_DEV uint32_t acc_col(uint32_t lane, uint32_t r)
{
    return K_WAVE == 64 ? lane % 16 : 2 * (lane % 4) + r % 2 + 8 * (r / 4);
}

/* Where element (row, k) lies in a tile in memory or LDS. */
K_DEV uint32_t tile_at(uint32_t row, uint32_t k)
{
    return ((k / 8) * 16 + row) * 8 + k % 8;
}

template <class T> K_DEV k_frag<T> tile_load(const T *tile)
{
    k_frag<T> f;
    uint32_t lane = k_lane();
    K_UNROLL
    for (uint32_t i = 0; i < FRAG_ROWS; i++)
        f.r[i] =
            *reinterpret_cast<const k_vec8<T> *>(tile + tile_at(tile_row(lane, i), tile_k(lane)));
    return f;
}

template <class To, class From> K_DEV k_frag<To> k_convert(const k_frag<From> &x)
{
    k_frag<To> y;
    K_UNROLL
    for (int i = 0; i < FRAG_ROWS; i++)
        y.r[i] = k_convert<To>(x.r[i]);
    return y;
}

K_DEV k_acc acc_zero()
{
    k_acc c;
    K_UNROLL
    for (int i = 0; i < ACC; i++)
        c.v[i] = 0.0f;
    return c;
}

#if defined(TD_EMU)

/* The whole wave's product at once, k ascending: exact products, one rounding a sum. */
template <class T> struct k_mma_in {
    k_frag<T> a, b;
    k_acc c;
};

template <class T> static void k_mma_all(td_emu::wave_table *t)
{
    static_assert(sizeof(k_mma_in<T>) <= td_emu::SLOT, "a slot holds a lane's operands");
    if (t->who != (K_WAVE == 64 ? ~0ull : 0xffffffffull))
        td_emu::die("a matrix instruction with lanes off");
    float a[16][32], b[32][16], c[16][16];
    for (uint32_t l = 0; l < K_WAVE; l++) {
        k_mma_in<T> in;
        memcpy(&in, t->in[l], sizeof in);
        for (uint32_t i = 0; i < FRAG_ROWS; i++)
            for (uint32_t k = 0; k < 8; k++) {
                a[tile_row(l, i)][tile_k(l) + k] = k_to_f32(in.a.r[i].v[k]);
                b[tile_k(l) + k][tile_row(l, i)] = k_to_f32(in.b.r[i].v[k]);
            }
        for (uint32_t r = 0; r < ACC; r++)
            c[acc_row(l, r)][acc_col(l, r)] = in.c.v[r];
    }
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < 32; k++)
            for (int j = 0; j < 16; j++)
                c[i][j] += a[i][k] * b[k][j];
    for (uint32_t l = 0; l < K_WAVE; l++) {
        k_acc out;
        for (uint32_t r = 0; r < ACC; r++)
            out.v[r] = c[acc_row(l, r)][acc_col(l, r)];
        memcpy(t->out[l], &out, sizeof out);
    }
}

template <class T> K_DEV k_acc k_mma(const k_frag<T> &a, const k_frag<T> &b, k_acc c)
{
    k_mma_in<T> in = {a, b, c};
    td_emu::wave_op(k_mma_all<T>, &in, sizeof in, &c, sizeof c);
    return c;
}

#elif defined(__CUDACC__)

K_DEV void k_mma_16816(const uint32_t a[4], const uint32_t b[2], float *c)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/* A lane's elements 4h..4h+3 of each row are the instruction's k 2q, 2q+1, 2q+8, 2q+9. */
K_DEV k_acc k_mma(const k_frag<k_bf16> &a, const k_frag<k_bf16> &b, k_acc c)
{
    uint32_t x[2][4], y[2][4];
    K_UNROLL
    for (int i = 0; i < 2; i++) {
        __builtin_memcpy(x[i], a.r[i].v, 16);
        __builtin_memcpy(y[i], b.r[i].v, 16);
    }
    K_UNROLL
    for (int h = 0; h < 2; h++) {
        uint32_t ra[4] = {x[0][2 * h], x[1][2 * h], x[0][2 * h + 1], x[1][2 * h + 1]};
        K_UNROLL
        for (int n = 0; n < 2; n++) {
            uint32_t rb[2] = {y[n][2 * h], y[n][2 * h + 1]};
            k_mma_16816(ra, rb, c.v + 4 * n);
        }
    }
    return c;
}

/* No f32 instruction keeps all bits: plain FMAs on shuffled operands. For checks, not for speed. */
K_DEV k_acc k_mma(const k_frag<float> &a, const k_frag<float> &b, k_acc c)
{
    unsigned lane = k_lane();
    K_UNROLL
    for (int q = 0; q < 4; q++)
        K_UNROLL
    for (int k = 0; k < 8; k++) {
        float x[2], y[2][2];
        K_UNROLL
        for (int i = 0; i < 2; i++) {
            x[i] = k_shuffle(a.r[i].v[k], lane / 4 * 4 + q);
            K_UNROLL
            for (int j = 0; j < 2; j++)
                y[i][j] = k_shuffle(b.r[i].v[k], (2 * (lane % 4) + j) * 4 + q);
        }
        K_UNROLL
        for (int r = 0; r < ACC; r++)
            c.v[r] = k_fma(x[r % 4 / 2], y[r / 4][r % 2], c.v[r]);
    }
    return c;
}

#else

typedef __bf16 k_bf16x8 __attribute__((ext_vector_type(8)));
typedef short k_s16x4 __attribute__((ext_vector_type(4)));
typedef float k_f32x4 __attribute__((ext_vector_type(4)));

K_DEV k_acc k_mma(const k_frag<k_bf16> &a, const k_frag<k_bf16> &b, k_acc c)
{
    k_f32x4 d;
    __builtin_memcpy(&d, &c, 16);
#if defined(__gfx950__)
    k_bf16x8 x, y;
    __builtin_memcpy(&x, &a, 16);
    __builtin_memcpy(&y, &b, 16);
    d = __builtin_amdgcn_mfma_f32_16x16x32_bf16(x, y, d, 0, 0, 0);
#elif defined(__gfx942__)
    k_s16x4 x[2], y[2];
    __builtin_memcpy(x, &a, 16);
    __builtin_memcpy(y, &b, 16);
    d = __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(x[0], y[0], d, 0, 0, 0);
    d = __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(x[1], y[1], d, 0, 0, 0);
#endif
    __builtin_memcpy(&c, &d, 16);
    return c;
}

K_DEV k_acc k_mma(const k_frag<float> &a, const k_frag<float> &b, k_acc c)
{
    k_f32x4 d;
    __builtin_memcpy(&d, &c, 16);
    K_UNROLL
    for (int i = 0; i < 8; i++)
        d = __builtin_amdgcn_mfma_f32_16x16x4f32(a.r[0].v[i], b.r[0].v[i], d, 0, 0, 0);
    __builtin_memcpy(&c, &d, 16);
    return c;
}

#endif

#endif
