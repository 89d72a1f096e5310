/* SPDX-License-Identifier: Apache-2.0 */
#include "worker/lane.h"

#include <errno.h>

#include "base/banned.h"

enum { SPIN_US = 20, BAD_STEPS_MAX = 3 };

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

void td_worker_lane_good_step(td_worker_lane *l, uint64_t n_tokens)
{
    l->bad_steps = 0;
    atomic_store_explicit(&l->c.load->step, ++l->n_steps, memory_order_relaxed);
    atomic_fetch_add_explicit(&l->c.load->tokens_total, n_tokens, memory_order_relaxed);
}

void td_worker_lane_bad_step(td_worker_lane *l)
{
    static td_msg dead = {TD_WORKER_DEAD};
    if (++l->bad_steps == BAD_STEPS_MAX)
        td_push_wait(l->c.to_loop, &dead);
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
        td_wait_two(l->c.from_loop, l->c.from_mover, SPIN_US, -1);
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
