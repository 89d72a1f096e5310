/* SPDX-License-Identifier: Apache-2.0 */
/* Promise 2, "whole streams", at its source: the request's life cycle as a pure function. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <cmocka.h>
#include <string.h>

#include "router/life.h"
#include "rpc/frame.h"
#include "base/banned.h"

enum { S = 1000000 };

typedef struct fixture {
    td_life l;
    td_life_actions a;
    uint64_t now;
} fixture;

static void begin(fixture *f, uint32_t n, uint32_t max_tokens)
{
    td_life_config c = {.n_choices = n, .max_tokens = max_tokens, .deadline_us = 100 * S};
    memset(f, 0, sizeof *f);
    td_life_init(&f->l, &c);
}

static void step(fixture *f, td_life_event ev)
{
    if (!ev.attempt)
        ev.attempt = f->l.attempt;
    td_life_step(&f->l, &ev, f->now, &f->a);
}

static void simple(fixture *f, td_life_event_kind kind)
{
    step(f, (td_life_event){.kind = kind});
}

static const td_life_action *find(const fixture *f, td_life_action_kind kind)
{
    for (uint32_t i = 0; i < f->a.n; i++)
        if (f->a.v[i].kind == kind)
            return &f->a.v[i];
    return NULL;
}

static int count(const fixture *f, td_life_action_kind kind)
{
    int n = 0;
    for (uint32_t i = 0; i < f->a.n; i++)
        n += f->a.v[i].kind == kind;
    return n;
}

static int cancels(const fixture *f, td_leg leg)
{
    for (uint32_t i = 0; i < f->a.n; i++)
        if (f->a.v[i].kind == TD_LIFE_CANCEL_LEG && f->a.v[i].leg == leg)
            return 1;
    return 0;
}

static void run_at(fixture *f, uint32_t attempt, uint32_t choice, uint32_t index, uint32_t id,
                   int finish)
{
    td_life_run r = {choice, index, &id, 1, finish};
    step(f, (td_life_event){.kind = TD_LIFE_EV_RUN,
                            .attempt = attempt,
                            .leg = TD_LEG_DECODE,
                            .runs = &r,
                            .n_runs = 1});
}

static void first(fixture *f, uint32_t n, const uint32_t *ids, uint32_t index, int finish)
{
    td_life_run r[TD_LIFE_CHOICES_MAX];
    for (uint32_t i = 0; i < n; i++)
        r[i] = (td_life_run){i, index, &ids[i], 1, finish};
    step(f,
         (td_life_event){.kind = TD_LIFE_EV_FIRST, .leg = TD_LEG_PREFILL, .runs = r, .n_runs = n});
}

static void status(fixture *f, td_leg leg, uint32_t code)
{
    step(f, (td_life_event){.kind = TD_LIFE_EV_STATUS, .leg = leg, .code = code});
}

static void to_ticket(fixture *f)
{
    if (f->l.phase == TD_LIFE_NEW) {
        simple(f, TD_LIFE_EV_START);
        assert_non_null(find(f, TD_LIFE_DISPATCH));
    }
    simple(f, TD_LIFE_EV_PAIR);
    assert_non_null(find(f, TD_LIFE_RESERVE));
    simple(f, TD_LIFE_EV_TICKET);
    assert_non_null(find(f, TD_LIFE_PREFILL));
    simple(f, TD_LIFE_EV_COMMIT);
}

static const uint32_t ids3[] = {10, 20, 30};

static void to_decoding(fixture *f, uint32_t n)
{
    to_ticket(f);
    first(f, n, ids3, 0, 0);
    assert_int_equal(count(f, TD_LIFE_DELIVER), n);
    status(f, TD_LEG_PREFILL, TD_OK);
    assert_int_equal(f->a.n, 0);
}

/* index 0 from P, then D's runs, one end, and no cancel that would cross D's own STATUS */
static void happy_path(void **state)
{
    fixture f;
    begin(&f, 1, 3);
    to_decoding(&f, 1);
    run_at(&f, 1, 0, 1, 11, 0);
    assert_int_equal(count(&f, TD_LIFE_DELIVER), 1);
    run_at(&f, 1, 0, 2, 12, 2);
    assert_int_equal(count(&f, TD_LIFE_DELIVER), 1);
    assert_int_equal(find(&f, TD_LIFE_END)->error, TD_ERROR_NONE);
    assert_false(cancels(&f, TD_LEG_DECODE));
    status(&f, TD_LEG_DECODE, TD_OK);
    assert_int_equal(f.a.n, 0);
}

/* D may be faster than P's reply: its runs wait, and so does its OK */
static void decode_before_first(void **state)
{
    fixture f;
    begin(&f, 1, 3);
    to_ticket(&f);
    run_at(&f, 1, 0, 1, 11, 0);
    assert_int_equal(count(&f, TD_LIFE_HOLD), 1);
    assert_int_equal(count(&f, TD_LIFE_DELIVER), 0);
    run_at(&f, 1, 0, 2, 12, 1);
    assert_int_equal(count(&f, TD_LIFE_HOLD), 1);
    status(&f, TD_LEG_DECODE, TD_OK);
    assert_int_equal(count(&f, TD_LIFE_HOLD), 1);
    first(&f, 1, ids3, 0, 0);
    assert_int_equal(f.a.v[0].kind, TD_LIFE_DELIVER);
    assert_int_equal(f.a.v[1].kind, TD_LIFE_RELEASE);
    run_at(&f, 1, 0, 1, 11, 0);
    run_at(&f, 1, 0, 2, 12, 1);
    assert_int_equal(find(&f, TD_LIFE_END)->error, TD_ERROR_NONE);
}

static void held_is_bounded(void **state)
{
    fixture f;
    begin(&f, 1, 1 << 20);
    to_ticket(&f);
    uint32_t i = 0;
    for (; i < TD_LIFE_HELD_MAX; i++) {
        run_at(&f, 1, 0, 1 + i, i, 0);
        assert_non_null(find(&f, TD_LIFE_HOLD));
    }
    run_at(&f, 1, 0, 1 + i, i, 0);
    assert_non_null(find(&f, TD_LIFE_DROP_HELD));
    assert_int_equal(find(&f, TD_LIFE_BLAME)->leg, TD_LEG_DECODE);
}

/* D ends with choices open: not a finished answer */
static void early_ok_is_data_loss(void **state)
{
    fixture f;
    begin(&f, 1, 9);
    to_decoding(&f, 1);
    status(&f, TD_LEG_DECODE, TD_OK);
    assert_null(find(&f, TD_LIFE_END));
    assert_non_null(find(&f, TD_LIFE_DISPATCH));
    assert_int_equal(f.l.attempt, 2);
    begin(&f, 1, 9);
    to_ticket(&f);
    status(&f, TD_LEG_PREFILL, TD_OK); /* P says OK and gave no tokens */
    assert_int_equal(find(&f, TD_LIFE_BLAME)->leg, TD_LEG_PREFILL);
    assert_true(cancels(&f, TD_LEG_DECODE));
}

/* a lost, doubled or too long run never reaches the client */
static void wrong_index(void **state)
{
    static const struct {
        uint32_t index, n;
    } bad[] = {{0, 1}, {2, 1}, {1, 9}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        fixture f;
        uint32_t ids[16] = {0};
        begin(&f, 1, 8);
        to_decoding(&f, 1);
        td_life_run r = {0, bad[i].index, ids, bad[i].n, 0};
        step(&f, (td_life_event){
                     .kind = TD_LIFE_EV_RUN, .leg = TD_LEG_DECODE, .runs = &r, .n_runs = 1});
        assert_null(find(&f, TD_LIFE_DELIVER));
        assert_true(cancels(&f, TD_LEG_DECODE));
        assert_non_null(find(&f, TD_LIFE_DISPATCH));
    }
}

static void run_before_commit(void **state)
{
    fixture f;
    begin(&f, 1, 8);
    simple(&f, TD_LIFE_EV_START);
    simple(&f, TD_LIFE_EV_PAIR);
    simple(&f, TD_LIFE_EV_TICKET);
    first(&f, 1, ids3, 0, 0);
    run_at(&f, 1, 0, 1, 11, 0);
    assert_null(find(&f, TD_LIFE_DELIVER));
    assert_int_equal(find(&f, TD_LIFE_BLAME)->leg, TD_LEG_DECODE);
}

/* a decode worker that says "whole" of what it never granted, or twice, is broken */
static void commit_out_of_turn(void **state)
{
    fixture f;
    begin(&f, 1, 8);
    simple(&f, TD_LIFE_EV_START);
    simple(&f, TD_LIFE_EV_PAIR);
    simple(&f, TD_LIFE_EV_COMMIT);
    assert_int_equal(find(&f, TD_LIFE_BLAME)->leg, TD_LEG_DECODE);
    assert_true(cancels(&f, TD_LEG_DECODE));
    assert_int_equal(f.l.attempt, 2);
    assert_int_equal(f.l.committed, 0);
    to_decoding(&f, 1);
    simple(&f, TD_LIFE_EV_COMMIT);
    assert_int_equal(find(&f, TD_LIFE_BLAME)->leg, TD_LEG_DECODE);
}

static void timer(fixture *f, uint64_t now, uint64_t progress_us)
{
    f->now = now;
    step(f, (td_life_event){.kind = TD_LIFE_EV_TIMER, .progress_us = progress_us});
}

/* A prefill worker whose steps stand still with a prompt in hand loses it long before the deadline;
 * one that works on something else, or on a long prompt, does not. */
static void prefill_stalls(void **state)
{
    fixture f;
    begin(&f, 1, 8);
    f.l.config.stall_us = 10 * S;
    f.now = 3 * S;
    simple(&f, TD_LIFE_EV_START);
    simple(&f, TD_LIFE_EV_PAIR);
    simple(&f, TD_LIFE_EV_TICKET);
    assert_true(f.l.armed_us <= 13 * S);
    for (uint64_t now = 13 * S; now < 43 * S; now += 10 * S) {
        timer(&f, now, now - S);
        assert_null(find(&f, TD_LIFE_BLAME));
        assert_int_equal(find(&f, TD_LIFE_ARM)->at_us, now - S + 10 * S);
    }
    timer(&f, 42 * S, 32 * S);
    assert_int_equal(find(&f, TD_LIFE_BLAME)->leg, TD_LEG_PREFILL);
    assert_true(cancels(&f, TD_LEG_PREFILL) && cancels(&f, TD_LEG_DECODE));
    assert_non_null(find(&f, TD_LIFE_DISPATCH));
    begin(&f, 1, 1); /* alone: no decode worker's silence would tell */
    f.l.config.stall_us = 10 * S;
    simple(&f, TD_LIFE_EV_START);
    simple(&f, TD_LIFE_EV_PAIR);
    timer(&f, 10 * S, 0);
    assert_int_equal(find(&f, TD_LIFE_BLAME)->leg, TD_LEG_PREFILL);
}

/* tokens do not move the timer: it fires early and looks again */
static void tokens_leave_the_timer(void **state)
{
    fixture f;
    begin(&f, 1, 8);
    to_decoding(&f, 1);
    f.now = 5 * S;
    run_at(&f, 1, 0, 1, 11, 0);
    assert_null(find(&f, TD_LIFE_ARM));
    timer(&f, 60 * S, 0);
    assert_null(find(&f, TD_LIFE_BLAME));
    assert_int_equal(find(&f, TD_LIFE_ARM)->at_us, 65 * S);
    timer(&f, 65 * S, 64 * S); /* the prefill worker's steps say nothing of this stream */
    assert_int_equal(find(&f, TD_LIFE_BLAME)->leg, TD_LEG_DECODE);
}

static void to_local(fixture *f)
{
    f->l.config.allow_local = 1;
    if (f->l.phase == TD_LIFE_NEW)
        simple(f, TD_LIFE_EV_START);
    simple(f, TD_LIFE_EV_PAIR);
    assert_non_null(find(f, TD_LIFE_RESERVE));
    simple(f, TD_LIFE_EV_LOCAL);
    assert_non_null(find(f, TD_LIFE_LOCAL));
    assert_null(find(f, TD_LIFE_PREFILL));
}

/* conditional split: no prefill worker, every token from D, index 0 first; a recovery goes on
 * behind what was emitted, on either kind of worker */
static void local_prefill(void **state)
{
    fixture f;
    begin(&f, 2, 3);
    to_local(&f);
    simple(&f, TD_LIFE_EV_COMMIT);
    for (uint32_t c = 0; c < 2; c++) {
        run_at(&f, 1, c, 0, 10 + c, 0);
        assert_int_equal(count(&f, TD_LIFE_DELIVER), 1);
    }
    run_at(&f, 1, 1, 1, 21, 1);
    status(&f, TD_LEG_DECODE, TD_UNAVAILABLE);
    assert_int_equal(find(&f, TD_LIFE_BLAME)->leg, TD_LEG_DECODE);
    assert_false(cancels(&f, TD_LEG_PREFILL));
    assert_int_equal(f.l.local, 0);
    to_local(&f); /* choice 1 has ended */
    simple(&f, TD_LIFE_EV_COMMIT);
    run_at(&f, 2, 0, 1, 11, 0);
    assert_int_equal(count(&f, TD_LIFE_DELIVER), 1);
    status(&f, TD_LEG_DECODE, TD_UNAVAILABLE);
    to_ticket(&f);
    uint32_t last = 11;
    first(&f, 1, &last, 1, 0);
    run_at(&f, 3, 0, 2, 12, 2);
    assert_int_equal(find(&f, TD_LIFE_END)->error, TD_ERROR_NONE);
}

/* what a decode worker may not say */
static void local_prefill_refused(void **state)
{
    fixture f;
    begin(&f, 1, 3); /* not asked for */
    simple(&f, TD_LIFE_EV_START);
    simple(&f, TD_LIFE_EV_PAIR);
    simple(&f, TD_LIFE_EV_LOCAL);
    assert_int_equal(find(&f, TD_LIFE_BLAME)->leg, TD_LEG_DECODE);
    begin(&f, 1, 3); /* after its ticket */
    f.l.config.allow_local = 1;
    to_ticket(&f);
    simple(&f, TD_LIFE_EV_LOCAL);
    assert_int_equal(find(&f, TD_LIFE_BLAME)->leg, TD_LEG_DECODE);
    begin(&f, 1, 3); /* tokens before it has prefilled */
    to_local(&f);
    run_at(&f, 1, 0, 0, 10, 0);
    assert_null(find(&f, TD_LIFE_HOLD));
    assert_int_equal(find(&f, TD_LIFE_BLAME)->leg, TD_LEG_DECODE);
    begin(&f, 1, 3); /* an end before that */
    to_local(&f);
    status(&f, TD_LEG_DECODE, TD_OK);
    assert_int_equal(find(&f, TD_LIFE_BLAME)->leg, TD_LEG_DECODE);
    begin(&f, 1, 3); /* index 1 first */
    to_local(&f);
    simple(&f, TD_LIFE_EV_COMMIT);
    run_at(&f, 1, 0, 1, 11, 0);
    assert_null(find(&f, TD_LIFE_DELIVER));
    begin(&f, 1, 3); /* its steps stand still */
    f.l.config.stall_us = 10 * S;
    to_local(&f);
    timer(&f, 10 * S, 5 * S);
    assert_null(find(&f, TD_LIFE_BLAME));
    timer(&f, 15 * S, 5 * S);
    assert_int_equal(find(&f, TD_LIFE_BLAME)->leg, TD_LEG_DECODE);
}

/* recovery: the resampled token is compared and not sent again; D2 goes on at the number emitted */
static void recovery(void **state)
{
    fixture f;
    begin(&f, 1, 4);
    to_decoding(&f, 1);
    run_at(&f, 1, 0, 1, 11, 0);
    status(&f, TD_LEG_DECODE, TD_UNAVAILABLE);
    assert_int_equal(find(&f, TD_LIFE_BLAME)->leg, TD_LEG_DECODE);
    assert_int_equal(f.l.attempt, 2);
    assert_true(td_life_is_resume(&f.l));
    to_ticket(&f);
    run_at(&f, 1, 0, 2, 99, 0); /* late, of the first attempt */
    assert_int_equal(f.a.n, 0);
    uint32_t last = 11;
    first(&f, 1, &last, 1, 0);
    assert_int_equal(count(&f, TD_LIFE_DELIVER), 0);
    run_at(&f, 2, 0, 2, 12, 0);
    assert_int_equal(count(&f, TD_LIFE_DELIVER), 1);
    run_at(&f, 2, 0, 3, 13, 2);
    assert_int_equal(find(&f, TD_LIFE_END)->error, TD_ERROR_NONE);
    assert_int_equal(f.l.n_stale, 1);
}

static void nondeterminism(void **state)
{
    fixture f;
    begin(&f, 1, 4);
    to_decoding(&f, 1);
    status(&f, TD_LEG_DECODE, TD_DATA_LOSS);
    to_ticket(&f);
    uint32_t other = 77;
    first(&f, 1, &other, 0, 0);
    assert_int_equal(find(&f, TD_LIFE_END)->error, TD_ERROR_NONDETERMINISM);
    assert_true(cancels(&f, TD_LEG_DECODE));
    assert_int_equal(count(&f, TD_LIFE_DELIVER), 0);
}

/* the decode worker compares too, and may say so first */
static void nondeterminism_seen_by_worker(void **state)
{
    fixture f;
    begin(&f, 1, 4);
    to_decoding(&f, 1);
    status(&f, TD_LEG_DECODE, TD_UNAVAILABLE);
    simple(&f, TD_LIFE_EV_PAIR);
    simple(&f, TD_LIFE_EV_TICKET);
    step(&f, (td_life_event){.kind = TD_LIFE_EV_STATUS,
                             .leg = TD_LEG_DECODE,
                             .code = TD_DATA_LOSS,
                             .error = TD_ERROR_NONDETERMINISM});
    assert_int_equal(find(&f, TD_LIFE_END)->error, TD_ERROR_NONDETERMINISM);
}

/* a worker that is about to leave has not failed, and its farewell is not ours to the client */
static void draining_worker(void **state)
{
    fixture f;
    begin(&f, 1, 4);
    simple(&f, TD_LIFE_EV_START);
    simple(&f, TD_LIFE_EV_PAIR);
    step(&f, (td_life_event){.kind = TD_LIFE_EV_STATUS,
                             .leg = TD_LEG_DECODE,
                             .code = TD_UNAVAILABLE,
                             .error = TD_ERROR_DRAINING});
    assert_non_null(find(&f, TD_LIFE_DISPATCH));
    assert_int_equal(f.l.n_redispatch, 0);
    to_decoding(&f, 1); /* with tokens out it has: the stream must move */
    step(&f, (td_life_event){.kind = TD_LIFE_EV_STATUS,
                             .leg = TD_LEG_DECODE,
                             .code = TD_UNAVAILABLE,
                             .error = TD_ERROR_DRAINING});
    assert_int_equal(f.l.n_redispatch, 1);
}

static void at_most_two_redispatches(void **state)
{
    fixture f;
    begin(&f, 1, 4);
    simple(&f, TD_LIFE_EV_START);
    for (int i = 0; i < 3; i++) {
        assert_non_null(find(&f, TD_LIFE_DISPATCH));
        simple(&f, TD_LIFE_EV_PAIR);
        status(&f, TD_LEG_DECODE, TD_UNAVAILABLE);
    }
    assert_null(find(&f, TD_LIFE_DISPATCH));
    assert_int_equal(find(&f, TD_LIFE_END)->error, TD_ERROR_WORKER_LOST);
    assert_int_equal(f.l.n_redispatch, 2);
}

/* "no room" is no failure: it waits longer each time, blames nobody and is bounded */
static void no_room(void **state)
{
    fixture f;
    uint64_t wait = 0;
    begin(&f, 1, 4);
    simple(&f, TD_LIFE_EV_START);
    for (int i = 0; i < TD_LIFE_REFUSED_MAX; i++) {
        simple(&f, TD_LIFE_EV_PAIR);
        status(&f, TD_LEG_DECODE, TD_RESOURCE_EXHAUSTED);
        assert_null(find(&f, TD_LIFE_BLAME));
        assert_true(find(&f, TD_LIFE_DISPATCH)->at_us >= wait);
        wait = find(&f, TD_LIFE_DISPATCH)->at_us;
    }
    assert_true(wait >= S / 2);
    simple(&f, TD_LIFE_EV_PAIR);
    status(&f, TD_LEG_DECODE, TD_RESOURCE_EXHAUSTED);
    assert_int_equal(find(&f, TD_LIFE_END)->error, TD_ERROR_OVERLOADED);
}

/* a stream that has begun waits for room until its deadline, however often it hears "no" */
static void no_room_for_a_stream(void **state)
{
    fixture f;
    begin(&f, 1, 4);
    to_decoding(&f, 1);
    status(&f, TD_LEG_DECODE, TD_UNAVAILABLE);
    for (int i = 0; i < 200; i++) {
        f.now += S / 2;
        simple(&f, TD_LIFE_EV_PAIR);
        status(&f, TD_LEG_DECODE, TD_RESOURCE_EXHAUSTED);
        assert_null(find(&f, TD_LIFE_END));
        assert_true(find(&f, TD_LIFE_DISPATCH)->at_us <= f.now + S);
    }
    assert_true(f.now >= 100 * S);
    simple(&f, TD_LIFE_EV_TIMER);
    assert_int_equal(find(&f, TD_LIFE_END)->error, TD_ERROR_DEADLINE);
}

static void request_errors_end_it(void **state)
{
    fixture f;
    begin(&f, 1, 4);
    simple(&f, TD_LIFE_EV_START);
    simple(&f, TD_LIFE_EV_PAIR);
    status(&f, TD_LEG_DECODE, TD_OUT_OF_RANGE);
    assert_int_equal(find(&f, TD_LIFE_END)->error, TD_ERROR_CONTEXT_LENGTH);
}

/* P that could not push because D is not who the ticket says: D is to blame */
static void stale_ticket_blames_decode(void **state)
{
    fixture f;
    begin(&f, 1, 4);
    to_ticket(&f);
    status(&f, TD_LEG_PREFILL, TD_FAILED_PRECONDITION);
    assert_int_equal(find(&f, TD_LIFE_BLAME)->leg, TD_LEG_DECODE);
    assert_true(cancels(&f, TD_LEG_DECODE));
}

/* a prefill worker that dies after the hand-over takes no stream with it */
static void prefill_dies_after_commit(void **state)
{
    fixture f;
    begin(&f, 1, 4);
    to_ticket(&f);
    first(&f, 1, ids3, 0, 0);
    status(&f, TD_LEG_PREFILL, TD_UNAVAILABLE);
    assert_int_equal(f.a.n, 0);
    run_at(&f, 1, 0, 1, 11, 1);
    assert_int_equal(find(&f, TD_LIFE_END)->error, TD_ERROR_NONE);
}

/* max_tokens 1: P alone, D is never asked */
static void alone(void **state)
{
    fixture f;
    begin(&f, 2, 1);
    simple(&f, TD_LIFE_EV_START);
    simple(&f, TD_LIFE_EV_PAIR);
    assert_null(find(&f, TD_LIFE_RESERVE));
    assert_non_null(find(&f, TD_LIFE_PREFILL));
    first(&f, 2, ids3, 0, 2);
    assert_int_equal(count(&f, TD_LIFE_DELIVER), 2);
    assert_int_equal(find(&f, TD_LIFE_END)->error, TD_ERROR_NONE);
    assert_int_equal(count(&f, TD_LIFE_CANCEL_LEG), 0);
}

static void first_tokens_end_all(void **state)
{
    fixture f;
    begin(&f, 2, 5);
    to_ticket(&f);
    first(&f, 2, ids3, 0, 1);
    assert_int_equal(count(&f, TD_LIFE_DELIVER), 2);
    assert_true(cancels(&f, TD_LEG_DECODE)); /* the reservation is released */
    assert_int_equal(find(&f, TD_LIFE_END)->error, TD_ERROR_NONE);
}

/* n > 1: finished choices are not redone, each unfinished one is compared */
static void recovery_of_choices(void **state)
{
    fixture f;
    begin(&f, 3, 5);
    to_decoding(&f, 3);
    run_at(&f, 1, 1, 1, 21, 1); /* choice 1 ends */
    run_at(&f, 1, 2, 1, 31, 0);
    assert_null(find(&f, TD_LIFE_END));
    status(&f, TD_LEG_DECODE, TD_UNAVAILABLE);
    to_ticket(&f);
    uint32_t id0 = 10, id2 = 31;
    td_life_run r[] = {{2, 1, &id2, 1, 0}, {0, 0, &id0, 1, 0}};
    step(&f,
         (td_life_event){.kind = TD_LIFE_EV_FIRST, .leg = TD_LEG_PREFILL, .runs = r, .n_runs = 2});
    assert_null(find(&f, TD_LIFE_END));
    assert_int_equal(count(&f, TD_LIFE_DELIVER), 0);
    run_at(&f, 2, 0, 1, 11, 1);
    run_at(&f, 2, 2, 2, 32, 1);
    assert_int_equal(find(&f, TD_LIFE_END)->error, TD_ERROR_NONE);
}

static void first_must_name_each_choice_once(void **state)
{
    fixture f;
    uint32_t id = 1;
    td_life_run twice[] = {{0, 0, &id, 1, 0}, {0, 0, &id, 1, 0}},
                far[] = {{0, 0, &id, 1, 0}, {7, 0, &id, 1, 0}};
    begin(&f, 2, 5);
    to_ticket(&f);
    step(&f, (td_life_event){
                 .kind = TD_LIFE_EV_FIRST, .leg = TD_LEG_PREFILL, .runs = twice, .n_runs = 2});
    assert_int_equal(find(&f, TD_LIFE_BLAME)->leg, TD_LEG_PREFILL);
    begin(&f, 2, 5);
    to_ticket(&f);
    step(&f, (td_life_event){
                 .kind = TD_LIFE_EV_FIRST, .leg = TD_LEG_PREFILL, .runs = far, .n_runs = 2});
    assert_int_equal(find(&f, TD_LIFE_BLAME)->leg, TD_LEG_PREFILL);
    begin(&f, 2, 5);
    to_ticket(&f);
    step(&f, (td_life_event){
                 .kind = TD_LIFE_EV_FIRST, .leg = TD_LEG_PREFILL, .runs = twice, .n_runs = 1});
    assert_int_equal(find(&f, TD_LIFE_BLAME)->leg, TD_LEG_PREFILL);
}

/* cancel reaches both legs and ends once, in every phase */
static void cancel(void **state)
{
    fixture f;
    for (int phase = 0; phase < 4; phase++) {
        begin(&f, 1, 5);
        simple(&f, TD_LIFE_EV_START);
        if (phase > 0)
            simple(&f, TD_LIFE_EV_PAIR);
        if (phase > 1)
            simple(&f, TD_LIFE_EV_TICKET);
        if (phase > 2)
            first(&f, 1, ids3, 0, 0);
        step(&f, (td_life_event){.kind = TD_LIFE_EV_CANCEL, .error = TD_ERROR_CANCELLED});
        assert_int_equal(cancels(&f, TD_LEG_DECODE), phase > 0);
        assert_int_equal(cancels(&f, TD_LEG_PREFILL), phase > 1);
        assert_int_equal(find(&f, TD_LIFE_END)->error, TD_ERROR_CANCELLED);
        simple(&f, TD_LIFE_EV_CANCEL);
        assert_int_equal(f.a.n, 0);
    }
}

static void client_ends_choices(void **state)
{
    fixture f;
    begin(&f, 2, 9);
    to_decoding(&f, 2);
    step(&f, (td_life_event){.kind = TD_LIFE_EV_END_CHOICE, .choice = 0});
    assert_int_equal(f.a.n, 0);
    run_at(&f, 1, 0, 1, 11, 0); /* overshoot is dropped, not an error */
    assert_int_equal(count(&f, TD_LIFE_DELIVER), 0);
    run_at(&f, 1, 1, 1, 21, 0);
    assert_int_equal(count(&f, TD_LIFE_DELIVER), 1);
    step(&f, (td_life_event){.kind = TD_LIFE_EV_END_CHOICE, .choice = 1});
    assert_true(cancels(&f, TD_LEG_DECODE));
    assert_int_equal(find(&f, TD_LIFE_END)->error, TD_ERROR_NONE);
}

static void timers(void **state)
{
    fixture f;
    begin(&f, 1, 9);
    simple(&f, TD_LIFE_EV_START);
    assert_int_equal(find(&f, TD_LIFE_ARM)->at_us, 100 * S);
    f.now = 1 * S;
    simple(&f, TD_LIFE_EV_PAIR);
    assert_int_equal(find(&f, TD_LIFE_ARM)->at_us, 6 * S); /* a ticket within 5 s */
    f.now = 6 * S;
    simple(&f, TD_LIFE_EV_TIMER);
    assert_int_equal(find(&f, TD_LIFE_BLAME)->leg, TD_LEG_DECODE);
    to_decoding(&f, 1);
    f.now = 100 * S - 1;
    run_at(&f, 2, 0, 1, 11, 0);
    assert_non_null(find(&f, TD_LIFE_DELIVER));
    f.now = 100 * S;
    simple(&f, TD_LIFE_EV_TIMER);
    assert_int_equal(find(&f, TD_LIFE_END)->error, TD_ERROR_DEADLINE);
}

static void stalled_stream_moves(void **state)
{
    fixture f;
    begin(&f, 1, 9);
    to_decoding(&f, 1);
    f.now = 30 * S;
    run_at(&f, 1, 0, 1, 11, 0);
    f.now = 60 * S;
    simple(&f, TD_LIFE_EV_TIMER); /* not yet: 60 s since the last token */
    assert_int_equal(find(&f, TD_LIFE_ARM)->at_us, 90 * S);
    f.now = 90 * S;
    simple(&f, TD_LIFE_EV_TIMER);
    assert_non_null(find(&f, TD_LIFE_DISPATCH));
    assert_true(cancels(&f, TD_LEG_DECODE));
}

static void expired_in_queue(void **state)
{
    fixture f;
    begin(&f, 1, 9);
    simple(&f, TD_LIFE_EV_START);
    step(&f, (td_life_event){.kind = TD_LIFE_EV_EXPIRED, .error = TD_ERROR_NO_DECODE});
    assert_int_equal(find(&f, TD_LIFE_END)->error, TD_ERROR_NO_DECODE);
}

/* Any order of events: never two ends, never a gap, never a token twice. Seeded, short: the
 * simulator does the long runs. */
static void any_events(void **state)
{
    uint64_t x = 88172645463325252ull;
    for (int round = 0; round < 3000; round++) {
        fixture f;
        uint32_t next[2] = {0, 0};
        int ends = 0;
        begin(&f, 2, 6);
        f.l.config.allow_local = round % 2;
        for (int i = 0; i < 40; i++) {
            x ^= x << 13, x ^= x >> 7, x ^= x << 17;
            uint32_t id = 5;
            td_life_run r[2] = {{x >> 20 & 1, (uint32_t)(x >> 24) % 7, &id, 1, (x >> 30 & 7) == 0},
                                {1, 0, &id, 1, 0}};
            td_life_event ev = {.kind = 1 + x % TD_LIFE_EV_TIMER,
                                .attempt = 1 + (uint32_t)(x >> 8) % 3,
                                .leg = x >> 12 & 1,
                                .code = x >> 40 & 1 ? TD_OK : TD_UNAVAILABLE,
                                .error = TD_ERROR_CANCELLED,
                                .choice = x >> 16 & 1,
                                .runs = r,
                                .n_runs = 1};
            if (ev.kind == TD_LIFE_EV_FIRST) {
                ev.n_runs = 2;
                r[0].choice = 0;
            }
            if (ev.kind == TD_LIFE_EV_STATUS)
                ev.error = TD_ERROR_NONE;
            if (ev.kind == TD_LIFE_EV_CANCEL && x >> 50 & 7)
                continue;
            td_life_step(&f.l, &ev, f.now, &f.a);
            for (uint32_t k = 0; k < f.a.n; k++) {
                const td_life_action *a = &f.a.v[k];
                ends += a->kind == TD_LIFE_END;
                if (a->kind == TD_LIFE_DELIVER) {
                    assert_int_equal(ends, 0);
                    assert_int_equal(r[a->run].index, next[r[a->run].choice]);
                    next[r[a->run].choice]++;
                }
            }
            assert_true(ends <= 1);
        }
        assert_true(f.l.n_redispatch <= TD_LIFE_REDISPATCH_MAX);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(happy_path),
        cmocka_unit_test(decode_before_first),
        cmocka_unit_test(held_is_bounded),
        cmocka_unit_test(early_ok_is_data_loss),
        cmocka_unit_test(wrong_index),
        cmocka_unit_test(run_before_commit),
        cmocka_unit_test(commit_out_of_turn),
        cmocka_unit_test(prefill_stalls),
        cmocka_unit_test(tokens_leave_the_timer),
        cmocka_unit_test(no_room_for_a_stream),
        cmocka_unit_test(local_prefill),
        cmocka_unit_test(local_prefill_refused),
        cmocka_unit_test(recovery),
        cmocka_unit_test(nondeterminism),
        cmocka_unit_test(nondeterminism_seen_by_worker),
        cmocka_unit_test(draining_worker),
        cmocka_unit_test(at_most_two_redispatches),
        cmocka_unit_test(no_room),
        cmocka_unit_test(request_errors_end_it),
        cmocka_unit_test(stale_ticket_blames_decode),
        cmocka_unit_test(prefill_dies_after_commit),
        cmocka_unit_test(alone),
        cmocka_unit_test(first_tokens_end_all),
        cmocka_unit_test(recovery_of_choices),
        cmocka_unit_test(first_must_name_each_choice_once),
        cmocka_unit_test(cancel),
        cmocka_unit_test(client_ends_choices),
        cmocka_unit_test(timers),
        cmocka_unit_test(stalled_stream_moves),
        cmocka_unit_test(expired_in_queue),
        cmocka_unit_test(any_events),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
