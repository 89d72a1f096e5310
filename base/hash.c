/* SPDX-License-Identifier: Apache-2.0 */
#include "base/hash.h"

#include <nmmintrin.h>
#include <sodium.h>
#include <string.h>
#include <xxhash.h>

#include "base/bug.h"
#include "base/banned.h"

TD_STATIC_ASSERT(sizeof(crypto_generichash_blake2b_state) <= sizeof(((td_hash *)0)->state));

static crypto_generichash_blake2b_state *state(td_hash *h)
{
    return (crypto_generichash_blake2b_state *)(void *)h->state;
}

void td_hash_init(td_hash *h, const void *key, size_t key_bytes, size_t out_bytes)
{
    TD_BUG_ON(sodium_init() < 0);
    h->out_bytes = out_bytes;
    TD_BUG_ON(crypto_generichash_blake2b_init(state(h), key, key_bytes, out_bytes) != 0);
}

void td_hash_add(td_hash *h, const void *bytes, size_t n)
{
    crypto_generichash_blake2b_update(state(h), bytes, n);
}

void td_hash_add_field(td_hash *h, const void *bytes, size_t n)
{
    uint32_t len = (uint32_t)n;
    td_hash_add(h, &len, sizeof len);
    td_hash_add(h, bytes, n);
}

void td_hash_final(td_hash *h, void *out)
{
    crypto_generichash_blake2b_final(state(h), out, h->out_bytes);
}

void td_xxh128(const void *bytes, size_t n, uint8_t out[16])
{
    XXH128_canonical_t c;
    XXH128_canonicalFromHash(&c, XXH3_128bits(bytes, n));
    memcpy(out, c.digest, 16);
}

uint32_t td_crc32c(uint32_t crc, const void *bytes, size_t n)
{
    const uint8_t *p = bytes;
    uint64_t c = ~crc;
    for (; n >= 8; n -= 8, p += 8) {
        uint64_t v;
        memcpy(&v, p, 8);
        c = _mm_crc32_u64(c, v);
    }
    uint32_t c32 = (uint32_t)c;
    for (; n; n--, p++)
        c32 = _mm_crc32_u8(c32, *p);
    return ~c32;
}

uint32_t td_crc32c_copy(uint32_t crc, void *dst, const void *src, size_t n)
{
    const uint8_t *p = src;
    uint8_t *q = dst;
    uint64_t c = ~crc;
    for (; n >= 8; n -= 8, p += 8, q += 8) {
        uint64_t v;
        memcpy(&v, p, 8);
        memcpy(q, &v, 8);
        c = _mm_crc32_u64(c, v);
    }
    uint32_t c32 = (uint32_t)c;
    for (; n; n--, p++, q++) {
        *q = *p;
        c32 = _mm_crc32_u8(c32, *q);
    }
    return ~c32;
}

char *td_hex(const void *bytes, size_t n, char *out)
{
    static const char digits[] = "0123456789abcdef";
    const uint8_t *p = bytes;
    for (size_t i = 0; i < n; i++) {
        out[2 * i] = digits[p[i] >> 4];
        out[2 * i + 1] = digits[p[i] & 15];
    }
    out[2 * n] = 0;
    return out;
}
