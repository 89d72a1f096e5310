/* SPDX-License-Identifier: Apache-2.0 */
/* A GPU as the target of checks: what host and device share is page-locked host memory, and each
 * launch is waited for, so that a check reads results as it does on a CPU. */
#ifndef TD_KERNELS_CHECKS_GPU_H
#define TD_KERNELS_CHECKS_GPU_H

#include "kernels/checks/checks.h"
#include "kernels/gpu/backend.h"

typedef struct td_check_gpu td_check_gpu;

/* g is open with that backend and both outlive this; until close no launch of g is asynchronous.
 * -ENOMEM with text. */
int td_check_gpu_open(td_gpu *g, const td_backend *backend, td_check_gpu **ret_gpu,
                      td_err *reterr_err);
const td_check_target *td_check_gpu_target(const td_check_gpu *c);
void td_check_gpu_close(td_check_gpu *c);

#endif
