/* SPDX-License-Identifier: Apache-2.0 */
/* Added tokens: found in the text before anything else, leftmost and then longest, with the options
 * of the Python package `tokenizers` (single_word, lstrip, rstrip). Immutable after building. */
#ifndef TD_TEXT_ADDED_H
#define TD_TEXT_ADDED_H

#include <stddef.h>
#include <stdint.h>

#include "base/strbuf.h"

typedef struct td_added_token {
    td_str content; /* heap, owned by the tokenizer */
    uint32_t id;
    uint8_t special, single_word, lstrip, rstrip, normalized;
} td_added_token;

/* A set of texts as a trie. */
typedef struct td_added_set {
    struct td_added_node *nodes;
    size_t n, cap;
    uint32_t root[256]; /* node per first byte, 0 = none */
} td_added_set;

void td_added_set_done(td_added_set *s);
/* Put a text that stands for tokens[index]; a text put before keeps its first index. 0, -ENOMEM. */
int td_added_set_put(td_added_set *s, const char *text, size_t n, uint32_t index);

/* A part of the text: index of an added token, or -1 for text between. */
typedef struct td_added_part {
    size_t start, end;
    int64_t index;
} td_added_part;

typedef struct td_added_walk {
    const td_added_set *set;
    const td_added_token *tokens;
    const char *text;
    size_t n, at, done; /* search from at; done: end of the last part given out */
    int no_special;     /* special tokens are text */
    td_added_part next; /* a token found while text before it was given out; index -1: none */
} td_added_walk;

void td_added_walk_init(td_added_walk *w, const td_added_set *set, const td_added_token *tokens,
                        const char *text, size_t n, int no_special);
/* 1 and the next part in order, 0 at the end. */
int td_added_walk_next(td_added_walk *w, td_added_part *ret_part);

#endif
