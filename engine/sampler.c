/* SPDX-License-Identifier: Apache-2.0 */
#include "engine/sampler.h"

#include <string.h>

#include "base/rand.h"
#include "engine/internal.h"
#include "kernels/sample.h"

#include "base/banned.h"

/* Scratch: [draw's own][slot of each id + 1, u32][edits]. */
static size_t slots_at(uint32_t vocab)
{
    return td_sample_scratch_bytes(vocab);
}

static size_t edits_at(uint32_t vocab)
{
    return slots_at(vocab) + ((size_t)vocab + 15) / 16 * 64;
}

size_t td_sampler_scratch_bytes(uint32_t vocab)
{
    return (edits_at(vocab) + vocab * sizeof(td_logit_edit) + 63) / 64 * 64;
}

typedef struct edits {
    uint32_t *slot; /* [vocab]: 0, or index of the id's edit + 1 */
    td_logit_edit *list;
    uint32_t n;
} edits;

static td_logit_edit *edit_of(edits *e, uint32_t id)
{
    if (!e->slot[id]) {
        e->list[e->n] = (td_logit_edit){.id = id};
        e->slot[id] = ++e->n;
    }
    return &e->list[e->slot[id] - 1];
}

int td_sampler_counts(const td_sampling *s)
{
    return s->frequency_penalty != 0.0f || s->presence_penalty != 0.0f ||
           s->repetition_penalty != 1.0f;
}

static void add_penalties(edits *e, const td_sampling *s, const uint32_t *ids, size_t n,
                          size_t n_prompt)
{
    int all = s->repetition_penalty != 1.0f;
    if (!td_sampler_counts(s))
        return;
    for (size_t i = all ? 0 : n_prompt; i < n; i++) {
        td_logit_edit *d = edit_of(e, ids[i]);
        d->seen = 1;
        d->n_emitted += i >= n_prompt;
    }
}

void td_sampler_row(const float *logits, uint32_t vocab, const td_sampling *s, const uint32_t *ids,
                    size_t n, size_t n_known, size_t n_prompt, uint32_t choice,
                    const uint32_t *suppress, uint32_t n_suppress, void *scratch,
                    td_sample_row *row)
{
    edits e = {(uint32_t *)((char *)scratch + slots_at(vocab)),
               (td_logit_edit *)((char *)scratch + edits_at(vocab)), 0};
    if (s->n_bias || n_suppress || td_sampler_counts(s)) /* most rows have no edits */
        memset(e.slot, 0, vocab * sizeof *e.slot);
    for (uint32_t i = 0; i < s->n_bias; i++)
        edit_of(&e, s->bias[i].id)->bias += s->bias[i].bias;
    add_penalties(&e, s, ids, n_known, n_prompt);
    for (uint32_t i = 0; i < n_suppress; i++)
        edit_of(&e, suppress[i])->banned = 1;
    *row = (td_sample_row){.logits = logits,
                           .vocab = vocab,
                           .temperature = s->temperature,
                           .top_p = s->top_p,
                           .min_p = s->min_p,
                           .top_k = s->top_k,
                           .frequency_penalty = s->frequency_penalty,
                           .presence_penalty = s->presence_penalty,
                           .repetition_penalty = s->repetition_penalty,
                           .random = td_rand(s->seed, (uint32_t)n, choice, TD_RAND_SAMPLE),
                           .edits = e.list,
                           .n_edits = e.n,
                           .scratch = scratch};
}

void td_sampler_sample(const float *logits, uint32_t vocab, const td_sampling *s,
                       const uint32_t *ids, size_t n, size_t n_prompt, uint32_t choice,
                       const uint32_t *suppress, uint32_t n_suppress, void *scratch,
                       td_sample *ret_sample)
{
    td_sample_row row;
    td_sampler_row(logits, vocab, s, ids, n, n, n_prompt, choice, suppress, n_suppress, scratch,
                   &row);
    td_sample_draw(&row);
    ret_sample->id = row.id;
    if (s->logprobs)
        td_sampler_logprob(logits, vocab, row.id, s->n_top, &ret_sample->lp);
}

void td_sampler_logprob(const float *logits, uint32_t vocab, uint32_t id, uint32_t n_top,
                        td_logprob *ret_lp)
{
    uint32_t n = n_top < vocab ? n_top : vocab;
    n = n < TD_TOP_LOGPROBS_MAX ? n : TD_TOP_LOGPROBS_MAX;
    ret_lp->n_top = n;
    td_sample_logprob(logits, vocab, id, n, &ret_lp->logprob, ret_lp->top_ids, ret_lp->top);
}
