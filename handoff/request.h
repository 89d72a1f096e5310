/* SPDX-License-Identifier: Apache-2.0 */
/* A request as both kinds of worker see it: the message checked, its arrays as plain views, its
 * handoff plan. Both ends derive the same plan from it. Pure; any thread. */
#ifndef TD_HANDOFF_REQUEST_H
#define TD_HANDOFF_REQUEST_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "handoff/plan.h"

struct Tandem__V1__Request;
struct Tandem__V1__SamplingParams;
struct Tandem__V1__Ticket;

typedef struct td_request {
    const struct Tandem__V1__Request *message; /* borrowed: the views point into it */
    const struct Tandem__V1__SamplingParams *sampling;
    const uint32_t *prompt;
    size_t n_prompt;
    uint32_t n; /* choices */
    /* Choices to work on: 0..n-1 at first (n_emitted[i] 0), the unfinished ones on a recovery. */
    uint32_t n_choices, choices[TD_CHOICES_MAX];
    const uint32_t *emitted[TD_CHOICES_MAX];
    size_t n_emitted[TD_CHOICES_MAX];
    int recovery;
    const uint32_t *stop_ids;
    uint32_t n_stop_ids, max_tokens, min_tokens, n_top;
    int ignore_eos, logprobs, prompt_logprobs;
    const uint8_t *prefix_key; /* 32 bytes */
    td_handoff_plan plan;
} td_request;

/* Check everything but the sampling parameters, which the engine checks. 0; -EINVAL, -ERANGE
 * (longer than max_context) with text naming the field. */
int td_request_read(const struct Tandem__V1__Request *message, uint32_t vocab_size,
                    uint32_t max_context, td_request *ret_request, td_err *reterr_err);

/* ids of timeline i: prompt ‖ emitted without the last, copied to out (plan.timelines[i].n_ids
 * entries). */
void td_request_ids(const td_request *r, uint32_t timeline, uint32_t *out);

/* Fixed sizes of a ticket's fields. 0; -EINVAL with text. */
int td_ticket_message_check(const struct Tandem__V1__Ticket *t, td_err *reterr_err);

#endif
