/* SPDX-License-Identifier: Apache-2.0 */
/* Strict HTTP/1.1 server and small client on a loop. What net/http_parse.h refuses never reaches
 * on_request: the server answers 400, 408, 413, 429, 431, 503 or 505 itself with an OpenAI error
 * body and closes. Loop thread only.
 *
 * A td_http_req is born in on_request (whole body read) and dies after td_http_reply() or
 * td_http_stream_end()/_abort(); when the client leaves first, on_close runs once and the request
 * dies after it returns: drop every pointer there. Who does not answer inside on_request must have
 * called td_http_on_close() before returning from it.
 *
 * A client that ends its sending side after the request (`nc -N`) gets its answer. To tell it from
 * one that is gone the server sends an interim `100 Continue`: a closed peer resets, and on_close
 * runs. HTTP/1.0 knows no interim answers: it is noticed at the first write. A client whose end of
 * sending arrives when a stream has begun counts as gone. */
#ifndef TD_NET_HTTP_H
#define TD_NET_HTTP_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "base/strbuf.h"
#include "net/loop.h"

typedef struct td_http_server td_http_server;
typedef struct td_http_req td_http_req;

typedef struct td_http_config {
    const char *listen; /* "127.0.0.1:8080", "[::1]:0"; a literal address; or NULL with fd */
    int fd;             /* inherited listening socket when listen is NULL; taken over on success */
    int allow_nonloopback; /* 1: requests are authenticated, so other addresses than loopback may be
                              bound */
    size_t max_body_bytes; /* default 8 MiB */
    size_t max_header_bytes;     /* default 16 KiB */
    size_t max_buffered_bytes;   /* bodies of all requests together, then 503; default 32 ×
                                    max_body_bytes */
    uint32_t max_conns;          /* default 4096; beyond that 503 */
    uint32_t max_conns_per_peer; /* of one address (net/peers.h), default 1024; beyond that 429 */
    uint32_t header_timeout_s;   /* for a whole head, and for each 4 KiB of a body; default 5 */
    uint32_t idle_timeout_s; /* between requests, and for a reader that takes nothing; default 60 */
    size_t max_backlog_bytes; /* unsent bytes of one stream before it counts as a slow reader;
                                 default 1 MiB */
    void (*on_request)(void *arg, td_http_req *req);
    void *arg;
} td_http_config;

typedef struct td_http_header {
    const char *name, *value;
} td_http_header;

/* Bind and listen. Strings are copied. Every 0 stands for its default. A wildcard address is
 * refused, and so is one beyond loopback without allow_nonloopback. -EADDRINUSE, -EINVAL, -EPERM...
 * with text naming the address. */
int td_http_server_open(td_loop *l, const td_http_config *config, td_http_server **ret_server,
                        td_err *reterr_err);
/* Stop accepting and close idle connections; open requests go on, with `Connection: close`. */
void td_http_server_stop_listening(td_http_server *s);
/* End everything: on_close runs for open requests. Not inside a callback of the server. NULL is
 * fine. */
void td_http_server_close(td_http_server *s);
/* Bound address as "127.0.0.1:43211". Borrowed. */
const char *td_http_server_addr(const td_http_server *s);
uint32_t td_http_server_conns(const td_http_server *s);
/* Connections refused so far because there were too many, of all or of one address. */
uint64_t td_http_server_refused(const td_http_server *s);

const char *td_http_method(const td_http_req *r); /* "GET", "POST", ... */
const char *td_http_path(const td_http_req *r);   /* decoded path without the query */
const char *td_http_query(const td_http_req *r);  /* raw, "" when absent */
td_str td_http_body(const td_http_req *r);        /* until the request dies */
const char *td_http_header_get(const td_http_req *r,
                               const char *name); /* first of that name; NULL when absent */
const char *td_http_peer(const td_http_req *r);   /* "127.0.0.1:5123" */

/* Called once when the client disconnects before the answer is complete, or when a stream's reader
 * is too slow (td_http_is_slow tells which). */
void td_http_on_close(td_http_req *r, void (*fn)(void *arg, td_http_req *r), void *arg);
int td_http_is_slow(const td_http_req *r);

/* Whole answer; headers is an array of n. Content-Length is added. The request is dead afterwards.
 */
void td_http_reply(td_http_req *r, int status, const td_http_header *headers, size_t n_headers,
                   const void *body, size_t len);

/* Streamed answer, chunked (until close for HTTP/1.0). Begin sends the head at once. Writes are
 * gathered and flushed once per loop turn. An answer to HEAD sends no body whatever is written. */
void td_http_stream_begin(td_http_req *r, int status, const td_http_header *headers,
                          size_t n_headers);
/* 0, or -ENOBUFS when the backlog bound is passed: on_close follows from the loop. */
int td_http_stream_write(td_http_req *r, const void *data, size_t n);
size_t td_http_stream_backlog(const td_http_req *r);
void td_http_stream_end(td_http_req *r); /* final chunk; dead afterwards */
void td_http_stream_abort(
    td_http_req *r); /* close the connection without the final chunk; dead afterwards */

/* Client: one request over one connection, streamed. Used by the command line, the bench and tests:
 * a name that is not a literal address is looked up by getaddrinfo(), which blocks. */
typedef struct td_http_call td_http_call;
typedef struct td_http_call_ops {
    void (*on_head)(void *arg, int status, const char *(*get)(const void *ctx, const char *name),
                    const void *ctx);
    void (*on_data)(void *arg, const char *data, size_t n);
    /* error NULL: complete; else what failed ("127.0.0.1:8080: connection refused"). The call is
     * freed afterwards. */
    void (*on_done)(void *arg, const char *error);
} td_http_call_ops;
/* url: http://HOST:PORT/path. body NULL for GET; copied. -EINVAL, -ENOENT (unknown host) with text;
 * later failures come by on_done. */
int td_http_call_start(td_loop *l, const char *method, const char *url,
                       const td_http_header *headers, size_t n_headers, const void *body,
                       size_t len, const td_http_call_ops *ops, void *arg, td_http_call **ret_call,
                       td_err *reterr_err);
void td_http_call_cancel(td_http_call *c); /* no callback follows */

#endif
