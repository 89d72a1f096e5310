/* SPDX-License-Identifier: Apache-2.0 */
/* One time unit: monotonic microseconds. */
#ifndef TD_BASE_CLOCK_H
#define TD_BASE_CLOCK_H

#include <stdint.h>

uint64_t td_now_us(void);
/* Wall clock, seconds since 1970: for `created` and log lines only. */
int64_t td_wall_s(void);

#define TD_MS 1000ull
#define TD_S  1000000ull

#endif
