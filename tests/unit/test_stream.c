/* SPDX-License-Identifier: Apache-2.0 */
/* rpc/stream.h: the promises of the header, by example and by two ends on a lossy model network. */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/bug.h"
#include "rpc/stream.h"

/* ---- a two-sided model ---- */

enum { MAX_CALLS = 64, MAX_NET = 4096, WINDOW = 2000, MAX_MESSAGE = 700, STREAM_CREDIT = 4 };

typedef struct packet {
    td_stream_frame f;
    uint64_t at_us;
    uint32_t value;   /* CALL: number of the call; DATA: index of the message */
    uint32_t n_items; /* BATCH */
    struct {
        uint64_t stream;
        uint32_t sequence, value, bytes;
    } items[8];
} packet;

typedef struct call {
    uint32_t total; /* messages that the callee will send */
    uint32_t code;  /* with which it will finish */
    int caller;     /* end that opened it */
    uint64_t stream;
    /* caller */
    uint32_t received, n_status, status, n_cancel, n_cancel_sent;
    int local;
    /* callee */
    int known, aborted, finished, waiting;
    uint32_t sent;
    uint64_t granted;
} call;

typedef struct end {
    td_streams *s;
    uint64_t granted_bytes, sent_bytes; /* as a checker outside the core counts them */
    uint32_t n_down;
} end;

typedef struct world {
    uint64_t rng, now;
    end e[2];
    packet net[2][MAX_NET]; /* towards e[i]; in order */
    uint32_t n_net[2];
    call calls[MAX_CALLS];
    uint32_t n_calls;
    unsigned drop, dup, reorder, cancel, manual; /* per mille */
    int cut;                                     /* nothing is delivered any more */
} world;

static uint64_t rnd(world *w, uint64_t n)
{
    w->rng = w->rng * 6364136223846793005ull + 1442695040888963407ull;
    return (w->rng >> 33) % n;
}

static int chance(world *w, unsigned per_mille)
{
    return rnd(w, 1000) < per_mille;
}

static call *call_of(world *w, int caller, uint64_t stream)
{
    for (uint32_t i = 0; i < w->n_calls; i++)
        if (w->calls[i].caller == caller && w->calls[i].stream == stream)
            return &w->calls[i];
    return NULL;
}

static void net_put(world *w, int to, const packet *p)
{
    assert_true(w->n_net[to] < MAX_NET);
    uint32_t n = w->n_net[to]++;
    w->net[to][n] = *p;
    w->net[to][n].at_us = w->now + 50 + rnd(w, 100);
    if (n && w->net[to][n].at_us < w->net[to][n - 1].at_us)
        w->net[to][n].at_us = w->net[to][n - 1].at_us;
    if (n && chance(w, w->reorder)) {
        packet t = w->net[to][n];
        w->net[to][n] = w->net[to][n - 1];
        w->net[to][n - 1] = t;
    }
}

static void transmit(world *w, int from, const packet *p)
{
    if (w->cut || chance(w, w->drop))
        return;
    net_put(w, !from, p);
    if (chance(w, w->dup))
        net_put(w, !from, p);
}

static void note_sent(world *w, int from, const td_stream_frame *f)
{
    call *c = call_of(w, f->type == TD_FRAME_CREDIT ? from : !from, f->stream);
    if (f->type == TD_FRAME_CREDIT && f->stream == 0)
        w->e[!from].granted_bytes += f->bytes;
    else if (f->type == TD_FRAME_CREDIT)
        c->granted += f->messages;
    if (f->type == TD_FRAME_CANCEL)
        assert_int_equal(call_of(w, from, f->stream)->n_cancel_sent++, 0);
    if (f->type == TD_FRAME_STATUS && c)
        assert_true(c->finished || !c->known); /* only FINISH or a refusal makes one */
}

static void step(world *w, int side, td_stream_event ev, const packet *in, td_stream_out *out);

/* The caller consumes at once or, as a slow one, later in pump(). */
static void deliver(world *w, int side, uint64_t stream, uint32_t value)
{
    call *c = call_of(w, side, stream);
    assert_non_null(c);
    assert_int_equal(c->n_status, 0);
    assert_int_equal(value, c->received); /* in order, once */
    c->received++;
    td_stream_out out;
    if (!chance(w, w->manual))
        step(w, side, (td_stream_event){.type = TD_EV_CONSUME, .stream = stream, .messages = 1},
             NULL, &out);
}

static void callee_finish(world *w, int side, call *c)
{
    td_stream_out out;
    c->finished = 1;
    step(w, side, (td_stream_event){.type = TD_EV_FINISH, .stream = c->stream, .code = c->code},
         NULL, &out);
}

static void up(world *w, int side, const td_stream_up *u, const packet *in)
{
    call *c;
    switch (u->type) {
    case TD_UP_CALL:
        c = &w->calls[in->value];
        assert_int_equal(c->known, 0); /* a call arrives once */
        c->known = 1;
        td_streams_set_user(w->e[side].s, u->stream, c);
        break;
    case TD_UP_DATA:
        deliver(w, side, u->stream, in->value);
        break;
    case TD_UP_STATUS:
        c = call_of(w, side, u->stream);
        assert_ptr_equal(u->user, c);
        assert_int_equal(c->n_status, 0); /* exactly one */
        c->n_status++;
        c->status = u->code;
        c->local = u->local;
        if (u->code == TD_OK)
            assert_int_equal(c->received, c->total);
        break;
    case TD_UP_ABORT:
        c = td_streams_user(w->e[side].s, u->stream);
        assert_int_equal(c->aborted, 0);
        c->aborted = 1;
        break;
    case TD_UP_CREDIT:
        c = td_streams_user(w->e[side].s, u->stream);
        assert_int_equal(c->waiting, 1);
        c->waiting = 0;
        break;
    case TD_UP_GOAWAY:
        break;
    case TD_UP_DOWN:
        assert_int_equal(w->e[side].n_down++, 0);
        for (uint32_t i = 0; i < w->n_calls; i++) /* every call had its end before */
            if (w->calls[i].caller == side)
                assert_int_equal(w->calls[i].n_status, 1);
    }
}

/* One event and everything that follows from it; `in` is what carried a body. */
static void step(world *w, int side, td_stream_event ev, const packet *in, td_stream_out *out)
{
    packet p = in ? *in : (packet){0};
    td_stream_out more;
    td_streams_step(w->e[side].s, &ev, w->now, out);
    for (td_stream_out *o = out;; o = &more) {
        for (uint32_t i = 0; i < o->n_send; i++) {
            p.f = o->send[i];
            note_sent(w, side, &p.f);
            transmit(w, side, &p);
        }
        for (uint32_t i = 0; i < o->n_up; i++)
            up(w, side, &o->up[i], in);
        if (!o->more)
            break;
        td_streams_step(w->e[side].s, &(td_stream_event){.type = TD_EV_MORE}, w->now, &more);
    }
}

static void receive(world *w, int side, const packet *p)
{
    td_stream_out out;
    int r = td_streams_step(w->e[side].s, &(td_stream_event){.type = TD_EV_MORE}, w->now, &out);
    assert_int_equal(out.n_send + out.n_up, 0); /* nothing is ever left behind */
    if (p->f.type != TD_FRAME_BATCH) {
        step(w, side, (td_stream_event){.type = TD_EV_RECV, .frame = p->f}, p, &out);
        return;
    }
    td_stream_event ev = {.type = TD_EV_RECV, .frame = p->f};
    r = td_streams_step(w->e[side].s, &ev, w->now, &out);
    for (uint32_t i = 0; i < out.n_up; i++)
        up(w, side, &out.up[i], p);
    while (out.more) {
        td_streams_step(w->e[side].s, &(td_stream_event){.type = TD_EV_MORE}, w->now, &out);
        for (uint32_t i = 0; i < out.n_up; i++)
            up(w, side, &out.up[i], p);
    }
    for (uint32_t i = 0; r == 0 && i < p->n_items; i++) {
        packet item = {.value = p->items[i].value};
        td_stream_frame f = {.type = TD_FRAME_DATA,
                             .stream = p->items[i].stream,
                             .sequence = p->items[i].sequence,
                             .session = p->f.session,
                             .bytes = p->items[i].bytes};
        step(w, side, (td_stream_event){.type = TD_EV_RECV, .frame = f, .batched = 1}, &item, &out);
    }
}

static void open_call(world *w, int side)
{
    if (w->n_calls == MAX_CALLS)
        return;
    call *c = &w->calls[w->n_calls];
    *c = (call){.caller = side,
                .total = (uint32_t)rnd(w, 14),
                .code = chance(w, 100) ? TD_INTERNAL : TD_OK,
                .granted = STREAM_CREDIT};
    packet p = {.value = w->n_calls};
    td_stream_out out;
    td_stream_event ev = {.type = TD_EV_OPEN,
                          .timeout_us = 200000 + rnd(w, 400000),
                          .credit = STREAM_CREDIT,
                          .user = c};
    int r = td_streams_step(w->e[side].s, &ev, w->now, &out);
    if (r < 0) {
        assert_true(r == -ENOBUFS || r == -ENOTCONN);
        return;
    }
    c->stream = out.stream;
    assert_int_equal(out.stream & 1, side == 0);
    w->n_calls++;
    p.f = out.send[0];
    transmit(w, side, &p);
}

/* Callee work on one call: one message, or the end. Batched messages are put into *batch. */
static void work(world *w, int side, call *c, packet *batch)
{
    td_stream_out out;
    if (c->aborted || (c->sent == c->total && !chance(w, 500))) {
        callee_finish(w, side, c);
        return;
    }
    if (c->waiting || c->sent == c->total)
        return;
    end *e = &w->e[side];
    int batched = batch && batch->n_items < 8;
    uint64_t bytes = 1 + rnd(w, MAX_MESSAGE);
    td_stream_event ev = {
        .type = TD_EV_SEND, .stream = c->stream, .bytes = bytes, .batched = batched};
    int r = td_streams_step(e->s, &ev, w->now, &out);
    if (r == -EAGAIN) {
        c->waiting = 1;
        return;
    }
    if (r == -ECANCELED)
        return;
    assert_int_equal(r, 0);
    assert_true(e->sent_bytes < e->granted_bytes); /* only the last message overdraws */
    assert_true(c->sent < c->granted);
    e->sent_bytes += bytes;
    packet p = {.value = c->sent++};
    if (!batched) {
        p.f = out.send[0];
        transmit(w, side, &p);
        return;
    }
    batch->items[batch->n_items].stream = c->stream;
    batch->items[batch->n_items].sequence = out.sequence;
    batch->items[batch->n_items].bytes = (uint32_t)bytes;
    batch->items[batch->n_items++].value = p.value;
}

static void work_all(world *w, int side)
{
    td_stream_out out;
    packet batch = {0};
    int use_batch = chance(w, 500);
    for (uint32_t i = 0; i < w->n_calls; i++) {
        call *c = &w->calls[i];
        /* FINISH would overtake what lies in the batch: a shell ends the batch first */
        int ends = c->aborted || c->sent == c->total;
        if (c->caller == side || !c->known || c->finished || !chance(w, 400) || (use_batch && ends))
            continue;
        work(w, side, c, use_batch ? &batch : NULL);
    }
    if (!batch.n_items)
        return;
    td_streams_step(w->e[side].s, &(td_stream_event){.type = TD_EV_BATCH}, w->now, &out);
    if (out.n_send) {
        batch.f = out.send[0];
        transmit(w, side, &batch);
    }
}

static void caller_moves(world *w, int side)
{
    td_stream_out out;
    for (uint32_t i = 0; i < w->n_calls; i++) {
        call *c = &w->calls[i];
        if (c->caller != side)
            continue;
        if (chance(w, w->cancel)) {
            step(w, side, (td_stream_event){.type = TD_EV_CANCEL, .stream = c->stream}, NULL, &out);
            for (uint32_t k = 0; k < out.n_up; k++)
                assert_int_not_equal(out.up[k].type, TD_UP_STATUS); /* never from inside */
            c->n_cancel++;
        }
        if (w->manual && chance(w, 200))
            step(w, side,
                 (td_stream_event){.type = TD_EV_CONSUME, .stream = c->stream, .messages = 3}, NULL,
                 &out);
    }
}

static void pump(world *w, int side)
{
    uint32_t n = 0;
    while (n < w->n_net[side] && w->net[side][n].at_us <= w->now)
        n++;
    packet *ready = calloc(n + 1, sizeof *ready);
    memcpy(ready, w->net[side], n * sizeof *ready);
    w->n_net[side] -= n;
    memmove(w->net[side], w->net[side] + n, w->n_net[side] * sizeof *ready);
    for (uint32_t i = 0; i < n && !w->cut; i++)
        receive(w, side, &ready[i]);
    free(ready);
    td_stream_out out;
    if (td_streams_next_us(w->e[side].s) <= w->now)
        step(w, side, (td_stream_event){.type = TD_EV_TICK}, NULL, &out);
}

static td_streams_config config_of(int binder)
{
    return (td_streams_config){.binder = binder,
                               .session = 7,
                               .max_streams = 24,
                               .ping_us = 20000,
                               .dead_us = 100000,
                               .lag_us = 250000,
                               .cancel_grace_us = 100000,
                               .send_credit_bytes = binder ? 0 : WINDOW,
                               .window_bytes = WINDOW,
                               .max_message_bytes = MAX_MESSAGE};
}

static world *world_new(uint64_t seed)
{
    world *w = calloc(1, sizeof *w);
    assert_non_null(w);
    w->rng = seed * 2654435761u + 1;
    for (int side = 0; side < 2; side++) {
        td_streams_config c = config_of(side == 0);
        assert_int_equal(td_streams_new(&c, w->now, &w->e[side].s), 0);
        w->e[side].granted_bytes = c.send_credit_bytes;
    }
    td_stream_out out;
    for (int side = 0; side < 2; side++)
        step(w, side, (td_stream_event){.type = TD_EV_START}, NULL, &out);
    return w;
}

static void world_free(world *w)
{
    td_streams_free(w->e[0].s);
    td_streams_free(w->e[1].s);
    free(w);
}

static void run(world *w, uint64_t until_us, int opening)
{
    for (; w->now < until_us; w->now += 500)
        for (int side = 0; side < 2; side++) {
            pump(w, side);
            if (opening && chance(w, 150))
                open_call(w, side);
            work_all(w, side);
            caller_moves(w, side);
        }
}

/* Whatever happened: every call has had one STATUS, and both tables are empty. */
static void check_ended(world *w)
{
    for (uint32_t i = 0; i < w->n_calls; i++)
        assert_int_equal(w->calls[i].n_status, 1);
    assert_int_equal(td_streams_count(w->e[0].s), 0);
    assert_int_equal(td_streams_count(w->e[1].s), 0);
}

/* Promise: without faults and cancels, every call ends with the callee's code and all of its
 * messages. */
static void test_clean_network(void **state)
{
    for (uint64_t seed = 1; seed <= 40; seed++) {
        world *w = world_new(seed);
        w->manual = seed % 3 == 0 ? 500 : 0;
        run(w, 60000, 1);
        run(w, 1200000, 0);
        check_ended(w);
        assert_true(w->n_calls > 20);
        for (uint32_t i = 0; i < w->n_calls; i++) {
            assert_int_equal(w->calls[i].status, w->calls[i].code);
            assert_int_equal(w->calls[i].received, w->calls[i].total);
        }
        world_free(w);
    }
}

/* Promise: one STATUS each, order, no duplicates, credit kept, whatever the network does (asserted
 * on the way). */
static void test_faulty_network(void **state)
{
    static const struct {
        unsigned drop, dup, reorder, cancel;
    } kinds[] = {{20, 0, 0, 0}, {0, 50, 0, 0}, {0, 0, 50, 0}, {0, 0, 0, 5}, {5, 20, 10, 5}};
    for (uint64_t seed = 1; seed <= 300; seed++) {
        world *w = world_new(seed);
        size_t k = seed % TD_ARRAY_LEN(kinds);
        w->drop = kinds[k].drop;
        w->dup = kinds[k].dup;
        w->reorder = kinds[k].reorder;
        w->cancel = kinds[k].cancel;
        run(w, 60000, 1);
        run(w, 1500000, 0);
        check_ended(w);
        world_free(w);
    }
}

/* Promise: death of the peer is UNAVAILABLE on every open call, at the end of dead_us, once, on
 * both sides. */
static void test_cut(void **state)
{
    for (uint64_t seed = 1; seed <= 60; seed++) {
        world *w = world_new(seed);
        run(w, 1000 + seed * 700, 1);
        w->cut = 1;
        uint64_t cut = w->now;
        run(w, cut + 90000, 0);
        assert_int_equal(td_streams_is_down(w->e[0].s), 0);
        run(w, cut + 110000, 0);
        assert_int_equal(td_streams_is_down(w->e[0].s), 1);
        assert_int_equal(td_streams_is_down(w->e[1].s), 1);
        run(w, cut + 120000, 1);
        check_ended(w);
        assert_int_equal(w->e[0].n_down, 1);
        for (uint32_t i = 0; i < w->n_calls; i++)
            if (w->calls[i].local)
                assert_int_equal(w->calls[i].status, TD_UNAVAILABLE);
        world_free(w);
    }
}

/* ---- single rules ---- */

static td_streams *one(int binder)
{
    td_streams *s;
    td_streams_config c = config_of(binder);
    assert_int_equal(td_streams_new(&c, 0, &s), 0);
    return s;
}

static td_stream_out recv(td_streams *s, uint64_t now, td_stream_frame f)
{
    td_stream_out out;
    if (!f.session)
        f.session = 7;
    td_streams_step(s, &(td_stream_event){.type = TD_EV_RECV, .frame = f}, now, &out);
    return out;
}

/* Bug guarded: a peer's CALL with our parity, an old id, no time, or a lost beginning must not open
 * a stream. */
static void test_bad_calls(void **state)
{
    td_streams *s = one(1);
    td_stream_out o =
        recv(s, 1, (td_stream_frame){.type = TD_FRAME_CALL, .stream = 4, .timeout_ms = 5});
    assert_int_equal(o.up[0].type, TD_UP_CALL);
    o = recv(s, 1, (td_stream_frame){.type = TD_FRAME_CALL, .stream = 2, .timeout_ms = 5});
    assert_int_equal(o.n_up + o.n_send, 0);
    o = recv(s, 1, (td_stream_frame){.type = TD_FRAME_CALL, .stream = 6, .timeout_ms = 0});
    assert_int_equal(o.send[0].type, TD_FRAME_STATUS);
    assert_int_equal(o.send[0].code, TD_INVALID_ARGUMENT);
    o = recv(s, 1, (td_stream_frame){.type = TD_FRAME_CANCEL, .stream = 8, .sequence = 1});
    assert_int_equal(o.send[0].code, TD_DATA_LOSS);
    o = recv(s, 1, (td_stream_frame){.type = TD_FRAME_CALL, .stream = 10, .malformed = 1});
    assert_int_equal(o.send[0].code, TD_INTERNAL);
    assert_int_equal(td_streams_count(s), 1);
    o = recv(s, 1, (td_stream_frame){.type = TD_FRAME_CALL, .stream = 3, .timeout_ms = 5});
    assert_int_equal(o.up[0].type, TD_UP_ABORT);
    assert_int_equal(o.up[1].type, TD_UP_DOWN);
    assert_int_equal(o.up[1].why, TD_DOWN_PROTOCOL);
    td_streams_free(s);
}

/* Promise: frames of another session change nothing (fencing). */
static void test_fencing(void **state)
{
    td_streams *s = one(1);
    td_stream_out o = recv(
        s, 1, (td_stream_frame){.type = TD_FRAME_CALL, .stream = 2, .timeout_ms = 5, .session = 6});
    assert_int_equal(o.n_up + o.n_send, 0);
    td_streams_stats st;
    td_streams_get_stats(s, &st);
    assert_int_equal(st.stale, 1);
    td_streams_free(s);
}

/* Promise: a late observer never accuses; without lag, silence is death. */
static void test_lag(void **state)
{
    td_streams *s = one(1);
    td_stream_out o;
    td_streams_step(s, &(td_stream_event){.type = TD_EV_TICK, .lag_us = 250000}, 500000, &o);
    assert_int_equal(td_streams_is_down(s), 0);
    td_streams_step(s, &(td_stream_event){.type = TD_EV_TICK}, 599999, &o);
    assert_int_equal(td_streams_is_down(s), 0);
    td_streams_step(s, &(td_stream_event){.type = TD_EV_TICK}, 600000, &o);
    assert_int_equal(td_streams_is_down(s), 1);
    assert_int_equal(o.up[0].why, TD_DOWN_SILENCE);
    td_streams_free(s);
}

/* Promise: a deadline passes on both sides; a cancelled callee's OK reads CANCELLED. */
static void test_deadline_and_cancel(void **state)
{
    td_streams *s = one(1);
    td_stream_out o;
    recv(s, 0, (td_stream_frame){.type = TD_FRAME_CALL, .stream = 2, .timeout_ms = 10});
    recv(s, 0, (td_stream_frame){.type = TD_FRAME_CALL, .stream = 4, .timeout_ms = 50});
    td_streams_step(s, &(td_stream_event){.type = TD_EV_OPEN, .timeout_us = 10000}, 0, &o);
    assert_int_equal(o.send[0].timeout_ms, 10);
    assert_int_equal(td_streams_next_us(s), 10000);
    td_streams_step(s, &(td_stream_event){.type = TD_EV_TICK}, 10000, &o);
    assert_int_equal(o.n_up, 2);
    for (uint32_t i = 0; i < 2; i++)
        assert_int_equal(o.up[i].code, TD_DEADLINE_EXCEEDED);
    assert_int_equal(o.send[o.n_send - 1].type, TD_FRAME_CANCEL);
    o = recv(s, 10001, (td_stream_frame){.type = TD_FRAME_CANCEL, .stream = 4, .sequence = 1});
    assert_int_equal(o.up[0].type, TD_UP_ABORT);
    o = recv(s, 10001, (td_stream_frame){.type = TD_FRAME_CANCEL, .stream = 4, .sequence = 2});
    assert_int_equal(o.n_up, 0);
    assert_int_equal(
        td_streams_step(s, &(td_stream_event){.type = TD_EV_SEND, .stream = 4, .bytes = 1}, 10001,
                        &o),
        -ECANCELED);
    td_streams_step(s, &(td_stream_event){.type = TD_EV_FINISH, .stream = 4, .code = TD_OK}, 10001,
                    &o);
    assert_int_equal(o.send[0].type, TD_FRAME_STATUS);
    assert_int_equal(o.send[0].code, TD_CANCELLED);
    assert_int_equal(
        td_streams_step(s, &(td_stream_event){.type = TD_EV_FINISH, .stream = 4}, 10001, &o),
        -ENOENT);
    td_streams_free(s);
}

/* Promise: a callee that ignores CANCEL cannot hold the caller: the STATUS is made here after the
 * grace. */
static void test_cancel_grace(void **state)
{
    td_streams *s = one(1);
    td_stream_out o;
    td_streams_step(s, &(td_stream_event){.type = TD_EV_OPEN, .timeout_us = 900000000}, 0, &o);
    td_streams_step(s, &(td_stream_event){.type = TD_EV_CANCEL, .stream = 1}, 10, &o);
    assert_int_equal(o.n_up, 0);
    for (uint64_t t = 50000; t < 100010; t += 25000) {
        recv(s, t, (td_stream_frame){.type = TD_FRAME_PONG, .sequence = (uint32_t)(t / 25000 - 2)});
        td_streams_step(s, &(td_stream_event){.type = TD_EV_TICK}, t, &o);
        assert_int_equal(o.n_up, 0);
    }
    td_streams_step(s, &(td_stream_event){.type = TD_EV_TICK}, 100010, &o);
    assert_int_equal(o.up[0].type, TD_UP_STATUS);
    assert_int_equal(o.up[0].code, TD_CANCELLED);
    assert_int_equal(td_streams_count(s), 0);
    td_streams_free(s);
}

/* Promise: GOAWAY ends the calls that the peer never took, and lets the others go on. */
static void test_goaway(void **state)
{
    td_streams *s = one(1);
    td_stream_out o;
    for (int i = 0; i < 3; i++)
        td_streams_step(s, &(td_stream_event){.type = TD_EV_OPEN, .timeout_us = 10000}, 0, &o);
    o = recv(s, 0, (td_stream_frame){.type = TD_FRAME_GOAWAY, .last_stream = 1, .timeout_ms = 100});
    assert_int_equal(o.up[0].type, TD_UP_GOAWAY);
    assert_int_equal(o.n_up, 3);
    assert_int_equal(td_streams_count(s), 1);
    assert_int_equal(
        td_streams_step(s, &(td_stream_event){.type = TD_EV_OPEN, .timeout_us = 1}, 0, &o),
        -ENOTCONN);
    o = recv(s, 0, (td_stream_frame){.type = TD_FRAME_GOAWAY, .sequence = 1});
    assert_int_equal(o.up[0].code, TD_UNAVAILABLE);
    assert_int_equal(o.up[1].type, TD_UP_DOWN);
    td_streams_free(s);
}

/* Bug guarded: more ends than one step's room (session death with a full table) must all come, by
 * TD_EV_MORE. */
static void test_more(void **state)
{
    td_streams *s = one(0);
    td_stream_out o;
    for (int i = 0; i < 24; i++)
        assert_int_equal(
            td_streams_step(s, &(td_stream_event){.type = TD_EV_OPEN, .timeout_us = 9999}, 0, &o),
            0);
    assert_int_equal(
        td_streams_step(s, &(td_stream_event){.type = TD_EV_OPEN, .timeout_us = 9999}, 0, &o),
        -ENOBUFS);
    td_streams_step(s, &(td_stream_event){.type = TD_EV_LOST}, 1, &o);
    uint32_t n = o.n_up;
    while (o.more) {
        td_streams_step(s, &(td_stream_event){.type = TD_EV_MORE}, 1, &o);
        n += o.n_up;
    }
    assert_int_equal(n, 25);
    assert_int_equal(o.up[o.n_up - 1].type, TD_UP_DOWN);
    td_streams_free(s);
}

/* Bug guarded: removal from the index must keep every other stream reachable, however the ids
 * collide. */
static void test_table(void **state)
{
    enum { N = 3000, TURNS = 20000 };
    static uint64_t ids[N];
    td_streams *s;
    td_stream_out o;
    world w = {.rng = 5};
    td_streams_config c = config_of(1);
    c.max_streams = N;
    assert_int_equal(td_streams_new(&c, 0, &s), 0);
    for (unsigned turn = 0; turn < TURNS; turn++) {
        uint64_t *id = &ids[rnd(&w, N)];
        if (*id) {
            recv(s, 1, (td_stream_frame){.type = TD_FRAME_STATUS, .stream = *id});
            *id = 0;
        } else {
            td_streams_step(
                s, &(td_stream_event){.type = TD_EV_OPEN, .timeout_us = 1000000, .user = id}, 0,
                &o);
            *id = o.stream;
        }
        if (turn % 1000 == 0)
            for (unsigned i = 0; i < N; i++)
                if (ids[i])
                    assert_ptr_equal(td_streams_user(s, ids[i]), &ids[i]);
    }
    td_streams_free(s);
}

/* Promise: a peer that sends past its credit is stopped: per stream, and for the session's bytes.
 */
static void test_peer_overdraws(void **state)
{
    td_streams *s = one(1);
    td_stream_out o;
    td_streams_step(s, &(td_stream_event){.type = TD_EV_OPEN, .timeout_us = 10000, .credit = 2}, 0,
                    &o);
    for (uint32_t i = 0; i < 2; i++)
        assert_int_equal(
            recv(s, 1,
                 (td_stream_frame){.type = TD_FRAME_DATA, .stream = 1, .sequence = i, .bytes = 1})
                .up[0]
                .type,
            TD_UP_DATA);
    o = recv(s, 1,
             (td_stream_frame){.type = TD_FRAME_DATA, .stream = 1, .sequence = 2, .bytes = 1});
    assert_int_equal(o.up[0].code, TD_RESOURCE_EXHAUSTED);
    assert_int_equal(o.send[0].type, TD_FRAME_CANCEL);
    td_streams_free(s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_clean_network),
        cmocka_unit_test(test_faulty_network),
        cmocka_unit_test(test_cut),
        cmocka_unit_test(test_bad_calls),
        cmocka_unit_test(test_fencing),
        cmocka_unit_test(test_lag),
        cmocka_unit_test(test_deadline_and_cancel),
        cmocka_unit_test(test_cancel_grace),
        cmocka_unit_test(test_goaway),
        cmocka_unit_test(test_more),
        cmocka_unit_test(test_table),
        cmocka_unit_test(test_peer_overdraws),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
