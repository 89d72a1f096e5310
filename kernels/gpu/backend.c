/* SPDX-License-Identifier: Apache-2.0 */
/* Life of the GPU backend: device, queue, memory, the table. */
#include "kernels/gpu/backend.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bug.h"
#include "kernels/gpu/inside.h"

#include "base/banned.h"

enum { ALLOCATIONS_MAX = 256 };

typedef struct range {
    const char *p;
    size_t bytes;
} range;

/* The process's device. Opened and closed by one thread; the loader's threads and the lane use it
 * one after the other, under the lock where they meet (weights.c). */
static struct device {
    td_gpu *gpu;
    void *kernels[N_KERNELS];
    range owned[ALLOCATIONS_MAX]; /* device memory that copy() must tell from the host's */
    td_gpu_plan plan;
    td_tune_chooser *chooser; /* NULL, or borrowed */
    int load_error;           /* of a weight's upload, negative errno */
    char load_text[300];
    td_backend table;
} device;

static _Thread_local const td_gpu *driven; /* by this thread */

td_gpu *td_gpu_device(void)
{
    TD_BUG_ON(!device.gpu);
    if (driven != device.gpu && device.gpu->ops->use(device.gpu) == 0)
        driven = device.gpu;
    return device.gpu;
}

td_gpu_plan td_gpu_plan_for(td_tune_key *k)
{
    if (device.plan != TD_GPU_PLAN_AUTO || !device.chooser)
        return device.plan;
    k->cus = device.gpu->n_cus;
    return td_tune_choose(device.chooser, k);
}

uint32_t td_gpu_backend_cus(void)
{
    return td_gpu_device()->n_cus;
}

void td_gpu_backend_tuned(td_tune_chooser *chooser)
{
    device.chooser = chooser;
}

void td_gpu_backend_plan(td_gpu_plan plan)
{
    device.plan = plan;
}

const char *td_gpu_backend_error(void)
{
    return device.gpu ? device.gpu->error : "";
}

void td_gpu_fail(td_queue *q, int code)
{
    if (q->error == 0)
        q->error = code;
}

void td_gpu_load_failed(int code)
{
    if (device.load_error)
        return;
    device.load_error = code;
    snprintf(device.load_text, sizeof device.load_text, "%s", device.gpu->error);
}

int td_gpu_pool_type(td_queue *q, td_dtype t, int fp8_too)
{
    if (t == TD_F32 || t == TD_BF16 || (fp8_too && t == TD_F8E4M3))
        return 1;
    td_gpu_fail(q, -ENOTSUP);
    return 0;
}

const td_step *td_gpu_step(td_queue *q, const td_step *s)
{
    if (q->mode == TD_GPU_RUN && memcmp(&q->step, s, sizeof *s) != 0) {
        memcpy(&q->step, s, sizeof *s);
        int r = td_gpu_send(q, q->dev_step, &q->step, sizeof q->step);
        if (r < 0)
            td_gpu_fail(q, r);
    }
    return q->dev_step;
}

void td_gpu_launch(td_queue *q, kernel_id k, uint64_t blocks, size_t lds_bytes, const void *args,
                   size_t args_bytes)
{
    td_gpu *g = td_gpu_device();
    if (q->error || blocks == 0 || q->mode == TD_GPU_DRY)
        return;
    if (blocks > INT32_MAX || lds_bytes > g->lds_bytes) {
        td_gpu_fail(q, -E2BIG);
        return;
    }
    td_gpu_dim dim = {(uint32_t)blocks, 4 * g->wave, (uint32_t)lds_bytes};
    int r = g->ops->launch(g, q->stream, device.kernels[k], dim, args, args_bytes);
    if (r < 0)
        td_gpu_fail(q, r);
}

void *td_gpu_scratch(td_queue *q, scratch *s, size_t bytes)
{
    td_gpu *g = td_gpu_device();
    if (bytes <= s->bytes)
        return s->p;
    if (q->mode == TD_GPU_RECORD) { /* the dry pass has asked for less */
        td_gpu_fail(q, -EFAULT);
        return NULL;
    }
    q->moves += s != &q->draws;        /* which no recorded op uses */
    g->ops->stream_wait(g, q->stream); /* what is queued may still read the old one */
    g->ops->mem_free(g, s->p);
    s->p = g->ops->mem_alloc(g, bytes);
    s->bytes = s->p ? bytes : 0;
    if (!s->p)
        td_gpu_fail(q, -ENOMEM);
    return s->p;
}

static void *gpu_mem_alloc(td_queue *q, size_t bytes)
{
    td_gpu *g = td_gpu_device();
    for (size_t i = 0; i < ALLOCATIONS_MAX; i++) {
        range *at = &device.owned[i];
        if (at->p)
            continue;
        void *p = g->ops->mem_alloc(g, bytes);
        if (p && g->ops->fill(g, q->stream, p, 0, bytes) == 0) {
            *at = (range){p, bytes};
            return p;
        }
        g->ops->mem_free(g, p);
        return NULL;
    }
    return NULL;
}

static void gpu_mem_free(td_queue *q, void *p)
{
    td_gpu *g = td_gpu_device();
    for (size_t i = 0; p && i < ALLOCATIONS_MAX; i++)
        if (device.owned[i].p == p) {
            g->ops->stream_wait(g, q->stream);
            g->ops->mem_free(g, p);
            device.owned[i] = (range){0};
        }
}

static int on_device(const void *p)
{
    for (size_t i = 0; i < ALLOCATIONS_MAX; i++) {
        const range *r = &device.owned[i];
        if (r->p && (const char *)p >= r->p && (const char *)p < r->p + r->bytes)
            return 1;
    }
    return 0;
}

/* What leaves the device is there when this returns. */
static void gpu_copy(td_queue *q, void *dst, const void *src, size_t bytes)
{
    td_gpu *g = td_gpu_device();
    int r = 0, to = on_device(dst), from = on_device(src);
    if (bytes == 0)
        return;
    if (to)
        r = from ? g->ops->copy(g, q->stream, dst, src, bytes) : td_gpu_send(q, dst, src, bytes);
    else if (from)
        r = g->ops->download(g, q->stream, dst, src, bytes);
    if (!to && r >= 0)
        r = g->ops->stream_wait(g, q->stream);
    if (!to && !from && r >= 0)
        memcpy(dst, src, bytes);
    if (r < 0)
        td_gpu_fail(q, r);
}

static void gpu_close(td_queue *q)
{
    if (!q)
        return;
    td_gpu *g = td_gpu_device();
    td_gpu_transfer_close(q);
    if (q->stream)
        g->ops->stream_wait(g, q->stream);
    td_gpu_behind_close(q);
    scratch *all[] = {&q->attend, &q->scores, &q->lists, &q->experts, &q->draws};
    for (size_t i = 0; i < TD_ARRAY_LEN(all); i++)
        g->ops->mem_free(g, all[i]->p);
    g->ops->mem_free(g, q->dev_step);
    g->ops->mem_free(g, q->dev_error);
    g->ops->stream_free(g, q->stream);
    free(q);
}

static int gpu_open(const td_backend_options *options, td_queue **ret_queue, td_err *reterr_err)
{
    td_gpu *g = td_gpu_device();
    if (device.load_error)
        return td_err_set(reterr_err, device.load_error, "weights did not reach the device: %s",
                          device.load_text);
    td_queue *q = calloc(1, sizeof *q);
    if (!q)
        return td_err_set(reterr_err, -ENOMEM, "out of memory for the kernel queue");
    q->o = *options;
    int r = g->ops->stream_new(g, &q->stream);
    if (r >= 0) {
        q->dev_step = g->ops->mem_alloc(g, sizeof *q->dev_step);
        q->dev_error = g->ops->mem_alloc(g, sizeof *q->dev_error);
        r = q->dev_step && q->dev_error
                ? g->ops->fill(g, q->stream, q->dev_error, 0, sizeof *q->dev_error)
                : -ENOMEM;
    }
    r = r < 0 ? r : td_gpu_behind_open(q);
    r = r < 0 ? r : td_gpu_transfer_open(q);
    if (r < 0) {
        gpu_close(q);
        return td_err_set(reterr_err, r, "%s", g->error);
    }
    memset(&q->step, 0xff, sizeof q->step); /* no step is like this */
    *ret_queue = q;
    return 0;
}

static int gpu_finish(td_queue *q)
{
    td_gpu *g = td_gpu_device();
    int found = 0, r = q->error;
    q->error = 0;
    int d = g->ops->download(g, q->stream, &found, q->dev_error, sizeof found);
    d = d < 0 ? d : g->ops->stream_wait(g, q->stream);
    if (d >= 0 && found) {
        d = g->ops->fill(g, q->stream, q->dev_error, 0, sizeof found);
        d = d < 0 ? d : -EIO;
    }
    return r < 0 ? r : d;
}

static const td_backend ops = {
    .open = gpu_open,
    .close = gpu_close,
    .finish = gpu_finish,
    .mem_alloc = gpu_mem_alloc,
    .mem_free = gpu_mem_free,
    .copy = gpu_copy,
    .weight_new = td_gpu_weight_new,
    .weight_fill = td_gpu_weight_fill,
    .vector_new = td_gpu_vector_new,
    .weight_free = td_gpu_weight_free,
    .weight_bytes = td_gpu_weight_bytes,
    .embed = td_gpu_embed,
    .add_norm = td_gpu_add_norm,
    .gemm = td_gpu_gemm,
    .mla_write = td_gpu_mla_write,
    .index_write = td_gpu_index_write,
    .index_select = td_gpu_index_select,
    .attend_mla = td_gpu_attend_mla,
    .gqa_write = td_gpu_gqa_write,
    .attend_gqa = td_gpu_attend_gqa,
    .route = td_gpu_route,
    .moe = td_gpu_moe,
    .reduce_slices = td_gpu_reduce_slices,
    .logits = td_gpu_logits,
    .sample = td_gpu_sample,
    .transfer = &td_gpu_transfer,
    .capture = &td_gpu_capture,
    .behind = &td_gpu_behind,
};

int td_gpu_backend_open(td_gpu *g, const char *name, const td_backend **ret_backend,
                        td_err *reterr_err)
{
    static const char *const names[N_KERNELS] = {
#define TD_KERNEL(name) #name,
#include "kernels/hip/list.def"
#undef TD_KERNEL
    };
    static const uint8_t scaled[N_KERNELS] = {
#define TD_KERNEL(name)        0,
#define TD_KERNEL_SCALED(name) 1,
#include "kernels/hip/list.def"
#undef TD_KERNEL
    };
    if (device.gpu)
        return td_err_set(reterr_err, -EBUSY, "%s: a device is open already", name);
    struct device d = {.gpu = g, .table = ops};
    d.table.act_fp8 = 1;
    for (size_t i = 0; i < N_KERNELS; i++)
        if (g->ops->kernel(g, names[i], &d.kernels[i]) < 0) {
            if (!scaled[i])
                return td_err_set(reterr_err, -ENOENT, "%s", g->error);
            d.table.act_fp8 = 0;
            g->error[0] = 0;
        }
    d.table.name = name;
    d.table.isa = g->arch;
    device = d;
    driven = NULL;
    *ret_backend = &device.table;
    return 0;
}

void td_gpu_backend_close(void)
{
    device = (struct device){0};
    driven = NULL;
}
