/* SPDX-License-Identifier: Apache-2.0 */
#include "text/pretok.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/banned.h"

enum { REMOVED, ISOLATED, MERGED_WITH_PREVIOUS, MERGED_WITH_NEXT, CONTIGUOUS, N_BEHAVIORS };
static const char *const behaviors[N_BEHAVIORS] = {"Removed", "Isolated", "MergedWithPrevious",
                                                   "MergedWithNext", "Contiguous"};

/* GPT-2's own pattern, which ByteLevel applies when use_regex is set. */
static const char gpt2_pattern[] =
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";

void td_pretoks_done(td_pretoks *p)
{
    for (size_t i = 0; i < p->n; i++)
        td_pattern_free(p->list[i].pattern);
    td_pattern_free(p->gpt2.pattern);
    *p = (td_pretoks){0};
}

void td_pretok_work_done(td_pretok_work *w)
{
    td_spans_done(&w->a);
    td_spans_done(&w->b);
    td_spans_done(&w->cut);
    td_strbuf_done(&w->spaced);
}

static int parse_split(td_pretok *t, const json_t *spec, const char *what, td_err *reterr_err)
{
    const char *behavior = json_string_value(json_object_get(spec, "behavior"));
    const json_t *p = json_object_get(spec, "pattern");
    const json_t *literal = json_object_get(p, "String"), *regex = json_object_get(p, "Regex");
    while (behavior && t->behavior < N_BEHAVIORS && strcmp(behavior, behaviors[t->behavior]) != 0)
        t->behavior++;
    if (!behavior || t->behavior == N_BEHAVIORS)
        return td_err_set(reterr_err, -EINVAL,
                          "%s: pre_tokenizer.behavior '%.60s' is unknown; correct the file", what,
                          behavior ? behavior : "(none)");
    t->invert = json_is_true(json_object_get(spec, "invert"));
    if (json_is_string(literal))
        return td_pattern_literal(json_string_value(literal), json_string_length(literal),
                                  &t->pattern);
    if (json_is_string(regex))
        return td_pattern_regex(what, json_string_value(regex), &t->pattern, reterr_err);
    return td_err_set(
        reterr_err, -EINVAL,
        "%s: pre_tokenizer.pattern must be {\"String\": ...} or {\"Regex\": ...}; correct the file",
        what);
}

static int parse_byte_level(td_pretoks *p, const json_t *spec, const char *what, td_err *reterr_err)
{
    p->has_byte_level = 1;
    p->prefix_space = !json_is_false(json_object_get(spec, "add_prefix_space"));
    p->gpt2 = (td_pretok){.behavior = ISOLATED};
    if (json_is_false(json_object_get(spec, "use_regex")))
        return 0;
    return td_pattern_regex(what, gpt2_pattern, &p->gpt2.pattern, reterr_err);
}

static int parse_step(td_pretoks *p, const json_t *spec, const char *what, td_err *reterr_err)
{
    const char *type = json_string_value(json_object_get(spec, "type"));
    if (p->has_byte_level)
        return td_err_set(reterr_err, -ENOTSUP,
                          "%s: pre_tokenizer has a step after ByteLevel, which is not supported; "
                          "put ByteLevel last",
                          what);
    if (type && strcmp(type, "ByteLevel") == 0)
        return parse_byte_level(p, spec, what, reterr_err);
    if (p->n == TD_PRETOKS_MAX)
        return td_err_set(reterr_err, -E2BIG, "%s: pre_tokenizer has more than %d steps", what,
                          TD_PRETOKS_MAX);
    td_pretok *t = &p->list[p->n++];
    *t = (td_pretok){0};
    if (type && strcmp(type, "Split") == 0)
        return parse_split(t, spec, what, reterr_err);
    t->behavior = json_is_true(json_object_get(spec, "individual_digits")) ? ISOLATED : CONTIGUOUS;
    if (type && strcmp(type, "Digits") == 0)
        return td_pattern_regex(what, "\\p{N}", &t->pattern, reterr_err); /* Rust's is_numeric */
    return td_err_set(reterr_err, -ENOTSUP,
                      "%s: pre_tokenizer.type '%.60s' is not supported; use a model with Split, "
                      "Digits and ByteLevel",
                      what, type ? type : "(none)");
}

int td_pretoks_parse(td_pretoks *p, const json_t *spec, const char *what, td_err *reterr_err)
{
    const char *type = json_string_value(json_object_get(spec, "type"));
    int r = 0;
    if (type && strcmp(type, "Sequence") == 0) {
        size_t i;
        json_t *step;
        json_array_foreach(json_object_get(spec, "pretokenizers"), i, step)
        {
            r = parse_step(p, step, what, reterr_err);
            if (r < 0)
                return r;
        }
    } else if (type) {
        r = parse_step(p, spec, what, reterr_err);
    }
    if (r == 0 && !p->has_byte_level)
        r = td_err_set(
            reterr_err, -ENOTSUP,
            "%s: pre_tokenizer has no ByteLevel; only byte-level tokenizers are supported", what);
    return r;
}

/* Join what the behaviour joins, as `tokenizers` does; base is added to the offsets. */
static void join(const td_pretok *t, const td_spans *cut, uint32_t base, td_spans *out)
{
    int before = 0;
    size_t from = out->n;
    for (size_t i = 0; i < cut->n; i++) {
        td_span s = cut->data[i];
        int match = s.match != t->invert, merge = 0;
        if (t->behavior == REMOVED && match)
            continue;
        if (t->behavior == CONTIGUOUS)
            merge = match == before;
        if (t->behavior == MERGED_WITH_PREVIOUS)
            merge = match && !before;
        before = match;
        if (merge && out->n > from)
            out->data[out->n - 1].end = base + s.end;
        else
            td_spans_add(out, base + s.start, base + s.end, 0);
    }
}

/* The mirror image of MergedWithPrevious. */
static void join_next(const td_pretok *t, const td_spans *cut, uint32_t base, td_spans *out)
{
    int after = 0;
    size_t from = out->n;
    for (size_t i = cut->n; i-- > 0;) {
        td_span s = cut->data[i];
        int match = s.match != t->invert;
        if (match && !after && out->n > from)
            out->data[out->n - 1].start = base + s.start;
        else
            td_spans_add(out, base + s.start, base + s.end, 0);
        after = match;
    }
    for (size_t i = from, k = out->n; i + 1 < k; i++) {
        td_span swap = out->data[i];
        out->data[i] = out->data[--k];
        out->data[k] = swap;
    }
}

static int cut_span(const td_pretok *t, td_matcher *m, td_pretok_work *w, const char *text,
                    uint32_t base, size_t n, td_spans *out)
{
    w->cut.n = 0;
    int r = td_pattern_cut(t->pattern, m, text, n, &w->cut);
    if (r < 0)
        return r;
    if (t->behavior == MERGED_WITH_NEXT)
        join_next(t, &w->cut, base, out);
    else
        join(t, &w->cut, base, out);
    return w->cut.failed || out->failed ? -ENOMEM : 0;
}

/* ByteLevel's own split, and the rest, work on each piece alone: a space may be put before it
 * first. */
static int finish_piece(const td_pretoks *p, td_matcher *m, td_pretok_work *w, const char *piece,
                        size_t n, td_piece_fn *fn, void *arg)
{
    if (p->prefix_space && piece[0] != ' ') {
        td_strbuf_reset(&w->spaced);
        td_strbuf_addc(&w->spaced, ' ');
        td_strbuf_add(&w->spaced, piece, n);
        if (w->spaced.failed)
            return -ENOMEM;
        piece = w->spaced.data;
        n = w->spaced.len;
    }
    if (!p->gpt2.pattern)
        return fn(arg, piece, n);
    w->b.n = 0;
    int r = cut_span(&p->gpt2, m, w, piece, 0, n, &w->b);
    for (size_t i = 0; r >= 0 && i < w->b.n; i++)
        r = fn(arg, piece + w->b.data[i].start, w->b.data[i].end - w->b.data[i].start);
    return r;
}

int td_pretoks_apply(const td_pretoks *p, td_matcher *m, td_pretok_work *w, const char *text,
                     size_t n, td_piece_fn *fn, void *arg)
{
    if (n == 0)
        return 0;
    w->a.n = 0;
    td_spans_add(&w->a, 0, (uint32_t)n, 0);
    for (size_t i = 0; i < p->n; i++) {
        w->b.n = 0;
        for (size_t k = 0; k < w->a.n; k++) {
            td_span s = w->a.data[k];
            int r = cut_span(&p->list[i], m, w, text + s.start, s.start, s.end - s.start, &w->b);
            if (r < 0)
                return r;
        }
        td_spans swap = w->a;
        w->a = w->b;
        w->b = swap;
    }
    if (w->a.failed)
        return -ENOMEM;
    for (size_t k = 0; k < w->a.n; k++) {
        td_span s = w->a.data[k];
        int r = finish_piece(p, m, w, text + s.start, s.end - s.start, fn, arg);
        if (r < 0)
            return r;
    }
    return 0;
}
