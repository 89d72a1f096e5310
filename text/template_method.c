/* SPDX-License-Identifier: Apache-2.0 */
/* Methods of strings, lists and dicts that templates call. What changes a list or dict is refused,
 * as Jinja's immutable sandbox does. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unicode/uchar.h>
#include <unicode/ustring.h>

#include "text/template_loop.h"
#include "text/template_value.h"
#include "base/bug.h"
#include "base/cleanup.h"
#include "base/banned.h"

typedef td_value method_fn(td_run *r, td_value self, const td_args *a);

static td_value undefined(void)
{
    return td_v_undefined((td_str){0});
}

/* A string argument; 0 and a failure when it is something else. */
static int want_str(td_run *r, const td_args *a, size_t place, const char *name, td_str *ret_s)
{
    td_value v = td_args_get(a, place, name, undefined());
    if (v.kind != V_STR) {
        td_run_fail(r, -EINVAL, "argument %zu must be str, not %s", place + 1, td_v_type(v));
        return 0;
    }
    *ret_s = v.s;
    return 1;
}

static td_str empty_if_null(td_str s)
{
    return s.ptr ? s : (td_str){"", 0};
}

/* First place of needle, which is not empty, or NULL. Through a string that holds it a million
 * times each call must cost no more than what it passes over: that of memmem() under
 * ThreadSanitizer costs all that follows, so the common needle of one byte goes another way. */
static const char *find_in(td_str s, td_str needle)
{
    return needle.len == 1 ? memchr(s.ptr, needle.ptr[0], s.len)
                           : memmem(s.ptr, s.len, needle.ptr, needle.len);
}

/* The same for the last place. */
static const char *find_last_in(td_str s, td_str needle)
{
    const char *hit = NULL, *end = s.ptr + s.len;
    for (const char *at; (at = find_in(s, needle)) != NULL; hit = at)
        s = (td_str){at + 1, (size_t)(end - at - 1)};
    return hit;
}

static td_value strip(td_run *r, td_value self, const td_args *a, int left, int right)
{
    td_value chars = td_args_get(a, 0, "chars", td_v_none());
    if (chars.kind != V_NONE && chars.kind != V_STR)
        return td_run_fail(r, -EINVAL, "strip arg must be None or str");
    td_run_step(r, self.s.len / 64);
    return td_v_str(td_str_strip(self.s, chars.kind == V_STR ? &chars.s : NULL, left, right));
}

static td_value s_strip(td_run *r, td_value self, const td_args *a)
{
    return strip(r, self, a, 1, 1);
}

static td_value s_lstrip(td_run *r, td_value self, const td_args *a)
{
    return strip(r, self, a, 1, 0);
}

static td_value s_rstrip(td_run *r, td_value self, const td_args *a)
{
    return strip(r, self, a, 0, 1);
}

static td_value split_space(td_run *r, td_str s, int64_t max)
{
    td_value list = td_v_list(r, V_LIST);
    uint32_t cp;
    int64_t n_splits = 0;
    for (s = td_str_strip(s, NULL, 1, 0); s.len && !r->code; s = td_str_strip(s, NULL, 1, 0)) {
        size_t n = 0;
        int len;
        while (n < s.len && (len = td_utf8_decode(s.ptr + n, s.len - n, &cp)) > 0 &&
               !td_is_space(cp))
            n += (size_t)len;
        if (max >= 0 && n_splits++ == max)
            n = s.len; /* the rest, whole */
        td_v_append(r, list, td_v_str((td_str){s.ptr, n}));
        s.ptr += n;
        s.len -= n;
    }
    return list;
}

static td_value split_by(td_run *r, td_str s, td_str sep, int64_t max)
{
    td_value list = td_v_list(r, V_LIST);
    s = empty_if_null(s);
    while (!r->code) {
        const char *hit = max == 0 ? NULL : find_in(s, sep);
        size_t n = hit ? (size_t)(hit - s.ptr) : s.len;
        td_v_append(r, list, td_v_str((td_str){s.ptr, n}));
        if (!hit)
            break;
        max--;
        s.ptr += n + sep.len;
        s.len -= n + sep.len;
    }
    return list;
}

static td_value rsplit_by(td_run *r, td_str s, td_str sep, int64_t max)
{
    td_value all = split_by(r, s, sep, -1), list = td_v_list(r, V_LIST);
    size_t n = r->code ? 0 : td_v_n(all),
           join = max >= 0 && n > (size_t)max + 1 ? n - (size_t)max : 1;
    for (size_t i = 0; i < n; i++) {
        td_str part = all.list->at[i].s;
        if (i == 0 && join > 1) {
            i = join - 1;
            part.len = (size_t)(all.list->at[i].s.ptr + all.list->at[i].s.len - part.ptr);
        }
        td_v_append(r, list, td_v_str(part));
    }
    return list;
}

static td_value split(td_run *r, td_value self, const td_args *a, int from_right)
{
    td_value sep = td_args_get(a, 0, "sep", td_v_none()),
             max = td_args_get(a, 1, "maxsplit", td_v_int(-1));
    if (max.kind != V_INT)
        return td_run_fail(r, -EINVAL, "maxsplit must be an integer");
    td_run_step(r, self.s.len / 64);
    if (sep.kind == V_NONE) {
        if (from_right && max.i >= 0)
            return td_run_fail(r, -EINVAL, "rsplit() with maxsplit needs a separator here");
        return split_space(r, self.s, max.i);
    }
    if (sep.kind != V_STR || sep.s.len == 0)
        return td_run_fail(r, -EINVAL,
                           sep.kind == V_STR ? "empty separator" : "separator must be str or None");
    return from_right ? rsplit_by(r, self.s, sep.s, max.i) : split_by(r, self.s, sep.s, max.i);
}

static td_value s_split(td_run *r, td_value self, const td_args *a)
{
    return split(r, self, a, 0);
}

static td_value s_rsplit(td_run *r, td_value self, const td_args *a)
{
    return split(r, self, a, 1);
}

static td_value s_splitlines(td_run *r, td_value self, const td_args *a)
{
    td_value list = td_v_list(r, V_LIST);
    td_str s = self.s;
    int keep = td_v_truth(r, td_args_get(a, 0, "keepends", td_v_bool(0)));
    while (s.len && !r->code) {
        size_t n = 0, end = 0;
        uint32_t cp = 0;
        while (n < s.len && !end) {
            int len = TD_MAX(td_utf8_decode(s.ptr + n, s.len - n, &cp), 1);
            if ((cp >= 10 && cp <= 13) || (cp >= 0x1C && cp <= 0x1E) || cp == 0x85 ||
                cp == 0x2028 || cp == 0x2029)
                end = (size_t)len + (cp == '\r' && n + 1 < s.len && s.ptr[n + 1] == '\n');
            else
                n += (size_t)len;
        }
        td_v_append(r, list, td_v_str((td_str){s.ptr, n + (keep ? end : 0)}));
        s.ptr += n + end;
        s.len -= n + end;
    }
    return list;
}

static int fixes(td_str s, td_str fix, int at_end)
{
    return fix.len <= s.len && (fix.len == 0 || memcmp(at_end ? s.ptr + s.len - fix.len : s.ptr,
                                                       fix.ptr, fix.len) == 0);
}

static td_value starts_or_ends(td_run *r, td_value self, const td_args *a, int at_end)
{
    td_value v = td_args_get(a, 0, at_end ? "suffix" : "prefix", undefined());
    if (v.kind == V_STR)
        return td_v_bool(fixes(self.s, v.s, at_end));
    if (v.kind != V_TUPLE)
        return td_run_fail(r, -EINVAL, "argument must be str or a tuple of str, not %s",
                           td_v_type(v));
    for (size_t i = 0; i < td_v_n(v); i++) {
        td_value one = td_v_at(r, v, i);
        if (one.kind == V_STR && fixes(self.s, one.s, at_end))
            return td_v_bool(1);
    }
    return td_v_bool(0);
}

static td_value s_startswith(td_run *r, td_value self, const td_args *a)
{
    return starts_or_ends(r, self, a, 0);
}

static td_value s_endswith(td_run *r, td_value self, const td_args *a)
{
    return starts_or_ends(r, self, a, 1);
}

static td_value s_removeprefix(td_run *r, td_value self, const td_args *a)
{
    td_str fix;
    if (want_str(r, a, 0, "prefix", &fix) && fixes(self.s, fix, 0)) {
        self.s.ptr += fix.len;
        self.s.len -= fix.len;
    }
    return self;
}

static td_value s_removesuffix(td_run *r, td_value self, const td_args *a)
{
    td_str fix;
    if (want_str(r, a, 0, "suffix", &fix) && fixes(self.s, fix, 1))
        self.s.len -= fix.len;
    return self;
}

static td_value s_replace(td_run *r, td_value self, const td_args *a)
{
    td_str from, to, s = empty_if_null(self.s);
    td_value max = td_args_get(a, 2, "count", td_v_int(-1));
    td_strbuf b;
    if (!want_str(r, a, 0, "old", &from) || !want_str(r, a, 1, "new", &to))
        return undefined();
    if (max.kind != V_INT)
        return td_run_fail(r, -EINVAL, "count must be an integer");
    td_run_step(r, s.len / 64);
    td_run_buffer(r, &b);
    int64_t left = max.i;
    while (left != 0 && from.len) {
        const char *hit = find_in(s, from);
        if (!hit)
            break;
        td_strbuf_add(&b, s.ptr, (size_t)(hit - s.ptr));
        td_strbuf_add(&b, to.ptr, to.len);
        s.len -= (size_t)(hit - s.ptr) + from.len;
        s.ptr = hit + from.len;
        left--;
    }
    /* an empty pattern matches before every character and at the end */
    for (uint32_t cp; left != 0 && !from.len && !b.failed; left--) {
        td_strbuf_add(&b, to.ptr, to.len);
        if (!s.len)
            break;
        size_t n = (size_t)TD_MAX(td_utf8_decode(s.ptr, s.len, &cp), 1);
        td_strbuf_add(&b, s.ptr, n);
        s.ptr += n;
        s.len -= n;
    }
    td_strbuf_add(&b, s.ptr, s.len);
    return td_v_take(r, &b);
}

/* Python's upper() and lower() are Unicode's full mappings without locale, which ICU has for
 * UTF-16. */
static td_value map_case(td_run *r, td_str s, int upper)
{
    td_strbuf b;
    int ascii = 1;
    for (size_t i = 0; i < s.len; i++)
        ascii &= (unsigned char)s.ptr[i] < 0x80;
    td_run_buffer(r, &b);
    if (ascii) {
        for (size_t i = 0; i < s.len; i++) {
            char c = s.ptr[i];
            td_strbuf_addc(&b, upper && c >= 'a' && c <= 'z'    ? (char)(c - 32)
                               : !upper && c >= 'A' && c <= 'Z' ? (char)(c + 32)
                                                                : c);
        }
        return td_v_take(r, &b);
    }
    if (s.len > INT32_MAX / 16)
        return td_run_fail(r, -E2BIG, "a text is too long to change its case");
    int32_t n16 = 0, n_out, n8 = 0, cap = (int32_t)s.len * 3 + 4;
    UErrorCode e = U_ZERO_ERROR;
    TD_AUTO_FREE UChar *wide = malloc((s.len + 1) * sizeof *wide);
    TD_AUTO_FREE UChar *out = malloc((size_t)cap * sizeof *out);
    TD_AUTO_FREE char *utf8 = malloc((size_t)cap * 3);
    if (!wide || !out || !utf8)
        return td_run_fail(r, -ENOMEM, "out of memory");
    u_strFromUTF8(wide, (int32_t)s.len + 1, &n16, s.ptr, (int32_t)s.len, &e);
    n_out = upper ? u_strToUpper(out, cap, wide, n16, "", &e)
                  : u_strToLower(out, cap, wide, n16, "", &e);
    u_strToUTF8(utf8, cap * 3, &n8, out, n_out, &e);
    if (U_FAILURE(e))
        return td_run_fail(r, -EINVAL, "ICU: %s", u_errorName(e));
    td_strbuf_add(&b, utf8, (size_t)n8);
    return td_v_take(r, &b);
}

static td_value s_upper(td_run *r, td_value self, const td_args *a)
{
    return map_case(r, self.s, 1);
}

static td_value s_lower(td_run *r, td_value self, const td_args *a)
{
    return map_case(r, self.s, 0);
}

/* First character in title case, the rest as `lower` gives it. */
static void add_capitalized(td_run *r, td_str s, td_strbuf *b)
{
    uint32_t cp;
    char utf8[4];
    if (!s.len)
        return;
    int len = TD_MAX(td_utf8_decode(s.ptr, s.len, &cp), 1);
    if (cp == 0xDF) /* the one common letter whose title case is two */
        td_strbuf_adds(b, "Ss");
    else
        td_strbuf_add(b, utf8, (size_t)td_utf8_encode((uint32_t)u_totitle((UChar32)cp), utf8));
    td_value rest = map_case(r, (td_str){s.ptr + len, s.len - (size_t)len}, 0);
    if (!r->code)
        td_strbuf_add(b, rest.s.ptr, rest.s.len);
}

static td_value s_capitalize(td_run *r, td_value self, const td_args *a)
{
    td_strbuf b;
    td_run_buffer(r, &b);
    add_capitalized(r, self.s, &b);
    return td_v_take(r, &b);
}

static td_value s_title(td_run *r, td_value self, const td_args *a)
{
    td_strbuf b;
    uint32_t cp;
    int cased = 0;
    char utf8[4];
    td_run_buffer(r, &b);
    for (size_t at = 0; at < self.s.len;) {
        at += (size_t)TD_MAX(td_utf8_decode(self.s.ptr + at, self.s.len - at, &cp), 1);
        UChar32 c = cased ? u_tolower((UChar32)cp) : u_totitle((UChar32)cp);
        cased = u_hasBinaryProperty((UChar32)cp, UCHAR_CASED);
        td_strbuf_add(&b, utf8, (size_t)td_utf8_encode((uint32_t)c, utf8));
    }
    return td_v_take(r, &b);
}

static td_value find(td_run *r, td_value self, const td_args *a, int last)
{
    td_str needle, s = empty_if_null(self.s);
    if (!want_str(r, a, 0, "sub", &needle))
        return undefined();
    td_run_step(r, s.len / 64);
    if (!needle.len)
        return td_v_int(last ? (int64_t)td_str_chars(s) : 0);
    const char *hit = last ? find_last_in(s, needle) : find_in(s, needle);
    return td_v_int(hit ? (int64_t)td_str_chars((td_str){s.ptr, (size_t)(hit - s.ptr)}) : -1);
}

static td_value s_find(td_run *r, td_value self, const td_args *a)
{
    return find(r, self, a, 0);
}

static td_value s_rfind(td_run *r, td_value self, const td_args *a)
{
    return find(r, self, a, 1);
}

static td_value s_index(td_run *r, td_value self, const td_args *a)
{
    td_value v = find(r, self, a, 0);
    return v.kind == V_INT && v.i < 0 ? td_run_fail(r, -EINVAL, "substring not found") : v;
}

static td_value s_count(td_run *r, td_value self, const td_args *a)
{
    td_str needle;
    if (!want_str(r, a, 0, "sub", &needle))
        return undefined();
    if (!needle.len)
        return td_v_int((int64_t)td_str_chars(self.s) + 1);
    td_value parts = split_by(r, self.s, needle, -1);
    return r->code ? undefined() : td_v_int((int64_t)td_v_n(parts) - 1);
}

static td_value s_join(td_run *r, td_value self, const td_args *a)
{
    td_value all = td_v_iterate(r, td_args_get(a, 0, "iterable", undefined()));
    td_strbuf b;
    td_run_buffer(r, &b);
    for (size_t i = 0; !r->code && i < td_v_n(all); i++) {
        td_value v = td_v_at(r, all, i);
        if (v.kind != V_STR)
            td_run_fail(r, -EINVAL, "sequence item %zu: expected str instance, %s found", i,
                        td_v_type(v));
        if (i)
            td_strbuf_add(&b, self.s.ptr, self.s.len);
        td_strbuf_add(&b, v.s.ptr, v.kind == V_STR ? v.s.len : 0);
    }
    return td_v_take(r, &b);
}

/* {} {0} {name}, without conversions and widths. */
static td_value s_format(td_run *r, td_value self, const td_args *a)
{
    td_strbuf b;
    size_t next = 0;
    int numbered = 0; /* 1: by number, 2: automatically */
    td_str s = self.s;
    td_run_buffer(r, &b);
    for (size_t i = 0; i < s.len && !r->code; i++) {
        char c = s.ptr[i];
        if (c != '{' && c != '}') {
            td_strbuf_addc(&b, c);
            continue;
        }
        if (i + 1 < s.len && s.ptr[i + 1] == c) {
            td_strbuf_addc(&b, c);
            i++;
            continue;
        }
        const char *end = c == '{' ? memchr(s.ptr + i, '}', s.len - i) : NULL;
        td_str field = {s.ptr + i + 1, end ? (size_t)(end - s.ptr) - i - 1 : 0};
        int is_number = field.len && field.len < 4;
        size_t place = 0;
        td_value v = undefined();
        for (size_t k = 0; k < field.len && is_number; k++) {
            is_number = field.ptr[k] >= '0' && field.ptr[k] <= '9';
            place = place * 10 + (size_t)(field.ptr[k] - '0');
        }
        for (size_t k = 0; k < field.len; k++)
            if (strchr(":!.[", field.ptr[k]))
                end = NULL;
        if (!end)
            return td_strbuf_done(&b),
                   td_run_fail(r, -EINVAL, "format(): only {}, {0} and {name} are supported");
        if (!field.len || is_number) {
            numbered |= field.len ? 1 : 2;
            if (numbered == 3)
                return td_strbuf_done(&b),
                       td_run_fail(r, -EINVAL, "format(): {} and {0} cannot be mixed");
            place = field.len ? place : next++;
            if (place >= a->n)
                return td_strbuf_done(&b),
                       td_run_fail(r, -EINVAL, "format(): argument %zu is missing", place);
            v = a->at[place];
        } else {
            size_t k = 0;
            while (k < a->n_named && (a->names[k].len != field.len ||
                                      memcmp(a->names[k].ptr, field.ptr, field.len) != 0))
                k++;
            if (k == a->n_named)
                return td_strbuf_done(&b),
                       td_run_fail(r, -EINVAL, "format(): argument '%.*s' is missing",
                                   (int)TD_MIN(field.len, (size_t)60), field.ptr);
            v = a->named[k];
        }
        td_v_print(r, v, &b);
        i = (size_t)(end - s.ptr);
    }
    return td_v_take(r, &b);
}

static td_value all_chars(td_value self, int (*is)(uint32_t))
{
    uint32_t cp;
    for (size_t at = 0; at < self.s.len;) {
        at += (size_t)TD_MAX(td_utf8_decode(self.s.ptr + at, self.s.len - at, &cp), 1);
        if (!is(cp))
            return td_v_bool(0);
    }
    return td_v_bool(self.s.len != 0);
}

static int is_alpha(uint32_t cp)
{
    return (U_GET_GC_MASK((UChar32)cp) & U_GC_L_MASK) != 0;
}

static int is_digit(uint32_t cp)
{
    int32_t type = u_getIntPropertyValue((UChar32)cp, UCHAR_NUMERIC_TYPE);
    return type == U_NT_DECIMAL || type == U_NT_DIGIT;
}

static int is_numeric(uint32_t cp)
{
    return u_getIntPropertyValue((UChar32)cp, UCHAR_NUMERIC_TYPE) != U_NT_NONE;
}

static int is_alnum(uint32_t cp)
{
    return is_alpha(cp) || is_numeric(cp);
}

static td_value s_isalpha(td_run *r, td_value self, const td_args *a)
{
    return all_chars(self, is_alpha);
}

static td_value s_isdigit(td_run *r, td_value self, const td_args *a)
{
    return all_chars(self, is_digit);
}

static td_value s_isnumeric(td_run *r, td_value self, const td_args *a)
{
    return all_chars(self, is_numeric);
}

static td_value s_isalnum(td_run *r, td_value self, const td_args *a)
{
    return all_chars(self, is_alnum);
}

static td_value s_isspace(td_run *r, td_value self, const td_args *a)
{
    return all_chars(self, td_is_space);
}

/* At least one cased character, and none of the other case. */
static td_value all_case(td_value self, int upper)
{
    uint32_t cp;
    int any = 0;
    for (size_t at = 0; at < self.s.len;) {
        at += (size_t)TD_MAX(td_utf8_decode(self.s.ptr + at, self.s.len - at, &cp), 1);
        if (u_hasBinaryProperty((UChar32)cp, upper ? UCHAR_LOWERCASE : UCHAR_UPPERCASE) ||
            u_charType((UChar32)cp) == U_TITLECASE_LETTER)
            return td_v_bool(0);
        any |= u_hasBinaryProperty((UChar32)cp, upper ? UCHAR_UPPERCASE : UCHAR_LOWERCASE);
    }
    return td_v_bool(any);
}

static td_value s_isupper(td_run *r, td_value self, const td_args *a)
{
    return all_case(self, 1);
}

static td_value s_islower(td_run *r, td_value self, const td_args *a)
{
    return all_case(self, 0);
}

static td_value partition(td_run *r, td_value self, const td_args *a, int last)
{
    td_str sep, s = empty_if_null(self.s);
    td_value t = td_v_list(r, V_TUPLE);
    if (!want_str(r, a, 0, "sep", &sep) || r->code)
        return undefined();
    if (!sep.len)
        return td_run_fail(r, -EINVAL, "empty separator");
    const char *hit = last ? find_last_in(s, sep) : find_in(s, sep);
    td_str none = {"", 0};
    if (!hit) {
        td_v_append(r, t, td_v_str(last ? none : s));
        td_v_append(r, t, td_v_str(none));
        td_v_append(r, t, td_v_str(last ? s : none));
        return t;
    }
    size_t n = (size_t)(hit - s.ptr);
    td_v_append(r, t, td_v_str((td_str){s.ptr, n}));
    td_v_append(r, t, td_v_str(sep));
    td_v_append(r, t, td_v_str((td_str){hit + sep.len, s.len - n - sep.len}));
    return t;
}

static td_value s_partition(td_run *r, td_value self, const td_args *a)
{
    return partition(r, self, a, 0);
}

static td_value s_rpartition(td_run *r, td_value self, const td_args *a)
{
    return partition(r, self, a, 1);
}

static td_value l_index(td_run *r, td_value self, const td_args *a)
{
    for (size_t i = 0; i < td_v_n(self) && !r->code; i++)
        if (td_v_equal(r, td_v_at(r, self, i), a->at[0]))
            return td_v_int((int64_t)i);
    return td_run_fail(r, -EINVAL, "the value is not in the list");
}

static td_value l_count(td_run *r, td_value self, const td_args *a)
{
    int64_t n = 0;
    for (size_t i = 0; i < td_v_n(self) && !r->code; i++)
        n += td_v_equal(r, td_v_at(r, self, i), a->at[0]);
    return td_v_int(n);
}

static td_value l_copy(td_run *r, td_value self, const td_args *a)
{
    td_value list = td_v_list(r, V_LIST);
    for (size_t i = 0; i < td_v_n(self) && !r->code; i++)
        td_v_append(r, list, td_v_at(r, self, i));
    return list;
}

static td_value immutable(td_run *r, td_value self, const td_args *a)
{
    return td_run_fail(r, -EINVAL, "a %s cannot be changed in a template; build a new one",
                       td_v_type(self));
}

static td_value d_items(td_run *r, td_value self, const td_args *a)
{
    td_value list = td_v_list(r, V_VIEW);
    for (size_t i = 0; i < td_v_n(self) && !r->code; i++) {
        td_value pair = td_v_list(r, V_TUPLE);
        if (r->code)
            break;
        td_v_append(r, pair, td_v_key(r, self, i));
        td_v_append(r, pair, td_v_item(r, self, i));
        td_v_append(r, list, pair);
    }
    return list;
}

static td_value d_keys(td_run *r, td_value self, const td_args *a)
{
    td_value list = td_v_iterate(r, self);
    if (!r->code)
        list.kind = V_VIEW;
    return list;
}

static td_value d_values(td_run *r, td_value self, const td_args *a)
{
    td_value list = td_v_list(r, V_VIEW);
    for (size_t i = 0; i < td_v_n(self) && !r->code; i++)
        td_v_append(r, list, td_v_item(r, self, i));
    return list;
}

static td_value d_get(td_run *r, td_value self, const td_args *a)
{
    td_value v;
    return td_v_get(r, self, a->at[0], &v) ? v : a->n > 1 ? a->at[1] : td_v_none();
}

static td_value d_copy(td_run *r, td_value self, const td_args *a)
{
    td_value d = td_v_dict(r);
    for (size_t i = 0; i < td_v_n(self) && !r->code; i++)
        td_v_put(r, d, td_v_key(r, self, i), td_v_item(r, self, i));
    return d;
}

static td_value loop_cycle(td_run *r, td_value self, const td_args *a)
{
    return a->at[self.loop->index % a->n];
}

static td_value loop_changed(td_run *r, td_value self, const td_args *a)
{
    td_value now = td_v_list(r, V_TUPLE);
    for (size_t i = 0; i < a->n && !r->code; i++)
        td_v_append(r, now, a->at[i]);
    int changed = !r->code && (!self.loop->has_changed || !td_v_equal(r, self.loop->changed, now));
    self.loop->changed = now;
    self.loop->has_changed = 1;
    return td_v_bool(changed);
}

enum { OF_STR = 1, OF_LIST = 2, OF_DICT = 4, OF_LOOP = 8, MANY = 100 };
static const struct {
    const char *name;
    int of;
    method_fn *fn;
    unsigned char min, max;
    const char *names[4];
} methods[] = {
    {"strip", OF_STR, s_strip, 0, 1, {0}},
    {"lstrip", OF_STR, s_lstrip, 0, 1, {0}},
    {"rstrip", OF_STR, s_rstrip, 0, 1, {0}},
    {"split", OF_STR, s_split, 0, 2, {"sep", "maxsplit"}},
    {"rsplit", OF_STR, s_rsplit, 0, 2, {"sep", "maxsplit"}},
    {"splitlines", OF_STR, s_splitlines, 0, 1, {"keepends"}},
    {"startswith", OF_STR, s_startswith, 1, 1, {0}},
    {"endswith", OF_STR, s_endswith, 1, 1, {0}},
    {"removeprefix", OF_STR, s_removeprefix, 1, 1, {0}},
    {"removesuffix", OF_STR, s_removesuffix, 1, 1, {0}},
    {"replace", OF_STR, s_replace, 2, 3, {0}},
    {"upper", OF_STR, s_upper, 0, 0, {0}},
    {"lower", OF_STR, s_lower, 0, 0, {0}},
    {"capitalize", OF_STR, s_capitalize, 0, 0, {0}},
    {"title", OF_STR, s_title, 0, 0, {0}},
    {"find", OF_STR, s_find, 1, 1, {0}},
    {"rfind", OF_STR, s_rfind, 1, 1, {0}},
    {"index", OF_STR, s_index, 1, 1, {0}},
    {"count", OF_STR, s_count, 1, 1, {0}},
    {"join", OF_STR, s_join, 1, 1, {0}},
    {"format", OF_STR, s_format, 0, MANY, {0}},
    {"isalpha", OF_STR, s_isalpha, 0, 0, {0}},
    {"isdigit", OF_STR, s_isdigit, 0, 0, {0}},
    {"isnumeric", OF_STR, s_isnumeric, 0, 0, {0}},
    {"isalnum", OF_STR, s_isalnum, 0, 0, {0}},
    {"isspace", OF_STR, s_isspace, 0, 0, {0}},
    {"isupper", OF_STR, s_isupper, 0, 0, {0}},
    {"islower", OF_STR, s_islower, 0, 0, {0}},
    {"partition", OF_STR, s_partition, 1, 1, {0}},
    {"rpartition", OF_STR, s_rpartition, 1, 1, {0}},
    {"index", OF_LIST, l_index, 1, 1, {0}},
    {"count", OF_LIST, l_count, 1, 1, {0}},
    {"copy", OF_LIST, l_copy, 0, 0, {0}},
    {"append", OF_LIST, immutable, 0, MANY, {0}},
    {"extend", OF_LIST, immutable, 0, MANY, {0}},
    {"insert", OF_LIST, immutable, 0, MANY, {0}},
    {"pop", OF_LIST | OF_DICT, immutable, 0, MANY, {0}},
    {"remove", OF_LIST, immutable, 0, MANY, {0}},
    {"reverse", OF_LIST, immutable, 0, MANY, {0}},
    {"sort", OF_LIST, immutable, 0, MANY, {0}},
    {"clear", OF_LIST | OF_DICT, immutable, 0, MANY, {0}},
    {"items", OF_DICT, d_items, 0, 0, {0}},
    {"keys", OF_DICT, d_keys, 0, 0, {0}},
    {"values", OF_DICT, d_values, 0, 0, {0}},
    {"get", OF_DICT, d_get, 1, 2, {0}},
    {"copy", OF_DICT, d_copy, 0, 0, {0}},
    {"update", OF_DICT, immutable, 0, MANY, {0}},
    {"setdefault", OF_DICT, immutable, 0, MANY, {0}},
    {"popitem", OF_DICT, immutable, 0, MANY, {0}},
    {"cycle", OF_LOOP, loop_cycle, 1, MANY, {0}},
    {"changed", OF_LOOP, loop_changed, 0, MANY, {0}},
};

int td_v_method_number(td_value v, td_str name)
{
    int of = v.kind == V_STR                         ? OF_STR
             : v.kind == V_LIST || v.kind == V_TUPLE ? OF_LIST
             : v.kind == V_DICT                      ? OF_DICT
             : v.kind == V_LOOP                      ? OF_LOOP
                                                     : 0;
    for (size_t i = 0; of && i < TD_ARRAY_LEN(methods); i++)
        if ((methods[i].of & of) && td_str_eq(name, methods[i].name))
            return (int)i;
    return -1;
}

td_value td_v_call_method(td_run *r, td_value self, uint32_t number, const td_args *a)
{
    int any_name = methods[number].fn == s_format;
    if (r->code)
        return undefined();
    if (any_name) {
        td_args places = {.at = a->at, .n = a->n};
        return td_args_check(r, "format()", &places, 0, MANY, NULL) ? s_format(r, self, a)
                                                                    : undefined();
    }
    if (!td_args_check(r, methods[number].name, a, methods[number].min, methods[number].max,
                       methods[number].names))
        return undefined();
    return methods[number].fn(r, self, a);
}
