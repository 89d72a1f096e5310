/* SPDX-License-Identifier: Apache-2.0 */
#include "base/strbuf.h"

#include <stdio.h>
#include <stdlib.h>

#include "base/banned.h"

static char empty[1];

void td_strbuf_init(td_strbuf *b)
{
    *b = (td_strbuf){.data = empty};
}

void td_strbuf_done(td_strbuf *b)
{
    if (b->cap)
        free(b->data);
    *b = (td_strbuf){.data = empty, .max_bytes = b->max_bytes};
}

void td_strbuf_reset(td_strbuf *b)
{
    b->len = 0;
    b->failed = 0;
    if (b->cap)
        b->data[0] = 0;
}

/* Room for n more bytes and the NUL. */
static int reserve(td_strbuf *b, size_t n)
{
    if (b->failed)
        return 0;
    size_t need;
    if (__builtin_add_overflow(b->len, n, &need) || need == SIZE_MAX ||
        (b->max_bytes && need > b->max_bytes)) {
        b->failed = 1;
        return 0;
    }
    need++;
    if (need <= b->cap)
        return 1;
    size_t cap = b->cap ? b->cap : 64;
    while (cap < need)
        cap = cap > SIZE_MAX / 2 ? need : cap * 2;
    char *p = realloc(b->cap ? b->data : NULL, cap);
    if (!p) {
        b->failed = 1;
        return 0;
    }
    b->data = p;
    b->cap = cap;
    return 1;
}

void td_strbuf_add(td_strbuf *b, const void *bytes, size_t n)
{
    if (n == 0 || !reserve(b, n))
        return;
    memcpy(b->data + b->len, bytes, n);
    b->len += n;
    b->data[b->len] = 0;
}

void td_strbuf_adds(td_strbuf *b, const char *z)
{
    td_strbuf_add(b, z, strlen(z));
}

void td_strbuf_addc(td_strbuf *b, char c)
{
    td_strbuf_add(b, &c, 1);
}

void td_strbuf_addv(td_strbuf *b, const char *fmt, va_list ap)
{
    char small[256]; /* most calls fit: format once */
    va_list again;
    va_copy(again, ap);
    int n = vsnprintf(small, sizeof small, fmt, ap);
    if (n < 0) {
        b->failed = 1;
    } else if ((size_t)n < sizeof small) {
        td_strbuf_add(b, small, (size_t)n);
    } else if (reserve(b, (size_t)n)) {
        vsnprintf(b->data + b->len, (size_t)n + 1, fmt, again);
        b->len += (size_t)n;
    }
    va_end(again);
}

void td_strbuf_addf(td_strbuf *b, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    td_strbuf_addv(b, fmt, ap);
    va_end(ap);
}

void td_strbuf_add_u64(td_strbuf *b, uint64_t v)
{
    char text[20];
    size_t at = sizeof text;
    do {
        text[--at] = (char)('0' + v % 10);
        v /= 10;
    } while (v);
    td_strbuf_add(b, text + at, sizeof text - at);
}

static void add_escape(td_strbuf *b, unsigned char c)
{
    static const char short_form[32] = {
        ['\b'] = 'b', ['\f'] = 'f', ['\n'] = 'n', ['\r'] = 'r', ['\t'] = 't'};
    static const char hex[] = "0123456789abcdef";
    char out[6] = {'\\', 'u', '0', '0', 0, 0};
    if (c == '"' || c == '\\' || (c < 32 && short_form[c])) {
        out[1] = c < 32 ? short_form[c] : (char)c;
        td_strbuf_add(b, out, 2);
        return;
    }
    out[4] = hex[c >> 4];
    out[5] = hex[c & 15];
    td_strbuf_add(b, out, 6);
}

void td_strbuf_add_json(td_strbuf *b, const char *s, size_t n)
{
    size_t from = 0, at = 0;
    while (at < n) {
        unsigned char c = (unsigned char)s[at];
        uint32_t cp;
        if (c >= 0x20 && c != '"' && c != '\\' && c < 0x7f) {
            at++;
            continue;
        }
        int len = c < 0x80 ? 1 : td_utf8_decode(s + at, n - at, &cp);
        if (c >= 0x80 && len > 0) {
            at += (size_t)len;
            continue;
        }
        td_strbuf_add(b, s + from, at - from);
        if (c < 0x80)
            add_escape(b, c);
        else
            td_strbuf_adds(b, "\xEF\xBF\xBD");
        from = ++at;
    }
    td_strbuf_add(b, s + from, n - from);
}

void td_strbuf_drop(td_strbuf *b, size_t n)
{
    if (n >= b->len) {
        b->len = 0;
    } else {
        memmove(b->data, b->data + n, b->len - n);
        b->len -= n;
    }
    if (b->cap)
        b->data[b->len] = 0;
}

char *td_strbuf_take(td_strbuf *b, size_t *ret_len)
{
    if (!reserve(b, 0)) {
        td_strbuf_done(b);
        return NULL;
    }
    char *p = b->data;
    p[b->len] = 0;
    if (ret_len)
        *ret_len = b->len;
    *b = (td_strbuf){.data = empty, .max_bytes = b->max_bytes};
    return p;
}
