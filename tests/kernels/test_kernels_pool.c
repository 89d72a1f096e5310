/* SPDX-License-Identifier: Apache-2.0 */
/* Guards the thread pool: every item runs exactly once and is finished when the call returns, also
 * for late sleepers, single items, none, and after long idling. */
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

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(every_item_runs_once),
                                       cmocka_unit_test(pinning_to_a_granted_core_works)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
