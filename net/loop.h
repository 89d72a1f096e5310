/* SPDX-License-Identifier: Apache-2.0 */
/* The event loop of a service: descriptors, timers, signals; precise clock. One thread owns a loop; only td_loop_wake()
 * and td_loop_stop() may be called from others. */
#ifndef TD_NET_LOOP_H
#define TD_NET_LOOP_H

#include <stdint.h>

typedef struct td_loop td_loop;
typedef struct td_io td_io;
typedef struct td_timer td_timer;

enum { TD_IO_READ = 1, TD_IO_WRITE = 2 };
typedef void (*td_io_fn)(void *arg, int fd, int events);
typedef void (*td_timer_fn)(void *arg);

int td_loop_new(td_loop **ret_loop);
void td_loop_free(td_loop *l);
/* Run until td_loop_stop(). */
int td_loop_run(td_loop *l);
/* Run whatever is ready, waiting at most timeout_us for the first event (tests, tools). */
int td_loop_run_once(td_loop *l, uint64_t timeout_us);
void td_loop_stop(td_loop *l);

/* Watch a descriptor (level-triggered, persistent). The descriptor stays the caller's. */
int td_io_add(td_loop *l, int fd, int events, td_io_fn fn, void *arg, td_io **ret_io);
void td_io_del(td_io *io); /* NULL is fine */

/* Call fn once after delay_us, or every period_us when period_us > 0. */
int td_timer_add(td_loop *l, uint64_t delay_us, uint64_t period_us, td_timer_fn fn, void *arg, td_timer **ret_timer);
void td_timer_set(td_timer *t, uint64_t delay_us); /* re-arm a one-shot */
void td_timer_del(td_timer *t);

/* Call fn on the loop when the process gets signo. */
int td_signal_add(td_loop *l, int signo, td_timer_fn fn, void *arg);

/* Run fn at the end of the current turn, after all ready events were handled (flush output once per wake-up).
 * Added again while pending: once. The struct is embedded by the caller and must live until it ran or is removed. */
typedef struct td_after {
    void (*fn)(void *arg);
    void *arg;
    struct td_after *next;
    int pending;
} td_after;
void td_loop_after(td_loop *l, td_after *a);
void td_loop_after_del(td_loop *l, td_after *a);

/* Largest delay seen between a timer's due time and its run in the last second, microseconds: a late observer never
 * accuses (architecture, section 5). */
uint64_t td_loop_lag_us(const td_loop *l);

/* The event_base, for net's own files. */
struct event_base *td_loop_base(td_loop *l);

#endif
