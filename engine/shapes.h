/* SPDX-License-Identifier: Apache-2.0 */
/* The products that a model's forward pass launches on a GPU and that have a choice of launch plan:
 * what `tandem tune` measures, and what a start looks up. From config.json and its
 * quantization_config alone, so that a table can be made before the weights are there. Any thread.
 */
#ifndef TD_ENGINE_SHAPES_H
#define TD_ENGINE_SHAPES_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "kernels/gpu/tune.h"

typedef struct td_shape {
    td_tune_key key; /* cus and rows are 0 */
    /* This engine launches it. Not: shares of more than one rank, and experts with the shared one
     * among them (E + 1, top k + 1), which are measured for what comes. */
    int launched;
} td_shape;

typedef struct td_shapes {
    td_shape *data; /* each key once */
    size_t n, cap;
} td_shapes;

/* All shapes of DIR/config.json on each of these numbers of ranks; one that does not divide the
 * model's heads and widths is -EINVAL. act_fp8: MXFP4 weights meet FP8 operands. Append to *shapes,
 * which is zeroed or was filled before. */
int td_shapes_add(const char *dir, const uint32_t *ranks, size_t n_ranks, int act_fp8,
                  td_shapes *shapes, td_err *reterr_err);
void td_shapes_done(td_shapes *s);

/* Launched shapes of at most max_rows rows without a row in the table, of a device of cus compute
 * units: each with its row class. Returns their number; at most max go to ret_keys, which may be
 * NULL when max is 0. */
size_t td_shapes_untuned(const td_shapes *s, const td_tuned *t, uint32_t cus, uint32_t max_rows,
                         td_tune_key *ret_keys, size_t max);

#endif
