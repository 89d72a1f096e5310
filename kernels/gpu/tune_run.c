/* SPDX-License-Identifier: Apache-2.0 */
#include "kernels/gpu/tune_run.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bug.h"
#include "base/rand.h"
#include "kernels/formats.h"
#include "kernels/gpu/inside.h"

#include "base/banned.h"

/* Elements of a weight lie in a small pool of random ones: row n of a slab begins where its run of
 * RUN rows begins, STRIDE elements behind the row before. So that gigabytes need no drawing, and
 * any element can be found again. */
enum {
    POOL = 1 << 20, /* bytes */
    RUN = 1024,
    STRIDE = 64,
    STARTS = 256,
    PATTERN_ROWS = 64, /* rows of operands that differ */
    SAMPLES = 2,       /* outputs of row 0 that are computed in float64 */
    REPEATS_MAX = 101
};
#define COMPARE_BYTES ((size_t)32 << 20) /* fetched at once */

enum { W_FIRST, W_UP, W_DOWN, WEIGHTS }; /* gemm: the first; silu: two */

struct td_tune_bench {
    td_gpu *g;
    const td_backend *be;
    td_queue *q;
    td_tune_key key;
    td_tune_settings settings;
    uint32_t max_rows;
    uint8_t *pool;
    float *scales; /* FP8 */
    uint8_t *e8m0; /* MXFP4 */
    td_tensor *w[WEIGHTS];
    float *a, *out, *first, *act, *weights; /* device */
    uint32_t *experts;                      /* device */
    void *flush;
    void *from, *to;        /* events */
    float *host_a;          /* [PATTERN_ROWS][row_elems] */
    uint32_t *host_experts; /* of row 0 */
    float *host_weights;
    double want[SAMPLES], size[SAMPLES];
    void *host[2]; /* for comparing */
};

static uint32_t a_elems(const td_tune_key *k)
{
    return k->heads * k->k;
}

/* Outputs of a row, all slices. */
static size_t out_elems(const td_tune_key *k)
{
    return (size_t)(k->op == TD_TUNE_MOE ? k->k : k->heads * k->n) * k->slices;
}

/* ---- weights ---- */

/* [n][k] of weight i. */
static void shape_of(const td_tune_key *key, int i, uint32_t *ret_slabs, uint32_t *ret_n,
                     uint32_t *ret_k)
{
    int down = i == W_DOWN;
    *ret_slabs = key->op == TD_TUNE_MOE ? key->experts : key->heads;
    *ret_n = down ? key->k : key->n;
    *ret_k = down ? key->n : key->k;
}

static size_t start_of(int i, uint32_t slab, uint32_t n)
{
    return (size_t)((slab * 31u + n / RUN * 17u + (uint32_t)i * 7u) % STARTS) * 1024;
}

static double bf16_at(const uint8_t *p)
{
    uint32_t u = (uint32_t)p[0] << 16 | (uint32_t)p[1] << 24;
    float f;
    memcpy(&f, &u, 4);
    return (double)f;
}

/* Element k of row n of a slab. */
static double weight_at(const td_tune_bench *b, int i, uint32_t slab, uint32_t n, uint32_t k)
{
    uint32_t slabs, rows, width;
    shape_of(&b->key, i, &slabs, &rows, &width);
    size_t at = start_of(i, slab, n) + (size_t)(n % RUN) * STRIDE;
    if (b->key.format == TD_W_BF16)
        return bf16_at(b->pool + 2 * (at + k));
    if (b->key.format == TD_W_FP8)
        return (double)td_e4m3_to_f32(b->pool[at + k]) *
               (double)b->scales[(size_t)(n / TD_FP8_BLOCK) *
                                     ((width + TD_FP8_BLOCK - 1) / TD_FP8_BLOCK) +
                                 k / TD_FP8_BLOCK];
    uint8_t code = b->pool[at + k / 2] >> (k % 2 * 4) & 15;
    return 0.5 * td_e2m1_doubled[code] *
           ldexp(1, b->e8m0[(size_t)n * (width / TD_MX_GROUP) + k / TD_MX_GROUP] - 127);
}

static float draw(td_rng *r)
{
    return (float)(int)td_rng_below(r, 256) / 128.0f - 1.0f; /* exact in BF16 */
}

static int draw_pool(td_tune_bench *b, td_rng *r)
{
    uint32_t slabs, n, k, most = 0;
    for (int i = 0; i < WEIGHTS; i++) {
        shape_of(&b->key, i, &slabs, &n, &k);
        uint32_t scales = n * (k / TD_MX_GROUP + 1);
        most = scales > most ? scales : most;
    }
    b->pool = malloc(POOL);
    b->e8m0 = malloc(most);
    b->scales = malloc((size_t)most / 32 * sizeof(float) + 4096);
    if (!b->pool || !b->e8m0 || !b->scales)
        return -ENOMEM;
    for (size_t i = 0; i < POOL; i++)
        b->pool[i] = (uint8_t)td_rng_next(r);
    for (size_t i = 0; b->key.format == TD_W_FP8 && i < POOL; i++)
        if ((b->pool[i] & 0x7f) == 0x7f)
            b->pool[i] ^= 1; /* no NaN */
    for (size_t i = 0; b->key.format == TD_W_BF16 && i < POOL / 2; i++) {
        float f = draw(r);
        memcpy(b->pool + 2 * i, (char *)&f + 2, 2);
    }
    for (size_t i = 0; i < most; i++)
        b->e8m0[i] = (uint8_t)(119 + td_rng_below(r, 6));
    for (size_t i = 0; i < (size_t)most / 32 + 1024; i++)
        b->scales[i] = 0.001f + 0.0001f * (float)(int)td_rng_below(r, 64);
    return 0;
}

static int make_weight(td_tune_bench *b, int i)
{
    uint32_t slabs, n, k;
    shape_of(&b->key, i, &slabs, &n, &k);
    td_weight_format f = (td_weight_format)b->key.format;
    int r = b->be->weight_new(f, slabs, n, k, &b->w[i]);
    td_weight_src src = {.dtype = f == TD_W_BF16  ? TD_BF16
                                  : f == TD_W_FP8 ? TD_F8E4M3
                                                  : TD_U8,
                         .scales = f == TD_W_FP8     ? (const void *)b->scales
                                   : f == TD_W_MXFP4 ? b->e8m0
                                                     : NULL,
                         .n_stride = STRIDE,
                         .k_stride = 1};
    for (uint32_t s = 0; r >= 0 && s < slabs; s++)
        for (uint32_t n0 = 0; n0 < n; n0 += RUN) {
            src.base = b->pool + start_of(i, s, n0) * (f == TD_W_BF16 ? 2 : 1);
            b->be->weight_fill(b->w[i], s, n0, n - n0 < RUN ? n - n0 : RUN, &src);
        }
    return r;
}

/* ---- float64 ---- */

static double dot(const td_tune_bench *b, int i, uint32_t slab, uint32_t n, const double *a,
                  double *ret_size)
{
    uint32_t slabs, rows, width;
    double v = 0, size = 0;
    shape_of(&b->key, i, &slabs, &rows, &width);
    for (uint32_t k = 0; k < width; k++) {
        double p = a[k] * weight_at(b, i, slab, n, k);
        v += p;
        size += fabs(p);
    }
    if (ret_size)
        *ret_size = size;
    return v;
}

static double round_bf16(double v)
{
    float f = (float)v;
    uint32_t u;
    memcpy(&u, &f, 4);
    u = (u + 0x7fffu + (u >> 16 & 1)) & 0xffff0000u;
    memcpy(&f, &u, 4);
    return (double)f;
}

static double silu_mul(double g, double u)
{
    return g / (1 + exp(-g)) * u;
}

/* Output number s of row 0: the first, the last. */
static uint32_t sample_of(const td_tune_bench *b, int s)
{
    uint32_t n = b->key.op == TD_TUNE_MOE ? b->key.k : b->key.n;
    return s ? n - 1 : 0;
}

/* What the weights meet: n operands as the key says, in place. */
static int round_operands(const td_tune_bench *b, double *a, uint32_t n)
{
    float *f = b->key.act_fp8 ? malloc(n * sizeof *f) : NULL;
    if (!b->key.act_fp8)
        return 0;
    if (!f)
        return -ENOMEM;
    for (uint32_t i = 0; i < n; i++)
        f[i] = (float)a[i];
    td_ocp_fp8_values(f, n, a);
    free(f);
    return 0;
}

static int want_experts(td_tune_bench *b, const double *a)
{
    double *act = malloc(b->key.n * sizeof *act);
    if (!act)
        return -ENOMEM;
    int r = 0;
    for (uint32_t j = 0; r >= 0 && j < b->key.top_k; j++) {
        uint32_t e = b->host_experts[j];
        for (uint32_t i = 0; i < b->key.n; i++)
            act[i] =
                round_bf16(silu_mul(dot(b, W_FIRST, e, i, a, NULL), dot(b, W_UP, e, i, a, NULL)));
        r = round_operands(b, act, b->key.n);
        for (int s = 0; s < SAMPLES; s++) {
            double size, v = dot(b, W_DOWN, e, sample_of(b, s), act, &size);
            b->want[s] += (double)b->host_weights[j] * v;
            b->size[s] += fabs((double)b->host_weights[j]) * size;
        }
    }
    free(act);
    return r;
}

static int want_row(td_tune_bench *b)
{
    int r = 0;
    double *a = malloc(b->key.k * sizeof *a);
    if (!a)
        return -ENOMEM;
    for (uint32_t k = 0; k < b->key.k; k++)
        a[k] = (double)b->host_a[k];
    r = round_operands(b, a, b->key.k);
    if (r >= 0 && b->key.op == TD_TUNE_MOE)
        r = want_experts(b, a);
    for (int s = 0; r >= 0 && s < SAMPLES && b->key.op != TD_TUNE_MOE; s++) {
        double up_size, g = dot(b, W_FIRST, 0, sample_of(b, s), a, &b->size[s]);
        b->want[s] = g;
        if (b->key.op == TD_TUNE_SILU) {
            double u = dot(b, W_UP, 0, sample_of(b, s), a, &up_size);
            b->want[s] = silu_mul(g, u);
            b->size[s] = b->size[s] * up_size;
        }
    }
    free(a);
    return r;
}

/* ---- memory ---- */

static void *device(td_tune_bench *b, size_t bytes, int *failed)
{
    void *p = *failed ? NULL : b->g->ops->mem_alloc(b->g, bytes);
    if (!p)
        *failed = 1;
    return p;
}

/* Rows repeat after PATTERN_ROWS. */
static int fill_rows(td_tune_bench *b, void *dst, const void *rows, size_t row_bytes)
{
    int r = 0;
    for (uint32_t t = 0; r >= 0 && t < b->max_rows; t += PATTERN_ROWS) {
        uint32_t n = b->max_rows - t < PATTERN_ROWS ? b->max_rows - t : PATTERN_ROWS;
        r = b->g->ops->upload(b->g, b->q->stream, (char *)dst + t * row_bytes, rows, n * row_bytes);
    }
    return r < 0 ? r : b->g->ops->stream_wait(b->g, b->q->stream);
}

static int draw_operands(td_tune_bench *b, td_rng *r)
{
    const td_tune_key *k = &b->key;
    size_t elems = (size_t)PATTERN_ROWS * a_elems(k), pairs = (size_t)PATTERN_ROWS * k->top_k;
    b->host_a = malloc(elems * sizeof(float));
    b->host_experts = malloc((pairs + 1) * sizeof(uint32_t));
    b->host_weights = malloc((pairs + 1) * sizeof(float));
    if (!b->host_a || !b->host_experts || !b->host_weights)
        return -ENOMEM;
    for (size_t i = 0; i < elems; i++)
        b->host_a[i] = draw(r);
    for (uint32_t i = 0; i < pairs; i++) { /* distinct within a row: top_k <= experts */
        uint32_t j = i % k->top_k;
        uint32_t first = j ? b->host_experts[i - j] : (uint32_t)td_rng_below(r, k->experts);
        b->host_experts[i] = (first + j * (k->experts / k->top_k)) % k->experts;
        b->host_weights[i] = 0.5f + 0.5f * draw(r);
    }
    int code = fill_rows(b, b->a, b->host_a, a_elems(k) * sizeof(float));
    if (code >= 0 && pairs)
        code = fill_rows(b, b->experts, b->host_experts, k->top_k * sizeof(uint32_t));
    if (code >= 0 && pairs)
        code = fill_rows(b, b->weights, b->host_weights, k->top_k * sizeof(float));
    return code;
}

static int make_memory(td_tune_bench *b)
{
    const td_tune_key *k = &b->key;
    int failed = 0, moe = k->op == TD_TUNE_MOE;
    size_t rows = b->max_rows;
    b->a = device(b, rows * a_elems(k) * sizeof(float), &failed);
    b->out = device(b, rows * out_elems(k) * sizeof(float), &failed);
    b->first = device(b, rows * out_elems(k) * sizeof(float), &failed);
    if (moe) {
        size_t act = td_moe_act_elems(b->max_rows, k->top_k, k->n, 0);
        b->act = device(b, act * sizeof(float), &failed);
        b->experts = device(b, rows * k->top_k * sizeof(uint32_t), &failed);
        b->weights = device(b, rows * k->top_k * sizeof(float), &failed);
    }
    if (b->settings.flush_bytes)
        b->flush = device(b, b->settings.flush_bytes, &failed);
    b->host[0] = malloc(COMPARE_BYTES);
    b->host[1] = malloc(COMPARE_BYTES);
    return failed || !b->host[0] || !b->host[1] ? -ENOMEM : 0;
}

static int make(td_tune_bench *b)
{
    td_rng r = {5, 0};
    int n = b->key.op == TD_TUNE_MOE ? 3 : b->key.op == TD_TUNE_SILU ? 2 : 1;
    int code = make_memory(b);
    code = code < 0 ? code : draw_pool(b, &r);
    for (int i = 0; code >= 0 && i < n; i++)
        code = make_weight(b, i);
    code = code < 0 ? code : draw_operands(b, &r);
    code = code < 0 ? code : b->g->ops->event_new(b->g, &b->from);
    code = code < 0 ? code : b->g->ops->event_new(b->g, &b->to);
    return code < 0 ? code : want_row(b);
}

int td_tune_bench_open(td_gpu *g, const td_backend *be, const td_tune_key *key, uint32_t max_rows,
                       const td_tune_settings *settings, td_tune_bench **ret_bench,
                       td_err *reterr_err)
{
    char text[200];
    td_tune_bench *b = calloc(1, sizeof *b);
    td_backend_options o = {.act = TD_BF16, .act_fp8 = (int)key->act_fp8, .n_threads = 1};
    if (key->act_fp8 && !be->act_fp8) {
        free(b);
        return td_err_set(reterr_err, -ENOTSUP,
                          "FP8 operands for MXFP4 weights: %s has no scaled matrix instruction",
                          be->isa);
    }
    TD_BUG_ON(!settings->repeats || settings->repeats > REPEATS_MAX);
    if (!b)
        return td_err_set(reterr_err, -ENOMEM, "out of memory");
    *b =
        (td_tune_bench){.g = g, .be = be, .key = *key, .settings = *settings, .max_rows = max_rows};
    int r = be->open(&o, &b->q, reterr_err);
    if (r >= 0 && (r = make(b)) < 0) {
        td_tune_key_text(key, text, sizeof text);
        td_err_set(reterr_err, r, "%s: %s", text,
                   r == -ENOMEM ? "does not fit the device's memory" : g->error);
    }
    if (r < 0) {
        td_tune_bench_close(b);
        return r;
    }
    *ret_bench = b;
    return 0;
}

void td_tune_bench_close(td_tune_bench *b)
{
    if (!b)
        return;
    for (int i = 0; i < WEIGHTS; i++)
        b->be->weight_free(b->w[i]);
    void *memory[] = {b->a, b->out, b->first, b->act, b->weights, b->experts, b->flush};
    for (size_t i = 0; i < TD_ARRAY_LEN(memory); i++)
        b->g->ops->mem_free(b->g, memory[i]);
    if (b->from)
        b->g->ops->event_free(b->g, b->from);
    if (b->to)
        b->g->ops->event_free(b->g, b->to);
    b->be->close(b->q);
    void *heap[] = {b->pool,         b->scales,       b->e8m0,    b->host_a,
                    b->host_experts, b->host_weights, b->host[0], b->host[1]};
    for (size_t i = 0; i < TD_ARRAY_LEN(heap); i++)
        free(heap[i]);
    free(b);
}

/* ---- runs ---- */

static void launch(td_tune_bench *b, uint32_t rows, float *out)
{
    const td_tune_key *k = &b->key;
    td_step st = {.n_rows = rows};
    if (k->op == TD_TUNE_MOE) {
        td_moe m = {.a = b->a,
                    .experts = b->experts,
                    .weights = b->weights,
                    .n_experts = k->experts,
                    .top_k = k->top_k,
                    .gate = b->w[W_FIRST],
                    .up = b->w[W_UP],
                    .down = b->w[W_DOWN],
                    .slices = k->slices,
                    .act = b->act,
                    .partial = out};
        b->be->moe(b->q, &st, &m);
        return;
    }
    td_gemm g = {.a = b->a,
                 .a_stride = a_elems(k),
                 .a_head = k->k,
                 .n_heads = k->heads,
                 .epilogue = k->op == TD_TUNE_SILU ? TD_EPI_SILU_MUL
                             : k->slices > 1       ? TD_EPI_PARTIAL
                                                   : TD_EPI_F32,
                 .n_out = 1,
                 .w = {b->w[W_FIRST], b->w[W_UP]},
                 .out = {out},
                 .out_stride = {k->heads * k->n},
                 .out_head = k->n,
                 .slices = k->slices};
    b->be->gemm(b->q, &st, &g);
}

/* Once, into out, which nobody wrote before. */
static int run_once(td_tune_bench *b, td_gpu_plan plan, uint32_t rows, float *out)
{
    size_t bytes = rows * out_elems(&b->key) * sizeof(float);
    int r = b->g->ops->fill(b->g, b->q->stream, out, 0xff, bytes);
    td_gpu_backend_plan(plan);
    launch(b, rows, out);
    td_gpu_backend_plan(TD_GPU_PLAN_AUTO);
    int f = b->be->finish(b->q);
    return r < 0 ? r : f;
}

/* 1: the candidate's output is the default's; 0: not, and why says where. */
static int same(td_tune_bench *b, uint32_t rows, char *why, size_t why_n)
{
    size_t all = rows * out_elems(&b->key) * sizeof(float);
    for (size_t at = 0; at < all; at += COMPARE_BYTES) {
        size_t n = all - at < COMPARE_BYTES ? all - at : COMPARE_BYTES;
        int r = 0;
        for (int i = 0; r >= 0 && i < 2; i++)
            r = b->g->ops->download(b->g, b->q->stream, b->host[i],
                                    (char *)(i ? b->out : b->first) + at, n);
        r = r < 0 ? r : b->g->ops->stream_wait(b->g, b->q->stream);
        if (r < 0)
            return r;
        const float *want = b->host[0], *got = b->host[1];
        for (size_t i = 0; i < n / sizeof(float); i++)
            if (memcmp(&want[i], &got[i], sizeof *got) != 0) {
                snprintf(why, why_n,
                         "output %zu of %zu is %.9g, the default plan's is %.9g (error %g)",
                         at / sizeof(float) + i, all / sizeof(float), (double)got[i],
                         (double)want[i], fabs((double)got[i] - (double)want[i]));
                return 0;
            }
    }
    return 1;
}

static int by_size(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

static int time_plan(td_tune_bench *b, td_gpu_plan plan, uint32_t rows, double *ret_us)
{
    const td_gpu_ops *o = b->g->ops;
    float ms[REPEATS_MAX];
    int r = 0;
    td_gpu_backend_plan(plan);
    for (uint32_t i = 0; r >= 0 && i < b->settings.repeats; i++) {
        if (b->flush)
            r = o->fill(b->g, b->q->stream, b->flush, (uint8_t)i, b->settings.flush_bytes);
        r = r < 0 ? r : o->event_record(b->g, b->from, b->q->stream);
        launch(b, rows, b->out);
        r = r < 0 ? r : o->event_record(b->g, b->to, b->q->stream);
        int f = b->be->finish(b->q);
        r = r < 0 ? r : f;
        r = r < 0 ? r : o->event_ms(b->g, b->from, b->to, &ms[i]);
    }
    td_gpu_backend_plan(TD_GPU_PLAN_AUTO);
    if (r < 0)
        return r;
    qsort(ms, b->settings.repeats, sizeof *ms, by_size);
    *ret_us = 1e3 * (double)ms[b->settings.repeats / 2];
    return 0;
}

/* Of the samples, relative to what was summed. */
static int error_of(td_tune_bench *b, uint32_t rows, double *ret_error)
{
    const td_tune_key *k = &b->key;
    uint32_t width = k->op == TD_TUNE_MOE ? k->k : k->heads * k->n;
    *ret_error = 0;
    for (int s = 0; s < SAMPLES; s++) {
        double got = 0;
        for (uint32_t i = 0; i < k->slices; i++) {
            float v = 0.0f;
            size_t at = (size_t)i * rows * width + sample_of(b, s);
            int r = b->g->ops->download(b->g, b->q->stream, &v, b->first + at, sizeof v);
            r = r < 0 ? r : b->g->ops->stream_wait(b->g, b->q->stream);
            if (r < 0)
                return r;
            got += (double)v;
        }
        double e = fabs(got - b->want[s]) / (b->size[s] > 0 ? b->size[s] : 1);
        *ret_error = e > *ret_error || isnan(e) ? e : *ret_error;
    }
    return 0;
}

/* The fastest of those that give the default's bytes. The default is one of them. */
static int candidates(td_tune_bench *b, uint32_t rows, td_tune_result *ret)
{
    size_t refused = 0;
    for (td_gpu_plan p = TD_GPU_PLAN_FEW; p <= TD_GPU_PLAN_MANY; p++) {
        char why[160];
        int r = run_once(b, p, rows, b->out);
        r = r < 0 ? r : same(b, rows, why, sizeof why);
        if (r < 0)
            return r;
        if (!r) {
            snprintf(ret->refused[refused++], sizeof ret->refused[0], "%s: %s", td_gpu_plan_name(p),
                     why);
            continue;
        }
        r = time_plan(b, p, rows, &ret->us[p]);
        if (r < 0)
            return r;
        if (ret->row.plan == TD_GPU_PLAN_AUTO || ret->us[p] < ret->row.us) {
            ret->row.plan = p;
            ret->row.us = ret->us[p];
        }
    }
    return 0;
}

int td_tune_bench_run(td_tune_bench *b, uint32_t rows, td_tune_result *ret_result,
                      td_err *reterr_err)
{
    TD_BUG_ON(rows > b->max_rows || td_tune_rows_class(rows) != rows);
    td_tune_result result = {.row = {.key = b->key}, .us = {-1, -1, -1}};
    result.row.key.cus = b->g->n_cus;
    result.row.key.rows = rows;
    td_gpu_backend_tuned(NULL); /* the default is what holds without a table */
    int r = run_once(b, TD_GPU_PLAN_AUTO, rows, b->first);
    r = r < 0 ? r : error_of(b, rows, &result.row.error);
    r = r < 0 ? r : candidates(b, rows, &result);
    if (r < 0) {
        char text[200];
        td_tune_key_text(&result.row.key, text, sizeof text);
        return td_err_set(reterr_err, r, "%s: %s", text,
                          b->g->error[0] ? b->g->error : td_errno_text(r));
    }
    *ret_result = result;
    return 0;
}
