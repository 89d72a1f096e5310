/* SPDX-License-Identifier: Apache-2.0 */
/* Philox4x32-10 (Salmon et al. 2011): counter-based, so a draw is a function of (seed, position,
 * choice, purpose). */
#ifndef TD_BASE_RAND_H
#define TD_BASE_RAND_H

#include <stddef.h>
#include <stdint.h>

enum td_rand_purpose { TD_RAND_SAMPLE = 0, TD_RAND_SIM = 1, TD_RAND_TEST = 2 };

/* One block: key (2 words), counter (4 words) -> 4 words. Matches the Random123 known-answer
 * vectors. */
void td_philox(const uint32_t key[2], const uint32_t counter[4], uint32_t out[4]);

/* 64 random bits: key = seed (low word first), counter = (position, choice, purpose, 0). */
uint64_t td_rand(uint64_t seed, uint32_t position, uint32_t choice, uint32_t purpose);

/* Stream for tests and the simulator: next 64 bits / uniform in [0, n). */
typedef struct td_rng {
    uint64_t seed;
    uint64_t n;
} td_rng;
uint64_t td_rng_next(td_rng *r);
uint64_t td_rng_below(td_rng *r, uint64_t n);

/* Bytes from the kernel (seeds, epochs, ids). Never fails after start-up. */
void td_random_bytes(void *out, size_t n);

#endif
