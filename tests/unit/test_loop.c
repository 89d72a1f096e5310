/* SPDX-License-Identifier: Apache-2.0 */
/* Guards: precise timers (libevent's default clock is 4 ms coarse), one flush per turn, wake and
 * stop from other threads, and the lag that keeps a late observer from accusing. */
#include "net/loop.h"

#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/clock.h"

typedef struct fixture {
    td_loop *loop;
    int n, m, order[16];
    td_timer *timer;
    td_io *io, *other;
    td_after a, b;
    uint64_t at_us;
} fixture;

static int setup(void **state)
{
    fixture *f = calloc(1, sizeof *f);
    *state = f;
    return td_loop_new(&f->loop);
}

static int teardown(void **state)
{
    fixture *f = *state;
    td_loop_free(f->loop);
    free(f);
    return 0;
}

static void stop(void *arg)
{
    fixture *f = arg;
    f->n++;
    f->at_us = td_now_us();
    td_loop_stop(f->loop);
}

/* The coarse clock made a 5 ms timer fire at 8.4 ms. Best of several: the machine may be busy, the
 * clock may not. */
static void timer_is_precise_and_never_early(void **state)
{
    fixture *f = *state;
    uint64_t best = UINT64_MAX;
    for (int i = 0; i < 20; i++) {
        uint64_t start = td_now_us();
        assert_int_equal(td_timer_add(f->loop, 5 * TD_MS, 0, stop, f, &f->timer), 0);
        assert_int_equal(td_loop_run(f->loop), 0);
        assert_true(f->at_us - start >= 5 * TD_MS);
        if (f->at_us - start < best)
            best = f->at_us - start;
        td_timer_del(f->timer);
    }
    assert_true(best < 6500);
}

static void spin_then_arm(void *arg)
{
    fixture *f = arg;
    uint64_t start = td_now_us();
    while (td_now_us() - start < 20 * TD_MS)
        ;
    f->at_us = td_now_us();
    td_timer_del(f->timer);
    td_timer_add(f->loop, 10 * TD_MS, 0, stop, f, &f->timer);
}

/* libevent's cached time made a timer that was added late in a callback fire early. */
static void delay_counts_from_the_call(void **state)
{
    fixture *f = *state;
    td_timer_add(f->loop, 0, 0, spin_then_arm, f, &f->timer);
    td_loop_run_once(f->loop, TD_S);
    uint64_t armed = f->at_us;
    td_loop_run(f->loop);
    assert_true(f->at_us - armed >= 10 * TD_MS);
    td_timer_del(f->timer);
}

static void count_to_five(void *arg)
{
    fixture *f = arg;
    if (++f->n == 5) {
        td_timer_del(f->timer); /* inside its own callback */
        td_loop_stop(f->loop);
    }
}

static void periodic_timer_repeats_and_dies_inside(void **state)
{
    fixture *f = *state;
    uint64_t start = td_now_us();
    td_timer_add(f->loop, TD_MS, 2 * TD_MS, count_to_five, f, &f->timer);
    td_loop_run(f->loop);
    assert_int_equal(f->n, 5);
    assert_true(td_now_us() - start >= 9 * TD_MS);
}

static void stopped_timer_is_silent_until_set(void **state)
{
    fixture *f = *state;
    td_timer_add(f->loop, TD_MS, 0, stop, f, &f->timer);
    td_timer_stop(f->timer);
    td_loop_run_once(f->loop, 5 * TD_MS);
    assert_int_equal(f->n, 0);
    td_timer_set(f->timer, TD_MS);
    td_loop_run(f->loop);
    assert_int_equal(f->n, 1);
    td_timer_del(f->timer);
}

static void after_a(void *arg)
{
    fixture *f = arg;
    f->order[f->n++] = 1;
    td_loop_after(f->loop, &f->a); /* again: next turn, not this one */
}

static void after_b(void *arg)
{
    fixture *f = arg;
    f->order[f->n++] = 2;
}

static void after_runs_once_a_turn_in_order(void **state)
{
    fixture *f = *state;
    f->a = (td_after){.fn = after_a, .arg = f};
    f->b = (td_after){.fn = after_b, .arg = f};
    td_loop_after(f->loop, &f->a);
    td_loop_after(f->loop, &f->b);
    td_loop_after(f->loop, &f->a);
    assert_int_equal(td_loop_run_once(f->loop, TD_S), 0);
    assert_int_equal(f->n, 2);
    assert_int_equal(f->order[0], 1);
    assert_int_equal(f->order[1], 2);
    uint64_t start = td_now_us();
    td_loop_run_once(f->loop, 5 * TD_S); /* a is pending: must not wait */
    assert_true(td_now_us() - start < TD_S);
    assert_int_equal(f->n, 3);
    td_loop_after_del(f->loop, &f->a);
    td_loop_after(f->loop, &f->b); /* the tail survived the removal of the last */
    td_loop_run_once(f->loop, 0);
    assert_int_equal(f->n, 4);
    assert_int_equal(f->order[3], 2);
}

static void remove_b(void *arg)
{
    fixture *f = arg;
    f->n++;
    td_loop_after_del(f->loop, &f->b);
}

static void after_may_remove_a_later_one(void **state)
{
    fixture *f = *state;
    f->a = (td_after){.fn = remove_b, .arg = f};
    f->b = (td_after){.fn = after_b, .arg = f};
    td_loop_after(f->loop, &f->a);
    td_loop_after(f->loop, &f->b);
    td_loop_run_once(f->loop, 0);
    assert_int_equal(f->n, 1);
}

static void *stop_from_thread(void *arg)
{
    fixture *f = arg;
    td_loop_stop(f->loop);
    return NULL;
}

static void stop_reaches_a_waiting_loop(void **state)
{
    fixture *f = *state;
    pthread_t t;
    assert_int_equal(pthread_create(&t, NULL, stop_from_thread, f), 0);
    assert_int_equal(td_loop_run(f->loop), 0);
    pthread_join(t, NULL);
}

static void stop_before_run_is_honoured_once(void **state)
{
    fixture *f = *state;
    td_loop_stop(f->loop);
    assert_int_equal(td_loop_run(f->loop), 0);
    td_timer_add(f->loop, TD_MS, 0, stop, f, &f->timer);
    td_loop_run(f->loop);
    assert_int_equal(f->n, 1);
    td_timer_del(f->timer);
}

static void readable(void *arg, int fd, int events)
{
    fixture *f = arg;
    f->n++;
    f->m |= events;
    td_io_del(f->io); /* both are ready: whoever comes first deletes both */
    td_io_del(f->other);
}

static void io_may_delete_itself_and_another_ready_one(void **state)
{
    fixture *f = *state;
    int a[2], b[2];
    assert_int_equal(pipe(a), 0);
    assert_int_equal(pipe(b), 0);
    assert_int_equal(write(a[1], "x", 1), 1);
    assert_int_equal(write(b[1], "x", 1), 1);
    td_io_add(f->loop, a[0], TD_IO_READ, readable, f, &f->io);
    td_io_add(f->loop, b[0], TD_IO_READ, readable, f, &f->other);
    td_loop_run_once(f->loop, TD_S);
    td_loop_run_once(f->loop, 0);
    assert_int_equal(f->n, 1);
    assert_int_equal(f->m, TD_IO_READ);
    for (int i = 0; i < 2; i++) {
        close(a[i]);
        close(b[i]);
    }
}

static void note(void *arg, int fd, int events)
{
    fixture *f = arg;
    f->n++;
    f->m = events;
}

static void io_set_pauses_and_resumes(void **state)
{
    fixture *f = *state;
    int a[2];
    assert_int_equal(pipe(a), 0);
    assert_int_equal(write(a[1], "x", 1), 1);
    td_io_add(f->loop, a[0], 0, note, f, &f->io);
    td_loop_run_once(f->loop, 0);
    assert_int_equal(f->n, 0);
    assert_int_equal(td_io_set(f->io, TD_IO_READ), 0);
    td_loop_run_once(f->loop, TD_S);
    assert_int_equal(f->n, 1);
    td_io_set(f->io, 0);
    td_loop_run_once(f->loop, 0);
    assert_int_equal(f->n, 1);
    td_io_del(f->io);
    close(a[0]);
    close(a[1]);
}

static void signal_comes_through_the_loop(void **state)
{
    fixture *f = *state;
    assert_int_equal(td_signal_add(f->loop, SIGUSR1, stop, f), 0);
    raise(SIGUSR1);
    td_loop_run(f->loop);
    assert_int_equal(f->n, 1);
    assert_int_equal(td_signal_add(f->loop, SIGUSR1, NULL, NULL), 0);
    assert_int_equal(td_signal_add(f->loop, 9999, stop, f), -EINVAL);
}

static void spin(void *arg)
{
    uint64_t start = td_now_us();
    while (td_now_us() - start < 30 * TD_MS)
        ;
}

static void blocked_loop_knows_its_lag(void **state)
{
    fixture *f = *state;
    td_timer *late;
    assert_int_equal(td_loop_lag_us(f->loop), 0);
    td_timer_add(f->loop, 0, 0, spin, f, &f->timer);
    td_timer_add(f->loop, 5 * TD_MS, 0, stop, f, &late);
    td_loop_run(f->loop);
    assert_true(td_loop_lag_us(f->loop) >= 20 * TD_MS);
    td_timer_del(f->timer);
    td_timer_del(late);
}

int main(void)
{
#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
    const struct CMUnitTest tests[] = {
        T(timer_is_precise_and_never_early),
        T(delay_counts_from_the_call),
        T(periodic_timer_repeats_and_dies_inside),
        T(stopped_timer_is_silent_until_set),
        T(after_runs_once_a_turn_in_order),
        T(after_may_remove_a_later_one),
        T(stop_reaches_a_waiting_loop),
        T(stop_before_run_is_honoured_once),
        T(io_may_delete_itself_and_another_ready_one),
        T(io_set_pauses_and_resumes),
        T(signal_comes_through_the_loop),
        T(blocked_loop_knows_its_lag),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
