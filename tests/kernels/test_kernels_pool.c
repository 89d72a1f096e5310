/* SPDX-License-Identifier: Apache-2.0 */
/* Guards the thread pool: every item runs exactly once and is finished when the call returns, also
 * for late sleepers, single items, none, and after long idling; a thread that lost its core to a
 * stranger holds nobody up for long. */
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
    atomic_int core[2];
} lost_job;

static void lost_item(void *arg, uint32_t i, uint32_t thread)
{
    lost_job *j = arg;
    if (thread == j->loses)
        usleep(5000); /* as if a stranger had its core: no CPU time passes */
    atomic_store(&j->core[thread], core_of_this_thread());
}

/* A thread that others wait for, and that does not run, gets the core of one that waits: the caller
 * and the others alike. */
static void who_waits_gives_its_core(void **state)
{
    int cores[2], before = 0, changed = 0;
    cpu_set_t all;
    assert_int_equal(sched_getaffinity(0, sizeof all, &all), 0);
    if (!two_cores(cores))
        skip();
    td_pool *p = NULL;
    assert_int_equal(td_pool_open(2, cores, 2, &p), 0);
    for (uint32_t loses = 0; loses < 2; loses++, changed = 0) {
        for (int tries = 0; tries < 100 && !changed; tries++) {
            lost_job j = {.loses = loses, .core = {-1, -1}};
            before = core_of_this_thread();
            td_pool_run(p, lost_item, &j, 2);
            changed = core_of_this_thread() != before;
            for (int i = 0; i < 2; i++)
                assert_true(j.core[i] == -1 || j.core[i] == cores[0] || j.core[i] == cores[1]);
        }
        assert_true(changed);
    }
    td_pool_close(p);
    sched_setaffinity(0, sizeof all, &all);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(every_item_runs_once),
                                       cmocka_unit_test(who_waits_gives_its_core),
                                       cmocka_unit_test(pinning_to_a_granted_core_works)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
