/* SPDX-License-Identifier: Apache-2.0 */
/* Split streamed GLM output into reasoning and content at </think>; a <think> counts only at the
 * very beginning, and neither after that: an answer may speak of the tags. A suffix that may be the
 * beginning of a tag is held back, so the result does not depend on how the text arrives in pieces.
 * One thread at a time. */
#ifndef TD_TEXT_REASONING_H
#define TD_TEXT_REASONING_H

#include <stddef.h>

#include "base/strbuf.h"

typedef struct td_reasoning {
    int inside;   /* between the tags */
    int may_open; /* no tag and no text yet: <think> would be a tag */
    int started;  /* something other than white space was seen since the last switch */
    char held[8]; /* beginning of a possible tag */
    unsigned char n_held;
    td_strbuf space; /* white space round a tag: dropped if a tag follows or precedes it */
} td_reasoning;

/* starts_inside: the prompt ended with <think>, as GLM's templates do with thinking on. */
void td_reasoning_init(td_reasoning *r, int starts_inside);
void td_reasoning_done(td_reasoning *r);
/* Append what the text settles to the two outputs. The tags themselves, and white space next to
 * them, appear in neither. */
void td_reasoning_add(td_reasoning *r, const char *text, size_t n, td_strbuf *reasoning,
                      td_strbuf *content);
/* End of the output: a held beginning was text after all. */
void td_reasoning_finish(td_reasoning *r, td_strbuf *reasoning, td_strbuf *content);
/* 1 while tokens belong to the reasoning. */
int td_reasoning_is_inside(const td_reasoning *r);

#endif
