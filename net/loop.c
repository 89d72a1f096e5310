/* SPDX-License-Identifier: Apache-2.0 */
#include "net/loop.h"

#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <event2/event.h>

#include "base/bug.h"
#include "base/clock.h"
#include "base/banned.h"

struct td_loop {
    struct event_base *base;
    struct event *wake, *once; /* eventfd; timeout of td_loop_run_once() */
    int wake_fd;
    atomic_int stop;
    struct event *signals[NSIG];
    td_timer_fn signal_fn[NSIG];
    void *signal_arg[NSIG];
    td_after *after_head, **after_tail;
    int after_gen; /* 1 or 2: tells what was added during a flush from what the flush must run */
    uint64_t lag_start_us;            /* current one-second window */
    uint64_t lag_now_us, lag_last_us; /* largest delay in this and in the window before */
};

struct td_io {
    struct event *ev;
    struct event_base *base;
    td_io_fn fn;
    void *arg;
};

struct td_timer {
    td_loop *loop;
    struct event *ev;
    uint64_t due_us, period_us;
    td_timer_fn fn;
    void *arg;
};

static void on_wake(evutil_socket_t fd, short what, void *arg)
{
    uint64_t n;
    if (read(fd, &n, sizeof n) < 0)
        return; /* EAGAIN: an earlier read took it */
}

static void on_once(evutil_socket_t fd, short what, void *arg) {}

static struct event_base *base_new(void)
{
    struct event_config *c = event_config_new();
    if (!c)
        return NULL;
    /* Precise: the default clock ticks every 4 ms. No cached time: a timer added late in a turn
     * must count from now. */
    event_config_set_flag(c, EVENT_BASE_FLAG_PRECISE_TIMER | EVENT_BASE_FLAG_NO_CACHE_TIME |
                                 EVENT_BASE_FLAG_NOLOCK);
    struct event_base *b = event_base_new_with_config(c);
    event_config_free(c);
    return b;
}

int td_loop_new(td_loop **ret_loop)
{
    td_loop *l = calloc(1, sizeof *l);
    if (!l)
        return -ENOMEM;
    l->wake_fd = -1;
    l->after_tail = &l->after_head;
    l->after_gen = 1;
    int r = -ENOMEM;
    if (!(l->base = base_new()))
        goto fail;
    l->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (l->wake_fd < 0) {
        r = -errno;
        goto fail;
    }
    l->wake = event_new(l->base, l->wake_fd, EV_READ | EV_PERSIST, on_wake, l);
    l->once = event_new(l->base, -1, 0, on_once, l);
    if (!l->wake || !l->once || event_add(l->wake, NULL))
        goto fail;
    *ret_loop = l;
    return 0;
fail:
    td_loop_free(l);
    return r;
}

void td_loop_free(td_loop *l)
{
    if (!l)
        return;
    for (int i = 0; i < NSIG; i++)
        if (l->signals[i])
            event_free(l->signals[i]);
    if (l->wake)
        event_free(l->wake);
    if (l->once)
        event_free(l->once);
    if (l->base)
        event_base_free(l->base);
    if (l->wake_fd >= 0)
        close(l->wake_fd);
    free(l);
}

/* What is added while this runs waits for the next turn, so that one that re-adds itself cannot
 * hold the loop. */
static void flush_after(td_loop *l)
{
    int gen = l->after_gen;
    l->after_gen = 3 - gen;
    while (l->after_head && l->after_head->pending == gen) {
        td_after *a = l->after_head;
        if (!(l->after_head = a->next))
            l->after_tail = &l->after_head;
        a->next = NULL;
        a->pending = 0;
        a->fn(a->arg);
    }
}

static int turn(td_loop *l, int flags)
{
    if (l->after_head)
        flags |= EVLOOP_NONBLOCK;
    int r = event_base_loop(l->base, flags | EVLOOP_ONCE);
    flush_after(l);
    return r < 0 ? -EIO : 0;
}

int td_loop_run(td_loop *l)
{
    int r = 0;
    while (!r && !atomic_load(&l->stop))
        r = turn(l, 0);
    atomic_store(&l->stop, 0);
    return r;
}

static struct timeval timeval_of(uint64_t us)
{
    return (struct timeval){.tv_sec = (time_t)(us / TD_S), .tv_usec = (suseconds_t)(us % TD_S)};
}

int td_loop_run_once(td_loop *l, uint64_t timeout_us)
{
    if (timeout_us == 0)
        return turn(l, EVLOOP_NONBLOCK);
    struct timeval tv = timeval_of(timeout_us);
    if (event_add(l->once, &tv))
        return -ENOMEM;
    int r = turn(l, 0);
    event_del(l->once);
    return r;
}

void td_loop_wake(td_loop *l)
{
    int saved = errno; /* may run in a signal handler */
    uint64_t one = 1;
    if (write(l->wake_fd, &one, sizeof one) < 0)
        TD_BUG_ON(errno != EAGAIN); /* full: a wake-up is pending anyway */
    errno = saved;
}

void td_loop_stop(td_loop *l)
{
    atomic_store(&l->stop, 1);
    td_loop_wake(l);
}

struct event_base *td_loop_base(td_loop *l)
{
    return l->base;
}

static void on_io(evutil_socket_t fd, short what, void *arg)
{
    td_io *io = arg;
    io->fn(io->arg, fd, (what & EV_READ ? TD_IO_READ : 0) | (what & EV_WRITE ? TD_IO_WRITE : 0));
}

static short io_flags(int events)
{
    return (short)(EV_PERSIST | (events & TD_IO_READ ? EV_READ : 0) |
                   (events & TD_IO_WRITE ? EV_WRITE : 0));
}

int td_io_add(td_loop *l, int fd, int events, td_io_fn fn, void *arg, td_io **ret_io)
{
    td_io *io = calloc(1, sizeof *io);
    if (!io)
        return -ENOMEM;
    *io = (td_io){.base = l->base, .fn = fn, .arg = arg};
    io->ev = event_new(l->base, fd, io_flags(events), on_io, io);
    if (!io->ev || (events && event_add(io->ev, NULL))) {
        td_io_del(io);
        return -ENOMEM;
    }
    *ret_io = io;
    return 0;
}

int td_io_set(td_io *io, int events)
{
    int fd = event_get_fd(io->ev);
    event_del(io->ev);
    if (!events)
        return 0;
    event_assign(io->ev, io->base, fd, io_flags(events), on_io, io);
    return event_add(io->ev, NULL) ? -ENOMEM : 0;
}

void td_io_del(td_io *io)
{
    if (!io)
        return;
    if (io->ev)
        event_free(io->ev);
    free(io);
}

static void lag_window(td_loop *l, uint64_t now)
{
    if (now - l->lag_start_us < TD_S)
        return;
    l->lag_last_us = now - l->lag_start_us < 2 * TD_S ? l->lag_now_us : 0;
    l->lag_now_us = 0;
    l->lag_start_us = now;
}

static void lag_add(td_loop *l, uint64_t now, uint64_t due)
{
    lag_window(l, now);
    if (now > due)
        l->lag_now_us = TD_MAX(l->lag_now_us, now - due);
}

uint64_t td_loop_lag_us(const td_loop *l)
{
    uint64_t age = td_now_us() - l->lag_start_us;
    if (age >= 2 * TD_S)
        return 0;
    return age >= TD_S ? l->lag_now_us : TD_MAX(l->lag_now_us, l->lag_last_us);
}

static int arm(td_timer *t, uint64_t now)
{
    struct timeval tv = timeval_of(t->due_us > now ? t->due_us - now : 0);
    return event_add(t->ev, &tv) ? -ENOMEM : 0;
}

static void on_timer(evutil_socket_t fd, short what, void *arg)
{
    td_timer *t = arg;
    uint64_t now = td_now_us();
    lag_add(t->loop, now, t->due_us);
    if (t->period_us) {
        t->due_us += t->period_us;
        if (t->due_us <= now)
            t->due_us = now + t->period_us;
        arm(t, now); /* before fn, which may delete the timer; re-adding a known event does not
                        allocate */
    }
    t->fn(t->arg);
}

int td_timer_add(td_loop *l, uint64_t delay_us, uint64_t period_us, td_timer_fn fn, void *arg,
                 td_timer **ret_timer)
{
    td_timer *t = calloc(1, sizeof *t);
    if (!t)
        return -ENOMEM;
    uint64_t now = td_now_us();
    *t = (td_timer){
        .loop = l, .due_us = now + delay_us, .period_us = period_us, .fn = fn, .arg = arg};
    t->ev = event_new(l->base, -1, 0, on_timer, t);
    if (!t->ev || arm(t, now)) {
        td_timer_del(t);
        return -ENOMEM;
    }
    *ret_timer = t;
    return 0;
}

void td_timer_set(td_timer *t, uint64_t delay_us)
{
    uint64_t now = td_now_us();
    t->due_us = now + delay_us;
    TD_BUG_ON(arm(
        t, now)); /* the event has its slot in the heap reserved: cannot fail for memory of ours */
}

void td_timer_stop(td_timer *t)
{
    event_del(t->ev);
}

void td_timer_del(td_timer *t)
{
    if (!t)
        return;
    if (t->ev)
        event_free(t->ev);
    free(t);
}

static void on_signal(evutil_socket_t signo, short what, void *arg)
{
    td_loop *l = arg;
    if (l->signal_fn[signo])
        l->signal_fn[signo](l->signal_arg[signo]);
}

int td_signal_add(td_loop *l, int signo, td_timer_fn fn, void *arg)
{
    if (signo <= 0 || signo >= NSIG)
        return -EINVAL;
    l->signal_fn[signo] = fn;
    l->signal_arg[signo] = arg;
    if (!fn) {
        if (l->signals[signo])
            event_free(l->signals[signo]);
        l->signals[signo] = NULL;
        return 0;
    }
    if (l->signals[signo])
        return 0;
    l->signals[signo] = evsignal_new(l->base, signo, on_signal, l);
    if (!l->signals[signo] || event_add(l->signals[signo], NULL))
        return -ENOMEM;
    return 0;
}

void td_loop_after(td_loop *l, td_after *a)
{
    if (a->pending)
        return;
    a->pending = l->after_gen;
    a->next = NULL;
    *l->after_tail = a;
    l->after_tail = &a->next;
}

void td_loop_after_del(td_loop *l, td_after *a)
{
    if (!a->pending)
        return;
    td_after **p = &l->after_head;
    while (*p != a)
        p = &(*p)->next;
    *p = a->next;
    if (l->after_tail == &a->next)
        l->after_tail = p;
    a->next = NULL;
    a->pending = 0;
}
