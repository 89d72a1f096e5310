/* SPDX-License-Identifier: Apache-2.0 */
/* Router and experts. Rows are sorted by expert once; then all experts' gates and ups are one list
 * of pieces, and all downs another: no wait between experts. Down keeps each (row, expert)'s slice
 * sums until every expert of its panels is there, then adds them in the row's own order (numerics,
 * rules 8 and 12). */
#include "kernels/cpu/cpu.h"
#include "kernels/math.h"

#include "base/banned.h"

enum { ROWS_AT_ONCE = 1024 }; /* bounds the scratch of down */

typedef struct route_job {
    cpu_queue *c;
    const td_route *a;
    cpu_path path;
    cpu_rows rows;
    uint32_t group;
} route_job;

static void route_pack(void *arg, uint32_t tile, uint32_t thread)
{
    const route_job *j = arg;
    cpu_source src = {.a = j->a->h, .stride = j->a->w->k, .k = j->a->w->k};
    td_cpu_pack_tile(j->c->kernels, j->path, &src, &j->rows, tile, j->c->operand);
}

static void route_scores(void *arg, uint32_t item, uint32_t thread)
{
    const route_job *j = arg;
    const td_route *a = j->a;
    uint32_t panel = item * j->group, left = a->w->n_panels - panel,
             count = left < j->group ? left : j->group, lanes = cpu_lanes(a->w, panel, count);
    float *sums = cpu_work(j->c, thread);
    for (uint32_t t0 = 0, t1; t0 < j->rows.n_tiles; t0 = t1) {
        t1 = j->rows.n_tiles - t0 > CPU_CHUNK_TILES ? t0 + CPU_CHUNK_TILES : j->rows.n_tiles;
        cpu_product p = {
            .kernels = j->c->kernels,
            .path = j->path,
            .w = cpu_tensor_of(a->w),
            .panel = panel,
            .count = count,
            .k1 = a->w->k,
            .rows = &j->rows,
            .tile0 = t0,
            .tile1 = t1,
            .sum_stride = (size_t)count * LANES,
        };
        td_cpu_multiply(&p, sums);
        uint32_t r0 = cpu_tile_row(&j->rows, t0), n = cpu_tile_row(&j->rows, t1) - r0;
        for (uint32_t r = 0; r < n; r++) {
            float *s = a->scores + (size_t)(r0 + r) * a->n_experts + (size_t)panel * LANES;
            for (uint32_t l = 0; l < lanes; l++)
                s[l] = td_sigmoid(sums[(size_t)r * count * LANES + l]);
        }
    }
}

static void route_choose(void *arg, uint32_t t, uint32_t thread)
{
    const route_job *j = arg;
    td_ref_choose(j->a, t);
}

void td_cpu_route(td_queue *q, const td_step *s, const td_route *a)
{
    cpu_queue *c = cpu_queue_of(q);
    route_job j = {.c = c, .a = a, .path = td_cpu_path(c, a->w, 0)};
    size_t elems = (size_t)s->n_rows * a->w->k;
    if (!s->n_rows || td_cpu_need_operand(c, elems + s->n_rows) < 0)
        return;
    j.rows = td_cpu_rows(c, c->operand, s->n_rows, td_cpu_words(j.path, a->w->k));
    td_cpu_run(c, route_pack, &j, j.rows.n_tiles, elems / 8);
    j.group = td_cpu_group(c, s->n_rows, a->w->n_panels);
    td_cpu_run(c, route_scores, &j, (a->w->n_panels + j.group - 1) / j.group, elems * a->w->n);
    td_cpu_run(c, route_choose, &j, s->n_rows, (size_t)s->n_rows * a->n_experts * 16);
}

/* Who is where: pairs (row, slot) sorted by expert, then the shared expert's rows. Expert e has
 * pairs [start[e], start[e + 1]); e = n_experts is the shared one. */
typedef struct moe_job {
    cpu_queue *c;
    const td_moe *a;
    uint32_t row0, n_rows, all_rows; /* a part of the step's rows */
    uint32_t n_groups, n_pairs;      /* experts, the shared one included */
    uint32_t inner, shared_inner, act_stride, group;
    uint32_t *start;      /* [n_groups + 1] */
    uint32_t *order;      /* [n_pairs] (row - row0) * slots + slot */
    uint32_t *place;      /* [n_rows * slots] position of that pair in order */
    uint32_t *row_of;     /* [n_pairs] row, an index into a */
    uint32_t *act_of;     /* [n_pairs] where its activations are, in units of elements */
    uint32_t *first_tile; /* [n_groups + 1] */
    uint32_t *first_item; /* [n_groups + 1] pieces of gate and up */
    size_t up_words, down_words;
} moe_job;

static const td_tensor *of_group(const moe_job *j, uint32_t e, const td_tensor *own,
                                 const td_tensor *shared)
{
    return e < j->a->n_experts ? own : shared;
}

static uint32_t inner_of(const moe_job *j, uint32_t e)
{
    return e < j->a->n_experts ? j->inner : j->shared_inner;
}

static uint32_t slots_of(const td_moe *a)
{
    return a->top_k + (a->shared_gate ? 1 : 0);
}

static uint32_t group_of_pair(const moe_job *j, uint32_t row, uint32_t slot)
{
    const td_moe *a = j->a;
    return slot < a->top_k ? a->experts[(size_t)(j->row0 + row) * a->top_k + slot] : a->n_experts;
}

/* Counting sort: pairs of an expert stay in row order. */
static void sort_pairs(moe_job *j)
{
    uint32_t slots = slots_of(j->a), most = j->c->kernels->rows;
    memset(j->start, 0, (j->n_groups + 1) * sizeof *j->start);
    for (uint32_t i = 0; i < j->n_pairs; i++)
        j->start[group_of_pair(j, i / slots, i % slots) + 1]++;
    for (uint32_t e = 0, tiles = 0; e < j->n_groups; e++) {
        j->first_tile[e] = tiles;
        tiles += (j->start[e + 1] + most - 1) / most;
        j->first_tile[e + 1] = tiles;
        j->start[e + 1] += j->start[e];
    }
    for (uint32_t i = 0; i < j->n_pairs; i++) {
        uint32_t row = i / slots, slot = i % slots, at = j->start[group_of_pair(j, row, slot)]++;
        j->order[at] = i;
        j->place[i] = at;
        j->row_of[at] = j->row0 + row;
        j->act_of[at] = row * j->act_stride + slot * j->inner;
    }
    for (uint32_t e = j->n_groups; e > 0; e--)
        j->start[e] = j->start[e - 1];
    j->start[0] = 0;
}

static uint32_t find_group(const uint32_t *first, uint32_t n, uint32_t i)
{
    uint32_t lo = 0, hi = n;
    while (hi - lo > 1) {
        uint32_t mid = (lo + hi) / 2;
        if (first[mid] <= i)
            lo = mid;
        else
            hi = mid;
    }
    return lo;
}

/* Rows of one expert, as tiles; words of the expert's first pair. The two kinds of expert may have
 * other widths and formats, so each pair takes the widest room. */
static cpu_rows rows_of(const moe_job *j, uint32_t e, const td_tensor *w, size_t words)
{
    cpu_path path = td_cpu_path(j->c, w, 1);
    return td_cpu_rows(j->c, j->c->operand + j->start[e] * words, j->start[e + 1] - j->start[e],
                       td_cpu_words(path, w->k));
}

static void pack(const moe_job *j, uint32_t item, const td_tensor *own, const td_tensor *shared,
                 size_t words, const cpu_source *from)
{
    uint32_t e = find_group(j->first_tile, j->n_groups, item);
    const td_tensor *w = of_group(j, e, own, shared);
    cpu_rows rows = rows_of(j, e, w, words);
    cpu_source src = *from;
    src.k = w->k;
    src.list = from->list + j->start[e];
    td_cpu_pack_tile(j->c->kernels, td_cpu_path(j->c, w, 1), &src, &rows, item - j->first_tile[e],
                     j->c->operand + j->start[e] * words);
}

static void pack_up(void *arg, uint32_t item, uint32_t thread)
{
    const moe_job *j = arg;
    const td_moe *a = j->a;
    cpu_source src = {.a = a->a, .stride = a->gate->k, .list = j->row_of};
    pack(j, item, a->gate, a->shared_gate, j->up_words, &src);
}

static void pack_down(void *arg, uint32_t item, uint32_t thread)
{
    const moe_job *j = arg;
    const td_moe *a = j->a;
    cpu_source src = {.a = a->act, .stride = 1, .list = j->act_of};
    pack(j, item, a->down, a->shared_down, j->down_words, &src);
}

static void multiply(const moe_job *j, const td_tensor *w, uint32_t slab, uint32_t panel,
                     uint32_t count, const cpu_rows *rows, uint32_t tile0, uint32_t tile1,
                     uint32_t k0, uint32_t k1, float *sums, size_t sum_stride)
{
    cpu_product p = {
        .kernels = j->c->kernels,
        .path = td_cpu_path(j->c, w, 1),
        .w = cpu_tensor_of(w),
        .slab = slab,
        .panel = panel,
        .count = count,
        .k0 = k0,
        .k1 = k1,
        .rows = rows,
        .tile0 = tile0,
        .tile1 = tile1,
        .sum_stride = sum_stride,
    };
    td_cpu_multiply(&p, sums);
}

/* Some panels of one expert's gate and up, all its rows. */
static void up_item(void *arg, uint32_t item, uint32_t thread)
{
    const moe_job *j = arg;
    const td_moe *a = j->a;
    uint32_t e = find_group(j->first_item, j->n_groups, item), slab = e < a->n_experts ? e : 0;
    const td_tensor *gate = of_group(j, e, a->gate, a->shared_gate),
                    *up = of_group(j, e, a->up, a->shared_up);
    uint32_t panel = (item - j->first_item[e]) * j->group, left = gate->n_panels - panel,
             count = left < j->group ? left : j->group, lanes = cpu_lanes(gate, panel, count);
    cpu_rows rows = rows_of(j, e, gate, j->up_words);
    float *g = cpu_work(j->c, thread), *u = g + CPU_WORK_FLOATS / 2;
    for (uint32_t t0 = 0, t1; t0 < rows.n_tiles; t0 = t1) {
        t1 = rows.n_tiles - t0 > CPU_CHUNK_TILES ? t0 + CPU_CHUNK_TILES : rows.n_tiles;
        uint32_t r0 = cpu_tile_row(&rows, t0), n = cpu_tile_row(&rows, t1) - r0;
        multiply(j, gate, slab, panel, count, &rows, t0, t1, 0, gate->k, g, (size_t)count * LANES);
        multiply(j, up, slab, panel, count, &rows, t0, t1, 0, gate->k, u, (size_t)count * LANES);
        td_silu_mul_n(g, u, g, (size_t)n * count * LANES);
        for (uint32_t r = 0; r < n; r++) {
            float *out = a->act + j->act_of[j->start[e] + r0 + r] + (size_t)panel * LANES;
            const float *v = g + (size_t)r * count * LANES;
            for (uint32_t l = 0; l < lanes; l++)
                out[l] = ref_round(j->c->q.o.act, v[l]);
        }
    }
}

/* One slice of a row: its experts in top-k order, then the shared expert. y is [pairs][width]. */
static void combine(const moe_job *j, uint32_t row, const float *y, size_t width, uint32_t lanes,
                    float *out)
{
    const td_moe *a = j->a;
    const uint32_t *place = j->place + (size_t)row * slots_of(a);
    const float *weights = a->weights + (size_t)(j->row0 + row) * a->top_k;
    float sum[CPU_PANELS_MAX * LANES];
    for (uint32_t i = 0; i < a->top_k; i++) {
        const float *v = y + place[i] * width;
        float w = weights[i];
        if (i)
            for (uint32_t l = 0; l < width; l++)
                sum[l] = sum[l] + w * v[l];
        else
            for (uint32_t l = 0; l < width; l++)
                sum[l] = w * v[l];
    }
    if (a->shared_down)
        for (uint32_t l = 0; l < width; l++)
            sum[l] += y[place[a->top_k] * width + l];
    memcpy(out, sum, lanes * sizeof *out);
}

/* All slices of a row and their tree. */
static void combine_slices(const moe_job *j, uint32_t row, const float *y, size_t plane,
                           size_t width, uint32_t lanes, float *out)
{
    float sums[TD_KPLAN_SLICES_MAX][CPU_PANELS_MAX * LANES];
    for (uint32_t s = 0; s < j->a->slices; s++)
        combine(j, row, y + s * plane, width, (uint32_t)width, sums[s]);
    for (uint32_t step = 1; step < j->a->slices; step *= 2)
        for (uint32_t s = 0; s < j->a->slices; s += 2 * step)
            for (size_t l = 0; l < width; l++)
                sums[s][l] += sums[s + step][l];
    memcpy(out, sums[0], lanes * sizeof *out);
}

/* Some panels of every expert's down, all rows and slices. */
static void down_item(void *arg, uint32_t item, uint32_t thread)
{
    const moe_job *j = arg;
    const td_moe *a = j->a;
    uint32_t panel = item * j->group, left = a->down->n_panels - panel,
             count = left < j->group ? left : j->group, lanes = cpu_lanes(a->down, panel, count);
    size_t width = (size_t)count * LANES, plane = j->n_pairs * width;
    float *y = cpu_work(j->c, thread);
    for (uint32_t e = 0; e < j->n_groups; e++) {
        if (j->start[e] == j->start[e + 1])
            continue;
        const td_tensor *down = of_group(j, e, a->down, a->shared_down);
        uint32_t slab = e < a->n_experts ? e : 0, step = inner_of(j, e) / a->slices;
        cpu_rows rows = rows_of(j, e, down, j->down_words);
        uint32_t some = td_cpu_width(j->c->kernels, td_cpu_path(j->c, down, 1), &rows);
        for (uint32_t x = 0; x < count; x += some)
            for (uint32_t s = 0; s < a->slices; s++)
                multiply(j, down, slab, panel + x, count - x < some ? count - x : some, &rows, 0,
                         rows.n_tiles, s * step, (s + 1) * step,
                         y + s * plane + j->start[e] * width + (size_t)x * LANES, width);
    }
    if (a->out) {
        for (uint32_t r = 0; r < j->n_rows; r++)
            combine_slices(j, r, y, plane, width, lanes,
                           a->out + (size_t)(j->row0 + r) * a->down->n + (size_t)panel * LANES);
        return;
    }
    for (uint32_t s = 0; s < a->slices; s++)
        for (uint32_t r = 0; r < j->n_rows; r++)
            combine(j, r, y + s * plane, width, lanes,
                    a->partial + ((size_t)s * j->all_rows + j->row0 + r) * a->down->n +
                        (size_t)panel * LANES);
}

static size_t widest(size_t a, size_t b)
{
    return a > b ? a : b;
}

/* Lists and scratch of one part of the rows; 0 or -ENOMEM (kept in the queue). */
static int prepare(moe_job *j)
{
    const td_moe *a = j->a;
    cpu_queue *c = j->c;
    j->n_pairs = j->n_rows * slots_of(a);
    j->up_words = td_cpu_words(td_cpu_path(c, a->gate, 1), a->gate->k);
    j->down_words = td_cpu_words(td_cpu_path(c, a->down, 1), a->down->k);
    if (a->shared_gate) {
        j->up_words =
            widest(j->up_words, td_cpu_words(td_cpu_path(c, a->shared_gate, 1), a->shared_gate->k));
        j->down_words = widest(j->down_words,
                               td_cpu_words(td_cpu_path(c, a->shared_down, 1), a->shared_down->k));
    }
    if (td_cpu_need_lists(c, 4ul * j->n_pairs + 3ul * (j->n_groups + 1)) < 0 ||
        td_cpu_need_operand(c, j->n_pairs * widest(j->up_words, j->down_words)) < 0)
        return -1;
    j->order = c->lists;
    j->place = j->order + j->n_pairs;
    j->row_of = j->place + j->n_pairs;
    j->act_of = j->row_of + j->n_pairs;
    j->start = j->act_of + j->n_pairs;
    j->first_tile = j->start + j->n_groups + 1;
    j->first_item = j->first_tile + j->n_groups + 1;
    sort_pairs(j);
    return 0;
}

static void run_up(moe_job *j)
{
    const td_moe *a = j->a;
    size_t elems = (size_t)j->n_pairs * a->gate->k;
    td_cpu_run(j->c, pack_up, j, j->first_tile[j->n_groups], elems / 8);
    uint32_t used = 0, items = 0;
    for (uint32_t e = 0; e < j->n_groups; e++)
        used += j->start[e] != j->start[e + 1];
    j->group = td_cpu_group(j->c, j->n_pairs / used, used * a->gate->n_panels);
    for (uint32_t e = 0; e < j->n_groups; e++) {
        const td_tensor *gate = of_group(j, e, a->gate, a->shared_gate);
        j->first_item[e] = items;
        if (j->start[e] != j->start[e + 1])
            items += (gate->n_panels + j->group - 1) / j->group;
        j->first_item[e + 1] = items;
    }
    td_cpu_run(j->c, up_item, j, items, elems * j->inner);
}

static void run_down(moe_job *j)
{
    const td_moe *a = j->a;
    size_t elems = (size_t)j->n_pairs * j->inner;
    td_cpu_run(j->c, pack_down, j, j->first_tile[j->n_groups], elems / 8);
    j->group = td_cpu_group(j->c, j->n_rows, a->down->n_panels);
    while (j->group > 2 && j->n_pairs > 512) /* what waits to be added should stay in the caches */
        j->group /= 2;
    if (td_cpu_need_work(j->c, (size_t)a->slices * j->n_pairs * j->group * LANES) < 0)
        return;
    td_cpu_run(j->c, down_item, j, (a->down->n_panels + j->group - 1) / j->group,
               elems * a->down->n);
}

void td_cpu_moe(td_queue *q, const td_step *s, const td_moe *a)
{
    for (uint32_t at = 0; at < s->n_rows; at += ROWS_AT_ONCE) {
        moe_job j = {.c = cpu_queue_of(q),
                     .a = a,
                     .row0 = at,
                     .all_rows = s->n_rows,
                     .n_rows = s->n_rows - at < ROWS_AT_ONCE ? s->n_rows - at : ROWS_AT_ONCE,
                     .n_groups = a->n_experts + (a->shared_gate ? 1 : 0),
                     .inner = a->gate->n,
                     .shared_inner = a->shared_gate ? a->shared_gate->n : 0};
        j.act_stride = a->top_k * j.inner + j.shared_inner;
        if (prepare(&j) < 0)
            return;
        run_up(&j);
        run_down(&j);
    }
}
