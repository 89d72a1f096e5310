/* SPDX-License-Identifier: Apache-2.0 */
#include "decode-worker/lane.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bug.h"
#include "base/prefix.h"
#include "base/rand.h"
#include "decode-worker/job.h"
#include "decode-worker/spec.h"
#include "base/banned.h"

enum { SPIN_US = 20, BAD_STEPS_MAX = 3 };

typedef struct runner {
    td_decode_job *job;
    uint32_t at; /* index of its choice in the job */
} runner;

struct td_decode_lane {
    td_decode_lane_config c;
    td_kv_pool *pool;
    td_list jobs;
    uint32_t n_jobs, n_admitted, n_reserved; /* sequences; blocks of tickets that are not settled */
    uint32_t generation, cursor;
    uint64_t step;
    int bad_steps;
    pthread_t thread;
    atomic_int stop;
    /* room of one step */
    runner *runners; /* [max_admitted] */
    uint32_t *picks; /* [max_seqs] */
    td_step_item *items;
    td_sample *samples;
};

/* ---- ends ---- */

static uint32_t n_choices(const td_decode_job *j)
{
    return j->request.plan.n_choices;
}

static void free_blocks(td_decode_lane *l, td_decode_job *j)
{
    for (uint32_t i = 0; i < TD_CHOICES_MAX; i++) {
        td_seq_free(j->seqs[i]);
        j->seqs[i] = NULL;
    }
    for (uint32_t i = 0; i < j->n_spare; i++)
        td_kv_unref(l->pool, j->spare[i]);
    j->n_spare = 0;
    free(j->spare);
    free(j->blocks);
    j->spare = NULL;
    j->blocks = NULL;
}

/* Before a message leaves: who has heard of a ticket or an end sees it in the load too. */
static void note_blocks(td_decode_lane *l)
{
    atomic_store_explicit(&l->c.load->kv_free, td_kv_available(l->pool), memory_order_relaxed);
    atomic_store_explicit(&l->c.load->kv_reserved, l->n_reserved, memory_order_relaxed);
}

static void finish(td_decode_lane *l, td_decode_job *j)
{
    if (j->granted || j->running)
        l->n_admitted -= n_choices(j);
    free_blocks(l, j);
    td_list_del(&j->lane_node);
    l->n_jobs--;
    note_blocks(l);
    td_push_wait(l->c.to_loop, &j->end);
}

static void set_end(td_decode_job *j, uint32_t code, td_error error, const char *text)
{
    if (j->code)
        return;
    j->code = code;
    j->error = error;
    snprintf(j->text, sizeof j->text, "%s", text);
}

/* End a job before its time: at once, or when the mover has given its blocks back. */
static void fail(td_decode_lane *l, td_decode_job *j, uint32_t code, td_error error,
                 const char *text)
{
    set_end(j, code, error, text);
    if (!j->granted) {
        finish(l, j);
        return;
    }
    atomic_store(&j->fence, code);
    (void)td_ring_push(l->c.to_mover, &td_msg_wake);
}

/* ---- admission ---- */

static uint64_t most_rows(const td_decode_job *j)
{
    return (uint64_t)j->request.n_prompt + j->request.max_tokens - 1;
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
    int r = td_kv_alloc(l->pool, spare, j->spare);
    j->n_spare = r < 0 ? 0 : spare;
    return r;
}

static int admit(td_decode_lane *l, td_decode_job *j, td_err *err)
{
    const td_request *q = &j->request;
    td_decode_need needs[TD_CHOICES_MAX];
    uint32_t n = n_choices(j);
    for (uint32_t i = 0; i < n; i++)
        needs[i] = (td_decode_need){.n_prompt = (uint32_t)q->n_prompt,
                                    .n_emitted = (uint32_t)q->n_emitted[i],
                                    .max_tokens = q->max_tokens};
    uint64_t all = td_decode_blocks(&l->c.policy, needs, n, !q->recovery, 0);
    /* Prefix hits only for a single timeline: a ticket tells one number of held blocks. */
    if (j->n_seqs == 1)
        j->held_blocks = (uint32_t)(td_seq_attach_prefix(j->seqs[0]) / TD_BLOCK_TOKENS);
    uint64_t need = td_decode_blocks(&l->c.policy, needs, n, !q->recovery, j->held_blocks);
    uint32_t available = td_kv_available(l->pool);
    switch (td_decode_admit(&l->c.policy, needs, n, need, all, available, l->n_admitted)) {
    case TD_DECODE_TOO_BIG:
        return td_err_set(err, -ERANGE,
                          "%zu prompt tokens and %u to emit in %u choices need %llu KV blocks, "
                          "this worker has %u",
                          q->n_prompt, q->max_tokens, n, (unsigned long long)all,
                          l->c.policy.n_blocks);
    case TD_DECODE_FULL:
        return td_err_set(
            err, -ENOSPC, "no room: %llu KV blocks needed, %u free, %u of %u sequences admitted",
            (unsigned long long)need, available, l->n_admitted, l->c.policy.max_admitted);
    case TD_DECODE_ADMIT:
        break;
    }
    int r = reserve(l, j, need);
    return r < 0 ? td_err_set(err, r, "no room for %llu KV blocks", (unsigned long long)need) : 0;
}

/* What the mover may write where, and what must arrive. */
static int fill_grant(td_decode_job *j)
{
    const td_handoff_plan *p = &j->request.plan;
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
        size_t n = j->request.n_emitted[i];
        j->first[i] = (td_in_first){.choice = j->request.choices[i]};
        if (j->request.recovery) { /* recomputed: it must be the id that the client has already */
            j->first[i].has_id = 1;
            j->first[i].id = j->request.emitted[i][n - 1];
        }
    }
    return 0;
}

static uint32_t n_waiting_blocks(const td_decode_job *j)
{
    return j->request.plan.n_blocks - j->held_blocks * j->n_seqs;
}

static int prepare(td_decode_lane *l, td_decode_job *j, td_err *err)
{
    const td_handoff_plan *p = &j->request.plan;
    for (j->n_seqs = 0; j->n_seqs < p->n_timelines; j->n_seqs++) {
        int r = td_decode_seq(l->c.engine, &j->request, j->n_seqs, p->timelines[j->n_seqs].choice,
                              &j->seqs[j->n_seqs], err);
        if (r < 0)
            return r;
    }
    int r = admit(l, j, err);
    if (r == 0 && (r = fill_grant(j)) < 0)
        td_err_set(err, r, "ticket: out of memory");
    return r;
}

static void arrive(td_decode_lane *l, td_decode_job *j)
{
    td_err err = {0};
    td_list_add(&l->jobs, &j->lane_node);
    l->n_jobs++;
    int r = prepare(l, j, &err);
    if (r < 0) {
        td_error e = r == -ERANGE   ? TD_ERROR_CONTEXT_LENGTH
                     : r == -EINVAL ? TD_ERROR_INVALID_VALUE
                                    : TD_ERROR_NONE;
        fail(l, j,
             r == -ERANGE   ? TD_OUT_OF_RANGE
             : r == -ENOSPC ? TD_RESOURCE_EXHAUSTED
                            : td_code_from_errno(r),
             e, err.text);
        return;
    }
    j->granted = 1;
    j->generation = ++l->generation;
    td_random_bytes(j->ticket_id, sizeof j->ticket_id);
    l->n_admitted += n_choices(j);
    l->n_reserved += n_waiting_blocks(j);
    note_blocks(l);
    td_push_wait(l->c.to_mover, &j->grant);
    td_push_wait(l->c.to_loop, &j->ticket);
}

/* ---- commit ---- */

/* Make the other choices of a first attempt from the first one: full blocks shared, the partial one
 * copied. The spare blocks are exactly what that takes. */
static int fork_choices(td_decode_lane *l, td_decode_job *j)
{
    for (uint32_t i = 0; i < j->n_spare; i++)
        td_kv_unref(l->pool, j->spare[i]);
    j->n_spare = 0;
    for (; j->n_seqs < n_choices(j); j->n_seqs++) {
        int r = td_seq_fork(j->seqs[0], j->request.choices[j->n_seqs], &j->seqs[j->n_seqs]);
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
        td_seq_set_computed(j->seqs[t], j->request.plan.timelines[t].n_ids);
    if (fork_choices(l, j) < 0) {
        fail(l, j, TD_INTERNAL, TD_ERROR_INTERNAL, "choices could not be made from the first one");
        return;
    }
    td_push_wait(l->c.to_loop, &j->committed);
    for (uint32_t i = 0; i < j->n_seqs; i++) {
        if (td_seq_append(j->seqs[i], j->ids[i]) == TD_FINISH_NONE)
            continue;
        td_seq_free(j->seqs[i]); /* its first token ended it; the prefill worker's answer says so */
        j->seqs[i] = NULL;
    }
    if (!any_left(j))
        finish(l, j);
}

static void settled(td_decode_lane *l, td_decode_job *j)
{
    char text[96];
    l->n_reserved -= n_waiting_blocks(j);
    j->granted = 0;
    j->running = 1;
    if (j->code) {
        finish(l, j);
    } else if (j->delivered) {
        adopt(l, j);
    } else {
        int first = j->settled_why == TD_DROP_FIRST && j->request.recovery;
        snprintf(text, sizeof text, "the handoff ended: %s",
                 j->settled_why ? td_drop_name(j->settled_why) : td_code_name(j->settled_code));
        fail(l, j, j->settled_code, first ? TD_ERROR_NONDETERMINISM : TD_ERROR_NONE, text);
    }
}

static void flush(td_decode_lane *l, td_decode_flush *f)
{
    f->blocks = td_kv_flush(l->pool);
    td_push_wait(l->c.to_loop, f);
}

static void take(td_decode_lane *l)
{
    td_msg *m;
    while ((m = td_ring_pop(l->c.from_mover))) {
        if (m->kind == TD_DECODE_SETTLED)
            settled(l, ((td_decode_msg_of *)m)->job);
    }
    while ((m = td_ring_pop(l->c.from_loop))) {
        if (m->kind == TD_DECODE_ARRIVE)
            arrive(l, ((td_decode_msg_of *)m)->job);
        else if (m->kind == TD_DECODE_FLUSH)
            flush(l, (td_decode_flush *)m);
    }
}

/* Cancelled or out of time: stops within this step. */
static void see_flags(td_decode_lane *l)
{
    int stop = atomic_load(&l->stop);
    for (td_list *n = l->jobs.next, *next; n != &l->jobs; n = next) {
        next = n->next;
        td_decode_job *j = TD_LIST_ENTRY(n, td_decode_job, lane_node);
        uint32_t code = atomic_load(&j->cancel);
        if (atomic_load(&j->fence))
            continue;
        if (code)
            fail(l, j, code, code == TD_DEADLINE_EXCEEDED ? TD_ERROR_DEADLINE : TD_ERROR_CANCELLED,
                 "cancelled");
        else if (stop)
            fail(l, j, TD_UNAVAILABLE, TD_ERROR_DRAINING, "the worker ends");
    }
}

/* ---- steps ---- */

static uint32_t look(td_decode_lane *l)
{
    uint32_t n = 0, waiting = 0;
    for (td_list *at = l->jobs.next; at != &l->jobs; at = at->next) {
        td_decode_job *j = TD_LIST_ENTRY(at, td_decode_job, lane_node);
        waiting += j->granted;
        for (uint32_t i = 0; j->running && i < j->n_seqs; i++) {
            if (j->seqs[i])
                l->runners[n++] = (runner){j, i};
        }
    }
    atomic_store_explicit(&l->c.load->running, n, memory_order_relaxed);
    atomic_store_explicit(&l->c.load->waiting, waiting, memory_order_relaxed);
    return n;
}

static void bad_step(td_decode_lane *l, uint32_t n)
{
    static td_msg dead = {TD_DECODE_DEAD};
    for (uint32_t i = 0; i < n; i++) {
        td_decode_job *j = l->runners[l->picks[i]].job;
        if (!j->code) /* not yet failed by another choice of it */
            set_end(j, TD_INTERNAL, TD_ERROR_INTERNAL, "the engine failed in this request's step");
    }
    for (td_list *at = l->jobs.next, *next; at != &l->jobs; at = next) {
        next = at->next;
        td_decode_job *j = TD_LIST_ENTRY(at, td_decode_job, lane_node);
        if (j->running && j->code)
            finish(l, j);
    }
    if (++l->bad_steps == BAD_STEPS_MAX)
        td_push_wait(l->c.to_loop, &dead);
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

static void run_step(td_decode_lane *l, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        const runner *r = &l->runners[l->picks[i]];
        l->items[i] = (td_step_item){.seq = r->job->seqs[r->at], .n_tokens = 1, .n_samples = 1};
    }
    td_decode_step *m = malloc(sizeof *m + n * sizeof *m->tokens);
    if (!m || td_engine_step(l->c.engine, l->items, n, l->samples) < 0) {
        free(m);
        bad_step(l, n);
        return;
    }
    l->bad_steps = 0;
    *m = (td_decode_step){.head = {TD_DECODE_STEP}, .step = ++l->step, .n = n};
    for (uint32_t i = 0; i < n; i++)
        take_token(&m->tokens[i], &l->runners[l->picks[i]], &l->samples[i]);
    atomic_store_explicit(&l->c.load->step, l->step, memory_order_relaxed);
    atomic_fetch_add_explicit(&l->c.load->tokens_total, n, memory_order_relaxed);
    td_push_wait(l->c.to_loop, m);
    for (uint32_t i = 0; i < n; i++) {
        td_decode_job *j = l->runners[l->picks[i]].job;
        if (!j || any_left(j))
            continue;
        for (uint32_t k = i + 1; k < n; k++) { /* its other choices ended in the same step */
            if (l->runners[l->picks[k]].job == j)
                l->runners[l->picks[k]].job = NULL;
        }
        finish(l, j);
    }
}

static void *lane_main(void *arg)
{
    td_decode_lane *l = arg;
    for (;;) {
        take(l);
        see_flags(l);
        uint32_t n = td_decode_plan(&l->c.policy, look(l), &l->cursor, l->picks);
        if (n > 0)
            run_step(l, n);
        note_blocks(l);
        if (n > 0)
            continue;
        if (atomic_load(&l->stop) && l->n_jobs == 0)
            return NULL;
        td_wait_two(l->c.from_loop, l->c.from_mover, SPIN_US, -1);
    }
}

static void lane_free(td_decode_lane *l)
{
    free(l->runners);
    free(l->picks);
    free(l->items);
    free(l->samples);
    free(l);
}

int td_decode_lane_start(const td_decode_lane_config *config, td_decode_lane **ret_lane,
                         td_err *reterr_err)
{
    td_decode_lane *l = calloc(1, sizeof *l);
    if (!l)
        return td_err_set(reterr_err, -ENOMEM, "lane: out of memory");
    uint32_t n = config->policy.max_seqs;
    l->c = *config;
    l->pool = td_engine_pool(config->engine);
    td_list_init(&l->jobs);
    l->runners = calloc(config->policy.max_admitted, sizeof *l->runners);
    l->picks = calloc(n, sizeof *l->picks);
    l->items = calloc(n, sizeof *l->items);
    l->samples = calloc(n, sizeof *l->samples);
    int r = l->runners && l->picks && l->items && l->samples ? 0 : -ENOMEM;
    if (r == 0)
        r = -pthread_create(&l->thread, NULL, lane_main, l);
    if (r < 0) {
        lane_free(l);
        return td_err_set(reterr_err, r, "lane: cannot start a thread: %s", td_errno_text(r));
    }
    *ret_lane = l;
    return 0;
}

int td_decode_lane_stop(td_decode_lane *l)
{
    if (!atomic_exchange(&l->stop, 1))
        (void)td_ring_push(l->c.from_loop, &td_msg_wake);
    if (pthread_tryjoin_np(l->thread, NULL) != 0)
        return 0;
    lane_free(l);
    return 1;
}
