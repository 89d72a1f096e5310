/* SPDX-License-Identifier: Apache-2.0 */
/* Admission to a decode worker, the choice of who runs in the next step, and the conditional split:
 * a prompt of which the worker lacks little is prefilled here, a chunk a step beside the running
 * streams, so that a stream never waits longer for its next token than one chunk takes. Pure: no
 * clock, no allocation.
 *
 * Admission reserves the worst case: every block that the prompt and max_tokens of each choice can
 * come to need is taken when the request is admitted, so an admitted stream never runs out of
 * memory, is never preempted and never moved. What does not fit is refused at once and the router
 * asks another worker or waits. The price is that a worker admits fewer requests than it could if
 * most answers end early. */
#ifndef TD_DECODE_WORKER_BATCH_H
#define TD_DECODE_WORKER_BATCH_H

#include <stdint.h>

typedef struct td_decode_policy {
    uint32_t max_seqs;     /* sequences in one step */
    uint32_t max_admitted; /* sequences admitted at a time (waiting for their prompt or running); >=
                              max_seqs */
    uint32_t n_blocks;     /* of the pool */
    uint32_t max_context;  /* tokens of one sequence */
    uint32_t local_rows;   /* prompt tokens in one step, all local prefills together (--chunk) */
} td_decode_policy;

enum { TD_DECODE_LOCAL_MAX = 8 }; /* local prefills in one step */

/* One choice of a request. */
typedef struct td_decode_need {
    uint32_t n_prompt, n_emitted; /* emitted: ids it has already (a recovery) */
    uint32_t max_tokens;          /* emitted ids at most, those before included */
} td_decode_need;

/* Blocks that a request can come to need, `held` of its leading prompt blocks excluded. n choices
 * of the same prompt share its full blocks when share is set (a first attempt); otherwise each has
 * its own. */
uint64_t td_decode_blocks(const td_decode_policy *p, const td_decode_need *needs, uint32_t n,
                          int share, uint32_t held);

typedef enum td_decode_verdict {
    TD_DECODE_ADMIT,
    TD_DECODE_FULL,   /* not now: blocks or sequences are taken */
    TD_DECODE_TOO_BIG /* never: larger than the pool, the context or max_seqs */
} td_decode_verdict;

/* blocks: td_decode_blocks() with the prefix that is held; blocks_all: the same with held = 0.
 * blocks_free: what the pool could give now, evicting what nobody uses (the held blocks not
 * counted). n_admitted: sequences admitted now. */
td_decode_verdict td_decode_admit(const td_decode_policy *p, const td_decode_need *needs,
                                  uint32_t n, uint64_t blocks, uint64_t blocks_all,
                                  uint64_t blocks_free, uint32_t n_admitted);

/* Who runs: all n runnable sequences, or max_seqs of them beginning behind the one that ran last,
 * so that each gets every ceil(n / max_seqs)-th step. cursor: kept by the caller, starts at 0.
 * ret_picks has room for max_seqs; returns how many. */
uint32_t td_decode_plan(const td_decode_policy *p, uint32_t n, uint32_t *cursor,
                        uint32_t *ret_picks);

/* Conditional split. limit: what the request allows (0: nothing); n_ids: rows that its only
 * timeline needs; held_blocks: leading ones that are here. Returns the tokens to prefill here, 0:
 * as ever on a prefill worker. Several timelines (a recovery of choices) go to a prefill worker. */
uint32_t td_decode_local(uint32_t limit, uint32_t n_timelines, uint32_t n_ids,
                         uint32_t held_blocks);

/* Which local prefills get rows in the next step: oldest first, each until it is whole. n_left: of
 * n <= TD_DECODE_LOCAL_MAX prefills, each >= 1. ret_tokens[i]: rows of the i-th; returns how many
 * get any. */
uint32_t td_decode_plan_local(const td_decode_policy *p, const uint32_t *n_left, uint32_t n,
                              uint32_t *ret_tokens);

#endif
