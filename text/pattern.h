/* SPDX-License-Identifier: Apache-2.0 */
/* Patterns of tokenizer.json: {"String": s} or {"Regex": r}. Regexes there are Oniguruma's (Ruby
 * syntax); they are translated to PCRE2, and what the two read differently is refused by name.
 * Immutable after compile; a td_matcher belongs to one thread. */
#ifndef TD_TEXT_PATTERN_H
#define TD_TEXT_PATTERN_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "base/strbuf.h"

typedef struct td_pattern td_pattern;

/* Part of a text: [start, end), and whether the pattern matched it. */
typedef struct td_span {
    uint32_t start, end;
    int match;
} td_span;

typedef struct td_spans {
    td_span *data;
    size_t n, cap;
    int failed;
} td_spans;

void td_spans_done(td_spans *s);
void td_spans_add(td_spans *s, uint32_t start, uint32_t end, int match);

/* what names the place in error texts ("tokenizer.json: pre_tokenizer.pattern"). */
int td_pattern_regex(const char *what, const char *source, td_pattern **ret_p, td_err *reterr_err);
int td_pattern_literal(const char *text, size_t n, td_pattern **ret_p);
void td_pattern_free(td_pattern *p);

typedef struct td_matcher {
    struct pcre2_real_match_data_8 *data;
    struct pcre2_real_match_context_8 *context;
    _Atomic uint64_t *n_interpreted; /* counts matches that compiled code could not do and PCRE2's
                                        interpreter did */
} td_matcher;
int td_matcher_init(td_matcher *m, _Atomic uint64_t *n_interpreted);
void td_matcher_done(td_matcher *m);

/* Cut valid UTF-8 (n < 2^31) into alternating matches and gaps, all of it covered, nothing empty;
 * appended to out. 0; -ENOMEM; -EOVERFLOW the pattern ran into its match limit. */
int td_pattern_cut(const td_pattern *p, td_matcher *m, const char *text, size_t n, td_spans *out);

/* Rewrite Oniguruma's syntax as PCRE2's. -ENOTSUP names what differs. For tests. */
int td_pattern_translate(const char *what, const char *source, td_strbuf *out, td_err *reterr_err);

#endif
