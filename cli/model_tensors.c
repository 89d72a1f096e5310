/* SPDX-License-Identifier: Apache-2.0 */
/* Names and shapes of a checkpoint's tensors, as published checkpoints of these architectures have
 * them. */
#include "cli/model.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/banned.h"

typedef struct list_maker {
    td_random_list *list;
    char prefix[64];
    float residual; /* scale of what adds to the residual, relative to the others */
} list_maker;

static void add(list_maker *m, const char *name, td_random_tensor t)
{
    td_random_list *l = m->list;
    char full[320];
    if (l->n == l->cap && !l->failed) {
        size_t cap = l->cap ? 2 * l->cap : 1024;
        td_random_tensor *p = realloc(l->data, cap * sizeof *p);
        l->failed = !p;
        l->data = p ? p : l->data;
        l->cap = p ? cap : l->cap;
    }
    snprintf(full, sizeof full, "%s%s", m->prefix, name);
    t.name = l->failed ? NULL : strdup(full);
    l->failed |= !t.name;
    if (!l->failed)
        l->data[l->n++] = t;
}

static void matrix(list_maker *m, const char *name, uint64_t n, uint64_t k)
{
    add(m, name, (td_random_tensor){.n = n, .k = k, .scale = 1.0f / sqrtf((float)k)});
}

/* A matrix whose output is added to the residual. */
static void outward(list_maker *m, const char *name, uint64_t n, uint64_t k)
{
    add(m, name, (td_random_tensor){.n = n, .k = k, .scale = m->residual / sqrtf((float)k)});
}

static void norm(list_maker *m, const char *name, uint64_t n)
{
    add(m, name, (td_random_tensor){.n = n, .mean = 1.0f, .scale = 0.1f});
}

static void mlp(list_maker *m, const char *at, uint64_t inner, uint64_t hidden)
{
    char name[128];
    snprintf(name, sizeof name, "%s.gate_proj.weight", at);
    matrix(m, name, inner, hidden);
    snprintf(name, sizeof name, "%s.up_proj.weight", at);
    matrix(m, name, inner, hidden);
    snprintf(name, sizeof name, "%s.down_proj.weight", at);
    outward(m, name, hidden, inner);
}

static void norms(list_maker *m, const td_config *c)
{
    norm(m, "input_layernorm.weight", c->hidden);
    norm(m, "post_attention_layernorm.weight", c->hidden);
}

static void qwen_layer(list_maker *m, const td_config *c)
{
    norms(m, c);
    matrix(m, "self_attn.q_proj.weight", (uint64_t)c->n_heads * c->head_dim, c->hidden);
    matrix(m, "self_attn.k_proj.weight", (uint64_t)c->n_kv_heads * c->head_dim, c->hidden);
    matrix(m, "self_attn.v_proj.weight", (uint64_t)c->n_kv_heads * c->head_dim, c->hidden);
    norm(m, "self_attn.q_norm.weight", c->head_dim);
    norm(m, "self_attn.k_norm.weight", c->head_dim);
    outward(m, "self_attn.o_proj.weight", c->hidden, (uint64_t)c->n_heads * c->head_dim);
    mlp(m, "mlp", c->inter, c->hidden);
}

static void glm_indexer(list_maker *m, const td_config *c)
{
    matrix(m, "self_attn.indexer.wq_b.weight", (uint64_t)c->index_heads * c->index_dims, c->q_lora);
    matrix(m, "self_attn.indexer.wk.weight", c->index_dims, c->hidden);
    matrix(m, "self_attn.indexer.weights_proj.weight", c->index_heads, c->hidden);
    norm(m, "self_attn.indexer.k_norm.weight", c->index_dims);
    add(m, "self_attn.indexer.k_norm.bias", (td_random_tensor){.n = c->index_dims, .scale = 0.1f});
}

static void glm_experts(list_maker *m, const td_config *c)
{
    char name[64];
    matrix(m, "mlp.gate.weight", c->n_experts, c->hidden);
    add(m, "mlp.gate.e_score_correction_bias",
        (td_random_tensor){.n = c->n_experts, .scale = 0.01f, .f32 = 1});
    for (uint32_t e = 0; e < c->n_experts; e++) {
        snprintf(name, sizeof name, "mlp.experts.%u", e);
        mlp(m, name, c->moe_inter, c->hidden);
    }
    if (c->n_shared)
        mlp(m, "mlp.shared_experts", (uint64_t)c->n_shared * c->moe_inter, c->hidden);
}

static void glm_layer(list_maker *m, const td_config *c, uint32_t layer)
{
    uint64_t heads = c->n_heads;
    norms(m, c);
    matrix(m, "self_attn.q_a_proj.weight", c->q_lora, c->hidden);
    norm(m, "self_attn.q_a_layernorm.weight", c->q_lora);
    matrix(m, "self_attn.q_b_proj.weight", heads * (c->nope + c->rope_dims), c->q_lora);
    matrix(m, "self_attn.kv_a_proj_with_mqa.weight", c->kv_lora + c->rope_dims, c->hidden);
    norm(m, "self_attn.kv_a_layernorm.weight", c->kv_lora);
    matrix(m, "self_attn.kv_b_proj.weight", heads * (c->nope + c->v_dims), c->kv_lora);
    outward(m, "self_attn.o_proj.weight", c->hidden, heads * c->v_dims);
    if (c->full[layer])
        glm_indexer(m, c);
    if (c->sparse[layer])
        glm_experts(m, c);
    else
        mlp(m, "mlp", c->inter, c->hidden);
}

static void glm_mtp(list_maker *m, const td_config *c)
{
    glm_layer(m, c, c->n_layers);
    norm(m, "enorm.weight", c->hidden);
    norm(m, "hnorm.weight", c->hidden);
    matrix(m, "eh_proj.weight", c->hidden, 2ull * c->hidden);
    norm(m, "shared_head.norm.weight", c->hidden);
}

void td_random_tensors(const td_config *c, td_random_list *ret_list)
{
    int glm = c->arch == TD_ARCH_GLM_MOE_DSA;
    *ret_list = (td_random_list){0};
    list_maker m = {.list = ret_list, .residual = 1.0f / sqrtf(2.0f * (float)c->n_layers)};
    matrix(&m, "model.embed_tokens.weight", c->vocab, c->hidden);
    norm(&m, "model.norm.weight", c->hidden);
    if (!c->tie)
        matrix(&m, "lm_head.weight", c->vocab, c->hidden);
    for (uint32_t i = 0; i < c->n_layers + (glm && c->n_mtp); i++) {
        snprintf(m.prefix, sizeof m.prefix, "model.layers.%u.", i);
        if (i == c->n_layers)
            glm_mtp(&m, c);
        else if (glm)
            glm_layer(&m, c, i);
        else
            qwen_layer(&m, c);
    }
}

void td_random_list_done(td_random_list *l)
{
    for (size_t i = 0; i < l->n; i++)
        free(l->data[i].name);
    free(l->data);
    *l = (td_random_list){0};
}

uint64_t td_random_bytes_of(const td_random_tensor *t)
{
    return t->n * (t->k ? t->k : 1) * (t->f32 ? 4 : 2);
}
