/* SPDX-License-Identifier: Apache-2.0 */
/* The inside of a td_tokenizer: filled by tokenizer_load.c, read by tokenizer.c. */
#ifndef TD_TEXT_TOKENIZER_INTERNAL_H
#define TD_TEXT_TOKENIZER_INTERNAL_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "text/added.h"
#include "text/bpe.h"
#include "text/normalize.h"
#include "text/pretok.h"
#include "text/tokenizer.h"

enum { TD_TOKEN_ABSENT = UINT32_MAX };

/* bytes -> id over strings that lie elsewhere. */
typedef struct td_vocab {
    struct td_vocab_slot {
        uint32_t hash, id; /* id == UINT32_MAX: empty */
    } * slots;
    size_t mask;
} td_vocab;

/* Token of an id: a range of the pool. */
typedef struct td_token {
    uint32_t at, len; /* len == TD_TOKEN_ABSENT: no such id */
} td_token;

struct td_tokenizer {
    char *pool;        /* bytes of all tokens */
    td_token *tokens;  /* by id */
    uint8_t *special;  /* by id */
    uint32_t n_tokens; /* highest id + 1 */
    td_vocab by_bytes; /* the model's vocabulary by the bytes it stands for */
    uint32_t byte_id[256];
    td_merges merges;
    int ignore_merges;
    td_added_token *added;
    size_t n_added;
    td_added_set raw, normalized; /* added tokens looked for before and after normalizing */
    td_normalizers normalizers;
    td_pretoks pretoks;
    td_ids prefix, suffix; /* the post-processor's */
    _Atomic uint64_t n_interpreted;
};

/* Fast hash of short strings; the file is the operator's, so no key. */
static inline uint32_t td_vocab_hash(const char *s, size_t n)
{
    uint64_t h = n * 0x9E3779B97F4A7C15ull, w;
    while (n >= 8) {
        __builtin_memcpy(&w, s, 8);
        h = (h ^ w) * 0xBF58476D1CE4E5B9ull;
        h ^= h >> 31;
        s += 8;
        n -= 8;
    }
    w = 0;
    for (size_t i = 0; i < n; i++)
        w = w << 8 | (unsigned char)s[i];
    h = (h ^ w) * 0x94D049BB133111EBull;
    return (uint32_t)(h >> 32 ^ h);
}

/* Room for n strings. 0, -ENOMEM. */
int td_vocab_init(td_vocab *v, size_t n);
void td_vocab_done(td_vocab *v);

#endif
