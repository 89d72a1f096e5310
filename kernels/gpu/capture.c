/* SPDX-License-Identifier: Apache-2.0 */
/* Steps as graphs: launches are recorded at the grids of the largest step of a class; kernels read
 * dev_step, so that a replay needs one upload of it and one call. */
#include <errno.h>
#include <stdlib.h>

#include "kernels/gpu/inside.h"

#include "base/banned.h"

typedef struct graph {
    void *of_driver;
    uint64_t moves; /* of the queue's scratches when it was recorded */
} graph;

static int begin(td_queue *q, int dry)
{
    td_gpu *g = td_gpu_device();
    int r = dry ? 0 : g->ops->graph_begin(g, q->stream);
    if (r >= 0)
        q->mode = dry ? TD_GPU_DRY : TD_GPU_RECORD;
    return r;
}

static void drop(td_queue *q, void *p)
{
    td_gpu *g = td_gpu_device();
    graph *k = p;
    if (k && k->of_driver) {
        g->ops->stream_wait(g, q->stream); /* it may be running */
        g->ops->graph_free(g, k->of_driver);
    }
    free(k);
}

static int end(td_queue *q, void **ret_graph)
{
    td_gpu *g = td_gpu_device();
    int r = q->error, recorded = q->mode == TD_GPU_RECORD;
    q->error = 0;
    q->mode = TD_GPU_RUN;
    *ret_graph = NULL;
    if (!recorded)
        return r;
    void *of_driver = NULL;
    int e = g->ops->graph_end(g, q->stream, &of_driver);
    graph *k = malloc(sizeof *k);
    if (k)
        *k = (graph){of_driver, q->moves};
    else if (of_driver)
        g->ops->graph_free(g, of_driver);
    r = r < 0 ? r : e < 0 ? e : k ? 0 : -ENOMEM;
    if (r < 0)
        drop(q, k);
    else
        *ret_graph = k;
    return r;
}

static int replay(td_queue *q, const td_step *s, void *p)
{
    td_gpu *g = td_gpu_device();
    const graph *k = p;
    if (k->moves != q->moves)
        return -ESTALE;
    td_gpu_step(q, s);
    return q->error ? 0 : g->ops->graph_launch(g, q->stream, k->of_driver);
}

const td_capture_ops td_gpu_capture = {.begin = begin, .end = end, .replay = replay, .free = drop};
