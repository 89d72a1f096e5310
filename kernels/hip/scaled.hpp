/* SPDX-License-Identifier: Apache-2.0 */
/* MXFP4 weights and FP8 operands in the scaled matrix instruction: gfx950 (16x16x128), and the
 * emulation with waves of 64.
 *
 * An operand (act.mxfp4=fp8g32 of the profile) is rounded as OCP Microscaling Formats 1.0, 6.3,
 * says, in groups of 32 along K that begin at multiples of 32 in its row:
 *   scale = 2^(floor(log2(largest magnitude)) - 8), at least 2^-127
 *   element = e4m3fn(x / scale), to nearest even, at most 448 in magnitude
 * float32 denormals count as 0; a group with a NaN or an infinity is NaN.
 *
 * K plan: steps of 128 k from the begin of the slice, what lies behind its end is 0; blocks of
 * TD_KPLAN_GEMM_BLOCK k from zero, blocks added left to right: the same for every tile shape. The
 * emulation's step adds, in order of k, four groups of 32: the exact sum of a group's products,
 * rounded once, times both scales. */
#ifndef TD_KERNELS_HIP_SCALED_HPP
#define TD_KERNELS_HIP_SCALED_HPP

#include "kernels/hip/formats.hpp"

#if defined(__gfx950__) || (defined(TD_EMU) && K_WAVE == 64)
#define K_SCALED

enum {
    MX_STEP = TD_K_MX_STEP,             /* k of an instruction */
    MX_GROUPS = MX_STEP / 32,           /* a lane has the scale of row l % 16, group l / 16 */
    MX_CODES = 16 * MX_STEP,            /* bytes of a tile of operands in LDS */
    MX_TILE = MX_CODES + TD_K_MX_SCALES /* and its scales, a byte for each lane */
};

struct alignas(16) mx_bytes {
    uint32_t v[4];
};

/* A lane's share of 16 rows x 128 k. e4m3: k = 16 (l / 16) + 0..15, then the same + 64. */
struct mx_operand {
    mx_bytes codes[2];
    uint32_t scale;
};

/* e2m1: k = 32 (l / 16) + 0..31. */
struct mx_weight {
    mx_bytes codes;
    uint32_t scale;
};

K_DEV uint32_t mx_operand_k(uint32_t lane, uint32_t i)
{
    return 16 * (lane / 16) + i % 16 + 64 * (i / 16);
}

#if defined(TD_EMU)

struct mx_mma_in {
    mx_operand a;
    mx_weight b;
    k_acc c;
};

/* In units of 2^-9; a NaN spoils its group. */
K_DEV int32_t mx_e4m3_units(uint32_t code, bool &nan)
{
    uint32_t e = code >> 3 & 15, m = code & 7;
    nan |= e == 15 && m == 7;
    int32_t v = (int32_t)(e ? (8 + m) << (e - 1) : m);
    return code & 0x80 ? -v : v;
}

K_DEV int32_t mx_e2m1_doubled(uint32_t code)
{
    uint32_t m = code & 7;
    int32_t v = (int32_t)(m < 4 ? m : (2 + (m & 1)) << (m / 2 - 1));
    return code & 8 ? -v : v;
}

/* v * 2^(a + b - 254); what is below 2^-252 is below every f32. */
K_DEV float mx_scaled(float v, uint32_t a, uint32_t b)
{
    int e = (int)(a + b) - 254;
    e = e < -252 ? -252 : e;
    return v * k_float((uint32_t)(127 + e / 2) << 23) * k_float((uint32_t)(127 + e - e / 2) << 23);
}

/* What a wave brings to an instruction, by row and k. */
struct mx_tiles {
    int32_t a[16][MX_STEP], b[16][MX_STEP];
    uint32_t a_scale[16][MX_GROUPS], b_scale[16][MX_GROUPS];
    bool a_nan[16][MX_GROUPS];
    float c[16][16];
};

K_DEV void mx_take_lane(mx_tiles *t, uint32_t l, const mx_mma_in &in)
{
    uint32_t row = l % 16, group = l / 16;
    t->a_scale[row][group] = in.a.scale & 0xff;
    t->b_scale[row][group] = in.b.scale & 0xff;
    for (uint32_t i = 0; i < 32; i++) {
        uint32_t k = mx_operand_k(l, i), kb = 32 * group + i;
        t->a[row][k] = mx_e4m3_units(in.a.codes[i / 16].v[i % 16 / 4] >> (i % 4 * 8) & 0xff,
                                     t->a_nan[row][k / 32]);
        t->b[row][kb] = mx_e2m1_doubled(in.b.codes.v[i / 8] >> (i % 8 * 4) & 15);
    }
    for (uint32_t r = 0; r < ACC; r++)
        t->c[acc_row(l, r)][acc_col(l, r)] = in.c.v[r];
}

K_DEV float mx_group_dot(const mx_tiles *t, uint32_t i, uint32_t j, uint32_t g)
{
    uint32_t sa = t->a_scale[i][g], sb = t->b_scale[j][g];
    if (t->a_nan[i][g] || sa == 0xff || sb == 0xff)
        return k_float(0x7fc00000u);
    int32_t sum = 0; /* at most 32 * 448 * 2^9 * 12: it fits */
    for (uint32_t k = 32 * g; k < 32 * g + 32; k++)
        sum += t->a[i][k] * t->b[j][k];
    return mx_scaled((float)sum * 0.0009765625f, sa, sb); /* 2^-10 */
}

K_DEV void mx_mma_all(td_emu::wave_table *w)
{
    static_assert(sizeof(mx_mma_in) <= td_emu::SLOT, "a slot holds a lane's operands");
    if (w->who != ~0ull)
        td_emu::die("a matrix instruction with lanes off");
    mx_tiles t;
    memset(t.a_nan, 0, sizeof t.a_nan);
    for (uint32_t l = 0; l < K_WAVE; l++) {
        mx_mma_in in;
        memcpy(&in, w->in[l], sizeof in);
        mx_take_lane(&t, l, in);
    }
    for (uint32_t i = 0; i < 16; i++)
        for (uint32_t j = 0; j < 16; j++)
            for (uint32_t g = 0; g < MX_GROUPS; g++)
                t.c[i][j] += mx_group_dot(&t, i, j, g);
    for (uint32_t l = 0; l < K_WAVE; l++) {
        k_acc out;
        for (uint32_t r = 0; r < ACC; r++)
            out.v[r] = t.c[acc_row(l, r)][acc_col(l, r)];
        memcpy(w->out[l], &out, sizeof out);
    }
}

K_DEV k_acc k_mma_scaled(const mx_operand &a, const mx_weight &b, k_acc c)
{
    mx_mma_in in = {a, b, c};
    td_emu::wave_op(mx_mma_all, &in, sizeof in, &c, sizeof c);
    return c;
}

#else

typedef int k_i32x8 __attribute__((ext_vector_type(8)));

/* Formats: 0 e4m3, 4 e2m1 (which uses half of its registers). Scales must lie in vector registers,
 * byte 0. */
K_DEV k_acc k_mma_scaled(const mx_operand &a, const mx_weight &b, k_acc c)
{
    k_i32x8 x, y = {};
    k_f32x4 d;
    __builtin_memcpy(&x, a.codes, 32);
    __builtin_memcpy(&y, &b.codes, 16);
    __builtin_memcpy(&d, &c, 16);
    d = __builtin_amdgcn_mfma_scale_f32_16x16x128_f8f6f4(x, y, d, 0, 4, 0, (int)a.scale, 0,
                                                         (int)b.scale);
    __builtin_memcpy(&c, &d, 16);
    return c;
}

#endif

/* Where bytes of operands lie in a tile in LDS: both parts of a lane are 16 bytes in a run that the
 * wave reads whole. */
K_DEV uint32_t mx_operand_at(uint32_t row, uint32_t k)
{
    return (k / 16 * 16 + row) * 16 + k % 16;
}

K_DEV mx_operand mx_operand_load(const uint8_t *tile)
{
    mx_operand a;
    K_UNROLL
    for (uint32_t p = 0; p < 2; p++)
        a.codes[p] = *reinterpret_cast<const mx_bytes *>(
            tile + mx_operand_at(k_lane() % 16, mx_operand_k(k_lane(), 16 * p)));
    a.scale = tile[MX_CODES + k_lane()];
    return a;
}

/* The group's scale from the bits of its largest magnitude. */
K_DEV uint32_t mx_scale_code(uint32_t most)
{
    uint32_t e = most >> 23;
    return e == 255 ? 255 : e > 8 ? e - 8 : 0;
}

struct mx_unit {
    uint32_t codes[2], scale;
};

/* 8 elements of a group of 32 whose other elements are with the 4 neighbours of the lane. */
K_DEV mx_unit mx_round(const k_vec8<float> &x)
{
    uint32_t most = 0;
    K_UNROLL
    for (int i = 0; i < 8; i++) {
        uint32_t m = k_bits(x.v[i]) & 0x7fffffffu;
        most = m > most ? m : most;
    }
    K_UNROLL
    for (uint32_t o = 1; o < 4; o *= 2) {
        uint32_t other = k_shuffle_u32(most, k_lane() ^ o);
        most = other > most ? other : most;
    }
    mx_unit u = {{0, 0}, mx_scale_code(most)};
    float up = k_float((254 - u.scale) << 23); /* 2^(127 - scale): exact products */
    K_UNROLL
    for (int i = 0; i < 8; i++) {
        uint32_t code = (k_bits(x.v[i]) & 0x7f800000u) ? k_to_e4m3(x.v[i] * up) : 0;
        u.codes[i / 4] |= (u.scale == 255 ? 0x7f : code) << (i % 4 * 8);
    }
    return u;
}

/* A tile row of MXFP4 weights, 128 k a load: 16 bytes of a lane, 1 KiB of the wave. */
struct mx_weight_row : weight_row<k_mx> {
    /* Tiles [tile, tile + 4) of 32 k; from end on: 0. */
    K_DEV_MEMBER mx_weight load_step(uint32_t tile, uint32_t end) const
    {
        mx_weight w = {{{0, 0, 0, 0}}, 127};
        tile += k_lane() / 16;
        if (tile < end) {
            uint32_t row = k_lane() % 16;
            w.codes = *reinterpret_cast<const mx_bytes *>(tiles + (size_t)tile * (TD_K_TILE / 2) +
                                                          mx_tile_at(row, 0));
            w.scale = scales[(size_t)tile * 16 + row];
        }
        return w;
    }
};

/* MT tiles of rows and NB tiles of weights per wave, STEPS instructions a trip through LDS. The
 * form of gemm_core (gemm.hip). */
template <int MT, int NB, int STEPS> struct mx_core {
    typedef uint8_t lds_type;
    static const uint32_t ROWS = MT * 16, TILES = NB;
    static const uint32_t CHUNK = STEPS * MX_STEP, ROW_UNITS = CHUNK / 8;
    static const uint32_t EACH = ROWS * ROW_UNITS / K_THREADS;
    static const uint32_t BLOCK_CHUNKS = TD_KPLAN_GEMM_BLOCK / CHUNK;
    static_assert(EACH * K_THREADS == ROWS * ROW_UNITS, "each thread has as many units");

    const float *rows[EACH]; /* of this thread's units; NULL: no such row */
    mx_weight_row weights[NB];
    k_acc sum[MT][NB], part[MT][NB];
    k_vec8<float> next[EACH];
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
        return (k_tid() + e * K_THREADS) / ROW_UNITS;
    }

    K_DEV_MEMBER void fetch(uint32_t k0, uint32_t k1)
    {
        K_UNROLL
        for (uint32_t e = 0; e < EACH; e++) {
            next[e] = k_zero8<float>();
            if (rows[e])
                next[e] = k_load8(rows[e], k0 + (k_tid() + e * K_THREADS) % ROW_UNITS * 8, k1, vec);
        }
    }

    K_DEV_MEMBER void put(uint8_t *lds)
    {
        K_UNROLL
        for (uint32_t e = 0; e < EACH; e++) {
            uint32_t row = unit_row(e), k8 = (k_tid() + e * K_THREADS) % ROW_UNITS * 8;
            if (round_a) {
                K_UNROLL
                for (int i = 0; i < 8; i++)
                    next[e].v[i] = k_round(next[e].v[i]);
            }
            mx_unit u = mx_round(next[e]);
            uint8_t *tile = lds + (k8 / MX_STEP * MT + row / 16) * MX_TILE;
            __builtin_memcpy(
                __builtin_assume_aligned(tile + mx_operand_at(row % 16, k8 % MX_STEP), 8), u.codes,
                8);
            if (k8 % 32 == 0)
                tile[MX_CODES + k8 % MX_STEP / 32 * 16 + row % 16] = (uint8_t)u.scale;
        }
    }

    K_DEV_MEMBER void fetch_weights(uint32_t at, uint32_t end, mx_weight (&w)[STEPS][NB]) const
    {
        K_UNROLL
        for (int s = 0; s < STEPS; s++)
            K_UNROLL
        for (int b = 0; b < NB; b++)
            if (weights[b].tiles && at + s * MX_STEP < end)
                w[s][b] = weights[b].load_step(at / 32 + s * MX_GROUPS, end / 32);
    }

    K_DEV_MEMBER static uint32_t chunk_end(uint32_t at, uint32_t k1)
    {
        return at + CHUNK < k1 ? at + CHUNK : k1;
    }

    /* Add [k0, k1) of the rows times the weights into sum; both are multiples of 32. */
    K_DEV_MEMBER void run(uint32_t k0, uint32_t k1, uint8_t *lds)
    {
        mx_weight w[STEPS][NB], ahead[STEPS][NB];
        fetch(k0, chunk_end(k0, k1));
        fetch_weights(k0, k1, w);
        for (uint32_t at = k0, n = 0; at < k1; n++) {
            uint32_t end = chunk_end(at, k1);
            k_sync();
            put(lds);
            k_sync();
            if (end < k1) {
                fetch(end, chunk_end(end, k1));
                fetch_weights(end, k1, ahead);
            }
            multiply(at, end, w, lds);
            if (n % BLOCK_CHUNKS == BLOCK_CHUNKS - 1 || end >= k1)
                close_block();
            K_UNROLL
            for (int s = 0; s < STEPS; s++)
                K_UNROLL
            for (int b = 0; b < NB; b++)
                w[s][b] = ahead[s][b];
            at = end;
        }
    }

    K_DEV_MEMBER void multiply(uint32_t at, uint32_t end, const mx_weight (&w)[STEPS][NB],
                               const uint8_t *lds)
    {
        K_UNROLL
        for (int s = 0; s < STEPS; s++) {
            if (at + s * MX_STEP >= end)
                continue;
            K_UNROLL
            for (int m = 0; m < MT; m++) {
                mx_operand a = mx_operand_load(lds + (s * MT + m) * MX_TILE);
                K_UNROLL
                for (int b = 0; b < NB; b++)
                    if (weights[b].tiles)
                        part[m][b] = k_mma_scaled(a, w[s][b], part[m][b]);
            }
        }
    }

    K_DEV_MEMBER void close_block()
    {
        K_UNROLL
        for (int m = 0; m < MT; m++)
            K_UNROLL
        for (int b = 0; b < NB; b++) {
            K_UNROLL
            for (int r = 0; r < ACC; r++)
                sum[m][b].v[r] += part[m][b].v[r];
            part[m][b] = acc_zero();
        }
    }

    /* put_one(m, b, row, col, r): every element of this lane. */
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

#endif

#endif
