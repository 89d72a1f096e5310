/* SPDX-License-Identifier: Apache-2.0 */
#include "base/rand.h"

#include <sys/random.h>

#include "base/bug.h"
#include "base/banned.h"

static void round_once(const uint32_t key[2], uint32_t c[4])
{
    uint64_t a = 0xD2511F53ull * c[0], b = 0xCD9E8D57ull * c[2];
    uint32_t out[4] = {(uint32_t)(b >> 32) ^ c[1] ^ key[0], (uint32_t)b,
                       (uint32_t)(a >> 32) ^ c[3] ^ key[1], (uint32_t)a};
    for (int i = 0; i < 4; i++)
        c[i] = out[i];
}

void td_philox(const uint32_t key[2], const uint32_t counter[4], uint32_t out[4])
{
    uint32_t k[2] = {key[0], key[1]};
    for (int i = 0; i < 4; i++)
        out[i] = counter[i];
    for (int round = 0; round < 10; round++) {
        if (round) {
            k[0] += 0x9E3779B9u;
            k[1] += 0xBB67AE85u;
        }
        round_once(k, out);
    }
}

uint64_t td_rand(uint64_t seed, uint32_t position, uint32_t choice, uint32_t purpose)
{
    uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)},
             counter[4] = {position, choice, purpose, 0}, out[4];
    td_philox(key, counter, out);
    return (uint64_t)out[1] << 32 | out[0];
}

uint64_t td_rng_next(td_rng *r)
{
    uint64_t n = r->n++;
    return td_rand(r->seed, (uint32_t)n, (uint32_t)(n >> 32), TD_RAND_TEST);
}

uint64_t td_rng_below(td_rng *r, uint64_t n)
{
    return (uint64_t)(((unsigned __int128)td_rng_next(r) * n) >> 64);
}

void td_random_bytes(void *out, size_t n)
{
    unsigned char *p = out;
    while (n) {
        ssize_t got = getrandom(p, n, 0);
        if (got < 0)
            continue; /* EINTR; nothing else can happen once the pool is up */
        p += got;
        n -= (size_t)got;
    }
}
