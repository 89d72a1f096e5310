/* SPDX-License-Identifier: Apache-2.0 */
/* One request: does what router/life.h says. The client's callbacks run inside and may cancel or
 * end choices there. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/bug.h"
#include "base/clock.h"
#include "base/log.h"
#include "router/dispatch_int.h"
#include "base/banned.h"

static void drop_held(td_gen *g)
{
    while (g->held) {
        td_gen_held *h = g->held;
        g->held = h->next;
        free(h);
    }
    g->held_end = &g->held;
}

static void on_out_of_memory(td_gen *g)
{
    td_life_event ev = {.kind = TD_LIFE_EV_CANCEL, .error = TD_ERROR_INTERNAL};
    td_gen_step(g, &ev, NULL);
}

static void hold(td_gen *g, const td_life_event *ev, const td_gen_run *r)
{
    Tandem__V1__TokenRun m = TANDEM__V1__TOKEN_RUN__INIT;
    size_t n = 0;
    if (r) {
        m.choice = r->choice;
        m.index = r->index;
        m.ids = (ProtobufCBinaryData){r->n * 4, (uint8_t *)r->ids};
        m.has_logprobs = r->logprobs != NULL;
        m.logprobs = (ProtobufCBinaryData){r->logprobs ? r->n * 4 : 0, (uint8_t *)r->logprobs};
        m.has_finish = r->finish != 0;
        m.finish =
            r->finish == 1 ? TANDEM__V1__FINISH__FINISH_STOP : TANDEM__V1__FINISH__FINISH_LENGTH;
    }
    Tandem__V1__TopLogprob *top = NULL, **top_ptr = NULL;
    if (r && r->top) {
        top = calloc(r->n, sizeof *top);
        top_ptr = calloc(r->n, sizeof *top_ptr);
        for (size_t i = 0; top && top_ptr && i < r->n; i++) {
            tandem__v1__top_logprob__init(&top[i]);
            top[i].ids = (ProtobufCBinaryData){r->top[i].n * 4ul, (uint8_t *)r->top[i].ids};
            top[i].logprobs =
                (ProtobufCBinaryData){r->top[i].n * 4ul, (uint8_t *)r->top[i].logprobs};
            top_ptr[i] = &top[i];
        }
        m.n_top = top && top_ptr ? r->n : 0;
        m.top = top_ptr;
    }
    if (r)
        n = tandem__v1__token_run__get_packed_size(&m);
    td_gen_held *h = r && r->top && !m.n_top ? NULL : calloc(1, sizeof *h + n);
    if (h) {
        h->attempt = ev->attempt;
        h->n = n;
        if (r)
            tandem__v1__token_run__pack(&m, h->bytes);
        *g->held_end = h;
        g->held_end = &h->next;
    }
    free(top);
    free(top_ptr);
    if (!h)
        on_out_of_memory(g);
}

static void release_held(td_gen *g)
{
    td_gen_held *h = g->held;
    g->held = NULL;
    g->held_end = &g->held;
    while (h) {
        td_gen_held *next = h->next;
        if (h->n) {
            ProtobufCAllocator alloc = td_wire_allocator(g->dispatch);
            Tandem__V1__TokenRun *m = tandem__v1__token_run__unpack(&alloc, h->n, h->bytes);
            if (m)
                td_leg_feed_run(g, h->attempt, m);
            else
                on_out_of_memory(g);
        } else {
            td_life_event ev = {.kind = TD_LIFE_EV_STATUS,
                                .attempt = h->attempt,
                                .leg = TD_LEG_DECODE,
                                .code = TD_OK};
            td_gen_step(g, &ev, NULL);
        }
        free(h);
        h = next;
    }
}

static int keep_ids(td_gen_emitted *e, const td_gen_run *r, uint32_t max)
{
    if (r->n > e->cap - e->n) {
        size_t cap = TD_MIN(TD_MAX((size_t)e->cap * 2, e->n + r->n + 64), max);
        uint32_t *ids = realloc(e->ids, cap * sizeof *ids);
        if (!ids)
            return -ENOMEM;
        e->ids = ids;
        e->cap = (uint32_t)cap;
    }
    memcpy(e->ids + e->n, r->ids, r->n * sizeof *r->ids);
    e->n += (uint32_t)r->n;
    return 0;
}

static void deliver(td_gen *g, const td_gen_run *r)
{
    td_dispatch *d = g->dispatch;
    uint64_t now = td_now_us();
    if (g->life.choice[r->choice].ended || g->want_cancel ||
        (g->want_end_choices & 1u << r->choice))
        return; /* the client had enough since this step began */
    if (keep_ids(&g->emitted[r->choice], r, g->spec.max_tokens) < 0) {
        on_out_of_memory(g);
        return;
    }
    if (!g->last_token_us)
        td_histogram_add(d->stats.ttft, (double)(now - g->submitted_us) / 1e6);
    else if (r->index > 0)
        for (size_t i = 0; i < r->n; i++)
            td_histogram_add(d->stats.itl, (double)(now - g->last_token_us) / 1e6 / (double)r->n);
    g->last_token_us = now;
    g->usage.completion_tokens += (uint32_t)r->n;
    td_counter_add(d->stats.generation_tokens, r->n);
    if (td_list_empty(&g->dirty_link))
        td_list_add(&d->dirty, &g->dirty_link);
    td_loop_after(d->loop, &d->after);
    g->ops.on_run(g->arg, r);
}

static void blame(td_gen *g, td_leg leg)
{
    td_dispatch *d = g->dispatch;
    const td_worker *w = td_registry_find(&d->registry, g->pair[leg]);
    if (g->n_failed < TD_GEN_FAILED_MAX)
        g->failed[g->n_failed++] = g->pair[leg];
    td_counter_add(d->stats.redispatch[leg], 1);
    td_log(TD_LOG_WARN, "leg_failed",
           "request=%.*s attempt=%u leg=%s worker=%s tokens=%llu why=\"%s\"",
           (int)g->spec.request_id.len, g->spec.request_id.ptr, g->life.attempt,
           leg == TD_LEG_DECODE ? "decode" : "prefill", w ? w->name : "gone",
           (unsigned long long)td_life_n_emitted(&g->life), g->why);
}

/* The decode worker prefills what little it lacks: counted, told in the usage, named once. */
static void go_local(td_gen *g)
{
    td_dispatch *d = g->dispatch;
    td_leg_drop(g); /* the prefill worker's: D's has been started */
    g->usage.local_tokens += g->local_tokens;
    td_counter_add(d->stats.local_prefills, 1);
    td_counter_add(d->stats.local_tokens, g->local_tokens);
    if (!d->said_local)
        td_log(
            TD_LOG_INFO, "local_prefill",
            "request=%.*s tokens=%u why=\"at most --local-prefill-tokens %u are not in the decode "
            "worker's cache; said once, counted in local_prefills_total\"",
            (int)g->spec.request_id.len, g->spec.request_id.ptr, g->local_tokens,
            d->config.local_tokens);
    d->said_local = 1;
}

static void start_leg(td_gen *g, td_leg leg)
{
    uint32_t attempt = g->life.attempt;
    int e = td_leg_start(g, leg);
    if (e == 0)
        return;
    if (e == -ENOMEM) { /* ours, not the worker's */
        on_out_of_memory(g);
        return;
    }
    td_life_event ev = {.kind = TD_LIFE_EV_STATUS,
                        .attempt = attempt,
                        .leg = leg,
                        .code = e == -E2BIG     ? TD_OUT_OF_RANGE
                                : e == -ENOBUFS ? TD_RESOURCE_EXHAUSTED
                                                : TD_UNAVAILABLE};
    td_gen_step(g, &ev, NULL);
}

static void on_timer(void *arg)
{
    td_gen *g = arg;
    const td_worker *w =
        td_registry_find(&g->dispatch->registry, g->pair[td_life_prefiller(&g->life)]);
    td_life_event ev = {.kind = TD_LIFE_EV_TIMER, .progress_us = w ? w->progress_us : 0};
    td_gen_step(g, &ev, NULL);
}

static void arm(td_gen *g, uint64_t at_us)
{
    uint64_t now = td_now_us();
    uint64_t delay = at_us > now ? at_us - now : 0;
    if (g->timer)
        td_timer_set(g->timer, delay);
    else if (td_timer_add(g->dispatch->loop, delay, 0, on_timer, g, &g->timer) < 0)
        on_out_of_memory(g);
}

static void finish(td_gen *g, td_error error)
{
    td_dispatch *d = g->dispatch;
    g->ended = 1;
    g->error = error;
    g->usage.attempts = g->life.attempt;
    td_admit_remove(&d->admit, &g->entry);
    td_leg_drop(g);
    drop_held(g);
    td_timer_del(g->timer);
    g->timer = NULL;
    td_list_add(&d->ended, &g->ended_link);
    td_loop_after(d->loop, &d->after);
}

/* Act on one action. runs: of the event. */
static void act(td_gen *g, const td_life_event *ev, const td_life_action *a, const td_gen_run *runs)
{
    switch (a->kind) {
    case TD_LIFE_DISPATCH:
        td_leg_drop(g);
        g->leg[0] = g->leg[1] = NULL; /* what was started ends with its STATUS */
        td_dispatch_queue(g, a->at_us);
        break;
    case TD_LIFE_RESERVE:
        start_leg(g, TD_LEG_DECODE);
        break;
    case TD_LIFE_PREFILL:
        start_leg(g, TD_LEG_PREFILL);
        break;
    case TD_LIFE_LOCAL:
        go_local(g);
        break;
    case TD_LIFE_CANCEL_LEG:
        td_leg_cancel(g, a->leg);
        break;
    case TD_LIFE_BLAME:
        blame(g, a->leg);
        break;
    case TD_LIFE_DELIVER:
        deliver(g, &runs[a->run]);
        break;
    case TD_LIFE_HOLD:
        hold(g, ev, ev->kind == TD_LIFE_EV_RUN ? &runs[0] : NULL);
        break;
    case TD_LIFE_RELEASE:
        release_held(g);
        break;
    case TD_LIFE_DROP_HELD:
        drop_held(g);
        break;
    case TD_LIFE_ARM:
        if (a->at_us == g->life.armed_us) /* else a nested step armed anew */
            arm(g, a->at_us);
        break;
    case TD_LIFE_END:
        finish(g, a->error);
        break;
    }
}

/* What the client asked for inside a callback comes after all that the step had to deliver: a
 * nested step would end the request over tokens of other choices that are still to be handed out.
 */
static void do_deferred(td_gen *g)
{
    td_life_event cancel = {.kind = TD_LIFE_EV_CANCEL, .error = TD_ERROR_CANCELLED};
    while (g->want_end_choices && !g->want_cancel) {
        td_life_event ev = {.kind = TD_LIFE_EV_END_CHOICE,
                            .choice = (uint32_t)__builtin_ctz(g->want_end_choices)};
        g->want_end_choices &= g->want_end_choices - 1;
        td_gen_step(g, &ev, NULL);
    }
    if (g->want_cancel && !g->ended)
        td_gen_step(g, &cancel, NULL);
}

void td_gen_step(td_gen *g, const td_life_event *ev, const td_gen_run *runs)
{
    td_life_actions actions;
    uint64_t stale = g->life.n_stale;
    uint32_t refused = g->life.n_refused;
    td_life_step(&g->life, ev, td_now_us(), &actions);
    td_counter_add(g->dispatch->stats.stale_events, g->life.n_stale - stale);
    td_counter_add(g->dispatch->stats.no_room, g->life.n_refused - refused);
    g->depth++;
    for (uint32_t i = 0; i < actions.n; i++) {
        /* a call that could not start may have ended the request in a nested step */
        if (g->ended && actions.v[i].kind != TD_LIFE_CANCEL_LEG)
            continue;
        act(g, ev, &actions.v[i], runs);
    }
    g->depth--;
    if (!g->depth && (g->want_cancel || g->want_end_choices) && !g->ended)
        do_deferred(g);
}

void td_gen_cancel(td_gen *g)
{
    g->want_cancel = 1;
    if (!g->depth && !g->ended)
        do_deferred(g);
}

void td_gen_end_choice(td_gen *g, uint32_t choice)
{
    if (choice >= g->spec.n)
        return;
    g->want_end_choices |= 1u << choice;
    if (!g->depth && !g->ended)
        do_deferred(g);
}

static const char *end_text(const td_gen *g)
{
    if (g->error == TD_ERROR_NONE)
        return NULL;
    if (g->error == TD_ERROR_DEADLINE && !g->spec.client_deadline)
        return "the server's time limit for a request passed (--request-timeout)";
    return g->why[0] && g->error != TD_ERROR_CANCELLED && g->error != TD_ERROR_DEADLINE ? g->why
                                                                                        : NULL;
}

void td_gen_call_end(td_gen *g)
{
    td_dispatch *d = g->dispatch;
    const td_error_info *info = td_error_get(g->error);
    uint32_t retry = 0;
    if (g->error != TD_ERROR_NONE && info->retryable && (info->http == 503 || info->http == 429))
        retry = td_admit_retry_ms(&d->admit);
    td_counter_add(d->stats.ended[g->error], 1);
    td_histogram_add(d->stats.request_time, (double)(td_now_us() - g->submitted_us) / 1e6);
    if (g->error == TD_ERROR_NONDETERMINISM) {
        td_counter_add(d->stats.nondeterminism, 1);
        td_log(TD_LOG_ERROR, "nondeterminism", "request=%.*s attempt=%u",
               (int)g->spec.request_id.len, g->spec.request_id.ptr, g->life.attempt);
    }
    g->on_end_done = 1;
    d->n_live--;
    g->ops.on_end(g->arg, g->error, end_text(g), retry, &g->usage);
}

void td_gen_free(td_gen *g)
{
    if (!g)
        return;
    td_dispatch *d = g->dispatch;
    if (td_map_get(&d->by_id, g->id_hash) == g)
        td_map_del(&d->by_id, g->id_hash);
    td_list_del(&g->link);
    td_list_del(&g->dirty_link);
    td_list_del(&g->ended_link);
    td_timer_del(g->timer);
    drop_held(g);
    for (uint32_t i = 0; g->emitted && i < g->spec.n; i++)
        free(g->emitted[i].ids);
    td_arena_done(&g->arena);
    free(g);
}

void td_gen_release(td_gen *g)
{
    if (g->on_end_done && g->n_legs == 0)
        td_gen_free(g);
}
