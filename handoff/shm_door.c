/* SPDX-License-Identifier: Apache-2.0 */
#include "handoff/shm_door.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "base/arena.h"
#include "base/bug.h"
#include "base/rand.h"
#include "base/secret.h"
#include "handoff/wire.h"
#include "rpc/frame.h"
#include "base/banned.h"

enum { SPEAK_US = 2000000, WORD_BYTES = 4096 };

struct td_shm_pool {
    uint8_t prefill_epoch[16];
    uint64_t number, bytes;
    const uint8_t *base;          /* NULL: not yet taken */
    const _Atomic uint32_t *word; /* 1: withdrawn */
};

typedef struct guest {
    int fd; /* -1: free */
    uint64_t since_us;
    td_shm_pool pool;
} guest;

struct td_shm_door {
    td_shm_door_config c;
    td_shm_offer offer;
    int fd;
    guest guests[TD_SHM_POOLS_MAX];
    td_shm_door_stats stats;
};

static const char *const refusal_names[TD_SHM_REFUSALS] = {
    [TD_SHM_TAKEN] = "none",        [TD_SHM_BAD_UID] = "uid",     [TD_SHM_FULL] = "full",
    [TD_SHM_BAD_FORMAT] = "format", [TD_SHM_BAD_NONCE] = "nonce", [TD_SHM_BAD_EPOCH] = "epoch",
    [TD_SHM_BAD_LAYOUT] = "layout", [TD_SHM_BAD_FDS] = "fds",     [TD_SHM_BAD_SEALS] = "seals",
    [TD_SHM_BAD_SIZE] = "size",     [TD_SHM_DOUBLE] = "double",   [TD_SHM_NO_MEMORY] = "memory",
    [TD_SHM_TIMEOUT] = "timeout",
};

const char *td_shm_refusal_name(td_shm_refusal r)
{
    return (unsigned)r < TD_SHM_REFUSALS ? refusal_names[r] : "?";
}

int td_shm_door_open(const td_shm_door_config *config, td_shm_door **ret_door, td_err *reterr_err)
{
    td_shm_door *d = calloc(1, sizeof *d);
    if (!d)
        return td_err_set(reterr_err, -ENOMEM, "shared memory: out of memory");
    d->c = *config;
    d->c.kv_endpoint = NULL;
    for (int i = 0; i < TD_SHM_POOLS_MAX; i++)
        d->guests[i].fd = -1;
    td_random_bytes(d->offer.nonce, sizeof d->offer.nonce);
    int r = td_shm_path(config->kv_endpoint, d->offer.nonce, d->offer.path, reterr_err);
    if (r == 0) {
        r = d->fd = td_shm_listen(d->offer.path);
        if (r < 0)
            td_err_set(reterr_err, r, "%s: cannot listen for shared memory: %s", d->offer.path,
                       td_errno_text(-r));
    }
    if (r < 0) {
        free(d);
        return r;
    }
    *ret_door = d;
    return 0;
}

const td_shm_offer *td_shm_door_offer(const td_shm_door *d)
{
    return &d->offer;
}

const td_shm_door_stats *td_shm_door_get_stats(const td_shm_door *d)
{
    return &d->stats;
}

/* ---- guests ---- */

static void guest_end(td_shm_door *d, guest *g)
{
    td_shm_pool *p = &g->pool;
    if (p->base) {
        munmap((void *)(uintptr_t)p->base, p->bytes);
        munmap((void *)(uintptr_t)p->word, WORD_BYTES);
        atomic_fetch_sub_explicit(&d->stats.pools, 1, memory_order_relaxed);
    }
    close(g->fd);
    *g = (guest){.fd = -1};
}

static void refuse(td_shm_door *d, guest *g, td_shm_refusal why)
{
    atomic_fetch_add_explicit(&d->stats.refused[why], 1, memory_order_relaxed);
    guest_end(d, g);
}

static void answer(int fd, uint32_t code, const char *reason)
{
    uint8_t out[TD_PREAMBLE_BYTES + TD_POOL_BODY_MAX];
    td_wire_pool_ack a = {.code = code};
    td_preamble p = {.major = TD_WIRE_MAJOR, .minor = TD_WIRE_MINOR, .type = TD_FRAME_KV_POOL_ACK};
    memcpy(a.reason, reason, TD_MIN(strlen(reason), sizeof a.reason - 1));
    td_preamble_pack(&p, out);
    int n = td_wire_pack_pool_ack(&a, out + TD_PREAMBLE_BYTES, TD_POOL_BODY_MAX);
    TD_BUG_ON(n < 0);
    /* a peer that does not hear it sees the connection end, or its own timeout */
    (void)td_shm_send(fd, out, TD_PREAMBLE_BYTES + (size_t)n, NULL, 0);
}

/* A file that cannot shrink, and whose pages do not come from a reserve that may be empty: reading
 * a mapping of it never ends in SIGBUS. */
static td_shm_refusal check_file(int fd, uint64_t bytes)
{
    struct stat st;
    struct statfs fs;
    int seals = fcntl(fd, F_GET_SEALS);
    if (seals < 0 || (seals & (F_SEAL_SHRINK | F_SEAL_GROW)) != (F_SEAL_SHRINK | F_SEAL_GROW))
        return TD_SHM_BAD_SEALS;
    if (fstatfs(fd, &fs) < 0 || fs.f_type != TMPFS_MAGIC)
        return TD_SHM_BAD_SEALS;
    if (fstat(fd, &st) < 0 || !S_ISREG(st.st_mode) || (uint64_t)st.st_size != bytes)
        return TD_SHM_BAD_SIZE;
    return TD_SHM_TAKEN;
}

static td_shm_refusal map_pool(td_shm_pool *p, const td_wire_pool *w, const int fds[2])
{
    td_shm_refusal why = w->bytes ? check_file(fds[0], w->bytes) : TD_SHM_BAD_SIZE;
    if (!why)
        why = check_file(fds[1], WORD_BYTES);
    if (why)
        return why;
    void *base = mmap(NULL, w->bytes, PROT_READ, MAP_SHARED, fds[0], 0);
    if (base == MAP_FAILED)
        return TD_SHM_NO_MEMORY;
    void *word = mmap(NULL, WORD_BYTES, PROT_READ, MAP_SHARED, fds[1], 0);
    if (word == MAP_FAILED) {
        munmap(base, w->bytes);
        return TD_SHM_NO_MEMORY;
    }
    memcpy(p->prefill_epoch, w->prefill_epoch, 16);
    p->number = w->pool;
    p->bytes = w->bytes;
    p->base = base;
    p->word = word;
    return TD_SHM_TAKEN;
}

static td_shm_refusal read_packet(const uint8_t *packet, size_t n, td_wire_pool *ret_pool)
{
    td_preamble pre;
    td_arena a;
    if (n < TD_PREAMBLE_BYTES || td_preamble_unpack(packet, TD_PREAMBLE_BYTES, &pre) < 0 ||
        pre.type != TD_FRAME_KV_POOL)
        return TD_SHM_BAD_FORMAT;
    td_arena_init(&a, 16 << 10);
    int r = td_wire_unpack_pool(packet + TD_PREAMBLE_BYTES, n - TD_PREAMBLE_BYTES, &a, ret_pool);
    td_arena_done(&a);
    return r < 0 ? TD_SHM_BAD_FORMAT : TD_SHM_TAKEN;
}

static td_shm_refusal take(td_shm_door *d, guest *g, const uint8_t *packet, size_t n,
                           const int *fds, unsigned n_fds)
{
    td_wire_pool w;
    td_shm_refusal why = read_packet(packet, n, &w);
    if (why)
        return why;
    if (!td_secret_equal(w.nonce, d->offer.nonce, sizeof w.nonce))
        return TD_SHM_BAD_NONCE;
    if (memcmp(w.decode_epoch, d->c.epoch, 16) != 0)
        return TD_SHM_BAD_EPOCH;
    if (memcmp(w.layout_hash, d->c.layout_hash, 16) != 0)
        return TD_SHM_BAD_LAYOUT;
    if (n_fds != 2)
        return TD_SHM_BAD_FDS;
    if (td_shm_door_find(d, w.prefill_epoch, w.pool))
        return TD_SHM_DOUBLE;
    return map_pool(&g->pool, &w, fds);
}

/* Its first and only packet, or its end. */
static void hear(td_shm_door *d, guest *g)
{
    uint8_t packet[TD_SHM_PACKET_MAX];
    int fds[2];
    unsigned n_fds;
    int n = td_shm_recv(g->fd, packet, sizeof packet, fds, &n_fds);
    if (n == -EAGAIN || n == -EINTR)
        return;
    td_shm_refusal why = TD_SHM_BAD_FORMAT;
    if (n > 0 && !g->pool.base)
        why = take(d, g, packet, (size_t)n, fds, n_fds);
    for (unsigned i = 0; i < n_fds; i++)
        close(fds[i]); /* a mapping needs no descriptor */
    if (n > 0 && why == TD_SHM_TAKEN) {
        atomic_fetch_add_explicit(&d->stats.taken, 1, memory_order_relaxed);
        atomic_fetch_add_explicit(&d->stats.pools, 1, memory_order_relaxed);
        answer(g->fd, TD_OK, "");
    } else if (n > 0 || n == -EPROTO) {
        answer(g->fd, TD_FAILED_PRECONDITION, td_shm_refusal_name(why));
        refuse(d, g, why);
    } else {
        guest_end(d, g);
    }
}

static void let_in(td_shm_door *d, uint64_t now_us)
{
    for (;;) {
        uid_t uid;
        int fd = accept4(d->fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
        if (fd < 0)
            return; /* -EAGAIN, or out of descriptors: it waits in the backlog */
        guest *g = d->guests, *end = g + TD_SHM_POOLS_MAX, turned_away = {.fd = fd};
        if (td_shm_peer_uid(fd, &uid) < 0 || uid != d->c.uid) {
            refuse(d, &turned_away, TD_SHM_BAD_UID);
            continue;
        }
        while (g < end && g->fd >= 0)
            g++;
        if (g == end)
            refuse(d, &turned_away, TD_SHM_FULL);
        else
            *g = (guest){.fd = fd, .since_us = now_us};
    }
}

void td_shm_door_run(td_shm_door *d, uint64_t now_us)
{
    struct pollfd polls[TD_SHM_POOLS_MAX + 1];
    for (int i = 0; i < TD_SHM_POOLS_MAX; i++)
        polls[i] = (struct pollfd){.fd = d->guests[i].fd, .events = POLLIN};
    polls[TD_SHM_POOLS_MAX] = (struct pollfd){.fd = d->fd, .events = POLLIN};
    if (poll(polls, TD_SHM_POOLS_MAX + 1, 0) < 0)
        return;
    for (int i = 0; i < TD_SHM_POOLS_MAX; i++) {
        guest *g = &d->guests[i];
        if (polls[i].revents)
            hear(d, g);
        if (g->fd >= 0 && !g->pool.base && now_us >= g->since_us + SPEAK_US)
            refuse(d, g, TD_SHM_TIMEOUT);
    }
    if (polls[TD_SHM_POOLS_MAX].revents)
        let_in(d, now_us);
}

uint32_t td_shm_door_polls(const td_shm_door *d, td_bulk_poll *polls, uint32_t cap)
{
    uint32_t n = 0;
    if (n < cap)
        polls[n++] = (td_bulk_poll){.fd = d->fd, .want = TD_BULK_READ};
    for (int i = 0; i < TD_SHM_POOLS_MAX && n < cap; i++) {
        if (d->guests[i].fd >= 0)
            polls[n++] = (td_bulk_poll){.fd = d->guests[i].fd, .want = TD_BULK_READ};
    }
    return n;
}

uint64_t td_shm_door_due(const td_shm_door *d)
{
    uint64_t due = UINT64_MAX;
    for (int i = 0; i < TD_SHM_POOLS_MAX; i++) {
        const guest *g = &d->guests[i];
        if (g->fd >= 0 && !g->pool.base)
            due = TD_MIN(due, g->since_us + SPEAK_US);
    }
    return due;
}

void td_shm_door_close(td_shm_door *d)
{
    if (!d)
        return;
    for (int i = 0; i < TD_SHM_POOLS_MAX; i++) {
        if (d->guests[i].fd >= 0)
            guest_end(d, &d->guests[i]);
    }
    close(d->fd);
    if (d->offer.path[0] == '/')
        (void)unlink(d->offer.path);
    free(d);
}

/* ---- reading ---- */

const td_shm_pool *td_shm_door_find(const td_shm_door *d, const uint8_t prefill_epoch[16],
                                    uint64_t pool)
{
    for (int i = 0; i < TD_SHM_POOLS_MAX; i++) {
        const td_shm_pool *p = &d->guests[i].pool;
        if (p->base && p->number == pool && memcmp(p->prefill_epoch, prefill_epoch, 16) == 0)
            return p;
    }
    return NULL;
}

const uint8_t *td_shm_pool_range(const td_shm_pool *p, uint64_t offset, uint64_t bytes)
{
    return offset <= p->bytes && bytes <= p->bytes - offset ? p->base + offset : NULL;
}

int td_shm_pool_is_withdrawn(const td_shm_pool *p)
{
    /* pairs with the fence of td_shm_line_withdraw(): if a byte of the copy was written after the
     * word, the word is seen */
    atomic_thread_fence(memory_order_acquire);
    return atomic_load_explicit((_Atomic uint32_t *)(uintptr_t)p->word, memory_order_acquire) != 0;
}
