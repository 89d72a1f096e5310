/* SPDX-License-Identifier: Apache-2.0 */
/* A stand-in for libamdhip64 that computes: HIP's calls on the emulation, so that whole processes
 * run with --device hip where there is no GPU. It takes any code object and finds kernels in the
 * emulation by name. For tests. */
#include <pthread.h>
#include <stdint.h>
#include <string.h>

#include "kernels/hip/emu_gpu.h"

enum { FAILED = 1, OUT_OF_MEMORY = 2, NOT_FOUND = 500, NOT_READY = 600, ARGS_MAX = 512 };

#define API __attribute__((visibility("default")))

/* Drivers may be called by any thread. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static td_gpu *g;

int hipInit(unsigned flags);
int hipGetDeviceCount(int *n);
int hipDeviceGet(int *device, int ordinal);
int hipSetDevice(int device);
int hipDeviceGetName(char *name, int len, int device);
int hipDeviceGetAttribute(int *value, int attr, int device);
int hipMemGetInfo(size_t *left, size_t *total);
int hipModuleLoadData(void **module, const void *image);
int hipModuleUnload(void *module);
int hipModuleGetFunction(void **function, void *module, const char *name);
int hipModuleLaunchKernel(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                          unsigned bz, unsigned lds, void *stream, void **params, void **extra);
int hipMalloc(void **p, size_t bytes);
int hipFree(void *p);
int hipHostMalloc(void **p, size_t bytes, unsigned flags);
int hipHostFree(void *p);
int hipMemcpyHtoDAsync(void *dst, const void *src, size_t n, void *stream);
int hipMemcpyDtoHAsync(void *dst, const void *src, size_t n, void *stream);
int hipMemcpyDtoDAsync(void *dst, const void *src, size_t n, void *stream);
int hipMemsetD8Async(void *dst, unsigned char value, size_t n, void *stream);
int hipStreamCreateWithFlags(void **stream, unsigned flags);
int hipStreamDestroy(void *stream);
int hipStreamSynchronize(void *stream);
int hipStreamWaitEvent(void *stream, void *event, unsigned flags);
int hipEventCreateWithFlags(void **event, unsigned flags);
int hipEventDestroy(void *event);
int hipEventRecord(void *event, void *stream);
int hipEventQuery(void *event);
int hipEventSynchronize(void *event);
int hipEventElapsedTime(float *ms, void *from, void *to);
int hipLaunchHostFunc(void *stream, void (*fn)(void *), void *arg);
int hipStreamBeginCapture(void *stream, int m);
int hipStreamEndCapture(void *stream, void **graph);
int hipGraphInstantiateWithFlags(void **exec, void *graph, unsigned long long flags);
int hipGraphLaunch(void *exec, void *stream);
int hipGraphExecDestroy(void *exec);
int hipGraphDestroy(void *graph);
const char *hipGetErrorString(int code);

/* A call that gives errno as HIP's codes. */
#define LOCKED(call)                                                                               \
    do {                                                                                           \
        pthread_mutex_lock(&lock);                                                                 \
        int r_ = (call);                                                                           \
        pthread_mutex_unlock(&lock);                                                               \
        return r_ < 0 ? FAILED : 0;                                                                \
    } while (0)

API int hipInit(unsigned flags)
{
    if (!g)
        g = td_emu_gpu_new(64, 0);
    return g ? (int)flags : FAILED;
}

API int hipGetDeviceCount(int *n)
{
    *n = 1;
    return 0;
}

API int hipDeviceGet(int *device, int ordinal)
{
    *device = ordinal;
    return 0;
}

API int hipSetDevice(int device)
{
    return device ? FAILED : 0;
}

API int hipDeviceGetName(char *name, int len, int device)
{
    (void)device;
    strncpy(name, "emulation", (size_t)len - 1);
    name[len - 1] = 0;
    return 0;
}

API int hipDeviceGetAttribute(int *value, int attr, int device)
{
    *value = attr == 63 ? 1 : attr == 87 ? 64 : attr == 74 ? (int)g->lds_bytes : -1;
    return device ? FAILED : 0;
}

API int hipMemGetInfo(size_t *left, size_t *total)
{
    LOCKED(g->ops->mem_info(g, left, total));
}

API int hipModuleLoadData(void **module, const void *image)
{
    *module = g;
    return image ? 0 : FAILED;
}

API int hipModuleUnload(void *module)
{
    return module == g ? 0 : FAILED;
}

API int hipModuleGetFunction(void **function, void *module, const char *name)
{
    (void)module;
    return g->ops->kernel(g, name, function) < 0 ? NOT_FOUND : 0;
}

/* A driver knows the size of a kernel's struct from its code object; here more is read, of the
 * caller's stack. */
__attribute__((no_sanitize("address", "undefined"))) static void read_args(void **params,
                                                                           unsigned char *out)
{
    const volatile unsigned char *from = params[0];
    for (int i = 0; i < ARGS_MAX; i++)
        out[i] = from[i];
}

API int hipModuleLaunchKernel(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                              unsigned by, unsigned bz, unsigned lds, void *stream, void **params,
                              void **extra)
{
    unsigned char args[ARGS_MAX];
    td_gpu_dim dim = {gx, bx, lds};
    if (gy != 1 || gz != 1 || by != 1 || bz != 1 || extra)
        return FAILED;
    read_args(params, args);
    LOCKED(g->ops->launch(g, stream, f, dim, args, sizeof args));
}

static int allocate(void *(*alloc)(td_gpu *, size_t), void **p, size_t bytes)
{
    pthread_mutex_lock(&lock);
    *p = alloc(g, bytes);
    pthread_mutex_unlock(&lock);
    return *p ? 0 : OUT_OF_MEMORY;
}

static int release(void (*give_back)(td_gpu *, void *), void *p)
{
    pthread_mutex_lock(&lock);
    give_back(g, p);
    pthread_mutex_unlock(&lock);
    return 0;
}

API int hipMalloc(void **p, size_t bytes)
{
    return allocate(g->ops->mem_alloc, p, bytes);
}

API int hipFree(void *p)
{
    return release(g->ops->mem_free, p);
}

API int hipHostMalloc(void **p, size_t bytes, unsigned flags)
{
    return flags ? FAILED : allocate(g->ops->host_alloc, p, bytes);
}

API int hipHostFree(void *p)
{
    return release(g->ops->host_free, p);
}

API int hipMemcpyHtoDAsync(void *dst, const void *src, size_t n, void *stream)
{
    LOCKED(g->ops->upload(g, stream, dst, src, n));
}

API int hipMemcpyDtoHAsync(void *dst, const void *src, size_t n, void *stream)
{
    LOCKED(g->ops->download(g, stream, dst, src, n));
}

API int hipMemcpyDtoDAsync(void *dst, const void *src, size_t n, void *stream)
{
    LOCKED(g->ops->copy(g, stream, dst, src, n));
}

API int hipMemsetD8Async(void *dst, unsigned char value, size_t n, void *stream)
{
    LOCKED(g->ops->fill(g, stream, dst, value, n));
}

API int hipStreamCreateWithFlags(void **stream, unsigned flags)
{
    (void)flags;
    LOCKED(g->ops->stream_new(g, stream));
}

API int hipStreamDestroy(void *stream)
{
    return release(g->ops->stream_free, stream);
}

API int hipStreamSynchronize(void *stream)
{
    LOCKED(g->ops->stream_wait(g, stream));
}

API int hipStreamWaitEvent(void *stream, void *event, unsigned flags)
{
    (void)flags;
    LOCKED(g->ops->event_after(g, stream, event));
}

API int hipEventCreateWithFlags(void **event, unsigned flags)
{
    (void)flags;
    LOCKED(g->ops->event_new(g, event));
}

API int hipEventDestroy(void *event)
{
    return release(g->ops->event_free, event);
}

API int hipEventRecord(void *event, void *stream)
{
    LOCKED(g->ops->event_record(g, event, stream));
}

API int hipEventQuery(void *event)
{
    pthread_mutex_lock(&lock);
    int done = g->ops->event_done(g, event);
    pthread_mutex_unlock(&lock);
    return done ? 0 : NOT_READY;
}

API int hipEventSynchronize(void *event)
{
    LOCKED(g->ops->event_wait(g, event));
}

API int hipEventElapsedTime(float *ms, void *from, void *to)
{
    (void)from;
    (void)to;
    *ms = 0;
    return FAILED;
}

API int hipLaunchHostFunc(void *stream, void (*fn)(void *), void *arg)
{
    LOCKED(g->ops->host_call(g, stream, fn, arg));
}

API int hipStreamBeginCapture(void *stream, int m)
{
    (void)m;
    LOCKED(g->ops->graph_begin(g, stream));
}

API int hipStreamEndCapture(void *stream, void **graph)
{
    LOCKED(g->ops->graph_end(g, stream, graph));
}

API int hipGraphInstantiateWithFlags(void **exec, void *graph, unsigned long long flags)
{
    *exec = graph;
    return flags ? FAILED : 0;
}

API int hipGraphLaunch(void *exec, void *stream)
{
    LOCKED(g->ops->graph_launch(g, stream, exec));
}

API int hipGraphExecDestroy(void *exec)
{
    return release(g->ops->graph_free, exec);
}

API int hipGraphDestroy(void *graph) /* the executable one is it */
{
    (void)graph;
    return 0;
}

API const char *hipGetErrorString(int code)
{
    return code == NOT_FOUND ? "named symbol not found" : g ? g->error : "unknown";
}
