/* SPDX-License-Identifier: Apache-2.0 */
/* The process's ZeroMQ context, counted: control sockets and KV sockets share one I/O thread. Any
 * thread. */
#ifndef TD_RPC_ZMQ_CTX_H
#define TD_RPC_ZMQ_CTX_H

/* Take a reference; the first one makes the context. NULL: out of memory or descriptors (errno). */
void *td_zmq_context_ref(void);
/* Drop it; the last one ends the context and waits for sockets that still linger (each at most its
 * LINGER). */
void td_zmq_context_unref(void);

#endif
