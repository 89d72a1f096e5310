/* SPDX-License-Identifier: Apache-2.0 */
/* Pull reader over a JSON text in memory: for tokenizer.json, whose half a million merges would
 * cost jansson seconds of time and hundreds of megabytes. No allocation, no recursion. The first
 * failure sticks; ask td_jpull_failed() at the end of a group of calls. */
#ifndef TD_TEXT_JSON_PULL_H
#define TD_TEXT_JSON_PULL_H

#include <stddef.h>
#include <stdint.h>

#include "base/strbuf.h"

typedef struct td_jpull {
    const char *base, *p, *end;
    const char *failed; /* NULL, or what was wrong at p; static text */
} td_jpull;

void td_jpull_init(td_jpull *j, const char *text, size_t n);
/* Next character that is not white space, not consumed; 0 at the end or after a failure. */
char td_jpull_peek(td_jpull *j);
/* Consume c if it is next. 1 or 0. */
int td_jpull_try(td_jpull *j, char c);
/* Consume c or fail. */
void td_jpull_expect(td_jpull *j, char c);
/* Consume a string; the view is the raw text between the quotes, not yet unescaped. *ret_escaped:
 * it holds a backslash. */
int td_jpull_string(td_jpull *j, td_str *ret_raw, int *ret_escaped);
/* Consume ["a", "b"] from exactly j->p when neither string holds an escape: 1 and their texts. 0
 * with nothing consumed otherwise, be it right or wrong: read it with the other functions. */
int td_jpull_try_pair(td_jpull *j, td_str ret_raw[2]);
/* Consume an integer 0..UINT32_MAX without sign, fraction or exponent. */
int td_jpull_u32(td_jpull *j, uint32_t *ret_v);
/* Consume any value, at most 64 levels deep; *ret_text (may be NULL) is its text. Brackets and
 * strings are checked, the rest is left to whoever parses the text. */
int td_jpull_skip(td_jpull *j, td_str *ret_text);
/* Walk an object: 1 and the next key (its ':' consumed), 0 at the end or on failure. *first starts
 * at 1. */
int td_jpull_key(td_jpull *j, int *first, td_str *ret_raw, int *ret_escaped);
/* Walk an array: 1 when an element follows. *first starts at 1. */
int td_jpull_element(td_jpull *j, int *first);
/* Set the failure unless one is set. */
void td_jpull_fail(td_jpull *j, const char *what);
/* Line number of the present place, from 1. */
size_t td_jpull_line(const td_jpull *j);
/* Write the unescaped form of a raw string to out (room for raw.len bytes). Returns its length, or
 * -EILSEQ. */
int64_t td_jpull_unescape(td_str raw, char *out);

#endif
