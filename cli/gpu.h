/* SPDX-License-Identifier: Apache-2.0 */
/* A GPU for commands that drive it themselves: `tandem tune`, `tandem selftest`. */
#ifndef TD_CLI_GPU_H
#define TD_CLI_GPU_H

#include "kernels/gpu/backend.h"

/* word: "hip", "cuda", or "auto" for the first that serves. -ENODEV, ... with text. */
int td_cli_gpu_open(const char *word, td_gpu **ret_gpu, const td_backend **ret_backend,
                    td_err *reterr_err);
void td_cli_gpu_close(td_gpu *g);

#endif
