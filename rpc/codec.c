/* SPDX-License-Identifier: Apache-2.0 */
#include "rpc/codec.h"

#include <errno.h>
#include <string.h>

#include "base/bug.h"
#include "base/strbuf.h"
#include "proto/engine.pb-c.h"
#include "proto/inference.pb-c.h"
#include "proto/rpc.pb-c.h"
#include "base/banned.h"

#define KIB 1024u
#define MIB (1024u * 1024u)

/* Size caps (proto/README.md) and memory per byte of message. Messages that consist of many small
 * ones need more than 4: a TopLogprob of one entry has 14 bytes on the wire and 140 here. */
static const struct {
    const ProtobufCMessageDescriptor *type;
    uint32_t cap_bytes, factor;
} caps[] = {
    {&tandem__v1__call__descriptor, 8 * MIB + 64 * KIB, 4},
    {&tandem__v1__data__descriptor, 16 * MIB + 64 * KIB, 4},
    {&tandem__v1__batch__descriptor, 4 * MIB, 12},
    {&tandem__v1__request__descriptor, 8 * MIB, 6},
    {&tandem__v1__reserve_request__descriptor, 8 * MIB, 6},
    {&tandem__v1__prefill_request__descriptor, 8 * MIB, 6},
    {&tandem__v1__decode_event__descriptor, 1 * MIB, 12},
    {&tandem__v1__prefill_reply__descriptor, 16 * MIB, 12},
    {&tandem__v1__generate_request__descriptor, 8 * MIB, 6},
    {&tandem__v1__generate_reply__descriptor, 1 * MIB, 4},
};
enum { CAP_DEFAULT = 64 * KIB, FACTOR_DEFAULT = 4, DEPTH_MAX = 8 };

static void cap_of(const ProtobufCMessageDescriptor *type, size_t *ret_cap, size_t *ret_factor)
{
    *ret_cap = CAP_DEFAULT;
    *ret_factor = FACTOR_DEFAULT;
    for (size_t i = 0; i < TD_ARRAY_LEN(caps); i++)
        if (caps[i].type == type) {
            *ret_cap = caps[i].cap_bytes;
            *ret_factor = caps[i].factor;
        }
}

size_t td_codec_cap(const ProtobufCMessageDescriptor *type)
{
    size_t cap, factor;
    cap_of(type, &cap, &factor);
    return cap;
}

/* ---- the pass over the wire form ---- */

typedef struct scan {
    const uint8_t *p, *end;
    uint32_t n_unknown;
    td_err *err;
} scan;

enum { WIRE_VARINT = 0, WIRE_64 = 1, WIRE_BYTES = 2, WIRE_32 = 5 };

static int scan_message(scan *s, const ProtobufCMessageDescriptor *type, const uint8_t *end,
                        int depth);

static int bad(scan *s, const ProtobufCMessageDescriptor *type, const char *field, const char *why)
{
    return td_err_set(s->err, -EBADMSG, "%s.%s: %s", type->name, field, why);
}

static int read_varint(scan *s, const uint8_t *end, uint64_t *ret_v)
{
    uint64_t v = 0;
    for (unsigned shift = 0; shift < 64 && s->p < end; shift += 7) {
        uint8_t b = *s->p++;
        v |= (uint64_t)(b & 0x7f) << shift;
        if (!(b & 0x80)) {
            *ret_v = v;
            return 0;
        }
    }
    return -EBADMSG;
}

/* Read the value behind a tag: *ret_v is the varint, or the length of the bytes at s->p. */
static int read_value(scan *s, const uint8_t *end, unsigned wire, uint64_t *ret_v)
{
    size_t left = (size_t)(end - s->p), fixed = wire == WIRE_64 ? 8 : 4;
    switch (wire) {
    case WIRE_VARINT:
        return read_varint(s, end, ret_v);
    case WIRE_64:
    case WIRE_32:
        if (left < fixed)
            return -EBADMSG;
        s->p += fixed;
        return 0;
    case WIRE_BYTES:
        if (read_varint(s, end, ret_v) < 0 || *ret_v > (size_t)(end - s->p))
            return -EBADMSG;
        return 0;
    default: /* groups are not in any of our messages */
        return -EBADMSG;
    }
}

static int check_string(const uint8_t *p, size_t n)
{
    return !memchr(p, 0, n) && td_utf8_valid((const char *)p, n);
}

static int check_enum(const ProtobufCFieldDescriptor *f, uint64_t v)
{
    return v <= INT32_MAX && protobuf_c_enum_descriptor_get_value(f->descriptor, (int)v);
}

static int scan_bytes(scan *s, const ProtobufCMessageDescriptor *type,
                      const ProtobufCFieldDescriptor *f, size_t n, int depth)
{
    const uint8_t *end = s->p + n;
    if (f && f->type == PROTOBUF_C_TYPE_MESSAGE)
        return scan_message(s, f->descriptor, end, depth + 1);
    if (f && f->type == PROTOBUF_C_TYPE_STRING && !check_string(s->p, n))
        return bad(s, type, f->name, "is not UTF-8 without NUL: send text");
    if (f && f->type == PROTOBUF_C_TYPE_ENUM) /* packed */
        return bad(s, type, f->name, "packed enums are not used");
    s->p = end;
    return 0;
}

/* Repeated numbers may come packed or not. */
static int wire_fits(const ProtobufCFieldDescriptor *f, unsigned wire)
{
    switch (f->type) {
    case PROTOBUF_C_TYPE_STRING:
    case PROTOBUF_C_TYPE_BYTES:
    case PROTOBUF_C_TYPE_MESSAGE:
        return wire == WIRE_BYTES;
    case PROTOBUF_C_TYPE_FLOAT:
    case PROTOBUF_C_TYPE_FIXED32:
    case PROTOBUF_C_TYPE_SFIXED32:
        return wire == WIRE_32 || (wire == WIRE_BYTES && f->label == PROTOBUF_C_LABEL_REPEATED);
    case PROTOBUF_C_TYPE_DOUBLE:
    case PROTOBUF_C_TYPE_FIXED64:
    case PROTOBUF_C_TYPE_SFIXED64:
        return wire == WIRE_64 || (wire == WIRE_BYTES && f->label == PROTOBUF_C_LABEL_REPEATED);
    default:
        return wire == WIRE_VARINT || (wire == WIRE_BYTES && f->label == PROTOBUF_C_LABEL_REPEATED);
    }
}

static int scan_field(scan *s, const ProtobufCMessageDescriptor *type, const uint8_t *end,
                      int depth)
{
    uint64_t tag, v = 0;
    if (read_varint(s, end, &tag) < 0 || tag > UINT32_MAX || tag >> 3 == 0)
        return bad(s, type, "", "bad tag");
    const ProtobufCFieldDescriptor *f =
        protobuf_c_message_descriptor_get_field(type, (unsigned)(tag >> 3));
    if (!f && ++s->n_unknown > TD_CODEC_UNKNOWN_MAX)
        return bad(s, type, "", "too many unknown fields");
    const char *name = f ? f->name : "(unknown)";
    if (read_value(s, end, tag & 7, &v) < 0)
        return bad(s, type, name, "cut or malformed");
    if (f && !wire_fits(f, tag & 7))
        return bad(s, type, name, "wrong wire type");
    if (f && f->type == PROTOBUF_C_TYPE_ENUM && !check_enum(f, v))
        return bad(s, type, name, "no such value");
    return (tag & 7) == WIRE_BYTES ? scan_bytes(s, type, f, (size_t)v, depth) : 0;
}

static int scan_message(scan *s, const ProtobufCMessageDescriptor *type, const uint8_t *end,
                        int depth)
{
    if (depth > DEPTH_MAX)
        return bad(s, type, "", "nested too deeply");
    while (s->p < end) {
        int r = scan_field(s, type, end, depth);
        if (r < 0)
            return r;
    }
    return 0;
}

/* ---- unpack ---- */

static void *arena_alloc(void *arena, size_t n)
{
    return td_arena_alloc(arena, n);
}

/* The arena is freed as a whole. */
static void arena_free(void *arena, void *p)
{
    (void)arena;
    (void)p;
}

void td_codec_init(td_codec *c)
{
    td_arena_init(&c->arena, TD_CODEC_CONST_BYTES);
    c->unknown_fields = 0;
}

void td_codec_done(td_codec *c)
{
    td_arena_done(&c->arena);
}

int td_codec_unpack(td_codec *c, const ProtobufCMessageDescriptor *type, const void *bytes,
                    size_t n, ProtobufCMessage **ret_message, td_err *err)
{
    size_t cap, factor;
    cap_of(type, &cap, &factor);
    if (n > cap)
        return td_err_set(err, -E2BIG, "%s: %zu bytes, at most %zu are taken", type->name, n, cap);
    static const uint8_t nothing[1];
    scan s = {.p = n ? bytes : nothing, .err = err};
    int r = scan_message(&s, type, s.p + n, 0);
    if (r < 0)
        return r;
    c->unknown_fields += s.n_unknown;
    td_arena_reset(&c->arena);
    c->arena.limit_bytes = n * factor + TD_CODEC_CONST_BYTES;
    if (c->arena.used_bytes >
        c->arena.limit_bytes) /* the chunk kept of a large message would lift the budget */
        td_arena_done(&c->arena);
    ProtobufCAllocator a = {arena_alloc, arena_free, &c->arena};
    ProtobufCMessage *m = protobuf_c_message_unpack(type, &a, n, n ? bytes : nothing);
    if (!m && td_arena_failed(&c->arena))
        return td_err_set(err, -E2BIG, "%s: unpacks to more than %zu bytes", type->name,
                          c->arena.limit_bytes);
    if (!m)
        return td_err_set(err, -EBADMSG, "%s: a required field is missing or has the wrong type",
                          type->name);
    *ret_message = m;
    return 0;
}
