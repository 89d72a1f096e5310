/* SPDX-License-Identifier: Apache-2.0 */
#include "worker/desk.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/bug.h"
#include "base/clock.h"
#include "proto/engine.pb-c.h"
#include "base/banned.h"

ProtobufCBinaryData td_worker_bin(const void *p, size_t n)
{
    return (ProtobufCBinaryData){.len = n, .data = (uint8_t *)(uintptr_t)p};
}

/* ---- jobs ---- */

static void job_free(td_worker_desk *d, td_worker_job *j)
{
    td_list_del(&j->loop_node);
    d->n_jobs--;
    d->ops->job_free(j);
    if (d->draining && d->n_jobs == 0)
        d->on_idle(d->arg);
}

void td_worker_desk_cancel(td_worker_desk *d, td_worker_job *j, uint32_t code)
{
    atomic_store(&j->cancel, code);
    (void)td_ring_push(d->to_lane, &td_msg_wake);
}

static void on_cancel(void *arg, td_call *c)
{
    td_worker_desk *d = arg;
    td_worker_job *j = td_call_user(c);
    td_worker_desk_cancel(d, j, td_call_remaining_us(c) ? TD_CANCELLED : TD_DEADLINE_EXCEEDED);
    if (d->ops->on_cancel)
        d->ops->on_cancel(d, j);
}

static int same_request(const td_worker_job *j, const ProtobufCBinaryData *id)
{
    const ProtobufCBinaryData *b = &j->request.message->request_id;
    return b->len == id->len && memcmp(b->data, id->data, id->len) == 0;
}

static int is_running(const td_worker_desk *d, const td_worker_job *job)
{
    for (td_list *l = d->jobs.next; l != &d->jobs; l = l->next) {
        td_worker_job *j = TD_LIST_ENTRY(l, td_worker_job, loop_node);
        if (same_request(j, &job->request.message->request_id) && j->attempt == job->attempt)
            return 1;
    }
    return 0;
}

static void refuse(td_call *c, int r, const char *text)
{
    td_error e = r == -EEXIST   ? TD_ERROR_CONFLICT
                 : r == -ERANGE ? TD_ERROR_CONTEXT_LENGTH
                 : r == -EINVAL ? TD_ERROR_INVALID_REQUEST
                 : r == -EAGAIN ? TD_ERROR_QUEUE_FULL
                                : TD_ERROR_NONE;
    uint32_t code = e             ? (uint32_t)td_error_get(e)->status
                    : r == -EXDEV ? TD_FAILED_PRECONDITION
                                  : td_code_from_errno(r);
    td_host_fail(c, code, e, text);
}

static void job_init(td_worker_job *j, td_call *c)
{
    td_list_init(&j->loop_node);
    td_list_init(&j->lane_node);
    td_list_init(&j->mover_node);
    j->arrive = (td_worker_msg_of){{TD_WORKER_ARRIVE}, j};
    j->end = (td_worker_msg_of){{TD_WORKER_END}, j};
    j->call = c;
    j->arrived_us = td_now_us();
    j->deadline_us = j->arrived_us + td_call_remaining_us(c);
}

static int job_start(td_worker_desk *d, td_worker_job *j, td_str message, td_err *err)
{
    int r = d->ops->job_read(d, j, message, err);
    if (r < 0)
        return r;
    if (is_running(d, j))
        return td_err_set(err, -EEXIST, "request_id: this attempt is running here");
    r = td_ring_push(d->to_lane, &j->arrive);
    return r < 0 ? td_err_set(err, r, "the worker's queue is full") : 0;
}

static void on_work(td_worker_desk *d, td_call *c, td_str message)
{
    td_err err = {0};
    td_worker_job *j = d->n_jobs < TD_WORKER_JOBS_MAX ? d->ops->job_new() : NULL;
    if (!j) {
        refuse(c, -EAGAIN, "the worker's queue is full");
        return;
    }
    job_init(j, c);
    d->n_jobs++;
    int r = job_start(d, j, message, &err);
    if (r < 0) {
        refuse(c, r, err.text);
        job_free(d, j);
        return;
    }
    td_list_add(&d->jobs, &j->loop_node);
    td_call_set_user(c, j);
    td_call_on_cancel(c, on_cancel, d);
    if (d->ops->on_credit)
        td_call_on_credit(c, d->ops->on_credit, d);
    if (d->requests)
        td_counter_add(d->requests, 1);
}

/* ---- calls that every worker serves ---- */

static void on_abort(td_worker_desk *d, td_call *c, td_str message)
{
    Tandem__V1__AbortRequest *m =
        tandem__v1__abort_request__unpack(NULL, message.len, (const uint8_t *)message.ptr);
    Tandem__V1__AbortReply reply = TANDEM__V1__ABORT_REPLY__INIT;
    if (!m) {
        refuse(c, -EINVAL, "AbortRequest: not a valid message");
        return;
    }
    for (td_list *l = d->jobs.next; l != &d->jobs; l = l->next) {
        td_worker_job *j = TD_LIST_ENTRY(l, td_worker_job, loop_node);
        if (same_request(j, &m->request_id)) {
            td_worker_desk_cancel(d, j, TD_CANCELLED);
            reply.aborted++;
        }
    }
    tandem__v1__abort_request__free_unpacked(m, NULL);
    (void)td_host_send(c, &reply.base);
    td_call_finish(c, NULL);
}

static void on_flush(td_worker_desk *d, td_call *c)
{
    td_worker_flush *f = malloc(sizeof *f);
    if (!f || (*f = (td_worker_flush){.head = {TD_WORKER_FLUSH}, .call = c},
               td_ring_push(d->to_lane, f)) < 0) {
        free(f);
        refuse(c, -EAGAIN, "the worker's queue is full");
    }
}

static void flushed(td_worker_flush *f)
{
    Tandem__V1__FlushReply m = TANDEM__V1__FLUSH_REPLY__INIT;
    m.blocks = f->blocks;
    (void)td_host_send(f->call, &m.base);
    td_call_finish(f->call, NULL);
    free(f);
}

static void on_drain(td_worker_desk *d, td_call *c)
{
    Tandem__V1__DrainReply m = TANDEM__V1__DRAIN_REPLY__INIT;
    (void)td_host_send(c, &m.base);
    td_call_finish(c, NULL);
    td_worker_desk_drain(d);
}

void td_worker_desk_call(td_worker_desk *d, td_call *c, td_str method, td_str message)
{
    if (td_host_call(d->host, c, method))
        return;
    if (td_str_eq(method, "tandem.v1.Engine/Abort"))
        on_abort(d, c, message);
    else if (td_str_eq(method, "tandem.v1.Engine/FlushCache"))
        on_flush(d, c);
    else if (td_str_eq(method, "tandem.v1.Engine/Drain"))
        on_drain(d, c);
    else if (!td_str_eq(method, d->ops->method))
        td_host_fail(c, TD_UNIMPLEMENTED, TD_ERROR_UNSUPPORTED, d->ops->no_method);
    else if (d->draining)
        td_host_fail(c, TD_UNAVAILABLE, TD_ERROR_DRAINING, NULL);
    else
        on_work(d, c, message);
}

/* ---- from the lane ---- */

void td_worker_desk_end(td_worker_desk *d, td_worker_job *j, const char *event, td_log_level full)
{
    td_str id = td_call_request_id(j->call);
    if (j->code && j->code != TD_CANCELLED) {
        td_log(j->code == TD_RESOURCE_EXHAUSTED ? full : TD_LOG_WARN, event,
               "request_id=\"%.*s\" attempt=%u code=%s why=\"%s\"", (int)id.len, id.ptr, j->attempt,
               td_code_name(j->code), j->text);
        if (d->failed)
            td_counter_add(d->failed, 1);
    }
    if (j->code)
        td_host_fail(j->call, j->code, j->error, j->text);
    else
        td_call_finish(j->call, NULL);
    job_free(d, j);
}

void td_worker_desk_turn(td_worker_desk *d)
{
    td_msg *m;
    td_ring_clear(d->from_lane);
    while ((m = td_ring_pop(d->from_lane))) {
        if (m->kind == TD_WORKER_FLUSH)
            flushed((td_worker_flush *)m);
        else if (m->kind == TD_WORKER_DEAD)
            d->on_dead(d->arg);
        else
            d->ops->on_msg(d, m);
    }
    if (d->ops->on_turn)
        d->ops->on_turn(d);
}

void td_worker_desk_drain(td_worker_desk *d)
{
    if (d->draining)
        return;
    d->draining = 1;
    atomic_store(&d->host->load.draining, 1);
    if (d->n_jobs == 0)
        d->on_idle(d->arg);
}
