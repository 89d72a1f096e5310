/* SPDX-License-Identifier: Apache-2.0 */
/* A frame as it comes from the socket (preamble, then body): preamble, bounded unpacking by type,
 * and the stream core with an open call in each direction. */
#include <stdint.h>
#include <stdlib.h>

#include "base/bug.h"
#include "proto/rpc.pb-c.h"
#include "rpc/codec.h"
#include "rpc/frame.h"
#include "rpc/stream.h"
#include "base/banned.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const ProtobufCMessageDescriptor *type_of(uint8_t frame)
{
    static const ProtobufCMessageDescriptor *const types[] = {
        [TD_FRAME_HELLO] = &tandem__v1__hello__descriptor,
        [TD_FRAME_WELCOME] = &tandem__v1__welcome__descriptor,
        [TD_FRAME_CALL] = &tandem__v1__call__descriptor,
        [TD_FRAME_DATA] = &tandem__v1__data__descriptor,
        [TD_FRAME_BATCH] = &tandem__v1__batch__descriptor,
        [TD_FRAME_CREDIT] = &tandem__v1__credit__descriptor,
        [TD_FRAME_CANCEL] = &tandem__v1__cancel__descriptor,
        [TD_FRAME_STATUS] = &tandem__v1__status__descriptor,
        [TD_FRAME_PING] = &tandem__v1__ping__descriptor,
        [TD_FRAME_PONG] = &tandem__v1__ping__descriptor,
        [TD_FRAME_GOAWAY] = &tandem__v1__goaway__descriptor,
    };
    return frame < TD_ARRAY_LEN(types) ? types[frame] : NULL;
}

/* What a body unpacks to must pack again. */
static int check_body(uint8_t frame, const uint8_t *body, size_t n)
{
    const ProtobufCMessageDescriptor *type = type_of(frame);
    ProtobufCMessage *m;
    td_codec c;
    td_err err;
    if (!type)
        return -1;
    td_codec_init(&c);
    int r = td_codec_unpack(&c, type, body, n, &m, &err);
    if (r == 0) {
        size_t packed = protobuf_c_message_get_packed_size(m);
        uint8_t *again = malloc(packed ? packed : 1);
        TD_BUG_ON(!again || protobuf_c_message_pack(m, again) != packed);
        free(again);
    }
    td_codec_done(&c);
    return r;
}

static void feed(td_streams *s, const td_preamble *p, int malformed, size_t n)
{
    td_stream_out out;
    td_stream_event ev = {.type = TD_EV_RECV};
    ev.frame = (td_stream_frame){.type = p->type,
                                 .malformed = (uint8_t)malformed,
                                 .ignorable = p->flags & TD_FRAME_IGNORABLE,
                                 .stream = p->stream,
                                 .sequence = p->sequence,
                                 .session = p->session,
                                 .messages = p->sequence,
                                 .bytes = n,
                                 .timeout_ms = p->n_attachments};
    for (int i = 0; i < 3; i++) {
        td_streams_step(s, &ev, 1, &out);
        while (out.more)
            td_streams_step(s, &(td_stream_event){.type = TD_EV_MORE}, 1, &out);
        ev.frame.sequence++;
    }
    td_streams_step(s, &(td_stream_event){.type = TD_EV_TICK}, 2000000, &out);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    td_preamble p;
    size_t head = TD_MIN(size, (size_t)TD_PREAMBLE_BYTES);
    if (td_preamble_unpack(data, head, &p) < 0)
        return 0;
    int malformed = check_body(p.type, data + head, size - head) < 0;
    td_streams_config c = {.binder = 1,
                           .session = p.session,
                           .max_streams = 4,
                           .ping_us = 1000,
                           .dead_us = 2000,
                           .lag_us = 1000,
                           .cancel_grace_us = 1000,
                           .window_bytes = 1000,
                           .max_message_bytes = 1000};
    td_streams *s;
    td_stream_out out;
    TD_BUG_ON(td_streams_new(&c, 0, &s) < 0);
    td_streams_step(s, &(td_stream_event){.type = TD_EV_OPEN, .timeout_us = 5000}, 0, &out);
    td_streams_step(
        s,
        &(td_stream_event){
            .type = TD_EV_RECV,
            .frame = {.type = TD_FRAME_CALL, .stream = 2, .timeout_ms = 1, .session = p.session}},
        0, &out);
    feed(s, &p, malformed, size);
    td_streams_free(s);
    return 0;
}
