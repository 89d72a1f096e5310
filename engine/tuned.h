/* SPDX-License-Identifier: Apache-2.0 */
/* Tuned launch plans of the device that is open: a table from a folder or from this build, and what
 * was launched without a row of it. Opened and closed by the thread that opens the device. */
#ifndef TD_ENGINE_TUNED_H
#define TD_ENGINE_TUNED_H

#include "base/err.h"
#include "kernels/gpu/tune.h"
#include "kernels/kernels.h"

typedef struct td_tuning td_tuning;

/* DIR/<arch>.csv, dir "": the table of this build. be: td_device_backend()'s; NULL (the CPU, which
 * has one plan) gives NULL. From now on launches take their plan from it. -ENOENT, -EINVAL with
 * file, line and field. */
int td_tuning_open(const td_backend *be, const char *dir, td_tuning **ret_tuning,
                   td_err *reterr_err);
/* --strict: -EINVAL with their number and the first when the model of DIR launches shapes of up to
 * max_rows rows that have no row; act_fp8 as td_shapes_add(). t NULL: 0. */
int td_tuning_require(const td_tuning *t, const char *dir, uint32_t max_rows, int act_fp8,
                      td_err *reterr_err);
/* Launches without a row so far, each kind once; any thread. 0 for NULL. */
size_t td_tuning_untuned(const td_tuning *t);
/* Is number i the first of its shape, whatever the number of rows? text: room for its name. */
int td_tuning_untuned_text(const td_tuning *t, size_t i, char *text, size_t n);
/* Before the device; NULL is fine. */
void td_tuning_close(td_tuning *t);

#endif
