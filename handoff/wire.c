/* SPDX-License-Identifier: Apache-2.0 */
#include "handoff/wire.h"

#include <errno.h>
#include <string.h>

#include "base/bug.h"
#include "proto/kv.pb-c.h"
#include "base/banned.h"

typedef ProtobufCBinaryData bin;

static bin bin_of(const void *p, size_t n)
{
    return (bin){.len = n, .data = (uint8_t *)(uintptr_t)p};
}

/* The fields that every message has under the same names. */
#define PACK_KEY(m, k)                                                                             \
    do {                                                                                           \
        (m).ticket = bin_of((k)->id, 16);                                                          \
        (m).attempt = (k)->attempt;                                                                \
        (m).generation = (k)->generation;                                                          \
        (m).prefill_epoch = bin_of((k)->prefill_epoch, 16);                                        \
        (m).decode_epoch = bin_of((k)->decode_epoch, 16);                                          \
    } while (0)
#define PACK_TERMS(m, t)                                                                           \
    do {                                                                                           \
        (m).model_hash = bin_of((t)->model_hash, 32);                                              \
        (m).profile_id = bin_of((t)->profile_id, 16);                                              \
        (m).layout_hash = bin_of((t)->layout_hash, 16);                                            \
    } while (0)

static int take(const bin *b, void *out, size_t n)
{
    if (b->len != n)
        return -EPROTO;
    memcpy(out, b->data, n);
    return 0;
}

static int take_key(td_ticket_key *k, const bin *ticket, uint32_t attempt, uint32_t generation,
                    const bin *prefill, const bin *decode)
{
    k->attempt = attempt;
    k->generation = generation;
    if (take(ticket, k->id, 16) || take(prefill, k->prefill_epoch, 16) ||
        take(decode, k->decode_epoch, 16))
        return -EPROTO;
    return 0;
}

static int take_terms(td_ticket_terms *t, const bin *model, const bin *profile, const bin *layout)
{
    if (take(model, t->model_hash, 32) || take(profile, t->profile_id, 16) ||
        take(layout, t->layout_hash, 16))
        return -EPROTO;
    return 0;
}

static int pack_message(const ProtobufCMessage *m, void *out, size_t cap)
{
    if (protobuf_c_message_get_packed_size(m) > cap)
        return -ENOSPC;
    return (int)protobuf_c_message_pack(m, out);
}

int td_wire_pack_segment(const td_wire_segment *s, void *out, size_t cap)
{
    Tandem__V1__KvRun runs[TD_SEGMENT_RUNS_MAX], *list[TD_SEGMENT_RUNS_MAX];
    Tandem__V1__KvSegment m = TANDEM__V1__KV_SEGMENT__INIT;
    TD_BUG_ON(s->n_runs > TD_SEGMENT_RUNS_MAX);
    PACK_KEY(m, &s->key);
    PACK_TERMS(m, &s->terms);
    m.group = s->group;
    for (uint32_t i = 0; i < s->n_runs; i++) {
        const td_kv_run *r = &s->runs[i];
        tandem__v1__kv_run__init(&runs[i]);
        runs[i].block = r->block;
        runs[i].rows = r->rows;
        runs[i].crc32c = r->crc;
        runs[i].has_chain = r->has_chain;
        if (r->has_chain)
            runs[i].chain = bin_of(r->chain, 16);
        runs[i].has_offset = runs[i].has_length = s->shared;
        runs[i].offset = r->offset;
        runs[i].length = r->length;
        list[i] = &runs[i];
    }
    m.n_runs = s->n_runs;
    m.runs = list;
    m.has_pool = s->shared;
    m.pool = s->pool;
    return pack_message(&m.base, out, cap);
}

int td_wire_pack_commit(const td_wire_commit *c, void *out, size_t cap)
{
    Tandem__V1__KvCommit m = TANDEM__V1__KV_COMMIT__INIT;
    PACK_KEY(m, &c->key);
    PACK_TERMS(m, &c->terms);
    m.n_tokens = c->n_tokens;
    m.digests = bin_of(c->digests, c->n_digests * 4ul);
    m.choices = bin_of(c->choices, c->n_first * 4ul);
    m.first = bin_of(c->ids, c->n_first * 4ul);
    return pack_message(&m.base, out, cap);
}

int td_wire_pack_ack(const td_wire_ack *a, void *out, size_t cap)
{
    Tandem__V1__KvAck m = TANDEM__V1__KV_ACK__INIT;
    PACK_KEY(m, &a->key);
    m.received_bytes = a->received_bytes;
    m.state = (Tandem__V1__KvState)a->state;
    m.has_code = a->code != 0;
    m.code = a->code;
    m.has_reason = a->reason[0] != 0;
    m.reason = bin_of(a->reason, strlen(a->reason));
    return pack_message(&m.base, out, cap);
}

int td_wire_pack_pool(const td_wire_pool *p, void *out, size_t cap)
{
    Tandem__V1__KvPool m = TANDEM__V1__KV_POOL__INIT;
    m.nonce = bin_of(p->nonce, 32);
    m.prefill_epoch = bin_of(p->prefill_epoch, 16);
    m.decode_epoch = bin_of(p->decode_epoch, 16);
    m.layout_hash = bin_of(p->layout_hash, 16);
    m.pool = p->pool;
    m.bytes = p->bytes;
    return pack_message(&m.base, out, cap);
}

int td_wire_pack_pool_ack(const td_wire_pool_ack *a, void *out, size_t cap)
{
    Tandem__V1__KvPoolAck m = TANDEM__V1__KV_POOL_ACK__INIT;
    m.code = a->code;
    m.has_reason = a->reason[0] != 0;
    m.reason = bin_of(a->reason, strlen(a->reason));
    return pack_message(&m.base, out, cap);
}

/* protobuf-c allocates a piece at a time; the arena bounds what a small message can grow into. */
static void *arena_alloc(void *arena, size_t n)
{
    return td_arena_alloc(arena, n);
}

static void arena_free(void *arena, void *p)
{
    (void)arena;
    (void)p;
}

static int unpack_message(const ProtobufCMessageDescriptor *d, const void *p, size_t n, size_t max,
                          td_arena *scratch, void *ret_message)
{
    if (n > max)
        return -E2BIG;
    ProtobufCAllocator a = {.alloc = arena_alloc, .free = arena_free, .allocator_data = scratch};
    ProtobufCMessage *m = protobuf_c_message_unpack(d, &a, n, p);
    if (!m)
        return td_arena_failed(scratch) ? -ENOMEM : -EPROTO;
    *(ProtobufCMessage **)ret_message = m;
    return 0;
}

static int take_run(td_kv_run *r, const Tandem__V1__KvRun *m, int shared)
{
    *r = (td_kv_run){.block = m->block,
                     .rows = m->rows,
                     .crc = m->crc32c,
                     .offset = m->has_offset ? m->offset : 0,
                     .length = m->has_length ? m->length : 0,
                     .has_chain = m->has_chain};
    if (m->has_offset != shared || m->has_length != shared)
        return -EPROTO;
    return m->has_chain ? take(&m->chain, r->chain, 16) : 0;
}

int td_wire_unpack_segment(const void *p, size_t n, td_arena *scratch, td_wire_segment *s)
{
    Tandem__V1__KvSegment *m;
    int r =
        unpack_message(&tandem__v1__kv_segment__descriptor, p, n, TD_SEGMENT_HEAD_MAX, scratch, &m);
    if (r < 0)
        return r;
    if (m->n_runs == 0 || m->has_payload)
        return -EPROTO;
    if (m->n_runs > TD_SEGMENT_RUNS_MAX)
        return -E2BIG;
    if (take_key(&s->key, &m->ticket, m->attempt, m->generation, &m->prefill_epoch,
                 &m->decode_epoch) ||
        take_terms(&s->terms, &m->model_hash, &m->profile_id, &m->layout_hash))
        return -EPROTO;
    s->group = m->group;
    s->n_runs = (uint32_t)m->n_runs;
    s->shared = m->has_pool != 0;
    s->pool = m->has_pool ? m->pool : 0;
    for (uint32_t i = 0; i < s->n_runs; i++) {
        if (take_run(&s->runs[i], m->runs[i], s->shared))
            return -EPROTO;
    }
    return 0;
}

/* u32 little-endian array; copied so that it is aligned. */
static int take_u32s(const bin *b, td_arena *scratch, const uint32_t **ret_v, uint32_t *ret_n)
{
    if (b->len % 4)
        return -EPROTO;
    uint32_t *v = td_arena_alloc(scratch, b->len);
    if (!v)
        return -ENOMEM;
    if (b->len)
        memcpy(v, b->data, b->len);
    *ret_v = v;
    *ret_n = (uint32_t)(b->len / 4);
    return 0;
}

int td_wire_unpack_commit(const void *p, size_t n, td_arena *scratch, td_wire_commit *c)
{
    Tandem__V1__KvCommit *m;
    uint32_t n_ids = 0;
    int r = unpack_message(&tandem__v1__kv_commit__descriptor, p, n, TD_KV_BODY_MAX, scratch, &m);
    if (r < 0)
        return r;
    if (take_key(&c->key, &m->ticket, m->attempt, m->generation, &m->prefill_epoch,
                 &m->decode_epoch) ||
        take_terms(&c->terms, &m->model_hash, &m->profile_id, &m->layout_hash))
        return -EPROTO;
    c->n_tokens = m->n_tokens;
    if ((r = take_u32s(&m->digests, scratch, &c->digests, &c->n_digests)) < 0 ||
        (r = take_u32s(&m->choices, scratch, &c->choices, &c->n_first)) < 0 ||
        (r = take_u32s(&m->first, scratch, &c->ids, &n_ids)) < 0)
        return r;
    return n_ids == c->n_first ? 0 : -EPROTO;
}

/* It goes to logs: printable only. */
static void take_reason(char *out, size_t cap, int has, const bin *b)
{
    size_t len = has ? TD_MIN(b->len, cap - 1) : 0;
    memset(out, 0, cap);
    for (size_t i = 0; i < len; i++)
        out[i] = b->data[i] > 32 && b->data[i] < 127 ? (char)b->data[i] : '_';
}

int td_wire_unpack_ack(const void *p, size_t n, td_arena *scratch, td_wire_ack *a)
{
    Tandem__V1__KvAck *m;
    int r = unpack_message(&tandem__v1__kv_ack__descriptor, p, n, TD_KV_BODY_MAX, scratch, &m);
    if (r < 0)
        return r;
    if (take_key(&a->key, &m->ticket, m->attempt, m->generation, &m->prefill_epoch,
                 &m->decode_epoch))
        return -EPROTO;
    if ((int)m->state < TD_ACK_RECEIVING || (int)m->state > TD_ACK_UNKNOWN)
        return -EPROTO;
    a->received_bytes = m->received_bytes;
    a->state = (td_ack_state)m->state;
    a->code = m->has_code ? m->code : 0;
    take_reason(a->reason, sizeof a->reason, m->has_reason, &m->reason);
    return 0;
}

int td_wire_unpack_pool(const void *p, size_t n, td_arena *scratch, td_wire_pool *q)
{
    Tandem__V1__KvPool *m;
    int r = unpack_message(&tandem__v1__kv_pool__descriptor, p, n, TD_POOL_BODY_MAX, scratch, &m);
    if (r < 0)
        return r;
    if (take(&m->nonce, q->nonce, 32) || take(&m->prefill_epoch, q->prefill_epoch, 16) ||
        take(&m->decode_epoch, q->decode_epoch, 16) || take(&m->layout_hash, q->layout_hash, 16))
        return -EPROTO;
    q->pool = m->pool;
    q->bytes = m->bytes;
    return 0;
}

int td_wire_unpack_pool_ack(const void *p, size_t n, td_arena *scratch, td_wire_pool_ack *a)
{
    Tandem__V1__KvPoolAck *m;
    int r =
        unpack_message(&tandem__v1__kv_pool_ack__descriptor, p, n, TD_POOL_BODY_MAX, scratch, &m);
    if (r < 0)
        return r;
    a->code = m->code;
    take_reason(a->reason, sizeof a->reason, m->has_reason, &m->reason);
    return 0;
}

void td_wire_payload_tag(uint64_t bytes, uint8_t out[TD_PAYLOAD_TAG_BYTES])
{
    TD_BUG_ON(bytes >> 35);
    out[0] = 15 << 3 | 2;
    for (int i = 1; i < TD_PAYLOAD_TAG_BYTES; i++) {
        out[i] = (uint8_t)(bytes & 127) | (i < TD_PAYLOAD_TAG_BYTES - 1 ? 128 : 0);
        bytes >>= 7;
    }
}

int td_wire_check_tag(const void *p, size_t n, uint64_t bytes)
{
    uint8_t want[TD_PAYLOAD_TAG_BYTES];
    if (n != sizeof want || bytes >> 35)
        return -EPROTO;
    td_wire_payload_tag(bytes, want);
    return memcmp(p, want, n) == 0 ? 0 : -EPROTO;
}
