/* SPDX-License-Identifier: Apache-2.0 */
/* Pre-tokenizers of tokenizer.json: Split, Digits, and ByteLevel as the last of a Sequence. Others
 * are refused by name. Immutable after parsing. */
#ifndef TD_TEXT_PRETOK_H
#define TD_TEXT_PRETOK_H

#include <jansson.h>
#include <stddef.h>

#include "base/err.h"
#include "base/strbuf.h"
#include "text/pattern.h"

enum { TD_PRETOKS_MAX = 16 };

typedef struct td_pretok {
    int behavior, invert;
    td_pattern *pattern; /* never NULL in the list */
} td_pretok;

typedef struct td_pretoks {
    td_pretok list[TD_PRETOKS_MAX];
    size_t n;
    td_pretok gpt2;   /* ByteLevel's own split, after the list; no pattern: none */
    int prefix_space; /* ByteLevel's add_prefix_space */
    int has_byte_level;
} td_pretoks;

/* Read the value of "pre_tokenizer". what names the file. */
int td_pretoks_parse(td_pretoks *p, const json_t *spec, const char *what, td_err *reterr_err);
void td_pretoks_done(td_pretoks *p);

/* Scratch of one thread. */
typedef struct td_pretok_work {
    td_spans a, b, cut;
    td_strbuf spaced;
} td_pretok_work;
void td_pretok_work_done(td_pretok_work *w);

typedef int td_piece_fn(void *arg, const char *piece, size_t n);
/* Cut valid UTF-8 (n < 2^31) into pieces and hand each, never empty, to fn in order. 0, or the
 * first negative result. */
int td_pretoks_apply(const td_pretoks *p, td_matcher *m, td_pretok_work *w, const char *text,
                     size_t n, td_piece_fn *fn, void *arg);

#endif
