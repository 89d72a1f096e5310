/* SPDX-License-Identifier: Apache-2.0 */
/* Geometry of a handoff: which sequences a request needs, and the block space of its ticket. Both
 * ends compute it from the same request, so no size or place ever comes from the wire. Pure; any
 * thread.
 *
 * A timeline is a sequence of ids whose rows travel: on a first attempt there is one, the prompt,
 * whatever n is (the decode worker forks it). On a recovery each unfinished choice has its own:
 * prompt ‖ emitted without the last id. The ticket's block space is timeline 0's blocks, then
 * timeline 1's, and so on; the first `held` blocks of every timeline are not sent. */
#ifndef TD_HANDOFF_PLAN_H
#define TD_HANDOFF_PLAN_H

#include <stddef.h>
#include <stdint.h>

#include "engine/kv.h"

enum { TD_CHOICES_MAX = 16, TD_KV_FRAME_MAX = 1 << 20 };

typedef struct td_timeline {
    uint32_t choice;   /* first choice sampled from it */
    uint32_t n_ids;    /* rows that travel: n_prompt, or n_prompt + n_emitted - 1 */
    uint32_t n_blocks; /* ceil(n_ids / 64) */
    uint32_t base;     /* index of its block 0 in the block space */
} td_timeline;

typedef struct td_handoff_plan {
    td_timeline timelines[TD_CHOICES_MAX];
    uint32_t n_timelines;
    uint32_t n_choices; /* first tokens in the commit */
    uint32_t n_blocks;  /* of the block space */
    uint32_t n_tokens;  /* rows over all timelines */
} td_handoff_plan;

/* First attempt: n_emitted = 0 and n choices. Recovery: choices/emitted are [n_emitted] (choice
 * index, ids emitted >= 1). 0; -EINVAL out of range; -E2BIG more rows than fit 32 bits. */
int td_plan_init(td_handoff_plan *p, size_t n_prompt, uint32_t n, const uint32_t *choices,
                 const size_t *emitted, uint32_t n_emitted);
/* Timeline and block within it of an index of the block space; rows: those that travel (64 but for
 * a last block). */
void td_plan_block(const td_handoff_plan *p, uint32_t index, uint32_t *ret_timeline,
                   uint32_t *ret_block, uint32_t *ret_rows);

/* Frames of `rows` rows of one block in a group: 1, or for fewer than 64 rows one per layer; two
 * where layers have scales: the rows' values, then their scales. */
uint32_t td_run_frames(const td_kv_group *g, uint32_t rows);
/* Frame i of those: where it lies in the block, and its length. */
void td_run_frame(const td_kv_group *g, uint32_t rows, uint32_t i, uint64_t *ret_offset,
                  uint64_t *ret_bytes);
uint64_t td_run_bytes(const td_kv_group *g, uint32_t rows);
/* 0 when every frame of this layout fits TD_KV_FRAME_MAX and rows divide evenly; -ENOTSUP. */
int td_layout_check(const td_kv_layout *layout);

#endif
