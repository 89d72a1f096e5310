/* SPDX-License-Identifier: Apache-2.0 */
/* Inside of `tandem eval`: what a checkpoint lost against another (its BF16 original, usually). */
#ifndef TD_CLI_EVAL_H
#define TD_CLI_EVAL_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "base/options.h"
#include "engine/device.h"
#include "engine/engine.h"
#include "text/template.h"
#include "text/tokenizer.h"

/* A model with what is needed to ask it. */
typedef struct td_eval_model {
    td_model *model;
    td_engine *engine;
    td_tokenizer *tokenizer;
    td_template *tpl; /* NULL: it has none */
    uint32_t rows;    /* of one step */
} td_eval_model;

/* Open with the options act, kv, index, isa, threads on a device; steps of rows tokens. -errno with
 * text. */
int td_eval_open(const char *dir, const td_options *o, const td_device *device, uint32_t rows,
                 td_eval_model *ret, td_err *reterr_err);
void td_eval_close(td_eval_model *m);

/* Sums over the predicted tokens of a text. With a baseline: KL(baseline || model) in nats, and how
 * often both have the same most probable id. change = nll - base_nll of each token, paired. */
typedef struct td_eval_text {
    uint64_t tokens, agree;
    double nll, base_nll, change_squares, kl, kl_largest;
} td_eval_text;

/* Windows of window ids, each from an empty context; window ids at most rows of td_eval_open. base
 * NULL: no comparison. progress may be NULL. */
int td_eval_text_run(td_eval_model *m, td_eval_model *base, const uint32_t *ids, size_t n,
                     uint32_t window, void (*progress)(double fraction), td_eval_text *ret,
                     td_err *reterr_err);

/* Problems with exact answers, JSON lines: id, skill, question, answer, max_tokens (160). */
typedef struct td_eval_problem {
    char *skill, *question, *answer; /* heap */
    uint32_t max_tokens;
} td_eval_problem;

typedef struct td_eval_set {
    td_eval_problem *data;
    size_t n;
} td_eval_set;

int td_eval_set_load(const char *path, td_eval_set *ret, td_err *reterr_err);
void td_eval_set_done(td_eval_set *s);

/* Ask all, greedily, with the chat template's defaults; right[i] = the reply says "The answer is
 * X." (the last such sentence) with the right X. */
int td_eval_ask(td_eval_model *m, const td_eval_set *s, void (*progress)(double fraction),
                uint8_t *right, td_err *reterr_err);

#endif
