/* SPDX-License-Identifier: Apache-2.0 */
#include "prefill-worker/desk.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/bug.h"
#include "base/clock.h"
#include "base/log.h"
#include "prefill-worker/job.h"
#include "proto/engine.pb-c.h"
#include "base/banned.h"

static ProtobufCBinaryData bin(const void *p, size_t n)
{
    return (ProtobufCBinaryData){.len = n, .data = (uint8_t *)(uintptr_t)p};
}

/* ---- jobs ---- */

static void job_free(td_prefill_desk *d, td_job *j)
{
    td_list_del(&j->loop_node);
    d->n_jobs--;
    tandem__v1__prefill_request__free_unpacked(j->message, NULL);
    free(j->prompt_lp);
    free(j);
    if (d->draining && d->n_jobs == 0)
        d->on_idle(d->arg);
}

static void cancel(td_prefill_desk *d, td_job *j, uint32_t code)
{
    atomic_store(&j->cancel, code);
    (void)td_ring_push(d->to_lane, &td_msg_wake);
}

static void on_cancel(void *arg, td_call *c)
{
    cancel(arg, td_call_user(c), td_call_remaining_us(c) ? TD_CANCELLED : TD_DEADLINE_EXCEEDED);
}

static int same_request(const td_job *j, td_str id)
{
    const ProtobufCBinaryData *b = &j->request.message->request_id;
    return b->len == id.len && memcmp(b->data, id.ptr, id.len) == 0;
}

static int is_running(td_prefill_desk *d, td_str id, uint32_t attempt)
{
    for (td_list *l = d->jobs.next; l != &d->jobs; l = l->next) {
        td_job *j = TD_LIST_ENTRY(l, td_job, loop_node);
        if (same_request(j, id) && j->message->attempt == attempt)
            return 1;
    }
    return 0;
}

/* A ticket for other weights, another profile or another layout can never be served: say so before
 * computing. */
static int check_ticket(const td_prefill_desk *d, const Tandem__V1__Ticket *t, td_err *err)
{
    const td_model_info *i = d->host->info;
    int r = td_ticket_message_check(t, err);
    if (r < 0)
        return r;
    if (memcmp(t->model_hash.data, i->model_hash, 32) != 0)
        return td_err_set(err, -EXDEV, "ticket: the decode worker has another model");
    if (memcmp(t->profile_id.data, i->profile_id, 16) != 0)
        return td_err_set(err, -EXDEV, "ticket: the decode worker has another numerics profile");
    if (memcmp(t->layout_hash.data, i->kv.hash, 16) != 0)
        return td_err_set(err, -EXDEV, "ticket: the decode worker has another KV layout");
    return 0;
}

static int job_read(td_prefill_desk *d, td_job *j, td_str message, td_err *err)
{
    j->message =
        tandem__v1__prefill_request__unpack(NULL, message.len, (const uint8_t *)message.ptr);
    if (!j->message)
        return td_err_set(err, -EINVAL, "PrefillRequest: not a valid message");
    int r = td_request_read(j->message->request, d->host->info->vocab_size, d->max_context,
                            &j->request, err);
    if (r == 0 && j->message->ticket)
        r = check_ticket(d, j->message->ticket, err);
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
    uint32_t code = e             ? (uint32_t)td_error_get(e)->status
                    : r == -EXDEV ? TD_FAILED_PRECONDITION
                                  : td_code_from_errno(r);
    td_host_fail(c, code, e, text);
}

static void on_prefill(td_prefill_desk *d, td_call *c, td_str message)
{
    td_err err = {0};
    td_job *j = d->n_jobs < TD_PREFILL_JOBS_MAX ? calloc(1, sizeof *j) : NULL;
    if (!j) {
        refuse(c, -EAGAIN, "the worker's queue is full");
        return;
    }
    td_list_init(&j->loop_node);
    td_list_init(&j->lane_node);
    td_list_init(&j->mover_node);
    d->n_jobs++;
    int r = job_read(d, j, message, &err);
    if (r == 0) {
        j->arrive = (td_job_msg_of){{TD_JOB_ARRIVE}, j};
        j->open = (td_job_msg_of){{TD_JOB_OPEN}, j};
        j->final = (td_job_msg_of){{TD_JOB_DROP}, j};
        j->pushed = (td_job_msg_of){{TD_JOB_PUSHED}, j};
        j->reply = (td_job_msg_of){{TD_JOB_REPLY}, j};
        j->end = (td_job_msg_of){{TD_JOB_END}, j};
        j->call = c;
        j->arrived_us = td_now_us();
        j->deadline_us = j->arrived_us + td_call_remaining_us(c);
        if (j->message->ticket)
            j->deadline_us =
                TD_MIN(j->deadline_us, j->arrived_us + j->message->ticket->deadline_ms * TD_MS);
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
    if (d->requests)
        td_counter_add(d->requests, 1);
}

static void on_abort(td_prefill_desk *d, td_call *c, td_str message)
{
    Tandem__V1__AbortRequest *m =
        tandem__v1__abort_request__unpack(NULL, message.len, (const uint8_t *)message.ptr);
    Tandem__V1__AbortReply reply = TANDEM__V1__ABORT_REPLY__INIT;
    if (!m) {
        refuse(c, -EINVAL, "AbortRequest: not a valid message");
        return;
    }
    for (td_list *l = d->jobs.next; l != &d->jobs; l = l->next) {
        td_job *j = TD_LIST_ENTRY(l, td_job, loop_node);
        if (same_request(j, (td_str){(char *)m->request_id.data, m->request_id.len})) {
            cancel(d, j, TD_CANCELLED);
            reply.aborted++;
        }
    }
    tandem__v1__abort_request__free_unpacked(m, NULL);
    (void)td_host_send(c, &reply.base);
    td_call_finish(c, NULL);
}

static void on_flush(td_prefill_desk *d, td_call *c)
{
    td_flush *f = malloc(sizeof *f);
    if (!f ||
        (*f = (td_flush){.head = {TD_JOB_FLUSH}, .call = c}, td_ring_push(d->to_lane, f)) < 0) {
        free(f);
        refuse(c, -EAGAIN, "the worker's queue is full");
    }
}

static void flushed(td_flush *f)
{
    Tandem__V1__FlushReply m = TANDEM__V1__FLUSH_REPLY__INIT;
    m.blocks = f->blocks;
    (void)td_host_send(f->call, &m.base);
    td_call_finish(f->call, NULL);
    free(f);
}

static void on_drain(td_prefill_desk *d, td_call *c)
{
    Tandem__V1__DrainReply m = TANDEM__V1__DRAIN_REPLY__INIT;
    (void)td_host_send(c, &m.base);
    td_call_finish(c, NULL);
    td_prefill_desk_drain(d);
}

void td_prefill_desk_call(void *arg, td_call *c, td_str method, td_str message)
{
    td_prefill_desk *d = arg;
    if (td_host_call(d->host, c, method))
        return;
    if (td_str_eq(method, "tandem.v1.Engine/Abort"))
        on_abort(d, c, message);
    else if (td_str_eq(method, "tandem.v1.Engine/FlushCache"))
        on_flush(d, c);
    else if (td_str_eq(method, "tandem.v1.Engine/Drain"))
        on_drain(d, c);
    else if (!td_str_eq(method, "tandem.v1.Engine/Prefill"))
        td_host_fail(c, TD_UNIMPLEMENTED, TD_ERROR_UNSUPPORTED,
                     "a prefill worker does not serve this method");
    else if (d->draining)
        td_host_fail(c, TD_UNAVAILABLE, TD_ERROR_DRAINING, NULL);
    else
        on_prefill(d, c, message);
}

/* ---- answers ---- */

/* One id with its logprobs, as TokenRun wants them; points into the job. */
typedef struct first_run {
    Tandem__V1__TokenRun run;
    Tandem__V1__TopLogprob top, *tops[1];
} first_run;

static void fill_top(Tandem__V1__TopLogprob *m, const td_logprob *lp)
{
    tandem__v1__top_logprob__init(m);
    m->ids = bin(lp->top_ids, lp->n_top * sizeof *lp->top_ids);
    m->logprobs = bin(lp->top, lp->n_top * sizeof *lp->top);
}

static void fill_first(first_run *f, const td_job *j, uint32_t i)
{
    const td_sample *s = &j->first[i];
    tandem__v1__token_run__init(&f->run);
    f->run.choice = j->request.choices[i];
    f->run.index = j->request.recovery ? (uint32_t)j->request.n_emitted[i] - 1 : 0;
    f->run.ids = bin(&s->id, sizeof s->id);
    f->run.has_finish = j->finish[i] != TD_FINISH_NONE;
    f->run.finish = (Tandem__V1__Finish)j->finish[i];
    if (!j->request.logprobs)
        return;
    f->run.has_logprobs = 1;
    f->run.logprobs = bin(&s->lp.logprob, sizeof s->lp.logprob);
    if (j->request.n_top) {
        fill_top(&f->top, &s->lp);
        f->tops[0] = &f->top;
        f->run.n_top = 1;
        f->run.top = f->tops;
    }
}

/* Prompt logprobs: n_prompt - 1 entries. Arrays are the caller's to free. */
static int fill_prompt(Tandem__V1__PromptLogprobs *m, const td_job *j, float **ret_values,
                       Tandem__V1__TopLogprob **ret_tops, Tandem__V1__TopLogprob ***ret_list)
{
    size_t n = j->request.n_prompt - 1;
    *ret_values = malloc(n * sizeof(float) + 1);
    *ret_tops = calloc(n + 1, sizeof **ret_tops);
    *ret_list = calloc(n + 1, sizeof **ret_list);
    if (!*ret_values || !*ret_tops || !*ret_list)
        return -ENOMEM;
    tandem__v1__prompt_logprobs__init(m);
    for (size_t i = 0; i < n; i++) {
        (*ret_values)[i] = j->prompt_lp[i].logprob;
        fill_top(&(*ret_tops)[i], &j->prompt_lp[i]);
        (*ret_list)[i] = &(*ret_tops)[i];
    }
    m->logprobs = bin(*ret_values, n * sizeof(float));
    if (j->request.n_top) {
        m->n_top = n;
        m->top = *ret_list;
    }
    return 0;
}

static int send_reply(td_job *j)
{
    first_run runs[TD_CHOICES_MAX];
    Tandem__V1__TokenRun *list[TD_CHOICES_MAX];
    Tandem__V1__PrefillReply m = TANDEM__V1__PREFILL_REPLY__INIT;
    Tandem__V1__Usage usage = TANDEM__V1__USAGE__INIT;
    Tandem__V1__PromptLogprobs prompt;
    Tandem__V1__TopLogprob *tops = NULL, **top_list = NULL;
    float *values = NULL;
    for (uint32_t i = 0; i < j->n_first; i++) {
        fill_first(&runs[i], j, i);
        list[i] = &runs[i].run;
    }
    m.n_first = j->n_first;
    m.first = list;
    m.prompt_tokens = (uint32_t)j->request.n_prompt;
    m.cached_tokens = j->cached_tokens;
    m.has_sent_blocks = 1;
    m.sent_blocks = j->sent_blocks;
    usage.has_prompt_tokens = usage.has_cached_tokens = usage.has_queue_us = usage.has_prefill_us =
        1;
    usage.prompt_tokens = m.prompt_tokens;
    usage.cached_tokens = m.cached_tokens;
    usage.queue_us = j->queue_us;
    usage.prefill_us = j->prefill_us;
    m.usage = &usage;
    int r = 0;
    if (j->prompt_lp && (r = fill_prompt(&prompt, j, &values, &tops, &top_list)) == 0)
        m.prompt = &prompt;
    if (r == 0)
        r = td_host_send(j->call, &m.base);
    free(values);
    free(tops);
    free(top_list);
    return r;
}

static void end(td_prefill_desk *d, td_job *j)
{
    td_str id = td_call_request_id(j->call);
    if (j->code && j->code != TD_CANCELLED) {
        td_log(TD_LOG_WARN, "prefill_failed", "request_id=\"%.*s\" attempt=%u code=%s why=\"%s\"",
               (int)id.len, id.ptr, j->message->attempt, td_code_name(j->code), j->text);
        if (d->failed)
            td_counter_add(d->failed, 1);
    } else if (td_log_enabled(TD_LOG_DEBUG)) {
        td_log(TD_LOG_DEBUG, "prefill_end",
               "request_id=\"%.*s\" tokens=%zu cached=%u sent_blocks=%u queue_us=%llu us=%llu",
               (int)id.len, id.ptr, j->request.n_prompt, j->cached_tokens, j->sent_blocks,
               (unsigned long long)j->queue_us, (unsigned long long)j->prefill_us);
    }
    if (j->code)
        td_host_fail(j->call, j->code, j->error, j->text);
    else
        td_call_finish(j->call, NULL);
    job_free(d, j);
}

/* The first tokens leave before the blocks have arrived; the STATUS follows when they have. */
static void reply(td_prefill_desk *d, td_job *j)
{
    int r = send_reply(j);
    if (r < 0 && r != -ECANCELED)
        cancel(d, j, td_code_from_errno(r));
}

void td_prefill_desk_turn(td_prefill_desk *d)
{
    td_msg *m;
    td_ring_clear(d->from_lane);
    while ((m = td_ring_pop(d->from_lane))) {
        switch (m->kind) {
        case TD_JOB_REPLY:
            reply(d, ((td_job_msg_of *)m)->job);
            break;
        case TD_JOB_END:
            end(d, ((td_job_msg_of *)m)->job);
            break;
        case TD_JOB_FLUSH:
            flushed((td_flush *)m);
            break;
        case TD_JOB_DEAD:
            d->on_dead(d->arg);
            break;
        default:
            break;
        }
    }
}

void td_prefill_desk_drain(td_prefill_desk *d)
{
    if (d->draining)
        return;
    d->draining = 1;
    atomic_store(&d->host->load.draining, 1);
    if (d->n_jobs == 0)
        d->on_idle(d->arg);
}
