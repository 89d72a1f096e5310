/* SPDX-License-Identifier: Apache-2.0 */
/* One request over one connection; `Connection: close`, so that the end of the answer is the end of
 * the call. */
#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <strings.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/clock.h"
#include "net/http.h"
#include "net/http_parse.h"
#include "net/listen.h"
#include "base/banned.h"

enum { HEAD_MAX = 65536, CONNECT_TIMEOUT_US = 10 * TD_S };

struct td_http_call {
    td_loop *loop;
    td_io *io;
    td_timer *timer; /* of connecting */
    td_after after;  /* starts connecting: no callback runs inside td_http_call_start() */
    int fd;
    struct addrinfo *addrs, *addr; /* all of the host's; the one being tried */
    char peer[TD_ADDR_TEXT];
    int connected, head_done, until_close, head_only;
    td_strbuf out, in; /* request; head of the answer */
    size_t sent, scanned;
    td_http_framer framer;
    const td_http_call_ops *ops;
    void *arg;
    int in_callback, cancelled;
};

static void call_free(td_http_call *c)
{
    td_loop_after_del(c->loop, &c->after);
    td_io_del(c->io);
    td_timer_del(c->timer);
    if (c->fd >= 0)
        close(c->fd);
    if (c->addrs)
        freeaddrinfo(c->addrs);
    td_strbuf_done(&c->out);
    td_strbuf_done(&c->in);
    free(c);
}

/* Last thing done with a call. Returns -ECANCELED so that callers unwind. */
static int finish(td_http_call *c, const char *error)
{
    c->in_callback = 1; /* a cancel from inside is late and harmless */
    c->ops->on_done(c->arg, error);
    call_free(c);
    return -ECANCELED;
}

static int fail(td_http_call *c, const char *why)
{
    char text[256];
    snprintf(text, sizeof text, "%s: %s", c->peer, why);
    return finish(c, text);
}

void td_http_call_cancel(td_http_call *c)
{
    if (!c)
        return;
    if (c->in_callback)
        c->cancelled = 1;
    else
        call_free(c);
}

/* After each callback: 0, or -ECANCELED and the call is gone. */
static int callback_done(td_http_call *c)
{
    c->in_callback = 0;
    if (!c->cancelled)
        return 0;
    call_free(c);
    return -ECANCELED;
}

/* ---- connecting ---- */

static void on_io(void *arg, int fd, int events);

static void drop_socket(td_http_call *c)
{
    td_io_del(c->io);
    c->io = NULL;
    if (c->fd >= 0)
        close(c->fd);
    c->fd = -1;
}

static int connect_one(td_http_call *c)
{
    int one = 1;
    td_addr_text(c->addr->ai_addr, c->peer);
    c->fd = socket(c->addr->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (c->fd < 0)
        return -errno;
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (connect(c->fd, c->addr->ai_addr, c->addr->ai_addrlen) < 0 && errno != EINPROGRESS)
        return -errno;
    return td_io_add(c->loop, c->fd, TD_IO_WRITE, on_io, c, &c->io);
}

/* Try addresses from c->addr on; error is what the one before said. */
static void connect_next(td_http_call *c, int error)
{
    for (; c->addr; c->addr = c->addr->ai_next) {
        drop_socket(c);
        error = connect_one(c);
        if (!error)
            return;
    }
    fail(c, td_errno_text(error));
}

static void on_start(void *arg)
{
    connect_next(arg, 0);
}

static void on_connect_timeout(void *arg)
{
    fail(arg, "no connection within 10 s");
}

static int on_connected(td_http_call *c)
{
    int error = 0;
    socklen_t len = sizeof error;
    getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &len);
    if (error) {
        c->addr = c->addr->ai_next;
        connect_next(c, -error);
        return -ECANCELED;
    }
    c->connected = 1;
    td_timer_del(c->timer);
    c->timer = NULL;
    return td_io_set(c->io, TD_IO_READ | TD_IO_WRITE);
}

/* ---- the answer ---- */

static const char *get_header(const void *ctx, const char *name)
{
    const td_http_field *f = td_http_head_get(ctx, name);
    return f ? f->value.ptr : NULL;
}

static int deliver_head(td_http_call *c, td_http_head *h)
{
    /* accessors hand out C strings; behind each value stands its line's end, already parsed */
    for (uint32_t i = 0; i < h->n_fields; i++)
        ((char *)h->fields[i].value.ptr)[h->fields[i].value.len] = 0;
    c->head_done = 1;
    int bodiless = c->head_only || h->status == 204 || h->status == 304;
    if (bodiless) {
        h->chunked = 0;
        h->content_length = 0;
    }
    c->until_close = !h->chunked && h->content_length < 0;
    if (c->until_close)
        td_http_framer_init_close(&c->framer, UINT64_MAX);
    else
        td_http_framer_init(&c->framer, h, UINT64_MAX);
    if (!c->ops->on_head)
        return 0;
    c->in_callback = 1;
    c->ops->on_head(c->arg, h->status, get_header, h);
    return callback_done(c);
}

static int feed_body(td_http_call *c, const char *p, size_t n)
{
    size_t used;
    td_str data;
    td_http_bad bad;
    for (;;) {
        int done = td_http_framer_feed(&c->framer, p, n, &used, &data, &bad);
        if (done < 0)
            return fail(c, bad.text);
        if (data.len && c->ops->on_data) {
            c->in_callback = 1;
            c->ops->on_data(c->arg, data.ptr, data.len);
            if (callback_done(c))
                return -ECANCELED;
        }
        if (done)
            return finish(c, NULL);
        p += used;
        n -= used;
        if (n == 0)
            return 0;
    }
}

/* Heads, interim ones (1xx) skipped, then the body. */
static int feed_head(td_http_call *c, const char *p, size_t len)
{
    td_http_head h;
    td_http_bad bad;
    td_strbuf_add(&c->in, p, len);
    if (c->in.failed)
        return fail(c, "out of memory");
    while (!c->head_done) {
        int n = td_http_scan_head(&c->scanned, c->in.data, c->in.len, HEAD_MAX, &bad);
        if (n == 0)
            return 0;
        if (n < 0 || td_http_parse_response(c->in.data, (size_t)n, &h, &bad))
            return fail(c, "the answer is not proper HTTP/1.1");
        if (h.status >= 200 && deliver_head(c, &h))
            return -ECANCELED;
        td_strbuf_drop(&c->in, (size_t)n);
        c->scanned = 0;
    }
    return feed_body(c, c->in.data, c->in.len);
}

static int on_eof(td_http_call *c)
{
    if (c->head_done && c->until_close)
        return finish(c, NULL);
    return fail(c, c->head_done ? "the connection closed in the middle of the answer"
                                : "the connection closed without an answer");
}

static int receive(td_http_call *c)
{
    char buf[16384];
    ssize_t n = recv(c->fd, buf, sizeof buf, 0);
    if (n < 0)
        return errno == EAGAIN || errno == EINTR ? 0 : fail(c, td_errno_text(errno));
    if (n == 0)
        return on_eof(c);
    return c->head_done ? feed_body(c, buf, (size_t)n) : feed_head(c, buf, (size_t)n);
}

static void send_some(td_http_call *c)
{
    while (c->sent < c->out.len) {
        ssize_t n = send(c->fd, c->out.data + c->sent, c->out.len - c->sent, MSG_NOSIGNAL);
        if (n < 0 && errno == EAGAIN)
            return;
        if (n < 0 && errno == EINTR)
            continue;
        /* A server that refuses early closes its side: what it said is still to be read. */
        c->sent = n < 0 ? c->out.len : c->sent + (size_t)n;
    }
    td_io_set(c->io, TD_IO_READ);
}

static void on_io(void *arg, int fd, int events)
{
    td_http_call *c = arg;
    if (!c->connected && on_connected(c))
        return;
    if (events & TD_IO_WRITE)
        send_some(c);
    if (events & TD_IO_READ)
        receive(c);
}

/* ---- start ---- */

typedef struct url {
    char host[256], port[8];
    td_str authority;
    const char *path;
} url;

static int parse_url(const char *text, url *u)
{
    static const char scheme[] = "http://";
    if (strncasecmp(text, scheme, sizeof scheme - 1))
        return -EINVAL;
    const char *p = text + sizeof scheme - 1;
    size_t n = strcspn(p, "/?#");
    u->authority = (td_str){p, n};
    u->path = p[n] == '/' ? p + n : "/";
    if (n == 0 || (p[n] && p[n] != '/') || strpbrk(u->path, " \t\r\n#"))
        return -EINVAL;
    const char *host_end = p[0] == '[' ? memchr(p, ']', n) : memchr(p, ':', n);
    const char *host = p[0] == '[' ? p + 1 : p, *after = host_end;
    if (p[0] == '[' && !host_end)
        return -EINVAL;
    if (!host_end)
        host_end = after = p + n;
    else if (*host_end == ']')
        after = host_end + 1;
    size_t port_len = (size_t)(p + n - after);
    if ((size_t)(host_end - host) >= sizeof u->host || port_len > 6 ||
        (port_len && *after != ':') || port_len == 1)
        return -EINVAL;
    snprintf(u->host, sizeof u->host, "%.*s", (int)(host_end - host), host);
    snprintf(u->port, sizeof u->port, "%.*s", port_len ? (int)port_len - 1 : 2,
             port_len ? after + 1 : "80");
    return u->host[0] ? 0 : -EINVAL;
}

static void build_request(td_http_call *c, const char *method, const url *u,
                          const td_http_header *headers, size_t n_headers, const void *body,
                          size_t len)
{
    td_strbuf_addf(&c->out, "%s %s HTTP/1.1\r\nHost: %.*s\r\nConnection: close\r\n", method,
                   u->path, (int)u->authority.len, u->authority.ptr);
    for (size_t i = 0; i < n_headers; i++)
        td_strbuf_addf(&c->out, "%s: %s\r\n", headers[i].name, headers[i].value);
    if (body)
        td_strbuf_addf(&c->out, "Content-Length: %zu\r\n", len);
    td_strbuf_adds(&c->out, "\r\n");
    if (body)
        td_strbuf_add(&c->out, body, len);
}

static td_http_call *call_new(td_loop *l, const td_http_call_ops *ops, void *arg)
{
    td_http_call *c = calloc(1, sizeof *c);
    if (!c)
        return NULL;
    c->loop = l;
    c->fd = -1;
    c->ops = ops;
    c->arg = arg;
    c->after = (td_after){.fn = on_start, .arg = c};
    td_strbuf_init(&c->out);
    td_strbuf_init(&c->in);
    if (td_timer_add(l, CONNECT_TIMEOUT_US, 0, on_connect_timeout, c, &c->timer)) {
        call_free(c);
        return NULL;
    }
    return c;
}

int td_http_call_start(td_loop *l, const char *method, const char *text,
                       const td_http_header *headers, size_t n_headers, const void *body,
                       size_t len, const td_http_call_ops *ops, void *arg, td_http_call **ret_call,
                       td_err *reterr_err)
{
    url u;
    if (parse_url(text, &u))
        return td_err_set(reterr_err, -EINVAL,
                          "URL `%.200s`: write http://HOST:PORT/PATH (TLS is for a proxy in front)",
                          text);
    for (size_t i = 0; i < n_headers; i++)
        if (strpbrk(headers[i].name, "\r\n:") || strpbrk(headers[i].value, "\r\n"))
            return td_err_set(reterr_err, -EINVAL, "header `%.80s` holds a line break",
                              headers[i].name);
    td_http_call *c = call_new(l, ops, arg);
    if (!c)
        return td_err_set(reterr_err, -ENOMEM, "%.200s: out of memory", text);
    const struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_NUMERICSERV};
    int g = getaddrinfo(u.host, u.port, &hints, &c->addrs);
    if (g) {
        call_free(c);
        return td_err_set(reterr_err, -ENOENT, "%.200s: %s", text, gai_strerror(g));
    }
    c->addr = c->addrs;
    c->head_only = !strcmp(method, "HEAD");
    build_request(c, method, &u, headers, n_headers, body, len);
    if (c->out.failed) {
        call_free(c);
        return td_err_set(reterr_err, -ENOMEM, "%.200s: out of memory", text);
    }
    td_loop_after(l, &c->after);
    *ret_call = c;
    return 0;
}
