/* SPDX-License-Identifier: Apache-2.0 */
/* A backend that counts what its matrix products must read and multiply and how long each kind of
 * op takes (where ops only enqueue: the host's part), and passes everything on. Attention, norms
 * and the pool are not counted, only timed. One thread. */
#ifndef TD_BENCH_COUNT_H
#define TD_BENCH_COUNT_H

#include <stdint.h>
#include <string.h>
#include <time.h>

#include "kernels/kernels.h"
#include "kernels/ref/ref.h"

typedef enum td_count_op {
    TD_COUNT_PRODUCTS,
    TD_COUNT_EXPERTS,
    TD_COUNT_HEAD,
    TD_COUNT_ATTENTION,
    TD_COUNT_INDEX,
    TD_COUNT_SMALL, /* embedding, norms, rows into the pool, router, slices */
    TD_COUNT_SAMPLING,
    TD_COUNT_OPS
} td_count_op;

static const char *const td_count_names[TD_COUNT_OPS] = {
    "products", "experts", "head", "attention", "indexer", "small ops", "sampling"};

typedef struct td_count {
    double bytes, operations, us[TD_COUNT_OPS];
} td_count;

static td_count td_counted;
static td_backend td_counting;
static const td_backend *td_counted_backend;

static inline void td_count_product(const td_tensor *w, double slabs, double rows)
{
    td_counted.bytes +=
        (double)td_counted_backend->weight_bytes(w) / (double)w->slabs * (double)slabs;
    td_counted.operations += 2.0 * rows * (double)w->n * (double)w->k;
}

/* One thread: its CPU time, which strangers on its core do not lengthen. */
static int td_count_by_cpu;

static inline uint64_t td_count_now(void)
{
    struct timespec t;
    clock_gettime(td_count_by_cpu ? CLOCK_PROCESS_CPUTIME_ID : CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Pass an op on and add its time. */
#define TD_COUNT_TIMED(op, call)                                                                   \
    do {                                                                                           \
        uint64_t start_ = td_count_now();                                                          \
        td_counted_backend->call;                                                                  \
        td_counted.us[op] += (double)(td_count_now() - start_) / 1e3;                              \
    } while (0)

static inline void td_count_gemm(td_queue *q, const td_step *s, const td_gemm *g)
{
    uint32_t n = g->epilogue == TD_EPI_SILU_MUL ? 2 : g->n_out;
    for (uint32_t i = 0; i < n; i++)
        td_count_product(g->w[i], g->n_heads, (double)s->n_rows * g->n_heads);
    TD_COUNT_TIMED(TD_COUNT_PRODUCTS, gemm(q, s, g));
}

static inline void td_count_logits(td_queue *q, const td_step *s, const float *h,
                                   const td_tensor *head, float *logits)
{
    td_count_product(head, 1, s->n_logits);
    TD_COUNT_TIMED(TD_COUNT_HEAD, logits(q, s, h, head, logits));
}

static inline void td_count_moe(td_queue *q, const td_step *s, const td_moe *a)
{
    uint8_t seen[1024] = {0};
    double used = 0;
    for (size_t i = 0; i < (size_t)s->n_rows * a->top_k; i++) {
        uint32_t e = a->experts[i] % sizeof seen;
        used += !seen[e];
        seen[e] = 1;
    }
    const td_tensor *own[] = {a->gate, a->up, a->down},
                    *shared[] = {a->shared_gate, a->shared_up, a->shared_down};
    for (int i = 0; i < 3; i++) {
        td_count_product(own[i], used, (double)s->n_rows * a->top_k);
        if (shared[i])
            td_count_product(shared[i], 1, s->n_rows);
    }
    TD_COUNT_TIMED(TD_COUNT_EXPERTS, moe(q, s, a));
}

/* Ops of a step and one argument, which are only timed. */
#define TD_COUNT_OP(name, type, op)                                                                \
    static inline void td_count_##name(td_queue *q, const td_step *s, const type *a)               \
    {                                                                                              \
        TD_COUNT_TIMED(op, name(q, s, a));                                                         \
    }
TD_COUNT_OP(mla_write, td_mla_write, TD_COUNT_SMALL)
TD_COUNT_OP(gqa_write, td_gqa_write, TD_COUNT_SMALL)
TD_COUNT_OP(index_write, td_index_write, TD_COUNT_SMALL)
TD_COUNT_OP(route, td_route, TD_COUNT_SMALL)
TD_COUNT_OP(index_select, td_index_select, TD_COUNT_INDEX)
TD_COUNT_OP(attend_mla, td_attend_mla, TD_COUNT_ATTENTION)
TD_COUNT_OP(attend_gqa, td_attend_gqa, TD_COUNT_ATTENTION)

static inline void td_count_embed(td_queue *q, const td_step *s, const td_tensor *table, float *x)
{
    TD_COUNT_TIMED(TD_COUNT_SMALL, embed(q, s, table, x));
}

static inline void td_count_add_norm(td_queue *q, const td_step *s, float *x, const float *delta,
                                     const td_tensor *w, float eps, uint32_t width, float *out,
                                     float *out_f32)
{
    TD_COUNT_TIMED(TD_COUNT_SMALL, add_norm(q, s, x, delta, w, eps, width, out, out_f32));
}

static inline void td_count_reduce_slices(td_queue *q, const td_step *s, const float *partial,
                                          uint32_t slices, uint32_t n, float *out)
{
    TD_COUNT_TIMED(TD_COUNT_SMALL, reduce_slices(q, s, partial, slices, n, out));
}

static inline void td_count_sample(td_queue *q, struct td_sample_row *rows, uint32_t n)
{
    TD_COUNT_TIMED(TD_COUNT_SAMPLING, sample(q, rows, n));
}

/* The backend to open a model with. */
static inline const td_backend *td_count_on(const td_backend *real)
{
    td_counted_backend = real;
    td_counting = *real;
    td_counting.gemm = td_count_gemm;
    td_counting.logits = td_count_logits;
    td_counting.moe = td_count_moe;
    td_counting.mla_write = td_count_mla_write;
    td_counting.gqa_write = td_count_gqa_write;
    td_counting.index_write = td_count_index_write;
    td_counting.route = td_count_route;
    td_counting.index_select = td_count_index_select;
    td_counting.attend_mla = td_count_attend_mla;
    td_counting.attend_gqa = td_count_attend_gqa;
    td_counting.embed = td_count_embed;
    td_counting.add_norm = td_count_add_norm;
    td_counting.reduce_slices = td_count_reduce_slices;
    td_counting.sample = td_count_sample;
    return &td_counting;
}

#endif
