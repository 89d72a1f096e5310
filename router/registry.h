/* SPDX-License-Identifier: Apache-2.0 */
/* The workers that this router has admitted: who they are, what they hold, what was put there. A
 * worker whose files, model or profile differ from ours is refused with a text that names both.
 * Loop thread. */
#ifndef TD_ROUTER_REGISTRY_H
#define TD_ROUTER_REGISTRY_H

#include <stdint.h>

#include "base/err.h"
#include "net/metrics.h"
#include "router/sched.h"
#include "rpc/rpc.h"

typedef struct td_worker {
    td_sched_worker sched;
    td_session *session; /* lives as long as the worker */
    char name[96];       /* unique among the admitted */
    uint8_t epoch[16];
    /* the last load report */
    uint32_t seen_kv_free, seen_running;
    uint64_t seen_waiting_tokens, seen_tokens_total, seen_step;
    uint64_t progress_us; /* when a report last told a new step; 0: never */
    td_gauge *running, *waiting_tokens, *kv_blocks, *kv_free, *draining;
    td_counter *tokens;
} td_worker;

typedef struct td_registry {
    uint8_t config_hash[32], tokenizer_hash[32];
    uint8_t model_hash[32]; /* of the pool: configured, or of the first worker admitted */
    int have_model_hash;
    uint8_t profile_id[16], layout_hash[16]; /* of the workers that are here; free when none is */
    char *profile;                           /* its text, heap; NULL: the first worker told none */
    td_worker **workers;
    const td_sched_worker **view; /* the same workers, for td_sched_choose() */
    uint32_t n, cap;
    uint64_t next_id;
    td_metrics *metrics; /* NULL: no rows per worker */
} td_registry;

void td_registry_init(td_registry *r);
void td_registry_done(td_registry *r);

/* Admit or refuse. The worker is not ready before td_registry_ready(). -EINVAL incomplete, -EPERM
 * differs, with text. */
int td_registry_admit(td_registry *r, td_session *s, const struct Tandem__V1__Hello *hello,
                      td_worker **ret_worker, td_err *reterr_err);
void td_registry_ready(td_registry *r, td_worker *w);
/* Frees w. */
void td_registry_remove(td_registry *r, td_worker *w);
/* Notice GOAWAYs since the last load reports. */
void td_registry_refresh(td_registry *r);
void td_registry_load(td_worker *w, const struct Tandem__V1__Load *load, uint64_t now_us);
/* NULL when it has left. */
td_worker *td_registry_find(const td_registry *r, uint64_t id);
/* Workers of a role that take new requests. */
uint32_t td_registry_count(const td_registry *r, int is_decode);
/* Longest prompt + answer that some pair can hold, at most limit; limit when no worker is here. */
uint32_t td_registry_max_context(const td_registry *r, uint32_t limit);
void td_registry_update_metrics(td_registry *r);

#endif
