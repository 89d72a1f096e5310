/* SPDX-License-Identifier: Apache-2.0 */
/* The engine's public boundary in three nouns: td_model (weights), td_engine (scratch and KV pool),
 * td_seq (one timeline). Lane thread only. A step runs any mixture of prefill chunks and decode
 * rows; the tokens of a sequence do not depend on what else is in the step (promise 1).
 *
 * A sequence holds ids (prompt, then emitted) of which the first n_computed have their KV rows in
 * its blocks. The token after the last id is sampled when a step computes the last id. Position of
 * a token = its index in ids. */
#ifndef TD_ENGINE_ENGINE_H
#define TD_ENGINE_ENGINE_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "engine/kv.h"
#include "engine/model.h"
#include "engine/sampler.h"

typedef struct td_engine td_engine;
typedef struct td_seq td_seq;

typedef struct td_engine_limits {
    uint32_t max_rows; /* tokens in one step (chunk rows + decode rows) */
    uint32_t max_seqs; /* sequences in one step */
    uint32_t n_blocks; /* KV pool size; 0: from kv_bytes */
    uint64_t kv_bytes;
    uint64_t staging_bytes; /* of a pool on a device: page-locked memory to stage blocks, at most
                             * as many as the pool has; 0: 4 GiB */
} td_engine_limits;

/* model is borrowed and must outlive the engine. All memory a step needs is allocated here. */
int td_engine_open(td_model *model, const td_engine_limits *limits, td_engine **ret_engine,
                   td_err *reterr_err);
void td_engine_free(td_engine *e); /* every sequence must be freed before */
td_kv_pool *td_engine_pool(td_engine *e);
const td_model_info *td_engine_info(const td_engine *e);

typedef enum td_finish { TD_FINISH_NONE, TD_FINISH_STOP, TD_FINISH_LENGTH } td_finish;

typedef struct td_seq_spec {
    const uint32_t *ids;    /* prompt, then ids already emitted (a recovery); copied */
    size_t n_ids, n_prompt; /* 1 <= n_prompt <= n_ids; every id < vocab_size (checked) */
    td_sampling sampling;   /* bias is copied */
    uint32_t choice;        /* index of this choice, part of the random counter */
    uint64_t max_tokens; /* emitted tokens at most; >= 1. prompt + max_tokens <= max_context is the
                            caller's check too */
    uint64_t min_tokens;
    int ignore_eos;
    const uint32_t *stop_ids; /* besides the model's eos ids; copied */
    uint32_t n_stop_ids;
    uint8_t prefix_key[32];
} td_seq_spec;

/* -EINVAL with text (field and range), -ENOMEM. */
int td_seq_new(td_engine *e, const td_seq_spec *spec, td_seq **ret_seq, td_err *reterr_err);
void td_seq_free(td_seq *s); /* unrefs its blocks; NULL is fine */

/* Take cached blocks for the leading ids; whole blocks, at most n_ids - 1 tokens. Only on a
 * sequence with no blocks. Returns tokens covered (n_computed afterwards). */
size_t td_seq_attach_prefix(td_seq *s);
/* Make sure blocks exist for n_tokens tokens in all. -ENOSPC: nothing changed. */
int td_seq_reserve(td_seq *s, size_t n_tokens);
/* Declare that the first n_tokens tokens' rows are present in its blocks (a handoff was verified).
 * Full blocks are indexed. */
void td_seq_set_computed(td_seq *s, size_t n_tokens);
/* New sequence with the same ids, computed rows and parameters but another choice: full blocks
 * shared, the partial one copied. -ENOSPC, -ENOMEM. */
int td_seq_fork(td_seq *s, uint32_t choice, td_seq **ret_seq);
/* Append an emitted token (own sample, or the first token told by a commit). Returns why the
 * sequence ended, if it did: stop id or eos (unless ignored; never before min_tokens) -> STOP,
 * max_tokens reached -> LENGTH. The stop id itself is part of ids but not text. */
td_finish td_seq_append(td_seq *s, uint32_t id);

/* Is it going to reach max_tokens with an id that a step under way draws? */
int td_seq_is_last(const td_seq *s);

/* Views, valid until the next call that changes the sequence. */
const uint32_t *td_seq_ids(const td_seq *s, size_t *ret_n);
size_t td_seq_computed(const td_seq *s);
size_t td_seq_n_prompt(const td_seq *s);
const td_block *td_seq_blocks(const td_seq *s, size_t *ret_n);
/* Chain hashes of the full blocks [n_ids / 64][16]; includes blocks not computed yet. */
const uint8_t *td_seq_hashes(td_seq *s, size_t *ret_n);

typedef struct td_step_item {
    td_seq *seq;
    uint32_t
        n_tokens; /* ids to compute now, from td_seq_computed(); >= 1; blocks must be reserved */
    uint32_t n_samples; /* choices to sample when the last id is computed in this step (choice,
                         * choice+1, ...); 0 = none. Decode: 1. Results lie one after another. */
    int want_logits;    /* copy the last row's logits into ret_logits (tests, logits dumps) */
    float *ret_logits;  /* [vocab_size] */
    td_logprob *ret_prompt_lp; /* not NULL: [n_tokens], entry i = logprob of the id that follows
                                * computed id i, with prompt_top alternatives; the last prompt row
                                * has no following id: entry untouched */
    uint32_t prompt_top;
    /* NULL, or called with the logits [vocab_size] of every computed row, in order of position */
    void (*visit)(void *arg, size_t position, const float *logits);
    void *visit_arg;
} td_step_item;

/* Run one step. samples: room for the sum of n_samples, in item order. After success each
 * sequence's computed count grew by n_tokens and blocks that became full are indexed under their
 * hash. 0; -EINVAL (limits, nothing ran); -EIO (a kernel failed or produced NaN: no sequence moved
 * on; the step's rows are undefined until a step computes them again, together or alone). */
int td_engine_step(td_engine *e, const td_step_item *items, uint32_t n_items,
                   td_sample *ret_samples);

/* A step in two halves, for a device that runs behind the host: begin lays it out and queues it,
 * end waits for it. So the next step can be begun before this one's ids are known; a sequence of
 * this one takes part in it with the id that is being drawn, which the device takes from where the
 * sampler puts it. The host learns ids one step behind:
 *
 *   begin(n+1)  end(n) -> append n's ids, free whose end they are  begin(n+2)  end(n+1) ...
 *
 * Results are those of td_engine_step(), byte by byte. A sequence that ended at n has a row in n+1
 * that belongs to nobody: its KV row lies in a block that is not indexed and that goes to others
 * in the order of the device, so that whatever they write there comes after it. A sequence that
 * would end by max_tokens is known before (td_seq_is_last()) and not to be begun again.
 *
 * A step cannot be begun (-EAGAIN, nothing is queued) when
 *   - the backend's ops run in the call (CPU),
 *   - an item wants all logits, prompt logprobs, a visit, or more than one sample,
 *   - more than 16 sequences want logprobs,
 *   - a probe is set.
 * It runs as td_engine_step() when nothing is begun. Seed, temperature, top_p, top_k, min_p,
 * logit_bias and min_tokens depend on how many ids there are, not on which; penalties count the one
 * that is not known on the device; logprobs are made of logits that come with the ids. */
enum { TD_STEPS_BEGUN_MAX = 2 }; /* not ended */

/* Does it ever begin a step ahead? */
int td_engine_runs_behind(const td_engine *e);
/* Steps that are begun and not ended. */
uint32_t td_engine_begun(const td_engine *e);
/* Begin a step; at most TD_STEPS_BEGUN_MAX. Does not wait for the device, but for its memory to
 * grow. Items as for td_engine_step(): n_tokens from td_seq_computed() plus what is begun, blocks
 * reserved for the id that is not known too. 0, -EAGAIN (above), -EINVAL (limits, nothing ran),
 * else as td_engine_step(): what was begun before stays so. */
int td_engine_begin(td_engine *e, const td_step_item *items, uint32_t n_items);
/* Wait for the step that was begun first. Outcome and samples as td_engine_step() with its items;
 * those of sequences that were freed since are undefined. Before the next call each of its ids is
 * appended to its sequence, or the sequence is freed. When it fails the steps begun after it are
 * dropped: nothing is begun, and no sequence moved on. */
int td_engine_end(td_engine *e, td_sample *ret_samples);

#endif
