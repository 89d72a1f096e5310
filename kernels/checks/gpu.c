/* SPDX-License-Identifier: Apache-2.0 */
#include "kernels/checks/gpu.h"

#include <errno.h>
#include <stdlib.h>

#include "base/bug.h"

#include "base/banned.h"

/* More than any check has at a time. */
#define SHARED_BYTES ((size_t)96 << 20)

struct td_check_gpu {
    td_gpu *gpu;
    const td_gpu_ops *inner;
    td_gpu_ops waiting; /* as inner, but launch waits */
    uint8_t *shared;
    size_t used; /* a stack: checks free in the order opposite to their taking */
    td_check_target target;
};

/* The one whose launches wait: a td_gpu has no room for a pointer to it. */
static td_check_gpu *current;

static int waiting_launch(td_gpu *g, void *stream, void *kernel, td_gpu_dim dim, const void *args,
                          size_t args_bytes)
{
    int r = current->inner->launch(g, stream, kernel, dim, args, args_bytes);
    return r < 0 ? r : current->inner->stream_wait(g, stream);
}

static void *take(void *arg, size_t bytes)
{
    td_check_gpu *c = arg;
    size_t room = (bytes + 63) / 64 * 64;
    if (room > SHARED_BYTES - c->used)
        return NULL;
    void *p = c->shared + c->used;
    c->used += room;
    return p;
}

static void give(void *arg, void *p)
{
    td_check_gpu *c = arg;
    c->used = (size_t)((uint8_t *)p - c->shared);
}

int td_check_gpu_open(td_gpu *g, const td_backend *backend, td_check_gpu **ret_gpu,
                      td_err *reterr_err)
{
    TD_BUG_ON(current);
    td_check_gpu *c = calloc(1, sizeof *c);
    if (c)
        c->shared = g->ops->host_alloc(g, SHARED_BYTES);
    if (!c || !c->shared) {
        free(c);
        return td_err_set(reterr_err, -ENOMEM, "no page-locked memory for checks: %s", g->error);
    }
    c->gpu = g;
    c->inner = g->ops;
    c->waiting = *g->ops;
    c->waiting.launch = waiting_launch;
    c->target =
        (td_check_target){.backend = backend, .matrix = 1, .alloc = take, .free = give, .arg = c};
    g->ops = &c->waiting;
    current = c;
    *ret_gpu = c;
    return 0;
}

const td_check_target *td_check_gpu_target(const td_check_gpu *c)
{
    return &c->target;
}

void td_check_gpu_close(td_check_gpu *c)
{
    if (!c)
        return;
    c->gpu->ops = c->inner;
    c->inner->host_free(c->gpu, c->shared);
    current = NULL;
    free(c);
}
