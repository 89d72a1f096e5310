/* SPDX-License-Identifier: Apache-2.0 */
#include "base/json.h"

#include <errno.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/file.h"
#include "base/strbuf.h"
#include "base/banned.h"

enum { BYTES_DEFAULT = 8 << 20, DEPTH_DEFAULT = 32, NODES_DEFAULT = 64 << 10 };

typedef struct scan {
    size_t depth, nodes, max_depth, max_nodes;
} scan;

/* Past a string that opens at `at`; n when it never ends. */
static size_t skip_string(const char *t, size_t n, size_t at)
{
    for (at++; at < n; at++) {
        if (t[at] == '\\')
            at++;
        else if (t[at] == '"')
            return at + 1;
    }
    return n;
}

static int is_scalar_byte(char c)
{
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '-' ||
           c == '+' || c == '.';
}

static int scan_text(scan *s, const char *t, size_t n, td_err *reterr_err)
{
    for (size_t at = 0; at < n;) {
        char c = t[at];
        if (c == '{' || c == '[') {
            s->nodes++;
            if (++s->depth > s->max_depth)
                return td_err_set(reterr_err, -E2BIG, "nested deeper than %zu levels",
                                  s->max_depth);
            at++;
        } else if (c == '}' || c == ']') {
            if (s->depth-- == 0)
                return td_err_set(reterr_err, -EINVAL, "unbalanced '%c' at byte %zu", c, at);
            at++;
        } else if (c == '"') {
            s->nodes++;
            at = skip_string(t, n, at);
        } else if (is_scalar_byte(c)) {
            s->nodes++;
            while (at < n && is_scalar_byte(t[at]))
                at++;
        } else if (c == ' ' || c == '\n' || c == '\r' || c == '\t' || c == ',' || c == ':') {
            at++;
        } else {
            return td_err_set(reterr_err, -EINVAL, "unexpected byte 0x%02x at byte %zu",
                              (unsigned char)c, at);
        }
        if (s->nodes > s->max_nodes)
            return td_err_set(reterr_err, -E2BIG, "more than %zu values", s->max_nodes);
    }
    return s->depth ? td_err_set(reterr_err, -EINVAL, "ends inside an object or list") : 0;
}

int td_json_scan(const char *text, size_t n, const td_json_limits *limits, td_err *reterr_err)
{
    size_t max_bytes = limits && limits->max_bytes ? limits->max_bytes : BYTES_DEFAULT;
    scan s = {.max_depth = limits && limits->max_depth ? limits->max_depth : DEPTH_DEFAULT,
              .max_nodes = limits && limits->max_nodes ? limits->max_nodes : NODES_DEFAULT};
    if (n > max_bytes)
        return td_err_set(reterr_err, -E2BIG, "%zu bytes; at most %zu are taken", n, max_bytes);
    if (!td_utf8_valid(text, n))
        return td_err_set(reterr_err, -EILSEQ, "not valid UTF-8");
    return scan_text(&s, text, n, reterr_err);
}

int td_json_parse(const char *text, size_t n, const td_json_limits *limits, const char *what,
                  json_t **ret_root, td_err *reterr_err)
{
    int r = td_json_scan(text, n, limits, reterr_err);
    if (r < 0) {
        td_err_prefix(reterr_err, "%s", what);
        return r;
    }
    if (n == 0)
        return td_err_set(reterr_err, -EINVAL, "%s: is empty; JSON must stand there", what);
    json_error_t e;
    json_t *root = json_loadb(text, n, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &e);
    if (!root)
        return td_err_set(reterr_err, -EINVAL, "%s: line %d column %d: %s", what, e.line, e.column,
                          e.text);
    *ret_root = root;
    return 0;
}

int td_json_load(const char *path, const td_json_limits *limits, json_t **ret_root,
                 td_err *reterr_err)
{
    TD_AUTO_FREE char *text = NULL;
    size_t n = 0;
    int r = td_file_read(path, limits && limits->max_bytes ? limits->max_bytes : BYTES_DEFAULT,
                         &text, &n, reterr_err);
    return r < 0 ? r : td_json_parse(text, n, limits, path, ret_root, reterr_err);
}

static json_t *present(const json_t *o, const char *key)
{
    json_t *v = json_object_get(o, key);
    return json_is_null(v) ? NULL : v;
}

int td_json_get_int(const json_t *o, const char *what, const char *key, int64_t min, int64_t max,
                    int64_t *ret_v, td_err *reterr_err)
{
    const json_t *v = present(o, key);
    if (!v)
        return 0;
    int64_t x = json_integer_value(v);
    if (!json_is_integer(v) || x < min || x > max)
        return td_err_set(reterr_err, -EINVAL, "%s: %s must be an integer between %lld and %lld",
                          what, key, (long long)min, (long long)max);
    *ret_v = x;
    return 1;
}

int td_json_get_num(const json_t *o, const char *what, const char *key, double min, double max,
                    double *ret_v, td_err *reterr_err)
{
    const json_t *v = present(o, key);
    if (!v)
        return 0;
    double x = json_number_value(v);
    if (!json_is_number(v) || !(x >= min && x <= max))
        return td_err_set(reterr_err, -EINVAL, "%s: %s must be a number between %g and %g", what,
                          key, min, max);
    *ret_v = x;
    return 1;
}

int td_json_get_bool(const json_t *o, const char *what, const char *key, int *ret_v,
                     td_err *reterr_err)
{
    const json_t *v = present(o, key);
    if (!v)
        return 0;
    if (!json_is_boolean(v))
        return td_err_set(reterr_err, -EINVAL, "%s: %s must be true or false", what, key);
    *ret_v = json_is_true(v);
    return 1;
}

int td_json_get_str(const json_t *o, const char *what, const char *key, const char **ret_v,
                    td_err *reterr_err)
{
    const json_t *v = present(o, key);
    if (!v)
        return 0;
    if (!json_is_string(v))
        return td_err_set(reterr_err, -EINVAL, "%s: %s must be a string", what, key);
    /* a C string would end early: texts that differ behind a NUL must not look the same */
    if (strlen(json_string_value(v)) != json_string_length(v))
        return td_err_set(reterr_err, -EINVAL, "%s: %s must not hold a NUL character", what, key);
    *ret_v = json_string_value(v);
    return 1;
}
