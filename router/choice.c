/* SPDX-License-Identifier: Apache-2.0 */
#include "router/choice.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/banned.h"

int td_choice_init(td_choice *c, const td_card *card, const td_params *params, td_api api,
                   uint32_t index)
{
    *c = (td_choice){.card = card, .params = params, .index = index, .chat = api == TD_API_CHAT};
    td_strbuf_init(&c->content_text);
    td_strbuf_init(&c->reasoning_text);
    td_strbuf_init(&c->scratch_a);
    td_strbuf_init(&c->scratch_b);
    td_detok_init(&c->detok, card->tok,
                  0); /* which special tokens are text is decided here, by id */
    td_reasoning_init(&c->reasoning, params->starts_in_reasoning);
    if (!params->n_stops)
        return 0;
    return td_stops_new(params->stops, params->n_stops, &c->stops);
}

void td_choice_done(td_choice *c)
{
    td_strbuf_done(&c->content_text);
    td_strbuf_done(&c->reasoning_text);
    td_strbuf_done(&c->scratch_a);
    td_strbuf_done(&c->scratch_b);
    td_stops_free(c->stops);
    td_reasoning_done(&c->reasoning);
    td_ids_done(&c->ids);
    free(c->lps);
}

static void add_lp(td_choice *c, uint32_t id, float logprob, const td_gen_top *top)
{
    if (c->n_lps == c->cap_lps) {
        size_t cap = c->cap_lps ? c->cap_lps * 2 : 16;
        td_choice_lp *more = realloc(c->lps, cap * sizeof *more);
        if (!more) {
            c->content_text.failed = 1;
            return;
        }
        c->lps = more;
        c->cap_lps = cap;
    }
    td_choice_lp *lp = &c->lps[c->n_lps++];
    *lp = (td_choice_lp){.id = id, .logprob = logprob};
    for (uint32_t i = 0; top && i < top->n && i < 20; i++, lp->n_top++) {
        lp->top_ids[i] = top->ids[i];
        lp->top[i] = top->logprobs[i];
    }
}

/* Text that passed the stop strings goes to content, or through the reasoning parser in chat. */
static void emit_text(td_choice *c, const td_strbuf *text)
{
    if (!c->chat)
        td_strbuf_add(&c->content_text, text->data, text->len);
    else if (text->len)
        td_reasoning_add(&c->reasoning, text->data, text->len, &c->reasoning_text,
                         &c->content_text);
}

/* Returns 1 when a stop string was completed. */
static int add_text(td_choice *c, const td_strbuf *piece)
{
    int hit = 0;
    if (!c->stops) {
        emit_text(c, piece);
    } else {
        td_strbuf_reset(&c->scratch_b);
        hit = td_stops_add(c->stops, piece->data, piece->len, &c->scratch_b);
        emit_text(c, &c->scratch_b);
    }
    if (piece->failed || c->scratch_b.failed) /* the next reset would forget it */
        c->content_text.failed = 1;
    return hit;
}

static void end(td_choice *c, const char *reason, int flush_held)
{
    if (flush_held) {
        td_strbuf_reset(&c->scratch_a);
        td_detok_finish(&c->detok, &c->scratch_a);
        if (!add_text(c, &c->scratch_a) && c->stops) {
            td_strbuf_reset(&c->scratch_b);
            td_stops_finish(c->stops, &c->scratch_b);
            emit_text(c, &c->scratch_b);
        }
    }
    if (c->chat)
        td_reasoning_finish(&c->reasoning, &c->reasoning_text, &c->content_text);
    c->finished = 1;
    c->finish = reason;
}

static int add_id(td_choice *c, uint32_t id)
{
    if (c->params->skip_special_tokens && !td_card_is_text(c->card, id))
        return 0;
    td_strbuf_reset(&c->scratch_a);
    td_detok_add(&c->detok, id, &c->scratch_a);
    return c->scratch_a.len ? add_text(c, &c->scratch_a) : 0;
}

/* Anything that ran out of memory lost text. */
static int failed(const td_choice *c)
{
    return c->content_text.failed || c->reasoning_text.failed || c->ids.failed;
}

int td_choice_add(td_choice *c, const td_gen_run *run)
{
    for (size_t i = 0; i < run->n && !c->finished; i++) {
        int last = i + 1 == run->n;
        c->n_tokens++;
        if (c->params->drop_generated) {
            if (last && run->finish)
                end(c, "length", 1);
            continue;
        }
        if (c->params->return_token_ids)
            td_ids_add(&c->ids, run->ids[i]);
        if (last && run->finish == 1) { /* the stop id itself is not text */
            end(c, "stop", 1);
            continue;
        }
        if (run->logprobs)
            add_lp(c, run->ids[i], run->logprobs[i], run->top ? &run->top[i] : NULL);
        if (c->chat && td_reasoning_is_inside(&c->reasoning))
            c->n_reasoning_tokens++;
        if (add_id(c, run->ids[i])) {
            end(c, "stop", 0);
            return 1;
        }
        if (last && run->finish)
            end(c, "length", 1);
    }
    return failed(c) ? -ENOMEM : 0;
}

int td_choice_echo(td_choice *c, const td_prompt *prompt, const float *logprobs,
                   const td_gen_top *top, size_t n)
{
    if (prompt->text.len)
        td_strbuf_add(&c->content_text, prompt->text.ptr, prompt->text.len);
    else
        td_tokenizer_decode(c->card->tok, prompt->ids, prompt->n_ids,
                            c->params->skip_special_tokens, &c->content_text);
    if (logprobs) {
        add_lp(c, prompt->ids[0], NAN, NULL);
        for (size_t i = 0; i < n && i + 1 < prompt->n_ids; i++)
            add_lp(c, prompt->ids[i + 1], logprobs[i], top ? &top[i] : NULL);
    }
    return failed(c) ? -ENOMEM : 0;
}

int td_choice_pending(const td_choice *c)
{
    return c->content_text.len || c->reasoning_text.len || c->n_lps || c->ids.n;
}

void td_choice_clear(td_choice *c)
{
    td_strbuf_reset(&c->content_text);
    td_strbuf_reset(&c->reasoning_text);
    c->n_lps = 0;
    c->ids.n = 0;
}
