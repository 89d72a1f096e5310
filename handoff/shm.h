/* SPDX-License-Identifier: Apache-2.0 */
/* KV blocks on one host: the prefill worker lends its pool, the decode worker copies out of it.
 * What both ends share: where the socket is, and packets with descriptors on it.
 *
 * The decode worker has a door (handoff/shm_door.h), a Unix SOCK_SEQPACKET socket that its tickets
 * name; a prefill worker opens a line to it (handoff/shm_line.h), once per life of the peer, and
 * passes two memfds: its pool and a page that says when the pool may no longer be read. Both sides
 * let in their own user only (SO_PEERCRED); the door also asks for the ticket's nonce. No thread of
 * its own; mover threads. */
#ifndef TD_HANDOFF_SHM_H
#define TD_HANDOFF_SHM_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "base/err.h"

/* How KV blocks travel. */
typedef enum td_kv_transport {
    TD_KV_AUTO, /* shared memory where both workers are on one host, else ZeroMQ */
    TD_KV_ZMQ,
    TD_KV_SHM
} td_kv_transport;

/* The value of --kv-transport: "auto", "zmq" or "shm". */
td_kv_transport td_kv_transport_of(const char *word);

enum { TD_SHM_NONCE_BYTES = 32, TD_SHM_PATH_MAX = 108, TD_SHM_PACKET_MAX = 1024 };

typedef struct td_shm_offer {
    char path[TD_SHM_PATH_MAX]; /* "/..." or "@name" (abstract); "": none */
    uint8_t nonce[TD_SHM_NONCE_BYTES];
} td_shm_offer;

/* The socket that belongs to a KV endpoint, reachable from where that is: "ipc://PATH" gives
 * PATH.shm, any other an abstract name with the nonce's first half in it. -ENAMETOOLONG, with text.
 */
int td_shm_path(const char *kv_endpoint, const uint8_t nonce[TD_SHM_NONCE_BYTES],
                char ret_path[TD_SHM_PATH_MAX], td_err *reterr_err);

/* A socket that listens at, or is connected to, path; neither blocks. A listening one removes what
 * lies there, and only this user may connect. Its number; -errno. */
int td_shm_listen(const char *path);
int td_shm_connect(const char *path);
/* User at the other end: of a connected socket its process, of a connection to a listener whoever
 * bound that. */
int td_shm_peer_uid(int fd, uid_t *ret_uid);

/* One packet with up to 2 descriptors. send: 0; recv: its bytes, 0 at the end of the connection.
 * Received descriptors are the caller's, also when it does not like the packet. -EAGAIN; -EPROTO
 * longer than cap, or more descriptors than 2; -errno. */
int td_shm_send(int fd, const void *p, size_t n, const int *fds, unsigned n_fds);
int td_shm_recv(int fd, void *p, size_t cap, int ret_fds[2], unsigned *ret_n_fds);

#endif
