/* SPDX-License-Identifier: Apache-2.0 */
/* Binding: every tensor of the checkpoint goes to one named slot, with its shape checked; a tensor
 * that no slot takes is an error, and so is a slot that finds none. The model hash is taken on the
 * way. Loads a rank's share of heads and widths. */
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bug.h"
#include "base/hash.h"
#include "engine/internal.h"
#include "engine/safetensors.h"

#include "base/banned.h"

enum { NAME_BYTES = 200 };

typedef struct binder {
    td_model *m;
    td_st *st;
    const char *dir;
    td_err *err;
    int failed; /* sticky: the first error stays in err */
    char prefix[NAME_BYTES];
    int check_only; /* MTP layer: names, types and shapes are checked, nothing is kept */
} binder;

static void fail(binder *b, int code, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
static void fail(binder *b, int code, const char *fmt, ...)
{
    char text[400];
    va_list ap;
    if (b->failed)
        return;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    b->failed = td_err_set(b->err, code, "%s: %s", b->dir, text);
}

static int refuse_type(binder *b, const td_st_tensor *t)
{
    if (t->dtype == TD_F32 || t->dtype == TD_BF16 || t->dtype == TD_F16)
        return 0;
    fail(b, -ENOTSUP,
         "tensor %s has dtype %s: quantised weights are not supported yet; use the BF16 checkpoint",
         t->name, t->type);
    return -ENOTSUP;
}

/* Find prefix + name with the wanted shape (b = 0: a vector of a). NULL and a sticky error
 * otherwise. */
static const td_st_tensor *take(binder *b, const char *name, uint64_t a, uint64_t k)
{
    char full[2 * NAME_BYTES];
    if (b->failed)
        return NULL;
    snprintf(full, sizeof full, "%s%s", b->prefix, name);
    td_st_tensor *t = td_st_find(b->st, full);
    if (!t) {
        fail(b, -EINVAL, "tensor %s is missing; fetch the checkpoint again, or correct config.json",
             full);
        return NULL;
    }
    if (t->used) {
        fail(b, -EINVAL, "tensor %s is needed twice", full);
        return NULL;
    }
    t->used = 1;
    if (refuse_type(b, t) < 0)
        return NULL;
    uint32_t rank = k ? 2 : 1;
    if (t->rank != rank || t->shape[0] != a || (k && t->shape[1] != k)) {
        fail(b, -EINVAL,
             "tensor %s has shape [%llu, %llu] of rank %u, config.json asks for [%llu, %llu]", full,
             (unsigned long long)t->shape[0], (unsigned long long)(t->rank > 1 ? t->shape[1] : 0),
             t->rank, (unsigned long long)a, (unsigned long long)k);
        return NULL;
    }
    return t;
}

static td_tensor *own(binder *b, td_tensor *w, int code)
{
    td_model *m = b->m;
    if (code < 0) {
        fail(b, code, "out of memory for weights");
        return NULL;
    }
    if (m->n_owned == m->cap_owned) {
        size_t cap = m->cap_owned ? 2 * m->cap_owned : 256;
        td_tensor **p = realloc(m->owned, cap * sizeof(td_tensor *));
        if (!p) {
            m->backend->weight_free(w);
            fail(b, -ENOMEM, "out of memory for weights");
            return NULL;
        }
        m->owned = p;
        m->cap_owned = cap;
    }
    m->owned[m->n_owned++] = w;
    m->info.weight_bytes += m->backend->weight_bytes(w);
    return w;
}

static td_weight_src view(const td_st_tensor *t)
{
    return (td_weight_src){.dtype = (td_dtype)t->dtype,
                           .base = t->data,
                           .n_stride = t->rank > 1 ? t->shape[1] : 1,
                           .k_stride = 1};
}

static td_weight_format format_of(const td_st_tensor *t)
{
    return t->dtype == TD_BF16 ? TD_W_BF16 : TD_W_F32;
}

/* Matrix [n][k], as stored. */
static td_tensor *matrix(binder *b, const char *name, uint32_t n, uint32_t k)
{
    const td_st_tensor *t = take(b, name, n, k);
    td_tensor *w = NULL;
    if (!t || b->check_only)
        return NULL;
    int r = b->m->backend->weight_new(format_of(t), 1, n, k, &w);
    if (r >= 0) {
        td_weight_src src = view(t);
        b->m->backend->weight_fill(w, 0, 0, n, &src);
    }
    return own(b, w, r);
}

static td_tensor *vector(binder *b, const char *name, uint32_t n)
{
    const td_st_tensor *t = take(b, name, n, 0);
    td_tensor *w = NULL;
    if (!t || b->check_only)
        return NULL;
    td_weight_src src = view(t);
    int r = b->m->backend->vector_new(n, &src, &w);
    return own(b, w, r);
}

/* kv_b [H * (N + V)][C]: per head N rows of W_UK, then V rows of W_UV. Absorbed: q_lat = W_UK^T
 * q_nope, so W_UK is loaded transposed, [H][C][N]; o = W_UV o_lat, so W_UV is [H][V][C]. */
static void kv_b(binder *b, td_layer *l)
{
    const td_config *c = &b->m->config;
    const td_backend *be = b->m->backend;
    size_t rows = c->nope + c->v_dims, size;
    const td_st_tensor *t =
        take(b, "self_attn.kv_b_proj.weight", (uint64_t)c->n_heads * rows, c->kv_lora);
    if (!t || b->check_only)
        return;
    size = td_dtype_bytes((td_dtype)t->dtype);
    td_weight_src uk = {.dtype = (td_dtype)t->dtype,
                        .base = t->data,
                        .slab_stride = rows * c->kv_lora,
                        .n_stride = 1,
                        .k_stride = c->kv_lora};
    td_weight_src uv = uk;
    uv.base = t->data + (size_t)c->nope * c->kv_lora * size;
    uv.n_stride = c->kv_lora;
    uv.k_stride = 1;
    int r = be->weight_new(format_of(t), c->n_heads, c->kv_lora, c->nope, &l->w_uk);
    l->w_uk = own(b, l->w_uk, r);
    r = l->w_uk ? be->weight_new(format_of(t), c->n_heads, c->v_dims, c->kv_lora, &l->w_uv)
                : -ENOMEM;
    l->w_uv = own(b, l->w_uv, r);
    for (uint32_t h = 0; l->w_uv && h < c->n_heads; h++) {
        be->weight_fill(l->w_uk, h, 0, c->kv_lora, &uk);
        be->weight_fill(l->w_uv, h, 0, c->v_dims, &uv);
    }
}

/* mlp.experts.E.<what> for every E, into one tensor of E slabs. */
static td_tensor *experts(binder *b, const char *what, uint32_t n, uint32_t k)
{
    char name[NAME_BYTES];
    td_tensor *w = NULL;
    if (b->failed)
        return NULL;
    td_weight_format format = TD_W_F32;
    for (uint32_t e = 0; e < b->m->config.n_experts && !b->failed; e++) {
        snprintf(name, sizeof name, "mlp.experts.%u.%s.weight", e, what);
        const td_st_tensor *t = take(b, name, n, k);
        if (!t || b->check_only)
            continue;
        if (e == 0) {
            format = format_of(t);
            int r = b->m->backend->weight_new(format, b->m->config.n_experts, n, k, &w);
            w = own(b, w, r);
        }
        if (!w)
            break;
        if (format_of(t) != format) {
            fail(b, -EINVAL, "tensor %s%s has dtype %s, expert 0 of its layer has another",
                 b->prefix, name, t->type);
            break;
        }
        td_weight_src src = view(t);
        src.slab_stride = 0; /* each expert is a tensor of its own */
        b->m->backend->weight_fill(w, e, 0, n, &src);
    }
    return w;
}

static void glm_indexer(binder *b, td_layer *l)
{
    const td_config *c = &b->m->config;
    l->index_q =
        matrix(b, "self_attn.indexer.wq_b.weight", c->index_heads * c->index_dims, c->q_lora);
    l->index_k = matrix(b, "self_attn.indexer.wk.weight", c->index_dims, c->hidden);
    l->index_w = matrix(b, "self_attn.indexer.weights_proj.weight", c->index_heads, c->hidden);
    l->index_norm = vector(b, "self_attn.indexer.k_norm.weight", c->index_dims);
    l->index_bias = vector(b, "self_attn.indexer.k_norm.bias", c->index_dims);
}

static void glm_attention(binder *b, td_layer *l)
{
    const td_config *c = &b->m->config;
    uint32_t head = c->nope + c->rope_dims;
    l->q_a = matrix(b, "self_attn.q_a_proj.weight", c->q_lora, c->hidden);
    l->q_a_norm = vector(b, "self_attn.q_a_layernorm.weight", c->q_lora);
    l->q_b = matrix(b, "self_attn.q_b_proj.weight", c->n_heads * head, c->q_lora);
    l->kv_a =
        matrix(b, "self_attn.kv_a_proj_with_mqa.weight", c->kv_lora + c->rope_dims, c->hidden);
    l->kv_a_norm = vector(b, "self_attn.kv_a_layernorm.weight", c->kv_lora);
    kv_b(b, l);
    l->o = matrix(b, "self_attn.o_proj.weight", c->hidden, c->n_heads * c->v_dims);
}

static void glm_moe(binder *b, td_layer *l)
{
    const td_config *c = &b->m->config;
    uint32_t shared = c->n_shared * c->moe_inter;
    l->router = matrix(b, "mlp.gate.weight", c->n_experts, c->hidden);
    l->router_bias = vector(b, "mlp.gate.e_score_correction_bias", c->n_experts);
    l->expert_gate = experts(b, "gate_proj", c->moe_inter, c->hidden);
    l->expert_up = experts(b, "up_proj", c->moe_inter, c->hidden);
    l->expert_down = experts(b, "down_proj", c->hidden, c->moe_inter);
    if (!shared)
        return;
    l->shared_gate = matrix(b, "mlp.shared_experts.gate_proj.weight", shared, c->hidden);
    l->shared_up = matrix(b, "mlp.shared_experts.up_proj.weight", shared, c->hidden);
    l->shared_down = matrix(b, "mlp.shared_experts.down_proj.weight", c->hidden, shared);
}

static void dense_mlp(binder *b, td_layer *l)
{
    const td_config *c = &b->m->config;
    l->gate = matrix(b, "mlp.gate_proj.weight", c->inter, c->hidden);
    l->up = matrix(b, "mlp.up_proj.weight", c->inter, c->hidden);
    l->down = matrix(b, "mlp.down_proj.weight", c->hidden, c->inter);
}

static void glm_layer(binder *b, td_layer *l, uint32_t i)
{
    const td_config *c = &b->m->config;
    snprintf(b->prefix, sizeof b->prefix, "model.layers.%u.", i);
    l->in_norm = vector(b, "input_layernorm.weight", c->hidden);
    l->post_norm = vector(b, "post_attention_layernorm.weight", c->hidden);
    glm_attention(b, l);
    if (c->full[i])
        glm_indexer(b, l);
    if (c->sparse[i])
        glm_moe(b, l);
    else
        dense_mlp(b, l);
}

/* The MTP layer is recognised and checked; speculation will run it. A checkpoint may also come
 * without. */
static void glm_mtp(binder *b)
{
    const td_config *c = &b->m->config;
    td_layer none = {0};
    char first[NAME_BYTES];
    snprintf(first, sizeof first, "model.layers.%u.eh_proj.weight", c->n_layers);
    if (b->failed || !c->n_mtp || !td_st_find(b->st, first))
        return;
    b->check_only = 1;
    glm_layer(b, &none, c->n_layers);
    vector(b, "enorm.weight", c->hidden);
    vector(b, "hnorm.weight", c->hidden);
    matrix(b, "eh_proj.weight", c->hidden, 2 * c->hidden);
    vector(b, "shared_head.norm.weight", c->hidden);
    b->check_only = 0;
}

static void qwen_layer(binder *b, td_layer *l, uint32_t i)
{
    const td_config *c = &b->m->config;
    snprintf(b->prefix, sizeof b->prefix, "model.layers.%u.", i);
    l->in_norm = vector(b, "input_layernorm.weight", c->hidden);
    l->post_norm = vector(b, "post_attention_layernorm.weight", c->hidden);
    l->q = matrix(b, "self_attn.q_proj.weight", c->n_heads * c->head_dim, c->hidden);
    l->k = matrix(b, "self_attn.k_proj.weight", c->n_kv_heads * c->head_dim, c->hidden);
    l->v = matrix(b, "self_attn.v_proj.weight", c->n_kv_heads * c->head_dim, c->hidden);
    l->q_norm = vector(b, "self_attn.q_norm.weight", c->head_dim);
    l->k_norm = vector(b, "self_attn.k_norm.weight", c->head_dim);
    l->o = matrix(b, "self_attn.o_proj.weight", c->hidden, c->n_heads * c->head_dim);
    dense_mlp(b, l);
}

static void ends(binder *b)
{
    td_model *m = b->m;
    const td_config *c = &m->config;
    b->prefix[0] = 0;
    m->embed = matrix(b, "model.embed_tokens.weight", c->vocab, c->hidden);
    m->norm = vector(b, "model.norm.weight", c->hidden);
    td_st_tensor *head = td_st_find(b->st, "lm_head.weight");
    if (!c->tie)
        m->head = matrix(b, "lm_head.weight", c->vocab, c->hidden);
    else
        m->head = m->embed;
    /* some exporters repeat the tied matrix; only an equal copy is harmless */
    const td_st_tensor *embed = td_st_find(b->st, "model.embed_tokens.weight");
    if (c->tie && head && embed && !b->failed) {
        head->used = 1;
        if (head->bytes != embed->bytes || memcmp(head->data, embed->data, embed->bytes) != 0)
            fail(b, -EINVAL,
                 "lm_head.weight differs from model.embed_tokens.weight, but tie_word_embeddings "
                 "is true");
    }
}

/* Rotary frequencies are recomputed from rope_theta; old exporters store them. */
static int harmless(const char *name)
{
    size_t n = strlen(name);
    const char *tail = "rotary_emb.inv_freq";
    return n >= strlen(tail) && strcmp(name + n - strlen(tail), tail) == 0;
}

static void refuse_unused(binder *b)
{
    for (size_t i = 0; i < td_st_count(b->st) && !b->failed; i++) {
        const td_st_tensor *t = td_st_at(b->st, i);
        if (t->used || harmless(t->name))
            continue;
        if (refuse_type(b, t) < 0)
            return;
        fail(b, -EINVAL,
             "tensor %s has no place in this architecture with this config.json (indexer_types, "
             "mlp_layer_types, "
             "num_hidden_layers); refusing to ignore it",
             t->name);
    }
}

static void hash_tensor(td_hash *h, const td_st_tensor *t)
{
    uint8_t sum[16], shape[8 * TD_ST_RANK_MAX];
    td_xxh128(t->data, t->bytes, sum);
    for (uint32_t d = 0; d < t->rank; d++)
        for (int i = 0; i < 8; i++)
            shape[8 * d + (uint32_t)i] = (uint8_t)(t->shape[d] >> (8 * i));
    td_hash_add_field(h, t->name, strlen(t->name));
    td_hash_add_field(h, t->type, strlen(t->type));
    td_hash_add_field(h, shape, 8ul * t->rank);
    td_hash_add(h, sum, sizeof sum);
}

/* BLAKE2b-256 over config, tokenizer (with template) and, sorted by name, every tensor. */
static void hash_model(binder *b, const td_model_options *o)
{
    td_model_info *info = &b->m->info;
    td_hash h;
    td_hash_init(&h, NULL, 0, sizeof info->model_hash);
    td_hash_add_field(&h, info->config_hash, sizeof info->config_hash);
    td_hash_add_field(&h, info->tokenizer_hash, sizeof info->tokenizer_hash);
    size_t n = td_st_count(b->st);
    for (size_t i = 0; i < n && !b->failed; i++) {
        hash_tensor(&h, td_st_at(b->st, i));
        if (o->progress && i % 256 == 0)
            o->progress(o->progress_arg, "hashing weights", (double)i / (double)n);
    }
    td_hash_final(&h, info->model_hash);
}

int td_weights_load(td_model *m, const char *dir, const td_model_options *o, td_err *reterr_err)
{
    binder b = {.m = m, .dir = dir, .err = reterr_err};
    int r = td_st_open(dir, &b.st, reterr_err);
    if (r < 0)
        return r;
    TD_BUG_ON(m->shard.n_ranks !=
              1); /* shares of heads and widths are cut here once more ranks are accepted */
    for (uint32_t i = 0; i < m->config.n_layers && !b.failed; i++) {
        (m->config.arch == TD_ARCH_GLM_MOE_DSA ? glm_layer : qwen_layer)(&b, &m->layers[i], i);
        if (o->progress)
            o->progress(o->progress_arg, "loading weights", (double)(i + 1) / m->config.n_layers);
    }
    if (m->config.arch == TD_ARCH_GLM_MOE_DSA)
        glm_mtp(&b);
    ends(&b);
    refuse_unused(&b);
    hash_model(&b, o);
    const td_st_tensor *block = td_st_find(b.st, "model.layers.0.self_attn.o_proj.weight"),
                       *embed = td_st_find(b.st, "model.embed_tokens.weight");
    if (!b.failed) {
        m->block_dtype = (td_dtype)block->dtype;
        m->head_dtype = (td_dtype)embed->dtype;
    }
    td_st_close(b.st);
    return b.failed;
}

void td_weights_free(td_model *m)
{
    for (size_t i = 0; i < m->n_owned; i++)
        m->backend->weight_free(m->owned[i]);
    free(m->owned);
}
