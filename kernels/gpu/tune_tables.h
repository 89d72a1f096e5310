/* SPDX-License-Identifier: Apache-2.0 */
/* The tables of launch plans that this build holds: kernels/tuned/<arch>.csv as they are. */
#ifndef TD_KERNELS_GPU_TUNE_TABLES_H
#define TD_KERNELS_GPU_TUNE_TABLES_H

#include <stddef.h>

/* Text of an architecture's table; NULL: there is none. Static storage. */
const char *td_tune_table(const char *arch, size_t *ret_n);
/* Number i of the architectures that have one; NULL behind the last. */
const char *td_tune_table_arch(size_t i);

#endif
