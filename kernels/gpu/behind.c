/* SPDX-License-Identifier: Apache-2.0 */
/* What lets the host be a step ahead of the device. Uploads leave from page-locked memory of the
 * queue's own, as drivers may wait for the stream before they read any other; it is used in two
 * halves, and the next one when what left it last has passed. The results of a step come back by an
 * event, so that the one behind it may run on. */
#include <errno.h>
#include <string.h>

#include "kernels/gpu/inside.h"

#include "base/banned.h"

enum { HALF = 2 << 20, ALIGN = 64 };

int td_gpu_behind_open(td_queue *q)
{
    td_gpu *g = td_gpu_device();
    q->room = g->ops->host_alloc(g, 2 * (size_t)HALF);
    int r = q->room ? 0 : -ENOMEM;
    for (int i = 0; i < 2; i++)
        r = r < 0 ? r : g->ops->event_new(g, &q->room_passed[i]);
    for (int i = 0; i < TD_BEHIND_MAX; i++) {
        sealed *s = &q->sealed[i];
        r = r < 0 ? r : g->ops->event_new(g, &s->passed);
        s->host = g->ops->host_alloc(g, (1 + (size_t)q->o.max_rows) * sizeof *s->host);
        r = r < 0 || s->host ? r : -ENOMEM;
    }
    return r;
}

void td_gpu_behind_close(td_queue *q)
{
    td_gpu *g = td_gpu_device();
    for (int i = 0; i < 2; i++)
        g->ops->event_free(g, q->room_passed[i]);
    for (int i = 0; i < TD_BEHIND_MAX; i++) {
        g->ops->event_free(g, q->sealed[i].passed);
        if (q->sealed[i].host)
            g->ops->host_free(g, q->sealed[i].host);
    }
    if (q->room)
        g->ops->host_free(g, q->room);
}

/* Go to the other half. */
static int turn(td_queue *q, td_gpu *g)
{
    int r = g->ops->event_record(g, q->room_passed[q->room_half], q->stream);
    if (r < 0)
        return r;
    q->room_used[q->room_half] = 1;
    q->room_half = !q->room_half;
    q->room_at = 0;
    return q->room_used[q->room_half] ? g->ops->event_wait(g, q->room_passed[q->room_half]) : 0;
}

/* n <= HALF bytes. */
static int send(td_queue *q, td_gpu *g, char *dst, const char *src, size_t n)
{
    int r = q->room_at + n > HALF ? turn(q, g) : 0;
    if (r < 0)
        return r;
    char *at = q->room + q->room_half * (size_t)HALF + q->room_at;
    memcpy(at, src, n);
    q->room_at += (n + ALIGN - 1) / ALIGN * ALIGN;
    return g->ops->upload(g, q->stream, dst, at, n);
}

int td_gpu_send(td_queue *q, void *dst, const void *src, size_t bytes)
{
    td_gpu *g = td_gpu_device();
    int r = 0;
    for (size_t at = 0; r >= 0 && at < bytes; at += HALF) {
        size_t n = bytes - at < HALF ? bytes - at : HALF;
        r = send(q, g, (char *)dst + at, (const char *)src + at, n);
    }
    return r;
}

static void draw(td_queue *q, struct td_sample_row *rows, uint32_t n, uint32_t *ids)
{
    (void)td_gpu_draw(q, rows, n, ids);
}

static void bring(td_queue *q, void *host, const void *src, size_t bytes)
{
    td_gpu *g = td_gpu_device();
    int r = g->ops->download(g, q->stream, host, src, bytes);
    if (r < 0)
        td_gpu_fail(q, r);
}

/* The error is taken and reset between this step and the next. */
static int seal(td_queue *q, const uint32_t *ids, uint32_t n)
{
    td_gpu *g = td_gpu_device();
    sealed *s = &q->sealed[(q->first_sealed + q->n_sealed) % TD_BEHIND_MAX];
    if (q->n_sealed == TD_BEHIND_MAX || n > q->o.max_rows)
        return -EINVAL;
    int r = g->ops->download(g, q->stream, s->host, q->dev_error, sizeof *q->dev_error);
    r = r < 0 ? r : g->ops->fill(g, q->stream, q->dev_error, 0, sizeof *q->dev_error);
    r = r < 0 ? r : g->ops->download(g, q->stream, s->host + 1, ids, n * sizeof *ids);
    r = r < 0 ? r : g->ops->event_record(g, s->passed, q->stream);
    if (r < 0)
        return r;
    s->error = q->error;
    q->error = 0;
    s->n = n;
    q->n_sealed++;
    return 0;
}

static int wait(td_queue *q, uint32_t *ret_ids)
{
    td_gpu *g = td_gpu_device();
    sealed *s = &q->sealed[q->first_sealed];
    if (q->n_sealed == 0)
        return -EINVAL;
    int r = g->ops->event_wait(g, s->passed);
    q->first_sealed = (q->first_sealed + 1) % TD_BEHIND_MAX;
    q->n_sealed--;
    r = s->error < 0 ? s->error : r < 0 ? r : s->host[0] ? -EIO : 0;
    if (r >= 0 && ret_ids)
        memcpy(ret_ids, s->host + 1, s->n * sizeof *ret_ids);
    return r;
}

const td_behind_ops td_gpu_behind = {.draw = draw, .bring = bring, .seal = seal, .wait = wait};
