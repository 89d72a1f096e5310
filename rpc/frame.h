/* SPDX-License-Identifier: Apache-2.0 */
/* The 24-byte preamble in front of every message (api: wire major 1). Little-endian, fixed. Pure;
 * any thread. */
#ifndef TD_RPC_FRAME_H
#define TD_RPC_FRAME_H

#include <stddef.h>
#include <stdint.h>

enum {
    TD_PREAMBLE_BYTES = 24,
    TD_WIRE_MAGIC = 0x4454 /* "TD" */,
    TD_WIRE_MAJOR = 1,
    TD_WIRE_MINOR = 0
};

typedef enum td_frame_type {
    TD_FRAME_HELLO = 1,
    TD_FRAME_WELCOME = 2,
    TD_FRAME_CALL = 3,
    TD_FRAME_DATA = 4,
    TD_FRAME_BATCH = 5,
    TD_FRAME_CREDIT = 6,
    TD_FRAME_HALF_CLOSE = 7,
    TD_FRAME_CANCEL = 8,
    TD_FRAME_STATUS = 9,
    TD_FRAME_PING = 10,
    TD_FRAME_PONG = 11,
    TD_FRAME_GOAWAY = 12,
    /* KV socket */
    TD_FRAME_KV_SEGMENT = 32,
    TD_FRAME_KV_COMMIT = 33,
    TD_FRAME_KV_ACK = 34,
    /* socket for shared memory */
    TD_FRAME_KV_POOL = 35,
    TD_FRAME_KV_POOL_ACK = 36
} td_frame_type;

enum { TD_FRAME_IGNORABLE = 1 }; /* flag bit 0: skip when the type is unknown */

typedef struct td_preamble {
    uint8_t major, minor, type, flags;
    uint16_t n_attachments; /* frames behind the body */
    uint64_t stream;   /* odd from the binding side, even from the dialling side; 0 = session */
    uint32_t sequence; /* per stream and direction, from 0 */
    uint32_t session;  /* number of the pair's session from WELCOME; 0 in HELLO */
} td_preamble;

void td_preamble_pack(const td_preamble *p, uint8_t out[TD_PREAMBLE_BYTES]);
/* 0; -EPROTO wrong size, magic or major. */
int td_preamble_unpack(const void *bytes, size_t n, td_preamble *ret_p);

/* gRPC status codes. */
typedef enum td_code {
    TD_OK = 0,
    TD_CANCELLED = 1,
    TD_UNKNOWN = 2,
    TD_INVALID_ARGUMENT = 3,
    TD_DEADLINE_EXCEEDED = 4,
    TD_NOT_FOUND = 5,
    TD_ALREADY_EXISTS = 6,
    TD_PERMISSION_DENIED = 7,
    TD_RESOURCE_EXHAUSTED = 8,
    TD_FAILED_PRECONDITION = 9,
    TD_ABORTED = 10,
    TD_OUT_OF_RANGE = 11,
    TD_UNIMPLEMENTED = 12,
    TD_INTERNAL = 13,
    TD_UNAVAILABLE = 14,
    TD_DATA_LOSS = 15,
    TD_UNAUTHENTICATED = 16
} td_code;

#endif
