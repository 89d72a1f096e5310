/* SPDX-License-Identifier: Apache-2.0 */
/* Matrix products: which kernel, how many blocks. */
#include <errno.h>

#include "base/bug.h"
#include "kernels/gpu/inside.h"
#include "kernels/kplan.h"

#include "base/banned.h"

enum {
    WAVES = 4,
    CHUNK = 64,
    FEW_ROWS = 16,
    MANY_ROWS = 64, /* rows of a block's tile */
    FEW_UP_TO = 32, /* rows */
};
#define EXPERT_OUT_MAX ((size_t)512 << 20) /* bytes of expert outputs before they are combined */

static uint64_t ceil_div(uint64_t a, uint64_t b)
{
    return (a + b - 1) / b;
}

/* Types of a product in the order of list.def. */
enum product { BB, BM, B8, XM, FB, FF, FM, F8, PRODUCTS };

static enum product product_of(td_dtype act, td_weight_format w)
{
    static const uint8_t of[2][TD_WEIGHT_FORMATS] = {
        {[TD_W_F32] = FF, [TD_W_BF16] = FB, [TD_W_FP8] = F8, [TD_W_MXFP4] = FM},
        {[TD_W_F32] = FF, [TD_W_BF16] = BB, [TD_W_FP8] = B8, [TD_W_MXFP4] = BM}};
    return of[act == TD_BF16][w];
}

static enum product operand_product(const td_queue *q, td_weight_format w)
{
    enum product p = product_of(q->o.act, w);
    return p == BM && q->o.act_fp8 ? XM : p;
}

/* f32 products are for checks: they have one launch plan. rows_each: that meet one matrix. */
static int is_many(td_tune_key *key, uint32_t rows, uint32_t rows_each, enum product type)
{
    if (type > XM)
        return 0;
    key->rows = td_tune_rows_class(rows);
    key->act_fp8 = type == XM;
    key->tp = key->ep = 1;
    td_gpu_plan p = td_gpu_plan_for(key);
    return p == TD_GPU_PLAN_AUTO ? rows_each > FEW_UP_TO : p == TD_GPU_PLAN_MANY;
}

static int gemm_is_many(const td_k_gemm *a, int silu, enum product type, uint32_t rows)
{
    td_tune_key key = {.op = silu ? TD_TUNE_SILU : TD_TUNE_GEMM,
                       .k = a->w[0].k,
                       .heads = a->n_heads,
                       .slices = a->slices,
                       .format = a->w[0].format};
    for (uint32_t o = 0; o < a->n_out; o++)
        key.n += a->w[o].n;
    return is_many(&key, rows, rows, type);
}

static int moe_is_many(const td_moe *m, enum product type, uint32_t rows)
{
    td_tune_key key = {.op = TD_TUNE_MOE,
                       .n = m->gate->n,
                       .k = m->gate->k,
                       .heads = 1,
                       .slices = m->slices,
                       .format = m->gate->format,
                       .experts = m->n_experts,
                       .top_k = m->top_k};
    uint64_t pairs = (uint64_t)rows * m->top_k;
    return is_many(&key, rows, (uint32_t)ceil_div(pairs, m->n_experts), type);
}

/* From the first kernel of its family: few of every type, then many of the first four. */
static kernel_id pick(kernel_id first, int many, enum product type)
{
    return first + (many ? PRODUCTS : 0) + type;
}

/* The operands' rows in LDS. */
static size_t lds_of(int many, enum product type)
{
    if (type == XM) /* few: two steps of 16 rows; many: one of 64 */
        return (many ? 4ul : 2ul) * (TD_K_MX_STEP * FEW_ROWS + TD_K_MX_SCALES);
    return (size_t)(many ? MANY_ROWS : FEW_ROWS) * CHUNK * (type <= B8 ? 2 : 4);
}

static uint32_t aligned(const void *p, uint32_t stride, uint32_t head, uint32_t k)
{
    return (uintptr_t)p % 16 == 0 && stride % 4 == 0 && head % 4 == 0 && k % 8 == 0;
}

static void launch_gemm(td_queue *q, td_k_gemm *a, int silu, enum product type, uint32_t rows)
{
    int many = gemm_is_many(a, silu, type, rows);
    uint64_t groups = 0;
    for (uint32_t o = 0; o < a->n_out; o++)
        groups += ceil_div(a->w[o].n_tiles, WAVES * (many && !silu ? 2 : 1));
    a->vec = aligned(a->a, a->a_stride, a->a_head, a->w[0].k);
    uint64_t blocks = ceil_div(rows, many ? MANY_ROWS : FEW_ROWS) * groups * a->n_heads * a->slices;
    td_gpu_launch(q, pick(silu ? K_gemm_silu_few_bb : K_gemm_few_bb, many, type), blocks,
                  lds_of(many, type), a, sizeof *a);
}

/* Outputs whose weights have one type go in one launch. */
static void gemm_outputs(td_queue *q, const td_step *s, const td_gemm *g, enum product type)
{
    int silu = g->epilogue == TD_EPI_SILU_MUL;
    td_k_gemm a = {.step = td_gpu_step(q, s),
                   .a = g->a,
                   .a_stride = g->a_stride,
                   .a_head = g->a_head,
                   .round_a = g->a_round && q->o.act == TD_BF16,
                   .round_out = q->o.act == TD_BF16 && (silu || g->epilogue == TD_EPI_OPERAND),
                   .n_heads = g->n_heads,
                   .slices = g->epilogue == TD_EPI_PARTIAL ? g->slices : 1,
                   .out_head = g->out_head};
    for (uint32_t o = 0; o < g->n_out; o++) {
        if (operand_product(q, g->w[o]->format) != type)
            continue;
        a.w[a.n_out] = td_gpu_matrix(g->w[o]);
        a.out[a.n_out] = g->out[o];
        a.out_stride[a.n_out++] = g->epilogue == TD_EPI_PARTIAL ? g->w[o]->n : g->out_stride[o];
    }
    if (a.n_out == 0)
        return;
    if (silu)
        a.w[1] = td_gpu_matrix(g->w[1]);
    launch_gemm(q, &a, silu, type, s->n_rows);
}

void td_gpu_gemm(td_queue *q, const td_step *s, const td_gemm *g)
{
    if (g->epilogue == TD_EPI_SILU_MUL && g->w[0]->format != g->w[1]->format) {
        td_gpu_fail(q, -ENOTSUP);
        return;
    }
    for (enum product type = BB; type < PRODUCTS; type++)
        gemm_outputs(q, s, g, type);
}

void td_gpu_logits(td_queue *q, const td_step *s, const float *h, const td_tensor *head,
                   float *logits)
{
    td_k_gemm a = {.step = td_gpu_step(q, s),
                   .a = h,
                   .a_stride = head->k,
                   .n_heads = 1,
                   .n_out = 1,
                   .slices = 1,
                   .w = {td_gpu_matrix(head)},
                   .out = {logits},
                   .out_stride = {head->n},
                   .of_logits = 1,
                   .error = q->dev_error};
    launch_gemm(q, &a, 0, operand_product(q, head->format), s->n_logits);
}

void td_gpu_route(td_queue *q, const td_step *s, const td_route *r)
{
    if (r->n_experts > TD_K_EXPERTS_MAX || r->top_k > TD_K_CHOSEN_MAX) {
        td_gpu_fail(q, -E2BIG);
        return;
    }
    td_k_gemm g = {.step = td_gpu_step(q, s),
                   .a = r->h,
                   .a_stride = r->w->k,
                   .n_heads = 1,
                   .n_out = 1,
                   .slices = 1,
                   .w = {td_gpu_matrix(r->w)},
                   .out = {r->scores},
                   .out_stride = {r->n_experts}};
    /* the router's operand is f32, whatever act is */
    launch_gemm(q, &g, 0, product_of(TD_F32, r->w->format), s->n_rows);
    td_k_route a = {.step = g.step,
                    .bias = r->bias->data,
                    .n_experts = r->n_experts,
                    .top_k = r->top_k,
                    .n_groups = r->n_groups,
                    .top_groups = r->top_groups,
                    .norm = (uint32_t)r->norm,
                    .scale = r->scale,
                    .scores = r->scores,
                    .experts = r->experts,
                    .weights = r->weights,
                    .margin = r->margin};
    td_gpu_launch(q, K_route_choose, s->n_rows, TD_K_LDS_ROUTE, &a, sizeof a);
}

/* Where the lists of a step lie in one scratch. */
static td_k_moe_lists lists_in(void *room, uint32_t pairs, uint32_t n_experts)
{
    uint32_t *p = room;
    td_k_moe_lists l = {.n_tiles = p, .counts = p + 16};
    l.firsts = l.counts + n_experts;
    l.pairs = l.firsts + n_experts;
    l.tiles = l.pairs + pairs;
    return l;
}

static int sort_rows(td_queue *q, const td_step *s, const td_moe *m, uint32_t tile_rows,
                     td_k_moe_lists *ret_lists, uint64_t *ret_tiles)
{
    uint32_t pairs = s->n_rows * m->top_k, e = m->n_experts;
    uint64_t tiles = pairs / tile_rows + e;
    if (tiles > pairs)
        tiles = pairs;
    void *p = td_gpu_scratch(q, &q->lists, (16 + 2ul * e + pairs + 2 * tiles) * sizeof(uint32_t));
    if (!p)
        return -ENOMEM;
    *ret_lists = lists_in(p, pairs, e);
    *ret_tiles = tiles;
    td_k_moe_sort a = {.step = td_gpu_step(q, s),
                       .experts = m->experts,
                       .n_experts = e,
                       .top_k = m->top_k,
                       .tile_rows = tile_rows,
                       .to = *ret_lists};
    td_gpu_launch(q, K_moe_sort, ceil_div(e, WAVES), 0, &a, sizeof a);
    td_gpu_launch(q, K_moe_tiles, 1, e * sizeof(uint32_t), &a, sizeof a);
    return 0;
}

/* The shared expert is a plain product of every row: its slices wait in partial. */
static void shared_expert(td_queue *q, const td_step *s, const td_moe *m, uint32_t act_stride)
{
    float *act = m->act + (size_t)m->top_k * m->gate->n;
    td_gemm up = {.a = m->a,
                  .a_stride = m->shared_gate->k,
                  .n_heads = 1,
                  .epilogue = TD_EPI_SILU_MUL,
                  .n_out = 1,
                  .w = {m->shared_gate, m->shared_up},
                  .out = {act},
                  .out_stride = {act_stride}};
    td_gpu_gemm(q, s, &up);
    td_gemm down = {.a = act,
                    .a_stride = act_stride,
                    .n_heads = 1,
                    .epilogue = TD_EPI_PARTIAL,
                    .n_out = 1,
                    .w = {m->shared_down},
                    .out = {m->partial},
                    .slices = m->slices};
    td_gpu_gemm(q, s, &down);
}

/* Slices whose outputs fit the scratch are computed and combined together. */
static void down_and_combine(td_queue *q, const td_step *s, const td_moe *m, td_k_moe *a,
                             uint64_t tiles, int many)
{
    enum product type = operand_product(q, m->down->format);
    uint32_t n = m->down->n, take = m->slices;
    size_t slice = (size_t)s->n_rows * m->top_k * n * sizeof(float);
    while (take > 1 && take * slice > EXPERT_OUT_MAX)
        take /= 2;
    a->out = td_gpu_scratch(q, &q->experts, take * slice);
    if (!a->out)
        return;
    a->w[0] = td_gpu_matrix(m->down);
    a->a = m->act;
    a->n_slices = take;
    a->vec = aligned(a->a, a->a_stride, a->inner, a->w[0].k);
    a->out_stride = n;
    uint64_t groups = ceil_div(a->w[0].n_tiles, WAVES * (many ? 2 : 1));
    td_k_moe_combine c = {.step = a->step,
                          .y = a->out,
                          .weights = m->weights,
                          .n = n,
                          .top_k = m->top_k,
                          .n_slices = take,
                          .shared = m->shared_down != NULL,
                          .partial = m->partial};
    for (uint32_t at = 0; at < m->slices; at += take) {
        a->slice0 = c.slice0 = at;
        td_gpu_launch(q, pick(K_moe_down_few_bb, many, type), tiles * groups * take,
                      lds_of(many, type), a, sizeof *a);
        td_gpu_launch(q, K_moe_combine, (uint64_t)s->n_rows * take, 0, &c, sizeof c);
    }
}

void td_gpu_moe(td_queue *q, const td_step *s, const td_moe *m)
{
    enum product type = operand_product(q, m->gate->format);
    uint32_t inner = m->gate->n;
    uint32_t act_stride = m->top_k * inner + (m->shared_gate ? m->shared_gate->n : 0);
    int many = moe_is_many(m, type, s->n_rows);
    uint64_t tiles = 0;
    td_k_moe a = {.step = td_gpu_step(q, s),
                  .a = m->a,
                  .a_stride = m->gate->k,
                  .vec = aligned(m->a, m->gate->k, 0, m->gate->k),
                  .round_out = q->o.act == TD_BF16,
                  .top_k = m->top_k,
                  .inner = inner,
                  .slices = m->slices,
                  .w = {td_gpu_matrix(m->gate), td_gpu_matrix(m->up)},
                  .out = m->act,
                  .out_stride = act_stride};
    if (m->gate->format != m->up->format || m->gate->format != m->down->format) {
        td_gpu_fail(q, -ENOTSUP);
        return;
    }
    if (sort_rows(q, s, m, many ? MANY_ROWS : FEW_ROWS, &a.lists, &tiles) < 0)
        return;
    td_gpu_launch(q, pick(K_moe_up_few_bb, many, type), tiles * ceil_div(a.w[0].n_tiles, WAVES),
                  lds_of(many, type), &a, sizeof a);
    if (m->shared_gate)
        shared_expert(q, s, m, act_stride);
    a.a_stride = act_stride;
    down_and_combine(q, s, m, &a, tiles, many);
}
