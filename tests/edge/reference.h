/* SPDX-License-Identifier: Apache-2.0 */
/* What one process alone gives for a request: the truth that clusters are compared with. The
 * program defines MODEL. */
#ifndef TD_TESTS_EDGE_REFERENCE_H
#define TD_TESTS_EDGE_REFERENCE_H

#include "engine/engine.h"
#include "tests/edge/cluster.h"

static td_model *model;
static td_engine *engine;

static void reference_open_kv(td_dtype kv)
{
    td_err err = {0};
    td_model_options mo = {
        .isa = "auto", .act = TD_BF16, .kv = kv, .index = TD_BF16, .n_threads = 1, .n_ranks = 1};
    td_engine_limits limits = {.max_rows = 2048, .max_seqs = 4, .n_blocks = 64};
    if (td_model_open(MODEL, &mo, &model, &err) < 0 ||
        td_engine_open(model, &limits, &engine, &err) < 0)
        fail_msg("%s", err.text);
}

static inline void reference_open(void)
{
    reference_open_kv(TD_BF16);
}

static void take_sample(token *t, const td_sample *s)
{
    t->id = s->id;
    t->logprob = s->lp.logprob;
    memcpy(t->top_ids, s->lp.top_ids, sizeof t->top_ids);
    memcpy(t->top, s->lp.top, sizeof t->top);
}

/* One process, alone, the prompt in one step. */
static void reference(const request *r, uint32_t choice, token *out)
{
    td_err err = {0};
    td_seq *s;
    td_sample sample;
    td_seq_spec spec = {.ids = r->prompt,
                        .n_ids = r->n_prompt,
                        .n_prompt = r->n_prompt,
                        .choice = choice,
                        .max_tokens = r->max_tokens,
                        .ignore_eos = 1,
                        .sampling = {.temperature = r->temperature,
                                     .top_p = 1,
                                     .top_k = r->top_k,
                                     .repetition_penalty = r->repetition_penalty,
                                     .seed = r->seed,
                                     .logprobs = 1,
                                     .n_top = TOP}};
    if (td_seq_new(engine, &spec, &s, &err) < 0)
        fail_msg("%s", err.text);
    assert_int_equal(td_seq_reserve(s, r->n_prompt + r->max_tokens), 0);
    for (uint32_t i = 0; i < r->max_tokens; i++) {
        td_step_item item = {
            .seq = s, .n_tokens = i == 0 ? (uint32_t)r->n_prompt : 1, .n_samples = 1};
        assert_int_equal(td_engine_step(engine, &item, 1, &sample), 0);
        take_sample(&out[i], &sample);
        td_finish f = td_seq_append(s, sample.id);
        assert_int_equal(f, i + 1 == r->max_tokens ? TD_FINISH_LENGTH : TD_FINISH_NONE);
    }
    td_seq_free(s);
    td_kv_flush(td_engine_pool(engine));
}

static void reference_close(void)
{
    td_engine_free(engine);
    td_model_free(model);
}

#endif
