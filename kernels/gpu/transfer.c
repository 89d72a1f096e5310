/* SPDX-License-Identifier: Apache-2.0 */
/* Copies between the KV pool and page-locked memory, on a stream beside the ops. The end of a group
 * is told by a call of the host that the driver makes in the order of the stream, so that threads
 * which may not drive the device see it too. */
#include <errno.h>

#include "kernels/gpu/inside.h"

#include "base/banned.h"

int td_gpu_transfer_open(td_queue *q)
{
    td_gpu *g = td_gpu_device();
    int r = g->ops->stream_new(g, &q->copy_stream);
    return r < 0 ? r : g->ops->event_new(g, &q->ops_end);
}

void td_gpu_transfer_close(td_queue *q)
{
    td_gpu *g = td_gpu_device();
    if (q->copy_stream)
        g->ops->stream_wait(g, q->copy_stream);
    if (q->ops_end)
        g->ops->event_free(g, q->ops_end);
    if (q->copy_stream)
        g->ops->stream_free(g, q->copy_stream);
}

static void *host_alloc(td_queue *q, size_t bytes)
{
    td_gpu *g = td_gpu_device();
    return g->ops->host_alloc(g, bytes);
}

static void host_free(td_queue *q, void *p)
{
    td_gpu *g = td_gpu_device();
    g->ops->host_free(g, p);
}

static void fill(td_queue *q, void *dst, uint8_t value, size_t bytes)
{
    td_gpu *g = td_gpu_device();
    int r = g->ops->fill(g, q->stream, dst, value, bytes);
    if (r < 0)
        td_gpu_fail(q, r);
}

/* Rows that leave are whole, and rows that come in are no longer in use, when the ops queued so far
 * are done. */
static int begin(td_queue *q, td_gpu *g)
{
    if (q->in_group)
        return 0;
    int r = g->ops->event_record(g, q->ops_end, q->stream);
    r = r < 0 ? r : g->ops->event_after(g, q->copy_stream, q->ops_end);
    q->in_group = r >= 0;
    return r;
}

static int out(td_queue *q, void *host, const void *src, size_t bytes)
{
    td_gpu *g = td_gpu_device();
    int r = begin(q, g);
    return r < 0 ? r : g->ops->download(g, q->copy_stream, host, src, bytes);
}

static int in(td_queue *q, void *dst, const void *host, size_t bytes)
{
    td_gpu *g = td_gpu_device();
    int r = begin(q, g);
    return r < 0 ? r : g->ops->upload(g, q->copy_stream, dst, host, bytes);
}

/* The driver's thread. Marks pass in their order, one call each. */
static void passed(void *arg)
{
    td_queue *q = arg;
    atomic_fetch_add_explicit(&q->marks_done, 1, memory_order_release);
}

static uint64_t mark(td_queue *q)
{
    td_gpu *g = td_gpu_device();
    q->in_group = 0;
    return g->ops->host_call(g, q->copy_stream, passed, q) < 0 ? 0 : ++q->marks;
}

static int copied(const td_queue *q, uint64_t m)
{
    return atomic_load_explicit(&q->marks_done, memory_order_acquire) >= m;
}

static int wait(td_queue *q)
{
    td_gpu *g = td_gpu_device();
    return g->ops->stream_wait(g, q->copy_stream);
}

const td_transfer_ops td_gpu_transfer = {.host_alloc = host_alloc,
                                         .host_free = host_free,
                                         .fill = fill,
                                         .out = out,
                                         .in = in,
                                         .mark = mark,
                                         .copied = copied,
                                         .wait = wait};
