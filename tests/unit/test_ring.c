/* SPDX-License-Identifier: Apache-2.0 */
/* Guards: what one thread of a worker pushes the other pops, once, in order, and no wake-up is
 * lost. Runs under TSan. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/ring.h"
#include "base/banned.h"

static void test_bounds(void **state)
{
    td_ring *r;
    int x[5];
    assert_int_equal(td_ring_new(SIZE_MAX, &r), -ENOMEM);
    assert_int_equal(td_ring_new(3, &r), 0);
    assert_null(td_ring_pop(r));
    for (int round = 0; round < 3; round++) {
        for (int i = 0; i < 4; i++)
            assert_int_equal(td_ring_push(r, &x[i]), 0);
        assert_int_equal(td_ring_push(r, &x[4]), -EAGAIN);
        assert_int_equal(td_ring_len(r), 4);
        for (int i = 0; i < 4; i++)
            assert_ptr_equal(td_ring_pop(r), &x[i]);
        assert_null(td_ring_pop(r));
    }
    td_ring_free(r);
    td_ring_free(NULL);
}

static int readable(const td_ring *r)
{
    struct pollfd p = {.fd = td_ring_fd(r), .events = POLLIN};
    return poll(&p, 1, 0);
}

static void test_descriptor(void **state)
{
    td_ring *r;
    int x;
    assert_int_equal(td_ring_new(8, &r), 0);
    assert_int_equal(readable(r), 0);
    td_ring_push(r, &x);
    assert_int_equal(readable(r), 1);
    assert_int_equal(readable(r), 1); /* level-triggered */
    td_ring_clear(r);
    assert_int_equal(readable(r), 0);
    assert_ptr_equal(td_ring_pop(r), &x);
    td_ring_push(r, &x);
    assert_int_equal(readable(r), 1);
    td_ring_free(r);
}

static void test_wait_times_out(void **state)
{
    td_ring *r;
    int x;
    assert_int_equal(td_ring_new(8, &r), 0);
    uint64_t start = td_now_us();
    assert_int_equal(td_ring_wait(r, 20, 20000), 0);
    assert_true(td_now_us() - start >= 19000);
    td_ring_push(r, &x);
    assert_int_equal(td_ring_wait(r, 0, 1000000), 1);
    td_ring_free(r);
}

static void *write_late(void *arg)
{
    uint64_t one = 1;
    usleep(5000);
    assert_int_equal(write(td_ring_fd(arg), &one, sizeof one), sizeof one);
    return NULL;
}

/* A producer held up between its item, popped long ago, and its write: no item is no timeout. */
static void test_late_wake_up(void **state)
{
    td_ring *r;
    pthread_t t;
    assert_int_equal(td_ring_new(8, &r), 0);
    uint64_t start = td_now_us();
    assert_int_equal(pthread_create(&t, NULL, write_late, r), 0);
    assert_int_equal(td_ring_wait(r, 0, 40000), 0);
    assert_true(td_now_us() - start >= 39000);
    pthread_join(t, NULL);
    td_ring_free(r);
}

enum { ITEMS = 20000 };

static void *produce(void *arg)
{
    td_ring *r = arg;
    for (uintptr_t i = 1; i <= ITEMS; i++) {
        while (td_ring_push(r, (void *)i) == -EAGAIN)
            sched_yield();
        if (i % 1000 == 0) { /* let the consumer fall asleep */
            uint64_t until = td_now_us() + 300;
            while (td_now_us() < until)
                sched_yield();
        }
    }
    return NULL;
}

/* how 0: td_ring_wait; 1: poll on the descriptor, as a loop thread does. Never busy: a lost wake-up
 * hangs and fails. */
static void two_threads(int how)
{
    td_ring *r;
    pthread_t t;
    uintptr_t want = 1;
    assert_int_equal(td_ring_new(64, &r), 0);
    assert_int_equal(pthread_create(&t, NULL, produce, r), 0);
    while (want <= ITEMS) {
        if (how == 0) {
            assert_int_equal(td_ring_wait(r, 5, 20000000), 1);
        } else {
            struct pollfd p = {.fd = td_ring_fd(r), .events = POLLIN};
            assert_int_equal(poll(&p, 1, 20000), 1);
            td_ring_clear(r);
        }
        for (void *p; (p = td_ring_pop(r));)
            assert_int_equal((uintptr_t)p, want++);
    }
    pthread_join(t, NULL);
    assert_int_equal(td_ring_len(r), 0);
    td_ring_free(r);
}

static void test_threads_wait(void **state)
{
    two_threads(0);
}

static void test_threads_poll(void **state)
{
    two_threads(1);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_bounds),         cmocka_unit_test(test_descriptor),
        cmocka_unit_test(test_wait_times_out), cmocka_unit_test(test_late_wake_up),
        cmocka_unit_test(test_threads_wait),   cmocka_unit_test(test_threads_poll)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
