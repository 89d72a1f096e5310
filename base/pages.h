/* SPDX-License-Identifier: Apache-2.0 */
/* Zeroed memory for a table of megabytes, on huge pages where the kernel gives them: the first
 * touch of 4 KiB pages costs more than filling them, and random look-ups miss the TLB. What is
 * smaller than TD_PAGES_MIN comes from the heap, so that a small table stays small. */
#ifndef TD_BASE_PAGES_H
#define TD_BASE_PAGES_H

#include <stddef.h>

enum { TD_PAGES_MIN = 4 << 20 };

/* NULL when out of memory. Only touched pages are resident. */
void *td_pages_alloc(size_t bytes);
/* bytes as at td_pages_alloc(); p may be NULL. */
void td_pages_free(void *p, size_t bytes);

#endif
