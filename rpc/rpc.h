/* SPDX-License-Identifier: Apache-2.0 */
/* gRPC-style calls over ZeroMQ: the shell round the pure core in rpc/stream.h. One td_rpc is one
 * socket on one loop: bound (ROUTER) or dialled (DEALER). A peer becomes a session by HELLO and
 * WELCOME; both sides may call once it is up. Loop thread only.
 *
 * Invariants: exactly one STATUS per stream, also after CANCEL, also when the peer dies (then
 * UNAVAILABLE is made here); a sequence gap ends a stream with DATA_LOSS; late frames are counted
 * and dropped; cancelling or losing an incoming call cancels every child call; a deadline passes on
 * both sides. */
#ifndef TD_RPC_RPC_H
#define TD_RPC_RPC_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "base/strbuf.h"
#include "net/loop.h"
#include "rpc/frame.h"
#include "rpc/link.h"

/* Generated types, by forward declaration so that this header needs no protobuf-c. */
struct Tandem__V1__Hello;
struct Tandem__V1__Load;

typedef struct td_rpc td_rpc;
typedef struct td_session td_session;
typedef struct td_call td_call;

typedef struct td_status {
    uint32_t code; /* td_code */
    const char
        *error; /* stable name from the error table, "" when none; borrowed for the callback */
    const char *message; /* borrowed for the callback */
    uint32_t retry_after_ms;
} td_status;

/* Who this process is: HELLO for the dialling side. Borrowed until td_rpc_close. */
typedef struct td_rpc_ops {
    /* Binding side: a HELLO arrived. Return 0 to admit, or a negative errno with text: the peer
     * gets STATUS on stream 0 with FAILED_PRECONDITION and the text, and is not admitted. NULL
     * admits everyone. */
    int (*on_hello)(void *arg, td_session *s, const struct Tandem__V1__Hello *hello,
                    td_err *reterr_err);
    void (*on_up)(void *arg, td_session *s);
    /* The session ended (GOAWAY finished, silence, epoch change, refused). Its calls have had their
     * STATUS. `reason` is for logs. The session is freed afterwards. */
    void (*on_down)(void *arg, td_session *s, const char *reason);
    /* Incoming call; message is the packed request, borrowed for the callback. Answer with
     * td_call_send/td_call_finish, now or later. NULL: every call gets UNIMPLEMENTED. */
    void (*on_call)(void *arg, td_call *c, td_str method, td_str message);
    void (*on_load)(void *arg, td_session *s, const struct Tandem__V1__Load *load);
    /* A BATCH was delivered entirely: flush output once. May be NULL. */
    void (*on_batch_end)(void *arg, td_session *s);
    /* Give the current load for the next PING; NULL: none. Fill the fields of an initialised
     * message. */
    void (*get_load)(void *arg, struct Tandem__V1__Load *load);
} td_rpc_ops;

typedef struct td_rpc_config {
    const char *endpoint; /* ipc://PATH or tcp://LITERAL:PORT; wildcards are refused; tcp beyond
                           * loopback is refused without keys */
    int dial;             /* 1 dial, 0 bind */
    td_link *link;        /* keys; outlives the td_rpc. NULL: none, and nobody watches */
    td_door door;         /* bind: CONTROL or CLIENT; dial: CONTROL */
    struct Tandem__V1__Hello
        *hello;        /* dial: sent on every (re)connection; borrowed for the td_rpc's life */
    uint8_t epoch[16]; /* this process's boot epoch */
    uint32_t ping_ms, dead_ms;   /* bind: 250, 1000 */
    uint32_t max_sessions;       /* bind: default 1024 */
    size_t max_message_bytes;    /* default 16 MiB */
    size_t session_credit_bytes; /* default 8 MiB */
    uint32_t max_streams;        /* calls of one session, both directions; default 1024 */
    td_rpc_ops ops;
    void *arg;
} td_rpc_config;

/* 0; -EINVAL, -EACCES, -EADDRINUSE ... with text. A dialled one connects in the background and says
 * HELLO again, with backoff, whenever it has no session. Two diallers of one process to one binder
 * need different epochs: a HELLO replaces the session of its epoch. */
int td_rpc_open(td_loop *l, const td_rpc_config *config, td_rpc **ret_rpc, td_err *reterr_err);
/* Every call gets its STATUS (CANCELLED), every session on_down. Incoming calls still need their
 * td_call_finish(). Not from inside a callback of this td_rpc. NULL is fine. */
void td_rpc_close(td_rpc *r);
/* The endpoint in use (a tcp port 0 is resolved). Borrowed. */
const char *td_rpc_endpoint(const td_rpc *r);
/* Tell all peers that no new calls will be taken. */
void td_rpc_goaway(td_rpc *r, const char *reason, uint32_t drain_ms);

void td_session_set_user(td_session *s, void *user);
void *td_session_user(const td_session *s);
const char *td_session_name(const td_session *s); /* from HELLO, printable */
uint32_t td_session_number(const td_session *s);
/* Whose key the other side proved to have: binding side with keys, else NULL. HELLO's role is that
 * of the key. */
const td_peer *td_session_peer(const td_session *s);
int td_session_is_draining(const td_session *s); /* GOAWAY seen */
/* End the session (on_down follows from the loop, not from inside); the peer is told. */
void td_session_close(td_session *s, const char *reason);

/* Outgoing calls. */
typedef struct td_call_ops {
    void (*on_data)(void *arg, td_call *c, td_str message); /* packed response message, borrowed */
    /* Exactly once; the call is freed afterwards. */
    void (*on_status)(void *arg, td_call *c, const td_status *status);
} td_call_ops;

typedef struct td_call_spec {
    td_session *session;
    const char *method;  /* "tandem.v1.Engine/Prefill" */
    const void *message; /* packed request; copied */
    size_t message_bytes;
    uint64_t timeout_us; /* > 0 */
    td_str request_id;   /* for logs on the other side */
    uint32_t attempt;
    td_call *parent;   /* incoming call whose end cancels this one; NULL */
    uint32_t credit;   /* response messages the callee may stream ahead; 0 = 64 */
    int manual_credit; /* 0: credit is renewed when on_data returns; 1: only by td_call_consume()
                          (slow readers) */
    td_call_ops ops;
    void *arg;
} td_call_spec;

/* 0 (exactly one on_status will follow, never from inside this function); -ENOTCONN; -ENOBUFS;
 * -E2BIG. */
int td_call_start(const td_call_spec *spec, td_call **ret_call);
/* manual_credit: n delivered messages are done with; the callee may send as many more. */
void td_call_consume(td_call *c, uint32_t n);
/* Ask the callee to stop; on_status still follows (CANCELLED, or the real one if it crossed).
 * Idempotent. */
void td_call_cancel(td_call *c, const char *reason);

/* Incoming calls. */
td_session *td_call_session(const td_call *c);
td_str td_call_request_id(const td_call *c);
uint32_t td_call_attempt(const td_call *c);
/* Remaining time, microseconds; 0 = passed. */
uint64_t td_call_remaining_us(const td_call *c);
/* At once if that has happened already. on_cancel runs once if the caller cancels, its deadline
 * passes or the session ends before td_call_finish(); afterwards the callee must still call
 * td_call_finish() exactly once (it frees the call). */
void td_call_on_cancel(td_call *c, void (*fn)(void *arg, td_call *c), void *arg);
int td_call_is_cancelled(const td_call *c);
void td_call_set_user(td_call *c, void *user);
void *td_call_user(const td_call *c);
/* Stream one response message now. 0; -EAGAIN out of credit (not sent: coalesce and wait for
 * on_credit); -ECANCELED. */
int td_call_send(td_call *c, const void *message, size_t n);
void td_call_on_credit(td_call *c, void (*fn)(void *arg, td_call *c), void *arg);
/* End the call. message/error of status are copied; NULL status = OK. Frees c. */
void td_call_finish(td_call *c, const td_status *status);

/* Between begin and end, td_call_send() joins the batch and td_call_finish() takes effect after it.
 * One BATCH per engine step: begin, add deltas of calls of this session, end. add: as td_call_send.
 * An empty batch with no load is not sent. */
void td_batch_begin(td_session *s, uint64_t step);
int td_batch_add(td_call *c, const void *message, size_t n);
void td_batch_end(td_session *s, const struct Tandem__V1__Load *load);

typedef struct td_rpc_stats {
    uint64_t frames_in, frames_out, bytes_in, bytes_out, late_frames, bad_frames, unroutable,
        sessions_lost, unknown_fields;
} td_rpc_stats;
void td_rpc_get_stats(const td_rpc *r, td_rpc_stats *ret_stats);

/* Status of an errno (for callee code): -EINVAL -> INVALID_ARGUMENT, -ENOSPC -> RESOURCE_EXHAUSTED,
 * ... */
uint32_t td_code_from_errno(int err);
const char *td_code_name(uint32_t code);

#endif
