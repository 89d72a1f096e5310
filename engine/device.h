/* SPDX-License-Identifier: Apache-2.0 */
/* What computes, by a word of --device. One GPU in a process; HIP_VISIBLE_DEVICES and
 * CUDA_VISIBLE_DEVICES choose among several. */
#ifndef TD_ENGINE_DEVICE_H
#define TD_ENGINE_DEVICE_H

#include <stddef.h>

#include "base/err.h"
#include "kernels/kernels.h"

struct td_gpu_object; /* kernels/gpu/gpu.h */

typedef struct td_device td_device;

typedef struct td_device_spec {
    const char *word; /* "cpu", "hip", "cuda", "auto" */
    const char *isa;  /* kernels of the CPU; a GPU takes "auto" only */
    int strict;       /* auto: a GPU that is there and does not serve is an error */
    const struct td_gpu_object *objects; /* NULL: those of this build */
    size_t n_objects;
} td_device_spec;

/* cpu: no driver is touched. hip, cuda: that device, or an error that says what is missing and what
 * to do. auto: the first GPU that serves, else the CPU. */
int td_device_open(const td_device_spec *spec, td_device **ret_device, td_err *reterr_err);
/* For td_model_options.backend: NULL = the CPU's, by isa. */
const td_backend *td_device_backend(const td_device *d);
/* What was taken and, of auto, why: for people, one line. */
const char *td_device_text(const td_device *d);
/* auto took the CPU although there is a GPU. */
int td_device_is_fallback(const td_device *d);
/* The driver's last complaint, for people; "" = none. */
const char *td_device_error(const td_device *d);
/* After every model and engine on it. */
void td_device_close(td_device *d);

#endif
