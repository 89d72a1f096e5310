/* SPDX-License-Identifier: Apache-2.0 */
#include "rpc/stream.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/bug.h"
#include "base/banned.h"

/* A balance of bytes above this can only come from a broken peer. */
#define CREDIT_BYTES_MAX (1ll << 40)

typedef struct slot {
    uint64_t id; /* 0 = free */
    void *user;
    uint64_t deadline_us;
    uint32_t send_seq, recv_seq;
    uint32_t
        credit; /* incoming: messages we may send. outgoing: messages the callee may still send */
    uint32_t window; /* outgoing: credit given at first */
    uint32_t owed;   /* outgoing: consumed, not granted again yet */
    uint32_t abort_code;
    uint32_t next_free;
    uint8_t outgoing, cancelled, blocked;
    uint8_t dropped; /* outgoing: DATA came after our CANCEL and was not delivered */
} slot;

struct td_streams {
    td_streams_config c;
    slot *slots;
    uint32_t *index; /* hash of id -> slot + 1, linear probing; 2..4 times max_streams entries */
    uint32_t index_mask, n, n_blocked, free_head;

    uint64_t next_id, peer_last;
    uint32_t send_seq, recv_seq; /* stream 0 */
    int64_t send_bytes; /* session credit left for our DATA; the last message may overdraw it */
    int64_t recv_bytes; /* what we granted and the peer has not used */
    uint64_t owed_bytes;

    uint64_t last_recv_us, next_ping_us, next_deadline_us, nonce;
    int draining, peer_draining;
    uint64_t peer_accepted; /* GOAWAY's last_stream */
    td_down down;
    uint32_t down_code;
    int down_told;
    int sweeping; /* slots from `cursor` on are still to be looked at */
    uint32_t cursor;
    td_streams_stats stats;
};

/* ---- table ---- */

static uint32_t bucket_of(const td_streams *s, uint64_t id)
{
    return (uint32_t)((id * 0x9E3779B97F4A7C15ull) >> 32) & s->index_mask;
}

static slot *find(const td_streams *s, uint64_t id)
{
    for (uint32_t b = bucket_of(s, id); s->index[b]; b = (b + 1) & s->index_mask)
        if (s->slots[s->index[b] - 1].id == id)
            return &s->slots[s->index[b] - 1];
    return NULL;
}

static slot *slot_add(td_streams *s, uint64_t id)
{
    if (s->free_head == s->c.max_streams)
        return NULL;
    uint32_t i = s->free_head;
    slot *t = &s->slots[i];
    s->free_head = t->next_free;
    *t = (slot){.id = id, .deadline_us = UINT64_MAX};
    uint32_t b = bucket_of(s, id);
    while (s->index[b])
        b = (b + 1) & s->index_mask;
    s->index[b] = i + 1;
    s->n++;
    return t;
}

static void index_del(td_streams *s, uint64_t id)
{
    uint32_t b = bucket_of(s, id);
    while (s->slots[s->index[b] - 1].id != id)
        b = (b + 1) & s->index_mask;
    /* Shift the run behind the hole back, so that no tombstones are needed. */
    for (uint32_t next = (b + 1) & s->index_mask; s->index[next];
         next = (next + 1) & s->index_mask) {
        uint32_t home = bucket_of(s, s->slots[s->index[next] - 1].id);
        if (((next - home) & s->index_mask) >= ((next - b) & s->index_mask)) {
            s->index[b] = s->index[next];
            b = next;
        }
    }
    s->index[b] = 0;
}

static void slot_del(td_streams *s, slot *t)
{
    index_del(s, t->id);
    s->n_blocked -= t->blocked;
    t->id = 0;
    t->blocked = 0;
    t->next_free = s->free_head;
    s->free_head = (uint32_t)(t - s->slots);
    s->n--;
}

/* ---- output ---- */

static td_stream_frame *send_frame(td_streams *s, td_stream_out *out, uint8_t type, uint64_t stream,
                                   uint32_t *seq)
{
    TD_BUG_ON(out->n_send == TD_STREAM_OUT_MAX);
    td_stream_frame *f = &out->send[out->n_send++];
    *f = (td_stream_frame){
        .type = type, .stream = stream, .sequence = (*seq)++, .session = s->c.session};
    return f;
}

static td_stream_up *go_up(td_stream_out *out, td_stream_up_type type, const slot *t, uint32_t code)
{
    TD_BUG_ON(out->n_up == TD_STREAM_OUT_MAX);
    td_stream_up *u = &out->up[out->n_up++];
    *u = (td_stream_up){.type = type, .code = code};
    if (t) {
        u->stream = t->id;
        u->user = t->user;
    }
    return u;
}

static void send_cancel(td_streams *s, slot *t, uint32_t code, td_stream_out *out)
{
    if (t->cancelled)
        return;
    t->cancelled = 1;
    send_frame(s, out, TD_FRAME_CANCEL, t->id, &t->send_seq)->code = code;
}

/* STATUS for a call that never got a slot. */
static void refuse_call(td_streams *s, uint64_t id, uint32_t code, td_stream_out *out)
{
    uint32_t seq = 0;
    send_frame(s, out, TD_FRAME_STATUS, id, &seq)->code = code;
}

static void start_sweep(td_streams *s)
{
    s->sweeping = 1;
    s->cursor = 0;
    s->next_deadline_us = UINT64_MAX;
}

static void set_deadline(td_streams *s, slot *t, uint64_t at_us)
{
    t->deadline_us = at_us;
    if (at_us < s->next_deadline_us)
        s->next_deadline_us = at_us;
}

static void set_down(td_streams *s, td_down why, uint32_t code)
{
    if (s->down)
        return;
    s->down = why;
    s->down_code = code ? code : TD_UNAVAILABLE;
    start_sweep(s);
}

/* ---- ends of a stream ---- */

/* The call ends here, whatever the callee does: it is told to stop and its later frames will be
 * late ones. */
static void end_outgoing(td_streams *s, slot *t, uint32_t code, td_stream_out *out)
{
    send_cancel(s, t, code, out);
    go_up(out, TD_UP_STATUS, t, code)->local = 1;
    slot_del(s, t);
}

static void abort_incoming(td_streams *s, slot *t, uint32_t code, td_stream_out *out)
{
    if (t->abort_code)
        return;
    t->abort_code = code;
    s->n_blocked -= t->blocked;
    t->blocked = 0;
    go_up(out, TD_UP_ABORT, t, code);
}

static void fail(td_streams *s, slot *t, uint32_t code, td_stream_out *out)
{
    if (t->outgoing)
        end_outgoing(s, t, code, out);
    else
        abort_incoming(s, t, code, out);
}

static int slot_can_send(const td_streams *s, const slot *t)
{
    return t->credit > 0 && s->send_bytes > 0;
}

static void wake(td_streams *s, slot *t, td_stream_out *out)
{
    if (!t->blocked || !slot_can_send(s, t))
        return;
    t->blocked = 0;
    s->n_blocked--;
    go_up(out, TD_UP_CREDIT, t, 0);
}

static void expire(td_streams *s, slot *t, uint64_t now, td_stream_out *out)
{
    if (t->deadline_us > now) {
        if (t->deadline_us < s->next_deadline_us)
            s->next_deadline_us = t->deadline_us;
    } else if (t->outgoing) {
        end_outgoing(s, t, t->cancelled ? TD_CANCELLED : TD_DEADLINE_EXCEEDED, out);
    } else {
        abort_incoming(s, t, TD_DEADLINE_EXCEEDED, out);
    }
}

/* One slot of a sweep: at most one frame and one upward call. */
static void sweep_slot(td_streams *s, slot *t, uint64_t now, td_stream_out *out)
{
    if (s->down && t->outgoing) {
        go_up(out, TD_UP_STATUS, t, s->down_code)->local = 1;
        slot_del(s, t);
    } else if (s->down) {
        abort_incoming(s, t, TD_UNAVAILABLE, out);
    } else if (s->peer_draining && t->outgoing && t->id > s->peer_accepted) {
        go_up(out, TD_UP_STATUS, t, TD_UNAVAILABLE)->local = 1;
        slot_del(s, t);
    } else {
        if (!t->abort_code)
            expire(s, t, now, out);
        wake(s, t, out);
    }
}

static void sweep(td_streams *s, uint64_t now, td_stream_out *out)
{
    while (s->sweeping && s->cursor < s->c.max_streams) {
        if (out->n_send == TD_STREAM_OUT_MAX || out->n_up == TD_STREAM_OUT_MAX)
            break;
        slot *t = &s->slots[s->cursor++];
        if (t->id)
            sweep_slot(s, t, now, out);
    }
    if (s->sweeping && s->cursor == s->c.max_streams)
        s->sweeping = 0;
    if (s->down && !s->sweeping && !s->down_told && out->n_up < TD_STREAM_OUT_MAX) {
        s->down_told = 1;
        go_up(out, TD_UP_DOWN, NULL, s->down_code)->why = s->down;
    }
    out->more = s->sweeping || (s->down && !s->down_told);
}

/* ---- received frames ---- */

/* Bytes of DATA come back to the peer as soon as they left the transport: a slow consumer holds its
 * own stream's credit, never that of its neighbours. Late frames too: their sender has paid for
 * them. */
static void take_bytes(td_streams *s, uint64_t bytes, td_stream_out *out)
{
    if (s->recv_bytes <= -(int64_t)s->c.window_bytes) {
        set_down(s, TD_DOWN_PROTOCOL, TD_RESOURCE_EXHAUSTED);
        return;
    }
    s->recv_bytes -= (int64_t)bytes;
    s->owed_bytes += bytes;
    if (s->owed_bytes * 2 < s->c.window_bytes)
        return;
    send_frame(s, out, TD_FRAME_CREDIT, 0, &s->send_seq)->bytes = s->owed_bytes;
    s->recv_bytes += (int64_t)s->owed_bytes;
    s->owed_bytes = 0;
}

static void recv_session_credit(td_streams *s, uint64_t bytes)
{
    if (bytes > CREDIT_BYTES_MAX || s->send_bytes + (int64_t)bytes > CREDIT_BYTES_MAX) {
        set_down(s, TD_DOWN_PROTOCOL, TD_UNAVAILABLE);
        return;
    }
    s->send_bytes += (int64_t)bytes;
    if (s->n_blocked && s->send_bytes > 0)
        start_sweep(s);
}

static void recv_goaway(td_streams *s, const td_stream_frame *f, td_stream_out *out)
{
    if (f->timeout_ms == 0) {
        set_down(s, TD_DOWN_GOAWAY, TD_UNAVAILABLE);
        return;
    }
    if (!s->peer_draining)
        go_up(out, TD_UP_GOAWAY, NULL, 0);
    s->peer_draining = 1;
    s->peer_accepted = f->last_stream;
    start_sweep(s);
}

/* Stream 0. */
static int recv_session(td_streams *s, const td_stream_frame *f, td_stream_out *out)
{
    int dropped = f->type == TD_FRAME_BATCH ? -ESTALE : 0;
    /* "unknown session": who says so has forgotten our numbers too, and says nothing else any more.
     * Were it dropped as a late frame, its coming would still pass for a sign of life, for ever. */
    if (f->type == TD_FRAME_STATUS && !f->malformed) {
        set_down(s, TD_DOWN_GOAWAY, TD_UNAVAILABLE);
        return 0;
    }
    if (f->sequence != s->recv_seq) {
        if (f->sequence < s->recv_seq)
            s->stats.late++;
        else
            set_down(s, TD_DOWN_GAP, TD_UNAVAILABLE);
        return dropped;
    }
    s->recv_seq++;
    if (f->malformed) {
        s->stats.malformed++;
        return dropped;
    }
    switch (f->type) {
    case TD_FRAME_PING:
        send_frame(s, out, TD_FRAME_PONG, 0, &s->send_seq)->nonce = f->nonce;
        break;
    case TD_FRAME_PONG:
    case TD_FRAME_BATCH:
        break;
    case TD_FRAME_CREDIT:
        recv_session_credit(s, f->bytes);
        break;
    case TD_FRAME_GOAWAY:
        recv_goaway(s, f, out);
        break;
    default:
        if (f->ignorable)
            s->stats.unknown++;
        else
            set_down(s, TD_DOWN_PROTOCOL, TD_UNAVAILABLE);
    }
    return 0;
}

static void recv_call(td_streams *s, const td_stream_frame *f, uint64_t now, td_stream_out *out)
{
    s->peer_last = f->stream;
    uint32_t refuse = 0;
    if (f->malformed) {
        s->stats.malformed++;
        refuse = TD_INTERNAL;
    } else if (f->sequence != 0 || f->type != TD_FRAME_CALL) { /* its CALL was lost */
        s->stats.gaps++;
        refuse = TD_DATA_LOSS;
    } else if (f->timeout_ms == 0) {
        refuse = TD_INVALID_ARGUMENT;
    } else if (s->draining) {
        refuse = TD_UNAVAILABLE;
    }
    slot *t = refuse ? NULL : slot_add(s, f->stream);
    if (!t) {
        refuse_call(s, f->stream, refuse ? refuse : TD_RESOURCE_EXHAUSTED, out);
        return;
    }
    t->recv_seq = 1;
    t->credit = f->messages ? TD_MIN(f->messages, TD_STREAM_CREDIT_MAX) : TD_STREAM_CREDIT_DEFAULT;
    set_deadline(s, t, now + (uint64_t)f->timeout_ms * 1000);
    go_up(out, TD_UP_CALL, t, 0);
}

/* A frame of a stream that is not in the table. */
static void recv_unknown(td_streams *s, const td_stream_frame *f, uint64_t now, td_stream_out *out)
{
    int from_peer = (f->stream & 1) != (uint64_t)(s->c.binder != 0);
    if (f->type == TD_FRAME_CALL && !from_peer)
        set_down(s, TD_DOWN_PROTOCOL, TD_UNAVAILABLE);
    else if (from_peer && f->stream > s->peer_last && f->type != TD_FRAME_DATA)
        recv_call(s, f, now, out);
    else
        s->stats.late++;
}

static void recv_response(td_streams *s, slot *t, const td_stream_frame *f, td_stream_out *out)
{
    if (f->type == TD_FRAME_STATUS) {
        /* OK promises that every message was delivered */
        go_up(out, TD_UP_STATUS, t, f->code == TD_OK && t->dropped ? TD_CANCELLED : f->code);
        slot_del(s, t);
    } else if (f->type == TD_FRAME_DATA && (t->credit == 0 || f->bytes > s->c.max_message_bytes)) {
        end_outgoing(s, t, TD_RESOURCE_EXHAUSTED, out);
    } else if (f->type == TD_FRAME_DATA) {
        t->credit--;
        if (t->cancelled)
            t->dropped = 1;
        else
            go_up(out, TD_UP_DATA, t, 0);
    } else if (f->ignorable) {
        s->stats.unknown++;
    } else {
        end_outgoing(s, t, TD_INTERNAL, out);
    }
}

static void recv_request(td_streams *s, slot *t, const td_stream_frame *f, td_stream_out *out)
{
    switch (f->type) {
    case TD_FRAME_CREDIT:
        t->credit = TD_MIN(f->messages, TD_STREAM_CREDIT_MAX - t->credit) + t->credit;
        if (!t->abort_code)
            wake(s, t, out);
        break;
    case TD_FRAME_CANCEL:
        abort_incoming(s, t, TD_CANCELLED, out);
        break;
    case TD_FRAME_HALF_CLOSE: /* the CALL carries the only message: nothing more was to come */
        break;
    case TD_FRAME_DATA:
        abort_incoming(s, t, TD_UNIMPLEMENTED, out);
        break;
    default:
        if (f->ignorable)
            s->stats.unknown++;
        else
            abort_incoming(s, t, TD_INTERNAL, out);
    }
}

static void recv_stream(td_streams *s, const td_stream_frame *f, uint64_t now, td_stream_out *out)
{
    slot *t = find(s, f->stream);
    if (t && f->sequence < t->recv_seq) { /* a duplicate: paid for already */
        s->stats.late++;
        return;
    }
    if (f->type == TD_FRAME_DATA && !f->malformed)
        take_bytes(s, f->bytes, out);
    if (s->down)
        return;
    if (!t) {
        recv_unknown(s, f, now, out);
    } else if (f->sequence > t->recv_seq) {
        s->stats.gaps++;
        t->recv_seq = f->sequence + 1;
        fail(s, t, TD_DATA_LOSS, out);
    } else if (f->malformed) {
        t->recv_seq++;
        s->stats.malformed++;
        fail(s, t, TD_INTERNAL, out);
    } else {
        t->recv_seq++;
        if (t->outgoing)
            recv_response(s, t, f, out);
        else
            recv_request(s, t, f, out);
    }
}

static int on_recv(td_streams *s, const td_stream_event *e, uint64_t now, td_stream_out *out)
{
    const td_stream_frame *f = &e->frame;
    if (s->down || f->session != s->c.session) {
        s->stats.stale++;
        return f->type == TD_FRAME_BATCH ? -ESTALE : 0;
    }
    s->last_recv_us = now;
    if (f->stream == 0 && !e->batched)
        return recv_session(s, f, out);
    if (f->stream == 0)
        s->stats.late++;
    else
        recv_stream(s, f, now, out);
    return 0;
}

/* ---- local events ---- */

static int on_open(td_streams *s, const td_stream_event *e, uint64_t now, td_stream_out *out)
{
    if (s->down || s->peer_draining)
        return -ENOTCONN;
    slot *t = slot_add(s, s->next_id);
    if (!t)
        return -ENOBUFS;
    s->next_id += 2;
    t->outgoing = 1;
    t->user = e->user;
    t->window = e->credit ? TD_MIN(e->credit, TD_STREAM_CREDIT_MAX) : TD_STREAM_CREDIT_DEFAULT;
    t->credit = t->window;
    uint64_t ms = (e->timeout_us + 999) / 1000; /* never 0: the other side refuses that */
    ms = TD_MAX(TD_MIN(ms, UINT32_MAX), 1);
    set_deadline(s, t, now + TD_MIN(e->timeout_us, ms * 1000));
    out->stream = t->id;
    td_stream_frame *f = send_frame(s, out, TD_FRAME_CALL, t->id, &t->send_seq);
    f->messages = t->window;
    f->timeout_ms = (uint32_t)ms;
    return 0;
}

static int on_send(td_streams *s, const td_stream_event *e, td_stream_out *out)
{
    slot *t = find(s, e->stream);
    if (!t || t->outgoing)
        return -ENOENT;
    if (t->abort_code || s->down)
        return -ECANCELED;
    if (e->bytes > s->c.max_message_bytes)
        return -EMSGSIZE;
    if (!slot_can_send(s, t)) {
        s->n_blocked += !t->blocked;
        t->blocked = 1;
        return -EAGAIN;
    }
    t->credit--;
    s->send_bytes -= (int64_t)e->bytes;
    out->sequence = t->send_seq;
    if (e->batched)
        t->send_seq++;
    else
        send_frame(s, out, TD_FRAME_DATA, t->id, &t->send_seq)->bytes = e->bytes;
    return 0;
}

static int on_finish(td_streams *s, const td_stream_event *e, td_stream_out *out)
{
    slot *t = find(s, e->stream);
    if (!t || t->outgoing)
        return -ENOENT;
    uint32_t code = t->abort_code ? t->abort_code : e->code;
    if (!s->down)
        send_frame(s, out, TD_FRAME_STATUS, t->id, &t->send_seq)->code = code;
    slot_del(s, t);
    return 0;
}

static void on_cancel(td_streams *s, const td_stream_event *e, uint64_t now, td_stream_out *out)
{
    slot *t = find(s, e->stream);
    if (!t || !t->outgoing || t->cancelled || s->down)
        return;
    send_cancel(s, t, TD_CANCELLED, out);
    set_deadline(s, t, TD_MIN(t->deadline_us, now + s->c.cancel_grace_us));
}

static void on_consume(td_streams *s, const td_stream_event *e, td_stream_out *out)
{
    slot *t = find(s, e->stream);
    if (!t || !t->outgoing || t->cancelled || s->down)
        return;
    uint32_t used = t->window - t->credit - t->owed;
    t->owed += TD_MIN(e->messages, used);
    if (t->owed == 0 || (uint64_t)t->owed * 2 < t->window)
        return;
    send_frame(s, out, TD_FRAME_CREDIT, t->id, &t->send_seq)->messages = t->owed;
    t->credit += t->owed;
    t->owed = 0;
}

static void on_tick(td_streams *s, const td_stream_event *e, uint64_t now, td_stream_out *out)
{
    if (s->down)
        return;
    if (e->lag_us >= s->c.lag_us)
        s->last_recv_us = now; /* we slept: give the peer a whole interval again */
    if (now >= s->last_recv_us + s->c.dead_us) {
        set_down(s, TD_DOWN_SILENCE, TD_UNAVAILABLE);
        return;
    }
    if (now >= s->next_ping_us) {
        s->next_ping_us = now + s->c.ping_us;
        send_frame(s, out, TD_FRAME_PING, 0, &s->send_seq)->nonce = ++s->nonce;
    }
    if (now >= s->next_deadline_us)
        start_sweep(s);
}

static void on_goaway(td_streams *s, const td_stream_event *e, td_stream_out *out)
{
    if (s->down)
        return;
    s->draining = 1;
    td_stream_frame *f = send_frame(s, out, TD_FRAME_GOAWAY, 0, &s->send_seq);
    f->last_stream = s->peer_last;
    f->timeout_ms = e->timeout_ms;
    if (e->timeout_ms == 0)
        set_down(s, TD_DOWN_GOAWAY, e->code);
}

static void on_start(td_streams *s, td_stream_out *out)
{
    if (!s->c.binder)
        send_frame(s, out, TD_FRAME_CREDIT, 0, &s->send_seq)->bytes = s->c.window_bytes;
}

int td_streams_step(td_streams *s, const td_stream_event *e, uint64_t now, td_stream_out *out)
{
    out->stream = 0;
    out->sequence = 0;
    out->n_send = out->n_up = 0;
    out->more = 0;
    int r = 0;
    switch (e->type) {
    case TD_EV_START:
        on_start(s, out);
        break;
    case TD_EV_OPEN:
        r = on_open(s, e, now, out);
        break;
    case TD_EV_SEND:
        r = on_send(s, e, out);
        break;
    case TD_EV_BATCH:
        if (!s->down)
            send_frame(s, out, TD_FRAME_BATCH, 0, &s->send_seq);
        break;
    case TD_EV_FINISH:
        r = on_finish(s, e, out);
        break;
    case TD_EV_CANCEL:
        on_cancel(s, e, now, out);
        break;
    case TD_EV_CONSUME:
        on_consume(s, e, out);
        break;
    case TD_EV_RECV:
        r = on_recv(s, e, now, out);
        break;
    case TD_EV_TICK:
        on_tick(s, e, now, out);
        break;
    case TD_EV_GOAWAY:
        on_goaway(s, e, out);
        break;
    case TD_EV_LOST:
        set_down(s, TD_DOWN_LOST, e->code);
        break;
    case TD_EV_MORE:
        break;
    }
    sweep(s, now, out);
    return r;
}

/* ---- life and questions ---- */

static int config_ok(const td_streams_config *c)
{
    return c->max_streams > 0 && c->max_streams <= 65536 && c->ping_us > 0 &&
           c->dead_us > c->ping_us && c->window_bytes > 0 && c->window_bytes <= CREDIT_BYTES_MAX &&
           c->send_credit_bytes <= CREDIT_BYTES_MAX && c->max_message_bytes > 0;
}

int td_streams_new(const td_streams_config *c, uint64_t now, td_streams **ret_streams)
{
    if (!config_ok(c))
        return -EINVAL;
    uint32_t n_index = 16;
    while (n_index < 2 * c->max_streams)
        n_index *= 2;
    td_streams *s = calloc(1, sizeof *s);
    if (s) {
        s->slots = calloc(c->max_streams, sizeof *s->slots);
        s->index = calloc(n_index, sizeof *s->index);
    }
    if (!s || !s->slots || !s->index) {
        td_streams_free(s);
        return -ENOMEM;
    }
    s->c = *c;
    s->index_mask = n_index - 1;
    for (uint32_t i = 0; i < c->max_streams; i++)
        s->slots[i].next_free = i + 1;
    s->next_id = c->binder ? 1 : 2;
    s->send_bytes = (int64_t)c->send_credit_bytes;
    s->recv_bytes = (int64_t)c->window_bytes;
    s->last_recv_us = now;
    s->next_ping_us = now + c->ping_us;
    s->next_deadline_us = UINT64_MAX;
    *ret_streams = s;
    return 0;
}

void td_streams_free(td_streams *s)
{
    if (!s)
        return;
    free(s->slots);
    free(s->index);
    free(s);
}

uint64_t td_streams_next_us(const td_streams *s)
{
    if (s->down)
        return UINT64_MAX;
    uint64_t at = TD_MIN(s->next_ping_us, s->last_recv_us + s->c.dead_us);
    return TD_MIN(at, s->next_deadline_us);
}

void td_streams_set_user(td_streams *s, uint64_t stream, void *user)
{
    slot *t = find(s, stream);
    if (t)
        t->user = user;
}

void *td_streams_user(const td_streams *s, uint64_t stream)
{
    const slot *t = find(s, stream);
    return t ? t->user : NULL;
}

int td_streams_can_send(const td_streams *s, uint64_t stream)
{
    const slot *t = find(s, stream);
    return t && !t->outgoing && !t->abort_code && !s->down && slot_can_send(s, t);
}

uint64_t td_streams_remaining_us(const td_streams *s, uint64_t stream, uint64_t now)
{
    const slot *t = find(s, stream);
    return t && t->deadline_us > now ? t->deadline_us - now : 0;
}

int td_streams_is_down(const td_streams *s)
{
    return s->down != 0;
}

int td_streams_is_draining(const td_streams *s)
{
    return s->peer_draining;
}

uint32_t td_streams_count(const td_streams *s)
{
    return s->n;
}

void td_streams_get_stats(const td_streams *s, td_streams_stats *ret_stats)
{
    *ret_stats = s->stats;
}
