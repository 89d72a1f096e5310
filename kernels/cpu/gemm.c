/* SPDX-License-Identifier: Apache-2.0 */
/* Matrix products: rows are laid side by side for the register tiles once an op, then panels are
 * handed out to threads in pieces. One row, few rows and many rows differ only in the tile: the
 * tree of an output is the K plan's. */
#include <emmintrin.h>
#include <errno.h>

#include "kernels/cpu/cpu.h"
#include "kernels/formats.h"
#include "kernels/math.h"

#include "base/banned.h"

/* What one path knows of its words: how many elements and words make a unit that is packed at
 * once, bytes of a panel for each k (of 16 outputs), elements of a tile's step, and of a word. */
static const struct form {
    uint32_t unit, unit_words, panel_bytes, step, word;
} forms[CPU_PATHS] = {
    [CPU_F32] = {1, 1, 64, 1, 1},       [CPU_BF16_F32] = {2, 2, 32, 1, 1},
    [CPU_BF16] = {2, 1, 32, 2, 2},      [CPU_MX_F32] = {32, 32, 8, 32, 1},
    [CPU_MX_BF16] = {32, 16, 8, 32, 2}, [CPU_MX_I8] = {32, CPU_I8_WORDS, 8, 32, 4},
    [CPU_FP8_F32] = {4, 4, 16, 4, 1},   [CPU_FP8_BF16] = {4, 2, 16, 4, 2},
};

cpu_path td_cpu_path(const cpu_queue *c, const td_tensor *w, int operand_is_act)
{
    int act = operand_is_act && c->q.o.act == TD_BF16, dot = act && c->kernels->dot_bf16;
    switch (w->format) {
    case TD_W_MXFP4:
        return act && c->q.o.act_i8 ? CPU_MX_I8 : dot ? CPU_MX_BF16 : CPU_MX_F32;
    case TD_W_FP8:
        return dot ? CPU_FP8_BF16 : CPU_FP8_F32;
    case TD_W_BF16:
        return dot ? CPU_BF16 : CPU_BF16_F32;
    default:
        return CPU_F32;
    }
}

uint32_t td_cpu_words(cpu_path path, uint32_t k)
{
    const struct form *f = &forms[path];
    return (k + f->unit - 1) / f->unit * f->unit_words;
}

cpu_rows td_cpu_rows(const cpu_queue *c, const uint32_t *words, uint32_t n, uint32_t steps)
{
    uint32_t most = c->kernels->rows;
    return (cpu_rows){words, n, (n + most - 1) / most, steps};
}

/* Elements of a row that are laid out at a time, a multiple of every unit; and their words. */
enum { CHUNK_ELEMS = 128, CHUNK = 128 };

/* dst[step][rows] = src[row][step]. */
static void interleave(uint32_t (*src)[CHUNK], uint32_t rows, uint32_t n, uint32_t *dst)
{
    uint32_t r = 0;
    for (; r + 4 <= rows; r += 4) {
        uint32_t j = 0;
        for (; j + 4 <= n; j += 4) {
            __m128i a = _mm_loadu_si128((const __m128i *)(src[r] + j)),
                    b = _mm_loadu_si128((const __m128i *)(src[r + 1] + j)),
                    c = _mm_loadu_si128((const __m128i *)(src[r + 2] + j)),
                    d = _mm_loadu_si128((const __m128i *)(src[r + 3] + j));
            __m128i ab = _mm_unpacklo_epi32(a, b), cd = _mm_unpacklo_epi32(c, d),
                    ab2 = _mm_unpackhi_epi32(a, b), cd2 = _mm_unpackhi_epi32(c, d);
            uint32_t *to = dst + (size_t)j * rows + r;
            _mm_storeu_si128((__m128i *)to, _mm_unpacklo_epi64(ab, cd));
            _mm_storeu_si128((__m128i *)(to + rows), _mm_unpackhi_epi64(ab, cd));
            _mm_storeu_si128((__m128i *)(to + 2ul * rows), _mm_unpacklo_epi64(ab2, cd2));
            _mm_storeu_si128((__m128i *)(to + 3ul * rows), _mm_unpackhi_epi64(ab2, cd2));
        }
        for (; j < n; j++)
            for (uint32_t i = 0; i < 4; i++)
                dst[(size_t)j * rows + r + i] = src[r + i][j];
    }
    for (; r < rows; r++)
        for (uint32_t j = 0; j < n; j++)
            dst[(size_t)j * rows + r] = src[r][j];
}

/* Words of pairs (0, 1), (2, 3): as (0, 2), (1, 3). MXFP4 takes those of 8 k as (0, 2), (4, 6), (1,
 * 3), (5, 7): the order in which its nibbles come out. */
static void reorder_pairs(cpu_path path, uint32_t *words, uint32_t n)
{
    for (uint32_t i = 0; i < n; i += 2) {
        uint32_t a = words[i], b = words[i + 1];
        words[i] = (a & 0xffffu) | b << 16;
        words[i + 1] = a >> 16 | (b & 0xffff0000u);
    }
    for (uint32_t i = 1; path == CPU_MX_BF16 && i < n; i += 4) {
        uint32_t x = words[i];
        words[i] = words[i + 1];
        words[i + 1] = x;
    }
}

/* n elements at a, a whole number of units, as words. */
static void take_words(const cpu_kernels *kernels, cpu_path path, const float *a, int round,
                       uint32_t n, uint32_t *dst)
{
    switch (path) {
    case CPU_BF16:
        kernels->to_bf16(a, dst, n / 2);
        return;
    case CPU_MX_BF16:
    case CPU_FP8_BF16:
        kernels->to_bf16(a, dst, n / 2);
        reorder_pairs(path, dst, n / 2);
        return;
    case CPU_MX_I8:
        for (uint32_t i = 0; i < n; i += 32, dst += CPU_I8_WORDS)
            kernels->to_i8(a + i, dst);
        return;
    default:
        memcpy(dst, a, n * sizeof *dst);
        for (uint32_t i = 0; round && i < n; i++)
            dst[i] = (uint32_t)ref_f32_to_bf16(a[i]) << 16;
    }
}

void td_cpu_pack_tile(const cpu_kernels *kernels, cpu_path path, const cpu_source *src,
                      const cpu_rows *rows, uint32_t tile, uint32_t *words)
{
    uint32_t r0 = cpu_tile_row(rows, tile), n = cpu_tile_row(rows, tile + 1) - r0;
    uint32_t *dst = words + (size_t)r0 * rows->steps, part[CPU_ROWS_MAX][CHUNK];
    for (uint32_t at = 0; at < src->k; at += CHUNK_ELEMS) {
        uint32_t len = src->k - at < CHUNK_ELEMS ? src->k - at : CHUNK_ELEMS,
                 whole = (len + forms[path].unit - 1) / forms[path].unit * forms[path].unit,
                 n_words = td_cpu_words(path, len);
        for (uint32_t r = 0; r < n; r++) {
            uint32_t row = src->list ? src->list[r0 + r] : r0 + r;
            const float *a = src->a + row * src->stride + at;
            float padded[CHUNK_ELEMS];
            if (len < whole) { /* zeros behind the last element */
                memset(padded, 0, sizeof padded);
                memcpy(padded, a, len * sizeof *a);
                a = padded;
            }
            take_words(kernels, path, a, src->round, whole, n == 1 ? dst : part[r]);
        }
        if (n > 1)
            interleave(part, n, n_words, dst);
        dst += (size_t)n_words * n;
    }
}

/* Are these rows many enough that weights are unpacked once for all of them? */
static int takes_words(const cpu_kernels *kernels, cpu_path path, uint32_t rows)
{
    return kernels->words_from[path] && rows >= kernels->words_from[path];
}

/* The widest tile of this path that rows and what is left of the panels allow. */
static cpu_tile_fn widest(const cpu_product *p, uint32_t rows, uint32_t left, uint32_t *ret_panels)
{
    int words = takes_words(p->kernels, p->path, p->rows->n);
    const cpu_tile_fn *fn =
        words ? p->kernels->words[p->path][rows - 1] : p->kernels->tile[p->path][rows - 1];
    uint32_t i = words ? 1 : 3;
    while (!fn[i] || 1u << i > left)
        i--;
    *ret_panels = 1u << i;
    return fn[i];
}

/* Tiles that read words take fewer rows than lie side by side, where registers want it so. */
static uint32_t rows_at_once(const cpu_product *p, uint32_t rows)
{
    uint32_t most = takes_words(p->kernels, p->path, p->rows->n) ? p->kernels->words_rows[p->path]
                                                                 : p->kernels->rows;
    uint32_t parts = (rows + most - 1) / most;
    return (rows + parts - 1) / parts;
}

uint32_t td_cpu_width(const cpu_kernels *kernels, cpu_path path, const cpu_rows *rows)
{
    cpu_product p = {.kernels = kernels, .path = path, .rows = rows};
    uint32_t width;
    widest(&p, rows_at_once(&p, (rows->n + rows->n_tiles - 1) / rows->n_tiles), CPU_PANELS_MAX,
           &width);
    return width;
}

/* Where the block that begins at `at` ends. A chain is never longer than its block (K plan); an
 * MXFP4 chain is a group, so there a block is only what many rows should find in the cache. */
static uint32_t block_end(const cpu_product *p, uint32_t at)
{
    uint32_t end = at + TD_KPLAN_GEMM_BLOCK;
    if (p->path == CPU_FP8_F32 || p->path == CPU_FP8_BF16)
        end = at / TD_FP8_BLOCK * TD_FP8_BLOCK + TD_FP8_BLOCK;
    else if (forms[p->path].step == TD_MX_GROUP && takes_words(p->kernels, p->path, p->rows->n))
        end = at + CPU_WORDS_PANEL / 64 * forms[p->path].word;
    else if (forms[p->path].step == TD_MX_GROUP && p->tile1 - p->tile0 == 1)
        end = p->k1;
    return end < p->k1 ? end : p->k1;
}

static const uint8_t *scales_of(const cpu_product *p, uint32_t at)
{
    size_t bytes = p->w->v.format == TD_W_FP8 ? (size_t)(at / TD_FP8_BLOCK) * LANES * sizeof(float)
                                              : (size_t)(at / TD_MX_GROUP) * LANES;
    return p->w->packed + bytes;
}

/* The tile of the product's first panel over one block: all but rows and panels. */
static cpu_tile block_tile(const cpu_product *p, uint32_t at, uint32_t end)
{
    const cpu_tensor *w = p->w;
    const struct form *f = &forms[p->path];
    size_t first = ((size_t)p->slab * w->v.n_panels + p->panel) * w->panel_bytes,
           before = w->codes_at + (size_t)at * f->panel_bytes;
    return (cpu_tile){.w = w->packed + first + before,
                      .scales = scales_of(p, at) + first,
                      .w_stride = w->panel_bytes,
                      .scale_stride = w->panel_bytes,
                      .w_left = w->panel_bytes - before,
                      .steps = p->path == CPU_BF16_F32 ? td_cpu_words(p->path, end - at)
                                                       : (end - at + f->step - 1) / f->step,
                      .sum_stride = p->sum_stride,
                      .first = at == p->k0};
}

/* Every tile by panels [x0, x1) of the product over one block. */
static void multiply_block(const cpu_product *p, uint32_t at, uint32_t end, uint32_t x0,
                           uint32_t x1, float *sums)
{
    const cpu_tile all = block_tile(p, at, end);
    uint32_t row0 = cpu_tile_row(p->rows, p->tile0), word = td_cpu_words(p->path, at);
    cpu_tile t = all;
    for (uint32_t i = p->tile0; i < p->tile1; i++) {
        uint32_t r0 = cpu_tile_row(p->rows, i), n = cpu_tile_row(p->rows, i + 1) - r0, step;
        /* the last of several tiles finds its block in the cache: it asks for the next block */
        int last = i > p->tile0 && i == p->tile1 - 1;
        t.a = p->rows->words + (size_t)r0 * p->rows->steps + (size_t)word * n;
        for (uint32_t x = x0; x < x1; x += step) {
            cpu_tile_fn fn = widest(p, n, x1 - x, &step);
            t.ahead = last ? (size_t)(end - at) * forms[p->path].panel_bytes : CPU_AHEAD / step;
            t.w = all.w + x * all.w_stride;
            t.scales = all.scales + x * all.scale_stride;
            t.sum = sums + (r0 - row0) * p->sum_stride + (size_t)x * LANES;
            fn(&t);
        }
    }
}

/* The same where a tile's panels [x0, x1) are unpacked first. */
static void multiply_words(const cpu_product *p, uint32_t at, uint32_t end, uint32_t x0,
                           uint32_t x1, float *sums)
{
    _Alignas(64) uint8_t words[CPU_WORDS_MAX];
    cpu_tile t = block_tile(p, at, end);
    size_t bytes = (size_t)(end - at) * forms[p->path].panel_bytes, few = CPU_AHEAD / (x1 - x0);
    cpu_unpack u = {.w = t.w + x0 * t.w_stride,
                    .w_stride = t.w_stride,
                    .w_left = t.w_left,
                    .ahead = p->tile1 - p->tile0 > 1 ? bytes : few,
                    .panels = x1 - x0,
                    .lines = (uint32_t)((bytes + 63) / 64),
                    .words = words};
    p->kernels->unpack[p->path](&u);
    t.w = words;
    t.w_stride = 64;
    t.scales += x0 * t.scale_stride;
    uint32_t row0 = cpu_tile_row(p->rows, p->tile0), word = td_cpu_words(p->path, at), step;
    for (uint32_t i = p->tile0; i < p->tile1; i++) {
        uint32_t r0 = cpu_tile_row(p->rows, i), n = cpu_tile_row(p->rows, i + 1) - r0;
        const uint32_t *a = p->rows->words + (size_t)r0 * p->rows->steps + (size_t)word * n;
        t.a_rows = n;
        for (uint32_t r = 0, some; r < n; r += some) {
            some = n - r < rows_at_once(p, n) ? n - r : rows_at_once(p, n);
            t.a = a + r;
            t.sum = sums + (r0 - row0 + r) * p->sum_stride + (size_t)x0 * LANES;
            widest(p, some, x1 - x0, &step)(&t);
        }
    }
}

/* A tile's panels go down K as far as they are long, for memory likes few long streams; all tiles
 * share each block of them while it is in the cache. */
void td_cpu_multiply(const cpu_product *p, float *sums)
{
    uint32_t step, rows = rows_at_once(p, (p->rows->n + p->rows->n_tiles - 1) / p->rows->n_tiles);
    int words = takes_words(p->kernels, p->path, p->rows->n);
    for (uint32_t x = 0; x < p->count; x += step) {
        widest(p, rows, p->count - x, &step);
        for (uint32_t at = p->k0, end; at < p->k1; at = end) {
            end = block_end(p, at);
            (words ? multiply_words : multiply_block)(p, at, end, x, x + step, sums);
        }
    }
}

void td_cpu_run(cpu_queue *c, td_pool_fn fn, void *arg, uint32_t n_items, size_t cost)
{
    if (cost >= CPU_COST_ALONE) {
        td_pool_run(c->q.pool, fn, arg, n_items);
        return;
    }
    for (uint32_t i = 0; i < n_items; i++)
        fn(arg, i, 0);
}

uint32_t td_cpu_group(const cpu_queue *c, uint32_t rows, uint32_t panels)
{
    uint32_t g = rows <= c->kernels->rows ? CPU_PANELS_MAX : CPU_PANELS_MANY;
    while (c->q.o.n_threads > 1 && g > 1 && panels / g < 8 * c->q.o.n_threads)
        g /= 2;
    return g;
}

/* Rows of one operand for one path; heads behind each other. */
typedef struct operand {
    cpu_rows rows;
    uint32_t *words;
    size_t head_words;
} operand;

typedef struct gemm_job {
    cpu_queue *c;
    const td_gemm *g;
    uint32_t n_rows, group, per_head; /* items of a head */
    const uint32_t *list;             /* rows of a; NULL: all */
    int check_nan;
    operand operands[CPU_PATHS];
    cpu_path path[TD_GEMM_OUTPUTS_MAX];
} gemm_job;

static uint32_t items_of(const gemm_job *j, uint32_t o)
{
    return (j->g->w[o]->n_panels + j->group - 1) / j->group;
}

static void put(td_dtype round, float *dst, const float *src, uint32_t n)
{
    if (round == TD_F32)
        memcpy(dst, src, n * sizeof *dst);
    else
        for (uint32_t i = 0; i < n; i++)
            dst[i] = ref_round(round, src[i]);
}

static void refuse_nan(const gemm_job *j, const float *v, uint32_t n)
{
    int bad = 0;
    for (uint32_t i = 0; i < n; i++)
        bad |= v[i] != v[i];
    if (bad)
        ref_fail(&j->c->q, -EIO);
}

/* One chunk of rows against the panels of one output: in sums, [rows][count * 16]. */
static void multiply(const gemm_job *j, uint32_t head, uint32_t o, uint32_t panel, uint32_t count,
                     uint32_t tile0, uint32_t tile1, uint32_t k0, uint32_t k1, float *sums)
{
    const operand *a = &j->operands[j->path[o]];
    cpu_rows rows = a->rows;
    rows.words = a->words + head * a->head_words;
    cpu_product p = {
        .kernels = j->c->kernels,
        .path = j->path[o],
        .w = cpu_tensor_of(j->g->w[o]),
        .slab = head,
        .panel = panel,
        .count = count,
        .k0 = k0,
        .k1 = k1,
        .rows = &rows,
        .tile0 = tile0,
        .tile1 = tile1,
        .sum_stride = (size_t)count * LANES,
    };
    td_cpu_multiply(&p, sums);
}

static void leave(const gemm_job *j, uint32_t head, uint32_t o, uint32_t panel, uint32_t count,
                  uint32_t r0, uint32_t n, const float *sums)
{
    const td_gemm *g = j->g;
    uint32_t lanes = cpu_lanes(g->w[o], panel, count);
    td_dtype round =
        g->epilogue == TD_EPI_OPERAND || g->epilogue == TD_EPI_SILU_MUL ? j->c->q.o.act : TD_F32;
    float *out = g->out[o] + (size_t)head * g->out_head + (size_t)panel * LANES;
    for (uint32_t r = 0; r < n; r++) {
        const float *v = sums + (size_t)r * count * LANES;
        put(round, out + (size_t)(r0 + r) * g->out_stride[o], v, lanes);
        if (j->check_nan)
            refuse_nan(j, v, lanes);
    }
}

static void leave_partial(const gemm_job *j, uint32_t slice, uint32_t panel, uint32_t count,
                          uint32_t r0, uint32_t n, const float *sums)
{
    const td_gemm *g = j->g;
    uint32_t width = g->w[0]->n, lanes = cpu_lanes(g->w[0], panel, count);
    float *out = g->out[0] + ((size_t)slice * j->n_rows + r0) * width + (size_t)panel * LANES;
    for (uint32_t r = 0; r < n; r++)
        memcpy(out + (size_t)r * width, sums + (size_t)r * count * LANES, lanes * sizeof *out);
}

static void add(float *a, const float *b, size_t n)
{
    for (size_t i = 0; i < n; i++)
        a[i] += b[i];
}

/* The tree ((0+1)+(2+3))+((4+5)+(6+7)) as slices come: a sum of 2^l slices meets its neighbour.
 * sums holds a buffer for each level, and ends with the whole in the first. */
static void sum_slices(const gemm_job *j, uint32_t panel, uint32_t count, uint32_t t0, uint32_t t1,
                       size_t size, float *sums)
{
    const td_gemm *g = j->g;
    uint32_t step = g->w[0]->k / g->slices, held = 0;
    for (uint32_t s = 0; s < g->slices; s++) {
        multiply(j, 0, 0, panel, count, t0, t1, s * step, (s + 1) * step, sums + held++ * size);
        for (uint32_t done = s + 1; done % 2 == 0; done /= 2, held--)
            add(sums + (held - 2) * size, sums + (held - 1) * size, size);
    }
}

/* All slices of a few panels before the next panels. */
static void slices(const gemm_job *j, uint32_t panel, uint32_t count, uint32_t t0, uint32_t t1,
                   float *sums)
{
    const td_gemm *g = j->g;
    const cpu_rows *rows = &j->operands[j->path[0]].rows;
    uint32_t width = td_cpu_width(j->c->kernels, j->path[0], rows), step = g->w[0]->k / g->slices;
    uint32_t r0 = cpu_tile_row(rows, t0), n = cpu_tile_row(rows, t1) - r0;
    for (uint32_t x = 0; x < count; x += width) {
        uint32_t some = count - x < width ? count - x : width;
        if (g->epilogue == TD_EPI_SUM) {
            sum_slices(j, panel + x, some, t0, t1, (size_t)n * some * LANES, sums);
            leave(j, 0, 0, panel + x, some, r0, n, sums);
            continue;
        }
        for (uint32_t s = 0; s < g->slices; s++) {
            multiply(j, 0, 0, panel + x, some, t0, t1, s * step, (s + 1) * step, sums);
            leave_partial(j, s, panel + x, some, r0, n, sums);
        }
    }
}

static void gemm_item(void *arg, uint32_t item, uint32_t thread)
{
    const gemm_job *j = arg;
    const td_gemm *g = j->g;
    uint32_t head = item / j->per_head, o = 0, unit = item % j->per_head;
    while (unit >= items_of(j, o))
        unit -= items_of(j, o++);
    uint32_t panel = unit * j->group, k = g->w[o]->k, left = g->w[o]->n_panels - panel,
             count = left < j->group ? left : j->group;
    const cpu_rows *rows = &j->operands[j->path[o]].rows;
    float *sums = cpu_work(j->c, thread), *up = sums + CPU_WORK_FLOATS / 2;
    for (uint32_t t0 = 0, t1; t0 < rows->n_tiles; t0 = t1) {
        t1 = rows->n_tiles - t0 > CPU_CHUNK_TILES ? t0 + CPU_CHUNK_TILES : rows->n_tiles;
        uint32_t r0 = cpu_tile_row(rows, t0), n = cpu_tile_row(rows, t1) - r0;
        if (g->epilogue == TD_EPI_PARTIAL || g->epilogue == TD_EPI_SUM) {
            slices(j, panel, count, t0, t1, sums);
            continue;
        }
        multiply(j, head, o, panel, count, t0, t1, 0, k, sums);
        if (g->epilogue == TD_EPI_SILU_MUL) {
            multiply(j, head, 1, panel, count, t0, t1, 0, k, up);
            td_silu_mul_n(sums, up, sums, (size_t)n * count * LANES);
        }
        leave(j, head, o, panel, count, r0, n, sums);
    }
}

static void pack_item(void *arg, uint32_t item, uint32_t thread)
{
    const gemm_job *j = arg;
    const td_gemm *g = j->g;
    uint32_t n_tiles = (j->n_rows + j->c->kernels->rows - 1) / j->c->kernels->rows,
             head = item / n_tiles;
    cpu_source src = {.a = g->a + (size_t)head * g->a_head,
                      .stride = g->a_stride,
                      .list = j->list,
                      .k = g->w[0]->k,
                      .round = g->a_round && j->c->q.o.act == TD_BF16};
    for (uint32_t p = 0; p < CPU_PATHS; p++) {
        const operand *a = &j->operands[p];
        if (a->rows.n)
            td_cpu_pack_tile(j->c->kernels, (cpu_path)p, &src, &a->rows, item % n_tiles,
                             a->words + head * a->head_words);
    }
}

/* Every path that an output needs gets its own form of the operand. */
static int lay_out(gemm_job *j, uint32_t n_w)
{
    const td_gemm *g = j->g;
    cpu_queue *c = j->c;
    size_t words = 0;
    for (uint32_t o = 0; o < n_w; o++) {
        uint32_t k = g->w[o]->k;
        j->path[o] = td_cpu_path(c, g->w[o], 1);
        operand *a = &j->operands[j->path[o]];
        if (a->rows.n)
            continue;
        a->rows = td_cpu_rows(c, NULL, j->n_rows, td_cpu_words(j->path[o], k));
        a->head_words = (size_t)j->n_rows * a->rows.steps;
        words += g->n_heads * a->head_words;
    }
    int r = td_cpu_need_operand(c, words);
    if (r < 0)
        return r;
    uint32_t *at = c->operand;
    for (uint32_t p = 0; p < CPU_PATHS; p++) {
        j->operands[p].words = at;
        at += g->n_heads * j->operands[p].head_words;
    }
    uint32_t n_tiles = (j->n_rows + c->kernels->rows - 1) / c->kernels->rows;
    td_cpu_run(c, pack_item, j, g->n_heads * n_tiles, words / 8);
    return 0;
}

static void run_gemm(gemm_job *j)
{
    const td_gemm *g = j->g;
    uint32_t panels = 0, n_w = g->epilogue == TD_EPI_SILU_MUL ? 2 : g->n_out,
             n_out = g->epilogue == TD_EPI_SILU_MUL ? 1 : g->n_out;
    if (!j->n_rows || lay_out(j, n_w) < 0)
        return;
    for (uint32_t o = 0; o < n_out; o++)
        panels += g->w[o]->n_panels;
    j->group = td_cpu_group(j->c, j->n_rows, panels * g->n_heads);
    for (uint32_t o = 0; o < n_out; o++)
        j->per_head += items_of(j, o);
    size_t cost = (size_t)j->n_rows * g->w[0]->k * panels * g->n_heads;
    td_cpu_run(j->c, gemm_item, j, g->n_heads * j->per_head, cost);
}

void td_cpu_gemm(td_queue *q, const td_step *s, const td_gemm *g)
{
    gemm_job j = {.c = cpu_queue_of(q), .g = g, .n_rows = s->n_rows};
    run_gemm(&j);
}

void td_cpu_logits(td_queue *q, const td_step *s, const float *h, const td_tensor *head,
                   float *logits)
{
    td_gemm g = {.a = h,
                 .a_stride = head->k,
                 .n_heads = 1,
                 .epilogue = TD_EPI_F32,
                 .n_out = 1,
                 .w = {head},
                 .out = {logits},
                 .out_stride = {head->n}};
    gemm_job j = {.c = cpu_queue_of(q),
                  .g = &g,
                  .n_rows = s->n_logits,
                  .list = s->logit_rows,
                  .check_nan = 1};
    run_gemm(&j);
}

typedef struct embed_job {
    const td_step *s;
    const td_tensor *table;
    float *x;
} embed_job;

static void embed_item(void *arg, uint32_t t, uint32_t thread)
{
    const embed_job *j = arg;
    td_cpu_weight_row(j->table, j->s->ids[t], j->x + (size_t)t * j->table->k);
}

void td_cpu_embed(td_queue *q, const td_step *s, const td_tensor *table, float *x)
{
    embed_job j = {s, table, x};
    td_cpu_run(cpu_queue_of(q), embed_item, &j, s->n_rows, (size_t)s->n_rows * table->k);
}

typedef struct norm_job {
    const cpu_queue *c;
    cpu_norm first; /* of row 0 */
} norm_job;

static void norm_item(void *arg, uint32_t t, uint32_t thread)
{
    const norm_job *j = arg;
    cpu_norm a = j->first;
    size_t at = (size_t)t * a.width;
    a.x += at;
    a.out += at;
    a.out_f32 = a.out_f32 ? a.out_f32 + at : NULL;
    a.delta = a.delta ? a.delta + at : NULL;
    j->c->kernels->add_norm(&a);
}

void td_cpu_add_norm(td_queue *q, const td_step *s, float *x, const float *delta,
                     const td_tensor *w, float eps, uint32_t width, float *out, float *out_f32)
{
    cpu_queue *c = cpu_queue_of(q);
    norm_job j = {c, {x, out, out_f32, delta, w->data, eps, width, c->q.o.act == TD_BF16}};
    td_cpu_run(c, norm_item, &j, s->n_rows, (size_t)s->n_rows * width * 4);
}
