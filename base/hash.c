/* SPDX-License-Identifier: Apache-2.0 */
#include "base/hash.h"

#include <errno.h>
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

/* Chooses the compression function for this CPU; once, because it takes a lock. */
__attribute__((constructor)) static void start(void)
{
    TD_BUG_ON(sodium_init() < 0);
}

void td_hash_init(td_hash *h, const void *key, size_t key_bytes, size_t out_bytes)
{
    TD_BUG_ON(out_bytes != 16 && out_bytes != 32);
    TD_BUG_ON(key_bytes != 0 && (key_bytes < 16 || key_bytes > 64));
    h->out_bytes = out_bytes;
    TD_BUG_ON(crypto_generichash_blake2b_init(state(h), key, key_bytes, out_bytes) != 0);
}

void td_hash_add(td_hash *h, const void *bytes, size_t n)
{
    if (n)
        crypto_generichash_blake2b_update(state(h), bytes, n);
}

void td_hash_add_field(td_hash *h, const void *bytes, size_t n)
{
    TD_BUG_ON(n > UINT32_MAX);
    uint32_t len = (uint32_t)n; /* x86-64 is little-endian */
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

static int digit(char c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    c |= 32;
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

int td_unhex(const char *hex, void *out, size_t n)
{
    unsigned char *p = out;
    for (size_t i = 0; i < n; i++, hex += 2) {
        int hi = digit(hex[0]), lo = hi < 0 ? -1 : digit(hex[1]);
        if (lo < 0)
            return -EINVAL;
        p[i] = (unsigned char)(hi << 4 | lo);
    }
    return *hex ? -EINVAL : 0;
}
