/* SPDX-License-Identifier: Apache-2.0 */
#include "decode-worker/batch.h"

#include "base/bug.h"
#include "base/prefix.h"
#include "base/banned.h"

/* Tokens whose rows can come to lie in blocks: the last emitted token is never computed. */
static uint64_t most_rows(const td_decode_policy *p, const td_decode_need *need)
{
    uint64_t rows = (uint64_t)need->n_prompt + need->max_tokens - 1;
    return TD_MIN(rows, (uint64_t)p->max_context);
}

uint64_t td_decode_blocks(const td_decode_policy *p, const td_decode_need *needs, uint32_t n,
                          int share, uint32_t held)
{
    uint64_t total = 0;
    for (uint32_t i = 0; i < n; i++) {
        uint64_t blocks = (most_rows(p, &needs[i]) + TD_BLOCK_TOKENS - 1) / TD_BLOCK_TOKENS;
        uint64_t shared = i > 0 && share ? needs[i].n_prompt / TD_BLOCK_TOKENS : held;
        total += blocks > shared ? blocks - shared : 0;
    }
    return total;
}

td_decode_verdict td_decode_admit(const td_decode_policy *p, const td_decode_need *needs,
                                  uint32_t n, uint64_t blocks, uint64_t blocks_all,
                                  uint64_t blocks_free, uint32_t n_admitted)
{
    if (n > p->max_admitted || blocks_all > p->n_blocks)
        return TD_DECODE_TOO_BIG;
    for (uint32_t i = 0; i < n; i++) {
        if ((uint64_t)needs[i].n_prompt + needs[i].max_tokens > p->max_context)
            return TD_DECODE_TOO_BIG;
    }
    if (n > p->max_admitted - n_admitted || blocks > blocks_free)
        return TD_DECODE_FULL;
    return TD_DECODE_ADMIT;
}

uint32_t td_decode_plan(const td_decode_policy *p, uint32_t n, uint32_t *cursor,
                        uint32_t *ret_picks)
{
    if (n <= p->max_seqs) {
        for (uint32_t i = 0; i < n; i++)
            ret_picks[i] = i;
        *cursor = 0;
        return n;
    }
    uint32_t at = *cursor % n;
    for (uint32_t i = 0; i < p->max_seqs; i++)
        ret_picks[i] = (at + i) % n;
    *cursor = (at + p->max_seqs) % n;
    return p->max_seqs;
}

uint32_t td_decode_local(uint32_t limit, uint32_t n_timelines, uint32_t n_ids, uint32_t held_blocks)
{
    uint32_t n = n_ids - held_blocks * TD_BLOCK_TOKENS;
    return n_timelines == 1 && n <= limit ? n : 0;
}

uint32_t td_decode_plan_local(const td_decode_policy *p, const uint32_t *n_left, uint32_t n,
                              uint32_t *ret_tokens)
{
    uint32_t rows = p->local_rows, n_picks = 0;
    for (; n_picks < n && rows > 0; n_picks++) {
        ret_tokens[n_picks] = TD_MIN(rows, n_left[n_picks]);
        rows -= ret_tokens[n_picks];
    }
    return n_picks;
}
