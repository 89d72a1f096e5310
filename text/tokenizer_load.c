/* SPDX-License-Identifier: Apache-2.0 */
#include "text/tokenizer_load.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/bug.h"
#include "base/file.h"
#include "base/pages.h"
#include "base/banned.h"

enum { FILE_BYTES_MAX = 256 << 20 };

/* GPT-2's alphabet: printable Latin-1 stands for itself, the other 68 bytes for U+0100 and up, in
 * order. */
static int is_plain(unsigned b)
{
    return (b >= 0x21 && b <= 0x7E) || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
}

static void make_alphabet(uint16_t to_char[256], int16_t to_byte[0x144])
{
    uint16_t next = 0x100;
    memset(to_byte, 0xFF, 0x144 * sizeof *to_byte);
    for (unsigned b = 0; b < 256; b++) {
        to_char[b] = is_plain(b) ? (uint16_t)b : next++;
        to_byte[to_char[b]] = (int16_t)b;
    }
}

/* Bytes that a token's text stands for. Returns their number, or -1 when a character is not of the
 * alphabet. */
static int64_t to_bytes(td_str text, const int16_t to_byte[0x144], char *out)
{
    int64_t n = 0;
    for (size_t at = 0; at < text.len;) {
        unsigned char c = (unsigned char)text.ptr[at];
        uint32_t cp = c;
        int len = c < 0x80 ? 1 : td_utf8_decode(text.ptr + at, text.len - at, &cp);
        if (len < 0 || cp >= 0x144 || to_byte[cp] < 0)
            return -1;
        out[n++] = (char)to_byte[cp];
        at += (size_t)len;
    }
    return n;
}

static int alloc_tokens(td_loader *l)
{
    size_t bytes = 1;
    for (uint32_t id = 0; id < l->n_ids; id++)
        bytes += l->texts[id].len;
    td_tokenizer *t = l->t;
    t->pool = bytes > UINT32_MAX ? NULL : malloc(bytes);
    t->tokens = malloc((l->n_ids + 1) * sizeof *t->tokens);
    t->special = calloc(l->n_ids + 1, 1);
    if (!t->pool || !t->tokens || !t->special ||
        (t->ignore_merges && td_vocab_init(&t->by_bytes, l->n_vocab) < 0))
        return td_err_set(l->err, -ENOMEM, "%s: out of memory for %zu bytes of tokens", l->what,
                          bytes);
    t->n_tokens = l->n_ids;
    return 0;
}

/* Puts wait a few tokens for their slot's cache line. */
typedef struct put_queue {
    td_vocab *vocab;
    td_vocab_key keys[16];
    uint32_t ids[16];
    size_t n;
} put_queue;

static void put_all(put_queue *q)
{
    for (size_t i = 0; i < q->n; i++)
        td_vocab_put(q->vocab, q->keys[i], q->ids[i]);
    q->n = 0;
}

static void put_soon(put_queue *q, td_vocab_key k, uint32_t id)
{
    if (q->n == TD_ARRAY_LEN(q->keys))
        put_all(q);
    __builtin_prefetch(&q->vocab->slots[td_vocab_place(q->vocab, k)], 1);
    q->keys[q->n] = k;
    q->ids[q->n++] = id;
}

/* From the file's text to bytes; only then may the file's memory go. */
static void build_tokens(td_loader *l, const int16_t to_byte[0x144])
{
    td_tokenizer *t = l->t;
    put_queue q = {.vocab = &t->by_bytes};
    uint32_t at = 0, same;
    for (size_t i = 0; i < t->n_added; i++)
        t->special[t->added[i].id] = 1; /* for the while of this loop: it is an added token */
    for (uint32_t id = 0; id < l->n_ids; id++) {
        td_str s = l->texts[id];
        t->tokens[id] = (td_token){at, TD_TOKEN_ABSENT};
        if (!s.ptr)
            continue;
        int64_t n = to_bytes(s, to_byte, t->pool + at);
        if (n < 0 && s.len) /* as `tokenizers` does: such a token stands for its own text */
            memcpy(t->pool + at, s.ptr, s.len);
        t->tokens[id].len = n < 0 ? (uint32_t)s.len : (uint32_t)n;
        at += t->tokens[id].len;
        if (t->ignore_merges && n > 0 &&
            (!t->special[id] || td_load_find(l, s.ptr, s.len, &same) == 0))
            put_soon(&q, td_vocab_key_of(t->pool + t->tokens[id].at, t->tokens[id].len), id);
    }
    put_all(&q);
    for (size_t i = 0; i < t->n_added; i++)
        t->special[t->added[i].id] = 0;
    for (size_t i = 0; i < t->n_added; i++)
        t->special[t->added[i].id] |= t->added[i].special;
}

static int find_alphabet(td_loader *l, const uint16_t to_char[256])
{
    for (unsigned b = 0; b < 256; b++) {
        char utf8[4];
        size_t n = (size_t)td_utf8_encode(to_char[b], utf8);
        l->t->byte_id[b] = UINT32_MAX;
        int in_utf8 = b != 0xC0 && b != 0xC1 && b < 0xF5;
        if (td_load_find(l, utf8, n, &l->t->byte_id[b]) < 0 && in_utf8)
            return td_err_set(l->err, -ENOTSUP,
                              "%s: model.vocab has no token for the byte 0x%02X ('%.*s'), so some "
                              "text could not be "
                              "written; train the tokenizer with the full byte alphabet",
                              l->what, b, (int)n, utf8);
    }
    return 0;
}

static int must_be_null(td_loader *l, td_str key, td_str value)
{
    if (td_str_eq(value, "null"))
        return 0;
    return td_err_set(l->err, -ENOTSUP, "%s: %.*s would change every encoding; set it to null",
                      l->what, (int)key.len, key.ptr);
}

static int load_field(td_loader *l, td_str key)
{
    struct {
        const char *key;
        td_str *slice;
    } const slices[] = {{"added_tokens", &l->added},
                        {"normalizer", &l->normalizer},
                        {"pre_tokenizer", &l->pretok},
                        {"post_processor", &l->post},
                        {"decoder", &l->decoder}};
    td_str value;
    if (td_str_eq(key, "model"))
        return l->by_text.slots
                   ? td_err_set(l->err, -EINVAL, "%s: model stands there twice; correct the file",
                                l->what)
                   : td_load_model(l);
    if (!td_jpull_skip(&l->j, &value))
        return 0; /* the caller looks at l->j.failed */
    for (size_t i = 0; i < sizeof slices / sizeof *slices; i++)
        if (td_str_eq(key, slices[i].key)) {
            *slices[i].slice = value;
            return 0;
        }
    if (td_str_eq(key, "truncation") || td_str_eq(key, "padding"))
        return must_be_null(l, key, value);
    if (td_str_eq(key, "version"))
        return td_str_eq(value, "\"1.0\"")
                   ? 0
                   : td_err_set(l->err, -ENOTSUP,
                                "%s: version %.*s is not supported; only \"1.0\" is", l->what,
                                (int)(value.len < 20 ? value.len : 20), value.ptr);
    return td_err_set(l->err, -ENOTSUP,
                      "%s: %.*s is not known here and may change results; remove it", l->what,
                      (int)(key.len < 60 ? key.len : 60), key.ptr);
}

static int load_fields(td_loader *l)
{
    td_str key;
    int first = 1, escaped, r;
    while (td_jpull_key(&l->j, &first, &key, &escaped)) {
        r = load_field(l, key);
        if (r < 0)
            return r;
    }
    if (!l->j.failed && td_jpull_peek(&l->j))
        td_jpull_fail(&l->j, "something follows the object");
    if (l->j.failed)
        return td_err_set(l->err, -EINVAL, "%s:%zu: %s; the file is damaged: download it again",
                          l->what, td_jpull_line(&l->j), l->j.failed);
    if (!l->by_text.slots)
        return td_err_set(l->err, -EINVAL, "%s: model is missing; download the file again",
                          l->what);
    return 0;
}

static int load(td_loader *l, const char *dir)
{
    uint16_t to_char[256];
    int16_t to_byte[0x144];
    make_alphabet(to_char, to_byte);
    int r = load_fields(l);
    if (r == 0)
        r = find_alphabet(l, to_char);
    if (r == 0)
        r = td_load_added(l);
    if (r == 0)
        r = td_load_config_added(l, dir);
    if (r == 0)
        r = td_load_pipeline(l);
    if (r == 0)
        r = td_load_post(l);
    if (r == 0)
        r = td_load_decoder(l);
    if (r == 0)
        r = alloc_tokens(l);
    if (r == 0)
        build_tokens(l, to_byte);
    return r;
}

int td_tokenizer_parse(const char *what, const char *text, size_t n, const char *dir,
                       uint32_t vocab_size, td_tokenizer **ret_tok, td_err *reterr_err)
{
    td_loader l = {.what = what, .vocab_size = vocab_size, .err = reterr_err};
    l.t = calloc(1, sizeof *l.t);
    if (!l.t)
        return td_err_set(reterr_err, -ENOMEM, "%s: out of memory", what);
    td_jpull_init(&l.j, text, n);
    td_arena_init(&l.arena, 0);
    int r = load(&l, dir);
    td_arena_done(&l.arena);
    td_vocab_done(&l.by_text);
    td_pages_free(l.texts, l.cap_texts * sizeof *l.texts);
    td_pages_free(l.merges, l.cap_merges * sizeof *l.merges);
    if (r < 0) {
        td_tokenizer_free(l.t);
        return r;
    }
    *ret_tok = l.t;
    return 0;
}

int td_tokenizer_open(const char *dir, uint32_t vocab_size, td_tokenizer **ret_tok,
                      td_err *reterr_err)
{
    TD_AUTO_FREE char *path = td_path_join(dir, "tokenizer.json");
    const void *text = NULL;
    size_t n = 0;
    if (!path)
        return td_err_set(reterr_err, -ENOMEM, "%s: out of memory", dir);
    int r = td_file_map_whole(path, FILE_BYTES_MAX, &text, &n, reterr_err);
    if (r == 0)
        r = td_tokenizer_parse(path, text ? text : "", n, dir, vocab_size, ret_tok, reterr_err);
    td_file_unmap(text, n);
    return r;
}
