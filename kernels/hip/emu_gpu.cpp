/* SPDX-License-Identifier: Apache-2.0 */
#include "kernels/hip/emu_gpu.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/hip/emu.hpp"

struct td_emu_kernel {
    const char *name;
    td_emu::kernel_fn fn;
};
extern "C" const td_emu_kernel td_emu_kernels_64[], td_emu_kernels_32[];

/* Under AddressSanitizer device memory of a guarded emulation is poisoned while the host runs. */
#if defined(__SANITIZE_ADDRESS__)
#define EMU_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMU_ASAN 1
#endif
#endif
#ifdef EMU_ASAN
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(p, n)   ((void)(p), (void)(n))
#define ASAN_UNPOISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#endif

namespace
{

/* What a captured stream holds. kernel NULL: a copy, or a fill when src is NULL. */
struct node {
    node *next;
    const td_emu_kernel *kernel;
    td_gpu_dim dim;
    void *dst;
    const void *src;
    uint8_t value;
    size_t bytes;
    unsigned char args[512];
};

struct stream {
    node *first, *last;
    bool capturing;
};

struct allocation {
    allocation *next;
    void *p;
    size_t bytes;
};

struct emu_gpu {
    td_gpu gpu;
    const td_emu_kernel *kernels;
    uint32_t order;
    bool guarded;
    allocation *memory;
};

enum { LDS_BYTES = 64 << 10 };

emu_gpu *of(td_gpu *g)
{
    return reinterpret_cast<emu_gpu *>(g);
}

int fail(td_gpu *g, int code, const char *what, const char *detail)
{
    snprintf(g->error, sizeof g->error, "emu: %s: %s", what, detail);
    return code;
}

/* Let the device (or, after it, nobody) at its memory. */
void open_memory(td_gpu *g, bool open)
{
    for (allocation *a = of(g)->guarded ? of(g)->memory : nullptr; a; a = a->next) {
        if (open)
            ASAN_UNPOISON_MEMORY_REGION(a->p, a->bytes);
        else
            ASAN_POISON_MEMORY_REGION(a->p, a->bytes);
    }
}

void run_node(td_gpu *g, const node *n)
{
    open_memory(g, true);
    if (n->kernel)
        td_emu::run(n->kernel->fn, n->args,
                    {n->dim.grid, n->dim.block, n->dim.lds_bytes, g->wave, of(g)->order});
    else if (n->src)
        memcpy(n->dst, n->src, n->bytes);
    else
        memset(n->dst, n->value, n->bytes);
    open_memory(g, false);
}

int add(td_gpu *g, void *s, const node *n)
{
    stream *st = static_cast<stream *>(s);
    if (!st->capturing) {
        run_node(g, n);
        return 0;
    }
    node *own = static_cast<node *>(malloc(sizeof *own));
    if (!own)
        return fail(g, -ENOMEM, "capture", "out of memory");
    *own = *n;
    own->next = nullptr;
    *(st->first ? &st->last->next : &st->first) = own;
    st->last = own;
    return 0;
}

void close_gpu(td_gpu *g)
{
    free(g);
}

int use(td_gpu *)
{
    return 0;
}

void *host_alloc(td_gpu *g, size_t bytes)
{
    size_t n = (bytes + 64) / 64 * 64;
    void *p = aligned_alloc(64, n);
    if (p)
        memset(p, 0xa5, n); /* never zero, so that nothing relies on it */
    else
        fail(g, -ENOMEM, "memory", "out of memory");
    return p;
}

void host_free(td_gpu *, void *p)
{
    free(p);
}

void *mem_alloc(td_gpu *g, size_t bytes)
{
    allocation *a = static_cast<allocation *>(malloc(sizeof *a));
    void *p = a ? host_alloc(g, bytes) : nullptr;
    if (!p) {
        free(a);
        return nullptr;
    }
    *a = {of(g)->memory, p, bytes};
    of(g)->memory = a;
    open_memory(g, false);
    return p;
}

void mem_free(td_gpu *g, void *p)
{
    for (allocation **at = &of(g)->memory; *at; at = &(*at)->next) {
        allocation *a = *at;
        if (a->p != p)
            continue;
        *at = a->next;
        ASAN_UNPOISON_MEMORY_REGION(p, a->bytes);
        free(p);
        free(a);
        return;
    }
    if (p)
        abort(); /* not from here, or freed before */
}

int mem_info(td_gpu *, size_t *ret_free, size_t *ret_total)
{
    *ret_free = *ret_total = (size_t)1 << 40;
    return 0;
}

int transfer(td_gpu *g, void *s, void *dst, const void *src, size_t bytes)
{
    node n = {};
    n.dst = dst;
    n.src = src;
    n.bytes = bytes;
    return bytes ? add(g, s, &n) : 0;
}

int fill(td_gpu *g, void *s, void *dst, uint8_t value, size_t bytes)
{
    node n = {};
    n.dst = dst;
    n.value = value;
    n.bytes = bytes;
    return add(g, s, &n);
}

int stream_new(td_gpu *g, void **ret_stream)
{
    *ret_stream = calloc(1, sizeof(stream));
    return *ret_stream ? 0 : fail(g, -ENOMEM, "a new stream", "out of memory");
}

void stream_free(td_gpu *, void *s)
{
    free(s);
}

int stream_wait(td_gpu *, void *)
{
    return 0;
}

int event_new(td_gpu *g, void **ret_event)
{
    *ret_event = calloc(1, sizeof(int));
    return *ret_event ? 0 : fail(g, -ENOMEM, "a new event", "out of memory");
}

void event_free(td_gpu *, void *e)
{
    free(e);
}

int event_record(td_gpu *, void *e, void *)
{
    *static_cast<int *>(e) = 1;
    return 0;
}

int event_after(td_gpu *, void *, void *)
{
    return 0;
}

int event_done(td_gpu *, void *e)
{
    return *static_cast<int *>(e);
}

int event_ms(td_gpu *g, void *, void *, float *)
{
    return fail(g, -ENOTSUP, "time between events", "the emulation has no clock");
}

int kernel(td_gpu *g, const char *name, void **ret_kernel)
{
    for (const td_emu_kernel *k = of(g)->kernels; k->name; k++)
        if (strcmp(k->name, name) == 0) {
            *ret_kernel = const_cast<td_emu_kernel *>(k);
            return 0;
        }
    return fail(g, -ENOENT, "no kernel", name);
}

int launch(td_gpu *g, void *s, void *k, td_gpu_dim dim, const void *args, size_t args_bytes)
{
    node n = {};
    if (args_bytes > sizeof n.args || dim.lds_bytes > LDS_BYTES || dim.grid == 0)
        return fail(g, -EINVAL, "launching a kernel", static_cast<td_emu_kernel *>(k)->name);
    n.kernel = static_cast<td_emu_kernel *>(k);
    n.dim = dim;
    memcpy(n.args, args, args_bytes);
    return add(g, s, &n);
}

int graph_begin(td_gpu *, void *s)
{
    stream *st = static_cast<stream *>(s);
    st->capturing = true;
    st->first = st->last = nullptr;
    return 0;
}

int graph_end(td_gpu *, void *s, void **ret_graph)
{
    stream *st = static_cast<stream *>(s);
    st->capturing = false;
    *ret_graph = st->first;
    st->first = st->last = nullptr;
    return 0;
}

int graph_launch(td_gpu *g, void *, void *graph)
{
    for (const node *n = static_cast<node *>(graph); n; n = n->next)
        run_node(g, n);
    return 0;
}

void graph_free(td_gpu *, void *graph)
{
    for (node *n = static_cast<node *>(graph), *next; n; n = next) {
        next = n->next;
        free(n);
    }
}

td_gpu_ops make_ops()
{
    td_gpu_ops o = {};
    o.close = close_gpu;
    o.use = use;
    o.mem_alloc = mem_alloc;
    o.mem_free = mem_free;
    o.host_alloc = host_alloc;
    o.host_free = host_free;
    o.mem_info = mem_info;
    o.upload = o.download = o.copy = transfer;
    o.fill = fill;
    o.stream_new = stream_new;
    o.stream_free = stream_free;
    o.stream_wait = stream_wait;
    o.event_new = event_new;
    o.event_free = event_free;
    o.event_record = event_record;
    o.event_after = event_after;
    o.event_done = event_done;
    o.event_ms = event_ms;
    o.kernel = kernel;
    o.launch = launch;
    o.graph_begin = graph_begin;
    o.graph_end = graph_end;
    o.graph_launch = graph_launch;
    o.graph_free = graph_free;
    return o;
}

} // namespace

extern "C" td_gpu *td_emu_gpu_new(uint32_t wave, uint32_t order)
{
    static const td_gpu_ops ops = make_ops();
    emu_gpu *e = static_cast<emu_gpu *>(calloc(1, sizeof *e));
    if (!e)
        return nullptr;
    td_gpu *g = &e->gpu;
    g->ops = &ops;
    snprintf(g->name, sizeof g->name, "emulation");
    snprintf(g->driver, sizeof g->driver, "emulation");
    snprintf(g->arch, sizeof g->arch, "emu%u", wave);
    g->wave = wave;
    g->n_cus = 1;
    g->lds_bytes = LDS_BYTES;
    e->kernels = wave == 64 ? td_emu_kernels_64 : td_emu_kernels_32;
    e->order = order;
    return g;
}

extern "C" void td_emu_gpu_guard(td_gpu *g)
{
    of(g)->guarded = true;
}
