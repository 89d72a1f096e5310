/* SPDX-License-Identifier: Apache-2.0 */
/* Endpoint rules and hardened ZeroMQ sockets, for control and KV sockets alike.
 *
 * An endpoint is ipc:///ABSOLUTE/PATH or tcp://LITERAL:PORT. Wildcards, names, abstract sockets
 * and, without keys, addresses beyond loopback are refused with a text that says what to write
 * instead. */
#ifndef TD_RPC_SOCK_H
#define TD_RPC_SOCK_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "rpc/link.h"

typedef struct td_sock_config {
    int type;                  /* ZMQ_ROUTER or ZMQ_DEALER */
    int dial;                  /* 1 connect, 0 bind */
    size_t max_frame_bytes;    /* one frame; a peer that sends more is disconnected */
    int hwm;                   /* messages per peer and direction; > 0 */
    td_link *link;             /* keys and watching; NULL: neither. Outlives the socket */
    td_door door;              /* with a link */
    int plain;                 /* 1: no CURVE: the KV door of a link that says it is private */
    const uint8_t *server_key; /* dial with keys: 32 bytes of the other side's public key */
} td_sock_config;

/* 0; -EINVAL with text (form, wildcard, name, path length); -EACCES (tcp beyond loopback without
 * keys). Opens nothing. */
int td_endpoint_check(const char *endpoint, int has_keys, td_err *reterr_err);

/* Make, configure, and bind or connect a socket on the process's context (one reference is held
 * until td_sock_close). A stale ipc file is removed only if nobody answers on it; the file is made
 * with mode 0600. 0; -EADDRINUSE somebody answers there; -EACCES, -ENOENT ... with text. */
int td_sock_open(const char *endpoint, const td_sock_config *config, void **ret_socket,
                 td_err *reterr_err);
/* linger_ms: how long the I/O thread may still write what was queued. A bound ipc file is removed.
 * NULL is fine. */
void td_sock_close(void *socket, int linger_ms);
/* Dialled, with a link: 1, once, when the other side would not have us. libzmq gives up then:
 * dial again, later. */
int td_sock_refused(void *socket);
int td_sock_redial(void *socket, const char *endpoint);
/* The endpoint with a tcp port 0 resolved. 0 or -errno. */
int td_sock_endpoint(void *socket, char *out, size_t out_bytes);

#endif
