/* SPDX-License-Identifier: Apache-2.0 */
/* Binding: every tensor of the checkpoint goes to one named slot, with its shape checked; a tensor
 * that no slot takes is an error, and so is a slot that finds none. The model hash is taken on the
 * way. Loads a rank's share of heads and widths. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bug.h"
#include "base/hash.h"
#include "engine/binder.h"
#include "kernels/formats.h"

#include "base/banned.h"

/* Names of its halves in a packed model. */
static const char UK[] = "self_attn.kv_b_proj.weight:wuk", UV[] = "self_attn.kv_b_proj.weight:wuv";

/* Sources of head 0; bytes to the next head's. Item 0 is the sum, the others are heads. */
typedef struct kv_b_job {
    const td_backend *be;
    const td_config *c;
    const td_layer *l;
    td_weight_src uk, uv;
    size_t uk_bytes, uv_bytes, uv_scales;
    td_st_tensor *t;
} kv_b_job;

static void kv_b_item(void *arg, uint32_t item, uint32_t thread)
{
    (void)thread;
    const kv_b_job *j = arg;
    if (item-- == 0) {
        td_bind_sum(j->t);
        return;
    }
    td_weight_src uk = j->uk, uv = j->uv;
    uk.base = (const uint8_t *)uk.base + item * j->uk_bytes;
    uv.base = (const uint8_t *)uv.base + item * j->uv_bytes;
    if (uv.scales)
        uv.scales = (const uint8_t *)uv.scales + item * j->uv_scales;
    j->be->weight_fill(j->l->w_uk, item, 0, j->c->kv_lora, &uk);
    j->be->weight_fill(j->l->w_uv, item, 0, j->c->v_dims, &uv);
}

/* kv_b [H * (N + V)][C] as stored. Decoded values, where it is quantised: of the BF16 that MXFP4's
 * are, or f32. */
static void kv_b_sources(const td_config *c, const td_bind_source *s, float *values, kv_b_job *j)
{
    size_t rows = c->nope + c->v_dims, unit = td_dtype_bytes(j->uk.dtype);
    j->uk.n_stride = 1;
    j->uk.k_stride = c->kv_lora;
    j->uk.base = values ? (const void *)values : s->t->data;
    j->uk_bytes = rows * c->kv_lora * unit;
    j->uv = j->uk;
    j->uv.n_stride = c->kv_lora;
    j->uv.k_stride = 1;
    j->uv.base = (const uint8_t *)j->uk.base + (size_t)c->nope * c->kv_lora * unit;
    j->uv_bytes = j->uk_bytes;
    if (s->format != TD_W_MXFP4)
        return;
    size_t codes = c->kv_lora / 2, scales = c->kv_lora / TD_MX_GROUP;
    j->uv = td_bind_view(s);
    j->uv.base = (const uint8_t *)j->uv.base + c->nope * codes;
    j->uv.scales = (const uint8_t *)j->uv.scales + c->nope * scales;
    j->uv_bytes = rows * codes;
    j->uv_scales = rows * scales;
}

/* In place. What MXFP4 can say has at most two digits and an exponent of f32: nothing is lost. */
static void narrow(float *values, size_t n)
{
    uint16_t *out = (uint16_t *)values;
    for (size_t i = 0; i < n; i++) {
        uint32_t u;
        memcpy(&u, values + i, 4);
        uint16_t half = (uint16_t)(u >> 16);
        memcpy(out + i, &half, 2);
    }
}

static void kv_b_tensors(td_binder *b, td_layer *l, td_weight_format uk, td_weight_format uv)
{
    const td_config *c = &b->m->config;
    const td_backend *be = b->m->backend;
    int r = be->weight_new(uk, c->n_heads, c->kv_lora, c->nope, &l->w_uk);
    l->w_uk = td_bind_own(b, l->w_uk, r);
    r = l->w_uk ? be->weight_new(uv, c->n_heads, c->v_dims, c->kv_lora, &l->w_uv) : -ENOMEM;
    l->w_uv = td_bind_own(b, l->w_uv, r);
}

/* Per head kv_b has N rows of W_UK, then V rows of W_UV. Absorbed: q_lat = W_UK^T q_nope, so W_UK
 * is loaded transposed, [H][C][N]; o = W_UV o_lat, so W_UV is [H][V][C]. Transposed, scales would
 * lie along the wrong axis, so W_UK is decoded first: MXFP4 to BF16, FP8 to f32. W_UV stays MXFP4,
 * whose scales belong to rows; blocks of FP8 scales do not align with heads. */
static void kv_b(td_binder *b, td_layer *l)
{
    const td_config *c = &b->m->config;
    size_t rows = c->nope + c->v_dims;
    if (b->pack) {
        l->w_uk = td_bind_packed(b, UK, c->n_heads, c->kv_lora, c->nope);
        l->w_uv = td_bind_packed(b, UV, c->n_heads, c->v_dims, c->kv_lora);
        return;
    }
    td_bind_source s =
        td_bind_find(b, "self_attn.kv_b_proj.weight", (uint64_t)c->n_heads * rows, c->kv_lora);
    if (!td_bind_agree(b, &s, TD_WC_ATTENTION) || b->check_only)
        return;
    td_weight_format uk = s.format, uv = s.format;
    float *values =
        s.scale ? td_bind_decoded(b, &s, (uint32_t)(c->n_heads * rows), c->kv_lora) : NULL;
    kv_b_job j = {.be = b->m->backend, .c = c, .l = l, .t = s.t};
    j.uk.dtype = (td_dtype)s.t->dtype;
    if (values && s.format == TD_W_MXFP4) {
        narrow(values, c->n_heads * rows * c->kv_lora);
        j.uk.dtype = TD_BF16;
        uk = TD_W_BF16;
    } else if (values) {
        j.uk.dtype = TD_F32;
        uk = uv = TD_W_F32;
    }
    if (!b->failed)
        kv_b_tensors(b, l, uk, uv);
    if (l->w_uv) {
        kv_b_sources(c, &s, values, &j);
        td_pool_run(b->pool, kv_b_item, &j, 1 + c->n_heads);
    }
    free(values);
    td_bind_save(b, UK, l->w_uk, uk, c->n_heads, c->kv_lora, c->nope);
    td_bind_save(b, UV, l->w_uv, uv, c->n_heads, c->v_dims, c->kv_lora);
}

/* mlp.experts.E.<what> for every E, into one tensor of E slabs. */
static td_tensor *experts(td_binder *b, const char *what, uint32_t n, uint32_t k)
{
    char name[TD_BIND_NAME];
    td_tensor *w = NULL;
    td_weight_format format = TD_W_F32;
    uint32_t n_experts = b->m->config.n_experts;
    char all[TD_BIND_NAME];
    snprintf(all, sizeof all, "mlp.experts.*.%s.weight", what);
    if (b->pack)
        return td_bind_packed(b, all, n_experts, n, k);
    for (uint32_t e = 0; e < b->m->config.n_experts && !b->failed; e++) {
        snprintf(name, sizeof name, "mlp.experts.%u.%s.weight", e, what);
        td_bind_source s = td_bind_find(b, name, n, k);
        if (!td_bind_agree(b, &s, TD_WC_EXPERTS) || b->check_only)
            continue;
        if (e == 0) {
            format = s.format;
            int r = b->m->backend->weight_new(format, b->m->config.n_experts, n, k, &w);
            w = td_bind_own(b, w, r);
        }
        if (!w)
            break;
        if (s.format != format) {
            td_bind_fail(b, -EINVAL, "tensor %s is %s, expert 0 of its layer is %s", s.t->name,
                         td_weight_format_name(s.format), td_weight_format_name(format));
            break;
        }
        td_bind_fill(b, w, e, n, &s);
    }
    td_bind_save(b, all, w, format, n_experts, n, k);
    return w;
}

static void glm_indexer(td_binder *b, td_layer *l)
{
    const td_config *c = &b->m->config;
    l->index_q = td_bind_matrix(b, TD_WC_INDEX, "self_attn.indexer.wq_b.weight",
                                c->index_heads * c->index_dims, c->q_lora);
    l->index_k =
        td_bind_matrix(b, TD_WC_INDEX, "self_attn.indexer.wk.weight", c->index_dims, c->hidden);
    l->index_w = td_bind_matrix(b, TD_WC_INDEX, "self_attn.indexer.weights_proj.weight",
                                c->index_heads, c->hidden);
    l->index_norm = td_bind_vector(b, "self_attn.indexer.k_norm.weight", c->index_dims);
    l->index_bias = td_bind_vector(b, "self_attn.indexer.k_norm.bias", c->index_dims);
}

static void glm_attention(td_binder *b, td_layer *l)
{
    const td_config *c = &b->m->config;
    uint32_t head = c->nope + c->rope_dims;
    l->q_a = td_bind_matrix(b, TD_WC_ATTENTION, "self_attn.q_a_proj.weight", c->q_lora, c->hidden);
    l->q_a_norm = td_bind_vector(b, "self_attn.q_a_layernorm.weight", c->q_lora);
    l->q_b = td_bind_matrix(b, TD_WC_ATTENTION, "self_attn.q_b_proj.weight", c->n_heads * head,
                            c->q_lora);
    l->kv_a = td_bind_matrix(b, TD_WC_ATTENTION, "self_attn.kv_a_proj_with_mqa.weight",
                             c->kv_lora + c->rope_dims, c->hidden);
    l->kv_a_norm = td_bind_vector(b, "self_attn.kv_a_layernorm.weight", c->kv_lora);
    kv_b(b, l);
    l->o = td_bind_matrix(b, TD_WC_ATTENTION, "self_attn.o_proj.weight", c->hidden,
                          c->n_heads * c->v_dims);
}

static void glm_moe(td_binder *b, td_layer *l)
{
    const td_config *c = &b->m->config;
    uint32_t shared = c->n_shared * c->moe_inter;
    l->router = td_bind_matrix(b, TD_WC_ROUTER, "mlp.gate.weight", c->n_experts, c->hidden);
    l->router_bias = td_bind_vector(b, "mlp.gate.e_score_correction_bias", c->n_experts);
    l->expert_gate = experts(b, "gate_proj", c->moe_inter, c->hidden);
    l->expert_up = experts(b, "up_proj", c->moe_inter, c->hidden);
    l->expert_down = experts(b, "down_proj", c->hidden, c->moe_inter);
    if (!shared)
        return;
    l->shared_gate =
        td_bind_matrix(b, TD_WC_SHARED, "mlp.shared_experts.gate_proj.weight", shared, c->hidden);
    l->shared_up =
        td_bind_matrix(b, TD_WC_SHARED, "mlp.shared_experts.up_proj.weight", shared, c->hidden);
    l->shared_down =
        td_bind_matrix(b, TD_WC_SHARED, "mlp.shared_experts.down_proj.weight", c->hidden, shared);
}

static void dense_mlp(td_binder *b, td_layer *l)
{
    const td_config *c = &b->m->config;
    l->gate = td_bind_matrix(b, TD_WC_DENSE, "mlp.gate_proj.weight", c->inter, c->hidden);
    l->up = td_bind_matrix(b, TD_WC_DENSE, "mlp.up_proj.weight", c->inter, c->hidden);
    l->down = td_bind_matrix(b, TD_WC_DENSE, "mlp.down_proj.weight", c->hidden, c->inter);
}

static void glm_layer(td_binder *b, td_layer *l, uint32_t i)
{
    const td_config *c = &b->m->config;
    snprintf(b->prefix, sizeof b->prefix, "model.layers.%u.", i);
    l->in_norm = td_bind_vector(b, "input_layernorm.weight", c->hidden);
    l->post_norm = td_bind_vector(b, "post_attention_layernorm.weight", c->hidden);
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
static void glm_mtp(td_binder *b)
{
    const td_config *c = &b->m->config;
    td_layer none = {0};
    char first[TD_BIND_NAME];
    snprintf(first, sizeof first, "model.layers.%u.eh_proj.weight", c->n_layers);
    if (b->failed || !c->n_mtp || !td_st_find(b->st, first))
        return;
    b->check_only = 1;
    glm_layer(b, &none, c->n_layers);
    td_bind_vector(b, "enorm.weight", c->hidden);
    td_bind_vector(b, "hnorm.weight", c->hidden);
    td_bind_matrix(b, TD_WC_DENSE, "eh_proj.weight", c->hidden, 2 * c->hidden);
    td_bind_vector(b, "shared_head.norm.weight", c->hidden);
    b->check_only = 0;
}

static void qwen_layer(td_binder *b, td_layer *l, uint32_t i)
{
    const td_config *c = &b->m->config;
    snprintf(b->prefix, sizeof b->prefix, "model.layers.%u.", i);
    l->in_norm = td_bind_vector(b, "input_layernorm.weight", c->hidden);
    l->post_norm = td_bind_vector(b, "post_attention_layernorm.weight", c->hidden);
    l->q = td_bind_matrix(b, TD_WC_ATTENTION, "self_attn.q_proj.weight", c->n_heads * c->head_dim,
                          c->hidden);
    l->k = td_bind_matrix(b, TD_WC_ATTENTION, "self_attn.k_proj.weight",
                          c->n_kv_heads * c->head_dim, c->hidden);
    l->v = td_bind_matrix(b, TD_WC_ATTENTION, "self_attn.v_proj.weight",
                          c->n_kv_heads * c->head_dim, c->hidden);
    l->q_norm = td_bind_vector(b, "self_attn.q_norm.weight", c->head_dim);
    l->k_norm = td_bind_vector(b, "self_attn.k_norm.weight", c->head_dim);
    l->o = td_bind_matrix(b, TD_WC_ATTENTION, "self_attn.o_proj.weight", c->hidden,
                          c->n_heads * c->head_dim);
    dense_mlp(b, l);
}

/* Some exporters repeat the tied matrix, some quantisers its scales; only equal copies are
 * harmless. */
static void same_head(td_binder *b)
{
    static const char *const parts[] = {"", "_scale", "_scale_inv"};
    char name[TD_BIND_NAME];
    for (size_t i = 0; i < TD_ARRAY_LEN(parts) && !b->pack && !b->failed; i++) {
        snprintf(name, sizeof name, "lm_head.weight%s", parts[i]);
        td_st_tensor *head = td_st_find(b->st, name);
        snprintf(name, sizeof name, "model.embed_tokens.weight%s", parts[i]);
        const td_st_tensor *embed = td_st_find(b->st, name);
        if (!head || !embed)
            continue;
        head->used = 1;
        if (head->dtype != embed->dtype || head->bytes != embed->bytes ||
            memcmp(head->data, embed->data, embed->bytes) != 0)
            td_bind_fail(b, -EINVAL, "%s differs from %s, but tie_word_embeddings is true",
                         head->name, embed->name);
    }
}

static void ends(td_binder *b)
{
    td_model *m = b->m;
    const td_config *c = &m->config;
    b->prefix[0] = 0;
    m->embed = td_bind_matrix(b, TD_WC_EMBED, "model.embed_tokens.weight", c->vocab, c->hidden);
    m->norm = td_bind_vector(b, "model.norm.weight", c->hidden);
    if (!c->tie)
        m->head = td_bind_matrix(b, TD_WC_HEAD, "lm_head.weight", c->vocab, c->hidden);
    else {
        m->head = m->embed;
        m->formats[TD_WC_HEAD] = m->formats[TD_WC_EMBED];
        same_head(b);
    }
}

/* Rotary frequencies are recomputed from rope_theta; old exporters store them. */
static int harmless(const char *name)
{
    size_t n = strlen(name);
    const char *tail = "rotary_emb.inv_freq";
    return n >= strlen(tail) && strcmp(name + n - strlen(tail), tail) == 0;
}

static void refuse_unused(td_binder *b)
{
    for (size_t i = 0; i < td_st_count(b->st) && !b->failed; i++) {
        const td_st_tensor *t = td_st_at(b->st, i);
        if (t->used || harmless(t->name))
            continue;
        td_bind_fail(
            b, -EINVAL,
            "tensor %s has no place in this architecture with this config.json (indexer_types, "
            "mlp_layer_types, "
            "num_hidden_layers); refusing to ignore it",
            t->name);
    }
}

static void hash_tensor(td_hash *h, td_st_tensor *t)
{
    uint8_t shape[8 * TD_ST_RANK_MAX];
    td_bind_sum(t);
    for (uint32_t d = 0; d < t->rank; d++)
        for (int i = 0; i < 8; i++)
            shape[8 * d + (uint32_t)i] = (uint8_t)(t->shape[d] >> (8 * i));
    td_hash_add_field(h, t->name, strlen(t->name));
    td_hash_add_field(h, t->type, strlen(t->type));
    td_hash_add_field(h, shape, 8ul * t->rank);
    td_hash_add(h, t->sum, sizeof t->sum);
}

/* BLAKE2b-256 over config, tokenizer (with template) and, sorted by name, every tensor. */
static void hash_model(td_binder *b, const td_model_options *o)
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

static void bind_layers(td_binder *b, const td_model_options *o)
{
    td_model *m = b->m;
    for (uint32_t i = 0; i < m->config.n_layers && !b->failed; i++) {
        (m->config.arch == TD_ARCH_GLM_MOE_DSA ? glm_layer : qwen_layer)(b, &m->layers[i], i);
        if (o->progress)
            o->progress(o->progress_arg, "loading weights", (double)(i + 1) / m->config.n_layers);
    }
    ends(b);
}

/* What a packed model was made of must be what lies beside it. */
static int check_meta(td_binder *b, const td_pack_meta *meta)
{
    td_model_info *info = &b->m->info;
    const char *layout = b->m->backend->layout;
    if (!layout || strcmp(layout, meta->layout) != 0)
        td_bind_fail(
            b, -ENOTSUP,
            "model.tdpack has the layout %s, kernels %s read %s; use the unpacked checkpoint",
            meta->layout, b->m->backend->isa, layout ? layout : "none");
    else if (memcmp(meta->config_hash, info->config_hash, sizeof meta->config_hash) != 0)
        td_bind_fail(b, -EINVAL, "config.json is not the one that model.tdpack was written with");
    else if (memcmp(meta->tokenizer_hash, info->tokenizer_hash, sizeof meta->tokenizer_hash) != 0)
        td_bind_fail(b, -EINVAL,
                     "the tokenizer or template is not the one that model.tdpack was written "
                     "with");
    memcpy(info->model_hash, meta->model_hash, sizeof info->model_hash);
    memcpy(b->m->formats, meta->formats, sizeof b->m->formats);
    return b->failed;
}

static int load_packed(td_binder *b, const td_model_options *o)
{
    int r = check_meta(b, td_pack_get_meta(b->pack));
    r = r < 0 ? r : td_pack_verify(b->pack, b->m->n_threads, b->err);
    if (r < 0)
        return r;
    bind_layers(b, o);
    return b->failed ? b->failed : td_pack_end(b->pack, b->err);
}

static int save_packed(td_binder *b)
{
    const td_model_info *info = &b->m->info;
    td_pack_meta meta = {0};
    snprintf(meta.layout, sizeof meta.layout, "%s", b->m->backend->layout);
    memcpy(meta.model_hash, info->model_hash, sizeof meta.model_hash);
    memcpy(meta.config_hash, info->config_hash, sizeof meta.config_hash);
    memcpy(meta.tokenizer_hash, info->tokenizer_hash, sizeof meta.tokenizer_hash);
    memcpy(meta.formats, b->m->formats, sizeof meta.formats);
    return td_pack_writer_finish(b->out, &meta, b->err);
}

static int load_checkpoint(td_binder *b, const char *dir, const td_model_options *o)
{
    int r = td_quant_load(dir, &b->quant, b->err);
    r = r < 0 ? r : td_st_open(dir, &b->st, b->err);
    if (r >= 0 && (r = td_pool_open(b->m->n_threads, NULL, 0, &b->pool)) < 0)
        td_err_set(b->err, r, "threads: %s", td_errno_text(r));
    if (r >= 0) {
        bind_layers(b, o);
        if (b->m->config.arch == TD_ARCH_GLM_MOE_DSA)
            glm_mtp(b);
        refuse_unused(b);
        hash_model(b, o);
        r = b->failed;
        if (r >= 0 && b->out)
            r = save_packed(b);
        if (r >= 0)
            td_st_give_back(b->st); /* every backend keeps weights in memory of its own */
    }
    td_pool_close(b->pool);
    td_quant_free(b->quant);
    td_st_close(b->st);
    return r;
}

int td_weights_load(td_model *m, const char *dir, const td_model_options *o, td_err *reterr_err)
{
    td_binder b = {.m = m, .dir = dir, .err = reterr_err};
    TD_BUG_ON(m->shard.n_ranks !=
              1); /* shares of heads and widths are cut here once more ranks are accepted */
    int r = td_pack_open(dir, &m->pack, reterr_err);
    if (r < 0)
        return r;
    b.pack = m->pack;
    if (o->pack_to && (b.pack || !m->backend->layout))
        return td_err_set(reterr_err, -EINVAL,
                          b.pack ? "%s is packed already" : "%s: kernels ref have no packed form",
                          dir);
    if (o->pack_to && (r = td_pack_writer_new(o->pack_to, &b.out, reterr_err)) < 0)
        return r;
    r = b.pack ? load_packed(&b, o) : load_checkpoint(&b, dir, o);
    td_pack_writer_free(b.out);
    return r;
}

void td_weights_free(td_model *m)
{
    for (size_t i = 0; i < m->n_owned; i++)
        m->backend->weight_free(m->owned[i]);
    free(m->owned);
    td_pack_close(m->pack);
}
