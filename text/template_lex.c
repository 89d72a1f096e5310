/* SPDX-License-Identifier: Apache-2.0 */
/* The lexer: Jinja's rules for white space with trim_blocks and lstrip_blocks on, as transformers
 * sets them. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unicode/uchar.h>

#include "text/template_ast.h"
#include "base/banned.h"

enum { BRACKETS_MAX = 200 };

typedef struct lexer {
    const char *name, *p, *end;
    uint32_t line;
    int line_starting; /* the last tag ended with a newline, or nothing came before */
    td_arena *arena;
    td_token_t *tokens;
    size_t n, cap;
    td_err *err;
} lexer;

static int wrong(lexer *x, const char *what)
{
    return td_err_set(x->err, -EINVAL, "%s:%u: %s; correct the template", x->name, x->line, what);
}

static int add(lexer *x, td_token_t t)
{
    if (x->n == x->cap) {
        size_t cap = x->cap ? x->cap * 2 : 256;
        td_token_t *more = realloc(x->tokens, cap * sizeof *more);
        if (!more)
            return td_err_set(x->err, -ENOMEM, "%s: out of memory", x->name);
        x->tokens = more;
        x->cap = cap;
    }
    x->tokens[x->n++] = t;
    return 0;
}

/* Python's str.isspace */
static int is_space(uint32_t cp)
{
    return u_isUWhiteSpace((UChar32)cp) || (cp >= 0x1C && cp <= 0x1F);
}

static size_t rstrip(const char *s, size_t n)
{
    while (n) {
        size_t at = n - 1;
        uint32_t cp = 0;
        while (at && ((unsigned char)s[at] & 0xC0) == 0x80)
            at--;
        if (td_utf8_decode(s + at, n - at, &cp) < 0 || !is_space(cp))
            break;
        n = at;
    }
    return n;
}

static void skip_space(lexer *x)
{
    uint32_t cp;
    int len;
    while (x->p < x->end && (len = td_utf8_decode(x->p, (size_t)(x->end - x->p), &cp)) > 0 &&
           is_space(cp)) {
        x->line += cp == '\n';
        x->p += len;
    }
}

static void count_lines(lexer *x, const char *from, const char *to)
{
    for (; from < to; from++)
        x->line += *from == '\n';
}

/* Text before a tag: "-" strips it, lstrip_blocks strips the indentation of a tag alone on its
 * line. */
static int add_text(lexer *x, const char *s, size_t n, char sign, int is_variable)
{
    uint32_t line = x->line;
    size_t keep = n;
    count_lines(x, s, s + n);
    if (sign == '-') {
        keep = rstrip(s, n);
    } else if (sign != '+' && !is_variable) {
        const char *newline = n ? memrchr(s, '\n', n) : NULL;
        size_t from = newline ? (size_t)(newline - s) + 1 : 0;
        if ((from > 0 || x->line_starting) && rstrip(s + from, n - from) == 0)
            keep = from;
    }
    return keep ? add(x, (td_token_t){.kind = TK_TEXT, .line = line, .s = {s, keep}}) : 0;
}

/* The end of a tag at p ("%}" and the like, perhaps with a sign). Returns its length, 0 if it is
 * not there. */
static size_t tag_end(const lexer *x, const char *close, char *ret_sign)
{
    size_t n = (size_t)(x->end - x->p),
           signs = n && (*x->p == '-' || (*x->p == '+' && close[0] != '}'));
    if (n < signs + 2 || memcmp(x->p + signs, close, 2) != 0)
        return 0;
    *ret_sign = signs ? *x->p : 0;
    return signs + 2;
}

/* What follows a tag: "-" eats white space, a block or comment eats one newline. */
static void after_tag(lexer *x, size_t len, char sign, int is_variable)
{
    x->p += len;
    const char *from = x->p;
    if (sign == '-') {
        skip_space(x);
    } else if (sign == 0 && !is_variable && x->p < x->end && *x->p == '\n') {
        x->p++;
        x->line++;
    }
    x->line_starting = x->p > from && x->p[-1] == '\n';
}

static const char *const operators[] = {"//", "**", "==", "!=", ">=", "<=", "+", "-", "/",
                                        "*",  "%",  "~",  "[",  "]",  "(",  ")", "{", "}",
                                        ">",  "<",  "=",  ".",  ":",  "|",  ",", ";"};

static int hex_value(const char *p, size_t n, uint32_t *ret_v)
{
    uint32_t v = 0;
    for (size_t i = 0; i < n; i++) {
        char c = p[i];
        int d = c >= '0' && c <= '9'                 ? c - '0'
                : (c | 32) >= 'a' && (c | 32) <= 'f' ? (c | 32) - 'a' + 10
                                                     : -1;
        if (d < 0)
            return 0;
        v = v << 4 | (uint32_t)d;
    }
    *ret_v = v;
    return 1;
}

/* One escape of Python's unicode-escape, p behind the backslash. Returns the bytes consumed. */
static size_t unescape(const char *p, size_t n, char *out, size_t *n_out)
{
    static const char from[] = "\\'\"abfnrtv", to[] = "\\'\"\a\b\f\n\r\t\v";
    const char *at = *p ? strchr(from, *p) : NULL;
    size_t digits = *p == 'x' ? 2 : *p == 'u' ? 4 : *p == 'U' ? 8 : 0;
    uint32_t cp = 0;
    *n_out = 1;
    if (at) {
        out[0] = to[at - from];
        return 1;
    }
    if (*p == '\n') {
        *n_out = 0;
        return 1;
    }
    if (digits && n > digits && hex_value(p + 1, digits, &cp) && cp < 0x110000 &&
        (cp < 0xD800 || cp >= 0xE000)) {
        *n_out = (size_t)td_utf8_encode(cp, out);
        return digits + 1;
    }
    if (*p >= '0' && *p <= '7') {
        size_t len = 0;
        while (len < 3 && len < n && p[len] >= '0' && p[len] <= '7')
            cp = cp * 8 + (uint32_t)(p[len++] - '0');
        *n_out = (size_t)td_utf8_encode(cp, out);
        return len;
    }
    out[0] = '\\'; /* not an escape: both characters stay */
    return 0;
}

static int lex_string(lexer *x)
{
    char quote = *x->p;
    const char *p = x->p + 1;
    while (p < x->end && *p != quote)
        p += *p == '\\' && p + 1 < x->end ? 2 : 1;
    if (p >= x->end)
        return wrong(x, "a string has no end");
    char *out = td_arena_alloc(x->arena, (size_t)(p - x->p));
    size_t n = 0;
    if (!out)
        return td_err_set(x->err, -ENOMEM, "%s: out of memory", x->name);
    for (const char *s = x->p + 1; s < p;) {
        if (*s != '\\') {
            out[n++] = *s++;
            continue;
        }
        size_t n_out;
        s += 1 + unescape(s + 1, (size_t)(p - s - 1), out + n, &n_out);
        n += n_out;
    }
    td_token_t t = {.kind = TK_STRING, .line = x->line, .s = {out, n}};
    count_lines(x, x->p, p);
    x->p = p + 1;
    return add(x, t);
}

static int is_digit(char c)
{
    return c >= '0' && c <= '9';
}

static int lex_number(lexer *x)
{
    char buf[64];
    size_t n = 0;
    const char *p = x->p;
    int is_float = 0, base = 10;
    if (p[0] == '0' && p + 1 < x->end && strchr("xXoObB", p[1])) {
        base = (p[1] | 32) == 'x' ? 16 : (p[1] | 32) == 'o' ? 8 : 2;
        p += 2;
    }
    for (; p < x->end && n < sizeof buf - 1; p++) {
        char c = *p;
        int more = p + 1 < x->end;
        if (base == 16 ? is_digit(c) || ((c | 32) >= 'a' && (c | 32) <= 'f') : is_digit(c)) {
            buf[n++] = c;
        } else if (c == '_' && more && is_digit(p[1])) {
            continue;
        } else if (base == 10 && c == '.' && !is_float && more && is_digit(p[1])) {
            is_float = 1;
            buf[n++] = c;
        } else if (base == 10 && (c | 32) == 'e' && is_float < 2 && more &&
                   (is_digit(p[1]) ||
                    ((p[1] == '+' || p[1] == '-') && p + 2 < x->end && is_digit(p[2])))) {
            is_float = 2;
            buf[n++] = c;
            buf[n++] = *++p;
        } else {
            break;
        }
    }
    buf[n] = 0;
    td_token_t t = {.kind = is_float ? TK_FLOAT : TK_INT, .line = x->line};
    char *stop = buf;
    errno = 0;
    if (is_float)
        t.f = strtod(buf, &stop);
    else
        t.i = strtoll(buf, &stop, base);
    if (n == 0 || *stop || n >= sizeof buf - 2 || (errno == ERANGE && !is_float))
        return wrong(x, "a number is malformed or past 64 bits");
    x->p = p;
    return add(x, t);
}

static int is_name_char(const char *p, const char *end, int first, int *ret_len)
{
    uint32_t cp;
    *ret_len = td_utf8_decode(p, (size_t)(end - p), &cp);
    if (*ret_len < 0)
        return 0;
    if (cp < 0x80)
        return (cp | 32) - 'a' < 26 || cp == '_' || (!first && cp - '0' < 10);
    return first ? u_isIDStart((UChar32)cp) : u_isIDPart((UChar32)cp);
}

static int lex_name(lexer *x)
{
    const char *from = x->p;
    int len;
    while (x->p < x->end && is_name_char(x->p, x->end, x->p == from, &len))
        x->p += len;
    return add(x,
               (td_token_t){.kind = TK_NAME, .line = x->line, .s = {from, (size_t)(x->p - from)}});
}

static int bracket(lexer *x, char *stack, size_t *depth, char c)
{
    if (c == '(' || c == '[' || c == '{') {
        if (*depth == BRACKETS_MAX)
            return wrong(x, "brackets are nested too deep");
        stack[(*depth)++] = c == '(' ? ')' : c == '[' ? ']' : '}';
    } else if (c == ')' || c == ']' || c == '}') {
        if (*depth == 0 || stack[*depth - 1] != c)
            return wrong(x, "unbalanced bracket");
        (*depth)--;
    }
    return 0;
}

static int lex_operator(lexer *x, char *stack, size_t *depth)
{
    for (size_t i = 0; i < sizeof operators / sizeof *operators; i++) {
        size_t n = strlen(operators[i]);
        if ((size_t)(x->end - x->p) < n || memcmp(x->p, operators[i], n) != 0)
            continue;
        int r = bracket(x, stack, depth, *x->p);
        x->p += n;
        return r < 0 ? r
                     : add(x, (td_token_t){.kind = TK_OP, .line = x->line, .s = {operators[i], n}});
    }
    return wrong(x, "a character that Jinja does not know");
}

/* The inside of {{ }} or {% %}, to its end. */
static int lex_tag(lexer *x, const char *close, td_tok end_kind)
{
    char stack[BRACKETS_MAX], sign = 0;
    size_t depth = 0, len;
    int is_variable = end_kind == TK_VAR_END, skip;
    for (;;) {
        len = depth == 0 ? tag_end(x, close, &sign) : 0;
        if (len) {
            int r = add(x, (td_token_t){.kind = end_kind, .line = x->line});
            after_tag(x, len, sign, is_variable);
            return r;
        }
        const char *before = x->p;
        skip_space(x);
        if (x->p > before)
            continue;
        if (x->p == x->end)
            return wrong(x, "a tag has no end");
        int r;
        if (is_digit(*x->p))
            r = lex_number(x);
        else if (*x->p == '"' || *x->p == '\'')
            r = lex_string(x);
        else if (is_name_char(x->p, x->end, 1, &skip))
            r = lex_name(x);
        else
            r = lex_operator(x, stack, &depth);
        if (r < 0)
            return r;
    }
}

static int skip_comment(lexer *x)
{
    for (const char *from = x->p; x->p + 1 < x->end; x->p++) {
        char sign = 0;
        size_t len = tag_end(x, "#}", &sign);
        if (!len)
            continue;
        count_lines(x, from, x->p);
        after_tag(x, len, sign, 0);
        return 0;
    }
    return wrong(x, "a comment has no end");
}

/* At "{%": is this the tag NAME without arguments? Returns its length including "%}", with the
 * signs of both ends. */
static size_t plain_tag(const lexer *x, const char *name, char *ret_before, char *ret_after)
{
    lexer at = *x;
    const char *from = at.p;
    size_t n = strlen(name), len;
    if (at.end - at.p < 2 || memcmp(at.p, "{%", 2) != 0)
        return 0;
    at.p += 2;
    *ret_before = at.p < at.end && (*at.p == '-' || *at.p == '+') ? *at.p++ : 0;
    skip_space(&at);
    if ((size_t)(at.end - at.p) < n || memcmp(at.p, name, n) != 0)
        return 0;
    at.p += n;
    skip_space(&at);
    len = tag_end(&at, "%}", ret_after);
    return len ? (size_t)(at.p - from) + len : 0;
}

/* Behind {% raw %}: text up to {% endraw %}. */
static int lex_raw(lexer *x)
{
    char before = 0, after = 0;
    for (const char *from = x->p; x->p < x->end; x->p++) {
        size_t len = *x->p == '{' ? plain_tag(x, "endraw", &before, &after) : 0;
        if (!len)
            continue;
        int r = add_text(x, from, (size_t)(x->p - from), before, 0);
        count_lines(x, x->p, x->p + len);
        after_tag(x, len, after, 0);
        return r;
    }
    return wrong(x, "{% raw %} has no {% endraw %}");
}

static int lex_markup(lexer *x, const char *text)
{
    char kind = x->p[1], before = 0, after = 0;
    size_t raw = kind == '%' ? plain_tag(x, "raw", &before, &after) : 0, n = (size_t)(x->p - text);
    if (!raw && x->p + 2 < x->end && (x->p[2] == '-' || x->p[2] == '+'))
        before = x->p[2];
    int r = add_text(x, text, n, before, kind == '{');
    if (r < 0)
        return r;
    if (raw) {
        count_lines(x, x->p, x->p + raw);
        /* no newline is trimmed here: trim_blocks leaves {% raw %} alone */
        after_tag(x, raw, after == '-' ? '-' : '+', 0);
        return lex_raw(x);
    }
    x->p += 2 + (before != 0);
    if (kind == '#')
        return skip_comment(x);
    r = add(x, (td_token_t){.kind = kind == '{' ? TK_VAR_BEGIN : TK_BLOCK_BEGIN, .line = x->line});
    if (r < 0)
        return r;
    return kind == '{' ? lex_tag(x, "}}", TK_VAR_END) : lex_tag(x, "%}", TK_BLOCK_END);
}

static int lex_all(lexer *x)
{
    const char *text = x->p;
    while (x->p < x->end) {
        const char *open = memchr(x->p, '{', (size_t)(x->end - x->p));
        if (!open || open + 1 >= x->end) {
            x->p = x->end;
            break;
        }
        x->p = open;
        if (open[1] != '{' && open[1] != '%' && open[1] != '#') {
            x->p++;
            continue;
        }
        int r = lex_markup(x, text);
        if (r < 0)
            return r;
        text = x->p;
    }
    int r = add_text(x, text, (size_t)(x->end - text), '+', 0);
    return r < 0 ? r : add(x, (td_token_t){.kind = TK_END, .line = x->line});
}

/* Newlines become \n, and one at the very end goes, as Jinja does before lexing. */
static size_t normalize(const char *source, size_t n, char *out)
{
    size_t k = 0;
    for (size_t i = 0; i < n; i++) {
        out[k++] = source[i] == '\r' ? '\n' : source[i];
        if (source[i] == '\r' && i + 1 < n && source[i + 1] == '\n')
            i++;
    }
    return k && out[k - 1] == '\n' ? k - 1 : k;
}

int td_tpl_lex(const char *name, const char *source, size_t n, td_arena *arena,
               td_token_t **ret_tokens, size_t *ret_n, td_err *reterr_err)
{
    char *copy = td_arena_alloc(arena, n + 1);
    if (!copy)
        return td_err_set(reterr_err, -ENOMEM, "%s: out of memory", name);
    lexer x = {
        .name = name, .p = copy, .line = 1, .line_starting = 1, .arena = arena, .err = reterr_err};
    x.end = copy + normalize(source, n, copy);
    int r = lex_all(&x);
    if (r < 0) {
        free(x.tokens);
        return r;
    }
    *ret_tokens = x.tokens;
    *ret_n = x.n;
    return 0;
}
