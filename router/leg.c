/* SPDX-License-Identifier: Apache-2.0 */
/* Legs: the calls that a request has open on workers. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bug.h"
#include "base/clock.h"
#include "router/dispatch_int.h"
#include "base/banned.h"

enum { DECODE_CREDIT = 256 };

int td_leg_plan(td_gen *g, td_leg kind, td_worker *w)
{
    td_gen_leg *leg = calloc(1, sizeof *leg);
    if (!leg)
        return -ENOMEM;
    *leg = (td_gen_leg){.gen = g, .kind = kind, .attempt = g->life.attempt, .worker = w->sched.id};
    if (kind == TD_LEG_DECODE) {
        leg->seqs = g->spec.n;
        leg->blocks =
            (uint32_t)td_sched_blocks((uint32_t)g->spec.n_prompt, g->spec.n, g->spec.max_tokens);
    } else {
        leg->tokens = (uint32_t)g->spec.n_prompt;
    }
    w->sched.sent_requests++;
    w->sched.sent_seqs += leg->seqs;
    w->sched.sent_blocks += leg->blocks;
    w->sched.sent_tokens += leg->tokens;
    g->leg[kind] = leg;
    g->pair[kind] = w->sched.id;
    g->n_legs++;
    return 0;
}

static void leg_free(td_gen_leg *leg)
{
    td_gen *g = leg->gen;
    td_worker *w = td_registry_find(&g->dispatch->registry, leg->worker);
    if (w) {
        w->sched.sent_requests--;
        w->sched.sent_seqs -= leg->seqs;
        w->sched.sent_blocks -= leg->blocks;
        w->sched.sent_tokens -= leg->tokens;
    }
    if (g->leg[leg->kind] == leg)
        g->leg[leg->kind] = NULL;
    g->n_legs--;
    free(leg);
}

void td_leg_drop(td_gen *g)
{
    for (int k = 0; k < 2; k++) {
        td_gen_leg *leg = g->leg[k];
        if (leg && !leg->call)
            leg_free(leg);
    }
}

void td_leg_cancel(td_gen *g, td_leg kind)
{
    if (g->leg[kind] && g->leg[kind]->call)
        td_call_cancel(g->leg[kind]->call, "the request is over or goes on elsewhere");
}

static void broken(td_gen *g, const td_gen_leg *leg, const char *what)
{
    td_life_event ev = {.kind = TD_LIFE_EV_BROKEN, .attempt = leg->attempt, .leg = leg->kind};
    snprintf(g->why, sizeof g->why, "the %s worker sent a malformed %s",
             leg->kind == TD_LEG_DECODE ? "decode" : "prefill", what);
    td_gen_step(g, &ev, NULL);
}

static void feed(td_gen *g, const td_gen_leg *leg, td_life_event_kind kind)
{
    td_life_event ev = {.kind = kind, .attempt = leg->attempt, .leg = leg->kind};
    td_gen_step(g, &ev, NULL);
}

void td_leg_feed_run(td_gen *g, uint32_t attempt, const struct Tandem__V1__TokenRun *m)
{
    td_life_run life;
    td_gen_run run;
    td_life_event ev = {.kind = TD_LIFE_EV_RUN,
                        .attempt = attempt,
                        .leg = TD_LEG_DECODE,
                        .runs = &life,
                        .n_runs = 1};
    if (td_wire_run(g, m, &life, &run) < 0) {
        td_gen_leg as = {.attempt = attempt, .kind = TD_LEG_DECODE};
        broken(g, &as, "TokenRun");
        return;
    }
    td_gen_step(g, &ev, &run);
}

/* Figures of the worker that prefilled: its own times, and what it had in its cache, which counts
 * for the first attempt that answered. */
static void note_prefill(td_gen *g, uint64_t prefill_us, uint32_t cached_tokens)
{
    td_dispatch *d = g->dispatch;
    g->usage.prefill_us += prefill_us;
    td_histogram_add(d->stats.prefill_time, (double)prefill_us / 1e6);
    if (td_life_is_resume(&g->life))
        return;
    g->usage.cached_tokens = TD_MIN(cached_tokens, g->usage.prompt_tokens);
    td_counter_add(d->stats.cached_tokens, g->usage.cached_tokens);
}

static void on_committed(td_gen *g, const td_gen_leg *leg, const Tandem__V1__Usage *usage)
{
    td_dispatch *d = g->dispatch;
    if (usage && leg->attempt == g->life.attempt && g->life.local) {
        note_prefill(g, usage->prefill_us, usage->cached_tokens);
    } else if (usage && leg->attempt == g->life.attempt) {
        g->usage.transfer_us += usage->transfer_us;
        g->usage.transfer_bytes += usage->transfer_bytes;
        td_counter_add(d->stats.kv_bytes, usage->transfer_bytes);
        td_histogram_add(d->stats.kv_time, (double)usage->transfer_us / 1e6);
    }
    feed(g, leg, TD_LIFE_EV_COMMIT);
}

/* Never more than was allowed, and never beside a ticket. */
static void on_local(td_gen *g, const td_gen_leg *leg, const Tandem__V1__DecodeEvent *m)
{
    if (m->ticket || m->local == 0 || m->local > g->dispatch->config.local_tokens) {
        broken(g, leg, "DecodeEvent");
        return;
    }
    if (leg->attempt == g->life.attempt)
        g->local_tokens = m->local;
    feed(g, leg, TD_LIFE_EV_LOCAL);
}

static void on_decode_data(void *arg, td_call *c, td_str message)
{
    td_gen_leg *leg = arg;
    td_gen *g = leg->gen;
    td_dispatch *d = g->dispatch;
    td_arena_reset(&d->scratch);
    ProtobufCAllocator alloc = td_wire_allocator(d);
    Tandem__V1__DecodeEvent *m =
        tandem__v1__decode_event__unpack(&alloc, message.len, (const uint8_t *)message.ptr);
    if (!m) {
        broken(g, leg, "DecodeEvent");
        return;
    }
    if (m->ticket) {
        g->ticket = m->ticket;
        feed(g, leg, TD_LIFE_EV_TICKET);
        g->ticket = NULL;
    }
    if (m->has_local)
        on_local(g, leg, m);
    if (m->has_committed && m->committed)
        on_committed(g, leg, m->usage);
    uint32_t attempt = leg->attempt;
    for (size_t i = 0; i < m->n_runs; i++)
        td_leg_feed_run(g, attempt, m->runs[i]);
}

static int send_prompt_logprobs(td_gen *g, const Tandem__V1__PrefillReply *m)
{
    const float *logprobs;
    const td_gen_top *top;
    if (!g->spec.prompt_logprobs || g->prompt_sent || g->ended)
        return 0;
    if (!m->prompt || td_wire_prompt(g, m->prompt, &logprobs, &top) < 0)
        return -EBADMSG;
    g->prompt_sent = 1;
    if (g->ops.on_prompt_logprobs)
        g->ops.on_prompt_logprobs(g->arg, logprobs, top, g->spec.n_prompt - 1);
    return 0;
}

static void on_prefill_data(void *arg, td_call *c, td_str message)
{
    td_gen_leg *leg = arg;
    td_gen *g = leg->gen;
    td_dispatch *d = g->dispatch;
    td_life_run life[TD_LIFE_CHOICES_MAX];
    td_gen_run run[TD_LIFE_CHOICES_MAX];
    td_arena_reset(&d->scratch);
    ProtobufCAllocator alloc = td_wire_allocator(d);
    Tandem__V1__PrefillReply *m =
        tandem__v1__prefill_reply__unpack(&alloc, message.len, (const uint8_t *)message.ptr);
    if (leg->attempt != g->life.attempt || g->ended)
        return; /* of an attempt that was given up */
    int bad = !m || m->n_first > TD_LIFE_CHOICES_MAX;
    for (size_t i = 0; !bad && i < m->n_first; i++)
        bad = td_wire_run(g, m->first[i], &life[i], &run[i]) < 0;
    if (bad || send_prompt_logprobs(g, m) < 0) {
        broken(g, leg, "PrefillReply");
        return;
    }
    note_prefill(g, m->usage ? m->usage->prefill_us : 0, m->cached_tokens);
    td_life_event ev = {.kind = TD_LIFE_EV_FIRST,
                        .attempt = leg->attempt,
                        .leg = TD_LEG_PREFILL,
                        .runs = life,
                        .n_runs = (uint32_t)m->n_first};
    td_gen_step(g, &ev, run);
}

static void on_status(void *arg, td_call *c, const td_status *status)
{
    td_gen_leg *leg = arg;
    td_gen *g = leg->gen;
    td_dispatch *d = g->dispatch;
    td_life_event ev = {
        .kind = TD_LIFE_EV_STATUS, .attempt = leg->attempt, .leg = leg->kind, .code = status->code};
    if (status->error && *status->error)
        ev.error = td_error_by_name(status->error, strlen(status->error));
    if (status->code != TD_OK && leg->attempt == g->life.attempt && status->message &&
        *status->message)
        snprintf(g->why, sizeof g->why, "%s", status->message);
    leg_free(leg); /* the room is free before a next attempt looks for some */
    td_gen_step(g, &ev, NULL);
    td_gen_release(g);
    td_loop_after(d->loop, &d->after);
}

int td_leg_start(td_gen *g, td_leg kind)
{
    td_dispatch *d = g->dispatch;
    td_gen_leg *leg = g->leg[kind];
    td_worker *w = leg ? td_registry_find(&d->registry, leg->worker) : NULL;
    uint64_t now = td_now_us();
    if (!w || !w->sched.ready)
        return -ENOTCONN;
    int e = kind == TD_LEG_DECODE ? td_wire_pack_reserve(g) : td_wire_pack_prefill(g);
    if (e < 0)
        return e;
    td_call_spec spec = {
        .session = w->session,
        .method = kind == TD_LEG_DECODE ? "tandem.v1.Engine/Reserve" : "tandem.v1.Engine/Prefill",
        .message = d->pack.data,
        .message_bytes = d->pack.len,
        .timeout_us = g->life.config.deadline_us > now ? g->life.config.deadline_us - now : 1,
        .request_id = g->spec.request_id,
        .attempt = g->life.attempt,
        .credit = kind == TD_LEG_DECODE ? DECODE_CREDIT : 0,
        .ops = {kind == TD_LEG_DECODE ? on_decode_data : on_prefill_data, on_status},
        .arg = leg,
    };
    return td_call_start(&spec, &leg->call);
}
