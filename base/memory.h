/* SPDX-License-Identifier: Apache-2.0 */
/* How much memory this process may use. */
#ifndef TD_BASE_MEMORY_H
#define TD_BASE_MEMORY_H

#include <stdint.h>

/* Bytes: the machine's memory, or less where a control group (v2, or v1's memory controller) above
 * the process is limited. */
uint64_t td_memory_limit(void);
/* The same of other files, for tests: memory's size, the text of /proc/self/cgroup, and where the
 * control groups are mounted (/sys/fs/cgroup). */
uint64_t td_memory_limit_of(uint64_t total, const char *cgroups, const char *mount);

#endif
