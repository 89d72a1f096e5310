/* SPDX-License-Identifier: Apache-2.0 */
#include "text/normalize.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unicode/uchar.h>
#include <unicode/uset.h>
#include <unicode/unorm2.h>
#include <unicode/ustring.h>

#include "base/cleanup.h"
#include "base/banned.h"

enum { NFC, NFD, NFKC, NFKD, LOWERCASE, STRIP_ACCENTS, STRIP, PREPEND, REPLACE, N_KINDS };
static const char *const names[N_KINDS] = {
    "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Strip", "Prepend", "Replace"};

void td_normalizers_done(td_normalizers *n)
{
    for (size_t i = 0; i < n->n; i++) {
        free((char *)n->list[i].text.ptr);
        td_pattern_free(n->list[i].pattern);
        unorm2_close(n->list[i].form);
        uset_close(n->list[i].set);
    }
    *n = (td_normalizers){0};
}

static int copy_text(td_normalizer *step, const json_t *spec, const char *key, const char *what,
                     td_err *reterr_err)
{
    const json_t *v = json_object_get(spec, key);
    if (!json_is_string(v))
        return td_err_set(reterr_err, -EINVAL,
                          "%s: normalizer.%s must be a string; correct the file", what, key);
    char *p = malloc(json_string_length(v) + 1);
    if (!p)
        return td_err_set(reterr_err, -ENOMEM, "%s: out of memory", what);
    memcpy(p, json_string_value(v), json_string_length(v) + 1);
    step->text = (td_str){p, json_string_length(v)};
    return 0;
}

static int parse_replace(td_normalizer *step, const json_t *spec, const char *what,
                         td_err *reterr_err)
{
    int r = copy_text(step, spec, "content", what, reterr_err);
    const json_t *p = json_object_get(spec, "pattern");
    const json_t *literal = json_object_get(p, "String"), *regex = json_object_get(p, "Regex");
    if (r < 0)
        return r;
    if (json_is_string(literal) && json_string_length(literal))
        return td_pattern_literal(json_string_value(literal), json_string_length(literal),
                                  &step->pattern);
    if (json_is_string(regex))
        return td_pattern_regex(what, json_string_value(regex), &step->pattern, reterr_err);
    return td_err_set(
        reterr_err, -EINVAL,
        "%s: normalizer.pattern must be {\"String\": ...} or {\"Regex\": ...}; correct the file",
        what);
}

static const UNormalizer2 *instance(int kind, UErrorCode *e)
{
    return kind == NFC    ? unorm2_getNFCInstance(e)
           : kind == NFD  ? unorm2_getNFDInstance(e)
           : kind == NFKC ? unorm2_getNFKCInstance(e)
                          : unorm2_getNFKDInstance(e);
}

/* `tokenizers` normalizes with the tables of Unicode 9; what came later stays as it is there, so
 * also here. */
static int open_form(td_normalizer *step, const char *what, td_err *reterr_err)
{
    static const UChar age[] = u"[:age=9.0:]";
    UErrorCode e = U_ZERO_ERROR;
    const UNormalizer2 *whole = instance(step->kind, &e);
    step->set = uset_openPattern(age, -1, &e);
    if (U_SUCCESS(e))
        uset_freeze(step->set);
    step->form = unorm2_openFiltered(whole, step->set, &e);
    if (U_FAILURE(e))
        return td_err_set(reterr_err, -ENOMEM, "%s: normalizer: ICU: %s; install ICU's data files",
                          what, u_errorName(e));
    return 0;
}

static int parse_step(td_normalizers *n, const json_t *spec, const char *what, td_err *reterr_err)
{
    const char *type = json_string_value(json_object_get(spec, "type"));
    int kind = 0;
    while (type && kind < N_KINDS && strcmp(type, names[kind]) != 0)
        kind++;
    if (!type || kind == N_KINDS)
        return td_err_set(
            reterr_err, -ENOTSUP,
            "%s: normalizer.type '%.60s' is not supported; use a model with NFC, NFD, NFKC, NFKD, "
            "Lowercase, StripAccents, Strip, Prepend, Replace or none",
            what, type ? type : "(none)");
    if (n->n == TD_NORMALIZERS_MAX)
        return td_err_set(reterr_err, -E2BIG, "%s: normalizer has more than %d steps", what,
                          TD_NORMALIZERS_MAX);
    td_normalizer *step = &n->list[n->n++];
    *step = (td_normalizer){.kind = kind};
    if (kind == STRIP) {
        step->left = json_is_true(json_object_get(spec, "strip_left"));
        step->right = json_is_true(json_object_get(spec, "strip_right"));
    }
    if (kind <= NFKD)
        return open_form(step, what, reterr_err);
    if (kind == PREPEND)
        return copy_text(step, spec, "prepend", what, reterr_err);
    return kind == REPLACE ? parse_replace(step, spec, what, reterr_err) : 0;
}

int td_normalizers_parse(td_normalizers *n, const json_t *spec, const char *what,
                         td_err *reterr_err)
{
    if (!spec || json_is_null(spec))
        return 0;
    const char *type = json_string_value(json_object_get(spec, "type"));
    if (!type || strcmp(type, "Sequence") != 0)
        return parse_step(n, spec, what, reterr_err);
    size_t i;
    json_t *step;
    json_array_foreach(json_object_get(spec, "normalizers"), i, step)
    {
        int r = parse_step(n, step, what, reterr_err);
        if (r < 0)
            return r;
    }
    return 0;
}

static int is_ascii(const char *s, size_t n)
{
    unsigned char all = 0;
    for (size_t i = 0; i < n; i++)
        all |= (unsigned char)s[i];
    return all < 0x80;
}

/* ICU's C interface normalizes UTF-16 only. */
static int compose(const td_normalizer *step, const char *text, size_t n, td_strbuf *out)
{
    if (is_ascii(text, n)) {
        td_strbuf_add(out, text, n);
        return 0;
    }
    UErrorCode e = U_ZERO_ERROR;
    const UNormalizer2 *form = step->form;
    int32_t n16 = 0, n_out, n8 = 0;
    TD_AUTO_FREE UChar *wide = malloc((n + 1) * sizeof *wide);
    if (!wide)
        return -ENOMEM;
    u_strFromUTF8(wide, (int32_t)n + 1, &n16, text, (int32_t)n, &e);
    n_out = unorm2_normalize(form, wide, n16, NULL, 0, &e);
    if (e != U_BUFFER_OVERFLOW_ERROR && U_FAILURE(e))
        return -ENOMEM;
    e = U_ZERO_ERROR;
    TD_AUTO_FREE UChar *norm = malloc(((size_t)n_out + 1) * sizeof *norm);
    TD_AUTO_FREE char *narrow = malloc((size_t)n_out * 3 + 1);
    if (!norm || !narrow)
        return -ENOMEM;
    unorm2_normalize(form, wide, n16, norm, n_out + 1, &e);
    u_strToUTF8(narrow, n_out * 3 + 1, &n8, norm, n_out, &e);
    if (U_FAILURE(e))
        return -ENOMEM;
    td_strbuf_add(out, narrow, (size_t)n8);
    return 0;
}

/* Character by character, without context, as Rust's char::to_lowercase. */
static void lower(uint32_t cp, td_strbuf *out)
{
    char utf8[4];
    if (cp == 0x130) /* the only character whose lower case is two */
        td_strbuf_add(out, "i\xCC\x87", 3);
    else
        td_strbuf_add(out, utf8, (size_t)td_utf8_encode((uint32_t)u_tolower((UChar32)cp), utf8));
}

static int is_mark(uint32_t cp)
{
    UVersionInfo age;
    if (!(U_GET_GC_MASK((UChar32)cp) & U_GC_M_MASK))
        return 0;
    u_charAge((UChar32)cp, age);
    return age[0] <= 9; /* as open_form() */
}

static void each_char(int kind, const char *text, size_t n, td_strbuf *out)
{
    uint32_t cp;
    for (size_t at = 0; at < n;) {
        int len = td_utf8_decode(text + at, n - at, &cp);
        if (len < 0)
            return; /* the caller validated the text */
        if (kind == LOWERCASE)
            lower(cp, out);
        else if (!is_mark(cp))
            td_strbuf_add(out, text + at, (size_t)len);
        at += (size_t)len;
    }
}

static void strip(const td_normalizer *step, const char *text, size_t n, td_strbuf *out)
{
    size_t start = 0, end = n;
    uint32_t cp;
    int len;
    while (step->left && start < n && (len = td_utf8_decode(text + start, n - start, &cp)) > 0 &&
           u_isUWhiteSpace((UChar32)cp))
        start += (size_t)len;
    while (step->right && end > start) {
        size_t at = end - 1;
        while (at > start && ((unsigned char)text[at] & 0xC0) == 0x80)
            at--;
        if (td_utf8_decode(text + at, end - at, &cp) < 0 || !u_isUWhiteSpace((UChar32)cp))
            break;
        end = at;
    }
    td_strbuf_add(out, text + start, end - start);
}

static int replace(const td_normalizer *step, td_matcher *m, const char *text, size_t n,
                   td_strbuf *out)
{
    td_spans spans = {0};
    int r = td_pattern_cut(step->pattern, m, text, n, &spans);
    for (size_t i = 0; r == 0 && i < spans.n; i++) {
        const td_span *s = &spans.data[i];
        if (s->match)
            td_strbuf_add(out, step->text.ptr, step->text.len);
        else
            td_strbuf_add(out, text + s->start, s->end - s->start);
    }
    td_spans_done(&spans);
    return r;
}

static int apply(const td_normalizer *step, td_matcher *m, const char *text, size_t n,
                 td_strbuf *out)
{
    if (n > INT32_MAX / 4)
        return -EOVERFLOW;
    switch (step->kind) {
    case LOWERCASE:
    case STRIP_ACCENTS:
        each_char(step->kind, text, n, out);
        return 0;
    case STRIP:
        strip(step, text, n, out);
        return 0;
    case PREPEND:
        if (n)
            td_strbuf_add(out, step->text.ptr, step->text.len);
        td_strbuf_add(out, text, n);
        return 0;
    case REPLACE:
        return replace(step, m, text, n, out);
    default:
        return compose(step, text, n, out);
    }
}

int td_normalizers_apply(const td_normalizers *n, td_matcher *m, const char *text, size_t len,
                         td_strbuf *scratch, td_strbuf *out)
{
    td_strbuf_reset(out);
    td_strbuf_add(out, text, len);
    for (size_t i = 0; i < n->n; i++) {
        td_strbuf_reset(scratch);
        int r = apply(&n->list[i], m, out->data, out->len, scratch);
        if (r < 0)
            return r;
        td_strbuf swap = *out;
        *out = *scratch;
        *scratch = swap;
    }
    return out->failed || scratch->failed ? -ENOMEM : 0;
}
