/* SPDX-License-Identifier: Apache-2.0 */
/* Bytes of the KV socket's messages (proto/kv.proto): sizes are checked here, meaning by
 * handoff/ticket.h. Pure; any thread. A segment is [preamble][KvSegment without
 * payload][tag][payload ...], or [preamble][KvSegment] when its runs lie in a shared pool; all
 * others are [preamble][body]. */
#ifndef TD_HANDOFF_WIRE_H
#define TD_HANDOFF_WIRE_H

#include <stddef.h>
#include <stdint.h>

#include "base/arena.h"
#include "handoff/ticket.h"

enum {
    TD_SEGMENT_RUNS_MAX = 256,   /* runs in one segment */
    TD_SEGMENT_HEAD_MAX = 65536, /* bytes of frame 1 */
    TD_KV_BODY_MAX = 1 << 20,    /* bytes of a commit or ack */
    TD_POOL_BODY_MAX = 512,      /* bytes of a pool's description or its answer */
    TD_PAYLOAD_TAG_BYTES = 6
};

typedef struct td_wire_segment {
    td_ticket_key key;
    td_ticket_terms terms;
    uint32_t group, n_runs;
    int shared;    /* the runs lie in a pool that the sender shared: no payload frames */
    uint64_t pool; /* its number */
    td_kv_run runs[TD_SEGMENT_RUNS_MAX];
} td_wire_segment;

typedef struct td_wire_commit {
    td_ticket_key key;
    td_ticket_terms terms;
    uint32_t n_tokens, n_digests, n_first;
    const uint32_t *digests, *choices, *ids; /* unpacked: in the arena */
} td_wire_commit;

typedef struct td_wire_ack {
    td_ticket_key key;
    uint64_t received_bytes;
    td_ack_state state;
    uint32_t code;
    char reason[32];
} td_wire_ack;

/* What goes with the descriptors of a pool (handoff/shm.h), and the answer. */
typedef struct td_wire_pool {
    uint8_t nonce[32], prefill_epoch[16], decode_epoch[16], layout_hash[16];
    uint64_t pool, bytes;
} td_wire_pool;

typedef struct td_wire_pool_ack {
    uint32_t code;
    char reason[64];
} td_wire_pool_ack;

/* Bytes written to out, or -ENOSPC. */
int td_wire_pack_segment(const td_wire_segment *s, void *out, size_t cap);
int td_wire_pack_commit(const td_wire_commit *c, void *out, size_t cap);
int td_wire_pack_ack(const td_wire_ack *a, void *out, size_t cap);
int td_wire_pack_pool(const td_wire_pool *p, void *out, size_t cap);
int td_wire_pack_pool_ack(const td_wire_pool_ack *a, void *out, size_t cap);

/* Parse bytes from outside. scratch: an arena used for the parse; what ret points to lives there
 * until it is reset. 0; -EPROTO not such a message, a field missing or of a wrong size; -E2BIG too
 * large; -ENOMEM. */
int td_wire_unpack_segment(const void *p, size_t n, td_arena *scratch,
                           td_wire_segment *ret_segment);
int td_wire_unpack_commit(const void *p, size_t n, td_arena *scratch, td_wire_commit *ret_commit);
int td_wire_unpack_ack(const void *p, size_t n, td_arena *scratch, td_wire_ack *ret_ack);
int td_wire_unpack_pool(const void *p, size_t n, td_arena *scratch, td_wire_pool *ret_pool);
int td_wire_unpack_pool_ack(const void *p, size_t n, td_arena *scratch, td_wire_pool_ack *ret_ack);

/* Frame 2: tag of field 15 and the payload's length as a varint padded to 5 bytes; bytes < 2^35. */
void td_wire_payload_tag(uint64_t bytes, uint8_t out[TD_PAYLOAD_TAG_BYTES]);
/* 0, or -EPROTO when p is not exactly that for so many bytes. */
int td_wire_check_tag(const void *p, size_t n, uint64_t bytes);

#endif
