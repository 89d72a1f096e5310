/* SPDX-License-Identifier: Apache-2.0 */
#include "worker/spec.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "proto/engine.pb-c.h"
#include "base/banned.h"

int td_worker_seq(td_engine *e, const td_request *r, uint32_t timeline, uint32_t choice,
                  td_seq **ret_seq, td_err *reterr_err)
{
    const Tandem__V1__SamplingParams *p = r->sampling;
    uint32_t n_ids = r->plan.timelines[timeline].n_ids;
    TD_AUTO_FREE uint32_t *ids = malloc(n_ids * sizeof *ids);
    TD_AUTO_FREE td_logit_bias *bias = calloc(p->n_logit_bias + 1, sizeof *bias);
    if (!ids || !bias)
        return td_err_set(reterr_err, -ENOMEM, "request: out of memory");
    td_request_ids(r, timeline, ids);
    for (size_t i = 0; i < p->n_logit_bias; i++)
        bias[i] = (td_logit_bias){.id = p->logit_bias[i]->id, .bias = p->logit_bias[i]->bias};
    td_seq_spec spec = {.ids = ids,
                        .n_ids = n_ids,
                        .n_prompt = r->n_prompt,
                        .choice = choice,
                        .max_tokens = r->max_tokens,
                        .min_tokens = r->min_tokens,
                        .ignore_eos = r->ignore_eos,
                        .stop_ids = r->stop_ids,
                        .n_stop_ids = r->n_stop_ids,
                        .sampling = {.temperature = p->temperature,
                                     .top_p = p->top_p,
                                     .min_p = p->min_p,
                                     .top_k = p->top_k,
                                     .frequency_penalty = p->frequency_penalty,
                                     .presence_penalty = p->presence_penalty,
                                     .repetition_penalty = p->repetition_penalty,
                                     .seed = p->seed,
                                     .bias = bias,
                                     .n_bias = (uint32_t)p->n_logit_bias,
                                     .logprobs = r->logprobs,
                                     .n_top = r->n_top}};
    memcpy(spec.prefix_key, r->prefix_key, sizeof spec.prefix_key);
    return td_seq_new(e, &spec, ret_seq, reterr_err);
}
