/* SPDX-License-Identifier: Apache-2.0 */
/* The kernels as they were compiled into this build: one object for each architecture whose
 * compiler was found (kernels/hip/CMakeLists.txt). */
#ifndef TD_KERNELS_GPU_OBJECTS_H
#define TD_KERNELS_GPU_OBJECTS_H

#include "kernels/gpu/gpu.h"

/* For td_gpu_open(); *ret_n may be 0. Static storage. */
const td_gpu_object *td_gpu_objects(size_t *ret_n);

#endif
