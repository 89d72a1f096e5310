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

/* ---- jobs ---- */

static td_worker_job *job_new(void)
{
    td_prefill_job *j = calloc(1, sizeof *j);
    if (!j)
        return NULL;
    j->open = (td_worker_msg_of){{TD_PREFILL_OPEN}, j};
    j->final = (td_worker_msg_of){{TD_PREFILL_DROP}, j};
    j->pushed = (td_worker_msg_of){{TD_PREFILL_PUSHED}, j};
    j->reply = (td_worker_msg_of){{TD_PREFILL_REPLY}, j};
    return &j->base;
}

static void job_free(td_worker_job *w)
{
    td_prefill_job *j = (td_prefill_job *)w;
    tandem__v1__prefill_request__free_unpacked(j->message, NULL);
    free(j->prompt_lp);
    free(j);
}

/* A ticket for other weights, another profile or another layout can never be served: say so before
 * computing. */
static int check_ticket(const td_worker_desk *d, const Tandem__V1__Ticket *t, td_err *err)
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

static int job_read(td_worker_desk *d, td_worker_job *w, td_str message, td_err *err)
{
    td_prefill_job *j = (td_prefill_job *)w;
    j->message =
        tandem__v1__prefill_request__unpack(NULL, message.len, (const uint8_t *)message.ptr);
    if (!j->message)
        return td_err_set(err, -EINVAL, "PrefillRequest: not a valid message");
    const Tandem__V1__Ticket *t = j->message->ticket;
    w->attempt = j->message->attempt;
    int r = td_request_read(j->message->request, d->host->info->vocab_size, d->max_context,
                            &w->request, err);
    if (r == 0 && t && (r = check_ticket(d, t, err)) == 0)
        w->deadline_us = TD_MIN(w->deadline_us, w->arrived_us + t->deadline_ms * TD_MS);
    return r;
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
    m->ids = td_worker_bin(lp->top_ids, lp->n_top * sizeof *lp->top_ids);
    m->logprobs = td_worker_bin(lp->top, lp->n_top * sizeof *lp->top);
}

static void fill_first(first_run *f, const td_prefill_job *j, uint32_t i)
{
    const td_sample *s = &j->first[i];
    tandem__v1__token_run__init(&f->run);
    f->run.choice = j->base.request.choices[i];
    f->run.index = j->base.request.recovery ? (uint32_t)j->base.request.n_emitted[i] - 1 : 0;
    f->run.ids = td_worker_bin(&s->id, sizeof s->id);
    f->run.has_finish = j->finish[i] != TD_FINISH_NONE;
    f->run.finish = (Tandem__V1__Finish)j->finish[i];
    if (!j->base.request.logprobs)
        return;
    f->run.has_logprobs = 1;
    f->run.logprobs = td_worker_bin(&s->lp.logprob, sizeof s->lp.logprob);
    if (j->base.request.n_top) {
        fill_top(&f->top, &s->lp);
        f->tops[0] = &f->top;
        f->run.n_top = 1;
        f->run.top = f->tops;
    }
}

/* Prompt logprobs: n_prompt - 1 entries. Arrays are the caller's to free. */
static int fill_prompt(Tandem__V1__PromptLogprobs *m, const td_prefill_job *j, float **ret_values,
                       Tandem__V1__TopLogprob **ret_tops, Tandem__V1__TopLogprob ***ret_list)
{
    size_t n = j->base.request.n_prompt - 1;
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
    m->logprobs = td_worker_bin(*ret_values, n * sizeof(float));
    if (j->base.request.n_top) {
        m->n_top = n;
        m->top = *ret_list;
    }
    return 0;
}

static int send_reply(td_prefill_job *j)
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
    m.prompt_tokens = (uint32_t)j->base.request.n_prompt;
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
        r = td_host_send(j->base.call, &m.base);
    free(values);
    free(tops);
    free(top_list);
    return r;
}

static void log_end(const td_prefill_job *j)
{
    td_str id = td_call_request_id(j->base.call);
    if (td_log_enabled(TD_LOG_DEBUG))
        td_log(TD_LOG_DEBUG, "prefill_end",
               "request_id=\"%.*s\" tokens=%zu cached=%u sent_blocks=%u queue_us=%llu us=%llu",
               (int)id.len, id.ptr, j->base.request.n_prompt, j->cached_tokens, j->sent_blocks,
               (unsigned long long)j->queue_us, (unsigned long long)j->prefill_us);
}

/* The first tokens leave before the blocks have arrived; the STATUS follows when they have. */
static void reply(td_worker_desk *d, td_prefill_job *j)
{
    int r = send_reply(j);
    if (r < 0 && r != -ECANCELED)
        td_worker_desk_cancel(d, &j->base, td_code_from_errno(r));
}

static void on_msg(td_worker_desk *d, td_msg *m)
{
    td_prefill_job *j = ((td_worker_msg_of *)m)->job;
    if (m->kind == TD_PREFILL_REPLY) {
        reply(d, j);
    } else if (m->kind == TD_WORKER_END) {
        log_end(j);
        td_worker_desk_end(d, &j->base, "prefill_failed", TD_LOG_WARN);
    }
}

void td_prefill_desk_init(td_prefill_desk *d)
{
    static const td_worker_desk_ops ops = {.method = "tandem.v1.Engine/Prefill",
                                           .no_method =
                                               "a prefill worker does not serve this method",
                                           .job_new = job_new,
                                           .job_read = job_read,
                                           .job_free = job_free,
                                           .on_msg = on_msg};
    d->base.ops = &ops;
}
