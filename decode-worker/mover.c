/* SPDX-License-Identifier: Apache-2.0 */
#include "decode-worker/mover.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/bug.h"
#include "base/clock.h"
#include "decode-worker/job.h"
#include "proto/engine.pb-c.h"
#include "worker/mover.h"
#include "base/banned.h"

struct td_decode_mover {
    td_worker_mover base; /* jobs: granted and not settled */
    td_receive *receive;
    int is_private; /* the KV link: messages are authenticated */
};

static void settle(td_decode_mover *m, td_decode_job *j)
{
    td_list_del(&j->base.mover_node);
    td_push_wait(m->base.to_lane, &j->settled);
}

static void on_deliver(void *arg, void *user, const uint32_t *ids, uint32_t n,
                       const td_receive_figures *figures)
{
    td_decode_job *j = user;
    j->delivered = 1;
    j->figures = *figures;
    memcpy(j->ids, ids, n * sizeof *ids);
    settle(arg, j);
}

static void on_release(void *arg, void *user, uint32_t code, td_drop why)
{
    td_decode_job *j = user;
    j->settled_code = code ? code : TD_ABORTED;
    j->settled_why = why;
    settle(arg, j);
}

/* Lost when memory or room is short: then they enter the device's pool later. */
static void on_blocks(void *arg, void *user, const td_block *blocks, uint32_t n)
{
    td_decode_mover *m = arg;
    td_decode_arrived *a = malloc(sizeof *a + n * sizeof *blocks);
    if (!a)
        return;
    *a = (td_decode_arrived){.head = {TD_DECODE_ARRIVED}, .job = user, .n = n};
    memcpy(a->blocks, blocks, n * sizeof *blocks);
    if (td_ring_push(m->base.to_lane, a) < 0)
        free(a);
}

/* The router has told the ticket before this thread came to read of it. */
static void on_unknown(void *arg)
{
    td_worker_mover_take(arg);
}

static void grant(td_decode_mover *m, td_decode_job *j)
{
    td_receive_grant g = {.attempt = j->message->attempt,
                          .generation = j->generation,
                          .blocks = j->blocks,
                          .n_blocks = j->base.request.plan.n_blocks,
                          .first = j->first,
                          .n_first = j->base.request.plan.n_choices,
                          .n_tokens = j->base.request.plan.n_tokens,
                          .credit_bytes = TD_DECODE_CREDIT_BYTES,
                          .deadline_us = j->base.deadline_us,
                          .user = j};
    if (m->is_private)
        g.mac_key = j->mac_key;
    memcpy(g.ticket, j->ticket_id, 16);
    td_list_add(&m->base.jobs, &j->base.mover_node);
    int r = td_receive_grant_add(m->receive, &g, td_now_us());
    if (r < 0)
        on_release(m, j, td_code_from_errno(r), TD_DROP_NONE);
}

static void from_lane(td_worker_mover *m, td_msg *msg)
{
    if (msg->kind == TD_DECODE_GRANT)
        grant((td_decode_mover *)m, ((td_worker_msg_of *)msg)->job);
}

static void drop(td_worker_mover *m, td_worker_job *j, uint32_t code)
{
    td_receive_cancel(((td_decode_mover *)m)->receive, ((td_decode_job *)j)->ticket_id, code,
                      td_now_us());
}

static int run(td_worker_mover *m, uint64_t now_us)
{
    return td_receive_run(((td_decode_mover *)m)->receive, now_us);
}

static uint64_t due(td_worker_mover *m, uint64_t now_us)
{
    (void)now_us;
    return td_receive_due(((td_decode_mover *)m)->receive);
}

static uint32_t polls(td_worker_mover *m, td_bulk_poll *polls, uint32_t max)
{
    return td_receive_polls(((td_decode_mover *)m)->receive, polls, max);
}

int td_decode_mover_start(const td_decode_mover_config *config, td_decode_mover **ret_mover,
                          td_err *reterr_err)
{
    static const td_worker_mover_ops ops = {
        .from_lane = from_lane, .drop = drop, .run = run, .due = due, .polls = polls};
    td_decode_mover *m = calloc(1, sizeof *m);
    if (!m)
        return td_err_set(reterr_err, -ENOMEM, "mover: out of memory");
    m->base = (td_worker_mover){.ops = &ops,
                                .from_lane = config->from_lane,
                                .to_lane = config->to_lane,
                                .core = config->core};
    td_receive_config receive = config->receive;
    receive.ops.on_deliver = on_deliver;
    receive.ops.on_release = on_release;
    receive.ops.on_unknown = on_unknown;
    if (td_kv_pool_memfd(receive.pool) < 0)
        receive.ops.on_blocks = on_blocks;
    receive.arg = m;
    m->is_private = td_link_kv_private(receive.link);
    int r = td_receive_open(&receive, &m->receive, reterr_err);
    if (r < 0)
        td_err_prefix(reterr_err, "--kv-listen");
    else
        r = td_worker_mover_start(&m->base, reterr_err);
    if (r < 0) {
        td_receive_close(m->receive);
        free(m);
        return r;
    }
    *ret_mover = m;
    return 0;
}

void td_decode_mover_stop(td_decode_mover *m)
{
    if (!m)
        return;
    td_worker_mover_stop(&m->base);
    td_receive_close(m->receive);
    free(m);
}

const char *td_decode_mover_endpoint(const td_decode_mover *m)
{
    return td_receive_endpoint(m->receive);
}

const td_shm_door *td_decode_mover_door(const td_decode_mover *m)
{
    return td_receive_door(m->receive);
}

const char *td_decode_mover_no_door(const td_decode_mover *m)
{
    return td_receive_no_door(m->receive);
}

const td_receive_stats *td_decode_mover_stats(const td_decode_mover *m)
{
    return td_receive_get_stats(m->receive);
}
