/* SPDX-License-Identifier: Apache-2.0 */
/* The checks of kernels/checks as tests: RUN_CHECKS("gemm") runs a group on every instruction set
 * of this machine, or in the emulation. */
#ifndef TD_TESTS_CHECKS_UTIL_H
#define TD_TESTS_CHECKS_UTIL_H

#include "tests/kernels/kernels_util.h"

#include "kernels/checks/checks.h"

enum { CHECKS_MAX = 64 };

static inline void run_check(void **state)
{
    td_check_target t = {.backend = under, .matrix = MATRIX};
    td_check_result r;
    td_check_run(*state, &t, &r);
    if (r.failed)
        fail_msg("%s", r.text);
}

/* Their number. */
static inline size_t checks_of(const char *group, struct CMUnitTest out[CHECKS_MAX])
{
    size_t n = 0;
    for (const td_check_case *k = td_check_cases; k->name; k++)
        if (strcmp(k->group, group) == 0 && n < CHECKS_MAX)
            out[n++] = (struct CMUnitTest){
                .name = k->name, .test_func = run_check, .initial_state = (void *)(uintptr_t)k};
    assert_true(n > 0 && n < CHECKS_MAX);
    return n;
}

#define RUN_CHECKS(group)                                                                          \
    do {                                                                                           \
        struct CMUnitTest checks_[CHECKS_MAX] = {0};                                               \
        checks_of(group, checks_);                                                                 \
        RUN_FOR_EVERY_ISA(checks_);                                                                \
    } while (0)

#endif
