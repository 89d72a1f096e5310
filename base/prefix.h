/* SPDX-License-Identifier: Apache-2.0 */
/* Prefix identity (architecture, section 3): one function for routers and workers.
 * prefix_key = BLAKE2b-256(secret; u32 length ‖ tenant ‖ u32 length ‖ cache_salt)
 * h_0 = 16 zero bytes; h_i = BLAKE2b-128(prefix_key; h_{i-1} ‖ 64 ids as u32 little-endian) */
#ifndef TD_BASE_PREFIX_H
#define TD_BASE_PREFIX_H

#include <stddef.h>
#include <stdint.h>

enum { TD_BLOCK_TOKENS = 64, TD_PREFIX_KEY_BYTES = 32, TD_PREFIX_HASH_BYTES = 16 };

void td_prefix_key(const void *secret, size_t secret_bytes, const char *tenant, size_t tenant_len,
                   const char *salt, size_t salt_len, uint8_t ret_key[TD_PREFIX_KEY_BYTES]);

/* Hash of the block behind prev; ids has TD_BLOCK_TOKENS entries. prev may be NULL for the first
 * block. */
void td_prefix_next(const uint8_t key[TD_PREFIX_KEY_BYTES],
                    const uint8_t prev[TD_PREFIX_HASH_BYTES], const uint32_t *ids,
                    uint8_t ret_hash[TD_PREFIX_HASH_BYTES]);

/* Hashes of all whole blocks of n ids; out has n / 64 rows of 16 bytes. Returns the count. */
size_t td_prefix_chain(const uint8_t key[TD_PREFIX_KEY_BYTES], const uint32_t *ids, size_t n,
                       uint8_t *out);

#endif
