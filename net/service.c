/* SPDX-License-Identifier: Apache-2.0 */
#include "net/service.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <systemd/sd-daemon.h>

#include "base/clock.h"
#include "base/file.h"
#include "base/banned.h"

struct td_service {
    td_loop *loop;
    const td_service_ops *ops;
    void *arg;
    uint64_t drain_timeout_us;
    td_timer *watchdog, *drain;
    int draining, stopped;
};

static void stop(void *arg)
{
    td_service *s = arg;
    if (s->stopped)
        return;
    s->stopped = 1;
    if (s->ops->stop)
        s->ops->stop(s->arg);
    td_loop_stop(s->loop);
}

static void on_signal(void *arg)
{
    td_service *s = arg;
    if (s->draining) {
        stop(s);
        return;
    }
    s->draining = 1;
    sd_notify(0, "STOPPING=1\nSTATUS=draining");
    if (!s->ops->drain || td_timer_add(s->loop, s->drain_timeout_us, 0, stop, s, &s->drain)) {
        stop(s);
        return;
    }
    s->ops->drain(s->arg);
}

static void on_watchdog(void *arg)
{
    td_service *s = arg;
    if (!s->ops->healthy || s->ops->healthy(s->arg))
        sd_notify(0, "WATCHDOG=1");
}

int td_service_new(td_loop *l, const td_service_ops *ops, void *arg, uint64_t drain_timeout_us,
                   td_service **ret_service)
{
    td_service *s = calloc(1, sizeof *s);
    if (!s)
        return -ENOMEM;
    *s = (td_service){.loop = l, .ops = ops, .arg = arg, .drain_timeout_us = drain_timeout_us};
    uint64_t watchdog_us = 0;
    signal(SIGPIPE, SIG_IGN);
    int r = td_signal_add(l, SIGTERM, on_signal, s);
    if (!r)
        r = td_signal_add(l, SIGINT, on_signal, s);
    /* half of the limit, as sd_watchdog_enabled(3) advises */
    if (!r && sd_watchdog_enabled(0, &watchdog_us) > 0)
        r = td_timer_add(l, 0, watchdog_us / 2, on_watchdog, s, &s->watchdog);
    if (r) {
        td_service_free(s);
        return r;
    }
    *ret_service = s;
    return 0;
}

void td_service_free(td_service *s)
{
    if (!s)
        return;
    td_signal_add(s->loop, SIGTERM, NULL, NULL);
    td_signal_add(s->loop, SIGINT, NULL, NULL);
    td_timer_del(s->watchdog);
    td_timer_del(s->drain);
    free(s);
}

void td_service_ready(td_service *s, const char *status)
{
    sd_notifyf(0, "READY=1\nSTATUS=%s", status);
}

void td_service_status(td_service *s, const char *status)
{
    sd_notifyf(0, "STATUS=%s", status);
}

int td_service_draining(const td_service *s)
{
    return s->draining;
}

int td_service_inherited(unsigned i)
{
    int n = sd_listen_fds(0);
    return n > 0 && i < (unsigned)n ? SD_LISTEN_FDS_START + (int)i : -ENOENT;
}

char *td_service_credential(const char *name)
{
    const char *dir = getenv("CREDENTIALS_DIRECTORY");
    struct stat st;
    if (!dir || !*dir || !*name || strchr(name, '/') || !strcmp(name, "..") || !strcmp(name, "."))
        return NULL;
    char *path = td_path_join(dir, name);
    if (path && stat(path, &st) == 0 && S_ISREG(st.st_mode))
        return path;
    free(path);
    return NULL;
}

/* ---- cores ---- */

/* A decimal number at *p; -EINVAL when there is none or it is no core. */
static int parse_core(const char **p)
{
    int v = 0;
    if (**p < '0' || **p > '9')
        return -EINVAL;
    for (; **p >= '0' && **p <= '9'; (*p)++)
        if ((v = v * 10 + (**p - '0')) >= CPU_SETSIZE)
            return -EINVAL;
    return v;
}

static int add_core(int core, int *cores, uint32_t *n, uint32_t max)
{
    for (uint32_t i = 0; i < *n; i++)
        if (cores[i] == core)
            return -EEXIST;
    if (*n == max)
        return -E2BIG;
    cores[(*n)++] = core;
    return 0;
}

int td_cores_parse(const char *list, int *ret_cores, uint32_t max, td_err *reterr_err)
{
    uint32_t n = 0;
    for (const char *p = list;; p++) {
        int from = parse_core(&p), to = from;
        if (from >= 0 && *p == '-') {
            p++;
            to = parse_core(&p);
        }
        if (from < 0 || to < from || (*p && *p != ','))
            return td_err_set(reterr_err, -EINVAL,
                              "cores `%.80s`: write numbers and ranges, e.g. 0-3,6", list);
        for (int c = from; c <= to; c++) {
            int r = add_core(c, ret_cores, &n, max);
            if (r == -EEXIST)
                return td_err_set(reterr_err, -EINVAL, "cores `%.80s`: %d stands twice", list, c);
            if (r)
                return td_err_set(reterr_err, -EINVAL, "cores `%.80s`: more than %u", list, max);
        }
        if (!*p)
            return (int)n;
    }
}

int td_cores_granted(int *ret_cores, uint32_t max)
{
    cpu_set_t set;
    uint32_t n = 0;
    CPU_ZERO(&set);
    if (sched_getaffinity(0, sizeof set, &set) < 0)
        return -errno;
    for (int c = 0; c < CPU_SETSIZE && n < max; c++)
        if (CPU_ISSET(c, &set))
            ret_cores[n++] = c;
    return (int)n;
}

int td_core_pin(int core)
{
    cpu_set_t set;
    if (core < 0 || core >= CPU_SETSIZE)
        return -EINVAL;
    CPU_ZERO(&set);
    CPU_SET(core, &set);
    return sched_setaffinity(0, sizeof set, &set) < 0 ? -errno : 0;
}
