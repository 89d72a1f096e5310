/* SPDX-License-Identifier: Apache-2.0 */
/* Inside of rpc/rpc.h: rpc.c owns the socket, session.c the handshake and the frames of a session,
 * call.c the calls and batches. The rules of streams are in rpc/stream.h, which these three feed
 * and obey. */
#ifndef TD_RPC_RPC_INT_H
#define TD_RPC_RPC_INT_H

#include <stddef.h>
#include <stdint.h>

#include "base/list.h"
#include "base/map.h"
#include "net/loop.h"
#include "proto/rpc.pb-c.h"
#include "rpc/codec.h"
#include "rpc/frame.h"
#include "rpc/rpc.h"
#include "rpc/stream.h"

enum { TD_ROUTE_BYTES_MAX = 255, TD_NAME_BYTES_MAX = 64, TD_REASON_BYTES = 300 };

typedef enum td_dial_state {
    TD_DIAL_TRY = 1,
    TD_DIAL_WAIT,
    TD_DIAL_BACKOFF,
    TD_DIAL_UP
} td_dial_state;
typedef enum td_pending { TD_PENDING_NONE, TD_PENDING_LOST, TD_PENDING_CLOSE } td_pending;

struct td_rpc {
    td_loop *loop;
    td_rpc_config c;
    char endpoint[256];
    void *socket;
    td_io *io;
    td_after pump; /* look at the socket again at the end of this turn */
    td_after reap; /* sessions with `pending` */
    td_codec codec;
    uint8_t server_key[TD_CURVE_KEY_BYTES]; /* dial with keys */
    const char *from; /* binding side with keys: who sent the message at hand */
    td_list sessions;
    uint32_t n_sessions, next_number;
    td_map by_route;  /* binding side: hash of the routing id -> session */
    td_session *peer; /* dialling side */
    td_timer *dial_timer;
    td_dial_state dial_state;
    uint64_t backoff_us;
    int redial;       /* the other side would not have us: dial anew after the back-off */
    unsigned n_young; /* sessions in a row that died young */
    int draining, closing;
    td_rpc_stats stats;
};

typedef struct td_route {
    uint8_t id[TD_ROUTE_BYTES_MAX];
    uint8_t n; /* 0 on the dialling side */
} td_route;

typedef struct td_batch_item {
    td_call *call;
    uint32_t sequence;
    size_t offset, n;
} td_batch_item;

typedef struct td_batch {
    int open;
    uint64_t step;
    td_batch_item *items;
    uint32_t n_items, cap_items;
    Tandem__V1__BatchItem *wire; /* cap_items of each */
    Tandem__V1__BatchItem **wire_ptr;
    td_strbuf bytes;
    td_list finished; /* calls finished inside the batch */
} td_batch;

struct td_session {
    td_rpc *rpc; /* NULL once the td_rpc is closed */
    td_list node;
    uint32_t refs; /* the table, each living call, whoever calls user code */
    td_streams *streams;
    uint32_t number;
    td_route route;
    uint8_t epoch[16];
    char name[TD_NAME_BYTES_MAX + 1];
    int has_peer; /* binding side with keys: */
    td_peer peer;
    char user_id[TD_CURVE_TEXT_BYTES];
    uint32_t generation; /* of the allow-list that peer is from */
    void *user;
    td_timer *tick;
    uint64_t tick_at_us;
    uint64_t made_us;
    int up; /* on_up was called and on_down was not */
    td_pending pending;
    char reason[TD_REASON_BYTES];
    td_batch batch;
};

struct td_call {
    td_session *s;
    uint64_t stream;
    int outgoing;
    /* outgoing */
    td_call_ops ops;
    void *arg;
    int manual_credit;
    td_call *parent;
    td_list sibling;
    /* incoming */
    td_list children;
    char request_id[64];
    uint32_t request_id_bytes, attempt;
    int cancelled, finishing;
    uint32_t n_batched;      /* messages in the open batch */
    td_list finished;        /* in batch.finished */
    struct td_call_end *end; /* of a call finished inside a batch */
    void (*cancel_fn)(void *arg, td_call *c);
    void *cancel_arg;
    void (*credit_fn)(void *arg, td_call *c);
    void *credit_arg;
    void *user;
};

/* What travels with one event of the core. Every pointer is borrowed for the step. */
typedef struct td_body {
    /* to send */
    const td_call_spec *spec;
    td_str message;
    const td_status *status;
    const char *reason;
    const Tandem__V1__Batch *batch;
    uint32_t drain_ms;
    /* received */
    const Tandem__V1__Call *call_in;
    td_str data_in;
    const Tandem__V1__Status *status_in;
} td_body;

/* rpc.c */
int td_rpc_send(td_rpc *r, const td_route *route, const td_preamble *p,
                const ProtobufCMessage *body);
void td_rpc_pump(td_rpc *r);
void td_rpc_add_session(td_rpc *r, td_session *s);
void td_rpc_del_session(td_rpc *r, td_session *s);
td_session *td_rpc_find_route(td_rpc *r, const td_route *route);

/* handshake.c */
void td_handshake_start(td_rpc *r);                    /* dialling side: no session: HELLO now */
void td_handshake_again(td_rpc *r, uint64_t lived_us); /* dialling side: it had one */
void td_handshake_try(td_rpc *r);                      /* the socket may have become writable */
void td_handshake_tick(void *rpc);                     /* dial_timer */
void td_handshake_recv(td_rpc *r, const td_route *route, const td_preamble *p, const uint8_t *body,
                       size_t n);

/* session.c */
int td_session_new(td_rpc *r, const td_route *route, const td_streams_config *streams,
                   const uint8_t epoch[16], td_session **ret_s);
td_session *td_session_ref(td_session *s);
void td_session_unref(td_session *s);
/* Step the core and do all that comes of it. ret_out (may be NULL) gets the first out. */
int td_session_step(td_session *s, const td_stream_event *ev, const td_body *body,
                    td_stream_out *ret_out);
void td_session_recv(td_session *s, const td_preamble *p, const uint8_t *body, size_t n,
                     int bad_form);
/* The session cannot go on; it ends from the loop. */
void td_session_lose(td_session *s, td_pending how, const char *reason);
/* Binding side with keys: take the identity of who sent the message at hand. -EACCES with text. */
int td_session_authenticate(td_session *s, uint32_t hello_role, td_err *reterr_err);
/* 1: the message at hand is from this session's peer, who is still in the list. */
int td_session_is_from_peer(td_session *s);
/* Printable copy for logs: control bytes become '?'. */
void td_printable(char *out, size_t out_bytes, const void *bytes, size_t n);

/* call.c */
void td_call_incoming(td_session *s, uint64_t stream, const Tandem__V1__Call *m);
void td_call_deliver(td_call *c, td_str message);
void td_call_ended(td_call *c, uint32_t code, int local, const Tandem__V1__Status *m);
void td_call_abort(td_call *c, uint32_t code);
void td_call_credit(td_call *c);
const char *td_error_of_code(uint32_t code);
void td_batch_free(td_batch *b);

#endif
