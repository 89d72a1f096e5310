/* SPDX-License-Identifier: Apache-2.0 */
/* The vocabulary and the merges: nearly all of tokenizer.json, read in one pass. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/bug.h"
#include "base/cleanup.h"
#include "base/pages.h"
#include "text/tokenizer_load.h"
#include "base/banned.h"

static int no_memory(td_loader *l)
{
    return td_err_set(l->err, -ENOMEM, "%s: out of memory", l->what);
}

static int not_json(td_loader *l)
{
    return td_err_set(l->err, -EINVAL, "%s:%zu: %s; the file is damaged: download it again",
                      l->what, td_jpull_line(&l->j), l->j.failed ? l->j.failed : "not JSON");
}

/* At first room for as many tokens as the file may hold; what is never touched costs nothing. */
static int grow_texts(td_loader *l, uint32_t id)
{
    size_t guess = TD_MIN((size_t)(l->j.end - l->j.base) / 32 + 1024, (size_t)1 << 18);
    size_t cap = l->cap_texts ? l->cap_texts : guess;
    while (cap <= id)
        cap *= 2;
    td_str *more = td_pages_alloc(cap * sizeof *more);
    if (!more)
        return -ENOMEM;
    if (l->texts)
        memcpy(more, l->texts, l->cap_texts * sizeof *more);
    td_pages_free(l->texts, l->cap_texts * sizeof *more);
    l->texts = more;
    l->cap_texts = cap;
    return 0;
}

int td_load_token(td_loader *l, td_str text, uint32_t id, const char *field)
{
    if ((l->vocab_size && id >= l->vocab_size) || id >= TD_TOKEN_IDS_MAX)
        return td_err_set(
            l->err, -ERANGE,
            "%s: %s: token '%.*s' has id %u, past the vocabulary of %u (config.json: vocab_size); "
            "tokenizer and model do not belong together",
            l->what, field, (int)(text.len < 80 ? text.len : 80), text.ptr, id,
            l->vocab_size ? l->vocab_size : TD_TOKEN_IDS_MAX);
    if (id >= l->cap_texts && grow_texts(l, id) < 0)
        return no_memory(l);
    if (l->texts[id].ptr)
        return td_err_set(l->err, -EINVAL,
                          "%s: %s: id %u is given to '%.*s' and to '%.*s'; correct the file",
                          l->what, field, id, (int)(l->texts[id].len < 80 ? l->texts[id].len : 80),
                          l->texts[id].ptr, (int)(text.len < 80 ? text.len : 80), text.ptr);
    l->texts[id] = text;
    if (id >= l->n_ids)
        l->n_ids = id + 1;
    return 0;
}

static int find_key(const td_loader *l, td_vocab_key k, const char *s, size_t n, uint32_t *ret_id)
{
    size_t at = td_vocab_place(&l->by_text, k);
    for (uint32_t id; (id = td_vocab_next(&l->by_text, k, &at)) != UINT32_MAX;) {
        td_str text = l->texts[id];
        if (n <= 11 || (text.len == n && memcmp(text.ptr, s, n) == 0)) {
            *ret_id = id;
            return 0;
        }
    }
    return -ENOENT;
}

int td_load_find(const td_loader *l, const char *s, size_t n, uint32_t *ret_id)
{
    return l->by_text.slots ? find_key(l, td_vocab_key_of(s, n), s, n, ret_id) : -ENOENT;
}

static int unescape(td_loader *l, td_str raw, td_str *ret_text)
{
    char *out = td_arena_alloc(&l->arena, raw.len + 1);
    if (!out)
        return no_memory(l);
    int64_t n = td_jpull_unescape(raw, out);
    if (n < 0) {
        td_jpull_fail(&l->j, "bad escape in a string");
        return not_json(l);
    }
    *ret_text = (td_str){out, (size_t)n};
    return 0;
}

static int index_token(td_loader *l, td_vocab_key k, uint32_t id)
{
    td_str s = l->texts[id];
    uint32_t same;
    if (find_key(l, k, s.ptr, s.len, &same) == 0)
        return td_err_set(
            l->err, -EINVAL,
            "%s: model.vocab: '%.*s' stands there twice, as %u and %u; correct the file", l->what,
            (int)(s.len < 80 ? s.len : 80), s.ptr, same, id);
    td_vocab_put(&l->by_text, k, id);
    return 0;
}

/* The table is larger than the cache: sixteen tokens wait together for their slots. */
static int index_vocab(td_loader *l)
{
    td_vocab_key keys[16];
    int r = 0;
    if (td_vocab_init(&l->by_text, l->n_vocab) < 0)
        return no_memory(l);
    for (uint32_t from = 0, to; from < l->n_ids && r == 0; from = to) {
        to = TD_MIN(from + (uint32_t)TD_ARRAY_LEN(keys), l->n_ids);
        for (uint32_t id = from; id < to; id++) {
            td_str s = l->texts[id];
            if (!s.ptr)
                continue;
            keys[id - from] = td_vocab_key_of(s.ptr, s.len);
            __builtin_prefetch(&l->by_text.slots[td_vocab_place(&l->by_text, keys[id - from])], 1);
        }
        for (uint32_t id = from; id < to && r == 0; id++)
            if (l->texts[id].ptr)
                r = index_token(l, keys[id - from], id);
    }
    return r;
}

static int load_vocab(td_loader *l)
{
    td_str text;
    int first = 1, escaped;
    while (td_jpull_key(&l->j, &first, &text, &escaped)) {
        uint32_t id;
        int r = escaped ? unescape(l, text, &text) : 0;
        if (r < 0)
            return r;
        if (!td_utf8_valid(text.ptr, text.len))
            td_jpull_fail(&l->j, "a token is not UTF-8");
        if (!td_jpull_u32(&l->j, &id))
            return not_json(l);
        r = td_load_token(l, text, id, "model.vocab");
        if (r < 0)
            return r;
        l->n_vocab++;
    }
    if (l->j.failed)
        return not_json(l);
    return index_vocab(l);
}

static int unknown_in_merge(td_loader *l, const char *s, size_t n)
{
    return td_err_set(
        l->err, -EINVAL,
        "%s:%zu: model.merges: '%.*s' is not in model.vocab; vocabulary and merges do not belong "
        "together: download the file again",
        l->what, td_jpull_line(&l->j), (int)(n < 80 ? n : 80), s);
}

/* Pretty-printed, a merge takes about 45 bytes of the file; what is never touched costs nothing. */
static int grow_merges(td_loader *l)
{
    size_t cap = l->cap_merges ? l->cap_merges * 2 : (size_t)(l->j.end - l->j.p) / 32 + 16;
    td_merge *more = cap > UINT32_MAX ? NULL : td_pages_alloc(cap * sizeof *more);
    if (!more)
        return no_memory(l);
    if (l->n_merges)
        memcpy(more, l->merges, l->n_merges * sizeof *more);
    td_pages_free(l->merges, l->cap_merges * sizeof *more);
    l->merges = more;
    l->cap_merges = cap;
    return 0;
}

static int append_merge(td_loader *l, td_merge m)
{
    int r = l->n_merges == l->cap_merges ? grow_merges(l) : 0;
    if (r < 0)
        return r;
    l->merges[l->n_merges++] = m;
    l->merges[l->n_merges - 1].rank = (uint32_t)l->n_merges;
    return 0;
}

static int resolve(td_loader *l, const td_pending_merge *p, const char *joined)
{
    td_merge m = {.id = p->id};
    size_t n = p->left.len + p->right.len;
    td_str unknown = {0};
    if (find_key(l, p->keys[0], p->left.ptr, p->left.len, &m.left) < 0)
        unknown = p->left;
    else if (find_key(l, p->keys[1], p->right.ptr, p->right.len, &m.right) < 0)
        unknown = p->right;
    else if (m.id == UINT32_MAX && find_key(l, p->keys[2], joined, n, &m.id) < 0)
        unknown = (td_str){joined, n};
    else {
        l->last_made = m.id;
        return append_merge(l, m);
    }
    l->j.p = p->at;
    return unknown_in_merge(l, unknown.ptr ? unknown.ptr : "", unknown.len);
}

static int flush_merges(td_loader *l)
{
    int r = 0;
    for (size_t i = 0; i < l->n_pending && r == 0; i++)
        r = resolve(l, &l->pending[i], l->pending[i].joined);
    l->n_pending = 0;
    return r;
}

static int is_joined(td_str s, td_str left, td_str right)
{
    return s.ptr && s.len == left.len + right.len && memcmp(s.ptr, left.ptr, left.len) == 0 &&
           memcmp(s.ptr + left.len, right.ptr, right.len) == 0;
}

/* Merges nearly always stand in the order of what they make: the token after the one made last, or
 * the same in another way. Reading on in the vocabulary is cheaper than a look-up. */
static uint32_t guess_made(const td_loader *l, td_str left, td_str right)
{
    for (uint32_t id = l->last_made; id < l->n_ids && id - l->last_made < 2; id++)
        if (is_joined(l->texts[id], left, right))
            return id;
    return UINT32_MAX;
}

static td_vocab_key begin_find(const td_loader *l, const char *s, size_t n, size_t room)
{
    td_vocab_key k = td_vocab_key_within(s, n, room);
    __builtin_prefetch(&l->by_text.slots[td_vocab_place(&l->by_text, k)]);
    return k;
}

static void prepare(td_loader *l, td_pending_merge *p, char *joined, size_t room)
{
    td_str left = p->left, right = p->right;
    p->at = l->j.p;
    p->keys[0] = begin_find(l, left.ptr, left.len, room);
    p->keys[1] = begin_find(l, right.ptr, right.len, room);
    p->id = guess_made(l, left, right);
    if (p->id != UINT32_MAX) {
        l->last_made = p->id;
        return;
    }
    memcpy(joined, left.ptr, left.len);
    memcpy(joined + left.len, right.ptr, right.len);
    p->keys[2] = begin_find(l, joined, left.len + right.len, 0);
}

/* Half a million merges need a million look-ups in a table larger than the cache: sixteen merges
 * wait together. room: bytes that can be read from the beginning of either text. */
static int add_merge(td_loader *l, td_str left, td_str right, size_t room)
{
    size_t n = left.len + right.len;
    if (n > sizeof l->pending[0].joined) {
        TD_AUTO_FREE char *joined = malloc(n);
        int r = joined ? flush_merges(l) : no_memory(l);
        td_pending_merge *p = &l->pending[0];
        *p = (td_pending_merge){.left = left, .right = right};
        if (r < 0)
            return r;
        prepare(l, p, joined, room);
        return resolve(l, p, joined);
    }
    td_pending_merge *p = &l->pending[l->n_pending++];
    p->left = left;
    p->right = right;
    prepare(l, p, p->joined, room);
    return l->n_pending == sizeof l->pending / sizeof *l->pending ? flush_merges(l) : 0;
}

static int bad_merge(td_loader *l)
{
    td_jpull_fail(&l->j, "model.merges must hold \"left right\" or [\"left\", \"right\"]");
    return not_json(l);
}

/* "left right"; a first line "#version ..." is a remnant of merges.txt. */
static int load_merge_string(td_loader *l)
{
    td_str s;
    int escaped, r = 0;
    if (!td_jpull_string(&l->j, &s, &escaped))
        return not_json(l);
    if (escaped)
        r = unescape(l, s, &s);
    if (r < 0)
        return r;
    if (s.len >= 8 && memcmp(s.ptr, "#version", 8) == 0)
        return 0;
    const char *space = memchr(s.ptr, ' ', s.len);
    size_t n = space ? (size_t)(space - s.ptr) : 0;
    if (!space || memchr(space + 1, ' ', s.len - n - 1))
        return bad_merge(l);
    return add_merge(l, (td_str){s.ptr, n}, (td_str){space + 1, s.len - n - 1}, 0);
}

static int load_merge_pair(td_loader *l)
{
    td_str pair[2], s;
    int first = 1, escaped, n = 0;
    while (td_jpull_element(&l->j, &first)) {
        if (!td_jpull_string(&l->j, &s, &escaped))
            return not_json(l);
        int r = escaped ? unescape(l, s, &s) : 0;
        if (r < 0)
            return r;
        if (n == 2)
            return bad_merge(l);
        pair[n++] = s;
    }
    if (l->j.failed)
        return not_json(l);
    return n == 2 ? add_merge(l, pair[0], pair[1], 0) : bad_merge(l);
}

static int load_merges(td_loader *l)
{
    td_str pair[2];
    int first = 1, r = 0;
    while (r == 0 && td_jpull_element(&l->j, &first))
        r = td_jpull_peek(&l->j) == '"' ? load_merge_string(l)
            : td_jpull_try_pair(&l->j, pair)
                ? add_merge(l, pair[0], pair[1], (size_t)(l->j.end - pair[1].ptr))
                : load_merge_pair(l);
    if (r == 0)
        r = flush_merges(l);
    return r < 0 ? r : l->j.failed ? not_json(l) : 0;
}

/* A field whose only value we can honour is "off". */
static int must_be(td_loader *l, td_str key, td_str value, const char *const *allowed,
                   const char *remedy)
{
    for (; *allowed; allowed++)
        if (td_str_eq(value, *allowed))
            return 0;
    return td_err_set(l->err, -ENOTSUP, "%s: model.%.*s is %.*s, which is not supported; %s",
                      l->what, (int)key.len, key.ptr, (int)(value.len < 60 ? value.len : 60),
                      value.ptr, remedy);
}

static int load_model_field(td_loader *l, td_str key)
{
    static const char *const off[] = {"null", "\"\"", "0", "0.0", "false", NULL},
                             *const bpe[] = {"\"BPE\"", NULL},
                             *const booleans[] = {"true", "false", "null", NULL};
    td_str value;
    if (td_str_eq(key, "vocab"))
        return load_vocab(l);
    if (td_str_eq(key, "merges") && l->by_text.slots)
        return load_merges(l);
    if (!td_jpull_skip(&l->j, &value))
        return not_json(l);
    if (td_str_eq(key, "merges")) {
        l->merges_at = value.ptr;
        return 0;
    }
    if (td_str_eq(key, "type"))
        return must_be(l, key, value, bpe, "only BPE is");
    if (td_str_eq(key, "dropout") || td_str_eq(key, "continuing_subword_prefix") ||
        td_str_eq(key, "end_of_word_suffix"))
        return must_be(l, key, value, off, "use a byte-level tokenizer without it");
    if (td_str_eq(key, "ignore_merges")) {
        l->t->ignore_merges = td_str_eq(value, "true");
        return must_be(l, key, value, booleans, "write true or false");
    }
    /* without effect: every byte has its token, so nothing is ever unknown */
    if (td_str_eq(key, "unk_token") || td_str_eq(key, "fuse_unk") ||
        td_str_eq(key, "byte_fallback"))
        return 0;
    return td_err_set(l->err, -ENOTSUP,
                      "%s: model.%.*s is not known here and may change results; remove it", l->what,
                      (int)(key.len < 60 ? key.len : 60), key.ptr);
}

int td_load_model(td_loader *l)
{
    td_str key;
    int first = 1, escaped;
    while (td_jpull_key(&l->j, &first, &key, &escaped)) {
        int r = load_model_field(l, key);
        if (r < 0)
            return r;
    }
    if (l->j.failed)
        return not_json(l);
    if (!l->by_text.slots)
        return td_err_set(l->err, -EINVAL, "%s: model.vocab is missing; download the file again",
                          l->what);
    if (l->merges_at) {
        const char *after = l->j.p;
        l->j.p = l->merges_at;
        int r = load_merges(l);
        if (r < 0)
            return r;
        l->j.p = after;
    }
    if (td_merges_init(&l->t->merges, l->merges, l->n_merges) < 0)
        return no_memory(l);
    return 0;
}
