/* SPDX-License-Identifier: Apache-2.0 */
/* One choice on its way from ids to text: detokenizer, stop strings, reasoning parser. Everything
 * is a function of the ids alone, whatever runs they arrive in. Loop thread. */
#ifndef TD_ROUTER_CHOICE_H
#define TD_ROUTER_CHOICE_H

#include <stddef.h>
#include <stdint.h>

#include "base/strbuf.h"
#include "router/card.h"
#include "router/dispatch.h"
#include "router/request.h"
#include "text/reasoning.h"
#include "text/stops.h"
#include "text/tokenizer.h"

typedef struct td_choice_lp {
    uint32_t id;
    float logprob; /* NAN: none (first prompt token) */
    uint32_t n_top;
    uint32_t top_ids[20];
    float top[20];
} td_choice_lp;

typedef struct td_choice {
    const td_card *card;
    const td_params *params;
    uint32_t index; /* in the answer */
    td_detok detok;
    td_stops *stops; /* NULL without stop strings */
    td_reasoning reasoning;
    int chat;
    td_strbuf content_text, reasoning_text; /* gathered since the last td_choice_clear() */
    td_strbuf scratch_a, scratch_b;
    td_choice_lp *lps; /* gathered likewise */
    size_t n_lps, cap_lps;
    td_ids ids; /* gathered likewise, when token ids are returned */
    uint64_t n_tokens, n_reasoning_tokens;
    int role_sent;
    int finished;       /* finish is set; later runs are dropped */
    const char *finish; /* "stop", "length" */
} td_choice;

/* 0, -ENOMEM. params must outlive the choice. */
int td_choice_init(td_choice *c, const td_card *card, const td_params *params, td_api api,
                   uint32_t index);
void td_choice_done(td_choice *c);
/* Take a run. Returns 1 when a stop string ended the choice (the caller tells the workers), 0
 * otherwise, -ENOMEM. */
int td_choice_add(td_choice *c, const td_gen_run *run);
/* Put the prompt in front (echo). */
int td_choice_echo(td_choice *c, const td_prompt *prompt, const float *logprobs,
                   const td_gen_top *top, size_t n);
/* 1 when something waits for td_shape_chunk(). */
int td_choice_pending(const td_choice *c);
void td_choice_clear(td_choice *c);

#endif
