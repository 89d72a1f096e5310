/* SPDX-License-Identifier: Apache-2.0 */
/* Byte-level BPE from a Hugging Face tokenizer.json: text to ids and back.
 * Immutable after open: any number of threads may use one td_tokenizer at once. */
#ifndef TD_TEXT_TOKENIZER_H
#define TD_TEXT_TOKENIZER_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "base/strbuf.h"

typedef struct td_tokenizer td_tokenizer;

/* Growable list of ids, sticky failure. */
typedef struct td_ids {
    uint32_t *data;
    size_t n, cap;
    int failed;
} td_ids;
void td_ids_done(td_ids *ids);
void td_ids_add(td_ids *ids, uint32_t id);

/* Read DIR/tokenizer.json (and tokenizer_config.json when present). vocab_size is the model's
 * (config.json): an id at or past it is refused by name; 0 skips that check. */
int td_tokenizer_open(const char *dir, uint32_t vocab_size, td_tokenizer **ret_tok,
                      td_err *reterr_err);
void td_tokenizer_free(td_tokenizer *t);

enum td_encode_flags {
    TD_ENCODE_SPECIAL = 1, /* apply the post-processor (add bos and the like) */
    TD_ENCODE_NO_PARSE = 2 /* treat the text of special tokens as plain text */
};

/* Append the ids of UTF-8 text. Time is O(n log n) in the worst case.
 * 0; -EILSEQ invalid UTF-8; -EFBIG more than 256 MiB; -EOVERFLOW a split pattern ran into its match
 * limit; -ENOMEM. On failure out is unchanged. */
int td_tokenizer_encode(const td_tokenizer *t, const char *text, size_t n, int flags, td_ids *out);

/* Append the bytes of ids; skip_special leaves special tokens out. -EINVAL: an id without a token.
 */
int td_tokenizer_decode(const td_tokenizer *t, const uint32_t *ids, size_t n, int skip_special,
                        td_strbuf *out);

/* Raw bytes of one token, borrowed for the tokenizer's life; len 0 and ptr NULL for an id without a
 * token. */
td_str td_tokenizer_bytes(const td_tokenizer *t, uint32_t id);
/* 1 when the id is an added token marked special. */
int td_tokenizer_is_special(const td_tokenizer *t, uint32_t id);
/* Id of a token by its exact bytes (added tokens first). Looks at every token: for set-up, not for
 * requests. 0 found, -ENOENT. */
int td_tokenizer_find(const td_tokenizer *t, const char *text, size_t n, uint32_t *ret_id);
/* Number of ids (highest + 1). */
uint32_t td_tokenizer_size(const td_tokenizer *t);
/* Matches of split patterns that PCRE2's compiled code could not do and its interpreter did: right,
 * but slower. */
uint64_t td_tokenizer_n_interpreted(const td_tokenizer *t);

/* Streaming detokenizer: never splits a UTF-8 character; equals decode() of the whole list at the
 * end. Embedded. */
typedef struct td_detok {
    const td_tokenizer *tok;
    int skip_special;
    uint8_t held[8]; /* bytes of an unfinished character */
    uint8_t n_held;
} td_detok;
void td_detok_init(td_detok *d, const td_tokenizer *t, int skip_special);
/* Append what id completes. 0; -EINVAL an id without a token (nothing appended); -ENOMEM. */
int td_detok_add(td_detok *d, uint32_t id, td_strbuf *out);
/* End of stream: an unfinished character becomes U+FFFD, as decode() does. */
void td_detok_finish(td_detok *d, td_strbuf *out);

#endif
