/* SPDX-License-Identifier: Apache-2.0 */
/* The numerics profile: everything that can change a bit, as canonical text (numerics, "Profile").
 */
#ifndef TD_KERNELS_PROFILE_H
#define TD_KERNELS_PROFILE_H

#include <stdint.h>

#include "kernels/kernels.h"

typedef struct td_profile_spec {
    const td_backend *backend;
    const char *weights; /* weight dtype of the block matrices, e.g. "bf16" */
    const char *head;    /* of embedding and head */
    td_dtype act, kv, index;
} td_profile_spec;

/* One sorted key=value a line. Heap; NULL when out of memory. id = BLAKE2b-128 of the text. */
char *td_profile_text(const td_profile_spec *spec, uint8_t ret_id[16]);

#endif
