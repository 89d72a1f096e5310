/* SPDX-License-Identifier: Apache-2.0 */
/* str(), repr() and json.dumps() of values, to the byte as Python writes them. */
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unicode/uchar.h>

#include "text/template_value.h"
#include "base/bug.h"
#include "base/banned.h"

/* Python's repr of a float: the shortest digits that read back the same; exponents below -4 and
 * from 16. */
static void print_float(double f, td_strbuf *out)
{
    char text[40];
    int digits = 1;
    if (!isfinite(f)) {
        td_strbuf_adds(out, isnan(f) ? "nan" : f < 0 ? "-inf" : "inf");
        return;
    }
    do
        snprintf(text, sizeof text, "%.*e", digits - 1, f);
    while (strtod(text, NULL) != f && ++digits <= 17);
    char *e = strchr(text, 'e');
    int exponent = e ? (int)strtol(e + 1, NULL, 10) : 0;
    if (exponent >= -4 && exponent < 16) {
        int decimals = TD_MAX(digits - 1 - exponent, 1);
        td_strbuf_addf(out, "%.*f", decimals, f);
        return;
    }
    *e = 0;
    td_strbuf_addf(out, "%se%c%02d", text, exponent < 0 ? '-' : '+', abs(exponent));
}

/* Python's str.isprintable, but for the space. */
static int is_printable(uint32_t cp)
{
    uint32_t mask = U_GET_GC_MASK((UChar32)cp);
    return cp == ' ' || !(mask & (U_GC_C_MASK | U_GC_Z_MASK));
}

static void repr_char(uint32_t cp, char quote, td_strbuf *out)
{
    char utf8[4];
    if (cp == (unsigned char)quote || cp == '\\')
        td_strbuf_addf(out, "\\%c", (int)cp);
    else if (cp == '\n')
        td_strbuf_adds(out, "\\n");
    else if (cp == '\r')
        td_strbuf_adds(out, "\\r");
    else if (cp == '\t')
        td_strbuf_adds(out, "\\t");
    else if (is_printable(cp))
        td_strbuf_add(out, utf8, (size_t)td_utf8_encode(cp, utf8));
    else
        td_strbuf_addf(out, cp < 0x100 ? "\\x%02x" : cp < 0x10000 ? "\\u%04x" : "\\U%08x", cp);
}

static void repr_string(td_str s, td_strbuf *out)
{
    int single = s.len && memchr(s.ptr, '\'', s.len), both = single && memchr(s.ptr, '"', s.len);
    char quote = single && !both ? '"' : '\'';
    uint32_t cp;
    td_strbuf_addc(out, quote);
    for (size_t at = 0; at < s.len;) {
        int len = td_utf8_decode(s.ptr + at, s.len - at, &cp);
        if (len < 0)
            break;
        repr_char(cp, quote, out);
        at += (size_t)len;
    }
    td_strbuf_addc(out, quote);
}

static void repr_list(td_run *r, td_value v, const char *open, const char *close, td_strbuf *out)
{
    size_t n = td_v_n(v);
    td_strbuf_adds(out, open);
    for (size_t i = 0; i < n && !r->code; i++) {
        if (i)
            td_strbuf_adds(out, ", ");
        td_v_repr(r, td_v_at(r, v, i), out);
    }
    td_strbuf_adds(out, v.kind == V_TUPLE && n == 1 ? ",)" : close);
}

static void repr_dict(td_run *r, td_value v, td_strbuf *out)
{
    td_strbuf_addc(out, '{');
    for (size_t i = 0; i < td_v_n(v) && !r->code; i++) {
        if (i)
            td_strbuf_adds(out, ", ");
        td_v_repr(r, td_v_key(r, v, i), out);
        td_strbuf_adds(out, ": ");
        td_v_repr(r, td_v_item(r, v, i), out);
    }
    td_strbuf_addc(out, '}');
}

static void repr_range(td_run *r, td_value v, td_strbuf *out)
{
    td_run_fail(r, -EINVAL, "a range cannot be printed; use range(...)|list");
}

static void repr_deep(td_run *r, td_value v, td_strbuf *out)
{
    if (r->depth >= r->max_depth || !td_run_step(r, 1)) {
        td_run_fail(r, -E2BIG, "values are nested more than %u deep", r->max_depth);
        return;
    }
    r->depth++;
    switch (v.kind) {
    case V_LIST:
        repr_list(r, v, "[", "]", out);
        break;
    case V_TUPLE:
        repr_list(r, v, "(", ")", out);
        break;
    case V_VIEW:
        repr_list(r, v, "dict_items([", "])", out);
        break;
    case V_RANGE:
        repr_range(r, v, out);
        break;
    case V_DICT:
        repr_dict(r, v, out);
        break;
    case V_NAMESPACE:
        td_strbuf_adds(out, "<Namespace ");
        repr_dict(r, v, out);
        td_strbuf_addc(out, '>');
        break;
    default:
        td_run_fail(r, -EINVAL, "a %s cannot be printed", td_v_type(v));
    }
    r->depth--;
    if (out->failed)
        td_run_fail(r, -E2BIG, "the template's output is too long");
}

void td_v_repr(td_run *r, td_value v, td_strbuf *out)
{
    switch (v.kind) {
    case V_UNDEFINED:
        td_strbuf_adds(out, "Undefined");
        break;
    case V_NONE:
        td_strbuf_adds(out, "None");
        break;
    case V_BOOL:
        td_strbuf_adds(out, v.i ? "True" : "False");
        break;
    case V_INT:
        td_strbuf_addf(out, "%lld", (long long)v.i);
        break;
    case V_FLOAT:
        print_float(v.f, out);
        break;
    case V_STR:
        td_run_step(r, v.s.len / 64);
        repr_string(v.s, out);
        break;
    default:
        repr_deep(r, v, out);
    }
}

void td_v_print(td_run *r, td_value v, td_strbuf *out)
{
    if (v.kind == V_STR) {
        td_run_step(r, v.s.len / 64);
        td_strbuf_add(out, v.s.ptr, v.s.len);
    } else if (v.kind != V_UNDEFINED) {
        td_v_repr(r, v, out);
    }
}

void td_run_buffer(td_run *r, td_strbuf *b)
{
    td_strbuf_init(b);
    b->max_bytes = r->arena.limit_bytes;
}

td_value td_v_take(td_run *r, td_strbuf *b)
{
    td_value v = b->failed
                     ? td_run_fail(r, -E2BIG, "the template needs more than %zu MiB of memory",
                                   r->arena.limit_bytes >> 20)
                     : td_v_copy(r, (td_str){b->data, b->len});
    td_strbuf_done(b);
    return v;
}

td_value td_v_to_str(td_run *r, td_value v)
{
    td_strbuf b;
    if (v.kind == V_STR)
        return v;
    td_run_buffer(r, &b);
    td_v_print(r, v, &b);
    return td_v_take(r, &b);
}

static void dump_char(uint32_t cp, int ensure_ascii, td_strbuf *out)
{
    static const char from[] = "\"\\\n\r\t\f\b", to[] = "\"\\nrtfb";
    const char *at = cp && cp < 0x80 ? strchr(from, (int)cp) : NULL;
    char utf8[4];
    if (at)
        td_strbuf_addf(out, "\\%c", to[at - from]);
    else if (cp < 0x20)
        td_strbuf_addf(out, "\\u%04x", cp);
    else if (!ensure_ascii || cp < 0x7F || cp == 0x7F)
        td_strbuf_add(out, utf8, (size_t)td_utf8_encode(cp, utf8));
    else if (cp < 0x10000)
        td_strbuf_addf(out, "\\u%04x", cp);
    else
        td_strbuf_addf(out, "\\u%04x\\u%04x", 0xD800 + ((cp - 0x10000) >> 10),
                       0xDC00 + ((cp - 0x10000) & 0x3FF));
}

static void dump_string(td_str s, int ensure_ascii, td_strbuf *out)
{
    uint32_t cp;
    td_strbuf_addc(out, '"');
    for (size_t at = 0, from = 0; at <= s.len;) {
        unsigned char c = at < s.len ? (unsigned char)s.ptr[at] : 0;
        if (at < s.len && c >= 0x20 && c != '"' && c != '\\' && (c < 0x80 || !ensure_ascii)) {
            at++;
            continue;
        }
        td_strbuf_add(out, s.ptr + from, at - from);
        if (at == s.len)
            break;
        int len = td_utf8_decode(s.ptr + at, s.len - at, &cp);
        if (len < 0)
            break;
        dump_char(cp, ensure_ascii, out);
        at += (size_t)len;
        from = at;
    }
    td_strbuf_addc(out, '"');
}

static void new_line(const td_dump *how, uint32_t level, td_strbuf *out)
{
    if (!how->has_indent)
        return;
    td_strbuf_addc(out, '\n');
    for (uint32_t i = 0; i < level; i++)
        td_strbuf_add(out, how->indent.ptr, how->indent.len);
}

static void dump_key(td_run *r, td_value key, td_strbuf *out, int ensure_ascii)
{
    switch (key.kind) {
    case V_STR:
        dump_string(key.s, ensure_ascii, out);
        return;
    case V_NONE:
    case V_BOOL:
        td_strbuf_addf(out, "\"%s\"", key.kind == V_NONE ? "null" : key.i ? "true" : "false");
        return;
    case V_INT:
    case V_FLOAT:
        td_strbuf_addc(out, '"');
        td_v_repr(r, key, out);
        td_strbuf_addc(out, '"');
        return;
    default:
        td_run_fail(r, -EINVAL, "tojson: a key cannot be a %s", td_v_type(key));
    }
}

/* Order of an object's pairs: as they come, or by key. */
static size_t *key_order(td_run *r, td_value v, int sort)
{
    size_t n = td_v_n(v), *order = td_run_alloc(r, n, sizeof *order);
    for (size_t i = 0; order && i < n; i++) {
        size_t k = i;
        for (;
             sort && k > 0 && td_v_compare(r, td_v_key(r, v, order[k - 1]), td_v_key(r, v, i)) > 0;
             k--)
            order[k] = order[k - 1];
        order[k] = i;
    }
    return order;
}

static void dump_dict(td_run *r, td_value v, const td_dump *how, uint32_t level, td_strbuf *out)
{
    size_t n = td_v_n(v), *order = n ? key_order(r, v, how->sort_keys) : NULL;
    if (!order) {
        td_strbuf_adds(out, "{}");
        return;
    }
    for (size_t i = 0; i < n && !r->code; i++) {
        if (i)
            td_strbuf_add(out, how->item_sep.ptr, how->item_sep.len);
        else
            td_strbuf_addc(out, '{');
        new_line(how, level + 1, out);
        dump_key(r, td_v_key(r, v, order[i]), out, how->ensure_ascii);
        td_strbuf_add(out, how->key_sep.ptr, how->key_sep.len);
        td_v_dump(r, td_v_item(r, v, order[i]), how, level + 1, out);
    }
    new_line(how, level, out);
    td_strbuf_addc(out, '}');
}

static void dump_list(td_run *r, td_value v, const td_dump *how, uint32_t level, td_strbuf *out)
{
    size_t n = td_v_n(v);
    if (n == 0) {
        td_strbuf_adds(out, "[]");
        return;
    }
    for (size_t i = 0; i < n && !r->code; i++) {
        if (i)
            td_strbuf_add(out, how->item_sep.ptr, how->item_sep.len);
        else
            td_strbuf_addc(out, '[');
        new_line(how, level + 1, out);
        td_v_dump(r, td_v_at(r, v, i), how, level + 1, out);
    }
    new_line(how, level, out);
    td_strbuf_addc(out, ']');
}

static void dump_scalar(td_run *r, td_value v, const td_dump *how, td_strbuf *out)
{
    switch (v.kind) {
    case V_NONE:
        td_strbuf_adds(out, "null");
        break;
    case V_BOOL:
        td_strbuf_adds(out, v.i ? "true" : "false");
        break;
    case V_FLOAT:
        if (isfinite(v.f))
            print_float(v.f, out);
        else
            td_strbuf_adds(out, isnan(v.f) ? "NaN" : v.f < 0 ? "-Infinity" : "Infinity");
        break;
    case V_INT:
        td_v_repr(r, v, out);
        break;
    case V_STR:
        td_run_step(r, v.s.len / 64);
        dump_string(v.s, how->ensure_ascii, out);
        break;
    default:
        td_run_fail(r, -EINVAL, "tojson: a value of type %s is not JSON", td_v_type(v));
    }
}

void td_v_dump(td_run *r, td_value v, const td_dump *how, uint32_t level, td_strbuf *out)
{
    int is_list = v.kind == V_LIST || v.kind == V_TUPLE;
    if (!is_list && v.kind != V_DICT) {
        dump_scalar(r, v, how, out);
        return;
    }
    if (r->code || !td_run_step(r, 1))
        return;
    if (r->depth >= r->max_depth) {
        td_run_fail(r, -E2BIG, "values are nested more than %u deep", r->max_depth);
        return;
    }
    r->depth++;
    if (is_list)
        dump_list(r, v, how, level, out);
    else
        dump_dict(r, v, how, level, out);
    r->depth--;
}
