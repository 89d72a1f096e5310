/* SPDX-License-Identifier: Apache-2.0 */
#include "text/pattern.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "base/bug.h"
#include "base/banned.h"

enum { LIMIT_BASE = 1000000, LIMIT_PER_BYTE = 8 };

struct td_pattern {
    pcre2_code *code; /* NULL: literal */
    char *literal;
    size_t n;
};

void td_spans_done(td_spans *s)
{
    free(s->data);
    *s = (td_spans){0};
}

void td_spans_add(td_spans *s, uint32_t start, uint32_t end, int match)
{
    if (s->n == s->cap && !s->failed) {
        size_t cap = s->cap ? s->cap * 2 : 64;
        td_span *more = realloc(s->data, cap * sizeof *more);
        if (!more)
            s->failed = 1;
        else
            s->data = more, s->cap = cap;
    }
    if (!s->failed)
        s->data[s->n++] = (td_span){start, end, match};
}

static int compile(const char *what, const char *source, const td_strbuf *translated,
                   pcre2_code **ret_code, td_err *reterr_err)
{
    pcre2_compile_context *ctx = pcre2_compile_context_create(NULL);
    if (!ctx)
        return td_err_set(reterr_err, -ENOMEM, "%s: out of memory", what);
    pcre2_set_newline(ctx, PCRE2_NEWLINE_LF); /* Oniguruma: only \n ends a line */
    pcre2_set_parens_nest_limit(ctx, 100);
    int e = 0;
    PCRE2_SIZE at = 0;
    /* MULTILINE: in Ruby's syntax ^ and $ always look at lines */
    pcre2_code *code = pcre2_compile(
        (PCRE2_SPTR)translated->data, translated->len,
        PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C, &e, &at, ctx);
    pcre2_compile_context_free(ctx);
    uint32_t empty = 0;
    if (!code) {
        PCRE2_UCHAR text[120];
        if (pcre2_get_error_message(e, text, sizeof text) < 0)
            text[0] = 0;
        return td_err_set(reterr_err, -EINVAL,
                          "%s: PCRE2 refuses the pattern '%.200s': %s; correct it", what, source,
                          (char *)text);
    }
    pcre2_pattern_info(code, PCRE2_INFO_MATCHEMPTY, &empty);
    if (empty) {
        pcre2_code_free(code);
        return td_err_set(
            reterr_err, -ENOTSUP,
            "%s: the pattern '%.200s' can match an empty text, which is not supported; correct it",
            what, source);
    }
    pcre2_jit_compile(code,
                      PCRE2_JIT_COMPLETE); /* without it the interpreter works, and is counted */
    *ret_code = code;
    return 0;
}

int td_pattern_regex(const char *what, const char *source, td_pattern **ret_p, td_err *reterr_err)
{
    td_strbuf translated;
    td_strbuf_init(&translated);
    td_pattern *p = calloc(1, sizeof *p);
    int r = p ? td_pattern_translate(what, source, &translated, reterr_err)
              : td_err_set(reterr_err, -ENOMEM, "%s: out of memory", what);
    if (r == 0)
        r = compile(what, source, &translated, &p->code, reterr_err);
    td_strbuf_done(&translated);
    if (r < 0) {
        td_pattern_free(p);
        return r;
    }
    *ret_p = p;
    return 0;
}

int td_pattern_literal(const char *text, size_t n, td_pattern **ret_p)
{
    td_pattern *p = calloc(1, sizeof *p);
    char *copy = malloc(n + 1);
    if (!p || !copy) {
        free(p);
        free(copy);
        return -ENOMEM;
    }
    if (n)
        memcpy(copy, text, n);
    copy[n] = 0;
    p->literal = copy;
    p->n = n;
    *ret_p = p;
    return 0;
}

void td_pattern_free(td_pattern *p)
{
    if (!p)
        return;
    pcre2_code_free(p->code);
    free(p->literal);
    free(p);
}

int td_matcher_init(td_matcher *m, _Atomic uint64_t *n_interpreted)
{
    *m = (td_matcher){.n_interpreted = n_interpreted};
    m->data = pcre2_match_data_create(1, NULL);
    m->context = pcre2_match_context_create(NULL);
    if (!m->data || !m->context) {
        td_matcher_done(m);
        return -ENOMEM;
    }
    return 0;
}

void td_matcher_done(td_matcher *m)
{
    pcre2_match_data_free(m->data);
    pcre2_match_context_free(m->context);
    *m = (td_matcher){0};
}

/* First match at or after `at`. 1 found, 0 none, negative error. */
static int find(const td_pattern *p, td_matcher *m, const char *text, size_t n, size_t at,
                size_t *ret_start, size_t *ret_end)
{
    if (!p->code) {
        const char *hit = p->n ? memmem(text + at, n - at, p->literal, p->n) : NULL;
        if (!hit)
            return 0;
        *ret_start = (size_t)(hit - text);
        *ret_end = *ret_start + p->n;
        return 1;
    }
    int r = pcre2_match(p->code, (PCRE2_SPTR)text, n, at, PCRE2_NO_UTF_CHECK, m->data, m->context);
    if (r == PCRE2_ERROR_JIT_STACKLIMIT) {
        atomic_fetch_add_explicit(m->n_interpreted, 1, memory_order_relaxed);
        r = pcre2_match(p->code, (PCRE2_SPTR)text, n, at, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT,
                        m->data, m->context);
    }
    if (r == PCRE2_ERROR_NOMATCH)
        return 0;
    if (r < 0)
        return r == PCRE2_ERROR_NOMEMORY ? -ENOMEM : -EOVERFLOW;
    const PCRE2_SIZE *v = pcre2_get_ovector_pointer(m->data);
    *ret_start = v[0];
    *ret_end = v[1];
    return 1;
}

int td_pattern_cut(const td_pattern *p, td_matcher *m, const char *text, size_t n, td_spans *out)
{
    TD_BUG_ON(n > INT32_MAX);
    size_t limit = LIMIT_BASE + n * LIMIT_PER_BYTE, at = 0, start = 0, end = 0;
    pcre2_set_match_limit(m->context, (uint32_t)TD_MIN(limit, (size_t)UINT32_MAX));
    int r = 0;
    while (at < n && (r = find(p, m, text, n, at, &start, &end)) > 0) {
        if (end <= start || start < at) /* \K and the like: the translator refuses them */
            return -EOVERFLOW;
        if (start > at)
            td_spans_add(out, (uint32_t)at, (uint32_t)start, 0);
        td_spans_add(out, (uint32_t)start, (uint32_t)end, 1);
        at = end;
    }
    if (r < 0)
        return r;
    if (at < n)
        td_spans_add(out, (uint32_t)at, (uint32_t)n, 0);
    return out->failed ? -ENOMEM : 0;
}
