/* SPDX-License-Identifier: Apache-2.0 */
/* Binding: every tensor of the checkpoint goes to one named slot, with its shape checked; a tensor
 * that no slot takes is an error, and so is a slot that finds none. The model hash is taken on the
 * way. Loads a rank's share of heads and widths. */
#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bug.h"
#include "base/hash.h"
#include "engine/internal.h"
#include "engine/pack.h"
#include "engine/quant.h"
#include "engine/safetensors.h"
#include "kernels/formats.h"
#include "kernels/ref/pool.h"

#include "base/banned.h"

enum { NAME_BYTES = 200 };

typedef struct binder {
    td_model *m;
    td_st *st;
    const char *dir;
    td_err *err;
    td_quant *quant;     /* what config.json says is quantised */
    td_pack *pack;       /* a packed model: tensors come from it, in the same order */
    td_pack_writer *out; /* tandem pack: each tensor goes there too */
    td_pool *pool;       /* packs weights */
    int failed;          /* sticky: the first error stays in err */
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

static void refuse_type(binder *b, const td_st_tensor *t)
{
    fail(b, -ENOTSUP, "tensor %s has dtype %s: no weight can be stored so", t->name, t->type);
}

/* The tensor of that name, marked as used. NULL and a sticky error otherwise. */
static td_st_tensor *take(binder *b, const char *full)
{
    if (b->failed)
        return NULL;
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
    return t;
}

static int has_shape(binder *b, const td_st_tensor *t, uint64_t n, uint64_t k, const char *why)
{
    uint32_t rank = k ? 2 : 1;
    if (t->rank == rank && t->shape[0] == n && (!k || t->shape[1] == k))
        return 1;
    fail(b, -EINVAL, "tensor %s has shape [%llu, %llu] of rank %u, %s asks for [%llu, %llu]",
         t->name, (unsigned long long)t->shape[0],
         (unsigned long long)(t->rank > 1 ? t->shape[1] : 0), t->rank, why, (unsigned long long)n,
         (unsigned long long)k);
    return 0;
}

/* A matrix as the checkpoint holds it. */
typedef struct source {
    td_st_tensor *t, *scale; /* t NULL: failed */
    td_weight_format format;
} source;

static int is_plain(const td_st_tensor *t)
{
    return t->dtype == TD_F32 || t->dtype == TD_BF16 || t->dtype == TD_F16;
}

/* A scale that is NaN or infinite would spread through every answer. */
static int scales_are_numbers(binder *b, const td_st_tensor *s)
{
    for (uint64_t i = 0; i < s->bytes && s->dtype == TD_U8; i++)
        if (s->data[i] == TD_E8M0_NAN) {
            fail(b, -EINVAL, "tensor %s holds a scale that is NaN (element %llu)", s->name,
                 (unsigned long long)i);
            return 0;
        }
    for (uint64_t i = 0; i < s->bytes / 4 && s->dtype == TD_F32; i++) {
        float f;
        memcpy(&f, s->data + 4 * i, 4);
        if (!isfinite(f)) {
            fail(b, -EINVAL, "tensor %s holds a scale that is not finite (element %llu)", s->name,
                 (unsigned long long)i);
            return 0;
        }
    }
    return 1;
}

static td_st_tensor *take_scale(binder *b, const td_st_tensor *t, const char *suffix, td_dtype type,
                                uint64_t n, uint64_t k)
{
    char full[2 * NAME_BYTES];
    snprintf(full, sizeof full, "%s%s", t->name, suffix);
    if (!td_st_find(b->st, full)) {
        fail(b, -EINVAL,
             "tensor %s has dtype %s, but its scales %s are missing; fetch the checkpoint again",
             t->name, t->type, full);
        return NULL;
    }
    td_st_tensor *s = take(b, full);
    if (s && s->dtype != (int)type) {
        fail(b, -EINVAL, "tensor %s has dtype %s, the scales of %s weights are %s", s->name,
             s->type, t->type, td_dtype_name(type));
        return NULL;
    }
    return s && has_shape(b, s, n, k, "the weight's shape") && scales_are_numbers(b, s) ? s : NULL;
}

/* Format and scales of a matrix [n][k], by the dtype of its tensor. */
static source quantised_source(binder *b, td_st_tensor *t, uint64_t n, uint64_t k)
{
    source s = {.format = t->dtype == TD_U8 ? TD_W_MXFP4 : TD_W_FP8};
    td_st_tensor *scale = NULL;
    if (s.format == TD_W_FP8 && has_shape(b, t, n, k, "config.json")) {
        scale = take_scale(b, t, "_scale_inv", TD_F32, (n + TD_FP8_BLOCK - 1) / TD_FP8_BLOCK,
                           (k + TD_FP8_BLOCK - 1) / TD_FP8_BLOCK);
    } else if (s.format == TD_W_MXFP4) {
        if (k % TD_MX_GROUP)
            fail(b, -EINVAL, "tensor %s is U8 (MXFP4), but its width %llu is not a multiple of %d",
                 t->name, (unsigned long long)k, TD_MX_GROUP);
        else if (has_shape(b, t, n, k / 2, "config.json (two elements a byte)"))
            scale = take_scale(b, t, "_scale", TD_U8, n, k / TD_MX_GROUP);
    }
    if (scale) {
        s.t = t;
        s.scale = scale;
    }
    return s;
}

/* Scales beside a weight that needs none: one of the two is wrong. */
static void refuse_scales(binder *b, const td_st_tensor *t)
{
    static const char *const suffixes[] = {"_scale", "_scale_inv", "_scale_2"};
    char full[2 * NAME_BYTES];
    for (size_t i = 0; i < sizeof suffixes / sizeof *suffixes; i++) {
        snprintf(full, sizeof full, "%s%s", t->name, suffixes[i]);
        if (td_st_find(b->st, full))
            fail(b, -EINVAL, "tensor %s has dtype %s and needs no scales, but %s exists", t->name,
                 t->type, full);
    }
}

/* Matrix prefix + name [n][k]. */
static source find_matrix(binder *b, const char *name, uint64_t n, uint64_t k)
{
    char full[2 * NAME_BYTES];
    source s = {0};
    snprintf(full, sizeof full, "%s%s", b->prefix, name);
    td_st_tensor *t = take(b, full);
    if (!t)
        return s;
    if (t->dtype == TD_U8 || t->dtype == TD_F8E4M3)
        return quantised_source(b, t, n, k);
    if (!is_plain(t)) {
        refuse_type(b, t);
        return s;
    }
    refuse_scales(b, t);
    if (b->failed || !has_shape(b, t, n, k, "config.json"))
        return s;
    return (source){.t = t, .format = t->dtype == TD_BF16 ? TD_W_BF16 : TD_W_F32};
}

/* Does config.json agree? Then note the format under its module class. */
static int agree(binder *b, const source *s, td_weight_class class)
{
    char module[2 * NAME_BYTES];
    if (!s->t)
        return 0;
    size_t n = strlen(s->t->name) - strlen(".weight");
    snprintf(module, sizeof module, "%.*s", (int)n, s->t->name);
    int linear = class != TD_WC_ROUTER && class != TD_WC_EMBED;
    if (s->scale && class == TD_WC_ROUTER) {
        fail(b, -ENOTSUP, "tensor %s has dtype %s: the router of experts must be plain", s->t->name,
             s->t->type);
        return 0;
    }
    td_err err = {0};
    if (td_quant_check(b->quant, module, linear, s->format, &err) < 0) {
        fail(b, -EINVAL, "%s", err.text);
        return 0;
    }
    if (!b->check_only)
        b->m->formats[class] |= 1u << s->format;
    return 1;
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

/* The packed model's next tensor under prefix + name, as a weight of its own. */
static td_tensor *packed_matrix(binder *b, const char *name, uint32_t slabs, uint32_t n, uint32_t k)
{
    char full[2 * NAME_BYTES];
    td_pack_entry e;
    td_tensor *w = NULL;
    td_err err = {0};
    snprintf(full, sizeof full, "%s%s", b->prefix, name);
    if (b->failed)
        return NULL;
    if (td_pack_take(b->pack, full, &e, &err) < 0) {
        fail(b, -EINVAL, "%s", err.text);
        return NULL;
    }
    int r = e.is_vector || e.slabs != slabs || e.n != n || e.k != k
                ? -EINVAL
                : b->m->backend->weight_map(e.format, slabs, n, k, e.bytes, e.n_bytes, &w);
    if (r == -EINVAL) {
        fail(b, r,
             "packed tensor %s has not the shape of config.json; write it again with tandem "
             "pack",
             full);
        return NULL;
    }
    return own(b, w, r);
}

static td_tensor *packed_vector(binder *b, const char *name, uint32_t n)
{
    char full[2 * NAME_BYTES];
    td_pack_entry e;
    td_tensor *w = NULL;
    td_err err = {0};
    snprintf(full, sizeof full, "%s%s", b->prefix, name);
    if (b->failed)
        return NULL;
    if (td_pack_take(b->pack, full, &e, &err) < 0) {
        fail(b, -EINVAL, "%s", err.text);
        return NULL;
    }
    if (!e.is_vector || e.n != n) {
        fail(b, -EINVAL,
             "packed tensor %s has not the shape of config.json; write it again with "
             "tandem pack",
             full);
        return NULL;
    }
    td_weight_src src = {.dtype = e.type, .base = e.bytes, .n_stride = 1, .k_stride = 1};
    int r = b->m->backend->vector_new(n, &src, &w); /* before w is read as an argument */
    return own(b, w, r) ? w : NULL;
}

/* tandem pack: the filled weight goes to the file under the name that packed_matrix() asks for. */
static void save_matrix(binder *b, const char *name, const td_tensor *w, td_weight_format format,
                        uint32_t slabs, uint32_t n, uint32_t k)
{
    char full[2 * NAME_BYTES];
    td_err err = {0};
    if (!b->out || !w || b->failed)
        return;
    snprintf(full, sizeof full, "%s%s", b->prefix, name);
    td_pack_entry e = {.format = format,
                       .slabs = slabs,
                       .n = n,
                       .k = k,
                       .bytes = b->m->backend->weight_packed(w),
                       .n_bytes = b->m->backend->weight_bytes(w)};
    int r = td_pack_writer_add(b->out, full, &e, &err);
    if (r < 0)
        fail(b, r, "%s", err.text);
}

static td_weight_src view(const source *s)
{
    return (td_weight_src){.dtype = (td_dtype)s->t->dtype,
                           .base = s->t->data,
                           .scales = s->scale ? s->scale->data : NULL,
                           .n_stride = s->t->rank > 1 ? s->t->shape[1] : 1,
                           .k_stride = 1};
}

/* The model hash takes each tensor's sum; taken while the tensor is packed, so that a checkpoint
 * larger than memory is read from disk once. */
static void sum_up(td_st_tensor *t)
{
    if (t->has_sum)
        return;
    td_xxh128(t->data, t->bytes, t->sum);
    t->has_sum = 1;
}

/* Item 0 is the sum; the others are rows of a slab, as many as share FP8 scales. */
typedef struct fill_job {
    const td_backend *be;
    td_tensor *w;
    uint32_t slab, n;
    td_weight_src src;
    td_st_tensor *t;
} fill_job;

enum { FILL_ROWS = TD_FP8_BLOCK };

static void fill_item(void *arg, uint32_t item, uint32_t thread)
{
    (void)thread;
    const fill_job *j = arg;
    if (item-- == 0) {
        sum_up(j->t);
        return;
    }
    uint32_t n0 = item * FILL_ROWS, rows = j->n - n0 < FILL_ROWS ? j->n - n0 : FILL_ROWS;
    td_weight_src src = j->src;
    size_t unit = src.dtype == TD_U8 ? 1 : td_dtype_bytes(src.dtype);
    src.base = (const uint8_t *)src.base + (size_t)n0 * src.n_stride * unit;
    j->be->weight_fill(j->w, j->slab, n0, rows, &src);
}

static void fill(binder *b, td_tensor *w, uint32_t slab, uint32_t n, const source *s)
{
    fill_job j = {.be = b->m->backend, .w = w, .slab = slab, .n = n, .src = view(s), .t = s->t};
    td_pool_run(b->pool, fill_item, &j, 1 + (n + FILL_ROWS - 1) / FILL_ROWS);
}

/* Matrix [n][k], as stored. */
static td_tensor *matrix(binder *b, td_weight_class class, const char *name, uint32_t n, uint32_t k)
{
    if (b->pack)
        return packed_matrix(b, name, 1, n, k);
    source s = find_matrix(b, name, n, k);
    td_tensor *w = NULL;
    if (!agree(b, &s, class) || b->check_only)
        return NULL;
    int r = b->m->backend->weight_new(s.format, 1, n, k, &w);
    if (r >= 0)
        fill(b, w, 0, n, &s);
    w = own(b, w, r);
    save_matrix(b, name, w, s.format, 1, n, k);
    return w;
}

static td_tensor *vector(binder *b, const char *name, uint32_t n)
{
    char full[2 * NAME_BYTES];
    td_tensor *w = NULL;
    if (b->pack)
        return packed_vector(b, name, n);
    snprintf(full, sizeof full, "%s%s", b->prefix, name);
    source s = {.t = take(b, full)};
    if (s.t && !is_plain(s.t))
        refuse_type(b, s.t);
    if (b->failed || !has_shape(b, s.t, n, 0, "config.json") || b->check_only)
        return NULL;
    td_weight_src src = view(&s);
    int r = b->m->backend->vector_new(n, &src, &w);
    td_pack_entry e = {.is_vector = 1,
                       .type = src.dtype,
                       .slabs = 1,
                       .n = n,
                       .bytes = s.t->data,
                       .n_bytes = s.t->bytes};
    td_err err = {0};
    int saved = b->out && r >= 0 ? td_pack_writer_add(b->out, full, &e, &err) : 0;
    w = own(b, w, r);
    if (saved < 0)
        fail(b, saved, "%s", err.text);
    return w;
}

/* The values of a quantised matrix [n][k]. */
typedef struct decode_job {
    const source *s;
    float *out;
    uint32_t n, k;
} decode_job;

static void decode_item(void *arg, uint32_t item, uint32_t thread)
{
    (void)thread;
    const decode_job *j = arg;
    uint32_t n0 = item * FILL_ROWS, n1 = j->n - n0 < FILL_ROWS ? j->n : n0 + FILL_ROWS;
    for (uint32_t n = n0; n < n1; n++)
        (j->s->format == TD_W_FP8 ? td_fp8_decode_row : td_mx_decode_row)(
            j->s->t->data + (size_t)n * j->s->t->shape[1], j->s->scale->data, n, j->k, 1,
            j->out + (size_t)n * j->k);
}

/* Heap. */
static float *decoded(binder *b, const source *s, uint32_t n, uint32_t k)
{
    decode_job j = {.s = s, .out = malloc((size_t)n * k * sizeof(float)), .n = n, .k = k};
    if (!j.out) {
        fail(b, -ENOMEM, "out of memory for weights");
        return NULL;
    }
    td_pool_run(b->pool, decode_item, &j, (n + FILL_ROWS - 1) / FILL_ROWS);
    return j.out;
}

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
        sum_up(j->t);
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
static void kv_b_sources(const td_config *c, const source *s, float *values, kv_b_job *j)
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
    j->uv = view(s);
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

static void kv_b_tensors(binder *b, td_layer *l, td_weight_format uk, td_weight_format uv)
{
    const td_config *c = &b->m->config;
    const td_backend *be = b->m->backend;
    int r = be->weight_new(uk, c->n_heads, c->kv_lora, c->nope, &l->w_uk);
    l->w_uk = own(b, l->w_uk, r);
    r = l->w_uk ? be->weight_new(uv, c->n_heads, c->v_dims, c->kv_lora, &l->w_uv) : -ENOMEM;
    l->w_uv = own(b, l->w_uv, r);
}

/* Per head kv_b has N rows of W_UK, then V rows of W_UV. Absorbed: q_lat = W_UK^T q_nope, so W_UK
 * is loaded transposed, [H][C][N]; o = W_UV o_lat, so W_UV is [H][V][C]. Transposed, scales would
 * lie along the wrong axis, so W_UK is decoded first: MXFP4 to BF16, FP8 to f32. W_UV stays MXFP4,
 * whose scales belong to rows; blocks of FP8 scales do not align with heads. */
static void kv_b(binder *b, td_layer *l)
{
    const td_config *c = &b->m->config;
    size_t rows = c->nope + c->v_dims;
    if (b->pack) {
        l->w_uk = packed_matrix(b, UK, c->n_heads, c->kv_lora, c->nope);
        l->w_uv = packed_matrix(b, UV, c->n_heads, c->v_dims, c->kv_lora);
        return;
    }
    source s =
        find_matrix(b, "self_attn.kv_b_proj.weight", (uint64_t)c->n_heads * rows, c->kv_lora);
    if (!agree(b, &s, TD_WC_ATTENTION) || b->check_only)
        return;
    td_weight_format uk = s.format, uv = s.format;
    float *values = s.scale ? decoded(b, &s, (uint32_t)(c->n_heads * rows), c->kv_lora) : NULL;
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
    save_matrix(b, UK, l->w_uk, uk, c->n_heads, c->kv_lora, c->nope);
    save_matrix(b, UV, l->w_uv, uv, c->n_heads, c->v_dims, c->kv_lora);
}

/* mlp.experts.E.<what> for every E, into one tensor of E slabs. */
static td_tensor *experts(binder *b, const char *what, uint32_t n, uint32_t k)
{
    char name[NAME_BYTES];
    td_tensor *w = NULL;
    td_weight_format format = TD_W_F32;
    uint32_t n_experts = b->m->config.n_experts;
    char all[NAME_BYTES];
    snprintf(all, sizeof all, "mlp.experts.*.%s.weight", what);
    if (b->pack)
        return packed_matrix(b, all, n_experts, n, k);
    for (uint32_t e = 0; e < b->m->config.n_experts && !b->failed; e++) {
        snprintf(name, sizeof name, "mlp.experts.%u.%s.weight", e, what);
        source s = find_matrix(b, name, n, k);
        if (!agree(b, &s, TD_WC_EXPERTS) || b->check_only)
            continue;
        if (e == 0) {
            format = s.format;
            int r = b->m->backend->weight_new(format, b->m->config.n_experts, n, k, &w);
            w = own(b, w, r);
        }
        if (!w)
            break;
        if (s.format != format) {
            fail(b, -EINVAL, "tensor %s is %s, expert 0 of its layer is %s", s.t->name,
                 td_weight_format_name(s.format), td_weight_format_name(format));
            break;
        }
        fill(b, w, e, n, &s);
    }
    save_matrix(b, all, w, format, n_experts, n, k);
    return w;
}

static void glm_indexer(binder *b, td_layer *l)
{
    const td_config *c = &b->m->config;
    l->index_q = matrix(b, TD_WC_INDEX, "self_attn.indexer.wq_b.weight",
                        c->index_heads * c->index_dims, c->q_lora);
    l->index_k = matrix(b, TD_WC_INDEX, "self_attn.indexer.wk.weight", c->index_dims, c->hidden);
    l->index_w =
        matrix(b, TD_WC_INDEX, "self_attn.indexer.weights_proj.weight", c->index_heads, c->hidden);
    l->index_norm = vector(b, "self_attn.indexer.k_norm.weight", c->index_dims);
    l->index_bias = vector(b, "self_attn.indexer.k_norm.bias", c->index_dims);
}

static void glm_attention(binder *b, td_layer *l)
{
    const td_config *c = &b->m->config;
    uint32_t head = c->nope + c->rope_dims;
    l->q_a = matrix(b, TD_WC_ATTENTION, "self_attn.q_a_proj.weight", c->q_lora, c->hidden);
    l->q_a_norm = vector(b, "self_attn.q_a_layernorm.weight", c->q_lora);
    l->q_b = matrix(b, TD_WC_ATTENTION, "self_attn.q_b_proj.weight", c->n_heads * head, c->q_lora);
    l->kv_a = matrix(b, TD_WC_ATTENTION, "self_attn.kv_a_proj_with_mqa.weight",
                     c->kv_lora + c->rope_dims, c->hidden);
    l->kv_a_norm = vector(b, "self_attn.kv_a_layernorm.weight", c->kv_lora);
    kv_b(b, l);
    l->o = matrix(b, TD_WC_ATTENTION, "self_attn.o_proj.weight", c->hidden, c->n_heads * c->v_dims);
}

static void glm_moe(binder *b, td_layer *l)
{
    const td_config *c = &b->m->config;
    uint32_t shared = c->n_shared * c->moe_inter;
    l->router = matrix(b, TD_WC_ROUTER, "mlp.gate.weight", c->n_experts, c->hidden);
    l->router_bias = vector(b, "mlp.gate.e_score_correction_bias", c->n_experts);
    l->expert_gate = experts(b, "gate_proj", c->moe_inter, c->hidden);
    l->expert_up = experts(b, "up_proj", c->moe_inter, c->hidden);
    l->expert_down = experts(b, "down_proj", c->hidden, c->moe_inter);
    if (!shared)
        return;
    l->shared_gate =
        matrix(b, TD_WC_SHARED, "mlp.shared_experts.gate_proj.weight", shared, c->hidden);
    l->shared_up = matrix(b, TD_WC_SHARED, "mlp.shared_experts.up_proj.weight", shared, c->hidden);
    l->shared_down =
        matrix(b, TD_WC_SHARED, "mlp.shared_experts.down_proj.weight", c->hidden, shared);
}

static void dense_mlp(binder *b, td_layer *l)
{
    const td_config *c = &b->m->config;
    l->gate = matrix(b, TD_WC_DENSE, "mlp.gate_proj.weight", c->inter, c->hidden);
    l->up = matrix(b, TD_WC_DENSE, "mlp.up_proj.weight", c->inter, c->hidden);
    l->down = matrix(b, TD_WC_DENSE, "mlp.down_proj.weight", c->hidden, c->inter);
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
    matrix(b, TD_WC_DENSE, "eh_proj.weight", c->hidden, 2 * c->hidden);
    vector(b, "shared_head.norm.weight", c->hidden);
    b->check_only = 0;
}

static void qwen_layer(binder *b, td_layer *l, uint32_t i)
{
    const td_config *c = &b->m->config;
    snprintf(b->prefix, sizeof b->prefix, "model.layers.%u.", i);
    l->in_norm = vector(b, "input_layernorm.weight", c->hidden);
    l->post_norm = vector(b, "post_attention_layernorm.weight", c->hidden);
    l->q =
        matrix(b, TD_WC_ATTENTION, "self_attn.q_proj.weight", c->n_heads * c->head_dim, c->hidden);
    l->k = matrix(b, TD_WC_ATTENTION, "self_attn.k_proj.weight", c->n_kv_heads * c->head_dim,
                  c->hidden);
    l->v = matrix(b, TD_WC_ATTENTION, "self_attn.v_proj.weight", c->n_kv_heads * c->head_dim,
                  c->hidden);
    l->q_norm = vector(b, "self_attn.q_norm.weight", c->head_dim);
    l->k_norm = vector(b, "self_attn.k_norm.weight", c->head_dim);
    l->o =
        matrix(b, TD_WC_ATTENTION, "self_attn.o_proj.weight", c->hidden, c->n_heads * c->head_dim);
    dense_mlp(b, l);
}

/* Some exporters repeat the tied matrix, some quantisers its scales; only equal copies are
 * harmless. */
static void same_head(binder *b)
{
    static const char *const parts[] = {"", "_scale", "_scale_inv"};
    char name[NAME_BYTES];
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
            fail(b, -EINVAL, "%s differs from %s, but tie_word_embeddings is true", head->name,
                 embed->name);
    }
}

static void ends(binder *b)
{
    td_model *m = b->m;
    const td_config *c = &m->config;
    b->prefix[0] = 0;
    m->embed = matrix(b, TD_WC_EMBED, "model.embed_tokens.weight", c->vocab, c->hidden);
    m->norm = vector(b, "model.norm.weight", c->hidden);
    if (!c->tie)
        m->head = matrix(b, TD_WC_HEAD, "lm_head.weight", c->vocab, c->hidden);
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

static void refuse_unused(binder *b)
{
    for (size_t i = 0; i < td_st_count(b->st) && !b->failed; i++) {
        const td_st_tensor *t = td_st_at(b->st, i);
        if (t->used || harmless(t->name))
            continue;
        fail(b, -EINVAL,
             "tensor %s has no place in this architecture with this config.json (indexer_types, "
             "mlp_layer_types, "
             "num_hidden_layers); refusing to ignore it",
             t->name);
    }
}

static void hash_tensor(td_hash *h, td_st_tensor *t)
{
    uint8_t shape[8 * TD_ST_RANK_MAX];
    sum_up(t);
    for (uint32_t d = 0; d < t->rank; d++)
        for (int i = 0; i < 8; i++)
            shape[8 * d + (uint32_t)i] = (uint8_t)(t->shape[d] >> (8 * i));
    td_hash_add_field(h, t->name, strlen(t->name));
    td_hash_add_field(h, t->type, strlen(t->type));
    td_hash_add_field(h, shape, 8ul * t->rank);
    td_hash_add(h, t->sum, sizeof t->sum);
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

static void bind_layers(binder *b, const td_model_options *o)
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
static int check_meta(binder *b, const td_pack_meta *meta)
{
    td_model_info *info = &b->m->info;
    const char *layout = b->m->backend->layout;
    if (!layout || strcmp(layout, meta->layout) != 0)
        fail(b, -ENOTSUP,
             "model.tdpack has the layout %s, kernels %s read %s; use the unpacked checkpoint",
             meta->layout, b->m->backend->isa, layout ? layout : "none");
    else if (memcmp(meta->config_hash, info->config_hash, sizeof meta->config_hash) != 0)
        fail(b, -EINVAL, "config.json is not the one that model.tdpack was written with");
    else if (memcmp(meta->tokenizer_hash, info->tokenizer_hash, sizeof meta->tokenizer_hash) != 0)
        fail(b, -EINVAL,
             "the tokenizer or template is not the one that model.tdpack was written "
             "with");
    memcpy(info->model_hash, meta->model_hash, sizeof info->model_hash);
    memcpy(b->m->formats, meta->formats, sizeof b->m->formats);
    return b->failed;
}

static int load_packed(binder *b, const td_model_options *o)
{
    int r = check_meta(b, td_pack_get_meta(b->pack));
    r = r < 0 ? r : td_pack_verify(b->pack, b->m->n_threads, b->err);
    if (r < 0)
        return r;
    bind_layers(b, o);
    return b->failed ? b->failed : td_pack_end(b->pack, b->err);
}

static int save_packed(binder *b)
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

static int load_checkpoint(binder *b, const char *dir, const td_model_options *o)
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
    binder b = {.m = m, .dir = dir, .err = reterr_err};
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
