/* SPDX-License-Identifier: Apache-2.0 */
/* td_json_scan: bounds a JSON text before jansson sees it (jansson can limit none of these at run
 * time). No allocation, no recursion, one pass. Typed getters over jansson follow. */
#ifndef TD_BASE_JSON_H
#define TD_BASE_JSON_H

#include <jansson.h>
#include <stddef.h>
#include <stdint.h>

#include "base/err.h"

typedef struct td_json_limits {
    size_t max_bytes, max_depth, max_nodes; /* 0 = default: 8 MiB, 32, 65,536 */
} td_json_limits;

/* Check size, depth, node count, UTF-8 and gross structure.
 * 0 acceptable (jansson still parses strictly)  -E2BIG size, depth or nodes  -EILSEQ not UTF-8
 * -EINVAL not JSON */
int td_json_scan(const char *text, size_t n, const td_json_limits *limits, td_err *reterr_err);

/* Scan, then parse strictly (duplicate keys are refused). what names the source in the error
 * ("config.json"). Caller owns *ret_root (json_decref). */
int td_json_parse(const char *text, size_t n, const td_json_limits *limits, const char *what,
                  json_t **ret_root, td_err *reterr_err);

/* Read a whole file (at most limits->max_bytes) and parse it. */
int td_json_load(const char *path, const td_json_limits *limits, json_t **ret_root,
                 td_err *reterr_err);

/* Getters on an object: 1 found and stored, 0 absent or null (output unchanged), -EINVAL wrong type
 * or outside [min, max] with the field named in the error as "<what>: <key> ...". */
int td_json_get_int(const json_t *o, const char *what, const char *key, int64_t min, int64_t max,
                    int64_t *ret_v, td_err *reterr_err);
int td_json_get_num(const json_t *o, const char *what, const char *key, double min, double max,
                    double *ret_v, td_err *reterr_err);
int td_json_get_bool(const json_t *o, const char *what, const char *key, int *ret_v,
                     td_err *reterr_err);
/* Borrowed from o. */
int td_json_get_str(const json_t *o, const char *what, const char *key, const char **ret_v,
                    td_err *reterr_err);

#endif
