/* SPDX-License-Identifier: Apache-2.0 */
#include "kernels/checks/checks.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bug.h"
#include "kernels/checks/inside.h"
#include "kernels/formats.h"

#include "base/banned.h"

enum { GUARD = 64, GUARD_BYTE = 0xa5 };

const td_check_case td_check_cases[] = {
#define TD_CHECK(group, function, name) {#group, name, td_check_##function},
#include "kernels/checks/list.def"
#undef TD_CHECK
    {0},
};

void td_check_begin(td_check *c, const td_check_target *t, td_check_result *result)
{
    *result = (td_check_result){0};
    *c = (td_check){.target = t,
                    .be = t->backend,
                    .rng = {1, 0},
                    .wider = t->matrix ? 4.0 : 1.0,
                    .result = result};
}

static void release(const td_check *c, void *p)
{
    if (c->target->alloc)
        c->target->free(c->target->arg, p);
    else
        free(p);
}

void td_check_drop(td_check *c)
{
    while (c->n_bufs)
        release(c, c->bufs[--c->n_bufs].raw);
}

void td_check_run(const td_check_case *k, const td_check_target *t, td_check_result *ret_result)
{
    td_check c;
    td_check_begin(&c, t, ret_result);
    if (setjmp(c.out) == 0)
        k->run(&c);
    td_check_drop(&c);
}

void td_check_fail(td_check *c, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(c->result->text, sizeof c->result->text, fmt, ap);
    va_end(ap);
    c->result->failed = 1;
    longjmp(c->out, 1);
}

void td_check_skip(td_check *c, const char *why)
{
    snprintf(c->result->text, sizeof c->result->text, "%s", why);
    c->result->skipped = 1;
    longjmp(c->out, 1);
}

void td_check_near(td_check *c, double got, double want, double tolerance, const char *what,
                   size_t at)
{
    td_check_result *r = c->result;
    double error = fabs(got - want);
    if (!(error <= tolerance)) {
        r->error = error;
        r->tolerance = tolerance;
        td_check_fail(c, "%s[%zu] is %.9g, float64 says %.9g (tolerance %g)", what, at, got, want,
                      tolerance);
    }
    if (r->n++ == 0 || error * r->tolerance > r->error * tolerance) {
        r->error = error;
        r->tolerance = tolerance;
    }
}

void td_check_match(td_check *c, const void *a, const void *b, size_t n, const char *file, int line,
                    const char *what)
{
    const uint8_t *x = a, *y = b;
    for (size_t i = 0; i < n; i++)
        if (x[i] != y[i])
            td_check_fail(c, "%s:%d: byte %zu of %zu of %s is %02x, not %02x", file, line, i, n,
                          what, x[i], y[i]);
}

void td_check_bits(td_check *c, const void *p, size_t n)
{
    const uint8_t *b = p;
    uint64_t h = c->result->bits ^ n; /* FNV-1a */
    for (size_t i = 0; i < n; i++)
        h = (h ^ b[i]) * 0x100000001b3u;
    c->result->bits = h;
}

static size_t room_of(size_t bytes)
{
    return (bytes + 63) / 64 * 64 + 2ul * GUARD;
}

float *td_check_floats(td_check *c, size_t n)
{
    size_t bytes = n * sizeof(float), room = room_of(bytes);
    const td_check_target *t = c->target;
    uint8_t *raw = t->alloc ? t->alloc(t->arg, room) : aligned_alloc(64, room);
    if (!raw)
        td_check_fail(c, "no memory for %zu bytes that host and backend share", room);
    TD_BUG_ON(c->n_bufs == TD_CHECK_BUFS);
    memset(raw, GUARD_BYTE, room);
    memset(raw + GUARD, 0xff, bytes);
    c->bufs[c->n_bufs++] = (td_check_buf){raw, bytes};
    return (float *)(void *)(raw + GUARD);
}

uint32_t *td_check_words(td_check *c, size_t n)
{
    return (uint32_t *)td_check_floats(c, n);
}

float td_check_value(td_check *c, int bf16)
{
    float f = (float)((double)(td_rng_next(&c->rng) >> 11) / 4503599627370496.0 - 1.0);
    /* a table, not a choice: gcc 12 drops "bf16 ? 0xffff0000 : ~0" between two memcpy at -O2 */
    static const uint32_t masks[2] = {0xffffffffu, 0xffff0000u};
    uint32_t u;
    memcpy(&u, &f, 4);
    u &= masks[bf16 != 0];
    memcpy(&f, &u, 4);
    return f;
}

float *td_check_random(td_check *c, size_t n, int bf16)
{
    float *f = td_check_floats(c, n);
    for (size_t i = 0; i < n; i++)
        f[i] = td_check_value(c, bf16);
    return f;
}

void td_check_guards(td_check *c, size_t keep)
{
    while (c->n_bufs > keep) {
        const td_check_buf *g = &c->bufs[c->n_bufs - 1];
        for (size_t i = 0; i < room_of(g->bytes); i++)
            if ((i < GUARD || i >= GUARD + g->bytes) && g->raw[i] != GUARD_BYTE)
                td_check_fail(c, "written %s a buffer of %zu bytes",
                              i < GUARD ? "in front of" : "behind", g->bytes);
        release(c, g->raw);
        c->n_bufs--;
    }
}

td_queue *td_check_queue(td_check *c, td_dtype act, uint32_t threads)
{
    td_queue *q = NULL;
    td_err err = {0};
    td_backend_options o = {.act = act,
                            .act_i8 = c->i8,
                            .act_fp8 = c->fp8,
                            .n_threads = threads,
                            .max_rows = 64,
                            .max_context = 4096,
                            .max_heads = 16,
                            .max_row_elems = 576,
                            .max_round_k = 512};
    if (c->be->open(&o, &q, &err) < 0)
        td_check_fail(c, "%s", err.text);
    return q;
}

static td_tensor *new_weight(td_check *c, td_weight_format format, uint32_t slabs, uint32_t n,
                             uint32_t k)
{
    td_tensor *t = NULL;
    int r = c->be->weight_new(format, slabs, n, k, &t);
    if (r < 0)
        td_check_fail(c, "a weight [%u][%u][%u] %s: %s", slabs, n, k, td_weight_format_name(format),
                      td_errno_text(r));
    return t;
}

static void *need(td_check *c, void *p)
{
    if (!p)
        td_check_fail(c, "out of memory");
    return p;
}

td_tensor *td_check_weight_as(td_check *c, td_weight_format format, const float *w, uint32_t slabs,
                              uint32_t n, uint32_t k)
{
    size_t all = (size_t)slabs * n * k;
    td_tensor *t = new_weight(c, format, slabs, n, k);
    uint16_t *half = need(c, malloc(all * sizeof *half));
    for (size_t i = 0; i < all; i++)
        memcpy(&half[i], (const char *)&w[i] + 2, 2);
    td_weight_src src = {.dtype = format == TD_W_BF16 ? TD_BF16 : TD_F32,
                         .base = format == TD_W_BF16 ? (const void *)half : w,
                         .slab_stride = (size_t)n * k,
                         .n_stride = k,
                         .k_stride = 1};
    for (uint32_t s = 0; s < slabs; s++)
        c->be->weight_fill(t, s, 0, n, &src);
    free(half);
    return t;
}

td_tensor *td_check_weight(td_check *c, const float *w, uint32_t slabs, uint32_t n, uint32_t k)
{
    return td_check_weight_as(c, TD_W_F32, w, slabs, n, k);
}

/* [rows][columns] of a matrix's scales, and bytes of a row of its codes. */
static uint32_t scale_rows(td_weight_format f, uint32_t n)
{
    return f == TD_W_MXFP4 ? n : (n + TD_FP8_BLOCK - 1u) / TD_FP8_BLOCK;
}

static uint32_t scale_columns(td_weight_format f, uint32_t k)
{
    uint32_t group = f == TD_W_MXFP4 ? TD_MX_GROUP : TD_FP8_BLOCK;
    return (k + group - 1) / group;
}

static size_t code_bytes(td_weight_format f, uint32_t k)
{
    return f == TD_W_MXFP4 ? k / 2 : k;
}

/* What the codes and scales of one matrix stand for. */
static void values_of(const td_check_quant *q, const uint8_t *codes, const uint8_t *e8m0,
                      const float *scales, double *ret_values)
{
    uint32_t across = scale_columns(q->format, q->k);
    size_t row = code_bytes(q->format, q->k);
    for (uint32_t i = 0; i < q->n; i++)
        for (uint32_t j = 0; j < q->k; j++)
            if (q->format == TD_W_MXFP4) {
                uint8_t e = codes[i * row + j / 2] >> (j % 2 * 4) & 15;
                ret_values[(size_t)i * q->k + j] =
                    0.5 * td_e2m1_doubled[e] * ldexp(1, e8m0[i * across + j / 32] - 127);
            } else {
                ret_values[(size_t)i * q->k + j] = (double)td_e4m3_to_f32(codes[i * row + j]) *
                                                   (double)scales[i / 128 * across + j / 128];
            }
}

/* NaN codes are avoided. */
void td_check_quant_draw(td_check *c, td_weight_format format, uint32_t slabs, uint32_t n,
                         uint32_t k, td_check_quant *ret, double *ret_values)
{
    size_t n_codes = n * code_bytes(format, k),
           n_scales = (size_t)scale_rows(format, n) * scale_columns(format, k);
    *ret = (td_check_quant){.format = format, .slabs = slabs, .n = n, .k = k};
    ret->codes = need(c, malloc(slabs * n_codes));
    ret->e8m0 = need(c, malloc(slabs * n_scales));
    ret->scales = need(c, malloc(slabs * n_scales * sizeof(float)));
    for (uint32_t s = 0; s < slabs; s++) {
        uint8_t *codes = ret->codes + s * n_codes, *e8m0 = ret->e8m0 + s * n_scales;
        float *scales = ret->scales + s * n_scales;
        for (size_t i = 0; i < n_scales; i++) {
            e8m0[i] = (uint8_t)(123 + td_rng_below(&c->rng, 8));
            scales[i] = 0.01f + 0.1f * fabsf(td_check_value(c, 0));
        }
        for (size_t i = 0; i < n_codes; i++) {
            codes[i] = (uint8_t)td_rng_next(&c->rng);
            if (format == TD_W_FP8 && (codes[i] & 0x7f) == 0x7f)
                codes[i] ^= 1;
        }
        if (ret_values)
            values_of(ret, codes, e8m0, scales, ret_values + (size_t)s * n * k);
    }
}

/* A rank's own scales: they lie as those of a matrix [n][k]. */
static void cut_scales(const td_check_quant *q, uint32_t s, uint32_t n0, uint32_t n, uint32_t k0,
                       uint32_t k, uint8_t *ret)
{
    size_t each = q->format == TD_W_MXFP4 ? 1 : sizeof(float);
    uint32_t rows = scale_rows(q->format, n), across = scale_columns(q->format, k),
             all = scale_columns(q->format, q->k),
             first = s * scale_rows(q->format, q->n) + scale_rows(q->format, n0);
    const uint8_t *from = q->format == TD_W_MXFP4 ? q->e8m0 : (const uint8_t *)q->scales;
    for (uint32_t r = 0; r < rows; r++)
        memcpy(ret + r * across * each,
               from + ((size_t)(first + r) * all + scale_columns(q->format, k0)) * each,
               across * each);
}

td_tensor *td_check_quant_part(td_check *c, const td_check_quant *q, uint32_t n0, uint32_t n,
                               uint32_t k0, uint32_t k)
{
    int mx = q->format == TD_W_MXFP4;
    TD_BUG_ON(mx ? k0 % TD_MX_GROUP : n0 % TD_FP8_BLOCK || k0 % TD_FP8_BLOCK);
    td_tensor *t = new_weight(c, q->format, q->slabs, n, k);
    uint8_t *scales =
        need(c, malloc((size_t)scale_rows(q->format, n) * scale_columns(q->format, k) * 4));
    size_t row = code_bytes(q->format, q->k);
    td_weight_src src = {
        .dtype = mx ? TD_U8 : TD_F8E4M3, .scales = scales, .n_stride = row, .k_stride = 1};
    for (uint32_t s = 0; s < q->slabs; s++) {
        cut_scales(q, s, n0, n, k0, k, scales);
        src.base = q->codes + ((size_t)s * q->n + n0) * row + code_bytes(q->format, k0);
        c->be->weight_fill(t, s, 0, n, &src);
    }
    free(scales);
    return t;
}

void td_check_quant_done(td_check_quant *q)
{
    free(q->codes);
    free(q->e8m0);
    free(q->scales);
    *q = (td_check_quant){0};
}

td_tensor *td_check_codes(td_check *c, td_weight_format format, uint32_t slabs, uint32_t n,
                          uint32_t k, double *ret_values)
{
    td_check_quant q;
    td_check_quant_draw(c, format, slabs, n, k, &q, ret_values);
    td_tensor *t = td_check_quant_part(c, &q, 0, n, 0, k);
    td_check_quant_done(&q);
    return t;
}

td_tensor *td_check_vector(td_check *c, const float *w, uint32_t n)
{
    td_tensor *t = NULL;
    td_weight_src src = {.dtype = TD_F32, .base = w, .n_stride = 1};
    if (c->be->vector_new(n, &src, &t) < 0)
        td_check_fail(c, "no memory for a vector");
    return t;
}

float td_check_bf16(float f)
{
    uint32_t u;
    memcpy(&u, &f, 4);
    u = (u + 0x7fffu + (u >> 16 & 1)) & 0xffff0000u;
    memcpy(&f, &u, 4);
    return f;
}

float td_check_rounded(td_dtype t, float f)
{
    return t == TD_BF16 ? td_check_bf16(f) : f;
}

float td_check_query(const td_check *c, td_dtype kv, float q)
{
    return c->target->matrix ? td_check_rounded(kv, q) : q;
}

double td_check_attend_bound(const td_check *c, td_dtype kv, double bound)
{
    return c->target->matrix && kv == TD_BF16 ? 0.004 : c->wider * bound;
}
