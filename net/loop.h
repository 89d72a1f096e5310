/* SPDX-License-Identifier: Apache-2.0 */
/* The event loop of a service: descriptors, timers, signals; precise clock. One thread owns a loop;
 * only td_loop_wake() and td_loop_stop() may be called from others. A turn = handle every ready
 * event, then run what td_loop_after() asked for. Callbacks may add and delete anything, themselves
 * included, but may not run or free the loop. */
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
/* Run until td_loop_stop(); a stop that came before is honoured by the next run. 0, or -EIO when
 * the kernel's event facility failed. */
int td_loop_run(td_loop *l);
/* Run whatever is ready, waiting at most timeout_us for the first event (tests, tools). */
int td_loop_run_once(td_loop *l, uint64_t timeout_us);
/* End td_loop_run() after the current turn. Any thread; async-signal-safe. */
void td_loop_stop(td_loop *l);
/* Make the loop do a turn now. Any thread; async-signal-safe. */
void td_loop_wake(td_loop *l);

/* Watch a descriptor (level-triggered, persistent). The descriptor stays the caller's. */
int td_io_add(td_loop *l, int fd, int events, td_io_fn fn, void *arg, td_io **ret_io);
/* Watch for other events from now on; 0 pauses. */
int td_io_set(td_io *io, int events);
void td_io_del(td_io *io); /* NULL is fine; before the descriptor is closed */

/* Call fn once after delay_us, then every period_us when period_us > 0. Never early; periods that
 * were missed are skipped, not made up for. */
int td_timer_add(td_loop *l, uint64_t delay_us, uint64_t period_us, td_timer_fn fn, void *arg,
                 td_timer **ret_timer);
void td_timer_set(td_timer *t, uint64_t delay_us); /* re-arm a one-shot */
void td_timer_stop(td_timer *t);                   /* until the next td_timer_set() */
void td_timer_del(td_timer *t);                    /* NULL is fine */

/* Call fn on the loop when the process gets signo; replaces an earlier fn, NULL gives the signal
 * back. One loop of the process takes signals. */
int td_signal_add(td_loop *l, int signo, td_timer_fn fn, void *arg);

/* Run fn at the end of the current turn, after all ready events were handled (flush output once per
 * wake-up). Added again while pending: once. The struct is embedded by the caller and must live
 * until it ran or is removed. */
typedef struct td_after {
    void (*fn)(void *arg);
    void *arg;
    struct td_after *next;
    int pending;
} td_after;
void td_loop_after(td_loop *l, td_after *a);
void td_loop_after_del(td_loop *l, td_after *a);

/* Largest delay seen between a timer's due time and its run in the last second, microseconds: a
 * late observer never accuses (architecture, section 5). */
uint64_t td_loop_lag_us(const td_loop *l);

/* The event_base, for net's own files. */
struct event_base *td_loop_base(td_loop *l);

#endif
