/* SPDX-License-Identifier: Apache-2.0 */
#include "sim.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bug.h"
#include "base/clock.h"
#include "base/banned.h"

const char *sim_bug_name(sim_bug b)
{
    static const char *const names[SIM_BUG_MAX] = {
        [SIM_BUG_NONE] = "none",
        [SIM_BUG_INDEX] = "index off by one",
        [SIM_BUG_DOUBLE_END] = "double terminal",
        [SIM_BUG_NO_END] = "lost terminal",
        [SIM_BUG_DOUBLE_FIRST] = "first tokens twice",
        [SIM_BUG_NO_CANCEL] = "cancel not sent",
        [SIM_BUG_NO_HOLD] = "early runs dropped",
        [SIM_BUG_NO_CRC] = "checksum not compared",
        [SIM_BUG_NO_FENCE] = "late segments copied",
        [SIM_BUG_LEAK_DECODE] = "decode blocks leak",
        [SIM_BUG_LEAK_PREFILL] = "prefill pins leak",
        [SIM_BUG_EARLY_FREE] = "pins dropped in flight",
        [SIM_BUG_RESUME] = "recovery one id short",
        [SIM_BUG_TIMER] = "late deadline",
        [SIM_BUG_LOCAL_INDEX] = "local first token kept back",
        [SIM_BUG_LOCAL_ROWS] = "local chunk left out",
    };
    return names[b];
}

/* ---- clock and queue ---- */

static int before(const sim_event *a, const sim_event *b)
{
    return a->at != b->at ? a->at < b->at : a->order < b->order;
}

static void swap(sim_event *a, sim_event *b)
{
    sim_event t = *a;
    *a = *b;
    *b = t;
}

static void sift_up(sim *s, size_t i)
{
    while (i > 0 && before(&s->heap[i], &s->heap[(i - 1) / 2])) {
        swap(&s->heap[i], &s->heap[(i - 1) / 2]);
        i = (i - 1) / 2;
    }
}

static void heap_push(sim *s, const sim_event *e)
{
    if (s->n_heap == s->cap_heap) {
        s->cap_heap = s->cap_heap ? s->cap_heap * 2 : 1024;
        s->heap = realloc(s->heap, s->cap_heap * sizeof *s->heap);
        TD_BUG_ON(!s->heap);
    }
    s->heap[s->n_heap++] = *e;
    sift_up(s, s->n_heap - 1);
}

static sim_event heap_pop(sim *s)
{
    sim_event top = s->heap[0];
    s->heap[0] = s->heap[--s->n_heap];
    for (size_t i = 0;;) {
        size_t l = 2 * i + 1, r = l + 1, m = i;
        if (l < s->n_heap && before(&s->heap[l], &s->heap[m]))
            m = l;
        if (r < s->n_heap && before(&s->heap[r], &s->heap[m]))
            m = r;
        if (m == i)
            return top;
        swap(&s->heap[i], &s->heap[m]);
        i = m;
    }
}

void sim_at(sim *s, uint64_t at, const sim_event *what)
{
    sim_event e = *what;
    e.at = TD_MAX(at, s->now);
    e.order = ++s->order;
    heap_push(s, &e);
}

void sim_fail(sim *s, const char *fmt, ...)
{
    if (s->failed)
        return;
    s->failed = 1;
    va_list ap;
    va_start(ap, fmt);
    int n = snprintf(s->text, sizeof s->text, "at %llu us: ", (unsigned long long)s->now);
    vsnprintf(s->text + n, sizeof s->text - (size_t)n, fmt, ap);
    va_end(ap);
}

void sim_log(sim *s, const char *fmt, ...)
{
    if (!s->options.verbose)
        return;
    va_list ap;
    va_start(ap, fmt);
    fprintf(stderr, "%9llu ", (unsigned long long)s->now);
    vfprintf(stderr, fmt, ap);
    fputc('\n', stderr);
    va_end(ap);
}

uint64_t sim_below(sim *s, uint64_t n)
{
    return td_rng_below(&s->rng, n);
}

int sim_fault(sim *s, uint32_t fault, uint32_t one_in)
{
    return (s->faults & fault) && s->now < s->faults_end_us && sim_below(s, one_in) == 0;
}

uint64_t sim_hash(uint64_t a, uint64_t b, uint64_t c, uint64_t d)
{
    uint64_t x = a;
    const uint64_t v[3] = {b, c, d};
    for (int i = 0; i < 3; i++) {
        x = (x ^ v[i]) * 0x9E3779B97F4A7C15ull + 0xD1B54A32D192ED03ull;
        x ^= x >> 29;
        x *= 0xBF58476D1CE4E5B9ull;
        x ^= x >> 32;
    }
    return x;
}

/* ---- the fake model ---- */

uint32_t sim_token(uint64_t seed, uint32_t choice, uint32_t index)
{
    return (uint32_t)(sim_hash(seed, choice, index, 1) % SIM_VOCAB);
}

uint32_t sim_length(const sim_request *r, uint32_t choice)
{
    uint64_t h = sim_hash(r->seed, choice, 0, 2);
    return h % 3 == 0 ? 1 + (uint32_t)(h >> 8) % r->max_tokens : r->max_tokens;
}

uint32_t sim_finish(const sim_request *r, uint32_t choice, uint32_t index)
{
    if (index + 1 < sim_length(r, choice))
        return 0;
    return sim_length(r, choice) < r->max_tokens ? 1 : 2;
}

uint64_t sim_content(const sim_request *r, uint32_t choice, uint32_t block, uint32_t rows,
                     uint32_t group)
{
    int own =
        block * TD_BLOCK_TOKENS + rows > r->n_prompt; /* rows of emitted ids: of this choice only */
    return sim_hash(r->seed, (uint64_t)block << 32 | rows, group, own ? 10 + choice : 3);
}

void sim_chain(const sim_request *r, uint32_t choice, uint32_t block, uint8_t ret_chain[16])
{
    uint64_t h[2] = {sim_content(r, choice, block, TD_BLOCK_TOKENS, 7),
                     sim_content(r, choice, block, TD_BLOCK_TOKENS, 8)};
    memcpy(ret_chain, h, 16);
}

int sim_plan(const sim_request *r, td_handoff_plan *ret_plan, uint32_t *ret_choices)
{
    uint32_t choices[SIM_CHOICES_MAX], n = 0;
    size_t emitted[SIM_CHOICES_MAX];
    for (uint32_t i = 0; i < r->n; i++) {
        if (r->resume && !r->open[i])
            continue;
        choices[n] = ret_choices[n] = i;
        emitted[n++] = r->n_emitted[i];
    }
    return td_plan_init(ret_plan, r->n_prompt, r->n, choices, emitted, r->resume ? n : 0);
}

td_ticket_terms sim_terms(void)
{
    td_ticket_terms t;
    memset(&t, 7, sizeof t);
    return t;
}

/* ---- messages and pools ---- */

void sim_working_for(sim *s, uint32_t request)
{
    const sim_gen *g = &s->router.gens[request];
    if (g->ended && !(s->faults & (SIM_F_HARM | SIM_F_NOISE)) && s->now > g->end_us + 20 * TD_MS)
        sim_fail(s, "request %u ended %llu us ago and is still worked for", request,
                 (unsigned long long)(s->now - g->end_us));
}

sim_body *sim_body_new(sim *s, int kind)
{
    /* the items of a batch are most of the size */
    size_t n = kind == SIM_BATCH ? sizeof(sim_body) : offsetof(sim_body, items);
    sim_body *b = calloc(1, n);
    TD_BUG_ON(!b);
    b->refs = 1;
    b->kind = (uint8_t)kind;
    s->n_bodies++;
    return b;
}

sim_body *sim_body_ref(sim_body *b)
{
    if (b)
        b->refs++;
    return b;
}

void sim_body_unref(sim *s, sim_body *b)
{
    if (!b || --b->refs)
        return;
    if (b->kind == SIM_BATCH)
        for (uint32_t i = 0; i < b->n_items; i++)
            sim_body_unref(s, b->items[i].body);
    s->n_bodies--;
    free(b);
}

void sim_pool_init(sim_pool *p, uint32_t n)
{
    memset(p, 0, sizeof *p);
    p->n = p->n_free = n;
}

int sim_pool_take(sim_pool *p, uint32_t n, uint32_t *ret_blocks)
{
    if (n > p->n_free)
        return 0;
    for (uint32_t b = 0, k = 0; k < n; b++) {
        if (p->refs[b])
            continue;
        p->refs[b] = 1;
        ret_blocks[k++] = b;
    }
    p->n_free -= n;
    return 1;
}

void sim_pool_put(sim *s, sim_pool *p, uint32_t block)
{
    if (!p->refs[block]) {
        sim_fail(s, "block %u is given back twice", block);
        return;
    }
    if (--p->refs[block])
        return;
    if (p->flight[block])
        sim_fail(s, "block %u is free with %u frames of it in flight", block, p->flight[block]);
    p->n_free++;
    for (int g = 0; g < SIM_GROUPS; g++)
        p->content[block][g] = 0xDEADDEADDEADDEADull; /* a stale read changes tokens */
}

/* ---- workers: lives and accidents ---- */

static void boot(sim *s, sim_worker *w)
{
    w->boot++;
    w->up = 1;
    uint64_t e[2] = {sim_hash(s->seed, w->index, w->boot, 5), w->boot};
    memcpy(w->epoch, e, 16);
    td_list_init(&w->jobs);
    w->lane_busy = 0;
    w->due_us = 0;
    w->frozen_until = w->slow_until = w->stuck_until = w->dark_until[0] = w->dark_until[1] = 0;
    w->n_steps = 0;
    w->ghost = 0;
    if (w->is_decode)
        sim_decode_boot(s, w);
    else
        sim_prefill_boot(s, w);
    sim_log(s, "worker %u boots, life %llu", w->index, (unsigned long long)w->boot);
    sim_dial(s, w);
}

static void on_boot(sim *s, sim_event *e)
{
    boot(s, &s->workers[e->worker]);
}

static void crash(sim *s, sim_worker *w)
{
    sim_log(s, "worker %u dies", w->index);
    s->tally->crashes++;
    w->up = 0;
    if (w->is_decode)
        sim_decode_die(s, w);
    else
        sim_prefill_die(s, w);
    sim_conn *c = w->conn;
    w->conn = NULL;
    if (c && c->streams[SIM_WORKER_END]) {
        c->dead[SIM_WORKER_END] = c->streams[SIM_WORKER_END];
        c->streams[SIM_WORKER_END] = NULL;
    }
    sim_at(s, s->now + 50 * TD_MS + sim_below(s, 2 * TD_S),
           &(sim_event){.fn = on_boot, .worker = w->index});
}

static void on_drained(sim *s, sim_event *e)
{
    sim_worker *w = &s->workers[e->worker];
    if (w->up && w->boot == e->a)
        crash(s, w);
}

static void drain(sim *s, sim_worker *w)
{
    if (!w->conn || !w->conn->streams[SIM_WORKER_END])
        return;
    sim_log(s, "worker %u drains", w->index);
    td_stream_event ev = {.type = TD_EV_GOAWAY, .timeout_ms = 2000};
    sim_step(s, w->conn, SIM_WORKER_END, &ev, NULL);
    sim_at(s, s->now + 2 * TD_S, &(sim_event){.fn = on_drained, .worker = w->index, .a = w->boot});
}

static void on_ghost_leaves(sim *s, sim_event *e)
{
    sim_worker *w = &s->workers[e->worker];
    if (!w->up || w->boot != e->a)
        return;
    while (w->ghost)
        sim_pool_put(s, &w->pool, w->ghost_blocks[--w->ghost]);
}

/* Somebody else's reservations: what this router predicts is wrong. */
static void ghost_comes(sim *s, sim_worker *w)
{
    uint32_t n = w->pool.n_free - w->pool.n_free / 8;
    if (w->ghost || !n || !sim_pool_take(&w->pool, n, w->ghost_blocks))
        return;
    w->ghost = n;
    sim_at(s, s->now + 10 * TD_MS + sim_below(s, TD_S),
           &(sim_event){.fn = on_ghost_leaves, .worker = w->index, .a = w->boot});
}

static void accident(sim *s, sim_worker *w)
{
    uint64_t a_while = 10 * TD_MS + sim_below(s, 2500 * TD_MS);
    switch (sim_below(s, 10)) {
    case 0:
        if (s->faults & SIM_F_CRASH)
            crash(s, w);
        break;
    case 1:
        if (s->faults & SIM_F_FREEZE)
            w->frozen_until = s->now + a_while;
        break;
    case 2:
        if (s->faults & SIM_F_SLOW)
            w->slow_until = s->now + a_while;
        break;
    case 3:
        if (s->faults & SIM_F_PARTITION)
            w->dark_until[sim_below(s, 2)] = s->now + a_while;
        break;
    case 4:
        if ((s->faults & SIM_F_CUT) && w->conn) {
            sim_conn *c = w->conn;
            sim_conn_lost(s, c, SIM_ROUTER_END);
            sim_conn_lost(s, c, SIM_WORKER_END);
        }
        break;
    case 5:
    case 7:
    case 8:
        if ((s->faults & SIM_F_KV_FULL) && w->is_decode)
            ghost_comes(s, w);
        break;
    case 6:
        if (s->faults & SIM_F_DRAIN)
            drain(s, w);
        break;
    case 9:
        if ((s->faults & SIM_F_STUCK) && !w->is_decode)
            w->stuck_until = s->now + 2 * a_while;
        break;
    default:
        break;
    }
}

static void on_accident(sim *s, sim_event *e)
{
    if (s->now >= s->faults_end_us)
        return;
    sim_worker *w = &s->workers[sim_below(s, s->n_workers)];
    if (w->up)
        accident(s, w);
    sim_at(s, s->now + 5 * TD_MS + sim_below(s, 120 * TD_MS), &(sim_event){.fn = on_accident});
}

static void on_calm(sim *s, sim_event *e)
{
    for (uint32_t i = 0; i < s->n_workers; i++) {
        s->workers[i].slow_until = 0; /* a frozen one thaws when its time has come */
        s->workers[i].dark_until[0] = s->workers[i].dark_until[1] = 0;
    }
}

static void open_workers(sim *s)
{
    s->n_prefill = 1 + (uint32_t)sim_below(s, SIM_P_MAX);
    s->n_workers = s->n_prefill + 1 + (uint32_t)sim_below(s, SIM_D_MAX);
    for (uint32_t i = 0; i < s->n_workers; i++) {
        sim_worker *w = &s->workers[i];
        w->index = i;
        w->is_decode = i >= s->n_prefill;
        w->step_us = 500 + sim_below(s, 8000);
        w->prefill_policy = (td_prefill_policy){.max_rows = 32u << sim_below(s, 4), .max_seqs = 4};
        uint32_t n_blocks = 24 + (uint32_t)sim_below(s, SIM_BLOCKS_MAX - 24);
        w->decode_policy = (td_decode_policy){
            .max_seqs = 4 + (uint32_t)sim_below(s, 8), .n_blocks = n_blocks, .max_context = 2048};
        w->decode_policy.max_admitted = w->decode_policy.max_seqs + (uint32_t)sim_below(s, 5);
        w->decode_policy.local_rows = w->prefill_policy.max_rows;
        w->pool.n = n_blocks;
        boot(s, w);
    }
}

/* ---- one seed ---- */

/* Promise 3's bookkeeping, after every event. */
static void check_world(sim *s)
{
    for (uint32_t i = 0; i < s->n_workers; i++) {
        sim_worker *w = &s->workers[i];
        if (!w->up)
            continue;
        if (w->is_decode)
            sim_decode_check(s, w);
        else
            sim_prefill_check(s, w);
    }
}

/* Everything is over and the faults have stopped: nothing may be held anywhere. */
static void check_idle(sim *s)
{
    for (uint32_t i = 0; i < s->n_workers; i++) {
        const sim_worker *w = &s->workers[i];
        if (!w->up || !w->conn || !w->conn->streams[SIM_WORKER_END])
            sim_fail(s, "worker %u has not come back", i);
        else if (!w->conn->streams[SIM_ROUTER_END] || !sim_router_serves(s, w->conn))
            sim_fail(s, "worker %u believes in a session that the router has forgotten", i);
        else if (w->pool.n_free != w->pool.n)
            sim_fail(s, "worker %u: %u of %u blocks are free at the end", i, w->pool.n_free,
                     w->pool.n);
        else if (td_streams_count(w->conn->streams[SIM_WORKER_END]))
            sim_fail(s, "worker %u: calls are open at the end", i);
        if (s->failed)
            return;
    }
    for (uint32_t i = 0; i < s->router.n_gens; i++)
        if (s->router.gens[i].n_legs)
            sim_fail(s, "request %u: %u legs are open at the end", i, s->router.gens[i].n_legs);
    if (td_admit_len(&s->router.admit))
        sim_fail(s, "the queue is not empty at the end");
}

static void run_until(sim *s, uint64_t end)
{
    while (s->n_heap && s->heap[0].at <= end && !s->failed) {
        sim_event e = heap_pop(s);
        s->now = e.at;
        s->tally->events++;
        e.fn(s, &e);
        check_world(s);
    }
    s->now = end;
}

static void close_world(sim *s)
{
    for (uint32_t i = 0; i < s->n_workers; i++) {
        sim_worker *w = &s->workers[i];
        if (!w->up)
            continue;
        w->up = 0;
        if (w->is_decode)
            sim_decode_die(s, w);
        else
            sim_prefill_die(s, w);
    }
    sim_net_close(s);
    for (size_t i = 0; i < s->n_heap; i++)
        sim_net_discard(s, &s->heap[i]);
    sim_net_free(s);
    sim_router_close(s);
    free(s->heap);
    if (s->n_bodies && !s->failed)
        sim_fail(s, "%llu messages leaked", (unsigned long long)s->n_bodies);
}

int sim_run_seed(uint64_t seed, const sim_options *options, sim_tally *tally, char *ret_text,
                 size_t text_bytes)
{
    sim *s = calloc(1, sizeof *s);
    TD_BUG_ON(!s);
    s->seed = seed;
    s->rng.seed = sim_hash(seed, 1, 2, 3);
    s->options = *options;
    s->tally = tally;
    s->faults = (uint32_t)(sim_below(s, 1 << 30) & (seed % 2 ? SIM_F_ALL : sim_below(s, 1 << 30))) &
                SIM_F_ALL;
    if (seed % 6 == 0)
        s->faults &= ~SIM_F_HARM; /* some worlds where everything must succeed */
    if (seed % 12 == 0)
        s->faults &= ~SIM_F_NOISE; /* and in time */
    s->early_reply = (int)sim_below(s, 2);
    s->local = seed % 3 ? 1 + (uint32_t)sim_below(s, 200) : 0;
    s->faults_end_us = 4 * TD_S;
    td_list_init(&s->conns);
    sim_log(s, "seed %llu faults %x", (unsigned long long)seed, s->faults);
    sim_router_open(s);
    open_workers(s);
    sim_at(s, 20 * TD_MS, &(sim_event){.fn = on_accident});
    sim_at(s, s->faults_end_us, &(sim_event){.fn = on_calm});
    sim_client_start(s, 8 + (uint32_t)sim_below(s, SIM_REQUESTS_MAX - 8));
    /* the last deadline is before 16 s; cancels and lost workers take 5 s more to be forgotten */
    run_until(s, 24 * TD_S);
    if (!s->failed)
        sim_client_check_end(s);
    if (!s->failed)
        check_idle(s);
    close_world(s);
    int r = s->failed ? -1 : 0;
    if (r < 0)
        snprintf(ret_text, text_bytes, "%s", s->text);
    free(s);
    return r;
}
