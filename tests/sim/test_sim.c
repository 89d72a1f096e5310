/* SPDX-License-Identifier: Apache-2.0 */
/* The cluster in one thread, 300 seeds. TD_SIM_SEEDS=N runs N seeds, TD_SIM_SEED=N replays one with
 * its log. Guards promises 1 to 3 and 5; the second test proves that the oracle sees: each of a
 * dozen seeded bugs is found. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <cmocka.h>

#include "sim.h"

#include "base/bug.h"
#include "base/banned.h"

enum { SEEDS = 300, BUG_SEEDS = 200 };

static uint64_t from_env(const char *name, uint64_t otherwise)
{
    const char *v = getenv(name);
    return v && *v ? strtoull(v, NULL, 10) : otherwise;
}

static void print_tally(const sim_tally *t)
{
    printf("%llu events, %llu requests: %llu whole, %llu refused; %llu tokens\n",
           (unsigned long long)t->events, (unsigned long long)t->requests,
           (unsigned long long)t->ok, (unsigned long long)t->refused,
           (unsigned long long)t->tokens);
    for (int e = 1; e < TD_ERROR_MAX; e++)
        if (t->errors[e])
            printf("  %s %llu\n", td_error_get((td_error)e)->name,
                   (unsigned long long)t->errors[e]);
#define ROW(x) printf("  " #x " %llu\n", (unsigned long long)t->x)
    ROW(redispatches);
    ROW(resumes_ok);
    ROW(stale);
    ROW(no_room);
    ROW(held);
    ROW(gaps);
    ROW(late);
    ROW(fenced);
    ROW(silences);
    ROW(crashes);
    ROW(coalesced);
    ROW(shared_blocks);
    ROW(held_blocks);
    ROW(closed_peers);
    ROW(commit_retries);
    ROW(stalls);
    ROW(local_prefills);
    ROW(local_resumes);
#undef ROW
    for (int d = 1; d < TD_DROP_MAX; d++)
        if (t->drops[d])
            printf("  dropped: %s %llu\n", td_drop_name((td_drop)d),
                   (unsigned long long)t->drops[d]);
}

static void seeds(void **state)
{
    static sim_tally t;
    char text[300];
    sim_options o = {.verbose = getenv("TD_SIM_SEED") != NULL};
    uint64_t first = from_env("TD_SIM_SEED", 1),
             n = o.verbose ? 1 : from_env("TD_SIM_SEEDS", SEEDS);
    for (uint64_t seed = first; seed < first + n; seed++)
        if (sim_run_seed(seed, &o, &t, text, sizeof text) < 0)
            fail_msg("seed %llu: %s (replay: TD_SIM_SEED=%llu)", (unsigned long long)seed, text,
                     (unsigned long long)seed);
    print_tally(&t);
    if (n < SEEDS)
        return;
    /* a run that never met the trouble would prove nothing */
    assert_true(t.ok * 2 > t.requests);
    assert_true(t.redispatches > 100 && t.resumes_ok > 20 && t.stale > 20 && t.no_room > 5 &&
                t.held > 20 && t.stalls > 5 && t.local_prefills > 200 && t.local_resumes > 20);
    assert_true(t.gaps > 20 && t.late > 20 && t.fenced > 20 && t.silences > 20 && t.crashes > 20);
    assert_true(t.coalesced > 20 && t.shared_blocks > 20 && t.held_blocks > 20 &&
                t.commit_retries > 5);
    assert_true(t.drops[TD_DROP_CRC] > 5 && t.drops[TD_DROP_STATE] > 5 &&
                t.drops[TD_DROP_DUPLICATE] > 5);
}

static void bugs_are_found(void **state)
{
    static sim_tally t;
    char text[300];
    if (getenv("TD_SIM_SEED"))
        skip();
    for (int bug = 1; bug < SIM_BUG_MAX; bug++) {
        sim_options o = {.bug = (sim_bug)bug};
        int found = 0;
        for (uint64_t seed = 1; seed <= BUG_SEEDS && !found; seed++)
            if (sim_run_seed(seed, &o, &t, text, sizeof text) < 0)
                found = (int)seed;
        if (!found)
            fail_msg("the bug \"%s\" was not found in %d seeds", sim_bug_name((sim_bug)bug),
                     BUG_SEEDS);
        printf("%s: seed %d, %s\n", sim_bug_name((sim_bug)bug), found, text);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(seeds), cmocka_unit_test(bugs_are_found)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
