/* SPDX-License-Identifier: Apache-2.0 */
/* The JSON that leaves the router: error bodies, chat and completion objects, stream chunks.
 * Written with an own escaper into a buffer; no tree. Shapes: OpenAI's API as its official clients
 * read it. Pure. */
#ifndef TD_ROUTER_SHAPE_H
#define TD_ROUTER_SHAPE_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "base/strbuf.h"
#include "router/card.h"
#include "router/choice.h"

/* What is the same in every object of one request. */
typedef struct td_shape {
    int chat, stream;
    const char *id, *model, *fingerprint;
    int64_t created;
    uint64_t seed;
    const td_card *card;
    int logprobs, usage_null, continuous_usage, token_ids;
} td_shape;

typedef struct td_usage {
    uint64_t prompt, completion, cached, reasoning;
    uint64_t local; /* prompt tokens that a decode worker prefilled; told when there are any */
} td_usage;

/* {"error":{"message","type","param","code"}} ; text NULL: the table's. param NULL: null. */
void td_shape_error(td_strbuf *out, td_error error, const char *text, const char *param);

/* One stream chunk ("data: {...}\n\n") with what the choice gathered since the last one; finish is
 * the reason or NULL. usage: written when the client asked for continuous figures. */
void td_shape_chunk(td_strbuf *out, const td_shape *s, const td_choice *c, const char *finish,
                    const td_usage *usage);
/* The chunk with empty choices and the figures, and the end marker. */
void td_shape_usage_chunk(td_strbuf *out, const td_shape *s, const td_usage *usage);
void td_shape_done(td_strbuf *out);

/* The whole object of a request that was not streamed. */
void td_shape_reply(td_strbuf *out, const td_shape *s, const td_choice *choices, size_t n,
                    const td_usage *usage);

#endif
