/* SPDX-License-Identifier: Apache-2.0 */
/* Inside of attention and indexer: what an instruction set brings. Lanes lie across keys, or across
 * the columns of a value; a score is a chain of FMA per 64 dims, and these blocks are added left to
 * right; a value is one chain over ranks. So every shape of register tile, and AVX2 and AVX-512,
 * give equal bits. */
#ifndef TD_KERNELS_CPU_ATTEND_H
#define TD_KERNELS_CPU_ATTEND_H

#include <stddef.h>
#include <stdint.h>

#include "kernels/cpu/cpu.h"

enum {
    ATTEND_TILE = TD_KPLAN_ATTN_TILE,
    ATTEND_DIMS = 64, /* of a chain: part of the K plan of this backend */
    ATTEND_FEW = 8,   /* queries that meet BF16 rows straight from where they lie */
};

typedef struct cpu_attend {
    /* n values of BF16 to f32. */
    void (*widen)(const uint8_t *src, float *dst, uint32_t n);
    /* n elements of FP8 times scale, as BF16 (kernels/kv_row.h); dst has room for a multiple of 16.
     */
    void (*unpack)(const uint8_t *src, float scale, uint32_t n, uint8_t *dst);
    /* n values, BF16 or f32, at bytes behind the begin of each of 64 rows become columns:
     * dst[d][row], d < n rounded up to 32. */
    void (*turn)(const uint8_t *const *rows, size_t at, uint32_t n, int bf16, float *dst);
    /* p[i][r] = (the sum so far, unless first, + q[i] . k[.][r] over n <= ATTEND_DIMS dims) *
     * scale, for 64 columns r of k [n][64]; p rows of 64. */
    void (*dots)(const float *q, size_t q_stride, uint32_t n_q, const float *k, uint32_t n,
                 int first, float scale, float *p);
    /* Both for at most ATTEND_FEW queries and BF16 rows, whose values never touch memory again:
     * p[i][r] = q[i] . row r * scale over all dims, a multiple of 16, at bytes behind each row's
     * begin. NULL: an instruction set without the registers for it. */
    void (*few_scores)(const float *q, size_t q_stride, uint32_t n_q, const uint8_t *const *rows,
                       size_t at, uint32_t dims, float scale, float *p);
    /* As values; blocks of 16 columns at bytes behind each row's begin. */
    void (*few_values)(const float *p, const uint32_t *n, uint32_t n_q, const float *alpha,
                       const uint8_t *const *rows, size_t at, uint32_t blocks, float *o,
                       size_t o_stride);
    /* For each query: m = max(m, p[0 .. n)); p -= m; p = -infinity from n on; alpha = old m - m. */
    void (*shift)(float *p, const uint32_t *n, uint32_t n_q, float *m, float *alpha);
    /* l = l * alpha + the sum of p[0 .. 64). */
    void (*total)(const float *p, uint32_t n_q, const float *alpha, float *l);
    /* o[i] = o[i] * alpha[i] + sum over ranks r < n[i], in order, of p[i][r] * v[r]. */
    void (*values)(const float *p, const uint32_t *n, uint32_t n_q, const float *alpha,
                   const float *v, size_t v_stride, uint32_t blocks, float *o, size_t o_stride);
    /* o = o * x + add * y over n elements, a multiple of 16. */
    void (*merge)(float *o, float x, const float *add, float y, uint32_t n);
    /* out = o / l over n elements, a multiple of 16 or the end of a row of o. */
    void (*divide)(const float *o, float l, float *out, uint32_t n);
    /* Indexer: out[0 .. 64) = sum over heads in order of w[h] * max(dots[h], 0). 1: a NaN among the
     * first n. */
    int (*combine)(const float *dots, const float *w, uint32_t n_heads, uint32_t n, float *out);
    /* Order-preserving integers of n scores; -0 counts as +0. Room for 16 more. */
    void (*keys)(const float *v, uint32_t *ret_keys, uint32_t n);
    /* Positions of the keys above thr, and of the first n_ties that equal it, ascending; returns
     * how many. At most room. Reads up to 15 keys past n. */
    uint32_t (*pick)(const uint32_t *keys, uint32_t n, uint32_t thr, uint32_t n_ties, uint32_t *out,
                     uint32_t room);
} cpu_attend;

extern const cpu_attend td_cpu_attend_avx2, td_cpu_attend_avx512;

/* The loops of a queue's instruction set. */
const cpu_attend *td_cpu_attend_of(const cpu_queue *c);

/* Rows that may share tiles: row t + 1 sits at the next position of row t's sequence. */
static inline int attend_follows(const td_step *s, uint32_t t)
{
    return s->seq_of[t + 1] == s->seq_of[t] && s->positions[t + 1] == s->positions[t] + 1;
}

static inline size_t attend_pad(size_t n)
{
    return (n + 15) / 16 * 16;
}

/* A block of dims that turn() fills and dots() reads before the next: it never leaves the first
 * cache. */
enum { ATTEND_TURNED = ATTEND_DIMS * ATTEND_TILE };

/* p[i][r] = q[i] . row r * scale over all dims, which begin at bytes behind each row's begin. */
static inline void attend_scores(const cpu_attend *f, const uint8_t *const *rows, size_t at,
                                 uint32_t dims, td_dtype type, float *turned, const float *q,
                                 size_t q_stride, uint32_t n_q, float scale, float *p)
{
    if (f->few_scores && type == TD_BF16 && n_q <= ATTEND_FEW && dims % 16 == 0) {
        f->few_scores(q, q_stride, n_q, rows, at, dims, scale, p);
        return;
    }
    for (uint32_t d = 0; d < dims; d += ATTEND_DIMS) {
        uint32_t n = dims - d < ATTEND_DIMS ? dims - d : ATTEND_DIMS;
        f->turn(rows, at + d * td_dtype_bytes(type), n, type == TD_BF16, turned);
        f->dots(q + d, q_stride, n_q, turned, n, d == 0, d + n == dims ? scale : 1.0f, p);
    }
}

/* An odd number of cache lines, so that a column of a tile meets every set of the cache. */
static inline size_t attend_stride(size_t n)
{
    return ((n + 15) / 16 | 1) * 16;
}

#endif
