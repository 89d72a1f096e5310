/* SPDX-License-Identifier: Apache-2.0 */
/* Byte pair merging by heap: O(n log n) for a piece of n bytes, whatever it holds.
 * The order is that of the Python package `tokenizers`: lowest rank first, then leftmost. */
#ifndef TD_TEXT_BPE_H
#define TD_TEXT_BPE_H

#include <stddef.h>
#include <stdint.h>

#include "text/tokenizer.h"

/* One merge: the pair left, right becomes id; rank, from 1, orders them. rank 0: an empty slot. */
typedef struct td_merge {
    uint32_t left, right, rank, id;
} td_merge;

typedef struct td_merges {
    td_merge *slots; /* open addressing */
    size_t mask;     /* slots - 1 */
} td_merges;

/* Build from a list in rank order (no rank 0); a repeated pair takes its last rank. 0, -ENOMEM. */
int td_merges_init(td_merges *m, const td_merge *list, size_t n);
void td_merges_done(td_merges *m);
const td_merge *td_merges_get(const td_merges *m, uint32_t left, uint32_t right);

/* Scratch of one thread, kept between pieces. n_ops counts heap steps: what a test of the
 * complexity looks at. */
typedef struct td_bpe_work {
    struct td_bpe_symbol *symbols;
    struct td_bpe_entry *heap;
    size_t cap, n_heap;
    uint64_t n_ops;
} td_bpe_work;

void td_bpe_work_done(td_bpe_work *w);
/* Merge the n bytes of a piece, byte i standing for token byte_id[b], and append the ids. 0,
 * -ENOMEM. */
int td_bpe_encode(const td_merges *m, const uint32_t byte_id[256], const char *piece, size_t n,
                  td_bpe_work *w, td_ids *out);

#endif
