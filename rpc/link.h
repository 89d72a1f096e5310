/* SPDX-License-Identifier: Apache-2.0 */
/* How the ZeroMQ sockets of a process are secured: its key pair, the allow-list, and what happens
 * at its doors. One td_link per process serves all its sockets. With keys every socket speaks
 * CURVE: a door admits the roles it is for and nobody else, a dialled server must have the key it
 * is known by. Without keys sockets speak plain ZeroMQ and stay on ipc and loopback. With keys
 * the KV door alone may be plain too, on a network that the operator calls private: then it admits
 * the addresses of that network, and each message is authenticated (rpc/mac.h).
 *
 * An own thread answers libzmq's authentication requests and watches handshakes; it sleeps
 * otherwise. Its handler runs before the first door opens, and a self-test proves that it turns
 * unknown keys away: without a handler libzmq would let everyone in. */
#ifndef TD_RPC_LINK_H
#define TD_RPC_LINK_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "base/strbuf.h"
#include "rpc/curve.h"

typedef struct td_link td_link;

/* Where two processes meet. The binding side admits: control prefill and decode, client client, kv
 * prefill. */
typedef enum td_door { TD_DOOR_CONTROL, TD_DOOR_CLIENT, TD_DOOR_KV, TD_DOOR_MAX } td_door;

const char *td_door_name(td_door door);

typedef enum td_denied {
    TD_DENIED_KEY,       /* binding side: a key that is not in the list */
    TD_DENIED_ROLE,      /* binding side: a key whose role this door does not admit */
    TD_DENIED_ADDRESS,   /* binding side: a private KV link, and not of its network */
    TD_DENIED_HANDSHAKE, /* binding side: no CURVE, another server key than ours, not finished in
                          * time; whoever notices first hangs up, so these cannot be told apart */
    TD_DENIED_REFUSED,   /* dialling side: the other side would not have us */
    TD_DENIED_MAX
} td_denied;

typedef struct td_link_event {
    int is_error;     /* somebody should act; else to be known */
    const char *name; /* "link_denied", "link_refused" */
    const char *text; /* key=value pairs, for the log */
} td_link_event;

typedef struct td_link_config {
    const char *secret, *peers; /* files; both or neither ("" or NULL) */
    td_role self;               /* our key must be listed under it */
    const char *kv_private;     /* a network: the KV door is plain there. NULL: it speaks CURVE */
    /* At most one in ten seconds per door and reason. On the link's thread, a lock held: only log.
     * May be NULL. */
    void (*on_event)(void *arg, const td_link_event *event);
    void *arg;
} td_link_config;

/* -EINVAL one file without the other, a key not listed under our role, a private KV link without
 * keys or network; -EPERM file modes; -ENOTSUP no CURVE in libzmq; -EACCES the self-test let a
 * stranger in; ... with text. */
int td_link_open(const td_link_config *config, td_link **ret_link, td_err *reterr_err);
/* After every socket that uses it. NULL is fine. */
void td_link_close(td_link *l);
/* Read the allow-list again. On failure the old one stays. Sessions of peers that left it end. */
int td_link_reload(td_link *l, td_err *reterr_err);

/* NULL: no keys. */
const td_curve_pair *td_link_keys(const td_link *l);
/* Changes with every reload. */
uint32_t td_link_generation(const td_link *l);
/* The key of the server behind a door: the one router of the list. -ENOENT with text. */
int td_link_router_key(td_link *l, uint8_t ret_key[TD_CURVE_KEY_BYTES], td_err *reterr_err);
/* Who authenticated as user_id (what the handler called it). -ENOENT: not in the list any more. */
int td_link_identify(td_link *l, const char *user_id, td_peer *ret_peer);
/* 1: the KV door is a private link. */
int td_link_kv_private(const td_link *l);
/* 0; -EACCES with text: this address (literal, no port) is not in the private network. */
int td_link_check_private(const td_link *l, const char *address, td_err *reterr_err);
/* 1: the key is listed under role. */
int td_link_is_listed(td_link *l, const uint8_t key[TD_CURVE_KEY_BYTES], td_role role);

uint64_t td_link_count(const td_link *l, td_door door, td_denied why);
/* Append tandem_link_denied_total and tandem_link_refused_total. */
void td_link_write_metrics(const td_link *l, td_strbuf *out);

/* ---- for rpc's own files ---- */

/* The handler's decision about one handshake. 1 admit and *ret_user_id is set, 0 deny. */
int td_link_decide(td_link *l, td_door door, const char *address, const void *key, size_t n_key,
                   char ret_user_id[TD_CURVE_TEXT_BYTES]);
/* The same at a plain KV door: by address. */
int td_link_decide_private(td_link *l, const char *address);
/* A handshake failed: event and value as zmq_socket_monitor() gives them. */
void td_link_failed(td_link *l, td_door door, int dial, const char *endpoint, const char *address,
                    int event, uint32_t value);

#endif
