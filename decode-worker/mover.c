/* SPDX-License-Identifier: Apache-2.0 */
#include "decode-worker/mover.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "base/bug.h"
#include "base/clock.h"
#include "decode-worker/job.h"
#include "net/service.h"
#include "proto/engine.pb-c.h"
#include "base/banned.h"

struct td_decode_mover {
    td_decode_mover_config c;
    td_receive *receive;
    td_list jobs; /* granted and not settled */
    pthread_t thread;
    atomic_int stop;
};

static void settle(td_decode_mover *m, td_decode_job *j)
{
    td_list_del(&j->mover_node);
    td_push_wait(m->c.to_lane, &j->settled);
}

static void on_deliver(void *arg, void *user, const uint32_t *ids, uint32_t n,
                       const td_receive_figures *figures)
{
    td_decode_job *j = user;
    j->delivered = 1;
    j->figures = *figures;
    memcpy(j->ids, ids, n * sizeof *ids);
    settle(arg, j);
}

static void on_release(void *arg, void *user, uint32_t code, td_drop why)
{
    td_decode_job *j = user;
    j->settled_code = code ? code : TD_ABORTED;
    j->settled_why = why;
    settle(arg, j);
}

static void grant(td_decode_mover *m, td_decode_job *j)
{
    td_receive_grant g = {.attempt = j->message->attempt,
                          .generation = j->generation,
                          .blocks = j->blocks,
                          .n_blocks = j->request.plan.n_blocks,
                          .first = j->first,
                          .n_first = j->request.plan.n_choices,
                          .n_tokens = j->request.plan.n_tokens,
                          .credit_bytes = TD_DECODE_CREDIT_BYTES,
                          .deadline_us = j->deadline_us,
                          .user = j};
    memcpy(g.ticket, j->ticket_id, 16);
    td_list_add(&m->jobs, &j->mover_node);
    int r = td_receive_grant_add(m->receive, &g, td_now_us());
    if (r < 0)
        on_release(m, j, td_code_from_errno(r), TD_DROP_NONE);
}

static void take(td_decode_mover *m)
{
    td_msg *msg;
    td_ring_clear(m->c.from_lane);
    while ((msg = td_ring_pop(m->c.from_lane))) {
        if (msg->kind == TD_DECODE_GRANT)
            grant(m, ((td_decode_msg_of *)msg)->job);
    }
}

static void see_fences(td_decode_mover *m)
{
    for (td_list *l = m->jobs.next, *next; l != &m->jobs; l = next) {
        next = l->next;
        td_decode_job *j = TD_LIST_ENTRY(l, td_decode_job, mover_node);
        uint32_t code = atomic_load(&j->fence);
        if (code)
            td_receive_cancel(m->receive, j->ticket_id, code, td_now_us());
    }
}

static void *mover_main(void *arg)
{
    td_decode_mover *m = arg;
    if (m->c.core >= 0)
        (void)td_core_pin(m->c.core);
    for (;;) {
        take(m);
        see_fences(m);
        int more = td_receive_run(m->receive, td_now_us());
        if (atomic_load(&m->stop) && td_list_empty(&m->jobs) && td_ring_len(m->c.from_lane) == 0)
            return NULL;
        uint64_t now = td_now_us(), due = td_receive_due(m->receive);
        uint64_t wait = more || due <= now ? 0 : TD_MIN(due - now, (uint64_t)TD_S);
        td_bulk_poll polls[2] = {{.fd = td_ring_fd(m->c.from_lane), .want = TD_BULK_READ},
                                 {.bulk = td_receive_bulk(m->receive), .want = TD_BULK_READ}};
        (void)td_bulk_wait(polls, 2, (int64_t)wait);
    }
}

int td_decode_mover_start(const td_decode_mover_config *config, td_decode_mover **ret_mover,
                          td_err *reterr_err)
{
    td_decode_mover *m = calloc(1, sizeof *m);
    if (!m)
        return td_err_set(reterr_err, -ENOMEM, "mover: out of memory");
    m->c = *config;
    m->c.receive.ops.on_deliver = on_deliver;
    m->c.receive.ops.on_release = on_release;
    m->c.receive.arg = m;
    td_list_init(&m->jobs);
    int r = td_receive_open(&m->c.receive, &m->receive, reterr_err);
    if (r < 0) {
        td_err_prefix(reterr_err, "--kv-listen");
    } else if ((r = -pthread_create(&m->thread, NULL, mover_main, m)) < 0) {
        td_err_set(reterr_err, r, "mover: cannot start a thread: %s", td_errno_text(r));
    }
    if (r < 0) {
        td_receive_close(m->receive);
        free(m);
        return r;
    }
    *ret_mover = m;
    return 0;
}

void td_decode_mover_stop(td_decode_mover *m)
{
    if (!m)
        return;
    atomic_store(&m->stop, 1);
    (void)td_ring_push(m->c.from_lane, &td_msg_wake);
    pthread_join(m->thread, NULL);
    td_receive_close(m->receive);
    free(m);
}

const char *td_decode_mover_endpoint(const td_decode_mover *m)
{
    return td_receive_endpoint(m->receive);
}

const td_receive_stats *td_decode_mover_stats(const td_decode_mover *m)
{
    return td_receive_get_stats(m->receive);
}
