/* SPDX-License-Identifier: Apache-2.0 */
/* The streams of one session, one end of it: step(state, event, now) -> frames to send and calls
 * upward. Pure: no I/O, no clock, no allocation after td_streams_new(); the same for the shell
 * (rpc/rpc.h) and the simulator.
 *
 * Invariants: ids are odd from the binding side, even from the dialling side, never reused; every
 * frame of a stream is numbered per direction (stream 0 too); exactly one STATUS goes up per
 * outgoing call, also after a cancel or the death of the peer; DATA goes up in order, once; neither
 * side sends past its credit. Order of work for the caller of step(): first send every out.send[],
 * then act on every out.up[] (an upward call may step() again, with another td_stream_out), then,
 * while out.more, step() with TD_EV_MORE. */
#ifndef TD_RPC_STREAM_H
#define TD_RPC_STREAM_H

#include <stddef.h>
#include <stdint.h>

#include "rpc/frame.h"

typedef struct td_streams td_streams;

enum {
    TD_STREAM_CREDIT_DEFAULT = 64,  /* messages, when a call names none */
    TD_STREAM_CREDIT_MAX = 1 << 20, /* a stream's balance is capped here */
    TD_STREAM_OUT_MAX = 16
};

typedef struct td_streams_config {
    int binder;       /* 1: our ids are odd, the peer's even; 0: the other way round */
    uint32_t session; /* the preamble's session: frames with another one are dropped and counted */
    uint32_t max_streams;      /* both directions together, 1..65536 */
    uint64_t ping_us, dead_us; /* PING every ping_us; down after dead_us without any frame */
    uint64_t lag_us; /* own loop lag from which silence proves nothing (a late observer never
                        accuses): 250 ms */
    uint64_t
        cancel_grace_us; /* after CANCEL, wait at most this long for the callee's STATUS: 5 s */
    uint64_t send_credit_bytes; /* what the peer granted so far: WELCOME's on the dialling side, 0
                                   on the binding side */
    uint64_t window_bytes; /* what we grant: told in WELCOME by the binding side, by a CREDIT after
                            * TD_EV_START by the dialling side. A sender may overdraw it by its last
                            * message, so any size passes. */
    uint32_t max_message_bytes; /* DATA above this is refused on both sides */
} td_streams_config;

/* What the core knows of a frame: the preamble's numbers and those of the body. Bodies stay with
 * the caller of step(). */
typedef struct td_stream_frame {
    uint8_t type;      /* td_frame_type; WELCOME and HELLO never come here */
    uint8_t malformed; /* RECV: the preamble was good and the body not: counted, ends its stream
                          with INTERNAL */
    uint8_t ignorable; /* RECV: flag bit 0 of the preamble */
    uint64_t stream;
    uint32_t sequence, session;
    uint32_t messages;   /* CALL: initial credit. CREDIT of a stream: more messages */
    uint64_t bytes;      /* DATA: bytes of its message. CREDIT of stream 0: more bytes */
    uint32_t timeout_ms; /* CALL: remaining time. GOAWAY: drain_ms; 0 = the session ends now */
    uint32_t
        code; /* STATUS: td_code. CANCEL: why (sent: CANCELLED, DEADLINE_EXCEEDED, DATA_LOSS) */
    uint64_t last_stream; /* GOAWAY */
    uint64_t nonce;       /* PING, PONG */
} td_stream_frame;

typedef enum td_stream_event_type {
    TD_EV_START = 1, /* once, before anything else */
    TD_EV_OPEN,   /* caller: timeout_us (> 0), credit (0 = default), user. out.stream = new id; the
                     first send is CALL */
    TD_EV_SEND,   /* callee: stream, bytes; batched = 1: account it, but the message travels in a
                   * BATCH that is sent by   TD_EV_BATCH: no frame comes out, out.sequence is the
                   * item's
                   */
    TD_EV_BATCH,  /* the BATCH itself: one frame on stream 0 */
    TD_EV_FINISH, /* callee: stream, code. Ends and forgets the stream. After an abort the code sent
                     is the abort's */
    TD_EV_CANCEL, /* caller: stream. Idempotent; TD_UP_STATUS still follows */
    TD_EV_CONSUME, /* caller: stream, messages delivered and done with: their credit is renewed
                      (CREDIT when half is used) */
    TD_EV_RECV, /* frame. A BATCH: first the BATCH itself, then, if 0 came back, each item as a DATA
                   with batched = 1 */
    TD_EV_TICK, /* lag_us = own loop lag. At td_streams_next_us() or before: deadlines, PING, death
                   by silence */
    TD_EV_GOAWAY, /* we drain: timeout_ms; new calls of the peer are answered UNAVAILABLE. 0: the
                   * session ends, outgoing calls get code (0 = UNAVAILABLE) */
    TD_EV_LOST,   /* the transport lost the peer: code (td_code of the outgoing calls' STATUS, 0 =
                     UNAVAILABLE) */
    TD_EV_MORE    /* go on with what did not fit */
} td_stream_event_type;

typedef struct td_stream_event {
    td_stream_event_type type;
    uint64_t stream;
    td_stream_frame frame; /* RECV */
    int batched;           /* SEND, RECV */
    uint64_t bytes;        /* SEND */
    uint32_t messages;     /* CONSUME */
    uint32_t code;         /* FINISH, LOST */
    uint64_t timeout_us;   /* OPEN */
    uint32_t timeout_ms;   /* GOAWAY */
    uint32_t credit;       /* OPEN */
    uint64_t lag_us;       /* TICK */
    void *user;            /* OPEN */
} td_stream_event;

typedef enum td_stream_up_type {
    TD_UP_CALL = 1, /* callee: a new call; the event's frame is its CALL. Give it a user with
                       td_streams_set_user() */
    TD_UP_DATA,     /* caller: deliver the event's message */
    TD_UP_STATUS,   /* caller: the call ended with code; the stream is gone. local: made here, there
                       is no STATUS body */
    TD_UP_ABORT,    /* callee: stop (code: CANCELLED, DEADLINE_EXCEEDED, DATA_LOSS, UNAVAILABLE ...)
                       and TD_EV_FINISH */
    TD_UP_CREDIT,   /* callee: a TD_EV_SEND refused with -EAGAIN may be tried again */
    TD_UP_GOAWAY,   /* the peer drains: no new calls to it */
    TD_UP_DOWN /* the session ended: why says how. Calls of it have had STATUS or ABORT before */
} td_stream_up_type;

typedef enum td_down {
    TD_DOWN_LOST = 1, /* TD_EV_LOST */
    TD_DOWN_SILENCE,  /* no frame for dead_us */
    TD_DOWN_GAP,      /* a gap on stream 0 */
    TD_DOWN_GOAWAY,   /* the peer ended it, or we did */
    TD_DOWN_PROTOCOL  /* the peer broke the rules: parity, credit, a frame that no side may send */
} td_down;

typedef struct td_stream_up {
    td_stream_up_type type;
    uint64_t stream;
    void *user; /* of the stream. Valid for STATUS always; for the others look the stream up again
                 * if an earlier upward call may have finished it */
    uint32_t code;
    int local;
    td_down why; /* DOWN */
} td_stream_up;

typedef struct td_stream_out {
    uint64_t stream;   /* OPEN */
    uint32_t sequence; /* SEND */
    uint32_t n_send, n_up;
    int more;
    td_stream_frame send[TD_STREAM_OUT_MAX]; /* type, stream, sequence, session and the body's
                                              * numbers. Body: CALL, DATA, STATUS from the event (a
                                              * STATUS that is not of a FINISH: code only) */
    td_stream_up up[TD_STREAM_OUT_MAX];
} td_stream_out;

typedef struct td_streams_stats {
    uint64_t late;      /* frames of ended or unknown streams, and duplicates: dropped */
    uint64_t stale;     /* frames of another session: dropped */
    uint64_t malformed; /* frames with a bad body */
    uint64_t unknown;   /* frames of unknown type that said they may be ignored */
    uint64_t gaps;      /* streams ended by a sequence gap */
} td_streams_stats;

/* The only allocation. -ENOMEM, -EINVAL (configuration out of range). */
int td_streams_new(const td_streams_config *config, uint64_t now_us, td_streams **ret_streams);
void td_streams_free(td_streams *s);

/* Apply one event. *out is cleared first.
 * 0           done (RECV: also when the frame was dropped; stats tell), except a dropped BATCH:
 * -ESTALE -EAGAIN     SEND: out of credit; TD_UP_CREDIT will come -ECANCELED  SEND: the stream was
 * aborted; FINISH it -ENOENT     SEND, FINISH: no such incoming stream (FINISHed already) -EMSGSIZE
 * SEND: larger than max_message_bytes -ENOBUFS    OPEN: max_streams reached -ENOTCONN   OPEN: the
 * session is down or the peer drains */
int td_streams_step(td_streams *s, const td_stream_event *event, uint64_t now_us,
                    td_stream_out *out);

/* When the next TD_EV_TICK is due; UINT64_MAX when down. */
uint64_t td_streams_next_us(const td_streams *s);

void td_streams_set_user(td_streams *s, uint64_t stream, void *user);
/* NULL when the stream is unknown or ended. */
void *td_streams_user(const td_streams *s, uint64_t stream);
/* 1 if a TD_EV_SEND would pass now (incoming streams). */
int td_streams_can_send(const td_streams *s, uint64_t stream);
/* Remaining time of a stream, microseconds; 0 = passed or unknown. */
uint64_t td_streams_remaining_us(const td_streams *s, uint64_t stream, uint64_t now_us);

int td_streams_is_down(const td_streams *s);
int td_streams_is_draining(const td_streams *s); /* the peer said GOAWAY */
/* Streams in the table: outgoing without STATUS, incoming without FINISH (these stay after the
 * session went down). */
uint32_t td_streams_count(const td_streams *s);
void td_streams_get_stats(const td_streams *s, td_streams_stats *ret_stats);

#endif
