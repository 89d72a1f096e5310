/* SPDX-License-Identifier: Apache-2.0 */
/* Every op of a backend against float64, on random and worst-case input, for the tests and for
 * `tandem selftest` on a real device. A check that fails leaves at once; the queue that it had open
 * is then lost. One check at a time on a backend. */
#ifndef TD_KERNELS_CHECKS_CHECKS_H
#define TD_KERNELS_CHECKS_CHECKS_H

#include <stddef.h>
#include <stdint.h>

#include "kernels/kernels.h"

/* What is checked. alloc: 64-byte aligned memory that both host and backend read and write, NULL
 * when there is none left; without it the host's own. What an op writes must be there when the op
 * returns: a device waits after each launch (td_check_gpu_open does that). */
typedef struct td_check_target {
    const td_backend *backend;
    int matrix; /* sums by matrix instructions, whose tree is the hardware's (numerics, rule 5) */
    void *(*alloc)(void *arg, size_t bytes);
    void (*free)(void *arg, void *p);
    void *arg;
} td_check_target;

typedef struct td_check_result {
    int failed, skipped;     /* skipped: the backend has nothing of what is checked */
    char text[320];          /* why */
    uint64_t n;              /* numbers compared with float64 */
    double error, tolerance; /* of the one that came nearest to its tolerance */
    uint64_t bits;           /* of outputs that lane orders and launch plans must not change */
} td_check_result;

typedef struct td_check td_check; /* a check that runs */

typedef struct td_check_case {
    const char *group, *name; /* "gemm", "quantised weights match float64" */
    void (*run)(td_check *c);
} td_check_case;

/* Ended by a row without a name. */
extern const td_check_case td_check_cases[];

void td_check_run(const td_check_case *k, const td_check_target *t, td_check_result *ret_result);

#endif
