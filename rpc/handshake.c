/* SPDX-License-Identifier: Apache-2.0 */
/* HELLO and WELCOME: how a connection becomes a session, on both sides, again and again. */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <zmq.h>

#include "base/bug.h"
#include "base/clock.h"
#include "base/rand.h"
#include "rpc/rpc_int.h"
#include "rpc/sock.h"
#include "base/banned.h"

#define TRY_US         (50 * TD_MS) /* not connected yet: look again (the descriptor tells sooner) */
#define WAIT_US        (1 * TD_S)   /* for WELCOME */
#define BACKOFF_MIN_US (250 * TD_MS)
#define BACKOFF_MAX_US (5 * TD_S)
#define YOUNG_US       (1 * TD_S)
#define YOUNG_MAX      3
#define LAG_US         (250 * TD_MS)
#define CANCEL_US      (5 * TD_S)

static td_streams_config streams_config(const td_rpc *r, uint32_t number)
{
    return (td_streams_config){.binder = !r->c.dial,
                               .session = number,
                               .max_streams = r->c.max_streams,
                               .ping_us = r->c.ping_ms * TD_MS,
                               .dead_us = r->c.dead_ms * TD_MS,
                               .lag_us = LAG_US,
                               .cancel_grace_us = CANCEL_US,
                               .window_bytes = r->c.session_credit_bytes,
                               .max_message_bytes = (uint32_t)r->c.max_message_bytes};
}

static int send_status(td_rpc *r, const td_route *route, uint32_t session, uint32_t code,
                       const char *text)
{
    Tandem__V1__Status m = TANDEM__V1__STATUS__INIT;
    m.code = code;
    m.has_message = 1;
    m.message = (ProtobufCBinaryData){.len = strlen(text), .data = (uint8_t *)(uintptr_t)text};
    td_preamble p = {.major = TD_WIRE_MAJOR,
                     .minor = TD_WIRE_MINOR,
                     .type = TD_FRAME_STATUS,
                     .session = session};
    return td_rpc_send(r, route, &p, &m.base);
}

static void drop_session(td_session *s, const char *reason)
{
    td_printable(s->reason, sizeof s->reason, reason, strlen(reason));
    td_session_step(s, &(td_stream_event){.type = TD_EV_LOST}, NULL, NULL);
}

/* ---- binding side ---- */

static int wrong_length(ProtobufCBinaryData b, int present, size_t want, const char *name,
                        td_err *err)
{
    if (!present || b.len == want)
        return 0;
    return td_err_set(err, -EINVAL, "HELLO.%s has %zu bytes, not %zu", name, b.len, want);
}

static int too_long(ProtobufCBinaryData b, size_t max, const char *name, td_err *err)
{
    if (b.len <= max)
        return 0;
    return td_err_set(err, -EINVAL, "HELLO.%s has %zu bytes, at most %zu are taken", name, b.len,
                      max);
}

static int check_hello(const Tandem__V1__Hello *h, td_err *err)
{
    if (h->major != TD_WIRE_MAJOR)
        return td_err_set(err, -EPROTO,
                          "HELLO.major is %" PRIu32 ", this side speaks %d: use the same release",
                          h->major, TD_WIRE_MAJOR);
    int r = wrong_length(h->epoch, 1, 16, "epoch", err);
    r = r ? r : wrong_length(h->schema_hash, h->has_schema_hash, 16, "schema_hash", err);
    r = r ? r : wrong_length(h->model_hash, h->has_model_hash, 32, "model_hash", err);
    r = r ? r : wrong_length(h->config_hash, h->has_config_hash, 32, "config_hash", err);
    r = r ? r : wrong_length(h->tokenizer_hash, h->has_tokenizer_hash, 32, "tokenizer_hash", err);
    r = r ? r : wrong_length(h->profile_id, h->has_profile_id, 16, "profile_id", err);
    r = r ? r : wrong_length(h->layout_hash, h->has_layout_hash, 16, "layout_hash", err);
    r = r ? r : too_long(h->name, TD_NAME_BYTES_MAX, "name", err);
    r = r ? r : too_long(h->build, 128, "build", err);
    r = r ? r : too_long(h->host_id, 64, "host_id", err);
    r = r ? r : too_long(h->kv_endpoint, 256, "kv_endpoint", err);
    r = r ? r : too_long(h->profile, 4096, "profile", err);
    if (r == 0 && h->n_features > 32)
        r = td_err_set(err, -EINVAL, "HELLO.features has %zu entries, at most 32 are taken",
                       h->n_features);
    return r;
}

static int send_welcome(td_rpc *r, td_session *s, const Tandem__V1__Hello *h)
{
    Tandem__V1__Welcome m = TANDEM__V1__WELCOME__INIT;
    m.minor = TD_WIRE_MINOR; /* 0: the least there is */
    m.epoch = (ProtobufCBinaryData){.len = 16, .data = r->c.epoch};
    m.session = s->number;
    m.ping_ms = r->c.ping_ms;
    m.dead_ms = r->c.dead_ms;
    m.credit_bytes = r->c.session_credit_bytes;
    td_preamble p = {.major = TD_WIRE_MAJOR,
                     .minor = TD_WIRE_MINOR,
                     .type = TD_FRAME_WELCOME,
                     .session = s->number};
    return td_rpc_send(r, &s->route, &p, &m.base);
}

/* The same process speaks on a new connection, or starts anew on an old one: what it had before is
 * over. With keys, nobody ends a session of another key. */
static int replace(td_rpc *r, const td_route *route, const uint8_t epoch[16])
{
    td_session *s = td_rpc_find_route(r, route);
    if (s)
        drop_session(s, "a new HELLO on the same connection");
    TD_LIST_FOR (it, &r->sessions) {
        s = TD_LIST_ENTRY(it, td_session, node);
        if (memcmp(s->epoch, epoch, 16) == 0) {
            if (r->from && strcmp(r->from, s->user_id) != 0)
                return -EACCES;
            drop_session(s, "the same process said HELLO on a new connection");
            return 0; /* epochs are unique in the table; callbacks may have changed the list */
        }
    }
    return 0;
}

static int admit(td_rpc *r, td_session *s, const Tandem__V1__Hello *h, td_err *err)
{
    td_printable(s->name, sizeof s->name, h->name.data, h->has_name ? h->name.len : 0);
    int e = r->c.ops.on_hello ? r->c.ops.on_hello(r->c.arg, s, h, err) : 0;
    if (e < 0)
        return e;
    e = send_welcome(r, s, h);
    if (e < 0)
        return td_err_set(err, e, "cannot answer: %s", td_errno_text(e));
    td_rpc_add_session(r, s);
    s->up = 1;
    td_session_step(s, &(td_stream_event){.type = TD_EV_START}, NULL, NULL);
    if (r->c.ops.on_up)
        r->c.ops.on_up(r->c.arg, s);
    return 0;
}

static uint32_t next_number(td_rpc *r)
{
    if (++r->next_number == 0) /* 0 is HELLO's */
        r->next_number = 1;
    return r->next_number;
}

static void recv_hello(td_rpc *r, const td_route *route, const uint8_t *body, size_t n)
{
    Tandem__V1__Hello *h;
    td_session *s = NULL;
    td_err err = {.code = 0};
    int e = TD_UNPACK(&r->codec, tandem__v1__hello, body, n, &h, &err);
    e = e ? e : check_hello(h, &err);
    if (e < 0) {
        r->stats.bad_frames++;
        send_status(r, route, 0, TD_INVALID_ARGUMENT, err.text);
        return;
    }
    if (replace(r, route, h->epoch.data) < 0) {
        r->stats.bad_frames++;
        send_status(r, route, 0, TD_PERMISSION_DENIED, "HELLO.epoch is that of another key");
        return;
    }
    if (r->draining || r->n_sessions >= r->c.max_sessions) {
        send_status(r, route, 0, TD_UNAVAILABLE, r->draining ? "draining" : "too many sessions");
        return;
    }
    td_streams_config sc = streams_config(r, next_number(r));
    e = td_session_new(r, route, &sc, h->epoch.data, &s);
    if (e < 0) {
        send_status(r, route, 0, TD_RESOURCE_EXHAUSTED, "out of memory");
        return;
    }
    e = r->from ? td_session_authenticate(s, h->role, &err) : 0;
    e = e ? e : admit(r, s, h, &err);
    if (e < 0) {
        send_status(r, route, 0, TD_FAILED_PRECONDITION, err.text[0] ? err.text : td_errno_text(e));
        td_session_unref(s);
    }
}

static void recv_stray(td_rpc *r, const td_route *route, const td_preamble *p)
{
    r->stats.late_frames++;
    if (p->type != TD_FRAME_STATUS && p->type != TD_FRAME_GOAWAY && p->type != TD_FRAME_WELCOME)
        send_status(r, route, p->session, TD_UNAVAILABLE, "unknown session: say HELLO");
}

/* ---- dialling side ---- */

static void set_state(td_rpc *r, td_dial_state state, uint64_t delay_us)
{
    r->dial_state = state;
    if (state == TD_DIAL_UP)
        td_timer_stop(r->dial_timer);
    else
        td_timer_set(r->dial_timer, delay_us);
}

static void back_off(td_rpc *r)
{
    uint32_t random;
    td_random_bytes(&random, sizeof random);
    r->backoff_us = TD_MIN(TD_MAX(r->backoff_us * 2, BACKOFF_MIN_US), BACKOFF_MAX_US);
    set_state(r, TD_DIAL_BACKOFF,
              r->backoff_us * 3 / 4 + random % (r->backoff_us / 2)); /* 75 to 125 % */
}

void td_handshake_start(td_rpc *r)
{
    set_state(r, TD_DIAL_TRY, 0);
}

/* At once after a session that lived; with backoff when sessions die young again and again. */
void td_handshake_again(td_rpc *r, uint64_t lived_us)
{
    if (lived_us >= YOUNG_US) {
        r->n_young = 0;
        r->backoff_us = 0;
    }
    if (++r->n_young <= YOUNG_MAX)
        td_handshake_start(r);
    else
        back_off(r);
}

static int send_hello(td_rpc *r)
{
    Tandem__V1__Hello h = *r->c.hello;
    h.major = TD_WIRE_MAJOR;
    h.minor = TD_WIRE_MINOR;
    h.epoch = (ProtobufCBinaryData){.len = 16, .data = r->c.epoch};
    td_preamble p = {.major = TD_WIRE_MAJOR, .minor = TD_WIRE_MINOR, .type = TD_FRAME_HELLO};
    return td_rpc_send(r, &(td_route){.n = 0}, &p, &h.base);
}

static int writable(td_rpc *r)
{
    int events = 0;
    size_t n = sizeof events;
    if (zmq_getsockopt(r->socket, ZMQ_EVENTS, &events, &n) < 0)
        return 0;
    /* Asking swallows the edge that tells of waiting input, as a send does. */
    if (events & ZMQ_POLLIN)
        td_loop_after(r->loop, &r->pump);
    return (events & ZMQ_POLLOUT) != 0;
}

void td_handshake_try(td_rpc *r)
{
    if (r->dial_state == TD_DIAL_WAIT &&
        !writable(r)) /* the connection went, and our HELLO with it */
        set_state(r, TD_DIAL_TRY, TRY_US);
    else if (r->dial_state == TD_DIAL_TRY && writable(r) && send_hello(r) == 0)
        set_state(r, TD_DIAL_WAIT, WAIT_US);
}

void td_handshake_tick(void *arg)
{
    td_rpc *r = arg;
    if (r->dial_state == TD_DIAL_WAIT) {
        td_rpc_pump(r); /* a WELCOME that lies unread came in time */
        if (r->dial_state == TD_DIAL_WAIT)
            back_off(r);
        return;
    }
    if (r->dial_state == TD_DIAL_TRY && r->c.link && td_sock_refused(r->socket)) {
        r->redial = 1;
        back_off(r);
        return;
    }
    if (r->dial_state == TD_DIAL_BACKOFF)
        r->dial_state = TD_DIAL_TRY;
    if (r->redial) {
        r->redial = 0;
        (void)td_sock_redial(r->socket, r->endpoint);
    }
    td_handshake_try(r);
    if (r->dial_state == TD_DIAL_TRY)
        set_state(r, TD_DIAL_TRY, TRY_US);
}

static int check_welcome(const Tandem__V1__Welcome *w)
{
    return w->epoch.len == 16 && w->session != 0 && w->minor == TD_WIRE_MINOR && w->ping_ms >= 10 &&
           w->dead_ms > w->ping_ms && w->dead_ms <= 600000 && w->credit_bytes > 0;
}

static void recv_welcome(td_rpc *r, const uint8_t *body, size_t n)
{
    Tandem__V1__Welcome *w;
    td_session *s;
    if (TD_UNPACK(&r->codec, tandem__v1__welcome, body, n, &w, NULL) < 0 || !check_welcome(w)) {
        r->stats.bad_frames++;
        return;
    }
    td_streams_config sc = streams_config(r, w->session);
    sc.send_credit_bytes = w->credit_bytes;
    sc.ping_us = w->ping_ms * TD_MS;
    sc.dead_us = w->dead_ms * TD_MS;
    uint8_t epoch[16];
    memcpy(epoch, w->epoch.data, sizeof epoch);
    if (r->peer)
        drop_session(r->peer, "the binder made a new session");
    if (td_session_new(r, &(td_route){.n = 0}, &sc, epoch, &s) < 0) {
        back_off(r);
        return;
    }
    set_state(r, TD_DIAL_UP, 0);
    td_rpc_add_session(r, s);
    s->up = 1;
    td_session_ref(s);
    td_session_step(s, &(td_stream_event){.type = TD_EV_START}, NULL, NULL);
    if (s->up && r->c.ops.on_up)
        r->c.ops.on_up(r->c.arg, s);
    td_session_unref(s);
}

/* The binder would not have us: say so, and come again later. */
static void recv_refusal(td_rpc *r, const uint8_t *body, size_t n)
{
    Tandem__V1__Status *m;
    td_session *s;
    if (TD_UNPACK(&r->codec, tandem__v1__status, body, n, &m, NULL) < 0) {
        r->stats.bad_frames++;
        return;
    }
    back_off(r);
    td_streams_config sc = streams_config(r, 0);
    static const uint8_t no_epoch[16];
    if (!r->c.ops.on_down || td_session_new(r, &(td_route){.n = 0}, &sc, no_epoch, &s) < 0)
        return;
    char text[TD_REASON_BYTES];
    td_printable(text, sizeof text, m->message.data, m->has_message ? m->message.len : 0);
    snprintf(s->reason, sizeof s->reason, "refused: %.*s", (int)sizeof s->reason - 16, text);
    r->c.ops.on_down(r->c.arg, s, s->reason);
    s->rpc = NULL;
    td_session_unref(s);
}

void td_handshake_recv(td_rpc *r, const td_route *route, const td_preamble *p, const uint8_t *body,
                       size_t n)
{
    if (!r->c.dial && p->type == TD_FRAME_HELLO)
        recv_hello(r, route, body, n);
    else if (!r->c.dial)
        recv_stray(r, route, p);
    else if (p->type == TD_FRAME_WELCOME && r->dial_state != TD_DIAL_BACKOFF)
        recv_welcome(r, body, n);
    else if (p->type == TD_FRAME_STATUS && p->stream == 0 && p->session == 0 &&
             r->dial_state == TD_DIAL_WAIT)
        recv_refusal(r, body, n);
    else
        r->stats.late_frames++;
}
