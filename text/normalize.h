/* SPDX-License-Identifier: Apache-2.0 */
/* Normalizers of tokenizer.json, in order: NFC, NFD, NFKC, NFKD, Lowercase, StripAccents, Strip,
 * Prepend, Replace, Sequence. Others are refused by name. Immutable after parsing. */
#ifndef TD_TEXT_NORMALIZE_H
#define TD_TEXT_NORMALIZE_H

#include <jansson.h>
#include <stddef.h>

#include "base/err.h"
#include "base/strbuf.h"
#include "text/pattern.h"

enum { TD_NORMALIZERS_MAX = 16 };

typedef struct td_normalizer {
    int kind;
    int left, right;           /* Strip */
    td_str text;               /* Prepend and Replace: heap */
    td_pattern *pattern;       /* Replace */
    struct UNormalizer2 *form; /* NFC and the like */
    struct USet *set;          /* characters form works on */
} td_normalizer;

typedef struct td_normalizers {
    td_normalizer list[TD_NORMALIZERS_MAX];
    size_t n;
} td_normalizers;

/* Read the value of "normalizer" (null: none). what names the file. */
int td_normalizers_parse(td_normalizers *n, const json_t *spec, const char *what,
                         td_err *reterr_err);
void td_normalizers_done(td_normalizers *n);
/* Replace the contents of out by the normalized form of valid UTF-8. scratch holds steps between.
 * 0; -ENOMEM; -EOVERFLOW a match limit. */
int td_normalizers_apply(const td_normalizers *n, td_matcher *m, const char *text, size_t len,
                         td_strbuf *scratch, td_strbuf *out);

#endif
