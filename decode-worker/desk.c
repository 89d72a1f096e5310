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

/* ---- jobs ---- */

static td_worker_job *job_new(void)
{
    td_decode_job *j = calloc(1, sizeof *j);
    if (!j)
        return NULL;
    td_list_init(&j->dirty_node);
    j->grant = (td_worker_msg_of){{TD_DECODE_GRANT}, j};
    j->settled = (td_worker_msg_of){{TD_DECODE_SETTLED}, j};
    j->ticket = (td_worker_msg_of){{TD_DECODE_TICKET}, j};
    j->committed = (td_worker_msg_of){{TD_DECODE_COMMITTED}, j};
    for (uint32_t i = 0; i < TD_CHOICES_MAX; i++) {
        td_strbuf_init(&j->pending[i].ids);
        td_strbuf_init(&j->pending[i].logprobs);
        td_strbuf_init(&j->pending[i].tops);
    }
    return &j->base;
}

static int job_read(td_worker_desk *d, td_worker_job *w, td_str message, td_err *err)
{
    td_decode_job *j = (td_decode_job *)w;
    j->message =
        tandem__v1__reserve_request__unpack(NULL, message.len, (const uint8_t *)message.ptr);
    if (!j->message)
        return td_err_set(err, -EINVAL, "ReserveRequest: not a valid message");
    w->attempt = j->message->attempt;
    j->local_limit = j->message->has_local_tokens ? j->message->local_tokens : 0;
    return td_request_read(j->message->request, d->host->info->vocab_size, d->max_context,
                           &w->request, err);
}

static void job_free(td_worker_job *w)
{
    td_decode_job *j = (td_decode_job *)w;
    td_list_del(&j->dirty_node);
    for (uint32_t i = 0; i < TD_CHOICES_MAX; i++) {
        td_strbuf_done(&j->pending[i].ids);
        td_strbuf_done(&j->pending[i].logprobs);
        td_strbuf_done(&j->pending[i].tops);
    }
    tandem__v1__reserve_request__free_unpacked(j->message, NULL);
    free(j);
}

static void cancel(td_decode_desk *d, td_decode_job *j, uint32_t code)
{
    td_worker_desk_cancel(&d->base, &j->base, code);
}

static void mark(td_decode_desk *d, td_decode_job *j)
{
    td_list_del(&j->dirty_node);
    td_list_add(&d->dirty, &j->dirty_node);
}

static void on_cancel(td_worker_desk *w, td_worker_job *job)
{
    td_decode_desk *d = (td_decode_desk *)w;
    td_decode_job *j = (td_decode_job *)job;
    if (!j->ended)
        return;
    /* it only waited for credit to send its last tokens */
    mark(d, j);
    td_loop_after(*d->loop, &d->after);
}

static void on_credit(void *arg, td_call *c)
{
    td_decode_desk *d = arg;
    mark(d, td_call_user(c));
    td_loop_after(*d->loop, &d->after);
}

/* ---- the stream ---- */

static void send_ticket(td_decode_desk *d, td_decode_job *j)
{
    const td_host *h = d->base.host;
    Tandem__V1__Ticket t = TANDEM__V1__TICKET__INIT;
    Tandem__V1__DecodeEvent m = TANDEM__V1__DECODE_EVENT__INIT;
    uint64_t now = td_now_us();
    t.id = td_worker_bin(j->ticket_id, 16);
    t.attempt = j->message->attempt;
    t.generation = j->generation;
    t.decode_epoch = td_worker_bin(h->epoch, 16);
    t.layout_hash = td_worker_bin(h->info->kv.hash, 16);
    t.profile_id = td_worker_bin(h->info->profile_id, 16);
    t.model_hash = td_worker_bin(h->info->model_hash, 32);
    t.endpoint = td_worker_bin(h->kv_endpoint, strlen(h->kv_endpoint));
    t.credit_bytes = TD_DECODE_CREDIT_BYTES;
    t.held_blocks = j->held_blocks;
    t.deadline_ms =
        j->base.deadline_us > now
            ? (uint32_t)TD_MIN((j->base.deadline_us - now) / TD_MS + 1, (uint64_t)UINT32_MAX)
            : 1;
    t.has_host_id = h->host_id[0] != 0;
    t.host_id = td_worker_bin(h->host_id, strlen(h->host_id));
    t.has_mac_key = h->kv_private;
    t.mac_key = td_worker_bin(j->mac_key, sizeof j->mac_key);
    t.has_kv_key = h->has_kv_key;
    t.kv_key = td_worker_bin(h->kv_key, sizeof h->kv_key);
    t.has_shm_path = t.has_shm_nonce = h->shm.path[0] != 0;
    t.shm_path = td_worker_bin(h->shm.path, strlen(h->shm.path));
    t.shm_nonce = td_worker_bin(h->shm.nonce, sizeof h->shm.nonce);
    m.ticket = &t;
    int r = td_host_send(j->base.call, &m.base);
    if (r < 0 && r != -ECANCELED)
        cancel(d, j, td_code_from_errno(r));
}

/* The answer to Reserve: a ticket, or that no prefill worker is needed. */
static void send_answer(td_decode_desk *d, td_decode_job *j)
{
    Tandem__V1__DecodeEvent m = TANDEM__V1__DECODE_EVENT__INIT;
    if (!j->local_tokens) {
        send_ticket(d, j);
        return;
    }
    m.has_local = 1;
    m.local = j->local_tokens;
    int r = td_host_send(j->base.call, &m.base);
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
    if (j->base.request.logprobs) {
        td_strbuf_add(&p->logprobs, &t->sample.lp.logprob, sizeof t->sample.lp.logprob);
        if (j->base.request.n_top)
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
        m->ids = td_worker_bin(lp->top_ids, lp->n_top * sizeof *lp->top_ids);
        m->logprobs = td_worker_bin(lp->top, lp->n_top * sizeof *lp->top);
        room->top_list[room->n_tops++] = m;
    }
}

static int fill_runs(event_room *room, const td_decode_job *j, Tandem__V1__DecodeEvent *m)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < j->base.request.n_choices; i++)
        n += j->pending[i].n;
    room->n_tops = 0;
    room->tops = j->base.request.n_top ? calloc(n + 1, sizeof *room->tops) : NULL;
    room->top_list = j->base.request.n_top ? calloc(n + 1, sizeof *room->top_list) : NULL;
    if (j->base.request.n_top && (!room->tops || !room->top_list))
        return -ENOMEM;
    m->runs = room->list;
    for (uint32_t i = 0; i < j->base.request.n_choices; i++) {
        const td_decode_pending *p = &j->pending[i];
        if (!p->n)
            continue;
        Tandem__V1__TokenRun *run = &room->runs[m->n_runs];
        tandem__v1__token_run__init(run);
        run->choice = j->base.request.choices[i];
        run->index = p->index;
        run->ids = td_worker_bin(p->ids.data, p->ids.len);
        run->has_logprobs = j->base.request.logprobs != 0;
        run->logprobs = td_worker_bin(p->logprobs.data, p->logprobs.len);
        run->has_finish = p->finish != TD_FINISH_NONE;
        run->finish = (Tandem__V1__Finish)p->finish;
        if (j->base.request.logprobs && j->base.request.n_top)
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
    u->prompt_tokens = (uint32_t)j->base.request.n_prompt;
    u->cached_tokens = j->held_blocks * TD_BLOCK_TOKENS;
    u->completion_tokens = n_sent;
    u->has_prefill_us = j->local_tokens > 0;
    u->prefill_us = j->prefill_us;
    u->transfer_us = j->figures.transfer_us;
    u->transfer_bytes = j->figures.bytes;
}

static void forget_pending(td_decode_job *j)
{
    for (uint32_t i = 0; i < j->base.request.n_choices; i++) {
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
    for (uint32_t i = 0; i < j->base.request.n_choices; i++)
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
    if (j->say_committed || (j->ended && !j->base.code)) {
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
            r = d->base.session == td_call_session(j->base.call)
                    ? td_batch_add(j->base.call, bytes, len)
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
    td_str id = td_call_request_id(j->base.call);
    if (td_log_enabled(TD_LOG_DEBUG))
        td_log(
            TD_LOG_DEBUG, "decode_end",
            "request_id=\"%.*s\" tokens=%u held_blocks=%u local=%u kv_bytes=%llu transfer_us=%llu",
            (int)id.len, id.ptr, j->n_sent, j->held_blocks, j->local_tokens,
            (unsigned long long)j->figures.bytes, (unsigned long long)j->figures.transfer_us);
    td_worker_desk_end(&d->base, &j->base, "decode_failed", TD_LOG_DEBUG);
}

/* One BATCH of everything that is new, then the ends: a STATUS never overtakes its tokens. */
static void flush_dirty(td_decode_desk *d)
{
    td_list done;
    td_list_init(&done);
    if (td_list_empty(&d->dirty))
        return;
    Tandem__V1__Load load = TANDEM__V1__LOAD__INIT;
    td_host_fill_load(d->base.host, &load);
    if (d->base.session)
        td_batch_begin(d->base.session, d->step);
    while (!td_list_empty(&d->dirty)) {
        td_decode_job *j = TD_LIST_ENTRY(d->dirty.next, td_decode_job, dirty_node);
        td_list_del(&j->dirty_node);
        int r = j->base.call && td_call_is_cancelled(j->base.call) ? -ECANCELED : flush_job(d, j);
        if (r < 0 && r != -EAGAIN && r != -ECANCELED)
            cancel(d, j, td_code_from_errno(r));
        if (r == -ECANCELED)
            forget_pending(j);
        if (j->ended && r != -EAGAIN)
            td_list_add(&done, &j->dirty_node);
    }
    if (d->base.session)
        td_batch_end(d->base.session, &load);
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

static void on_msg(td_worker_desk *w, td_msg *m)
{
    td_decode_desk *d = (td_decode_desk *)w;
    if (m->kind == TD_DECODE_STEP) {
        take_step(d, (td_decode_step *)m);
        return;
    }
    td_decode_job *j = ((td_worker_msg_of *)m)->job;
    if (m->kind == TD_DECODE_TICKET) {
        send_answer(d, j);
        return;
    }
    j->say_committed |= m->kind == TD_DECODE_COMMITTED;
    j->ended |= m->kind == TD_WORKER_END;
    mark(d, j);
}

static void on_turn(td_worker_desk *d)
{
    flush_dirty((td_decode_desk *)d);
}

static void on_after(void *arg)
{
    td_worker_desk_turn(arg);
}

void td_decode_desk_init(td_decode_desk *d, td_loop **loop)
{
    static const td_worker_desk_ops ops = {.method = "tandem.v1.Engine/Reserve",
                                           .no_method =
                                               "a decode worker does not serve this method",
                                           .job_new = job_new,
                                           .job_read = job_read,
                                           .job_free = job_free,
                                           .on_cancel = on_cancel,
                                           .on_credit = on_credit,
                                           .on_msg = on_msg,
                                           .on_turn = on_turn};
    d->base.ops = &ops;
    d->loop = loop;
    d->after = (td_after){.fn = on_after, .arg = &d->base};
    td_list_init(&d->dirty);
}
