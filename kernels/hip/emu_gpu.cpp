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

struct stream;

/* What a stream holds until it runs: a kernel, a call of the host, a wait for another stream, a
 * copy, or a fill when there is none of these. */
struct node {
    node *next;
    const td_emu_kernel *kernel;
    void (*call)(void *);
    void *call_arg;
    stream *after; /* wait until it ran after_n nodes */
    uint64_t after_n;
    td_gpu_dim dim;
    void *dst;
    const void *src;
    void *snapshot; /* own copy of src */
    uint8_t value;
    size_t bytes;
    unsigned char args[512];
};

struct stream {
    node *first, *last;
    bool capturing;
    uint64_t n_added, n_ran; /* of nodes that are not captured */
};

struct event {
    stream *of; /* NULL: not recorded */
    uint64_t n;
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
    bool guarded, deferred;
    uint64_t n_graphs;         /* launched */
    uint64_t n_ran;            /* kernels, copies, fills */
    allocation *memory, *host; /* host: page-locked */
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

void drain(td_gpu *g, stream *s, uint64_t n);

void run_node(td_gpu *g, const node *n)
{
    if (n->after) {
        drain(g, n->after, n->after_n);
        return;
    }
    if (n->call) {
        n->call(n->call_arg);
        return;
    }
    of(g)->n_ran++;
    open_memory(g, true);
    if (n->kernel)
        td_emu::run(n->kernel->fn, n->args,
                    {n->dim.grid, n->dim.block, n->dim.lds_bytes, g->wave, of(g)->order});
    else if (n->src)
        memcpy(n->dst, n->snapshot ? n->snapshot : n->src, n->bytes);
    else
        memset(n->dst, n->value, n->bytes);
    open_memory(g, false);
}

/* Run what was deferred, until the stream ran n nodes in all. */
void drain(td_gpu *g, stream *s, uint64_t n)
{
    while (s->n_ran < n) {
        node *at = s->first;
        s->first = at->next;
        s->n_ran++;
        run_node(g, at);
        free(at->snapshot);
        free(at);
    }
}

bool is_in(const allocation *a, const void *p)
{
    for (; a; a = a->next)
        if (p >= a->p && p < static_cast<char *>(a->p) + a->bytes)
            return true;
    return false;
}

int append(td_gpu *g, stream *s, const node *n)
{
    node *own = static_cast<node *>(malloc(sizeof *own));
    if (!own)
        return fail(g, -ENOMEM, "a stream", "out of memory");
    *own = *n;
    own->next = nullptr;
    *(s->first ? &s->last->next : &s->first) = own;
    s->last = own;
    return 0;
}

int add(td_gpu *g, void *st, const node *n)
{
    stream *s = static_cast<stream *>(st);
    if (s->capturing)
        return append(g, s, n);
    node own = *n;
    if (of(g)->deferred && n->src && !is_in(of(g)->memory, n->src) && !is_in(of(g)->host, n->src)) {
        own.snapshot = malloc(n->bytes); /* drivers have read pageable memory on return */
        if (!own.snapshot)
            return fail(g, -ENOMEM, "a copy", "out of memory");
        memcpy(own.snapshot, n->src, n->bytes);
    }
    int r = append(g, s, &own);
    s->n_added += r == 0;
    if (!of(g)->deferred)
        drain(g, s, s->n_added);
    return r;
}

void close_gpu(td_gpu *g)
{
    free(g);
}

int use(td_gpu *)
{
    return 0;
}

void *allocate(td_gpu *g, allocation **list, size_t bytes)
{
    size_t n = (bytes + 64) / 64 * 64;
    allocation *a = static_cast<allocation *>(malloc(sizeof *a));
    void *p = a ? aligned_alloc(64, n) : nullptr;
    if (!p) {
        free(a);
        fail(g, -ENOMEM, "memory", "out of memory");
        return nullptr;
    }
    memset(p, 0xa5, n); /* never zero, so that nothing relies on it */
    *a = {*list, p, bytes};
    *list = a;
    return p;
}

void release(allocation **list, void *p)
{
    for (allocation **at = list; *at; at = &(*at)->next) {
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

void *host_alloc(td_gpu *g, size_t bytes)
{
    return allocate(g, &of(g)->host, bytes);
}

void host_free(td_gpu *g, void *p)
{
    release(&of(g)->host, p);
}

void *mem_alloc(td_gpu *g, size_t bytes)
{
    void *p = allocate(g, &of(g)->memory, bytes);
    open_memory(g, false);
    return p;
}

void mem_free(td_gpu *g, void *p)
{
    release(&of(g)->memory, p);
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

int stream_wait(td_gpu *g, void *st)
{
    stream *s = static_cast<stream *>(st);
    drain(g, s, s->n_added);
    return 0;
}

void stream_free(td_gpu *g, void *s)
{
    if (s)
        stream_wait(g, s);
    free(s);
}

int event_new(td_gpu *g, void **ret_event)
{
    *ret_event = calloc(1, sizeof(event));
    return *ret_event ? 0 : fail(g, -ENOMEM, "a new event", "out of memory");
}

void event_free(td_gpu *, void *e)
{
    free(e);
}

int event_record(td_gpu *, void *ev, void *st)
{
    stream *s = static_cast<stream *>(st);
    *static_cast<event *>(ev) = {s, s->n_added};
    return 0;
}

int event_after(td_gpu *g, void *s, void *ev)
{
    const event *e = static_cast<event *>(ev);
    node n = {};
    n.after = e->of;
    n.after_n = e->n;
    return e->of ? add(g, s, &n) : 0;
}

int event_done(td_gpu *, void *ev)
{
    const event *e = static_cast<event *>(ev);
    return e->of && e->of->n_ran >= e->n;
}

int event_wait(td_gpu *g, void *ev)
{
    const event *e = static_cast<event *>(ev);
    if (e->of)
        drain(g, e->of, e->n);
    return 0;
}

int host_call(td_gpu *g, void *s, void (*fn)(void *), void *arg)
{
    node n = {};
    n.call = fn;
    n.call_arg = arg;
    return add(g, s, &n);
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

int graph_begin(td_gpu *g, void *s)
{
    stream *st = static_cast<stream *>(s);
    stream_wait(g, s); /* what is queued is no part of it */
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

int graph_launch(td_gpu *g, void *s, void *graph)
{
    int r = 0;
    of(g)->n_graphs++;
    for (const node *n = static_cast<node *>(graph); n && r == 0; n = n->next)
        r = add(g, s, n);
    return r;
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
    o.event_wait = event_wait;
    o.event_ms = event_ms;
    o.host_call = host_call;
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

extern "C" uint64_t td_emu_gpu_graphs(td_gpu *g)
{
    return of(g)->n_graphs;
}

extern "C" uint64_t td_emu_gpu_ran(td_gpu *g)
{
    return of(g)->n_ran;
}

extern "C" void td_emu_gpu_defer(td_gpu *g)
{
    of(g)->deferred = true;
}
