/* SPDX-License-Identifier: Apache-2.0 */
#include "rpc/rpc.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <zmq.h>

#include "base/bug.h"
#include "base/clock.h"
#include "base/hash.h"
#include "base/rand.h"
#include "rpc/rpc_int.h"
#include "rpc/sock.h"
#include "base/banned.h"

enum {
    PUMP_BUDGET = 256, /* messages in one go; other descriptors wait meanwhile */
    HWM = 65536, /* backstop only: credit keeps queues far below; reaching it ends the session */
    ENVELOPE_BYTES = 65536, /* room round the largest message */
    CLOSE_LINGER_MS = 100   /* GOAWAY goes out to peers that read */
};

/* ---- sending ---- */

static int send_part(void *socket, const void *bytes, size_t n, int flags)
{
    int r;
    do
        r = zmq_send(socket, bytes, n, flags | ZMQ_DONTWAIT);
    while (r < 0 && zmq_errno() == EINTR);
    return r < 0 ? -zmq_errno() : 0;
}

static int send_body(void *socket, const ProtobufCMessage *body, size_t n)
{
    zmq_msg_t m;
    if (zmq_msg_init_size(&m, n) < 0)
        return -ENOMEM;
    protobuf_c_message_pack(body, zmq_msg_data(&m));
    int r;
    do
        r = zmq_msg_send(&m, socket, ZMQ_DONTWAIT);
    while (r < 0 && zmq_errno() == EINTR);
    if (r >= 0)
        return 0;
    r = -zmq_errno();
    zmq_msg_close(&m);
    return r;
}

int td_rpc_send(td_rpc *r, const td_route *route, const td_preamble *p,
                const ProtobufCMessage *body)
{
    uint8_t preamble[TD_PREAMBLE_BYTES];
    td_preamble_pack(p, preamble);
    size_t n = body ? protobuf_c_message_get_packed_size(body) : 0;
    /* A send may swallow the edge that tells of waiting input. */
    td_loop_after(r->loop, &r->pump);
    int e = route->n ? send_part(r->socket, route->id, route->n, ZMQ_SNDMORE) : 0;
    if (e == 0)
        e = send_part(r->socket, preamble, sizeof preamble, ZMQ_SNDMORE);
    if (e == 0)
        e = n ? send_body(r->socket, body, n) : send_part(r->socket, "", 0, 0);
    if (e == 0) {
        r->stats.frames_out++;
        r->stats.bytes_out += sizeof preamble + n;
    } else if (e == -EHOSTUNREACH) {
        r->stats.unroutable++;
    }
    return e;
}

/* ---- receiving ---- */

static int has_more(zmq_msg_t *m)
{
    return zmq_msg_more(m);
}

static int recv_part(void *socket, zmq_msg_t *m)
{
    int r;
    zmq_msg_init(m);
    do
        r = zmq_msg_recv(m, socket, ZMQ_DONTWAIT);
    while (r < 0 && zmq_errno() == EINTR);
    if (r >= 0)
        return 0;
    r = -zmq_errno();
    zmq_msg_close(m);
    return r;
}

/* Take the rest of a multipart message off the socket. Returns how many parts that were. */
static unsigned drain(void *socket, int more)
{
    unsigned n = 0;
    zmq_msg_t m;
    while (more && recv_part(socket, &m) == 0) {
        more = has_more(&m);
        zmq_msg_close(&m);
        n++;
    }
    return n;
}

static void handle(td_rpc *r, const td_route *route, zmq_msg_t *preamble, zmq_msg_t *body,
                   int bad_form)
{
    td_preamble p;
    size_t n = zmq_msg_size(body);
    r->stats.frames_in++;
    r->stats.bytes_in += zmq_msg_size(preamble) + n;
    if (td_preamble_unpack(zmq_msg_data(preamble), zmq_msg_size(preamble), &p) < 0) {
        r->stats.bad_frames++;
        return;
    }
    bad_form |= p.n_attachments != 0;
    td_session *s = route->n ? td_rpc_find_route(r, route) : r->peer;
    if (route->n && td_link_keys(r->c.link)) {
        r->from = zmq_msg_gets(preamble, "User-Id");
        if (!r->from) { /* never happens while the handler lives: who is not admitted has no voice
                         */
            r->stats.bad_frames++;
            return;
        }
    }
    int of_session = s && p.type != TD_FRAME_HELLO && p.type != TD_FRAME_WELCOME &&
                     (route->n || p.session == s->number);
    if (of_session && r->from && !td_session_is_from_peer(s))
        r->stats.bad_frames++;
    else if (of_session)
        td_session_recv(s, &p, zmq_msg_data(body), n, bad_form);
    else if (bad_form)
        r->stats.bad_frames++;
    else
        td_handshake_recv(r, route, &p, zmq_msg_data(body), n);
    r->from = NULL;
}

/* Preamble and body behind the routing id. Fewer parts: dropped; more: the rest is drained. */
static void recv_message(td_rpc *r, const td_route *route, zmq_msg_t *preamble)
{
    zmq_msg_t body;
    if (!has_more(preamble) || recv_part(r->socket, &body) < 0) {
        r->stats.frames_in++;
        r->stats.bad_frames++;
        return;
    }
    int bad_form = drain(r->socket, has_more(&body)) > 0;
    handle(r, route, preamble, &body, bad_form);
    zmq_msg_close(&body);
}

static int recv_one(td_rpc *r)
{
    td_route route = {.n = 0};
    zmq_msg_t m;
    int e = recv_part(r->socket, &m);
    if (e < 0)
        return e;
    if (!r->c.dial) {
        size_t n = zmq_msg_size(&m);
        int more = has_more(&m), fits = n > 0 && n <= sizeof route.id;
        if (fits)
            memcpy(route.id, zmq_msg_data(&m), route.n = (uint8_t)n);
        zmq_msg_close(&m);
        if (!fits || !more || recv_part(r->socket, &m) < 0) {
            r->stats.bad_frames++;
            drain(r->socket, more && !fits);
            return 0;
        }
    }
    recv_message(r, &route, &m);
    zmq_msg_close(&m);
    return 0;
}

/* ZMQ_FD is edge-triggered: go on until EAGAIN, or come back by ourselves. */
void td_rpc_pump(td_rpc *r)
{
    for (int i = 0; i < PUMP_BUDGET; i++)
        if (recv_one(r) < 0) {
            if (r->c.dial)
                td_handshake_try(r);
            return;
        }
    td_loop_after(r->loop, &r->pump);
}

static void on_readable(void *arg, int fd, int events)
{
    td_rpc_pump(arg);
}

static void on_pump(void *arg)
{
    td_rpc_pump(arg);
}

/* ---- sessions ---- */

static uint64_t route_key(const td_route *route)
{
    uint8_t h[16];
    uint64_t key;
    td_xxh128(route->id, route->n, h);
    memcpy(&key, h, sizeof key);
    return key;
}

td_session *td_rpc_find_route(td_rpc *r, const td_route *route)
{
    td_session *s = td_map_get(&r->by_route, route_key(route));
    return s && s->route.n == route->n && memcmp(s->route.id, route->id, route->n) == 0 ? s : NULL;
}

void td_rpc_add_session(td_rpc *r, td_session *s)
{
    td_list_add(&r->sessions, &s->node);
    r->n_sessions++;
    if (r->c.dial)
        r->peer = s;
    else if (td_map_put(&r->by_route, route_key(&s->route), s, NULL) < 0)
        td_session_lose(s, TD_PENDING_LOST, "out of memory");
}

void td_rpc_del_session(td_rpc *r, td_session *s)
{
    td_streams_stats st;
    td_streams_get_stats(s->streams, &st);
    r->stats.late_frames += st.late + st.stale;
    r->stats.bad_frames += st.malformed;
    td_list_del(&s->node);
    r->n_sessions--;
    if (r->peer == s)
        r->peer = NULL;
    if (!r->c.dial && td_rpc_find_route(r, &s->route) == s)
        td_map_del(&r->by_route, route_key(&s->route));
}

static void end_session(td_session *s)
{
    td_pending how = s->pending;
    s->pending = TD_PENDING_NONE;
    td_stream_event ev = {.type = how == TD_PENDING_CLOSE ? TD_EV_GOAWAY : TD_EV_LOST};
    td_session_step(s, &ev, &(td_body){.reason = s->reason}, NULL);
}

static void on_reap(void *arg)
{
    td_rpc *r = arg;
    for (td_list *it = r->sessions.next; it != &r->sessions;) {
        td_session *s = TD_LIST_ENTRY(it, td_session, node);
        if (!s->pending) {
            it = it->next;
            continue;
        }
        end_session(s);
        it = r->sessions.next; /* callbacks may have changed the list anywhere */
    }
}

/* ---- open and close ---- */

static void set_defaults(td_rpc_config *c)
{
    c->ping_ms = c->ping_ms ? c->ping_ms : 250;
    c->dead_ms = c->dead_ms ? c->dead_ms : 1000;
    c->max_sessions = c->max_sessions ? c->max_sessions : 1024;
    c->max_streams = c->max_streams ? c->max_streams : 1024;
    c->max_message_bytes = c->max_message_bytes ? c->max_message_bytes : 16u << 20;
    c->session_credit_bytes = c->session_credit_bytes ? c->session_credit_bytes : 8u << 20;
}

static int check_config(const td_rpc_config *c, td_err *err)
{
    if (c->dial && !c->hello)
        return td_err_set(err, -EINVAL, "%s: dialling needs a HELLO", c->endpoint);
    if (c->dead_ms <= c->ping_ms || c->max_streams > 65536 || c->max_message_bytes > (16u << 20))
        return td_err_set(err, -EINVAL,
                          "%s: dead_ms must exceed ping_ms, max_streams 65536, messages 16 MiB",
                          c->endpoint);
    return 0;
}

static int attach(td_rpc *r, td_err *err)
{
    td_sock_config sc = {.type = r->c.dial ? ZMQ_DEALER : ZMQ_ROUTER,
                         .dial = r->c.dial,
                         .max_frame_bytes = r->c.max_message_bytes + ENVELOPE_BYTES,
                         .hwm = HWM,
                         .link = r->c.link,
                         .door = r->c.door,
                         .server_key = r->server_key};
    if (r->c.dial && td_link_keys(r->c.link)) {
        int k = td_link_router_key(r->c.link, r->server_key, err);
        if (k < 0)
            return k;
    }
    int e = td_sock_open(r->c.endpoint, &sc, &r->socket, err), fd;
    if (e < 0)
        return e;
    size_t n = sizeof fd;
    if (zmq_getsockopt(r->socket, ZMQ_FD, &fd, &n) < 0)
        return td_err_set(err, -zmq_errno(), "%s: no descriptor: %s", r->c.endpoint,
                          zmq_strerror(zmq_errno()));
    e = td_sock_endpoint(r->socket, r->endpoint, sizeof r->endpoint);
    if (e < 0)
        return td_err_set(err, e, "%s: endpoint: %s", r->c.endpoint, td_errno_text(e));
    if ((e = td_io_add(r->loop, fd, TD_IO_READ, on_readable, r, &r->io)) < 0 ||
        (e = td_timer_add(r->loop, 10 * TD_S, 0, td_handshake_tick, r, &r->dial_timer)) < 0)
        return td_err_set(err, e, "%s: %s", r->c.endpoint, td_errno_text(e));
    return 0;
}

int td_rpc_open(td_loop *l, const td_rpc_config *config, td_rpc **ret_rpc, td_err *err)
{
    td_rpc *r = calloc(1, sizeof *r);
    if (!r)
        return td_err_set(err, -ENOMEM, "%s: out of memory", config->endpoint);
    r->loop = l;
    r->c = *config;
    set_defaults(&r->c);
    r->pump = (td_after){.fn = on_pump, .arg = r};
    r->reap = (td_after){.fn = on_reap, .arg = r};
    td_codec_init(&r->codec);
    td_list_init(&r->sessions);
    td_map_init(&r->by_route);
    td_random_bytes(&r->next_number,
                    sizeof r->next_number); /* a restarted binder must not repeat numbers */
    int e = check_config(&r->c, err);
    if (e == 0)
        e = attach(r, err);
    if (e < 0) {
        td_rpc_close(r);
        return e;
    }
    r->c.endpoint = r->endpoint;
    td_loop_after(l, &r->pump); /* what came before the descriptor was watched */
    if (r->c.dial)
        td_handshake_start(r);
    else
        td_timer_stop(r->dial_timer);
    *ret_rpc = r;
    return 0;
}

void td_rpc_close(td_rpc *r)
{
    if (!r)
        return;
    r->closing = 1;
    while (!td_list_empty(&r->sessions)) {
        td_session *s = TD_LIST_ENTRY(r->sessions.next, td_session, node);
        td_stream_event ev = {.type = TD_EV_GOAWAY, .code = TD_CANCELLED};
        td_session_ref(s);
        td_session_step(s, &ev, &(td_body){.reason = "closed"}, NULL);
        s->rpc = NULL;
        td_session_unref(s);
    }
    td_loop_after_del(r->loop, &r->pump);
    td_loop_after_del(r->loop, &r->reap);
    td_timer_del(r->dial_timer);
    td_io_del(r->io);
    td_sock_close(r->socket, CLOSE_LINGER_MS);
    td_codec_done(&r->codec);
    td_map_done(&r->by_route);
    free(r);
}

const char *td_rpc_endpoint(const td_rpc *r)
{
    return r->endpoint;
}

void td_rpc_goaway(td_rpc *r, const char *reason, uint32_t drain_ms)
{
    td_stream_event ev = {.type = TD_EV_GOAWAY, .timeout_ms = drain_ms ? drain_ms : 1};
    r->draining = 1;
    TD_LIST_FOR (it, &r->sessions) {
        td_session *s = TD_LIST_ENTRY(it, td_session, node);
        td_session_step(s, &ev, &(td_body){.reason = reason}, NULL);
    }
}

void td_rpc_get_stats(const td_rpc *r, td_rpc_stats *ret_stats)
{
    *ret_stats = r->stats;
    ret_stats->unknown_fields = r->codec.unknown_fields;
    TD_LIST_FOR (it, &r->sessions) {
        td_streams_stats st;
        td_streams_get_stats(TD_LIST_ENTRY(it, td_session, node)->streams, &st);
        ret_stats->late_frames += st.late + st.stale;
        ret_stats->bad_frames += st.malformed;
    }
}

uint32_t td_code_from_errno(int err)
{
    switch (err < 0 ? -err : err) {
    case 0:
        return TD_OK;
    case EINVAL:
    case EBADMSG:
    case EILSEQ:
    case E2BIG:
    case EMSGSIZE:
        return TD_INVALID_ARGUMENT;
    case ERANGE:
        return TD_OUT_OF_RANGE;
    case ENOENT:
        return TD_NOT_FOUND;
    case EEXIST:
        return TD_ALREADY_EXISTS;
    case EACCES:
    case EPERM:
        return TD_PERMISSION_DENIED;
    case ENOSPC:
    case ENOMEM:
    case ENOBUFS:
        return TD_RESOURCE_EXHAUSTED;
    case ESTALE:
        return TD_FAILED_PRECONDITION;
    case ECANCELED:
        return TD_CANCELLED;
    case ETIMEDOUT:
        return TD_DEADLINE_EXCEEDED;
    case ENOSYS:
    case EOPNOTSUPP:
        return TD_UNIMPLEMENTED;
    case EAGAIN:
    case ENOTCONN:
    case ECONNRESET:
    case EHOSTUNREACH:
    case EPIPE:
        return TD_UNAVAILABLE;
    default:
        return TD_INTERNAL;
    }
}

const char *td_code_name(uint32_t code)
{
    static const char *const names[] = {
        "OK",
        "CANCELLED",
        "UNKNOWN",
        "INVALID_ARGUMENT",
        "DEADLINE_EXCEEDED",
        "NOT_FOUND",
        "ALREADY_EXISTS",
        "PERMISSION_DENIED",
        "RESOURCE_EXHAUSTED",
        "FAILED_PRECONDITION",
        "ABORTED",
        "OUT_OF_RANGE",
        "UNIMPLEMENTED",
        "INTERNAL",
        "UNAVAILABLE",
        "DATA_LOSS",
        "UNAUTHENTICATED",
    };
    return code < TD_ARRAY_LEN(names) ? names[code] : "UNKNOWN";
}
