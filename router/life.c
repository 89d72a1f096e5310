/* SPDX-License-Identifier: Apache-2.0 */
#include "router/life.h"

#include <string.h>

#include "base/bug.h"
#include "base/clock.h"
#include "rpc/frame.h"
#include "base/banned.h"

enum {
    RESERVE_US = 5000000,
    STALL_US = 60000000,
    BACKOFF_US = 20000,
    BACKOFF_MAX_US = 1000000,
    BACKOFF_SHIFT_MAX = 6,
    DEADLINE_SLACK_US = 50000
};

void td_life_init(td_life *l, const td_life_config *config)
{
    TD_BUG_ON(config->n_choices < 1 || config->n_choices > TD_LIFE_CHOICES_MAX ||
              config->max_tokens < 1);
    memset(l, 0, sizeof *l);
    l->config = *config;
    if (!l->config.reserve_us)
        l->config.reserve_us = RESERVE_US;
    if (!l->config.stall_us)
        l->config.stall_us = STALL_US;
    l->attempt = 1;
}

int td_life_choice_is_open(const td_life *l, uint32_t choice)
{
    return choice < l->config.n_choices && !l->choice[choice].finish && !l->choice[choice].ended;
}

static int any_open(const td_life *l)
{
    for (uint32_t i = 0; i < l->config.n_choices; i++)
        if (td_life_choice_is_open(l, i))
            return 1;
    return 0;
}

uint64_t td_life_n_emitted(const td_life *l)
{
    uint64_t n = 0;
    for (uint32_t i = 0; i < l->config.n_choices; i++)
        n += l->choice[i].n_emitted;
    return n;
}

int td_life_is_resume(const td_life *l)
{
    return td_life_n_emitted(l) > 0;
}

int td_life_is_alone(const td_life *l)
{
    return l->config.max_tokens == 1 && !td_life_is_resume(l);
}

td_leg td_life_prefiller(const td_life *l)
{
    return l->local ? TD_LEG_DECODE : TD_LEG_PREFILL;
}

static td_life_action *add(td_life_actions *a, td_life_action_kind kind)
{
    TD_BUG_ON(a->n == TD_LIFE_ACTIONS_MAX);
    td_life_action *v = &a->v[a->n++];
    memset(v, 0, sizeof *v);
    v->kind = kind;
    return v;
}

static void cancel_leg(td_life *l, td_leg leg, td_life_actions *a)
{
    if (!l->leg_open[leg])
        return;
    l->leg_open[leg] = 0;
    add(a, TD_LIFE_CANCEL_LEG)->leg = leg;
}

/* Let go of both workers and of what waited for them. */
static void release_legs(td_life *l, td_life_actions *a)
{
    cancel_leg(l, TD_LEG_PREFILL, a);
    cancel_leg(l, TD_LEG_DECODE, a);
    if (l->held)
        add(a, TD_LIFE_DROP_HELD);
    l->held = 0;
}

static void end(td_life *l, td_error error, td_life_actions *a)
{
    release_legs(l, a);
    l->phase = TD_LIFE_ENDED;
    add(a, TD_LIFE_END)->error = error;
}

/* Arm for whatever comes first. A stream's progress only moves progress_us; the timer is moved when
 * it fires. */
static void arm(td_life *l, td_life_actions *a)
{
    if (l->phase == TD_LIFE_ENDED)
        return;
    uint64_t at = l->config.deadline_us;
    if (l->phase == TD_LIFE_RESERVING)
        at = TD_MIN(at, l->progress_us + l->config.reserve_us);
    else if (l->phase == TD_LIFE_PREFILLING || l->phase == TD_LIFE_DECODING)
        at = TD_MIN(at, l->progress_us + l->config.stall_us);
    if (l->armed_us && l->armed_us <= at)
        return;
    l->armed_us = at;
    add(a, TD_LIFE_ARM)->at_us = at;
}

static void dispatch(td_life *l, uint64_t at_us, td_life_actions *a)
{
    l->phase = TD_LIFE_QUEUED;
    l->committed = l->local = 0;
    add(a, TD_LIFE_DISPATCH)->at_us = at_us;
}

/* Errors that another worker would answer in the same way. */
static td_error fatal_error(uint32_t code, td_error error)
{
    switch (code) {
    case TD_INVALID_ARGUMENT:
    case TD_OUT_OF_RANGE:
    case TD_UNIMPLEMENTED:
    case TD_PERMISSION_DENIED:
    case TD_UNAUTHENTICATED:
        break;
    default:
        return TD_ERROR_NONE;
    }
    if (error != TD_ERROR_NONE)
        return error;
    if (code == TD_INVALID_ARGUMENT)
        return TD_ERROR_INVALID_REQUEST;
    if (code == TD_OUT_OF_RANGE)
        return TD_ERROR_CONTEXT_LENGTH;
    return code == TD_UNIMPLEMENTED ? TD_ERROR_UNSUPPORTED : TD_ERROR_INTERNAL;
}

/* What the client hears when no attempt is left. */
static td_error last_error(uint32_t code)
{
    switch (code) {
    case TD_RESOURCE_EXHAUSTED:
        return TD_ERROR_OVERLOADED;
    case TD_DATA_LOSS:
        return TD_ERROR_DATA_LOSS;
    case TD_INTERNAL:
    case TD_UNKNOWN:
        return TD_ERROR_INTERNAL;
    default:
        return TD_ERROR_WORKER_LOST;
    }
}

/* A worker that has no room is no failure: the request goes back to the queue for a while. A stream
 * that has begun is worth the wait for room; its deadline bounds it. */
static void refused(td_life *l, uint64_t now, td_life_actions *a)
{
    if (l->n_refused >= TD_LIFE_REFUSED_MAX && !td_life_is_resume(l)) {
        end(l, last_error(TD_RESOURCE_EXHAUSTED), a);
        return;
    }
    uint64_t wait = TD_MIN((uint64_t)BACKOFF_US << TD_MIN(l->n_refused, BACKOFF_SHIFT_MAX),
                           (uint64_t)BACKOFF_MAX_US);
    l->n_refused++;
    release_legs(l, a);
    l->attempt++;
    dispatch(l, now + wait, a);
}

/* A prefill worker that could not deliver because its peer is not what the ticket said accuses the
 * decode worker. */
static td_leg culprit(td_leg leg, uint32_t code)
{
    if (leg == TD_LEG_PREFILL && (code == TD_FAILED_PRECONDITION || code == TD_ABORTED))
        return TD_LEG_DECODE;
    return leg;
}

static void fail(td_life *l, td_leg leg, uint32_t code, td_error error, uint64_t now,
                 td_life_actions *a)
{
    td_error fatal = error == TD_ERROR_NONDETERMINISM ? error : fatal_error(code, error);
    if (fatal == TD_ERROR_NONE && code == TD_DEADLINE_EXCEEDED &&
        now + DEADLINE_SLACK_US >= l->config.deadline_us)
        fatal = TD_ERROR_DEADLINE;
    if (fatal != TD_ERROR_NONE) {
        end(l, fatal, a);
        return;
    }
    /* full, or about to leave */
    int no_room =
        code == TD_RESOURCE_EXHAUSTED || (code == TD_UNAVAILABLE && error == TD_ERROR_DRAINING);
    if (no_room && l->phase != TD_LIFE_DECODING) {
        refused(l, now, a);
        return;
    }
    add(a, TD_LIFE_BLAME)->leg = culprit(leg, code);
    if (l->n_redispatch == TD_LIFE_REDISPATCH_MAX) {
        end(l, last_error(code), a);
        return;
    }
    l->n_redispatch++;
    release_legs(l, a);
    l->attempt++;
    dispatch(l, now, a);
}

static void on_pair(td_life *l, uint64_t now, td_life_actions *a)
{
    if (l->phase != TD_LIFE_QUEUED)
        return;
    l->progress_us = now;
    if (td_life_is_alone(l)) {
        l->phase = TD_LIFE_PREFILLING;
        l->leg_open[TD_LEG_PREFILL] = 1;
        add(a, TD_LIFE_PREFILL);
        return;
    }
    l->phase = TD_LIFE_RESERVING;
    l->leg_open[TD_LEG_DECODE] = 1;
    add(a, TD_LIFE_RESERVE);
}

static void on_ticket(td_life *l, uint64_t now, td_life_actions *a)
{
    if (l->phase != TD_LIFE_RESERVING) {
        fail(l, TD_LEG_DECODE, TD_INTERNAL, TD_ERROR_NONE, now, a); /* a second ticket */
        return;
    }
    l->phase = TD_LIFE_PREFILLING;
    l->progress_us = now;
    l->leg_open[TD_LEG_PREFILL] = 1;
    add(a, TD_LIFE_PREFILL);
}

/* The policy's answer in place of a ticket; only to who was asked for it. */
static void on_local(td_life *l, uint64_t now, td_life_actions *a)
{
    if (l->phase != TD_LIFE_RESERVING || !l->config.allow_local) {
        fail(l, TD_LEG_DECODE, TD_INTERNAL, TD_ERROR_NONE, now, a);
        return;
    }
    l->phase = TD_LIFE_PREFILLING;
    l->local = 1;
    l->progress_us = now;
    add(a, TD_LIFE_LOCAL);
}

/* Only what was granted can be whole, and once. */
static void on_commit(td_life *l, uint64_t now, td_life_actions *a)
{
    if (l->committed || (l->phase != TD_LIFE_PREFILLING && l->phase != TD_LIFE_DECODING)) {
        fail(l, TD_LEG_DECODE, TD_INTERNAL, TD_ERROR_NONE, now, a);
        return;
    }
    l->committed = 1;
    l->progress_us = now;
    if (l->local) /* nothing else is waited for: index 0, or what follows the emitted, comes next */
        l->phase = TD_LIFE_DECODING;
}

/* One id for each unfinished choice, each choice once, at the index that was asked for. */
static int first_is_valid(const td_life *l, const td_life_event *ev)
{
    int resume = td_life_is_resume(l);
    uint32_t seen = 0, n_want = 0;
    for (uint32_t i = 0; i < l->config.n_choices; i++)
        n_want += resume ? td_life_choice_is_open(l, i) : 1;
    if (ev->n_runs < n_want || ev->n_runs > l->config.n_choices)
        return 0;
    for (uint32_t i = 0; i < ev->n_runs; i++) {
        const td_life_run *r = &ev->runs[i];
        if (r->choice >= l->config.n_choices || r->n != 1 || (seen & 1u << r->choice))
            return 0;
        seen |= 1u << r->choice;
        if (r->index != (resume ? l->choice[r->choice].n_emitted - 1 : 0))
            return 0;
    }
    for (uint32_t i = 0; i < l->config.n_choices; i++)
        if ((!resume || td_life_choice_is_open(l, i)) && !(seen & 1u << i))
            return 0;
    return 1;
}

static void emit(td_life *l, const td_life_run *r, uint32_t run, td_life_actions *a)
{
    td_life_choice *c = &l->choice[r->choice];
    c->n_emitted += r->n;
    c->last_id = r->ids[r->n - 1];
    c->finish = r->finish != 0;
    if (!c->ended)
        add(a, TD_LIFE_DELIVER)->run = run;
}

/* The resampled last token decides whether two workers agree: it is compared and never sent again.
 */
static int first_agrees(const td_life *l, const td_life_event *ev)
{
    for (uint32_t i = 0; i < ev->n_runs; i++) {
        const td_life_run *r = &ev->runs[i];
        if (td_life_choice_is_open(l, r->choice) &&
            (r->ids[0] != l->choice[r->choice].last_id || r->finish))
            return 0;
    }
    return 1;
}

/* finisher: the leg whose runs ended the last choice. When they ended every choice, its call ends
 * by itself: a cancel would only cross the STATUS. */
static void end_if_done(td_life *l, td_leg finisher, td_life_actions *a)
{
    int finished = 1;
    if (any_open(l))
        return;
    for (uint32_t i = 0; i < l->config.n_choices; i++)
        finished &= l->choice[i].finish;
    if (finished)
        l->leg_open[finisher] = 0;
    end(l, TD_ERROR_NONE, a);
}

static void on_first(td_life *l, const td_life_event *ev, uint64_t now, td_life_actions *a)
{
    if (l->phase != TD_LIFE_PREFILLING || !first_is_valid(l, ev)) {
        fail(l, TD_LEG_PREFILL, TD_INTERNAL, TD_ERROR_NONE, now, a);
        return;
    }
    int alone = td_life_is_alone(l);
    if (td_life_is_resume(l)) {
        if (!first_agrees(l, ev)) {
            end(l, TD_ERROR_NONDETERMINISM, a);
            return;
        }
    } else {
        for (uint32_t i = 0; i < ev->n_runs; i++)
            emit(l, &ev->runs[i], i, a);
    }
    l->phase = TD_LIFE_DECODING;
    l->progress_us = now;
    end_if_done(l, TD_LEG_PREFILL, a);
    if (l->phase == TD_LIFE_ENDED)
        return;
    if (alone) { /* one token per choice was asked for, and none was marked as the last */
        fail(l, TD_LEG_PREFILL, TD_INTERNAL, TD_ERROR_NONE, now, a);
        return;
    }
    if (l->held)
        add(a, TD_LIFE_RELEASE);
    l->held = 0;
}

static int run_is_valid(const td_life *l, const td_life_run *r)
{
    if (r->choice >= l->config.n_choices || r->n == 0 || !l->committed)
        return 0;
    const td_life_choice *c = &l->choice[r->choice];
    return !c->finish && r->index == c->n_emitted && r->n <= l->config.max_tokens - c->n_emitted;
}

static void on_run(td_life *l, const td_life_event *ev, uint64_t now, td_life_actions *a)
{
    const td_life_run *r = &ev->runs[0];
    if (l->phase == TD_LIFE_PREFILLING && !l->local) {
        if (r->n == 0 || l->held >= TD_LIFE_HELD_MAX || r->n > TD_LIFE_HELD_MAX - l->held) {
            fail(l, TD_LEG_DECODE, TD_INTERNAL, TD_ERROR_NONE, now, a);
            return;
        }
        l->held += r->n;
        add(a, TD_LIFE_HOLD);
        return;
    }
    if (l->phase != TD_LIFE_DECODING || r->choice >= l->config.n_choices) {
        fail(l, TD_LEG_DECODE, TD_INTERNAL, TD_ERROR_NONE, now, a);
        return;
    }
    if (!run_is_valid(l, r)) {
        fail(l, TD_LEG_DECODE, TD_DATA_LOSS, TD_ERROR_NONE, now, a);
        return;
    }
    l->progress_us = now;
    emit(l, r, 0, a);
    if (r->finish)
        end_if_done(l, TD_LEG_DECODE, a);
}

static void on_status(td_life *l, const td_life_event *ev, uint64_t now, td_life_actions *a)
{
    if (ev->code == TD_OK && ev->leg == TD_LEG_DECODE && l->phase == TD_LIFE_PREFILLING &&
        !l->local) {
        l->held++; /* D has finished before P's reply came */
        add(a, TD_LIFE_HOLD);
        return;
    }
    l->leg_open[ev->leg] = 0;
    /* OK with something owed: P without a reply, D without the end of each choice */
    int owes = ev->leg == TD_LEG_DECODE || l->phase == TD_LIFE_PREFILLING;
    /* P has replied and D holds the blocks: the stream no longer needs P, however it ends */
    if (!owes && l->committed)
        return;
    if (ev->code != TD_OK)
        fail(l, ev->leg, ev->code, ev->error, now, a);
    else if (owes)
        fail(l, ev->leg, TD_DATA_LOSS, TD_ERROR_NONE, now, a);
}

/* While a prompt waits for its turn and is computed nothing comes from its worker; that its steps
 * go on is seen in its load reports. */
static void on_timer(td_life *l, uint64_t progress_us, uint64_t now, td_life_actions *a)
{
    l->armed_us = 0;
    if (l->phase == TD_LIFE_PREFILLING)
        l->progress_us = TD_MAX(l->progress_us, TD_MIN(progress_us, now));
    if (now >= l->config.deadline_us)
        end(l, TD_ERROR_DEADLINE, a);
    else if (l->phase == TD_LIFE_RESERVING && now >= l->progress_us + l->config.reserve_us)
        fail(l, TD_LEG_DECODE, TD_UNAVAILABLE, TD_ERROR_NONE, now, a);
    else if (l->phase == TD_LIFE_PREFILLING && now >= l->progress_us + l->config.stall_us)
        fail(l, td_life_prefiller(l), TD_UNAVAILABLE, TD_ERROR_NONE, now, a);
    else if (l->phase == TD_LIFE_DECODING && now >= l->progress_us + l->config.stall_us)
        fail(l, TD_LEG_DECODE, TD_UNAVAILABLE, TD_ERROR_NONE, now, a);
}

static void on_end_choice(td_life *l, uint32_t choice, td_life_actions *a)
{
    if (choice >= l->config.n_choices)
        return;
    l->choice[choice].ended = 1;
    end_if_done(l, TD_LEG_DECODE, a);
}

static int is_stale(const td_life *l, const td_life_event *ev)
{
    switch (ev->kind) {
    case TD_LIFE_EV_TICKET:
    case TD_LIFE_EV_LOCAL:
    case TD_LIFE_EV_COMMIT:
    case TD_LIFE_EV_RUN:
        return ev->attempt != l->attempt || !l->leg_open[TD_LEG_DECODE];
    case TD_LIFE_EV_FIRST:
        return ev->attempt != l->attempt || !l->leg_open[TD_LEG_PREFILL];
    case TD_LIFE_EV_STATUS:
    case TD_LIFE_EV_BROKEN:
        return ev->attempt != l->attempt || !l->leg_open[ev->leg];
    default:
        return 0;
    }
}

static void step(td_life *l, const td_life_event *ev, uint64_t now, td_life_actions *a)
{
    switch (ev->kind) {
    case TD_LIFE_EV_START:
        if (l->phase == TD_LIFE_NEW)
            dispatch(l, now, a);
        break;
    case TD_LIFE_EV_PAIR:
        on_pair(l, now, a);
        break;
    case TD_LIFE_EV_TICKET:
        on_ticket(l, now, a);
        break;
    case TD_LIFE_EV_LOCAL:
        on_local(l, now, a);
        break;
    case TD_LIFE_EV_FIRST:
        on_first(l, ev, now, a);
        break;
    case TD_LIFE_EV_COMMIT:
        on_commit(l, now, a);
        break;
    case TD_LIFE_EV_RUN:
        on_run(l, ev, now, a);
        break;
    case TD_LIFE_EV_STATUS:
        on_status(l, ev, now, a);
        break;
    case TD_LIFE_EV_BROKEN:
        fail(l, ev->leg, TD_INTERNAL, TD_ERROR_NONE, now, a);
        break;
    case TD_LIFE_EV_EXPIRED:
        if (l->phase == TD_LIFE_QUEUED)
            end(l, now >= l->config.deadline_us ? TD_ERROR_DEADLINE : ev->error, a);
        break;
    case TD_LIFE_EV_CANCEL:
        end(l, ev->error, a);
        break;
    case TD_LIFE_EV_END_CHOICE:
        on_end_choice(l, ev->choice, a);
        break;
    case TD_LIFE_EV_TIMER:
        on_timer(l, ev->progress_us, now, a);
        break;
    }
}

void td_life_step(td_life *l, const td_life_event *ev, uint64_t now_us,
                  td_life_actions *ret_actions)
{
    ret_actions->n = 0;
    if (l->phase == TD_LIFE_ENDED)
        return;
    if (is_stale(l, ev)) {
        l->n_stale++;
        return;
    }
    step(l, ev, now_us, ret_actions);
    arm(l, ret_actions);
}
