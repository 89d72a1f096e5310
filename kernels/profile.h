/* SPDX-License-Identifier: Apache-2.0 */
/* The numerics profile: everything that can change a bit, as canonical text (numerics, "Profile").
 */
#ifndef TD_KERNELS_PROFILE_H
#define TD_KERNELS_PROFILE_H

#include <stdint.h>

#include "kernels/kernels.h"

/* Classes of modules whose weights may have formats of their own. */
typedef enum td_weight_class {
    TD_WC_ATTENTION,
    TD_WC_DENSE,
    TD_WC_EMBED,
    TD_WC_EXPERTS,
    TD_WC_HEAD, /* tied: as embed */
    TD_WC_INDEX,
    TD_WC_ROUTER,
    TD_WC_SHARED,
    TD_WEIGHT_CLASSES
} td_weight_class;

typedef struct td_profile_spec {
    const td_backend *backend;
    const uint32_t *formats; /* [TD_WEIGHT_CLASSES] bits 1 << td_weight_format; 0: no such module */
    td_dtype act, kv, index;
    int act_i8;  /* operands that meet MXFP4 weights are int8 in groups of 32 */
    int act_fp8; /* ... are e4m3 in groups of 32 */
} td_profile_spec;

/* One sorted key=value a line. Heap; NULL when out of memory. id = BLAKE2b-128 of the text. */
char *td_profile_text(const td_profile_spec *spec, uint8_t ret_id[16]);

#endif
