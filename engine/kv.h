/* SPDX-License-Identifier: Apache-2.0 */
/* Paged KV pool: blocks of 64 tokens in one memfd, reference-counted, with a prefix index and LRU
 * eviction of blocks that are indexed and unreferenced. All functions: lane thread only, except
 * td_kv_data(), td_kv_pool_layout() and td_kv_pool_memfd(), which any thread may call. A block
 * handed to the mover (RESERVED or SEALED) keeps the lane's reference until the mover's message
 * gives it back. Test builds (TD_KV_POISON=1 in the environment, or sanitized) fill freed blocks
 * with NaN patterns. */
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
void td_kv_pool_free(td_kv_pool *p);
const td_kv_layout *td_kv_pool_layout(const td_kv_pool *p);
/* Descriptor of the pool's memory, to lend it; negative when it is not in host memory. Borrowed. */
int td_kv_pool_memfd(const td_kv_pool *p);
void td_kv_pool_stats(const td_kv_pool *p, td_kv_stats *ret_stats);

/* Start of a block's bytes (layout.block_bytes of them). */
uint8_t *td_kv_data(const td_kv_pool *p, td_block b);
/* Start of the pool's mapping; block b lies at b * block_bytes. */
uint8_t *td_kv_base(const td_kv_pool *p);

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
