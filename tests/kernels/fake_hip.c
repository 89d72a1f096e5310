/* SPDX-License-Identifier: Apache-2.0 */
/* A stand-in for libamdhip64, for the loader's test only: the calls that kernels/gpu uses, on host
 * memory, with the parameters of ROCm's headers written out. TD_FAKE_HIP in the environment chooses
 * what fails. Device memory lies behind a tag, so that a pointer that did not come from here is
 * seen. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int hipError_t;
typedef struct fake_stream {
    int capturing;
    void *graph;
} fake_stream;

enum {
    TAG = 0x7a67,
    SUCCESS = 0,
    OUT_OF_MEMORY = 2,
    NO_DEVICE = 100,
    NO_BINARY = 209,
    NOT_READY = 600
};

static int mode(const char *name)
{
    const char *m = getenv("TD_FAKE_HIP");
    return m && strcmp(m, name) == 0;
}

#define API __attribute__((visibility("default")))

hipError_t hipInit(unsigned flags);
hipError_t hipGetDeviceCount(int *n);
hipError_t hipDeviceGet(int *device, int ordinal);
hipError_t hipSetDevice(int device);
hipError_t hipDeviceGetName(char *name, int len, int device);
hipError_t hipDeviceGetAttribute(int *value, int attr, int device);
hipError_t hipMemGetInfo(size_t *left, size_t *total);
hipError_t hipModuleLoadData(void **module, const void *image);
hipError_t hipModuleUnload(void *module);
hipError_t hipModuleGetFunction(void **function, void *module, const char *name);
hipError_t hipModuleLaunchKernel(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                                 unsigned by, unsigned bz, unsigned lds, void *stream,
                                 void **params, void **extra);
hipError_t hipMalloc(void **p, size_t bytes);
hipError_t hipFree(void *p);
hipError_t hipHostMalloc(void **p, size_t bytes, unsigned flags);
hipError_t hipHostFree(void *p);
hipError_t hipMemcpyHtoDAsync(void *dst, const void *src, size_t n, void *stream);
hipError_t hipMemcpyDtoHAsync(void *dst, const void *src, size_t n, void *stream);
hipError_t hipMemcpyDtoDAsync(void *dst, const void *src, size_t n, void *stream);
hipError_t hipMemsetD8Async(void *dst, unsigned char value, size_t n, void *stream);
hipError_t hipStreamCreateWithFlags(void **stream, unsigned flags);
hipError_t hipStreamDestroy(void *stream);
hipError_t hipStreamSynchronize(void *stream);
hipError_t hipStreamWaitEvent(void *stream, void *event, unsigned flags);
hipError_t hipEventCreateWithFlags(void **event, unsigned flags);
hipError_t hipEventDestroy(void *event);
hipError_t hipEventRecord(void *event, void *stream);
hipError_t hipEventQuery(void *event);
hipError_t hipEventSynchronize(void *event);
hipError_t hipEventElapsedTime(float *ms, void *from, void *to);
hipError_t hipLaunchHostFunc(void *stream, void (*fn)(void *), void *arg);
hipError_t hipStreamBeginCapture(void *stream, int m);
hipError_t hipStreamEndCapture(void *stream, void **graph);
hipError_t hipGraphInstantiateWithFlags(void **exec, void *graph, unsigned long long flags);
hipError_t hipGraphLaunch(void *exec, void *stream);
hipError_t hipGraphExecDestroy(void *exec);
hipError_t hipGraphDestroy(void *graph);
const char *hipGetErrorString(int code);

API hipError_t hipInit(unsigned flags)
{
    return mode("no_device") ? 101 : flags; /* what ROCm 5 answers without a device */
}

API hipError_t hipGetDeviceCount(int *n)
{
    *n = mode("no_device") ? 0 : 2;
    return *n ? SUCCESS : NO_DEVICE;
}

API hipError_t hipDeviceGet(int *device, int ordinal)
{
    *device = ordinal;
    return SUCCESS;
}

API hipError_t hipSetDevice(int device)
{
    return device < 2 ? SUCCESS : NO_DEVICE;
}

API hipError_t hipDeviceGetName(char *name, int len, int device)
{
    strncpy(name, device ? "Fake MI355X" : "Fake MI300X", (size_t)len - 1);
    name[len - 1] = 0;
    return SUCCESS;
}

API hipError_t hipDeviceGetAttribute(int *value, int attr, int device)
{
    *value = attr == 63 ? 304 : attr == 87 ? (mode("wave32") ? 32 : 64) : attr == 74 ? 65536 : -1;
    return device < 2 ? SUCCESS : NO_DEVICE;
}

API hipError_t hipMemGetInfo(size_t *left, size_t *total)
{
    *left = 1 << 20;
    *total = 2 << 20;
    return SUCCESS;
}

/* Device 0 takes objects that begin with "942", as a driver takes those of its own architecture. */
API hipError_t hipModuleLoadData(void **module, const void *image)
{
    static int loaded;
    *module = &loaded;
    return memcmp(image, mode("gfx950") ? "950" : "942", 3) == 0 ? SUCCESS : NO_BINARY;
}

API hipError_t hipModuleUnload(void *module)
{
    return module ? SUCCESS : 1;
}

/* The one kernel: out[i] = value for i < n. */
typedef struct fill_args {
    uint32_t *out;
    uint32_t n, value;
} fill_args;

API hipError_t hipModuleGetFunction(void **function, void *module, const char *name)
{
    static int fill;
    *function = &fill;
    return module && (strcmp(name, "fill") == 0 || mode("every_kernel")) ? SUCCESS : 500;
}

static void run_fill(const fill_args *a, unsigned threads)
{
    for (unsigned i = 0; i < threads && i < a->n; i++)
        a->out[i] = a->value;
}

typedef struct fake_graph {
    fill_args args;
    unsigned threads;
} fake_graph;

API hipError_t hipModuleLaunchKernel(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                                     unsigned by, unsigned bz, unsigned lds, void *stream,
                                     void **params, void **extra)
{
    fake_stream *s = stream;
    if (!f || gy != 1 || gz != 1 || by != 1 || bz != 1 || extra || lds > 65536 || bx > 1024)
        return 1;
    if (mode("launch_fails"))
        return 719;
    if (s && s->capturing) {
        fake_graph *g = malloc(sizeof *g);
        memcpy(&g->args, params[0], sizeof g->args);
        g->threads = gx * bx;
        s->graph = g;
        return SUCCESS;
    }
    run_fill(params[0], gx * bx);
    return SUCCESS;
}

API hipError_t hipMalloc(void **p, size_t bytes)
{
    if (mode("no_memory"))
        return OUT_OF_MEMORY;
    uint64_t *raw = malloc(bytes + 64);
    *raw = TAG;
    *p = raw + 8;
    return SUCCESS;
}

API hipError_t hipFree(void *p)
{
    uint64_t *raw = (uint64_t *)p - 8;
    if (*raw != TAG)
        return 1;
    free(raw);
    return SUCCESS;
}

API hipError_t hipHostMalloc(void **p, size_t bytes, unsigned flags)
{
    *p = malloc(bytes);
    return flags;
}

API hipError_t hipHostFree(void *p)
{
    free(p);
    return SUCCESS;
}

API hipError_t hipMemcpyHtoDAsync(void *dst, const void *src, size_t n, void *stream)
{
    memcpy(dst, src, n);
    return stream ? SUCCESS : 1;
}

API hipError_t hipMemcpyDtoHAsync(void *dst, const void *src, size_t n, void *stream)
{
    memcpy(dst, src, n);
    return stream ? SUCCESS : 1;
}

API hipError_t hipMemcpyDtoDAsync(void *dst, const void *src, size_t n, void *stream)
{
    memcpy(dst, src, n);
    return stream ? SUCCESS : 1;
}

API hipError_t hipMemsetD8Async(void *dst, unsigned char value, size_t n, void *stream)
{
    memset(dst, value, n);
    return stream ? SUCCESS : 1;
}

API hipError_t hipStreamCreateWithFlags(void **stream, unsigned flags)
{
    *stream = calloc(1, sizeof(fake_stream));
    return flags == 1 ? SUCCESS : 1;
}

API hipError_t hipStreamDestroy(void *stream)
{
    free(stream);
    return SUCCESS;
}

API hipError_t hipStreamSynchronize(void *stream)
{
    return stream ? SUCCESS : 1;
}

API hipError_t hipStreamWaitEvent(void *stream, void *event, unsigned flags)
{
    return stream && event ? (hipError_t)flags : 1;
}

API hipError_t hipEventCreateWithFlags(void **event, unsigned flags)
{
    *event = calloc(1, sizeof(int));
    return (hipError_t)flags;
}

API hipError_t hipEventDestroy(void *event)
{
    free(event);
    return SUCCESS;
}

API hipError_t hipEventRecord(void *event, void *stream)
{
    *(int *)event = 1;
    return stream ? SUCCESS : 1;
}

API hipError_t hipEventQuery(void *event)
{
    return *(int *)event ? SUCCESS : NOT_READY;
}

API hipError_t hipEventSynchronize(void *event)
{
    return *(int *)event ? SUCCESS : NOT_READY;
}

API hipError_t hipEventElapsedTime(float *ms, void *from, void *to)
{
    *ms = from != to ? 1.5f : 0.0f;
    return SUCCESS;
}

API hipError_t hipLaunchHostFunc(void *stream, void (*fn)(void *), void *arg)
{
    fn(arg);
    return stream ? SUCCESS : 1;
}

API hipError_t hipStreamBeginCapture(void *stream, int m)
{
    ((fake_stream *)stream)->capturing = 1;
    return m == 1 ? SUCCESS : 1;
}

API hipError_t hipStreamEndCapture(void *stream, void **graph)
{
    fake_stream *s = stream;
    *graph = s->graph;
    s->capturing = 0;
    s->graph = NULL;
    return *graph ? SUCCESS : 1;
}

API hipError_t hipGraphInstantiateWithFlags(void **exec, void *graph, unsigned long long flags)
{
    *exec = malloc(sizeof(fake_graph));
    memcpy(*exec, graph, sizeof(fake_graph));
    return flags ? 1 : SUCCESS;
}

API hipError_t hipGraphLaunch(void *exec, void *stream)
{
    const fake_graph *g = exec;
    run_fill(&g->args, g->threads);
    return stream ? SUCCESS : 1;
}

API hipError_t hipGraphExecDestroy(void *exec)
{
    free(exec);
    return SUCCESS;
}

API hipError_t hipGraphDestroy(void *graph)
{
    free(graph);
    return SUCCESS;
}

API const char *hipGetErrorString(int code)
{
    return code == 719   ? "unspecified launch failure"
           : code == 101 ? "invalid device ordinal"
           : code == 100 ? "no ROCm-capable device is detected"
                         : "some error";
}
