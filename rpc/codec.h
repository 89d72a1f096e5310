/* SPDX-License-Identifier: Apache-2.0 */
/* Bounded unpacking of protobuf messages from outside. Before protobuf-c sees a byte, one pass
 * without allocation checks the wire form against the descriptor: size cap of the type, enum
 * ranges, UTF-8 and no NUL in strings, number of unknown fields. Then it unpacks into an arena with
 * a budget of a small multiple of the message (protobuf-c alone makes 72 MiB of 1 MiB). Packing is
 * protobuf-c's own. One thread per td_codec. */
#ifndef TD_RPC_CODEC_H
#define TD_RPC_CODEC_H

#include <protobuf-c/protobuf-c.h>
#include <stddef.h>
#include <stdint.h>

#include "base/arena.h"
#include "base/err.h"

enum { TD_CODEC_CONST_BYTES = 64 * 1024, TD_CODEC_UNKNOWN_MAX = 64 };

typedef struct td_codec {
    td_arena arena;
    uint64_t unknown_fields; /* skipped so far */
} td_codec;

void td_codec_init(td_codec *c);
void td_codec_done(td_codec *c);

/* Unpack n bytes as a message of `type`. The message lives in the codec until its next unpack;
 * don't free it. 0          *ret_message points to the message (cast it to the generated type)
 * -E2BIG     longer than the type's cap, or past the memory budget
 * -EBADMSG   not a message of this type: cut, missing a required field, bad enum, bad string. err
 * names the field */
int td_codec_unpack(td_codec *c, const ProtobufCMessageDescriptor *type, const void *bytes,
                    size_t n, ProtobufCMessage **ret_message, td_err *reterr_err);

/* Largest packed message of a type. */
size_t td_codec_cap(const ProtobufCMessageDescriptor *type);

/* Typed: TD_UNPACK(&codec, tandem__v1__call, bytes, n, &call, &err) with Tandem__V1__Call *call. */
#define TD_UNPACK(codec, lower, bytes, n, ret, err)                                                \
    td_codec_unpack((codec), &lower##__descriptor, (bytes), (n),                                   \
                    (ProtobufCMessage **)(void *)(ret), (err))

#endif
