/* SPDX-License-Identifier: Apache-2.0 */
/* BLAKE2b (libsodium), XXH3-128 (xxhash), CRC32C (SSE4.2), hex. */
#ifndef TD_BASE_HASH_H
#define TD_BASE_HASH_H

#include <stddef.h>
#include <stdint.h>

typedef struct td_hash {
    _Alignas(64) unsigned char state[384]; /* crypto_generichash_blake2b_state */
    size_t out_bytes;
} td_hash;

/* out_bytes 16 or 32; key may be NULL (key_bytes 0), else 16..64 bytes. */
void td_hash_init(td_hash *h, const void *key, size_t key_bytes, size_t out_bytes);
void td_hash_add(td_hash *h, const void *bytes, size_t n);
/* u32 little-endian length, then the bytes: unambiguous concatenation. */
void td_hash_add_field(td_hash *h, const void *bytes, size_t n);
void td_hash_final(td_hash *h, void *out);

/* XXH3 128-bit, canonical (big-endian) bytes. */
void td_xxh128(const void *bytes, size_t n, uint8_t out[16]);

/* CRC32C (Castagnoli); start with crc = 0; chains: crc(a‖b) = td_crc32c(td_crc32c(0, a), b). */
uint32_t td_crc32c(uint32_t crc, const void *bytes, size_t n);
/* Copy and checksum in one pass; regions do not overlap. */
uint32_t td_crc32c_copy(uint32_t crc, void *dst, const void *src, size_t n);

/* Lower-case hex; out has 2n+1 bytes. Returns out. */
char *td_hex(const void *bytes, size_t n, char *out);
/* Exactly 2n hex digits of either case to n bytes. 0, or -EINVAL (out is then unspecified). */
int td_unhex(const char *hex, void *out, size_t n);

#endif
