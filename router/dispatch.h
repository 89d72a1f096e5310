/* SPDX-License-Identifier: Apache-2.0 */
/* From a tokenized request to a stream of tokens: the shell that runs the request life cycle
 * (router/life.h, pure) with the scheduler (router/sched.h, pure), admission (router/admit.h, pure)
 * and the worker registry over rpc. Knows no HTTP and no text. Loop thread only.
 *
 * Invariants: every submitted request gets its tokens once, in order, per choice, and exactly one
 * on_end. */
#ifndef TD_ROUTER_DISPATCH_H
#define TD_ROUTER_DISPATCH_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "base/strbuf.h"
#include "net/loop.h"
#include "net/metrics.h"
#include "rpc/link.h"

typedef struct td_dispatch td_dispatch;
typedef struct td_gen td_gen;

/* What a request asks of the workers. Everything is copied by submit. */
typedef struct td_gen_bias {
    uint32_t id;
    float bias;
} td_gen_bias;

typedef struct td_gen_spec {
    td_str request_id; /* <= 64 bytes, unique among running requests */
    td_str tenant;
    const uint32_t *prompt;
    size_t n_prompt;                 /* >= 1 */
    uint32_t n;                      /* choices, 1..16 */
    uint32_t max_tokens, min_tokens; /* per choice; 1 <= max_tokens, prompt + max_tokens <=
                                        max_context (the caller's check) */
    int ignore_eos;
    float temperature, top_p, min_p, frequency_penalty, presence_penalty, repetition_penalty;
    uint32_t top_k;
    uint64_t seed;
    const td_gen_bias *bias;
    uint32_t n_bias;
    const uint32_t *stop_ids;
    uint32_t n_stop_ids;
    int logprobs;
    uint32_t top_logprobs;
    int prompt_logprobs;
    uint8_t prefix_key[32];
    int priority;
    uint64_t timeout_us; /* whole request */
    int client_deadline; /* the timeout was the client's wish: DEADLINE reads 408, else 504-like */
} td_gen_spec;

typedef struct td_gen_top {
    const uint32_t *ids;
    const float *logprobs;
    uint32_t n;
} td_gen_top;

/* n consecutive tokens of one choice; index counts emitted tokens of the choice from 0. logprobs
 * and top are NULL when not asked. Borrowed for the callback. finish: 0 none, 1 stop, 2 length
 * (with the last run of the choice). */
typedef struct td_gen_run {
    uint32_t choice, index;
    const uint32_t *ids;
    size_t n;
    const float *logprobs;
    const td_gen_top *top;
    int finish;
} td_gen_run;

typedef struct td_gen_usage {
    uint32_t prompt_tokens, cached_tokens; /* cached: prefix hits on the worker that prefilled */
    uint32_t completion_tokens;            /* over all choices, as delivered by workers */
    uint32_t local_tokens; /* prompt tokens that decode workers prefilled, over all attempts */
    uint64_t queue_us, prefill_us, transfer_us, transfer_bytes;
    uint32_t attempts;
    uint8_t profile_id[16];
} td_gen_usage;

typedef struct td_gen_ops {
    void (*on_run)(void *arg, const td_gen_run *run);
    /* Prompt logprobs arrive before any run: n_prompt - 1 entries, entry i belongs to prompt id i
     * + 1. */
    void (*on_prompt_logprobs)(void *arg, const float *logprobs, const td_gen_top *top, size_t n);
    /* Exactly once, also after cancel. error TD_ERROR_NONE when every choice finished. text may
     * refine the error. retry_after_ms 0 = none. The gen is freed afterwards. */
    void (*on_end)(void *arg, td_error error, const char *text, uint32_t retry_after_ms,
                   const td_gen_usage *usage);
    /* Optional: every delta of one engine step was delivered: flush now. */
    void (*on_flush)(void *arg);
} td_gen_ops;

/* Refuses at once (no callback) with a td_error in *ret_error and text: NO_PREFILL, NO_DECODE,
 * QUEUE_FULL, OVERLOADED, CONFLICT, DRAINING, CONTEXT_LENGTH (longer than any worker's pool can
 * hold). *ret_retry_after_ms is jittered 1..30 s for retryable ones. 0 on success: on_end will
 * follow, never from inside this function. */
int td_dispatch_submit(td_dispatch *d, const td_gen_spec *spec, const td_gen_ops *ops, void *arg,
                       td_gen **ret_gen, td_error *ret_error, uint32_t *ret_retry_after_ms,
                       td_err *reterr_err);
/* The client left or has enough (stop string): cancels on every worker; on_end follows from the
 * loop. */
void td_gen_cancel(td_gen *g);
/* One choice has ended for the client (stop string in that choice): its further runs are dropped;
 * when all choices are ended the request is cancelled on the workers and ends with TD_ERROR_NONE.
 */
void td_gen_end_choice(td_gen *g, uint32_t choice);

typedef struct td_dispatch_config {
    const char *control; /* endpoint to bind for workers */
    td_link *link;       /* keys; NULL: none. Outlives the dispatch */
    uint32_t max_queue;
    uint8_t config_hash[32],
        tokenizer_hash[32]; /* own files: a worker that differs is refused, naming both */
    int have_model_hash;
    uint8_t model_hash[32];
    uint32_t vocab_size, max_context;
    td_metrics *metrics;
    int strict;
    uint64_t stall_us; /* a worker that holds a request and stands still for so long has failed it;
                          0: the life cycle's default */
    uint32_t local_tokens; /* conditional split: a decode worker prefills by itself what it lacks of
                              a prompt when that is at most so many tokens; 0: never */
} td_dispatch_config;

int td_dispatch_open(td_loop *l, const td_dispatch_config *config, td_dispatch **ret_dispatch,
                     td_err *reterr_err);
/* Every running request ends (DRAINING) before this returns. */
void td_dispatch_close(td_dispatch *d);
const char *td_dispatch_endpoint(const td_dispatch *d);

/* New requests are refused with DRAINING from now on; on_idle runs (once) when none is left. */
void td_dispatch_drain(td_dispatch *d, void (*on_idle)(void *arg), void *arg);

typedef struct td_dispatch_state {
    uint32_t n_prefill, n_decode; /* admitted workers that take new requests */
    uint32_t n_running, n_queued;
    int ready;              /* at least one pair */
    uint8_t profile_id[16]; /* of the pool, zeros until a worker is admitted */
    uint8_t model_hash[32];
    uint32_t max_context; /* smallest of config and what a worker's pool can hold */
} td_dispatch_state;
void td_dispatch_get_state(const td_dispatch *d, td_dispatch_state *ret_state);

/* Refresh gauges (per worker rows) before a scrape. */
void td_dispatch_update_metrics(td_dispatch *d);

#endif
