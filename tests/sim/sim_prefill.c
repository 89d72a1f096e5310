/* SPDX-License-Identifier: Apache-2.0 */
/* Shell of a prefill worker: queue, steps by prefill-worker/batch.h, push by handoff/ticket.h. */
#include <stdlib.h>
#include <string.h>

#include "sim.h"

#include "base/bug.h"
#include "base/clock.h"
#include "base/hash.h"
#include "base/banned.h"

enum { JOBS_MAX = 24, BLOCK_BYTES = 640, CHUNK_BLOCKS = 3 };

static void on_lane(sim *s, sim_event *e);
static void on_due(sim *s, sim_event *e);

static sim_job *job_of(td_list *l)
{
    return TD_LIST_ENTRY(l, sim_job, link);
}

void sim_prefill_boot(sim *s, sim_worker *w)
{
    sim_pool_init(&w->pool, w->decode_policy.n_blocks);
}

/* ---- timers ---- */

static void arm_due(sim *s, sim_worker *w)
{
    uint64_t at = UINT64_MAX;
    TD_LIST_FOR (l, &w->jobs)
        if (job_of(l)->pushing)
            at = TD_MIN(at, td_ticket_out_due(&job_of(l)->out));
    if (at == UINT64_MAX || (w->due_us && w->due_us <= at))
        return;
    w->due_us = at;
    sim_at(s, at, &(sim_event){.fn = on_due, .worker = w->index, .a = w->boot, .b = at});
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

/* ---- ends ---- */

static void job_free(sim *s, sim_worker *w, sim_job *j)
{
    if (!(s->options.bug == SIM_BUG_LEAK_PREFILL && j->pushing && j->out.code))
        for (uint32_t i = 0; i < j->n_blocks; i++)
            sim_pool_put(s, &w->pool, j->blocks[i]);
    td_list_del(&j->link);
    free(j);
}

static void finish(sim *s, sim_job *j, uint32_t code)
{
    if (j->stream)
        sim_finish_call(s, j->conn, j->stream, code, TD_ERROR_NONE);
    j->stream = 0;
}

/* First tokens: index 0, or on a recovery the last emitted one again. */
static void reply(sim *s, sim_job *j)
{
    if (j->replied || !j->stream)
        return;
    j->replied = 1;
    sim_body *b = sim_body_new(s, SIM_REPLY);
    for (uint32_t c = 0; c < j->request.n; c++) {
        if (j->request.resume && !j->request.open[c])
            continue;
        uint32_t index = j->request.resume ? j->request.n_emitted[c] - 1 : 0;
        sim_run *r = &b->runs[b->n_runs++];
        *r = (sim_run){.choice = c, .index = index, .n = 1};
        r->ids[0] = sim_token(j->request.seed, c, index);
        r->finish = sim_finish(&j->request, c, index);
    }
    sim_send(s, j->conn, j->stream, b);
    sim_body_unref(s, b);
}

static int first_tokens_end_all(const sim_job *j)
{
    for (uint32_t c = 0; c < j->request.n; c++)
        if ((!j->request.resume || j->request.open[c]) &&
            !sim_finish(&j->request, c, j->request.resume ? j->request.n_emitted[c] - 1 : 0))
            return 0;
    return 1;
}

/* ---- push ---- */

static uint32_t block_crc(const sim_worker *w, uint32_t block, uint32_t group)
{
    return td_crc32c(0, &w->pool.content[block][group], sizeof(uint64_t));
}

static void fill_segment(const sim_worker *w, const sim_job *j, sim_kv *m)
{
    m->kind = SIM_KV_SEGMENT;
    m->from = w->index;
    m->to = j->ticket.decode;
    m->key = j->out.key;
    m->terms = j->ticket.terms;
    m->group = j->next_group;
    for (uint32_t b = j->next_block; b < j->plan.n_blocks && m->n_runs < CHUNK_BLOCKS; b++) {
        uint32_t t, at, rows;
        td_plan_block(&j->plan, b, &t, &at, &rows);
        td_kv_run *r = &m->runs[m->n_runs];
        *r = (td_kv_run){.block = b, .rows = rows, .crc = block_crc(w, j->blocks[b], m->group)};
        if (rows == TD_BLOCK_TOKENS) {
            r->has_chain = 1;
            sim_chain(&j->request, j->plan.timelines[t].choice, at, r->chain);
        }
        m->src[m->n_runs++] = j->blocks[b];
        m->bytes += rows * (BLOCK_BYTES / TD_BLOCK_TOKENS);
    }
}

static void send_commit(sim *s, sim_worker *w, sim_job *j)
{
    sim_kv m = {.kind = SIM_KV_COMMIT,
                .from = w->index,
                .to = j->ticket.decode,
                .key = j->out.key,
                .terms = j->ticket.terms,
                .n_tokens = j->plan.n_tokens};
    for (uint32_t b = j->ticket.held; b < j->plan.n_blocks; b++) {
        uint32_t crcs[SIM_GROUPS];
        for (uint32_t g = 0; g < SIM_GROUPS; g++)
            crcs[g] = block_crc(w, j->blocks[b], g);
        m.digests[m.n_digests++] = td_ticket_digest(crcs, SIM_GROUPS);
    }
    for (uint32_t c = 0; c < j->request.n; c++) {
        if (j->request.resume && !j->request.open[c])
            continue;
        m.choices[m.n_first] = c;
        m.ids[m.n_first++] =
            sim_token(j->request.seed, c, j->request.resume ? j->request.n_emitted[c] - 1 : 0);
    }
    sim_kv_send(s, &m);
}

static void out_step(sim *s, sim_worker *w, sim_job *j, const td_out_event *e);

/* The connection to that decode worker is closed: what it held comes back at once, for every job.
 */
static void close_peer(sim *s, sim_worker *w, uint32_t to)
{
    s->tally->closed_peers++;
    w->kv_gen[to]++;
    TD_LIST_FOR (l, &w->jobs) {
        sim_job *j = job_of(l);
        if (!j->pushing || j->ticket.decode != to)
            continue;
        for (uint32_t i = 0; i < j->n_blocks; i++)
            w->pool.flight[j->blocks[i]] = 0;
        j->in_flight = 0;
    }
    for (;;) { /* a step may free its job */
        sim_job *open = NULL;
        TD_LIST_FOR (l, &w->jobs)
            if (job_of(l)->pushing && job_of(l)->ticket.decode == to && job_of(l)->out.in_flight)
                open = job_of(l);
        if (!open)
            return;
        out_step(s, w, open, &(td_out_event){.kind = TD_OUT_PEER_CLOSED});
    }
}

/* Does what a step says; may free j. */
static void out_step(sim *s, sim_worker *w, sim_job *j, const td_out_event *e)
{
    td_out_actions a;
    uint32_t to = j->ticket.decode;
    td_ticket_out_step(&j->out, e, s->now, &a);
    s->tally->drops[a.drop]++;
    if (a.send_commit) {
        s->tally->commit_retries++;
        send_commit(s, w, j);
    }
    if (s->options.bug == SIM_BUG_EARLY_FREE && !a.done && j->out.state >= TD_OUT_ACKED &&
        j->in_flight)
        a.done = 1;
    if (a.done) {
        if (!j->out.code)
            reply(s, j);
        finish(s, j, j->out.code);
        job_free(s, w, j);
    }
    if (a.close_peer)
        close_peer(s, w, to);
    arm_due(s, w);
}

/* 1: something went out and j is still there to go on with. */
static int push_one(sim *s, sim_worker *w, sim_job *j)
{
    sim_kv m = {0};
    if (j->next_group == SIM_GROUPS || j->out.state > TD_OUT_PUSHING)
        return 0;
    fill_segment(w, j, &m);
    if (!td_ticket_out_may_send(&j->out, m.bytes))
        return 0;
    j->next_block += m.n_runs;
    if (j->next_block == j->plan.n_blocks) {
        j->next_block = j->ticket.held;
        j->next_group++;
    }
    for (uint32_t i = 0; i < m.n_runs; i++)
        w->pool.flight[m.src[i]]++;
    j->in_flight += m.n_runs;
    sim_kv_send(s, &m);
    out_step(s, w, j,
             &(td_out_event){
                 .kind = TD_OUT_SENT, .bytes = m.bytes, .queued = j->next_group < SIM_GROUPS});
    out_step(s, w, j, &(td_out_event){.kind = TD_OUT_FLIGHT, .in_flight = j->in_flight});
    return 1;
}

static void push(sim *s, sim_worker *w, sim_job *j)
{
    while (push_one(s, w, j))
        ;
    if (j->next_group < SIM_GROUPS || j->out.state > TD_OUT_PUSHING)
        return;
    send_commit(s, w, j);
    out_step(s, w, j, &(td_out_event){.kind = TD_OUT_COMMIT});
}

static void start_push(sim *s, sim_worker *w, sim_job *j)
{
    td_ticket_key key = j->ticket.key;
    memcpy(key.prefill_epoch, w->epoch, 16);
    td_ticket_out_init(&j->out, &key, j->ticket.credit_bytes, s->now + j->ticket.timeout_us,
                       s->now);
    j->pushing = 1;
    j->next_block = j->ticket.held; /* one timeline then: its leading blocks */
    if (s->early_reply)
        reply(s, j);
    out_step(s, w, j, &(td_out_event){.kind = TD_OUT_QUEUED});
    push(s, w, j);
}

static sim_job *find_push(sim_worker *w, const td_ticket_key *key)
{
    TD_LIST_FOR (l, &w->jobs)
        if (job_of(l)->pushing && memcmp(job_of(l)->out.key.id, key->id, 16) == 0)
            return job_of(l);
    return NULL;
}

void sim_prefill_kv(sim *s, sim_worker *w, const sim_kv *m)
{
    sim_job *j = find_push(w, &m->key);
    if (!j) {
        s->tally->drops[TD_DROP_UNKNOWN]++;
        return;
    }
    out_step(
        s, w, j,
        &(td_out_event){
            .kind = TD_OUT_ACK, .key = &m->key, .ack = m->ack, .bytes = m->bytes, .code = m->code});
    j = find_push(w, &m->key);
    if (j)
        push(s, w, j);
}

void sim_prefill_flight(sim *s, sim_worker *w, const sim_kv *m)
{
    for (uint32_t i = 0; i < m->n_runs; i++) {
        if (!w->pool.refs[m->src[i]])
            sim_fail(s, "worker %u: block %u was freed under a frame", w->index, m->src[i]);
        w->pool.flight[m->src[i]]--;
    }
    sim_job *j = find_push(w, &m->key);
    if (!j)
        return;
    j->in_flight -= m->n_runs;
    out_step(s, w, j, &(td_out_event){.kind = TD_OUT_FLIGHT, .in_flight = j->in_flight});
}

static void on_due(sim *s, sim_event *e)
{
    sim_worker *w = &s->workers[e->worker];
    if (!is_this_life(s, w, e) || w->due_us != e->b)
        return;
    w->due_us = 0;
    for (;;) {
        sim_job *due = NULL;
        TD_LIST_FOR (l, &w->jobs)
            if (job_of(l)->pushing && td_ticket_out_due(&job_of(l)->out) <= s->now)
                due = job_of(l);
        if (!due)
            break;
        uint64_t was = td_ticket_out_due(&due->out);
        td_list *link = &due->link;
        out_step(s, w, due, &(td_out_event){.kind = TD_OUT_TICK});
        int here = 0;
        TD_LIST_FOR (l, &w->jobs)
            here |= l == link;
        if (here && td_ticket_out_due(&due->out) == was) {
            sim_fail(s, "worker %u: a tick that was due did nothing", w->index);
            break;
        }
    }
    arm_due(s, w);
}

/* ---- lane ---- */

static void wake_lane(sim *s, sim_worker *w)
{
    if (w->lane_busy)
        return;
    w->lane_busy = 1;
    sim_at(s, s->now + 50, &(sim_event){.fn = on_lane, .worker = w->index, .a = w->boot});
}

static void seal(sim_worker *w, sim_job *j)
{
    for (uint32_t b = 0; b < j->plan.n_blocks; b++) {
        uint32_t t, at, rows;
        td_plan_block(&j->plan, b, &t, &at, &rows);
        for (uint32_t g = 0; g < SIM_GROUPS; g++)
            w->pool.content[j->blocks[b]][g] =
                sim_content(&j->request, j->plan.timelines[t].choice, at, rows, g);
    }
}

static void computed(sim *s, sim_worker *w, sim_job *j)
{
    j->computed = 1;
    seal(w, j);
    if (j->has_ticket && !first_tokens_end_all(j)) {
        start_push(s, w, j);
        return;
    }
    reply(s, j);
    finish(s, j, TD_OK);
    job_free(s, w, j);
}

static uint32_t plan_step(sim_worker *w, sim_job **jobs, td_prefill_pick *picks)
{
    td_prefill_view views[JOBS_MAX];
    uint32_t n = 0;
    TD_LIST_FOR (l, &w->jobs) {
        sim_job *j = job_of(l);
        jobs[n] = j;
        views[n++] = (td_prefill_view){j->computed ? 0 : j->n_left, j->plan.n_blocks, j->started};
    }
    return td_prefill_plan(&w->prefill_policy, views, n, w->pool.n_free, picks);
}

static void on_lane(sim *s, sim_event *e)
{
    sim_worker *w = &s->workers[e->worker];
    sim_job *jobs[JOBS_MAX];
    td_prefill_pick picks[16];
    if (!is_this_life(s, w, e))
        return;
    if (s->now < w->stuck_until) {
        sim_at(s, w->stuck_until, e);
        return;
    }
    w->lane_busy = 0;
    uint32_t n = plan_step(w, jobs, picks), rows = 0;
    for (uint32_t i = 0; i < n; i++) {
        sim_job *j = jobs[picks[i].job];
        sim_working_for(s, j->request.id);
        if (!j->started && !sim_pool_take(&w->pool, j->plan.n_blocks, j->blocks)) {
            sim_fail(s, "worker %u: a planned job finds no blocks", w->index);
            return;
        }
        if (!j->started)
            j->n_blocks = j->plan.n_blocks;
        j->started = 1;
        j->n_left -= picks[i].n_tokens;
        rows += picks[i].n_tokens;
        if (j->n_left == 0)
            computed(s, w, j);
    }
    if (!n)
        return;
    w->lane_busy = 1;
    w->n_steps++;
    uint64_t cost = 100 + (uint64_t)rows * w->step_us / 40;
    if (s->now < w->slow_until)
        cost *= 20;
    sim_at(s, s->now + cost, &(sim_event){.fn = on_lane, .worker = w->index, .a = w->boot});
}

/* ---- calls ---- */

void sim_prefill_call(sim *s, sim_worker *w, sim_conn *c, uint64_t stream, const sim_body *b)
{
    uint32_t choices[SIM_CHOICES_MAX], n = 0;
    TD_LIST_FOR (l, &w->jobs)
        n++;
    sim_job *j = calloc(1, sizeof *j);
    TD_BUG_ON(!j);
    td_list_init(&j->link);
    j->stream = stream;
    j->conn = c;
    j->request = b->request;
    j->attempt = b->attempt;
    j->has_ticket = b->has_ticket;
    j->ticket = b->ticket;
    int bad = sim_plan(&j->request, &j->plan, choices) < 0 || j->plan.n_blocks > SIM_SPAN_MAX;
    if (bad || n == JOBS_MAX || j->plan.n_blocks > w->pool.n) {
        finish(s, j,
               bad             ? TD_INVALID_ARGUMENT
               : n == JOBS_MAX ? TD_RESOURCE_EXHAUSTED
                               : TD_OUT_OF_RANGE);
        free(j);
        return;
    }
    j->n_left = j->plan.n_tokens;
    td_list_add(&w->jobs, &j->link);
    wake_lane(s, w);
}

void sim_prefill_abort(sim *s, sim_worker *w, sim_conn *c, uint64_t stream, uint32_t code)
{
    sim_job *found = NULL;
    TD_LIST_FOR (l, &w->jobs)
        if (job_of(l)->conn == c && job_of(l)->stream == stream)
            found = job_of(l);
    if (!found) {
        sim_finish_call(s, c, stream, code, TD_ERROR_NONE);
        return;
    }
    finish(s, found, code);
    found->cancelled = 1;
    if (found->pushing)
        out_step(s, w, found, &(td_out_event){.kind = TD_OUT_CANCEL, .code = code});
    else
        job_free(s, w, found);
    wake_lane(s, w);
}

void sim_prefill_die(sim *s, sim_worker *w)
{
    TD_LIST_FOR (l, &w->jobs)
        free(job_of(l));
    td_list_init(&w->jobs);
}

void sim_prefill_check(sim *s, sim_worker *w)
{
    uint32_t used = 0, held = 0;
    for (uint32_t b = 0; b < w->pool.n; b++)
        used += w->pool.refs[b] != 0;
    TD_LIST_FOR (l, &w->jobs)
        held += job_of(l)->n_blocks;
    if (used + w->pool.n_free != w->pool.n || held != used)
        sim_fail(s, "worker %u: %u blocks used, %u free, %u held by jobs, %u in all", w->index,
                 used, w->pool.n_free, held, w->pool.n);
}
