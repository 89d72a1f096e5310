/* SPDX-License-Identifier: Apache-2.0 */
#include "handoff/ticket.h"

#include <string.h>

#include "base/bug.h"
#include "base/hash.h"
#include "rpc/frame.h"
#include "base/banned.h"

static const struct {
    const char *name;
    uint32_t code;
} drops[TD_DROP_MAX] = {
    [TD_DROP_NONE] = {"none", TD_OK},
    [TD_DROP_UNKNOWN] = {"unknown", TD_ABORTED},
    [TD_DROP_MAC] = {"mac", TD_DATA_LOSS},
    [TD_DROP_ATTEMPT] = {"attempt", TD_ABORTED},
    [TD_DROP_GENERATION] = {"generation", TD_ABORTED},
    [TD_DROP_EPOCH] = {"epoch", TD_ABORTED},
    [TD_DROP_STATE] = {"state", TD_ABORTED},
    [TD_DROP_DUPLICATE] = {"duplicate", TD_ABORTED},
    [TD_DROP_FORMAT] = {"format", TD_INVALID_ARGUMENT},
    [TD_DROP_MODEL] = {"model", TD_FAILED_PRECONDITION},
    [TD_DROP_PROFILE] = {"profile", TD_FAILED_PRECONDITION},
    [TD_DROP_LAYOUT] = {"layout", TD_FAILED_PRECONDITION},
    [TD_DROP_RANGE] = {"range", TD_INVALID_ARGUMENT},
    [TD_DROP_CHAIN] = {"chain", TD_DATA_LOSS},
    [TD_DROP_CREDIT] = {"credit", TD_INVALID_ARGUMENT},
    [TD_DROP_CRC] = {"crc", TD_DATA_LOSS},
    [TD_DROP_DIGEST] = {"digest", TD_DATA_LOSS},
    [TD_DROP_POOL] = {"pool", TD_FAILED_PRECONDITION},
    [TD_DROP_FIRST] = {"first", TD_DATA_LOSS},
};

const char *td_drop_name(td_drop d)
{
    return (unsigned)d < TD_DROP_MAX ? drops[d].name : "?";
}

uint32_t td_drop_code(td_drop d)
{
    return (unsigned)d < TD_DROP_MAX ? drops[d].code : TD_INTERNAL;
}

uint32_t td_ticket_digest(const uint32_t *group_crcs, uint32_t n_groups)
{
    return td_crc32c(0, group_crcs, n_groups * sizeof *group_crcs);
}

/* ---- receiving end ---- */

size_t td_ticket_in_bytes(uint32_t n_blocks, uint32_t n_groups)
{
    return (size_t)n_blocks * n_groups * (sizeof(uint32_t) + 1);
}

void td_ticket_in_init(td_ticket_in *t, const td_in_grant *g, void *memory, uint64_t now_us)
{
    size_t pairs = (size_t)g->n_blocks * g->n_groups;
    *t = (td_ticket_in){.key = g->key,
                        .terms = g->terms,
                        .n_blocks = g->n_blocks,
                        .n_groups = g->n_groups,
                        .credit_bytes = g->credit_bytes,
                        .deadline_us = g->deadline_us,
                        .granted_us = now_us,
                        .blocks = g->blocks,
                        .first = g->first,
                        .n_first = g->n_first,
                        .n_tokens = g->n_tokens,
                        .crc = memory,
                        .seen = (uint8_t *)memory + pairs * sizeof(uint32_t)};
    memset(t->key.prefill_epoch, 0, sizeof t->key.prefill_epoch);
    memset(memory, 0, td_ticket_in_bytes(g->n_blocks, g->n_groups));
    for (uint32_t b = 0; b < g->n_blocks; b++)
        t->n_left += g->blocks[b].rows ? g->n_groups : 0;
}

int td_ticket_in_ended(const td_ticket_in *t)
{
    return t->state >= TD_IN_COMMITTED;
}

uint64_t td_ticket_in_due(const td_ticket_in *t)
{
    return td_ticket_in_ended(t) ? UINT64_MAX : t->deadline_us;
}

/* Does the frame speak of this life of this ticket? */
static td_drop in_stale(const td_ticket_in *t, const td_ticket_key *k)
{
    if (memcmp(t->key.id, k->id, 16) != 0)
        return TD_DROP_UNKNOWN;
    if (t->key.attempt != k->attempt)
        return TD_DROP_ATTEMPT;
    if (t->key.generation != k->generation)
        return TD_DROP_GENERATION;
    if (memcmp(t->key.decode_epoch, k->decode_epoch, 16) != 0)
        return TD_DROP_EPOCH;
    if (t->bound && memcmp(t->key.prefill_epoch, k->prefill_epoch, 16) != 0)
        return TD_DROP_EPOCH;
    return TD_DROP_NONE;
}

static td_drop in_terms(const td_ticket_in *t, const td_ticket_terms *terms)
{
    if (memcmp(t->terms.model_hash, terms->model_hash, 32) != 0)
        return TD_DROP_MODEL;
    if (memcmp(t->terms.profile_id, terms->profile_id, 16) != 0)
        return TD_DROP_PROFILE;
    if (memcmp(t->terms.layout_hash, terms->layout_hash, 16) != 0)
        return TD_DROP_LAYOUT;
    return TD_DROP_NONE;
}

static td_drop in_runs(const td_ticket_in *t, const td_in_event *e)
{
    if (e->group >= t->n_groups || e->n_runs == 0)
        return TD_DROP_RANGE;
    td_drop found = TD_DROP_NONE;
    for (uint32_t i = 0; i < e->n_runs; i++) {
        const td_kv_run *r = &e->runs[i];
        if (r->block >= t->n_blocks || r->rows == 0 || r->rows != t->blocks[r->block].rows)
            return TD_DROP_RANGE;
        /* ascending order also makes a block twice in one segment impossible */
        if (i > 0 && r->block <= e->runs[i - 1].block)
            return TD_DROP_RANGE;
        const td_in_block *b = &t->blocks[r->block];
        if (b->has_chain && (!r->has_chain || memcmp(b->chain, r->chain, 16) != 0))
            return TD_DROP_CHAIN;
        if (t->seen[(size_t)r->block * t->n_groups + e->group])
            found = TD_DROP_DUPLICATE;
    }
    return found;
}

static void in_end(td_ticket_in *t, td_in_state state, uint32_t code, uint64_t now_us,
                   td_in_actions *a)
{
    t->state = state;
    t->code = code;
    t->done_us = now_us;
    a->release = 1;
    a->ack = t->bound;
}

static void in_refuse(td_ticket_in *t, td_drop d, uint64_t now_us, td_in_actions *a)
{
    a->drop = d;
    a->copy = 0;
    if (d <= TD_DROP_DUPLICATE)
        return;
    t->why = d;
    in_end(t, TD_IN_FENCED, td_drop_code(d), now_us, a);
    a->ack = 1;
}

/* Everything that must hold before payload is touched, and again when it was copied: the ticket may
 * have ended between. */
static td_drop in_check_segment(const td_ticket_in *t, const td_in_event *e)
{
    td_drop d = in_terms(t, e->terms);
    if (!d)
        d = in_runs(t, e);
    if (!d && e->bytes > t->credit_bytes)
        d = TD_DROP_CREDIT;
    return d;
}

static void in_bind(td_ticket_in *t, const td_ticket_key *k)
{
    memcpy(t->key.prefill_epoch, k->prefill_epoch, 16);
    t->bound = 1;
}

static void in_body(td_ticket_in *t, const td_in_event *e, uint64_t now_us, td_in_actions *a)
{
    for (uint32_t i = 0; i < e->n_runs; i++) {
        if (e->crcs[i] != e->runs[i].crc) {
            in_refuse(t, TD_DROP_CRC, now_us, a);
            return;
        }
    }
    for (uint32_t i = 0; i < e->n_runs; i++) {
        size_t at = (size_t)e->runs[i].block * t->n_groups + e->group;
        t->seen[at] = 1;
        t->crc[at] = e->crcs[i];
    }
    t->n_left -= e->n_runs;
    t->received_bytes += e->bytes;
    t->n_segments++;
    if (!t->first_us)
        t->first_us = now_us;
    t->state = t->n_left ? TD_IN_RECEIVING : TD_IN_VERIFIED;
    a->ack = 1;
}

static td_drop in_check_first(const td_ticket_in *t, const td_in_event *e)
{
    if (e->n_first != t->n_first)
        return TD_DROP_FIRST;
    for (uint32_t i = 0; i < t->n_first; i++) {
        if (e->choices[i] != t->first[i].choice)
            return TD_DROP_FIRST;
        if (t->first[i].has_id && e->ids[i] != t->first[i].id)
            return TD_DROP_FIRST;
    }
    return TD_DROP_NONE;
}

static td_drop in_check_commit(const td_ticket_in *t, const td_in_event *e)
{
    td_drop d = in_terms(t, e->terms);
    if (d)
        return d;
    if (t->n_left || e->n_tokens != t->n_tokens)
        return TD_DROP_DIGEST;
    uint32_t n = 0;
    for (uint32_t b = 0; b < t->n_blocks; b++) {
        if (!t->blocks[b].rows)
            continue;
        if (n >= e->n_digests ||
            e->digests[n] != td_ticket_digest(t->crc + (size_t)b * t->n_groups, t->n_groups))
            return TD_DROP_DIGEST;
        n++;
    }
    if (n != e->n_digests)
        return TD_DROP_DIGEST;
    return in_check_first(t, e);
}

static void in_commit(td_ticket_in *t, const td_in_event *e, uint64_t now_us, td_in_actions *a)
{
    td_drop d = in_check_commit(t, e);
    if (d) {
        in_refuse(t, d, now_us, a);
        return;
    }
    t->state = TD_IN_COMMITTED;
    t->done_us = now_us;
    a->deliver = 1;
    a->ack = 1;
}

static void in_frame(td_ticket_in *t, const td_in_event *e, uint64_t now_us, td_in_actions *a)
{
    td_drop d = in_stale(t, e->key);
    if (!d && td_ticket_in_ended(t)) {
        /* A repeated commit, or any frame of a ticket that failed: say again how it ended. */
        a->ack = 1;
        if (e->kind != TD_IN_COMMIT || t->state != TD_IN_COMMITTED)
            d = TD_DROP_STATE;
        a->drop = d;
        return;
    }
    if (d) {
        in_refuse(t, d, now_us, a);
        return;
    }
    if (e->kind == TD_IN_BAD_FRAME) {
        in_refuse(t, e->why ? e->why : TD_DROP_FORMAT, now_us, a);
        return;
    }
    in_bind(t, e->key);
    if (e->kind == TD_IN_COMMIT) {
        in_commit(t, e, now_us, a);
        return;
    }
    d = in_check_segment(t, e);
    if (d)
        in_refuse(t, d, now_us, a);
    else if (e->kind == TD_IN_SEGMENT_HEAD)
        a->copy = 1;
    else
        in_body(t, e, now_us, a);
}

void td_ticket_in_step(td_ticket_in *t, const td_in_event *e, uint64_t now_us, td_in_actions *a)
{
    *a = (td_in_actions){0};
    switch (e->kind) {
    case TD_IN_SEGMENT_HEAD:
    case TD_IN_SEGMENT_BODY:
    case TD_IN_COMMIT:
    case TD_IN_BAD_FRAME:
        in_frame(t, e, now_us, a);
        break;
    case TD_IN_TICK:
        if (!td_ticket_in_ended(t) && now_us >= t->deadline_us)
            in_end(t, TD_IN_EXPIRED, TD_DEADLINE_EXCEEDED, now_us, a);
        break;
    case TD_IN_CANCEL:
        if (!td_ticket_in_ended(t))
            in_end(t, TD_IN_CANCELLED, e->code ? e->code : TD_CANCELLED, now_us, a);
        break;
    }
}

/* ---- pushing end ---- */

void td_ticket_out_init(td_ticket_out *t, const td_ticket_key *key, uint64_t credit_bytes,
                        uint64_t deadline_us, uint64_t now_us)
{
    *t = (td_ticket_out){.key = *key,
                         .credit_bytes = credit_bytes,
                         .deadline_us = deadline_us,
                         .progress_us = now_us};
}

int td_ticket_out_may_send(const td_ticket_out *t, uint64_t bytes)
{
    if (t->state > TD_OUT_PUSHING || bytes > t->credit_bytes)
        return 0;
    return t->sent_bytes - t->received_bytes <= t->credit_bytes - bytes;
}

static void out_end(td_ticket_out *t, td_out_state state, uint32_t code, uint64_t now_us)
{
    if (t->state >= TD_OUT_ACKED)
        return;
    t->state = state;
    t->code = code;
    t->failed_us = now_us;
}

static int out_is_ours(const td_ticket_out *t, const td_ticket_key *k)
{
    return memcmp(t->key.id, k->id, 16) == 0 && t->key.attempt == k->attempt &&
           t->key.generation == k->generation &&
           memcmp(t->key.decode_epoch, k->decode_epoch, 16) == 0 &&
           memcmp(t->key.prefill_epoch, k->prefill_epoch, 16) == 0;
}

static void out_ack(td_ticket_out *t, const td_out_event *e, uint64_t now_us, td_out_actions *a)
{
    if (!out_is_ours(t, e->key) || e->bytes > t->sent_bytes) {
        a->drop = TD_DROP_EPOCH;
        return;
    }
    if (e->bytes > t->received_bytes)
        t->received_bytes = e->bytes;
    t->settled |= e->ack != TD_ACK_RECEIVING;
    if (t->state >= TD_OUT_ACKED) {
        a->drop = TD_DROP_STATE;
        return;
    }
    t->progress_us = now_us;
    if (e->ack == TD_ACK_COMMITTED && t->state == TD_OUT_COMMIT_SENT)
        out_end(t, TD_OUT_ACKED, TD_OK, now_us);
    else if (e->ack == TD_ACK_COMMITTED)
        out_end(t, TD_OUT_FAILED, TD_INTERNAL, now_us); /* acked what was never committed */
    else if (e->ack == TD_ACK_FAILED)
        out_end(t, TD_OUT_FAILED, e->code ? e->code : TD_ABORTED, now_us);
    else if (e->ack == TD_ACK_UNKNOWN)
        out_end(t, TD_OUT_FAILED, TD_ABORTED, now_us);
}

/* Something waits for the peer: to be taken, or to be answered. */
static int out_owed(const td_ticket_out *t)
{
    if (t->state < TD_OUT_COMMIT_SENT && t->queued)
        return 1;
    return t->state == TD_OUT_COMMIT_SENT ||
           (t->state == TD_OUT_PUSHING && t->sent_bytes > t->received_bytes);
}

/* Somebody may still read our blocks. */
static int out_held(const td_ticket_out *t)
{
    return t->in_flight || (t->by_ref && !t->settled && t->sent_bytes > t->received_bytes);
}

static void out_tick(td_ticket_out *t, uint64_t now_us, td_out_actions *a)
{
    if (t->state < TD_OUT_ACKED && now_us >= t->deadline_us)
        out_end(t, TD_OUT_FAILED, TD_DEADLINE_EXCEEDED, now_us);
    if (out_owed(t) && now_us >= t->progress_us + TD_OUT_SILENCE_US)
        out_end(t, TD_OUT_FAILED, TD_UNAVAILABLE, now_us);
    if (t->state == TD_OUT_COMMIT_SENT && now_us >= t->commit_us + TD_OUT_COMMIT_RETRY_US) {
        t->commit_us = now_us;
        t->n_commits++;
        a->send_commit = 1;
    }
    if (t->state >= TD_OUT_ACKED && out_held(t) && !t->closing &&
        now_us >= t->failed_us + TD_OUT_DRAIN_US) {
        t->closing = 1;
        a->close_peer = 1;
    }
}

void td_ticket_out_step(td_ticket_out *t, const td_out_event *e, uint64_t now_us, td_out_actions *a)
{
    *a = (td_out_actions){0};
    switch (e->kind) {
    case TD_OUT_QUEUED:
        if (!out_owed(t))
            t->progress_us = now_us;
        t->queued = 1;
        break;
    case TD_OUT_SENT:
        TD_BUG_ON(!td_ticket_out_may_send(t, e->bytes));
        t->progress_us = now_us; /* the connection takes frames; acks are owed from here on */
        t->queued = e->queued;
        t->state = TD_OUT_PUSHING;
        t->sent_bytes += e->bytes;
        break;
    case TD_OUT_COMMIT:
        if (t->state > TD_OUT_PUSHING)
            break;
        if (!out_owed(t))
            t->progress_us = now_us;
        t->state = TD_OUT_COMMIT_SENT;
        t->commit_us = now_us;
        t->n_commits = 1;
        break;
    case TD_OUT_ACK:
        out_ack(t, e, now_us, a);
        break;
    case TD_OUT_FLIGHT:
        t->in_flight = e->in_flight;
        break;
    case TD_OUT_CANCEL:
        out_end(t, TD_OUT_FAILED, e->code ? e->code : TD_CANCELLED, now_us);
        break;
    case TD_OUT_PEER_CLOSED:
        t->in_flight = e->in_flight;
        t->settled = 1;
        out_end(t, TD_OUT_FAILED, TD_UNAVAILABLE, now_us);
        break;
    case TD_OUT_TICK:
        out_tick(t, now_us, a);
        break;
    }
    if (t->state >= TD_OUT_ACKED && !out_held(t) && !t->done) {
        t->done = 1;
        a->done = 1;
    }
}

uint64_t td_ticket_out_due(const td_ticket_out *t)
{
    if (t->done)
        return UINT64_MAX;
    if (t->state >= TD_OUT_ACKED)
        return t->closing ? UINT64_MAX : t->failed_us + TD_OUT_DRAIN_US;
    uint64_t due = t->deadline_us;
    if (out_owed(t))
        due = TD_MIN(due, t->progress_us + TD_OUT_SILENCE_US);
    if (t->state == TD_OUT_COMMIT_SENT)
        due = TD_MIN(due, t->commit_us + TD_OUT_COMMIT_RETRY_US);
    return due;
}
