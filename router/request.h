/* SPDX-License-Identifier: Apache-2.0 */
/* From the bytes of a request body to checked parameters and token ids: JSON scan, parse, field
 * table (request.def), template, tokenizer, prefix keys. Pure work without I/O; runs in the text
 * pool, any thread. */
#ifndef TD_ROUTER_REQUEST_H
#define TD_ROUTER_REQUEST_H

#include <jansson.h>
#include <stdio.h>
#include <stddef.h>
#include <stdint.h>

#include "base/arena.h"
#include "base/err.h"
#include "base/strbuf.h"
#include "router/card.h"
#include "router/dispatch.h"

typedef enum td_api {
    TD_API_CHAT = 1,
    TD_API_COMPLETIONS = 2,
    TD_API_TOKENIZE = 4,
    TD_API_DETOKENIZE = 8
} td_api;

enum { TD_PROMPTS_MAX = 128, TD_STOPS_MAX = 16, TD_STOP_BYTES_MAX = 256, TD_CHOICES_MAX = 128 };

typedef struct td_prompt {
    const uint32_t *ids;
    uint32_t n_ids;
    td_str text; /* as given, for echo; empty for id prompts */
} td_prompt;

typedef struct td_params {
    const char *model, *cache_salt, *reasoning_effort, *request_id;
    int stream, include_usage, continuous_usage, echo, ignore_eos, skip_special_tokens,
        return_token_ids;
    int add_special_tokens, add_generation_prompt, logprobs;
    int64_t n, max_tokens, max_completion_tokens, min_tokens, top_k, top_logprobs,
        priority; /* -1: not given (max_*) */
    double temperature, top_p, min_p, frequency_penalty, presence_penalty, repetition_penalty;
    uint64_t seed;
    const td_gen_bias *bias;
    uint32_t n_bias;
    td_str stops[TD_STOPS_MAX];
    uint32_t n_stops;
    const uint32_t *stop_ids;
    uint32_t n_stop_ids;
    int starts_in_reasoning; /* the rendered prompt ends inside <think> */
    td_prompt prompts[TD_PROMPTS_MAX];
    uint32_t n_prompts;
    uint32_t limit;     /* max_tokens in force for each choice, >= 1 */
    int drop_generated; /* max_tokens 0 with echo: one token is computed and not shown */
    uint8_t prefix_key[32];
    td_str ignored;     /* names of unknown fields, comma separated; "" */
    td_str detokenized; /* detokenize: the text */
} td_params;

typedef struct td_request_error {
    td_error error;
    const char *param; /* arena; NULL = none */
    char text[500];
} td_request_error;

typedef struct td_request_context {
    const td_card *card;
    uint32_t max_context; /* in force: config or what the pool can hold */
    const uint8_t *prefix_secret;
    size_t prefix_secret_bytes;
    td_str tenant;
    int strict;
} td_request_context;

/* Everything is allocated in the arena. 0, or -EINVAL with *ret_error. */
int td_request_parse(const td_request_context *ctx, td_api api, td_str body, td_arena *arena,
                     td_params *ret_params, td_request_error *ret_error);

/* The same from the client RPC, whose fields are already typed. input: an array of {role, content},
 * a string (prompt), or NULL when params holds the ids. Borrowed. */
int td_request_finish(const td_request_context *ctx, td_api api, json_t *input, td_arena *arena,
                      td_params *params, td_request_error *ret_error);
void td_params_init(const td_card *card, td_params *p);

/* Markdown table of the fields for docs/api.md. */
void td_request_docs(FILE *out);

#endif
