/* SPDX-License-Identifier: Apache-2.0 */
#include "kernels/ref/pool.h"

#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "kernels/math.h"

#include "base/banned.h"

enum {
    SPIN_US = 20,
    LOOK_US = 100,  /* between two looks at a thread that others wait for */
    SLEEP_US = 200, /* the caller spins so long for the last items */
};

/* A thread takes the items of its own range front to back, so that it reads memory in one
 * direction, and then the others' from their ends. */
struct member {
    _Alignas(64) _Atomic uint64_t range; /* first << 32 | end */
    _Atomic int busy;                    /* has an item, or is the caller within a run */
    td_pool *pool;
    pthread_t thread;
    clockid_t clock; /* of its CPU time */
    uint32_t index;
    int core, started;
};

/* A thread that wakes late finds items of a later run or none, so the caller need not wait for
 * sleepers: only for items. fn, arg are stable while an item of their run is undone. */
struct td_pool {
    _Alignas(64) _Atomic uint32_t done; /* futex word while the caller sleeps */
    _Atomic uint32_t caller_sleeps;
    _Alignas(64) _Atomic uint32_t wake; /* futex word: runs so far, or stop */
    _Atomic uint32_t sleepers;
    _Atomic int stop;
    atomic_flag swapping;
    td_pool_fn fn;
    void *arg;
    uint32_t n_threads;
    int pinned;
    struct member *members;
};

static void futex_wait(_Atomic uint32_t *word, uint32_t value, uint32_t us)
{
    struct timespec t = {.tv_nsec = (long)us * 1000};
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, us ? &t : NULL, NULL, 0);
}

static void futex_wake_all(_Atomic uint32_t *word)
{
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
}

static int take_from(struct member *m, int back, uint32_t *ret_item)
{
    uint64_t r = atomic_load_explicit(&m->range, memory_order_acquire);
    while ((uint32_t)(r >> 32) < (uint32_t)r) {
        uint64_t next = back ? r - 1 : r + (1ull << 32);
        if (atomic_compare_exchange_weak_explicit(&m->range, &r, next, memory_order_acq_rel,
                                                  memory_order_acquire)) {
            *ret_item = back ? (uint32_t)next : (uint32_t)(r >> 32);
            return 1;
        }
    }
    return 0;
}

static int take_item(td_pool *p, uint32_t thread, uint32_t *ret_item)
{
    if (take_from(&p->members[thread], 0, ret_item))
        return 1;
    for (uint32_t i = 1; i < p->n_threads; i++)
        if (take_from(&p->members[(thread + i) % p->n_threads], 1, ret_item))
            return 1;
    return 0;
}

/* Items that are done; the caller sleeps for the last ones. */
static void tell_done(td_pool *p, uint32_t n)
{
    if (!n)
        return;
    atomic_fetch_add(&p->done, n);
    if (atomic_load(&p->caller_sleeps))
        futex_wake_all(&p->done);
}

static void work(td_pool *p, uint32_t thread)
{
    uint32_t item, n = 0;
    struct member *m = &p->members[thread];
    atomic_store_explicit(&m->busy, 1, memory_order_release);
    while (take_item(p, thread, &item)) {
        p->fn(p->arg, item, thread);
        n++;
    }
    atomic_store_explicit(&m->busy, thread == 0, memory_order_relaxed);
    tell_done(p, n);
}

static void set_core(struct member *m, int core)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET((size_t)core, &set);
    m->core = core;
    pthread_setaffinity_np(m->thread, sizeof set, &set);
}

static uint64_t cpu_ns(const struct member *m)
{
    struct timespec t = {0};
    clock_gettime(m->clock, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Who waits for a thread that lost its core to a stranger takes its place: nothing waits for who
 * waits. */
static void change_places(td_pool *p, struct member *me, struct member *lost)
{
    if (atomic_flag_test_and_set(&p->swapping))
        return;
    int mine = me->core, theirs = lost->core;
    if (mine != theirs) {
        set_core(lost, mine);
        set_core(me, theirs);
    }
    atomic_flag_clear(&p->swapping);
}

/* What a waiting thread saw of one that has work. */
typedef struct look {
    struct member *at;
    uint64_t ns, when_us;
} look;

static struct member *busy_other(td_pool *p, uint32_t thread)
{
    for (uint32_t i = 1; i < p->n_threads; i++) {
        struct member *m = &p->members[(thread + i) % p->n_threads];
        if (atomic_load_explicit(&m->busy, memory_order_acquire))
            return m;
    }
    return NULL;
}

/* Called by a thread that waits, from time to time. Returns whether somebody has work. */
static int look_after(td_pool *p, uint32_t thread, look *l)
{
    struct member *m = p->pinned ? busy_other(p, thread) : NULL;
    uint64_t now = td_now_us();
    if (!m || m != l->at) {
        *l = (look){m, m ? cpu_ns(m) : 0, now};
    } else if (now - l->when_us >= LOOK_US) {
        uint64_t ns = cpu_ns(m);
        if (ns == l->ns)
            change_places(p, &p->members[thread], m);
        *l = (look){m, ns, now};
    }
    return m != NULL;
}

static void wait_for_work(td_pool *p, uint32_t thread, uint32_t seen)
{
    uint64_t end = td_now_us() + SPIN_US;
    look l = {0};
    while (atomic_load_explicit(&p->wake, memory_order_acquire) == seen) {
        if (td_now_us() < end) {
            __builtin_ia32_pause();
            continue;
        }
        int work = look_after(p, thread, &l);
        atomic_fetch_add(&p->sleepers, 1);
        if (atomic_load(&p->wake) == seen)
            futex_wait(&p->wake, seen, work ? LOOK_US : 0);
        atomic_fetch_sub(&p->sleepers, 1);
    }
}

static void *worker_main(void *arg)
{
    struct member *m = arg;
    td_pool *p = m->pool;
    td_fp_flush();
    uint32_t seen = 0;
    for (;;) {
        wait_for_work(p, m->index, seen);
        seen = atomic_load(&p->wake);
        if (atomic_load(&p->stop))
            return NULL;
        work(p, m->index);
    }
}

static void take_core(td_pool *p, struct member *m, int core)
{
    if (p->pinned && pthread_getcpuclockid(m->thread, &m->clock) == 0)
        set_core(m, core);
}

/* Whoever runs the pool now is its first thread: one opens it, another may work with it. */
static void take_seat(td_pool *p)
{
    struct member *m = &p->members[0];
    if (pthread_equal(m->thread, pthread_self()))
        return;
    while (atomic_flag_test_and_set(&p->swapping))
        __builtin_ia32_pause();
    m->thread = pthread_self();
    take_core(p, m, m->core);
    atomic_flag_clear(&p->swapping);
}

static int start(td_pool *p, const int *cores, uint32_t n_cores)
{
    p->pinned = cores && n_cores;
    for (uint32_t i = 0; i < p->n_threads; i++) {
        struct member *m = &p->members[i];
        m->pool = p;
        m->index = i;
        m->thread = pthread_self();
        int r = i ? pthread_create(&m->thread, NULL, worker_main, m) : 0;
        if (r)
            return -r;
        m->started = i > 0;
        if (p->pinned)
            take_core(p, m, cores[i % n_cores]);
    }
    return 0;
}

int td_pool_open(uint32_t n_threads, const int *cores, uint32_t n_cores, td_pool **ret_pool)
{
    td_pool *p = aligned_alloc(64, (sizeof *p + 63) / 64 * 64);
    if (!p)
        return -ENOMEM;
    *p = (td_pool){.n_threads = n_threads};
    p->members = aligned_alloc(64, n_threads * sizeof *p->members);
    int r = -ENOMEM;
    if (p->members) {
        memset(p->members, 0, n_threads * sizeof *p->members);
        r = start(p, cores, n_cores);
    }
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
    for (uint32_t i = 1; p->members && i < p->n_threads && p->members[i].started; i++)
        pthread_join(p->members[i].thread, NULL);
    free(p->members);
    free(p);
}

uint32_t td_pool_threads(const td_pool *p)
{
    return p->n_threads;
}

static void hand_out(td_pool *p, uint32_t n_items)
{
    for (uint32_t i = 0; i < p->n_threads; i++) {
        uint64_t first = (uint64_t)n_items * i / p->n_threads,
                 end = (uint64_t)n_items * (i + 1) / p->n_threads;
        atomic_store_explicit(&p->members[i].range, first << 32 | end, memory_order_release);
    }
    atomic_fetch_add(&p->wake, 1);
    if (atomic_load(&p->sleepers))
        futex_wake_all(&p->wake);
}

static void sleep_until(td_pool *p, uint32_t n_items)
{
    atomic_store(&p->caller_sleeps, 1);
    uint32_t done = atomic_load(&p->done);
    if (done < n_items)
        futex_wait(&p->done, done, LOOK_US);
    atomic_store(&p->caller_sleeps, 0);
}

/* The last items run elsewhere. */
static void wait_until(td_pool *p, uint32_t n_items)
{
    uint64_t start = 0;
    look l = {0};
    while (atomic_load_explicit(&p->done, memory_order_acquire) < n_items) {
        uint64_t now = td_now_us();
        start = start ? start : now;
        if (now - start > SPIN_US)
            look_after(p, 0, &l);
        if (now - start > SLEEP_US)
            sleep_until(p, n_items);
        else
            __builtin_ia32_pause();
    }
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
    take_seat(p);
    p->fn = fn;
    p->arg = arg;
    atomic_store_explicit(&p->done, 0, memory_order_relaxed);
    hand_out(p, n_items);
    work(p, 0);
    wait_until(p, n_items);
    atomic_store_explicit(&p->members[0].busy, 0, memory_order_relaxed);
}
