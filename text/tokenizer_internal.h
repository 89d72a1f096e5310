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

/* bytes -> id over strings that lie elsewhere. A slot holds what settles nearly every look-up: a
 * string of up to 11 bytes itself, or the hash of a longer one. So a look-up touches one cache
 * line, which may be fetched ahead. */
typedef struct td_vocab_key {
    uint64_t a;
    uint32_t b; /* top byte: length + 1, or 255 for a hash; so never 0 */
} td_vocab_key;

typedef struct td_vocab {
    struct td_vocab_slot {
        uint64_t a;
        uint32_t b, id; /* b == 0: empty */
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
    td_vocab by_bytes; /* with ignore_merges: the model's vocabulary by the bytes it stands for */
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

/* Key of a string. Not keyed against chosen collisions: the file is the operator's. */
static inline td_vocab_key td_vocab_key_of(const char *s, size_t n)
{
    uint64_t w = 0;
    uint32_t lo, hi = 0;
    if (n > 11) {
        uint64_t h = n * 0x9E3779B97F4A7C15ull;
        for (size_t i = 0; i < n; i += 8) {
            w = 0;
            __builtin_memcpy(&w, s + i, n - i < 8 ? n - i : 8);
            h = (h ^ w) * 0xBF58476D1CE4E5B9ull;
            h ^= h >> 31;
        }
        return (td_vocab_key){h, 0xFF000000u};
    }
    if (n >= 8) {
        __builtin_memcpy(&w, s, 8);
        for (size_t i = 8; i < n; i++)
            hi |= (uint32_t)(unsigned char)s[i] << (i - 8) * 8;
        return (td_vocab_key){w, (uint32_t)(n + 1) << 24 | hi};
    }
    if (n >= 4) { /* two loads that overlap */
        __builtin_memcpy(&lo, s, 4);
        __builtin_memcpy(&hi, s + n - 4, 4);
        return (td_vocab_key){lo | (uint64_t)hi << (n - 4) * 8, (uint32_t)(n + 1) << 24};
    }
    for (size_t i = 0; i < n; i++)
        w |= (uint64_t)(unsigned char)s[i] << i * 8;
    return (td_vocab_key){w, (uint32_t)(n + 1) << 24};
}

/* The same, and room bytes can be read from s: from 12 on there is no branch on the length, which
 * follows no pattern. */
static inline td_vocab_key td_vocab_key_within(const char *s, size_t n, size_t room)
{
    static const uint64_t low[12] = {0,          0xFF,         0xFFFF,         0xFFFFFF,
                                     0xFFFFFFFF, 0xFFFFFFFFFF, 0xFFFFFFFFFFFF, 0xFFFFFFFFFFFFFF,
                                     UINT64_MAX, UINT64_MAX,   UINT64_MAX,     UINT64_MAX};
    static const uint32_t high[12] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0xFF, 0xFFFF, 0xFFFFFF};
    uint64_t a;
    uint32_t b;
    if (n > 11 || room < 12)
        return td_vocab_key_of(s, n);
    __builtin_memcpy(&a, s, 8);
    __builtin_memcpy(&b, s + 8, 4);
    return (td_vocab_key){a & low[n], (uint32_t)(n + 1) << 24 | (b & high[n])};
}

static inline size_t td_vocab_place(const td_vocab *v, td_vocab_key k)
{
    uint64_t h = (k.a ^ (uint64_t)k.b << 32 ^ k.b) * 0x9E3779B97F4A7C15ull;
    return (size_t)(h >> 32 ^ h) & v->mask;
}

/* Next id whose key is k, from *at on (start with td_vocab_place()); UINT32_MAX at the end. A long
 * string's must be compared by the caller. */
static inline uint32_t td_vocab_next(const td_vocab *v, td_vocab_key k, size_t *at)
{
    for (;; *at = (*at + 1) & v->mask) {
        const struct td_vocab_slot *slot = &v->slots[*at];
        if (slot->b == 0)
            return UINT32_MAX;
        if (slot->a == k.a && slot->b == k.b) {
            *at = (*at + 1) & v->mask;
            return slot->id;
        }
    }
}

/* Room for n strings. 0, -ENOMEM. */
int td_vocab_init(td_vocab *v, size_t n);
void td_vocab_put(td_vocab *v, td_vocab_key k, uint32_t id);
void td_vocab_done(td_vocab *v);

#endif
