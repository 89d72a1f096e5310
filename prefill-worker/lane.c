/* SPDX-License-Identifier: Apache-2.0 */
#include "prefill-worker/lane.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bug.h"
#include "base/clock.h"
#include "base/cleanup.h"
#include "base/prefix.h"
#include "prefill-worker/job.h"
#include "proto/engine.pb-c.h"
#include "worker/spec.h"
#include "base/banned.h"

enum { VIEWS_MAX = 512 };

struct td_prefill_lane {
    td_worker_lane base; /* jobs: those to compute and those whose push is under way */
    td_prefill_policy policy;
    uint32_t n_blocks;
    uint64_t n_promised; /* blocks that later timelines of started jobs will take */
    uint32_t n_staging;  /* that started jobs may stage */
    /* room of one step */
    td_prefill_view views[VIEWS_MAX];
    td_prefill_job *viewed[VIEWS_MAX];
    td_prefill_pick *picks;
    td_step_item *items;
    td_prefill_job **picked;
    td_sample *samples;
    uint8_t *bad;
};

/* ---- ends ---- */

static void free_seqs(td_prefill_job *j)
{
    for (uint32_t t = 0; t < j->base.request.plan.n_timelines; t++) {
        td_seq_free(j->seqs[t]);
        j->seqs[t] = NULL;
    }
}

static void drop_promise(td_prefill_lane *l, td_prefill_job *j)
{
    l->n_promised -= j->promised;
    j->promised = 0;
}

static void free_job(td_worker_lane *l, td_worker_job *w)
{
    td_prefill_job *j = (td_prefill_job *)w;
    drop_promise((td_prefill_lane *)l, j);
    td_kv_unstage(l->pool, j->staged, j->n_staged);
    ((td_prefill_lane *)l)->n_staging -= j->staging;
    free(j->staged);
    free_seqs(j);
}

/* Last word to the mover; afterwards the job waits for `pushed`. */
static void close_push(td_prefill_lane *l, td_prefill_job *j, int kind)
{
    j->closed = 1;
    j->final.head.kind = kind;
    j->final_held.job = j;
    j->final_held.mark = j->mark;
    td_push_wait(l->base.c.to_mover, &j->final);
}

/* End a job that is not done: at once, or when the mover has let go of its blocks. */
static void fail(td_prefill_lane *l, td_prefill_job *j, uint32_t code, td_error error,
                 const char *text)
{
    td_worker_job_set_end(&j->base, code, error, text);
    j->timeline = j->base.request.plan.n_timelines; /* nothing is computed any more */
    drop_promise(l, j);
    if (!j->opened) {
        td_worker_lane_finish(&l->base, &j->base);
        return;
    }
    atomic_store(&j->base.drop, code);
    if (!j->closed)
        close_push(l, j, TD_PREFILL_DROP);
    else
        (void)td_ring_push(l->base.c.to_mover, &td_msg_wake);
}

/* ---- arrival ---- */

static uint32_t blocks_of(uint64_t tokens)
{
    return (uint32_t)((tokens + TD_BLOCK_TOKENS - 1) / TD_BLOCK_TOKENS);
}

/* What holds while the job waits: sequences exist (ids, no blocks), and the pool could hold all of
 * them at a time. */
static int check_job(td_prefill_lane *l, td_prefill_job *j, td_err *err)
{
    const td_handoff_plan *p = &j->base.request.plan;
    const Tandem__V1__Ticket *t = j->message->ticket;
    uint32_t staging = td_kv_staging(l->base.pool);
    if (t && p->n_blocks > staging && p->n_blocks <= l->n_blocks)
        return td_err_set(err, -ERANGE,
                          "the prompt hands over %u KV blocks, this worker stages %u; raise "
                          "--kv-staging",
                          p->n_blocks, staging);
    if (p->n_blocks > l->n_blocks)
        return td_err_set(err, -ERANGE, "the prompt needs %u KV blocks, this worker has %u",
                          p->n_blocks, l->n_blocks);
    for (uint32_t i = 0; i < p->n_timelines; i++) {
        if (t && t->held_blocks > (p->timelines[i].n_ids - 1) / TD_BLOCK_TOKENS)
            return td_err_set(err, -EINVAL, "ticket: held_blocks %u leaves no row to send",
                              t->held_blocks);
        int r = td_worker_seq(l->base.c.engine, &j->base.request, i,
                              j->base.request.plan.timelines[i].choice, &j->seqs[i], err);
        if (r < 0)
            return r;
    }
    return 0;
}

static int arrive(td_worker_lane *l, td_worker_job *j, td_err *err)
{
    return check_job((td_prefill_lane *)l, (td_prefill_job *)j, err);
}

static void push_text(const td_prefill_job *j, char *out, size_t cap)
{
    snprintf(out, cap, "handing KV blocks over failed%s%s", j->push_reason[0] ? ": " : "",
             j->push_reason);
}

static void pushed(td_prefill_lane *l, td_prefill_job *j)
{
    char text[96];
    push_text(j, text, sizeof text);
    if (j->push_code)
        td_worker_job_set_end(&j->base, j->push_code, TD_ERROR_NONE, text);
    td_worker_lane_finish(&l->base, &j->base);
}

static void from_mover(td_worker_lane *l, td_msg *m)
{
    if (m->kind == TD_PREFILL_PUSHED)
        pushed((td_prefill_lane *)l, ((td_worker_msg_of *)m)->job);
}

static void on_fail(td_worker_lane *l, td_worker_job *j, uint32_t code, td_error error,
                    const char *text)
{
    fail((td_prefill_lane *)l, (td_prefill_job *)j, code, error, text);
}

/* What could not be pushed need not be computed. */
static void see(td_worker_lane *l, td_worker_job *w)
{
    td_prefill_job *j = (td_prefill_job *)w;
    uint32_t code = atomic_load(&j->failed); /* set behind the reason */
    char text[96];
    if (j->closed || !code)
        return;
    push_text(j, text, sizeof text);
    on_fail(l, w, code, TD_ERROR_NONE, text);
}

/* ---- steps ---- */

static uint64_t n_left(const td_prefill_job *j)
{
    const td_handoff_plan *p = &j->base.request.plan;
    if (j->timeline == p->n_timelines)
        return 0;
    return p->timelines[j->timeline].n_ids - td_seq_computed(j->seqs[j->timeline]);
}

/* Tokens of a waiting job that the prefix index would give. */
static uint64_t hits(td_prefill_lane *l, td_prefill_job *j)
{
    size_t n;
    if (j->base.request.prompt_logprobs)
        return 0;
    const uint8_t *hashes = td_seq_hashes(j->seqs[j->timeline], &n);
    uint32_t most = (j->base.request.plan.timelines[j->timeline].n_ids - 1) / TD_BLOCK_TOKENS;
    return (uint64_t)td_kv_peek(l->base.pool, hashes, (uint32_t)TD_MIN(n, (size_t)most)) *
           TD_BLOCK_TOKENS;
}

static uint32_t look(td_prefill_lane *l)
{
    uint32_t n = 0;
    uint64_t waiting_tokens = 0, rows = 0;
    uint32_t waiting = 0;
    for (td_list *at = l->base.jobs.next; at != &l->base.jobs; at = at->next) {
        td_prefill_job *j = TD_LIST_ENTRY(at, td_prefill_job, base.lane_node);
        uint64_t left = n_left(j);
        if (left == 0)
            continue;
        waiting += !j->started;
        waiting_tokens += left;
        if (n == VIEWS_MAX || rows >= l->policy.max_rows)
            continue;
        td_prefill_view v = {.n_left = left, .started = j->started || j->timeline > 0};
        if (!v.started) {
            /* all its blocks, hits included: those that nobody else uses count as free now */
            const td_handoff_plan *p = &j->base.request.plan;
            v.blocks_needed = p->n_blocks - p->timelines[0].n_blocks +
                              blocks_of(j->attached ? left : p->timelines[0].n_ids);
        }
        if (!j->started && !j->attached)
            v.n_left -= hits(l, j);
        rows += v.n_left;
        l->viewed[n] = j;
        l->views[n++] = v;
    }
    atomic_store_explicit(&l->base.c.load->waiting, waiting, memory_order_relaxed);
    atomic_store_explicit(&l->base.c.load->waiting_tokens, waiting_tokens, memory_order_relaxed);
    return n;
}

static void open_push(td_prefill_lane *l, td_prefill_job *j)
{
    j->opened = 1;
    j->push_deadline_us = j->base.deadline_us;
    td_push_wait(l->base.c.to_mover, &j->open);
}

/* A job's later timelines are promised their blocks when it starts: two jobs that held some and
 * waited for more could wait for each other. */
static void promise(td_prefill_lane *l, td_prefill_job *j)
{
    const td_handoff_plan *p = &j->base.request.plan;
    uint32_t own = p->timelines[j->timeline].n_blocks;
    uint32_t later = j->timeline == 0 ? p->n_blocks - own : j->promised - own;
    l->n_promised += later;
    l->n_promised -= j->promised;
    j->promised = later;
}

/* Room to stage every block it may hand over, so that two jobs never wait for each other's. */
static int start_staging(td_prefill_lane *l, td_prefill_job *j)
{
    uint32_t n = j->base.request.plan.n_blocks;
    if (!j->message->ticket || j->staged)
        return 0;
    if (td_kv_staging(l->base.pool) == l->n_blocks) /* all, at any time */
        n = TD_MIN(n, l->n_blocks);
    else if (n > td_kv_staging(l->base.pool) - l->n_staging)
        return -ENOSPC;
    j->staged = calloc(n, sizeof *j->staged);
    if (!j->staged)
        return -ENOSPC;
    j->staging = n;
    l->n_staging += n;
    return 0;
}

/* Late binding: blocks and the connection only at the head of the queue. 0; -ENOSPC: try again
 * later. */
static int start(td_prefill_lane *l, td_prefill_job *j)
{
    const td_timeline *t = &j->base.request.plan.timelines[j->timeline];
    td_seq *s = j->seqs[j->timeline];
    if (start_staging(l, j) < 0)
        return -ENOSPC;
    if (!j->attached && !j->base.request.prompt_logprobs) {
        size_t covered = td_seq_attach_prefix(s);
        if (j->timeline == 0)
            j->cached_tokens = (uint32_t)TD_MIN(covered, j->base.request.n_prompt);
        j->attached = 1;
    }
    /* not on arrival: a queue of long prompts would hold rows that nobody computes yet */
    if (j->base.request.prompt_logprobs && !j->prompt_lp)
        j->prompt_lp = calloc(j->base.request.n_prompt, sizeof *j->prompt_lp);
    if ((j->base.request.prompt_logprobs && !j->prompt_lp) || td_seq_reserve(s, t->n_ids) < 0)
        return -ENOSPC;
    if (!j->started_us) {
        j->started_us = td_now_us();
        j->queue_us = j->started_us - j->base.arrived_us;
    }
    j->started = 1;
    promise(l, j);
    j->sent = j->message->ticket ? j->message->ticket->held_blocks : 0;
    if (j->message->ticket && !j->opened)
        open_push(l, j);
    return 0;
}

/* Blocks that the mover will read: their copies are queued beside the next steps. */
static int leave(td_prefill_lane *l, td_prefill_job *j, const td_block *blocks, uint32_t n)
{
    uint64_t mark;
    TD_BUG_ON(j->n_staged + n > j->staging);
    int r = td_kv_stage(l->base.pool, blocks, n);
    if (r < 0)
        return r;
    memcpy(j->staged + j->n_staged, blocks, n * sizeof *blocks);
    j->n_staged += n;
    r = td_kv_export(l->base.pool, blocks, n, &mark);
    j->mark = TD_MAX(j->mark, mark);
    return r;
}

/* Give the mover what has become final: full blocks as they seal, the partial one when the timeline
 * is computed. */
static int push_ready(td_prefill_lane *l, td_prefill_job *j)
{
    const td_timeline *t = &j->base.request.plan.timelines[j->timeline];
    td_seq *s = j->seqs[j->timeline];
    size_t computed = td_seq_computed(s), n_hashes, n_blocks;
    uint32_t upto = computed == t->n_ids ? t->n_blocks : (uint32_t)(computed / TD_BLOCK_TOKENS);
    if (!j->opened || j->closed || upto <= j->sent)
        return 0;
    uint32_t n = upto - j->sent;
    td_prefill_add *a = malloc(sizeof *a + n * sizeof *a->blocks);
    if (!a)
        return -ENOMEM;
    const td_block *blocks = td_seq_blocks(s, &n_blocks);
    const uint8_t *hashes = td_seq_hashes(s, &n_hashes);
    *a = (td_prefill_add){.head = {TD_PREFILL_ADD}, .job = j, .n = n};
    int r = leave(l, j, td_seq_blocks(s, &n_blocks) + j->sent, n);
    if (r < 0) {
        free(a);
        return r;
    }
    a->held.job = j;
    a->held.mark = j->mark;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t b = j->sent + i,
                 rows = TD_MIN((uint32_t)TD_BLOCK_TOKENS, t->n_ids - b * TD_BLOCK_TOKENS);
        TD_BUG_ON(b >= n_blocks);
        a->blocks[i] = (td_push_block){.block = blocks[b], .index = t->base + b, .rows = rows};
        a->blocks[i].has_chain = rows == TD_BLOCK_TOKENS && b < n_hashes;
        if (a->blocks[i].has_chain)
            memcpy(a->blocks[i].chain, hashes + (size_t)b * TD_PREFIX_HASH_BYTES,
                   TD_PREFIX_HASH_BYTES);
    }
    j->sent = upto;
    j->sent_blocks += n;
    td_push_wait(l->base.c.to_mover, a);
    return 0;
}

/* Would this first token end its choice? Asked of a sequence of its own, so that there is one rule
 * for ends. */
static int first_ends(td_prefill_lane *l, td_prefill_job *j, uint32_t timeline, uint32_t choice,
                      uint32_t id, td_finish *ret_finish)
{
    td_seq *s = NULL;
    int r = td_worker_seq(l->base.c.engine, &j->base.request, timeline, choice, &s, NULL);
    if (r < 0)
        return r;
    *ret_finish = td_seq_append(s, id);
    td_seq_free(s);
    return 0;
}

static int take_samples(td_prefill_lane *l, td_prefill_job *j, const td_sample *samples, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        uint32_t at = j->n_first++;
        j->first[at] = samples[i];
        int r = first_ends(l, j, j->timeline, j->base.request.choices[at], samples[i].id,
                           &j->finish[at]);
        if (r < 0)
            return r;
    }
    return 0;
}

/* Every timeline is computed and sampled: answer, and commit unless nothing is left to decode. */
static void computed(td_prefill_lane *l, td_prefill_job *j)
{
    int all_ended = 1;
    for (uint32_t i = 0; i < j->n_first; i++)
        all_ended &= j->finish[i] != TD_FINISH_NONE;
    j->prefill_us = td_now_us() - j->started_us;
    j->replied = 1;
    td_push_wait(l->base.c.to_loop, &j->reply);
    if (!j->opened)
        td_worker_lane_finish(&l->base, &j->base);
    else if (all_ended)
        close_push(l, j,
                   TD_PREFILL_DROP); /* P answers alone; the router gives the reservation back */
    else
        close_push(l, j, TD_PREFILL_COMMIT);
}

static void advance(td_prefill_lane *l, td_prefill_job *j, const td_sample *samples,
                    uint32_t n_samples)
{
    int r = push_ready(l, j);
    r = r < 0 ? r : take_samples(l, j, samples, n_samples);
    if (r == -EIO) {
        fail(l, j, TD_INTERNAL, TD_ERROR_INTERNAL, "the device did not copy its KV blocks");
        return;
    }
    if (r < 0) {
        fail(l, j, TD_RESOURCE_EXHAUSTED, TD_ERROR_OVERLOADED, "out of memory");
        return;
    }
    if (n_left(j) > 0)
        return;
    j->started = j->attached = 0;
    if (++j->timeline == j->base.request.plan.n_timelines)
        computed(l, j);
}

static uint32_t samples_of(const td_prefill_job *j, uint32_t n_tokens)
{
    if (n_tokens < n_left(j))
        return 0;
    return j->base.request.recovery ? 1 : j->base.request.n;
}

static uint32_t gather(td_prefill_lane *l, uint32_t n_picks)
{
    uint32_t n = 0;
    int full = 0; /* nobody overtakes, but who holds blocks goes on */
    for (uint32_t i = 0; i < n_picks; i++) {
        td_prefill_job *j = l->viewed[l->picks[i].job];
        if (!j->started && (j->timeline > 0 || !full))
            full |= start(l, j) < 0;
        if (!j->started)
            continue;
        td_seq *s = j->seqs[j->timeline];
        uint32_t n_tokens = (uint32_t)TD_MIN((uint64_t)l->picks[i].n_tokens, n_left(j));
        l->picked[n] = j;
        l->items[n] =
            (td_step_item){.seq = s, .n_tokens = n_tokens, .n_samples = samples_of(j, n_tokens)};
        if (j->prompt_lp && j->timeline == 0) {
            l->items[n].ret_prompt_lp = j->prompt_lp + td_seq_computed(s);
            l->items[n].prompt_top = j->base.request.n_top;
        }
        n++;
    }
    return n;
}

static uint64_t n_good_tokens(const td_prefill_lane *l, uint32_t n)
{
    uint64_t tokens = 0;
    for (uint32_t i = 0; i < n; i++)
        tokens += l->bad[i] ? 0 : l->items[i].n_tokens;
    return tokens;
}

static void run_step(td_prefill_lane *l, uint32_t n)
{
    uint32_t at = 0;
    atomic_store_explicit(&l->base.c.load->running, n, memory_order_relaxed);
    if (td_worker_lane_run(&l->base, l->items, n, l->samples, l->bad) > 0)
        td_worker_lane_count(&l->base, n_good_tokens(l, n));
    for (uint32_t i = 0; i < n; i++) {
        uint32_t n_samples = l->items[i].n_samples;
        if (l->bad[i])
            fail(l, l->picked[i], TD_INTERNAL, TD_ERROR_INTERNAL, TD_WORKER_BAD_STEP);
        else
            advance(l, l->picked[i], l->samples + at, n_samples);
        at += n_samples;
    }
}

static uint32_t step(td_worker_lane *w)
{
    td_prefill_lane *l = (td_prefill_lane *)w;
    uint32_t n_views = look(l);
    uint64_t available = td_kv_available(w->pool);
    available -= TD_MIN(available, l->n_promised);
    uint32_t n = td_prefill_plan(&l->policy, l->views, n_views, available, l->picks);
    n = gather(l, n);
    if (n > 0)
        run_step(l, n);
    return n;
}

static void lane_free(td_prefill_lane *l)
{
    free(l->picks);
    free(l->items);
    free(l->picked);
    free(l->samples);
    free(l->bad);
    free(l);
}

int td_prefill_lane_start(const td_worker_lane_config *config, const td_prefill_policy *policy,
                          td_prefill_lane **ret_lane, td_err *reterr_err)
{
    static const td_worker_lane_ops ops = {.arrive = arrive,
                                           .from_mover = from_mover,
                                           .fail = on_fail,
                                           .see = see,
                                           .step = step,
                                           .free_job = free_job};
    td_prefill_lane *l = calloc(1, sizeof *l);
    if (!l)
        return td_err_set(reterr_err, -ENOMEM, "lane: out of memory");
    uint32_t n = policy->max_seqs;
    td_kv_stats stats;
    td_kv_pool_stats(td_engine_pool(config->engine), &stats);
    l->policy = *policy;
    l->n_blocks = stats.n_blocks;
    l->picks = calloc(n, sizeof *l->picks);
    l->items = calloc(n, sizeof *l->items);
    l->picked = calloc(n, sizeof *l->picked);
    l->samples = calloc((size_t)n * TD_CHOICES_MAX, sizeof *l->samples);
    l->bad = calloc(n, sizeof *l->bad);
    int r = 0;
    if (!l->picks || !l->items || !l->picked || !l->samples || !l->bad)
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

int td_prefill_lane_stop(td_prefill_lane *l)
{
    if (!td_worker_lane_stop(&l->base))
        return 0;
    lane_free(l);
    return 1;
}
