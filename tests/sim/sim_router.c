/* SPDX-License-Identifier: Apache-2.0 */
/* Shell of the router: the product's life, sched and admit, as router/dispatch.c runs them. */
#include <stdlib.h>
#include <string.h>

#include "sim.h"

#include "base/bug.h"
#include "base/clock.h"
#include "base/banned.h"

enum { QUEUE_MAX = 32, GRACE_US = 2000000 };

static void pump(sim *s);
static void gen_step(sim *s, sim_gen *g, const td_life_event *ev, const sim_run *runs);

static sim_gen *gen_of(td_admit_entry *e)
{
    return TD_LIST_ENTRY(e, sim_gen, entry);
}

/* ---- workers ---- */

static sim_peer *find_peer(sim *s, uint64_t id)
{
    for (uint32_t i = 0; i < s->router.n_peers; i++)
        if (s->router.peers[i].sched.id == id)
            return &s->router.peers[i];
    return NULL;
}

static sim_peer *peer_of(sim *s, const sim_conn *c)
{
    for (uint32_t i = 0; i < s->router.n_peers; i++)
        if (s->router.peers[i].conn == c)
            return &s->router.peers[i];
    return NULL;
}

static void set_views(sim *s)
{
    for (uint32_t i = 0; i < s->router.n_peers; i++)
        s->router.view[i] = &s->router.peers[i].sched;
}

static td_sched_need need_of(const sim_gen *g)
{
    return (td_sched_need){.n_prompt = g->request.n_prompt,
                           .n_choices = g->request.n,
                           .max_tokens = g->request.max_tokens,
                           .alone = td_life_is_alone(&g->life),
                           .failed = g->failed,
                           .n_failed = g->n_failed};
}

static td_sched_verdict choose(sim *s, const sim_gen *g, uint32_t *d, uint32_t *p)
{
    td_sched_need need = need_of(g);
    return td_sched_choose(s->router.view, s->router.n_peers, &need, d, p);
}

static void set_expiry(sim *s, sim_gen *g)
{
    uint32_t d, p;
    td_sched_verdict v = choose(s, g, &d, &p);
    uint64_t deadline = g->life.config.deadline_us;
    if (v == TD_SCHED_OK || v == TD_SCHED_BUSY)
        g->entry.expires_us = deadline;
    else if (g->entry.expires_us == deadline || g->entry.expires_us > s->now + GRACE_US)
        g->entry.expires_us = TD_MIN(deadline, s->now + GRACE_US);
}

static void on_workers_changed(sim *s)
{
    for (uint32_t i = 0; i < s->router.n_gens; i++)
        if (s->router.gens[i].entry.queued)
            set_expiry(s, &s->router.gens[i]);
    pump(s);
}

static void on_up(sim *s, sim_event *e)
{
    sim_peer *p = peer_of(s, e->p);
    if (!p)
        return;
    p->sched.ready = 1;
    on_workers_changed(s);
}

int sim_router_hello(sim *s, sim_conn *c)
{
    sim_router *r = &s->router;
    const sim_worker *w = &s->workers[c->worker];
    if (r->n_peers == SIM_WORKERS_MAX)
        return 0;
    sim_peer *p = &r->peers[r->n_peers++];
    memset(p, 0, sizeof *p);
    p->worker = c->worker;
    p->conn = c;
    p->sched = (td_sched_worker){.id = ++r->next_peer,
                                 .is_decode = w->is_decode,
                                 .kv_blocks = w->pool.n,
                                 .max_seqs = w->decode_policy.max_seqs,
                                 .max_context = w->decode_policy.max_context};
    set_views(s);
    sim_at(s, s->now, &(sim_event){.fn = on_up, .p = c});
    return 1;
}

void sim_router_down(sim *s, sim_conn *c, td_down why)
{
    sim_peer *p = peer_of(s, c);
    s->tally->silences += why == TD_DOWN_SILENCE;
    sim_log(s, "router: worker %u is down, %d", c->worker, (int)why);
    if (!p)
        return;
    *p = s->router.peers[--s->router.n_peers];
    set_views(s);
    on_workers_changed(s);
}

int sim_router_serves(sim *s, const sim_conn *c)
{
    const sim_peer *p = peer_of(s, c);
    return p && p->sched.ready && !p->sched.draining;
}

void sim_router_goaway(sim *s, sim_conn *c)
{
    sim_peer *p = peer_of(s, c);
    if (!p)
        return;
    p->sched.draining = 1;
    on_workers_changed(s);
}

void sim_router_load(sim *s, sim_conn *c, const sim_body *b)
{
    sim_peer *p = peer_of(s, c);
    if (!p || !b)
        return;
    td_sched_seen(&p->sched, b->used_blocks, 0, b->waiting_tokens);
    if (b->step != p->seen_step) {
        p->seen_step = b->step;
        p->progress_us = s->now;
    }
    pump(s);
}

/* ---- queue ---- */

static void on_wake(sim *s, sim_event *e)
{
    if (s->router.wake_us != e->a)
        return;
    s->router.wake_us = 0;
    pump(s);
}

static void set_wake(sim *s)
{
    uint64_t at = td_admit_wake_us(&s->router.admit, s->now);
    if (at == UINT64_MAX || at == s->router.wake_us)
        return;
    s->router.wake_us = at;
    sim_at(s, at, &(sim_event){.fn = on_wake, .a = at});
}

static void plan_leg(sim *s, sim_gen *g, td_leg kind, sim_peer *p)
{
    sim_leg *leg = calloc(1, sizeof *leg);
    TD_BUG_ON(!leg);
    *leg = (sim_leg){.gen = g, .kind = kind, .attempt = g->life.attempt, .worker_id = p->sched.id};
    if (kind == TD_LEG_DECODE) {
        leg->seqs = g->request.n;
        leg->blocks =
            (uint32_t)td_sched_blocks(g->request.n_prompt, g->request.n, g->request.max_tokens);
    } else {
        leg->tokens = g->request.n_prompt;
    }
    p->sched.sent_requests++;
    p->sched.sent_seqs += leg->seqs;
    p->sched.sent_blocks += leg->blocks;
    p->sched.sent_tokens += leg->tokens;
    td_list_add(&s->router.legs, &leg->link);
    g->leg[kind] = leg;
    g->pair[kind] = p->sched.id;
    g->n_legs++;
}

static void leg_free(sim *s, sim_leg *leg)
{
    sim_peer *p = find_peer(s, leg->worker_id);
    if (p) {
        p->sched.sent_requests--;
        p->sched.sent_seqs -= leg->seqs;
        p->sched.sent_blocks -= leg->blocks;
        p->sched.sent_tokens -= leg->tokens;
    }
    if (leg->gen->leg[leg->kind] == leg)
        leg->gen->leg[leg->kind] = NULL;
    leg->gen->n_legs--;
    td_list_del(&leg->link);
    free(leg);
}

static void drop_planned(sim *s, sim_gen *g)
{
    for (int k = 0; k < 2; k++)
        if (g->leg[k] && !g->leg[k]->conn)
            leg_free(s, g->leg[k]);
}

static td_sched_verdict place(sim *s, sim_gen *g)
{
    uint32_t d, p;
    td_sched_verdict v = choose(s, g, &d, &p);
    if (v != TD_SCHED_OK)
        return v;
    td_admit_take(&s->router.admit, &g->entry);
    if (d != UINT32_MAX)
        plan_leg(s, g, TD_LEG_DECODE, &s->router.peers[d]);
    plan_leg(s, g, TD_LEG_PREFILL, &s->router.peers[p]);
    td_life_event ev = {.kind = TD_LIFE_EV_PAIR};
    gen_step(s, g, &ev, NULL);
    return v;
}

static td_error missing_error(const sim_gen *g, td_sched_verdict v)
{
    if (td_life_is_resume(&g->life))
        return TD_ERROR_WORKER_LOST;
    return v == TD_SCHED_NO_DECODE    ? TD_ERROR_NO_DECODE
           : v == TD_SCHED_NO_PREFILL ? TD_ERROR_NO_PREFILL
                                      : TD_ERROR_OVERLOADED;
}

static void pump_once(sim *s)
{
    td_admit *a = &s->router.admit;
    td_admit_entry *e;
    while ((e = td_admit_expired(a, s->now))) {
        uint32_t d, p;
        sim_gen *g = gen_of(e);
        td_life_event ev = {.kind = TD_LIFE_EV_EXPIRED,
                            .error = missing_error(g, choose(s, g, &d, &p))};
        td_admit_remove(a, e);
        gen_step(s, g, &ev, NULL);
    }
    e = td_admit_moved_after(a, NULL, s->now);
    while (e) {
        td_admit_entry *next = td_admit_moved_after(a, e, s->now);
        place(s, gen_of(e));
        e = next;
    }
    while ((e = td_admit_next(a, s->now)))
        if (place(s, gen_of(e)) != TD_SCHED_OK)
            break;
    set_wake(s);
}

/* The product pumps once at the end of a loop's turn: never inside a step. */
static void on_pump(sim *s, sim_event *e)
{
    s->router.pump_owed = 0;
    pump_once(s);
}

static void pump(sim *s)
{
    if (s->router.pump_owed || !td_admit_len(&s->router.admit))
        return;
    s->router.pump_owed = 1;
    sim_at(s, s->now, &(sim_event){.fn = on_pump});
}

/* ---- calls ---- */

static void fill_request(const sim *s, const sim_gen *g, sim_request *r)
{
    *r = g->request;
    r->resume = td_life_is_resume(&g->life);
    for (uint32_t c = 0; c < r->n; c++) {
        r->open[c] = (uint8_t)td_life_choice_is_open(&g->life, c);
        r->n_emitted[c] = g->life.choice[c].n_emitted;
        if (s->options.bug == SIM_BUG_RESUME && r->n_emitted[c] > 1)
            r->n_emitted[c]--;
    }
}

static int start_call(sim *s, sim_gen *g, td_leg kind)
{
    sim_leg *leg = g->leg[kind];
    sim_peer *p = leg ? find_peer(s, leg->worker_id) : NULL;
    if (!p || !p->sched.ready || !p->conn->streams[SIM_ROUTER_END])
        return -1;
    sim_body *b = sim_body_new(s, kind == TD_LEG_DECODE ? SIM_RESERVE : SIM_PREFILL);
    fill_request(s, g, &b->request);
    b->attempt = g->life.attempt;
    b->local = kind == TD_LEG_DECODE ? s->local : 0;
    if (kind == TD_LEG_PREFILL && g->ticket) {
        b->has_ticket = 1;
        b->ticket = *g->ticket;
    }
    leg->slow = sim_fault(s, SIM_F_READER, 2);
    td_stream_event ev = {.type = TD_EV_OPEN,
                          .credit = leg->slow ? 2 : 16,
                          .user = leg,
                          .timeout_us = TD_MAX(g->life.config.deadline_us, s->now + 1) - s->now};
    if (s->options.bug == SIM_BUG_TIMER)
        ev.timeout_us += TD_S;
    leg->conn = p->conn;
    int r = sim_step_r(s, p->conn, SIM_ROUTER_END, &ev, b, &leg->stream, NULL);
    if (r < 0)
        leg->conn = NULL;
    sim_body_unref(s, b);
    return r;
}

static void start_leg(sim *s, sim_gen *g, td_leg kind)
{
    uint32_t attempt = g->life.attempt;
    if (start_call(s, g, kind) >= 0)
        return;
    td_life_event ev = {
        .kind = TD_LIFE_EV_STATUS, .attempt = attempt, .leg = kind, .code = TD_UNAVAILABLE};
    gen_step(s, g, &ev, NULL);
}

static void cancel_leg(sim *s, sim_gen *g, td_leg kind)
{
    sim_leg *leg = g->leg[kind];
    if (!leg || !leg->conn || s->options.bug == SIM_BUG_NO_CANCEL)
        return;
    td_stream_event ev = {.type = TD_EV_CANCEL, .stream = leg->stream};
    sim_step(s, leg->conn, SIM_ROUTER_END, &ev, NULL);
}

/* ---- a request ---- */

static void drop_held(sim_gen *g)
{
    while (g->held) {
        sim_held *h = g->held;
        g->held = h->next;
        free(h);
    }
    g->held_end = &g->held;
}

static void hold(sim *s, sim_gen *g, const td_life_event *ev, const sim_run *run)
{
    if (s->options.bug == SIM_BUG_NO_HOLD)
        return;
    s->tally->held++;
    sim_held *h = calloc(1, sizeof *h);
    TD_BUG_ON(!h);
    h->attempt = ev->attempt;
    h->is_status = ev->kind == TD_LIFE_EV_STATUS;
    if (run)
        h->run = *run;
    *g->held_end = h;
    g->held_end = &h->next;
}

static void feed_run(sim *s, sim_gen *g, uint32_t attempt, const sim_run *r)
{
    uint32_t index = r->index + (s->options.bug == SIM_BUG_INDEX);
    const uint32_t *ids = r->ids;
    uint32_t n = r->n;
    sim_run shifted = *r;
    if (s->options.bug == SIM_BUG_INDEX && g->life.choice[r->choice].n_emitted == r->index &&
        n > 0) {
        shifted.index = index; /* the life sees what it expects, the client what it must not */
        index = r->index;
    }
    td_life_run life = {r->choice, index, ids, n, (int)r->finish};
    td_life_event ev = {.kind = TD_LIFE_EV_RUN,
                        .attempt = attempt,
                        .leg = TD_LEG_DECODE,
                        .runs = &life,
                        .n_runs = 1};
    gen_step(s, g, &ev, &shifted);
}

static void release_held(sim *s, sim_gen *g)
{
    sim_held *h = g->held;
    g->held = NULL;
    g->held_end = &g->held;
    while (h) {
        sim_held *next = h->next;
        if (h->is_status) {
            td_life_event ev = {.kind = TD_LIFE_EV_STATUS,
                                .attempt = h->attempt,
                                .leg = TD_LEG_DECODE,
                                .code = TD_OK};
            gen_step(s, g, &ev, NULL);
        } else {
            feed_run(s, g, h->attempt, &h->run);
        }
        free(h);
        h = next;
    }
}

static void on_arm(sim *s, sim_event *e)
{
    sim_gen *g = e->p;
    if (g->arm_us != e->a || g->ended)
        return;
    const sim_peer *p = find_peer(s, g->pair[td_life_prefiller(&g->life)]);
    td_life_event ev = {.kind = TD_LIFE_EV_TIMER, .progress_us = p ? p->progress_us : 0};
    gen_step(s, g, &ev, NULL);
}

static void finish(sim *s, sim_gen *g, td_error error)
{
    td_admit_remove(&s->router.admit, &g->entry);
    drop_planned(s, g);
    drop_held(g);
    if (s->options.bug == SIM_BUG_NO_END && g->request.id == 3)
        return;
    sim_client_end(s, g, error);
    if (s->options.bug == SIM_BUG_DOUBLE_END && g->request.id == 3)
        sim_client_end(s, g, error);
}

static void queue(sim *s, sim_gen *g, uint64_t at_us)
{
    g->entry.not_before_us = at_us;
    g->entry.expires_us = g->life.config.deadline_us;
    if (g->life.attempt > 1)
        td_admit_push_moved(&s->router.admit, &g->entry);
    else
        TD_BUG_ON(td_admit_push(&s->router.admit, &g->entry) < 0);
    set_expiry(s, g);
    pump(s);
}

static void act(sim *s, sim_gen *g, const td_life_event *ev, const td_life_action *a,
                const sim_run *runs)
{
    static const char *const names[] = {"",       "dispatch", "reserve", "prefill", "local",
                                        "cancel", "blame",    "deliver", "hold",    "release",
                                        "drop",   "arm",      "end"};
    if (a->kind != TD_LIFE_DELIVER)
        sim_log(s, "request %u attempt %u: %s leg %d", g->request.id, g->life.attempt,
                names[a->kind], (int)a->leg);
    switch (a->kind) {
    case TD_LIFE_DISPATCH:
        drop_planned(s, g);
        g->leg[0] = g->leg[1] = NULL;
        queue(s, g, a->at_us);
        break;
    case TD_LIFE_RESERVE:
        start_leg(s, g, TD_LEG_DECODE);
        break;
    case TD_LIFE_PREFILL:
        start_leg(s, g, TD_LEG_PREFILL);
        break;
    case TD_LIFE_LOCAL:
        drop_planned(s, g);
        s->tally->local_prefills++;
        s->tally->local_resumes += (uint64_t)td_life_is_resume(&g->life);
        break;
    case TD_LIFE_CANCEL_LEG:
        cancel_leg(s, g, a->leg);
        break;
    case TD_LIFE_BLAME:
        s->tally->redispatches++;
        s->tally->stalls += ev->kind == TD_LIFE_EV_TIMER && a->leg == TD_LEG_PREFILL;
        if (g->n_failed < TD_ARRAY_LEN(g->failed))
            g->failed[g->n_failed++] = g->pair[a->leg];
        break;
    case TD_LIFE_DELIVER:
        if (g->life.choice[runs[a->run].choice].ended ||
            (g->want_end_choices & 1u << runs[a->run].choice))
            break;
        sim_client_run(s, g, &runs[a->run]);
        if (s->options.bug == SIM_BUG_DOUBLE_FIRST && ev->kind == TD_LIFE_EV_FIRST &&
            g->request.id == 4)
            sim_client_run(s, g, &runs[a->run]);
        break;
    case TD_LIFE_HOLD:
        hold(s, g, ev, ev->kind == TD_LIFE_EV_RUN ? runs : NULL);
        break;
    case TD_LIFE_RELEASE:
        release_held(s, g);
        break;
    case TD_LIFE_DROP_HELD:
        drop_held(g);
        break;
    case TD_LIFE_ARM:
        if (a->at_us != g->life.armed_us)
            break;
        g->arm_us = a->at_us;
        sim_at(s, a->at_us + (s->options.bug == SIM_BUG_TIMER ? TD_S : 0),
               &(sim_event){.fn = on_arm, .a = a->at_us, .p = g});
        break;
    case TD_LIFE_END:
        finish(s, g, a->error);
        break;
    }
}

static void gen_step(sim *s, sim_gen *g, const td_life_event *ev, const sim_run *runs)
{
    td_life_actions actions;
    uint64_t stale = g->life.n_stale;
    uint32_t refused = g->life.n_refused;
    td_life_step(&g->life, ev, s->now, &actions);
    s->tally->stale += g->life.n_stale - stale;
    s->tally->no_room += g->life.n_refused - refused;
    g->depth++;
    for (uint32_t i = 0; i < actions.n; i++) {
        if (g->ended && actions.v[i].kind != TD_LIFE_CANCEL_LEG)
            continue;
        act(s, g, ev, &actions.v[i], runs);
    }
    g->depth--;
    while (!g->depth && g->want_end_choices && !g->ended) {
        td_life_event more = {.kind = TD_LIFE_EV_END_CHOICE,
                              .choice = (uint32_t)__builtin_ctz(g->want_end_choices)};
        g->want_end_choices &= g->want_end_choices - 1;
        gen_step(s, g, &more, NULL);
    }
}

/* As td_gen_cancel() and td_gen_end_choice(). */
void sim_router_event(sim *s, sim_gen *g, const td_life_event *ev)
{
    if (ev->kind == TD_LIFE_EV_END_CHOICE && g->depth)
        g->want_end_choices |= 1u << ev->choice;
    else
        gen_step(s, g, ev, NULL);
}

/* ---- what workers say ---- */

static void on_consume(sim *s, sim_event *e)
{
    td_stream_event ev = {.type = TD_EV_CONSUME, .stream = e->a, .messages = 1};
    sim_step(s, e->p, SIM_ROUTER_END, &ev, NULL);
}

void sim_router_data(sim *s, sim_conn *c, uint64_t stream, sim_leg *leg, const sim_body *b)
{
    sim_gen *g = leg->gen;
    uint32_t attempt = leg->attempt;
    td_leg kind = leg->kind;
    uint64_t later = leg->slow ? sim_below(s, 40 * TD_MS) : 0;
    if (b->has_ticket) {
        td_life_event ev = {.kind = TD_LIFE_EV_TICKET, .attempt = attempt, .leg = kind};
        g->ticket = &b->ticket;
        gen_step(s, g, &ev, NULL);
        g->ticket = NULL;
    }
    if (b->local && b->kind == SIM_EVENT) {
        td_life_event ev = {.kind = TD_LIFE_EV_LOCAL, .attempt = attempt, .leg = kind};
        gen_step(s, g, &ev, NULL);
    }
    if (b->committed) {
        td_life_event ev = {.kind = TD_LIFE_EV_COMMIT, .attempt = attempt, .leg = kind};
        gen_step(s, g, &ev, NULL);
    }
    if (b->kind == SIM_REPLY) {
        td_life_run runs[SIM_CHOICES_MAX];
        for (uint32_t i = 0; i < b->n_runs; i++)
            runs[i] = (td_life_run){b->runs[i].choice, b->runs[i].index, b->runs[i].ids,
                                    b->runs[i].n, (int)b->runs[i].finish};
        td_life_event ev = {.kind = TD_LIFE_EV_FIRST,
                            .attempt = attempt,
                            .leg = kind,
                            .runs = runs,
                            .n_runs = b->n_runs};
        gen_step(s, g, &ev, b->runs);
    } else {
        for (uint32_t i = 0; i < b->n_runs; i++)
            feed_run(s, g, attempt, &b->runs[i]);
    }
    sim_at(s, s->now + later, &(sim_event){.fn = on_consume, .a = stream, .p = c});
}

void sim_router_status(sim *s, sim_conn *c, sim_leg *leg, uint32_t code, const sim_body *b)
{
    sim_gen *g = leg->gen;
    td_life_event ev = {.kind = TD_LIFE_EV_STATUS,
                        .attempt = leg->attempt,
                        .leg = leg->kind,
                        .code = code,
                        .error = b ? b->error : TD_ERROR_NONE};
    if (code != TD_OK)
        sim_log(s, "request %u attempt %u leg %d: status %u", g->request.id, leg->attempt,
                (int)leg->kind, code);
    leg_free(s, leg);
    gen_step(s, g, &ev, NULL);
    pump(s);
}

/* ---- life ---- */

void sim_router_open(sim *s)
{
    TD_BUG_ON(td_admit_init(&s->router.admit, QUEUE_MAX, s->seed) < 0);
    td_list_init(&s->router.legs);
    for (uint32_t i = 0; i < SIM_REQUESTS_MAX; i++)
        s->router.gens[i].held_end = &s->router.gens[i].held;
}

void sim_router_submit(sim *s, sim_gen *g)
{
    td_sched_need need = need_of(g);
    uint32_t d, p;
    td_sched_verdict v = td_sched_choose(s->router.view, s->router.n_peers, &need, &d, &p);
    s->tally->requests++;
    if ((v != TD_SCHED_OK && v != TD_SCHED_BUSY) || s->router.admit.n == QUEUE_MAX) {
        s->tally->refused++;
        return;
    }
    g->live = 1;
    g->entry.tenant = g->request.id % 3;
    td_life_event ev = {.kind = TD_LIFE_EV_START};
    gen_step(s, g, &ev, NULL);
}

void sim_router_close(sim *s)
{
    for (uint32_t i = 0; i < s->router.n_gens; i++)
        drop_held(&s->router.gens[i]);
    TD_LIST_FOR (l, &s->router.legs) /* left over when a seed failed */
        free(TD_LIST_ENTRY(l, sim_leg, link));
    td_admit_done(&s->router.admit);
}
