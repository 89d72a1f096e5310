/* SPDX-License-Identifier: Apache-2.0 */
#include "text/json_pull.h"

#include <errno.h>
#include <string.h>

#include "base/banned.h"

enum { DEPTH_MAX = 64 };

void td_jpull_init(td_jpull *j, const char *text, size_t n)
{
    *j = (td_jpull){.base = text, .p = text, .end = text + n};
}

void td_jpull_fail(td_jpull *j, const char *what)
{
    if (!j->failed)
        j->failed = what;
}

static inline uint64_t load8(const char *p)
{
    uint64_t v;
    memcpy(&v, p, 8);
    return v;
}

/* Bytes of v before the lowest one that is marked; 8 bytes at a time because pretty-printed files
 * are half indentation. The lowest byte comes first, as the machine stores it. */
static inline unsigned before_mark(uint64_t mark)
{
    return (unsigned)__builtin_ctzll(mark) / 8;
}

static inline int is_space(char c)
{
    return c == ' ' || c == '\n' || c == '\r' || c == '\t';
}

/* First character from p on that is not white space, or end. */
static inline const char *skip_space(const char *p, const char *end)
{
    while (p < end && is_space(*p)) {
        uint64_t other = 0;
        p++;
        while (end - p >= 8 && (other = load8(p) ^ 0x2020202020202020ull) == 0)
            p += 8;
        if (other)
            p += before_mark(other);
    }
    return p;
}

/* Marks, in the top bit of each byte, what ends the plain run of a string: '"', '\\' and control
 * characters. A byte above the lowest marked one may be marked wrongly (by a borrow). */
static inline uint64_t ends_run(uint64_t v)
{
    const uint64_t ones = 0x0101010101010101ull;
    uint64_t quote = v ^ ones * '"', slash = v ^ ones * '\\';
    return (((v - ones * 0x20) & ~v) | ((quote - ones) & ~quote) | ((slash - ones) & ~slash)) &
           ones * 0x80;
}

/* First '"', '\\' or control character from p on, or end. */
static inline const char *skip_plain(const char *p, const char *end)
{
    uint64_t mark = 0;
    while (end - p >= 8 && (mark = ends_run(load8(p))) == 0)
        p += 8;
    if (mark)
        return p + before_mark(mark);
    while (p < end && *p != '"' && *p != '\\' && (unsigned char)*p >= 0x20)
        p++;
    return p;
}

char td_jpull_peek(td_jpull *j)
{
    if (j->failed)
        return 0;
    j->p = skip_space(j->p, j->end);
    return j->p == j->end ? 0 : *j->p;
}

int td_jpull_try(td_jpull *j, char c)
{
    if (td_jpull_peek(j) != c || c == 0)
        return 0;
    j->p++;
    return 1;
}

void td_jpull_expect(td_jpull *j, char c)
{
    if (!td_jpull_try(j, c))
        td_jpull_fail(j, j->p == j->end ? "the file ends too early" : "unexpected character");
}

int td_jpull_string(td_jpull *j, td_str *ret_raw, int *ret_escaped)
{
    td_jpull_expect(j, '"');
    if (j->failed)
        return 0;
    const char *p = j->p, *end = j->end;
    int escaped = 0;
    while ((p = skip_plain(p, end)) < end && *p != '"') {
        if (*p != '\\') {
            td_jpull_fail(j, "control character in a string");
            return 0;
        }
        escaped = 1;
        p += 2;
        if (p > end)
            break;
    }
    if (p >= end) {
        j->p = end;
        td_jpull_fail(j, "the file ends inside a string");
        return 0;
    }
    *ret_raw = (td_str){j->p, (size_t)(p - j->p)};
    *ret_escaped = escaped;
    j->p = p + 1;
    return 1;
}

/* The string at p, when it holds no escape: the place behind it, or NULL. */
static inline const char *plain_string(const char *p, const char *end, td_str *ret)
{
    if (p >= end || *p != '"')
        return NULL;
    const char *close = skip_plain(++p, end);
    if (close >= end || *close != '"')
        return NULL;
    *ret = (td_str){p, (size_t)(close - p)};
    return close + 1;
}

int td_jpull_try_pair(td_jpull *j, td_str ret_raw[2])
{
    const char *p = j->p, *end = j->end;
    if (j->failed || p == end || *p != '[')
        return 0;
    p = plain_string(skip_space(p + 1, end), end, &ret_raw[0]);
    if (!p || (p = skip_space(p, end)) == end || *p != ',')
        return 0;
    p = plain_string(skip_space(p + 1, end), end, &ret_raw[1]);
    if (!p || (p = skip_space(p, end)) == end || *p != ']')
        return 0;
    j->p = p + 1;
    return 1;
}

int td_jpull_u32(td_jpull *j, uint32_t *ret_v)
{
    td_jpull_peek(j);
    const char *p = j->p;
    uint64_t v = 0;
    while (!j->failed && p < j->end && *p >= '0' && *p <= '9' && v <= UINT32_MAX)
        v = v * 10 + (uint64_t)(*p++ - '0');
    int more = p < j->end && (*p == '.' || *p == 'e' || *p == 'E');
    if (j->failed || p == j->p || v > UINT32_MAX || more) {
        td_jpull_fail(j, "an id must be an integer from 0");
        return 0;
    }
    j->p = p;
    *ret_v = (uint32_t)v;
    return 1;
}

static void skip_scalar(td_jpull *j)
{
    const char *p = j->p;
    while (p < j->end && ((*p >= '0' && *p <= '9') || (*p >= 'a' && *p <= 'z') || *p == '-' ||
                          *p == '+' || *p == '.' || *p == 'E'))
        p++;
    if (p == j->p)
        td_jpull_fail(j, p == j->end ? "the file ends too early" : "unexpected character");
    j->p = p;
}

int td_jpull_skip(td_jpull *j, td_str *ret_text)
{
    uint64_t is_object = 0; /* a bit per open bracket */
    unsigned depth = 0;
    td_str s;
    int escaped;
    td_jpull_peek(j);
    const char *start = j->p;
    do {
        char c = td_jpull_peek(j);
        if (c == '{' || c == '[') {
            if (depth == DEPTH_MAX) {
                td_jpull_fail(j, "more than 64 levels deep");
                return 0;
            }
            is_object = is_object << 1 | (c == '{');
            depth++;
            j->p++;
        } else if (c == '}' || c == ']') {
            if (depth == 0 || (is_object & 1) != (c == '}')) {
                td_jpull_fail(j, "unbalanced bracket");
                return 0;
            }
            is_object >>= 1;
            depth--;
            j->p++;
        } else if (c == '"') {
            td_jpull_string(j, &s, &escaped);
        } else if (depth && (c == ',' || c == ':')) {
            j->p++;
        } else {
            skip_scalar(j);
        }
    } while (depth && !j->failed);
    if (ret_text)
        *ret_text = (td_str){start, (size_t)(j->p - start)};
    return !j->failed;
}

int td_jpull_key(td_jpull *j, int *first, td_str *ret_raw, int *ret_escaped)
{
    if (*first)
        td_jpull_expect(j, '{');
    if (j->failed || td_jpull_try(j, '}'))
        return 0;
    if (!*first)
        td_jpull_expect(j, ',');
    *first = 0;
    if (!td_jpull_string(j, ret_raw, ret_escaped))
        return 0;
    td_jpull_expect(j, ':');
    return !j->failed;
}

int td_jpull_element(td_jpull *j, int *first)
{
    if (*first)
        td_jpull_expect(j, '[');
    char c = td_jpull_peek(j);
    if (c == ']')
        j->p++;
    if (j->failed || c == ']')
        return 0;
    if (!*first && c == ',')
        j->p++;
    else if (!*first)
        td_jpull_expect(j, ',');
    *first = 0;
    return !j->failed;
}

size_t td_jpull_line(const td_jpull *j)
{
    size_t line = 1;
    for (const char *p = j->base; p < j->p; p++)
        line += *p == '\n';
    return line;
}

static int hex4(const char *p, const char *end, uint32_t *ret_v)
{
    uint32_t v = 0;
    if (end - p < 4)
        return 0;
    for (int i = 0; i < 4; i++) {
        char c = p[i];
        int d = c >= '0' && c <= '9'   ? c - '0'
                : c >= 'a' && c <= 'f' ? c - 'a' + 10
                : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                       : -1;
        if (d < 0)
            return 0;
        v = v << 4 | (uint32_t)d;
    }
    *ret_v = v;
    return 1;
}

/* After "\u": one character, perhaps from a surrogate pair. Returns the bytes consumed, 0 on error.
 */
static int unescape_u(const char *p, const char *end, uint32_t *ret_cp)
{
    uint32_t low;
    if (!hex4(p, end, ret_cp) || (*ret_cp >= 0xDC00 && *ret_cp < 0xE000))
        return 0;
    if (*ret_cp < 0xD800 || *ret_cp >= 0xE000)
        return 4;
    if (end - p < 10 || p[4] != '\\' || p[5] != 'u' || !hex4(p + 6, end, &low) || low < 0xDC00 ||
        low >= 0xE000)
        return 0;
    *ret_cp = 0x10000 + ((*ret_cp - 0xD800) << 10) + (low - 0xDC00);
    return 10;
}

int64_t td_jpull_unescape(td_str raw, char *out)
{
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    const char *p = raw.ptr, *end = raw.ptr + raw.len;
    char *o = out;
    while (p < end) {
        if (*p != '\\') {
            *o++ = *p++;
            continue;
        }
        if (++p == end)
            return -EILSEQ;
        char c = *p++;
        const char *at = c ? strchr(from, c) : NULL;
        uint32_t cp;
        if (at) {
            *o++ = to[at - from];
        } else {
            int n = c == 'u' ? unescape_u(p, end, &cp) : 0;
            if (n == 0)
                return -EILSEQ;
            p += n;
            o += td_utf8_encode(cp, o); /* at most 4 bytes where 6 or 12 stood */
        }
    }
    return o - out;
}
