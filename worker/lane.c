/* SPDX-License-Identifier: Apache-2.0 */
#include "worker/lane.h"

#include <errno.h>
#include <string.h>

#include "base/banned.h"

enum { SPIN_US = 20, LOOK_US = 500, BAD_STEPS_MAX = 3 };

void td_worker_lane_note_blocks(td_worker_lane *l)
{
    atomic_store_explicit(&l->c.load->kv_free, td_kv_available(l->pool), memory_order_relaxed);
    atomic_store_explicit(&l->c.load->kv_reserved, l->n_reserved, memory_order_relaxed);
}

void td_worker_lane_finish(td_worker_lane *l, td_worker_job *j)
{
    l->ops->free_job(l, j);
    td_list_del(&j->lane_node);
    l->n_jobs--;
    td_worker_lane_note_blocks(l);
    td_push_wait(l->c.to_loop, &j->end);
}

void td_worker_lane_count(td_worker_lane *l, uint64_t n_tokens)
{
    atomic_store_explicit(&l->c.load->step, ++l->n_steps, memory_order_relaxed);
    atomic_fetch_add_explicit(&l->c.load->tokens_total, n_tokens, memory_order_relaxed);
}

/* What was computed once must be computed again: tells a request that cannot be computed from an
 * engine that cannot compute. */
static int is_alive(td_worker_lane *l)
{
    td_seq *s = NULL;
    td_sample sample;
    td_seq_spec spec = {.ids = &l->known_id,
                        .n_ids = 1,
                        .n_prompt = 1,
                        .max_tokens = 1,
                        .sampling = {.top_p = 1, .repetition_penalty = 1}};
    int r = l->have_known ? td_seq_new(l->c.engine, &spec, &s, NULL) : -ENOENT;
    if (r == 0)
        r = td_seq_reserve(s, 1);
    if (r == 0) {
        td_step_item item = {.seq = s, .n_tokens = 1, .n_samples = 1};
        r = td_engine_step(l->c.engine, &item, 1, &sample);
    }
    td_seq_free(s);
    return r == 0;
}

static void all_failed(td_worker_lane *l)
{
    static td_msg dead = {TD_WORKER_DEAD};
    if (is_alive(l))
        l->bad_steps = 0;
    else if (++l->bad_steps == BAD_STEPS_MAX)
        td_push_wait(l->c.to_loop, &dead);
}

/* Items of a failed step, each alone. */
static uint32_t run_each(td_worker_lane *l, const td_step_item *items, uint32_t n,
                         td_sample *samples, uint8_t *ret_bad)
{
    uint32_t n_good = 0;
    for (uint32_t i = 0; i < n; i++) {
        if (!items[i].seq) {
            samples += items[i].n_samples;
            continue;
        }
        ret_bad[i] = n == 1 || td_engine_step(l->c.engine, &items[i], 1, samples) < 0;
        n_good += !ret_bad[i];
        samples += items[i].n_samples;
    }
    return n_good;
}

/* A step ended with outcome r. */
static uint32_t settle(td_worker_lane *l, int r, const td_step_item *items, uint32_t n,
                       td_sample *samples, uint8_t *ret_bad)
{
    memset(ret_bad, 0, n);
    uint32_t n_good = r < 0 ? run_each(l, items, n, samples, ret_bad) : n;
    if (n_good == 0) {
        all_failed(l);
        return 0;
    }
    l->bad_steps = 0;
    for (uint32_t i = 0; i < n; i++) {
        size_t n_ids;
        if (ret_bad[i] || !items[i].seq)
            continue;
        l->known_id = td_seq_ids(items[i].seq, &n_ids)[0];
        l->have_known = 1;
        break;
    }
    return n_good;
}

uint32_t td_worker_lane_run(td_worker_lane *l, const td_step_item *items, uint32_t n,
                            td_sample *samples, uint8_t *ret_bad)
{
    return settle(l, td_engine_step(l->c.engine, items, n, samples), items, n, samples, ret_bad);
}

uint32_t td_worker_lane_end(td_worker_lane *l, const td_step_item *items, uint32_t n,
                            td_sample *samples, uint8_t *ret_bad)
{
    return settle(l, td_engine_end(l->c.engine, samples), items, n, samples, ret_bad);
}

static void arrive(td_worker_lane *l, td_worker_job *j)
{
    td_err err = {0};
    td_list_add(&l->jobs, &j->lane_node);
    l->n_jobs++;
    int r = l->ops->arrive(l, j, &err);
    if (r >= 0)
        return;
    td_error e = r == -ERANGE   ? TD_ERROR_CONTEXT_LENGTH
                 : r == -EINVAL ? TD_ERROR_INVALID_VALUE
                                : TD_ERROR_NONE;
    uint32_t code = r == -ERANGE   ? TD_OUT_OF_RANGE
                    : r == -ENOSPC ? TD_RESOURCE_EXHAUSTED
                                   : td_code_from_errno(r);
    l->ops->fail(l, j, code, e, err.text);
}

static void flush(td_worker_lane *l, td_worker_flush *f)
{
    f->blocks = td_kv_flush(l->pool);
    td_push_wait(l->c.to_loop, f);
}

static void take(td_worker_lane *l)
{
    td_msg *m;
    while ((m = td_ring_pop(l->c.from_mover))) {
        if (m->kind != TD_WORKER_WAKE)
            l->ops->from_mover(l, m);
    }
    while ((m = td_ring_pop(l->c.from_loop))) {
        if (m->kind == TD_WORKER_ARRIVE)
            arrive(l, ((td_worker_msg_of *)m)->job);
        else if (m->kind == TD_WORKER_FLUSH)
            flush(l, (td_worker_flush *)m);
    }
}

/* Cancelled or out of time: stops within this step. */
static void see_flags(td_worker_lane *l)
{
    int stop = atomic_load(&l->stop);
    TD_LIST_FOR (n, &l->jobs) {
        td_worker_job *j = TD_LIST_ENTRY(n, td_worker_job, lane_node);
        uint32_t code = atomic_load(&j->cancel);
        if (atomic_load(&j->drop))
            continue;
        if (code)
            l->ops->fail(l, j, code,
                         code == TD_DEADLINE_EXCEEDED ? TD_ERROR_DEADLINE : TD_ERROR_CANCELLED,
                         "cancelled");
        else if (stop)
            l->ops->fail(l, j, TD_UNAVAILABLE, TD_ERROR_DRAINING, "the worker ends");
        else if (l->ops->see)
            l->ops->see(l, j);
    }
}

static void *lane_main(void *arg)
{
    td_worker_lane *l = arg;
    for (;;) {
        take(l);
        see_flags(l);
        uint32_t n = l->ops->step(l);
        td_worker_lane_note_blocks(l);
        if (n > 0)
            continue;
        atomic_store_explicit(&l->c.load->running, 0, memory_order_relaxed);
        if (atomic_load(&l->stop) && l->n_jobs == 0)
            return NULL;
        td_wait_two(l->c.from_loop, l->c.from_mover, SPIN_US, l->must_look ? LOOK_US : -1);
    }
}

int td_worker_lane_start(td_worker_lane *l, const td_worker_lane_ops *ops,
                         const td_worker_lane_config *config, td_err *reterr_err)
{
    l->ops = ops;
    l->c = *config;
    l->pool = td_engine_pool(config->engine);
    td_list_init(&l->jobs);
    int r = -pthread_create(&l->thread, NULL, lane_main, l);
    return r < 0 ? td_err_set(reterr_err, r, "lane: cannot start a thread: %s", td_errno_text(r))
                 : 0;
}

int td_worker_lane_stop(td_worker_lane *l)
{
    if (!atomic_exchange(&l->stop, 1))
        (void)td_ring_push(l->c.from_loop, &td_msg_wake);
    return pthread_tryjoin_np(l->thread, NULL) == 0;
}
