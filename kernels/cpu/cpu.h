/* SPDX-License-Identifier: Apache-2.0 */
/* Inside of the CPU backend: one set of drivers in plain C, and one table of register kernels for
 * each instruction set. Matrices are packed once, lanes across outputs: panels of 16 outputs, k
 * outermost, so GEMV, small M and GEMM are launch plans over one layout and one expression tree.
 * Everything small (norms, rows into the pool, the choice of experts) is the reference's own
 * code. */
#ifndef TD_KERNELS_CPU_CPU_H
#define TD_KERNELS_CPU_CPU_H

#include <stddef.h>
#include <stdint.h>

#include "kernels/kernels.h"
#include "kernels/ref/ref.h"

enum {
    CPU_ROWS_MAX = 12,    /* rows of a register tile */
    CPU_PANELS_MAX = 8,   /* panels of a register tile */
    CPU_PANELS_MANY = 4,  /* panels that many rows meet together: their block stays in L1 and L2 */
    CPU_CHUNK_TILES = 16, /* tiles of rows that a thread keeps sums of */
    /* sums of such a chunk, twice: gate and up. Or four times of half as many panels (many rows
     * meet two at a time): the levels of eight slices' tree */
    CPU_WORK_FLOATS = 2 * CPU_CHUNK_TILES * CPU_ROWS_MAX * CPU_PANELS_MANY * LANES,
    CPU_AHEAD = 8192,         /* bytes that are asked for in advance, of all panels of a tile */
    CPU_COST_ALONE = 1 << 16, /* products: below, waking a thread costs more than it brings */
};

/* How a panel meets a row: the weights' format, then the activations': f32 (FMA), BF16 pairs
 * (vdpbf16ps), int8 in groups of 32. */
typedef enum cpu_path {
    CPU_F32,
    CPU_BF16_F32,
    CPU_BF16,
    CPU_MX_F32,
    CPU_MX_BF16,
    CPU_MX_I8,
    CPU_FP8_F32,
    CPU_FP8_BF16,
    CPU_PATHS
} cpu_path;

enum { CPU_I8_WORDS = 10 }; /* of a group: 8 of int8, scale, -12 times the sum */

/* rows x panels over one K block: sum[r][p * 16 + lane] = (first ? 0 : sum) + the block's chain,
 * which starts at zero. */
typedef struct cpu_tile {
    const uint8_t *w;      /* first panel, at the block's first k; 64-byte aligned */
    const uint8_t *scales; /* FP8: 16 floats; MXFP4: 16 e8m0 a group */
    size_t w_stride;       /* bytes between panels */
    size_t scale_stride;   /* bytes between panels' scales */
    size_t w_left;         /* bytes from w to the end of its panel */
    size_t ahead;          /* bytes of a panel that memory should be asked for in advance */
    const void *a;         /* the tile's rows side by side: [word][rows] */
    uint32_t a_rows; /* rows that lie side by side; more than the tile's where it takes some */
    uint32_t steps;  /* of this block: words of a row; MXFP4: groups; FP8: quads of k */
    float *sum;      /* 64-byte aligned */
    size_t sum_stride;
    int first;
} cpu_tile;

typedef void (*cpu_tile_fn)(const cpu_tile *t);

/* A block of quantised weights, from `lines` times 64 bytes of each panel to words: f32 or BF16
 * pairs of 16 outputs, or u8 quads, in the order in which rows have theirs. */
typedef struct cpu_unpack {
    const uint8_t *w;
    size_t w_stride, w_left, ahead; /* as a tile's */
    uint32_t panels, lines;
    uint8_t *words; /* [word][panels] times 64 bytes, 64-byte aligned */
} cpu_unpack;

enum {
    CPU_WORDS_PANEL = 8192,              /* bytes that a panel's words may take */
    CPU_WORDS_MAX = 2 * CPU_WORDS_PANEL, /* two panels: half of a small first cache */
};

/* One row of add_norm. */
typedef struct cpu_norm {
    float *x, *out, *out_f32;
    const float *delta, *w;
    float eps;
    uint32_t width;
    int round; /* out to BF16 */
} cpu_norm;

/* What one instruction set brings. tile[path][rows - 1][log2(panels)]: NULL where registers do not
 * suffice; one panel always exists up to rows. */
typedef struct cpu_kernels {
    const char *isa;
    uint32_t rows; /* of the largest tile */
    int dot_bf16;  /* has CPU_BF16 */
    cpu_tile_fn tile[CPU_PATHS][CPU_ROWS_MAX][4];
    /* Many rows: unpack a block once, then tiles over its words, of one or two panels. From how
     * many rows on; 0: this path has nothing to unpack. words_rows: of the largest of these tiles.
     */
    uint32_t words_from[CPU_PATHS], words_rows[CPU_PATHS];
    void (*unpack[CPU_PATHS])(const cpu_unpack *u);
    cpu_tile_fn words[CPU_PATHS][CPU_ROWS_MAX][2];
    /* n words of BF16 pairs from 2 n floats, to nearest even */
    void (*to_bf16)(const float *src, uint32_t *dst, size_t n_words);
    /* CPU_I8_WORDS of 32 floats */
    void (*to_i8)(const float *src, uint32_t *dst);
    /* The reference's bits. */
    void (*add_norm)(const cpu_norm *a);
} cpu_kernels;

extern const cpu_kernels td_cpu_avx2, td_cpu_avx512, td_cpu_avx512bf16;

/* A weight. v.data of a matrix is unused; a vector (v.k = 0) is v alone. */
typedef struct cpu_tensor {
    td_tensor v;
    size_t panel_bytes; /* from one panel to the next */
    size_t codes_at;    /* within a panel, behind FP8 [K/128][16] f32, MXFP4 [K/32][16] e8m0 */
    uint8_t *packed;    /* [slabs][n_panels][panel_bytes] */
    size_t map_bytes;   /* 0: from the heap */
    int borrowed;       /* packed belongs to someone else and is read-only */
} cpu_tensor;

typedef struct cpu_queue {
    td_queue q;
    const cpu_kernels *kernels;
    uint32_t *operand; /* packed rows of the op that runs */
    size_t operand_words;
    float *work; /* one piece for each thread */
    size_t work_floats;
    uint32_t *lists; /* moe: who goes where */
    size_t list_words;
} cpu_queue;

static inline const cpu_tensor *cpu_tensor_of(const td_tensor *w)
{
    return (const cpu_tensor *)w;
}

static inline cpu_queue *cpu_queue_of(td_queue *q)
{
    return (cpu_queue *)q;
}

static inline float *cpu_work(const cpu_queue *c, uint32_t thread)
{
    return c->work + thread * c->work_floats;
}

static inline uint32_t cpu_lanes(const td_tensor *w, uint32_t panel, uint32_t count)
{
    uint32_t left = w->n - panel * LANES, room = count * LANES;
    return left < room ? left : room;
}

/* Grow scratch; what was in it is lost. 0, or -ENOMEM, which is also kept in the queue. */
int td_cpu_need_work(cpu_queue *c, size_t floats_per_thread);
int td_cpu_need_operand(cpu_queue *c, size_t words);
int td_cpu_need_lists(cpu_queue *c, size_t words);

/* td_pool_run, or all on this thread when the products are fewer than CPU_COST_ALONE. */
void td_cpu_run(cpu_queue *c, td_pool_fn fn, void *arg, uint32_t n_items, size_t cost);
/* Panels that one item takes. */
uint32_t td_cpu_group(const cpu_queue *c, uint32_t rows, uint32_t panels);

/* Rows as tiles want them: tile i has rows [i * n / n_tiles, (i + 1) * n / n_tiles), stored behind
 * each other, each [step][rows of the tile]. */
typedef struct cpu_rows {
    const uint32_t *words;
    uint32_t n, n_tiles, steps; /* steps: words of a row */
} cpu_rows;

static inline uint32_t cpu_tile_row(const cpu_rows *r, uint32_t tile)
{
    return (uint32_t)((uint64_t)tile * r->n / r->n_tiles);
}

cpu_path td_cpu_path(const cpu_queue *c, const td_tensor *w, int operand_is_act);
/* Words of a row of k elements. */
uint32_t td_cpu_words(cpu_path path, uint32_t k);
cpu_rows td_cpu_rows(const cpu_queue *c, const uint32_t *words, uint32_t n, uint32_t steps);
/* Fill one tile: row i of the set is at a + index * stride, index = list ? list[i] : i. round: to
 * BF16 first (paths whose activations stay f32 ask; the others round to their own form). */
typedef struct cpu_source {
    const float *a;
    size_t stride;
    const uint32_t *list;
    uint32_t k;
    int round;
} cpu_source;
void td_cpu_pack_tile(const cpu_kernels *kernels, cpu_path path, const cpu_source *src,
                      const cpu_rows *rows, uint32_t tile, uint32_t *words);

/* sums[row - first row of tile0][sum_stride]: tiles [tile0, tile1) of rows by panels [panel, panel
 * + count) of a slab, over [k0, k1). sum_stride >= count * 16, a multiple of 16. */
typedef struct cpu_product {
    const cpu_kernels *kernels;
    cpu_path path;
    const cpu_tensor *w;
    uint32_t slab, panel, count, k0, k1;
    const cpu_rows *rows;
    uint32_t tile0, tile1;
    size_t sum_stride;
} cpu_product;
/* Panels that a register tile of this many rows takes. Slices of K are best asked for so many
 * panels at a time: then memory sees each panel once, in one go. */
uint32_t td_cpu_width(const cpu_kernels *kernels, cpu_path path, const cpu_rows *rows);
void td_cpu_multiply(const cpu_product *p, float *sums);

/* weights.c */
int td_cpu_weight_new(td_weight_format format, uint32_t n_slabs, uint32_t n, uint32_t k,
                      td_tensor **ret_w);
void td_cpu_weight_fill(td_tensor *w, uint32_t slab, uint32_t n0, uint32_t n_rows,
                        const td_weight_src *src);
int td_cpu_vector_new(uint32_t n, const td_weight_src *src, td_tensor **ret_w);
void td_cpu_weight_free(td_tensor *w);
uint64_t td_cpu_weight_bytes(const td_tensor *w);
const void *td_cpu_weight_packed(const td_tensor *w);
int td_cpu_weight_map(td_weight_format format, uint32_t n_slabs, uint32_t n, uint32_t k,
                      const void *bytes, uint64_t n_bytes, td_tensor **ret_w);
/* k values of row n of slab 0. */
void td_cpu_weight_row(const td_tensor *w, uint32_t n, float *ret_row);

/* Ops. */
void td_cpu_add_norm(td_queue *q, const td_step *s, float *x, const float *delta,
                     const td_tensor *w, float eps, uint32_t width, float *out, float *out_f32);
void td_cpu_embed(td_queue *q, const td_step *s, const td_tensor *table, float *x);
void td_cpu_gemm(td_queue *q, const td_step *s, const td_gemm *g);
void td_cpu_logits(td_queue *q, const td_step *s, const float *h, const td_tensor *head,
                   float *logits);
void td_cpu_route(td_queue *q, const td_step *s, const td_route *a);
void td_cpu_moe(td_queue *q, const td_step *s, const td_moe *a);
void td_cpu_index_select(td_queue *q, const td_step *s, const td_index_select *a);
void td_cpu_attend_mla(td_queue *q, const td_step *s, const td_attend_mla *a);
void td_cpu_attend_gqa(td_queue *q, const td_step *s, const td_attend_gqa *a);

#endif
