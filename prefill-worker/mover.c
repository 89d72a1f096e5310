/* SPDX-License-Identifier: Apache-2.0 */
#include "prefill-worker/mover.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/bug.h"
#include "base/clock.h"
#include "base/log.h"
#include "prefill-worker/job.h"
#include "proto/engine.pb-c.h"
#include "worker/mover.h"
#include "base/banned.h"

struct td_prefill_mover {
    td_worker_mover base; /* jobs: opened, pushed not sent yet */
    td_pusher *pusher;
    td_kv_pool *pool;
    td_list held; /* td_prefill_held, in the order they came */
};

enum { COPY_POLL_US = 200 };

/* Tell the lane, once, when both the push has ended and the lane will send no more about it. */
static void report(td_prefill_mover *m, td_prefill_job *j)
{
    if (!j->push_done || !j->final_seen)
        return;
    td_list_del(&j->base.mover_node);
    td_push_wait(m->base.to_lane, &j->pushed);
}

static void end_push(td_prefill_mover *m, td_prefill_job *j, uint32_t code, const char *reason)
{
    j->push = NULL;
    j->push_done = 1;
    j->push_code = code;
    memset(j->push_reason, 0, sizeof j->push_reason);
    memcpy(j->push_reason, reason, TD_MIN(strlen(reason), sizeof j->push_reason - 1));
    if (code && !j->final_seen) {
        atomic_store(&j->failed, code);
        (void)td_ring_push(m->base.to_lane, &td_msg_wake);
    }
    report(m, j);
}

static void on_done(void *arg, void *user, uint32_t code, const char *reason,
                    const td_push_figures *figures)
{
    (void)figures;
    end_push(arg, user, code, reason);
}

static void on_transport(void *arg, const char *endpoint, td_kv_transport transport,
                         const char *why, int fallback)
{
    (void)arg;
    if (transport == TD_KV_SHM)
        td_log(TD_LOG_INFO, "kv_transport", "peer=\"%s\" transport=shm", endpoint);
    else if (fallback < 0)
        td_log(TD_LOG_ERROR, "kv_unreachable",
               "peer=\"%s\" why=\"shared memory: %s; kv-transport = shm or strict forbids "
               "ZeroMQ\"",
               endpoint, why);
    else
        td_log(fallback ? TD_LOG_WARN : TD_LOG_INFO, "kv_transport",
               "peer=\"%s\" transport=zmq why=\"%s\"", endpoint, why);
}

static void copy_text(char *out, size_t cap, const ProtobufCBinaryData *b)
{
    size_t n = TD_MIN(b->len, cap - 1);
    if (n)
        memcpy(out, b->data, n);
    out[n] = 0;
}

static void open_push(td_prefill_mover *m, td_prefill_job *j)
{
    const Tandem__V1__Ticket *t = j->message->ticket;
    char endpoint[256] = "", host_id[64] = "";
    td_shm_offer shm = {0};
    memcpy(endpoint, t->endpoint.data, TD_MIN(t->endpoint.len, sizeof endpoint - 1));
    td_push_ticket k = {.attempt = t->attempt,
                        .generation = t->generation,
                        .endpoint = endpoint,
                        .mac_key = t->has_mac_key ? t->mac_key.data : NULL,
                        .kv_key = t->has_kv_key ? t->kv_key.data : NULL,
                        .shm = t->has_shm_path ? &shm : NULL,
                        .host_id = host_id,
                        .credit_bytes = t->credit_bytes,
                        .deadline_us = j->push_deadline_us,
                        .user = j};
    if (t->has_host_id)
        copy_text(host_id, sizeof host_id, &t->host_id);
    if (t->has_shm_path) { /* sizes were checked with the message */
        copy_text(shm.path, sizeof shm.path, &t->shm_path);
        memcpy(shm.nonce, t->shm_nonce.data, sizeof shm.nonce);
    }
    memcpy(k.id, t->id.data, 16);
    memcpy(k.decode_epoch, t->decode_epoch.data, 16);
    td_list_add(&m->base.jobs, &j->base.mover_node);
    td_err err = {0};
    int r = td_push_begin(m->pusher, &k, td_now_us(), &j->push, &err);
    if (r < 0) {
        td_log(TD_LOG_WARN, "push_refused", "why=\"%s\"", err.text);
        end_push(m, j, td_code_from_errno(r), "endpoint");
    }
}

static void add(td_prefill_mover *m, td_prefill_add *a)
{
    td_prefill_job *j = a->job;
    uint64_t now = td_now_us();
    if (j->push && td_push_add(j->push, a->blocks, a->n, now) < 0)
        td_push_cancel(j->push, TD_RESOURCE_EXHAUSTED, now);
    free(a);
}

static void commit(td_prefill_mover *m, td_prefill_job *j)
{
    uint32_t ids[TD_CHOICES_MAX];
    for (uint32_t i = 0; i < j->n_first; i++)
        ids[i] = j->first[i].id;
    j->final_seen = 1;
    if (j->push) /* may end it, and then on_done reports */
        td_push_commit(j->push, j->base.request.plan.n_tokens, j->base.request.choices, ids,
                       j->n_first, td_now_us());
    else
        report(m, j);
}

static void drop(td_prefill_mover *m, td_prefill_job *j)
{
    j->final_seen = 1;
    if (j->push)
        td_push_cancel(j->push, atomic_load(&j->base.drop), td_now_us());
    else
        report(m, j);
}

static void handle(td_prefill_mover *m, td_msg *msg)
{
    switch (msg->kind) {
    case TD_PREFILL_OPEN:
        open_push(m, ((td_worker_msg_of *)msg)->job);
        break;
    case TD_PREFILL_ADD:
        add(m, (td_prefill_add *)msg);
        break;
    case TD_PREFILL_COMMIT:
        commit(m, ((td_worker_msg_of *)msg)->job);
        break;
    case TD_PREFILL_DROP:
        drop(m, ((td_worker_msg_of *)msg)->job);
        break;
    default:
        break;
    }
}

/* The job was dropped: nothing of it is sent any more. A failed device makes no copies, so that
 * nobody waits for those. */
static void handle_dropped(td_prefill_mover *m, td_prefill_held *h)
{
    if (h->msg->kind == TD_PREFILL_ADD)
        free(h->msg);
    else
        drop(m, h->job);
}

static void from_lane(td_worker_mover *w, td_msg *msg)
{
    td_prefill_mover *m = (td_prefill_mover *)w;
    td_prefill_held *h = NULL;
    if (msg->kind == TD_PREFILL_ADD)
        h = &((td_prefill_add *)msg)->held;
    else if (msg->kind != TD_PREFILL_OPEN)
        h = &((td_prefill_job *)((td_worker_msg_of *)msg)->job)->final_held;
    if (!h || (td_list_empty(&m->held) && td_kv_copied(m->pool, h->mark))) {
        handle(m, msg);
        return;
    }
    h->msg = msg;
    td_list_add(&m->held, &h->node);
}

/* Marks of a job ascend: when one is copied, so is what came before it. */
static void take_held(td_prefill_mover *m)
{
    for (td_list *l = m->held.next, *next; l != &m->held; l = next) {
        next = l->next;
        td_prefill_held *h = TD_LIST_ENTRY(l, td_prefill_held, node);
        int dropped = atomic_load(&h->job->base.drop) != 0;
        if (!dropped && !td_kv_copied(m->pool, h->mark))
            continue;
        td_list_del(&h->node);
        if (dropped)
            handle_dropped(m, h);
        else
            handle(m, h->msg);
    }
}

static void on_drop(td_worker_mover *m, td_worker_job *w, uint32_t code)
{
    (void)m;
    td_prefill_job *j = (td_prefill_job *)w;
    if (j->push)
        td_push_cancel(j->push, code, td_now_us());
}

static int run(td_worker_mover *m, uint64_t now_us)
{
    take_held((td_prefill_mover *)m);
    td_pusher_run(((td_prefill_mover *)m)->pusher, now_us);
    return 0;
}

static uint64_t due(td_worker_mover *w, uint64_t now_us)
{
    td_prefill_mover *m = (td_prefill_mover *)w;
    uint64_t at = td_pusher_due(m->pusher, now_us);
    return td_list_empty(&m->held) ? at : TD_MIN(at, now_us + COPY_POLL_US);
}

static uint32_t polls(td_worker_mover *m, td_bulk_poll *polls, uint32_t max)
{
    return td_pusher_polls(((td_prefill_mover *)m)->pusher, polls, max);
}

int td_prefill_mover_start(const td_prefill_mover_config *config, td_prefill_mover **ret_mover,
                           td_err *reterr_err)
{
    static const td_worker_mover_ops ops = {
        .from_lane = from_lane, .drop = on_drop, .run = run, .due = due, .polls = polls};
    td_prefill_mover *m = calloc(1, sizeof *m);
    if (!m)
        return td_err_set(reterr_err, -ENOMEM, "mover: out of memory");
    m->base = (td_worker_mover){.ops = &ops,
                                .from_lane = config->from_lane,
                                .to_lane = config->to_lane,
                                .core = config->core};
    m->pool = config->push.pool;
    td_list_init(&m->held);
    td_pusher_config push = config->push;
    push.ops.on_done = on_done;
    push.ops.on_transport = on_transport;
    push.arg = m;
    int r = td_pusher_open(&push, &m->pusher, reterr_err);
    if (r == 0)
        r = td_worker_mover_start(&m->base, reterr_err);
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
    td_worker_mover_stop(&m->base);
    td_pusher_close(m->pusher);
    free(m);
}

const td_push_stats *td_prefill_mover_stats(const td_prefill_mover *m)
{
    return td_pusher_get_stats(m->pusher);
}
