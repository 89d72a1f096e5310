/* SPDX-License-Identifier: Apache-2.0 */
#include "base/prefix.h"

#include "base/hash.h"
#include "base/banned.h"

void td_prefix_key(const void *secret, size_t secret_bytes, const char *tenant, size_t tenant_len,
                   const char *salt, size_t salt_len, uint8_t ret_key[TD_PREFIX_KEY_BYTES])
{
    td_hash h;
    uint8_t key[32];
    if (secret_bytes > 64) { /* BLAKE2b takes keys of at most 64 bytes */
        td_hash_init(&h, NULL, 0, 32);
        td_hash_add(&h, secret, secret_bytes);
        td_hash_final(&h, key);
        secret = key;
        secret_bytes = sizeof key;
    }
    td_hash_init(&h, secret, secret_bytes, TD_PREFIX_KEY_BYTES);
    td_hash_add_field(&h, tenant, tenant_len);
    td_hash_add_field(&h, salt, salt_len);
    td_hash_final(&h, ret_key);
}

void td_prefix_next(const uint8_t key[TD_PREFIX_KEY_BYTES],
                    const uint8_t prev[TD_PREFIX_HASH_BYTES], const uint32_t *ids,
                    uint8_t ret_hash[TD_PREFIX_HASH_BYTES])
{
    static const uint8_t first[TD_PREFIX_HASH_BYTES];
    td_hash h;
    td_hash_init(&h, key, TD_PREFIX_KEY_BYTES, TD_PREFIX_HASH_BYTES);
    td_hash_add(&h, prev ? prev : first, TD_PREFIX_HASH_BYTES);
    td_hash_add(&h, ids, TD_BLOCK_TOKENS * sizeof *ids);
    td_hash_final(&h, ret_hash);
}

size_t td_prefix_chain(const uint8_t key[TD_PREFIX_KEY_BYTES], const uint32_t *ids, size_t n,
                       uint8_t *out)
{
    size_t blocks = n / TD_BLOCK_TOKENS;
    for (size_t i = 0; i < blocks; i++)
        td_prefix_next(key, i ? out + (i - 1) * TD_PREFIX_HASH_BYTES : NULL,
                       ids + i * TD_BLOCK_TOKENS, out + i * TD_PREFIX_HASH_BYTES);
    return blocks;
}
