/* SPDX-License-Identifier: Apache-2.0 */
/* The forward pass of qwen3: grouped-query attention with a norm per head, dense SwiGLU. Source:
 * transformers' qwen3. */
#include <math.h>

#include "engine/internal.h"

#include "base/banned.h"

static void attend(td_engine *e, const td_layer *l)
{
    const td_config *c = &e->model->config;
    td_buffers *b = &e->buf;
    td_gemm in = {.a = b->h,
                  .a_stride = c->hidden,
                  .n_heads = 1,
                  .epilogue = TD_EPI_F32,
                  .n_out = 3,
                  .w = {l->q, l->k, l->v},
                  .out = {b->q, b->k, b->v},
                  .out_stride = {c->n_heads * c->head_dim, c->n_kv_heads * c->head_dim,
                                 c->n_kv_heads * c->head_dim}};
    e->be->gemm(e->queue, &e->step, &in);
    td_gqa_write write = {.q = b->q,
                          .k = b->k,
                          .v = b->v,
                          .q_norm = l->q_norm,
                          .k_norm = l->k_norm,
                          .eps = c->eps,
                          .n_heads = c->n_heads,
                          .n_kv_heads = c->n_kv_heads,
                          .dims = c->head_dim,
                          .rope = {0, c->rope_dims},
                          .kv = e->model->kv,
                          .layer_offset = l->kv_offset};
    e->be->gqa_write(e->queue, &e->step, &write);
    td_attend_gqa att = {.q = b->q,
                         .scale = 1.0f / sqrtf((float)c->head_dim),
                         .n_heads = c->n_heads,
                         .n_kv_heads = c->n_kv_heads,
                         .dims = c->head_dim,
                         .kv = e->model->kv,
                         .layer_offset = l->kv_offset,
                         .o = b->o};
    e->be->attend_gqa(e->queue, &e->step, &att);
    td_row_parallel(e, b->o, c->n_heads * c->head_dim, l->o);
}

void td_qwen3_forward(td_engine *e)
{
    const td_model *m = e->model;
    const td_config *c = &m->config;
    td_buffers *b = &e->buf;
    const float *delta = NULL;
    e->be->embed(e->queue, &e->step, m->embed, b->x);
    for (uint32_t i = 0; i < c->n_layers; i++) {
        const td_layer *l = &m->layers[i];
        e->be->add_norm(e->queue, &e->step, b->x, delta, l->in_norm, c->eps, c->hidden, b->h, NULL);
        attend(e, l);
        e->be->add_norm(e->queue, &e->step, b->x, b->delta, l->post_norm, c->eps, c->hidden, b->h,
                        NULL);
        td_dense_mlp(e, l);
        delta = b->delta;
    }
    e->be->add_norm(e->queue, &e->step, b->x, delta, m->norm, c->eps, c->hidden, b->h, NULL);
}
