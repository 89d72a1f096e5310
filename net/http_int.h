/* SPDX-License-Identifier: Apache-2.0 */
/* Shared by http_server.c (connections and input) and http_reply.c (answers) only.
 *
 * A connection works on one request at a time; what is pipelined waits in `in`, or in the kernel.
 * Only td_http_conn_run() frees a connection; everything else sets its state and asks for a run at
 * the end of the turn. */
#ifndef TD_NET_HTTP_INT_H
#define TD_NET_HTTP_INT_H

#include <event2/buffer.h>

#include "base/list.h"
#include "net/http.h"
#include "net/http_parse.h"
#include "net/listen.h"
#include "net/peers.h"

typedef struct td_http_conn td_http_conn;

struct td_http_server {
    td_loop *loop;
    td_http_config cfg;
    int fd; /* listening; -1 when stopped */
    td_io *io;
    td_timer *tick;
    td_list conns;
    uint32_t n_conns;
    td_peers peers;
    uint64_t n_refused;
    size_t buffered_bytes; /* bodies being held */
    int accept_paused;     /* out of descriptors: until the next tick */
    int stopping;          /* answers close their connection */
    int64_t date_s;
    char date[40], addr[TD_ADDR_TEXT];
    char scratch[65536];
};

typedef enum td_http_state {
    TD_HTTP_HEAD,   /* between requests, or inside a head */
    TD_HTTP_BODY,   /* inside a body */
    TD_HTTP_BUSY,   /* the request is with its handler */
    TD_HTTP_FLUSH,  /* send what is left, then close */
    TD_HTTP_LINGER, /* our side is shut; discard until the client has read all and closes */
    TD_HTTP_DEAD,
} td_http_state;

struct td_http_conn {
    td_list node;
    td_http_server *server;
    td_http_state state;
    int fd;
    struct event *ev;            /* edge-triggered, both directions, for life */
    unsigned readable, writable; /* what the last edges said and no EAGAIN took back */
    unsigned fin;                /* the client ended its side, perhaps behind bytes not read yet */
    unsigned eof;                /* and all its bytes are read */
    unsigned half_closed;        /* it did so before the answer began: it is still answered */
    unsigned probed;             /* an interim answer went out to see whether the client is there */
    unsigned more;               /* whole requests may be left in `in` */
    unsigned broken;             /* output was lost for want of memory */
    unsigned running, head_begun;
    td_strbuf in;
    size_t scanned;
    td_http_framer framer;
    size_t body_mark; /* body length when the deadline was set */
    struct evbuffer *out;
    uint64_t deadline_us; /* of reading; 0 = none */
    uint64_t stall_us;    /* of writing; 0 = nothing waits */
    td_http_req *req;
    td_after after;
    uint64_t peer_key; /* in server->peers */
    char peer[TD_ADDR_TEXT];
};

struct td_http_req {
    td_http_conn *conn; /* NULL inside on_close: the client is gone */
    char *bytes;        /* the head; fields point into it, each value NUL-terminated */
    td_http_head head;
    char *path;
    td_strbuf body;
    void (*on_close)(void *arg, td_http_req *r);
    void *on_close_arg;
    int streaming, chunked, no_body, slow;
};

/* Add to the output. */
void td_http_out(td_http_conn *c, const void *data, size_t n);
/* Ask for a run at the end of this turn. */
void td_http_conn_schedule(td_http_conn *c);
/* The answer is complete: free the request, then the next one, or close. */
void td_http_conn_answered(td_http_conn *c, int keep);
void td_http_req_free(td_http_server *s, td_http_req *r);
/* Answer an error of the server's own and close. */
void td_http_conn_refuse(td_http_conn *c, td_http_bad bad);
void td_http_write_head(td_http_conn *c, int status, const td_http_header *headers,
                        size_t n_headers);

#endif
