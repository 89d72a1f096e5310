/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/bug.h"
#include "base/clock.h"
#include "rpc/rpc_int.h"
#include "base/banned.h"

void td_printable(char *out, size_t out_bytes, const void *bytes, size_t n)
{
    const uint8_t *p = bytes;
    n = TD_MIN(n, out_bytes - 1);
    for (size_t i = 0; i < n; i++)
        out[i] = p[i] < 0x20 || p[i] > 0x7e ? '?' : (char)p[i];
    out[n] = 0;
}

/* ---- frames that the core wants sent ---- */

typedef union bodies {
    ProtobufCMessage base;
    Tandem__V1__Call call;
    Tandem__V1__Data data;
    Tandem__V1__Status status;
    Tandem__V1__Credit credit;
    Tandem__V1__Cancel cancel;
    Tandem__V1__Ping ping;
    Tandem__V1__Goaway goaway;
} bodies;

static ProtobufCBinaryData view(const char *p, size_t n)
{
    return (ProtobufCBinaryData){.len = n, .data = (uint8_t *)(uintptr_t)p};
}

/* Set an optional bytes field from text; NULL and "" leave it out. */
#define SET_TEXT(m, field, z)                                                                      \
    do {                                                                                           \
        const char *z_ = (z);                                                                      \
        (m).has_##field = z_ && *z_;                                                               \
        if ((m).has_##field)                                                                       \
            (m).field = view(z_, strlen(z_));                                                      \
    } while (0)

static void make_call(Tandem__V1__Call *m, const td_stream_frame *f, const td_call_spec *spec)
{
    tandem__v1__call__init(m);
    m->method = view(spec->method, strlen(spec->method));
    m->timeout_ms = f->timeout_ms;
    m->has_request_id = spec->request_id.len > 0;
    m->request_id = view(spec->request_id.ptr, spec->request_id.len);
    m->has_attempt = 1;
    m->attempt = spec->attempt;
    m->has_credit = 1;
    m->credit = f->messages;
    m->message = view(spec->message, spec->message_bytes);
}

/* f->code is the core's word; the callee's own text and error name go along only with its own code.
 */
static void make_status(Tandem__V1__Status *m, const td_stream_frame *f, const td_status *st)
{
    tandem__v1__status__init(m);
    m->code = f->code;
    int own = st && st->code == f->code;
    SET_TEXT(*m, error, own && st->error && *st->error ? st->error : td_error_of_code(f->code));
    SET_TEXT(*m, message, st ? st->message : NULL);
    m->has_retry_after_ms = own && st->retry_after_ms > 0;
    m->retry_after_ms = own ? st->retry_after_ms : 0;
}

static void make_credit(Tandem__V1__Credit *m, const td_stream_frame *f)
{
    tandem__v1__credit__init(m);
    m->has_messages = f->messages > 0;
    m->messages = f->messages;
    m->has_bytes = f->bytes > 0;
    m->bytes = f->bytes;
}

static void make_ping(Tandem__V1__Ping *m, const td_stream_frame *f, const td_rpc *r,
                      Tandem__V1__Load *load)
{
    tandem__v1__ping__init(m);
    m->nonce = f->nonce;
    if (f->type == TD_FRAME_PING && r->c.ops.get_load) {
        tandem__v1__load__init(load);
        r->c.ops.get_load(r->c.arg, load);
        m->load = load;
    }
}

static void make_goaway(Tandem__V1__Goaway *m, const td_stream_frame *f, const char *reason)
{
    tandem__v1__goaway__init(m);
    m->has_last_stream = 1;
    m->last_stream = f->last_stream;
    m->has_drain_ms = 1;
    m->drain_ms = f->timeout_ms;
    SET_TEXT(*m, reason, reason);
}

static const ProtobufCMessage *make_body(bodies *u, Tandem__V1__Load *load, td_session *s,
                                         const td_stream_frame *f, const td_body *b)
{
    switch (f->type) {
    case TD_FRAME_CALL:
        make_call(&u->call, f, b->spec);
        break;
    case TD_FRAME_DATA:
        tandem__v1__data__init(&u->data);
        u->data.message = view(b->message.ptr, b->message.len);
        break;
    case TD_FRAME_BATCH:
        return &b->batch->base;
    case TD_FRAME_CREDIT:
        make_credit(&u->credit, f);
        break;
    case TD_FRAME_CANCEL:
        tandem__v1__cancel__init(&u->cancel);
        SET_TEXT(u->cancel, reason, b->reason ? b->reason : td_code_name(f->code));
        break;
    case TD_FRAME_STATUS:
        make_status(&u->status, f, b->status);
        break;
    case TD_FRAME_PING:
    case TD_FRAME_PONG:
        make_ping(&u->ping, f, s->rpc, load);
        break;
    case TD_FRAME_GOAWAY:
        make_goaway(&u->goaway, f, b->reason);
        break;
    default:
        TD_BUG_ON(1);
    }
    return &u->base;
}

static void send_out(td_session *s, const td_stream_frame *f, const td_body *b)
{
    bodies u;
    Tandem__V1__Load load;
    if (!s->rpc)
        return;
    td_preamble p = {.major = TD_WIRE_MAJOR,
                     .minor = TD_WIRE_MINOR,
                     .type = f->type,
                     .stream = f->stream,
                     .sequence = f->sequence,
                     .session = f->session};
    int e = td_rpc_send(s->rpc, &s->route, &p, make_body(&u, &load, s, f, b));
    if (e < 0)
        td_session_lose(s, TD_PENDING_LOST,
                        e == -EAGAIN         ? "not connected, or its queue is full"
                        : e == -EHOSTUNREACH ? "its connection has gone"
                                             : td_errno_text(e));
}

/* ---- what goes up ---- */

static const char *down_text(td_down why)
{
    switch (why) {
    case TD_DOWN_SILENCE:
        return "silent for too long";
    case TD_DOWN_GAP:
        return "messages were lost";
    case TD_DOWN_GOAWAY:
        return "the peer ended the session";
    case TD_DOWN_PROTOCOL:
        return "the peer broke the protocol";
    default:
        return "connection lost";
    }
}

static void went_down(td_session *s, td_down why)
{
    td_rpc *r = s->rpc;
    if (!s->reason[0])
        td_printable(s->reason, sizeof s->reason, down_text(why), strlen(down_text(why)));
    td_timer_del(s->tick);
    s->tick = NULL;
    s->pending = TD_PENDING_NONE;
    td_rpc_del_session(r, s);
    r->stats.sessions_lost++;
    if (s->up && r->c.ops.on_down)
        r->c.ops.on_down(r->c.arg, s, s->reason);
    s->up = 0;
    s->rpc =
        NULL; /* calls that are not finished yet keep the session, and may outlive the td_rpc */
    if (r->c.dial && !r->closing)
        td_handshake_again(r, td_now_us() - s->made_us);
    td_session_unref(s);
}

static void go_up(td_session *s, const td_stream_up *u, const td_body *b)
{
    /* An upward call before this one may have finished the stream. */
    td_call *c = u->type == TD_UP_STATUS ? u->user : td_streams_user(s->streams, u->stream);
    switch (u->type) {
    case TD_UP_CALL:
        td_call_incoming(s, u->stream, b->call_in);
        break;
    case TD_UP_DATA:
        td_call_deliver(c, b->data_in);
        break;
    case TD_UP_STATUS:
        td_call_ended(c, u->code, u->local, u->local ? NULL : b->status_in);
        break;
    case TD_UP_ABORT:
        if (c)
            td_call_abort(c, u->code);
        break;
    case TD_UP_CREDIT:
        if (c)
            td_call_credit(c);
        break;
    case TD_UP_GOAWAY:
        break; /* td_session_is_draining() */
    case TD_UP_DOWN:
        went_down(s, u->why);
    }
}

static void arm(td_session *s, uint64_t now)
{
    uint64_t at = td_streams_next_us(s->streams);
    if (!s->tick || at >= s->tick_at_us)
        return;
    s->tick_at_us = at;
    td_timer_set(s->tick, at > now ? at - now : 0);
}

static void act(td_session *s, const td_stream_out *out, const td_body *b)
{
    for (uint32_t i = 0; i < out->n_send; i++)
        send_out(s, &out->send[i], b);
    for (uint32_t i = 0; i < out->n_up; i++)
        go_up(s, &out->up[i], b);
}

int td_session_step(td_session *s, const td_stream_event *ev, const td_body *body,
                    td_stream_out *ret_out)
{
    static const td_body nothing;
    td_stream_out first, more, *out = ret_out ? ret_out : &first;
    uint64_t now = td_now_us();
    body = body ? body : &nothing;
    td_session_ref(s);
    int r = td_streams_step(s->streams, ev, now, out);
    act(s, out, body);
    for (int go_on = out->more; go_on; go_on = more.more) {
        td_streams_step(s->streams, &(td_stream_event){.type = TD_EV_MORE}, now, &more);
        act(s, &more, body);
    }
    arm(s, now);
    td_session_unref(s);
    return r;
}

static void on_tick(void *arg)
{
    td_session *s = td_session_ref(arg);
    uint64_t now = td_now_us(), late = now > s->tick_at_us ? now - s->tick_at_us : 0;
    uint64_t lag = TD_MAX(td_loop_lag_us(s->rpc->loop), late);
    td_rpc_pump(s->rpc); /* what lies unread is a sign of life */
    s->tick_at_us = UINT64_MAX;
    td_session_step(s, &(td_stream_event){.type = TD_EV_TICK, .lag_us = lag}, NULL, NULL);
    td_session_unref(s);
}

/* ---- received frames ---- */

typedef struct decoded {
    td_body body;
    const Tandem__V1__Batch *batch;
    const Tandem__V1__Load *load;
    ProtobufCBinaryData reason;
} decoded;

static int decode_stream(td_codec *k, const uint8_t *p, size_t n, td_stream_frame *f, decoded *d)
{
    Tandem__V1__Call *call;
    Tandem__V1__Data *data;
    Tandem__V1__Cancel *cancel;
    int r = 0;
    if (f->type == TD_FRAME_CALL && (r = TD_UNPACK(k, tandem__v1__call, p, n, &call, NULL)) == 0) {
        f->timeout_ms = call->timeout_ms;
        f->messages = call->credit;
        d->body.call_in = call;
    } else if (f->type == TD_FRAME_DATA &&
               (r = TD_UNPACK(k, tandem__v1__data, p, n, &data, NULL)) == 0) {
        f->bytes = data->message.len;
        d->body.data_in = (td_str){(const char *)data->message.data, data->message.len};
    } else if (f->type == TD_FRAME_CANCEL) {
        r = TD_UNPACK(k, tandem__v1__cancel, p, n, &cancel, NULL);
    }
    return r;
}

static int decode_session(td_codec *k, const uint8_t *p, size_t n, td_stream_frame *f, decoded *d)
{
    Tandem__V1__Ping *ping;
    Tandem__V1__Goaway *goaway;
    Tandem__V1__Batch *batch;
    int r = 0;
    if (f->type == TD_FRAME_BATCH &&
        (r = TD_UNPACK(k, tandem__v1__batch, p, n, &batch, NULL)) == 0) {
        d->batch = batch;
        d->load = batch->load;
    } else if (f->type == TD_FRAME_GOAWAY &&
               (r = TD_UNPACK(k, tandem__v1__goaway, p, n, &goaway, NULL)) == 0) {
        f->timeout_ms = goaway->drain_ms;
        f->last_stream = goaway->last_stream;
        d->reason = goaway->reason;
    } else if ((f->type == TD_FRAME_PING || f->type == TD_FRAME_PONG) &&
               (r = TD_UNPACK(k, tandem__v1__ping, p, n, &ping, NULL)) == 0) {
        f->nonce = ping->nonce;
        d->load = ping->load;
    }
    return r;
}

/* Both for streams and for the session. */
static int decode_common(td_codec *k, const uint8_t *p, size_t n, td_stream_frame *f, decoded *d)
{
    Tandem__V1__Credit *credit;
    Tandem__V1__Status *status;
    int r = 0;
    if (f->type == TD_FRAME_CREDIT &&
        (r = TD_UNPACK(k, tandem__v1__credit, p, n, &credit, NULL)) == 0) {
        f->messages = credit->messages;
        f->bytes = f->stream ? 0 : credit->bytes;
    } else if (f->type == TD_FRAME_STATUS &&
               (r = TD_UNPACK(k, tandem__v1__status, p, n, &status, NULL)) == 0) {
        f->code = status->code;
        d->body.status_in = status;
        d->reason = status->message;
    }
    return r;
}

static int decode(td_codec *k, const uint8_t *p, size_t n, td_stream_frame *f, decoded *d)
{
    if (f->type == TD_FRAME_CREDIT || f->type == TD_FRAME_STATUS)
        return decode_common(k, p, n, f, d);
    /* DATA of stream 0 and the like: the core refuses them by type */
    return f->stream ? decode_stream(k, p, n, f, d) : decode_session(k, p, n, f, d);
}

static void recv_items(td_session *s, const Tandem__V1__Batch *batch, uint32_t session)
{
    for (size_t i = 0; i < batch->n_items && s->rpc; i++) {
        const Tandem__V1__BatchItem *it = batch->items[i];
        td_stream_event ev = {.type = TD_EV_RECV, .batched = 1};
        ev.frame = (td_stream_frame){.type = TD_FRAME_DATA,
                                     .stream = it->stream,
                                     .sequence = it->sequence,
                                     .session = session,
                                     .bytes = it->message.len};
        td_body b = {.data_in = {(const char *)it->message.data, it->message.len}};
        td_session_step(s, &ev, &b, NULL);
    }
}

void td_session_recv(td_session *s, const td_preamble *p, const uint8_t *body, size_t n,
                     int bad_form)
{
    td_stream_event ev = {.type = TD_EV_RECV};
    decoded d = {.batch = NULL};
    const td_rpc_ops *ops = &s->rpc->c.ops;
    void *arg = s->rpc->c.arg;
    ev.frame = (td_stream_frame){.type = p->type,
                                 .ignorable = p->flags & TD_FRAME_IGNORABLE,
                                 .stream = p->stream,
                                 .sequence = p->sequence,
                                 .session = p->session};
    ev.frame.malformed = bad_form || decode(&s->rpc->codec, body, n, &ev.frame, &d) < 0;
    int ends = p->stream == 0 && (p->type == TD_FRAME_STATUS || p->type == TD_FRAME_GOAWAY);
    if (ends && p->session == s->number && d.reason.len)
        td_printable(s->reason, sizeof s->reason, d.reason.data, d.reason.len);
    td_session_ref(s);
    int r = td_session_step(s, &ev, &d.body, NULL);
    if (r == 0 && d.batch)
        recv_items(s, d.batch, p->session);
    if (r == 0 && d.load && s->rpc && p->session == s->number && ops->on_load)
        ops->on_load(arg, s, d.load);
    if (r == 0 && d.batch && s->rpc && ops->on_batch_end)
        ops->on_batch_end(arg, s);
    td_session_unref(s);
}

/* ---- life ---- */

int td_session_new(td_rpc *r, const td_route *route, const td_streams_config *streams,
                   const uint8_t epoch[16], td_session **ret_s)
{
    td_session *s = calloc(1, sizeof *s);
    if (!s)
        return -ENOMEM;
    s->rpc = r;
    s->refs = 1;
    s->number = streams->session;
    s->route = *route;
    s->tick_at_us = UINT64_MAX;
    s->made_us = td_now_us();
    memcpy(s->epoch, epoch, sizeof s->epoch);
    td_list_init(&s->node);
    td_list_init(&s->batch.finished);
    td_strbuf_init(&s->batch.bytes);
    int e = td_streams_new(streams, td_now_us(), &s->streams);
    if (e == 0)
        e = td_timer_add(r->loop, 3600 * TD_S, 0, on_tick, s,
                         &s->tick); /* armed by the first step */
    if (e < 0) {
        td_session_unref(s);
        return e;
    }
    *ret_s = s;
    return 0;
}

td_session *td_session_ref(td_session *s)
{
    s->refs++;
    return s;
}

void td_session_unref(td_session *s)
{
    if (--s->refs > 0)
        return;
    td_timer_del(s->tick);
    td_streams_free(s->streams);
    td_batch_free(&s->batch);
    free(s);
}

void td_session_lose(td_session *s, td_pending how, const char *reason)
{
    if (!s->rpc || s->pending)
        return;
    s->pending = how;
    td_printable(s->reason, sizeof s->reason, reason, strlen(reason));
    td_loop_after(s->rpc->loop, &s->rpc->reap);
}

void td_session_close(td_session *s, const char *reason)
{
    td_session_lose(s, TD_PENDING_CLOSE, reason ? reason : "closed");
}

void td_session_set_user(td_session *s, void *user)
{
    s->user = user;
}

void *td_session_user(const td_session *s)
{
    return s->user;
}

const td_peer *td_session_peer(const td_session *s)
{
    return s->has_peer ? &s->peer : NULL;
}

const char *td_session_name(const td_session *s)
{
    return s->name;
}

uint32_t td_session_number(const td_session *s)
{
    return s->number;
}

int td_session_is_draining(const td_session *s)
{
    return td_streams_is_draining(s->streams);
}
