/* SPDX-License-Identifier: Apache-2.0 */
#include "text/added.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unicode/uchar.h>

#include "base/banned.h"

struct td_added_node {
    uint32_t child, sibling; /* 0 = none */
    int64_t index;           /* token that ends here, -1 = none */
    unsigned char byte;
};

void td_added_set_done(td_added_set *s)
{
    free(s->nodes);
    *s = (td_added_set){0};
}

/* Returns the node's number, 0 when out of memory; number 0 itself is never used. */
static uint32_t new_node(td_added_set *s, unsigned char byte)
{
    if (s->n == s->cap) {
        size_t cap = s->cap ? s->cap * 2 : 256;
        struct td_added_node *more =
            cap > UINT32_MAX ? NULL : realloc(s->nodes, cap * sizeof *more);
        if (!more)
            return 0;
        s->nodes = more;
        s->cap = cap;
        s->n += s->n == 0;
    }
    s->nodes[s->n] = (struct td_added_node){.index = -1, .byte = byte};
    return (uint32_t)s->n++;
}

static uint32_t child_of(const td_added_set *s, uint32_t node, unsigned char byte)
{
    uint32_t c = s->nodes[node].child;
    while (c && s->nodes[c].byte != byte)
        c = s->nodes[c].sibling;
    return c;
}

int td_added_set_put(td_added_set *s, const char *text, size_t n, uint32_t index)
{
    if (n == 0)
        return 0;
    uint32_t at = s->root[(unsigned char)text[0]];
    if (!at) {
        at = new_node(s, (unsigned char)text[0]);
        s->root[(unsigned char)text[0]] = at;
    }
    for (size_t i = 1; at && i < n; i++) {
        uint32_t c = child_of(s, at, (unsigned char)text[i]);
        if (!c) {
            c = new_node(s, (unsigned char)text[i]);
            if (!c)
                return -ENOMEM;
            s->nodes[c].sibling = s->nodes[at].child;
            s->nodes[at].child = c;
        }
        at = c;
    }
    if (!at)
        return -ENOMEM;
    if (s->nodes[at].index < 0)
        s->nodes[at].index = index;
    return 0;
}

/* Longest text of the set that begins at s. Returns its length and token, or 0. */
static size_t longest(const td_added_set *set, const char *s, size_t n, int64_t *ret_index)
{
    uint32_t at = set->root[(unsigned char)s[0]];
    size_t best = 0;
    for (size_t i = 1; at; i++) {
        if (set->nodes[at].index >= 0) {
            best = i;
            *ret_index = set->nodes[at].index;
        }
        if (i >= n)
            break;
        at = child_of(set, at, (unsigned char)s[i]);
    }
    return best;
}

/* \w of Rust's regex */
static int is_word(uint32_t cp)
{
    UChar32 c = (UChar32)cp;
    return u_hasBinaryProperty(c, UCHAR_ALPHABETIC) || u_hasBinaryProperty(c, UCHAR_JOIN_CONTROL) ||
           (U_GET_GC_MASK(c) & (U_GC_M_MASK | U_GC_ND_MASK | U_GC_PC_MASK)) != 0;
}

static size_t last_char(const char *s, size_t n, uint32_t *ret_cp)
{
    size_t back = 1;
    while (back < n && ((unsigned char)s[n - back] & 0xC0) == 0x80)
        back++;
    return td_utf8_decode(s + n - back, back, ret_cp) < 0 ? 0 : back;
}

static int is_whole_word(const td_added_walk *w, size_t start, size_t end)
{
    uint32_t cp;
    if (start && last_char(w->text, start, &cp) && is_word(cp))
        return 0;
    return end == w->n || td_utf8_decode(w->text + end, w->n - end, &cp) < 0 || !is_word(cp);
}

static size_t strip_left(const char *s, size_t n)
{
    uint32_t cp;
    size_t len;
    while (n && (len = last_char(s, n, &cp)) && u_isUWhiteSpace((UChar32)cp))
        n -= len;
    return n;
}

static size_t strip_right(const char *s, size_t at, size_t n)
{
    uint32_t cp;
    int len;
    while (at < n && (len = td_utf8_decode(s + at, n - at, &cp)) > 0 &&
           u_isUWhiteSpace((UChar32)cp))
        at += (size_t)len;
    return at;
}

void td_added_walk_init(td_added_walk *w, const td_added_set *set, const td_added_token *tokens,
                        const char *text, size_t n, int no_special)
{
    *w = (td_added_walk){.set = set,
                         .tokens = tokens,
                         .text = text,
                         .n = n,
                         .no_special = no_special,
                         .next.index = -1};
}

/* The next token that counts; the search goes on behind every one that was looked at, as the Rust
 * crate aho-corasick does. */
static int find(td_added_walk *w, td_added_part *ret_part)
{
    while (w->at < w->n) {
        int64_t index = -1;
        size_t len = w->set->root[(unsigned char)w->text[w->at]]
                         ? longest(w->set, w->text + w->at, w->n - w->at, &index)
                         : 0;
        if (len == 0) {
            w->at++;
            continue;
        }
        size_t start = w->at, end = start + len;
        w->at = end;
        const td_added_token *t = &w->tokens[index];
        if ((w->no_special && t->special) || (t->single_word && !is_whole_word(w, start, end)))
            continue;
        if (t->lstrip) {
            start = strip_left(w->text, start);
            if (start < w->done) /* that white space went to the token before */
                start = w->done;
        }
        if (t->rstrip)
            end = strip_right(w->text, end, w->n);
        *ret_part = (td_added_part){start, end, index};
        return 1;
    }
    return 0;
}

int td_added_walk_next(td_added_walk *w, td_added_part *ret_part)
{
    td_added_part part = w->next;
    w->next.index = -1;
    if (part.index < 0 && !(w->n && find(w, &part))) {
        if (w->done >= w->n)
            return 0;
        *ret_part = (td_added_part){w->done, w->n, -1};
        w->done = w->n;
        return 1;
    }
    if (w->done < part.start) {
        w->next = part;
        *ret_part = (td_added_part){w->done, part.start, -1};
        w->done = part.start;
        return 1;
    }
    w->done = part.end;
    *ret_part = part;
    return 1;
}
