/* SPDX-License-Identifier: Apache-2.0 */
/* Guards sampling: whatever the backend, the id is the one that kernels/sample.c draws. */
#include <math.h>
#include <stdlib.h>

#include "kernels/checks/inside.h"
#include "kernels/sample.h"

#include "base/banned.h"

enum { V = 777, ROWS = 5, EDITS = 8, ROUNDS = 12 };

/* Few distinct values: ties everywhere. */
static void fill_row(td_check *c, td_sample_row *r, float *logits, td_logit_edit *edits)
{
    static const float temperatures[] = {0.0f, 0.3f, 1.0f, 2.5f};
    td_rng *g = &c->rng;
    for (uint32_t i = 0; i < V; i++)
        logits[i] = (float)(int)td_rng_below(g, 40) * 0.25f;
    for (uint32_t i = 0; i < EDITS; i++)
        edits[i] = (td_logit_edit){.id = i * 31 + 2,
                                   .bias = td_check_value(c, 0),
                                   .n_emitted = (uint32_t)td_rng_below(g, 3),
                                   .seen = (uint8_t)td_rng_below(g, 2),
                                   .banned = (uint8_t)(td_rng_below(g, 4) == 0)};
    *r = (td_sample_row){.logits = logits,
                         .vocab = V,
                         .temperature = temperatures[td_rng_below(g, 4)],
                         .top_p =
                             td_rng_below(g, 2) ? 1.0f : 0.05f + 0.9f * fabsf(td_check_value(c, 0)),
                         .min_p = td_rng_below(g, 2) ? 0.0f : 0.3f * fabsf(td_check_value(c, 0)),
                         .top_k = td_rng_below(g, 2) ? 0 : 1 + (uint32_t)td_rng_below(g, 300),
                         .frequency_penalty = td_check_value(c, 0),
                         .presence_penalty = td_check_value(c, 0),
                         .repetition_penalty = 1.0f + 0.5f * fabsf(td_check_value(c, 0)),
                         .random = td_rng_next(g),
                         .edits = edits,
                         .n_edits = (uint32_t)td_rng_below(g, EDITS + 1)};
}

void td_check_the_sampler_draws_the_id_of_the_specification(td_check *c)
{
    td_queue *q = td_check_queue(c, TD_F32, 1);
    uint32_t distinct = 0;
    size_t scratch = (td_sample_scratch_bytes(V) + 63) / 64 * 64;
    for (int round = 0; round < ROUNDS; round++) {
        td_sample_row rows[ROWS];
        td_logit_edit edits[ROWS][EDITS];
        uint32_t want[ROWS];
        float *logits = td_check_floats(c, ROWS * V);
        for (uint32_t i = 0; i < ROWS; i++) {
            fill_row(c, &rows[i], logits + i * V, edits[i]);
            rows[i].scratch = td_check_floats(c, scratch / sizeof(float));
            td_sample_draw(&rows[i]);
            want[i] = rows[i].id;
            rows[i].id = UINT32_MAX;
            distinct += i && want[i] != want[i - 1];
        }
        c->be->sample(q, rows, ROWS);
        TD_MUST_EQUAL(c, c->be->finish(q), 0);
        for (uint32_t i = 0; i < ROWS; i++)
            TD_MUST_EQUAL(c, rows[i].id, want[i]);
        td_check_guards(c, 0);
    }
    TD_MUST(c, distinct > 20);
    c->be->close(q);
}
