/* SPDX-License-Identifier: Apache-2.0 */
/* What the router knows of a model: tokenizer, template, config and generation_config; never
 * weights. Immutable after open: any thread may read it. */
#ifndef TD_ROUTER_CARD_H
#define TD_ROUTER_CARD_H

#include <stdint.h>

#include "base/err.h"
#include "text/template.h"
#include "text/tokenizer.h"

typedef struct td_card {
    char *dir, *name;
    td_tokenizer *tok;
    td_template *chat; /* NULL: the model has no chat template */
    uint32_t vocab_size, max_context;
    uint8_t config_hash[32], tokenizer_hash[32];
    int64_t created; /* modification time of config.json */
    /* Defaults of generation_config.json. */
    double temperature, top_p, min_p, repetition_penalty;
    int64_t top_k;
    /* Special tokens that are text to the output parsers, by id; NULL-terminated by n_kept. */
    uint32_t kept[16], n_kept;
} td_card;

/* name NULL or "": the directory's own name. */
int td_card_open(const char *dir, const char *name, td_card **ret_card, td_err *reterr_err);
void td_card_free(td_card *c);

/* 1 when the id's text reaches the client: ordinary tokens, and special ones that mark reasoning or
 * tool calls. */
int td_card_is_text(const td_card *c, uint32_t id);

#endif
