/* SPDX-License-Identifier: Apache-2.0 */
/* The op table: what a backend must do, and nothing about how. ref/ is the specification
 * (numerics.md is its law). Shape letters, used in every comment: T rows (tokens) of a step, D
 * hidden width, H heads, V vocabulary, E experts, I inner width of an MLP, C latent width, N nope
 * dims, R rope dims (R/2 pairs), Dh head width, B = 64 tokens of a block, S canonical K slices, K
 * reduced width, Q index_topk. A queue belongs to one thread. Errors are sticky in it and asked
 * once with finish(). */
#ifndef TD_KERNELS_KERNELS_H
#define TD_KERNELS_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"

typedef enum td_dtype { TD_F32, TD_BF16, TD_F16, TD_U8, TD_F8E4M3, TD_DTYPES } td_dtype;

/* "f32", "bf16", ...; and bytes of one element. */
const char *td_dtype_name(td_dtype t);
size_t td_dtype_bytes(td_dtype t);
/* Types of operands and of cached rows as options and profile name them: "f32", "bf16", "fp8"
 * (F8E4M3 with scales, kernels/kv_row.h). -1: another word. */
const char *td_row_type_name(td_dtype t);
int td_row_type(const char *word);

typedef struct td_queue
    td_queue; /* a backend's context: threads or stream, scratch, sticky error */
typedef struct td_tensor td_tensor; /* weights in the backend's own layout */
struct td_sample_row;               /* kernels/sample.h */

/* What rows a step has. Lives in the backend's memory; every pointer is the backend's. Idle
 * capacity is not touched. */
typedef struct td_step {
    uint32_t n_rows, n_seqs, n_logits;
    uint32_t max_context;      /* no position of this step is >= this */
    const uint32_t *ids;       /* [T] */
    const uint32_t *positions; /* [T] */
    const uint32_t *seq_of;    /* [T] row of tables */
    const uint32_t *tables;    /* [n_seqs][table_stride] block numbers */
    uint32_t table_stride;
    const uint32_t *logit_rows; /* [n_logits] rows whose logits are wanted */
    const float *rope_cos;      /* [T][R/2] */
    const float *rope_sin;
    uint8_t *kv_base; /* block b starts at kv_base + b * block_bytes */
    uint64_t block_bytes;
} td_step;

/* How a matrix [N][K] is kept, decided by the checkpoint's tensor:
 * F32, BF16: its values (F16 is kept as F32).
 * FP8: OCP e4m3fn and an f32 scale per 128 x 128 block, [ceil(N/128)][ceil(K/128)]; value =
 *      element * scale.
 * MXFP4: OCP e2m1 and an e8m0 scale per 32 elements of a row, [N][K/32]; value = element *
 *      2^(scale - 127). K is a multiple of 32. */
typedef enum td_weight_format {
    TD_W_F32,
    TD_W_BF16,
    TD_W_FP8,
    TD_W_MXFP4,
    TD_WEIGHT_FORMATS
} td_weight_format;

/* "f32", "bf16", "fp8", "mxfp4". */
const char *td_weight_format_name(td_weight_format f);

/* Where a weight's elements lie: element (slab, n, k) at base + (slab * slab_stride + n * n_stride
 * + k * k_stride) elements of dtype. So transposed and sliced views of a checkpoint's tensor load
 * without a copy. FP8: dtype F8E4M3, k_stride 1. MXFP4: dtype U8, two elements a byte, the even one
 * in the low nibble; n_stride in bytes. scales: the whole slab's, as td_weight_format says: a slab
 * that is a part of a checkpoint's FP8 matrix begins at multiples of 128 rows and columns. NULL for
 * F32, BF16, F16. */
typedef struct td_weight_src {
    td_dtype dtype;
    const void *base, *scales;
    size_t slab_stride, n_stride, k_stride;
} td_weight_src;

/* How a GEMM's output leaves. */
typedef enum td_epilogue {
    TD_EPI_F32,      /* out[i] f32 [T][..][N] */
    TD_EPI_OPERAND,  /* rounded to act: the operand of a later GEMM */
    TD_EPI_SILU_MUL, /* w[0] gate, w[1] up: out[0] = operand silu(gate) * up */
    TD_EPI_PARTIAL,  /* out[0] f32 [S][T][N], S = td_kplan_slices(K) (see moe for the one exception)
                      */
    TD_EPI_SUM       /* out[0] f32 [T][N]: PARTIAL and reduce_slices in one, where sums_slices */
} td_epilogue;

enum { TD_GEMM_OUTPUTS_MAX = 4 };

/* out_i[t, h, n] = sum over k of a[t, h, k] * w_i[h, n, k]. Without heads n_heads = 1. */
typedef struct td_gemm {
    const float *a;            /* operand, or f32 when a_round is set */
    uint32_t a_stride, a_head; /* elements between rows; between heads */
    int a_round;               /* round a to act on the way in */
    uint32_t n_heads;
    td_epilogue epilogue;
    uint32_t n_out;
    const td_tensor *w[TD_GEMM_OUTPUTS_MAX];
    float *out[TD_GEMM_OUTPUTS_MAX];
    uint32_t out_stride[TD_GEMM_OUTPUTS_MAX]; /* elements between rows */
    uint32_t out_head;                        /* elements between heads */
    uint32_t slices;                          /* TD_EPI_PARTIAL, TD_EPI_SUM: S */
} td_gemm;

typedef struct td_rope_form {
    int interleave; /* 1: pairs (2i, 2i+1); 0: pairs (i, i + R/2). Values stay where they were. */
    uint32_t dims;  /* R */
} td_rope_form;

/* Latent attention: norm and rope of the new rows, rounded into the pool; q_pe rotated in place. */
typedef struct td_mla_write {
    const float *kv_a;     /* [T][C + R] */
    const td_tensor *norm; /* [C] */
    float eps;
    float *q; /* [T][H][N + R]: the last R of each head are rotated */
    uint32_t n_heads, latent, nope;
    td_rope_form rope;
    td_dtype kv;           /* F32, BF16, F8E4M3: kernels/kv_row.h */
    uint64_t layer_offset; /* of the rows c[C] | k_pe[R] within a block */
} td_mla_write;

/* Indexer: key = LayerNorm(k), first R dims rotated, rounded into the pool; first R dims of each
 * query head rotated. */
typedef struct td_index_write {
    const float *k;               /* [T][Di] */
    const td_tensor *norm, *bias; /* [Di] */
    float eps;
    float *q; /* [T][Hi][Di] */
    uint32_t n_heads, dims;
    td_rope_form rope;
    td_dtype index;
    uint64_t layer_offset;
} td_index_write;

/* Scores I[t, s] = sum over heads of weight[t, h] * scale * relu(q[t, h] . key[s]) for s <= t; the
 * Q greatest by (score descending, position ascending), stored ascending. A row with t + 1 <= Q
 * selects every position. NaN: -EIO. */
typedef struct td_index_select {
    const float *q;      /* [T][Hi][Di] rotated */
    const float *weight; /* [T][Hi] */
    float scale;
    uint32_t n_heads, dims, topk;
    td_dtype index;
    uint64_t layer_offset;
    uint32_t *selected;   /* [T][Q] positions */
    uint32_t *n_selected; /* [T] */
    float *margin; /* NULL, or [T]: (k-th best - next) / largest |score|; +inf when nothing is left
                      out */
} td_index_select;

/* o_lat[t, h] = sum of softmax(scale * (q_lat . c + q_pe . k_pe)) * c over the selected positions,
 * in tiles of 64 ranks. */
typedef struct td_attend_mla {
    const float *q_lat; /* [T][H][C] */
    const float *q;     /* [T][H][N + R], q_pe rotated */
    float scale;
    uint32_t n_heads, latent, nope, rope_dims;
    td_dtype kv;
    uint64_t layer_offset;
    const uint32_t *selected; /* [T][topk]; NULL: every position <= t */
    const uint32_t *n_selected;
    uint32_t topk;
    float *o_lat; /* [T][H][C] */
} td_attend_mla;

/* Grouped-query attention: optional per-head RMSNorm of q and k, rope, rounding into the pool. */
typedef struct td_gqa_write {
    float *q;       /* [T][H][Dh], normed and rotated in place */
    const float *k; /* [T][Hkv][Dh] */
    const float *v;
    const td_tensor *q_norm, *k_norm; /* [Dh], or NULL */
    float eps;
    uint32_t n_heads, n_kv_heads, dims;
    td_rope_form rope;
    td_dtype kv;
    uint64_t layer_offset; /* of the rows k[Hkv][Dh] | v[Hkv][Dh] */
} td_gqa_write;

typedef struct td_attend_gqa {
    const float *q; /* [T][H][Dh] */
    float scale;
    uint32_t n_heads, n_kv_heads, dims;
    td_dtype kv;
    uint64_t layer_offset;
    float *o; /* operand [T][H][Dh] */
} td_attend_gqa;

/* Router: s = sigmoid(w . h) in f32; groups by the sum of their two greatest biased scores; the k
 * experts with the greatest s + bias, ties to the lower id, in that order; weight = s / (sum s +
 * 1e-20) * scale (normalised if norm). */
typedef struct td_route {
    const float *h;            /* f32 [T][D] */
    const td_tensor *w, *bias; /* [E][D], [E] */
    uint32_t n_experts, top_k, n_groups, top_groups;
    int norm;
    float scale;
    float *scores;     /* [T][E] s, kept for probes */
    uint32_t *experts; /* [T][k] */
    float *weights;    /* [T][k] */
    float *margin; /* NULL, or [T]: least margin of group and expert choice, relative to the largest
                      |biased score| */
} td_route;

/* Experts and the shared expert: partial[s][t] = sum over the row's experts in top-k order of
 * weight * down_e(act) on slice s, then the shared expert's. */
typedef struct td_moe {
    const float *a;          /* operand [T][D] */
    const uint32_t *experts; /* [T][k] */
    const float *weights;    /* [T][k] */
    uint32_t n_experts, top_k;
    const td_tensor *gate, *up, *down;                      /* E slabs: [I][D], [I][D], [D][I] */
    const td_tensor *shared_gate, *shared_up, *shared_down; /* NULL: no shared expert */
    uint32_t slices; /* smallest of the members' canonical slices */
    float *act;      /* work space, td_moe_act_elems() floats */
    float *partial;  /* [S][T][D] */
    float *out; /* NULL, or [T][D] where sums_slices: the slices' tree; partial is not written */
} td_moe;

typedef struct td_backend_options {
    td_dtype act; /* TD_F32 or TD_BF16: rounding of GEMM operands */
    int act_i8;   /* operands that meet MXFP4 weights become int8 in groups of 32 (act BF16 only) */
    int act_fp8;  /* ... become e4m3 in groups of 32 (kernels/hip/scaled.hpp), where act_fp8 */
    uint32_t n_threads; /* >= 1, the caller included */
    const int *cores; /* NULL = do not pin; else n_cores entries, thread i on cores[i % n_cores] */
    uint32_t n_cores;
    /* Capacities for scratch: rows of a step, positions, heads of an op, elements of a KV or index
     * row, and the reduced width of a GEMM with a_round. */
    uint32_t max_rows, max_context, max_heads, max_row_elems, max_round_k;
} td_backend_options;

/* What a backend adds whose memory the host cannot follow. KV blocks cross through page-locked
 * memory by copies that run beside the ops; the queue's thread asks for them, one after another, in
 * a stream of their own. Only copied() may be called on any thread. */
typedef struct td_transfer_ops {
    /* Page-locked host memory; NULL when out of memory. */
    void *(*host_alloc)(td_queue *q, size_t bytes);
    void (*host_free)(td_queue *q, void *p);
    /* Every byte = value, after everything queued before. */
    void (*fill)(td_queue *q, void *dst, uint8_t value, size_t bytes);
    /* Copies behind every op that was queued before the first of them since the last mark(). No op
     * waits for them: rows that come in may be read by ops that are queued when copied() has told
     * so, and rows that go out must not change before. 0, or -EIO: the copy will not be made. */
    int (*out)(td_queue *q, void *host, const void *src, size_t bytes);
    int (*in)(td_queue *q, void *dst, const void *host, size_t bytes);
    /* End of a group of copies: its number, from 1 ascending; 0: -EIO, it will never be told. */
    uint64_t (*mark)(td_queue *q);
    /* Is every copy before that mark made, and what it wrote visible? A device that failed never
     * says yes. Any thread; never blocks. */
    int (*copied)(const td_queue *q, uint64_t mark);
    /* Wait for all copies. 0, -EIO. */
    int (*wait)(td_queue *q);
} td_transfer_ops;

/* What a backend adds that can record the ops of a step once and run them again on other steps,
 * without a call for each. Recorded ops see a step that tells the most that later ones may have
 * (n_rows, n_seqs, n_logits, max_context); they read what a step really has when they run. */
typedef struct td_capture_ops {
    /* Ops are not run until end(): first a pass with dry set, which finds room for them, then the
     * same ops again, which are recorded. 0, negative errno. */
    int (*begin)(td_queue *q, int dry);
    /* ret_graph: NULL for a dry pass. The first error of an op, and nothing is kept. */
    int (*end)(td_queue *q, void **ret_graph);
    /* -ESTALE: an op has moved the room since; record again. */
    int (*replay)(td_queue *q, const td_step *s, void *graph);
    void (*free)(td_queue *q, void *graph);
} td_capture_ops;

enum { TD_BEHIND_MAX = 2 };

/* What a backend adds whose ops run behind the host, so that a step can be queued while the one
 * before it still runs. No op and no copy to the backend's memory waits, but where scratches grow;
 * a copy to it has read host memory when it returns. */
typedef struct td_behind_ops {
    /* As sample, without waiting: the id of rows[i] comes to lie at ids[i] in the backend's memory;
     * rows are not changed. Edits are read before it returns; one id that they do not count yet may
     * lie at rows[i].fed in the backend's memory. */
    void (*draw)(td_queue *q, struct td_sample_row *rows, uint32_t n, uint32_t *ids);
    /* Copy to page-locked memory (transfer.host_alloc); there when the step is waited for. */
    void (*bring)(td_queue *q, void *host, const void *src, size_t bytes);
    /* What was queued since the last seal, or finish, is one step, that drew n <= max_rows ids at
     * ids. At most TD_BEHIND_MAX are sealed and not waited for. 0, negative errno: not sealed. */
    int (*seal)(td_queue *q, const uint32_t *ids, uint32_t n);
    /* Wait for the step that was sealed first. ret_ids: what it drew; NULL: nobody wants to know.
     * 0, or its first error as finish() tells it. */
    int (*wait)(td_queue *q, uint32_t *ret_ids);
} td_behind_ops;

typedef struct td_backend {
    const char *name, *isa;
    int act_i8;      /* heeds td_backend_options.act_i8; others ignore it */
    int act_fp8;     /* knows td_backend_options.act_fp8; others must not be asked */
    int sums_slices; /* knows TD_EPI_SUM and td_moe.out */

    int (*open)(const td_backend_options *options, td_queue **ret_queue, td_err *reterr_err);
    void (*close)(td_queue *q);
    /* Wait for everything queued; the first error since the last call: 0, -EIO (NaN, device),
     * -ENOMEM. */
    int (*finish)(td_queue *q);

    /* Backend memory, zeroed, 64-byte aligned. NULL when out of memory. */
    void *(*mem_alloc)(td_queue *q, size_t bytes);
    void (*mem_free)(td_queue *q, void *p);
    /* Order: after everything queued before. Either side may be host memory. */
    void (*copy)(td_queue *q, void *dst, const void *src, size_t bytes);

    /* A weight of n_slabs matrices [N][K]; all bytes arrive by weight_fill, rows n0 .. n0 + n_rows
     * of one slab at a time. A source's dtype must be one that the format can hold exactly: F32
     * takes F32, BF16, F16. Different slabs may be filled by different threads. */
    int (*weight_new)(td_weight_format format, uint32_t n_slabs, uint32_t n, uint32_t k,
                      td_tensor **ret_w);
    void (*weight_fill)(td_tensor *w, uint32_t slab, uint32_t n0, uint32_t n_rows,
                        const td_weight_src *src);
    /* A vector of n f32 (norms, biases). */
    int (*vector_new)(uint32_t n, const td_weight_src *src, td_tensor **ret_w);
    void (*weight_free)(td_tensor *w);
    uint64_t (*weight_bytes)(const td_tensor *w);
    /* A packed model (engine/pack.h) keeps weights as this backend lays them out in memory. layout
     * names that form, NULL: it is not to be kept; raise its number whenever the form changes. A
     * matrix's weight_bytes bytes; and the same matrix over bytes that outlive it, 64-byte aligned:
     * -EINVAL when their number does not fit the shape. */
    const char *layout;
    const void *(*weight_packed)(const td_tensor *w);
    int (*weight_map)(td_weight_format format, uint32_t n_slabs, uint32_t n, uint32_t k,
                      const void *bytes, uint64_t n_bytes, td_tensor **ret_w);

    void (*embed)(td_queue *q, const td_step *s, const td_tensor *table, float *x);
    /* x += delta (when not NULL); out = operand of rmsnorm(x) * w; out_f32 (when not NULL) the same
     * before rounding. x [T][width]. */
    void (*add_norm)(td_queue *q, const td_step *s, float *x, const float *delta,
                     const td_tensor *w, float eps, uint32_t width, float *out, float *out_f32);
    void (*gemm)(td_queue *q, const td_step *s, const td_gemm *g);
    void (*mla_write)(td_queue *q, const td_step *s, const td_mla_write *a);
    void (*index_write)(td_queue *q, const td_step *s, const td_index_write *a);
    void (*index_select)(td_queue *q, const td_step *s, const td_index_select *a);
    void (*attend_mla)(td_queue *q, const td_step *s, const td_attend_mla *a);
    void (*gqa_write)(td_queue *q, const td_step *s, const td_gqa_write *a);
    void (*attend_gqa)(td_queue *q, const td_step *s, const td_attend_gqa *a);
    void (*route)(td_queue *q, const td_step *s, const td_route *a);
    void (*moe)(td_queue *q, const td_step *s, const td_moe *a);
    /* out[t][n] = ((p0 + p1) + (p2 + p3)) + ((p4 + p5) + (p6 + p7)) over partial [S][T][N]. */
    void (*reduce_slices)(td_queue *q, const td_step *s, const float *partial, uint32_t slices,
                          uint32_t n, float *out);
    /* logits[i] = head . h[logit_rows[i]] f32 [n_logits][V]. NaN: -EIO. */
    void (*logits)(td_queue *q, const td_step *s, const float *h, const td_tensor *head,
                   float *logits);
    /* rows[i] draws from its logits; kernels/sample.h. */
    void (*sample)(td_queue *q, struct td_sample_row *rows, uint32_t n);
    /* NULL: backend memory is host memory, and whoever is on this host may read and write it. */
    const td_transfer_ops *transfer;
    const td_capture_ops *capture; /* NULL: ops are calls, and cost as little */
    const td_behind_ops *behind;   /* NULL: ops are done when they return */
} td_backend;

/* Floats of td_moe.act for n_rows rows. */
static inline size_t td_moe_act_elems(uint32_t n_rows, uint32_t top_k, uint32_t inner,
                                      uint32_t shared_inner)
{
    return (size_t)n_rows * ((size_t)top_k * inner + shared_inner);
}

/* Backend for an --isa word: "auto" (or NULL) is the best that this machine has; "ref", "avx2",
 * "avx512", "avx512bf16vnni". NULL: unknown, or this machine lacks it. */
const td_backend *td_backend_get(const char *isa);
/* Is there a backend of that name, whether or not this machine can run it? */
int td_backend_known(const char *isa);
extern const td_backend td_backend_ref;

#endif
