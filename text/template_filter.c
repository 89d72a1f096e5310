/* SPDX-License-Identifier: Apache-2.0 */
/* Filters: what stands behind "|". Semantics are Jinja 3.1's; tojson is that of transformers. */
#include <errno.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "text/template_value.h"
#include "base/bug.h"
#include "base/banned.h"

typedef td_value filter_fn(td_run *r, td_value v, const td_args *a);

static td_value undefined(void)
{
    return td_v_undefined((td_str){0});
}

/* Call a string's method by name. */
static td_value by_method(td_run *r, td_value v, const char *name, const td_args *a)
{
    td_value s = td_v_to_str(r, v);
    return r->code ? undefined()
                   : td_v_call_method(r, s, (uint32_t)td_v_method_number(s, td_str_of(name)), a);
}

static td_value f_upper(td_run *r, td_value v, const td_args *a)
{
    return by_method(r, v, "upper", a);
}

static td_value f_lower(td_run *r, td_value v, const td_args *a)
{
    return by_method(r, v, "lower", a);
}

static td_value f_capitalize(td_run *r, td_value v, const td_args *a)
{
    return by_method(r, v, "capitalize", a);
}

static td_value f_trim(td_run *r, td_value v, const td_args *a)
{
    td_value chars = td_args_get(a, 0, "chars", td_v_none());
    td_args given = {.at = &chars, .n = 1};
    return by_method(r, v, "strip", &given);
}

static td_value f_replace(td_run *r, td_value v, const td_args *a)
{
    td_value given[3] = {td_v_to_str(r, td_args_get(a, 0, "old", undefined())),
                         td_v_to_str(r, td_args_get(a, 1, "new", undefined())),
                         td_args_get(a, 2, "count", td_v_none())};
    td_args args = {.at = given, .n = given[2].kind == V_NONE ? 2 : 3};
    return by_method(r, v, "replace", &args);
}

/* A letter begins a word after white space, "-", "(", "{", "[" or "<". */
static td_value f_title(td_run *r, td_value v, const td_args *a)
{
    td_value s = td_v_to_str(r, v);
    td_strbuf b;
    td_run_buffer(r, &b);
    td_args none = {0};
    for (size_t at = 0; !r->code && at < s.s.len;) {
        size_t n = 0;
        uint32_t cp = 0;
        int separator = 0;
        while (at + n < s.s.len && !separator) {
            int len = TD_MAX(td_utf8_decode(s.s.ptr + at + n, s.s.len - at - n, &cp), 1);
            separator = td_is_space(cp) || (cp < 0x80 && strchr("-({[<", (int)cp));
            n += (size_t)len;
        }
        td_value word = by_method(r, td_v_str((td_str){s.s.ptr + at, n}), "capitalize", &none);
        if (!r->code)
            td_strbuf_add(&b, word.s.ptr, word.s.len);
        at += n;
    }
    return td_v_take(r, &b);
}

static td_value f_string(td_run *r, td_value v, const td_args *a)
{
    return td_v_to_str(r, v);
}

static td_value f_safe(td_run *r, td_value v, const td_args *a)
{
    return td_v_to_str(r, v); /* nothing is ever escaped */
}

static td_value f_escape(td_run *r, td_value v, const td_args *a)
{
    static const char from[] = "&<>'\"", *const to[] = {"&amp;", "&lt;", "&gt;", "&#39;", "&#34;"};
    td_value s = td_v_to_str(r, v);
    td_strbuf b;
    td_run_buffer(r, &b);
    for (size_t i = 0; !r->code && i < s.s.len; i++) {
        const char *at = s.s.ptr[i] ? strchr(from, s.s.ptr[i]) : NULL;
        if (at)
            td_strbuf_adds(&b, to[at - from]);
        else
            td_strbuf_addc(&b, s.s.ptr[i]);
    }
    return td_v_take(r, &b);
}

static td_value f_length(td_run *r, td_value v, const td_args *a)
{
    if (v.kind == V_STR)
        return td_v_int((int64_t)td_str_chars(v.s));
    if (v.kind == V_UNDEFINED)
        return td_v_int(0);
    if (v.kind == V_GEN || !(td_v_is_list(v) || v.kind == V_DICT))
        return td_run_fail(r, -EINVAL, "object of type '%s' has no len()", td_v_type(v));
    return td_v_int((int64_t)td_v_n(v));
}

static td_value f_default(td_run *r, td_value v, const td_args *a)
{
    td_value other = td_args_get(a, 0, "default_value", td_v_str(td_str_of("")));
    int also_false = td_v_truth(r, td_args_get(a, 1, "boolean", td_v_bool(0)));
    return v.kind == V_UNDEFINED || (also_false && !td_v_truth(r, v)) ? other : v;
}

static td_value f_first(td_run *r, td_value v, const td_args *a)
{
    td_value all = td_v_iterate(r, v);
    return !r->code && td_v_n(all) ? td_v_at(r, all, 0) : td_v_undefined(td_str_of("first item"));
}

static td_value f_last(td_run *r, td_value v, const td_args *a)
{
    if (v.kind == V_GEN)
        return td_run_fail(r, -EINVAL, "'generator' object is not reversible");
    td_value all = td_v_iterate(r, v);
    return !r->code && td_v_n(all) ? td_v_at(r, all, td_v_n(all) - 1)
                                   : td_v_undefined(td_str_of("last item"));
}

static td_value copy_list(td_run *r, td_value v, td_vkind kind)
{
    td_value all = td_v_iterate(r, v), list = td_v_list(r, kind);
    for (size_t i = 0; !r->code && i < td_v_n(all); i++)
        td_v_append(r, list, td_v_at(r, all, i));
    return list;
}

static td_value f_list(td_run *r, td_value v, const td_args *a)
{
    return copy_list(r, v, V_LIST);
}

static td_value f_reverse(td_run *r, td_value v, const td_args *a)
{
    if (v.kind == V_STR)
        return td_v_slice(r, v, td_v_none(), td_v_none(), td_v_int(-1));
    td_vkind kind = v.kind == V_GEN || v.kind == V_UNDEFINED ? V_LIST : V_GEN;
    td_value all = td_v_iterate(r, v), out = td_v_list(r, kind);
    for (size_t i = r->code ? 0 : td_v_n(all); i-- > 0;)
        td_v_append(r, out, td_v_at(r, all, i));
    return out;
}

static td_value f_items(td_run *r, td_value v, const td_args *a)
{
    td_args none = {0};
    if (v.kind == V_UNDEFINED)
        return td_v_list(r, V_GEN);
    if (v.kind != V_DICT)
        return td_run_fail(r, -EINVAL, "Can only get item pairs from a mapping.");
    td_value items =
        td_v_call_method(r, v, (uint32_t)td_v_method_number(v, td_str_of("items")), &none);
    if (!r->code)
        items.kind = V_GEN;
    return items;
}

/* "a.b.0": attributes and numbers, one after the other. */
static td_value attribute_path(td_run *r, td_value v, td_value path, td_value fallback)
{
    if (path.kind == V_INT)
        return td_v_subscript(r, v, path);
    if (path.kind != V_STR)
        return td_run_fail(r, -EINVAL, "an attribute must be a name");
    td_str rest = path.s;
    while (!r->code) {
        const char *dot = rest.len ? memchr(rest.ptr, '.', rest.len) : NULL;
        td_str part = {rest.ptr, dot ? (size_t)(dot - rest.ptr) : rest.len};
        int64_t number = 0;
        size_t digits = 0;
        while (digits < part.len && digits < 9 && part.ptr[digits] >= '0' &&
               part.ptr[digits] <= '9')
            number = number * 10 + (part.ptr[digits++] - '0');
        v = td_v_subscript(r, v, digits && digits == part.len ? td_v_int(number) : td_v_str(part));
        if (v.kind == V_UNDEFINED && fallback.kind != V_UNDEFINED)
            v = fallback;
        if (!dot)
            break;
        rest = (td_str){dot + 1, rest.len - part.len - 1};
    }
    return v;
}

static td_value f_join(td_run *r, td_value v, const td_args *a)
{
    td_value sep = td_v_to_str(r, td_args_get(a, 0, "d", td_v_str(td_str_of("")))),
             path = td_args_get(a, 1, "attribute", td_v_none());
    td_value all = td_v_iterate(r, v);
    td_strbuf b;
    td_run_buffer(r, &b);
    for (size_t i = 0; !r->code && i < td_v_n(all); i++) {
        td_value one = td_v_at(r, all, i);
        if (path.kind != V_NONE)
            one = attribute_path(r, one, path, undefined());
        if (i)
            td_strbuf_add(&b, sep.s.ptr, sep.s.len);
        td_v_print(r, one, &b);
    }
    return td_v_take(r, &b);
}

/* int(text, base): digits with single underscores between them, signs, white space round it. */
static int parse_int(td_str s, int64_t base, int64_t *ret_i)
{
    char digits[72];
    size_t n = 0;
    s = td_str_strip(s, NULL, 1, 1);
    for (size_t i = 0; i < s.len; i++) {
        if (s.ptr[i] == '_' && i && i + 1 < s.len && s.ptr[i - 1] != '_')
            continue;
        if (n == sizeof digits - 1 || s.ptr[i] == '_' || (unsigned char)s.ptr[i] <= ' ')
            return 0;
        digits[n++] = s.ptr[i];
    }
    digits[n] = 0;
    char *end = digits;
    errno = 0;
    if (n == 0 || base < 2 || base > 36)
        return 0;
    *ret_i = strtoll(digits, &end, (int)base);
    return *end == 0 && errno == 0 && end > digits;
}

static int parse_float(td_str s, double *ret_f)
{
    char text[400];
    s = td_str_strip(s, NULL, 1, 1);
    if (s.len == 0 || s.len >= sizeof text || memchr(s.ptr, 'x', s.len) ||
        memchr(s.ptr, 'X', s.len) || memchr(s.ptr, '(', s.len))
        return 0;
    memcpy(text, s.ptr, s.len);
    text[s.len] = 0;
    char *end;
    *ret_f = strtod(text, &end);
    return *end == 0;
}

static td_value f_int(td_run *r, td_value v, const td_args *a)
{
    td_value fallback = td_args_get(a, 0, "default", td_v_int(0)),
             base = td_args_get(a, 1, "base", td_v_int(10));
    int64_t i;
    double f = NAN;
    if (v.kind == V_UNDEFINED)
        return td_run_fail(r, -EINVAL, "'%.*s' is undefined", (int)TD_MIN(v.s.len, (size_t)80),
                           v.s.ptr ? v.s.ptr : "");
    if (v.kind == V_INT || v.kind == V_BOOL)
        return td_v_int(v.i);
    if (v.kind == V_STR && parse_int(v.s, base.kind == V_INT ? base.i : 10, &i))
        return td_v_int(i);
    if (v.kind == V_FLOAT)
        f = v.f;
    else if (v.kind == V_STR && !parse_float(v.s, &f))
        return fallback;
    return f > -9.2e18 && f < 9.2e18 ? td_v_int((int64_t)f) : fallback;
}

static td_value f_float(td_run *r, td_value v, const td_args *a)
{
    double f;
    if (v.kind == V_UNDEFINED)
        return td_run_fail(r, -EINVAL, "'%.*s' is undefined", (int)TD_MIN(v.s.len, (size_t)80),
                           v.s.ptr ? v.s.ptr : "");
    if (td_v_is_number(v))
        return td_v_float(td_v_double(v));
    return v.kind == V_STR && parse_float(v.s, &f) ? td_v_float(f)
                                                   : td_args_get(a, 0, "default", td_v_float(0));
}

static td_value f_abs(td_run *r, td_value v, const td_args *a)
{
    if (!td_v_is_number(v))
        return td_run_fail(r, -EINVAL, "abs: a number is needed, not %s", td_v_type(v));
    return v.kind == V_FLOAT ? td_v_float(fabs(v.f))
           : v.i < 0         ? td_v_binary(r, td_str_of("-"), td_v_int(0), td_v_int(v.i))
                             : td_v_int(v.i);
}

/* Half to even on the exact decimal value, as Python's round. */
static double round_to(double f, int64_t precision)
{
    char text[400];
    if (!isfinite(f) || precision > 300)
        return f;
    if (precision >= 0) {
        snprintf(text, sizeof text, "%.*f", (int)precision, f);
        return strtod(text, NULL);
    }
    double scale = pow(10, (double)-precision);
    return nearbyint(f / scale) * scale;
}

static td_value f_round(td_run *r, td_value v, const td_args *a)
{
    td_value precision = td_args_get(a, 0, "precision", td_v_int(0)),
             method = td_args_get(a, 1, "method", td_v_str(td_str_of("common")));
    if (!td_v_is_number(v) || precision.kind != V_INT || method.kind != V_STR)
        return td_run_fail(r, -EINVAL, "round: a number is needed, not %s", td_v_type(v));
    if (td_str_eq(method.s, "common")) {
        if (v.kind == V_FLOAT)
            return td_v_float(round_to(v.f, precision.i));
        return precision.i >= 0 ? td_v_int(v.i)
                                : td_v_int((int64_t)round_to((double)v.i, precision.i));
    }
    double scale = pow(10, (double)precision.i), f = td_v_double(v) * scale;
    if (!td_str_eq(method.s, "ceil") && !td_str_eq(method.s, "floor"))
        return td_run_fail(r, -EINVAL, "round: method must be common, ceil or floor");
    return td_v_float((method.s.ptr[0] == 'c' ? ceil(f) : floor(f)) / scale);
}

/* What sorting, min, max and unique compare: an attribute, in lower case unless case counts. */
static td_value sort_key(td_run *r, td_value v, td_value path, int case_sensitive)
{
    td_args none = {0};
    if (path.kind != V_NONE)
        v = attribute_path(r, v, path, undefined());
    return v.kind == V_STR && !case_sensitive ? by_method(r, v, "lower", &none) : v;
}

/* Equal keys need no order: Python compares them as one-element lists, so even undefined ones pass.
 */
static int sort_order(td_run *r, td_value a, td_value b)
{
    return a.kind == V_UNDEFINED && b.kind == V_UNDEFINED ? 0 : td_v_compare(r, a, b);
}

/* Merge sort: stable, and the budget is asked at each comparison. */
static void merge_sort(td_run *r, const td_value *keys, size_t *order, size_t *spare, size_t n,
                       int reverse)
{
    for (size_t width = 1; width < n && !r->code; width *= 2) {
        for (size_t from = 0; from < n; from += 2 * width) {
            size_t a = from, b = TD_MIN(from + width, n), a_end = b,
                   b_end = TD_MIN(from + 2 * width, n), k = from;
            while (a < a_end || b < b_end) {
                int c = a == a_end ? 1 : -1;
                if (a < a_end && b < b_end)
                    c = sort_order(r, keys[order[a]], keys[order[b]]) * (reverse ? -1 : 1);
                spare[k++] = c <= 0 ? order[a++] : order[b++];
            }
        }
        memcpy(order, spare, n * sizeof *order);
    }
}

static td_value sorted(td_run *r, td_value all, td_value path, int case_sensitive, int reverse)
{
    size_t n = r->code ? 0 : td_v_n(all);
    td_value out = td_v_list(r, V_LIST);
    td_value *keys = td_run_alloc(r, n, sizeof *keys);
    size_t *order = td_run_alloc(r, n, sizeof *order), *spare = td_run_alloc(r, n, sizeof *spare);
    if (r->code)
        return undefined();
    for (size_t i = 0; i < n; i++) {
        order[i] = i;
        keys[i] = sort_key(r, td_v_at(r, all, i), path, case_sensitive);
    }
    merge_sort(r, keys, order, spare, n, reverse);
    for (size_t i = 0; i < n && !r->code; i++)
        td_v_append(r, out, td_v_at(r, all, order[i]));
    return out;
}

static td_value f_sort(td_run *r, td_value v, const td_args *a)
{
    int reverse = td_v_truth(r, td_args_get(a, 0, "reverse", td_v_bool(0)));
    int case_sensitive = td_v_truth(r, td_args_get(a, 1, "case_sensitive", td_v_bool(0)));
    return sorted(r, td_v_iterate(r, v), td_args_get(a, 2, "attribute", td_v_none()),
                  case_sensitive, reverse);
}

static td_value f_dictsort(td_run *r, td_value v, const td_args *a)
{
    td_args none = {0};
    td_value by = td_args_get(a, 1, "by", td_v_str(td_str_of("key")));
    if (v.kind != V_DICT || by.kind != V_STR)
        return td_run_fail(r, -EINVAL, "dictsort: a mapping is needed, not %s", td_v_type(v));
    td_value items =
        td_v_call_method(r, v, (uint32_t)td_v_method_number(v, td_str_of("items")), &none);
    return sorted(r, items, td_v_int(td_str_eq(by.s, "value")),
                  td_v_truth(r, td_args_get(a, 0, "case_sensitive", td_v_bool(0))),
                  td_v_truth(r, td_args_get(a, 2, "reverse", td_v_bool(0))));
}

static td_value f_unique(td_run *r, td_value v, const td_args *a)
{
    td_value all = td_v_iterate(r, v), seen = td_v_dict(r), out = td_v_list(r, V_GEN), unused;
    int case_sensitive = td_v_truth(r, td_args_get(a, 0, "case_sensitive", td_v_bool(0)));
    for (size_t i = 0; !r->code && i < td_v_n(all); i++) {
        td_value one = td_v_at(r, all, i),
                 key =
                     sort_key(r, one, td_args_get(a, 1, "attribute", td_v_none()), case_sensitive);
        if (!td_v_hashable(r, key))
            return td_run_fail(r, -EINVAL, "unhashable type: '%s'", td_v_type(key));
        if (r->code || td_v_get(r, seen, key, &unused))
            continue;
        td_v_put(r, seen, key, td_v_none());
        td_v_append(r, out, one);
    }
    return out;
}

static td_value extreme(td_run *r, td_value v, const td_args *a, int sign)
{
    td_value all = td_v_iterate(r, v),
             best = td_v_undefined(td_str_of("No aggregated item, sequence was empty.")),
             best_key = best;
    int case_sensitive = td_v_truth(r, td_args_get(a, 0, "case_sensitive", td_v_bool(0)));
    for (size_t i = 0; !r->code && i < td_v_n(all); i++) {
        td_value one = td_v_at(r, all, i),
                 key =
                     sort_key(r, one, td_args_get(a, 1, "attribute", td_v_none()), case_sensitive);
        if (i == 0 || td_v_compare(r, key, best_key) * sign > 0) {
            best = one;
            best_key = key;
        }
    }
    return best;
}

static td_value f_min(td_run *r, td_value v, const td_args *a)
{
    return extreme(r, v, a, -1);
}

static td_value f_max(td_run *r, td_value v, const td_args *a)
{
    return extreme(r, v, a, 1);
}

static td_value f_sum(td_run *r, td_value v, const td_args *a)
{
    td_value all = td_v_iterate(r, v), path = td_args_get(a, 0, "attribute", td_v_none()),
             total = td_args_get(a, 1, "start", td_v_int(0));
    for (size_t i = 0; !r->code && i < td_v_n(all); i++) {
        td_value one = td_v_at(r, all, i);
        total = td_v_binary(r, td_str_of("+"), total,
                            path.kind == V_NONE ? one : attribute_path(r, one, path, undefined()));
    }
    return total;
}

/* The filter or test named by argument `skip`, with the arguments after it. */
static td_args rest_of(const td_args *a, size_t skip)
{
    td_args rest = *a;
    if (a->n) /* at may be NULL */
        rest.at += TD_MIN(skip, a->n);
    rest.n -= TD_MIN(skip, a->n);
    return rest;
}

static td_value f_map(td_run *r, td_value v, const td_args *a)
{
    if (!td_v_truth(r, v)) /* Jinja looks no further */
        return td_v_list(r, V_GEN);
    td_value all = td_v_iterate(r, v), out = td_v_list(r, V_GEN),
             path = td_args_get(a, SIZE_MAX, "attribute", undefined());
    td_value fallback = td_args_get(a, SIZE_MAX, "default", undefined());
    int id = a->n && a->at[0].kind == V_STR ? td_tpl_filter_id(a->at[0].s) : -1;
    td_args rest = rest_of(a, 1);
    if (path.kind == V_UNDEFINED && id < 0)
        return td_run_fail(r, -EINVAL, "map: name a filter or attribute=");
    for (size_t i = 0; !r->code && i < td_v_n(all); i++) {
        td_value one = td_v_at(r, all, i);
        td_v_append(r, out,
                    path.kind != V_UNDEFINED ? attribute_path(r, one, path, fallback)
                                             : td_v_filter(r, id, one, &rest));
    }
    return out;
}

static td_value choose(td_run *r, td_value v, const td_args *a, int by_attribute, int want)
{
    size_t skip = by_attribute ? 1 : 0;
    if (!td_v_truth(r, v)) /* Jinja looks no further */
        return td_v_list(r, V_GEN);
    td_value all = td_v_iterate(r, v), out = td_v_list(r, V_GEN);
    int id = a->n > skip && a->at[skip].kind == V_STR ? td_tpl_test_id(a->at[skip].s) : -1;
    td_args rest = rest_of(a, skip + 1);
    if (a->n < skip || (a->n > skip && id < 0))
        return td_run_fail(r, -EINVAL, "select, reject: an attribute is missing, or no such test");
    for (size_t i = 0; !r->code && i < td_v_n(all); i++) {
        td_value one = td_v_at(r, all, i),
                 what = by_attribute ? attribute_path(r, one, a->at[0], undefined()) : one;
        int yes = id < 0 ? td_v_truth(r, what) : td_v_test(r, id, what, &rest);
        if (!r->code && yes == want)
            td_v_append(r, out, one);
    }
    return out;
}

static td_value f_select(td_run *r, td_value v, const td_args *a)
{
    return choose(r, v, a, 0, 1);
}

static td_value f_reject(td_run *r, td_value v, const td_args *a)
{
    return choose(r, v, a, 0, 0);
}

static td_value f_selectattr(td_run *r, td_value v, const td_args *a)
{
    return choose(r, v, a, 1, 1);
}

static td_value f_rejectattr(td_run *r, td_value v, const td_args *a)
{
    return choose(r, v, a, 1, 0);
}

static int indent_text(td_run *r, td_value width, td_str *ret_s)
{
    td_value text = width.kind == V_STR
                        ? width
                        : td_v_binary(r, td_str_of("*"), td_v_str(td_str_of(" ")), width);
    if (r->code)
        return 0;
    *ret_s = text.s;
    return 1;
}

static td_value f_indent(td_run *r, td_value v, const td_args *a)
{
    td_value s = v;
    td_str by;
    if (v.kind != V_STR)
        return td_run_fail(r, -EINVAL, "indent: a string is needed, not %s", td_v_type(v));
    int first = td_v_truth(r, td_args_get(a, 1, "first", td_v_bool(0))),
        blank = td_v_truth(r, td_args_get(a, 2, "blank", td_v_bool(0)));
    td_strbuf b;
    if (!indent_text(r, td_args_get(a, 0, "width", td_v_int(4)), &by) || r->code)
        return undefined();
    td_run_buffer(r, &b);
    for (size_t at = 0, line = 0; at <= s.s.len; line++) {
        const char *end = at < s.s.len ? memchr(s.s.ptr + at, '\n', s.s.len - at) : NULL;
        size_t n = end ? (size_t)(end - s.s.ptr) - at : s.s.len - at;
        if (line)
            td_strbuf_addc(&b, '\n');
        if (line ? n || blank : first)
            td_strbuf_add(&b, by.ptr, by.len);
        td_strbuf_add(&b, s.s.ptr ? s.s.ptr + at : "", n);
        at += n + 1;
    }
    return td_v_take(r, &b);
}

static td_value f_tojson(td_run *r, td_value v, const td_args *a)
{
    td_value indent = td_args_get(a, 1, "indent", td_v_none()),
             separators = td_args_get(a, 2, "separators", td_v_none());
    td_dump how = {.ensure_ascii = td_v_truth(r, td_args_get(a, 0, "ensure_ascii", td_v_bool(0))),
                   .sort_keys = td_v_truth(r, td_args_get(a, 3, "sort_keys", td_v_bool(0))),
                   .has_indent = indent.kind != V_NONE,
                   .item_sep = td_str_of(indent.kind != V_NONE ? "," : ", "),
                   .key_sep = td_str_of(": ")};
    td_strbuf b;
    if (how.has_indent && !indent_text(r, indent, &how.indent))
        return undefined();
    if (separators.kind == V_LIST || separators.kind == V_TUPLE) {
        td_value item = td_v_n(separators) == 2 ? td_v_at(r, separators, 0) : undefined();
        td_value key = td_v_n(separators) == 2 ? td_v_at(r, separators, 1) : undefined();
        if (item.kind != V_STR || key.kind != V_STR)
            return td_run_fail(r, -EINVAL, "tojson: separators must be two strings");
        how.item_sep = item.s;
        how.key_sep = key.s;
    }
    td_run_buffer(r, &b);
    td_v_dump(r, v, &how, 0, &b);
    return td_v_take(r, &b);
}

static td_value f_format(td_run *r, td_value v, const td_args *a)
{
    td_value format = td_v_to_str(r, v), tuple = td_v_list(r, V_TUPLE);
    for (size_t i = 0; i < a->n && !r->code; i++)
        td_v_append(r, tuple, a->at[i]);
    return r->code ? undefined() : td_v_format_percent(r, format.s, tuple);
}

static td_value f_batch(td_run *r, td_value v, const td_args *a)
{
    td_value all = td_v_iterate(r, v), out = td_v_list(r, V_GEN), part = undefined(),
             size = td_args_get(a, 0, "linecount", undefined());
    if (size.kind != V_INT || size.i < 1)
        return td_run_fail(r, -EINVAL, "batch: a positive number is needed");
    for (size_t i = 0; !r->code && i < td_v_n(all); i++) {
        if (i % (size_t)size.i == 0) {
            part = td_v_list(r, V_LIST);
            td_v_append(r, out, part);
        }
        td_v_append(r, part, td_v_at(r, all, i));
    }
    td_value fill = td_args_get(a, 1, "fill_with", td_v_none());
    while (!r->code && fill.kind != V_NONE && part.kind == V_LIST && td_v_n(part) < (size_t)size.i)
        td_v_append(r, part, fill);
    return out;
}

enum { MANY = 50 };
static const struct {
    const char *name;
    filter_fn *fn;
    unsigned char min, max;
    const char *names[5];
} filters[] = {
    {"abs", f_abs, 0, 0, {0}},
    {"batch", f_batch, 1, 2, {"linecount", "fill_with"}},
    {"capitalize", f_capitalize, 0, 0, {0}},
    {"count", f_length, 0, 0, {0}},
    {"d", f_default, 0, 2, {"default_value", "boolean"}},
    {"default", f_default, 0, 2, {"default_value", "boolean"}},
    {"dictsort", f_dictsort, 0, 3, {"case_sensitive", "by", "reverse"}},
    {"e", f_escape, 0, 0, {0}},
    {"escape", f_escape, 0, 0, {0}},
    {"first", f_first, 0, 0, {0}},
    {"float", f_float, 0, 1, {"default"}},
    {"format", f_format, 0, MANY, {0}},
    {"indent", f_indent, 0, 3, {"width", "first", "blank"}},
    {"int", f_int, 0, 2, {"default", "base"}},
    {"items", f_items, 0, 0, {0}},
    {"join", f_join, 0, 2, {"d", "attribute"}},
    {"last", f_last, 0, 0, {0}},
    {"length", f_length, 0, 0, {0}},
    {"list", f_list, 0, 0, {0}},
    {"lower", f_lower, 0, 0, {0}},
    {"map", f_map, 0, MANY, {"attribute", "default"}},
    {"max", f_max, 0, 2, {"case_sensitive", "attribute"}},
    {"min", f_min, 0, 2, {"case_sensitive", "attribute"}},
    {"reject", f_reject, 0, MANY, {0}},
    {"rejectattr", f_rejectattr, 1, MANY, {0}},
    {"replace", f_replace, 2, 3, {"old", "new", "count"}},
    {"reverse", f_reverse, 0, 0, {0}},
    {"round", f_round, 0, 2, {"precision", "method"}},
    {"safe", f_safe, 0, 0, {0}},
    {"select", f_select, 0, MANY, {0}},
    {"selectattr", f_selectattr, 1, MANY, {0}},
    {"sort", f_sort, 0, 3, {"reverse", "case_sensitive", "attribute"}},
    {"string", f_string, 0, 0, {0}},
    {"sum", f_sum, 0, 2, {"attribute", "start"}},
    {"title", f_title, 0, 0, {0}},
    {"tojson", f_tojson, 0, 4, {"ensure_ascii", "indent", "separators", "sort_keys"}},
    {"trim", f_trim, 0, 1, {"chars"}},
    {"unique", f_unique, 0, 2, {"case_sensitive", "attribute"}},
    {"upper", f_upper, 0, 0, {0}},
};

int td_tpl_filter_id(td_str name)
{
    for (size_t i = 0; i < TD_ARRAY_LEN(filters); i++)
        if (td_str_eq(name, filters[i].name))
            return (int)i;
    return -1;
}

td_value td_v_filter(td_run *r, int id, td_value input, const td_args *a)
{
    if (r->code ||
        !td_args_check(r, filters[id].name, a, filters[id].min, filters[id].max, filters[id].names))
        return undefined();
    if (r->depth >= r->max_depth) /* map('map', ...) */
        return td_run_fail(r, -E2BIG, "filters are nested more than %u deep", r->max_depth);
    r->depth++;
    td_value v = filters[id].fn(r, input, a);
    r->depth--;
    return r->code ? undefined() : v;
}
