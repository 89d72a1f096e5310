/* SPDX-License-Identifier: Apache-2.0 */
#include "engine/quantize.h"

#include <errno.h>
#include <fnmatch.h>
#include <jansson.h>
#include <math.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/file.h"
#include "base/json.h"
#include "base/version.h"
#include "engine/model_files.h"
#include "engine/safetensors.h"
#include "engine/safetensors_write.h"
#include "kernels/formats.h"
#include "kernels/ref/pool.h"

#include "base/banned.h"

enum { STRIPE = TD_FP8_BLOCK, PATTERN_BYTES = 256 };
static const uint64_t SHARD_BYTES = 5ull << 30;

typedef struct job {
    const td_quantize_options *o;
    td_st *st;
    td_st_writer *out;
    td_pool *pool;
    json_t *config, *kept; /* kept: names of linear modules that stay as they are */
    char mtp[16];          /* number of the MTP layer, as text */
    td_err *err;
} job;

const char *const *td_quantize_default_exclude(td_weight_format format)
{
    static const char *const mxfp4[] = {
        "*self_attn*",  "*mlp.gate",      "*lm_head",        "*mlp.gate_proj",
        "*mlp.up_proj", "*mlp.down_proj", "*layers.{mtp}.*", NULL};
    static const char *const fp8[] = {"*lm_head", "*mlp.gate", "*indexer.weights_proj", "*eh_proj",
                                      NULL};
    return format == TD_W_MXFP4 ? mxfp4 : fp8;
}

static int ends_in(const char *s, const char *tail)
{
    size_t n = strlen(s), m = strlen(tail);
    return n >= m && strcmp(s + n - m, tail) == 0;
}

/* Module of a matrix: name without ".weight". 0: it is none. */
static int matrix_module(const td_st_tensor *t, char *module, size_t size)
{
    static const char suffix[] = ".weight";
    size_t n = strlen(t->name), s = sizeof suffix - 1;
    if (t->rank != 2 || n <= s || n >= size || !ends_in(t->name, suffix))
        return 0;
    memcpy(module, t->name, n - s);
    module[n - s] = 0;
    return !ends_in(module, "norm");
}

static int is_linear(const char *module)
{
    return !strstr(module, "embed");
}

/* {mtp} stands for the number of the MTP layer. */
static void expand(const job *j, const char *pattern, char out[PATTERN_BYTES])
{
    const char *at = strstr(pattern, "{mtp}");
    if (!at)
        snprintf(out, PATTERN_BYTES, "%s", pattern);
    else
        snprintf(out, PATTERN_BYTES, "%.*s%s%s", (int)(at - pattern), pattern, j->mtp, at + 5);
}

static int named(const job *j, const char *const *globs, size_t n, const char *module)
{
    char pattern[PATTERN_BYTES];
    for (size_t i = 0; i < n; i++) {
        expand(j, globs[i], pattern);
        if (fnmatch(pattern, module, 0) == 0)
            return 1;
    }
    return 0;
}

/* The format of a matrix that is quantised, 0: it is kept, -errno. */
_Static_assert(TD_W_MXFP4 > 0 && TD_W_FP8 > 0, "0 says kept");
static int decide(job *j, const td_st_tensor *t)
{
    const td_quantize_options *o = j->o;
    td_weight_format format = o->format;
    char module[TD_ST_NAME_MAX + 1];
    if (t->dtype == TD_U8 || t->dtype == TD_F8E4M3)
        return td_err_set(j->err, -EINVAL,
                          "tensor %s has dtype %s: the checkpoint is quantised already; start from "
                          "the BF16 one",
                          t->name, t->type);
    if (!matrix_module(t, module, sizeof module))
        return 0;
    if (named(j, o->fp8, o->n_fp8, module)) {
        format = TD_W_FP8;
    } else if (!is_linear(module)) {
        return 0;
    } else if (named(j, o->exclude, o->n_exclude, module)) {
        json_array_append_new(j->kept, json_string(module));
        return 0;
    }
    if (ends_in(module, ".mlp.gate"))
        return td_err_set(j->err, -EINVAL,
                          "module %s is a router of experts, which must stay plain; exclude it, "
                          "and name it in no other list",
                          module);
    if (t->dtype != TD_BF16 && t->dtype != TD_F32 && t->dtype != TD_F16)
        return td_err_set(j->err, -EINVAL, "tensor %s has dtype %s, which is no weight", t->name,
                          t->type);
    if (format == TD_W_MXFP4 && t->shape[1] % TD_MX_GROUP)
        return td_err_set(j->err, -EINVAL,
                          "tensor %s has rows of %llu, not a multiple of %d; exclude module %s",
                          t->name, (unsigned long long)t->shape[1], TD_MX_GROUP, module);
    return (int)format;
}

static uint64_t blocks_of(uint64_t n)
{
    return (n + TD_FP8_BLOCK - 1) / TD_FP8_BLOCK;
}

/* Type, shape and bytes of codes and scales. */
typedef struct plan {
    const char *type, *scale_type, *suffix;
    uint64_t shape[2], scale_shape[2], bytes, scale_bytes;
} plan;

static plan plan_of(const td_st_tensor *t, td_weight_format f)
{
    uint64_t n = t->shape[0], k = t->shape[1];
    plan p = {.type = "U8",
              .scale_type = "U8",
              .suffix = "_scale",
              .shape = {n, k / 2},
              .scale_shape = {n, k / TD_MX_GROUP}};
    if (f == TD_W_FP8)
        p = (plan){.type = "F8_E4M3",
                   .scale_type = "F32",
                   .suffix = "_scale_inv",
                   .shape = {n, k},
                   .scale_shape = {blocks_of(n), blocks_of(k)}};
    p.bytes = p.shape[0] * p.shape[1];
    p.scale_bytes = p.scale_shape[0] * p.scale_shape[1] * (f == TD_W_FP8 ? 4 : 1);
    return p;
}

/* Every output tensor is declared; used holds its decision. */
static int declare(job *j, size_t *ret_quantised)
{
    size_t quantised = 0;
    for (size_t i = 0; i < td_st_count(j->st); i++) {
        td_st_tensor *t = td_st_at(j->st, i);
        int r = decide(j, t);
        if (r < 0)
            return r;
        t->used = r;
        if (!r) {
            r = td_st_writer_add(j->out, t->name, t->type, t->shape, t->rank, t->bytes, j->err);
        } else {
            char name[TD_ST_NAME_MAX + 16];
            plan p = plan_of(t, (td_weight_format)r);
            snprintf(name, sizeof name, "%s%s", t->name, p.suffix);
            r = td_st_writer_add(j->out, t->name, p.type, p.shape, 2, p.bytes, j->err);
            r = r < 0 ? r
                      : td_st_writer_add(j->out, name, p.scale_type, p.scale_shape, 2,
                                         p.scale_bytes, j->err);
            quantised++;
        }
        if (r < 0)
            return r;
    }
    *ret_quantised = quantised;
    return quantised ? 0
                     : td_err_set(j->err, -EINVAL,
                                  "nothing is left to quantise: every module is excluded");
}

/* One tensor at work. */
typedef struct work {
    const td_st_tensor *t;
    uint8_t *codes, *scales;
    td_weight_format format;
    struct loss {
        double error, norm, largest;
    } * stripes;
    _Atomic int bad; /* a value that is not finite, or out of memory */
} work;

static void load_row(const td_st_tensor *t, uint64_t row, float *x)
{
    uint64_t k = t->shape[1];
    const uint8_t *p = t->data + row * k * td_dtype_bytes((td_dtype)t->dtype);
    if (t->dtype == TD_F32) {
        memcpy(x, p, k * sizeof *x);
        return;
    }
    for (uint64_t i = 0; i < k; i++) {
        uint16_t h;
        memcpy(&h, p + 2 * i, 2);
        uint32_t u = (uint32_t)h << 16;
        if (t->dtype == TD_BF16)
            memcpy(&x[i], &u, 4);
        else
            x[i] = td_f16_to_f32(h);
    }
}

static void add_loss(struct loss *l, float x, float q)
{
    double d = fabs((double)x - (double)q);
    l->error += d * d;
    l->norm += (double)x * (double)x;
    if (!(d <= l->largest))
        l->largest = d;
}

static void mxfp4_row(work *w, uint64_t row, const float *x, struct loss *l)
{
    uint64_t groups = w->t->shape[1] / TD_MX_GROUP;
    for (uint64_t g = 0; g < groups; g++, x += TD_MX_GROUP) {
        uint8_t *codes = w->codes + (row * groups + g) * (TD_MX_GROUP / 2),
                *scale = w->scales + row * groups + g;
        float back[TD_MX_GROUP];
        *scale = td_mx_scale_even(x);
        td_mx_encode(x, *scale, codes);
        td_mx_decode(codes, *scale, back);
        for (int i = 0; i < TD_MX_GROUP; i++)
            add_loss(l, x[i], back[i]);
    }
}

/* 128 columns of the stripe's rows: one scale. */
static void fp8_block(work *w, uint64_t row0, uint64_t rows, uint64_t k0, const float *x,
                      struct loss *l)
{
    uint64_t k = w->t->shape[1], k1 = k0 + STRIPE < k ? k0 + STRIPE : k;
    float amax = 0.0f;
    for (uint64_t r = 0; r < rows; r++)
        for (uint64_t i = k0; i < k1; i++)
            amax = fabsf(x[r * k + i]) > amax ? fabsf(x[r * k + i]) : amax;
    float scale = td_fp8_scale(amax);
    memcpy(w->scales + (row0 / STRIPE * blocks_of(k) + k0 / STRIPE) * 4, &scale, 4);
    for (uint64_t r = 0; r < rows; r++)
        for (uint64_t i = k0; i < k1; i++) {
            uint8_t code = td_f32_to_e4m3(x[r * k + i] / scale);
            w->codes[(row0 + r) * k + i] = code;
            add_loss(l, x[r * k + i], td_e4m3_to_f32(code) * scale);
        }
}

static void stripe_item(void *arg, uint32_t item, uint32_t thread)
{
    (void)thread;
    work *w = arg;
    uint64_t n = w->t->shape[0], k = w->t->shape[1], row0 = (uint64_t)item * STRIPE,
             rows = n - row0 < STRIPE ? n - row0 : STRIPE;
    TD_AUTO_FREE float *x = malloc(rows * k * sizeof *x);
    struct loss *l = &w->stripes[item];
    if (!x) {
        w->bad = ENOMEM;
        return;
    }
    for (uint64_t r = 0; r < rows; r++) {
        load_row(w->t, row0 + r, x + r * k);
        for (uint64_t i = 0; i < k; i++)
            if (!isfinite(x[r * k + i]))
                w->bad = EDOM;
    }
    for (uint64_t r = 0; w->format == TD_W_MXFP4 && r < rows; r++)
        mxfp4_row(w, row0 + r, x + r * k, l);
    for (uint64_t k0 = 0; w->format == TD_W_FP8 && k0 < k; k0 += STRIPE)
        fp8_block(w, row0, rows, k0, x, l);
}

static void tell(job *j, const work *w, uint32_t n_stripes)
{
    struct loss sum = {0};
    for (uint32_t s = 0; s < n_stripes; s++) {
        sum.error += w->stripes[s].error;
        sum.norm += w->stripes[s].norm;
        if (w->stripes[s].largest > sum.largest)
            sum.largest = w->stripes[s].largest;
    }
    td_quantize_row row = {.name = w->t->name,
                           .format = w->format,
                           .elements = w->t->shape[0] * w->t->shape[1],
                           .relative = sum.norm > 0.0 ? sqrt(sum.error / sum.norm) : 0.0,
                           .largest = sum.largest};
    if (j->o->row)
        j->o->row(j->o->arg, &row);
}

static int quantise_tensor(job *j, const td_st_tensor *t)
{
    td_weight_format format = (td_weight_format)t->used;
    plan p = plan_of(t, format);
    uint32_t n_stripes = (uint32_t)blocks_of(t->shape[0]);
    TD_AUTO_FREE uint8_t *codes = malloc(p.bytes ? p.bytes : 1);
    TD_AUTO_FREE uint8_t *scales = malloc(p.scale_bytes ? p.scale_bytes : 1);
    TD_AUTO_FREE struct loss *stripes = calloc(n_stripes ? n_stripes : 1, sizeof *stripes);
    if (!codes || !scales || !stripes)
        return td_err_set(j->err, -ENOMEM, "out of memory for tensor %s", t->name);
    work w = {.t = t, .codes = codes, .scales = scales, .format = format, .stripes = stripes};
    td_pool_run(j->pool, stripe_item, &w, n_stripes);
    if (w.bad)
        return w.bad == ENOMEM ? td_err_set(j->err, -ENOMEM, "out of memory for tensor %s", t->name)
                               : td_err_set(j->err, -EINVAL,
                                            "tensor %s holds a value that is not finite", t->name);
    int r = td_st_writer_data(j->out, codes, p.bytes, j->err);
    r = r < 0 ? r : td_st_writer_data(j->out, scales, p.scale_bytes, j->err);
    if (r >= 0)
        tell(j, &w, n_stripes);
    return r;
}

static json_t *mxfp4_spec(int dynamic)
{
    return json_pack("{s:s, s:b, s:s, s:i, s:i, s:n, s:n, s:s, s:s, s:s, s:s, s:n, s:s, s:b}",
                     "dtype", "fp4", "is_dynamic", dynamic, "qscheme", "per_group", "ch_axis", -1,
                     "group_size", TD_MX_GROUP, "block_size", "symmetric", "round_method",
                     "half_even", "scale_type", "float", "scale_format", "e8m0",
                     "scale_calculation_mode", "even", "mx_element_dtype", "observer_cls",
                     "PerBlockMXObserver", "is_scale_quant", 0);
}

/* Quark's QLayerConfig of e4m3 in blocks. */
static json_t *fp8_layer(void)
{
    json_t *weight = json_pack(
        "{s:s, s:b, s:s, s:n, s:n, s:[i,i], s:b, s:s, s:s, s:n, s:n, s:n, s:s, s:b}", "dtype",
        "fp8_e4m3", "is_dynamic", 0, "qscheme", "per_block", "ch_axis", "group_size", "block_size",
        TD_FP8_BLOCK, TD_FP8_BLOCK, "symmetric", 1, "round_method", "half_even", "scale_type",
        "float", "scale_format", "scale_calculation_mode", "mx_element_dtype", "observer_cls",
        "PerBlock2DMinMaxObserver", "is_scale_quant", 0);
    return json_pack("{s:n, s:n, s:o, s:n, s:n}", "input_tensors", "output_tensors", "weight",
                     weight, "bias", "target_device");
}

/* Glob -> scheme, for what is not in the global one. */
static json_t *layer_config(const job *j)
{
    json_t *layers = json_object();
    char pattern[PATTERN_BYTES];
    for (size_t i = 0; i < j->o->n_fp8; i++) {
        expand(j, j->o->fp8[i], pattern);
        if (json_object_set_new(layers, pattern, fp8_layer()) < 0) {
            json_decref(layers);
            return NULL;
        }
    }
    return layers;
}

/* The keys that Quark writes; version names the writer. */
static json_t *quark_config(const job *j)
{
    char writer[64];
    snprintf(writer, sizeof writer, "tandem-%s", td_version());
    return json_pack(
        "{s:{s:o, s:n, s:o, s:n, s:n}, s:O, s:n, s:n, s:s, s:{}, s:o, s:{}, s:b, s:s, s:s, "
        "s:{s:[], s:f, s:s, s:s, s:n}}",
        "global_quant_config", "input_tensors", mxfp4_spec(1), "output_tensors", "weight",
        mxfp4_spec(0), "bias", "target_device", "exclude", j->kept, "algo_config",
        "softmax_quant_spec", "quant_method", "quark", "layer_type_quant_config",
        "layer_quant_config", layer_config(j), "kv_cache_quant_config", "kv_cache_post_rope", 0,
        "quant_mode", "eager_mode", "version", writer, "export", "kv_cache_group", "min_kv_scale",
        0.0, "pack_method", "reorder", "weight_format", "real_quantized", "weight_merge_groups");
}

static json_t *fp8_config(const job *j)
{
    return json_pack("{s:s, s:s, s:s, s:[i,i], s:O}", "quant_method", "fp8", "fmt", "e4m3",
                     "activation_scheme", "dynamic", "weight_block_size", TD_FP8_BLOCK,
                     TD_FP8_BLOCK, "modules_to_not_convert", j->kept);
}

static int write_config(job *j, const char *out)
{
    json_t *q = j->o->format == TD_W_MXFP4 ? quark_config(j) : fp8_config(j);
    TD_AUTO_FREE char *path = td_path_join(out, "config.json");
    if (!q || !path || json_object_set_new(j->config, "quantization_config", q) < 0)
        return td_err_set(j->err, -ENOMEM, "out of memory");
    if (json_dump_file(j->config, path, JSON_INDENT(2)) < 0)
        return td_err_set(j->err, -EIO, "%s: %s", path, td_errno_text(-errno));
    return 0;
}

static int write_weights(job *j, size_t quantised)
{
    size_t done = 0;
    int r = 0;
    for (size_t i = 0; r >= 0 && i < td_st_count(j->st); i++) {
        const td_st_tensor *t = td_st_at(j->st, i);
        if (!t->used) {
            r = td_st_writer_data(j->out, t->data, t->bytes, j->err);
            continue;
        }
        r = quantise_tensor(j, t);
        if (r >= 0 && j->o->progress)
            j->o->progress(j->o->arg, (double)++done / (double)quantised);
    }
    return r < 0 ? r : td_st_writer_finish(j->out, j->err);
}

static int read_config(job *j, const char *model)
{
    TD_AUTO_FREE char *path = td_path_join(model, "config.json");
    int64_t layers = 0;
    int r = path ? td_json_load(path, NULL, &j->config, j->err) : -ENOMEM;
    r = r < 0 ? r
              : td_json_get_int(j->config, "config.json", "num_hidden_layers", 1, 1000000, &layers,
                                j->err);
    if (r >= 0 && json_object_get(j->config, "quantization_config"))
        r = td_err_set(j->err, -EINVAL,
                       "%s has a quantization_config already; start from the BF16 checkpoint",
                       path);
    snprintf(j->mtp, sizeof j->mtp, "%lld", (long long)layers);
    j->kept = json_array();
    return r < 0 ? r : j->kept ? 0 : -ENOMEM;
}

static int matches_one(const job *j, const char *glob, int linear)
{
    char pattern[PATTERN_BYTES], module[TD_ST_NAME_MAX + 1];
    expand(j, glob, pattern);
    for (size_t i = 0; i < td_st_count(j->st); i++)
        if (matrix_module(td_st_at(j->st, i), module, sizeof module) &&
            (!linear || is_linear(module)) && fnmatch(pattern, module, 0) == 0)
            return 1;
    return 0;
}

/* A glob that matches nothing is a slip, except the defaults, which serve several architectures. */
static int check_globs(job *j)
{
    const td_quantize_options *o = j->o;
    const char *const *standard = td_quantize_default_exclude(o->format);
    if (o->n_fp8 && o->format != TD_W_MXFP4)
        return td_err_set(j->err, -EINVAL,
                          "--fp8 names what is FP8 beside MXFP4; with --format fp8 all is FP8 that "
                          "--exclude does not name");
    for (size_t g = 0; g < o->n_fp8; g++)
        if (!matches_one(j, o->fp8[g], 0))
            return td_err_set(j->err, -EINVAL,
                              "--fp8 %s matches no matrix; a tied head is model.embed_tokens",
                              o->fp8[g]);
    for (size_t g = 0; g < o->n_exclude; g++) {
        int known = 0;
        for (size_t i = 0; standard[i]; i++)
            known |= strcmp(standard[i], o->exclude[g]) == 0;
        if (!known && !matches_one(j, o->exclude[g], 1))
            return td_err_set(j->err, -EINVAL, "--exclude %s matches no linear module",
                              o->exclude[g]);
    }
    return 0;
}

static uint32_t threads_of(const td_quantize_options *o)
{
    cpu_set_t set;
    if (o->n_threads)
        return o->n_threads;
    int n = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
    return n < 1 ? 1 : (uint32_t)n;
}

int td_quantize(const char *model, const char *out, const td_quantize_options *o,
                td_err *reterr_err)
{
    job j = {.o = o, .err = reterr_err};
    size_t quantised = 0;
    int r = read_config(&j, model);
    r = r < 0 ? r : td_st_open(model, &j.st, reterr_err);
    r = r < 0 ? r : check_globs(&j);
    int made = r >= 0 && mkdir(out, 0755) == 0;
    if (r >= 0 && !made)
        r = td_err_set(reterr_err, -errno, "%s: %s; give a directory that does not exist", out,
                       td_errno_text(-errno));
    r = r < 0 ? r : td_st_writer_new(out, SHARD_BYTES, &j.out, reterr_err);
    r = r < 0 ? r : declare(&j, &quantised);
    if (r >= 0 && (r = td_pool_open(threads_of(o), NULL, 0, &j.pool)) < 0)
        td_err_set(reterr_err, r, "threads: %s", td_errno_text(r));
    r = r < 0 ? r : write_weights(&j, quantised);
    r = r < 0 ? r : write_config(&j, out);
    r = r < 0 ? r : td_model_files_copy(model, out, 0, reterr_err);
    td_pool_close(j.pool);
    td_st_writer_free(j.out);
    td_st_close(j.st);
    json_decref(j.kept);
    json_decref(j.config);
    if (r < 0 && made)
        td_model_files_remove(out);
    return r;
}
