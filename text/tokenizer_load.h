/* SPDX-License-Identifier: Apache-2.0 */
/* Reading tokenizer.json in three parts that share one td_loader: the big tables
 * (tokenizer_vocab.c), the small sections (tokenizer_parts.c), and putting it together
 * (tokenizer_load.c). */
#ifndef TD_TEXT_TOKENIZER_LOAD_H
#define TD_TEXT_TOKENIZER_LOAD_H

#include <stddef.h>
#include <stdint.h>

#include "base/arena.h"
#include "base/err.h"
#include "text/json_pull.h"
#include "text/tokenizer_internal.h"

enum { TD_TOKEN_IDS_MAX = 1 << 24 };

/* A merge whose look-ups are under way. */
typedef struct td_pending_merge {
    td_str left, right;
    td_vocab_key keys[3]; /* left, right, both */
    uint32_t id;          /* of both together; UINT32_MAX: to be looked up */
    const char *at;       /* place in the file, for an error */
    char joined[56];      /* both, when to be looked up */
} td_pending_merge;

typedef struct td_loader {
    const char *what; /* the file, for error texts */
    td_jpull j;
    uint32_t vocab_size; /* the model's, 0 = unknown */
    td_arena arena;      /* unescaped strings */
    td_str *texts;       /* by id, as written in the file; ptr NULL: no token */
    size_t cap_texts;
    uint32_t n_ids, n_vocab;
    td_vocab by_text;
    td_merge *merges;
    size_t n_merges, cap_merges;
    td_pending_merge pending[16];
    size_t n_pending;
    uint32_t last_made;                              /* what the last merge gives */
    const char *merges_at;                           /* set when "merges" came before "vocab" */
    td_str added, normalizer, pretok, post, decoder; /* their text in the file */
    td_tokenizer *t;
    td_err *err;
} td_loader;

/* Read the value of "model". */
int td_load_model(td_loader *l);
/* Record a token; refuses ids twice or past the vocabulary. */
int td_load_token(td_loader *l, td_str text, uint32_t id, const char *field);
/* Id of a text of the model's vocabulary. 0, -ENOENT. */
int td_load_find(const td_loader *l, const char *s, size_t n, uint32_t *ret_id);

int td_load_added(td_loader *l);
int td_load_config_added(td_loader *l, const char *dir);
int td_load_post(td_loader *l);
int td_load_decoder(td_loader *l);
int td_load_pipeline(td_loader *l);

/* Parse from memory; for fuzzing. what names the text in errors. */
int td_tokenizer_parse(const char *what, const char *text, size_t n, const char *dir,
                       uint32_t vocab_size, td_tokenizer **ret_tok, td_err *reterr_err);

#endif
