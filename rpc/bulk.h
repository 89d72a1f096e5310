/* SPDX-License-Identifier: Apache-2.0 */
/* Large multipart messages over ZeroMQ without a copy on the sending side: the KV socket. A
 * receiver binds (ROUTER), each sender dials it (DEALER). One td_bulk belongs to one thread (the
 * mover).
 *
 * Invariants: a part sent by reference is counted in *flight until libzmq has let go of it (its
 * free callback does one atomic decrement and nothing else), so memory may be reused when the count
 * is 0; td_bulk_close() forgets what was queued (LINGER 0), which forces the counts to 0 soon
 * after; a message has at most TD_BULK_PARTS_MAX parts of at most TD_BULK_PART_BYTES_MAX, one that
 * has more is dropped and counted. Endpoints are checked as rpc/sock.h says: no wildcard, nothing
 * beyond loopback without keys. */
#ifndef TD_RPC_BULK_H
#define TD_RPC_BULK_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "rpc/link.h"

enum {
    TD_BULK_PARTS_MAX = 1024,
    TD_BULK_PART_BYTES_MAX = (1 << 20) + 4096,
    TD_BULK_PEER_BYTES_MAX = 32
};

typedef struct td_bulk td_bulk;

/* Bind or dial the KV door. A dialled one connects in the background and again after a loss; until
 * then sends give -EAGAIN. link: keys, outlives the td_bulk; NULL: none. A link whose KV door
 * is private binds without CURVE, and dials so when server_key is NULL. server_key: 32 bytes of the
 * binding side's public key, needed when the link has keys and is not private. */
int td_bulk_bind(const char *endpoint, td_link *link, td_bulk **ret_bulk, td_err *reterr_err);
int td_bulk_dial(const char *endpoint, td_link *link, const uint8_t *server_key, td_bulk **ret_bulk,
                 td_err *reterr_err);
/* Forget what is queued and close. NULL is fine. */
void td_bulk_close(td_bulk *b);
/* The endpoint in use; a tcp port 0 is resolved. Borrowed. */
const char *td_bulk_endpoint(const td_bulk *b);

/* Who sent a message, to answer it; meaningful on a bound td_bulk only. */
typedef struct td_bulk_peer {
    uint8_t id[TD_BULK_PEER_BYTES_MAX];
    uint8_t n;
} td_bulk_peer;

typedef struct td_bulk_part {
    const void *data;
    size_t n;
    _Atomic uint32_t
        *flight; /* NULL: the bytes are copied; else sent by reference, counted here while held */
} td_bulk_part;

/* Queue one message; never blocks. peer: NULL on a dialled one.
 * 0        queued; referenced parts stay untouched until *flight says so
 * -EAGAIN  not connected or the queue is full; nothing is held: wait for TD_BULK_WRITE
 * -EHOSTUNREACH  that peer has gone
 * -EPIPE   the connection broke inside a message, or the other side refused our key: close it;
 *          nothing more can be sent */
int td_bulk_send(td_bulk *b, const td_bulk_peer *peer, const td_bulk_part *parts, uint32_t n);

/* Take the next message: its parts are views until the next td_bulk_recv() or td_bulk_close().
 * 0; -EAGAIN none; -EBADMSG one was dropped and counted (too many parts): call again. */
int td_bulk_recv(td_bulk *b, td_bulk_peer *ret_peer, uint32_t *ret_n);
/* Part i of the message taken last. */
const void *td_bulk_part_data(const td_bulk *b, uint32_t i, size_t *ret_n);
/* Messages dropped for their form since the start. */
uint64_t td_bulk_dropped(const td_bulk *b);

enum { TD_BULK_READ = 1, TD_BULK_WRITE = 2 };
typedef struct td_bulk_poll {
    td_bulk *bulk; /* or NULL and fd */
    int fd;
    int want, ready; /* TD_BULK_READ | TD_BULK_WRITE */
} td_bulk_poll;

/* Wait until one is ready or timeout_us passed (rounded up to milliseconds; < 0: for ever). n <=
 * 256. Number of ready ones; 0; -EINTR. */
int td_bulk_wait(td_bulk_poll *polls, uint32_t n, int64_t timeout_us);

#endif
