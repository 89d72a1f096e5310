/* SPDX-License-Identifier: Apache-2.0 */
/* K plans: the constants that fix the expression tree of every output element (numerics, rules 1,
 * 2, 5, 12). They are part of the numerics profile; changing one changes bits and raises the op's
 * revision in profile.c. Launch plans (tiles, threads) are not here: they never change a bit. */
#ifndef TD_KERNELS_KPLAN_H
#define TD_KERNELS_KPLAN_H

#include <stdint.h>

enum {
    TD_KPLAN_GEMM_BLOCK = 256, /* a dot product is a chain per block of this many k; block sums are
                                  added left to right */
    TD_KPLAN_SLICES_MAX = 8,   /* canonical K slices of row-parallel products */
    TD_KPLAN_SLICE_UNIT = 32,  /* K / slices is a multiple of this */
    TD_KPLAN_NORM_LANES = 16, /* a row reduction keeps 16 partial sums (element i in lane i mod 16),
                                 joined by a tree */
    TD_KPLAN_ATTN_TILE = 64,  /* ranks in one attention tile */
    TD_KPLAN_ATTN_SPLIT = 8,  /* tiles in one split */
};

/* Canonical slices for a reduction over k: largest power of two <= 8 with k / S a multiple of 32,
 * else 1. */
static inline uint32_t td_kplan_slices(uint32_t k)
{
    uint32_t s = TD_KPLAN_SLICES_MAX;
    while (s > 1 && (k % s || (k / s) % TD_KPLAN_SLICE_UNIT))
        s /= 2;
    return s;
}

#endif
