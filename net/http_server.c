/* SPDX-License-Identifier: Apache-2.0 */
/* Listener, connections and their input. */
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#include <event2/event.h>

#include "base/bug.h"
#include "base/cleanup.h"
#include "base/clock.h"
#include "net/http_int.h"
#include "base/banned.h"

enum {
    TICK_US = 250 * TD_MS, /* grain of timeouts */
    LINGER_US = 2 * TD_S,  /* for the client to read our last bytes */
    READS_PER_RUN = 16,    /* of 64 KiB, then others have their turn */
    REQUESTS_PER_RUN = 16, /* pipelined */
    BODY_MIN_BYTES = 4096, /* a body must bring this in each header_timeout_s */
    REFUSALS_MAX = 64,     /* connections beyond max_conns that are still told why */
    PEER_REFUSALS_MAX = 8, /* the same for one address */
};

static void conn_run(td_http_conn *c);

/* ---- life of a connection ---- */

static void conn_after(void *arg)
{
    conn_run(arg);
}

void td_http_conn_schedule(td_http_conn *c)
{
    if (!c->running) /* a run ends with a flush anyway */
        td_loop_after(c->server->loop, &c->after);
}

void td_http_req_free(td_http_server *s, td_http_req *r)
{
    if (!r)
        return;
    s->buffered_bytes -= r->body.len;
    td_strbuf_done(&r->body);
    free(r->bytes);
    free(r->path);
    free(r);
}

static void read_deadline(td_http_conn *c, uint32_t seconds)
{
    c->deadline_us = td_now_us() + seconds * TD_S;
}

void td_http_conn_answered(td_http_conn *c, int keep)
{
    td_http_req_free(c->server, TD_TAKE(c->req));
    c->state = keep ? TD_HTTP_HEAD : TD_HTTP_FLUSH;
    c->scanned = 0;
    c->head_begun = c->probed = 0;
    c->deadline_us = 0;
    if (c->in.len == 0)
        td_strbuf_done(&c->in); /* thousands of idle connections must not keep their buffers */
    if (keep)
        read_deadline(c, c->server->cfg.idle_timeout_s);
    td_http_conn_schedule(c);
}

static void conn_free(td_http_conn *c)
{
    td_http_server *s = c->server;
    td_loop_after_del(s->loop, &c->after);
    td_http_req_free(s, c->req);
    if (c->ev)
        event_free(c->ev);
    if (c->out)
        evbuffer_free(c->out);
    td_strbuf_done(&c->in);
    close(c->fd);
    td_peers_drop(&s->peers, c->peer_key);
    td_list_del(&c->node);
    s->n_conns--;
    free(c);
}

/* The client is gone, or its time is over: tell the handler, who drops its pointers. */
static void conn_lose(td_http_conn *c)
{
    td_http_req *r = c->req;
    c->state = TD_HTTP_DEAD;
    if (!r)
        return;
    r->conn = NULL;
    if (r->on_close)
        r->on_close(r->on_close_arg, r);
}

static void on_event(evutil_socket_t fd, short what, void *arg)
{
    td_http_conn *c = arg;
    if (what & EV_READ)
        c->readable = 1;
    if (what & EV_WRITE)
        c->writable = 1;
    if (what & EV_CLOSED)
        c->readable = c->fin = 1;
    conn_run(c);
}

/* Takes the descriptor, and the place in s->peers. */
static td_http_conn *conn_new(td_http_server *s, int fd, const struct sockaddr *peer,
                              uint64_t peer_key)
{
    td_http_conn *c = calloc(1, sizeof *c);
    if (!c) {
        td_peers_drop(&s->peers, peer_key);
        close(fd);
        return NULL;
    }
    c->server = s;
    c->peer_key = peer_key;
    c->fd = fd;
    c->writable = 1;
    c->after = (td_after){.fn = conn_after, .arg = c};
    td_strbuf_init(&c->in);
    td_addr_text(peer, c->peer);
    td_list_add(&s->conns, &c->node);
    s->n_conns++;
    read_deadline(c, s->cfg.idle_timeout_s);
    c->out = evbuffer_new();
    c->ev = event_new(td_loop_base(s->loop), fd,
                      EV_READ | EV_WRITE | EV_CLOSED | EV_ET | EV_PERSIST, on_event, c);
    if (!c->out || !c->ev || event_add(c->ev, NULL)) {
        conn_free(c);
        return NULL;
    }
    return c;
}

/* ---- input ---- */

static int refuse(td_http_conn *c, int status, const char *text)
{
    td_http_conn_refuse(c, (td_http_bad){status, text});
    return -EBADMSG;
}

/* NUL-terminate what the accessors hand out; the byte behind each is ours: a blank, ':' or CR. */
static void terminate_fields(td_http_req *r)
{
    td_http_head *h = &r->head;
    ((char *)h->method.ptr)[h->method.len] = 0;
    if (h->query.len)
        ((char *)h->query.ptr)[h->query.len] = 0;
    else
        h->query.ptr = "";
    for (uint32_t i = 0; i < h->n_fields; i++) {
        ((char *)h->fields[i].name.ptr)[h->fields[i].name.len] = 0;
        ((char *)h->fields[i].value.ptr)[h->fields[i].value.len] = 0;
    }
}

static td_http_req *req_new(const char *head, size_t n)
{
    td_http_req *r = calloc(1, sizeof *r);
    if (!r)
        return NULL;
    td_strbuf_init(&r->body);
    if (!(r->bytes = malloc(n))) {
        free(r);
        return NULL;
    }
    memcpy(r->bytes, head, n);
    return r;
}

/* A whole head of n bytes is in c->in. */
static int begin_request(td_http_conn *c, size_t n)
{
    td_http_server *s = c->server;
    td_http_bad bad;
    td_http_req *r = c->req = req_new(c->in.data, n);
    if (!r)
        return refuse(c, 503, "out of memory");
    if (td_http_parse_request(r->bytes, n, &r->head, &bad))
        return refuse(c, bad.status, bad.text);
    if (!(r->path = malloc(r->head.path.len + 1)))
        return refuse(c, 503, "out of memory");
    if (td_http_decode_path(r->head.path, r->path))
        return refuse(c, 400, "the path has a bad percent-escape");
    if (r->head.content_length > 0 && (uint64_t)r->head.content_length > s->cfg.max_body_bytes)
        return refuse(c, 413, "Content-Length is above it");
    terminate_fields(r);
    r->conn = c;
    r->no_body = !strcmp(r->head.method.ptr, "HEAD");
    td_strbuf_drop(&c->in, n);
    c->scanned = 0;
    td_http_framer_init(&c->framer, &r->head, s->cfg.max_body_bytes);
    c->state = TD_HTTP_BODY;
    c->body_mark = 0;
    read_deadline(c, s->cfg.header_timeout_s);
    if (r->head.expect_continue && c->in.len == 0 &&
        (r->head.chunked || r->head.content_length > 0))
        td_http_out(c, "HTTP/1.1 100 Continue\r\n\r\n", 25);
    return 0;
}

static int read_head(td_http_conn *c)
{
    td_http_bad bad;
    if (c->in.len == 0)
        return -EAGAIN;
    if (!c->head_begun) {
        c->head_begun = 1;
        read_deadline(c, c->server->cfg.header_timeout_s);
    }
    int n = td_http_scan_head(&c->scanned, c->in.data, c->in.len, c->server->cfg.max_header_bytes,
                              &bad);
    if (n < 0)
        return refuse(c, bad.status, bad.text);
    return n == 0 ? -EAGAIN : begin_request(c, (size_t)n);
}

static int read_body(td_http_conn *c)
{
    td_http_server *s = c->server;
    td_http_req *r = c->req;
    size_t off = 0;
    int done = 0;
    while (!done) {
        size_t used;
        td_str data;
        td_http_bad bad;
        done =
            td_http_framer_feed(&c->framer, c->in.data + off, c->in.len - off, &used, &data, &bad);
        if (done < 0)
            return refuse(c, bad.status, bad.text);
        if (s->buffered_bytes + data.len > s->cfg.max_buffered_bytes)
            return refuse(c, 503, "too many request bodies at once");
        size_t before = r->body.len;
        td_strbuf_add(&r->body, data.ptr, data.len);
        s->buffered_bytes += r->body.len - before;
        if (r->body.failed)
            return refuse(c, 503, "out of memory");
        off += used;
        if (off == c->in.len && !done)
            break;
    }
    td_strbuf_drop(&c->in, off);
    return done ? 0 : -EAGAIN;
}

static void dispatch(td_http_conn *c)
{
    c->state = TD_HTTP_BUSY;
    c->deadline_us = 0;
    c->half_closed |= c->fin;
    c->server->cfg.on_request(c->server->cfg.arg, c->req);
}

/* Handle requests that are in c->in. */
static void process(td_http_conn *c)
{
    c->more = 0;
    for (int n = 0; n < REQUESTS_PER_RUN; n++) {
        if (c->state == TD_HTTP_HEAD && read_head(c))
            return;
        if (c->state == TD_HTTP_BODY) {
            if (read_body(c))
                return;
            dispatch(c);
        }
        if (c->state != TD_HTTP_HEAD)
            return;
    }
    c->more = 1;
    td_loop_after(c->server->loop, &c->after);
}

/* How many bytes may be read now: what waits for its turn is bounded, and stays in the kernel
 * beyond that. */
static size_t room(const td_http_conn *c)
{
    size_t max = c->server->cfg.max_header_bytes;
    switch (c->state) {
    case TD_HTTP_HEAD:
    case TD_HTTP_BUSY:
        return TD_MIN(sizeof c->server->scratch, max - TD_MIN(max, c->in.len));
    case TD_HTTP_DEAD:
        return 0;
    default:
        return sizeof c->server->scratch;
    }
}

/* 1 when bytes came; else 0, with eof, readable or the state changed. */
static int receive(td_http_conn *c)
{
    td_http_server *s = c->server;
    ssize_t n = recv(c->fd, s->scratch, room(c), 0);
    if (n > 0) {
        if (c->state != TD_HTTP_FLUSH && c->state != TD_HTTP_LINGER)
            td_strbuf_add(&c->in, s->scratch, (size_t)n);
        if (c->in.failed)
            conn_lose(c); /* out of memory */
        return 1;
    }
    if (n == 0)
        c->eof = c->fin = 1;
    else if (errno != EAGAIN && errno != EINTR)
        conn_lose(c);
    c->readable = n < 0 && errno == EINTR;
    return 0;
}

static void read_input(td_http_conn *c)
{
    process(c);
    for (int i = 0; c->readable && room(c); i++) {
        if (i == READS_PER_RUN) {
            td_loop_after(c->server->loop, &c->after);
            return;
        }
        if (receive(c))
            process(c);
    }
}

/* ---- the client's end of sending ---- */

static int is_reset(const td_http_conn *c)
{
    struct pollfd p = {.fd = c->fd};
    return poll(&p, 1, 0) > 0 && (p.revents & (POLLERR | POLLHUP));
}

static void check_fin_busy(td_http_conn *c)
{
    if (c->req->streaming && !c->half_closed) {
        conn_lose(c);
        return;
    }
    c->half_closed = 1;
    if (c->probed || c->req->streaming || c->req->head.minor == 0)
        return;
    c->probed = 1;
    td_http_out(c, "HTTP/1.1 100 Continue\r\n\r\n", 25);
}

/* Gone, or only done with sending? See the head of http.h. */
static void check_fin(td_http_conn *c)
{
    if (!c->fin || c->state == TD_HTTP_DEAD)
        return;
    if (is_reset(c)) {
        conn_lose(c);
    } else if (c->state == TD_HTTP_BUSY) {
        check_fin_busy(c);
    } else if (c->eof && !c->more && (c->state == TD_HTTP_HEAD || c->state == TD_HTTP_BODY)) {
        td_http_req_free(c->server, TD_TAKE(c->req)); /* unfinished: nobody waits for an answer */
        c->state = TD_HTTP_FLUSH;
    } else if (c->eof && c->state == TD_HTTP_LINGER) {
        c->state = TD_HTTP_DEAD;
    }
}

/* ---- output ---- */

static void flush(td_http_conn *c)
{
    size_t before = evbuffer_get_length(c->out);
    while (c->writable && evbuffer_get_length(c->out)) {
        struct evbuffer_iovec v[16];
        int n = evbuffer_peek(c->out, -1, NULL, v, 16);
        struct msghdr m = {.msg_iov = (struct iovec *)v, .msg_iovlen = (size_t)TD_MIN(n, 16)};
        ssize_t sent = sendmsg(c->fd, &m, MSG_NOSIGNAL);
        if (sent >= 0) {
            evbuffer_drain(c->out, (size_t)sent);
        } else if (errno == EAGAIN) {
            c->writable = 0;
        } else if (errno != EINTR) {
            evbuffer_drain(c->out, evbuffer_get_length(c->out));
            conn_lose(c);
            return;
        }
    }
    size_t left = evbuffer_get_length(c->out);
    if (left == 0)
        c->stall_us = 0;
    else if (left < before || !c->stall_us)
        c->stall_us = td_now_us() + c->server->cfg.idle_timeout_s * TD_S;
}

/* Everything was sent: close so that the last bytes are not lost to a reset by bytes the client
 * still sends. */
static void finish(td_http_conn *c)
{
    if (c->state != TD_HTTP_FLUSH || evbuffer_get_length(c->out))
        return;
    if (c->eof || shutdown(c->fd, SHUT_WR) < 0) {
        c->state = TD_HTTP_DEAD;
        return;
    }
    c->state = TD_HTTP_LINGER;
    c->deadline_us = td_now_us() + LINGER_US;
    td_strbuf_reset(&c->in);
}

static void conn_run(td_http_conn *c)
{
    c->running = 1;
    read_input(c);
    check_fin(c);
    if (c->broken && c->state != TD_HTTP_DEAD)
        conn_lose(c); /* out of memory: an answer with a hole must not look whole */
    if (c->state != TD_HTTP_DEAD)
        flush(c);
    if (c->state == TD_HTTP_BUSY && c->req->slow)
        conn_lose(c);
    finish(c);
    c->running = 0;
    if (c->state == TD_HTTP_DEAD)
        conn_free(c);
}

/* ---- timeouts ---- */

static void conn_expired(td_http_conn *c)
{
    if (c->state == TD_HTTP_BODY && c->req->body.len >= c->body_mark + BODY_MIN_BYTES) {
        c->body_mark = c->req->body.len;
        read_deadline(c, c->server->cfg.header_timeout_s);
        return;
    }
    if (c->state == TD_HTTP_HEAD && !c->head_begun)
        c->state = TD_HTTP_FLUSH; /* idle: nothing to say */
    else if (c->state == TD_HTTP_HEAD)
        refuse(c, 408, "the request head took too long");
    else if (c->state == TD_HTTP_BODY)
        refuse(c, 408, "the request body came too slowly");
    else
        c->state = TD_HTTP_DEAD; /* lingered long enough */
}

static void conn_tick(td_http_conn *c, uint64_t now)
{
    if (c->stall_us && now >= c->stall_us) {
        if (c->req)
            c->req->slow = 1;
        conn_lose(c);
    } else if (c->deadline_us && now >= c->deadline_us) {
        conn_expired(c);
    } else {
        return;
    }
    conn_run(c);
}

static void on_tick(void *arg)
{
    td_http_server *s = arg;
    uint64_t now = td_now_us();
    TD_LIST_FOR (it, &s->conns)
        conn_tick(TD_LIST_ENTRY(it, td_http_conn, node), now);
    if (s->accept_paused && s->io) {
        s->accept_paused = 0;
        td_io_set(s->io, TD_IO_READ);
    }
}

/* ---- listener ---- */

/* A connection more, unless there are too many: then it is told so, or, with the places for that
 * taken too, closed. */
static void admit(td_http_server *s, int fd, const struct sockaddr *peer)
{
    uint64_t key = td_peer_key(peer);
    int64_t of_peer = td_peers_add(&s->peers, key);
    int many = s->n_conns >= s->cfg.max_conns, many_of_peer = of_peer > s->cfg.max_conns_per_peer;
    s->n_refused += (uint64_t)(many || many_of_peer);
    if (of_peer < 0) {
        close(fd);
        return;
    }
    if (s->n_conns >= s->cfg.max_conns + REFUSALS_MAX ||
        of_peer > (int64_t)s->cfg.max_conns_per_peer + PEER_REFUSALS_MAX) {
        td_peers_drop(&s->peers, key);
        close(fd);
        return;
    }
    td_http_conn *c = conn_new(s, fd, peer, key);
    if (c && many)
        refuse(c, 503, "too many connections");
    else if (c && many_of_peer)
        refuse(c, 429, "too many connections from this address");
}

static void on_accept(void *arg, int fd, int events)
{
    td_http_server *s = arg;
    for (int i = 0; i < 256; i++) {
        struct sockaddr_storage peer = {0};
        socklen_t len = sizeof peer;
        int cfd = accept4(fd, (struct sockaddr *)&peer, &len, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (cfd < 0) {
            if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) {
                s->accept_paused = 1; /* level-triggered: would spin */
                td_io_set(s->io, 0);
            }
            if (errno != ECONNABORTED && errno != EINTR)
                return;
            continue;
        }
        admit(s, cfd, (struct sockaddr *)&peer);
    }
}

static void apply_defaults(td_http_config *c)
{
    c->max_body_bytes = c->max_body_bytes ? c->max_body_bytes : 8u << 20;
    c->max_header_bytes = c->max_header_bytes ? c->max_header_bytes : 16u << 10;
    c->max_buffered_bytes = c->max_buffered_bytes ? c->max_buffered_bytes : 32 * c->max_body_bytes;
    c->max_conns = c->max_conns ? c->max_conns : 4096;
    c->max_conns_per_peer = c->max_conns_per_peer ? c->max_conns_per_peer : 1024;
    c->header_timeout_s = c->header_timeout_s ? c->header_timeout_s : 5;
    c->idle_timeout_s = c->idle_timeout_s ? c->idle_timeout_s : 60;
    c->max_backlog_bytes = c->max_backlog_bytes ? c->max_backlog_bytes : 1u << 20;
}

static int open_socket(td_http_server *s, const td_http_config *config, td_err *reterr_err)
{
    struct sockaddr_storage addr = {0};
    socklen_t len = sizeof addr;
    int fd = config->fd;
    int r = config->listen
                ? td_listen_open(config->listen, config->allow_nonloopback, &fd, reterr_err)
                : td_listen_adopt(fd, config->allow_nonloopback, reterr_err);
    if (r)
        return r;
    getsockname(fd, (struct sockaddr *)&addr, &len);
    td_addr_text((struct sockaddr *)&addr, s->addr);
    s->fd = fd;
    return 0;
}

int td_http_server_open(td_loop *l, const td_http_config *config, td_http_server **ret_server,
                        td_err *reterr_err)
{
    td_http_server *s = calloc(1, sizeof *s);
    if (!s)
        return td_err_set(reterr_err, -ENOMEM, "HTTP server: out of memory");
    s->loop = l;
    s->fd = -1;
    s->cfg = *config;
    s->cfg.listen = NULL; /* the caller's string may go */
    apply_defaults(&s->cfg);
    td_list_init(&s->conns);
    td_peers_init(&s->peers);
    int r = open_socket(s, config, reterr_err);
    if (!r)
        r = td_io_add(l, s->fd, TD_IO_READ, on_accept, s, &s->io);
    if (!r)
        r = td_timer_add(l, TICK_US, TICK_US, on_tick, s, &s->tick);
    if (r) {
        if (s->fd >= 0 && !config->listen)
            s->fd = -1; /* the inherited socket stays the caller's */
        td_http_server_close(s);
        return r;
    }
    *ret_server = s;
    return 0;
}

static void close_listener(td_http_server *s)
{
    td_io_del(TD_TAKE(s->io));
    if (s->fd >= 0)
        close(s->fd);
    s->fd = -1;
}

void td_http_server_stop_listening(td_http_server *s)
{
    close_listener(s);
    s->stopping = 1;
    TD_LIST_FOR (it, &s->conns) {
        td_http_conn *c = TD_LIST_ENTRY(it, td_http_conn, node);
        if (c->state != TD_HTTP_HEAD || c->head_begun)
            continue;
        c->state = TD_HTTP_FLUSH;
        td_http_conn_schedule(c);
    }
}

/* Answers that are complete but not all with the kernel: their readers have a second together. */
static void send_last_bytes(td_http_server *s)
{
    uint64_t end = td_now_us() + TD_S;
    TD_LIST_FOR (it, &s->conns) {
        td_http_conn *c = TD_LIST_ENTRY(it, td_http_conn, node);
        c->running = 1; /* nothing is scheduled any more */
        while (c->state != TD_HTTP_DEAD) {
            flush(c);
            uint64_t now = td_now_us();
            if (c->req || now >= end || evbuffer_get_length(c->out) == 0)
                break;
            struct pollfd p = {.fd = c->fd, .events = POLLOUT};
            if (poll(&p, 1, (int)((end - now) / TD_MS) + 1) > 0)
                c->writable = 1;
        }
    }
}

void td_http_server_close(td_http_server *s)
{
    if (!s)
        return;
    close_listener(s);
    td_timer_del(s->tick);
    send_last_bytes(s);
    TD_LIST_FOR (it, &s->conns) {
        td_http_conn *c = TD_LIST_ENTRY(it, td_http_conn, node);
        if (c->state != TD_HTTP_DEAD)
            conn_lose(c);
        conn_free(c);
    }
    td_peers_done(&s->peers);
    free(s);
}

const char *td_http_server_addr(const td_http_server *s)
{
    return s->addr;
}

uint64_t td_http_server_refused(const td_http_server *s)
{
    return s->n_refused;
}

uint32_t td_http_server_conns(const td_http_server *s)
{
    return s->n_conns;
}

/* ---- what a handler may ask ---- */

const char *td_http_method(const td_http_req *r)
{
    return r->head.method.ptr;
}

const char *td_http_path(const td_http_req *r)
{
    return r->path;
}

const char *td_http_query(const td_http_req *r)
{
    return r->head.query.ptr;
}

td_str td_http_body(const td_http_req *r)
{
    return (td_str){r->body.data, r->body.len};
}

const char *td_http_header_get(const td_http_req *r, const char *name)
{
    const td_http_field *f = td_http_head_get(&r->head, name);
    return f ? f->value.ptr : NULL;
}

const char *td_http_peer(const td_http_req *r)
{
    return r->conn ? r->conn->peer : "";
}

void td_http_on_close(td_http_req *r, void (*fn)(void *arg, td_http_req *r), void *arg)
{
    r->on_close = fn;
    r->on_close_arg = arg;
}

int td_http_is_slow(const td_http_req *r)
{
    return r->slow;
}
