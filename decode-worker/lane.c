/* SPDX-License-Identifier: Apache-2.0 */
#include "decode-worker/lane.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bug.h"
#include "base/clock.h"
#include "base/prefix.h"
#include "base/rand.h"
#include "decode-worker/job.h"
#include "worker/spec.h"
#include "base/banned.h"

#define NO_FORK "choices could not be made from the first one"

typedef struct runner {
    td_decode_job *job;
    uint32_t at; /* index of its choice in the job */
} runner;

/* Who is in a step, and what is computed: one token of each, then chunks of local prefills. */
typedef struct flight {
    runner *runners; /* [max_seqs]; job NULL: it ended since */
    uint32_t n;
    td_step_item *items;
} flight;

struct td_decode_lane {
    td_worker_lane base;
    td_decode_policy policy;
    uint32_t n_admitted; /* sequences */
    uint32_t generation, cursor;
    uint32_t n_entering; /* jobs whose blocks are being copied to the device */
    _Atomic uint64_t local_tokens;
    /* room of one step */
    runner *runners; /* [max_admitted] */
    uint32_t *picks; /* [max_seqs] */
    td_decode_job *locals[TD_DECODE_LOCAL_MAX];
    uint32_t n_locals;
    flight flights[TD_STEPS_BEGUN_MAX]; /* those that are begun, and room for the next */
    uint32_t oldest;                    /* first of td_engine_begun() */
    _Atomic uint64_t n_ahead, n_waited;
    td_sample *samples;
    uint8_t *bad;
};

/* ---- ends ---- */

static uint32_t n_choices(const td_decode_job *j)
{
    return j->base.request.plan.n_choices;
}

static void free_job(td_worker_lane *w, td_worker_job *job)
{
    td_decode_lane *l = (td_decode_lane *)w;
    td_decode_job *j = (td_decode_job *)job;
    for (int k = 0; k < TD_STEPS_BEGUN_MAX; k++)
        for (uint32_t i = 0; i < l->flights[k].n; i++)
            if (l->flights[k].runners[i].job == j)
                l->flights[k].runners[i].job = NULL;
    if (j->granted || j->prefilling || j->running)
        l->n_admitted -= n_choices(j);
    td_kv_unstage(l->base.pool, j->staged, j->n_staged);
    j->n_staged = 0;
    for (uint32_t i = 0; i < TD_CHOICES_MAX; i++) {
        td_seq_free(j->seqs[i]);
        j->seqs[i] = NULL;
    }
    for (uint32_t i = 0; i < j->n_spare; i++)
        td_kv_unref(l->base.pool, j->spare[i]);
    j->n_spare = 0;
    free(j->spare);
    free(j->blocks);
    free(j->staged);
    j->spare = j->staged = NULL;
    j->blocks = NULL;
}

static uint32_t n_waiting_blocks(const td_decode_job *j)
{
    return j->base.request.plan.n_blocks - j->held_blocks * j->n_seqs;
}

/* Its copies are made or, for a job that ends early, waited for: until then its blocks are not
 * free. */
static void end_entering(td_decode_lane *l, td_decode_job *j)
{
    if (j->base.code || !td_kv_copied(l->base.pool, j->mark))
        (void)td_kv_wait(l->base.pool); /* a device that failed copies no more */
    j->entering = j->granted = 0;
    j->running = 1;
    l->n_entering--;
    l->base.n_reserved -= n_waiting_blocks(j);
}

/* End a job before its time: at once, or when the mover has given its blocks back. */
static void fail(td_decode_lane *l, td_decode_job *j, uint32_t code, td_error error,
                 const char *text)
{
    td_worker_job_set_end(&j->base, code, error, text);
    if (j->entering)
        end_entering(l, j);
    if (!j->granted) {
        td_worker_lane_finish(&l->base, &j->base);
        return;
    }
    atomic_store(&j->base.drop, code);
    (void)td_ring_push(l->base.c.to_mover, &td_msg_wake);
}

/* ---- admission ---- */

static uint64_t most_rows(const td_decode_job *j)
{
    return (uint64_t)j->base.request.n_prompt + j->base.request.max_tokens - 1;
}

/* Take every block the job can come to need. -ENOSPC: the caller frees what was taken. */
static int reserve(td_decode_lane *l, td_decode_job *j, uint64_t blocks)
{
    uint64_t own = 0;
    for (uint32_t t = 0; t < j->n_seqs; t++) {
        if (td_seq_reserve(j->seqs[t], most_rows(j)) < 0)
            return -ENOSPC;
        own += (most_rows(j) + TD_BLOCK_TOKENS - 1) / TD_BLOCK_TOKENS - j->held_blocks;
    }
    uint32_t spare = (uint32_t)(blocks - own);
    if (spare == 0)
        return 0;
    j->spare = calloc(spare, sizeof *j->spare);
    if (!j->spare)
        return -ENOMEM;
    int r = td_kv_alloc(l->base.pool, spare, j->spare);
    j->n_spare = r < 0 ? 0 : spare;
    return r;
}

static int admit(td_decode_lane *l, td_decode_job *j, td_err *err)
{
    const td_request *q = &j->base.request;
    td_decode_need needs[TD_CHOICES_MAX];
    uint32_t n = n_choices(j);
    for (uint32_t i = 0; i < n; i++)
        needs[i] = (td_decode_need){.n_prompt = (uint32_t)q->n_prompt,
                                    .n_emitted = (uint32_t)q->n_emitted[i],
                                    .max_tokens = q->max_tokens};
    uint64_t all = td_decode_blocks(&l->policy, needs, n, !q->recovery, 0);
    /* Prefix hits only for a single timeline: a ticket tells one number of held blocks. */
    if (j->n_seqs == 1)
        j->held_blocks = (uint32_t)(td_seq_attach_prefix(j->seqs[0]) / TD_BLOCK_TOKENS);
    uint64_t need = td_decode_blocks(&l->policy, needs, n, !q->recovery, j->held_blocks);
    uint32_t available = td_kv_available(l->base.pool);
    switch (td_decode_admit(&l->policy, needs, n, need, all, available, l->n_admitted)) {
    case TD_DECODE_TOO_BIG:
        return td_err_set(err, -ERANGE,
                          "%zu prompt tokens and %u to emit in %u choices need %llu KV blocks, "
                          "this worker has %u",
                          q->n_prompt, q->max_tokens, n, (unsigned long long)all,
                          l->policy.n_blocks);
    case TD_DECODE_FULL:
        return td_err_set(
            err, -ENOSPC, "no room: %llu KV blocks needed, %u free, %u of %u sequences admitted",
            (unsigned long long)need, available, l->n_admitted, l->policy.max_admitted);
    case TD_DECODE_ADMIT:
        break;
    }
    int r = reserve(l, j, need);
    return r < 0 ? td_err_set(err, r, "no room for %llu KV blocks", (unsigned long long)need) : 0;
}

/* What the mover may write where, and what must arrive. */
static int fill_grant(td_decode_job *j)
{
    const td_handoff_plan *p = &j->base.request.plan;
    j->blocks = calloc(p->n_blocks, sizeof *j->blocks);
    if (!j->blocks)
        return -ENOMEM;
    for (uint32_t i = 0; i < p->n_blocks; i++) {
        uint32_t t, b, rows;
        size_t n_hashes, n_blocks;
        td_plan_block(p, i, &t, &b, &rows);
        if (b < j->held_blocks)
            continue;
        const uint8_t *hashes = td_seq_hashes(j->seqs[t], &n_hashes);
        const td_block *blocks = td_seq_blocks(j->seqs[t], &n_blocks);
        TD_BUG_ON(b >= n_blocks);
        td_receive_block *g = &j->blocks[i];
        g->block = blocks[b];
        g->expect.rows = rows;
        g->expect.has_chain = rows == TD_BLOCK_TOKENS && b < n_hashes;
        if (g->expect.has_chain)
            memcpy(g->expect.chain, hashes + (size_t)b * TD_PREFIX_HASH_BYTES,
                   TD_PREFIX_HASH_BYTES);
    }
    for (uint32_t i = 0; i < p->n_choices; i++) {
        size_t n = j->base.request.n_emitted[i];
        j->first[i] = (td_in_first){.choice = j->base.request.choices[i]};
        if (j->base.request
                .recovery) { /* recomputed: it must be the id that the client has already */
            j->first[i].has_id = 1;
            j->first[i].id = j->base.request.emitted[i][n - 1];
        }
    }
    return 0;
}

/* A place where the mover writes, for every block that will arrive. */
static int stage(td_decode_lane *l, td_decode_job *j, td_err *err)
{
    uint32_t need = n_waiting_blocks(j), all = td_kv_staging(l->base.pool), n = 0;
    if (need > all)
        return td_err_set(err, -ERANGE,
                          "%u KV blocks would arrive, this worker stages %u; raise --kv-staging",
                          need, all);
    j->staged = calloc(need, sizeof *j->staged);
    if (!j->staged)
        return td_err_set(err, -ENOMEM, "ticket: out of memory");
    for (uint32_t i = 0; i < j->base.request.plan.n_blocks; i++)
        if (j->blocks[i].expect.rows)
            j->staged[n++] = j->blocks[i].block;
    TD_BUG_ON(n != need);
    int r = td_kv_stage(l->base.pool, j->staged, n);
    if (r < 0)
        return td_err_set(err, r, "no room: %u KV blocks to stage, %u of %u places are free", n,
                          td_kv_staging_free(l->base.pool), all);
    j->n_staged = n;
    return 0;
}

static int prepare(td_decode_lane *l, td_decode_job *j, td_err *err)
{
    const td_handoff_plan *p = &j->base.request.plan;
    for (j->n_seqs = 0; j->n_seqs < p->n_timelines; j->n_seqs++) {
        int r = td_worker_seq(l->base.c.engine, &j->base.request, j->n_seqs,
                              p->timelines[j->n_seqs].choice, &j->seqs[j->n_seqs], err);
        if (r < 0)
            return r;
    }
    int r = admit(l, j, err);
    if (r < 0)
        return r;
    uint32_t limit = j->base.request.prompt_logprobs ? 0 : j->local_limit;
    j->local_tokens = td_decode_local(limit, p->n_timelines, p->timelines[0].n_ids, j->held_blocks);
    if (j->local_tokens)
        return 0;
    if ((r = fill_grant(j)) < 0)
        return td_err_set(err, r, "ticket: out of memory");
    return stage(l, j, err);
}

static int arrive(td_worker_lane *w, td_worker_job *job, td_err *err)
{
    td_decode_lane *l = (td_decode_lane *)w;
    td_decode_job *j = (td_decode_job *)job;
    int r = prepare(l, j, err);
    if (r < 0)
        return r;
    l->n_admitted += n_choices(j);
    if (j->local_tokens) {
        j->prefilling = 1;
        td_worker_lane_note_blocks(&l->base);
        td_push_wait(l->base.c.to_loop, &j->ticket);
        return 0;
    }
    j->granted = 1;
    j->generation = ++l->generation;
    td_random_bytes(j->ticket_id, sizeof j->ticket_id);
    td_random_bytes(j->mac_key, sizeof j->mac_key);
    l->base.n_reserved += n_waiting_blocks(j);
    td_worker_lane_note_blocks(&l->base);
    td_push_wait(l->base.c.to_mover, &j->grant);
    td_push_wait(l->base.c.to_loop, &j->ticket);
    return 0;
}

/* ---- commit ---- */

/* Make the other choices of a first attempt from the first one: full blocks shared, the partial one
 * copied. The spare blocks are exactly what that takes. */
static int fork_choices(td_decode_lane *l, td_decode_job *j)
{
    for (uint32_t i = 0; i < j->n_spare; i++)
        td_kv_unref(l->base.pool, j->spare[i]);
    j->n_spare = 0;
    for (; j->n_seqs < n_choices(j); j->n_seqs++) {
        int r = td_seq_fork(j->seqs[0], j->base.request.choices[j->n_seqs], &j->seqs[j->n_seqs]);
        if (r == 0)
            r = td_seq_reserve(j->seqs[j->n_seqs], most_rows(j));
        if (r < 0)
            return r;
    }
    return 0;
}

static int any_left(const td_decode_job *j)
{
    for (uint32_t i = 0; i < j->n_seqs; i++) {
        if (j->seqs[i])
            return 1;
    }
    return 0;
}

/* The rows are here and verified: from now on the blocks are the lane's, and may be read. */
static void adopt(td_decode_lane *l, td_decode_job *j)
{
    for (uint32_t t = 0; t < j->n_seqs; t++)
        td_seq_set_computed(j->seqs[t], j->base.request.plan.timelines[t].n_ids);
    if (fork_choices(l, j) < 0) {
        fail(l, j, TD_INTERNAL, TD_ERROR_INTERNAL, NO_FORK);
        return;
    }
    td_push_wait(l->base.c.to_loop, &j->committed);
    for (uint32_t i = 0; i < j->n_seqs; i++) {
        if (td_seq_append(j->seqs[i], j->ids[i]) == TD_FINISH_NONE)
            continue;
        td_seq_free(j->seqs[i]); /* its first token ended it; the prefill worker's answer says so */
        j->seqs[i] = NULL;
    }
    if (!any_left(j))
        td_worker_lane_finish(&l->base, &j->base);
}

/* Staged blocks up to n go to the pool, beside the steps of others. */
static void import(td_decode_lane *l, td_decode_job *j, uint32_t n)
{
    uint64_t mark;
    int r = td_kv_import(l->base.pool, j->staged + j->n_entered, n - j->n_entered, &mark);
    j->copying = 1;
    j->n_entered = n;
    j->mark = TD_MAX(j->mark, mark);
    if (r < 0)
        fail(l, j, TD_INTERNAL, TD_ERROR_INTERNAL, "the device did not take its KV blocks");
}

/* Whole, if not committed: nobody reads them yet. */
static void arrived(td_decode_lane *l, const td_decode_arrived *a)
{
    td_decode_job *j = a->job;
    uint32_t n = j->n_entered;
    for (uint32_t i = 0; i < a->n; i++) {
        uint32_t at = n; /* near: blocks come in their order */
        while (at < j->n_staged && j->staged[at] != a->blocks[i])
            at++;
        TD_BUG_ON(at == j->n_staged);
        td_block b = j->staged[at];
        j->staged[at] = j->staged[n];
        j->staged[n++] = b;
    }
    if (!j->base.code)
        import(l, j, n);
}

/* All are verified. */
static void enter(td_decode_lane *l, td_decode_job *j)
{
    j->entering = 1;
    l->n_entering++;
    import(l, j, j->n_staged);
}

static void entered(td_decode_lane *l, td_decode_job *j)
{
    end_entering(l, j);
    td_kv_unstage(l->base.pool, j->staged, j->n_staged);
    j->n_staged = 0;
    adopt(l, j);
}

/* Jobs whose copies are made. */
static void see_entered(td_decode_lane *l)
{
    for (td_list *at = l->base.jobs.next, *next; l->n_entering && at != &l->base.jobs; at = next) {
        td_decode_job *j = TD_LIST_ENTRY(at, td_decode_job, base.lane_node);
        next = at->next;
        if (j->entering && td_kv_copied(l->base.pool, j->mark))
            entered(l, j);
    }
}

static void settled(td_decode_lane *l, td_decode_job *j)
{
    char text[96];
    if (j->delivered && !j->base.code) {
        enter(l, j);
        return; /* seen before the next step */
    }
    if (j->copying)
        (void)td_kv_wait(l->base.pool);
    l->base.n_reserved -= n_waiting_blocks(j);
    j->granted = 0;
    j->running = 1;
    if (j->base.code) {
        td_worker_lane_finish(&l->base, &j->base);
    } else {
        int first = j->settled_why == TD_DROP_FIRST && j->base.request.recovery;
        snprintf(text, sizeof text, "the handoff ended: %s",
                 j->settled_why ? td_drop_name(j->settled_why) : td_code_name(j->settled_code));
        fail(l, j, j->settled_code, first ? TD_ERROR_NONDETERMINISM : TD_ERROR_NONE, text);
    }
}

static void from_mover(td_worker_lane *l, td_msg *m)
{
    if (m->kind == TD_DECODE_SETTLED) {
        settled((td_decode_lane *)l, ((td_worker_msg_of *)m)->job);
    } else if (m->kind == TD_DECODE_ARRIVED) {
        arrived((td_decode_lane *)l, (td_decode_arrived *)m);
        free(m);
    }
}

static void on_fail(td_worker_lane *l, td_worker_job *j, uint32_t code, td_error error,
                    const char *text)
{
    fail((td_decode_lane *)l, (td_decode_job *)j, code, error, text);
}

/* ---- steps ---- */

static uint32_t look(td_decode_lane *l)
{
    uint32_t n = 0, waiting = 0, n_running = 0;
    l->n_locals = 0;
    for (td_list *at = l->base.jobs.next; at != &l->base.jobs; at = at->next) {
        td_decode_job *j = TD_LIST_ENTRY(at, td_decode_job, base.lane_node);
        waiting += j->granted;
        if (j->prefilling && l->n_locals < TD_DECODE_LOCAL_MAX)
            l->locals[l->n_locals++] = j;
        for (uint32_t i = 0; j->running && i < j->n_seqs; i++) {
            n_running += j->seqs[i] != NULL;
            if (j->seqs[i] && !td_seq_is_last(j->seqs[i]))
                l->runners[n++] = (runner){j, i};
        }
    }
    atomic_store_explicit(&l->base.c.load->running, n_running + l->n_locals, memory_order_relaxed);
    atomic_store_explicit(&l->base.c.load->waiting, waiting, memory_order_relaxed);
    return n;
}

/* Does its row belong to somebody still? */
static int is_live(const runner *r)
{
    return r->job && r->job->seqs[r->at];
}

/* A job fails with any of its choices. */
static void end_bad(td_decode_lane *l, const flight *f)
{
    for (uint32_t i = 0; i < f->n; i++)
        if (l->bad[i] && is_live(&f->runners[i]))
            td_worker_job_set_end(&f->runners[i].job->base, TD_INTERNAL, TD_ERROR_INTERNAL,
                                  TD_WORKER_BAD_STEP);
}

/* Jobs that have no choice left, or failed in this step. */
static void finish_ended(td_decode_lane *l, const flight *f)
{
    for (uint32_t i = 0; i < f->n; i++) {
        td_decode_job *j = f->runners[i].job; /* NULL behind one of its other choices */
        if (j && (!any_left(j) || j->base.code))
            td_worker_lane_finish(&l->base, &j->base);
    }
}

static void take_token(td_decode_token *t, const runner *r, const td_sample *sample)
{
    td_seq *s = r->job->seqs[r->at];
    size_t n;
    td_finish finish_why = td_seq_append(s, sample->id);
    td_seq_ids(s, &n);
    *t = (td_decode_token){.job = r->job,
                           .at = r->at,
                           .index = (uint32_t)(n - td_seq_n_prompt(s)) - 1,
                           .finish = finish_why,
                           .sample = *sample};
    if (finish_why == TD_FINISH_NONE)
        return;
    td_seq_free(s); /* its blocks serve others from the next step on */
    r->job->seqs[r->at] = NULL;
}

/* ---- local prefills ---- */

/* Chunks beside the tokens of running streams. Returns how many prefills take part. */
static uint32_t add_locals(td_decode_lane *l, flight *f)
{
    uint32_t left[TD_DECODE_LOCAL_MAX], tokens[TD_DECODE_LOCAL_MAX];
    for (uint32_t i = 0; i < l->n_locals; i++)
        left[i] = l->locals[i]->base.request.plan.timelines[0].n_ids -
                  (uint32_t)td_seq_computed(l->locals[i]->seqs[0]);
    uint32_t n_picks = td_decode_plan_local(&l->policy, left, l->n_locals, tokens);
    for (uint32_t i = 0; i < n_picks; i++) {
        td_decode_job *j = l->locals[i];
        if (!j->started_us)
            j->started_us = td_now_us();
        td_step_item *it = &f->items[f->n + i];
        *it = (td_step_item){.seq = j->seqs[0], .n_tokens = tokens[i]};
        if (tokens[i] == left[i]) /* as a prefill worker samples it */
            it->n_samples = j->base.request.recovery ? 1 : j->base.request.n;
    }
    return n_picks;
}

/* A recovery: the last emitted id again, or the two workers do not compute the same. */
static int is_same(td_decode_job *j, uint32_t id)
{
    const td_request *q = &j->base.request;
    return id == q->emitted[0][q->n_emitted[0] - 1] &&
           td_seq_append(j->seqs[0], id) == TD_FINISH_NONE;
}

/* The prompt is whole: from here on the job runs as one whose blocks were handed over, but its
 * first tokens go out with this step. */
static void local_done(td_decode_lane *l, td_decode_job *j, const td_sample *samples,
                       td_decode_step *m)
{
    j->prefilling = 0;
    j->running = 1;
    j->prefill_us = td_now_us() - j->started_us;
    atomic_fetch_add_explicit(&l->local_tokens, j->local_tokens, memory_order_relaxed);
    if (fork_choices(l, j) < 0) {
        td_worker_job_set_end(&j->base, TD_INTERNAL, TD_ERROR_INTERNAL, NO_FORK);
        return;
    }
    if (j->base.request.recovery && !is_same(j, samples[0].id)) {
        td_worker_job_set_end(&j->base, TD_DATA_LOSS, TD_ERROR_NONDETERMINISM,
                              "the resampled token differs from the one that was sent");
        return;
    }
    td_push_wait(l->base.c.to_loop, &j->committed);
    for (uint32_t i = 0; !j->base.request.recovery && i < j->n_seqs; i++)
        take_token(&m->tokens[m->n++], &(runner){j, i}, &samples[i]);
}

static void take_locals(td_decode_lane *l, const flight *f, uint32_t n_locals, td_decode_step *m)
{
    const td_sample *samples = l->samples + f->n;
    for (uint32_t i = 0; i < n_locals; i++) {
        td_decode_job *j = l->locals[i];
        uint32_t n_samples = f->items[f->n + i].n_samples;
        if (l->bad[f->n + i])
            td_worker_job_set_end(&j->base, TD_INTERNAL, TD_ERROR_INTERNAL, TD_WORKER_BAD_STEP);
        else if (n_samples)
            local_done(l, j, samples, m);
        samples += n_samples;
    }
}

static void finish_locals(td_decode_lane *l, uint32_t n_locals)
{
    for (uint32_t i = 0; i < n_locals; i++) {
        td_decode_job *j = l->locals[i];
        if (j->base.code || !any_left(j))
            td_worker_lane_finish(&l->base, &j->base);
    }
}

/* ---- a step ---- */

/* What the step made: tokens of the running streams and first tokens of prompts that are whole. */
static void send_step(td_decode_lane *l, td_decode_step *m, const flight *f, uint32_t n_locals)
{
    *m = (td_decode_step){.head = {TD_DECODE_STEP}, .step = l->base.n_steps + 1};
    for (uint32_t i = 0; i < f->n; i++) {
        const runner *r = &f->runners[i];
        if (is_live(r) && !r->job->base.code)
            take_token(&m->tokens[m->n++], r, &l->samples[i]);
    }
    take_locals(l, f, n_locals, m);
    td_worker_lane_count(&l->base, m->n);
    if (m->n > 0)
        td_push_wait(l->base.c.to_loop, m);
    else
        free(m);
}

/* The step of f has ended, n_good of its items well. */
static void take_step(td_decode_lane *l, flight *f, uint32_t n_locals, uint32_t n_good)
{
    td_decode_step *m =
        malloc(sizeof *m + (f->n + n_locals * (size_t)TD_CHOICES_MAX) * sizeof *m->tokens);
    if (!m || n_good == 0) {
        memset(l->bad, 1, f->n + n_locals);
        free(m);
        m = NULL;
    }
    end_bad(l, f);
    if (m)
        send_step(l, m, f, n_locals);
    else
        take_locals(l, f, n_locals, NULL); /* all failed */
    finish_ended(l, f);
    finish_locals(l, n_locals);
    f->n = 0;
}

static void run_step(td_decode_lane *l, flight *f, uint32_t n_locals)
{
    uint32_t n_good = td_worker_lane_run(&l->base, f->items, f->n + n_locals, l->samples, l->bad);
    take_step(l, f, n_locals, n_good);
}

/* Wait for the step that was begun first. Rows of choices that ended since belong to nobody. */
static uint32_t end_step(td_decode_lane *l)
{
    flight *f = &l->flights[l->oldest];
    uint32_t n = f->n;
    for (uint32_t i = 0; i < n; i++) {
        const runner *r = &f->runners[i];
        f->items[i].seq = is_live(r) ? r->job->seqs[r->at] : NULL;
    }
    l->oldest = (l->oldest + 1) % TD_STEPS_BEGUN_MAX;
    take_step(l, f, 0, td_worker_lane_end(&l->base, f->items, n, l->samples, l->bad));
    return n;
}

/* A token of each that was picked. */
static flight *fill_flight(td_decode_lane *l, uint32_t n)
{
    uint32_t begun = td_engine_begun(l->base.c.engine);
    flight *f = &l->flights[(l->oldest + begun) % TD_STEPS_BEGUN_MAX];
    f->n = n;
    for (uint32_t i = 0; i < n; i++) {
        runner r = f->runners[i] = l->runners[l->picks[i]];
        f->items[i] = (td_step_item){.seq = r.job->seqs[r.at], .n_tokens = 1, .n_samples = 1};
    }
    return f;
}

static void count(_Atomic uint64_t *n)
{
    atomic_fetch_add_explicit(n, 1, memory_order_relaxed);
}

/* On a device the next step is begun before the last one is ended, so that it need not wait for the
 * host. With a chunk of a prompt in it, or where the host must act in between (engine.h), it is
 * begun or run when the last one is ended. */
static uint32_t step(td_worker_lane *w)
{
    td_decode_lane *l = (td_decode_lane *)w;
    td_engine *e = w->c.engine;
    see_entered(l);
    w->must_look = l->n_entering > 0;
    uint32_t begun = td_engine_begun(e), cursor = l->cursor;
    flight *f = fill_flight(l, td_decode_plan(&l->policy, look(l), &l->cursor, l->picks));
    uint32_t n = f->n;
    if (td_engine_runs_behind(e) && n > 0 && l->n_locals == 0 &&
        td_engine_begin(e, f->items, n) == 0) {
        count(begun ? &l->n_ahead : &l->n_waited);
        return begun ? end_step(l) : n;
    }
    if (begun) { /* planned again when it is ended */
        f->n = 0;
        l->cursor = cursor;
        return end_step(l);
    }
    uint32_t n_locals = add_locals(l, f);
    if (n + n_locals > 0) {
        if (td_engine_runs_behind(e))
            count(&l->n_waited);
        run_step(l, f, n_locals);
    }
    return n + n_locals;
}

uint64_t td_decode_lane_steps_ahead(const td_decode_lane *l)
{
    return atomic_load_explicit(&l->n_ahead, memory_order_relaxed);
}

uint64_t td_decode_lane_steps_waited(const td_decode_lane *l)
{
    return atomic_load_explicit(&l->n_waited, memory_order_relaxed);
}

uint64_t td_decode_lane_local_tokens(const td_decode_lane *l)
{
    return atomic_load_explicit(&l->local_tokens, memory_order_relaxed);
}

static void lane_free(td_decode_lane *l)
{
    free(l->runners);
    free(l->picks);
    for (int i = 0; i < TD_STEPS_BEGUN_MAX; i++) {
        free(l->flights[i].runners);
        free(l->flights[i].items);
    }
    free(l->samples);
    free(l->bad);
    free(l);
}

int td_decode_lane_start(const td_worker_lane_config *config, const td_decode_policy *policy,
                         td_decode_lane **ret_lane, td_err *reterr_err)
{
    static const td_worker_lane_ops ops = {.arrive = arrive,
                                           .from_mover = from_mover,
                                           .fail = on_fail,
                                           .step = step,
                                           .free_job = free_job};
    td_decode_lane *l = calloc(1, sizeof *l);
    if (!l)
        return td_err_set(reterr_err, -ENOMEM, "lane: out of memory");
    uint32_t n = policy->max_seqs;
    l->policy = *policy;
    l->runners = calloc(policy->max_admitted, sizeof *l->runners);
    l->picks = calloc(n, sizeof *l->picks);
    l->samples = calloc(n + (size_t)TD_DECODE_LOCAL_MAX * TD_CHOICES_MAX, sizeof *l->samples);
    l->bad = calloc(n + TD_DECODE_LOCAL_MAX, sizeof *l->bad);
    int r = 0, have = 1;
    for (int i = 0; i < TD_STEPS_BEGUN_MAX; i++) {
        flight *f = &l->flights[i];
        f->runners = calloc(n, sizeof *f->runners);
        f->items = calloc(n + TD_DECODE_LOCAL_MAX, sizeof *f->items);
        have = have && f->runners && f->items;
    }
    if (!have || !l->runners || !l->picks || !l->samples || !l->bad)
        r = td_err_set(reterr_err, -ENOMEM, "lane: out of memory");
    else
        r = td_worker_lane_start(&l->base, &ops, config, reterr_err);
    if (r < 0) {
        lane_free(l);
        return r;
    }
    *ret_lane = l;
    return 0;
}

int td_decode_lane_stop(td_decode_lane *l)
{
    if (!td_worker_lane_stop(&l->base))
        return 0;
    lane_free(l);
    return 1;
}
