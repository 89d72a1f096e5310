/* SPDX-License-Identifier: Apache-2.0 */
/* Metrics of the dispatch shell. All times are differences of this router's own clock, but prefill
 * and transfer times, which are the workers' own. */
#include <errno.h>
#include <stdio.h>

#include "router/dispatch_int.h"
#include "base/banned.h"

static const double buckets_transfer[] = {.0001, .00025, .0005, .001, .0025, .005, .01, .025,
                                          .05,   .1,     .25,   .5,   1,     2.5,  10};

static int open_counters(td_dispatch *d)
{
    td_dispatch_stats *s = &d->stats;
    td_metrics *m = d->config.metrics;
    const struct {
        td_counter **c;
        const char *name, *labels, *help;
    } rows[] = {
        {&s->submitted, "requests_admitted_total", "", "Requests that entered the queue"},
        {&s->refused, "requests_refused_total", "",
         "Requests refused at once (queue full, role missing, draining)"},
        {&s->redispatch[TD_LEG_PREFILL], "redispatch_total", "pool=\"prefill\"",
         "Attempts that a failing worker of the pool ended"},
        {&s->redispatch[TD_LEG_DECODE], "redispatch_total", "pool=\"decode\"",
         "Attempts that a failing worker of the pool ended"},
        {&s->no_room, "worker_no_room_total", "", "Attempts that a worker answered with no room"},
        {&s->nondeterminism, "nondeterminism_total", "",
         "Recoveries whose resampled token differed from the one sent"},
        {&s->refused_workers, "refused_workers_total", "", "Workers refused at HELLO"},
        {&s->late_frames, "late_frames_total", "",
         "Frames of ended streams or older sessions, dropped"},
        {&s->bad_frames, "bad_frames_total", "", "Malformed or unroutable frames, dropped"},
        {&s->stale_events, "stale_events_total", "",
         "Messages of an attempt that was given up, dropped"},
        {&s->sessions_lost, "worker_sessions_lost_total", "",
         "Worker sessions that ended without a farewell"},
        {&s->prompt_tokens, "prompt_tokens_total", "", "Prompt tokens of admitted requests"},
        {&s->generation_tokens, "generation_tokens_total", "", "Tokens delivered"},
        {&s->cached_tokens, "cached_tokens_total", "",
         "Prompt tokens found in the cache of the worker that prefilled"},
        {&s->local_prefills, "local_prefills_total", "",
         "Attempts that a decode worker prefilled by itself (--local-prefill-tokens)"},
        {&s->local_tokens, "local_prefill_tokens_total", "",
         "Prompt tokens that decode workers prefilled"},
        {&s->kv_bytes, "kv_transfer_bytes_total", "",
         "KV bytes handed from prefill to decode workers"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        *rows[i].c = td_counter_new(m, rows[i].name, rows[i].labels, rows[i].help);
        if (!*rows[i].c)
            return -ENOMEM;
    }
    for (int e = 0; e < TD_ERROR_MAX; e++) {
        char label[80];
        snprintf(label, sizeof label, "error=\"%s\"",
                 e == TD_ERROR_NONE ? "none" : td_error_get((td_error)e)->name);
        s->ended[e] =
            td_counter_new(m, "requests_ended_total", label, "Admitted requests by how they ended");
        if (!s->ended[e])
            return -ENOMEM;
    }
    return 0;
}

static int open_histograms(td_dispatch *d)
{
    td_dispatch_stats *s = &d->stats;
    const struct {
        td_histogram **h;
        const char *name, *help;
        const double *bounds;
        uint32_t n;
    } rows[] = {
        {&s->queue_time, "request_queue_time_seconds", "From admission to the choice of a pair",
         td_buckets_ttft, td_n_buckets_ttft},
        {&s->ttft, "time_to_first_token_seconds", "From admission to the first token",
         td_buckets_ttft, td_n_buckets_ttft},
        {&s->itl, "inter_token_latency_seconds", "Between tokens of a request", td_buckets_itl,
         td_n_buckets_itl},
        {&s->request_time, "request_time_seconds", "From admission to the end", td_buckets_request,
         td_n_buckets_request},
        {&s->prefill_time, "prefill_time_seconds", "Computing a prompt, as the worker measured it",
         td_buckets_ttft, td_n_buckets_ttft},
        {&s->kv_time, "kv_transfer_seconds",
         "First to last KV segment, as the decode worker measured it", buckets_transfer,
         sizeof buckets_transfer / sizeof *buckets_transfer},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        *rows[i].h = td_histogram_new(d->config.metrics, rows[i].name, "", rows[i].help,
                                      rows[i].bounds, rows[i].n);
        if (!*rows[i].h)
            return -ENOMEM;
    }
    return 0;
}

int td_stats_open(td_dispatch *d)
{
    td_dispatch_stats *s = &d->stats;
    td_metrics *m = d->config.metrics;
    s->running = td_gauge_new(m, "requests_running", "", "Requests on workers");
    s->waiting =
        td_gauge_new(m, "requests_waiting", "", "Requests that wait for a pair of workers");
    s->prefill_workers =
        td_gauge_new(m, "workers_ready", "pool=\"prefill\"", "Workers that take new requests");
    s->decode_workers =
        td_gauge_new(m, "workers_ready", "pool=\"decode\"", "Workers that take new requests");
    if (!s->running || !s->waiting || !s->prefill_workers || !s->decode_workers)
        return -ENOMEM;
    int e = open_counters(d);
    return e < 0 ? e : open_histograms(d);
}

static void add_delta(td_counter *c, uint64_t now, uint64_t *seen)
{
    td_counter_add(c, now - *seen);
    *seen = now;
}

void td_stats_update(td_dispatch *d)
{
    td_dispatch_stats *s = &d->stats;
    td_rpc_stats r;
    uint32_t waiting = td_admit_len(&d->admit);
    td_rpc_get_stats(d->rpc, &r);
    add_delta(s->late_frames, r.late_frames, &s->seen_late);
    add_delta(s->bad_frames, r.bad_frames + r.unroutable, &s->seen_bad);
    add_delta(s->sessions_lost, r.sessions_lost, &s->seen_lost);
    td_gauge_set(s->waiting, waiting);
    td_gauge_set(s->running, d->n_live - waiting);
    td_gauge_set(s->prefill_workers, td_registry_count(&d->registry, 0));
    td_gauge_set(s->decode_workers, td_registry_count(&d->registry, 1));
    td_registry_update_metrics(&d->registry);
}
