/* SPDX-License-Identifier: Apache-2.0 */
#include "worker/mover.h"

#include "base/bug.h"
#include "base/clock.h"
#include "net/service.h"
#include "base/banned.h"

void td_worker_mover_take(td_worker_mover *m)
{
    td_msg *msg;
    td_ring_clear(m->from_lane);
    while ((msg = td_ring_pop(m->from_lane))) {
        if (msg->kind != TD_WORKER_WAKE)
            m->ops->from_lane(m, msg);
    }
}

static void see_drops(td_worker_mover *m)
{
    TD_LIST_FOR (n, &m->jobs) {
        td_worker_job *j = TD_LIST_ENTRY(n, td_worker_job, mover_node);
        uint32_t code = atomic_load(&j->drop);
        if (code)
            m->ops->drop(m, j, code);
    }
}

static void *mover_main(void *arg)
{
    td_worker_mover *m = arg;
    td_bulk_poll polls[TD_WORKER_POLLS_MAX];
    if (m->core >= 0)
        (void)td_core_pin(m->core);
    for (;;) {
        td_worker_mover_take(m);
        see_drops(m);
        int more = m->ops->run(m, td_now_us());
        if (atomic_load(&m->stop) && td_list_empty(&m->jobs) && td_ring_len(m->from_lane) == 0)
            return NULL;
        uint64_t now = td_now_us(), due = m->ops->due(m, now);
        uint64_t wait = more || due <= now ? 0 : TD_MIN(due - now, (uint64_t)TD_S);
        polls[0] = (td_bulk_poll){.fd = td_ring_fd(m->from_lane), .want = TD_BULK_READ};
        uint32_t n = 1 + m->ops->polls(m, polls + 1, TD_WORKER_POLLS_MAX - 1);
        (void)td_bulk_wait(polls, n, (int64_t)wait);
    }
}

int td_worker_mover_start(td_worker_mover *m, td_err *reterr_err)
{
    td_list_init(&m->jobs);
    int r = -pthread_create(&m->thread, NULL, mover_main, m);
    return r < 0 ? td_err_set(reterr_err, r, "mover: cannot start a thread: %s", td_errno_text(r))
                 : 0;
}

void td_worker_mover_stop(td_worker_mover *m)
{
    atomic_store(&m->stop, 1);
    (void)td_ring_push(m->from_lane, &td_msg_wake);
    pthread_join(m->thread, NULL);
}
