/* SPDX-License-Identifier: Apache-2.0 */
/* Secrets: compared in a time that tells nothing, and erased in a way that no compiler removes. */
#ifndef TD_BASE_SECRET_H
#define TD_BASE_SECRET_H

#include <stddef.h>

/* 1 when the n bytes are equal; the time depends on n only. */
int td_secret_equal(const void *a, const void *b, size_t n);
/* Overwrite; bytes may be NULL when n is 0. */
void td_secret_wipe(void *bytes, size_t n);

#endif
