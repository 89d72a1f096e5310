/* SPDX-License-Identifier: Apache-2.0 */
/* A backend that counts what its matrix products must read and multiply, and passes everything on.
 * Attention, norms and the pool are not counted. One thread. */
#ifndef TD_BENCH_COUNT_H
#define TD_BENCH_COUNT_H

#include <stdint.h>
#include <string.h>

#include "kernels/kernels.h"
#include "kernels/ref/ref.h"

typedef struct td_count {
    double bytes, operations;
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

static inline void td_count_gemm(td_queue *q, const td_step *s, const td_gemm *g)
{
    uint32_t n = g->epilogue == TD_EPI_SILU_MUL ? 2 : g->n_out;
    for (uint32_t i = 0; i < n; i++)
        td_count_product(g->w[i], g->n_heads, (double)s->n_rows * g->n_heads);
    td_counted_backend->gemm(q, s, g);
}

static inline void td_count_logits(td_queue *q, const td_step *s, const float *h,
                                   const td_tensor *head, float *logits)
{
    td_count_product(head, 1, s->n_logits);
    td_counted_backend->logits(q, s, h, head, logits);
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
    td_counted_backend->moe(q, s, a);
}

/* The backend to open a model with. */
static inline const td_backend *td_count_on(const td_backend *real)
{
    td_counted_backend = real;
    td_counting = *real;
    td_counting.gemm = td_count_gemm;
    td_counting.logits = td_count_logits;
    td_counting.moe = td_count_moe;
    return &td_counting;
}

#endif
