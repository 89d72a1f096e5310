/* SPDX-License-Identifier: Apache-2.0 */
/* Guards the thread pool: every item runs exactly once and is finished when the call returns, also
 * for late sleepers, single items, none, and after long idling; a thread that lost its core to a
 * stranger holds nobody up for long. */
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

#include <cmocka.h>

#include "kernels/ref/pool.h"

enum { ITEMS = 500 };

typedef struct job {
    atomic_uint count[ITEMS];
    uint32_t threads;
} job;

static void item(void *arg, uint32_t i, uint32_t thread)
{
    job *j = arg;
    assert_true(i < ITEMS && thread < j->threads);
    atomic_fetch_add_explicit(&j->count[i], 1, memory_order_relaxed);
}

static void every_item_runs_once(void **state)
{
    for (uint32_t threads = 1; threads <= 5; threads += 2) {
        td_pool *p = NULL;
        assert_int_equal(td_pool_open(threads, NULL, 0, &p), 0);
        assert_int_equal(td_pool_threads(p), threads);
        for (uint32_t round = 0; round < 2000; round++) {
            static job j;
            uint32_t n = round % ITEMS;
            for (uint32_t i = 0; i < n; i++)
                j.count[i] = 0;
            j.threads = threads;
            td_pool_run(p, item, &j, n);
            for (uint32_t i = 0; i < n; i++)
                if (j.count[i] != 1)
                    fail_msg("round %u: item %u ran %u times", round, i, j.count[i]);
            if (round % 500 == 7)
                usleep(3000); /* the others fall asleep */
        }
        td_pool_close(p);
    }
}

static void pinning_to_a_granted_core_works(void **state)
{
    int cores[1] = {0};
    td_pool *p = NULL;
    static job j = {.threads = 2};
    assert_int_equal(td_pool_open(2, cores, 1, &p), 0);
    td_pool_run(p, item, &j, 100);
    for (uint32_t i = 0; i < 100; i++)
        assert_int_equal(j.count[i], 1);
    td_pool_close(p);
    td_pool_close(NULL);
}

/* Two cores of this process; 0 where it has one. */
static int two_cores(int cores[2])
{
    cpu_set_t set;
    int n = 0;
    assert_int_equal(sched_getaffinity(0, sizeof set, &set), 0);
    for (int c = 0; c < CPU_SETSIZE && n < 2; c++)
        if (CPU_ISSET((size_t)c, &set))
            cores[n++] = c;
    return n == 2;
}

static int core_of_this_thread(void)
{
    cpu_set_t set;
    assert_int_equal(sched_getaffinity(0, sizeof set, &set), 0);
    assert_int_equal(CPU_COUNT(&set), 1);
    for (int c = 0; c < CPU_SETSIZE; c++)
        if (CPU_ISSET((size_t)c, &set))
            return c;
    return -1;
}

typedef struct lost_job {
    uint32_t loses; /* the thread whose item makes no progress */
    atomic_int began, core[2];
} lost_job;

static void lost_item(void *arg, uint32_t i, uint32_t thread)
{
    lost_job *j = arg;
    if (thread == j->loses) {
        atomic_store(&j->began, 1);
        usleep(10000); /* as if a stranger had its core: no CPU time passes */
    }
    /* a second thread that is slow to wake shall have an item all the same */
    for (int k = 0; thread == 0 && k < 1000 && !atomic_load(&j->began); k++)
        usleep(100);
    atomic_store(&j->core[thread], core_of_this_thread());
}

static int places_change(td_pool *p, uint32_t loses)
{
    for (int tries = 0; tries < 200; tries++) {
        lost_job j = {.loses = loses, .core = {-1, -1}};
        int before = core_of_this_thread();
        td_pool_run(p, lost_item, &j, 2);
        if (core_of_this_thread() != before)
            return 1;
    }
    return 0;
}

/* A thread that others wait for, and that does not run, gets the core of one that waits: the caller
 * and the others alike. */
static void who_waits_gives_its_core(void **state)
{
    int cores[2];
    cpu_set_t all;
    assert_int_equal(sched_getaffinity(0, sizeof all, &all), 0);
    if (!two_cores(cores))
        skip();
    td_pool *p = NULL;
    assert_int_equal(td_pool_open(2, cores, 2, &p), 0);
    for (uint32_t loses = 0; loses < 2; loses++)
        assert_true(places_change(p, loses));
    td_pool_close(p);
    sched_setaffinity(0, sizeof all, &all);
}

enum { ROUNDS = 40 };

typedef struct heir {
    td_pool *pool;
    pthread_t opener;
    int core, moved; /* of the opener; how often it was found elsewhere */
} heir;

/* The first thread's take long, but run: nobody needs another's place. */
static void long_item(void *arg, uint32_t i, uint32_t thread)
{
    heir *h = arg;
    for (int k = 0; thread == 0 && k < 200; k++) {
        cpu_set_t set;
        assert_int_equal(pthread_getaffinity_np(h->opener, sizeof set, &set), 0);
        h->moved += !CPU_ISSET((size_t)h->core, &set);
        for (volatile int n = 0; n < 10000; n++)
            ;
    }
}

static void *inherit(void *arg)
{
    heir *h = arg;
    for (int round = 0; round < ROUNDS; round++)
        td_pool_run(h->pool, long_item, h, 2);
    return NULL;
}

/* The thread that opens a pool need not be the one that works with it: one that rests after opening
 * is not taken for one that lost its core, again and again. */
static void another_thread_takes_over(void **state)
{
    heir h = {.opener = pthread_self()};
    int cores[2];
    cpu_set_t all;
    pthread_t t;
    assert_int_equal(sched_getaffinity(0, sizeof all, &all), 0);
    if (!two_cores(cores))
        skip();
    assert_int_equal(td_pool_open(2, cores, 2, &h.pool), 0);
    h.core = cores[0];
    assert_int_equal(pthread_create(&t, NULL, inherit, &h), 0);
    pthread_join(t, NULL);
    assert_int_equal(h.moved, 0);
    td_pool_close(h.pool);
    sched_setaffinity(0, sizeof all, &all);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(every_item_runs_once),
                                       cmocka_unit_test(who_waits_gives_its_core),
                                       cmocka_unit_test(another_thread_takes_over),
                                       cmocka_unit_test(pinning_to_a_granted_core_works)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
