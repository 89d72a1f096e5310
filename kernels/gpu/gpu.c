/* SPDX-License-Identifier: Apache-2.0 */
#include "kernels/gpu/gpu.h"

#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bug.h"

#include "base/banned.h"

/* Where the kinds differ: numbers and a few calls that only one of them has. */
typedef struct kind_row {
    const char *name, *vendor, *arch_prefix, *remedy;
    const char *libraries[4];
    int attr_cus, attr_wave, attr_lds;
    int no_device, not_ready, no_binary, no_memory; /* error codes */
} kind_row;

static const kind_row kinds[TD_GPU_KINDS] = {
    [TD_GPU_HIP] = {.name = "hip",
                    .vendor = "AMD",
                    .arch_prefix = "gfx",
                    .remedy = "install ROCm's libamdhip64 (5, 6 or 7), or use another device",
                    .libraries = {"libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so.5"},
                    .attr_cus = 63,
                    .attr_wave = 87,
                    .attr_lds = 74,
                    .no_device = 100,
                    .not_ready = 600,
                    .no_binary = 209,
                    .no_memory = 2},
    [TD_GPU_CUDA] = {.name = "cuda",
                     .vendor = "NVIDIA",
                     .arch_prefix = "sm_",
                     .remedy = "install the NVIDIA driver (libcuda.so.1), or use another device",
                     .libraries = {"libcuda.so.1"},
                     .attr_cus = 16,
                     .attr_wave = 10,
                     .attr_lds = 97, /* what a block may opt in to */
                     .no_device = 100,
                     .not_ready = 600,
                     .no_binary = 209,
                     .no_memory = 2},
};

enum {
    LDS_WITHOUT_ASKING = 48 << 10,
    ATTR_DYNAMIC_LDS = 8,
    STREAM_NON_BLOCKING = 1,
    CAPTURE_THREAD = 1
};

typedef struct driver {
    td_gpu gpu;
    td_gpu_kind kind;
    void *lib, *module, *context;
    int device;
#define TD_SYM(field, hip, cuda, params) int(*field) params;
#include "kernels/gpu/symbols.def"
#undef TD_SYM
    /* HIP only */
    int (*set_device)(int);
    const char *(*hip_text)(int);
    /* CUDA only */
    int (*cuda_text)(int, const char **);
    int (*retain)(void **, int), (*release)(int), (*set_context)(void *);
    int (*set_attribute)(void *, int, int);
} driver;

const char *td_gpu_kind_name(td_gpu_kind k)
{
    return (unsigned)k < TD_GPU_KINDS ? kinds[k].name : "?";
}

static driver *of(td_gpu *g)
{
    return (driver *)g;
}

static const char *text_of(driver *d, int code)
{
    const char *t = NULL;
    if (d->hip_text)
        t = d->hip_text(code);
    else if (d->cuda_text && d->cuda_text(code, &t) != 0)
        t = NULL;
    return t ? t : "unknown error";
}

/* A driver's code as errno, its text kept. */
static int check(driver *d, int code, const char *what)
{
    if (code == 0)
        return 0;
    const kind_row *k = &kinds[d->kind];
    snprintf(d->gpu.error, sizeof d->gpu.error, "%s: %s: %s (%d)", k->name, what, text_of(d, code),
             code);
    return code == k->no_memory ? -ENOMEM : code == k->no_device ? -ENODEV : -EIO;
}

static int gpu_use(td_gpu *g)
{
    driver *d = of(g);
    if (d->kind == TD_GPU_HIP)
        return check(d, d->set_device(d->device), "choosing the device");
    return check(d, d->set_context(d->context), "choosing the device");
}

static void gpu_close(td_gpu *g)
{
    driver *d = of(g);
    if (d->module)
        d->module_unload(d->module);
    if (d->context)
        d->release(d->device);
    /* the library stays: drivers do not survive being unloaded */
    free(d);
}

static void *gpu_mem_alloc(td_gpu *g, size_t bytes)
{
    void *p = NULL;
    return check(of(g), of(g)->mem_alloc(&p, bytes ? bytes : 1), "device memory") < 0 ? NULL : p;
}

static void gpu_mem_free(td_gpu *g, void *p)
{
    if (p)
        check(of(g), of(g)->mem_free(p), "freeing device memory");
}

static void *gpu_host_alloc(td_gpu *g, size_t bytes)
{
    void *p = NULL;
    int code = of(g)->host_alloc(&p, bytes ? bytes : 1, 0);
    return check(of(g), code, "page-locked memory") < 0 ? NULL : p;
}

static void gpu_host_free(td_gpu *g, void *p)
{
    if (p)
        check(of(g), of(g)->host_free(p), "freeing page-locked memory");
}

static int gpu_mem_info(td_gpu *g, size_t *ret_free, size_t *ret_total)
{
    return check(of(g), of(g)->mem_info(ret_free, ret_total), "asking for free memory");
}

static int gpu_upload(td_gpu *g, void *stream, void *dst, const void *src, size_t bytes)
{
    return bytes ? check(of(g), of(g)->upload(dst, src, bytes, stream), "upload") : 0;
}

static int gpu_download(td_gpu *g, void *stream, void *dst, const void *src, size_t bytes)
{
    return bytes ? check(of(g), of(g)->download(dst, src, bytes, stream), "download") : 0;
}

static int gpu_copy(td_gpu *g, void *stream, void *dst, const void *src, size_t bytes)
{
    return bytes ? check(of(g), of(g)->copy(dst, src, bytes, stream), "copy") : 0;
}

static int gpu_fill(td_gpu *g, void *stream, void *dst, uint8_t value, size_t bytes)
{
    return bytes ? check(of(g), of(g)->fill(dst, value, bytes, stream), "fill") : 0;
}

static int gpu_stream_new(td_gpu *g, void **ret_stream)
{
    return check(of(g), of(g)->stream_new(ret_stream, STREAM_NON_BLOCKING), "a new stream");
}

static void gpu_stream_free(td_gpu *g, void *stream)
{
    if (stream)
        check(of(g), of(g)->stream_free(stream), "ending a stream");
}

static int gpu_stream_wait(td_gpu *g, void *stream)
{
    return check(of(g), of(g)->stream_wait(stream), "waiting for the device");
}

static int gpu_event_new(td_gpu *g, void **ret_event)
{
    return check(of(g), of(g)->event_new(ret_event, 0), "a new event");
}

static void gpu_event_free(td_gpu *g, void *event)
{
    if (event)
        check(of(g), of(g)->event_free(event), "ending an event");
}

static int gpu_event_record(td_gpu *g, void *event, void *stream)
{
    return check(of(g), of(g)->event_record(event, stream), "recording an event");
}

static int gpu_event_after(td_gpu *g, void *stream, void *event)
{
    return check(of(g), of(g)->stream_after(stream, event, 0), "waiting for an event");
}

static int gpu_event_done(td_gpu *g, void *event)
{
    int code = of(g)->event_query(event);
    if (code == kinds[of(g)->kind].not_ready)
        return 0;
    int r = check(of(g), code, "asking for an event");
    return r < 0 ? r : 1;
}

static int gpu_event_wait(td_gpu *g, void *event)
{
    return check(of(g), of(g)->event_wait(event), "waiting for an event");
}

static int gpu_event_ms(td_gpu *g, void *from, void *to, float *ret_ms)
{
    return check(of(g), of(g)->event_ms(ret_ms, from, to), "time between events");
}

static int gpu_host_call(td_gpu *g, void *stream, void (*fn)(void *), void *arg)
{
    return check(of(g), of(g)->host_call(stream, fn, arg), "queueing a call of the host");
}

static int gpu_kernel(td_gpu *g, const char *name, void **ret_kernel)
{
    int code = of(g)->function(ret_kernel, of(g)->module, name);
    if (code == 0)
        return 0;
    snprintf(g->error, sizeof g->error, "%s: the code object for %s has no kernel %s (%d)",
             kinds[of(g)->kind].name, g->arch, name, code);
    return -ENOENT;
}

static int gpu_launch(td_gpu *g, void *stream, void *kernel, td_gpu_dim dim, const void *args,
                      size_t args_bytes)
{
    driver *d = of(g);
    void *params[1];
    memcpy(params, &args, sizeof args); /* drivers forget that they only read */
    if (dim.lds_bytes > LDS_WITHOUT_ASKING && d->set_attribute) {
        int r = check(d, d->set_attribute(kernel, ATTR_DYNAMIC_LDS, (int)dim.lds_bytes),
                      "asking for shared memory");
        if (r < 0)
            return r;
    }
    int code =
        d->launch(kernel, dim.grid, 1, 1, dim.block, 1, 1, dim.lds_bytes, stream, params, NULL);
    return check(d, code, "launching a kernel");
}

static int gpu_graph_begin(td_gpu *g, void *stream)
{
    return check(of(g), of(g)->capture_begin(stream, CAPTURE_THREAD), "starting a capture");
}

static int gpu_graph_end(td_gpu *g, void *stream, void **ret_graph)
{
    driver *d = of(g);
    void *graph = NULL, *exec = NULL;
    int r = check(d, d->capture_end(stream, &graph), "ending a capture");
    if (r < 0)
        return r;
    r = check(d, d->graph_make(&exec, graph, 0), "building a graph");
    d->graph_drop(graph);
    if (r >= 0)
        *ret_graph = exec;
    return r;
}

static int gpu_graph_launch(td_gpu *g, void *stream, void *graph)
{
    return check(of(g), of(g)->graph_launch(graph, stream), "launching a graph");
}

static void gpu_graph_free(td_gpu *g, void *graph)
{
    if (graph)
        check(of(g), of(g)->graph_free(graph), "ending a graph");
}

static const td_gpu_ops driver_ops = {
    .close = gpu_close,
    .use = gpu_use,
    .mem_alloc = gpu_mem_alloc,
    .mem_free = gpu_mem_free,
    .host_alloc = gpu_host_alloc,
    .host_free = gpu_host_free,
    .mem_info = gpu_mem_info,
    .upload = gpu_upload,
    .download = gpu_download,
    .copy = gpu_copy,
    .fill = gpu_fill,
    .stream_new = gpu_stream_new,
    .stream_free = gpu_stream_free,
    .stream_wait = gpu_stream_wait,
    .event_new = gpu_event_new,
    .event_free = gpu_event_free,
    .event_record = gpu_event_record,
    .event_after = gpu_event_after,
    .event_done = gpu_event_done,
    .event_wait = gpu_event_wait,
    .event_ms = gpu_event_ms,
    .host_call = gpu_host_call,
    .kernel = gpu_kernel,
    .launch = gpu_launch,
    .graph_begin = gpu_graph_begin,
    .graph_end = gpu_graph_end,
    .graph_launch = gpu_graph_launch,
    .graph_free = gpu_graph_free,
};

/* dlsym gives a data pointer; C has no cast from it to a function, so its bytes are copied. */
static int find(driver *d, const char *name, void *ret_function, td_err *err)
{
    void *p = dlsym(d->lib, name);
    if (!p)
        return td_err_set(err, -ENOSYS, "%s has no %s: this driver is too old; %s", d->gpu.driver,
                          name, kinds[d->kind].remedy);
    memcpy(ret_function, &p, sizeof p);
    return 0;
}

static int find_all(driver *d, td_err *err)
{
    int r = 0, hip = d->kind == TD_GPU_HIP;
#define TD_SYM(field, hip_name, cuda_name, params)                                                 \
    r = r < 0 ? r : find(d, hip ? hip_name : cuda_name, &d->field, err);
#include "kernels/gpu/symbols.def"
#undef TD_SYM
    if (r < 0)
        return r;
    if (hip) {
        r = find(d, "hipSetDevice", &d->set_device, err);
        return r < 0 ? r : find(d, "hipGetErrorString", &d->hip_text, err);
    }
    r = find(d, "cuGetErrorString", &d->cuda_text, err);
    r = r < 0 ? r : find(d, "cuDevicePrimaryCtxRetain", &d->retain, err);
    r = r < 0 ? r : find(d, "cuDevicePrimaryCtxRelease_v2", &d->release, err);
    r = r < 0 ? r : find(d, "cuCtxSetCurrent", &d->set_context, err);
    return r < 0 ? r : find(d, "cuFuncSetAttribute", &d->set_attribute, err);
}

static int open_library(driver *d, td_err *err)
{
    const kind_row *k = &kinds[d->kind];
    const char *why = NULL;
    for (size_t i = 0; i < TD_ARRAY_LEN(k->libraries) && k->libraries[i] && !d->lib; i++) {
        d->lib = dlopen(k->libraries[i], RTLD_NOW | RTLD_LOCAL);
        if (d->lib)
            snprintf(d->gpu.driver, sizeof d->gpu.driver, "%s", k->libraries[i]);
        else if (!why)
            why = k->libraries[i];
    }
    if (!d->lib)
        return td_err_set(err, -ENOENT, "%s: no %s driver: %s and its like cannot be opened; %s",
                          k->name, k->vendor, why, k->remedy);
    return find_all(d, err);
}

static int fail(driver *d, int r, td_err *err)
{
    return td_err_set(err, r, "%s: %s", d->gpu.driver, d->gpu.error);
}

/* Without a device either call may be the one that says so. */
static int open_device(driver *d, uint32_t ordinal, td_err *err)
{
    const kind_row *k = &kinds[d->kind];
    int n = 0, code = d->init(0);
    int more = d->count(&n);
    if (code == k->no_device || more == k->no_device || (code == 0 && more == 0 && n < 1) ||
        (n < 1 && code != 0))
        return td_err_set(err, -ENODEV, "%s: %s found no device (%s); use another device", k->name,
                          d->gpu.driver, text_of(d, code ? code : more));
    int r = check(d, code ? code : more, "starting the driver");
    if (r < 0)
        return fail(d, r, err);
    if (ordinal >= (uint32_t)n)
        return td_err_set(err, -ENODEV, "%s: there is no device %u, only 0 to %d", k->name, ordinal,
                          n - 1);
    r = check(d, d->get_device(&d->device, (int)ordinal), "opening the device");
    if (r >= 0 && d->kind == TD_GPU_CUDA)
        r = check(d, d->retain(&d->context, d->device), "opening the device");
    r = r < 0 ? r : gpu_use(&d->gpu);
    return r < 0 ? fail(d, r, err) : 0;
}

static int describe(driver *d, td_err *err)
{
    const kind_row *k = &kinds[d->kind];
    int cus = 0, wave = 0, lds = 0;
    int r = check(d, d->device_name(d->gpu.name, sizeof d->gpu.name, d->device), "device name");
    r = r < 0 ? r : check(d, d->attribute(&cus, k->attr_cus, d->device), "compute units");
    r = r < 0 ? r : check(d, d->attribute(&wave, k->attr_wave, d->device), "wave size");
    r = r < 0 ? r : check(d, d->attribute(&lds, k->attr_lds, d->device), "shared memory");
    if (r < 0)
        return fail(d, r, err);
    if (wave != (d->kind == TD_GPU_HIP ? 64 : 32))
        return td_err_set(err, -ENODEV, "%s: %s has waves of %d lanes; only MI300 and later serve",
                          k->name, d->gpu.name, wave);
    d->gpu.n_cus = (uint32_t)cus;
    d->gpu.wave = (uint32_t)wave;
    d->gpu.lds_bytes = (uint32_t)lds;
    return 0;
}

/* The architecture is found by trying: no properties struct, no list of names. */
static int load_object(driver *d, const td_gpu_object *objects, size_t n, td_err *err)
{
    const kind_row *k = &kinds[d->kind];
    char tried[128] = "";
    size_t at = 0;
    for (size_t i = 0; i < n; i++) {
        if (strncmp(objects[i].arch, k->arch_prefix, strlen(k->arch_prefix)) != 0)
            continue;
        int code = d->module_load(&d->module, objects[i].bytes);
        if (code == 0) {
            snprintf(d->gpu.arch, sizeof d->gpu.arch, "%s", objects[i].arch);
            return 0;
        }
        d->module = NULL;
        if (code != k->no_binary)
            check(d, code, "loading kernels");
        if (at < sizeof tried)
            at += (size_t)snprintf(tried + at, sizeof tried - at, "%s%s", at ? ", " : "",
                                   objects[i].arch);
    }
    if (!at)
        return td_err_set(err, -ENOEXEC,
                          "%s: this build holds no kernels for %s devices; build it with %s",
                          k->name, k->vendor, d->kind == TD_GPU_HIP ? "clang++-22" : "nvcc");
    return td_err_set(err, -ENOEXEC, "%s: %s loads none of the kernels in this build (%s)%s%s",
                      k->name, d->gpu.name, tried, d->gpu.error[0] ? ": " : "", d->gpu.error);
}

int td_gpu_open(td_gpu_kind kind, uint32_t ordinal, const td_gpu_object *objects, size_t n_objects,
                td_gpu **ret_gpu, td_err *reterr_err)
{
    TD_BUG_ON((unsigned)kind >= TD_GPU_KINDS);
    driver *d = calloc(1, sizeof *d);
    if (!d)
        return td_err_set(reterr_err, -ENOMEM, "out of memory");
    d->gpu.ops = &driver_ops;
    d->kind = kind;
    int r = open_library(d, reterr_err);
    r = r < 0 ? r : open_device(d, ordinal, reterr_err);
    r = r < 0 ? r : describe(d, reterr_err);
    r = r < 0 ? r : load_object(d, objects, n_objects, reterr_err);
    if (r < 0) {
        gpu_close(&d->gpu);
        return r;
    }
    *ret_gpu = &d->gpu;
    return 0;
}

void td_gpu_close(td_gpu *g)
{
    if (g)
        g->ops->close(g);
}
