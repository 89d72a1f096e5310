/* SPDX-License-Identifier: Apache-2.0 */
#include "engine/quant.h"

#include <errno.h>
#include <fnmatch.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/file.h"
#include "base/json.h"
#include "kernels/formats.h"

#include "base/banned.h"

enum { CONFIG_BYTES_MAX = 1 << 20, NAMES_MAX = 65536 };

static const char *const WHAT = "config.json: quantization_config";

/* An entry of layer_quant_config. */
typedef struct rule {
    char *glob;
    td_weight_format format;
} rule;

struct td_quant {
    td_weight_format format;
    char **names; /* modules that stay unquantised: names, parts of names or globs */
    size_t n_names;
    rule *rules; /* the first that matches decides */
    size_t n_rules;
};

static void free_json(json_t **j)
{
    json_decref(*j);
}
#define AUTO_JSON TD_CLEANUP(free_json) json_t *

/* A string that must have one value; absent is fine unless it must be there. */
static int want_str(const json_t *o, const char *key, const char *want, int required, td_err *err)
{
    const char *v = NULL;
    int r = td_json_get_str(o, WHAT, key, &v, err);
    if (r < 0 || (r == 0 && !required))
        return r;
    if (r == 0)
        return td_err_set(err, -EINVAL, "%s: %s is missing; expected \"%s\"", WHAT, key, want);
    if (strcmp(v, want) == 0)
        return 0;
    return td_err_set(err, -ENOTSUP, "%s: %s is \"%.60s\"; only \"%s\" is supported", WHAT, key, v,
                      want);
}

static int want_empty(const json_t *o, const char *key, td_err *err)
{
    const json_t *v = json_object_get(o, key);
    if (!v || json_is_null(v) || (json_is_object(v) && json_object_size(v) == 0))
        return 0;
    return td_err_set(err, -ENOTSUP, "%s: %s is set, which is not supported", WHAT, key);
}

static int is_block(const json_t *o, const char *key)
{
    const json_t *b = json_object_get(o, key);
    return json_is_array(b) && json_array_size(b) == 2 &&
           json_integer_value(json_array_get(b, 0)) == TD_FP8_BLOCK &&
           json_integer_value(json_array_get(b, 1)) == TD_FP8_BLOCK;
}

static int check_mxfp4(const json_t *weight, td_err *err)
{
    int64_t group = 0;
    int r = want_str(weight, "dtype", "fp4", 1, err);
    r = r < 0 ? r : want_str(weight, "qscheme", "per_group", 1, err);
    r = r < 0 ? r : want_str(weight, "scale_format", "e8m0", 1, err);
    r = r < 0 ? r
              : td_json_get_int(weight, WHAT, "group_size", TD_MX_GROUP, TD_MX_GROUP, &group, err);
    if (r == 0 && group == 0)
        r = td_err_set(err, -EINVAL, "%s: group_size is missing; expected 32", WHAT);
    return r;
}

/* One module class of its own: the scheme of its weights. */
static int read_rule(const json_t *layer, rule *ret, td_err *err)
{
    const json_t *weight = json_object_get(layer, "weight");
    const char *dtype = NULL;
    if (!json_is_object(weight))
        return td_err_set(err, -EINVAL, "%s: weight is missing", WHAT);
    int r = td_json_get_str(weight, WHAT, "dtype", &dtype, err);
    if (r < 0)
        return r;
    if (r == 0 || strcmp(dtype, "fp8_e4m3") != 0) {
        ret->format = TD_W_MXFP4;
        return check_mxfp4(weight, err);
    }
    ret->format = TD_W_FP8;
    r = want_str(weight, "qscheme", "per_block", 1, err);
    if (r >= 0 && !is_block(weight, "block_size"))
        r = td_err_set(err, -ENOTSUP, "%s: block_size must be [128, 128]", WHAT);
    return r;
}

static int take_rules(td_quant *q, const json_t *o, td_err *err)
{
    json_t *layers = json_object_get(o, "layer_quant_config"), *layer;
    const char *glob;
    size_t n = json_object_size(layers);
    if (n == 0)
        return want_empty(o, "layer_quant_config", err);
    q->rules = n <= NAMES_MAX ? calloc(n, sizeof *q->rules) : NULL;
    if (!q->rules)
        return td_err_set(err, -ENOMEM, "%s: layer_quant_config: no room for %zu entries", WHAT, n);
    json_object_foreach(layers, glob, layer)
    {
        rule *t = &q->rules[q->n_rules];
        int r = read_rule(layer, t, err);
        if (r < 0) {
            td_err_prefix(err, "layer_quant_config[\"%.80s\"]", glob);
            return r;
        }
        if (!(t->glob = strdup(glob)))
            return td_err_set(err, -ENOMEM, "out of memory");
        q->n_rules++;
    }
    return 0;
}

static int check_quark(const json_t *o, td_err *err)
{
    const json_t *global = json_object_get(o, "global_quant_config"),
                 *weight = json_object_get(global, "weight");
    if (!json_is_object(weight))
        return td_err_set(err, -EINVAL, "%s: global_quant_config.weight is missing", WHAT);
    int r = check_mxfp4(weight, err);
    static const char *const empty[] = {"layer_type_quant_config", "kv_cache_quant_config",
                                        "algo_config", "softmax_quant_spec"};
    for (size_t i = 0; r >= 0 && i < sizeof empty / sizeof *empty; i++)
        r = want_empty(o, empty[i], err);
    return r;
}

static int check_fp8(const json_t *o, td_err *err)
{
    int r = want_str(o, "fmt", "e4m3", 0, err);
    r = r < 0 ? r : want_str(o, "activation_scheme", "dynamic", 0, err);
    if (r < 0)
        return r;
    if (is_block(o, "weight_block_size"))
        return 0;
    return td_err_set(err, -ENOTSUP, "%s: weight_block_size must be [128, 128]", WHAT);
}

static int take_names(td_quant *q, const json_t *o, const char *key, td_err *err)
{
    const json_t *a = json_object_get(o, key);
    if (!a || json_is_null(a))
        return 0;
    size_t n = json_array_size(a);
    if (!json_is_array(a) || n > NAMES_MAX)
        return td_err_set(err, -EINVAL, "%s: %s must be a list of at most %d names", WHAT, key,
                          NAMES_MAX);
    q->names = calloc(n ? n : 1, sizeof *q->names);
    if (!q->names)
        return td_err_set(err, -ENOMEM, "out of memory");
    for (size_t i = 0; i < n; i++) {
        const char *s = json_string_value(json_array_get(a, i));
        if (!s || strncmp(s, "re:", 3) == 0)
            return td_err_set(err, -ENOTSUP, "%s: %s[%zu] must be a name or a glob", WHAT, key, i);
        q->names[q->n_names] = strdup(s);
        if (!q->names[q->n_names++])
            return td_err_set(err, -ENOMEM, "out of memory");
    }
    return 0;
}

static int read_quant(const json_t *o, td_quant *q, td_err *err)
{
    const char *method = NULL;
    int r = td_json_get_str(o, WHAT, "quant_method", &method, err);
    if (r < 0)
        return r;
    if (r && strcmp(method, "quark") == 0) {
        q->format = TD_W_MXFP4;
        r = check_quark(o, err);
        r = r < 0 ? r : take_rules(q, o, err);
        return r < 0 ? r : take_names(q, o, "exclude", err);
    }
    if (r && strcmp(method, "fp8") == 0) {
        q->format = TD_W_FP8;
        r = check_fp8(o, err);
        return r < 0 ? r : take_names(q, o, "modules_to_not_convert", err);
    }
    return td_err_set(err, -ENOTSUP,
                      "%s: quant_method \"%.60s\" is not supported; supported are fp8 and quark",
                      WHAT, method ? method : "");
}

int td_quant_parse(const char *config, size_t n, td_quant **ret, td_err *reterr_err)
{
    AUTO_JSON root = NULL;
    td_json_limits limits = {.max_bytes = CONFIG_BYTES_MAX};
    int r = td_json_parse(config, n, &limits, "config.json", &root, reterr_err);
    if (r < 0)
        return r;
    const json_t *o = json_object_get(root, "quantization_config");
    *ret = NULL;
    if (!o || json_is_null(o))
        return 0;
    if (!json_is_object(o))
        return td_err_set(reterr_err, -EINVAL, "%s must be an object", WHAT);
    td_quant *q = calloc(1, sizeof *q);
    if (!q)
        return td_err_set(reterr_err, -ENOMEM, "out of memory");
    r = read_quant(o, q, reterr_err);
    if (r < 0) {
        td_quant_free(q);
        return r;
    }
    *ret = q;
    return 0;
}

int td_quant_load(const char *dir, td_quant **ret, td_err *reterr_err)
{
    TD_AUTO_FREE char *path = td_path_join(dir, "config.json");
    TD_AUTO_FREE char *text = NULL;
    size_t n = 0;
    if (!path)
        return td_err_set(reterr_err, -ENOMEM, "out of memory");
    int r = td_file_read(path, CONFIG_BYTES_MAX, &text, &n, reterr_err);
    r = r < 0 ? r : td_quant_parse(text, n, ret, reterr_err);
    if (r < 0)
        td_err_prefix(reterr_err, "%s", dir);
    return r;
}

void td_quant_free(td_quant *q)
{
    if (!q)
        return;
    for (size_t i = 0; i < q->n_names; i++)
        free(q->names[i]);
    free(q->names);
    for (size_t i = 0; i < q->n_rules; i++)
        free(q->rules[i].glob);
    free(q->rules);
    free(q);
}

/* As transformers and Quark match: a glob, the whole name, its beginning or its end at a dot. */
static int matches(const char *pattern, const char *module)
{
    size_t p = strlen(pattern), m = strlen(module);
    if (fnmatch(pattern, module, 0) == 0)
        return 1;
    if (p > m)
        return 0;
    return (strncmp(module, pattern, p) == 0 && module[p] == '.') ||
           (p < m && module[m - p - 1] == '.' && strcmp(module + m - p, pattern) == 0);
}

/* The published FP8 checkpoint lists self_attn.indexers_proj, which no module is called; it means
 * indexer.weights_proj. */
static int listed(const td_quant *q, const char *module)
{
    const char *indexer = strstr(module, ".indexer.weights_proj");
    for (size_t i = 0; i < q->n_names; i++) {
        if (matches(q->names[i], module))
            return 1;
        size_t n = strlen(q->names[i]);
        const char *tail = "indexers_proj";
        if (indexer && n >= strlen(tail) && strcmp(q->names[i] + n - strlen(tail), tail) == 0)
            return 1;
    }
    return 0;
}

/* What the list says of a module. named: it says so by name. F32 stands for plain. */
static td_weight_format expected(const td_quant *q, const char *module, int *ret_named)
{
    *ret_named = 1;
    if (listed(q, module))
        return TD_W_F32;
    for (size_t i = 0; i < q->n_rules; i++)
        if (fnmatch(q->rules[i].glob, module, 0) == 0)
            return q->rules[i].format;
    *ret_named = 0;
    return q->format;
}

int td_quant_check(const td_quant *q, const char *module, int linear, td_weight_format format,
                   td_err *reterr_err)
{
    int quantised = format == TD_W_FP8 || format == TD_W_MXFP4, named = 0;
    const char *remedy = "the list and the tensors disagree; fetch the checkpoint again or ask "
                         "whoever converted it";
    if (!q && quantised)
        return td_err_set(reterr_err, -EINVAL,
                          "module %s is stored as %s, but config.json has no quantization_config; "
                          "%s",
                          module, td_weight_format_name(format), remedy);
    if (!q)
        return 0;
    td_weight_format want = expected(q, module, &named);
    if (quantised && want == TD_W_F32)
        return td_err_set(reterr_err, -EINVAL,
                          "module %s is stored as %s, but quantization_config excludes it; %s",
                          module, td_weight_format_name(format), remedy);
    if (!quantised && want != TD_W_F32 && (linear || named))
        return td_err_set(reterr_err, -EINVAL,
                          "module %s is stored as %s, but quantization_config does not exclude it "
                          "from %s; %s",
                          module, td_weight_format_name(format), td_weight_format_name(want),
                          remedy);
    if (quantised && want != format)
        return td_err_set(reterr_err, -EINVAL,
                          "module %s is stored as %s, but quantization_config says %s; %s", module,
                          td_weight_format_name(format), td_weight_format_name(want), remedy);
    return 0;
}
