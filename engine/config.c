/* SPDX-License-Identifier: Apache-2.0 */
#include "engine/config.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/bug.h"
#include "base/cleanup.h"
#include "base/file.h"
#include "base/json.h"

#include "base/banned.h"

enum { CONFIG_BYTES_MAX = 1 << 20 };
static const char *const FILE_NAME = "config.json";

static void free_json(json_t **j)
{
    json_decref(*j);
}
#define AUTO_JSON TD_CLEANUP(free_json) json_t *

/* A u32 field of td_config: required unless dflt >= 0. */
typedef struct field {
    const char *key;
    size_t at;
    int64_t min, max, dflt;
} field;

#define F(key, member, min, max, dflt)                                                             \
    {                                                                                              \
        key, offsetof(td_config, member), min, max, dflt                                           \
    }
enum { REQUIRED = -1 };

static const field common_fields[] = {
    F("vocab_size", vocab, 2, 1 << 22, REQUIRED),
    F("hidden_size", hidden, 8, 65536, REQUIRED),
    F("num_hidden_layers", n_layers, 1, TD_LAYERS_MAX - 1, REQUIRED),
    F("num_attention_heads", n_heads, 1, 1024, REQUIRED),
    F("intermediate_size", inter, 1, 1 << 20, REQUIRED),
    F("max_position_embeddings", max_context, 1, 1 << 24, REQUIRED),
};
static const field qwen_fields[] = {
    F("num_key_value_heads", n_kv_heads, 1, 1024, REQUIRED),
    F("head_dim", head_dim, 2, 1024, REQUIRED),
};
static const field glm_fields[] = {
    F("num_key_value_heads", n_kv_heads, 1, 1024, REQUIRED),
    F("q_lora_rank", q_lora, 1, 65536, REQUIRED),
    F("kv_lora_rank", kv_lora, 1, 4096, REQUIRED),
    F("qk_nope_head_dim", nope, 1, 4096, REQUIRED),
    F("qk_rope_head_dim", rope_dims, 2, 1024, REQUIRED),
    F("v_head_dim", v_dims, 1, 4096, REQUIRED),
    F("index_n_heads", index_heads, 1, 1024, REQUIRED),
    F("index_head_dim", index_dims, 2, 4096, REQUIRED),
    F("index_topk", index_topk, 1, 1 << 20, REQUIRED),
    F("n_routed_experts", n_experts, 1, 1024, REQUIRED),
    F("num_experts_per_tok", top_k, 1, 64, REQUIRED),
    F("n_shared_experts", n_shared, 0, 16, REQUIRED),
    F("moe_intermediate_size", moe_inter, 1, 1 << 20, REQUIRED),
    F("n_group", n_groups, 1, 1024, 1),
    F("topk_group", top_groups, 1, 1024, 1),
    F("num_nextn_predict_layers", n_mtp, 0, 1, 0),
};

static int bad(td_err *err, const char *key, const char *text)
{
    return td_err_set(err, -EINVAL, "%s: %s %s", FILE_NAME, key, text);
}

static int read_fields(const json_t *o, const field *f, size_t n, td_config *c, td_err *err)
{
    for (size_t i = 0; i < n; i++) {
        int64_t v = f[i].dflt;
        int r = td_json_get_int(o, FILE_NAME, f[i].key, f[i].min, f[i].max, &v, err);
        if (r < 0)
            return r;
        if (r == 0 && f[i].dflt == REQUIRED)
            return bad(err, f[i].key, "is missing; take the file of the original checkpoint");
        *(uint32_t *)((char *)c + f[i].at) = (uint32_t)v;
    }
    return 0;
}

/* A boolean that must have one value, because the other is another architecture. */
static int require_bool(const json_t *o, const char *key, int want, td_err *err)
{
    int v = want, r = td_json_get_bool(o, FILE_NAME, key, &v, err);
    if (r < 0)
        return r;
    return v == want ? 0
                     : bad(err, key,
                           want ? "must be true: the other form is not supported"
                                : "must be false: the other form is not supported");
}

static int require_str(const json_t *o, const char *key, const char *want, td_err *err)
{
    const char *v = want;
    int r = td_json_get_str(o, FILE_NAME, key, &v, err);
    if (r < 0)
        return r;
    if (strcmp(v, want) == 0)
        return 0;
    return td_err_set(err, -EINVAL, "%s: %s is \"%.60s\"; only \"%s\" is supported", FILE_NAME, key,
                      v, want);
}

static int require_absent(const json_t *o, const char *key, const char *why, td_err *err)
{
    const json_t *v = json_object_get(o, key);
    if (!v || json_is_null(v))
        return 0;
    return td_err_set(err, -EINVAL, "%s: %s is set; %s", FILE_NAME, key, why);
}

/* rope_theta lives in rope_parameters (transformers 5) or at the top (4); a missing one is never a
 * default. */
static int read_rope(const json_t *o, td_config *c, td_err *err)
{
    const json_t *p = json_object_get(o, "rope_parameters");
    if (p && !json_is_null(p) && !json_is_object(p))
        return bad(err, "rope_parameters", "must be an object");
    double inner = 0, outer = 0;
    int ri = json_is_object(p) ? td_json_get_num(p, "config.json: rope_parameters", "rope_theta",
                                                 1.0, 1e12, &inner, err)
                               : 0;
    if (ri < 0)
        return ri;
    int ro = td_json_get_num(o, FILE_NAME, "rope_theta", 1.0, 1e12, &outer, err);
    if (ro < 0)
        return ro;
    if (!ri && !ro)
        return bad(err, "rope_theta",
                   "is missing, both inside rope_parameters and at the top level");
    if (ri && ro && inner != outer)
        return bad(err, "rope_theta", "differs between rope_parameters and the top level");
    c->rope_theta = ri ? inner : outer;
    if (json_is_object(p)) {
        int r = require_str(p, "rope_type", "default", err);
        if (r < 0)
            return r;
    }
    return require_absent(o, "rope_scaling",
                          "scaled rope is not supported yet: remove it only if it was null", err);
}

static int read_eos(const json_t *o, const char *what, td_config *c, td_err *err)
{
    const json_t *e = json_object_get(o, "eos_token_id");
    if (!e || json_is_null(e))
        return 0;
    size_t n = json_is_array(e) ? json_array_size(e) : 1;
    if (n > TD_CONFIG_EOS_MAX)
        return td_err_set(err, -EINVAL, "%s: eos_token_id has %zu ids, at most %d are supported",
                          what, n, TD_CONFIG_EOS_MAX);
    for (size_t i = 0; i < n; i++) {
        const json_t *v = json_is_array(e) ? json_array_get(e, i) : e;
        if (!json_is_integer(v) || json_integer_value(v) < 0 || json_integer_value(v) >= c->vocab)
            return td_err_set(err, -EINVAL, "%s: eos_token_id must be an id below vocab_size %u",
                              what, c->vocab);
        c->eos[i] = (uint32_t)json_integer_value(v);
    }
    c->n_eos = (uint32_t)n;
    return 0;
}

static int read_common(const json_t *o, td_config *c, td_err *err)
{
    double eps = 0;
    int r = read_fields(o, common_fields, TD_ARRAY_LEN(common_fields), c, err);
    if (r < 0)
        return r;
    r = td_json_get_num(o, FILE_NAME, "rms_norm_eps", 1e-12, 1e-2, &eps, err);
    if (r <= 0)
        return r < 0 ? r
                     : bad(err, "rms_norm_eps",
                           "is missing; take the file of the original checkpoint");
    c->eps = (float)eps;
    r = td_json_get_bool(o, FILE_NAME, "tie_word_embeddings", &c->tie, err);
    r = r < 0 ? r : require_str(o, "hidden_act", "silu", err);
    r = r < 0 ? r : require_bool(o, "attention_bias", 0, err);
    r = r < 0 ? r : require_bool(o, "mlp_bias", 0, err);
    r = r < 0 ? r : read_rope(o, c, err);
    return r < 0 ? r : read_eos(o, FILE_NAME, c, err);
}

/* An array of n strings out of two; stores v == one. Returns 0 when absent. */
static int read_types(const json_t *o, const char *key, const char *one, const char *other,
                      uint32_t n, uint8_t *out, td_err *err)
{
    const json_t *a = json_object_get(o, key);
    if (!a || json_is_null(a))
        return 0;
    if (!json_is_array(a) || json_array_size(a) != n)
        return td_err_set(err, -EINVAL, "%s: %s must list one word for each of the %u layers",
                          FILE_NAME, key, n);
    for (uint32_t i = 0; i < n; i++) {
        const char *s = json_string_value(json_array_get(a, i));
        if (!s || (strcmp(s, one) != 0 && strcmp(s, other) != 0))
            return td_err_set(err, -EINVAL, "%s: %s[%u] must be \"%s\" or \"%s\"", FILE_NAME, key,
                              i, one, other);
        out[i] = strcmp(s, one) == 0;
    }
    return 1;
}

static int pattern_indexers(const char *p, td_config *c, td_err *err)
{
    if (strlen(p) != c->n_layers || strspn(p, "FS") != c->n_layers)
        return bad(err, "index_topk_pattern", "must be one F or S for each layer");
    for (uint32_t i = 0; i < c->n_layers; i++)
        c->full[i] = p[i] == 'F';
    return 0;
}

/* indexer_types decides; else a pattern; else the rule; with none of them every layer is full
 * (GLM-5). */
static int read_indexers(const json_t *o, td_config *c, td_err *err)
{
    int r = read_types(o, "indexer_types", "full", "shared", c->n_layers, c->full, err);
    if (r == 0) {
        int64_t freq = 1, offset = 2;
        const char *pattern = NULL;
        r = td_json_get_str(o, FILE_NAME, "index_topk_pattern", &pattern, err);
        r = r < 0 ? r
                  : td_json_get_int(o, FILE_NAME, "index_topk_freq", 1, TD_LAYERS_MAX, &freq, err);
        r = r < 0 ? r
                  : td_json_get_int(o, FILE_NAME, "index_skip_topk_offset", 0, TD_LAYERS_MAX,
                                    &offset, err);
        if (r >= 0 && pattern)
            r = pattern_indexers(pattern, c, err);
        for (int64_t i = 0; r >= 0 && !pattern && i < c->n_layers; i++)
            c->full[i] = (i - offset + 1 > 0 ? i - offset + 1 : 0) % freq == 0;
    }
    if (r < 0)
        return r;
    if (!c->full[0])
        return bad(err, "indexer_types[0]",
                   "must be \"full\": a shared layer needs an earlier full one");
    for (uint32_t i = 0; i < c->n_layers; i++)
        c->n_full += c->full[i];
    c->full[c->n_layers] = 1;
    return 0;
}

static int read_mlp_types(const json_t *o, td_config *c, td_err *err)
{
    int64_t dense = 3;
    int r = read_types(o, "mlp_layer_types", "sparse", "dense", c->n_layers, c->sparse, err);
    if (r == 0) {
        r = td_json_get_int(o, FILE_NAME, "first_k_dense_replace", 0, TD_LAYERS_MAX, &dense, err);
        for (int64_t i = 0; i < c->n_layers; i++)
            c->sparse[i] = i >= dense;
    }
    c->sparse[c->n_layers] = 1;
    return r;
}

static int check_glm(const td_config *c, td_err *err)
{
    if (c->n_kv_heads != c->n_heads)
        return bad(err, "num_key_value_heads",
                   "must equal num_attention_heads: latent attention has no grouped heads");
    if (c->rope_dims % 2)
        return bad(err, "qk_rope_head_dim", "must be even");
    if (c->index_dims < c->rope_dims)
        return bad(err, "index_head_dim", "must be at least qk_rope_head_dim");
    if (c->top_k > c->n_experts)
        return bad(err, "num_experts_per_tok", "is larger than n_routed_experts");
    if (c->n_experts % c->n_groups)
        return bad(err, "n_group", "must divide n_routed_experts");
    if (c->top_groups > c->n_groups)
        return bad(err, "topk_group", "is larger than n_group");
    if (c->n_groups > 1 && c->n_experts / c->n_groups < 2)
        return bad(err, "n_group", "leaves fewer than two experts in a group");
    if (c->top_k > c->n_experts / c->n_groups * c->top_groups)
        return bad(err, "num_experts_per_tok", "is larger than the experts of topk_group groups");
    return 0;
}

/* qk_head_dim repeats nope + rope; when it is there it must agree. head_dim is not read at all. */
static int check_head_dim(const json_t *o, const td_config *c, td_err *err)
{
    int64_t v = c->nope + c->rope_dims;
    int r = td_json_get_int(o, FILE_NAME, "qk_head_dim", 1, 65536, &v, err);
    if (r < 0)
        return r;
    return v == c->nope + c->rope_dims
               ? 0
               : bad(err, "qk_head_dim", "must be qk_nope_head_dim + qk_rope_head_dim");
}

static int read_glm(const json_t *o, td_config *c, td_err *err)
{
    double scale = 1.0, lora_eps = 1e-6;
    int64_t moe_freq = 1;
    c->norm_topk = c->rope_interleave = c->index_rope_interleave = 1;
    int r = read_fields(o, glm_fields, TD_ARRAY_LEN(glm_fields), c, err);
    r = r < 0 ? r : td_json_get_num(o, FILE_NAME, "routed_scaling_factor", 1e-6, 1e6, &scale, err);
    r = r < 0 ? r : td_json_get_num(o, FILE_NAME, "lora_norm_eps", 1e-12, 1e-2, &lora_eps, err);
    r = r < 0 ? r : td_json_get_int(o, FILE_NAME, "moe_layer_freq", 1, 1, &moe_freq, err);
    r = r < 0 ? r : td_json_get_bool(o, FILE_NAME, "norm_topk_prob", &c->norm_topk, err);
    r = r < 0 ? r : td_json_get_bool(o, FILE_NAME, "rope_interleave", &c->rope_interleave, err);
    r = r < 0 ? r
              : td_json_get_bool(o, FILE_NAME, "indexer_rope_interleave", &c->index_rope_interleave,
                                 err);
    r = r < 0 ? r : require_str(o, "scoring_func", "sigmoid", err);
    r = r < 0 ? r : require_str(o, "topk_method", "noaux_tc", err);
    r = r < 0 ? r : check_head_dim(o, c, err);
    r = r < 0 ? r : read_indexers(o, c, err);
    r = r < 0 ? r : read_mlp_types(o, c, err);
    c->routed_scale = (float)scale;
    c->lora_eps = (float)lora_eps;
    return r < 0 ? r : check_glm(c, err);
}

static int read_qwen(const json_t *o, td_config *c, td_err *err)
{
    uint8_t full[TD_LAYERS_MAX];
    int r = read_fields(o, qwen_fields, TD_ARRAY_LEN(qwen_fields), c, err);
    r = r < 0 ? r : require_bool(o, "use_sliding_window", 0, err);
    r = r < 0 ? r
              : read_types(o, "layer_types", "full_attention", "sliding_attention", c->n_layers,
                           full, err);
    if (r < 0)
        return r;
    for (uint32_t i = 0; r && i < c->n_layers; i++)
        if (!full[i])
            return bad(err, "layer_types", "names sliding_attention, which is not supported");
    if (c->n_heads % c->n_kv_heads)
        return bad(err, "num_key_value_heads", "must divide num_attention_heads");
    if (c->head_dim % 2)
        return bad(err, "head_dim", "must be even");
    c->rope_dims = c->head_dim;
    return 0;
}

static int read_arch(const json_t *o, td_arch *ret, td_err *err)
{
    const char *type = NULL;
    int r = td_json_get_str(o, FILE_NAME, "model_type", &type, err);
    if (r <= 0)
        return r < 0 ? r : bad(err, "model_type", "is missing; is this a model directory?");
    for (td_arch a = TD_ARCH_GLM_MOE_DSA; a <= TD_ARCH_QWEN3; a++)
        if (strcmp(type, td_arch_name(a)) == 0) {
            *ret = a;
            return 0;
        }
    return td_err_set(
        err, -EINVAL,
        "%s: model_type \"%.60s\" is not supported; supported are glm_moe_dsa and qwen3", FILE_NAME,
        type);
}

const char *td_arch_name(td_arch a)
{
    return a == TD_ARCH_GLM_MOE_DSA ? "glm_moe_dsa" : "qwen3";
}

int td_config_parse(const char *config, size_t n, const char *generation, size_t generation_n,
                    td_config *ret_config, td_err *reterr_err)
{
    AUTO_JSON root = NULL;
    AUTO_JSON gen = NULL;
    td_json_limits limits = {.max_bytes = CONFIG_BYTES_MAX};
    td_config c = {0};
    int r = td_json_parse(config, n, &limits, FILE_NAME, &root, reterr_err);
    if (r >= 0 && !json_is_object(root))
        r = td_err_set(reterr_err, -EINVAL, "%s: not a JSON object", FILE_NAME);
    r = r < 0 ? r : read_arch(root, &c.arch, reterr_err);
    r = r < 0 ? r : read_common(root, &c, reterr_err);
    if (r >= 0)
        r = (c.arch == TD_ARCH_GLM_MOE_DSA ? read_glm : read_qwen)(root, &c, reterr_err);
    if (r >= 0 && generation) {
        r = td_json_parse(generation, generation_n, &limits, "generation_config.json", &gen,
                          reterr_err);
        if (r >= 0 && !json_is_object(gen))
            r = td_err_set(reterr_err, -EINVAL, "generation_config.json: not a JSON object");
        r = r < 0 ? r : read_eos(gen, "generation_config.json", &c, reterr_err);
    }
    if (r < 0)
        return r;
    *ret_config = c;
    return 0;
}

static int read_file(const char *dir, const char *name, char **ret, size_t *ret_n, td_err *err)
{
    TD_AUTO_FREE char *path = td_path_join(dir, name);
    if (!path)
        return td_err_set(err, -ENOMEM, "out of memory");
    return td_file_read(path, CONFIG_BYTES_MAX, ret, ret_n, err);
}

int td_config_load(const char *dir, td_config *ret_config, td_err *reterr_err)
{
    TD_AUTO_FREE char *config = NULL;
    TD_AUTO_FREE char *gen = NULL;
    size_t n = 0, gen_n = 0;
    int r = read_file(dir, FILE_NAME, &config, &n, reterr_err);
    if (r < 0)
        return r;
    r = read_file(dir, "generation_config.json", &gen, &gen_n, reterr_err);
    if (r < 0 && r != -ENOENT)
        return r;
    r = td_config_parse(config, n, gen, gen_n, ret_config, reterr_err);
    if (r < 0)
        td_err_prefix(reterr_err, "%s", dir);
    return r < 0 ? r : 0;
}
