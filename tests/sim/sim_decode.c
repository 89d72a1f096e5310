/* SPDX-License-Identifier: Apache-2.0 */
/* Shell of a decode worker: admission and steps by decode-worker/batch.h, arrival of blocks by
 * handoff/ticket.h. Before each token it looks at every block that came over the network: a wrong
 * one makes a wrong token. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "sim.h"

#include "base/bug.h"
#include "base/clock.h"
#include "base/hash.h"
#include "base/banned.h"

enum { PENDING_MAX = 8, CREDIT_BYTES = 2400, TOMBSTONES_US = 10000000 };

static void on_lane(sim *s, sim_event *e);
static void on_due(sim *s, sim_event *e);
static void on_forget(sim *s, sim_event *e);

static sim_res *res_of(td_list *l)
{
    return TD_LIST_ENTRY(l, sim_res, link);
}

void sim_decode_boot(sim *s, sim_worker *w)
{
    sim_pool_init(&w->pool, w->decode_policy.n_blocks);
}

static int is_this_life(sim *s, sim_worker *w, const sim_event *e)
{
    if (!w->up || w->boot != e->a)
        return 0;
    if (s->now < w->frozen_until) {
        sim_at(s, w->frozen_until, e);
        return 0;
    }
    return 1;
}

static void arm_due(sim *s, sim_worker *w)
{
    uint64_t at = UINT64_MAX;
    TD_LIST_FOR (l, &w->jobs)
        if (!res_of(l)->local)
            at = TD_MIN(at, td_ticket_in_due(&res_of(l)->in));
    if (at == UINT64_MAX || (w->due_us && w->due_us <= at))
        return;
    w->due_us = at;
    sim_at(s, at, &(sim_event){.fn = on_due, .worker = w->index, .a = w->boot, .b = at});
}

static uint32_t choice_at(const sim_res *r, uint32_t i)
{
    return r->request.resume ? r->plan.timelines[i].choice : i;
}

/* ---- memory ---- */

/* First attempt: the choices share the prompt's full blocks. Recovery: each has its own. */
static int take_blocks(sim *s, sim_worker *w, sim_res *r, const td_decode_need *needs)
{
    for (uint32_t i = 0; i < r->n_seqs; i++) {
        uint32_t rows = needs[i].n_prompt + needs[i].max_tokens - 1;
        uint32_t all = (rows + TD_BLOCK_TOKENS - 1) / TD_BLOCK_TOKENS;
        uint32_t shared = i > 0 && !r->request.resume ? needs[i].n_prompt / TD_BLOCK_TOKENS : 0;
        shared = TD_MIN(shared, all);
        if (all > SIM_SPAN_MAX || !sim_pool_take(&w->pool, all - shared, r->blocks[i] + shared)) {
            sim_fail(s, "worker %u: an admitted request finds no blocks", w->index);
            return 0;
        }
        for (uint32_t b = 0; b < shared; b++) {
            r->blocks[i][b] = r->blocks[0][b];
            w->pool.refs[r->blocks[0][b]]++;
            s->tally->shared_blocks++;
        }
        r->n_blocks[i] = all;
    }
    return 1;
}

static void release(sim *s, sim_worker *w, sim_res *r)
{
    if (r->released)
        return;
    r->released = 1;
    if (s->options.bug == SIM_BUG_LEAK_DECODE && !r->committed)
        return;
    for (uint32_t i = 0; i < r->n_seqs; i++)
        for (uint32_t b = 0; b < r->n_blocks[i]; b++)
            sim_pool_put(s, &w->pool, r->blocks[i][b]);
}

/* The ticket stays for a while to answer what is late. */
static void bury(sim *s, sim_worker *w, sim_res *r)
{
    for (uint32_t i = 0; i < r->n_seqs; i++)
        r->runnable[i] = 0;
    release(s, w, r);
    sim_at(s, s->now + TOMBSTONES_US,
           &(sim_event){.fn = on_forget, .worker = w->index, .a = w->boot, .p = r});
}

static void on_forget(sim *s, sim_event *e)
{
    sim_worker *w = &s->workers[e->worker];
    if (!w->up || w->boot != e->a)
        return; /* it died with its worker */
    sim_res *r = e->p;
    td_list_del(&r->link);
    free(r);
}

static void finish(sim *s, sim_res *r, uint32_t code)
{
    uint64_t stream = r->stream;
    r->stream = 0;
    if (stream)
        sim_finish_call(s, r->conn, stream, code, TD_ERROR_NONE);
}

/* ---- Reserve ---- */

static uint32_t fill_needs(const sim_res *r, td_decode_need *needs)
{
    for (uint32_t i = 0; i < r->n_seqs; i++) {
        uint32_t c = choice_at(r, i);
        needs[i] =
            (td_decode_need){r->request.n_prompt, r->request.resume ? r->request.n_emitted[c] : 0,
                             r->request.max_tokens};
    }
    return r->n_seqs;
}

static uint32_t verdict(const sim_worker *w, const sim_res *r, const td_decode_need *needs)
{
    uint32_t admitted = 0;
    TD_LIST_FOR (l, (td_list *)&w->jobs)
        admitted += res_of(l)->released ? 0 : res_of(l)->n_seqs;
    uint64_t blocks = td_decode_blocks(&w->decode_policy, needs, r->n_seqs, !r->request.resume, 0);
    switch (td_decode_admit(&w->decode_policy, needs, r->n_seqs, blocks, blocks, w->pool.n_free,
                            admitted)) {
    case TD_DECODE_ADMIT:
        return TD_OK;
    case TD_DECODE_FULL:
        return TD_RESOURCE_EXHAUSTED;
    default:
        return TD_OUT_OF_RANGE;
    }
}

/* Rows [from, to) of the only timeline: they are what they must be. */
static void fill_rows(sim_worker *w, sim_res *r, uint32_t from, uint32_t to)
{
    for (uint32_t b = from / TD_BLOCK_TOKENS; b * TD_BLOCK_TOKENS < to; b++) {
        uint32_t rows = TD_MIN((uint32_t)TD_BLOCK_TOKENS, to - b * TD_BLOCK_TOKENS);
        for (uint32_t i = 0; i < SIM_GROUPS; i++)
            w->pool.content[r->blocks[0][b]][i] =
                sim_content(&r->request, r->plan.timelines[0].choice, b, rows, i);
    }
}

/* What its cache has of the prompt: whole blocks, and at least one row is to come. */
static void attach(sim *s, sim_worker *w, sim_res *r)
{
    if (r->plan.n_timelines != 1 || sim_below(s, 3) != 0)
        return;
    r->held = (uint32_t)sim_below(s, (r->plan.timelines[0].n_ids - 1) / TD_BLOCK_TOKENS + 1);
    fill_rows(w, r, 0, r->held * TD_BLOCK_TOKENS);
    s->tally->held_blocks += r->held;
}

static void grant(sim *s, sim_worker *w, sim_res *r, uint64_t deadline_us)
{
    td_in_grant g = {.terms = sim_terms(),
                     .blocks = r->in_blocks,
                     .n_blocks = r->plan.n_blocks,
                     .n_groups = SIM_GROUPS,
                     .first = r->first,
                     .n_first = r->plan.n_choices,
                     .n_tokens = r->plan.n_tokens,
                     .credit_bytes = CREDIT_BYTES,
                     .deadline_us = deadline_us};
    uint64_t id[2] = {sim_hash(s->seed, w->index, w->boot, ++w->generation),
                      sim_hash(s->seed, w->generation, 9, 9)};
    memcpy(g.key.id, id, 16);
    g.key.attempt = r->attempt;
    g.key.generation = (uint32_t)w->generation;
    memcpy(g.key.decode_epoch, w->epoch, 16);
    for (uint32_t b = 0; b < r->plan.n_blocks; b++) {
        uint32_t t, at;
        td_in_block *k = &r->in_blocks[b];
        td_plan_block(&r->plan, b, &t, &at, &k->rows);
        if (at < r->held) {
            k->rows = 0;
            continue;
        }
        k->has_chain = k->rows == TD_BLOCK_TOKENS;
        if (k->has_chain)
            sim_chain(&r->request, r->plan.timelines[t].choice, at, k->chain);
    }
    for (uint32_t i = 0; i < r->plan.n_choices; i++) {
        uint32_t c = choice_at(r, i);
        r->first[i] = (td_in_first){.choice = c, .has_id = r->request.resume};
        if (r->request.resume)
            r->first[i].id = sim_token(r->request.seed, c, r->request.n_emitted[c] - 1);
    }
    td_ticket_in_init(&r->in, &g, r->memory, s->now);
}

static void send_ticket(sim *s, sim_worker *w, sim_res *r, uint64_t timeout_us)
{
    sim_body *b = sim_body_new(s, SIM_EVENT);
    b->has_ticket = 1;
    b->ticket = (sim_ticket){r->in.key, sim_terms(), w->index, CREDIT_BYTES, timeout_us, r->held};
    sim_send(s, r->conn, r->stream, b);
    sim_body_unref(s, b);
}

static void wake_lane(sim *s, sim_worker *w)
{
    if (w->lane_busy)
        return;
    w->lane_busy = 1;
    sim_at(s, s->now + 20, &(sim_event){.fn = on_lane, .worker = w->index, .a = w->boot});
}

static void send_local(sim *s, sim_worker *w, sim_res *r)
{
    sim_body *b = sim_body_new(s, SIM_EVENT);
    b->local = r->local;
    sim_send(s, r->conn, r->stream, b);
    sim_body_unref(s, b);
    wake_lane(s, w);
}

void sim_decode_call(sim *s, sim_worker *w, sim_conn *c, uint64_t stream, const sim_body *b)
{
    uint32_t choices[SIM_CHOICES_MAX];
    td_decode_need needs[SIM_CHOICES_MAX];
    sim_res *r = calloc(1, sizeof *r);
    TD_BUG_ON(!r);
    r->stream = stream;
    r->conn = c;
    r->request = b->request;
    r->attempt = b->attempt;
    TD_BUG_ON(sim_plan(&r->request, &r->plan, choices) < 0);
    r->n_seqs = r->plan.n_choices;
    fill_needs(r, needs);
    uint32_t code = verdict(w, r, needs);
    if (code != TD_OK || !take_blocks(s, w, r, needs)) {
        finish(s, r, code);
        free(r);
        return;
    }
    uint64_t left = td_streams_remaining_us(c->streams[SIM_WORKER_END], stream, s->now);
    td_list_add(&w->jobs, &r->link);
    attach(s, w, r);
    r->local = r->n_left =
        td_decode_local(b->local, r->plan.n_timelines, r->plan.timelines[0].n_ids, r->held);
    if (r->local) {
        send_local(s, w, r);
        return;
    }
    grant(s, w, r, s->now + left);
    send_ticket(s, w, r, left);
    arm_due(s, w);
}

static void in_step(sim *s, sim_worker *w, sim_res *r, const td_in_event *e);

void sim_decode_abort(sim *s, sim_worker *w, sim_conn *c, uint64_t stream, uint32_t code)
{
    TD_LIST_FOR (l, &w->jobs) {
        sim_res *r = res_of(l);
        if (r->conn != c || r->stream != stream)
            continue;
        finish(s, r, code);
        if (r->committed || r->local)
            bury(s, w, r);
        else
            in_step(s, w, r, &(td_in_event){.kind = TD_IN_CANCEL, .code = code});
        return;
    }
    sim_finish_call(s, c, stream, code, TD_ERROR_NONE);
}

/* ---- arrival ---- */

/* The blocks are whole: fork the partial block for the other choices, and let them run. */
static void deliver(sim *s, sim_worker *w, sim_res *r)
{
    uint32_t full = r->request.n_prompt / TD_BLOCK_TOKENS;
    r->committed = 1;
    r->committed_owed = 1;
    for (uint32_t i = 0; i < r->n_seqs; i++) {
        uint32_t c = choice_at(r, i);
        r->next[i] = r->request.resume ? r->request.n_emitted[c]
                     : r->local        ? s->options.bug == SIM_BUG_LOCAL_INDEX
                                       : 1;
        r->n_rows[i] = r->plan.timelines[r->request.resume ? i : 0].n_ids;
        r->runnable[i] = !r->next[i] || !sim_finish(&r->request, c, r->next[i] - 1);
        r->pending[i] = (sim_run){.choice = c, .index = r->next[i]};
        if (!r->request.resume && i > 0 && r->request.n_prompt % TD_BLOCK_TOKENS &&
            r->n_blocks[i] > full)
            memcpy(w->pool.content[r->blocks[i][full]], w->pool.content[r->blocks[0][full]],
                   sizeof w->pool.content[0]);
    }
    wake_lane(s, w);
}

static void send_ack(sim *s, sim_worker *w, uint32_t to, const td_ticket_key *key,
                     td_ack_state state, uint64_t bytes, uint32_t code)
{
    sim_kv m = {.kind = SIM_KV_ACK,
                .from = w->index,
                .to = to,
                .key = *key,
                .ack = state,
                .bytes = bytes,
                .code = code};
    sim_kv_send(s, &m);
}

static td_ack_state ack_state(const td_ticket_in *t)
{
    if (t->state < TD_IN_COMMITTED)
        return TD_ACK_RECEIVING;
    return t->state == TD_IN_COMMITTED ? TD_ACK_COMMITTED : TD_ACK_FAILED;
}

static td_in_actions in_actions(sim *s, sim_worker *w, sim_res *r, const td_in_event *e)
{
    td_in_actions a;
    td_ticket_in_step(&r->in, e, s->now, &a);
    s->tally->drops[a.drop]++;
    if (a.release) {
        s->tally->fenced += r->in.state == TD_IN_FENCED;
        finish(s, r, r->in.code);
        bury(s, w, r);
    }
    if (a.deliver)
        deliver(s, w, r);
    arm_due(s, w);
    return a;
}

static void in_step(sim *s, sim_worker *w, sim_res *r, const td_in_event *e)
{
    in_actions(s, w, r, e);
}

static sim_res *find_res(sim_worker *w, const td_ticket_key *key)
{
    TD_LIST_FOR (l, &w->jobs)
        if (!res_of(l)->local && memcmp(res_of(l)->in.key.id, key->id, 16) == 0)
            return res_of(l);
    return NULL;
}

static void copy_payload(sim_worker *w, sim_res *r, const sim_kv *m)
{
    for (uint32_t i = 0; i < m->n_runs; i++) {
        uint32_t t, at, rows;
        if (m->runs[i].block >= r->plan.n_blocks)
            continue;
        td_plan_block(&r->plan, m->runs[i].block, &t, &at, &rows);
        w->pool.content[r->blocks[t][at]][m->group] = m->payload[i];
    }
}

static td_in_actions on_segment(sim *s, sim_worker *w, sim_res *r, sim_kv *m)
{
    uint32_t crcs[SIM_SPAN_MAX];
    td_in_event e = {.kind = TD_IN_SEGMENT_HEAD,
                     .key = &m->key,
                     .terms = &m->terms,
                     .group = m->group,
                     .runs = m->runs,
                     .n_runs = m->n_runs,
                     .bytes = m->bytes,
                     .crcs = crcs};
    td_in_actions a = in_actions(s, w, r, &e);
    if (a.copy || s->options.bug == SIM_BUG_NO_FENCE)
        copy_payload(w, r, m);
    if (!a.copy)
        return a;
    for (uint32_t i = 0; i < m->n_runs; i++)
        crcs[i] = s->options.bug == SIM_BUG_NO_CRC
                      ? m->runs[i].crc
                      : td_crc32c(0, &m->payload[i], sizeof m->payload[i]);
    e.kind = TD_IN_SEGMENT_BODY;
    return in_actions(s, w, r, &e);
}

void sim_decode_kv(sim *s, sim_worker *w, sim_kv *m)
{
    sim_res *r = find_res(w, &m->key);
    if (!r) {
        s->tally->drops[TD_DROP_UNKNOWN]++;
        if (m->kind == SIM_KV_COMMIT)
            send_ack(s, w, m->from, &m->key, TD_ACK_UNKNOWN, 0, TD_ABORTED);
        return;
    }
    td_in_actions a;
    if (m->kind == SIM_KV_SEGMENT) {
        a = on_segment(s, w, r, m);
    } else {
        td_in_event e = {.kind = TD_IN_COMMIT,
                         .key = &m->key,
                         .terms = &m->terms,
                         .digests = m->digests,
                         .n_digests = m->n_digests,
                         .n_tokens = m->n_tokens,
                         .choices = m->choices,
                         .ids = m->ids,
                         .n_first = m->n_first};
        a = in_actions(s, w, r, &e);
    }
    if (a.ack)
        send_ack(s, w, m->from, &m->key, ack_state(&r->in), r->in.received_bytes, r->in.code);
}

static void on_due(sim *s, sim_event *e)
{
    sim_worker *w = &s->workers[e->worker];
    if (!is_this_life(s, w, e) || w->due_us != e->b)
        return;
    w->due_us = 0;
    TD_LIST_FOR (l, &w->jobs)
        if (!res_of(l)->local && td_ticket_in_due(&res_of(l)->in) <= s->now)
            in_step(s, w, res_of(l), &(td_in_event){.kind = TD_IN_TICK});
    arm_due(s, w);
}

/* ---- lane ---- */

static int blocks_are_right(const sim_worker *w, const sim_res *r, uint32_t i)
{
    for (uint32_t b = 0; b * TD_BLOCK_TOKENS < r->n_rows[i]; b++) {
        uint32_t rows = TD_MIN((uint32_t)TD_BLOCK_TOKENS, r->n_rows[i] - b * TD_BLOCK_TOKENS);
        for (uint32_t g = 0; g < SIM_GROUPS; g++)
            if (w->pool.content[r->blocks[i][b]][g] !=
                sim_content(&r->request, choice_at(r, i), b, rows, g))
                return 0;
    }
    return 1;
}

static void compute(const sim_worker *w, sim_res *r, uint32_t i)
{
    sim_run *p = &r->pending[i];
    uint32_t c = choice_at(r, i), index = r->next[i]++;
    uint32_t id = sim_token(r->request.seed, c, index);
    if (!blocks_are_right(w, r, i))
        id = (id + 1) % SIM_VOCAB;
    if (!p->n)
        p->index = index;
    p->ids[p->n++] = id;
    p->finish = sim_finish(&r->request, c, index);
    if (p->finish)
        r->runnable[i] = 0;
}

/* A chunk of the prompts that are prefilled here; returns its rows. */
static uint32_t prefill_step(sim *s, sim_worker *w)
{
    sim_res *local[TD_DECODE_LOCAL_MAX];
    uint32_t left[TD_DECODE_LOCAL_MAX], tokens[TD_DECODE_LOCAL_MAX], n = 0, rows = 0;
    TD_LIST_FOR (l, &w->jobs) {
        sim_res *r = res_of(l);
        if (!r->n_left || r->released || n == TD_DECODE_LOCAL_MAX)
            continue;
        local[n] = r;
        left[n++] = r->n_left;
    }
    n = td_decode_plan_local(&w->decode_policy, left, n, tokens);
    for (uint32_t i = 0; i < n; i++) {
        sim_res *r = local[i];
        uint32_t done = r->plan.timelines[0].n_ids - r->n_left;
        sim_working_for(s, r->request.id);
        r->n_left -= tokens[i];
        rows += tokens[i];
        if (!(s->options.bug == SIM_BUG_LOCAL_ROWS && !r->n_left))
            fill_rows(w, r, done, done + tokens[i]);
        if (!r->n_left)
            deliver(s, w, r);
    }
    return rows;
}

static uint32_t plan_step(sim_worker *w, sim_res **res, uint32_t *seq)
{
    uint32_t n = 0;
    TD_LIST_FOR (l, &w->jobs) {
        sim_res *r = res_of(l);
        for (uint32_t i = 0; i < r->n_seqs; i++) {
            if (!r->runnable[i] || r->pending[i].n >= PENDING_MAX)
                continue;
            res[n] = r;
            seq[n++] = i;
        }
    }
    return n;
}

/* One message of what a stream has to say, or NULL when that is nothing. */
static sim_body *take_pending(sim *s, sim_res *r)
{
    sim_body *b = sim_body_new(s, SIM_EVENT);
    b->committed = r->committed_owed;
    for (uint32_t i = 0; i < r->n_seqs; i++)
        if (r->pending[i].n)
            b->runs[b->n_runs++] = r->pending[i];
    if (b->n_runs || b->committed)
        return b;
    sim_body_unref(s, b);
    return NULL;
}

static void sent(sim *s, sim_res *r)
{
    r->committed_owed = 0;
    for (uint32_t i = 0; i < r->n_seqs; i++) {
        s->tally->coalesced += r->pending[i].n > 1;
        r->pending[i].n = 0;
    }
}

static int has_work(const sim_res *r)
{
    int more = r->committed_owed;
    for (uint32_t i = 0; i < r->n_seqs; i++)
        more |= r->runnable[i] || r->pending[i].n;
    return more;
}

static void send_batch(sim *s, sim_worker *w)
{
    sim_conn *c = w->conn;
    sim_body *batch = sim_body_new(s, SIM_BATCH);
    sim_worker_load(w, batch);
    TD_LIST_FOR (l, &w->jobs) {
        sim_res *r = res_of(l);
        if (!r->stream || r->conn != c || !r->committed || batch->n_items == SIM_STREAMS_MAX)
            continue;
        sim_body *b = take_pending(s, r);
        if (!b)
            continue;
        uint32_t k = batch->n_items;
        if (sim_send_batched(s, c, r->stream, b, &batch->items[k].sequence) == 0) {
            batch->items[k].stream = r->stream;
            batch->items[k].body = b;
            batch->n_items++;
            sent(s, r);
        } else {
            sim_log(s, "worker %u: stream %llu of request %u waits for credit", w->index,
                    (unsigned long long)r->stream, r->request.id);
            sim_body_unref(s, b);
        }
    }
    if (batch->n_items && c) {
        td_stream_event ev = {.type = TD_EV_BATCH};
        sim_step(s, c, SIM_WORKER_END, &ev, batch);
    }
    sim_body_unref(s, batch);
}

static void finish_done(sim *s, sim_worker *w)
{
    TD_LIST_FOR (l, &w->jobs) {
        sim_res *r = res_of(l);
        if (!r->committed || r->released || has_work(r))
            continue;
        finish(s, r, TD_OK);
        bury(s, w, r);
    }
}

static void on_lane(sim *s, sim_event *e)
{
    sim_worker *w = &s->workers[e->worker];
    sim_res *res[SIM_STREAMS_MAX * SIM_CHOICES_MAX];
    uint32_t seq[SIM_STREAMS_MAX * SIM_CHOICES_MAX], picks[64];
    if (!is_this_life(s, w, e))
        return;
    w->lane_busy = 0;
    uint32_t n = plan_step(w, res, seq);
    uint32_t n_picks = n ? td_decode_plan(&w->decode_policy, n, &w->cursor, picks) : 0;
    for (uint32_t i = 0; i < n_picks; i++) {
        sim_working_for(s, res[picks[i]]->request.id);
        compute(w, res[picks[i]], seq[picks[i]]);
    }
    w->lane_busy = 1; /* a delivery inside must not wake it once more */
    uint32_t rows = prefill_step(s, w);
    w->lane_busy = 0;
    w->n_steps += n || rows;
    send_batch(s, w);
    finish_done(s, w);
    if (!n && !rows &&
        !plan_step(w, res, seq)) /* what was sent just now may have made room for more */
        return;
    w->lane_busy = 1;
    uint64_t cost = w->step_us + (uint64_t)rows * w->step_us / 40;
    if (s->now < w->slow_until)
        cost *= 20;
    sim_at(s, s->now + cost, &(sim_event){.fn = on_lane, .worker = w->index, .a = w->boot});
}

void sim_decode_credit(sim *s, sim_worker *w, sim_conn *c, uint64_t stream)
{
    sim_log(s, "worker %u: credit for stream %llu", w->index, (unsigned long long)stream);
    wake_lane(s, w);
}

/* ---- life ---- */

void sim_decode_die(sim *s, sim_worker *w)
{
    TD_LIST_FOR (l, &w->jobs)
        free(res_of(l));
    td_list_init(&w->jobs);
}

void sim_decode_check(sim *s, sim_worker *w)
{
    uint32_t refs[SIM_BLOCKS_MAX] = {0}, used = 0;
    TD_LIST_FOR (l, &w->jobs) {
        const sim_res *r = res_of(l);
        if (r->released)
            continue;
        for (uint32_t i = 0; i < r->n_seqs; i++)
            for (uint32_t b = 0; b < r->n_blocks[i]; b++)
                refs[r->blocks[i][b]]++;
    }
    for (uint32_t i = 0; i < w->ghost; i++)
        refs[w->ghost_blocks[i]]++;
    for (uint32_t b = 0; b < w->pool.n; b++) {
        used += refs[b] != 0;
        if (refs[b] != w->pool.refs[b]) {
            sim_fail(s, "worker %u: block %u has %u references, %u owners", w->index, b,
                     w->pool.refs[b], refs[b]);
            return;
        }
    }
    if (used + w->pool.n_free != w->pool.n)
        sim_fail(s, "worker %u: %u blocks used and %u free of %u", w->index, used, w->pool.n_free,
                 w->pool.n);
}

void sim_worker_load(const sim_worker *w, sim_body *b)
{
    b->used_blocks = w->pool.n - w->pool.n_free;
    b->step = w->n_steps;
    if (w->is_decode)
        return;
    TD_LIST_FOR (l, (td_list *)&w->jobs)
        b->waiting_tokens += TD_LIST_ENTRY(l, sim_job, link)->n_left;
}
