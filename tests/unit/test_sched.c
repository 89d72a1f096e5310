/* SPDX-License-Identifier: Apache-2.0 */
/* The choice of a pair: room, load, exclusion, equality of what the two hold (promise 3: unlike
 * profiles never meet). */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <cmocka.h>
#include <string.h>

#include "router/sched.h"
#include "base/banned.h"

enum { P1, P2, D1, D2, N };

typedef struct pool {
    td_sched_worker w[N];
    const td_sched_worker *v[N];
    td_sched_need need;
    uint32_t d, p;
} pool;

static void fill(pool *f)
{
    memset(f, 0, sizeof *f);
    for (int i = 0; i < N; i++) {
        f->w[i] = (td_sched_worker){.id = (uint64_t)i + 1,
                                    .is_decode = i >= D1,
                                    .ready = 1,
                                    .kv_blocks = 100,
                                    .max_seqs = 8,
                                    .max_context = 6400};
        f->v[i] = &f->w[i];
    }
    f->need = (td_sched_need){.n_prompt = 100, .n_choices = 1, .max_tokens = 100};
}

static td_sched_verdict choose(pool *f)
{
    f->d = f->p = 99;
    return td_sched_choose(f->v, N, &f->need, &f->d, &f->p);
}

static void blocks(void **state)
{
    assert_int_equal(td_sched_blocks(64, 1, 64), 2);
    assert_int_equal(td_sched_blocks(65, 1, 64), 2); /* the last token has no row */
    assert_int_equal(td_sched_blocks(65, 1, 65), 3);
    /* the full block shared, the partial one copied */
    assert_int_equal(td_sched_blocks(100, 4, 29), 1 + 4 * 1);
    assert_int_equal(td_sched_blocks(100, 4, 30), 1 + 4 * 2);
}

static void least_loaded(void **state)
{
    pool f;
    fill(&f);
    assert_int_equal(choose(&f), TD_SCHED_OK);
    assert_int_equal(f.d, D1); /* ties: the lowest id */
    assert_int_equal(f.p, P1);
    f.w[D1].sent_seqs = 1; /* same blocks, more running */
    f.w[P1].sent_tokens = 10;
    choose(&f);
    assert_int_equal(f.d, D2);
    assert_int_equal(f.p, P2);
    td_sched_seen(&f.w[D2], 20, 0, 0); /* the report knows what other routers sent */
    td_sched_seen(&f.w[P2], 0, 0, 100);
    choose(&f);
    assert_int_equal(f.d, D1);
    assert_int_equal(f.p, P1);
    f.w[D2].kv_blocks = 1000; /* 20 of 1000 is emptier than 5 of 100 */
    f.w[D1].sent_blocks = 5;
    choose(&f);
    assert_int_equal(f.d, D2);
}

/* a report that still shows what we know to be over does not fill the worker */
static void reports_lag(void **state)
{
    pool f;
    fill(&f);
    f.w[D1].sent_blocks = 90, f.w[D1].sent_seqs = 8;
    td_sched_seen(&f.w[D1], 90, 8, 0);
    f.w[D1].sent_blocks = f.w[D1].sent_seqs = 0; /* ended here, not reported yet */
    f.w[D2].ready = 0;
    assert_int_equal(choose(&f), TD_SCHED_OK);
}

static void excluded(void **state)
{
    pool f;
    uint64_t failed[] = {D1 + 1, P1 + 1};
    fill(&f);
    f.need.failed = failed;
    f.need.n_failed = 2;
    choose(&f);
    assert_int_equal(f.d, D2);
    assert_int_equal(f.p, P2);
    f.w[D2].draining = 1; /* the last resort is better than none */
    f.w[P2].ready = 0;
    assert_int_equal(choose(&f), TD_SCHED_OK);
    assert_int_equal(f.d, D1);
    assert_int_equal(f.p, P1);
    f.w[D1].draining = 1;
    assert_int_equal(choose(&f), TD_SCHED_NO_DECODE);
    f.w[D1].draining = 0;
    f.w[P1].ready = 0;
    assert_int_equal(choose(&f), TD_SCHED_NO_PREFILL);
}

static void room(void **state)
{
    pool f;
    fill(&f);
    f.need.max_tokens = 2000; /* 33 blocks */
    f.w[D1].sent_blocks = 68, f.w[D2].sent_blocks = 67;
    assert_int_equal(choose(&f), TD_SCHED_OK);
    assert_int_equal(f.d, D2);
    f.w[D2].other_blocks = 1;
    assert_int_equal(choose(&f), TD_SCHED_BUSY);
    f.need.max_tokens = 6301; /* 6401 tokens: 101 blocks and over the context */
    assert_int_equal(choose(&f), TD_SCHED_TOO_LONG);
    fill(&f);
    f.need.n_choices = 2;
    f.w[D1].sent_seqs = 7, f.w[D2].other_running = 7;
    assert_int_equal(choose(&f), TD_SCHED_BUSY);
    fill(&f);
    f.w[P1].sent_requests = f.w[P2].sent_requests = 1;
    f.w[P1].sent_tokens = f.w[P2].sent_tokens = TD_SCHED_PREFILL_TOKENS - 99;
    assert_int_equal(choose(&f), TD_SCHED_BUSY);
    f.w[P2].sent_tokens--;
    choose(&f);
    assert_int_equal(f.p, P2);
}

/* each half of a pair holds the same model in the same layout under the same profile */
static void pairs_match(void **state)
{
    pool f;
    fill(&f);
    f.w[P1].profile_id[3] = 1;
    f.w[P2].layout_hash[15] = 1;
    assert_int_equal(choose(&f), TD_SCHED_NO_PREFILL);
    f.w[D2].profile_id[3] = 1;
    assert_int_equal(choose(&f), TD_SCHED_OK);
    assert_int_equal(f.d, D2);
    assert_int_equal(f.p, P1);
    f.w[D2].model_hash[31] = 1;
    assert_int_equal(choose(&f), TD_SCHED_NO_PREFILL);
    uint8_t other[16] = {9};
    fill(&f);
    f.need.profile_id = other; /* a resumed request does not change its profile */
    assert_int_equal(choose(&f), TD_SCHED_NO_DECODE);
}

/* D is the emptier one but its only prefill partner is full: the other pair serves */
static void room_on_both(void **state)
{
    pool f;
    fill(&f);
    f.w[D1].profile_id[0] = f.w[P1].profile_id[0] = 1;
    f.w[P1].sent_requests = 1;
    f.w[P1].sent_tokens = TD_SCHED_PREFILL_TOKENS;
    f.w[D2].sent_blocks = 10;
    assert_int_equal(choose(&f), TD_SCHED_OK);
    assert_int_equal(f.d, D2);
    assert_int_equal(f.p, P2);
}

static void alone(void **state)
{
    pool f;
    fill(&f);
    f.need.alone = 1;
    f.need.max_tokens = 1;
    f.w[D1].ready = f.w[D2].ready = 0;
    assert_int_equal(choose(&f), TD_SCHED_OK);
    assert_int_equal(f.d, UINT32_MAX);
    assert_int_equal(f.p, P1);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(blocks),       cmocka_unit_test(least_loaded),
        cmocka_unit_test(reports_lag),  cmocka_unit_test(excluded),
        cmocka_unit_test(room),         cmocka_unit_test(pairs_match),
        cmocka_unit_test(room_on_both), cmocka_unit_test(alone),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
