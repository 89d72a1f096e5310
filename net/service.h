/* SPDX-License-Identifier: Apache-2.0 */
/* Skeleton of a service: readiness and watchdog to systemd (no-ops elsewhere), SIGTERM once =
 * drain, twice = end, inherited sockets, credentials, core pinning. */
#ifndef TD_NET_SERVICE_H
#define TD_NET_SERVICE_H

#include <stdint.h>

#include "base/err.h"
#include "net/loop.h"

typedef struct td_service td_service;

typedef struct td_service_ops {
    void (*drain)(void *arg); /* first SIGTERM or SIGINT: refuse new work, finish what runs, then
                                 td_loop_stop() */
    void (*stop)(
        void *arg); /* second signal, or the drain timeout: end now; then the loop is stopped */
    /* Asked before each watchdog ping: 1 healthy, 0 withhold the ping (an engine that is stuck). */
    int (*healthy)(void *arg);
} td_service_ops;

/* Install signal handlers (SIGTERM, SIGINT, SIGPIPE ignored), watchdog timer when WATCHDOG_USEC is
 * set. ops must live as long as the service. A loop that hangs stops the pings by itself: they come
 * from its timer. */
int td_service_new(td_loop *l, const td_service_ops *ops, void *arg, uint64_t drain_timeout_us,
                   td_service **ret_service);
void td_service_free(td_service *s);
/* READY=1 with a status line. */
void td_service_ready(td_service *s, const char *status);
/* STATUS=... (loading progress and the like). */
void td_service_status(td_service *s, const char *status);
int td_service_draining(const td_service *s);

/* Listening socket number i passed by the manager (LISTEN_FDS), or -ENOENT. */
int td_service_inherited(unsigned i);
/* Path of a credential in $CREDENTIALS_DIRECTORY, heap, or NULL. */
char *td_service_credential(const char *name);

/* Parse "0-3,6" into cores (at most max). Count, or -EINVAL with text. */
int td_cores_parse(const char *list, int *ret_cores, uint32_t max, td_err *reterr_err);
/* Cores granted to this process (sched_getaffinity). Count. */
int td_cores_granted(int *ret_cores, uint32_t max);
/* Pin the calling thread to one core; FTZ/DAZ are the engine's business. 0 or -errno. */
int td_core_pin(int core);

#endif
