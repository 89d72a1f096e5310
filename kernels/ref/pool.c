/* SPDX-License-Identifier: Apache-2.0 */
#include "kernels/ref/pool.h"

#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "kernels/math.h"

#include "base/banned.h"

enum { SPIN_US = 20 };

/* ticket = generation << 32 | items left. A thread that wakes late sees another generation or no
 * items, so the caller need not wait for sleepers: only for items. fn, arg are stable while an item
 * of their generation is undone. */
struct td_pool {
    _Alignas(64) _Atomic uint64_t ticket;
    _Alignas(64) _Atomic uint32_t done;
    _Alignas(64) _Atomic uint32_t wake; /* futex word: generation, or stop */
    _Atomic uint32_t sleepers;
    _Atomic int stop;
    td_pool_fn fn;
    void *arg;
    uint32_t n_threads, n_started, generation;
    struct worker {
        td_pool *pool;
        pthread_t thread;
        uint32_t index;
    } * workers;
};

static void futex_wait(_Atomic uint32_t *word, uint32_t value)
{
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void futex_wake_all(_Atomic uint32_t *word)
{
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
}

static int take_item(td_pool *p, uint32_t *ret_item)
{
    uint64_t t = atomic_load_explicit(&p->ticket, memory_order_acquire);
    while ((uint32_t)t) {
        if (atomic_compare_exchange_weak_explicit(&p->ticket, &t, t - 1, memory_order_acq_rel,
                                                  memory_order_acquire)) {
            *ret_item = (uint32_t)t - 1;
            return 1;
        }
    }
    return 0;
}

static void work(td_pool *p, uint32_t thread)
{
    uint32_t item;
    while (take_item(p, &item)) {
        p->fn(p->arg, item, thread);
        atomic_fetch_add_explicit(&p->done, 1, memory_order_release);
    }
}

static void wait_for_work(td_pool *p, uint32_t seen)
{
    uint64_t end = td_now_us() + SPIN_US;
    while (atomic_load_explicit(&p->wake, memory_order_acquire) == seen) {
        if (td_now_us() < end) {
            __builtin_ia32_pause();
            continue;
        }
        atomic_fetch_add(&p->sleepers, 1);
        if (atomic_load(&p->wake) == seen)
            futex_wait(&p->wake, seen);
        atomic_fetch_sub(&p->sleepers, 1);
    }
}

static void *worker_main(void *arg)
{
    struct worker *w = arg;
    td_pool *p = w->pool;
    td_fp_flush();
    uint32_t seen = 0;
    for (;;) {
        wait_for_work(p, seen);
        seen = atomic_load(&p->wake);
        if (atomic_load(&p->stop))
            return NULL;
        work(p, w->index);
    }
}

static void pin(pthread_t t, int core)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET((size_t)core, &set);
    pthread_setaffinity_np(t, sizeof set, &set);
}

static int start(td_pool *p, const int *cores, uint32_t n_cores)
{
    if (cores && n_cores)
        pin(pthread_self(), cores[0]);
    for (uint32_t i = 1; i < p->n_threads; i++) {
        struct worker *w = &p->workers[i];
        w->pool = p;
        w->index = i;
        int r = pthread_create(&w->thread, NULL, worker_main, w);
        if (r)
            return -r;
        p->n_started = i;
        if (cores && n_cores)
            pin(w->thread, cores[i % n_cores]);
    }
    return 0;
}

int td_pool_open(uint32_t n_threads, const int *cores, uint32_t n_cores, td_pool **ret_pool)
{
    td_pool *p = aligned_alloc(64, (sizeof *p + 63) / 64 * 64);
    if (!p)
        return -ENOMEM;
    *p = (td_pool){.n_threads = n_threads};
    p->workers = calloc(n_threads, sizeof *p->workers);
    int r = p->workers ? start(p, cores, n_cores) : -ENOMEM;
    if (r < 0) {
        td_pool_close(p);
        return r;
    }
    *ret_pool = p;
    return 0;
}

void td_pool_close(td_pool *p)
{
    if (!p)
        return;
    atomic_store(&p->stop, 1);
    atomic_fetch_add(&p->wake, 1);
    futex_wake_all(&p->wake);
    for (uint32_t i = 1; i <= p->n_started; i++)
        pthread_join(p->workers[i].thread, NULL);
    free(p->workers);
    free(p);
}

uint32_t td_pool_threads(const td_pool *p)
{
    return p->n_threads;
}

void td_pool_run(td_pool *p, td_pool_fn fn, void *arg, uint32_t n_items)
{
    if (p->n_threads == 1 || n_items == 1) {
        for (uint32_t i = 0; i < n_items; i++)
            fn(arg, i, 0);
        return;
    }
    if (n_items == 0)
        return;
    p->fn = fn;
    p->arg = arg;
    atomic_store_explicit(&p->done, 0, memory_order_relaxed);
    p->generation++;
    atomic_store_explicit(&p->ticket, (uint64_t)p->generation << 32 | n_items,
                          memory_order_release);
    atomic_fetch_add(&p->wake, 1);
    if (atomic_load(&p->sleepers))
        futex_wake_all(&p->wake);
    work(p, 0);
    /* the last items run elsewhere: if their thread lost its core to a stranger, give it ours */
    uint64_t end = 0;
    while (atomic_load_explicit(&p->done, memory_order_acquire) < n_items) {
        __builtin_ia32_pause();
        if (!end)
            end = td_now_us() + SPIN_US;
        else if (td_now_us() > end)
            sched_yield();
    }
}
