/* SPDX-License-Identifier: Apache-2.0 */
/* The one parameter of each kernel: filled by the host (kernels/gpu/backend.c), read on the device.
 * C and C++. step lies in device memory at a fixed address, so that a captured launch stays true.
 * Weights: see TD_K_TILE. "vec" promises that rows are multiples of 8 elements and 16-byte aligned.
 */
#ifndef TD_KERNELS_HIP_ARGS_H
#define TD_KERNELS_HIP_ARGS_H

#include "kernels/kernels.h"

/* A matrix [N][K] lies in tiles of 16 rows x 32 columns, [slab][N/16][K/32][(k/8)%4][n%16][k%8],
 * filled up with zeros: the 8 elements that a lane feeds to one matrix instruction are together,
 * and a wave's load is one contiguous run on every architecture. */
enum { TD_K_TILE_N = 16, TD_K_TILE_K = 32, TD_K_TILE = TD_K_TILE_N * TD_K_TILE_K };

/* LDS of the scaled matrix products: bytes of scales behind each tile of 16 rows x 128 k. */
enum { TD_K_MX_STEP = 128, TD_K_MX_SCALES = 64 };

/* Dynamic LDS of kernels whose need does not depend on shapes; limits of the router. */
enum {
    TD_K_LDS_PICK = 8448,
    TD_K_LDS_SAMPLE = 18688,
    TD_K_LDS_ROUTE = 12800,
    TD_K_EXPERTS_MAX = 1024,
    TD_K_CHOSEN_MAX = 64
};

/* FP8: a byte an element; scales f32 [slab][ceil(N/128)][scale_cols = ceil(K/128)].
 * MXFP4: tiles [n%16][k%32], two elements a byte, the even one low; scales e8m0
 * [slab][N/16][K/32][16]. */
typedef struct td_k_matrix {
    const void *data, *scales;
    uint32_t n, k, n_tiles, k_tiles, scale_cols;
    uint32_t format; /* td_weight_format */
} td_k_matrix;

typedef struct td_k_embed {
    const td_step *step;
    td_k_matrix table;
    float *x;
} td_k_embed;

typedef struct td_k_add_norm {
    const td_step *step;
    float *x;
    const float *delta, *w;
    float eps;
    uint32_t width, round;
    float *out, *out_f32;
} td_k_add_norm;

typedef struct td_k_reduce {
    const td_step *step;
    const float *partial;
    uint32_t slices, n;
    float *out;
} td_k_reduce;

typedef struct td_k_mla_write {
    const td_step *step;
    const float *kv_a, *norm;
    float eps;
    float *q;
    uint32_t n_heads, latent, nope, interleave, rope_dims, kv; /* td_dtype */
    uint32_t n_scales;                                         /* of a row (kernels/kv_row.h) */
    uint64_t layer_offset, scales_at;
} td_k_mla_write;

typedef struct td_k_index_write {
    const td_step *step;
    const float *k, *norm, *bias;
    float eps;
    float *q;
    uint32_t n_heads, dims, interleave, rope_dims, bf16;
    uint64_t layer_offset;
} td_k_index_write;

typedef struct td_k_gqa_write {
    const td_step *step;
    float *q;
    const float *k, *v, *q_norm, *k_norm;
    float eps;
    uint32_t n_heads, n_kv_heads, dims, interleave, rope_dims, kv; /* td_dtype */
    uint32_t n_scales;
    uint64_t layer_offset, scales_at;
} td_k_gqa_write;

typedef struct td_k_gemm {
    const td_step *step;
    const float *a;
    uint32_t a_stride, a_head, vec;
    uint32_t round_a, round_out; /* to BF16 */
    uint32_t n_heads, n_out, slices;
    td_k_matrix w[TD_GEMM_OUTPUTS_MAX];
    float *out[TD_GEMM_OUTPUTS_MAX];
    uint32_t out_stride[TD_GEMM_OUTPUTS_MAX], out_head;
    uint32_t of_logits; /* rows are step->logit_rows */
    int *error;         /* NULL, or set when an output is NaN */
} td_k_gemm;

/* Rows of the step sorted by expert, made by moe_sort and moe_tiles. A pair is row * top_k + slot.
 */
typedef struct td_k_moe_lists {
    uint32_t *pairs;  /* [T * k] by expert, then ascending */
    uint32_t *counts; /* [E] */
    uint32_t *firsts; /* [E] where an expert's pairs begin */
    uint32_t *tiles;  /* [tiles_max][2]: expert, first pair within it */
    uint32_t *n_tiles;
} td_k_moe_lists;

typedef struct td_k_moe_sort {
    const td_step *step;
    const uint32_t *experts;
    uint32_t n_experts, top_k, tile_rows;
    td_k_moe_lists to;
} td_k_moe_sort;

/* moe_up: act = silu(gate . a) * (up . a). moe_down: out[slice - slice0][pair] = w[0] . act. */
typedef struct td_k_moe {
    const td_step *step;
    const float *a;
    uint32_t a_stride, vec, round_out, top_k, inner, slices, slice0, n_slices;
    td_k_matrix w[2];
    td_k_moe_lists lists;
    float *out;
    uint32_t out_stride;
} td_k_moe;

typedef struct td_k_moe_combine {
    const td_step *step;
    const float *y; /* [n_slices][T * k][N] */
    const float *weights;
    uint32_t n, top_k, slice0, n_slices, shared; /* shared: partial holds the shared expert's */
    float *partial;
} td_k_moe_combine;

typedef struct td_k_route {
    const td_step *step;
    const float *bias;
    uint32_t n_experts, top_k, n_groups, top_groups, norm;
    float scale;
    float *scores; /* in: logits; out: their sigmoid */
    uint32_t *experts;
    float *weights, *margin;
} td_k_route;

/* One block: a row, up to 16 heads that share keys, a split of the row's list. */
typedef struct td_k_attend {
    const td_step *step;
    const float *q0, *q1; /* the query is q0's dims, then q1's */
    uint32_t q0_dims, q0_row, q0_head, q1_dims, q1_row, q1_head, q1_at;
    float scale;
    uint32_t n_heads, n_groups, group_heads;
    uint32_t key_dims, value_dims;
    uint32_t row_elems, key_at, value_at, group_step; /* elements of a pool row */
    uint32_t vec;
    uint64_t layer_offset, scales_at; /* scales_at .. group_scales: FP8 */
    uint32_t n_scales;                /* of a row */
    uint32_t key_part, value_scale;   /* dims of a key's first part; first scale of the values */
    uint32_t group_scales;            /* scales of a group's key */
    const uint32_t *selected, *n_selected;
    uint32_t topk;
    uint32_t row0, n_rows, n_splits; /* rows of this launch */
    float *part_o, *part_ml;         /* [rows][H][splits][value_dims]; [..][2] */
    float *out;                      /* attend_merge: [T][H][value_dims] */
    uint32_t round_out;
} td_k_attend;

typedef struct td_k_index {
    const td_step *step;
    const float *q, *weight;
    float scale;
    uint32_t n_heads, dims, topk, vec;
    uint64_t layer_offset;
    uint32_t row0, n_rows, n_blocks, stride; /* rows of this launch; key blocks; floats of a row */
    float *scores;                           /* [n_rows][stride] */
    uint32_t *selected, *n_selected;
    float *margin;
    int *error;
} td_k_index;

/* A row of the sampler; pointers are the device's. */
typedef struct td_k_draw {
    const float *logits;
    uint32_t vocab, top_k;
    float temperature, top_p, min_p;
    float frequency_penalty, presence_penalty, repetition_penalty;
    uint64_t random, least; /* least: min_p as a weight */
    uint64_t top_p_bits;    /* top_p as a 63-bit fraction; 0 = off */
    const struct td_logit_edit *edits;
    uint32_t n_edits;
    const uint32_t *fed; /* NULL, or an id that was emitted once more than the edits say */
    uint32_t *id;
    float *x;    /* [vocab] */
    uint64_t *w; /* [vocab] */
} td_k_draw;

typedef struct td_k_sample {
    const td_k_draw *rows;
} td_k_sample;

#endif
