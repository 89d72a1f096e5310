/* SPDX-License-Identifier: Apache-2.0 */
/* The network: control connections with the product's stream core at both ends, and the KV network
 * between workers. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "sim.h"

#include "base/bug.h"
#include "base/clock.h"
#include "base/hash.h"
#include "base/banned.h"

enum { WINDOW_BYTES = 1 << 20, REDIAL_US = 1000000 };

typedef struct packet {
    td_stream_frame frame;
    sim_body *body;
    sim_conn *conn;
    int end; /* towards */
} packet;

static void on_packet(sim *s, sim_event *e);
static void on_kv(sim *s, sim_event *e);
static void on_hello(sim *s, sim_event *e);

static sim_worker *worker_of(sim *s, const sim_conn *c)
{
    return &s->workers[c->worker];
}

/* The life of the worker that opened this connection goes on. */
static int is_alive(sim *s, const sim_conn *c)
{
    return worker_of(s, c)->up && worker_of(s, c)->boot == c->boot;
}

static int is_dark(sim *s, const sim_conn *c, int end)
{
    return s->now < worker_of(s, c)->dark_until[end];
}

static uint64_t delay(sim *s)
{
    uint64_t d = 30 + sim_below(s, 200);
    if (sim_fault(s, SIM_F_DELAY, 60))
        d += sim_below(s, 300 * TD_MS);
    return d;
}

static uint64_t arrival(sim *s, uint64_t *fifo_us, uint64_t bytes)
{
    uint64_t at = s->now + delay(s) + bytes / 100;
    if (sim_fault(s, SIM_F_REORDER, 150))
        return at;
    *fifo_us = TD_MAX(*fifo_us, at);
    return *fifo_us;
}

/* ---- control frames ---- */

static void packet_free(sim *s, packet *p)
{
    sim_body_unref(s, p->body);
    free(p);
}

static void post(sim *s, sim_conn *c, int end, const td_stream_frame *f, sim_body *body)
{
    packet *p = malloc(sizeof *p);
    TD_BUG_ON(!p);
    *p = (packet){*f, sim_body_ref(body), c, end};
    if (sim_fault(s, SIM_F_MALFORM, 800))
        p->frame.malformed = 1;
    sim_at(s, arrival(s, &c->fifo_us[end], 0), &(sim_event){.fn = on_packet, .p = p});
}

static void transmit(sim *s, sim_conn *c, int from, const td_stream_frame *f, sim_body *body)
{
    int end = !from;
    if (sim_fault(s, SIM_F_DROP, 400))
        return;
    if (is_dark(s, c, end)) /* the transport sends again when it can: late, often to a session that
                               is dead by then */
        c->fifo_us[end] = TD_MAX(c->fifo_us[end], worker_of(s, c)->dark_until[end]);
    post(s, c, end, f, body);
    if (sim_fault(s, SIM_F_DUP, 100))
        post(s, c, end, f, body);
}

static uint64_t body_bytes(const sim_body *b)
{
    return b ? 64 + b->n_runs * 32 : 16;
}

/* What goes with a frame that a step sends: the event's body, or the load report of a PING. */
static void send_frame(sim *s, sim_conn *c, int end, td_stream_frame *f, sim_body *body)
{
    int carries = f->type == TD_FRAME_CALL || f->type == TD_FRAME_DATA ||
                  f->type == TD_FRAME_BATCH ||
                  (f->type == TD_FRAME_STATUS && body && body->kind == SIM_STATUS);
    if (f->type == TD_FRAME_PING && end == SIM_WORKER_END) {
        sim_body *load = sim_body_new(s, SIM_LOAD);
        sim_worker_load(worker_of(s, c), load);
        transmit(s, c, end, f, load);
        sim_body_unref(s, load);
        return;
    }
    transmit(s, c, end, f, carries ? body : NULL);
}

static void close_end(sim_conn *c, int end)
{
    if (!c->streams[end])
        return;
    c->dead[end] = c->streams[end];
    c->streams[end] = NULL;
}

static void on_redial(sim *s, sim_event *e)
{
    sim_worker *w = &s->workers[e->worker];
    if (w->up && w->boot == e->a && !w->conn)
        sim_dial(s, w);
}

static void worker_down(sim *s, sim_conn *c)
{
    sim_worker *w = worker_of(s, c);
    if (w->conn != c)
        return;
    w->conn = NULL;
    sim_at(s, s->now + 20 * TD_MS + sim_below(s, 200 * TD_MS),
           &(sim_event){.fn = on_redial, .worker = w->index, .a = w->boot});
}

static void up_router(sim *s, sim_conn *c, const td_stream_up *u, const sim_body *body)
{
    td_streams *st = c->streams[SIM_ROUTER_END];
    switch (u->type) {
    case TD_UP_DATA: {
        sim_leg *leg = st ? td_streams_user(st, u->stream) : NULL;
        if (leg)
            sim_router_data(s, c, u->stream, leg, body);
        break;
    }
    case TD_UP_STATUS:
        if (u->local && u->code == TD_DATA_LOSS)
            s->tally->gaps++;
        sim_router_status(s, c, u->user, u->code,
                          u->local || !body || body->kind != SIM_STATUS ? NULL : body);
        break;
    case TD_UP_GOAWAY:
        sim_router_goaway(s, c);
        break;
    case TD_UP_DOWN:
        close_end(c, SIM_ROUTER_END);
        sim_router_down(s, c, u->why);
        break;
    default:
        sim_fail(s, "the router's stream core says %d", (int)u->type);
    }
}

static void up_worker(sim *s, sim_conn *c, const td_stream_up *u, const sim_body *body)
{
    sim_worker *w = worker_of(s, c);
    switch (u->type) {
    case TD_UP_CALL:
        if (w->is_decode)
            sim_decode_call(s, w, c, u->stream, body);
        else
            sim_prefill_call(s, w, c, u->stream, body);
        break;
    case TD_UP_ABORT:
        if (w->is_decode)
            sim_decode_abort(s, w, c, u->stream, u->code);
        else
            sim_prefill_abort(s, w, c, u->stream, u->code);
        break;
    case TD_UP_CREDIT:
        if (w->is_decode)
            sim_decode_credit(s, w, c, u->stream);
        break;
    case TD_UP_DOWN:
        close_end(c, SIM_WORKER_END);
        worker_down(s, c);
        break;
    default:
        break;
    }
}

static void on_tick(sim *s, sim_event *e);

static void arm_tick(sim *s, sim_conn *c, int end)
{
    uint64_t at = td_streams_next_us(c->streams[end]);
    if (at == UINT64_MAX || (c->tick_us[end] && c->tick_us[end] <= at))
        return;
    c->tick_us[end] = at;
    sim_at(s, at, &(sim_event){.fn = on_tick, .a = at, .b = (uint64_t)end, .p = c});
}

int sim_step_r(sim *s, sim_conn *c, int end, const td_stream_event *ev, sim_body *body,
               uint64_t *ret_stream, uint32_t *ret_sequence)
{
    td_streams *st = c->streams[end];
    td_stream_out out;
    td_stream_event more = {.type = TD_EV_MORE};
    int r = td_streams_step(st, ev, s->now, &out);
    if (ret_stream)
        *ret_stream = out.stream;
    if (ret_sequence)
        *ret_sequence = out.sequence;
    for (;;) {
        for (uint32_t i = 0; i < out.n_send; i++)
            send_frame(s, c, end, &out.send[i], body);
        for (uint32_t i = 0; i < out.n_up; i++) {
            if (end == SIM_ROUTER_END)
                up_router(s, c, &out.up[i], body);
            else
                up_worker(s, c, &out.up[i], body);
        }
        if (!out.more || c->streams[end] != st)
            break;
        td_streams_step(st, &more, s->now, &out);
    }
    if (c->streams[end] == st)
        arm_tick(s, c, end);
    return r;
}

void sim_step(sim *s, sim_conn *c, int end, const td_stream_event *ev, sim_body *body)
{
    if (c->streams[end])
        sim_step_r(s, c, end, ev, body, NULL, NULL);
}

/* Events of a worker wait while it is frozen. 1: put off. */
static int put_off(sim *s, const sim_worker *w, const sim_event *e)
{
    if (s->now >= w->frozen_until)
        return 0;
    sim_at(s, w->frozen_until, e);
    return 1;
}

static void on_tick(sim *s, sim_event *e)
{
    sim_conn *c = e->p;
    int end = (int)e->b;
    if (c->tick_us[end] != e->a || !c->streams[end])
        return;
    if (end == SIM_WORKER_END && put_off(s, worker_of(s, c), e))
        return;
    c->tick_us[end] = 0;
    td_stream_event ev = {.type = TD_EV_TICK, .lag_us = s->now - e->a};
    sim_step(s, c, end, &ev, NULL);
}

void sim_conn_lost(sim *s, sim_conn *c, int end)
{
    td_stream_event ev = {.type = TD_EV_LOST};
    sim_step(s, c, end, &ev, NULL);
}

/* The router answers frames of a session it does not know: the worker dials again. */
static void on_reset(sim *s, sim_event *e)
{
    sim_conn *c = e->p;
    td_stream_event ev = {
        .type = TD_EV_RECV,
        .frame = {.type = TD_FRAME_STATUS, .session = c->number, .code = TD_UNAVAILABLE}};
    if (is_alive(s, c) && !put_off(s, worker_of(s, c), e))
        sim_step(s, c, SIM_WORKER_END, &ev, NULL);
}

static void deliver_batch(sim *s, packet *p)
{
    td_stream_event ev = {.type = TD_EV_RECV, .frame = p->frame};
    if (sim_step_r(s, p->conn, p->end, &ev, NULL, NULL, NULL) < 0)
        return;
    for (uint32_t i = 0; i < p->body->n_items && p->conn->streams[p->end]; i++) {
        sim_body *b = p->body->items[i].body;
        td_stream_event item = {.type = TD_EV_RECV,
                                .batched = 1,
                                .frame = {.type = TD_FRAME_DATA,
                                          .stream = p->body->items[i].stream,
                                          .sequence = p->body->items[i].sequence,
                                          .session = p->frame.session,
                                          .bytes = body_bytes(b)}};
        sim_step_r(s, p->conn, p->end, &item, b, NULL, NULL);
    }
    if (!p->frame.malformed)
        sim_router_load(s, p->conn, p->body);
}

static void on_packet(sim *s, sim_event *e)
{
    packet *p = e->p;
    sim_conn *c = p->conn;
    if (p->end == SIM_WORKER_END && is_alive(s, c) && put_off(s, worker_of(s, c), e))
        return;
    if (p->end == SIM_WORKER_END && !is_alive(s, c)) {
        packet_free(s, p);
        return;
    }
    if (!c->streams[p->end]) {
        if (p->end == SIM_ROUTER_END && is_alive(s, c) && !is_dark(s, c, SIM_WORKER_END))
            sim_at(s, s->now + delay(s), &(sim_event){.fn = on_reset, .p = c});
        packet_free(s, p);
        return;
    }
    if (p->frame.type == TD_FRAME_BATCH) {
        deliver_batch(s, p);
    } else {
        td_stream_event ev = {.type = TD_EV_RECV, .frame = p->frame};
        if (p->frame.type == TD_FRAME_PING && p->end == SIM_ROUTER_END && !p->frame.malformed)
            sim_router_load(s, c, p->body);
        sim_step_r(s, c, p->end, &ev, p->body, NULL, NULL);
    }
    packet_free(s, p);
}

/* ---- HELLO and WELCOME ---- */

static td_streams *new_streams(sim *s, const sim_conn *c, int binder)
{
    td_streams_config config = {
        .binder = binder,
        .session = c->number,
        .max_streams = SIM_STREAMS_MAX,
        .ping_us = 250 * TD_MS,
        .dead_us = TD_S,
        .lag_us = 250 * TD_MS,
        .cancel_grace_us = 5 * TD_S,
        .send_credit_bytes = binder ? 0 : WINDOW_BYTES,
        .window_bytes = WINDOW_BYTES,
        .max_message_bytes = 1 << 16,
    };
    td_streams *st = NULL;
    TD_BUG_ON(td_streams_new(&config, s->now, &st) < 0);
    return st;
}

static void start(sim *s, sim_conn *c, int end)
{
    c->streams[end] = new_streams(s, c, end == SIM_ROUTER_END);
    td_stream_event ev = {.type = TD_EV_START};
    sim_step(s, c, end, &ev, NULL);
}

static void on_welcome(sim *s, sim_event *e)
{
    sim_conn *c = e->p;
    if (!is_alive(s, c) || worker_of(s, c)->conn != c || c->streams[SIM_WORKER_END] ||
        c->dead[SIM_WORKER_END])
        return;
    if (!put_off(s, worker_of(s, c), e))
        start(s, c, SIM_WORKER_END);
}

static void on_hello(sim *s, sim_event *e)
{
    sim_conn *c = e->p;
    if (c->streams[SIM_ROUTER_END] || c->dead[SIM_ROUTER_END])
        return;
    TD_LIST_FOR (l, &s->conns) { /* a newer connection of the same worker ends the older one */
        sim_conn *old = TD_LIST_ENTRY(l, sim_conn, link);
        if (old != c && old->worker == c->worker && old->number < c->number)
            sim_conn_lost(s, old, SIM_ROUTER_END);
    }
    if (!sim_router_hello(s, c))
        return;
    start(s, c, SIM_ROUTER_END);
    if (is_dark(s, c, SIM_WORKER_END) || sim_fault(s, SIM_F_DROP, 400))
        return;
    /* frames follow WELCOME on the same connection: it keeps its place in the line */
    uint64_t at = TD_MAX(s->now + delay(s), c->fifo_us[SIM_WORKER_END]);
    c->fifo_us[SIM_WORKER_END] = at;
    sim_at(s, at, &(sim_event){.fn = on_welcome, .p = c});
}

/* No WELCOME came. */
static void on_handshake_timeout(sim *s, sim_event *e)
{
    sim_conn *c = e->p;
    sim_worker *w = worker_of(s, c);
    if (!is_alive(s, c) || w->conn != c || c->streams[SIM_WORKER_END] || put_off(s, w, e))
        return;
    w->conn = NULL;
    sim_dial(s, w);
}

void sim_dial(sim *s, sim_worker *w)
{
    sim_conn *c = calloc(1, sizeof *c);
    TD_BUG_ON(!c);
    c->number = ++s->next_session;
    c->worker = w->index;
    c->boot = w->boot;
    td_list_add(&s->conns, &c->link);
    w->conn = c;
    if (!is_dark(s, c, SIM_ROUTER_END))
        sim_at(s, s->now + delay(s), &(sim_event){.fn = on_hello, .p = c});
    sim_at(s, s->now + REDIAL_US, &(sim_event){.fn = on_handshake_timeout, .p = c});
}

/* ---- calls on a worker ---- */

void sim_finish_call(sim *s, sim_conn *c, uint64_t stream, uint32_t code, td_error error)
{
    if (!c->streams[SIM_WORKER_END])
        return;
    sim_body *b = sim_body_new(s, SIM_STATUS);
    b->error = error;
    td_stream_event ev = {.type = TD_EV_FINISH, .stream = stream, .code = code};
    sim_step(s, c, SIM_WORKER_END, &ev, b);
    sim_body_unref(s, b);
}

int sim_send(sim *s, sim_conn *c, uint64_t stream, sim_body *body)
{
    if (!c->streams[SIM_WORKER_END])
        return -ECANCELED;
    td_stream_event ev = {.type = TD_EV_SEND, .stream = stream, .bytes = body_bytes(body)};
    return sim_step_r(s, c, SIM_WORKER_END, &ev, body, NULL, NULL);
}

int sim_send_batched(sim *s, sim_conn *c, uint64_t stream, const sim_body *body,
                     uint32_t *ret_sequence)
{
    if (!c->streams[SIM_WORKER_END])
        return -ECANCELED;
    td_stream_event ev = {
        .type = TD_EV_SEND, .stream = stream, .bytes = body_bytes(body), .batched = 1};
    return sim_step_r(s, c, SIM_WORKER_END, &ev, NULL, NULL, ret_sequence);
}

/* ---- KV ---- */

static void kv_post(sim *s, sim_kv *m, uint64_t at)
{
    s->n_kv++;
    sim_at(s, at, &(sim_event){.fn = on_kv, .p = m});
}

static sim_kv *kv_copy(const sim_kv *m)
{
    sim_kv *k = malloc(sizeof *k);
    TD_BUG_ON(!k);
    *k = *m;
    return k;
}

void sim_kv_send(sim *s, const sim_kv *m)
{
    sim_worker *from = &s->workers[m->from], *to = &s->workers[m->to];
    sim_kv *k = kv_copy(m);
    k->from_boot = from->boot;
    k->gen = m->kind == SIM_KV_ACK ? 0 : from->kv_gen[m->to];
    kv_post(s, k, arrival(s, &to->kv_fifo_us[m->from], m->kind == SIM_KV_ACK ? 0 : m->bytes));
}

/* The sender's memory is read when the network lets go of it. */
static void read_payload(sim *s, sim_kv *m)
{
    const sim_worker *from = &s->workers[m->from];
    for (uint32_t i = 0; i < m->n_runs; i++)
        m->payload[i] = from->pool.content[m->src[i]][m->group];
}

static void kv_arrives(sim *s, sim_kv *m)
{
    sim_worker *to = &s->workers[m->to];
    if (!to->up)
        return;
    if (to->is_decode)
        sim_decode_kv(s, to, m);
    else
        sim_prefill_kv(s, to, m);
}

static void on_kv(sim *s, sim_event *e)
{
    sim_kv *m = e->p;
    sim_worker *from = &s->workers[m->from], *to = &s->workers[m->to];
    if (to->up && put_off(s, to, e))
        return;
    int from_here = from->up && from->boot == m->from_boot;
    int gone = m->kind != SIM_KV_ACK && (!from_here || m->gen != from->kv_gen[m->to]);
    if (m->kind == SIM_KV_SEGMENT && !m->copy && !gone) {
        read_payload(s, m);
        sim_prefill_flight(s, from, m);
    }
    int lost = gone || sim_fault(s, SIM_F_KV_DROP, 150);
    if (!lost && !m->copy && sim_fault(s, SIM_F_DUP, 6)) {
        sim_kv *k = kv_copy(m);
        k->copy = 1;
        kv_post(s, k, s->now + sim_below(s, sim_below(s, 2) ? 100 : 20 * TD_MS));
    }
    if (!lost && m->kind == SIM_KV_SEGMENT && sim_fault(s, SIM_F_KV_FLIP, 60))
        m->payload[sim_below(s, m->n_runs)] ^= 1ull << sim_below(s, 64);
    s->n_kv--;
    if (!lost)
        kv_arrives(s, m);
    free(m);
}

/* ---- end of the world ---- */

void sim_net_close(sim *s)
{
    TD_LIST_FOR (l, &s->conns) {
        sim_conn *c = TD_LIST_ENTRY(l, sim_conn, link);
        for (int end = 0; end < 2; end++) {
            td_streams_stats stats;
            if (!c->streams[end] && !c->dead[end])
                continue;
            td_streams_get_stats(c->streams[end] ? c->streams[end] : c->dead[end], &stats);
            s->tally->late += stats.late;
        }
    }
}

void sim_net_discard(sim *s, const sim_event *e)
{
    if (e->fn == on_packet)
        packet_free(s, e->p);
    else if (e->fn == on_kv)
        free(e->p);
}

void sim_net_free(sim *s)
{
    TD_LIST_FOR (l, &s->conns) {
        sim_conn *c = TD_LIST_ENTRY(l, sim_conn, link);
        for (int end = 0; end < 2; end++) {
            td_streams_free(c->streams[end]);
            td_streams_free(c->dead[end]);
        }
        td_list_del(l);
        free(c);
    }
}
