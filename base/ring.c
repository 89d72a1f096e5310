/* SPDX-License-Identifier: Apache-2.0 */
#include "base/ring.h"

#include <errno.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "base/bug.h"
#include "base/clock.h"
#include "base/banned.h"

enum { CACHE_LINE = 64 };

struct td_ring {
    _Alignas(CACHE_LINE) _Atomic size_t head; /* consumer */
    _Alignas(CACHE_LINE) _Atomic size_t tail; /* producer */
    /* 1: the consumer may sleep, so the next push writes to the descriptor. Set by the consumer
     * before its last look. */
    _Alignas(CACHE_LINE) _Atomic int sleeping;
    size_t mask;
    int fd;
    void *items[];
};

int td_ring_new(size_t n, td_ring **ret_ring)
{
    size_t cap = 2;
    if (n > SIZE_MAX / 4 / sizeof(void *))
        return -ENOMEM;
    while (cap < n)
        cap *= 2;
    size_t bytes =
        (sizeof(td_ring) + cap * sizeof(void *) + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE;
    td_ring *r = aligned_alloc(CACHE_LINE, bytes);
    if (!r)
        return -ENOMEM;
    atomic_init(&r->head, 0);
    atomic_init(&r->tail, 0);
    atomic_init(&r->sleeping, 1);
    r->mask = cap - 1;
    r->fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (r->fd < 0) {
        int e = -errno;
        free(r);
        return e;
    }
    *ret_ring = r;
    return 0;
}

void td_ring_free(td_ring *r)
{
    if (!r)
        return;
    close(r->fd);
    free(r);
}

int td_ring_push(td_ring *r, void *item)
{
    TD_BUG_ON(!item);
    size_t tail = atomic_load_explicit(&r->tail, memory_order_relaxed);
    if (tail - atomic_load_explicit(&r->head, memory_order_acquire) > r->mask)
        return -EAGAIN;
    r->items[tail & r->mask] = item;
    /* seq_cst on both sides: either we see `sleeping`, or the consumer's last look sees the item */
    atomic_store(&r->tail, tail + 1);
    if (atomic_load(&r->sleeping) && atomic_exchange(&r->sleeping, 0)) {
        uint64_t one = 1;
        (void)!write(r->fd, &one, sizeof one);
    }
    return 0;
}

void *td_ring_pop(td_ring *r)
{
    size_t head = atomic_load_explicit(&r->head, memory_order_relaxed);
    if (head == atomic_load(&r->tail))
        return NULL;
    void *item = r->items[head & r->mask];
    atomic_store_explicit(&r->head, head + 1, memory_order_release);
    return item;
}

int td_ring_fd(const td_ring *r)
{
    return r->fd;
}

void td_ring_clear(td_ring *r)
{
    uint64_t n;
    (void)!read(r->fd, &n, sizeof n);
    atomic_store(&r->sleeping, 1);
}

size_t td_ring_len(const td_ring *r)
{
    return atomic_load(&((td_ring *)r)->tail) - atomic_load(&((td_ring *)r)->head);
}

int td_ring_wait(td_ring *r, unsigned spin_us, long timeout_us)
{
    if (td_ring_len(r))
        return 1;
    for (uint64_t until = td_now_us() + spin_us; spin_us && td_now_us() < until;)
        if (td_ring_len(r))
            return 1;
    uint64_t end = td_now_us() + (uint64_t)(timeout_us < 0 ? 0 : timeout_us);
    for (;;) {
        td_ring_clear(r);
        if (td_ring_len(r))
            return 1;
        uint64_t now = td_now_us(), left = now < end ? end - now : 0;
        struct timespec t = {(time_t)(left / 1000000), (long)(left % 1000000 * 1000)};
        struct pollfd p = {.fd = r->fd, .events = POLLIN};
        ppoll(&p, 1, timeout_us < 0 ? NULL : &t, NULL);
        if (td_ring_len(r))
            return 1;
        /* a signal, or the late wake-up for an item that was popped long ago: the producer may be
         * held up between its item and its write */
        if (timeout_us >= 0 && td_now_us() >= end)
            return 0;
    }
}
