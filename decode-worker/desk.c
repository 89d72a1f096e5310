/* SPDX-License-Identifier: Apache-2.0 */
#include "decode-worker/desk.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/bug.h"
#include "base/cleanup.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/prefix.h"
#include "decode-worker/job.h"
#include "decode-worker/mover.h"
#include "proto/engine.pb-c.h"
#include "base/banned.h"

static ProtobufCBinaryData bin(const void *p, size_t n)
{
    return (ProtobufCBinaryData){.len = n, .data = (uint8_t *)(uintptr_t)p};
}

/* ---- jobs ---- */

static void job_free(td_decode_desk *d, td_decode_job *j)
{
    td_list_del(&j->loop_node);
    td_list_del(&j->dirty_node);
    d->n_jobs--;
    for (uint32_t i = 0; i < TD_CHOICES_MAX; i++) {
        td_strbuf_done(&j->pending[i].ids);
        td_strbuf_done(&j->pending[i].logprobs);
        td_strbuf_done(&j->pending[i].tops);
    }
    tandem__v1__reserve_request__free_unpacked(j->message, NULL);
    free(j);
    if (d->draining && d->n_jobs == 0)
        d->on_idle(d->arg);
}

static void cancel(td_decode_desk *d, td_decode_job *j, uint32_t code)
{
    atomic_store(&j->cancel, code);
    (void)td_ring_push(d->to_lane, &td_msg_wake);
}

static void mark(td_decode_desk *d, td_decode_job *j)
{
    td_list_del(&j->dirty_node);
    td_list_add(&d->dirty, &j->dirty_node);
}

static void on_cancel(void *arg, td_call *c)
{
    td_decode_desk *d = arg;
    td_decode_job *j = td_call_user(c);
    cancel(d, j, td_call_remaining_us(c) ? TD_CANCELLED : TD_DEADLINE_EXCEEDED);
    if (!j->ended)
        return;
    /* it only waited for credit to send its last tokens */
    mark(d, j);
    td_loop_after(d->loop, &d->after);
}

static void on_credit(void *arg, td_call *c)
{
    td_decode_desk *d = arg;
    mark(d, td_call_user(c));
    td_loop_after(d->loop, &d->after);
}

static int same_request(const td_decode_job *j, td_str id)
{
    const ProtobufCBinaryData *b = &j->request.message->request_id;
    return b->len == id.len && memcmp(b->data, id.ptr, id.len) == 0;
}

static int is_running(td_decode_desk *d, td_str id, uint32_t attempt)
{
    for (td_list *l = d->jobs.next; l != &d->jobs; l = l->next) {
        td_decode_job *j = TD_LIST_ENTRY(l, td_decode_job, loop_node);
        if (same_request(j, id) && j->message->attempt == attempt)
            return 1;
    }
    return 0;
}

static int job_read(td_decode_desk *d, td_decode_job *j, td_str message, td_err *err)
{
    j->message =
        tandem__v1__reserve_request__unpack(NULL, message.len, (const uint8_t *)message.ptr);
    if (!j->message)
        return td_err_set(err, -EINVAL, "ReserveRequest: not a valid message");
    int r = td_request_read(j->message->request, d->host->info->vocab_size, d->max_context,
                            &j->request, err);
    if (r == 0 && is_running(d,
                             (td_str){(char *)j->request.message->request_id.data,
                                      j->request.message->request_id.len},
                             j->message->attempt))
        r = td_err_set(err, -EEXIST, "request_id: this attempt is running here");
    return r;
}

static void refuse(td_call *c, int r, const char *text)
{
    td_error e = r == -EEXIST   ? TD_ERROR_CONFLICT
                 : r == -ERANGE ? TD_ERROR_CONTEXT_LENGTH
                 : r == -EINVAL ? TD_ERROR_INVALID_REQUEST
                 : r == -EAGAIN ? TD_ERROR_QUEUE_FULL
                                : TD_ERROR_NONE;
    td_host_fail(c, e ? (uint32_t)td_error_get(e)->status : td_code_from_errno(r), e, text);
}

static void job_init(td_decode_job *j)
{
    td_list_init(&j->loop_node);
    td_list_init(&j->dirty_node);
    td_list_init(&j->lane_node);
    td_list_init(&j->mover_node);
    j->arrive = (td_decode_msg_of){{TD_DECODE_ARRIVE}, j};
    j->grant = (td_decode_msg_of){{TD_DECODE_GRANT}, j};
    j->settled = (td_decode_msg_of){{TD_DECODE_SETTLED}, j};
    j->ticket = (td_decode_msg_of){{TD_DECODE_TICKET}, j};
    j->committed = (td_decode_msg_of){{TD_DECODE_COMMITTED}, j};
    j->end = (td_decode_msg_of){{TD_DECODE_END}, j};
    for (uint32_t i = 0; i < TD_CHOICES_MAX; i++) {
        td_strbuf_init(&j->pending[i].ids);
        td_strbuf_init(&j->pending[i].logprobs);
        td_strbuf_init(&j->pending[i].tops);
    }
}

static void on_reserve(td_decode_desk *d, td_call *c, td_str message)
{
    td_err err = {0};
    td_decode_job *j = d->n_jobs < TD_DECODE_JOBS_MAX ? calloc(1, sizeof *j) : NULL;
    if (!j) {
        refuse(c, -EAGAIN, "the worker's queue is full");
        return;
    }
    job_init(j);
    d->n_jobs++;
    int r = job_read(d, j, message, &err);
    if (r == 0) {
        j->call = c;
        j->deadline_us = td_now_us() + td_call_remaining_us(c);
        r = td_ring_push(d->to_lane, &j->arrive);
    }
    if (r < 0) {
        refuse(c, r, err.text);
        job_free(d, j);
        return;
    }
    td_list_add(&d->jobs, &j->loop_node);
    td_call_set_user(c, j);
    td_call_on_cancel(c, on_cancel, d);
    td_call_on_credit(c, on_credit, d);
    if (d->requests)
        td_counter_add(d->requests, 1);
}

static void on_abort(td_decode_desk *d, td_call *c, td_str message)
{
    Tandem__V1__AbortRequest *m =
        tandem__v1__abort_request__unpack(NULL, message.len, (const uint8_t *)message.ptr);
    Tandem__V1__AbortReply reply = TANDEM__V1__ABORT_REPLY__INIT;
    if (!m) {
        refuse(c, -EINVAL, "AbortRequest: not a valid message");
        return;
    }
    for (td_list *l = d->jobs.next; l != &d->jobs; l = l->next) {
        td_decode_job *j = TD_LIST_ENTRY(l, td_decode_job, loop_node);
        if (same_request(j, (td_str){(char *)m->request_id.data, m->request_id.len})) {
            cancel(d, j, TD_CANCELLED);
            reply.aborted++;
        }
    }
    tandem__v1__abort_request__free_unpacked(m, NULL);
    (void)td_host_send(c, &reply.base);
    td_call_finish(c, NULL);
}

static void on_flush(td_decode_desk *d, td_call *c)
{
    td_decode_flush *f = malloc(sizeof *f);
    if (!f || (*f = (td_decode_flush){.head = {TD_DECODE_FLUSH}, .call = c},
               td_ring_push(d->to_lane, f)) < 0) {
        free(f);
        refuse(c, -EAGAIN, "the worker's queue is full");
    }
}

static void flushed(td_decode_flush *f)
{
    Tandem__V1__FlushReply m = TANDEM__V1__FLUSH_REPLY__INIT;
    m.blocks = f->blocks;
    (void)td_host_send(f->call, &m.base);
    td_call_finish(f->call, NULL);
    free(f);
}

static void on_drain(td_decode_desk *d, td_call *c)
{
    Tandem__V1__DrainReply m = TANDEM__V1__DRAIN_REPLY__INIT;
    (void)td_host_send(c, &m.base);
    td_call_finish(c, NULL);
    td_decode_desk_drain(d);
}

void td_decode_desk_call(void *arg, td_call *c, td_str method, td_str message)
{
    td_decode_desk *d = arg;
    if (td_host_call(d->host, c, method))
        return;
    if (td_str_eq(method, "tandem.v1.Engine/Abort"))
        on_abort(d, c, message);
    else if (td_str_eq(method, "tandem.v1.Engine/FlushCache"))
        on_flush(d, c);
    else if (td_str_eq(method, "tandem.v1.Engine/Drain"))
        on_drain(d, c);
    else if (!td_str_eq(method, "tandem.v1.Engine/Reserve"))
        td_host_fail(c, TD_UNIMPLEMENTED, TD_ERROR_UNSUPPORTED,
                     "a decode worker does not serve this method");
    else if (d->draining)
        td_host_fail(c, TD_UNAVAILABLE, TD_ERROR_DRAINING, NULL);
    else
        on_reserve(d, c, message);
}

/* ---- the stream ---- */

static void send_ticket(td_decode_desk *d, td_decode_job *j)
{
    const td_host *h = d->host;
    Tandem__V1__Ticket t = TANDEM__V1__TICKET__INIT;
    Tandem__V1__DecodeEvent m = TANDEM__V1__DECODE_EVENT__INIT;
    uint64_t now = td_now_us();
    t.id = bin(j->ticket_id, 16);
    t.attempt = j->message->attempt;
    t.generation = j->generation;
    t.decode_epoch = bin(h->epoch, 16);
    t.layout_hash = bin(h->info->kv.hash, 16);
    t.profile_id = bin(h->info->profile_id, 16);
    t.model_hash = bin(h->info->model_hash, 32);
    t.endpoint = bin(h->kv_endpoint, strlen(h->kv_endpoint));
    t.credit_bytes = TD_DECODE_CREDIT_BYTES;
    t.held_blocks = j->held_blocks;
    t.deadline_ms = j->deadline_us > now
                        ? (uint32_t)TD_MIN((j->deadline_us - now) / TD_MS + 1, (uint64_t)UINT32_MAX)
                        : 1;
    t.has_host_id = h->host_id[0] != 0;
    t.host_id = bin(h->host_id, strlen(h->host_id));
    m.ticket = &t;
    int r = td_host_send(j->call, &m.base);
    if (r < 0 && r != -ECANCELED)
        cancel(d, j, td_code_from_errno(r));
}

static void add_token(td_decode_desk *d, const td_decode_token *t)
{
    td_decode_job *j = t->job;
    td_decode_pending *p = &j->pending[t->at];
    if (p->n++ == 0)
        p->index = t->index;
    p->finish = t->finish;
    td_strbuf_add(&p->ids, &t->sample.id, sizeof t->sample.id);
    if (j->request.logprobs) {
        td_strbuf_add(&p->logprobs, &t->sample.lp.logprob, sizeof t->sample.lp.logprob);
        if (j->request.n_top)
            td_strbuf_add(&p->tops, &t->sample.lp, sizeof t->sample.lp);
    }
    if (p->ids.failed || p->logprobs.failed || p->tops.failed)
        cancel(d, j, TD_RESOURCE_EXHAUSTED);
    mark(d, j);
}

/* Room for one event's parts: bounded by what is pending. */
typedef struct event_room {
    Tandem__V1__TokenRun runs[TD_CHOICES_MAX], *list[TD_CHOICES_MAX];
    Tandem__V1__TopLogprob *tops, **top_list;
    uint32_t n_tops;
} event_room;

static void fill_tops(event_room *room, Tandem__V1__TokenRun *run, const td_decode_pending *p)
{
    run->n_top = p->n;
    run->top = room->top_list + room->n_tops;
    for (uint32_t i = 0; i < p->n; i++) {
        const td_logprob *lp = (const td_logprob *)(const void *)p->tops.data + i;
        Tandem__V1__TopLogprob *m = &room->tops[room->n_tops];
        tandem__v1__top_logprob__init(m);
        m->ids = bin(lp->top_ids, lp->n_top * sizeof *lp->top_ids);
        m->logprobs = bin(lp->top, lp->n_top * sizeof *lp->top);
        room->top_list[room->n_tops++] = m;
    }
}

static int fill_runs(event_room *room, const td_decode_job *j, Tandem__V1__DecodeEvent *m)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < j->request.n_choices; i++)
        n += j->pending[i].n;
    room->n_tops = 0;
    room->tops = j->request.n_top ? calloc(n + 1, sizeof *room->tops) : NULL;
    room->top_list = j->request.n_top ? calloc(n + 1, sizeof *room->top_list) : NULL;
    if (j->request.n_top && (!room->tops || !room->top_list))
        return -ENOMEM;
    m->runs = room->list;
    for (uint32_t i = 0; i < j->request.n_choices; i++) {
        const td_decode_pending *p = &j->pending[i];
        if (!p->n)
            continue;
        Tandem__V1__TokenRun *run = &room->runs[m->n_runs];
        tandem__v1__token_run__init(run);
        run->choice = j->request.choices[i];
        run->index = p->index;
        run->ids = bin(p->ids.data, p->ids.len);
        run->has_logprobs = j->request.logprobs != 0;
        run->logprobs = bin(p->logprobs.data, p->logprobs.len);
        run->has_finish = p->finish != TD_FINISH_NONE;
        run->finish = (Tandem__V1__Finish)p->finish;
        if (j->request.logprobs && j->request.n_top)
            fill_tops(room, run, p);
        room->list[m->n_runs++] = run;
    }
    return 0;
}

static void fill_usage(Tandem__V1__Usage *u, const td_decode_job *j, uint32_t n_sent)
{
    tandem__v1__usage__init(u);
    u->has_prompt_tokens = u->has_cached_tokens = u->has_completion_tokens = 1;
    u->has_transfer_us = u->has_transfer_bytes = 1;
    u->prompt_tokens = (uint32_t)j->request.n_prompt;
    u->cached_tokens = j->held_blocks * TD_BLOCK_TOKENS;
    u->completion_tokens = n_sent;
    u->transfer_us = j->figures.transfer_us;
    u->transfer_bytes = j->figures.bytes;
}

static void forget_pending(td_decode_job *j)
{
    for (uint32_t i = 0; i < j->request.n_choices; i++) {
        td_decode_pending *p = &j->pending[i];
        td_strbuf_reset(&p->ids);
        td_strbuf_reset(&p->logprobs);
        td_strbuf_reset(&p->tops);
        p->n = 0;
    }
    j->say_committed = 0;
}

static uint32_t n_pending(const td_decode_job *j)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < j->request.n_choices; i++)
        n += j->pending[i].n;
    return n;
}

/* Send what is pending as one event of the current batch. 0, or as td_batch_add(). */
static int flush_job(td_decode_desk *d, td_decode_job *j)
{
    Tandem__V1__DecodeEvent m = TANDEM__V1__DECODE_EVENT__INIT;
    Tandem__V1__Usage usage;
    event_room room;
    uint32_t n = n_pending(j);
    if (n == 0 && !j->say_committed)
        return 0;
    m.has_committed = j->say_committed;
    m.committed = j->say_committed;
    if (j->say_committed || (j->ended && !j->code)) {
        fill_usage(&usage, j, j->n_sent + n);
        m.usage = &usage;
    }
    int r = fill_runs(&room, j, &m);
    if (r == 0) {
        size_t len = tandem__v1__decode_event__get_packed_size(&m);
        TD_AUTO_FREE uint8_t *bytes = malloc(len);
        r = -ENOMEM;
        if (bytes) {
            tandem__v1__decode_event__pack(&m, bytes);
            r = d->session == td_call_session(j->call) ? td_batch_add(j->call, bytes, len)
                                                       : -ECANCELED;
        }
    }
    free(room.tops);
    free(room.top_list);
    if (r == 0) {
        j->n_sent += n;
        forget_pending(j);
    }
    return r;
}

static void end(td_decode_desk *d, td_decode_job *j)
{
    td_str id = td_call_request_id(j->call);
    if (j->code && j->code != TD_CANCELLED) {
        td_log(j->code == TD_RESOURCE_EXHAUSTED ? TD_LOG_DEBUG : TD_LOG_WARN, "decode_failed",
               "request_id=\"%.*s\" attempt=%u code=%s why=\"%s\"", (int)id.len, id.ptr,
               j->message->attempt, td_code_name(j->code), j->text);
        if (d->failed)
            td_counter_add(d->failed, 1);
    } else if (td_log_enabled(TD_LOG_DEBUG)) {
        td_log(TD_LOG_DEBUG, "decode_end",
               "request_id=\"%.*s\" tokens=%u held_blocks=%u kv_bytes=%llu transfer_us=%llu",
               (int)id.len, id.ptr, j->n_sent, j->held_blocks, (unsigned long long)j->figures.bytes,
               (unsigned long long)j->figures.transfer_us);
    }
    if (j->code)
        td_host_fail(j->call, j->code, j->error, j->text);
    else
        td_call_finish(j->call, NULL);
    job_free(d, j);
}

/* One BATCH of everything that is new, then the ends: a STATUS never overtakes its tokens. */
static void flush_dirty(td_decode_desk *d)
{
    td_list done;
    td_list_init(&done);
    if (td_list_empty(&d->dirty))
        return;
    Tandem__V1__Load load = TANDEM__V1__LOAD__INIT;
    td_host_fill_load(d->host, &load);
    if (d->session)
        td_batch_begin(d->session, d->step);
    while (!td_list_empty(&d->dirty)) {
        td_decode_job *j = TD_LIST_ENTRY(d->dirty.next, td_decode_job, dirty_node);
        td_list_del(&j->dirty_node);
        int r = j->call && td_call_is_cancelled(j->call) ? -ECANCELED : flush_job(d, j);
        if (r < 0 && r != -EAGAIN && r != -ECANCELED)
            cancel(d, j, td_code_from_errno(r));
        if (r == -ECANCELED)
            forget_pending(j);
        if (j->ended && r != -EAGAIN)
            td_list_add(&done, &j->dirty_node);
    }
    if (d->session)
        td_batch_end(d->session, &load);
    while (!td_list_empty(&done))
        end(d, TD_LIST_ENTRY(done.next, td_decode_job, dirty_node));
}

static void take_step(td_decode_desk *d, td_decode_step *s)
{
    d->step = s->step;
    for (uint32_t i = 0; i < s->n; i++)
        add_token(d, &s->tokens[i]);
    free(s);
}

static void take(td_decode_desk *d, td_msg *m)
{
    td_decode_job *j = m->kind == TD_DECODE_COMMITTED || m->kind == TD_DECODE_END
                           ? ((td_decode_msg_of *)m)->job
                           : NULL;
    switch (m->kind) {
    case TD_DECODE_TICKET:
        send_ticket(d, ((td_decode_msg_of *)m)->job);
        break;
    case TD_DECODE_STEP:
        take_step(d, (td_decode_step *)m);
        break;
    case TD_DECODE_COMMITTED:
        j->say_committed = 1;
        mark(d, j);
        break;
    case TD_DECODE_END:
        j->ended = 1;
        mark(d, j);
        break;
    case TD_DECODE_FLUSH:
        flushed((td_decode_flush *)m);
        break;
    case TD_DECODE_DEAD:
        d->on_dead(d->arg);
        break;
    default:
        break;
    }
}

void td_decode_desk_turn(td_decode_desk *d)
{
    td_msg *m;
    td_ring_clear(d->from_lane);
    while ((m = td_ring_pop(d->from_lane)))
        take(d, m);
    flush_dirty(d);
}

void td_decode_desk_drain(td_decode_desk *d)
{
    if (d->draining)
        return;
    d->draining = 1;
    atomic_store(&d->host->load.draining, 1);
    if (d->n_jobs == 0)
        d->on_idle(d->arg);
}
