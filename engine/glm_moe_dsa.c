/* SPDX-License-Identifier: Apache-2.0 */
/* The forward pass of glm_moe_dsa, top to bottom: absorbed latent attention over the positions that
 * a lightning indexer selects, shared layers reusing the last full layer's selection,
 * sigmoid-routed experts. Source: the model's specification (section 2) and transformers'
 * glm_moe_dsa. At most 16 op calls a layer. */
#include <math.h>

#include "engine/internal.h"
#include "kernels/kplan.h"

#include "base/banned.h"

/* Queries, latents and, on a full layer, the indexer's key and head weights from one operand h. */
static void project(td_engine *e, const td_layer *l)
{
    const td_config *c = &e->model->config;
    td_buffers *b = &e->buf;
    uint32_t head = c->nope + c->rope_dims;
    td_gemm in = {
        .a = b->h,
        .a_stride = c->hidden,
        .n_heads = 1,
        .epilogue = TD_EPI_F32,
        .n_out = l->index_q ? 4 : 2,
        .w = {l->q_a, l->kv_a, l->index_k, l->index_w},
        .out = {b->q_a, b->kv_a, b->index_k, b->index_w},
        .out_stride = {c->q_lora, c->kv_lora + c->rope_dims, c->index_dims, c->index_heads}};
    e->be->gemm(e->queue, &e->step, &in);
    e->be->add_norm(e->queue, &e->step, b->q_a, NULL, l->q_a_norm, c->lora_eps, c->q_lora, b->qr,
                    NULL);
    td_gemm up = {.a = b->qr,
                  .a_stride = c->q_lora,
                  .n_heads = 1,
                  .epilogue = TD_EPI_F32,
                  .n_out = l->index_q ? 2 : 1,
                  .w = {l->q_b, l->index_q},
                  .out = {b->q, b->index_q},
                  .out_stride = {c->n_heads * head, c->index_heads * c->index_dims}};
    e->be->gemm(e->queue, &e->step, &up);
}

/* Index keys are written at every length, also where everything is selected: later rows need them.
 */
static void select_positions(td_engine *e, const td_layer *l, uint32_t layer)
{
    const td_config *c = &e->model->config;
    td_buffers *b = &e->buf;
    td_index_write write = {.k = b->index_k,
                            .norm = l->index_norm,
                            .bias = l->index_bias,
                            .eps = 1e-6f,
                            .q = b->index_q,
                            .n_heads = c->index_heads,
                            .dims = c->index_dims,
                            .rope = {c->index_rope_interleave, c->rope_dims},
                            .index = e->model->index,
                            .layer_offset = l->index_offset};
    e->be->index_write(e->queue, &e->step, &write);
    td_index_select select = {.q = b->index_q,
                              .weight = b->index_w,
                              .scale = 1.0f / sqrtf((float)c->index_heads * (float)c->index_dims),
                              .n_heads = c->index_heads,
                              .dims = c->index_dims,
                              .topk = c->index_topk,
                              .index = e->model->index,
                              .layer_offset = l->index_offset,
                              .selected = b->selected,
                              .n_selected = b->n_selected,
                              .margin = e->probe ? b->index_margin : NULL};
    e->be->index_select(e->queue, &e->step, &select);
    td_probe_selection(e, layer);
}

void td_row_parallel(td_engine *e, const float *a, uint32_t k, const td_tensor *w)
{
    td_buffers *b = &e->buf;
    int whole = e->be->sums_slices;
    uint32_t width = e->model->config.hidden;
    td_gemm g = {.a = a,
                 .a_stride = k,
                 .n_heads = 1,
                 .epilogue = whole ? TD_EPI_SUM : TD_EPI_PARTIAL,
                 .n_out = 1,
                 .w = {w},
                 .out = {whole ? b->delta : b->partial},
                 .out_stride = {width},
                 .slices = td_kplan_slices(k)};
    e->be->gemm(e->queue, &e->step, &g);
    if (!whole)
        e->be->reduce_slices(e->queue, &e->step, b->partial, g.slices, width, b->delta);
}

static void attend(td_engine *e, const td_layer *l)
{
    const td_config *c = &e->model->config;
    td_buffers *b = &e->buf;
    uint32_t head = c->nope + c->rope_dims;
    td_gemm absorb = {.a = b->q,
                      .a_stride = c->n_heads * head,
                      .a_head = head,
                      .a_round = 1,
                      .n_heads = c->n_heads,
                      .epilogue = TD_EPI_F32,
                      .n_out = 1,
                      .w = {l->w_uk},
                      .out = {b->q_lat},
                      .out_stride = {c->n_heads * c->kv_lora},
                      .out_head = c->kv_lora};
    e->be->gemm(e->queue, &e->step, &absorb);
    td_attend_mla att = {.q_lat = b->q_lat,
                         .q = b->q,
                         .scale = 1.0f / sqrtf((float)head),
                         .n_heads = c->n_heads,
                         .latent = c->kv_lora,
                         .nope = c->nope,
                         .rope_dims = c->rope_dims,
                         .kv = e->model->kv,
                         .layer_offset = l->kv_offset,
                         .selected = b->selected,
                         .n_selected = b->n_selected,
                         .topk = c->index_topk,
                         .o_lat = b->o_lat};
    e->be->attend_mla(e->queue, &e->step, &att);
    td_gemm value = {.a = b->o_lat,
                     .a_stride = c->n_heads * c->kv_lora,
                     .a_head = c->kv_lora,
                     .a_round = 1,
                     .n_heads = c->n_heads,
                     .epilogue = TD_EPI_OPERAND,
                     .n_out = 1,
                     .w = {l->w_uv},
                     .out = {b->o},
                     .out_stride = {c->n_heads * c->v_dims},
                     .out_head = c->v_dims};
    e->be->gemm(e->queue, &e->step, &value);
    td_row_parallel(e, b->o, c->n_heads * c->v_dims, l->o);
}

static void experts(td_engine *e, const td_layer *l, uint32_t layer)
{
    const td_config *c = &e->model->config;
    td_buffers *b = &e->buf;
    td_route route = {.h = b->h32,
                      .w = l->router,
                      .bias = l->router_bias,
                      .n_experts = c->n_experts,
                      .top_k = c->top_k,
                      .n_groups = c->n_groups,
                      .top_groups = c->top_groups,
                      .norm = c->norm_topk,
                      .scale = c->routed_scale,
                      .scores = b->scores,
                      .experts = b->experts,
                      .weights = b->route_weights,
                      .margin = e->probe ? b->route_margin : NULL};
    e->be->route(e->queue, &e->step, &route);
    td_probe_route(e, layer);
    uint32_t own = td_kplan_slices(c->moe_inter),
             shared = td_kplan_slices(c->n_shared * c->moe_inter);
    td_moe moe = {.a = b->h,
                  .experts = b->experts,
                  .weights = b->route_weights,
                  .n_experts = c->n_experts,
                  .top_k = c->top_k,
                  .gate = l->expert_gate,
                  .up = l->expert_up,
                  .down = l->expert_down,
                  .shared_gate = l->shared_gate,
                  .shared_up = l->shared_up,
                  .shared_down = l->shared_down,
                  .slices = c->n_shared && shared < own ? shared : own,
                  .act = b->act,
                  .partial = b->partial,
                  .out = e->be->sums_slices ? b->delta : NULL};
    e->be->moe(e->queue, &e->step, &moe);
    if (!moe.out)
        e->be->reduce_slices(e->queue, &e->step, b->partial, moe.slices, c->hidden, b->delta);
}

void td_dense_mlp(td_engine *e, const td_layer *l)
{
    const td_config *c = &e->model->config;
    td_buffers *b = &e->buf;
    td_gemm up = {.a = b->h,
                  .a_stride = c->hidden,
                  .n_heads = 1,
                  .epilogue = TD_EPI_SILU_MUL,
                  .n_out = 1,
                  .w = {l->gate, l->up},
                  .out = {b->act},
                  .out_stride = {c->inter}};
    e->be->gemm(e->queue, &e->step, &up);
    td_row_parallel(e, b->act, c->inter, l->down);
}

void td_glm_moe_dsa_forward(td_engine *e)
{
    const td_model *m = e->model;
    const td_config *c = &m->config;
    td_buffers *b = &e->buf;
    const float *delta = NULL; /* what the block before left to add */
    e->be->embed(e->queue, &e->step, m->embed, b->x);
    for (uint32_t i = 0; i < c->n_layers; i++) {
        const td_layer *l = &m->layers[i];
        e->be->add_norm(e->queue, &e->step, b->x, delta, l->in_norm, c->eps, c->hidden, b->h, NULL);
        project(e, l);
        td_mla_write write = {.kv_a = b->kv_a,
                              .norm = l->kv_a_norm,
                              .eps = c->lora_eps,
                              .q = b->q,
                              .n_heads = c->n_heads,
                              .latent = c->kv_lora,
                              .nope = c->nope,
                              .rope = {c->rope_interleave, c->rope_dims},
                              .kv = m->kv,
                              .layer_offset = l->kv_offset};
        e->be->mla_write(e->queue, &e->step, &write);
        if (c->full[i])
            select_positions(e, l, i);
        attend(e, l);
        e->be->add_norm(e->queue, &e->step, b->x, b->delta, l->post_norm, c->eps, c->hidden, b->h,
                        b->h32);
        if (c->sparse[i])
            experts(e, l, i);
        else
            td_dense_mlp(e, l);
        delta = b->delta;
    }
    e->be->add_norm(e->queue, &e->step, b->x, delta, m->norm, c->eps, c->hidden, b->h, NULL);
}
