/* SPDX-License-Identifier: Apache-2.0 */
#include "prefill-worker/mover.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "base/bug.h"
#include "base/clock.h"
#include "net/service.h"
#include "prefill-worker/job.h"
#include "proto/engine.pb-c.h"
#include "base/banned.h"

enum { POLLS_MAX = 256 };

struct td_prefill_mover {
    td_prefill_mover_config c;
    td_pusher *pusher;
    td_list jobs; /* opened, pushed not sent yet */
    pthread_t thread;
    atomic_int stop;
};

/* Tell the lane, once, when both the push has ended and the lane will send no more about it. */
static void report(td_prefill_mover *m, td_job *j)
{
    if (!j->push_done || !j->final_seen)
        return;
    td_list_del(&j->mover_node);
    td_push_wait(m->c.to_lane, &j->pushed);
}

static void end_push(td_prefill_mover *m, td_job *j, uint32_t code, const char *reason)
{
    j->push = NULL;
    j->push_done = 1;
    j->push_code = code;
    memset(j->push_reason, 0, sizeof j->push_reason);
    memcpy(j->push_reason, reason, TD_MIN(strlen(reason), sizeof j->push_reason - 1));
    if (code && !j->final_seen) {
        atomic_store(&j->failed, code);
        (void)td_ring_push(m->c.to_lane, &td_msg_wake);
    }
    report(m, j);
}

static void on_done(void *arg, void *user, uint32_t code, const char *reason,
                    const td_push_figures *figures)
{
    (void)figures;
    end_push(arg, user, code, reason);
}

static void open_push(td_prefill_mover *m, td_job *j)
{
    const Tandem__V1__Ticket *t = j->message->ticket;
    char endpoint[256] = "";
    memcpy(endpoint, t->endpoint.data, TD_MIN(t->endpoint.len, sizeof endpoint - 1));
    td_push_ticket k = {.attempt = t->attempt,
                        .generation = t->generation,
                        .endpoint = endpoint,
                        .credit_bytes = t->credit_bytes,
                        .deadline_us = j->push_deadline_us,
                        .user = j};
    memcpy(k.id, t->id.data, 16);
    memcpy(k.decode_epoch, t->decode_epoch.data, 16);
    td_list_add(&m->jobs, &j->mover_node);
    td_err err = {0};
    int r = td_push_begin(m->pusher, &k, td_now_us(), &j->push, &err);
    if (r < 0)
        end_push(m, j, td_code_from_errno(r), "endpoint");
}

static void add(td_prefill_mover *m, td_job_add *a)
{
    td_job *j = a->job;
    uint64_t now = td_now_us();
    if (j->push && td_push_add(j->push, a->blocks, a->n, now) < 0)
        td_push_cancel(j->push, TD_RESOURCE_EXHAUSTED, now);
    free(a);
}

static void commit(td_prefill_mover *m, td_job *j)
{
    uint32_t ids[TD_CHOICES_MAX];
    for (uint32_t i = 0; i < j->n_first; i++)
        ids[i] = j->first[i].id;
    j->final_seen = 1;
    if (j->push) /* may end it, and then on_done reports */
        td_push_commit(j->push, j->request.plan.n_tokens, j->request.choices, ids, j->n_first,
                       td_now_us());
    else
        report(m, j);
}

static void drop(td_prefill_mover *m, td_job *j)
{
    j->final_seen = 1;
    if (j->push)
        td_push_cancel(j->push, atomic_load(&j->abort), td_now_us());
    else
        report(m, j);
}

static void take(td_prefill_mover *m)
{
    td_msg *msg;
    td_ring_clear(m->c.from_lane);
    while ((msg = td_ring_pop(m->c.from_lane))) {
        switch (msg->kind) {
        case TD_JOB_OPEN:
            open_push(m, ((td_job_msg_of *)msg)->job);
            break;
        case TD_JOB_ADD:
            add(m, (td_job_add *)msg);
            break;
        case TD_JOB_COMMIT:
            commit(m, ((td_job_msg_of *)msg)->job);
            break;
        case TD_JOB_DROP:
            drop(m, ((td_job_msg_of *)msg)->job);
            break;
        default:
            break;
        }
    }
}

static void see_aborts(td_prefill_mover *m)
{
    for (td_list *l = m->jobs.next, *next; l != &m->jobs; l = next) {
        next = l->next;
        td_job *j = TD_LIST_ENTRY(l, td_job, mover_node);
        uint32_t code = atomic_load(&j->abort);
        if (code && j->push)
            td_push_cancel(j->push, code, td_now_us());
    }
}

static void *mover_main(void *arg)
{
    td_prefill_mover *m = arg;
    td_bulk_poll polls[POLLS_MAX];
    if (m->c.core >= 0)
        (void)td_core_pin(m->c.core);
    for (;;) {
        take(m);
        see_aborts(m);
        td_pusher_run(m->pusher, td_now_us());
        if (atomic_load(&m->stop) && td_list_empty(&m->jobs) && td_ring_len(m->c.from_lane) == 0)
            return NULL;
        uint64_t now = td_now_us(), due = td_pusher_due(m->pusher, now);
        polls[0] = (td_bulk_poll){.fd = td_ring_fd(m->c.from_lane), .want = TD_BULK_READ};
        uint32_t n = 1 + td_pusher_polls(m->pusher, polls + 1, POLLS_MAX - 1);
        uint64_t wait = due <= now ? 0 : TD_MIN(due - now, (uint64_t)TD_S);
        (void)td_bulk_wait(polls, n, (int64_t)wait);
    }
}

int td_prefill_mover_start(const td_prefill_mover_config *config, td_prefill_mover **ret_mover,
                           td_err *reterr_err)
{
    td_prefill_mover *m = calloc(1, sizeof *m);
    if (!m)
        return td_err_set(reterr_err, -ENOMEM, "mover: out of memory");
    m->c = *config;
    m->c.push.ops.on_done = on_done;
    m->c.push.arg = m;
    td_list_init(&m->jobs);
    int r = td_pusher_open(&m->c.push, &m->pusher, reterr_err);
    if (r == 0 && (r = -pthread_create(&m->thread, NULL, mover_main, m)) < 0)
        td_err_set(reterr_err, r, "mover: cannot start a thread: %s", td_errno_text(r));
    if (r < 0) {
        td_pusher_close(m->pusher);
        free(m);
        return r;
    }
    *ret_mover = m;
    return 0;
}

void td_prefill_mover_stop(td_prefill_mover *m)
{
    if (!m)
        return;
    atomic_store(&m->stop, 1);
    (void)td_ring_push(m->c.from_lane, &td_msg_wake);
    pthread_join(m->thread, NULL);
    td_pusher_close(m->pusher);
    free(m);
}

const td_push_stats *td_prefill_mover_stats(const td_prefill_mover *m)
{
    return td_pusher_get_stats(m->pusher);
}
