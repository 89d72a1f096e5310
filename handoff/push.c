/* SPDX-License-Identifier: Apache-2.0 */
#include "handoff/push.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/arena.h"
#include "base/bug.h"
#include "base/clock.h"
#include "base/hash.h"
#include "base/list.h"
#include "handoff/plan.h"
#include "handoff/shm_line.h"
#include "handoff/wire.h"
#include "rpc/frame.h"
#include "rpc/mac.h"
#include "base/banned.h"

enum {
    PEERS_MAX = 128,
    ACK_PARTS = 2,
    SEGMENT_FRAMES_MAX = 512, /* bounds what the receiver's libzmq holds of one message */
    SEGMENT_BYTES_MAX = 4 << 20,
    SCRATCH_BYTES = 12 << 20,
    IDLE_US = 30000000,   /* a connection without pushes is closed after this */
    FLIGHT_POLL_US = 1000 /* free callbacks wake nobody: look again after this */
};

/* One life of a decode worker. */
typedef struct peer {
    td_list node;
    char *endpoint;
    uint8_t epoch[16];
    uint8_t key[TD_CURVE_KEY_BYTES]; /* with keys: of the decode worker */
    int is_private;                  /* messages carry a mac */
    td_bulk *bulk;                   /* NULL: closed by force, frames still coming back */
    td_shm_line *line;               /* NULL: blocks go over the socket */
    int on_this_host;                /* for certain */
    int ready;                       /* it is decided which */
    int is_out_of_reach;             /* shared memory is a must and was refused: pushes fail */
    char why[32];                    /* then */
    uint32_t n_pushes;
    uint64_t idle_us;
    int blocked; /* the last send gave -EAGAIN */
} peer;

struct td_push {
    td_list node;
    td_pusher *pusher;
    peer *peer;
    td_ticket_out t;
    void *user;
    uint8_t mac_key[TD_MAC_KEY_BYTES]; /* private link */
    uint64_t mac_seen;
    _Atomic uint32_t flight;
    td_push_block *blocks;
    uint32_t *crcs; /* [cap][n_groups] */
    uint32_t n_blocks, cap;
    uint32_t lo, hi, group, next; /* the part being sent: blocks [lo, hi), of group `group` those
                                     before `next` went out */
    int want_commit;
    uint32_t n_tokens, n_first, choices[TD_CHOICES_MAX], ids[TD_CHOICES_MAX];
    uint64_t first_us;
    char reason[32];
};

struct td_pusher {
    td_pusher_config c;
    const td_kv_layout *layout;
    td_ticket_terms terms;
    td_list peers, pushes;
    uint32_t n_peers;
    uint64_t n_lines; /* numbers them */
    td_arena scratch;
    td_wire_segment segment;
    uint8_t head[TD_SEGMENT_HEAD_MAX];
    td_bulk_part parts[SEGMENT_FRAMES_MAX + 4];
    td_mac *mac; /* when our KV link is private */
    td_push_stats stats;
    uint8_t complained[PEERS_MAX][16]; /* epochs that shared memory did not reach: a ring */
    uint32_t n_complained;
};

int td_pusher_open(const td_pusher_config *config, td_pusher **ret_pusher, td_err *reterr_err)
{
    const td_kv_layout *layout = td_kv_pool_layout(config->pool);
    if (td_layout_check(layout) < 0)
        return td_err_set(reterr_err, -ENOTSUP,
                          "KV layout: one layer of a block is larger than a frame of %d bytes",
                          TD_KV_FRAME_MAX);
    td_pusher *p = calloc(1, sizeof *p);
    if (!p)
        return td_err_set(reterr_err, -ENOMEM, "KV socket: out of memory");
    p->c = *config;
    p->layout = layout;
    memcpy(p->terms.model_hash, config->model_hash, 32);
    memcpy(p->terms.profile_id, config->profile_id, 16);
    memcpy(p->terms.layout_hash, layout->hash, 16);
    td_list_init(&p->peers);
    td_list_init(&p->pushes);
    td_arena_init(&p->scratch, SCRATCH_BYTES);
    int r = td_link_kv_private(config->link) ? td_mac_new(&p->mac, reterr_err) : 0;
    if (r < 0) {
        td_pusher_close(p);
        return r;
    }
    *ret_pusher = p;
    return 0;
}

const td_push_stats *td_pusher_get_stats(const td_pusher *p)
{
    return &p->stats;
}

static void count(_Atomic uint64_t *c, uint64_t n)
{
    atomic_fetch_add_explicit(c, n, memory_order_relaxed);
}

static void close_by_force(td_pusher *p, peer *e, uint64_t now_us);

/* ---- peers ---- */

static void peer_free(td_pusher *p, peer *e)
{
    td_list_del(&e->node);
    p->n_peers--;
    td_shm_line_close(e->line);
    td_bulk_close(e->bulk);
    free(e->endpoint);
    free(e);
}

static peer *peer_find(td_pusher *p, const td_push_ticket *k)
{
    for (td_list *l = p->peers.next; l != &p->peers; l = l->next) {
        peer *e = TD_LIST_ENTRY(l, peer, node);
        if (e->bulk && strcmp(e->endpoint, k->endpoint) == 0 &&
            memcmp(e->epoch, k->decode_epoch, 16) == 0 && e->is_private == (k->mac_key != NULL) &&
            (!k->kv_key || memcmp(e->key, k->kv_key, sizeof e->key) == 0))
            return e;
    }
    return NULL;
}

/* A router in error, or in other hands, sends our blocks to nobody but decode workers. */
static int may_dial(td_pusher *p, const td_push_ticket *k, td_err *reterr_err)
{
    if (k->mac_key && !p->mac)
        return td_err_set(
            reterr_err, -EACCES,
            "%s: its KV link is private and ours is curve: set kv-link and kv-private "
            "alike on both sides",
            k->endpoint);
    if (!k->mac_key && !k->kv_key && p->mac)
        return td_err_set(reterr_err, -EACCES,
                          "%s: its ticket names no key: update the decode worker", k->endpoint);
    if (!td_link_keys(p->c.link) || !k->kv_key ||
        td_link_is_listed(p->c.link, k->kv_key, TD_ROLE_DECODE))
        return 0;
    return td_err_set(reterr_err, -EACCES,
                      "%s: the key in its ticket is not that of a decode worker in curve-peers",
                      k->endpoint);
}

/* A peer that nothing may be sent to is dropped with its push, and every attempt finds it anew: the
 * complaint about one life of it is made once. */
static uint8_t *complaint_about(td_pusher *p, const peer *e)
{
    for (uint32_t i = 0; i < PEERS_MAX; i++)
        if (memcmp(p->complained[i], e->epoch, sizeof e->epoch) == 0)
            return p->complained[i];
    return NULL;
}

static int first_complaint(td_pusher *p, const peer *e)
{
    if (complaint_about(p, e))
        return 0;
    memcpy(p->complained[p->n_complained++ % PEERS_MAX], e->epoch, sizeof e->epoch);
    return 1;
}

/* The blocks of this peer go over the socket, or nowhere when that is not allowed. name: of why, in
 * one word. tried: shared memory was not ruled out from the start. */
static void over_socket(td_pusher *p, peer *e, const char *name, const char *why, int tried)
{
    int fallback = tried && e->on_this_host;
    snprintf(e->why, sizeof e->why, "shm_%.27s", name);
    td_shm_line_close(e->line); /* name may be its */
    e->line = NULL;
    e->ready = 1;
    e->is_out_of_reach = p->c.transport == TD_KV_SHM || (fallback && p->c.strict);
    if ((fallback || e->is_out_of_reach) && !first_complaint(p, e))
        return;
    if (fallback)
        count(&p->stats.fallbacks, 1);
    if (p->c.ops.on_transport)
        p->c.ops.on_transport(p->c.arg, e->endpoint, TD_KV_ZMQ, why,
                              e->is_out_of_reach ? -1 : fallback);
}

/* Offer the pool to a peer that may be on this host; else its blocks go over the socket. */
static void lend_pool(td_pusher *p, peer *e, const td_push_ticket *k, uint64_t now_us)
{
    const char *here = p->c.host_id, *there = k->host_id ? k->host_id : "";
    int known = *here && *there;
    td_err err = {0};
    e->on_this_host = strncmp(e->endpoint, "ipc:", 4) == 0 || (known && strcmp(here, there) == 0);
    if (p->c.transport == TD_KV_ZMQ) {
        over_socket(p, e, "off", "kv-transport = zmq", 0);
    } else if (td_kv_pool_memfd(p->c.pool) < 0) {
        over_socket(p, e, "device", "our pool is in a device's memory", 0);
    } else if (!k->shm) {
        over_socket(p, e, "not_offered", "the decode worker offers none", 0);
    } else if (known && !e->on_this_host) {
        over_socket(p, e, "other_host", "it is on another host", 0);
    } else {
        td_shm_line_config lc = {.offer = k->shm,
                                 .pool_fd = td_kv_pool_memfd(p->c.pool),
                                 .number = ++p->n_lines,
                                 .uid = geteuid()};
        memcpy(lc.prefill_epoch, p->c.epoch, 16);
        memcpy(lc.decode_epoch, k->decode_epoch, 16);
        memcpy(lc.layout_hash, p->layout->hash, 16);
        if (td_shm_line_open(&lc, now_us, &e->line, &err) < 0)
            over_socket(p, e, "unreachable", err.text, 1);
    }
}

/* Hear what the other end of the line says. */
static void run_line(td_pusher *p, peer *e, uint64_t now_us)
{
    td_shm_line_state state = td_shm_line_run(e->line, now_us);
    if (state == TD_SHM_READY && !e->ready) {
        uint8_t *old = complaint_about(p, e);
        if (old)
            memset(old, 0, sizeof e->epoch); /* a later failure is news */
        e->ready = 1;
        if (p->c.ops.on_transport)
            p->c.ops.on_transport(p->c.arg, e->endpoint, TD_KV_SHM, "", 0);
    } else if (state == TD_SHM_REFUSED) {
        char why[96];
        snprintf(why, sizeof why, "it refused the pool (%s)", td_shm_line_why(e->line));
        over_socket(p, e, td_shm_line_why(e->line), why, 1);
    } else if (state == TD_SHM_LOST) {
        close_by_force(p, e, now_us);
    }
}

static int peer_get(td_pusher *p, const td_push_ticket *k, uint64_t now_us, peer **ret_peer,
                    td_err *reterr_err)
{
    const char *endpoint = k->endpoint;
    int r = may_dial(p, k, reterr_err);
    if (r < 0)
        return r;
    if ((*ret_peer = peer_find(p, k)))
        return 0;
    if (p->n_peers == PEERS_MAX)
        return td_err_set(reterr_err, -ENOBUFS, "KV socket: more than %d decode workers at a time",
                          PEERS_MAX);
    peer *e = calloc(1, sizeof *e);
    if (!e || !(e->endpoint = strdup(endpoint))) {
        free(e);
        return td_err_set(reterr_err, -ENOMEM, "KV socket: out of memory");
    }
    e->is_private = k->mac_key != NULL;
    if (k->kv_key)
        memcpy(e->key, k->kv_key, sizeof e->key);
    r = td_bulk_dial(endpoint, p->c.link, k->kv_key ? e->key : NULL, &e->bulk, reterr_err);
    if (r < 0) {
        free(e->endpoint);
        free(e);
        return r;
    }
    memcpy(e->epoch, k->decode_epoch, sizeof e->epoch);
    td_list_add(&p->peers, &e->node);
    p->n_peers++;
    *ret_peer = e;
    lend_pool(p, e, k, now_us);
    return 0;
}

/* ---- pushes ---- */

int td_push_begin(td_pusher *p, const td_push_ticket *k, uint64_t now_us, td_push **ret_push,
                  td_err *reterr_err)
{
    for (td_list *l = p->pushes.next; l != &p->pushes; l = l->next) {
        if (memcmp(TD_LIST_ENTRY(l, td_push, node)->t.key.id, k->id, 16) == 0)
            return td_err_set(reterr_err, -EEXIST, "ticket: already being pushed");
    }
    td_push *s = calloc(1, sizeof *s);
    if (!s)
        return td_err_set(reterr_err, -ENOMEM, "KV socket: out of memory");
    int r = peer_get(p, k, now_us, &s->peer, reterr_err);
    if (r < 0) {
        free(s);
        return r;
    }
    td_ticket_key key = {.attempt = k->attempt, .generation = k->generation};
    memcpy(key.id, k->id, 16);
    memcpy(key.decode_epoch, k->decode_epoch, 16);
    memcpy(key.prefill_epoch, p->c.epoch, 16);
    if (k->mac_key)
        td_mac_derive(k->mac_key, key.prefill_epoch, key.decode_epoch, s->mac_key);
    td_ticket_out_init(&s->t, &key, k->credit_bytes, k->deadline_us, now_us);
    s->pusher = p;
    s->user = k->user;
    s->peer->n_pushes++;
    td_list_add(&p->pushes, &s->node);
    *ret_push = s;
    return 0;
}

static void push_free(td_push *s)
{
    peer *e = s->peer;
    td_list_del(&s->node);
    e->n_pushes--;
    e->idle_us = td_now_us();
    if (!e->n_pushes && !e->bulk)
        peer_free(s->pusher, e);
    free(s->blocks);
    free(s->crcs);
    free(s);
}

/* Run one event through the ticket and do what it asks; the push may be freed. */
static void step(td_push *s, const td_out_event *e, uint64_t now_us);

/* Send a message whose preamble counts a mac on a private link. parts has room for one more. */
static int send_parts(td_push *s, td_bulk_part *parts, uint32_t n)
{
    uint8_t mac[TD_MAC_PART_BYTES];
    if (!s->peer->bulk)
        return -EPIPE;
    if (s->peer->is_private) {
        int r = td_mac_sign(s->pusher->mac, s->mac_key, TD_MAC_PUSH, parts, n, mac);
        if (r < 0)
            return r;
        parts[n++] = (td_bulk_part){.data = mac, .n = sizeof mac};
    }
    return td_bulk_send(s->peer->bulk, NULL, parts, n);
}

static int send_commit(td_push *s)
{
    td_pusher *p = s->pusher;
    td_wire_commit c = {.key = s->t.key,
                        .terms = p->terms,
                        .n_tokens = s->n_tokens,
                        .n_digests = s->n_blocks,
                        .n_first = s->n_first,
                        .choices = s->choices,
                        .ids = s->ids};
    td_arena_reset(&p->scratch);
    uint32_t *digests = td_arena_alloc_array(&p->scratch, s->n_blocks, sizeof *digests);
    size_t cap = 1024 + s->n_blocks * sizeof *digests;
    void *body = td_arena_alloc(&p->scratch, cap);
    if (!digests || !body)
        return -ENOMEM;
    for (uint32_t b = 0; b < s->n_blocks; b++)
        digests[b] =
            td_ticket_digest(s->crcs + (size_t)b * p->layout->n_groups, p->layout->n_groups);
    c.digests = digests;
    int n = td_wire_pack_commit(&c, body, cap);
    TD_BUG_ON(n < 0);
    uint8_t head[TD_PREAMBLE_BYTES];
    td_preamble pre = {.major = TD_WIRE_MAJOR,
                       .minor = TD_WIRE_MINOR,
                       .type = TD_FRAME_KV_COMMIT,
                       .n_attachments = s->peer->is_private != 0};
    td_preamble_pack(&pre, head);
    td_bulk_part parts[3] = {{.data = head, .n = sizeof head}, {.data = body, .n = (size_t)n}};
    return send_parts(s, parts, 2);
}

/* Take blocks from `next` on until frames, bytes or runs of one segment are full. Returns payload
 * bytes. */
static uint64_t gather(td_push *s, uint32_t *ret_n_runs, uint32_t *ret_n_frames)
{
    const td_kv_group *g = &s->pusher->layout->groups[s->group];
    uint64_t bytes = 0, most = TD_MIN((uint64_t)SEGMENT_BYTES_MAX, s->t.credit_bytes);
    uint32_t runs = 0, frames = 0;
    for (uint32_t i = s->next; i < s->hi && runs < TD_SEGMENT_RUNS_MAX; i++, runs++) {
        uint32_t f = td_run_frames(g, s->blocks[i].rows);
        uint64_t b = td_run_bytes(g, s->blocks[i].rows);
        if (runs > 0 && (frames + f > SEGMENT_FRAMES_MAX || bytes + b > most))
            break;
        frames += f;
        bytes += b;
    }
    *ret_n_runs = runs;
    *ret_n_frames = frames;
    return bytes;
}

/* Describe the runs and refer to their rows; the checksum is the only pass over the bytes. */
static void describe(td_push *s, uint32_t n_runs)
{
    td_pusher *p = s->pusher;
    const td_kv_group *g = &p->layout->groups[s->group];
    td_bulk_part *part = p->parts + 3;
    p->segment.shared = s->peer->line != NULL;
    p->segment.pool = s->peer->line ? td_shm_line_number(s->peer->line) : 0;
    p->segment.key = s->t.key;
    p->segment.terms = p->terms;
    p->segment.group = s->group;
    p->segment.n_runs = n_runs;
    for (uint32_t i = 0; i < n_runs; i++) {
        const td_push_block *b = &s->blocks[s->next + i];
        const uint8_t *base = td_kv_data(p->c.pool, b->block);
        td_kv_run *run = &p->segment.runs[i];
        *run = (td_kv_run){.block = b->index, .rows = b->rows, .has_chain = b->has_chain};
        memcpy(run->chain, b->chain, 16);
        for (uint32_t f = 0, n = td_run_frames(g, b->rows); f < n; f++) {
            uint64_t offset, bytes;
            td_run_frame(g, b->rows, f, &offset, &bytes);
            run->crc = td_crc32c(run->crc, base + offset, bytes);
            if (!p->segment.shared)
                *part++ = (td_bulk_part){.data = base + offset, .n = bytes, .flight = &s->flight};
        }
        if (p->segment.shared) {
            run->offset = (uint64_t)(base - td_kv_base(p->c.pool)) + g->offset;
            run->length = (uint32_t)td_run_bytes(g, b->rows);
        }
        s->crcs[(size_t)(s->next + i) * p->layout->n_groups + s->group] = run->crc;
    }
}

static void advance(td_push *s, uint32_t n_runs)
{
    s->next += n_runs;
    if (s->next < s->hi)
        return;
    s->next = s->lo;
    if (++s->group < s->pusher->layout->n_groups)
        return;
    s->group = 0;
    s->lo = s->next = s->hi;
    s->hi = s->n_blocks;
}

/* Send the next segment. 1 sent, 0 nothing to send or no credit, else -errno of td_bulk_send(). */
static int send_segment(td_push *s, uint64_t now_us)
{
    td_pusher *p = s->pusher;
    uint32_t n_runs, n_frames;
    if (s->lo == s->hi || !s->peer->ready)
        return 0;
    uint64_t bytes = gather(s, &n_runs, &n_frames);
    if (!td_ticket_out_may_send(&s->t, bytes))
        return 0;
    describe(s, n_runs);
    uint8_t pre_bytes[TD_PREAMBLE_BYTES], tag[TD_PAYLOAD_TAG_BYTES];
    uint32_t n_parts = p->segment.shared ? 2 : n_frames + 3;
    td_preamble pre = {.major = TD_WIRE_MAJOR,
                       .minor = TD_WIRE_MINOR,
                       .type = TD_FRAME_KV_SEGMENT,
                       .n_attachments = (uint16_t)(n_parts - 2 + (s->peer->is_private != 0))};
    td_preamble_pack(&pre, pre_bytes);
    td_wire_payload_tag(bytes, tag);
    int n = td_wire_pack_segment(&p->segment, p->head, sizeof p->head);
    TD_BUG_ON(n < 0);
    p->parts[0] = (td_bulk_part){.data = pre_bytes, .n = sizeof pre_bytes};
    p->parts[1] = (td_bulk_part){.data = p->head, .n = (size_t)n};
    p->parts[2] = (td_bulk_part){.data = tag, .n = sizeof tag};
    int r = send_parts(s, p->parts, n_parts);
    if (r < 0)
        return r;
    s->t.by_ref = p->segment.shared;
    if (!s->first_us) {
        s->first_us = now_us;
        count(&p->stats.pushes[p->segment.shared], 1);
    }
    count(&p->stats.segments, 1);
    count(&p->stats.bytes, bytes);
    advance(s, n_runs);
    td_out_event e = {.kind = TD_OUT_SENT, .bytes = bytes, .queued = s->lo != s->hi};
    step(s, &e, now_us);
    return 1;
}

static void send_what_may(td_push *s, uint64_t now_us)
{
    int r = 1;
    if (s->t.state > TD_OUT_PUSHING)
        return;
    while (r > 0)
        r = send_segment(s, now_us);
    if (r == 0 && s->want_commit && s->lo == s->hi) {
        r = send_commit(s);
        if (r == 0) {
            td_out_event e = {.kind = TD_OUT_COMMIT};
            count(&s->pusher->stats.commits, 1);
            step(s, &e, now_us);
        }
    }
    if (r == -EAGAIN)
        s->peer->blocked = 1;
    else if (r < 0)
        close_by_force(s->pusher, s->peer, now_us);
}

static void finish(td_push *s, uint64_t now_us)
{
    td_pusher *p = s->pusher;
    td_push_figures f = {.bytes = s->t.sent_bytes, .blocks = s->n_blocks};
    if (s->first_us)
        f.transfer_us = now_us - s->first_us;
    if (s->t.code)
        count(&p->stats.failed, 1);
    p->c.ops.on_done(p->c.arg, s->user, s->t.code, s->reason, &f);
    push_free(s);
}

static void step(td_push *s, const td_out_event *e, uint64_t now_us)
{
    td_out_actions a;
    s->t.in_flight = atomic_load_explicit(&s->flight, memory_order_acquire);
    td_ticket_out_step(&s->t, e, now_us, &a);
    if (a.drop)
        count(&s->pusher->stats.drops[a.drop], 1);
    if (a.send_commit)
        (void)send_commit(s); /* tried again by the next tick, given up by the ticket */
    if (a.close_peer)
        close_by_force(s->pusher, s->peer, now_us);
    else if (a.done)
        finish(s, now_us);
}

/* Fence with certainty: close the connection, forget what is queued, withdraw the pool. Every push
 * on it has failed; each is done when its frames came back, which run() sees. */
static void close_by_force(td_pusher *p, peer *e, uint64_t now_us)
{
    if (!e->bulk)
        return;
    count(&p->stats.forced_closes, e->n_pushes != 0);
    td_bulk_close(e->bulk);
    e->bulk = NULL;
    td_shm_line_close(e->line);
    e->line = NULL;
    for (td_list *l = p->pushes.next; l != &p->pushes; l = l->next) {
        td_push *o = TD_LIST_ENTRY(l, td_push, node);
        if (o->peer != e)
            continue;
        /* Not through step(): nothing may be freed inside this walk. in_flight > 0 keeps it from
         * being done here. */
        td_out_event ev = {.kind = TD_OUT_PEER_CLOSED, .in_flight = atomic_load(&o->flight) + 1};
        td_out_actions a;
        td_ticket_out_step(&o->t, &ev, now_us, &a);
        TD_BUG_ON(a.done);
    }
}

static int reserve(td_push *s, uint32_t n)
{
    if (s->n_blocks + n <= s->cap)
        return 0;
    uint32_t cap = TD_MAX(s->n_blocks + n, s->cap * 2), n_groups = s->pusher->layout->n_groups;
    void *blocks = reallocarray(s->blocks, cap, sizeof *s->blocks);
    if (!blocks)
        return -ENOMEM;
    s->blocks = blocks;
    void *crcs = reallocarray(s->crcs, cap, n_groups * sizeof *s->crcs);
    if (!crcs)
        return -ENOMEM;
    s->crcs = crcs;
    s->cap = cap;
    return 0;
}

int td_push_add(td_push *s, const td_push_block *blocks, uint32_t n, uint64_t now_us)
{
    if (n == 0)
        return 0;
    if (reserve(s, n) < 0)
        return -ENOMEM;
    memcpy(s->blocks + s->n_blocks, blocks, n * sizeof *blocks);
    s->n_blocks += n;
    if (s->lo == s->hi)
        s->hi = s->n_blocks;
    td_out_event e = {.kind = TD_OUT_QUEUED};
    step(s, &e, now_us);
    return 0;
}

int td_push_commit(td_push *s, uint32_t n_tokens, const uint32_t *choices, const uint32_t *ids,
                   uint32_t n, uint64_t now_us)
{
    TD_BUG_ON(n > TD_CHOICES_MAX || s->want_commit);
    s->want_commit = 1;
    s->n_tokens = n_tokens;
    s->n_first = n;
    memcpy(s->choices, choices, n * sizeof *choices);
    memcpy(s->ids, ids, n * sizeof *ids);
    td_out_event e = {.kind = TD_OUT_QUEUED};
    step(s, &e, now_us);
    return 0;
}

void td_push_cancel(td_push *s, uint32_t code, uint64_t now_us)
{
    td_out_event e = {.kind = TD_OUT_CANCEL, .code = code};
    step(s, &e, now_us);
}

/* ---- the turn ---- */

static void on_ack(td_pusher *p, const peer *from, const td_wire_ack *ack, uint64_t now_us)
{
    for (td_list *l = p->pushes.next; l != &p->pushes; l = l->next) {
        td_push *s = TD_LIST_ENTRY(l, td_push, node);
        /* a ticket is answered on its own connection; another's word is nobody's */
        if (s->peer != from || memcmp(s->t.key.id, ack->key.id, 16) != 0)
            continue;
        if (from->is_private && td_mac_check(p->mac, s->mac_key, TD_MAC_ACK, from->bulk,
                                             ACK_PARTS + 1, &s->mac_seen) < 0) {
            count(&p->stats.drops[TD_DROP_MAC], 1);
            return;
        }
        td_out_event e = {.kind = TD_OUT_ACK,
                          .key = &ack->key,
                          .ack = ack->state,
                          .bytes = ack->received_bytes,
                          .code = ack->code};
        memcpy(s->reason, ack->reason, sizeof s->reason);
        step(s, &e, now_us);
        return;
    }
    count(&p->stats.drops[TD_DROP_UNKNOWN], 1);
}

static void receive(td_pusher *p, peer *e, uint64_t now_us)
{
    for (;;) {
        td_bulk_peer from;
        uint32_t n;
        size_t len;
        td_preamble pre;
        td_wire_ack ack;
        int r = e->bulk ? td_bulk_recv(e->bulk, &from, &n) : -EAGAIN;
        if (r == -EAGAIN)
            return;
        td_arena_reset(&p->scratch);
        const void *head = r == 0 ? td_bulk_part_data(e->bulk, 0, &len) : NULL;
        if (!head || n != ACK_PARTS + (e->is_private != 0) ||
            td_preamble_unpack(head, len, &pre) < 0 || pre.type != TD_FRAME_KV_ACK ||
            (head = td_bulk_part_data(e->bulk, 1, &len),
             td_wire_unpack_ack(head, len, &p->scratch, &ack)) < 0) {
            count(&p->stats.drops[TD_DROP_FORMAT], 1);
            continue;
        }
        on_ack(p, e, &ack, now_us);
    }
}

static void run_push(td_push *s, uint64_t now_us)
{
    if (s->peer->is_out_of_reach && s->t.state <= TD_OUT_PUSHING) {
        snprintf(s->reason, sizeof s->reason, "%s", s->peer->why);
        td_push_cancel(s, TD_FAILED_PRECONDITION, now_us);
        return;
    }
    if (s->t.state <= TD_OUT_PUSHING && !s->peer->blocked)
        send_what_may(s, now_us);
    td_out_event tick = {.kind = TD_OUT_TICK};
    step(s, &tick, now_us);
}

void td_pusher_run(td_pusher *p, uint64_t now_us)
{
    for (td_list *l = p->peers.next, *next; l != &p->peers; l = next) {
        next = l->next;
        peer *e = TD_LIST_ENTRY(l, peer, node);
        e->blocked = 0;
        if (!e->n_pushes && (!e->bulk || e->is_out_of_reach || now_us >= e->idle_us + IDLE_US))
            peer_free(p, e);
    }
    for (td_list *l = p->peers.next, *next; l != &p->peers; l = next) {
        next = l->next;
        peer *e = TD_LIST_ENTRY(l, peer, node);
        receive(p, e, now_us);
        if (e->line)
            run_line(p, e, now_us);
    }
    for (td_list *l = p->pushes.next, *next; l != &p->pushes; l = next) {
        next = l->next;
        run_push(TD_LIST_ENTRY(l, td_push, node), now_us);
    }
}

uint32_t td_pusher_polls(td_pusher *p, td_bulk_poll *polls, uint32_t cap)
{
    uint32_t n = 0;
    for (td_list *l = p->peers.next; l != &p->peers && n < cap; l = l->next) {
        peer *e = TD_LIST_ENTRY(l, peer, node);
        if (e->bulk)
            polls[n++] = (td_bulk_poll){.bulk = e->bulk,
                                        .want = TD_BULK_READ | (e->blocked ? TD_BULK_WRITE : 0)};
        if (e->line && n < cap)
            polls[n++] = (td_bulk_poll){.fd = td_shm_line_fd(e->line), .want = TD_BULK_READ};
    }
    return n;
}

uint64_t td_pusher_due(const td_pusher *p, uint64_t now_us)
{
    uint64_t due = UINT64_MAX;
    for (const td_list *l = p->peers.next; l != &p->peers; l = l->next) {
        const peer *e = TD_LIST_ENTRY(l, const peer, node);
        if (e->line)
            due = TD_MIN(due, td_shm_line_due(e->line));
    }
    for (const td_list *l = p->pushes.next; l != &p->pushes; l = l->next) {
        const td_push *s = TD_LIST_ENTRY(l, const td_push, node);
        uint64_t d = td_ticket_out_due(&s->t);
        if (s->t.state >= TD_OUT_ACKED)
            d = TD_MIN(d, now_us + FLIGHT_POLL_US);
        due = TD_MIN(due, d);
    }
    return due;
}

void td_pusher_close(td_pusher *p)
{
    if (!p)
        return;
    while (!td_list_empty(&p->pushes)) {
        td_push *s = TD_LIST_ENTRY(p->pushes.next, td_push, node);
        uint64_t now = td_now_us();
        close_by_force(p, s->peer, now);
        run_push(s, now);
        if (!td_list_empty(&p->pushes))
            usleep(FLIGHT_POLL_US);
    }
    while (!td_list_empty(&p->peers))
        peer_free(p, TD_LIST_ENTRY(p->peers.next, peer, node));
    td_arena_done(&p->scratch);
    td_mac_free(p->mac);
    free(p);
}
