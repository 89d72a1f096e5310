/* SPDX-License-Identifier: Apache-2.0 */
/* Measure the launch plans of one shape on the device that is open (kernels/gpu/backend.h). Every
 * candidate must give the bytes of the default plan, else it is refused; of the others the fastest
 * is chosen. Weights and operands are random. One at a time; the thread that opened the device. */
#ifndef TD_KERNELS_GPU_TUNE_RUN_H
#define TD_KERNELS_GPU_TUNE_RUN_H

#include "kernels/gpu/backend.h"

typedef struct td_tune_bench td_tune_bench;

typedef struct td_tune_settings {
    uint32_t repeats;   /* runs of a candidate that are timed; their median counts */
    size_t flush_bytes; /* written before each, so that weights come from memory; 0 = do not */
} td_tune_settings;

typedef struct td_tune_result {
    td_tuned_row row;     /* of the chosen plan */
    double us[3];         /* by td_gpu_plan; negative: not measured */
    char refused[2][200]; /* candidates that were refused, and why; "" = none */
} td_tune_result;

/* Weights of a key (cus and rows do not matter) of which at most max_rows rows will be measured.
 * -ENOMEM: they do not fit the device. */
int td_tune_bench_open(td_gpu *g, const td_backend *be, const td_tune_key *key, uint32_t max_rows,
                       const td_tune_settings *settings, td_tune_bench **ret_bench,
                       td_err *reterr_err);
/* rows: a row class. -EIO and the like: the device failed; a refused candidate is no failure. */
int td_tune_bench_run(td_tune_bench *b, uint32_t rows, td_tune_result *ret_result,
                      td_err *reterr_err);
void td_tune_bench_close(td_tune_bench *b);

#endif
