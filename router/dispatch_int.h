/* SPDX-License-Identifier: Apache-2.0 */
/* What the files of the dispatch shell share: dispatch.c (open, submit, queue), gen.c (a request's
 * actions), leg.c (calls to workers), wire.c (messages), stats.c (metrics). */
#ifndef TD_ROUTER_DISPATCH_INT_H
#define TD_ROUTER_DISPATCH_INT_H

#include "base/arena.h"
#include "base/list.h"
#include "base/map.h"
#include "proto/engine.pb-c.h"
#include "router/admit.h"
#include "router/dispatch.h"
#include "router/life.h"
#include "router/registry.h"
#include "rpc/rpc.h"

enum {
    TD_GEN_FAILED_MAX = TD_LIFE_REDISPATCH_MAX + 1,
    /* how long requests outlive the last worker of a role: a restart under systemd takes less */
    TD_DISPATCH_GRACE_US = 2000000
};

typedef struct td_dispatch_stats {
    td_gauge *running, *waiting, *prefill_workers, *decode_workers;
    td_counter *submitted, *refused, *redispatch[2], *no_room, *nondeterminism, *refused_workers,
        *late_frames, *bad_frames, *stale_events, *sessions_lost, *prompt_tokens,
        *generation_tokens, *cached_tokens, *kv_bytes, *local_prefills, *local_tokens;
    td_counter *ended[TD_ERROR_MAX];
    td_histogram *queue_time, *ttft, *itl, *request_time, *prefill_time, *kv_time;
    uint64_t seen_late, seen_bad, seen_lost;
} td_dispatch_stats;

struct td_dispatch {
    td_loop *loop;
    td_rpc *rpc;
    td_dispatch_config config; /* strings are not used after open */
    uint8_t epoch[16];
    td_registry registry;
    td_admit admit;
    td_map by_id;    /* hash of request_id -> td_gen */
    td_list gens;    /* all that exist */
    td_list dirty;   /* delivered since the last flush */
    td_list ended;   /* on_end is owed */
    uint32_t n_live; /* on_end not called yet */
    td_after after;  /* flush and on_end at the end of the loop's turn */
    td_timer *wake;  /* queue expiry and back-off */
    uint64_t wake_us;
    td_arena scratch; /* one unpacked message */
    td_strbuf pack;   /* one packed message */
    int draining, closing, said_local;
    void (*on_idle)(void *arg);
    void *on_idle_arg;
    td_dispatch_stats stats;
};

/* A held event: a TokenRun of the decode worker packed again, or its OK. */
typedef struct td_gen_held {
    struct td_gen_held *next;
    uint32_t attempt;
    size_t n; /* 0: STATUS OK */
    uint8_t bytes[];
} td_gen_held;

/* One call to one worker for one attempt, counted on the worker from the moment the pair is chosen.
 * Once started it outlives its request's interest: it ends with the call's STATUS. */
typedef struct td_gen_leg {
    td_gen *gen;
    td_leg kind;
    uint32_t attempt;
    uint64_t worker;               /* id: the worker may leave before the call is started */
    td_call *call;                 /* NULL: not started */
    uint32_t seqs, blocks, tokens; /* what was counted on the worker */
} td_gen_leg;

/* Ids of a choice as delivered, for a next attempt. */
typedef struct td_gen_emitted {
    uint32_t *ids;
    uint32_t n, cap;
} td_gen_emitted;

struct td_gen {
    td_dispatch *dispatch;
    td_list link, dirty_link, ended_link;
    td_gen_spec spec; /* pointers into arena */
    td_arena arena;
    td_gen_ops ops;
    void *arg;
    uint64_t id_hash;
    td_life life;
    td_timer *timer;
    td_admit_entry entry;
    td_gen_leg *leg[2]; /* of the current attempt */
    uint64_t pair[2];   /* ids of its workers */
    uint32_t n_legs;    /* of all attempts */
    uint64_t failed[TD_GEN_FAILED_MAX];
    uint32_t n_failed;
    uint8_t profile_id[16];
    int has_profile;
    const struct Tandem__V1__Ticket *ticket; /* during the step that asks for the prefill */
    td_gen_held *held, **held_end;
    td_gen_emitted *emitted;
    td_gen_usage usage;
    uint32_t local_tokens; /* what the decode worker said that it prefills, during that step */
    uint64_t submitted_us, queued_us, last_token_us;
    int prompt_sent, ended, on_end_done;
    int depth; /* of nested steps */
    int want_cancel;
    uint32_t want_end_choices; /* bits */
    td_error error;
    char why[200]; /* what the last failing worker said */
};

/* dispatch.c */
/* Wait for a pair; not before at_us. */
void td_dispatch_queue(td_gen *g, uint64_t at_us);

/* gen.c */
/* runs: parallel to ev->runs, for deliveries; may be NULL. May end g, never frees it. */
void td_gen_step(td_gen *g, const td_life_event *ev, const td_gen_run *runs);
/* Frees g when nothing refers to it any more. */
void td_gen_release(td_gen *g);
/* The one on_end. */
void td_gen_call_end(td_gen *g);
void td_gen_free(td_gen *g);

/* leg.c */
/* Count a leg of the current attempt on a worker. -ENOMEM. */
int td_leg_plan(td_gen *g, td_leg kind, td_worker *w);
/* Start the planned call. Negative errno when it cannot be started: the leg stays planned. */
int td_leg_start(td_gen *g, td_leg kind);
void td_leg_cancel(td_gen *g, td_leg kind);
/* Let go of what was planned and not started. */
void td_leg_drop(td_gen *g);
/* Feed one TokenRun of the decode worker. */
void td_leg_feed_run(td_gen *g, uint32_t attempt, const struct Tandem__V1__TokenRun *m);

/* wire.c: build into d->pack. */
int td_wire_pack_reserve(td_gen *g);
int td_wire_pack_prefill(td_gen *g);
/* View of one TokenRun: *ret_life and *ret_run point into m and d->scratch. -EBADMSG. */
int td_wire_run(td_gen *g, const struct Tandem__V1__TokenRun *m, td_life_run *ret_life,
                td_gen_run *ret_run);
/* Prompt logprobs into d->scratch; n entries. -EBADMSG. */
int td_wire_prompt(td_gen *g, const struct Tandem__V1__PromptLogprobs *m,
                   const float **ret_logprobs, const td_gen_top **ret_top);
/* Allocator over d->scratch for protobuf-c. */
ProtobufCAllocator td_wire_allocator(td_dispatch *d);

/* stats.c */
int td_stats_open(td_dispatch *d);
void td_stats_update(td_dispatch *d);

#endif
