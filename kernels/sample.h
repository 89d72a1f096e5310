/* SPDX-License-Identifier: Apache-2.0 */
/* One draw from one row of logits (numerics, "Sampling"): exact integer weights, so every backend
 * and thread count gives the same token. Radix selection, never a sort. Any thread; no state. */
#ifndef TD_KERNELS_SAMPLE_H
#define TD_KERNELS_SAMPLE_H

#include <stddef.h>
#include <stdint.h>

/* What changes one id's logit before the draw. Unique ids. */
typedef struct td_logit_edit {
    uint32_t id;
    float bias;
    uint32_t n_emitted; /* times emitted: frequency and presence penalty */
    uint8_t seen;       /* in the prompt or emitted: repetition penalty */
    uint8_t banned;     /* may not be drawn */
} td_logit_edit;

typedef struct td_sample_row {
    const float *logits; /* [vocab], not changed */
    uint32_t vocab;
    float temperature, top_p, min_p; /* 0 = argmax; 1 = off; 0 = off */
    uint32_t top_k;                  /* 0 = off */
    float frequency_penalty, presence_penalty, repetition_penalty;
    uint64_t random; /* 64 random bits of (seed, position, choice) */
    const td_logit_edit *edits;
    uint32_t n_edits;
    const uint32_t *fed; /* NULL, or for td_behind_ops.draw alone, in the backend's memory: an id
                          * that was emitted last and that the edits do not count yet */
    void *scratch;       /* td_sample_scratch_bytes(vocab), 64-byte aligned */
    uint32_t id;         /* the result */
} td_sample_row;

size_t td_sample_scratch_bytes(uint32_t vocab);

/* Draw; writes row->id. A row whose every id is banned gives id 0. */
void td_sample_draw(td_sample_row *row);

/* log_softmax of the raw logits: logprob of id, and the n_top greatest by (logit descending, id
 * ascending). */
void td_sample_logprob(const float *logits, uint32_t vocab, uint32_t id, uint32_t n_top,
                       float *ret_logprob, uint32_t *ret_top_ids, float *ret_top);

#endif
