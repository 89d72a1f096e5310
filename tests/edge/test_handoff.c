/* SPDX-License-Identifier: Apache-2.0 */
/* Promise 3 on real sockets: blocks that went through push and receive give the same logits as if
 * they had stayed; frames that are damaged, stale, foreign or late are refused before or after the
 * copy as they must be, counted, and never make a block visible; a repeated commit is answered and
 * not delivered again. */
#include <setjmp.h>
#include <errno.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/bug.h"
#include "base/clock.h"
#include "base/hash.h"
#include "base/prefix.h"
#include "base/rand.h"
#include "engine/engine.h"
#include "handoff/plan.h"
#include "handoff/push.h"
#include "handoff/receive.h"
#include "handoff/wire.h"
#include "rpc/frame.h"

#define MODEL TD_SOURCE_DIR "/tests/goldens/models/glm-shared"

enum { BLOCKS = 24, N_PROMPT = 200, N_SEND = 4 };

static td_model *model;
static td_engine *engine[2];
static char dir[64];

typedef struct end {
    td_receive *receive;
    td_pusher *pusher;
    int delivered, released, done;
    uint32_t code, ids[4], push_code;
    td_drop why;
    uint64_t now_us;  /* added to the clock */
    uint32_t n_whole; /* blocks told of, less those of delivered tickets */
} end;

/* Before a ticket is delivered each of its blocks was told to be whole, once. */
static void on_deliver(void *arg, void *user, const uint32_t *ids, uint32_t n,
                       const td_receive_figures *f)
{
    end *e = arg;
    (void)user;
    assert_true(e->n_whole >= f->blocks);
    e->n_whole -= f->blocks;
    e->delivered++;
    memcpy(e->ids, ids, n * sizeof *ids);
}

static void on_release(void *arg, void *user, uint32_t code, td_drop why)
{
    end *e = arg;
    (void)user;
    e->released++;
    e->code = code;
    e->why = why;
}

static void on_blocks(void *arg, void *user, const td_block *blocks, uint32_t n)
{
    end *e = arg;
    (void)user;
    for (uint32_t i = 0; i < n; i++)
        for (uint32_t k = 0; k < i; k++)
            assert_int_not_equal(blocks[i], blocks[k]);
    e->n_whole += n;
}

static void on_done(void *arg, void *user, uint32_t code, const char *reason,
                    const td_push_figures *f)
{
    end *e = arg;
    (void)user;
    (void)reason;
    (void)f;
    e->done++;
    e->push_code = code;
}

static void end_open(end *e, const char *endpoint)
{
    td_err err = {0};
    memset(e, 0, sizeof *e);
    const td_model_info *info = td_model_get_info(model);
    td_receive_config rc = {.endpoint = endpoint,
                            .pool = td_engine_pool(engine[1]),
                            .ops = {on_deliver, on_release, NULL, on_blocks},
                            .arg = e};
    td_pusher_config pc = {.pool = td_engine_pool(engine[0]), .ops = {on_done}, .arg = e};
    memcpy(rc.model_hash, info->model_hash, 32);
    memcpy(rc.profile_id, info->profile_id, 16);
    memset(rc.epoch, 0xdd, 16);
    memcpy(pc.model_hash, info->model_hash, 32);
    memcpy(pc.profile_id, info->profile_id, 16);
    memset(pc.epoch, 0xaa, 16);
    if (td_receive_open(&rc, &e->receive, &err) < 0 || td_pusher_open(&pc, &e->pusher, &err) < 0)
        fail_msg("%s", err.text);
}

static void end_close(end *e)
{
    td_pusher_close(e->pusher);
    td_receive_close(e->receive);
}

static void turn(end *e)
{
    td_bulk_poll polls[8] = {{.bulk = td_receive_bulk(e->receive), .want = TD_BULK_READ}};
    uint32_t n = 1 + td_pusher_polls(e->pusher, polls + 1, 7);
    td_bulk_wait(polls, n, 2000);
    td_receive_run(e->receive, td_now_us() + e->now_us);
    td_pusher_run(e->pusher, td_now_us() + e->now_us);
}

static td_seq *make_seq(int which, const uint32_t *ids, size_t n, size_t reserve)
{
    td_err err = {0};
    td_seq *s;
    td_seq_spec spec = {.ids = ids,
                        .n_ids = n,
                        .n_prompt = n,
                        .max_tokens = 50,
                        .ignore_eos = 1,
                        .sampling = {.top_p = 1, .repetition_penalty = 1}};
    if (td_seq_new(engine[which], &spec, &s, &err) < 0)
        fail_msg("%s", err.text);
    assert_int_equal(td_seq_reserve(s, reserve), 0);
    return s;
}

static uint32_t step(int which, td_seq *s, uint32_t n, float *logits)
{
    td_sample sample;
    td_step_item item = {.seq = s,
                         .n_tokens = n,
                         .n_samples = 1,
                         .want_logits = logits != NULL,
                         .ret_logits = logits};
    assert_int_equal(td_engine_step(engine[which], &item, 1, &sample), 0);
    return sample.id;
}

/* What a grant of the prompt in s needs. */
static void make_grant(td_seq *s, size_t n_ids, const uint8_t ticket[16], td_receive_block *blocks,
                       td_in_first *first, td_receive_grant *g)
{
    size_t n_blocks, n_hashes;
    const td_block *b = td_seq_blocks(s, &n_blocks);
    const uint8_t *h = td_seq_hashes(s, &n_hashes);
    uint32_t n = (uint32_t)((n_ids + 63) / 64);
    for (uint32_t i = 0; i < n; i++) {
        blocks[i] = (td_receive_block){.block = b[i],
                                       .expect = {.rows = TD_MIN(64u, (uint32_t)n_ids - i * 64)}};
        blocks[i].expect.has_chain = blocks[i].expect.rows == 64;
        if (blocks[i].expect.has_chain)
            memcpy(blocks[i].expect.chain, h + i * 16, 16);
    }
    *first = (td_in_first){0};
    *g = (td_receive_grant){.attempt = 1,
                            .generation = 3,
                            .blocks = blocks,
                            .n_blocks = n,
                            .first = first,
                            .n_first = 1,
                            .n_tokens = (uint32_t)n_ids,
                            .credit_bytes = 1 << 20,
                            .deadline_us = td_now_us() + 10 * TD_S};
    memcpy(g->ticket, ticket, 16);
}

/* ---- logits through the wire ---- */

static void through(const char *endpoint, uint32_t held)
{
    uint32_t ids[N_PROMPT], vocab = td_model_get_info(model)->vocab_size;
    td_rng rng = {.seed = 11};
    for (int i = 0; i < N_PROMPT; i++)
        ids[i] = (uint32_t)td_rng_below(&rng, vocab);
    end e;
    end_open(&e, endpoint);
    td_seq *a = make_seq(0, ids, N_PROMPT, N_PROMPT + 20),
           *b = make_seq(1, ids, N_PROMPT, N_PROMPT + 20);
    float *la = malloc(vocab * sizeof *la), *lb = malloc(vocab * sizeof *lb);
    uint32_t first = step(0, a, N_PROMPT, la);

    td_receive_block blocks[BLOCKS];
    td_in_first f;
    td_receive_grant g;
    uint8_t ticket[16];
    td_random_bytes(ticket, 16);
    make_grant(b, N_PROMPT, ticket, blocks, &f, &g);
    g.credit_bytes = 100000; /* far less than the prompt: credit must be renewed */
    for (uint32_t i = 0; i < held; i++)
        blocks[i].expect.rows = 0;
    assert_int_equal(td_receive_grant_add(e.receive, &g, td_now_us()), 0);
    td_push_ticket k = {.attempt = 1,
                        .generation = 3,
                        .endpoint = td_receive_endpoint(e.receive),
                        .credit_bytes = g.credit_bytes,
                        .deadline_us = g.deadline_us};
    memcpy(k.id, ticket, 16);
    memset(k.decode_epoch, 0xdd, 16);
    td_push *push;
    td_err err = {0};
    if (td_push_begin(e.pusher, &k, td_now_us(), &push, &err) < 0)
        fail_msg("%s", err.text);
    size_t n;
    const td_block *from = td_seq_blocks(a, &n);
    for (uint32_t i = held; i < g.n_blocks; i++) { /* block by block, as chunks seal */
        td_push_block p = {.block = from[i],
                           .index = i,
                           .rows = blocks[i].expect.rows,
                           .has_chain = blocks[i].expect.has_chain};
        memcpy(p.chain, blocks[i].expect.chain, 16);
        assert_int_equal(td_push_add(push, &p, 1, td_now_us()), 0);
        turn(&e);
    }
    uint32_t choice = 0;
    td_push_commit(push, N_PROMPT, &choice, &first, 1, td_now_us());
    for (int i = 0; i < 2000 && !e.done; i++)
        turn(&e);
    assert_int_equal(e.done, 1);
    assert_int_equal(e.push_code, TD_OK);
    assert_int_equal(e.delivered, 1);
    assert_int_equal(e.released, 0);
    assert_int_equal(e.ids[0], first);
    if (held) { /* what was held before the handoff: here simply copied */
        for (uint32_t i = 0; i < held; i++)
            memcpy(td_kv_data(td_engine_pool(engine[1]), blocks[i].block),
                   td_kv_data(td_engine_pool(engine[0]), from[i]),
                   td_model_get_info(model)->kv.block_bytes);
    }
    td_seq_set_computed(b, N_PROMPT);
    for (int i = 0; i < 16; i++) {
        td_seq_append(a, first);
        td_seq_append(b, first);
        uint32_t x = step(0, a, 1, la), y = step(1, b, 1, lb);
        assert_memory_equal(la, lb, vocab * sizeof *la);
        assert_int_equal(x, y);
        first = x;
    }
    free(la);
    free(lb);
    td_seq_free(a);
    td_seq_free(b);
    end_close(&e);
    td_kv_flush(td_engine_pool(engine[0]));
    td_kv_flush(td_engine_pool(engine[1]));
}

static void test_logits_over_ipc(void **state)
{
    (void)state;
    char endpoint[128];
    snprintf(endpoint, sizeof endpoint, "ipc://%s/kv.sock", dir);
    through(endpoint, 0);
    through(endpoint, 2);
}

static void test_logits_over_tcp(void **state)
{
    (void)state;
    through("tcp://127.0.0.1:0", 0);
}

/* A ticket that ends at the decode worker while blocks are on their way: the prefill worker hears
 * of it at once, with the reason, instead of finding out by seconds of silence. */
static void told(int cancel, uint32_t code)
{
    uint32_t ids[N_PROMPT] = {0};
    char endpoint[128];
    end e;
    snprintf(endpoint, sizeof endpoint, "ipc://%s/kv.sock", dir);
    end_open(&e, endpoint);
    td_seq *a = make_seq(0, ids, N_PROMPT, N_PROMPT), *b = make_seq(1, ids, N_PROMPT, N_PROMPT);
    step(0, a, N_PROMPT, NULL);
    td_receive_block blocks[BLOCKS];
    td_in_first f;
    td_receive_grant g;
    uint8_t ticket[16];
    td_random_bytes(ticket, 16);
    make_grant(b, N_PROMPT, ticket, blocks, &f, &g);
    assert_int_equal(td_receive_grant_add(e.receive, &g, td_now_us()), 0);
    td_push_ticket k = {.attempt = 1,
                        .generation = 3,
                        .endpoint = td_receive_endpoint(e.receive),
                        .credit_bytes = g.credit_bytes,
                        .deadline_us = td_now_us() + 100 * TD_S};
    memcpy(k.id, ticket, 16);
    memset(k.decode_epoch, 0xdd, 16);
    td_push *push;
    td_err err = {0};
    if (td_push_begin(e.pusher, &k, td_now_us(), &push, &err) < 0)
        fail_msg("%s", err.text);
    size_t n;
    td_push_block p = {.block = td_seq_blocks(a, &n)[0], .rows = 64, .has_chain = 1};
    memcpy(p.chain, blocks[0].expect.chain, 16);
    assert_int_equal(td_push_add(push, &p, 1, td_now_us()), 0);
    for (int i = 0; i < 2000 && !atomic_load(&td_receive_get_stats(e.receive)->segments); i++)
        turn(&e);
    assert_int_equal(e.done, 0); /* the next blocks are not computed yet */
    if (cancel)
        td_receive_cancel(e.receive, ticket, code, td_now_us());
    else
        td_receive_run(e.receive, g.deadline_us);
    assert_int_equal(e.released, 1);
    for (uint64_t until = td_now_us() + TD_S; !e.done && td_now_us() < until;)
        turn(&e);
    assert_int_equal(e.done, 1);
    assert_int_equal(e.push_code, code);
    td_seq_free(a);
    td_seq_free(b);
    end_close(&e);
    td_kv_flush(td_engine_pool(engine[0]));
}

static void test_end_is_told(void **state)
{
    (void)state;
    told(1, TD_CANCELLED);
    told(1, TD_UNAVAILABLE);
    told(0, TD_DEADLINE_EXCEEDED);
}

/* ---- a sender that can lie ---- */

typedef struct liar {
    end e;
    td_bulk *bulk;
    td_seq *seq;
    td_receive_block blocks[BLOCKS];
    td_in_first first;
    td_receive_grant grant;
    td_ticket_key key;
    td_ticket_terms terms;
    uint8_t *payload; /* of all blocks */
    uint32_t crcs[N_SEND][TD_KV_GROUPS_MAX];
    /* lies */
    uint32_t cut_frame, cut_bytes, extra_frame, tag_plus, block_plus;
    int flip;
} liar;

static void liar_open(liar *l)
{
    td_err err = {0};
    const td_model_info *info = td_model_get_info(model);
    char endpoint[128];
    uint32_t ids[N_PROMPT] = {0};
    memset(l, 0, sizeof *l);
    snprintf(endpoint, sizeof endpoint, "ipc://%s/kv.sock", dir);
    end_open(&l->e, endpoint);
    if (td_bulk_dial(endpoint, NULL, NULL, &l->bulk, &err) < 0)
        fail_msg("%s", err.text);
    td_random_bytes(l->key.id, 16);
    l->seq = make_seq(1, ids, N_PROMPT, N_PROMPT);
    make_grant(l->seq, N_PROMPT, l->key.id, l->blocks, &l->first, &l->grant);
    assert_int_equal(l->grant.n_blocks, N_SEND);
    for (uint32_t i = 0; i < N_SEND; i++)
        memset(td_kv_data(td_engine_pool(engine[1]), l->blocks[i].block), 0x55,
               info->kv.block_bytes);
    assert_int_equal(td_receive_grant_add(l->e.receive, &l->grant, td_now_us()), 0);
    l->key.attempt = 1;
    l->key.generation = 3;
    memset(l->key.decode_epoch, 0xdd, 16);
    memset(l->key.prefill_epoch, 0xaa, 16);
    memcpy(l->terms.model_hash, info->model_hash, 32);
    memcpy(l->terms.profile_id, info->profile_id, 16);
    memcpy(l->terms.layout_hash, info->kv.hash, 16);
    l->payload = malloc(N_SEND * info->kv.block_bytes);
    for (size_t i = 0; i < N_SEND * info->kv.block_bytes; i++)
        l->payload[i] = (uint8_t)(i * 31 + 7);
}

static void liar_close(liar *l)
{
    td_bulk_close(l->bulk);
    end_close(&l->e);
    td_seq_free(l->seq);
    free(l->payload);
}

static void send_parts(liar *l, td_bulk_part *parts, uint32_t n, uint8_t type)
{
    uint8_t head[TD_PREAMBLE_BYTES];
    td_preamble p = {.major = 1, .type = type, .n_attachments = (uint16_t)(n - 2)};
    td_preamble_pack(&p, head);
    parts[0] = (td_bulk_part){.data = head, .n = sizeof head};
    int r = -EAGAIN;
    for (int i = 0; i < 1000 && r == -EAGAIN; i++) {
        r = td_bulk_send(l->bulk, NULL, parts, n);
        if (r == -EAGAIN)
            usleep(1000);
    }
    assert_int_equal(r, 0);
}

static void send_group(liar *l, uint32_t group)
{
    const td_kv_layout *layout = &td_model_get_info(model)->kv;
    const td_kv_group *g = &layout->groups[group];
    static td_wire_segment s;
    td_bulk_part parts[256];
    uint8_t body[4096], tag[TD_PAYLOAD_TAG_BYTES];
    uint64_t total = 0;
    uint32_t n = 3;
    s = (td_wire_segment){.key = l->key, .terms = l->terms, .group = group, .n_runs = N_SEND};
    for (uint32_t b = 0; b < N_SEND; b++) {
        td_kv_run *run = &s.runs[b];
        const td_in_block *x = &l->blocks[b].expect;
        *run = (td_kv_run){.block = b + (b == N_SEND - 1 ? l->block_plus : 0),
                           .rows = x->rows,
                           .has_chain = x->has_chain};
        memcpy(run->chain, x->chain, 16);
        for (uint32_t f = 0; f < td_run_frames(g, x->rows); f++) {
            uint64_t offset, bytes;
            td_run_frame(g, x->rows, f, &offset, &bytes);
            const uint8_t *p = l->payload + b * layout->block_bytes + offset;
            run->crc = td_crc32c(run->crc, p, bytes);
            parts[n++] = (td_bulk_part){.data = p, .n = bytes};
            total += bytes;
        }
        l->crcs[b][group] = run->crc;
    }
    if (l->cut_frame) {
        parts[n - l->cut_frame].n -= l->cut_bytes;
        total -= l->cut_bytes;
    }
    if (l->extra_frame) {
        parts[n++] = (td_bulk_part){.data = l->payload, .n = 1};
        total += 1;
    }
    if (l->flip)
        s.runs[0].crc ^= 1u << (l->flip % 32);
    int len = td_wire_pack_segment(&s, body, sizeof body);
    assert_true(len > 0);
    td_wire_payload_tag(total + l->tag_plus, tag);
    parts[1] = (td_bulk_part){.data = body, .n = (size_t)len};
    parts[2] = (td_bulk_part){.data = tag, .n = sizeof tag};
    send_parts(l, parts, n, TD_FRAME_KV_SEGMENT);
}

static void send_commit(liar *l)
{
    uint32_t n_groups = td_model_get_info(model)->kv.n_groups, digests[N_SEND], choice = 0, id = 5;
    uint8_t body[1024];
    td_bulk_part parts[2];
    for (uint32_t b = 0; b < N_SEND; b++)
        digests[b] = td_ticket_digest(l->crcs[b], n_groups);
    td_wire_commit c = {.key = l->key,
                        .terms = l->terms,
                        .n_tokens = N_PROMPT,
                        .n_digests = N_SEND,
                        .n_first = 1,
                        .digests = digests,
                        .choices = &choice,
                        .ids = &id};
    int len = td_wire_pack_commit(&c, body, sizeof body);
    assert_true(len > 0);
    parts[1] = (td_bulk_part){.data = body, .n = (size_t)len};
    send_parts(l, parts, 2, TD_FRAME_KV_COMMIT);
}

/* Run until an ack came; its contents. */
static td_wire_ack ack(liar *l)
{
    for (int i = 0; i < 2000; i++) {
        td_bulk_peer peer;
        uint32_t n;
        turn(&l->e);
        if (td_bulk_recv(l->bulk, &peer, &n) < 0)
            continue;
        size_t len;
        td_arena a;
        td_wire_ack out;
        td_arena_init(&a, 0);
        const void *p = td_bulk_part_data(l->bulk, 1, &len);
        assert_int_equal(td_wire_unpack_ack(p, len, &a, &out), 0);
        td_arena_done(&a);
        return out;
    }
    fail_msg("no ack");
    return (td_wire_ack){0};
}

static uint32_t n_groups(void)
{
    return td_model_get_info(model)->kv.n_groups;
}

static uint64_t drops(const liar *l, td_drop d)
{
    return atomic_load(&td_receive_get_stats(l->e.receive)->drops[d]);
}

static int untouched(const liar *l)
{
    const td_model_info *info = td_model_get_info(model);
    for (uint32_t b = 0; b < N_SEND; b++) {
        const uint8_t *p = td_kv_data(td_engine_pool(engine[1]), l->blocks[b].block);
        for (uint64_t i = 0; i < info->kv.block_bytes; i++) {
            if (p[i] != 0x55)
                return 0;
        }
    }
    return 1;
}

static void finish_honestly(liar *l)
{
    for (uint32_t g = 0; g < n_groups(); g++) {
        send_group(l, g);
        assert_int_equal(ack(l).state, TD_ACK_RECEIVING);
    }
    send_commit(l);
    assert_int_equal(ack(l).state, TD_ACK_COMMITTED);
    assert_int_equal(l->e.delivered, 1);
    assert_int_equal(l->e.released, 0);
}

static void test_repeated_commit(void **state)
{
    (void)state;
    liar l;
    liar_open(&l);
    finish_honestly(&l);
    for (int i = 0; i < 3; i++) {
        send_commit(&l);
        assert_int_equal(ack(&l).state, TD_ACK_COMMITTED);
    }
    send_group(&l, 0); /* late rows must not be written into a visible block */
    memset(td_kv_data(td_engine_pool(engine[1]), l.blocks[0].block), 0x55, 64);
    assert_int_equal(ack(&l).state, TD_ACK_COMMITTED);
    assert_int_equal(td_kv_data(td_engine_pool(engine[1]), l.blocks[0].block)[3], 0x55);
    assert_int_equal(l.e.delivered, 1);
    liar_close(&l);
}

static void test_flipped_bit(void **state)
{
    (void)state;
    for (int bit = 1; bit < 32; bit += 10) {
        liar l;
        liar_open(&l);
        l.flip = bit;
        send_group(&l, n_groups() - 1);
        td_wire_ack a = ack(&l);
        assert_int_equal(a.state, TD_ACK_FAILED);
        assert_int_equal(a.code, TD_DATA_LOSS);
        assert_string_equal(a.reason, "crc");
        assert_true(l.e.released == 1 && l.e.delivered == 0 && l.e.why == TD_DROP_CRC);
        l.flip = 0;
        send_group(&l, 0); /* nothing is believed any more */
        assert_int_equal(ack(&l).state, TD_ACK_FAILED);
        assert_int_equal(drops(&l, TD_DROP_STATE), 1);
        liar_close(&l);
    }
}

static void test_stale_names(void **state)
{
    (void)state;
    liar l;
    liar_open(&l);
    td_ticket_key good = l.key;
    l.key.generation--;
    send_group(&l, 0);
    l.key = good;
    l.key.attempt++;
    send_group(&l, 0);
    l.key = good;
    l.key.decode_epoch[0] ^= 1; /* this process before its restart */
    send_group(&l, 0);
    send_commit(&l);
    l.key = good;
    l.key.id[15] ^= 1;
    send_group(&l, 0);
    assert_int_equal(ack(&l).state, TD_ACK_UNKNOWN);
    assert_int_equal(drops(&l, TD_DROP_GENERATION), 1);
    assert_int_equal(drops(&l, TD_DROP_ATTEMPT), 1);
    assert_int_equal(drops(&l, TD_DROP_EPOCH), 2);
    assert_int_equal(drops(&l, TD_DROP_UNKNOWN), 1);
    assert_true(untouched(&l));
    l.key = good;
    finish_honestly(&l);
    liar_close(&l);
}

static void must_fence(liar *l, td_drop why, uint32_t code)
{
    send_group(l, 0);
    td_wire_ack a = ack(l);
    assert_int_equal(a.state, TD_ACK_FAILED);
    assert_int_equal(a.code, code);
    assert_int_equal(l->e.why, why);
    assert_int_equal(l->e.released, 1);
    assert_true(untouched(l)); /* refused before payload was read */
    liar_close(l);
}

static void test_other_model_profile_layout(void **state)
{
    (void)state;
    liar l;
    liar_open(&l);
    l.terms.layout_hash[5] ^= 1;
    must_fence(&l, TD_DROP_LAYOUT, TD_FAILED_PRECONDITION);
    liar_open(&l);
    l.terms.model_hash[31] ^= 1;
    must_fence(&l, TD_DROP_MODEL, TD_FAILED_PRECONDITION);
    liar_open(&l);
    l.terms.profile_id[0] ^= 1;
    must_fence(&l, TD_DROP_PROFILE, TD_FAILED_PRECONDITION);
    liar_open(&l);
    l.blocks[1].expect.chain[0] ^= 1; /* another prompt, tenant or salt */
    must_fence(&l, TD_DROP_CHAIN, TD_DATA_LOSS);
}

static void test_lying_geometry(void **state)
{
    (void)state;
    liar l;
    liar_open(&l);
    l.block_plus = 1;
    must_fence(&l, TD_DROP_RANGE, TD_INVALID_ARGUMENT);
    liar_open(&l);
    l.block_plus = UINT32_MAX - 10;
    must_fence(&l, TD_DROP_RANGE, TD_INVALID_ARGUMENT);
    liar_open(&l);
    l.blocks[3].expect.rows = 64;
    l.blocks[3].expect.has_chain = 0;
    must_fence(&l, TD_DROP_RANGE, TD_INVALID_ARGUMENT);
    liar_open(&l);
    l.cut_frame = 1;
    l.cut_bytes = 1;
    must_fence(&l, TD_DROP_FORMAT, TD_INVALID_ARGUMENT);
    liar_open(&l);
    l.extra_frame = 1;
    must_fence(&l, TD_DROP_FORMAT, TD_INVALID_ARGUMENT);
    liar_open(&l);
    l.tag_plus = 1;
    must_fence(&l, TD_DROP_FORMAT, TD_INVALID_ARGUMENT);
}

static void test_expired(void **state)
{
    (void)state;
    liar l;
    liar_open(&l);
    send_group(&l, 0);
    assert_int_equal(ack(&l).state, TD_ACK_RECEIVING);
    td_receive_run(l.e.receive, l.grant.deadline_us + 1);
    assert_true(l.e.released == 1 && l.e.code == TD_DEADLINE_EXCEEDED);
    uint8_t *p = td_kv_data(td_engine_pool(engine[1]), l.blocks[0].block);
    memset(p, 0x55, td_model_get_info(model)->kv.block_bytes); /* it belongs to somebody else now */
    send_group(&l, 1 % n_groups());
    send_commit(&l);
    assert_int_equal(ack(&l).state, TD_ACK_FAILED);
    assert_int_equal(ack(&l).state, TD_ACK_FAILED);
    for (uint64_t i = 0; i < td_model_get_info(model)->kv.block_bytes; i++)
        assert_int_equal(p[i], 0x55);
    assert_int_equal(l.e.delivered, 0);
    liar_close(&l);
}

/* Frame 1 cut at every byte: counted, nothing else. */
static void test_cut_frames(void **state)
{
    (void)state;
    liar l;
    liar_open(&l);
    td_wire_segment s = {
        .key = l.key, .terms = l.terms, .n_runs = 1, .runs = {{.block = 0, .rows = 64}}};
    uint8_t body[512], tag[TD_PAYLOAD_TAG_BYTES];
    int len = td_wire_pack_segment(&s, body, sizeof body);
    td_wire_payload_tag(0, tag);
    for (int n = 0; n < len; n++) {
        td_bulk_part parts[3] = {
            {0}, {.data = body, .n = (size_t)n}, {.data = tag, .n = sizeof tag}};
        send_parts(&l, parts, 3, TD_FRAME_KV_SEGMENT);
        if (n % 64 == 0)
            turn(&l.e);
    }
    for (int i = 0; i < 200 && drops(&l, TD_DROP_FORMAT) < (uint64_t)len; i++)
        turn(&l.e);
    assert_int_equal(drops(&l, TD_DROP_FORMAT), len);
    assert_int_equal(l.e.released, 0);
    finish_honestly(&l);
    liar_close(&l);
}

/* Nobody at the endpoint, or somebody who never answers: a typed end within seconds of (virtual)
 * time, blocks given back once, and only when no frame of them is held. */
static void test_silent_peer(void **state)
{
    (void)state;
    for (int bound = 0; bound < 2; bound++) {
        end e;
        char endpoint[128], deaf[128];
        td_bulk *other = NULL;
        td_err err = {0};
        uint32_t ids[N_PROMPT] = {0};
        snprintf(endpoint, sizeof endpoint, "ipc://%s/kv.sock", dir);
        snprintf(deaf, sizeof deaf, "ipc://%s/deaf.sock", dir);
        end_open(&e, endpoint);
        if (bound)
            assert_int_equal(td_bulk_bind(deaf, NULL, &other, &err), 0);
        td_seq *a = make_seq(0, ids, N_PROMPT, N_PROMPT);
        td_push_ticket k = {.attempt = 1,
                            .endpoint = deaf,
                            .credit_bytes = 1 << 20,
                            .deadline_us = td_now_us() + 600 * TD_S};
        td_push *push;
        uint64_t now = td_now_us();
        assert_int_equal(td_push_begin(e.pusher, &k, now, &push, &err), 0);
        size_t n;
        const td_block *b = td_seq_blocks(a, &n);
        td_push_block p = {.block = b[0], .rows = 64};
        assert_int_equal(td_push_add(push, &p, 1, now), 0);
        uint32_t choice = 0, id = 0;
        td_push_commit(push, 64, &choice, &id, 1, now);
        for (int i = 0; i < 50; i++)
            turn(&e);
        assert_int_equal(e.done, 0);
        e.now_us = TD_OUT_SILENCE_US;
        for (int i = 0; i < 500 && !e.done; i++)
            turn(&e);
        assert_int_equal(e.done, 1);
        assert_int_equal(e.push_code, TD_UNAVAILABLE);
        td_bulk_close(other);
        end_close(&e);
        td_seq_free(a);
    }
}

/* Beyond loopback nothing listens without keys, and no wildcard is taken. */
static void test_refused_endpoints(void **state)
{
    (void)state;
    static const char *const bad[] = {"tcp://0.0.0.0:0",
                                      "tcp://*:0",
                                      "tcp://192.0.2.1:5000",
                                      "tcp://localhost:5000",
                                      "inproc://x",
                                      "ipc://relative",
                                      ""};
    for (size_t i = 0; i < TD_ARRAY_LEN(bad); i++) {
        td_bulk *b = NULL;
        td_err err = {0};
        assert_true(td_bulk_bind(bad[i], NULL, &b, &err) < 0);
        assert_non_null(strchr(err.text, ' '));
        assert_null(b);
        assert_true(td_bulk_dial(bad[i], NULL, NULL, &b, &err) < 0);
    }
}

static int setup(void **state)
{
    (void)state;
    td_err err = {0};
    td_model_options mo = {.isa = "auto",
                           .act = TD_BF16,
                           .kv = TD_BF16,
                           .index = TD_BF16,
                           .n_threads = 1,
                           .n_ranks = 1};
    td_engine_limits limits = {.max_rows = 256, .max_seqs = 2, .n_blocks = BLOCKS};
    if (td_model_open(MODEL, &mo, &model, &err) < 0 ||
        td_engine_open(model, &limits, &engine[0], &err) < 0 ||
        td_engine_open(model, &limits, &engine[1], &err) < 0)
        fail_msg("%s", err.text);
    snprintf(dir, sizeof dir, "/tmp/tandem-test-XXXXXX");
    return mkdtemp(dir) ? 0 : -1;
}

static int teardown(void **state)
{
    (void)state;
    td_engine_free(engine[0]);
    td_engine_free(engine[1]);
    td_model_free(model);
    static const char *const names[] = {"kv.sock", "deaf.sock"};
    for (size_t i = 0; i < TD_ARRAY_LEN(names); i++) { /* libzmq removes them too, but later */
        char path[96];
        snprintf(path, sizeof path, "%s/%s", dir, names[i]);
        unlink(path);
    }
    return rmdir(dir);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_logits_over_ipc),   cmocka_unit_test(test_logits_over_tcp),
        cmocka_unit_test(test_repeated_commit),   cmocka_unit_test(test_flipped_bit),
        cmocka_unit_test(test_stale_names),       cmocka_unit_test(test_other_model_profile_layout),
        cmocka_unit_test(test_lying_geometry),    cmocka_unit_test(test_expired),
        cmocka_unit_test(test_cut_frames),        cmocka_unit_test(test_silent_peer),
        cmocka_unit_test(test_refused_endpoints), cmocka_unit_test(test_end_is_told),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
