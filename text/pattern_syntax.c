/* SPDX-License-Identifier: Apache-2.0 */
/* Oniguruma (Ruby syntax) to PCRE2. Both read most patterns alike; what they do not is rewritten
 * (\s \w \v \h) or refused. */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "text/pattern.h"
#include "base/banned.h"

typedef struct syntax {
    const char *what, *source, *p;
    td_strbuf *out;
    td_err *err;
    int in_class;
} syntax;

static int refuse(syntax *s, const char *construct)
{
    return td_err_set(s->err, -ENOTSUP,
                      "%s: '%s' at byte %zu of the pattern '%.200s' is not supported; rewrite the "
                      "pattern without it",
                      s->what, construct, (size_t)(s->p - s->source), s->source);
}

static const struct {
    const char *name, *ranges;
} newer[] = {
#define NEWER(name, ranges) {name, ranges},
#include "text/pattern_newer.inc"
#undef NEWER
};

static const char *newer_of(const char *name, size_t n)
{
    for (size_t i = 0; i < sizeof newer / sizeof *newer; i++)
        if (strlen(newer[i].name) == n && memcmp(newer[i].name, name, n) == 0)
            return newer[i].ranges;
    return NULL;
}

/* A set of characters, or all others: in brackets of its own unless it stands in some. */
static int add_set(syntax *s, const char *set, const char *more, int negated, const char *construct)
{
    if (negated && s->in_class)
        return refuse(s, construct);
    td_strbuf_adds(s->out, s->in_class ? "" : negated ? "[^" : "[");
    td_strbuf_adds(s->out, set);
    td_strbuf_adds(s->out, more);
    td_strbuf_adds(s->out, s->in_class ? "" : "]");
    return 0;
}

/* Oniguruma's \s is the White_Space property and \w is Alphabetic, marks, decimal digits,
 * connectors and, outside brackets, six signs of Latin-1; PCRE2's \s adds U+180E, its \w leaves the
 * marks out. */
static int class_escape(syntax *s, char c)
{
    static const char word[] = "\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}",
                      alone[] =
                          "\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}\\x{b2}\\x{b3}\\x{b9}\\x{bc}-\\x{be}";
    char construct[] = {'\\', c, 0};
    if (c == 's' || c == 'S')
        td_strbuf_adds(s->out, c == 's' ? "\\p{White_Space}" : "\\P{White_Space}");
    else if (c == 'd' || c == 'D')
        return add_set(s, "\\p{Nd}", newer_of("Nd", 2), c == 'D', construct);
    else
        return add_set(s, s->in_class ? word : alone, newer_of("w", 1), c == 'W', construct);
    return 0;
}

static int property(syntax *s, char c)
{
    const char *end = s->p[0] == '{' ? strchr(s->p, '}') : NULL;
    if (!end)
        return refuse(s, "\\p without braces");
    int negated = (c == 'P') != (s->p[1] == '^');
    const char *name = s->p + 1 + (s->p[1] == '^'), *more = newer_of(name, (size_t)(end - name));
    if (more) {
        char set[8], construct[] = {'\\', c, 0};
        snprintf(set, sizeof set, "\\p{%.*s}", (int)(end - name), name);
        s->p = end + 1;
        return add_set(s, set, more, negated, construct);
    }
    td_strbuf_addc(s->out, '\\');
    td_strbuf_addc(s->out, c);
    td_strbuf_add(s->out, s->p, (size_t)(end - s->p) + 1);
    s->p = end + 1;
    return 0;
}

static int is_hex(char c)
{
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F');
}

/* \uHHHH, \xHH, \x{H...} */
static int code_escape(syntax *s, char c)
{
    size_t n = 0, max = c == 'u' ? 4 : 2;
    int braces = c == 'x' && s->p[0] == '{';
    const char *digits = s->p + braces;
    if (braces)
        max = 8;
    while (n < max && is_hex(digits[n]))
        n++;
    if (n == 0 || (c == 'u' && n < 4) || (braces && digits[n] != '}'))
        return refuse(s, "malformed \\x or \\u");
    unsigned value = 0;
    for (size_t i = 0; i < n; i++)
        value = value * 16 +
                (unsigned)(digits[i] <= '9' ? digits[i] - '0' : (digits[i] | 32) - 'a' + 10);
    if (c == 'x' && !braces && value > 0x7F) /* a byte there, a character here */
        return refuse(s, "\\xHH above 7F");
    td_strbuf_addf(s->out, "\\x{%x}", value);
    s->p = digits + n + braces;
    return 0;
}

static int escape(syntax *s)
{
    char c = *s->p;
    if (c == 0)
        return refuse(s, "backslash at the end");
    s->p++;
    if (strchr("sSdDwW", c))
        return class_escape(s, c);
    if (c == 'p' || c == 'P')
        return property(s, c);
    if (c == 'x' || c == 'u')
        return code_escape(s, c);
    if (c == 'v') {
        td_strbuf_adds(s->out, "\\x0b");
        return 0;
    }
    if (strchr("rntfea", c) ||
        (c > ' ' && c < 0x7F && !(c >= '0' && c <= '9') && !((c | 32) >= 'a' && (c | 32) <= 'z'))) {
        td_strbuf_addc(s->out, '\\');
        td_strbuf_addc(s->out, c);
        return 0;
    }
    if ((unsigned char)c >= 0x80 || c == ' ') {
        td_strbuf_addc(s->out, c);
        return 0;
    }
    return refuse(s, (char[]){'\\', c, 0});
}

static int group(syntax *s)
{
    static const char *const kinds[] = {"?:", "?=", "?!", "?>", "?<=", "?<!", "?i:", "?-i:"};
    if (s->p[0] != '?' && s->p[0] != '*') {
        td_strbuf_adds(s->out, "(");
        return 0;
    }
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        if (strncmp(s->p, kinds[i], strlen(kinds[i])) == 0) {
            td_strbuf_addc(s->out, '(');
            td_strbuf_adds(s->out, kinds[i]);
            s->p += strlen(kinds[i]);
            return 0;
        }
    return refuse(s, "this kind of group");
}

static int class_char(syntax *s, char c)
{
    if (c == '[')
        return refuse(s, "[ inside a character class");
    if (c == '&' && s->p[0] == '&')
        return refuse(s, "&& inside a character class");
    if (c == ']')
        s->in_class = 0;
    td_strbuf_addc(s->out, c);
    return 0;
}

/* After '{': a range quantifier that both read alike, or a literal brace. */
static int brace(syntax *s)
{
    size_t n = strspn(s->p, "0123456789,");
    if (s->p[n] == '}' && (s->p[0] == ',' || s->p[n + 1] == '+'))
        return refuse(s, s->p[0] == ',' ? "{,n}" : "{n,m}+");
    td_strbuf_addc(s->out, '{');
    return 0;
}

int td_pattern_translate(const char *what, const char *source, td_strbuf *out, td_err *reterr_err)
{
    syntax s = {.what = what, .source = source, .p = source, .out = out, .err = reterr_err};
    int r = 0;
    while (r == 0 && *s.p) {
        char c = *s.p++;
        if (c == '\\') {
            r = escape(&s);
        } else if (s.in_class) {
            r = class_char(&s, c);
        } else if (c == '[') {
            s.in_class = 1;
            td_strbuf_addc(out, c);
            if (*s.p == '^')
                td_strbuf_addc(out, *s.p++);
            if (*s.p == ']')
                r = refuse(&s, "] first in a character class");
        } else if (c == '(') {
            r = group(&s);
        } else if (c == '{') {
            r = brace(&s);
        } else {
            td_strbuf_addc(out, c);
        }
    }
    if (r == 0 && out->failed)
        r = td_err_set(reterr_err, -ENOMEM, "%s: out of memory", what);
    return r;
}
