/* SPDX-License-Identifier: Apache-2.0 */
/* The link's thread: answers libzmq's authentication requests (ZAP, RFC 27) and watches the
 * handshakes of our sockets. One per process and context, counted. For rpc's own files. */
#ifndef TD_RPC_ZAP_H
#define TD_RPC_ZAP_H

#include "base/err.h"
#include "rpc/link.h"

enum { TD_ZAP_DOMAIN_BYTES = 16 };

/* Take a reference; the first one starts the thread. self_test: prove, once per process, that a key
 * unknown to us is turned away. */
int td_zap_start(int self_test, td_err *reterr_err);
/* Every watched socket was closed before. */
void td_zap_stop(void);

/* Watch a socket from now until td_zap_forget(), before it binds or connects. Requests of its
 * domain are decided by the link for this door; plain: by address instead of key. 0; -ENOMEM,
 * -EMFILE ... */
int td_zap_watch(void *socket, td_link *l, td_door door, int dial, int plain, const char *endpoint,
                 char ret_domain[TD_ZAP_DOMAIN_BYTES]);
/* Before the socket is closed; unknown ones are fine. */
void td_zap_forget(void *socket);
/* 1, once: the other side would not have us; libzmq does not try again by itself. */
int td_zap_refused(void *socket);

#endif
