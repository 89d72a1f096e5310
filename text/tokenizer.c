/* SPDX-License-Identifier: Apache-2.0 */
#include "text/tokenizer.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "text/tokenizer_internal.h"
#include "base/bug.h"
#include "base/pages.h"
#include "base/banned.h"

enum { TEXT_BYTES_MAX = 256 << 20 };

void td_ids_done(td_ids *ids)
{
    free(ids->data);
    *ids = (td_ids){0};
}

void td_ids_add(td_ids *ids, uint32_t id)
{
    if (ids->n == ids->cap && !ids->failed) {
        size_t cap = ids->cap ? ids->cap * 2 : 64;
        uint32_t *more = realloc(ids->data, cap * sizeof *more);
        if (!more)
            ids->failed = 1;
        else
            ids->data = more, ids->cap = cap;
    }
    if (!ids->failed)
        ids->data[ids->n++] = id;
}

int td_vocab_init(td_vocab *v, size_t n)
{
    size_t cap = 16;
    while (cap / 3 < n / 2) /* at most two thirds full */
        cap *= 2;
    v->slots = td_pages_alloc(cap * sizeof *v->slots);
    if (!v->slots)
        return -ENOMEM;
    v->mask = cap - 1;
    return 0;
}

void td_vocab_put(td_vocab *v, td_vocab_key k, uint32_t id)
{
    size_t at = td_vocab_place(v, k);
    while (v->slots[at].b)
        at = (at + 1) & v->mask;
    v->slots[at] = (struct td_vocab_slot){k.a, k.b, id};
}

void td_vocab_done(td_vocab *v)
{
    td_pages_free(v->slots, (v->mask + 1) * sizeof *v->slots);
    *v = (td_vocab){0};
}

void td_tokenizer_free(td_tokenizer *t)
{
    if (!t)
        return;
    free(t->pool);
    free(t->tokens);
    free(t->special);
    td_vocab_done(&t->by_bytes);
    td_merges_done(&t->merges);
    for (size_t i = 0; i < t->n_added; i++)
        free((char *)t->added[i].content.ptr);
    free(t->added);
    td_added_set_done(&t->raw);
    td_added_set_done(&t->normalized);
    td_normalizers_done(&t->normalizers);
    td_pretoks_done(&t->pretoks);
    td_ids_done(&t->prefix);
    td_ids_done(&t->suffix);
    free(t);
}

td_str td_tokenizer_bytes(const td_tokenizer *t, uint32_t id)
{
    if (id >= t->n_tokens || t->tokens[id].len == TD_TOKEN_ABSENT)
        return (td_str){NULL, 0};
    return (td_str){t->pool + t->tokens[id].at, t->tokens[id].len};
}

int td_tokenizer_is_special(const td_tokenizer *t, uint32_t id)
{
    return id < t->n_tokens && t->special[id];
}

uint32_t td_tokenizer_size(const td_tokenizer *t)
{
    return t->n_tokens;
}

uint64_t td_tokenizer_n_interpreted(const td_tokenizer *t)
{
    return atomic_load_explicit(&t->n_interpreted, memory_order_relaxed);
}

static int find_bytes(const td_tokenizer *t, const char *s, size_t n, uint32_t *ret_id)
{
    td_vocab_key k = td_vocab_key_of(s, n);
    size_t at = td_vocab_place(&t->by_bytes, k);
    for (uint32_t id; (id = td_vocab_next(&t->by_bytes, k, &at)) != UINT32_MAX;) {
        td_token tok = t->tokens[id];
        if (n <= 11 || (tok.len == n && memcmp(t->pool + tok.at, s, n) == 0)) {
            *ret_id = id;
            return 0;
        }
    }
    return -ENOENT;
}

int td_tokenizer_find(const td_tokenizer *t, const char *text, size_t n, uint32_t *ret_id)
{
    for (size_t i = 0; i < t->n_added; i++)
        if (t->added[i].content.len == n && memcmp(t->added[i].content.ptr, text, n) == 0) {
            *ret_id = t->added[i].id;
            return 0;
        }
    for (uint32_t id = 0; n && id < t->n_tokens; id++)
        if (t->tokens[id].len == n && memcmp(t->pool + t->tokens[id].at, text, n) == 0) {
            *ret_id = id;
            return 0;
        }
    return -ENOENT;
}

/* What one call of encode needs. */
typedef struct encoder {
    const td_tokenizer *t;
    td_matcher matcher;
    td_pretok_work pretok;
    td_bpe_work bpe;
    td_strbuf normal, scratch;
    int no_special;
    td_ids *out;
} encoder;

static int encode_piece(void *arg, const char *piece, size_t n)
{
    encoder *e = arg;
    uint32_t id;
    if (e->t->ignore_merges && find_bytes(e->t, piece, n, &id) == 0) {
        td_ids_add(e->out, id);
        return 0;
    }
    return td_bpe_encode(&e->t->merges, e->t->byte_id, piece, n, &e->bpe, e->out);
}

static int encode_normalized(encoder *e, const char *text, size_t n)
{
    td_added_walk walk;
    td_added_part part;
    td_added_walk_init(&walk, &e->t->normalized, e->t->added, text, n, e->no_special);
    while (td_added_walk_next(&walk, &part)) {
        int r = 0;
        if (part.index >= 0)
            td_ids_add(e->out, e->t->added[part.index].id);
        else
            r = td_pretoks_apply(&e->t->pretoks, &e->matcher, &e->pretok, text + part.start,
                                 part.end - part.start, encode_piece, e);
        if (r < 0)
            return r;
    }
    return 0;
}

/* Text between the added tokens that are looked for in the raw text. */
static int encode_part(encoder *e, const char *text, size_t n)
{
    if (e->t->normalizers.n == 0)
        return encode_normalized(e, text, n);
    int r = td_normalizers_apply(&e->t->normalizers, &e->matcher, text, n, &e->scratch, &e->normal);
    return r < 0 ? r : encode_normalized(e, e->normal.data, e->normal.len);
}

static int encode(encoder *e, const char *text, size_t n)
{
    td_added_walk walk;
    td_added_part part;
    td_added_walk_init(&walk, &e->t->raw, e->t->added, text, n, e->no_special);
    while (td_added_walk_next(&walk, &part)) {
        int r = 0;
        if (part.index >= 0)
            td_ids_add(e->out, e->t->added[part.index].id);
        else
            r = encode_part(e, text + part.start, part.end - part.start);
        if (r < 0)
            return r;
    }
    return 0;
}

static void add_all(td_ids *out, const td_ids *more)
{
    for (size_t i = 0; i < more->n; i++)
        td_ids_add(out, more->data[i]);
}

int td_tokenizer_encode(const td_tokenizer *t, const char *text, size_t n, int flags, td_ids *out)
{
    if (n > TEXT_BYTES_MAX)
        return -EFBIG;
    if (!td_utf8_valid(text, n))
        return -EILSEQ;
    encoder e = {.t = t, .out = out, .no_special = (flags & TD_ENCODE_NO_PARSE) != 0};
    td_strbuf_init(&e.normal);
    td_strbuf_init(&e.scratch);
    td_strbuf_init(&e.pretok.spaced);
    size_t n_before = out->n;
    /* counting does not change what a tokenizer is */
    int r = td_matcher_init(&e.matcher, (_Atomic uint64_t *)&t->n_interpreted);
    if (flags & TD_ENCODE_SPECIAL)
        add_all(out, &t->prefix);
    if (r == 0)
        r = encode(&e, text, n);
    if (flags & TD_ENCODE_SPECIAL)
        add_all(out, &t->suffix);
    td_matcher_done(&e.matcher);
    td_pretok_work_done(&e.pretok);
    td_bpe_work_done(&e.bpe);
    td_strbuf_done(&e.normal);
    td_strbuf_done(&e.scratch);
    if (r == 0 && out->failed)
        r = -ENOMEM;
    if (r < 0)
        out->n = n_before;
    return r;
}

int td_tokenizer_decode(const td_tokenizer *t, const uint32_t *ids, size_t n, int skip_special,
                        td_strbuf *out)
{
    for (size_t i = 0; i < n; i++)
        if (!td_tokenizer_bytes(t, ids[i]).ptr)
            return -EINVAL;
    td_detok d;
    td_detok_init(&d, t, skip_special);
    for (size_t i = 0; i < n; i++)
        td_detok_add(&d, ids[i], out);
    td_detok_finish(&d, out);
    return out->failed ? -ENOMEM : 0;
}

void td_detok_init(td_detok *d, const td_tokenizer *t, int skip_special)
{
    *d = (td_detok){.tok = t, .skip_special = skip_special};
}

static void add_replacement(td_strbuf *out)
{
    td_strbuf_add(out, "\xEF\xBF\xBD", 3);
}

/* One byte more. held is always a proper beginning of a character, so that what does not continue
 * it is a maximal subpart in Unicode's sense: one U+FFFD, as Rust's from_utf8_lossy writes. */
static void add_byte(td_detok *d, char byte, td_strbuf *out)
{
    uint32_t cp;
    for (;;) {
        d->held[d->n_held] = (uint8_t)byte;
        size_t n = (size_t)d->n_held + 1;
        const char *held = (const char *)d->held;
        if (td_utf8_decode(held, n, &cp) > 0) {
            td_strbuf_add(out, held, n);
            d->n_held = 0;
            return;
        }
        if (td_utf8_whole(held, n) == 0) {
            d->n_held++;
            return;
        }
        add_replacement(out);
        if (d->n_held == 0)
            return; /* the byte alone begins nothing */
        d->n_held = 0;
    }
}

int td_detok_add(td_detok *d, uint32_t id, td_strbuf *out)
{
    td_str bytes = td_tokenizer_bytes(d->tok, id);
    if (!bytes.ptr)
        return -EINVAL;
    if (d->skip_special && td_tokenizer_is_special(d->tok, id))
        return 0;
    size_t i = 0;
    if (d->n_held == 0 && td_utf8_valid(bytes.ptr, bytes.len)) {
        td_strbuf_add(out, bytes.ptr, bytes.len);
        i = bytes.len;
    }
    for (; i < bytes.len; i++)
        add_byte(d, bytes.ptr[i], out);
    return out->failed ? -ENOMEM : 0;
}

void td_detok_finish(td_detok *d, td_strbuf *out)
{
    if (d->n_held)
        add_replacement(out);
    d->n_held = 0;
}
