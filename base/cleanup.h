/* SPDX-License-Identifier: Apache-2.0 */
/* Scope cleanup and take: early return without leaks. */
#ifndef TD_BASE_CLEANUP_H
#define TD_BASE_CLEANUP_H

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define TD_CLEANUP(f) __attribute__((cleanup(f)))

/* Move a pointer out of its variable, leaving NULL. */
#define TD_TAKE(p)                                                                                 \
    ({                                                                                             \
        __typeof__(p) td_taken_ = (p);                                                             \
        (p) = NULL;                                                                                \
        td_taken_;                                                                                 \
    })

static inline void td_cleanup_free(void *p)
{
    free(*(void **)p);
}

static inline void td_cleanup_close(int *fd)
{
    if (*fd >= 0)
        close(*fd);
}

static inline void td_cleanup_fclose(FILE **f)
{
    if (*f)
        fclose(*f);
}

#define TD_AUTO_FREE   TD_CLEANUP(td_cleanup_free)
#define TD_AUTO_CLOSE  TD_CLEANUP(td_cleanup_close)
#define TD_AUTO_FCLOSE TD_CLEANUP(td_cleanup_fclose)

#endif
