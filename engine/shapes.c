/* SPDX-License-Identifier: Apache-2.0 */
#include "engine/shapes.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bug.h"
#include "base/cleanup.h"
#include "base/file.h"
#include "base/json.h"
#include "engine/config.h"
#include "engine/quant.h"
#include "kernels/formats.h"
#include "kernels/kplan.h"

#include "base/banned.h"

typedef struct lister {
    const char *dir;
    td_config c;
    td_quant *quant;
    td_weight_format plain; /* what is not quantised */
    uint32_t ranks, act_fp8;
    td_shapes *out;
    td_err *err;
    int failed; /* sticky */
    char prefix[64];
} lister;

/* A matrix of a launch: its module, behind the layer's prefix unless whole, and its rows, which are
 * a rank's own where shared. */
typedef struct part {
    const char *module;
    uint32_t n;
    int whole, shared;
} part;

static td_weight_format format_of(const lister *l, const part *p)
{
    char module[160];
    snprintf(module, sizeof module, "%s%s", p->whole ? "" : l->prefix, p->module);
    static const td_weight_format formats[] = {TD_W_BF16, TD_W_FP8, TD_W_MXFP4};
    int linear = !p->whole || !l->c.tie; /* a tied head is the embedding */
    for (size_t i = 0; i < TD_ARRAY_LEN(formats); i++) {
        td_err ignored = {0};
        if (td_quant_check(l->quant, module, linear, formats[i], &ignored) >= 0)
            return i ? formats[i] : l->plain;
    }
    return l->plain;
}

static void add(lister *l, const td_tune_key *k, int launched)
{
    td_shapes *s = l->out;
    for (size_t i = 0; i < s->n; i++)
        if (memcmp(&s->data[i].key, k, sizeof *k) == 0) {
            s->data[i].launched |= launched;
            return;
        }
    if (s->n == s->cap) {
        size_t cap = s->cap ? 2 * s->cap : 64;
        td_shape *data = realloc(s->data, cap * sizeof *data);
        if (!data) {
            l->failed = td_err_set(l->err, -ENOMEM, "out of memory");
            return;
        }
        s->data = data;
        s->cap = cap;
    }
    s->data[s->n++] = (td_shape){*k, launched};
}

static td_tune_key key_of(const lister *l, td_tune_op op, uint32_t n, uint32_t k,
                          td_weight_format format)
{
    return (td_tune_key){.op = op,
                         .n = n,
                         .k = k,
                         .heads = 1,
                         .slices = 1,
                         .format = format,
                         .act_fp8 = format == TD_W_MXFP4 && l->act_fp8,
                         .tp = l->ranks,
                         .ep = 1};
}

/* Two ranks cannot share a scale of FP8: of rows or columns each has whole blocks. */
static void need_blocks(lister *l, const part *p, uint32_t own, td_weight_format f)
{
    if (f == TD_W_FP8 && l->ranks > 1 && own % TD_FP8_BLOCK && !l->failed)
        l->failed = td_err_set(
            l->err, -EINVAL,
            "%s: %s%s is in FP8, and %u of its rows or columns for each of %u ranks are not whole "
            "blocks of %d with a scale; take fewer ranks, or that module in BF16 or MXFP4",
            l->dir, p->whole ? "" : l->prefix, p->module, own, l->ranks, TD_FP8_BLOCK);
}

/* Matrices that meet one operand: those of a format go in one launch. f32 ones have no choice. */
static void product(lister *l, const part *parts, size_t n_parts, uint32_t k, uint32_t heads)
{
    for (td_weight_format f = TD_W_BF16; f < TD_WEIGHT_FORMATS; f++) {
        td_tune_key key = key_of(l, TD_TUNE_GEMM, 0, k, f);
        key.heads = heads;
        for (size_t i = 0; i < n_parts; i++) {
            if (format_of(l, &parts[i]) != f)
                continue;
            key.n += parts[i].n;
            if (parts[i].shared)
                need_blocks(l, &parts[i], parts[i].n, f);
        }
        if (key.n)
            add(l, &key, l->ranks == 1);
    }
}

static uint32_t share(lister *l, uint32_t n, const char *what)
{
    if (n % l->ranks && !l->failed)
        l->failed = td_err_set(l->err, -EINVAL, "%s: %s %u cannot be shared by %u ranks", l->dir,
                               what, n, l->ranks);
    return n / l->ranks;
}

/* Of the whole width k: a rank has whole canonical slices (numerics, rule 12). */
static uint32_t slices_of(lister *l, uint32_t k)
{
    return share(l, td_kplan_slices(k), "the number of canonical slices");
}

/* Sums over the width that ranks share. */
static void row_parallel(lister *l, const char *module, uint32_t n, uint32_t k, uint32_t slices)
{
    part p = {module, n, 0, 0};
    td_weight_format f = format_of(l, &p);
    td_tune_key key = key_of(l, TD_TUNE_GEMM, n, share(l, k, module), f);
    need_blocks(l, &p, key.k, f);
    key.slices = slices;
    if (f != TD_W_F32)
        add(l, &key, l->ranks == 1);
}

static void swiglu(lister *l, const char *gate, uint32_t inner)
{
    part p = {gate, inner, 0, 0};
    td_weight_format f = format_of(l, &p);
    td_tune_key key = key_of(l, TD_TUNE_SILU, share(l, inner, gate), l->c.hidden, f);
    need_blocks(l, &p, key.n, f);
    if (f != TD_W_F32)
        add(l, &key, l->ranks == 1);
}

static void dense(lister *l)
{
    swiglu(l, "mlp.gate_proj", l->c.inter);
    row_parallel(l, "mlp.down_proj", l->c.hidden, l->c.inter, slices_of(l, l->c.inter));
}

static void experts(lister *l)
{
    const td_config *c = &l->c;
    uint32_t shared = c->n_shared * c->moe_inter, slices = td_kplan_slices(c->moe_inter);
    if (c->n_shared && td_kplan_slices(shared) < slices)
        slices = td_kplan_slices(shared);
    uint32_t whole = slices;
    slices = share(l, slices, "the number of canonical slices of an expert");
    part p = {"mlp.experts.0.gate_proj", c->moe_inter, 0, 0};
    td_weight_format f = format_of(l, &p);
    td_tune_key key =
        key_of(l, TD_TUNE_MOE, share(l, c->moe_inter, "moe_intermediate_size"), c->hidden, f);
    need_blocks(l, &p, key.n, f);
    key.slices = slices;
    key.experts = c->n_experts;
    key.top_k = c->top_k;
    if (f != TD_W_F32) {
        add(l, &key, l->ranks == 1);
        td_tune_key fused = key, apart = key;
        fused.experts += c->n_shared;
        fused.top_k += c->n_shared;
        if (c->n_shared)
            add(l, &fused, 0);
        apart.tp = 1; /* each rank has some experts whole */
        apart.ep = l->ranks;
        apart.n = c->moe_inter;
        apart.slices = whole;
        apart.experts = c->n_experts / l->ranks;
        if (l->ranks > 1 && c->n_experts % l->ranks == 0 && apart.experts >= c->top_k)
            add(l, &apart, 0);
    }
    if (!c->n_shared)
        return;
    swiglu(l, "mlp.shared_experts.gate_proj", shared);
    row_parallel(l, "mlp.shared_experts.down_proj", c->hidden, shared, slices);
}

/* The halves of kv_b as weights.c keeps them: the transposed one of MXFP4 in BF16, FP8 as f32. */
static void absorbed(lister *l, const part *uk, const part *uv, uint32_t heads)
{
    td_weight_format f = format_of(l, uk);
    td_tune_key key = key_of(l, TD_TUNE_GEMM, uk->n, l->c.nope, TD_W_BF16);
    key.heads = heads;
    if (f == TD_W_BF16 || f == TD_W_MXFP4) {
        add(l, &key, l->ranks == 1);
        product(l, uv, 1, l->c.kv_lora, heads);
    }
}

static void latent_attention(lister *l, int full)
{
    const td_config *c = &l->c;
    uint32_t heads = share(l, c->n_heads, "num_attention_heads"), head = c->nope + c->rope_dims;
    part in[] = {{"self_attn.q_a_proj", c->q_lora, 0, 0},
                 {"self_attn.kv_a_proj_with_mqa", c->kv_lora + c->rope_dims, 0, 0},
                 {"self_attn.indexer.wk", c->index_dims, 0, 0},
                 {"self_attn.indexer.weights_proj", c->index_heads, 0, 0}};
    part up[] = {{"self_attn.q_b_proj", heads * head, 0, 1},
                 {"self_attn.indexer.wq_b", c->index_heads * c->index_dims, 0, 0}};
    part uk = {"self_attn.kv_b_proj", c->kv_lora, 0, 0},
         uv = {"self_attn.kv_b_proj", c->v_dims, 0, 0};
    product(l, in, full ? 4 : 2, c->hidden, 1);
    product(l, up, full ? 2 : 1, c->q_lora, 1);
    absorbed(l, &uk, &uv, heads);
    row_parallel(l, "self_attn.o_proj", c->hidden, c->n_heads * c->v_dims,
                 slices_of(l, c->n_heads * c->v_dims));
}

static void grouped_attention(lister *l)
{
    const td_config *c = &l->c;
    uint32_t q = share(l, c->n_heads, "num_attention_heads") * c->head_dim,
             kv = share(l, c->n_kv_heads, "num_key_value_heads") * c->head_dim;
    part in[] = {{"self_attn.q_proj", q, 0, 1},
                 {"self_attn.k_proj", kv, 0, 1},
                 {"self_attn.v_proj", kv, 0, 1}};
    product(l, in, TD_ARRAY_LEN(in), c->hidden, 1);
    row_parallel(l, "self_attn.o_proj", c->hidden, c->n_heads * c->head_dim,
                 slices_of(l, c->n_heads * c->head_dim));
}

static void list(lister *l)
{
    const td_config *c = &l->c;
    for (uint32_t i = 0; i < c->n_layers && !l->failed; i++) {
        snprintf(l->prefix, sizeof l->prefix, "model.layers.%u.", i);
        if (c->arch == TD_ARCH_GLM_MOE_DSA)
            latent_attention(l, c->full[i]);
        else
            grouped_attention(l);
        if (c->arch == TD_ARCH_GLM_MOE_DSA && c->sparse[i])
            experts(l);
        else
            dense(l);
    }
    part head = {c->tie ? "model.embed_tokens" : "lm_head", share(l, c->vocab, "vocab_size"), 1, 1};
    product(l, &head, 1, c->hidden, 1);
}

/* BF16, unless the checkpoint's plain tensors are of a type that is kept as f32. */
static int read_plain(lister *l)
{
    TD_AUTO_FREE char *path = td_path_join(l->dir, "config.json");
    json_t *root = NULL;
    if (!path)
        return td_err_set(l->err, -ENOMEM, "out of memory");
    int r = td_json_load(path, NULL, &root, l->err);
    if (r < 0)
        return r;
    const char *type = json_string_value(json_object_get(root, "dtype"));
    if (!type)
        type = json_string_value(json_object_get(root, "torch_dtype"));
    l->plain = !type || strcmp(type, "bfloat16") == 0 ? TD_W_BF16 : TD_W_F32;
    json_decref(root);
    return 0;
}

int td_shapes_add(const char *dir, const uint32_t *ranks, size_t n_ranks, int act_fp8,
                  td_shapes *shapes, td_err *reterr_err)
{
    lister l = {.dir = dir, .act_fp8 = act_fp8 != 0, .out = shapes, .err = reterr_err};
    int r = td_config_load(dir, &l.c, reterr_err);
    r = r < 0 ? r : td_quant_load(dir, &l.quant, reterr_err);
    r = r < 0 ? r : read_plain(&l);
    for (size_t i = 0; r >= 0 && i < n_ranks; i++) {
        l.ranks = ranks[i];
        TD_BUG_ON(!l.ranks);
        list(&l);
        r = l.failed;
    }
    td_quant_free(l.quant);
    return r;
}

void td_shapes_done(td_shapes *s)
{
    free(s->data);
    *s = (td_shapes){0};
}

size_t td_shapes_untuned(const td_shapes *s, const td_tuned *t, uint32_t cus, uint32_t max_rows,
                         td_tune_key *ret_keys, size_t max)
{
    size_t n = 0;
    for (size_t i = 0; i < s->n; i++)
        for (uint32_t rows = 1; s->data[i].launched && rows <= td_tune_rows_class(max_rows);
             rows *= 2) {
            td_tune_key k = s->data[i].key;
            k.cus = cus;
            k.rows = rows;
            if (td_tuned_find(t, &k))
                continue;
            if (n < max)
                ret_keys[n] = k;
            n++;
        }
    return n;
}
