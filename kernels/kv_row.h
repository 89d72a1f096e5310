/* SPDX-License-Identifier: Apache-2.0 */
/* How a layer's rows lie in a KV block, for every backend and for the layout: 64 rows of values
 * and, for FP8, [64][n_scales] f32 behind them, inside the layer's range.
 *
 * FP8 (TD_F8E4M3): elements are OCP e4m3fn. A row is a list of parts: MLA c[C] | k_pe[R]; GQA the k
 * heads [Dh], then the v heads [Dh]. Each part is cut into groups of 128 elements (its last may be
 * shorter), and each group has a scale; scales are in the order of the elements. Written:
 *   scale = largest magnitude / 448 in f32; below the least normal f32 it is 0
 *   element = e4m3fn(x / scale), to nearest even, at most 448 in magnitude; scale 0: element 0
 *   a group with a NaN or an infinity has a scale that is NaN or infinite, and reads as NaN
 * Read: BF16(element * scale), the product in f32 and rounded to nearest even. So whatever meets
 * FP8 rows meets BF16 values, in the kernel for BF16 rows. */
#ifndef TD_KERNELS_KV_ROW_H
#define TD_KERNELS_KV_ROW_H

#include <stddef.h>
#include <stdint.h>

#include "kernels/kernels.h"

enum { TD_KV_ROWS = 64, TD_KV_SCALE_GROUP = 128 };

typedef struct td_kv_row {
    uint32_t elems, n_scales; /* of a row; n_scales is 0 for types without scales */
    uint32_t bytes;           /* of a row's elements */
    uint64_t scales_at;       /* from the layer's begin to the scales of row 0 */
    uint64_t layer_bytes;     /* in a block */
} td_kv_row;

/* Scales of a part of n elements. */
static inline uint32_t td_kv_part_scales(td_dtype kv, uint32_t n)
{
    return kv == TD_F8E4M3 ? (n + TD_KV_SCALE_GROUP - 1) / TD_KV_SCALE_GROUP : 0;
}

static inline td_kv_row td_kv_row_of(td_dtype kv, uint32_t elems, uint32_t n_scales)
{
    td_kv_row r;
    r.elems = elems;
    r.n_scales = n_scales;
    r.bytes = elems * (uint32_t)td_dtype_bytes(kv);
    r.scales_at = (uint64_t)TD_KV_ROWS * r.bytes;
    r.layer_bytes = r.scales_at + (uint64_t)TD_KV_ROWS * n_scales * sizeof(float);
    return r;
}

/* c[latent] | k_pe[rope_dims] */
static inline td_kv_row td_kv_row_mla(td_dtype kv, uint32_t latent, uint32_t rope_dims)
{
    return td_kv_row_of(kv, latent + rope_dims,
                        td_kv_part_scales(kv, latent) + td_kv_part_scales(kv, rope_dims));
}

/* k[n_kv_heads][dims] | v[n_kv_heads][dims] */
static inline td_kv_row td_kv_row_gqa(td_dtype kv, uint32_t n_kv_heads, uint32_t dims)
{
    return td_kv_row_of(kv, 2 * n_kv_heads * dims, 2 * n_kv_heads * td_kv_part_scales(kv, dims));
}

/* key[dims] of the indexer */
static inline td_kv_row td_kv_row_index(td_dtype index, uint32_t dims)
{
    return td_kv_row_of(index, dims, td_kv_part_scales(index, dims));
}

#endif
