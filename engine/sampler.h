/* SPDX-License-Identifier: Apache-2.0 */
/* Sampling as numerics.md says: a function of (logits, parameters, seed, position, choice, ids so
 * far). */
#ifndef TD_ENGINE_SAMPLER_H
#define TD_ENGINE_SAMPLER_H

#include <stddef.h>
#include <stdint.h>

enum { TD_TOP_LOGPROBS_MAX = 20, TD_LOGIT_BIAS_MAX = 1024, TD_STOP_IDS_MAX = 64 };

typedef struct td_logit_bias {
    uint32_t id;
    float bias;
} td_logit_bias;

typedef struct td_sampling {
    float temperature;                         /* 0 = argmax, ties to the lower id */
    float top_p;                               /* (0, 1]; 1 = off */
    float min_p;                               /* [0, 1); 0 = off */
    uint32_t top_k;                            /* 0 = off */
    float frequency_penalty, presence_penalty; /* over emitted ids */
    float repetition_penalty;                  /* over prompt and emitted ids; 1 = off */
    uint64_t seed;
    const td_logit_bias *bias; /* borrowed by specs, owned by sequences */
    uint32_t n_bias;
    int logprobs;   /* 1: report the chosen token's */
    uint32_t n_top; /* and this many alternatives, 0..TD_TOP_LOGPROBS_MAX */
} td_sampling;

typedef struct td_logprob {
    float logprob; /* of the chosen token: log_softmax of the raw logits */
    uint32_t n_top;
    uint32_t top_ids[TD_TOP_LOGPROBS_MAX];
    float top[TD_TOP_LOGPROBS_MAX];
} td_logprob;

typedef struct td_sample {
    uint32_t id;
    td_logprob lp; /* valid when sampling.logprobs */
} td_sample;

/* ids: prompt then emitted; n_prompt of n are the prompt's. position = number of ids before the
 * sampled one. suppress: ids that may not be chosen (min_tokens not reached: eos and stop ids).
 * scratch: at least td_sampler_scratch_bytes(vocab) bytes, 64-byte aligned. logits are not changed.
 */
void td_sampler_sample(const float *logits, uint32_t vocab, const td_sampling *s,
                       const uint32_t *ids, size_t n, size_t n_prompt, uint32_t choice,
                       const uint32_t *suppress, uint32_t n_suppress, void *scratch,
                       td_sample *ret_sample);
size_t td_sampler_scratch_bytes(uint32_t vocab);

/* Logprob of a given next id at a row (prompt logprobs). */
void td_sampler_logprob(const float *logits, uint32_t vocab, uint32_t id, uint32_t n_top,
                        td_logprob *ret_lp);

#endif
