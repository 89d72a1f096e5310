/* SPDX-License-Identifier: Apache-2.0 */
#include "handoff/receive.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/arena.h"
#include "base/bug.h"
#include "base/clock.h"
#include "base/hash.h"
#include "base/list.h"
#include "base/map.h"
#include "handoff/plan.h"
#include "handoff/wire.h"
#include "rpc/frame.h"
#include "rpc/mac.h"
#include "base/banned.h"

enum { ENDED_MAX = 1024, TURN_MESSAGES = 64, SCRATCH_BYTES = 12 << 20 };

typedef struct grant {
    td_list node; /* open, or ended (oldest first) */
    td_ticket_in t;
    /* who sent the last frame that was taken, and as what: it is told when the ticket ends */
    td_bulk_peer from;
    td_ticket_key as_sent;
    int has_from;
    uint8_t mac_key[TD_MAC_KEY_BYTES]; /* private link */
    uint64_t mac_seen;
    void *user;
    /* NULL once ended: what is left is a tombstone that answers repeated commits */
    td_block *blocks;
    td_in_block *expect;
    td_in_first *first;
    void *memory;
} grant;

struct td_receive {
    td_receive_config c;
    const td_kv_layout *layout;
    td_bulk *bulk;
    td_shm_door *door; /* NULL: none */
    td_err no_door;
    td_mac *mac;      /* private link; else NULL */
    uint32_t n_parts; /* of the message at hand, its mac included */
    td_map by_id;     /* first 8 bytes of the ticket -> grant */
    td_list open, ended;
    uint32_t n_ended;
    td_arena scratch;
    td_wire_segment segment;
    uint32_t crcs[TD_SEGMENT_RUNS_MAX];
    td_receive_stats stats;
};

static uint64_t id_key(const uint8_t id[16])
{
    uint64_t k;
    memcpy(&k, id, sizeof k);
    return k;
}

static int open_door(td_receive *r, td_err *reterr_err)
{
    const td_receive_config *c = &r->c;
    td_shm_door_config dc = {.kv_endpoint = td_bulk_endpoint(r->bulk), .uid = geteuid()};
    if (c->transport == TD_KV_ZMQ)
        return 0;
    memcpy(dc.epoch, c->epoch, 16);
    memcpy(dc.layout_hash, r->layout->hash, 16);
    int e = td_shm_door_open(&dc, &r->door, &r->no_door);
    if (e == 0 || (c->transport == TD_KV_AUTO && !c->strict))
        return 0;
    return td_err_set(reterr_err, e, "%s (kv-transport, strict)", r->no_door.text);
}

int td_receive_open(const td_receive_config *config, td_receive **ret_receive, td_err *reterr_err)
{
    td_receive *r = calloc(1, sizeof *r);
    if (!r)
        return td_err_set(reterr_err, -ENOMEM, "KV socket: out of memory");
    r->c = *config;
    r->layout = td_kv_pool_layout(config->pool);
    td_map_init(&r->by_id);
    td_list_init(&r->open);
    td_list_init(&r->ended);
    td_arena_init(&r->scratch, SCRATCH_BYTES);
    int e = td_layout_check(r->layout);
    if (e < 0)
        td_err_set(reterr_err, e,
                   "KV layout: one layer of a block is larger than a frame of %d bytes",
                   TD_KV_FRAME_MAX);
    else
        e = td_bulk_bind(config->endpoint, config->link, &r->bulk, reterr_err);
    if (e == 0 && td_link_kv_private(config->link))
        e = td_mac_new(&r->mac, reterr_err);
    if (e == 0)
        e = open_door(r, reterr_err);
    if (e < 0) {
        td_receive_close(r);
        return e;
    }
    *ret_receive = r;
    return 0;
}

const char *td_receive_endpoint(const td_receive *r)
{
    return td_bulk_endpoint(r->bulk);
}

const td_receive_stats *td_receive_get_stats(const td_receive *r)
{
    return &r->stats;
}

const td_shm_door *td_receive_door(const td_receive *r)
{
    return r->door;
}

const char *td_receive_no_door(const td_receive *r)
{
    return r->no_door.text;
}

td_bulk *td_receive_bulk(td_receive *r)
{
    return r->bulk;
}

uint32_t td_receive_polls(td_receive *r, td_bulk_poll *polls, uint32_t cap)
{
    if (cap == 0)
        return 0;
    polls[0] = (td_bulk_poll){.bulk = r->bulk, .want = TD_BULK_READ};
    return 1 + (r->door ? td_shm_door_polls(r->door, polls + 1, cap - 1) : 0);
}

static void grant_forget(grant *g)
{
    free(g->blocks);
    free(g->expect);
    free(g->first);
    free(g->memory);
    g->blocks = NULL;
    g->expect = NULL;
    g->first = NULL;
    g->memory = NULL;
}

static void grant_free(td_receive *r, grant *g)
{
    td_list_del(&g->node);
    td_map_del(&r->by_id, id_key(g->t.key.id));
    grant_forget(g);
    free(g);
}

static void count(td_receive *r, td_drop d)
{
    if (d)
        atomic_fetch_add_explicit(&r->stats.drops[d], 1, memory_order_relaxed);
}

/* Keep the ticket's end for late frames; the oldest of too many is forgotten (late frames then read
 * UNKNOWN). */
static void grant_ended(td_receive *r, grant *g)
{
    td_list_del(&g->node);
    td_list_add(&r->ended, &g->node);
    grant_forget(g);
    if (++r->n_ended > ENDED_MAX) {
        r->n_ended--;
        grant_free(r, TD_LIST_ENTRY(r->ended.next, grant, node));
    }
}

static int grant_fill(grant *g, const td_receive_grant *spec, uint32_t n_groups)
{
    uint32_t n = spec->n_blocks;
    g->blocks = calloc(n, sizeof *g->blocks);
    g->expect = calloc(n, sizeof *g->expect);
    g->first = calloc(spec->n_first, sizeof *g->first);
    g->memory = malloc(td_ticket_in_bytes(n, n_groups));
    if (!g->blocks || !g->expect || !g->first || !g->memory)
        return -ENOMEM;
    for (uint32_t i = 0; i < n; i++) {
        g->blocks[i] = spec->blocks[i].block;
        g->expect[i] = spec->blocks[i].expect;
    }
    memcpy(g->first, spec->first, spec->n_first * sizeof *g->first);
    return 0;
}

int td_receive_grant_add(td_receive *r, const td_receive_grant *spec, uint64_t now_us)
{
    uint64_t key = id_key(spec->ticket);
    if (td_map_get(&r->by_id, key))
        return -EEXIST;
    grant *g = calloc(1, sizeof *g);
    if (!g)
        return -ENOMEM;
    td_list_init(&g->node);
    TD_BUG_ON((r->mac != NULL) != (spec->mac_key != NULL));
    if (spec->mac_key)
        memcpy(g->mac_key, spec->mac_key, sizeof g->mac_key);
    int e = grant_fill(g, spec, r->layout->n_groups);
    if (e == 0)
        e = td_map_put(&r->by_id, key, g, NULL);
    if (e < 0) {
        grant_forget(g);
        free(g);
        return e;
    }
    td_in_grant in = {.blocks = g->expect,
                      .n_blocks = spec->n_blocks,
                      .n_groups = r->layout->n_groups,
                      .first = g->first,
                      .n_first = spec->n_first,
                      .n_tokens = spec->n_tokens,
                      .credit_bytes = spec->credit_bytes,
                      .deadline_us = spec->deadline_us};
    memcpy(in.key.id, spec->ticket, 16);
    in.key.attempt = spec->attempt;
    in.key.generation = spec->generation;
    memcpy(in.key.decode_epoch, r->c.epoch, 16);
    memcpy(in.terms.model_hash, r->c.model_hash, 32);
    memcpy(in.terms.profile_id, r->c.profile_id, 16);
    memcpy(in.terms.layout_hash, r->layout->hash, 16);
    td_ticket_in_init(&g->t, &in, g->memory, now_us);
    g->user = spec->user;
    td_list_add(&r->open, &g->node);
    return 0;
}

/* g: whose key makes the answer authentic on a private link. Without one (an unknown ticket) nobody
 * would believe it there: the sender hears of it by its router. */
static void send_ack(td_receive *r, const td_bulk_peer *peer, const td_wire_ack *ack,
                     const grant *g)
{
    uint8_t head[TD_PREAMBLE_BYTES], body[512], mac[TD_MAC_PART_BYTES], key[TD_MAC_KEY_BYTES];
    td_preamble p = {.major = TD_WIRE_MAJOR,
                     .minor = TD_WIRE_MINOR,
                     .type = TD_FRAME_KV_ACK,
                     .n_attachments = r->mac != NULL};
    if (r->mac && !g)
        return;
    td_preamble_pack(&p, head);
    int n = td_wire_pack_ack(ack, body, sizeof body);
    TD_BUG_ON(n < 0);
    td_bulk_part parts[3] = {{.data = head, .n = sizeof head},
                             {.data = body, .n = (size_t)n},
                             {.data = mac, .n = sizeof mac}};
    if (r->mac) {
        td_mac_derive(g->mac_key, ack->key.prefill_epoch, ack->key.decode_epoch, key);
        if (td_mac_sign(r->mac, key, TD_MAC_ACK, parts, 2, mac) < 0)
            return;
    }
    /* A lost ack does no harm: the sender asks again by repeating its commit. */
    (void)td_bulk_send(r->bulk, peer, parts, r->mac ? 3 : 2);
}

/* The answer names the sender as its frame does, so that a stale sender hears it too. */
static void ack_ticket(td_receive *r, const td_bulk_peer *peer, const td_ticket_key *as_sent,
                       const grant *g)
{
    const td_ticket_in *t = &g->t;
    td_wire_ack ack = {.key = *as_sent, .received_bytes = t->received_bytes, .code = t->code};
    ack.state = t->state == TD_IN_COMMITTED ? TD_ACK_COMMITTED
                : td_ticket_in_ended(t)     ? TD_ACK_FAILED
                                            : TD_ACK_RECEIVING;
    if (t->why)
        memcpy(ack.reason, td_drop_name(t->why),
               TD_MIN(strlen(td_drop_name(t->why)), sizeof ack.reason - 1));
    send_ack(r, peer, &ack, g);
}

/* Do what the ticket's step asked for. */
static void act(td_receive *r, grant *g, const td_in_actions *a, const td_wire_commit *c)
{
    if (a->deliver) {
        td_receive_figures f = {.bytes = g->t.received_bytes,
                                .transfer_us = g->t.done_us - g->t.first_us};
        for (uint32_t b = 0; b < g->t.n_blocks; b++)
            f.blocks += g->expect[b].rows != 0;
        atomic_fetch_add_explicit(&r->stats.commits, 1, memory_order_relaxed);
        r->c.ops.on_deliver(r->c.arg, g->user, c->ids, c->n_first, &f);
    }
    if (a->release)
        r->c.ops.on_release(r->c.arg, g->user, g->t.code, g->t.why);
    if (a->deliver || a->release)
        grant_ended(r, g);
}

/* An end that no frame brought about: its sender would find out by silence. */
static void act_end(td_receive *r, grant *g, const td_in_actions *a)
{
    if (a->ack && g->has_from)
        ack_ticket(r, &g->from, &g->as_sent, g);
    act(r, g, a, NULL);
}

static void act_frame(td_receive *r, grant *g, const td_in_actions *a, const td_wire_commit *c,
                      const td_bulk_peer *peer, const td_ticket_key *as_sent)
{
    count(r, a->drop);
    if (a->ack)
        ack_ticket(r, peer, as_sent, g);
    if (!a->drop) {
        g->from = *peer;
        g->as_sent = *as_sent;
        g->has_from = 1;
    }
    act(r, g, a, c);
}

/* Private link: is the message at hand from the peer of the ticket, and new? */
static int is_authentic(td_receive *r, grant *g, const td_ticket_key *k)
{
    uint8_t key[TD_MAC_KEY_BYTES];
    if (!r->mac)
        return 1;
    td_mac_derive(g->mac_key, k->prefill_epoch, k->decode_epoch, key);
    return td_mac_check(r->mac, key, TD_MAC_PUSH, r->bulk, r->n_parts, &g->mac_seen) == 0;
}

/* The grant a frame speaks of; an unknown one is answered, so that its sender need not wait for a
 * timeout. A frame that is not authentic changes nothing. */
static grant *find(td_receive *r, const td_bulk_peer *peer, const td_ticket_key *k)
{
    grant *g = td_map_get(&r->by_id, id_key(k->id));
    if (!g && r->c.ops.on_unknown) {
        r->c.ops.on_unknown(r->c.arg);
        g = td_map_get(&r->by_id, id_key(k->id));
    }
    if (g && memcmp(g->t.key.id, k->id, 16) == 0) {
        if (is_authentic(r, g, k))
            return g;
        count(r, TD_DROP_MAC);
        return NULL;
    }
    count(r, TD_DROP_UNKNOWN);
    td_wire_ack ack = {.key = *k, .state = TD_ACK_UNKNOWN};
    send_ack(r, peer, &ack, NULL);
    return NULL;
}

/* Sizes of all payload frames against the geometry of the runs; nothing is read yet. */
static int check_frames(const td_receive *r, uint32_t n_parts)
{
    const td_kv_group *g = &r->layout->groups[r->segment.group];
    uint32_t part = 3;
    for (uint32_t i = 0; i < r->segment.n_runs; i++) {
        uint32_t rows = r->segment.runs[i].rows, n = td_run_frames(g, rows);
        if (n > n_parts - part)
            return -EPROTO;
        for (uint32_t f = 0; f < n; f++) {
            uint64_t offset, bytes;
            size_t have;
            td_run_frame(g, rows, f, &offset, &bytes);
            td_bulk_part_data(r->bulk, part++, &have);
            if (have != bytes)
                return -EPROTO;
        }
    }
    return part == n_parts ? 0 : -EPROTO;
}

static void copy_frames(td_receive *r, const grant *to)
{
    const td_kv_group *g = &r->layout->groups[r->segment.group];
    uint32_t part = 3;
    for (uint32_t i = 0; i < r->segment.n_runs; i++) {
        const td_kv_run *run = &r->segment.runs[i];
        uint8_t *block = td_kv_data(r->c.pool, to->blocks[run->block]);
        uint32_t crc = 0;
        for (uint32_t f = 0, n = td_run_frames(g, run->rows); f < n; f++) {
            uint64_t offset, bytes;
            size_t have;
            td_run_frame(g, run->rows, f, &offset, &bytes);
            const void *data = td_bulk_part_data(r->bulk, part++, &have);
            crc = td_crc32c_copy(crc, block + offset, data, bytes);
        }
        r->crcs[i] = crc;
    }
}

/* The same out of a pool that the sender shares. What it says is checked against the geometry and
 * the mapping before a byte is read, and what was read counts only if its owner kept it until then.
 */
static td_drop copy_shared(td_receive *r, const grant *to)
{
    const td_kv_group *g = &r->layout->groups[r->segment.group];
    const td_shm_pool *pool =
        r->door ? td_shm_door_find(r->door, r->segment.key.prefill_epoch, r->segment.pool) : NULL;
    if (!pool)
        return TD_DROP_POOL;
    for (uint32_t i = 0; i < r->segment.n_runs; i++) {
        const td_kv_run *run = &r->segment.runs[i];
        uint8_t *block = td_kv_data(r->c.pool, to->blocks[run->block]);
        const uint8_t *from = td_shm_pool_range(pool, run->offset, g->bytes);
        uint32_t crc = 0;
        if (!from || run->length != td_run_bytes(g, run->rows))
            return TD_DROP_POOL;
        for (uint32_t f = 0, n = td_run_frames(g, run->rows); f < n; f++) {
            uint64_t offset, bytes;
            td_run_frame(g, run->rows, f, &offset, &bytes);
            crc = td_crc32c_copy(crc, block + offset, from + (offset - g->offset), bytes);
        }
        r->crcs[i] = crc;
    }
    return td_shm_pool_is_withdrawn(pool) ? TD_DROP_POOL : TD_DROP_NONE;
}

/* Payload bytes of the segment at hand; kind becomes BAD_FRAME when its parts are not those of a
 * segment of its form. */
static uint64_t segment_bytes(td_receive *r, uint32_t n_parts, td_in_event *e)
{
    size_t n;
    uint64_t bytes = 0;
    if (r->segment.shared) {
        for (uint32_t i = 0; i < r->segment.n_runs; i++)
            bytes += r->segment.runs[i].length;
        if (n_parts != 2)
            e->kind = TD_IN_BAD_FRAME;
        return bytes;
    }
    for (uint32_t i = 3; i < n_parts; i++) {
        td_bulk_part_data(r->bulk, i, &n);
        bytes += n;
    }
    const void *tag = n_parts > 2 ? td_bulk_part_data(r->bulk, 2, &n) : (n = 0, "");
    if (td_wire_check_tag(tag, n, bytes) < 0)
        e->kind = TD_IN_BAD_FRAME;
    return bytes;
}

/* The head was good: take the payload. */
static void take_payload(td_receive *r, const grant *g, uint32_t n_parts, td_in_event *e)
{
    td_drop why = TD_DROP_NONE;
    if (r->segment.shared)
        why = copy_shared(r, g);
    else if (r->c.transport == TD_KV_SHM)
        why = TD_DROP_POOL;
    else if (check_frames(r, n_parts) < 0)
        why = TD_DROP_FORMAT;
    else
        copy_frames(r, g);
    e->kind = why ? TD_IN_BAD_FRAME : TD_IN_SEGMENT_BODY;
    e->why = why;
    if (why)
        return;
    atomic_fetch_add_explicit(&r->stats.segments, 1, memory_order_relaxed);
    atomic_fetch_add_explicit(&r->stats.bytes, e->bytes, memory_order_relaxed);
    if (r->segment.shared)
        atomic_fetch_add_explicit(&r->stats.shm_bytes, e->bytes, memory_order_relaxed);
}

/* Which blocks did the segment at hand complete? */
static void tell_blocks(td_receive *r, const grant *g)
{
    td_block whole[TD_SEGMENT_RUNS_MAX];
    uint32_t n = 0, n_groups = g->t.n_groups;
    for (uint32_t i = 0; i < r->segment.n_runs; i++) {
        uint32_t b = r->segment.runs[i].block;
        if (!memchr(g->t.seen + (size_t)b * n_groups, 0, n_groups))
            whole[n++] = g->blocks[b];
    }
    if (n)
        r->c.ops.on_blocks(r->c.arg, g->user, whole, n);
}

static void on_segment(td_receive *r, const td_bulk_peer *peer, uint32_t n_parts, uint64_t now_us)
{
    size_t n;
    const void *p = td_bulk_part_data(r->bulk, 1, &n);
    if (td_wire_unpack_segment(p, n, &r->scratch, &r->segment) < 0) {
        count(r, TD_DROP_FORMAT);
        return;
    }
    grant *g = find(r, peer, &r->segment.key);
    if (!g)
        return;
    td_in_event e = {.kind = TD_IN_SEGMENT_HEAD,
                     .key = &r->segment.key,
                     .terms = &r->segment.terms,
                     .group = r->segment.group,
                     .runs = r->segment.runs,
                     .crcs = r->crcs,
                     .n_runs = r->segment.n_runs};
    td_in_actions a;
    e.bytes = segment_bytes(r, n_parts, &e);
    td_ticket_in_step(&g->t, &e, now_us, &a);
    if (a.copy) {
        take_payload(r, g, n_parts, &e);
        td_ticket_in_step(&g->t, &e, now_us, &a);
        if (r->c.ops.on_blocks && !td_ticket_in_ended(&g->t))
            tell_blocks(r, g);
    }
    act_frame(r, g, &a, NULL, peer, &r->segment.key);
}

static void on_commit(td_receive *r, const td_bulk_peer *peer, uint64_t now_us)
{
    size_t n;
    td_wire_commit c;
    const void *p = td_bulk_part_data(r->bulk, 1, &n);
    if (td_wire_unpack_commit(p, n, &r->scratch, &c) < 0) {
        count(r, TD_DROP_FORMAT);
        return;
    }
    grant *g = find(r, peer, &c.key);
    if (!g)
        return;
    td_in_event e = {.kind = TD_IN_COMMIT,
                     .key = &c.key,
                     .terms = &c.terms,
                     .digests = c.digests,
                     .n_digests = c.n_digests,
                     .n_tokens = c.n_tokens,
                     .choices = c.choices,
                     .ids = c.ids,
                     .n_first = c.n_first};
    td_in_actions a;
    td_ticket_in_step(&g->t, &e, now_us, &a);
    act_frame(r, g, &a, &c, peer, &c.key);
}

static void on_message(td_receive *r, const td_bulk_peer *peer, uint32_t n_parts, uint64_t now_us)
{
    size_t n;
    td_preamble p;
    const void *head = td_bulk_part_data(r->bulk, 0, &n);
    td_arena_reset(&r->scratch);
    r->n_parts = n_parts;
    if (r->mac && n_parts > 2) /* the mac stands behind everything else */
        n_parts--;
    if (n_parts < 2 || td_preamble_unpack(head, n, &p) < 0 || p.n_attachments != r->n_parts - 2)
        count(r, TD_DROP_FORMAT);
    else if (p.type == TD_FRAME_KV_SEGMENT)
        on_segment(r, peer, n_parts, now_us);
    else if (p.type == TD_FRAME_KV_COMMIT && n_parts == 2)
        on_commit(r, peer, now_us);
    else if (!(p.flags & TD_FRAME_IGNORABLE))
        count(r, TD_DROP_FORMAT);
}

static void expire(td_receive *r, uint64_t now_us)
{
    td_in_event e = {.kind = TD_IN_TICK};
    for (td_list *l = r->open.next, *next; l != &r->open; l = next) {
        next = l->next;
        grant *g = TD_LIST_ENTRY(l, grant, node);
        td_in_actions a;
        td_ticket_in_step(&g->t, &e, now_us, &a);
        act_end(r, g, &a);
    }
}

int td_receive_run(td_receive *r, uint64_t now_us)
{
    int more = 1;
    for (int i = 0; i < TURN_MESSAGES && more; i++) {
        td_bulk_peer peer;
        uint32_t n;
        int e = td_bulk_recv(r->bulk, &peer, &n);
        if (e == 0)
            on_message(r, &peer, n, td_now_us());
        else if (e == -EBADMSG)
            count(r, TD_DROP_FORMAT);
        else
            more = 0;
    }
    if (now_us >= td_receive_due(r))
        expire(r, now_us);
    /* after the messages: the pool of a sender that has just ended is there for what it sent */
    if (r->door)
        td_shm_door_run(r->door, now_us);
    return more;
}

uint64_t td_receive_due(const td_receive *r)
{
    uint64_t due = r->door ? td_shm_door_due(r->door) : UINT64_MAX;
    for (const td_list *l = r->open.next; l != &r->open; l = l->next) {
        uint64_t d = td_ticket_in_due(&TD_LIST_ENTRY(l, const grant, node)->t);
        due = TD_MIN(due, d);
    }
    return due;
}

void td_receive_cancel(td_receive *r, const uint8_t ticket[16], uint32_t code, uint64_t now_us)
{
    grant *g = td_map_get(&r->by_id, id_key(ticket));
    if (!g || memcmp(g->t.key.id, ticket, 16) != 0)
        return;
    td_in_event e = {.kind = TD_IN_CANCEL, .code = code};
    td_in_actions a;
    td_ticket_in_step(&g->t, &e, now_us, &a);
    act_end(r, g, &a);
}

void td_receive_close(td_receive *r)
{
    if (!r)
        return;
    while (!td_list_empty(&r->open)) {
        grant *g = TD_LIST_ENTRY(r->open.next, grant, node);
        td_receive_cancel(r, g->t.key.id, TD_CANCELLED, td_now_us());
    }
    while (!td_list_empty(&r->ended))
        grant_free(r, TD_LIST_ENTRY(r->ended.next, grant, node));
    td_shm_door_close(r->door);
    td_bulk_close(r->bulk);
    td_mac_free(r->mac);
    td_map_done(&r->by_id);
    td_arena_done(&r->scratch);
    free(r);
}
