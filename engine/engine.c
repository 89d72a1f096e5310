/* SPDX-License-Identifier: Apache-2.0 */
/* Life of an engine: every buffer that a step needs is allocated here. */
#include "engine/engine.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/bug.h"
#include "base/prefix.h"
#include "engine/internal.h"
#include "kernels/kplan.h"
#include "kernels/math.h"

#include "base/banned.h"

enum { MEM_MAX = 64, ROWS_MAX = 65536, SEQS_MAX = 4096 };
static const uint64_t STAGING_BYTES = 4ull << 30;

/* Backend memory of n elements; a NULL is found by whoever asks e->n_mem > MEM_MAX. */
static void *buffer(td_engine *e, size_t n, size_t size)
{
    void *p = e->n_mem < MEM_MAX ? e->be->mem_alloc(e->queue, n * size) : NULL;
    if (p)
        e->mem[e->n_mem++] = p;
    else
        e->n_mem = MEM_MAX + 1;
    return p;
}

static float *floats(td_engine *e, size_t n)
{
    return buffer(e, n, sizeof(float));
}

static size_t largest(size_t a, size_t b)
{
    return a > b ? a : b;
}

static void glm_buffers(td_engine *e)
{
    const td_config *c = &e->model->config;
    td_buffers *b = &e->buf;
    size_t t = e->limits.max_rows;
    b->h32 = floats(e, t * c->hidden);
    b->q_a = floats(e, t * c->q_lora);
    b->qr = floats(e, t * c->q_lora);
    b->q = floats(e, t * c->n_heads * (c->nope + c->rope_dims));
    b->kv_a = floats(e, t * (c->kv_lora + c->rope_dims));
    b->q_lat = floats(e, t * c->n_heads * c->kv_lora);
    b->o_lat = floats(e, t * c->n_heads * c->kv_lora);
    b->o = floats(e, t * c->n_heads * c->v_dims);
    b->index_q = floats(e, t * c->index_heads * c->index_dims);
    b->index_k = floats(e, t * c->index_dims);
    b->index_w = floats(e, t * c->index_heads);
    b->index_margin = floats(e, t);
    b->selected = buffer(e, t * c->index_topk, sizeof(uint32_t));
    b->n_selected = buffer(e, t, sizeof(uint32_t));
    b->scores = floats(e, t * c->n_experts);
    b->route_weights = floats(e, t * c->top_k);
    b->route_margin = floats(e, t);
    b->experts = buffer(e, t * c->top_k, sizeof(uint32_t));
    b->act = floats(e, largest(t * c->inter, td_moe_act_elems((uint32_t)t, c->top_k, c->moe_inter,
                                                              c->n_shared * c->moe_inter)));
}

static void qwen_buffers(td_engine *e)
{
    const td_config *c = &e->model->config;
    td_buffers *b = &e->buf;
    size_t t = e->limits.max_rows;
    b->q = floats(e, t * c->n_heads * c->head_dim);
    b->o = floats(e, t * c->n_heads * c->head_dim);
    b->k = floats(e, t * c->n_kv_heads * c->head_dim);
    b->v = floats(e, t * c->n_kv_heads * c->head_dim);
    b->act = floats(e, t * c->inter);
}

static int step_buffers(td_engine *e, td_err *err)
{
    const td_config *c = &e->model->config;
    td_buffers *b = &e->buf;
    size_t t = e->limits.max_rows, pairs = c->rope_dims / 2, stride = (c->max_context + 63u) / 64;
    b->x = floats(e, t * c->hidden);
    b->delta = floats(e, t * c->hidden);
    b->h = floats(e, t * c->hidden);
    b->partial = floats(e, TD_KPLAN_SLICES_MAX * t * c->hidden);
    b->logits = floats(e, (size_t)e->limits.max_seqs * c->vocab);
    (c->arch == TD_ARCH_GLM_MOE_DSA ? glm_buffers : qwen_buffers)(e);
    e->dev_ids = buffer(e, t, 4);
    e->dev_positions = buffer(e, t, 4);
    e->dev_seq_of = buffer(e, t, 4);
    e->dev_logit_rows = buffer(e, e->limits.max_seqs, 4);
    e->dev_tables = buffer(e, stride * e->limits.max_seqs, 4);
    e->dev_cos = floats(e, t * pairs);
    e->dev_sin = floats(e, t * pairs);
    for (int i = 0; e->be->behind && i < TD_STEPS_BEGUN_MAX; i++)
        e->flights[i].dev_ids = buffer(e, e->limits.max_seqs, 4);
    e->step = (td_step){.ids = e->dev_ids,
                        .positions = e->dev_positions,
                        .seq_of = e->dev_seq_of,
                        .tables = e->dev_tables,
                        .table_stride = (uint32_t)stride,
                        .logit_rows = e->dev_logit_rows,
                        .rope_cos = e->dev_cos,
                        .rope_sin = e->dev_sin,
                        .kv_base = td_kv_base(e->pool),
                        .block_bytes = e->model->info.kv.block_bytes};
    return e->n_mem <= MEM_MAX
               ? 0
               : td_err_set(err, -ENOMEM,
                            "out of memory for a step of %zu rows; lower --chunk or --max-seqs", t);
}

/* Rows of the sampler in one call, each with room for its edits. On a device every call is a
 * launch. */
enum { DEVICE_DRAWS = 16 };

static int flight_buffers(td_engine *e)
{
    for (int i = 0; e->be->behind && i < TD_STEPS_BEGUN_MAX; i++) {
        td_flight *f = &e->flights[i];
        f->items = calloc(e->limits.max_seqs, sizeof *f->items);
        f->ids = calloc(e->limits.max_seqs, sizeof *f->ids);
        f->logits = e->be->transfer->host_alloc(
            e->queue, TD_FLIGHT_LOGITS * (size_t)e->model->config.vocab * sizeof *f->logits);
        if (!f->items || !f->ids || !f->logits)
            return 0;
    }
    return 1;
}

static int host_buffers(td_engine *e, td_err *err)
{
    const td_config *c = &e->model->config;
    size_t t = e->limits.max_rows, pairs = c->rope_dims / 2;
    e->ids = calloc(t, 4);
    e->positions = calloc(t, 4);
    e->seq_of = calloc(t, 4);
    e->logit_rows = calloc(e->limits.max_seqs, 4);
    e->rope_cos = calloc(t * pairs, sizeof(float));
    e->rope_sin = calloc(t * pairs, sizeof(float));
    e->inv_freq = calloc(pairs, sizeof(float));
    e->sample_scratch_bytes = td_sampler_scratch_bytes(c->vocab);
    e->n_draw_rows = e->be->behind ? DEVICE_DRAWS : e->model->n_threads;
    e->sample_scratch = aligned_alloc(64, e->sample_scratch_bytes * e->n_draw_rows);
    e->host_logits = malloc(e->be->transfer ? c->vocab * sizeof(float) : 1);
    if (!e->ids || !e->positions || !e->seq_of || !e->logit_rows || !e->rope_cos || !e->rope_sin ||
        !e->inv_freq || !e->sample_scratch || !e->host_logits || !flight_buffers(e))
        return td_err_set(err, -ENOMEM,
                          "out of memory for a step of %zu rows; lower --chunk or --max-seqs", t);
    td_rope_freqs(c->rope_theta, c->rope_dims, e->inv_freq);
    return 0;
}

static int open_queue(td_engine *e, td_err *err)
{
    const td_model *m = e->model;
    const td_config *c = &m->config;
    int mla = c->arch == TD_ARCH_GLM_MOE_DSA;
    uint32_t row = mla ? c->kv_lora + c->rope_dims : 2 * c->n_kv_heads * c->head_dim;
    td_backend_options o = {.act = m->act,
                            .act_i8 = m->act_i8,
                            .act_fp8 = m->act_fp8,
                            .n_threads = m->n_threads,
                            .cores = m->cores,
                            .n_cores = m->n_cores,
                            .max_rows = e->limits.max_rows,
                            .max_context = c->max_context,
                            .max_heads = c->n_heads,
                            .max_row_elems = row > c->index_dims ? row : c->index_dims,
                            .max_round_k = mla ? (c->nope > c->kv_lora ? c->nope : c->kv_lora) : 0};
    return m->backend->open(&o, &e->queue, err);
}

/* In the backend's memory. */
static int open_pool(td_engine *e, td_err *err)
{
    const td_kv_layout *l = &e->model->info.kv;
    if (!e->be->transfer)
        return td_kv_pool_open(l, e->limits.n_blocks, &e->pool, err);
    uint64_t bytes = e->limits.staging_bytes ? e->limits.staging_bytes : STAGING_BYTES,
             n = bytes / l->block_bytes;
    td_kv_place place = {.backend = e->be, .queue = e->queue, .n_staging = e->limits.n_blocks};
    if (n < place.n_staging)
        place.n_staging = n < 1 ? 1 : (uint32_t)n;
    return td_kv_pool_open_at(l, e->limits.n_blocks, &place, &e->pool, err);
}

static int take_limits(td_engine *e, const td_engine_limits *limits, td_err *err)
{
    const td_kv_layout *l = &e->model->info.kv;
    e->limits = *limits;
    if (limits->max_rows < 1 || limits->max_rows > ROWS_MAX || limits->max_seqs < 1 ||
        limits->max_seqs > SEQS_MAX)
        return td_err_set(err, -EINVAL,
                          "engine: %u rows and %u sequences a step; 1..%d and 1..%d are possible",
                          limits->max_rows, limits->max_seqs, ROWS_MAX, SEQS_MAX);
    if (e->limits.max_rows < e->limits.max_seqs)
        e->limits.max_rows = e->limits.max_seqs;
    if (!e->limits.n_blocks) {
        uint64_t n = limits->kv_bytes / l->block_bytes;
        if (n < 1 || n >= UINT32_MAX)
            return td_err_set(
                err, -EINVAL,
                "%llu bytes of KV memory hold %llu blocks of %llu bytes; raise --kv-memory",
                (unsigned long long)limits->kv_bytes, (unsigned long long)n,
                (unsigned long long)l->block_bytes);
        e->limits.n_blocks = (uint32_t)n;
    }
    return 0;
}

int td_engine_open(td_model *model, const td_engine_limits *limits, td_engine **ret_engine,
                   td_err *reterr_err)
{
    td_engine *e = calloc(1, sizeof *e);
    if (!e)
        return td_err_set(reterr_err, -ENOMEM, "out of memory");
    e->model = model;
    e->be = model->backend;
    e->mem = calloc(MEM_MAX, sizeof *e->mem);
    int r = e->mem ? take_limits(e, limits, reterr_err)
                   : td_err_set(reterr_err, -ENOMEM, "out of memory");
    r = r < 0 ? r : open_queue(e, reterr_err);
    r = r < 0 ? r : open_pool(e, reterr_err);
    r = r < 0 ? r : step_buffers(e, reterr_err);
    r = r < 0 ? r : host_buffers(e, reterr_err);
    if (r < 0) {
        td_engine_free(e);
        return r;
    }
    *ret_engine = e;
    return 0;
}

void td_engine_free(td_engine *e)
{
    if (!e)
        return;
    TD_BUG_ON(e->n_seqs_open != 0 || e->n_flights != 0);
    for (size_t i = 0; e->mem && i < MEM_MAX && e->mem[i]; i++)
        e->be->mem_free(e->queue, e->mem[i]);
    for (int i = 0; i < TD_STEPS_BEGUN_MAX; i++)
        if (e->flights[i].logits)
            e->be->transfer->host_free(e->queue, e->flights[i].logits);
    td_graphs_free(e);
    td_kv_pool_free(e->pool);
    if (e->queue)
        e->be->close(e->queue);
    for (int i = 0; i < TD_STEPS_BEGUN_MAX; i++) {
        free(e->flights[i].items);
        free(e->flights[i].ids);
    }
    free(e->mem);
    free(e->host_logits);
    free(e->ids);
    free(e->positions);
    free(e->seq_of);
    free(e->logit_rows);
    free(e->rope_cos);
    free(e->rope_sin);
    free(e->inv_freq);
    free(e->sample_scratch);
    free(e);
}

td_kv_pool *td_engine_pool(td_engine *e)
{
    return e->pool;
}

const td_model_info *td_engine_info(const td_engine *e)
{
    return &e->model->info;
}

void td_engine_set_probe(td_engine *e, const td_probe *probe)
{
    e->probe = probe;
}
