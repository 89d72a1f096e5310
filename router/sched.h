/* SPDX-License-Identifier: Apache-2.0 */
/* Which pair serves a request: the least loaded decode worker that has room, then the least loaded
 * prefill worker whose blocks it can read. Pure. What is "room": blocks in use or promised on the
 * worker now, plus all that this request may grow to, at most the worker's pool (a promise that is
 * kept needs no preemption). */
#ifndef TD_ROUTER_SCHED_H
#define TD_ROUTER_SCHED_H

#include <stdint.h>

/* Prompt tokens that may wait on one prefill worker, two of the largest chunks; the rest waits
 * here, where it can still go elsewhere. */
enum { TD_SCHED_PREFILL_TOKENS = 16384 };

/* A worker as the scheduler sees it. */
typedef struct td_sched_worker {
    uint64_t id; /* grows with each admission; never reused */
    int is_decode, ready, draining;
    uint8_t profile_id[16], layout_hash[16], model_hash[32];
    uint32_t kv_blocks, max_seqs, max_context;
    /* what this router has put there and has not seen the end of */
    uint32_t sent_requests, sent_seqs, sent_blocks;
    uint64_t sent_tokens; /* prompt tokens not known to be prefilled */
    /* what the last load report tells beyond that: put there by other routers */
    uint32_t other_blocks, other_running;
    uint64_t other_tokens;
} td_sched_worker;

typedef struct td_sched_need {
    uint32_t n_prompt, n_choices,
        max_tokens;         /* max_tokens per choice, counted from the prompt's end */
    int alone;              /* prefill worker only */
    const uint64_t *failed; /* workers that failed this request: last resort */
    uint32_t n_failed;
    const uint8_t *profile_id, *model_hash; /* a resumed request stays with these; NULL = any */
} td_sched_need;

typedef enum td_sched_verdict {
    TD_SCHED_OK = 0,
    TD_SCHED_BUSY,       /* room will come: wait */
    TD_SCHED_NO_PREFILL, /* no worker of that role (or none that fits the other one) takes requests
                          */
    TD_SCHED_NO_DECODE,
    TD_SCHED_TOO_LONG /* larger than any worker's whole pool */
} td_sched_verdict;

/* KV blocks a request can grow to: whole prompt blocks shared by the choices, the rest per choice.
 */
uint64_t td_sched_blocks(uint32_t n_prompt, uint32_t n_choices, uint32_t max_tokens);

/* Take a load report: blocks in use, sequences (or prompts) running, prompt tokens waiting. */
void td_sched_seen(td_sched_worker *w, uint32_t used_blocks, uint32_t running,
                   uint64_t waiting_tokens);

/* workers: n of them, any order. *ret_decode is UINT32_MAX when need->alone. Indices into workers;
 * set on OK only. */
td_sched_verdict td_sched_choose(const td_sched_worker *const *workers, uint32_t n,
                                 const td_sched_need *need, uint32_t *ret_decode,
                                 uint32_t *ret_prefill);

#endif
