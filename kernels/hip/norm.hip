/* SPDX-License-Identifier: Apache-2.0 */
/* Row work: embedding, residual and norm, joining of slices, the rows that enter the pool. A block
 * has one row. */
#include "kernels/hip/formats.hpp"
#include "kernels/kv_row.h"

/* Element k of row n of a matrix in tiles. */
K_DEV float matrix_at(const td_k_matrix &w, uint32_t n, uint32_t k)
{
    size_t tile = (size_t)(n / 16) * w.k_tiles + k / 32,
           at = tile * TD_K_TILE + tile_at(n % 16, k % 32);
    const uint8_t *bytes = static_cast<const uint8_t *>(w.data);
    if (w.format == TD_W_F32)
        return static_cast<const float *>(w.data)[at];
    if (w.format == TD_W_BF16)
        return k_to_f32(static_cast<const k_bf16 *>(w.data)[at]);
    if (w.format == TD_W_MXFP4)
        return k_mx_value(bytes[tile * (TD_K_TILE / 2) + mx_tile_at(n % 16, k % 32)] >> (k % 2 * 4),
                          static_cast<const uint8_t *>(w.scales)[tile * 16 + n % 16]);
    return k_e4m3_value(bytes[at]) *
           static_cast<const float *>(w.scales)[(size_t)(n / 128) * w.scale_cols + k / 128];
}

K_KERNEL(embed, td_k_embed)
{
    uint32_t t = k_block();
    if (t >= a.step->n_rows)
        return;
    uint32_t id = k_global(a.step->ids)[t], k = a.table.k;
    for (uint32_t i = k_tid(); i < k; i += K_THREADS)
        a.x[(size_t)t * k + i] = matrix_at(a.table, id, i);
}

K_KERNEL(add_norm, td_k_add_norm)
{
    uint32_t t = k_block();
    if (t >= a.step->n_rows)
        return;
    size_t at = (size_t)t * a.width;
    float sum = 0.0f;
    for (uint32_t i = k_tid(); i < a.width; i += K_THREADS) {
        float x = a.x[at + i];
        if (a.delta) {
            x += a.delta[at + i];
            a.x[at + i] = x;
        }
        sum += x * x;
    }
    sum = k_block_sum(sum, k_lds<float>());
    float r = 1.0f / k_sqrt(sum / (float)a.width + a.eps);
    for (uint32_t i = k_tid(); i < a.width; i += K_THREADS) {
        float y = a.x[at + i] * r * a.w[i];
        if (a.out_f32)
            a.out_f32[at + i] = y;
        a.out[at + i] = a.round ? k_round(y) : y;
    }
}

K_KERNEL(reduce_slices, td_k_reduce)
{
    uint32_t t = k_block();
    if (t >= a.step->n_rows)
        return;
    size_t s = (size_t)a.step->n_rows * a.n;
    for (uint32_t i = k_tid(); i < a.n; i += K_THREADS) {
        const float *e = a.partial + (size_t)t * a.n + i;
        float v = e[0];
        if (a.slices == 2)
            v = e[0] + e[s];
        if (a.slices == 4)
            v = (e[0] + e[s]) + (e[2 * s] + e[3 * s]);
        if (a.slices == 8)
            v = ((e[0] + e[s]) + (e[2 * s] + e[3 * s])) +
                ((e[4 * s] + e[5 * s]) + (e[6 * s] + e[7 * s]));
        a.out[(size_t)t * a.n + i] = v;
    }
}

/* Where row t's own position lies in the pool, in elements of its type. */
template <class T>
K_DEV T *own_row(const td_step *s, uint32_t t, uint64_t layer_offset, uint32_t row_elems)
{
    uint32_t pos = k_global(s->positions)[t],
             block =
                 k_global(s->tables)[(size_t)k_global(s->seq_of)[t] * s->table_stride + pos / 64];
    return reinterpret_cast<T *>(k_global(s->kv_base) + block * s->block_bytes + layer_offset) +
           (size_t)(pos % 64) * row_elems;
}

K_DEV void store(void *row, bool bf16, uint32_t i, float v)
{
    if (bf16)
        static_cast<k_bf16 *>(row)[i] = k_to_bf16(v);
    else
        static_cast<float *>(row)[i] = v;
}

K_DEV void *own_row_of(const td_step *s, uint32_t t, uint64_t layer_offset, uint32_t row_elems,
                       bool bf16)
{
    if (bf16)
        return own_row<k_bf16>(s, t, layer_offset, row_elems);
    return own_row<float>(s, t, layer_offset, row_elems);
}

/* Elements of an FP8 row and its scales (kernels/kv_row.h). */
struct f8_row {
    uint8_t *codes;
    float *scales;
};

K_DEV f8_row own_f8_row(const td_step *s, uint32_t t, uint64_t layer_offset, uint32_t row_elems,
                        uint64_t scales_at, uint32_t n_scales)
{
    f8_row r = {own_row<uint8_t>(s, t, layer_offset, row_elems),
                own_row<float>(s, t, layer_offset + scales_at, n_scales)};
    return r;
}

/* A group by one wave. Of NaN and infinity the bits are the greatest, so the scale tells them. */
K_DEV void store_f8_group(uint8_t *codes, float *scale, const float *x, uint32_t n)
{
    uint32_t most = 0;
    for (uint32_t i = k_lane(); i < n; i += K_WAVE) {
        uint32_t m = k_bits(x[i]) & 0x7fffffffu;
        most = m > most ? m : most;
    }
    for (uint32_t o = K_WAVE / 2; o > 0; o /= 2) {
        uint32_t other = k_shuffle_u32(most, k_lane() ^ o);
        most = other > most ? other : most;
    }
    float s = k_float(most) / 448.0f;
    s = s < k_float(0x00800000u) ? 0.0f : s; /* a NaN stays */
    bool some = s > 0.0f && s < k_inf();
    for (uint32_t i = k_lane(); i < n; i += K_WAVE)
        codes[i] = (uint8_t)(some ? k_to_e4m3(x[i] / s) : 0);
    if (k_lane() == 0)
        *scale = s;
}

/* A part of n elements: its groups g0, g0 + step, ... */
K_DEV void store_f8(uint8_t *codes, float *scales, const float *x, uint32_t n, uint32_t g0,
                    uint32_t step)
{
    const uint32_t size = TD_KV_SCALE_GROUP;
    for (uint32_t g = g0; g * size < n; g += step)
        store_f8_group(codes + g * size, scales + g, x + g * size,
                       n - g * size < size ? n - g * size : size);
}

struct rope_pair {
    uint32_t first, second;
};

K_DEV rope_pair rope_at(uint32_t i, uint32_t dims, bool interleave)
{
    rope_pair p = {interleave ? 2 * i : i, interleave ? 2 * i + 1 : i + dims / 2};
    return p;
}

K_DEV void rotate(float &x, float &y, float cos, float sin)
{
    float x0 = x, y0 = y;
    x = x0 * cos - y0 * sin;
    y = y0 * cos + x0 * sin;
}

/* Rotate R dims at the same place in each of n vectors, in place. */
K_DEV void rotate_heads(float *q, uint32_t n, uint32_t stride, uint32_t dims, bool interleave,
                        const float *cos, const float *sin)
{
    uint32_t pairs = dims / 2;
    for (uint32_t i = k_tid(); i < n * pairs; i += K_THREADS) {
        rope_pair p = rope_at(i % pairs, dims, interleave);
        float *v = q + (size_t)(i / pairs) * stride;
        rotate(v[p.first], v[p.second], cos[i % pairs], sin[i % pairs]);
    }
}

K_KERNEL(mla_write, td_k_mla_write)
{
    uint32_t t = k_block();
    if (t >= a.step->n_rows)
        return;
    uint32_t pairs = a.rope_dims / 2, width = a.latent + a.rope_dims;
    const float *cos = k_global(a.step->rope_cos) + (size_t)t * pairs,
                *sin = k_global(a.step->rope_sin) + (size_t)t * pairs,
                *src = a.kv_a + (size_t)t * width;
    bool f8 = a.kv == TD_F8E4M3, bf16 = a.kv == TD_BF16;
    void *row = f8 ? nullptr : own_row_of(a.step, t, a.layer_offset, width, bf16);
    float sum = 0.0f, *room = k_lds<float>(), *all = room + K_WAVES; /* FP8: the row in f32 */
    for (uint32_t i = k_tid(); i < a.latent; i += K_THREADS)
        sum += src[i] * src[i];
    sum = k_block_sum(sum, room);
    float r = 1.0f / k_sqrt(sum / (float)a.latent + a.eps);
    for (uint32_t i = k_tid(); i < a.latent; i += K_THREADS) {
        float v = src[i] * r * a.norm[i];
        if (f8)
            all[i] = v;
        else
            store(row, bf16, i, v);
    }
    for (uint32_t i = k_tid(); i < pairs; i += K_THREADS) {
        rope_pair p = rope_at(i, a.rope_dims, a.interleave);
        float x = src[a.latent + p.first], y = src[a.latent + p.second];
        rotate(x, y, cos[i], sin[i]);
        if (f8) {
            all[a.latent + p.first] = x;
            all[a.latent + p.second] = y;
        } else {
            store(row, bf16, a.latent + p.first, x);
            store(row, bf16, a.latent + p.second, y);
        }
    }
    if (f8) {
        k_sync();
        f8_row to = own_f8_row(a.step, t, a.layer_offset, width, a.scales_at, a.n_scales);
        store_f8(to.codes, to.scales, all, a.latent, k_wave(), K_WAVES);
        store_f8(to.codes + a.latent,
                 to.scales + (a.latent + TD_KV_SCALE_GROUP - 1) / TD_KV_SCALE_GROUP, all + a.latent,
                 a.rope_dims, k_wave(), K_WAVES);
    }
    uint32_t head = a.nope + a.rope_dims;
    rotate_heads(a.q + (size_t)t * a.n_heads * head + a.nope, a.n_heads, head, a.rope_dims,
                 a.interleave, cos, sin);
}

K_KERNEL(index_write, td_k_index_write)
{
    uint32_t t = k_block();
    if (t >= a.step->n_rows)
        return;
    float *room = k_lds<float>(), *y = room + K_WAVES;
    uint32_t pairs = a.rope_dims / 2;
    const float *cos = k_global(a.step->rope_cos) + (size_t)t * pairs,
                *sin = k_global(a.step->rope_sin) + (size_t)t * pairs,
                *src = a.k + (size_t)t * a.dims;
    void *row = own_row_of(a.step, t, a.layer_offset, a.dims, a.bf16);
    float sum = 0.0f;
    for (uint32_t i = k_tid(); i < a.dims; i += K_THREADS)
        sum += src[i];
    float mean = k_block_sum(sum, room) / (float)a.dims;
    sum = 0.0f;
    for (uint32_t i = k_tid(); i < a.dims; i += K_THREADS) {
        float d = src[i] - mean;
        sum += d * d;
    }
    float r = 1.0f / k_sqrt(k_block_sum(sum, room) / (float)a.dims + a.eps);
    for (uint32_t i = k_tid(); i < a.dims; i += K_THREADS)
        y[i] = (src[i] - mean) * r * a.norm[i] + a.bias[i];
    k_sync();
    for (uint32_t i = k_tid(); i < pairs; i += K_THREADS) {
        rope_pair p = rope_at(i, a.rope_dims, a.interleave);
        rotate(y[p.first], y[p.second], cos[i], sin[i]);
    }
    k_sync();
    for (uint32_t i = k_tid(); i < a.dims; i += K_THREADS)
        store(row, a.bf16, i, y[i]);
    rotate_heads(a.q + (size_t)t * a.n_heads * a.dims, a.n_heads, a.dims, a.rope_dims, a.interleave,
                 cos, sin);
}

/* Norm (optional) and rope of one head by one wave. y: dims floats of LDS that are its own. */
K_DEV void head_into(const float *src, const float *w, float eps, uint32_t dims, uint32_t rope_dims,
                     bool interleave, const float *cos, const float *sin, float *y)
{
    float r = 1.0f;
    if (w) {
        float sum = 0.0f;
        for (uint32_t i = k_lane(); i < dims; i += K_WAVE)
            sum += src[i] * src[i];
        r = 1.0f / k_sqrt(k_wave_sum(sum) / (float)dims + eps);
    }
    for (uint32_t i = k_lane(); i < dims; i += K_WAVE)
        y[i] = w ? src[i] * r * w[i] : src[i];
    k_wave_sync();
    for (uint32_t i = k_lane(); i < rope_dims / 2; i += K_WAVE) {
        rope_pair p = rope_at(i, rope_dims, interleave);
        rotate(y[p.first], y[p.second], cos[i], sin[i]);
    }
    k_wave_sync();
}

K_KERNEL(gqa_write, td_k_gqa_write)
{
    uint32_t t = k_block();
    if (t >= a.step->n_rows)
        return;
    uint32_t dims = a.dims, kv = a.n_kv_heads;
    const float *cos = k_global(a.step->rope_cos) + (size_t)t * (a.rope_dims / 2),
                *sin = k_global(a.step->rope_sin) + (size_t)t * (a.rope_dims / 2);
    bool f8 = a.kv == TD_F8E4M3, bf16 = a.kv == TD_BF16;
    float *y = k_lds<float>() + (size_t)k_wave() * dims;
    for (uint32_t h = k_wave(); h < kv; h += K_WAVES) {
        const float *k = a.k + ((size_t)t * kv + h) * dims, *v = a.v + ((size_t)t * kv + h) * dims;
        head_into(k, a.k_norm, a.eps, dims, a.rope_dims, a.interleave, cos, sin, y);
        if (f8) {
            f8_row to =
                own_f8_row(a.step, t, a.layer_offset, 2 * kv * dims, a.scales_at, a.n_scales);
            uint32_t each = (dims + TD_KV_SCALE_GROUP - 1) / TD_KV_SCALE_GROUP;
            store_f8(to.codes + h * dims, to.scales + h * each, y, dims, 0, 1);
            store_f8(to.codes + (kv + h) * dims, to.scales + (kv + h) * each, v, dims, 0, 1);
        } else {
            void *row = own_row_of(a.step, t, a.layer_offset, 2 * kv * dims, bf16);
            for (uint32_t i = k_lane(); i < dims; i += K_WAVE) {
                store(row, bf16, h * dims + i, y[i]);
                store(row, bf16, (kv + h) * dims + i, v[i]);
            }
        }
        k_wave_sync();
    }
    for (uint32_t h = k_wave(); h < a.n_heads; h += K_WAVES) {
        float *q = a.q + ((size_t)t * a.n_heads + h) * dims;
        head_into(q, a.q_norm, a.eps, dims, a.rope_dims, a.interleave, cos, sin, y);
        for (uint32_t i = k_lane(); i < dims; i += K_WAVE)
            q[i] = y[i];
        k_wave_sync();
    }
}
