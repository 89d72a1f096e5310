/* SPDX-License-Identifier: Apache-2.0 */
#include "router/dispatch.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/bug.h"
#include "base/clock.h"
#include "base/hash.h"
#include "base/log.h"
#include "router/dispatch_int.h"
#include "base/banned.h"

enum { SCRATCH_BYTES_MAX = 256 << 20, PING_MS = 250, DEAD_MS = 1000 };

/* ---- queue ---- */

static td_gen *gen_of(td_admit_entry *e)
{
    return TD_LIST_ENTRY(e, td_gen, entry);
}

static td_sched_need need_of(const td_gen *g)
{
    return (td_sched_need){
        .n_prompt = (uint32_t)g->spec.n_prompt,
        .n_choices = g->spec.n,
        .max_tokens = g->spec.max_tokens,
        .alone = td_life_is_alone(&g->life),
        .failed = g->failed,
        .n_failed = g->n_failed,
        .profile_id = g->has_profile ? g->profile_id : NULL,
        .model_hash =
            g->dispatch->registry.have_model_hash ? g->dispatch->registry.model_hash : NULL,
    };
}

static td_sched_verdict choose(const td_gen *g, uint32_t *ret_decode, uint32_t *ret_prefill)
{
    td_registry *r = &g->dispatch->registry;
    td_sched_need need = need_of(g);
    return td_sched_choose(r->view, r->n, &need, ret_decode, ret_prefill);
}

/* What a request hears that found nobody. */
static td_error missing_error(const td_gen *g, td_sched_verdict v)
{
    if (td_life_is_resume(&g->life))
        return TD_ERROR_WORKER_LOST;
    if (v == TD_SCHED_NO_DECODE)
        return TD_ERROR_NO_DECODE;
    if (v == TD_SCHED_NO_PREFILL)
        return TD_ERROR_NO_PREFILL;
    return v == TD_SCHED_TOO_LONG ? TD_ERROR_CONTEXT_LENGTH : TD_ERROR_OVERLOADED;
}

/* A queued request waits as long as its deadline allows while its roles are there, and a short
 * grace while one is missing. */
static void set_expiry(td_gen *g, uint64_t now)
{
    uint32_t a, b;
    td_sched_verdict v = choose(g, &a, &b);
    uint64_t deadline = g->life.config.deadline_us;
    if (v == TD_SCHED_OK || v == TD_SCHED_BUSY)
        g->entry.expires_us = deadline;
    else if (g->entry.expires_us == deadline || g->entry.expires_us > now + TD_DISPATCH_GRACE_US)
        g->entry.expires_us =
            TD_MIN(deadline, v == TD_SCHED_TOO_LONG ? now : now + TD_DISPATCH_GRACE_US);
}

static void on_workers_changed(td_dispatch *d)
{
    uint64_t now = td_now_us();
    for (td_list *l = d->gens.next; l != &d->gens; l = l->next) {
        td_gen *g = TD_LIST_ENTRY(l, td_gen, link);
        if (g->entry.queued)
            set_expiry(g, now);
    }
    td_loop_after(d->loop, &d->after);
}

void td_dispatch_queue(td_gen *g, uint64_t at_us)
{
    td_dispatch *d = g->dispatch;
    uint64_t now = td_now_us();
    g->queued_us = now;
    g->entry.not_before_us = at_us;
    g->entry.expires_us = g->life.config.deadline_us;
    if (g->life.attempt > 1)
        td_admit_push_moved(&d->admit, &g->entry);
    else
        TD_BUG_ON(td_admit_push(&d->admit, &g->entry) < 0); /* submit looked */
    set_expiry(g, now);
    td_loop_after(d->loop, &d->after);
}

static void remember_profile(td_gen *g, const td_sched_worker *w)
{
    memcpy(g->profile_id, w->profile_id, 16);
    memcpy(g->usage.profile_id, w->profile_id, 16);
    g->has_profile = 1;
}

static td_sched_verdict place(td_gen *g)
{
    td_dispatch *d = g->dispatch;
    td_registry *r = &d->registry;
    uint32_t decode, prefill;
    td_sched_verdict v = choose(g, &decode, &prefill);
    if (v != TD_SCHED_OK)
        return v;
    td_life_event ev = {.kind = TD_LIFE_EV_PAIR};
    td_arena_reset(&d->scratch); /* a turn may place many; nothing of the last one is borrowed */
    td_admit_take(&d->admit, &g->entry);
    uint64_t waited = td_now_us() - g->queued_us;
    g->usage.queue_us += waited;
    td_histogram_add(d->stats.queue_time, (double)waited / 1e6);
    int e = decode == UINT32_MAX ? 0 : td_leg_plan(g, TD_LEG_DECODE, r->workers[decode]);
    if (e == 0)
        e = td_leg_plan(g, TD_LEG_PREFILL, r->workers[prefill]);
    if (e < 0)
        ev = (td_life_event){.kind = TD_LIFE_EV_CANCEL, .error = TD_ERROR_INTERNAL};
    else
        remember_profile(g, r->view[prefill]);
    td_gen_step(g, &ev, NULL);
    return TD_SCHED_OK;
}

static void expire(td_dispatch *d, uint64_t now)
{
    td_admit_entry *e;
    while ((e = td_admit_expired(&d->admit, now))) {
        td_gen *g = gen_of(e);
        uint32_t a, b;
        td_life_event ev = {.kind = TD_LIFE_EV_EXPIRED,
                            .error = missing_error(g, choose(g, &a, &b))};
        td_admit_remove(&d->admit, e);
        td_gen_step(g, &ev, NULL);
    }
}

static void on_wake(void *arg)
{
    td_dispatch *d = arg;
    d->wake_us = 0;
    td_loop_after(d->loop, &d->after);
}

static void set_wake(td_dispatch *d, uint64_t now)
{
    uint64_t at = td_admit_wake_us(&d->admit, now);
    if (at == UINT64_MAX || at == d->wake_us)
        return;
    d->wake_us = at;
    td_timer_set(d->wake, at > now ? at - now : 0);
}

/* Place what can be placed. Moved requests go first, each on its own; of new ones the first that
 * finds no room holds up those behind it, so that a large request is not overtaken for ever. */
static void pump(td_dispatch *d)
{
    uint64_t now = td_now_us();
    if (!td_admit_len(&d->admit))
        return;
    td_registry_refresh(&d->registry);
    expire(d, now);
    td_admit_entry *e = td_admit_moved_after(&d->admit, NULL, now);
    while (e) {
        td_admit_entry *next = td_admit_moved_after(&d->admit, e, now);
        place(gen_of(e));
        e = next;
    }
    while ((e = td_admit_next(&d->admit, now)))
        if (place(gen_of(e)) != TD_SCHED_OK)
            break;
    set_wake(d, now);
}

/* ---- the end of a loop's turn ---- */

static void flush(td_dispatch *d)
{
    while (!td_list_empty(&d->dirty)) {
        td_gen *g = TD_LIST_ENTRY(d->dirty.next, td_gen, dirty_link);
        td_list_del(&g->dirty_link);
        if (g->ops.on_flush)
            g->ops.on_flush(g->arg);
    }
}

static void call_ends(td_dispatch *d)
{
    while (!td_list_empty(&d->ended)) {
        td_gen *g = TD_LIST_ENTRY(d->ended.next, td_gen, ended_link);
        td_list_del(&g->ended_link);
        td_gen_call_end(g);
        td_gen_release(g);
    }
}

static void tell_idle(td_dispatch *d)
{
    if (!d->draining || d->n_live || !d->on_idle)
        return;
    void (*fn)(void *) = d->on_idle;
    d->on_idle = NULL;
    fn(d->on_idle_arg);
}

static void on_after(void *arg)
{
    td_dispatch *d = arg;
    td_arena_reset(&d->scratch);
    flush(d);
    pump(d);
    call_ends(d);
    tell_idle(d);
}

/* ---- workers ---- */

static int on_hello(void *arg, td_session *s, const struct Tandem__V1__Hello *hello,
                    td_err *reterr_err)
{
    td_dispatch *d = arg;
    td_worker *w;
    td_err err = {0};
    int e = td_registry_admit(&d->registry, s, hello, &w, &err);
    if (e < 0) {
        td_counter_add(d->stats.refused_workers, 1);
        td_log(TD_LOG_WARN, "worker_refused", "why=\"%s\"", err.text);
        return td_err_set(reterr_err, e, "%s", err.text);
    }
    td_session_set_user(s, w);
    return 0;
}

static void on_up(void *arg, td_session *s)
{
    td_dispatch *d = arg;
    td_worker *w = td_session_user(s);
    if (!w)
        return;
    td_registry_ready(&d->registry, w);
    td_log(TD_LOG_INFO, "worker_up", "worker=%s role=%s kv_blocks=%u", w->name,
           w->sched.is_decode ? "decode" : "prefill", w->sched.kv_blocks);
    on_workers_changed(d);
}

static void on_down(void *arg, td_session *s, const char *reason)
{
    td_dispatch *d = arg;
    td_worker *w = td_session_user(s);
    if (!w)
        return;
    int orderly = d->draining || d->closing || td_session_is_draining(s);
    td_log(orderly ? TD_LOG_INFO : TD_LOG_WARN, "worker_down", "worker=%s role=%s reason=\"%s\"",
           w->name, w->sched.is_decode ? "decode" : "prefill", reason);
    td_session_set_user(s, NULL);
    td_registry_remove(&d->registry, w);
    if (!d->closing)
        on_workers_changed(d);
}

static void on_load(void *arg, td_session *s, const struct Tandem__V1__Load *load)
{
    td_dispatch *d = arg;
    td_worker *w = td_session_user(s);
    if (!w)
        return;
    int was = w->sched.draining;
    td_registry_load(w, load, td_now_us());
    w->sched.draining |= td_session_is_draining(s);
    if (was != w->sched.draining)
        on_workers_changed(d);
    else if (td_admit_len(&d->admit))
        td_loop_after(d->loop, &d->after);
}

static void on_batch_end(void *arg, td_session *s)
{
    flush(arg);
}

/* ---- open and close ---- */

static void dispatch_free(td_dispatch *d)
{
    if (d->after.fn)
        td_loop_after_del(d->loop, &d->after);
    td_timer_del(d->wake);
    td_registry_done(&d->registry);
    td_admit_done(&d->admit);
    td_map_done(&d->by_id);
    td_arena_done(&d->scratch);
    td_strbuf_done(&d->pack);
    free(d);
}

static int open_parts(td_dispatch *d, td_err *reterr_err)
{
    uint64_t seed;
    td_random_bytes(&seed, sizeof seed);
    td_random_bytes(d->epoch, sizeof d->epoch);
    if (td_admit_init(&d->admit, d->config.max_queue, seed) < 0 || td_stats_open(d) < 0 ||
        td_timer_add(d->loop, 0, 0, on_wake, d, &d->wake) < 0)
        return td_err_set(reterr_err, -ENOMEM, "router: out of memory");
    td_rpc_config c = {
        .endpoint = d->config.control,
        .link = d->config.link,
        .door = TD_DOOR_CONTROL,
        .epoch = {0},
        .ping_ms = PING_MS,
        .dead_ms = DEAD_MS,
        .ops = {.on_hello = on_hello,
                .on_up = on_up,
                .on_down = on_down,
                .on_load = on_load,
                .on_batch_end = on_batch_end},
        .arg = d,
    };
    memcpy(c.epoch, d->epoch, sizeof c.epoch);
    return td_rpc_open(d->loop, &c, &d->rpc, reterr_err);
}

int td_dispatch_open(td_loop *l, const td_dispatch_config *config, td_dispatch **ret_dispatch,
                     td_err *reterr_err)
{
    td_dispatch *d = calloc(1, sizeof *d);
    if (!d)
        return td_err_set(reterr_err, -ENOMEM, "router: out of memory");
    d->loop = l;
    d->config = *config;
    d->after = (td_after){.fn = on_after, .arg = d};
    td_list_init(&d->gens);
    td_list_init(&d->dirty);
    td_list_init(&d->ended);
    td_map_init(&d->by_id);
    td_arena_init(&d->scratch, SCRATCH_BYTES_MAX);
    td_strbuf_init(&d->pack);
    td_registry_init(&d->registry);
    d->registry.metrics = config->metrics;
    memcpy(d->registry.config_hash, config->config_hash, 32);
    memcpy(d->registry.tokenizer_hash, config->tokenizer_hash, 32);
    memcpy(d->registry.model_hash, config->model_hash, 32);
    d->registry.have_model_hash = config->have_model_hash;
    int e = open_parts(d, reterr_err);
    if (e < 0) {
        dispatch_free(d);
        return e;
    }
    *ret_dispatch = d;
    return 0;
}

void td_dispatch_close(td_dispatch *d)
{
    if (!d)
        return;
    d->draining = d->closing = 1;
    TD_LIST_FOR (l, &d->gens) {
        td_life_event ev = {.kind = TD_LIFE_EV_CANCEL, .error = TD_ERROR_DRAINING};
        td_gen_step(TD_LIST_ENTRY(l, td_gen, link), &ev, NULL);
    }
    flush(d);
    call_ends(d);
    td_rpc_close(d->rpc); /* the STATUS of each open call frees its request */
    TD_BUG_ON(!td_list_empty(&d->gens));
    dispatch_free(d);
}

const char *td_dispatch_endpoint(const td_dispatch *d)
{
    return td_rpc_endpoint(d->rpc);
}

void td_dispatch_drain(td_dispatch *d, void (*on_idle)(void *arg), void *arg)
{
    d->draining = 1;
    d->on_idle = on_idle;
    d->on_idle_arg = arg;
    td_loop_after(d->loop, &d->after);
}

void td_dispatch_get_state(const td_dispatch *d, td_dispatch_state *ret_state)
{
    td_dispatch_state s = {
        .n_prefill = td_registry_count(&d->registry, 0),
        .n_decode = td_registry_count(&d->registry, 1),
        .n_queued = td_admit_len(&d->admit),
        .max_context = td_registry_max_context(&d->registry, d->config.max_context),
    };
    s.n_running = d->n_live - s.n_queued;
    s.ready = !d->draining && s.n_prefill && s.n_decode;
    if (d->registry.n)
        memcpy(s.profile_id, d->registry.profile_id, 16);
    if (d->registry.have_model_hash)
        memcpy(s.model_hash, d->registry.model_hash, 32);
    *ret_state = s;
}

void td_dispatch_update_metrics(td_dispatch *d)
{
    td_stats_update(d);
}

/* ---- submit ---- */

static const void *copy(td_arena *a, const void *p, size_t n)
{
    void *q = td_arena_alloc(a, n);
    if (q && n)
        memcpy(q, p, n);
    return q;
}

static int copy_spec(td_gen *g, const td_gen_spec *s)
{
    td_arena *a = &g->arena;
    g->spec = *s;
    g->spec.request_id.ptr = copy(a, s->request_id.ptr, s->request_id.len);
    g->spec.tenant.ptr = copy(a, s->tenant.ptr, s->tenant.len);
    g->spec.prompt = copy(a, s->prompt, s->n_prompt * sizeof *s->prompt);
    g->spec.bias = copy(a, s->bias, s->n_bias * sizeof *s->bias);
    g->spec.stop_ids = copy(a, s->stop_ids, s->n_stop_ids * sizeof *s->stop_ids);
    g->emitted = td_arena_alloc_array(a, s->n, sizeof *g->emitted);
    return td_arena_failed(a) ? -ENOMEM : 0;
}

static uint64_t hash_of(td_str s)
{
    uint8_t h[16];
    uint64_t v;
    td_xxh128(s.ptr, s.len, h);
    memcpy(&v, h, sizeof v);
    return v;
}

static td_gen *new_gen(td_dispatch *d, const td_gen_spec *spec, const td_gen_ops *ops, void *arg)
{
    td_gen *g = calloc(1, sizeof *g);
    if (!g)
        return NULL;
    g->dispatch = d;
    td_list_init(&g->link);
    td_list_init(&g->dirty_link);
    td_list_init(&g->ended_link);
    g->held_end = &g->held;
    td_arena_init(&g->arena, 0);
    g->ops = *ops;
    g->arg = arg;
    g->submitted_us = td_now_us();
    g->id_hash = hash_of(spec->request_id);
    g->entry.tenant = hash_of(spec->tenant);
    g->entry.priority = spec->priority;
    g->usage.prompt_tokens = (uint32_t)spec->n_prompt;
    td_life_config c = {.n_choices = spec->n,
                        .max_tokens = spec->max_tokens,
                        .deadline_us = g->submitted_us + spec->timeout_us,
                        .stall_us = d->config.stall_us,
                        .allow_local = d->config.local_tokens && !spec->prompt_logprobs};
    td_life_init(&g->life, &c);
    if (copy_spec(g, spec) < 0 || td_map_put(&d->by_id, g->id_hash, g, NULL) < 0) {
        td_gen_free(g);
        return NULL;
    }
    td_list_add(&d->gens, &g->link);
    return g;
}

/* Why a request cannot even wait. */
static td_error refusal(td_dispatch *d, const td_gen_spec *spec, td_err *reterr_err)
{
    td_sched_need need = {.n_prompt = (uint32_t)spec->n_prompt,
                          .n_choices = spec->n,
                          .max_tokens = spec->max_tokens,
                          .alone = spec->max_tokens == 1};
    uint32_t a, b;
    td_registry_refresh(&d->registry);
    if (d->draining)
        return TD_ERROR_DRAINING;
    if (td_map_get(&d->by_id, hash_of(spec->request_id)))
        return TD_ERROR_CONFLICT;
    switch (td_sched_choose(d->registry.view, d->registry.n, &need, &a, &b)) {
    case TD_SCHED_NO_PREFILL:
        return TD_ERROR_NO_PREFILL;
    case TD_SCHED_NO_DECODE:
        return TD_ERROR_NO_DECODE;
    case TD_SCHED_TOO_LONG:
        td_err_set(reterr_err, -E2BIG,
                   "%zu prompt tokens and up to %u more for each of %u choices are more KV than "
                   "any worker holds: shorten "
                   "the prompt or lower max_tokens",
                   spec->n_prompt, spec->max_tokens, spec->n);
        return TD_ERROR_CONTEXT_LENGTH;
    case TD_SCHED_OK:
    case TD_SCHED_BUSY:
        break;
    }
    return d->admit.n >= d->admit.max ? TD_ERROR_QUEUE_FULL : TD_ERROR_NONE;
}

static int refuse(td_dispatch *d, td_error error, td_error *ret_error, uint32_t *ret_retry_after_ms,
                  td_err *reterr_err)
{
    const td_error_info *info = td_error_get(error);
    int status_503 = info->http == 503 || info->http == 429;
    td_counter_add(d->stats.refused, 1);
    *ret_error = error;
    *ret_retry_after_ms = info->retryable && status_503 ? td_admit_retry_ms(&d->admit) : 0;
    if (error != TD_ERROR_CONTEXT_LENGTH)
        td_err_set(reterr_err, -EAGAIN, "%s: %s", info->text, info->remedy);
    return error == TD_ERROR_CONTEXT_LENGTH ? -E2BIG : -EAGAIN;
}

int td_dispatch_submit(td_dispatch *d, const td_gen_spec *spec, const td_gen_ops *ops, void *arg,
                       td_gen **ret_gen, td_error *ret_error, uint32_t *ret_retry_after_ms,
                       td_err *reterr_err)
{
    TD_BUG_ON(spec->n < 1 || spec->n > TD_LIFE_CHOICES_MAX || spec->n_prompt < 1 ||
              spec->n_prompt > UINT32_MAX || spec->max_tokens < 1);
    td_error error = refusal(d, spec, reterr_err);
    td_gen *g = error == TD_ERROR_NONE ? new_gen(d, spec, ops, arg) : NULL;
    if (!g)
        return refuse(d, error == TD_ERROR_NONE ? TD_ERROR_OVERLOADED : error, ret_error,
                      ret_retry_after_ms, reterr_err);
    d->n_live++;
    td_counter_add(d->stats.submitted, 1);
    td_counter_add(d->stats.prompt_tokens, spec->n_prompt);
    td_life_event ev = {.kind = TD_LIFE_EV_START};
    td_gen_step(g, &ev, NULL);
    *ret_gen = g;
    return 0;
}
