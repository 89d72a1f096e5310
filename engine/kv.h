/* SPDX-License-Identifier: Apache-2.0 */
/* Paged KV pool: blocks of 64 tokens, reference-counted, with a prefix index and LRU eviction of
 * blocks that are indexed and unreferenced. All functions: lane thread only, except td_kv_data(),
 * td_kv_copied(), td_kv_pool_layout() and td_kv_pool_memfd(), which any thread may call. A block
 * handed to the mover (RESERVED or SEALED) keeps the lane's reference until the mover's message
 * gives it back. Test builds (TD_KV_POISON=1 in the environment, or sanitized) fill freed blocks
 * with NaN patterns.
 *
 * The bytes lie in one memfd, or in the memory of a device, where the host does not follow. There a
 * block that the mover reads or writes is staged: it has a place in page-locked memory, which is
 * what td_kv_data() gives. The lane, which alone drives the device, stages blocks, queues their
 * copies (td_kv_export(), td_kv_import()) beside the steps, and passes their mark on; whoever has
 * the mark asks td_kv_copied().
 *
 *   out: lane stage, export -> mark -> mover: copied? send ... -> lane unstage
 *   in:  lane stage -> mover writes, all verified -> lane import: copied? unstage, compute
 *
 * With the pool in host memory all of this succeeds at once and does nothing. */
#ifndef TD_ENGINE_KV_H
#define TD_ENGINE_KV_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "engine/model.h"

typedef struct td_kv_pool td_kv_pool;
typedef uint32_t td_block; /* 0 .. n_blocks-1 */

typedef struct td_kv_stats {
    uint32_t n_blocks, n_free, n_cached,
        n_used; /* free + cached (indexed, unreferenced) + used = n_blocks */
    uint64_t lookups_tokens, hits_tokens, evictions;
} td_kv_stats;

/* layout is copied. Memory is committed on first touch. */
int td_kv_pool_open(const td_kv_layout *layout, uint32_t n_blocks, td_kv_pool **ret_pool,
                    td_err *reterr_err);

/* A device's memory. The queue outlives the pool. */
typedef struct td_kv_place {
    const td_backend *backend; /* its transfer is not NULL */
    td_queue *queue;
    uint32_t n_staging; /* blocks that can be staged at a time; 1 .. n_blocks */
} td_kv_place;

int td_kv_pool_open_at(const td_kv_layout *layout, uint32_t n_blocks, const td_kv_place *place,
                       td_kv_pool **ret_pool, td_err *reterr_err);
void td_kv_pool_free(td_kv_pool *p); /* waits for copies under way */
const td_kv_layout *td_kv_pool_layout(const td_kv_pool *p);
/* Descriptor of the pool's memory, to lend it; negative when it is not in host memory. Borrowed. */
int td_kv_pool_memfd(const td_kv_pool *p);
void td_kv_pool_stats(const td_kv_pool *p, td_kv_stats *ret_stats);

/* A block's bytes (layout.block_bytes of them) for the host. On a device: of a staged block. */
uint8_t *td_kv_data(const td_kv_pool *p, td_block b);
/* Start of the pool for the backend; block b lies at b * block_bytes. */
uint8_t *td_kv_base(const td_kv_pool *p);
uint8_t *td_kv_at(const td_kv_pool *p, td_block b);

/* Blocks that can be staged at a time, and how many more now; host memory: n_blocks, always. */
uint32_t td_kv_staging(const td_kv_pool *p);
uint32_t td_kv_staging_free(const td_kv_pool *p);
/* Stage blocks, each once more. All or nothing: -ENOSPC. */
int td_kv_stage(td_kv_pool *p, const td_block *blocks, uint32_t n);
/* Nobody reads or writes them at td_kv_data() any more, and no import of them is under way. */
void td_kv_unstage(td_kv_pool *p, const td_block *blocks, uint32_t n);
/* Queue copies of staged blocks. Rows that were exported before and are staged still are not copied
 * again: they are final. An imported block is neither read nor freed before it is copied. -EIO: the
 * device failed. */
int td_kv_export(td_kv_pool *p, const td_block *blocks, uint32_t n, uint64_t *ret_mark);
int td_kv_import(td_kv_pool *p, const td_block *blocks, uint32_t n, uint64_t *ret_mark);
int td_kv_copied(const td_kv_pool *p, uint64_t mark);
/* Wait for every copy. -EIO. */
int td_kv_wait(td_kv_pool *p);

/* Take n blocks with one reference each, evicting least recently used cached blocks. All or
 * nothing: -ENOSPC. */
int td_kv_alloc(td_kv_pool *p, uint32_t n, td_block *ret_blocks);
/* Blocks that td_kv_alloc could give now (free + evictable). */
uint32_t td_kv_available(const td_kv_pool *p);
void td_kv_ref(td_kv_pool *p, td_block b);
/* Last reference: an indexed block becomes cached, another one free. */
void td_kv_unref(td_kv_pool *p, td_block b);
uint32_t td_kv_refs(const td_kv_pool *p, td_block b);

/* Make a full, immutable block findable by its prefix hash (base/prefix.h). When the hash is
 * present already, nothing changes: -EEXIST. */
int td_kv_index(td_kv_pool *p, td_block b, const uint8_t hash[16]);
/* Longest run of leading hits for n chained hashes [n][16]; takes a reference on each. Returns the
 * number of blocks. */
uint32_t td_kv_lookup(td_kv_pool *p, const uint8_t *hashes, uint32_t n, td_block *ret_blocks);
/* As lookup, but takes no reference and does not touch the LRU order. */
uint32_t td_kv_peek(const td_kv_pool *p, const uint8_t *hashes, uint32_t n);
/* Forget every indexed block that nobody references (FlushCache). Returns how many. */
uint32_t td_kv_flush(td_kv_pool *p);

#endif
