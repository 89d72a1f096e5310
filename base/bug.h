/* SPDX-License-Identifier: Apache-2.0 */
/* Checks for programmers' errors, kept in release. Bytes from outside are never a bug. */
#ifndef TD_BASE_BUG_H
#define TD_BASE_BUG_H

/* Print file, line and the condition to stderr, then abort. */
_Noreturn void td_bug_fail(const char *file, int line, const char *cond);

#define TD_BUG_ON(cond)                                                                            \
    do {                                                                                           \
        if (__builtin_expect(!!(cond), 0))                                                         \
            td_bug_fail(__FILE__, __LINE__, #cond);                                                \
    } while (0)

#define TD_STATIC_ASSERT(cond) _Static_assert(cond, #cond)
#define TD_ARRAY_LEN(a)        (sizeof(a) / sizeof((a)[0]))
#define TD_MIN(a, b)           ((a) < (b) ? (a) : (b))
#define TD_MAX(a, b)           ((a) > (b) ? (a) : (b))

#endif
