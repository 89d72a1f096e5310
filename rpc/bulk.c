/* SPDX-License-Identifier: Apache-2.0 */
#include "rpc/bulk.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <zmq.h>

#include "base/bug.h"
#include "rpc/sock.h"
#include "base/banned.h"

enum { BULK_HWM = 256, BULK_POLLS_MAX = 256 };

struct td_bulk {
    void *socket;
    td_link *link;
    int bound, broken;
    char endpoint[256];
    uint64_t dropped;
    uint32_t n_parts;
    zmq_msg_t parts[TD_BULK_PARTS_MAX];
};

static int bulk_open(const char *endpoint, int dial, td_link *link, const uint8_t *server_key,
                     td_bulk **ret_bulk, td_err *reterr_err)
{
    td_bulk *b = calloc(1, sizeof *b);
    if (!b)
        return td_err_set(reterr_err, -ENOMEM, "%s: out of memory", endpoint);
    b->bound = !dial;
    b->link = link;
    td_sock_config config = {.type = dial ? ZMQ_DEALER : ZMQ_ROUTER,
                             .dial = dial,
                             .max_frame_bytes = TD_BULK_PART_BYTES_MAX,
                             .hwm = BULK_HWM,
                             .link = link,
                             .plain = td_link_kv_private(link) && !server_key,
                             .door = TD_DOOR_KV,
                             .server_key = server_key};
    int r = td_sock_open(endpoint, &config, &b->socket, reterr_err);
    if (r == 0)
        r = td_sock_endpoint(b->socket, b->endpoint, sizeof b->endpoint);
    if (r < 0) {
        td_bulk_close(b);
        return r;
    }
    *ret_bulk = b;
    return 0;
}

int td_bulk_bind(const char *endpoint, td_link *link, td_bulk **ret_bulk, td_err *reterr_err)
{
    return bulk_open(endpoint, 0, link, NULL, ret_bulk, reterr_err);
}

int td_bulk_dial(const char *endpoint, td_link *link, const uint8_t *server_key, td_bulk **ret_bulk,
                 td_err *reterr_err)
{
    if (td_link_keys(link) && !server_key && !td_link_kv_private(link))
        return td_err_set(
            reterr_err, -EACCES,
            "%s: its ticket names no key, and our KV link is curve: give the decode worker "
            "curve-secret and curve-peers, or both sides kv-link = private",
            endpoint);
    return bulk_open(endpoint, 1, link, server_key, ret_bulk, reterr_err);
}

static void drop_parts(td_bulk *b)
{
    for (uint32_t i = 0; i < b->n_parts; i++)
        zmq_msg_close(&b->parts[i]);
    b->n_parts = 0;
}

void td_bulk_close(td_bulk *b)
{
    if (!b)
        return;
    drop_parts(b);
    td_sock_close(b->socket, 0);
    free(b);
}

const char *td_bulk_endpoint(const td_bulk *b)
{
    return b->endpoint;
}

uint64_t td_bulk_dropped(const td_bulk *b)
{
    return b->dropped;
}

/* libzmq calls this on any thread, when the bytes were written or forgotten. */
static void on_free(void *data, void *hint)
{
    (void)data;
    _Atomic uint32_t *flight = hint;
    atomic_fetch_sub_explicit(flight, 1, memory_order_release);
}

static int part_init(zmq_msg_t *m, const td_bulk_part *p)
{
    if (p->flight) {
        atomic_fetch_add_explicit(p->flight, 1, memory_order_relaxed);
        if (zmq_msg_init_data(m, (void *)(uintptr_t)p->data, p->n, on_free, p->flight) == 0)
            return 0;
        atomic_fetch_sub_explicit(p->flight, 1, memory_order_relaxed);
        return -errno;
    }
    if (zmq_msg_init_size(m, p->n) != 0)
        return -errno;
    if (p->n)
        memcpy(zmq_msg_data(m), p->data, p->n);
    return 0;
}

static int send_part(td_bulk *b, const td_bulk_part *p, int more)
{
    zmq_msg_t m;
    int r = part_init(&m, p);
    if (r < 0)
        return r;
    if (zmq_msg_send(&m, b->socket, ZMQ_DONTWAIT | (more ? ZMQ_SNDMORE : 0)) >= 0)
        return 0;
    r = -errno;
    zmq_msg_close(&m); /* runs on_free */
    return r;
}

int td_bulk_send(td_bulk *b, const td_bulk_peer *peer, const td_bulk_part *parts, uint32_t n)
{
    TD_BUG_ON(b->bound != (peer != NULL) || n == 0 || n > TD_BULK_PARTS_MAX);
    if (b->broken)
        return -EPIPE;
    if (peer) {
        td_bulk_part id = {.data = peer->id, .n = peer->n};
        int r = send_part(b, &id, 1);
        if (r < 0)
            return r == -EHOSTUNREACH || r == -EAGAIN ? r : -EHOSTUNREACH;
    }
    for (uint32_t i = 0; i < n; i++) {
        int r = send_part(b, &parts[i], i + 1 < n);
        if (r == 0)
            continue;
        if (i == 0 && !peer && r == -EAGAIN) {
            b->broken = b->link && td_sock_refused(b->socket);
            return b->broken ? -EPIPE : r;
        }
        if (peer)
            return -EHOSTUNREACH;
        /* The parts before are lost with the connection, and libzmq would swallow the next message
         * to keep messages whole: nobody may send here again. */
        b->broken = 1;
        return -EPIPE;
    }
    return 0;
}

/* Rest of a message that is not wanted. */
static void skip_rest(td_bulk *b, int more)
{
    while (more) {
        zmq_msg_t m;
        zmq_msg_init(&m);
        if (zmq_msg_recv(&m, b->socket, ZMQ_DONTWAIT) < 0)
            more = 0;
        else
            more = zmq_msg_more(&m);
        zmq_msg_close(&m);
    }
    drop_parts(b);
    b->dropped++;
}

static int recv_peer(td_bulk *b, td_bulk_peer *ret_peer)
{
    zmq_msg_t m;
    zmq_msg_init(&m);
    if (zmq_msg_recv(&m, b->socket, ZMQ_DONTWAIT) < 0) {
        int r = -errno;
        zmq_msg_close(&m);
        return r;
    }
    size_t n = zmq_msg_size(&m);
    int more = zmq_msg_more(&m), fits = more && n <= sizeof ret_peer->id;
    if (fits) {
        memcpy(ret_peer->id, zmq_msg_data(&m), n);
        ret_peer->n = (uint8_t)n;
    }
    zmq_msg_close(&m);
    if (fits)
        return 0;
    skip_rest(b, more);
    return -EBADMSG;
}

int td_bulk_recv(td_bulk *b, td_bulk_peer *ret_peer, uint32_t *ret_n)
{
    drop_parts(b);
    *ret_peer = (td_bulk_peer){0};
    if (b->bound) {
        int r = recv_peer(b, ret_peer);
        if (r < 0)
            return r == -EBADMSG ? r : -EAGAIN;
    }
    for (int more = 1; more;) {
        if (b->n_parts == TD_BULK_PARTS_MAX) {
            skip_rest(b, 1);
            return -EBADMSG;
        }
        zmq_msg_t *m = &b->parts[b->n_parts];
        zmq_msg_init(m);
        if (zmq_msg_recv(m, b->socket, ZMQ_DONTWAIT) < 0) {
            zmq_msg_close(m);
            if (b->n_parts == 0 && !b->bound)
                return -EAGAIN;
            skip_rest(b, 0);
            return -EBADMSG;
        }
        b->n_parts++;
        more = zmq_msg_more(m);
    }
    *ret_n = b->n_parts;
    return 0;
}

const void *td_bulk_part_data(const td_bulk *b, uint32_t i, size_t *ret_n)
{
    TD_BUG_ON(i >= b->n_parts);
    zmq_msg_t *m = (zmq_msg_t *)&b->parts[i]; /* libzmq's getters take no const */
    *ret_n = zmq_msg_size(m);
    return zmq_msg_data(m);
}

int td_bulk_wait(td_bulk_poll *polls, uint32_t n, int64_t timeout_us)
{
    zmq_pollitem_t items[BULK_POLLS_MAX];
    TD_BUG_ON(n > BULK_POLLS_MAX);
    for (uint32_t i = 0; i < n; i++) {
        td_bulk_poll *p = &polls[i];
        short events = (short)((p->want & TD_BULK_READ ? ZMQ_POLLIN : 0) |
                               (p->want & TD_BULK_WRITE ? ZMQ_POLLOUT : 0));
        items[i] = (zmq_pollitem_t){
            .socket = p->bulk ? p->bulk->socket : NULL, .fd = p->fd, .events = events};
        p->ready = 0;
    }
    long ms = timeout_us < 0 ? -1 : (long)TD_MIN((timeout_us + 999) / 1000, (int64_t)INT_MAX);
    int r = zmq_poll(items, (int)n, ms);
    if (r < 0)
        return errno == EINTR ? -EINTR : -errno;
    for (uint32_t i = 0; i < n; i++)
        polls[i].ready = (items[i].revents & (ZMQ_POLLIN | ZMQ_POLLERR) ? TD_BULK_READ : 0) |
                         (items[i].revents & ZMQ_POLLOUT ? TD_BULK_WRITE : 0);
    return r;
}
