/* SPDX-License-Identifier: Apache-2.0 */
/* Promise 3: blocks become visible only when every row of every group was verified for this ticket,
 * attempt, generation and both epochs; they are given back exactly once; the pushing end lets go
 * only when acked or failed and no frame flies. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "handoff/ticket.h"
#include "base/rand.h"
#include "rpc/frame.h"

enum { BLOCKS = 4, GROUPS = 3, HELD = 1, CREDIT = 1000, SEGMENT = 100 };

typedef struct fix {
    td_ticket_in t;
    td_in_block blocks[BLOCKS];
    td_in_first first;
    uint32_t memory[256];
    td_ticket_key key; /* as the sender names it */
    td_ticket_terms terms;
    uint32_t crcs[BLOCKS][GROUPS];
} fix;

static void fix_init(fix *f)
{
    memset(f, 0, sizeof *f);
    memset(f->key.id, 7, 16);
    f->key.attempt = 2;
    f->key.generation = 9;
    memset(f->key.decode_epoch, 1, 16);
    memset(f->terms.model_hash, 3, 32);
    memset(f->terms.profile_id, 4, 16);
    memset(f->terms.layout_hash, 5, 16);
    for (uint32_t b = HELD; b < BLOCKS; b++) {
        f->blocks[b].rows = b == BLOCKS - 1 ? 17 : 64;
        f->blocks[b].has_chain = b < BLOCKS - 1;
        memset(f->blocks[b].chain, (int)b + 10, 16);
    }
    f->first = (td_in_first){.choice = 0, .has_id = 1, .id = 42};
    td_in_grant g = {.key = f->key,
                     .terms = f->terms,
                     .blocks = f->blocks,
                     .n_blocks = BLOCKS,
                     .n_groups = GROUPS,
                     .first = &f->first,
                     .n_first = 1,
                     .n_tokens = 64 * 3 + 17,
                     .credit_bytes = CREDIT,
                     .deadline_us = 1000};
    assert_true(td_ticket_in_bytes(BLOCKS, GROUPS) <= sizeof f->memory);
    td_ticket_in_init(&f->t, &g, f->memory, 10);
    memset(f->key.prefill_epoch, 2, 16);
    for (uint32_t b = 0; b < BLOCKS; b++)
        for (uint32_t k = 0; k < GROUPS; k++)
            f->crcs[b][k] = 1000 + b * 10 + k;
}

static td_kv_run run_of(const fix *f, uint32_t b, uint32_t group)
{
    td_kv_run r = {.block = b,
                   .rows = f->blocks[b].rows,
                   .crc = f->crcs[b][group],
                   .has_chain = f->blocks[b].has_chain};
    memcpy(r.chain, f->blocks[b].chain, 16);
    return r;
}

/* Head, copy, body as a shell does. */
static td_in_actions send_runs(fix *f, uint32_t group, const td_kv_run *runs, uint32_t n,
                               uint32_t flip)
{
    uint32_t crcs[BLOCKS];
    for (uint32_t i = 0; i < n; i++)
        crcs[i] = runs[i].crc ^ flip;
    td_in_event e = {.kind = TD_IN_SEGMENT_HEAD,
                     .key = &f->key,
                     .terms = &f->terms,
                     .group = group,
                     .runs = runs,
                     .n_runs = n,
                     .bytes = SEGMENT};
    td_in_actions a;
    td_ticket_in_step(&f->t, &e, 20, &a);
    if (!a.copy)
        return a;
    assert_int_equal(a.drop, TD_DROP_NONE);
    e.kind = TD_IN_SEGMENT_BODY;
    e.crcs = crcs;
    td_ticket_in_step(&f->t, &e, 21, &a);
    return a;
}

static td_in_actions send_block(fix *f, uint32_t b, uint32_t group)
{
    td_kv_run r = run_of(f, b, group);
    return send_runs(f, group, &r, 1, 0);
}

static void send_all(fix *f)
{
    for (uint32_t g = 0; g < GROUPS; g++)
        for (uint32_t b = HELD; b < BLOCKS; b++)
            assert_true(send_block(f, b, g).ack);
}

static td_in_actions commit(fix *f, uint32_t spoil, uint32_t id)
{
    uint32_t digests[BLOCKS], n = 0, choice = 0;
    for (uint32_t b = HELD; b < BLOCKS; b++)
        digests[n++] = td_ticket_digest(f->crcs[b], GROUPS);
    digests[0] ^= spoil;
    td_in_event e = {.kind = TD_IN_COMMIT,
                     .key = &f->key,
                     .terms = &f->terms,
                     .digests = digests,
                     .n_digests = n,
                     .n_tokens = 64 * 3 + 17,
                     .choices = &choice,
                     .ids = &id,
                     .n_first = 1};
    td_in_actions a;
    td_ticket_in_step(&f->t, &e, 30, &a);
    return a;
}

static void test_whole_way(void **state)
{
    (void)state;
    fix f;
    fix_init(&f);
    assert_int_equal(f.t.n_left, 9);
    assert_true(commit(&f, 0, 42).release); /* a commit before the rows fences */
    fix_init(&f);
    send_all(&f);
    assert_int_equal(f.t.state, TD_IN_VERIFIED);
    td_in_actions a = commit(&f, 0, 42);
    assert_true(a.deliver && a.ack && !a.release);
    /* idempotent: asked again, acked again, delivered never again */
    a = commit(&f, 0, 42);
    assert_true(a.ack && !a.deliver && !a.release && !a.drop);
    /* neither deadline nor cancel can take delivered blocks back */
    td_in_event e = {.kind = TD_IN_TICK};
    td_ticket_in_step(&f.t, &e, 5000, &a);
    assert_false(a.release);
    e.kind = TD_IN_CANCEL;
    td_ticket_in_step(&f.t, &e, 5000, &a);
    assert_false(a.release);
    assert_int_equal(td_ticket_in_due(&f.t), UINT64_MAX);
}

static void test_stale_frames_change_nothing(void **state)
{
    (void)state;
    for (int what = 0; what < 5; what++) {
        fix f;
        fix_init(&f);
        send_block(&f, 1, 0);
        td_ticket_key good = f.key;
        static const td_drop want[] = {TD_DROP_UNKNOWN, TD_DROP_ATTEMPT, TD_DROP_GENERATION,
                                       TD_DROP_EPOCH, TD_DROP_EPOCH};
        if (what == 0)
            f.key.id[3] ^= 1;
        if (what == 1)
            f.key.attempt--;
        if (what == 2)
            f.key.generation--;
        if (what == 3)
            f.key.decode_epoch[15] ^= 1;
        if (what == 4)
            f.key.prefill_epoch[0] ^= 1;
        uint32_t left = f.t.n_left;
        td_in_actions a = send_block(&f, 2, 1);
        assert_int_equal(a.drop, want[what]);
        assert_false(a.copy || a.release || a.deliver);
        a = commit(&f, 0, 42);
        assert_int_equal(a.drop, want[what]);
        assert_int_equal(f.t.n_left, left);
        assert_int_equal(f.t.state, TD_IN_RECEIVING);
        f.key = good;
        assert_false(send_block(&f, 2, 1).drop);
    }
}

static void test_mismatch_fences(void **state)
{
    (void)state;
    fix f;
    td_in_actions a;
    fix_init(&f);
    f.terms.layout_hash[0] ^= 1;
    a = send_block(&f, 1, 0);
    assert_true(a.drop == TD_DROP_LAYOUT && a.release && !a.copy);
    assert_int_equal(f.t.code, TD_FAILED_PRECONDITION);
    fix_init(&f);
    f.terms.profile_id[0] ^= 1;
    assert_int_equal(send_block(&f, 1, 0).drop, TD_DROP_PROFILE);
    fix_init(&f);
    f.terms.model_hash[0] ^= 1;
    assert_int_equal(send_block(&f, 1, 0).drop, TD_DROP_MODEL);

    td_kv_run bad[] = {{.block = BLOCKS, .rows = 64},
                       {.block = 0, .rows = 64},
                       {.block = 1, .rows = 63},
                       {.block = 1}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        fix_init(&f);
        a = send_runs(&f, 0, &bad[i], 1, 0);
        assert_true(a.drop == TD_DROP_RANGE && a.release);
    }
    fix_init(&f);
    td_kv_run r[2] = {run_of(&f, 2, 0), run_of(&f, 2, 0)};
    assert_int_equal(send_runs(&f, 0, r, 2, 0).drop, TD_DROP_RANGE);
    fix_init(&f);
    assert_int_equal(send_runs(&f, GROUPS, r, 1, 0).drop, TD_DROP_RANGE);
    fix_init(&f);
    r[0].chain[5] ^= 1;
    assert_int_equal(send_runs(&f, 0, r, 1, 0).drop, TD_DROP_CHAIN);
    fix_init(&f);
    r[0] = run_of(&f, 2, 0);
    a = send_runs(&f, 0, r, 1, 0x10);
    assert_true(a.drop == TD_DROP_CRC && a.release && a.ack);
    assert_int_equal(f.t.code, TD_DATA_LOSS);
    /* after the fence nothing is copied, and the sender hears it */
    a = send_block(&f, 1, 0);
    assert_true(a.drop == TD_DROP_STATE && a.ack && !a.copy && !a.release);
}

static void test_commit_must_describe_what_arrived(void **state)
{
    (void)state;
    fix f;
    fix_init(&f);
    send_all(&f);
    assert_int_equal(commit(&f, 1, 42).drop, TD_DROP_DIGEST);
    fix_init(&f);
    send_all(&f);
    td_in_actions a = commit(&f, 0, 43); /* a recovery whose recomputed token differs */
    assert_true(a.drop == TD_DROP_FIRST && a.release);
}

static void test_duplicate_segment_is_not_copied(void **state)
{
    (void)state;
    fix f;
    fix_init(&f);
    send_block(&f, 1, 0);
    td_in_actions a = send_block(&f, 1, 0);
    assert_true(a.drop == TD_DROP_DUPLICATE && !a.copy && !a.release);
    assert_int_equal(f.t.received_bytes, SEGMENT);
}

static void test_deadline_and_cancel_release_once(void **state)
{
    (void)state;
    fix f;
    td_in_actions a;
    fix_init(&f);
    td_in_event e = {.kind = TD_IN_TICK};
    td_ticket_in_step(&f.t, &e, 999, &a);
    assert_false(a.release);
    td_ticket_in_step(&f.t, &e, 1000, &a);
    assert_true(a.release && f.t.code == TD_DEADLINE_EXCEEDED);
    td_ticket_in_step(&f.t, &e, 1001, &a);
    assert_false(a.release);
    assert_int_equal(send_block(&f, 1, 0).drop, TD_DROP_STATE);
    fix_init(&f);
    e = (td_in_event){.kind = TD_IN_CANCEL, .code = TD_CANCELLED};
    td_ticket_in_step(&f.t, &e, 5, &a);
    assert_true(a.release);
    td_ticket_in_step(&f.t, &e, 5, &a);
    assert_false(a.release);
}

/* Any order of any frames, some spoiled: delivered only when all was right, and exactly one of
 * deliver and release. */
static void test_random_orders(void **state)
{
    (void)state;
    for (uint64_t seed = 0; seed < 2000; seed++) {
        td_rng rng = {.seed = seed};
        fix f;
        fix_init(&f);
        int delivered = 0, released = 0, spoiled = 0;
        for (int i = 0; i < 40; i++) {
            td_in_actions a;
            uint32_t g = (uint32_t)td_rng_below(&rng, GROUPS),
                     b = HELD + (uint32_t)td_rng_below(&rng, BLOCKS - HELD);
            uint64_t dice = td_rng_below(&rng, 40);
            if (dice == 0) {
                td_kv_run r = run_of(&f, b, g);
                int fresh = !f.t.seen[b * GROUPS + g] && !td_ticket_in_ended(&f.t);
                a = send_runs(&f, g, &r, 1, 4);
                spoiled |= fresh;
            } else if (dice < 3) {
                int early = f.t.n_left > 0 && !td_ticket_in_ended(&f.t);
                a = commit(&f, 0, 42);
                spoiled |= early;
            } else {
                a = send_block(&f, b, g);
            }
            delivered += a.deliver;
            released += a.release;
        }
        assert_true(delivered + released <= 1);
        assert_int_equal(released, spoiled);
        if (delivered)
            assert_int_equal(f.t.n_left, 0);
    }
}

/* ---- pushing end ---- */

static td_out_actions out_step(td_ticket_out *t, td_out_kind kind, uint64_t bytes, uint64_t now)
{
    td_out_event e = {.kind = kind, .bytes = bytes, .in_flight = (uint32_t)bytes};
    td_out_actions a;
    td_ticket_out_step(t, &e, now, &a);
    return a;
}

static td_out_actions out_ack(td_ticket_out *t, td_ack_state s, uint64_t received, uint32_t code,
                              uint64_t now)
{
    td_out_event e = {
        .kind = TD_OUT_ACK, .key = &t->key, .ack = s, .bytes = received, .code = code};
    td_out_actions a;
    td_ticket_out_step(t, &e, now, &a);
    return a;
}

static void out_new(td_ticket_out *t)
{
    fix f;
    fix_init(&f);
    td_ticket_out_init(t, &f.key, 250, 60 * 1000000ull, 0);
}

static void test_out_credit_and_done(void **state)
{
    (void)state;
    td_ticket_out t;
    out_new(&t);
    assert_true(td_ticket_out_may_send(&t, 250));
    assert_false(td_ticket_out_may_send(&t, 251));
    out_step(&t, TD_OUT_SENT, 200, 1);
    assert_false(td_ticket_out_may_send(&t, 100));
    out_step(&t, TD_OUT_FLIGHT, 2, 1);
    out_ack(&t, TD_ACK_RECEIVING, 200, 0, 2);
    out_ack(&t, TD_ACK_RECEIVING, 100, 0, 2); /* cumulative: an old one takes nothing back */
    assert_true(td_ticket_out_may_send(&t, 250));
    out_step(&t, TD_OUT_COMMIT, 0, 3);
    assert_false(td_ticket_out_may_send(&t, 1));
    /* acked, but a frame is still held by the library: the blocks stay pinned */
    assert_false(out_ack(&t, TD_ACK_COMMITTED, 200, 0, 4).done);
    td_out_actions a = out_step(&t, TD_OUT_FLIGHT, 0, 5);
    assert_true(a.done && t.code == TD_OK);
    assert_false(out_step(&t, TD_OUT_FLIGHT, 0, 6).done);
}

static void test_out_retries_and_gives_up(void **state)
{
    (void)state;
    td_ticket_out t;
    out_new(&t);
    out_step(&t, TD_OUT_SENT, 100, 0);
    out_ack(&t, TD_ACK_RECEIVING, 100, 0, 10);
    out_step(&t, TD_OUT_COMMIT, 0, 1000);
    assert_int_equal(td_ticket_out_due(&t), 1000 + TD_OUT_COMMIT_RETRY_US);
    assert_true(out_step(&t, TD_OUT_TICK, 0, 1000 + TD_OUT_COMMIT_RETRY_US).send_commit);
    assert_false(out_step(&t, TD_OUT_TICK, 0, 1001 + TD_OUT_COMMIT_RETRY_US).send_commit);
    td_out_actions a = out_step(&t, TD_OUT_TICK, 0, 1000 + TD_OUT_SILENCE_US);
    assert_true(a.done && t.code == TD_UNAVAILABLE);
}

static void test_out_forces_fencing(void **state)
{
    (void)state;
    td_ticket_out t;
    out_new(&t);
    out_step(&t, TD_OUT_SENT, 100, 0);
    out_step(&t, TD_OUT_FLIGHT, 3, 0);
    td_out_event e = {.kind = TD_OUT_CANCEL};
    td_out_actions a;
    td_ticket_out_step(&t, &e, 100, &a);
    assert_false(a.done || a.close_peer);
    assert_false(out_step(&t, TD_OUT_TICK, 0, 99 + TD_OUT_DRAIN_US).close_peer);
    assert_true(out_step(&t, TD_OUT_TICK, 0, 100 + TD_OUT_DRAIN_US).close_peer);
    assert_false(out_step(&t, TD_OUT_TICK, 0, 200 + TD_OUT_DRAIN_US).close_peer);
    a = out_step(&t, TD_OUT_PEER_CLOSED, 0, 300 + TD_OUT_DRAIN_US);
    assert_true(a.done && t.code == TD_CANCELLED);
}

/* Bug: blocks that the peer reads out of shared memory were given back while it could still copy
 * them. They are held until it has acked every byte, ended the ticket, or lost the right to read.
 */
static void test_out_by_ref(void **state)
{
    (void)state;
    td_ticket_out t;
    td_out_event cancel = {.kind = TD_OUT_CANCEL};
    td_out_actions a;
    for (int end = 0; end < 4; end++) {
        out_new(&t);
        t.by_ref = 1;
        out_step(&t, TD_OUT_SENT, 100, 0);
        out_step(&t, TD_OUT_SENT, 100, 0);
        td_ticket_out_step(&t, &cancel, 100, &a);
        assert_false(a.done);
        assert_false(out_ack(&t, TD_ACK_RECEIVING, 100, 0, 101).done); /* half is not all */
        if (end == 0)
            assert_true(out_ack(&t, TD_ACK_RECEIVING, 200, 0, 102).done);
        else if (end == 1)
            assert_true(out_ack(&t, TD_ACK_FAILED, 100, 1, 102).done);
        else if (end == 2)
            assert_true(out_ack(&t, TD_ACK_UNKNOWN, 0, 0, 102).done);
        else {
            assert_false(out_step(&t, TD_OUT_TICK, 0, 99 + TD_OUT_DRAIN_US).done);
            a = out_step(&t, TD_OUT_TICK, 0, 100 + TD_OUT_DRAIN_US);
            assert_true(a.close_peer && !a.done);
            assert_true(out_step(&t, TD_OUT_PEER_CLOSED, 0, 101 + TD_OUT_DRAIN_US).done);
        }
        assert_int_equal(t.code, TD_CANCELLED);
    }
    out_new(&t); /* the way it should go */
    t.by_ref = 1;
    out_step(&t, TD_OUT_SENT, 100, 0);
    out_step(&t, TD_OUT_COMMIT, 0, 1);
    a = out_ack(&t, TD_ACK_COMMITTED, 100, 0, 2);
    assert_true(a.done && t.code == TD_OK);
}

static void test_out_foreign_acks(void **state)
{
    (void)state;
    td_ticket_out t;
    out_new(&t);
    out_step(&t, TD_OUT_SENT, 100, 0);
    td_ticket_key other = t.key;
    other.decode_epoch[0] ^= 1;
    td_out_event e = {.kind = TD_OUT_ACK, .key = &other, .ack = TD_ACK_COMMITTED, .bytes = 100};
    td_out_actions a;
    td_ticket_out_step(&t, &e, 1, &a);
    assert_true(a.drop && t.state == TD_OUT_PUSHING);
    assert_true(out_ack(&t, TD_ACK_RECEIVING, 101, 0, 1).drop); /* more than was sent */
    a = out_ack(&t, TD_ACK_UNKNOWN, 0, 0, 2);
    assert_true(a.done && t.code == TD_ABORTED);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_whole_way),
        cmocka_unit_test(test_stale_frames_change_nothing),
        cmocka_unit_test(test_mismatch_fences),
        cmocka_unit_test(test_commit_must_describe_what_arrived),
        cmocka_unit_test(test_duplicate_segment_is_not_copied),
        cmocka_unit_test(test_deadline_and_cancel_release_once),
        cmocka_unit_test(test_random_orders),
        cmocka_unit_test(test_out_credit_and_done),
        cmocka_unit_test(test_out_by_ref),
        cmocka_unit_test(test_out_retries_and_gives_up),
        cmocka_unit_test(test_out_forces_fencing),
        cmocka_unit_test(test_out_foreign_acks),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
