/* SPDX-License-Identifier: Apache-2.0 */
/* Messages of the KV socket: first byte chooses which, the rest is the body; what is accepted must
 * pack again to something that reads the same, and must pass through a ticket without a crash. */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "handoff/ticket.h"
#include "handoff/wire.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

static void through_ticket(const td_wire_segment *s, const td_wire_commit *c)
{
    enum { BLOCKS = 4, GROUPS = 2 };
    static uint32_t memory[64];
    static uint32_t crcs[TD_SEGMENT_RUNS_MAX];
    td_in_block blocks[BLOCKS] = {{0}, {.rows = 64}, {.rows = 64}, {.rows = 3}};
    td_in_first first = {0};
    td_in_grant g = {.blocks = blocks,
                     .n_blocks = BLOCKS,
                     .n_groups = GROUPS,
                     .first = &first,
                     .n_first = 1,
                     .n_tokens = 195,
                     .credit_bytes = 1 << 20,
                     .deadline_us = 1000};
    const td_ticket_key *key = s ? &s->key : &c->key;
    td_ticket_in t;
    td_in_actions a;
    g.key = *key;
    g.terms = s ? s->terms : c->terms;
    td_ticket_in_init(&t, &g, memory, 1);
    td_in_event e = {.kind = TD_IN_SEGMENT_HEAD, .key = key, .terms = &g.terms};
    if (s) {
        e.group = s->group;
        e.runs = s->runs;
        e.n_runs = s->n_runs;
        e.crcs = crcs;
        td_ticket_in_step(&t, &e, 2, &a);
        if (a.copy) {
            for (uint32_t i = 0; i < s->n_runs; i++)
                crcs[i] = s->runs[i].crc;
            e.kind = TD_IN_SEGMENT_BODY;
            td_ticket_in_step(&t, &e, 2, &a);
            if (a.deliver)
                abort();
        }
        return;
    }
    e.kind = TD_IN_COMMIT;
    e.digests = c->digests;
    e.n_digests = c->n_digests;
    e.n_tokens = c->n_tokens;
    e.choices = c->choices;
    e.ids = c->ids;
    e.n_first = c->n_first;
    td_ticket_in_step(&t, &e, 2, &a);
    if (a.deliver)
        abort(); /* nothing was verified */
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    static td_wire_segment s, s2;
    static uint8_t out[TD_KV_BODY_MAX];
    td_wire_commit c;
    td_wire_ack k;
    td_wire_pool p, p2;
    td_wire_pool_ack pk;
    td_arena a;
    if (n == 0)
        return 0;
    td_arena_init(&a, 12 << 20);
    int kind = data[0] % 6;
    if (kind == 0 && td_wire_unpack_segment(data + 1, n - 1, &a, &s) == 0) {
        int len = td_wire_pack_segment(&s, out, sizeof out);
        memset(&s2, 0, sizeof s2);
        if (len < 0 || td_wire_unpack_segment(out, (size_t)len, &a, &s2) < 0 ||
            s2.n_runs != s.n_runs || s2.shared != s.shared || s2.pool != s.pool ||
            s2.runs[0].offset != s.runs[0].offset)
            abort();
        through_ticket(&s, NULL);
    } else if (kind == 1 && td_wire_unpack_commit(data + 1, n - 1, &a, &c) == 0) {
        through_ticket(NULL, &c);
    } else if (kind == 2 && td_wire_unpack_ack(data + 1, n - 1, &a, &k) == 0) {
        if (td_wire_pack_ack(&k, out, sizeof out) < 0)
            abort();
    } else if (kind == 3) {
        (void)td_wire_check_tag(data + 1, n - 1, n);
    } else if (kind == 4 && td_wire_unpack_pool(data + 1, n - 1, &a, &p) == 0) {
        int len = td_wire_pack_pool(&p, out, sizeof out);
        if (len < 0 || td_wire_unpack_pool(out, (size_t)len, &a, &p2) < 0 ||
            memcmp(&p, &p2, sizeof p) != 0)
            abort();
    } else if (kind == 5 && td_wire_unpack_pool_ack(data + 1, n - 1, &a, &pk) == 0) {
        if (td_wire_pack_pool_ack(&pk, out, sizeof out) < 0)
            abort();
    }
    td_arena_done(&a);
    return 0;
}
