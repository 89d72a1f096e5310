/* SPDX-License-Identifier: Apache-2.0 */
#include "engine/binder.h"

#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/hash.h"
#include "kernels/formats.h"

#include "base/banned.h"

void td_bind_fail(td_binder *b, int code, const char *fmt, ...)
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

static void refuse_type(td_binder *b, const td_st_tensor *t)
{
    td_bind_fail(b, -ENOTSUP, "tensor %s has dtype %s: no weight can be stored so", t->name,
                 t->type);
}

/* The tensor of that name, marked as used. NULL and a sticky error otherwise. */
static td_st_tensor *take(td_binder *b, const char *full)
{
    if (b->failed)
        return NULL;
    td_st_tensor *t = td_st_find(b->st, full);
    if (!t) {
        td_bind_fail(b, -EINVAL,
                     "tensor %s is missing; fetch the checkpoint again, or correct config.json",
                     full);
        return NULL;
    }
    if (t->used) {
        td_bind_fail(b, -EINVAL, "tensor %s is needed twice", full);
        return NULL;
    }
    t->used = 1;
    return t;
}

static int has_shape(td_binder *b, const td_st_tensor *t, uint64_t n, uint64_t k, const char *why)
{
    uint32_t rank = k ? 2 : 1;
    if (t->rank == rank && t->shape[0] == n && (!k || t->shape[1] == k))
        return 1;
    td_bind_fail(b, -EINVAL,
                 "tensor %s has shape [%llu, %llu] of rank %u, %s asks for [%llu, %llu]", t->name,
                 (unsigned long long)t->shape[0],
                 (unsigned long long)(t->rank > 1 ? t->shape[1] : 0), t->rank, why,
                 (unsigned long long)n, (unsigned long long)k);
    return 0;
}

static int is_plain(const td_st_tensor *t)
{
    return t->dtype == TD_F32 || t->dtype == TD_BF16 || t->dtype == TD_F16;
}

/* A scale that is NaN or infinite would spread through every answer. */
static int scales_are_numbers(td_binder *b, const td_st_tensor *s)
{
    for (uint64_t i = 0; i < s->bytes && s->dtype == TD_U8; i++)
        if (s->data[i] == TD_E8M0_NAN) {
            td_bind_fail(b, -EINVAL, "tensor %s holds a scale that is NaN (element %llu)", s->name,
                         (unsigned long long)i);
            return 0;
        }
    for (uint64_t i = 0; i < s->bytes / 4 && s->dtype == TD_F32; i++) {
        float f;
        memcpy(&f, s->data + 4 * i, 4);
        if (!isfinite(f)) {
            td_bind_fail(b, -EINVAL, "tensor %s holds a scale that is not finite (element %llu)",
                         s->name, (unsigned long long)i);
            return 0;
        }
    }
    return 1;
}

static td_st_tensor *take_scale(td_binder *b, const td_st_tensor *t, const char *suffix,
                                td_dtype type, uint64_t n, uint64_t k)
{
    char full[2 * TD_BIND_NAME];
    snprintf(full, sizeof full, "%s%s", t->name, suffix);
    if (!td_st_find(b->st, full)) {
        td_bind_fail(
            b, -EINVAL,
            "tensor %s has dtype %s, but its scales %s are missing; fetch the checkpoint again",
            t->name, t->type, full);
        return NULL;
    }
    td_st_tensor *s = take(b, full);
    if (s && s->dtype != (int)type) {
        td_bind_fail(b, -EINVAL, "tensor %s has dtype %s, the scales of %s weights are %s", s->name,
                     s->type, t->type, td_dtype_name(type));
        return NULL;
    }
    return s && has_shape(b, s, n, k, "the weight's shape") && scales_are_numbers(b, s) ? s : NULL;
}

/* Format and scales of a matrix [n][k], by the dtype of its tensor. */
static td_bind_source quantised_source(td_binder *b, td_st_tensor *t, uint64_t n, uint64_t k)
{
    td_bind_source s = {.format = t->dtype == TD_U8 ? TD_W_MXFP4 : TD_W_FP8};
    td_st_tensor *scale = NULL;
    if (s.format == TD_W_FP8 && has_shape(b, t, n, k, "config.json")) {
        scale = take_scale(b, t, "_scale_inv", TD_F32, (n + TD_FP8_BLOCK - 1) / TD_FP8_BLOCK,
                           (k + TD_FP8_BLOCK - 1) / TD_FP8_BLOCK);
    } else if (s.format == TD_W_MXFP4) {
        if (k % TD_MX_GROUP)
            td_bind_fail(b, -EINVAL,
                         "tensor %s is U8 (MXFP4), but its width %llu is not a multiple of %d",
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
static void refuse_scales(td_binder *b, const td_st_tensor *t)
{
    static const char *const suffixes[] = {"_scale", "_scale_inv", "_scale_2"};
    char full[2 * TD_BIND_NAME];
    for (size_t i = 0; i < sizeof suffixes / sizeof *suffixes; i++) {
        snprintf(full, sizeof full, "%s%s", t->name, suffixes[i]);
        if (td_st_find(b->st, full))
            td_bind_fail(b, -EINVAL, "tensor %s has dtype %s and needs no scales, but %s exists",
                         t->name, t->type, full);
    }
}

/* Matrix prefix + name [n][k]. */
td_bind_source td_bind_find(td_binder *b, const char *name, uint64_t n, uint64_t k)
{
    char full[2 * TD_BIND_NAME];
    td_bind_source s = {0};
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
    return (td_bind_source){.t = t, .format = t->dtype == TD_BF16 ? TD_W_BF16 : TD_W_F32};
}

/* Does config.json agree? Then note the format under its module class. */
int td_bind_agree(td_binder *b, const td_bind_source *s, td_weight_class class)
{
    char module[2 * TD_BIND_NAME];
    if (!s->t)
        return 0;
    size_t n = strlen(s->t->name) - strlen(".weight");
    snprintf(module, sizeof module, "%.*s", (int)n, s->t->name);
    int linear = class != TD_WC_ROUTER && class != TD_WC_EMBED;
    if (s->scale && class == TD_WC_ROUTER) {
        td_bind_fail(b, -ENOTSUP, "tensor %s has dtype %s: the router of experts must be plain",
                     s->t->name, s->t->type);
        return 0;
    }
    td_err err = {0};
    if (td_quant_check(b->quant, module, linear, s->format, &err) < 0) {
        td_bind_fail(b, -EINVAL, "%s", err.text);
        return 0;
    }
    if (!b->check_only)
        b->m->formats[class] |= 1u << s->format;
    return 1;
}

td_tensor *td_bind_own(td_binder *b, td_tensor *w, int code)
{
    td_model *m = b->m;
    if (code < 0) {
        td_bind_fail(b, code, "out of memory for weights");
        return NULL;
    }
    if (m->n_owned == m->cap_owned) {
        size_t cap = m->cap_owned ? 2 * m->cap_owned : 256;
        td_tensor **p = realloc(m->owned, cap * sizeof(td_tensor *));
        if (!p) {
            m->backend->weight_free(w);
            td_bind_fail(b, -ENOMEM, "out of memory for weights");
            return NULL;
        }
        m->owned = p;
        m->cap_owned = cap;
    }
    m->owned[m->n_owned++] = w;
    m->info.weight_bytes += m->backend->weight_bytes(w);
    return w;
}

/* The packed model's next tensor under prefix + name. 1, or 0 after an error. */
static int take_packed(td_binder *b, const char *name, td_pack_entry *ret_entry)
{
    char full[2 * TD_BIND_NAME];
    td_err err = {0};
    snprintf(full, sizeof full, "%s%s", b->prefix, name);
    if (!b->failed && td_pack_take(b->pack, full, ret_entry, &err) < 0)
        td_bind_fail(b, -EINVAL, "%s", err.text);
    return !b->failed;
}

static td_tensor *refuse_packed(td_binder *b, const char *name)
{
    td_bind_fail(b, -EINVAL,
                 "packed tensor %s%s has not the shape of config.json; write it again with tandem "
                 "pack",
                 b->prefix, name);
    return NULL;
}

td_tensor *td_bind_packed(td_binder *b, const char *name, uint32_t slabs, uint32_t n, uint32_t k)
{
    td_pack_entry e;
    td_tensor *w = NULL;
    if (!take_packed(b, name, &e))
        return NULL;
    int r = e.is_vector || e.slabs != slabs || e.n != n || e.k != k
                ? -EINVAL
                : b->m->backend->weight_map(e.format, slabs, n, k, e.bytes, e.n_bytes, &w);
    return r == -EINVAL ? refuse_packed(b, name) : td_bind_own(b, w, r);
}

static td_tensor *packed_vector(td_binder *b, const char *name, uint32_t n)
{
    td_pack_entry e;
    td_tensor *w = NULL;
    if (!take_packed(b, name, &e))
        return NULL;
    if (!e.is_vector || e.n != n)
        return refuse_packed(b, name);
    td_weight_src src = {.dtype = e.type, .base = e.bytes, .n_stride = 1, .k_stride = 1};
    int r = b->m->backend->vector_new(n, &src, &w); /* before w is read as an argument */
    return td_bind_own(b, w, r) ? w : NULL;
}

/* tandem pack: the filled weight goes to the file under the name that td_bind_packed() asks for. */
void td_bind_save(td_binder *b, const char *name, const td_tensor *w, td_weight_format format,
                  uint32_t slabs, uint32_t n, uint32_t k)
{
    char full[2 * TD_BIND_NAME];
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
        td_bind_fail(b, r, "%s", err.text);
}

td_weight_src td_bind_view(const td_bind_source *s)
{
    return (td_weight_src){.dtype = (td_dtype)s->t->dtype,
                           .base = s->t->data,
                           .scales = s->scale ? s->scale->data : NULL,
                           .n_stride = s->t->rank > 1 ? s->t->shape[1] : 1,
                           .k_stride = 1};
}

/* The model hash takes each tensor's sum; taken while the tensor is packed, so that a checkpoint
 * larger than memory is read from disk once. */
void td_bind_sum(td_st_tensor *t)
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
        td_bind_sum(j->t);
        return;
    }
    uint32_t n0 = item * FILL_ROWS, rows = j->n - n0 < FILL_ROWS ? j->n - n0 : FILL_ROWS;
    td_weight_src src = j->src;
    size_t unit = src.dtype == TD_U8 ? 1 : td_dtype_bytes(src.dtype);
    src.base = (const uint8_t *)src.base + (size_t)n0 * src.n_stride * unit;
    j->be->weight_fill(j->w, j->slab, n0, rows, &src);
}

void td_bind_fill(td_binder *b, td_tensor *w, uint32_t slab, uint32_t n, const td_bind_source *s)
{
    fill_job j = {
        .be = b->m->backend, .w = w, .slab = slab, .n = n, .src = td_bind_view(s), .t = s->t};
    td_pool_run(b->pool, fill_item, &j, 1 + (n + FILL_ROWS - 1) / FILL_ROWS);
}

/* Matrix [n][k], as stored. */
td_tensor *td_bind_matrix(td_binder *b, td_weight_class class, const char *name, uint32_t n,
                          uint32_t k)
{
    if (b->pack)
        return td_bind_packed(b, name, 1, n, k);
    td_bind_source s = td_bind_find(b, name, n, k);
    td_tensor *w = NULL;
    if (!td_bind_agree(b, &s, class) || b->check_only)
        return NULL;
    int r = b->m->backend->weight_new(s.format, 1, n, k, &w);
    if (r >= 0)
        td_bind_fill(b, w, 0, n, &s);
    w = td_bind_own(b, w, r);
    td_bind_save(b, name, w, s.format, 1, n, k);
    return w;
}

td_tensor *td_bind_vector(td_binder *b, const char *name, uint32_t n)
{
    char full[2 * TD_BIND_NAME];
    td_tensor *w = NULL;
    if (b->pack)
        return packed_vector(b, name, n);
    snprintf(full, sizeof full, "%s%s", b->prefix, name);
    td_bind_source s = {.t = take(b, full)};
    if (s.t && !is_plain(s.t))
        refuse_type(b, s.t);
    if (b->failed || !has_shape(b, s.t, n, 0, "config.json") || b->check_only)
        return NULL;
    td_weight_src src = td_bind_view(&s);
    int r = b->m->backend->vector_new(n, &src, &w);
    td_pack_entry e = {.is_vector = 1,
                       .type = src.dtype,
                       .slabs = 1,
                       .n = n,
                       .bytes = s.t->data,
                       .n_bytes = s.t->bytes};
    td_err err = {0};
    int saved = b->out && r >= 0 ? td_pack_writer_add(b->out, full, &e, &err) : 0;
    w = td_bind_own(b, w, r);
    if (saved < 0)
        td_bind_fail(b, saved, "%s", err.text);
    return w;
}

/* The values of a quantised matrix [n][k]. */
typedef struct decode_job {
    const td_bind_source *s;
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
float *td_bind_decoded(td_binder *b, const td_bind_source *s, uint32_t n, uint32_t k)
{
    decode_job j = {.s = s, .out = malloc((size_t)n * k * sizeof(float)), .n = n, .k = k};
    if (!j.out) {
        td_bind_fail(b, -ENOMEM, "out of memory for weights");
        return NULL;
    }
    td_pool_run(b->pool, decode_item, &j, (n + FILL_ROWS - 1) / FILL_ROWS);
    return j.out;
}
