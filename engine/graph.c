/* SPDX-License-Identifier: Apache-2.0 */
/* Decode steps as recorded graphs: one for each class of rows and contexts, made when the class is
 * first met. Bits do not depend on it: kernels compute a row by itself, whatever the grid. */
#include <errno.h>

#include "engine/internal.h"

#include "base/banned.h"

/* The smallest power of two, times least, that holds n. */
static uint32_t class_of(uint32_t n, uint32_t least)
{
    uint32_t c = 0;
    for (uint64_t size = least; size < n; size *= 2)
        c++;
    return c;
}

static uint32_t at_most(uint64_t n, uint32_t limit)
{
    return n < limit ? (uint32_t)n : limit;
}

static void ops(td_engine *e)
{
    td_forward(e);
    e->be->logits(e->queue, &e->step, e->buf.h, e->model->head, e->buf.logits);
}

/* The ops of the largest step of a class. */
static int record(td_engine *e, uint32_t rows, uint32_t contexts, void **ret_graph)
{
    const td_capture_ops *c = e->be->capture;
    td_step real = e->step;
    uint32_t n = at_most(1ull << rows, e->limits.max_seqs);
    e->step.n_rows = e->step.n_seqs = e->step.n_logits = n;
    e->step.max_context = at_most((uint64_t)TD_GRAPH_CONTEXT_LEAST << contexts,
                                  e->step.table_stride * TD_GRAPH_CONTEXT_LEAST);
    int r = 0;
    for (int dry = 1; dry >= 0 && r >= 0; dry--) {
        r = c->begin(e->queue, dry);
        if (r < 0)
            break;
        ops(e);
        r = c->end(e->queue, ret_graph);
    }
    e->step = real;
    return r;
}

int td_graph_step(td_engine *e, uint32_t n)
{
    const td_capture_ops *c = e->be->capture;
    uint32_t rows = class_of(n, 1),
             contexts = class_of(e->step.max_context, TD_GRAPH_CONTEXT_LEAST);
    if (!c || e->probe || rows >= TD_GRAPH_ROWS || contexts >= TD_GRAPH_CONTEXTS)
        return 0;
    void **graph = &e->graphs[rows][contexts];
    for (int tries = 0; tries < 2; tries++) {
        int r = *graph ? 0 : record(e, rows, contexts, graph);
        r = r < 0 ? r : c->replay(e->queue, &e->step, *graph);
        if (r != -ESTALE)
            return r < 0 ? r : 1;
        c->free(e->queue, *graph);
        *graph = NULL;
    }
    return -EIO; /* recorded just now */
}

void td_graphs_free(td_engine *e)
{
    for (uint32_t i = 0; i < TD_GRAPH_ROWS * TD_GRAPH_CONTEXTS; i++)
        if (e->graphs[i / TD_GRAPH_CONTEXTS][i % TD_GRAPH_CONTEXTS])
            e->be->capture->free(e->queue, e->graphs[i / TD_GRAPH_CONTEXTS][i % TD_GRAPH_CONTEXTS]);
}
