/* SPDX-License-Identifier: Apache-2.0 */
#include "net/http_parse.h"

#include <errno.h>
#include <strings.h>

#include "base/bug.h"
#include "base/banned.h"

static int refuse(td_http_bad *bad, int status, const char *text)
{
    *bad = (td_http_bad){status, text};
    return -EBADMSG;
}

static int is_tchar(unsigned char c)
{
    if ((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9'))
        return 1;
    return c && strchr("!#$%&'*+-.^_`|~", c) != NULL;
}

/* What a field value may hold: visible, blank, tab, obs-text. */
static int is_value_char(unsigned char c)
{
    return c == '\t' || (c >= 0x20 && c != 0x7f);
}

static int is_digit(unsigned char c)
{
    return c >= '0' && c <= '9';
}

static int hex_value(unsigned char c)
{
    if (is_digit(c))
        return c - '0';
    c |= 0x20;
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

static int name_is(td_str s, const char *z)
{
    return s.len == strlen(z) && strncasecmp(s.ptr, z, s.len) == 0;
}

int td_http_scan_head(size_t *pos, const char *p, size_t n, size_t max_bytes, td_http_bad *bad)
{
    size_t i = *pos;
    for (; i < n && i < max_bytes; i++) {
        unsigned char c = (unsigned char)p[i];
        if (i > 0 && p[i - 1] == '\r' && c != '\n')
            return refuse(bad, 400, "a CR without LF in the request head");
        if (c == '\n') {
            if (i == 0 || p[i - 1] != '\r')
                return refuse(bad, 400, "a line of the request head ends in LF without CR");
            if (i == 1)
                return refuse(bad, 400, "the request begins with an empty line");
            if (i >= 3 && p[i - 2] == '\n')
                return (int)(i + 1);
        } else if (c != '\r' && !is_value_char(c)) {
            return refuse(bad, 400,
                          "a control byte in the request head (is this TLS on a plain port?)");
        }
    }
    *pos = i;
    if (n >= max_bytes)
        return refuse(bad, 431, "the request head is larger than the limit");
    return 0;
}

/* The next line of [*p, end) without its CRLF; the scan made sure that each has one. */
static td_str next_line(const char **p, const char *end)
{
    const char *nl = memchr(*p, '\n', (size_t)(end - *p));
    TD_BUG_ON(!nl || nl == *p);
    td_str s = {*p, (size_t)(nl - *p) - 1};
    *p = nl + 1;
    return s;
}

static td_str trim(td_str s)
{
    while (s.len && (*s.ptr == ' ' || *s.ptr == '\t')) {
        s.ptr++;
        s.len--;
    }
    while (s.len && (s.ptr[s.len - 1] == ' ' || s.ptr[s.len - 1] == '\t'))
        s.len--;
    return s;
}

static int parse_field(td_str line, td_http_field *ret_field, td_http_bad *bad)
{
    if (line.ptr[0] == ' ' || line.ptr[0] == '\t')
        return refuse(bad, 400, "a folded header line");
    size_t i = 0;
    while (i < line.len && is_tchar((unsigned char)line.ptr[i]))
        i++;
    if (i == 0 || i == line.len || line.ptr[i] != ':')
        return refuse(bad, 400,
                      "a header line is not `Name: value` (no blank may stand before the colon)");
    td_str value = {line.ptr + i + 1, line.len - i - 1};
    for (size_t j = 0; j < value.len; j++)
        if (!is_value_char((unsigned char)value.ptr[j]))
            return refuse(bad, 400, "a control byte in a header value");
    *ret_field = (td_http_field){{line.ptr, i}, trim(value)};
    return 0;
}

static int parse_fields(const char *p, const char *end, td_http_head *h, td_http_bad *bad)
{
    h->n_fields = 0;
    for (;;) {
        td_str line = next_line(&p, end);
        if (line.len == 0)
            return p == end ? 0 : refuse(bad, 400, "an empty line inside the head");
        if (h->n_fields == TD_HTTP_MAX_FIELDS)
            return refuse(bad, 431, "more than 100 header lines");
        if (parse_field(line, &h->fields[h->n_fields], bad))
            return -EBADMSG;
        h->n_fields++;
    }
}

const td_http_field *td_http_head_get(const td_http_head *h, const char *name)
{
    for (uint32_t i = 0; i < h->n_fields; i++)
        if (name_is(h->fields[i].name, name))
            return &h->fields[i];
    return NULL;
}

/* Fields that may stand once: two of them are read differently by different programs. */
static int check_single(const td_http_head *h, td_http_bad *bad)
{
    static const char *const single[] = {"host",         "content-length", "transfer-encoding",
                                         "content-type", "authorization",  "expect"};
    for (size_t k = 0; k < TD_ARRAY_LEN(single); k++) {
        int seen = 0;
        for (uint32_t i = 0; i < h->n_fields; i++)
            seen += name_is(h->fields[i].name, single[k]);
        if (seen > 1)
            return refuse(bad, 400,
                          "Host, Content-Length, Transfer-Encoding, Content-Type, Authorization or "
                          "Expect stands twice");
    }
    return 0;
}

static int parse_length(td_str v, int64_t *ret_length, td_http_bad *bad)
{
    int64_t n = 0;
    if (v.len == 0 || v.len > 18)
        return refuse(bad, 400, "Content-Length is not a number of at most 18 digits");
    for (size_t i = 0; i < v.len; i++) {
        if (!is_digit((unsigned char)v.ptr[i]))
            return refuse(bad, 400, "Content-Length is not made of digits alone");
        n = n * 10 + (v.ptr[i] - '0');
    }
    *ret_length = n;
    return 0;
}

static int parse_framing(td_http_head *h, td_http_bad *bad)
{
    const td_http_field *cl = td_http_head_get(h, "content-length");
    const td_http_field *te = td_http_head_get(h, "transfer-encoding");
    h->content_length = -1;
    h->chunked = 0;
    if (cl && te)
        return refuse(bad, 400, "both Content-Length and Transfer-Encoding");
    if (cl)
        return parse_length(cl->value, &h->content_length, bad);
    if (!te)
        return 0;
    if (h->minor == 0)
        return refuse(bad, 400, "Transfer-Encoding in HTTP/1.0");
    if (!name_is(te->value, "chunked"))
        return refuse(bad, 400, "Transfer-Encoding is not exactly `chunked`");
    h->chunked = 1;
    return 0;
}

/* 1 when the comma-separated list holds the token. */
static int list_has(td_str list, const char *token)
{
    const char *p = list.ptr, *end = list.ptr + list.len;
    while (p < end) {
        const char *comma = memchr(p, ',', (size_t)(end - p));
        const char *stop = comma ? comma : end;
        if (name_is(trim((td_str){p, (size_t)(stop - p)}), token))
            return 1;
        p = stop + 1;
    }
    return 0;
}

static void parse_connection(td_http_head *h)
{
    int close = 0, keep = 0;
    for (uint32_t i = 0; i < h->n_fields; i++) {
        if (!name_is(h->fields[i].name, "connection"))
            continue;
        close |= list_has(h->fields[i].value, "close");
        keep |= list_has(h->fields[i].value, "keep-alive");
    }
    h->keep_alive = !close && (h->minor == 1 || keep);
}

static int parse_version(td_str v, int *ret_minor, td_http_bad *bad)
{
    if (v.len != 8 || memcmp(v.ptr, "HTTP/", 5) || !is_digit((unsigned char)v.ptr[5]) ||
        v.ptr[6] != '.' || !is_digit((unsigned char)v.ptr[7]))
        return refuse(bad, 400, "the request line is not `METHOD target HTTP/1.1`");
    if (v.ptr[5] != '1' || v.ptr[7] > '1')
        return refuse(bad, 505, "only HTTP/1.0 and HTTP/1.1 are spoken here");
    *ret_minor = v.ptr[7] - '0';
    return 0;
}

/* absolute-form (`GET http://host/path`) becomes its path. */
static int strip_authority(td_str *target, td_http_bad *bad)
{
    size_t skip = 0;
    if (target->len >= 7 && strncasecmp(target->ptr, "http://", 7) == 0)
        skip = 7;
    else if (target->len >= 8 && strncasecmp(target->ptr, "https://", 8) == 0)
        skip = 8;
    if (!skip)
        return 0;
    const char *end = target->ptr + target->len;
    const char *slash = memchr(target->ptr + skip, '/', target->len - skip);
    if (!slash || slash == target->ptr + skip)
        return refuse(bad, 400, "the request target has no path");
    *target = (td_str){slash, (size_t)(end - slash)};
    return 0;
}

static int parse_target(td_str t, td_http_head *h, td_http_bad *bad)
{
    for (size_t i = 0; i < t.len; i++)
        if ((unsigned char)t.ptr[i] <= 0x20 || (unsigned char)t.ptr[i] >= 0x7f || t.ptr[i] == '#')
            return refuse(bad, 400, "the request target holds a byte that must be percent-encoded");
    if (strip_authority(&t, bad))
        return -EBADMSG;
    int asterisk = td_str_eq(t, "*") && td_str_eq(h->method, "OPTIONS");
    if (!asterisk && (t.len == 0 || t.ptr[0] != '/'))
        return refuse(bad, 400, "the request target does not begin with `/`");
    const char *mark = memchr(t.ptr, '?', t.len);
    h->path = (td_str){t.ptr, mark ? (size_t)(mark - t.ptr) : t.len};
    h->query = mark ? (td_str){mark + 1, t.len - h->path.len - 1} : (td_str){"", 0};
    return 0;
}

static int parse_request_line(td_str line, td_http_head *h, td_http_bad *bad)
{
    size_t i = 0;
    while (i < line.len && is_tchar((unsigned char)line.ptr[i]))
        i++;
    if (i == 0 || i > 32 || i == line.len || line.ptr[i] != ' ')
        return refuse(bad, 400, "the request line does not begin with a method and one blank");
    h->method = (td_str){line.ptr, i};
    const char *target = line.ptr + i + 1, *end = line.ptr + line.len;
    const char *blank = memchr(target, ' ', (size_t)(end - target));
    if (!blank)
        return refuse(bad, 400, "the request line is not `METHOD target HTTP/1.1`");
    if (parse_version((td_str){blank + 1, (size_t)(end - blank) - 1}, &h->minor, bad))
        return -EBADMSG;
    return parse_target((td_str){target, (size_t)(blank - target)}, h, bad);
}

static int check_host(const td_http_head *h, td_http_bad *bad)
{
    const td_http_field *host = td_http_head_get(h, "host");
    if (!host)
        return h->minor == 0 ? 0 : refuse(bad, 400, "no Host header");
    if (host->value.len == 0)
        return refuse(bad, 400, "the Host header is empty");
    for (size_t i = 0; i < host->value.len; i++) {
        unsigned char c = (unsigned char)host->value.ptr[i];
        if (c >= 0x80 || (!is_tchar(c) && !strchr(":[](),;=", c)))
            return refuse(bad, 400, "the Host header is not a host name and port");
    }
    return 0;
}

static int check_expect(td_http_head *h, td_http_bad *bad)
{
    const td_http_field *e = td_http_head_get(h, "expect");
    h->expect_continue = e && h->minor == 1;
    if (e && !name_is(e->value, "100-continue"))
        return refuse(bad, 400, "Expect is not `100-continue`");
    return 0;
}

int td_http_parse_request(const char *p, size_t n, td_http_head *ret_head, td_http_bad *bad)
{
    const char *end = p + n;
    td_http_head *h = ret_head;
    h->status = 0;
    if (parse_request_line(next_line(&p, end), h, bad) || parse_fields(p, end, h, bad) ||
        check_single(h, bad) || parse_framing(h, bad) || check_host(h, bad) || check_expect(h, bad))
        return -EBADMSG;
    parse_connection(h);
    return 0;
}

int td_http_parse_response(const char *p, size_t n, td_http_head *ret_head, td_http_bad *bad)
{
    const char *end = p + n;
    td_http_head *h = ret_head;
    h->method = h->path = h->query = (td_str){"", 0};
    h->expect_continue = 0;
    td_str line = next_line(&p, end);
    /* "HTTP/1.1 200" and, for those that leave the reason out, nothing behind it */
    if (line.len < 12 || parse_version((td_str){line.ptr, 8}, &h->minor, bad) ||
        line.ptr[8] != ' ' || (line.len > 12 && line.ptr[12] != ' '))
        return refuse(bad, 400, "the answer is not HTTP/1.x");
    h->status = 0;
    for (int i = 9; i < 12; i++) {
        if (!is_digit((unsigned char)line.ptr[i]))
            return refuse(bad, 400, "the answer's status is not a number");
        h->status = h->status * 10 + (line.ptr[i] - '0');
    }
    if (parse_fields(p, end, h, bad) || check_single(h, bad) || parse_framing(h, bad))
        return -EBADMSG;
    parse_connection(h);
    return 0;
}

int td_http_decode_path(td_str path, char *out)
{
    size_t n = 0;
    for (size_t i = 0; i < path.len; i++) {
        unsigned char c = (unsigned char)path.ptr[i];
        if (c == '%') {
            if (path.len - i < 3)
                return -EBADMSG;
            int hi = hex_value((unsigned char)path.ptr[i + 1]),
                lo = hex_value((unsigned char)path.ptr[i + 2]);
            if (hi < 0 || lo < 0)
                return -EBADMSG;
            c = (unsigned char)(hi << 4 | lo);
            i += 2;
        }
        if (c < 0x20 || c == 0x7f)
            return -EBADMSG;
        out[n++] = (char)c;
    }
    out[n] = 0;
    return td_utf8_valid(out, n) ? 0 : -EBADMSG;
}

enum {
    F_DONE,
    F_LENGTH,
    F_UNTIL_CLOSE,
    F_SIZE, /* chunk-size digits */
    F_EXT,  /* chunk extension, ignored */
    F_SIZE_LF,
    F_DATA,
    F_DATA_CR,
    F_DATA_LF,
    F_TRAILER, /* first byte of a trailer line, or of the final CRLF */
    F_TRAILER_NAME,
    F_TRAILER_VALUE,
    F_TRAILER_LF,
    F_END_LF,
};

void td_http_framer_init(td_http_framer *f, const td_http_head *h, uint64_t max_bytes)
{
    *f = (td_http_framer){.state = F_DONE, .max_bytes = max_bytes};
    if (h->chunked)
        f->state = F_SIZE;
    else if (h->content_length > 0) {
        f->state = F_LENGTH;
        f->left = (uint64_t)h->content_length;
    }
}

void td_http_framer_init_close(td_http_framer *f, uint64_t max_bytes)
{
    *f = (td_http_framer){.state = F_UNTIL_CLOSE, .left = UINT64_MAX, .max_bytes = max_bytes};
}

static int chunk_size_digit(td_http_framer *f, unsigned char c, td_http_bad *bad)
{
    int v = hex_value(c);
    if (v >= 0) {
        if (++f->n_digits > 15)
            return refuse(bad, 400, "a chunk size of more than 15 digits");
        f->left = f->left << 4 | (unsigned)v;
        return 0;
    }
    if (!f->n_digits || (c != '\r' && c != ';'))
        return refuse(bad, 400, "a chunk size is not hexadecimal digits");
    if (f->left > f->max_bytes - f->total)
        return refuse(bad, 413, "the body is larger than the limit");
    f->state = c == ';' ? F_EXT : F_SIZE_LF;
    return 0;
}

static int expect_byte(td_http_framer *f, unsigned char c, char want, int next, td_http_bad *bad)
{
    if (c != (unsigned char)want)
        return refuse(bad, 400, "a chunk does not end in CR LF");
    f->state = next;
    return 0;
}

/* One byte that is not body. */
static int framing_byte(td_http_framer *f, unsigned char c, td_http_bad *bad)
{
    switch (f->state) {
    case F_SIZE:
        return chunk_size_digit(f, c, bad);
    case F_EXT:
        if (c != '\r' && !is_value_char(c))
            return refuse(bad, 400, "a control byte in a chunk extension");
        f->state = c == '\r' ? F_SIZE_LF : F_EXT;
        return 0;
    case F_SIZE_LF:
        return expect_byte(f, c, '\n', f->left ? F_DATA : F_TRAILER, bad);
    case F_DATA_CR:
        return expect_byte(f, c, '\r', F_DATA_LF, bad);
    case F_DATA_LF:
        f->n_digits = 0;
        return expect_byte(f, c, '\n', F_SIZE, bad);
    case F_TRAILER:
        if (c != '\r' && !is_tchar(c))
            return refuse(bad, 400, "a trailer line is not `Name: value`");
        f->state = c == '\r' ? F_END_LF : F_TRAILER_NAME;
        return 0;
    case F_TRAILER_NAME:
        if (c != ':' && !is_tchar(c))
            return refuse(bad, 400, "a trailer line is not `Name: value`");
        f->state = c == ':' ? F_TRAILER_VALUE : F_TRAILER_NAME;
        return 0;
    case F_TRAILER_VALUE:
        if (c != '\r' && !is_value_char(c))
            return refuse(bad, 400, "a control byte in a trailer");
        f->state = c == '\r' ? F_TRAILER_LF : F_TRAILER_VALUE;
        return 0;
    case F_TRAILER_LF:
        return expect_byte(f, c, '\n', F_TRAILER, bad);
    default:
        return expect_byte(f, c, '\n', F_DONE, bad); /* F_END_LF */
    }
}

static int is_data_state(const td_http_framer *f)
{
    return f->state == F_LENGTH || f->state == F_UNTIL_CLOSE || f->state == F_DATA;
}

static td_str take_data(td_http_framer *f, const char *p, size_t n)
{
    size_t take = (size_t)TD_MIN((uint64_t)n, f->left);
    f->total += take;
    if (f->state != F_UNTIL_CLOSE)
        f->left -= take;
    if (f->left == 0)
        f->state = f->state == F_DATA ? F_DATA_CR : F_DONE;
    return (td_str){p, take};
}

int td_http_framer_feed(td_http_framer *f, const char *p, size_t n, size_t *ret_used,
                        td_str *ret_data, td_http_bad *bad)
{
    size_t i = 0;
    *ret_data = (td_str){p, 0};
    *ret_used = 0;
    while (f->state != F_DONE && i < n && !is_data_state(f)) {
        /* Tiny chunks with long extensions would make us read without end: 8 bytes for each of
         * body, and 16 KiB. */
        if (++f->overhead > 16384 + 8 * f->total)
            return refuse(bad, 400, "more chunk framing than body");
        if (framing_byte(f, (unsigned char)p[i], bad))
            return -EBADMSG;
        i++;
    }
    if (is_data_state(f) && i < n) {
        *ret_data = take_data(f, p + i, n - i);
        i += ret_data->len;
        if (f->total > f->max_bytes)
            return refuse(bad, 413, "the body is larger than the limit");
    }
    *ret_used = i;
    return f->state == F_DONE;
}
