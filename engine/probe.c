/* SPDX-License-Identifier: Apache-2.0 */
#include "engine/probe.h"

#include <stdlib.h>
#include <string.h>

#include "engine/internal.h"

#include "base/banned.h"

/* A step's buffer as the host may read and write it: itself, or a copy where the backend's memory
 * is a device's. NULL: no memory; the probe then sees nothing, and whoever set it counts. */
static void *borrow(td_engine *e, void *p, size_t bytes)
{
    if (!e->be->transfer)
        return p;
    void *copy = malloc(bytes);
    if (copy)
        e->be->copy(e->queue, copy, p, bytes);
    return copy;
}

static void give_back(td_engine *e, void *p, void *borrowed, size_t bytes, int changed)
{
    if (!e->be->transfer)
        return;
    if (borrowed && changed) {
        e->be->copy(e->queue, p, borrowed, bytes);
        e->be->finish(e->queue); /* the copy's source goes */
    }
    free(borrowed);
}

void td_probe_selection(td_engine *e, uint32_t layer)
{
    const td_config *c = &e->model->config;
    td_buffers *b = &e->buf;
    if (!e->probe || !e->probe->selected)
        return;
    size_t rows = e->step.n_rows, bytes = rows * c->index_topk * sizeof(uint32_t);
    e->be->finish(e->queue);
    uint32_t *selected = borrow(e, b->selected, bytes),
             *n = borrow(e, b->n_selected, rows * sizeof *n);
    float *margin = borrow(e, b->index_margin, rows * sizeof *margin);
    e->be->finish(e->queue);
    for (uint32_t t = 0; selected && n && margin && t < rows; t++)
        e->probe->selected(e->probe->arg, layer, e->positions[t],
                           selected + (size_t)t * c->index_topk, &n[t], c->index_topk, margin[t]);
    give_back(e, b->selected, selected, bytes, 1);
    give_back(e, b->n_selected, n, rows * sizeof *n, 1);
    give_back(e, b->index_margin, margin, 0, 0);
}

void td_probe_route(td_engine *e, uint32_t layer)
{
    const td_config *c = &e->model->config;
    td_buffers *b = &e->buf;
    if (!e->probe || !e->probe->routed)
        return;
    size_t rows = e->step.n_rows, chosen = rows * c->top_k * sizeof(uint32_t);
    e->be->finish(e->queue);
    float *scores = borrow(e, b->scores, rows * c->n_experts * sizeof *scores),
          *weights = borrow(e, b->route_weights, chosen),
          *margin = borrow(e, b->route_margin, rows * sizeof *margin);
    uint32_t *experts = borrow(e, b->experts, chosen);
    e->be->finish(e->queue);
    for (uint32_t t = 0; scores && weights && margin && experts && t < rows; t++)
        e->probe->routed(e->probe->arg, layer, e->positions[t], scores + (size_t)t * c->n_experts,
                         experts + (size_t)t * c->top_k, weights + (size_t)t * c->top_k, c->top_k,
                         margin[t]);
    give_back(e, b->scores, scores, 0, 0);
    give_back(e, b->route_weights, weights, chosen, 1);
    give_back(e, b->experts, experts, chosen, 1);
    give_back(e, b->route_margin, margin, 0, 0);
}
