/* SPDX-License-Identifier: Apache-2.0 */
/* Answers: heads, whole bodies, streams, and the server's own errors. */
#include <errno.h>
#include <stdio.h>
#include <strings.h>
#include <time.h>

#include "base/bug.h"
#include "base/clock.h"
#include "base/err.h"
#include "net/http_int.h"
#include "base/banned.h"

static const char *reason(int status)
{
    static const struct {
        int status;
        const char *text;
    } table[] = {
        {200, "OK"},
        {201, "Created"},
        {202, "Accepted"},
        {204, "No Content"},
        {304, "Not Modified"},
        {400, "Bad Request"},
        {401, "Unauthorized"},
        {403, "Forbidden"},
        {404, "Not Found"},
        {405, "Method Not Allowed"},
        {408, "Request Timeout"},
        {409, "Conflict"},
        {413, "Content Too Large"},
        {422, "Unprocessable Content"},
        {429, "Too Many Requests"},
        {431, "Request Header Fields Too Large"},
        {499, "Client Closed Request"},
        {500, "Internal Server Error"},
        {501, "Not Implemented"},
        {503, "Service Unavailable"},
        {505, "HTTP Version Not Supported"},
    };
    for (size_t i = 0; i < TD_ARRAY_LEN(table); i++)
        if (table[i].status == status)
            return table[i].text;
    return "Status";
}

static const char *date_now(td_http_server *s)
{
    int64_t now = td_wall_s();
    if (now != s->date_s) {
        struct tm tm;
        time_t t = (time_t)now;
        s->date_s = now;
        gmtime_r(&t, &tm);
        strftime(s->date, sizeof s->date, "%a, %d %b %Y %H:%M:%S GMT", &tm);
    }
    return s->date;
}

void td_http_out(td_http_conn *c, const void *data, size_t n)
{
    if (evbuffer_add(c->out, data, n) < 0)
        c->broken = 1;
}

static void out_text(td_http_conn *c, const char *text)
{
    td_http_out(c, text, strlen(text));
}

/* A value may echo what a client sent: no byte of it may begin a new line. */
static void out_clean(td_http_conn *c, const char *s)
{
    for (;;) {
        size_t n = strcspn(s, "\r\n");
        td_http_out(c, s, n);
        if (!s[n])
            return;
        out_text(c, " ");
        s += n + 1;
    }
}

void td_http_write_head(td_http_conn *c, int status, const td_http_header *headers,
                        size_t n_headers)
{
    char line[128];
    snprintf(line, sizeof line, "HTTP/1.1 %d %s\r\nDate: %s\r\n", status, reason(status),
             date_now(c->server));
    out_text(c, line);
    for (size_t i = 0; i < n_headers; i++) {
        out_clean(c, headers[i].name);
        out_text(c, ": ");
        out_clean(c, headers[i].value);
        out_text(c, "\r\n");
    }
}

static void out_length(td_http_conn *c, size_t len)
{
    char line[48];
    snprintf(line, sizeof line, "Content-Length: %zu\r\n", len);
    out_text(c, line);
}

static int keep_of(const td_http_req *r)
{
    const td_http_conn *c = r->conn;
    return r->head.keep_alive && !c->server->stopping && !(c->eof && c->in.len == 0);
}

static void write_connection(td_http_req *r, int keep)
{
    if (!keep)
        out_text(r->conn, "Connection: close\r\n");
    else if (r->head.minor == 0)
        out_text(r->conn, "Connection: keep-alive\r\n");
}

void td_http_reply(td_http_req *r, int status, const td_http_header *headers, size_t n_headers,
                   const void *body, size_t len)
{
    td_http_conn *c = r->conn;
    TD_BUG_ON(r->streaming);
    if (!c)
        return; /* inside on_close */
    int keep = keep_of(r), bodiless = status == 204 || status == 304;
    td_http_write_head(c, status, headers, n_headers);
    write_connection(r, keep);
    if (!bodiless)
        out_length(c, len);
    out_text(c, "\r\n");
    if (!bodiless && !r->no_body && len)
        td_http_out(c, body, len);
    td_http_conn_answered(c, keep);
}

void td_http_stream_begin(td_http_req *r, int status, const td_http_header *headers,
                          size_t n_headers)
{
    td_http_conn *c = r->conn;
    TD_BUG_ON(r->streaming);
    r->streaming = 1;
    if (!c)
        return;
    r->chunked = r->head.minor == 1;
    td_http_write_head(c, status, headers, n_headers);
    write_connection(r, r->chunked && keep_of(r));
    out_text(c, r->chunked ? "Transfer-Encoding: chunked\r\n\r\n" : "\r\n");
    td_http_conn_schedule(c);
}

int td_http_stream_write(td_http_req *r, const void *data, size_t n)
{
    td_http_conn *c = r->conn;
    TD_BUG_ON(!r->streaming);
    if (!c || r->no_body || n == 0)
        return 0; /* an empty chunk would end the stream */
    if (r->slow || evbuffer_get_length(c->out) + n > c->server->cfg.max_backlog_bytes) {
        r->slow = 1;
        td_http_conn_schedule(c);
        return -ENOBUFS;
    }
    if (r->chunked) {
        char size[24];
        snprintf(size, sizeof size, "%zx\r\n", n);
        out_text(c, size);
    }
    td_http_out(c, data, n);
    if (r->chunked)
        out_text(c, "\r\n");
    td_http_conn_schedule(c);
    return 0;
}

size_t td_http_stream_backlog(const td_http_req *r)
{
    return r->conn ? evbuffer_get_length(r->conn->out) : 0;
}

void td_http_stream_end(td_http_req *r)
{
    td_http_conn *c = r->conn;
    TD_BUG_ON(!r->streaming);
    if (!c)
        return;
    if (r->slow) { /* a write was refused: an answer with a hole must not look whole */
        td_http_conn_answered(c, 0);
        return;
    }
    if (r->chunked && !r->no_body)
        out_text(c, "0\r\n\r\n");
    td_http_conn_answered(c, r->chunked && keep_of(r));
}

void td_http_stream_abort(td_http_req *r)
{
    if (r->conn)
        td_http_conn_answered(r->conn, 0);
}

static td_error error_of(int status)
{
    switch (status) {
    case 408:
        return TD_ERROR_DEADLINE;
    case 413:
        return TD_ERROR_TOO_LARGE;
    case 429:
        return TD_ERROR_RATE_LIMITED;
    case 431:
        return TD_ERROR_HEADERS_TOO_LARGE;
    case 503:
        return TD_ERROR_OVERLOADED;
    case 505:
        return TD_ERROR_UNSUPPORTED;
    default:
        return TD_ERROR_INVALID_REQUEST;
    }
}

void td_http_conn_refuse(td_http_conn *c, td_http_bad bad)
{
    const td_error_info *e = td_error_get(error_of(bad.status));
    char body[512];
    /* bad.text is a literal of ours: nothing in it needs escaping */
    int n = snprintf(
        body, sizeof body,
        "{\"error\":{\"message\":\"%s: %s\",\"type\":\"%s\",\"param\":null,\"code\":\"%s\"}}",
        e->text, bad.text, e->type, e->name);
    td_http_header h[] = {
        {"Content-Type", "application/json"}, {"Connection", "close"}, {"Retry-After", "2"}};
    td_http_write_head(c, bad.status, h, bad.status == 503 || bad.status == 429 ? 3 : 2);
    out_length(c, (size_t)n);
    out_text(c, "\r\n");
    out_text(c, body);
    td_http_conn_answered(c, 0);
}
