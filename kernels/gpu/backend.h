/* SPDX-License-Identifier: Apache-2.0 */
/* The op table on a GPU: weights in the kernels' own tiles on the device, one stream, launches from
 * the thread that owns the queue. One device in a process: the table's weight calls name none.
 * Weights keep their format. BF16 operands meet BF16, FP8 and MXFP4 weights in the BF16 matrix
 * instruction; float32 operands or weights use the f32 one. Where the matrix instruction takes
 * scales (gfx950) the table has act_fp8. */
#ifndef TD_KERNELS_GPU_BACKEND_H
#define TD_KERNELS_GPU_BACKEND_H

#include "kernels/gpu/gpu.h"
#include "kernels/gpu/tune.h"
#include "kernels/kernels.h"

/* Find every kernel on g, which is borrowed until close, and make it the process's device. name of
 * the table as given ("hip", "cuda", "emu"), isa = g->arch.
 * -ENOENT  a kernel is missing: the text names it    -EBUSY  a device is open already */
int td_gpu_backend_open(td_gpu *g, const char *name, const td_backend **ret_backend,
                        td_err *reterr_err);
/* All queues are closed and all weights freed. */
void td_gpu_backend_close(void);

/* Launch plan of products: AUTO takes a tuned table's row, else decides by the number of rows.
 * Never changes a bit (numerics, rule 2). */
void td_gpu_backend_plan(td_gpu_plan plan);
/* Compute units of the device. */
uint32_t td_gpu_backend_cus(void);
/* Where AUTO looks; borrowed until close. NULL: by the number of rows only. */
void td_gpu_backend_tuned(td_tune_chooser *chooser);

/* What went wrong on the device since the last call, for people; "" = nothing. */
const char *td_gpu_backend_error(void);

#endif
