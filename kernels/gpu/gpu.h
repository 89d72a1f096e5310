/* SPDX-License-Identifier: Apache-2.0 */
/* A GPU, thinly: device, memory, streams, events, launches, captured graphs, with one table of
 * calls for every kind. HIP and CUDA are the drivers' own libraries, opened at run time, so one
 * binary runs where neither exists; the emulation (kernels/hip/emu.hpp) is a third kind. Calls that
 * can fail return 0 or a negative errno and leave a text for people in error. A td_gpu belongs to
 * one thread at a time: whoever takes it over calls use() first. */
#ifndef TD_KERNELS_GPU_GPU_H
#define TD_KERNELS_GPU_GPU_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"

typedef struct td_gpu td_gpu;

/* Kernels compiled for one architecture: "gfx942", "gfx950", "sm_90". */
typedef struct td_gpu_object {
    const char *arch;
    const void *bytes;
    size_t n_bytes;
} td_gpu_object;

typedef enum td_gpu_kind { TD_GPU_HIP, TD_GPU_CUDA, TD_GPU_KINDS } td_gpu_kind;

/* "hip", "cuda". */
const char *td_gpu_kind_name(td_gpu_kind k);

typedef struct td_gpu_dim {
    uint32_t grid, block; /* blocks; threads of one */
    uint32_t lds_bytes;   /* dynamic LDS (shared memory) of a block */
} td_gpu_dim;

/* Pointers to device memory are plain pointers that the host does not follow. Handles are the
 * driver's. */
typedef struct td_gpu_ops {
    void (*close)(td_gpu *g);
    /* Make the calling thread the one that drives this device. */
    int (*use)(td_gpu *g);

    /* Device memory; NULL when there is none left. Contents are undefined. */
    void *(*mem_alloc)(td_gpu *g, size_t bytes);
    void (*mem_free)(td_gpu *g, void *p);
    /* Page-locked host memory, which copies to and from without a detour. */
    void *(*host_alloc)(td_gpu *g, size_t bytes);
    void (*host_free)(td_gpu *g, void *p);
    int (*mem_info)(td_gpu *g, size_t *ret_free, size_t *ret_total);

    /* In order of their stream. From pageable host memory upload() has read src on return. */
    int (*upload)(td_gpu *g, void *stream, void *dst, const void *src, size_t bytes);
    int (*download)(td_gpu *g, void *stream, void *dst, const void *src, size_t bytes);
    int (*copy)(td_gpu *g, void *stream, void *dst, const void *src, size_t bytes);
    int (*fill)(td_gpu *g, void *stream, void *dst, uint8_t value, size_t bytes);

    int (*stream_new)(td_gpu *g, void **ret_stream);
    void (*stream_free)(td_gpu *g, void *stream);
    int (*stream_wait)(td_gpu *g, void *stream); /* blocks the host */
    int (*event_new)(td_gpu *g, void **ret_event);
    void (*event_free)(td_gpu *g, void *event);
    int (*event_record)(td_gpu *g, void *event, void *stream);
    int (*event_after)(td_gpu *g, void *stream, void *event); /* stream waits for event */
    int (*event_done)(td_gpu *g, void *event); /* 1 passed, 0 not yet: never blocks */
    int (*event_wait)(td_gpu *g, void *event); /* blocks the host */
    int (*event_ms)(td_gpu *g, void *from, void *to, float *ret_ms); /* both have passed */
    /* fn(arg) on some thread when everything queued before has been done, never when it failed. fn
     * calls no driver. */
    int (*host_call)(td_gpu *g, void *stream, void (*fn)(void *), void *arg);

    /* A kernel by name; -ENOENT. Lives as long as the td_gpu. */
    int (*kernel)(td_gpu *g, const char *name, void **ret_kernel);
    /* args is the kernel's one parameter, a struct; read before the call returns. */
    int (*launch)(td_gpu *g, void *stream, void *kernel, td_gpu_dim dim, const void *args,
                  size_t args_bytes);

    /* What is queued between begin and end is recorded, not run. */
    int (*graph_begin)(td_gpu *g, void *stream);
    int (*graph_end)(td_gpu *g, void *stream, void **ret_graph);
    int (*graph_launch)(td_gpu *g, void *stream, void *graph);
    void (*graph_free)(td_gpu *g, void *graph);
} td_gpu_ops;

struct td_gpu {
    const td_gpu_ops *ops;
    char name[96];        /* of the device */
    char driver[64];      /* the library that was opened */
    char arch[16];        /* of the code object that loaded */
    uint32_t wave, n_cus; /* lanes of a wave; compute units */
    uint32_t lds_bytes;   /* most that a block may ask for */
    char error[300];      /* of the last call that failed */
};

/* Open device number `ordinal` of a kind and load the first of the objects that it accepts. Fails,
 * never crashes, on a machine without such a device; the text says which step failed and what to
 * do.
 * -ENOENT  no driver library    -ENODEV  a driver, but no device    -ENOEXEC  no object fits
 * -ENOSYS  the driver lacks a call    -EIO  the driver failed    -ENOMEM */
int td_gpu_open(td_gpu_kind kind, uint32_t ordinal, const td_gpu_object *objects, size_t n_objects,
                td_gpu **ret_gpu, td_err *reterr_err);
void td_gpu_close(td_gpu *g);

#endif
