/* SPDX-License-Identifier: Apache-2.0 */
/* The CRC32C half of hash.h. SSE4.2's crc32 has a latency of 3 cycles and a throughput of 1: three
 * independent lanes of 1,024 bytes fill the unit, and a table shifts a lane's CRC over the bytes
 * behind it. */
#include <nmmintrin.h>
#include <string.h>

#include "base/hash.h"
#include "base/banned.h"

enum { LANE = 1024 };

/* shift[k][v]: CRC of byte k = v followed by LANE zero bytes; linear, so a CRC's shift is the XOR
 * of four. */
static uint32_t shift_table[4][256];

__attribute__((constructor)) static void build_shift_table(void)
{
    for (int k = 0; k < 4; k++) {
        for (uint32_t v = 0; v < 256; v++) {
            uint64_t c = (uint64_t)v << 8 * k;
            for (int i = 0; i < LANE; i += 8)
                c = _mm_crc32_u64(c, 0);
            shift_table[k][v] = (uint32_t)c;
        }
    }
}

static uint64_t shift(uint64_t c)
{
    return shift_table[0][c & 255] ^ shift_table[1][c >> 8 & 255] ^ shift_table[2][c >> 16 & 255] ^
           shift_table[3][c >> 24 & 255];
}

static inline uint64_t load(const unsigned char *p)
{
    uint64_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* dst NULL: checksum only. Inlined twice, so the test costs nothing. */
static inline __attribute__((always_inline)) uint64_t lanes(uint64_t c, unsigned char *dst,
                                                            const unsigned char *p)
{
    uint64_t a = c, b = 0, d = 0;
    for (int i = 0; i < LANE; i += 8) {
        uint64_t x = load(p + i), y = load(p + LANE + i), z = load(p + 2 * LANE + i);
        a = _mm_crc32_u64(a, x);
        b = _mm_crc32_u64(b, y);
        d = _mm_crc32_u64(d, z);
        if (dst) {
            memcpy(dst + i, &x, 8);
            memcpy(dst + LANE + i, &y, 8);
            memcpy(dst + 2 * LANE + i, &z, 8);
        }
    }
    return shift(shift(a) ^ b) ^ d;
}

/* What is checksummed is what was stored: each byte of src is read once (src may be memory a peer
 * can write). */
static inline __attribute__((always_inline)) uint32_t run(uint32_t crc, unsigned char *dst,
                                                          const unsigned char *p, size_t n)
{
    uint64_t c = ~crc;
    for (; n >= 3 * LANE; n -= 3 * LANE, p += 3 * LANE) {
        c = lanes(c, dst, p);
        if (dst)
            dst += 3 * LANE;
    }
    for (; n >= 8; n -= 8, p += 8) {
        uint64_t x = load(p);
        c = _mm_crc32_u64(c, x);
        if (dst) {
            memcpy(dst, &x, 8);
            dst += 8;
        }
    }
    for (; n; n--, p++) {
        unsigned char x = *(const volatile unsigned char *)p;
        c = _mm_crc32_u8((uint32_t)c, x);
        if (dst)
            *dst++ = x;
    }
    return ~(uint32_t)c;
}

uint32_t td_crc32c(uint32_t crc, const void *bytes, size_t n)
{
    return run(crc, NULL, bytes, n);
}

uint32_t td_crc32c_copy(uint32_t crc, void *dst, const void *src, size_t n)
{
    return run(crc, dst, src, n);
}
