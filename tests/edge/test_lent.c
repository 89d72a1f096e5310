/* SPDX-License-Identifier: Apache-2.0 */
/* Promise 3 where blocks are read out of the sender's own memory: what a segment says about a place
 * there is checked before it is read, what was read counts only with its checksum and only while
 * its owner keeps it, and blocks go back to their owner exactly when nobody can use what is in them
 * any more. And promise 4: a way that was not taken is counted, or an error. */
#include <setjmp.h>
#include <dirent.h>
#include <errno.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/arena.h"
#include "base/bug.h"
#include "base/clock.h"
#include "base/hash.h"
#include "base/rand.h"
#include "handoff/plan.h"
#include "handoff/push.h"
#include "handoff/receive.h"
#include "handoff/shm_line.h"
#include "handoff/wire.h"
#include "rpc/frame.h"

enum { GROUPS = 2, LAYERS = 3, ROW = 32, BLOCKS = 8, N_SEND = 3, LAST_ROWS = 17 };
enum { GROUP_BYTES = LAYERS * 64 * ROW, BLOCK_BYTES = GROUPS * GROUP_BYTES };
enum { N_TOKENS = 2 * 64 + LAST_ROWS };

static char dir[64];
static int idle_fds; /* behind the first test: no more may stay behind the others */

typedef struct end {
    td_kv_layout layout;
    td_kv_pool *pool[2]; /* lender, reader */
    td_block from[N_SEND], to[N_SEND];
    td_receive *receive;
    td_pusher *pusher;
    uint8_t ticket[16];
    int delivered, released, done, n_said;
    uint32_t code, push_code;
    td_drop why;
    char reason[32], said[200];
    td_kv_transport transport;
    int fallback;
} end;

static int n_fds(void)
{
    DIR *d = opendir("/proc/self/fd");
    int n = 0;
    while (readdir(d))
        n++;
    closedir(d);
    return n;
}

static void on_deliver(void *arg, void *user, const uint32_t *ids, uint32_t n,
                       const td_receive_figures *f)
{
    (void)user;
    (void)ids;
    (void)n;
    (void)f;
    ((end *)arg)->delivered++;
}

static void on_release(void *arg, void *user, uint32_t code, td_drop why)
{
    end *e = arg;
    (void)user;
    e->released++;
    e->code = code;
    e->why = why;
}

static void on_done(void *arg, void *user, uint32_t code, const char *reason,
                    const td_push_figures *f)
{
    end *e = arg;
    (void)user;
    (void)f;
    e->done++;
    e->push_code = code;
    snprintf(e->reason, sizeof e->reason, "%s", reason);
}

static void on_transport(void *arg, const char *endpoint, td_kv_transport transport,
                         const char *why, int fallback)
{
    end *e = arg;
    (void)endpoint;
    e->n_said++;
    e->transport = transport;
    e->fallback = fallback;
    snprintf(e->said, sizeof e->said, "%s", why);
}

static void fill(end *e, uint8_t salt)
{
    for (uint32_t b = 0; b < N_SEND; b++) {
        for (uint32_t i = 0; i < BLOCK_BYTES; i++) {
            td_kv_data(e->pool[0], e->from[b])[i] = (uint8_t)(i * 7 + b * 31 + salt);
            td_kv_data(e->pool[1], e->to[b])[i] = 0x55;
        }
    }
}

static void end_open(end *e, td_kv_transport lender, td_kv_transport reader, int strict)
{
    td_err err = {0};
    char endpoint[128];
    memset(e, 0, sizeof *e);
    e->layout = (td_kv_layout){.block_bytes = BLOCK_BYTES, .n_groups = GROUPS};
    for (uint32_t g = 0; g < GROUPS; g++)
        e->layout.groups[g] = (td_kv_group){
            .n_layers = LAYERS, .offset = (uint64_t)g * GROUP_BYTES, .bytes = GROUP_BYTES};
    memset(e->layout.hash, 0x11, 16);
    for (int i = 0; i < 2; i++)
        assert_int_equal(td_kv_pool_open(&e->layout, BLOCKS, &e->pool[i], &err), 0);
    assert_int_equal(td_kv_alloc(e->pool[0], N_SEND, e->from), 0);
    assert_int_equal(td_kv_alloc(e->pool[1], 1, e->to), 0); /* so that places differ */
    assert_int_equal(td_kv_alloc(e->pool[1], N_SEND, e->to), 0);
    fill(e, 0);
    snprintf(endpoint, sizeof endpoint, "ipc://%s/kv.sock", dir);
    td_receive_config rc = {.endpoint = endpoint,
                            .pool = e->pool[1],
                            .transport = reader,
                            .ops = {.on_deliver = on_deliver, .on_release = on_release},
                            .arg = e};
    td_pusher_config pc = {.pool = e->pool[0],
                           .transport = lender,
                           .strict = strict,
                           .ops = {.on_done = on_done, .on_transport = on_transport},
                           .arg = e};
    memset(rc.epoch, 0xdd, 16);
    memset(pc.epoch, 0xaa, 16);
    if (td_receive_open(&rc, &e->receive, &err) < 0 || td_pusher_open(&pc, &e->pusher, &err) < 0)
        fail_msg("%s", err.text);
}

static void end_close(end *e)
{
    td_pusher_close(e->pusher);
    td_receive_close(e->receive);
    td_kv_pool_free(e->pool[0]);
    td_kv_pool_free(e->pool[1]);
    /* libzmq opens its own with the first socket, and closes a socket's on a thread of its own */
    for (int i = 0; i < 2000 && idle_fds && n_fds() > idle_fds; i++)
        usleep(1000);
    if (!idle_fds) {
        usleep(100000);
        idle_fds = n_fds();
    }
    assert_int_equal(n_fds(), idle_fds);
}

static void turn(end *e, int both)
{
    td_bulk_poll polls[90];
    uint32_t n = td_pusher_polls(e->pusher, polls, 8);
    n += both ? td_receive_polls(e->receive, polls + n, 80) : 0;
    td_bulk_wait(polls, n, 2000);
    if (both)
        td_receive_run(e->receive, td_now_us());
    td_pusher_run(e->pusher, td_now_us());
}

static uint32_t rows_of(uint32_t b)
{
    return b == N_SEND - 1 ? LAST_ROWS : 64;
}

static void grant(end *e)
{
    td_receive_block blocks[N_SEND];
    td_in_first first = {0};
    for (uint32_t b = 0; b < N_SEND; b++)
        blocks[b] = (td_receive_block){.block = e->to[b], .expect = {.rows = rows_of(b)}};
    td_receive_grant g = {.attempt = 1,
                          .generation = 1,
                          .blocks = blocks,
                          .n_blocks = N_SEND,
                          .first = &first,
                          .n_first = 1,
                          .n_tokens = N_TOKENS,
                          .credit_bytes = 1 << 20,
                          .deadline_us = td_now_us() + 20 * TD_S};
    td_random_bytes(e->ticket, 16);
    memcpy(g.ticket, e->ticket, 16);
    assert_int_equal(td_receive_grant_add(e->receive, &g, td_now_us()), 0);
    e->delivered = e->released = e->done = 0;
}

static td_push *push(end *e, const td_shm_offer *shm)
{
    td_err err = {0};
    td_push *s;
    td_push_ticket k = {.attempt = 1,
                        .generation = 1,
                        .endpoint = td_receive_endpoint(e->receive),
                        .shm = shm,
                        .host_id = "",
                        .credit_bytes = 1 << 20,
                        .deadline_us = td_now_us() + 20 * TD_S};
    memcpy(k.id, e->ticket, 16);
    memset(k.decode_epoch, 0xdd, 16);
    if (td_push_begin(e->pusher, &k, td_now_us(), &s, &err) < 0)
        fail_msg("%s", err.text);
    for (uint32_t b = 0; b < N_SEND; b++) {
        td_push_block p = {.block = e->from[b], .index = b, .rows = rows_of(b)};
        assert_int_equal(td_push_add(s, &p, 1, td_now_us()), 0);
    }
    return s;
}

static void commit(td_push *s)
{
    uint32_t choice = 0, id = 9;
    td_push_commit(s, N_TOKENS, &choice, &id, 1, td_now_us());
}

static void until_done(end *e)
{
    for (int i = 0; i < 4000 && !e->done; i++)
        turn(e, 1);
    assert_int_equal(e->done, 1);
}

static const td_shm_offer *offer_of(const end *e)
{
    return td_shm_door_offer(td_receive_door(e->receive));
}

static const td_shm_door_stats *door_stats(const end *e)
{
    return td_shm_door_get_stats(td_receive_door(e->receive));
}

/* The rows that travelled, and not a byte more. */
static void must_be_copied(const end *e)
{
    for (uint32_t b = 0; b < N_SEND; b++) {
        const uint8_t *from = td_kv_data(e->pool[0], e->from[b]),
                      *to = td_kv_data(e->pool[1], e->to[b]);
        for (uint32_t i = 0; i < BLOCK_BYTES; i++) {
            int travels = i % (64 * ROW) < rows_of(b) * ROW;
            if (to[i] != (travels ? from[i] : 0x55))
                fail_msg("block %u, byte %u", b, i);
        }
    }
}

static int is_untouched(const end *e)
{
    for (uint32_t b = 0; b < N_SEND; b++) {
        for (uint32_t i = 0; i < BLOCK_BYTES; i++) {
            if (td_kv_data(e->pool[1], e->to[b])[i] != 0x55)
                return 0;
        }
    }
    return 1;
}

/* ---- the way it goes ---- */

static void test_through_memory(void **state)
{
    (void)state;
    end e;
    uint64_t bytes = GROUPS * LAYERS * ROW * N_TOKENS;
    end_open(&e, TD_KV_SHM, TD_KV_SHM, 0);
    for (int i = 0; i < 3; i++) {
        grant(&e);
        fill(&e, (uint8_t)i);
        commit(push(&e, offer_of(&e)));
        until_done(&e);
        assert_int_equal(e.push_code, TD_OK);
        assert_int_equal(e.delivered, 1);
        must_be_copied(&e);
    }
    assert_int_equal(atomic_load(&td_receive_get_stats(e.receive)->bytes), 3 * bytes);
    assert_int_equal(atomic_load(&td_receive_get_stats(e.receive)->shm_bytes), 3 * bytes);
    assert_int_equal(atomic_load(&td_pusher_get_stats(e.pusher)->pushes[1]), 3);
    assert_int_equal(atomic_load(&td_pusher_get_stats(e.pusher)->pushes[0]), 0);
    assert_int_equal(atomic_load(&door_stats(&e)->taken), 1); /* once, not once a push */
    assert_true(e.n_said == 1 && e.transport == TD_KV_SHM);
    end_close(&e);
}

static void test_over_sockets(void **state)
{
    (void)state;
    end e;
    end_open(&e, TD_KV_ZMQ, TD_KV_AUTO, 1); /* what was asked for is no fallback */
    grant(&e);
    commit(push(&e, offer_of(&e)));
    until_done(&e);
    assert_int_equal(e.delivered, 1);
    must_be_copied(&e);
    assert_int_equal(atomic_load(&td_receive_get_stats(e.receive)->shm_bytes), 0);
    assert_int_equal(atomic_load(&td_pusher_get_stats(e.pusher)->pushes[0]), 1);
    assert_int_equal(atomic_load(&td_pusher_get_stats(e.pusher)->fallbacks), 0);
    assert_true(e.n_said == 1 && e.transport == TD_KV_ZMQ && e.fallback == 0);
    end_close(&e);
}

/* ---- a way that cannot be taken ---- */

enum { NO_OFFER, BAD_NONCE, NOBODY };

static void cannot(td_kv_transport lender, int strict, int how, td_shm_offer *offer,
                   const char *reason)
{
    end e;
    end_open(&e, lender, TD_KV_AUTO, strict);
    grant(&e);
    *offer = *offer_of(&e);
    offer->nonce[5] ^= how == BAD_NONCE;
    if (how == NOBODY)
        snprintf(offer->path, sizeof offer->path, "%s/nobody.shm", dir);
    commit(push(&e, how == NO_OFFER ? NULL : offer));
    until_done(&e);
    assert_int_equal(e.n_said, 1);
    assert_int_equal(e.transport, TD_KV_ZMQ);
    assert_true(e.said[0] != 0);
    assert_int_equal(atomic_load(&td_pusher_get_stats(e.pusher)->fallbacks), how != NO_OFFER);
    if (reason) {
        assert_int_equal(e.push_code, TD_FAILED_PRECONDITION);
        assert_string_equal(e.reason, reason);
        assert_int_equal(e.fallback, -1);
        assert_true(is_untouched(&e));
        td_pusher_run(e.pusher, td_now_us()); /* forgets the peer */
        grant(&e);                            /* and so does the next one, which tries anew */
        commit(push(&e, how == NO_OFFER ? NULL : offer));
        until_done(&e);
        assert_int_equal(e.push_code, TD_FAILED_PRECONDITION);
        assert_int_equal(e.n_said, 1); /* a log line an attempt would fill the log */
        assert_int_equal(atomic_load(&td_pusher_get_stats(e.pusher)->fallbacks), how != NO_OFFER);
    } else {
        assert_int_equal(e.push_code, TD_OK);
        assert_int_equal(e.fallback, how != NO_OFFER);
        must_be_copied(&e);
    }
    end_close(&e);
}

static void test_fallbacks(void **state)
{
    (void)state;
    td_shm_offer o;
    cannot(TD_KV_AUTO, 0, NO_OFFER, &o, NULL);
    cannot(TD_KV_AUTO, 1, NO_OFFER, &o, NULL); /* the other side does without: no fallback */
    cannot(TD_KV_AUTO, 0, BAD_NONCE, &o, NULL);
    cannot(TD_KV_AUTO, 0, NOBODY, &o, NULL);
    cannot(TD_KV_AUTO, 1, BAD_NONCE, &o, "shm_nonce");
    cannot(TD_KV_AUTO, 1, NOBODY, &o, "shm_unreachable");
    cannot(TD_KV_SHM, 0, NO_OFFER, &o, "shm_not_offered");
    cannot(TD_KV_SHM, 0, BAD_NONCE, &o, "shm_nonce");
    cannot(TD_KV_SHM, 0, NOBODY, &o, "shm_unreachable");
}

/* A decode worker that takes shared memory only refuses payload, by name. */
static void test_reader_insists(void **state)
{
    (void)state;
    end e;
    end_open(&e, TD_KV_ZMQ, TD_KV_SHM, 0);
    grant(&e);
    commit(push(&e, offer_of(&e)));
    until_done(&e);
    assert_int_equal(e.push_code, TD_FAILED_PRECONDITION);
    assert_string_equal(e.reason, "pool");
    assert_int_equal(e.released, 1);
    assert_true(is_untouched(&e));
    end_close(&e);
}

/* ---- blocks go back ---- */

/* The reader stands still with a segment before it: the lender gets its blocks back all the same,
 * writes over them, and the reader, awake again, delivers nothing of it. */
static void test_withdrawn(void **state)
{
    (void)state;
    end e;
    end_open(&e, TD_KV_SHM, TD_KV_SHM, 0);
    grant(&e);
    commit(push(&e, offer_of(&e)));
    until_done(&e); /* now there is a line */
    grant(&e);
    fill(&e, 1);
    td_push *s = push(&e, offer_of(&e));
    for (int i = 0; i < 20; i++)
        turn(&e, 0);
    assert_int_equal(atomic_load(&td_pusher_get_stats(e.pusher)->pushes[1]), 2);
    commit(s);
    turn(&e, 0);
    td_push_cancel(s, TD_CANCELLED, td_now_us());
    assert_int_equal(e.done, 0); /* it may be reading */
    uint64_t start = td_now_us();
    while (!e.done && td_now_us() < start + 5 * TD_S)
        turn(&e, 0);
    assert_int_equal(e.done, 1);
    assert_true(td_now_us() - start >= TD_OUT_DRAIN_US - 100000);
    fill(&e, 99);
    for (int i = 0; i < 50; i++)
        td_receive_run(e.receive, td_now_us());
    assert_int_equal(e.delivered, 0);
    assert_int_equal(e.released, 1);
    assert_int_equal(e.why, TD_DROP_POOL);
    grant(&e); /* a new line, and all is well */
    fill(&e, 3);
    commit(push(&e, offer_of(&e)));
    until_done(&e);
    assert_int_equal(e.push_code, TD_OK);
    must_be_copied(&e);
    end_close(&e);
}

/* The reader ends: a push that waits for it ends too, and nothing is held. */
static void test_reader_ends(void **state)
{
    (void)state;
    end e;
    end_open(&e, TD_KV_SHM, TD_KV_SHM, 0);
    grant(&e);
    commit(push(&e, offer_of(&e)));
    until_done(&e);
    grant(&e);
    push(&e, offer_of(&e));
    turn(&e, 0);
    td_receive_close(e.receive);
    e.receive = NULL;
    for (int i = 0; i < 1000 && !e.done; i++)
        turn(&e, 0);
    assert_int_equal(e.done, 1);
    assert_int_equal(e.push_code, TD_UNAVAILABLE);
    end_close(&e);
}

/* ---- a lender that can lie ---- */

typedef struct lie {
    const char *what;
    uint64_t offset, pool;
    int is_offset, crc, length, parts, withdraw, overwrite, other_epoch;
    td_drop why;
    int touched;
} lie;

static const lie lies[] = {
    {.what = "nothing", .why = TD_DROP_NONE, .touched = 1},
    {.what = "behind the end", .is_offset = 1, .offset = BLOCKS * BLOCK_BYTES, .why = TD_DROP_POOL},
    {.what = "over the end",
     .is_offset = 1,
     .offset = BLOCKS * BLOCK_BYTES - GROUP_BYTES + 1,
     .why = TD_DROP_POOL},
    {.what = "wraps round", .is_offset = 1, .offset = UINT64_MAX - 8, .why = TD_DROP_POOL},
    {.what = "another place", .is_offset = 1, .offset = 1, .why = TD_DROP_CRC, .touched = 1},
    {.what = "longer", .length = 1, .why = TD_DROP_POOL},
    {.what = "shorter", .length = -1, .why = TD_DROP_POOL},
    {.what = "longer than credit", .length = 1 << 21, .why = TD_DROP_CREDIT},
    {.what = "another pool", .pool = 1, .why = TD_DROP_POOL},
    {.what = "nobody's pool", .other_epoch = 1, .why = TD_DROP_POOL},
    {.what = "checksum", .crc = 1, .why = TD_DROP_CRC, .touched = 1},
    {.what = "payload besides", .parts = 1, .why = TD_DROP_FORMAT},
    {.what = "withdrawn", .withdraw = 1, .why = TD_DROP_POOL, .touched = 1},
    {.what = "written over", .overwrite = 1, .why = TD_DROP_CRC, .touched = 1},
};

static void send_segment(end *e, td_bulk *bulk, const lie *l, uint64_t number)
{
    static td_wire_segment s;
    uint8_t head[TD_PREAMBLE_BYTES], body[2048];
    const td_kv_group *g = &e->layout.groups[0];
    s = (td_wire_segment){.shared = 1, .pool = number + l->pool, .n_runs = N_SEND};
    s.key = (td_ticket_key){.attempt = 1, .generation = 1};
    memcpy(s.key.id, e->ticket, 16);
    memset(s.key.decode_epoch, 0xdd, 16);
    memset(s.key.prefill_epoch, l->other_epoch ? 0xbb : 0xaa, 16);
    memset(s.terms.layout_hash, 0x11, 16);
    for (uint32_t b = 0; b < N_SEND; b++) {
        const uint8_t *p = td_kv_data(e->pool[0], e->from[b]);
        uint32_t crc = 0;
        for (uint32_t f = 0; f < td_run_frames(g, rows_of(b)); f++) {
            uint64_t offset, bytes;
            td_run_frame(g, rows_of(b), f, &offset, &bytes);
            crc = td_crc32c(crc, p + offset, bytes);
        }
        s.runs[b] =
            (td_kv_run){.block = b,
                        .rows = rows_of(b),
                        .crc = crc ^ (uint32_t)l->crc,
                        .offset = (uint64_t)(p - td_kv_base(e->pool[0])),
                        .length = (uint32_t)td_run_bytes(g, rows_of(b)) + (uint32_t)l->length};
        if (l->is_offset && b == 0)
            s.runs[b].offset = l->offset;
    }
    td_preamble pre = {
        .major = 1, .type = TD_FRAME_KV_SEGMENT, .n_attachments = (uint16_t)l->parts};
    td_preamble_pack(&pre, head);
    int n = td_wire_pack_segment(&s, body, sizeof body);
    assert_true(n > 0);
    td_bulk_part parts[3] = {
        {.data = head, .n = sizeof head}, {.data = body, .n = (size_t)n}, {.data = body, .n = 6}};
    int r = -EAGAIN;
    for (int i = 0; i < 2000 && r == -EAGAIN; i++) {
        r = td_bulk_send(bulk, NULL, parts, 2 + (uint32_t)l->parts);
        if (r == -EAGAIN)
            usleep(1000);
    }
    assert_int_equal(r, 0);
}

static td_shm_line *line_open(end *e, uint64_t number)
{
    td_err err = {0};
    td_shm_line *line;
    td_shm_line_config lc = {.offer = offer_of(e),
                             .pool_fd = td_kv_pool_memfd(e->pool[0]),
                             .number = number,
                             .uid = geteuid()};
    memset(lc.prefill_epoch, 0xaa, 16);
    memset(lc.decode_epoch, 0xdd, 16);
    memset(lc.layout_hash, 0x11, 16);
    if (td_shm_line_open(&lc, td_now_us(), &line, &err) < 0)
        fail_msg("%s", err.text);
    for (int i = 0; i < 100 && td_shm_line_run(line, td_now_us()) == TD_SHM_ASKED; i++)
        td_receive_run(e->receive, td_now_us());
    assert_int_equal(td_shm_line_run(line, td_now_us()), TD_SHM_READY);
    return line;
}

static void test_lies(void **state)
{
    (void)state;
    td_err err = {0};
    end e;
    td_bulk *bulk;
    end_open(&e, TD_KV_SHM, TD_KV_SHM, 0);
    if (td_bulk_dial(td_receive_endpoint(e.receive), NULL, NULL, &bulk, &err) < 0)
        fail_msg("%s", err.text);
    for (size_t i = 0; i < TD_ARRAY_LEN(lies); i++) {
        const lie *l = &lies[i];
        uint64_t before = atomic_load(&td_receive_get_stats(e.receive)->drops[l->why]);
        td_shm_line *line = line_open(&e, 100 + 2 * i);
        grant(&e);
        fill(&e, (uint8_t)i);
        send_segment(&e, bulk, l, 100 + 2 * i);
        if (l->withdraw)
            td_shm_line_withdraw(line);
        if (l->overwrite)
            td_kv_data(e.pool[0], e.from[1])[77] ^= 1;
        td_bulk_peer peer;
        uint32_t n;
        int r = -EAGAIN;
        for (int k = 0; k < 2000 && r == -EAGAIN; k++) {
            usleep(500);
            td_receive_run(e.receive, td_now_us());
            r = td_bulk_recv(bulk, &peer, &n);
        }
        if (r < 0)
            fail_msg("%s: no answer", l->what);
        if (e.released != (l->why != TD_DROP_NONE) || e.why != l->why || e.delivered)
            fail_msg("%s: released %d, why %s", l->what, e.released, td_drop_name(e.why));
        if (l->why)
            assert_int_equal(atomic_load(&td_receive_get_stats(e.receive)->drops[l->why]),
                             before + 1);
        if (is_untouched(&e) == l->touched)
            fail_msg("%s: %s", l->what, l->touched ? "was not read" : "was read");
        td_receive_cancel(e.receive, e.ticket, TD_CANCELLED, td_now_us());
        while (td_bulk_recv(bulk, &peer, &n) == 0) {
        }
        td_shm_line_close(line);
        td_receive_run(e.receive, td_now_us());
        e.why = TD_DROP_NONE;
    }
    td_bulk_close(bulk);
    end_close(&e);
}

static int setup(void **state)
{
    (void)state;
    snprintf(dir, sizeof dir, "/tmp/tandem-test-XXXXXX");
    return mkdtemp(dir) ? 0 : -1;
}

static int teardown(void **state)
{
    (void)state;
    char path[96]; /* libzmq removes it too, but later */
    snprintf(path, sizeof path, "%s/kv.sock", dir);
    unlink(path);
    return rmdir(dir);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_through_memory), cmocka_unit_test(test_over_sockets),
        cmocka_unit_test(test_fallbacks),      cmocka_unit_test(test_reader_insists),
        cmocka_unit_test(test_withdrawn),      cmocka_unit_test(test_reader_ends),
        cmocka_unit_test(test_lies),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
