/* SPDX-License-Identifier: Apache-2.0 */
#include "engine/kv.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/bug.h"
#include "base/memory.h"
#include "base/banned.h"

#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif

enum { HASH_BYTES = 16 };
static const uint32_t NONE = UINT32_MAX;

/* A block is free (on the free stack), used (refs > 0) or cached (refs = 0, indexed, on the LRU
 * list). */
typedef struct block {
    uint32_t refs;
    uint32_t prev, next;   /* LRU list when cached; next links the free stack when free */
    uint32_t chain;        /* next block of the hash bucket */
    uint32_t staged, slot; /* how often; where, NONE when it is not: what the mover reads */
    uint64_t exported;     /* mark; 0: not since it was staged */
    uint8_t indexed;
    uint8_t hash[HASH_BYTES];
} block;

struct td_kv_pool {
    td_kv_layout layout;
    uint32_t n_blocks, n_free, n_cached, n_buckets;
    uint32_t free_head, lru_old, lru_new; /* oldest is evicted first */
    block *blocks;
    uint32_t *buckets;
    uint8_t *base;
    uint64_t map_bytes;
    int fd, poison;
    const td_transfer_ops *transfer; /* NULL: host memory */
    td_kv_place place;
    uint8_t *staging;
    uint32_t *slots; /* [n_staging]; the first n_slots of them are free */
    uint32_t n_slots;
    uint64_t lookups_tokens, hits_tokens, evictions;
};

static int map_pool(td_kv_pool *p, td_err *err)
{
    /* the kernel would map more than there is, and kill somebody when it is used */
    uint64_t limit = td_memory_limit();
    if (p->map_bytes > limit)
        return td_err_set(err, -ENOMEM,
                          "KV pool: %llu MiB, and this process may use %llu MiB in all; lower "
                          "--kv-memory or --kv-blocks",
                          (unsigned long long)(p->map_bytes >> 20),
                          (unsigned long long)(limit >> 20));
    p->fd = memfd_create("tandem-kv", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (p->fd < 0 || ftruncate(p->fd, (off_t)p->map_bytes) < 0)
        return td_err_set(err, -errno, "KV pool: memfd of %llu bytes: %s; lower --kv-memory",
                          (unsigned long long)p->map_bytes, td_errno_text(errno));
    p->base = mmap(NULL, p->map_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, p->fd, 0);
    if (p->base == MAP_FAILED) {
        p->base = NULL;
        return td_err_set(err, -errno, "KV pool: mapping %llu bytes: %s; lower --kv-memory",
                          (unsigned long long)p->map_bytes, td_errno_text(errno));
    }
    /* Readers who get the descriptor can neither resize nor write it. Older kernels lack the last
     * seal. */
    if (fcntl(p->fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE) < 0 &&
        fcntl(p->fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) < 0)
        return td_err_set(err, -errno, "KV pool: sealing: %s", td_errno_text(errno));
    return 0;
}

/* Device memory, and page-locked memory to stage blocks. */
static int place_pool(td_kv_pool *p, td_err *err)
{
    const td_kv_place *d = &p->place;
    p->base = d->backend->mem_alloc(d->queue, p->map_bytes);
    if (!p->base)
        return td_err_set(err, -ENOMEM,
                          "KV pool: the device has no %llu MiB left; lower --kv-memory or "
                          "--kv-blocks",
                          (unsigned long long)(p->map_bytes >> 20));
    uint64_t bytes = p->layout.block_bytes * d->n_staging;
    p->staging = p->transfer->host_alloc(d->queue, bytes);
    p->slots = calloc(d->n_staging, sizeof *p->slots);
    if (!p->staging || !p->slots)
        return td_err_set(err, -ENOMEM,
                          "KV pool: no %llu MiB of page-locked memory; lower --kv-staging",
                          (unsigned long long)(bytes >> 20));
    for (p->n_slots = 0; p->n_slots < d->n_staging; p->n_slots++)
        p->slots[p->n_slots] = d->n_staging - 1 - p->n_slots;
    return 0;
}

/* All bits set is a NaN in every float type: whoever reads a stale row changes its output. */
static void poison(td_kv_pool *p, td_block b)
{
    if (!p->poison)
        return;
    if (p->transfer)
        p->transfer->fill(p->place.queue, td_kv_at(p, b), 0xff, p->layout.block_bytes);
    else
        memset(td_kv_at(p, b), 0xff, p->layout.block_bytes);
}

int td_kv_pool_open(const td_kv_layout *layout, uint32_t n_blocks, td_kv_pool **ret_pool,
                    td_err *reterr_err)
{
    return td_kv_pool_open_at(layout, n_blocks, NULL, ret_pool, reterr_err);
}

int td_kv_pool_open_at(const td_kv_layout *layout, uint32_t n_blocks, const td_kv_place *place,
                       td_kv_pool **ret_pool, td_err *reterr_err)
{
    uint64_t bytes;
    if (n_blocks == 0 || n_blocks == NONE ||
        __builtin_mul_overflow(layout->block_bytes, (uint64_t)n_blocks, &bytes) ||
        bytes > INT64_MAX)
        return td_err_set(reterr_err, -EINVAL, "KV pool: %u blocks of %llu bytes cannot be",
                          n_blocks, (unsigned long long)layout->block_bytes);
    td_kv_pool *p = calloc(1, sizeof *p);
    if (!p)
        return td_err_set(reterr_err, -ENOMEM, "KV pool: out of memory");
    *p = (td_kv_pool){.layout = *layout,
                      .n_blocks = n_blocks,
                      .map_bytes = bytes,
                      .fd = -1,
                      .free_head = NONE,
                      .lru_old = NONE,
                      .lru_new = NONE,
                      .n_buckets = 16};
    if (place) {
        p->place = *place;
        p->transfer = place->backend->transfer;
    }
    const char *env = getenv("TD_KV_POISON");
    p->poison = env && env[0] == '1';
#ifdef TD_SANITIZED
    p->poison = 1;
#endif
    while (p->n_buckets < 2u * n_blocks && p->n_buckets < 1u << 31)
        p->n_buckets *= 2;
    p->blocks = calloc(n_blocks, sizeof *p->blocks);
    p->buckets = malloc(p->n_buckets * sizeof *p->buckets);
    int r = p->blocks && p->buckets ? 0 : td_err_set(reterr_err, -ENOMEM, "KV pool: out of memory");
    if (r == 0)
        r = (p->transfer ? place_pool : map_pool)(p, reterr_err);
    if (r < 0) {
        td_kv_pool_free(p);
        return r;
    }
    memset(p->buckets, 0xff, p->n_buckets * sizeof *p->buckets);
    for (uint32_t b = n_blocks; b-- > 0;) {
        p->blocks[b].slot = NONE;
        p->blocks[b].next = p->free_head;
        p->free_head = b;
        poison(p, b);
    }
    p->n_free = n_blocks;
    *ret_pool = p;
    return 0;
}

void td_kv_pool_free(td_kv_pool *p)
{
    if (!p)
        return;
    if (p->transfer) {
        (void)td_kv_wait(p);
        p->place.backend->mem_free(p->place.queue, p->base);
        if (p->staging)
            p->transfer->host_free(p->place.queue, p->staging);
    } else if (p->base) {
        munmap(p->base, p->map_bytes);
    }
    if (p->fd >= 0)
        close(p->fd);
    free(p->slots);
    free(p->blocks);
    free(p->buckets);
    free(p);
}

const td_kv_layout *td_kv_pool_layout(const td_kv_pool *p)
{
    return &p->layout;
}

int td_kv_pool_memfd(const td_kv_pool *p)
{
    return p->fd;
}

void td_kv_pool_stats(const td_kv_pool *p, td_kv_stats *ret_stats)
{
    *ret_stats = (td_kv_stats){.n_blocks = p->n_blocks,
                               .n_free = p->n_free,
                               .n_cached = p->n_cached,
                               .n_used = p->n_blocks - p->n_free - p->n_cached,
                               .lookups_tokens = p->lookups_tokens,
                               .hits_tokens = p->hits_tokens,
                               .evictions = p->evictions};
}

uint8_t *td_kv_at(const td_kv_pool *p, td_block b)
{
    TD_BUG_ON(b >= p->n_blocks);
    return p->base + (uint64_t)b * p->layout.block_bytes;
}

uint8_t *td_kv_data(const td_kv_pool *p, td_block b)
{
    if (!p->transfer)
        return td_kv_at(p, b);
    TD_BUG_ON(b >= p->n_blocks || p->blocks[b].slot == NONE);
    return p->staging + (uint64_t)p->blocks[b].slot * p->layout.block_bytes;
}

uint8_t *td_kv_base(const td_kv_pool *p)
{
    return p->base;
}

static uint32_t *bucket(const td_kv_pool *p, const uint8_t *hash)
{
    uint32_t h;
    memcpy(&h, hash, sizeof h);
    return &p->buckets[h & (p->n_buckets - 1)];
}

static uint32_t find(const td_kv_pool *p, const uint8_t *hash)
{
    uint32_t b = *bucket(p, hash);
    while (b != NONE && memcmp(p->blocks[b].hash, hash, HASH_BYTES) != 0)
        b = p->blocks[b].chain;
    return b;
}

static void unindex(td_kv_pool *p, td_block b)
{
    uint32_t *at = bucket(p, p->blocks[b].hash);
    while (*at != b)
        at = &p->blocks[*at].chain;
    *at = p->blocks[b].chain;
    p->blocks[b].indexed = 0;
}

static void lru_add(td_kv_pool *p, td_block b)
{
    p->blocks[b].prev = p->lru_new;
    p->blocks[b].next = NONE;
    if (p->lru_new != NONE)
        p->blocks[p->lru_new].next = b;
    else
        p->lru_old = b;
    p->lru_new = b;
    p->n_cached++;
}

static void lru_del(td_kv_pool *p, td_block b)
{
    block *k = &p->blocks[b];
    *(k->prev != NONE ? &p->blocks[k->prev].next : &p->lru_old) = k->next;
    *(k->next != NONE ? &p->blocks[k->next].prev : &p->lru_new) = k->prev;
    p->n_cached--;
}

static void push_free(td_kv_pool *p, td_block b)
{
    poison(p, b);
    p->blocks[b].next = p->free_head;
    p->free_head = b;
    p->n_free++;
}

static void evict(td_kv_pool *p, td_block b)
{
    lru_del(p, b);
    unindex(p, b);
    push_free(p, b);
}

int td_kv_alloc(td_kv_pool *p, uint32_t n, td_block *ret_blocks)
{
    if (n > td_kv_available(p))
        return -ENOSPC;
    for (uint32_t i = 0; i < n; i++) {
        if (p->n_free == 0) {
            evict(p, p->lru_old);
            p->evictions++;
        }
        td_block b = p->free_head;
        p->free_head = p->blocks[b].next;
        p->n_free--;
        p->blocks[b].refs = 1;
        ret_blocks[i] = b;
    }
    return 0;
}

uint32_t td_kv_available(const td_kv_pool *p)
{
    return p->n_free + p->n_cached;
}

void td_kv_ref(td_kv_pool *p, td_block b)
{
    TD_BUG_ON(b >= p->n_blocks || p->blocks[b].refs == 0);
    p->blocks[b].refs++;
}

void td_kv_unref(td_kv_pool *p, td_block b)
{
    TD_BUG_ON(b >= p->n_blocks || p->blocks[b].refs == 0);
    if (--p->blocks[b].refs)
        return;
    if (p->blocks[b].indexed)
        lru_add(p, b);
    else
        push_free(p, b);
}

uint32_t td_kv_refs(const td_kv_pool *p, td_block b)
{
    TD_BUG_ON(b >= p->n_blocks);
    return p->blocks[b].refs;
}

int td_kv_index(td_kv_pool *p, td_block b, const uint8_t hash[16])
{
    block *k = &p->blocks[b];
    TD_BUG_ON(b >= p->n_blocks || k->refs == 0);
    if (k->indexed || find(p, hash) != NONE)
        return -EEXIST;
    memcpy(k->hash, hash, HASH_BYTES);
    k->indexed = 1;
    uint32_t *head = bucket(p, hash);
    k->chain = *head;
    *head = b;
    return 0;
}

uint32_t td_kv_peek(const td_kv_pool *p, const uint8_t *hashes, uint32_t n)
{
    uint32_t i = 0;
    while (i < n && find(p, hashes + (size_t)i * HASH_BYTES) != NONE)
        i++;
    return i;
}

uint32_t td_kv_lookup(td_kv_pool *p, const uint8_t *hashes, uint32_t n, td_block *ret_blocks)
{
    uint32_t i = 0;
    for (; i < n; i++) {
        uint32_t b = find(p, hashes + (size_t)i * HASH_BYTES);
        if (b == NONE)
            break;
        if (p->blocks[b].refs++ == 0)
            lru_del(p, b);
        ret_blocks[i] = b;
    }
    p->lookups_tokens += 64ull * n;
    p->hits_tokens += 64ull * i;
    return i;
}

uint32_t td_kv_flush(td_kv_pool *p)
{
    uint32_t n = 0;
    while (p->lru_old != NONE) {
        evict(p, p->lru_old);
        n++;
    }
    return n;
}

/* ---- staging ---- */

uint32_t td_kv_staging(const td_kv_pool *p)
{
    return p->transfer ? p->place.n_staging : p->n_blocks;
}

uint32_t td_kv_staging_free(const td_kv_pool *p)
{
    return p->transfer ? p->n_slots : p->n_blocks;
}

int td_kv_stage(td_kv_pool *p, const td_block *blocks, uint32_t n)
{
    uint32_t fresh = 0;
    if (!p->transfer)
        return 0;
    for (uint32_t i = 0; i < n; i++)
        fresh += p->blocks[blocks[i]].staged == 0; /* a block is in the list once */
    if (fresh > p->n_slots)
        return -ENOSPC;
    for (uint32_t i = 0; i < n; i++) {
        block *k = &p->blocks[blocks[i]];
        TD_BUG_ON(k->refs == 0);
        if (k->staged++)
            continue;
        k->slot = p->slots[--p->n_slots];
        k->exported = 0;
    }
    return 0;
}

void td_kv_unstage(td_kv_pool *p, const td_block *blocks, uint32_t n)
{
    for (uint32_t i = 0; p->transfer && i < n; i++) {
        block *k = &p->blocks[blocks[i]];
        TD_BUG_ON(k->staged == 0);
        if (--k->staged)
            continue;
        p->slots[p->n_slots++] = k->slot;
        k->slot = NONE;
    }
}

int td_kv_export(td_kv_pool *p, const td_block *blocks, uint32_t n, uint64_t *ret_mark)
{
    const td_kv_place *d = &p->place;
    uint32_t copies = 0;
    *ret_mark = 0;
    for (uint32_t i = 0; p->transfer && i < n; i++) {
        const block *k = &p->blocks[blocks[i]];
        if (k->exported) {
            *ret_mark = k->exported > *ret_mark ? k->exported : *ret_mark;
            continue;
        }
        if (p->transfer->out(d->queue, td_kv_data(p, blocks[i]), td_kv_at(p, blocks[i]),
                             p->layout.block_bytes) < 0)
            return -EIO;
        copies++;
    }
    if (copies == 0)
        return 0;
    *ret_mark = p->transfer->mark(d->queue);
    for (uint32_t i = 0; *ret_mark && i < n; i++)
        if (!p->blocks[blocks[i]].exported)
            p->blocks[blocks[i]].exported = *ret_mark;
    return *ret_mark ? 0 : -EIO;
}

int td_kv_import(td_kv_pool *p, const td_block *blocks, uint32_t n, uint64_t *ret_mark)
{
    const td_kv_place *d = &p->place;
    *ret_mark = 0;
    if (!p->transfer || n == 0)
        return 0;
    for (uint32_t i = 0; i < n; i++)
        if (p->transfer->in(d->queue, td_kv_at(p, blocks[i]), td_kv_data(p, blocks[i]),
                            p->layout.block_bytes) < 0)
            return -EIO;
    *ret_mark = p->transfer->mark(d->queue);
    return *ret_mark ? 0 : -EIO;
}

int td_kv_copied(const td_kv_pool *p, uint64_t mark)
{
    return mark == 0 || p->transfer->copied(p->place.queue, mark);
}

int td_kv_wait(td_kv_pool *p)
{
    return p->transfer ? p->transfer->wait(p->place.queue) : 0;
}
