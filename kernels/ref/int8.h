/* SPDX-License-Identifier: Apache-2.0 */
/* Int8 operands (td_backend_options.act_i8): where an operand of BF16 meets an MXFP4 matrix, each
 * group of 32 of a row becomes int8 with the scale max|a| / 127. A group's products are summed as
 * integers, exactly; groups are added in f32, in order. */
#ifndef TD_KERNELS_REF_INT8_H
#define TD_KERNELS_REF_INT8_H

#include <stdint.h>

#include "kernels/ref/ref.h"

/* An MXFP4 matrix: beside its values, twice the elements as integers, and the scales. */
typedef struct ref_mx {
    td_tensor v;
    int8_t *doubled; /* [slabs][n_panels][K][16] */
    float *scales;   /* [slabs][n_panels][K/32][16] */
} ref_mx;

/* 0, -ENOMEM: for a shape that v has already. */
int td_ref_mx_alloc(ref_mx *w);
void td_ref_mx_free(ref_mx *w);
/* Row n of a slab, from its codes and scales as td_weight_src has them. */
void td_ref_mx_fill(ref_mx *w, uint32_t slab, uint32_t n, const uint8_t *codes,
                    const uint8_t *scales);

/* Do operands that meet w become int8? */
static inline int ref_is_i8(const td_queue *q, const td_tensor *w)
{
    return q->o.act_i8 && q->o.act == TD_BF16 && w->format == TD_W_MXFP4;
}

/* One row, or two, against a panel of any format. k0, k1: multiples of 32 where the format has
 * groups. */
void td_ref_meet1(const td_queue *q, const float *a, const td_tensor *w, uint32_t slab,
                  uint32_t panel, uint32_t k0, uint32_t k1, float out[LANES]);
void td_ref_meet2(const td_queue *q, const float *a, const float *b, const td_tensor *w,
                  uint32_t slab, uint32_t panel, uint32_t k0, uint32_t k1, float out[2 * LANES]);

#endif
