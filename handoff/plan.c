/* SPDX-License-Identifier: Apache-2.0 */
#include "handoff/plan.h"

#include <errno.h>

#include "base/bug.h"
#include "base/prefix.h"
#include "base/banned.h"

static int add_timeline(td_handoff_plan *p, uint32_t choice, uint64_t n_ids)
{
    uint64_t blocks = (n_ids + TD_BLOCK_TOKENS - 1) / TD_BLOCK_TOKENS;
    if (p->n_tokens + n_ids > INT32_MAX)
        return -E2BIG;
    p->timelines[p->n_timelines++] = (td_timeline){.choice = choice,
                                                   .n_ids = (uint32_t)n_ids,
                                                   .n_blocks = (uint32_t)blocks,
                                                   .base = p->n_blocks};
    p->n_blocks += (uint32_t)blocks;
    p->n_tokens += (uint32_t)n_ids;
    return 0;
}

int td_plan_init(td_handoff_plan *p, size_t n_prompt, uint32_t n, const uint32_t *choices,
                 const size_t *emitted, uint32_t n_emitted)
{
    *p = (td_handoff_plan){0};
    if (n_prompt < 1 || n_prompt > INT32_MAX || n < 1 || n > TD_CHOICES_MAX || n_emitted > n)
        return -EINVAL;
    if (n_emitted == 0) {
        p->n_choices = n;
        return add_timeline(p, 0, n_prompt);
    }
    p->n_choices = n_emitted;
    for (uint32_t i = 0; i < n_emitted; i++) {
        if (choices[i] >= n || (i > 0 && choices[i] <= choices[i - 1]) || emitted[i] < 1 ||
            emitted[i] > INT32_MAX)
            return -EINVAL;
        int r = add_timeline(p, choices[i], (uint64_t)n_prompt + emitted[i] - 1);
        if (r < 0)
            return r;
    }
    return 0;
}

void td_plan_block(const td_handoff_plan *p, uint32_t index, uint32_t *ret_timeline,
                   uint32_t *ret_block, uint32_t *ret_rows)
{
    TD_BUG_ON(index >= p->n_blocks);
    uint32_t t = 0;
    while (index >= p->timelines[t].base + p->timelines[t].n_blocks)
        t++;
    const td_timeline *tl = &p->timelines[t];
    uint32_t b = index - tl->base;
    *ret_timeline = t;
    *ret_block = b;
    *ret_rows = TD_MIN((uint32_t)TD_BLOCK_TOKENS, tl->n_ids - b * TD_BLOCK_TOKENS);
}

uint32_t td_run_frames(const td_kv_group *g, uint32_t rows)
{
    return rows == TD_BLOCK_TOKENS ? 1 : g->scale_bytes ? 2 * g->n_layers : g->n_layers;
}

void td_run_frame(const td_kv_group *g, uint32_t rows, uint32_t i, uint64_t *ret_offset,
                  uint64_t *ret_bytes)
{
    uint64_t layer_bytes = g->bytes / g->n_layers, values = layer_bytes - g->scale_bytes;
    uint32_t layer = g->scale_bytes ? i / 2 : i;
    int scales = g->scale_bytes && i % 2;
    *ret_offset = g->offset + layer * layer_bytes + (scales ? values : 0);
    *ret_bytes = rows == TD_BLOCK_TOKENS
                     ? g->bytes
                     : (scales ? g->scale_bytes : values) / TD_BLOCK_TOKENS * rows;
}

uint64_t td_run_bytes(const td_kv_group *g, uint32_t rows)
{
    return g->bytes / TD_BLOCK_TOKENS * rows;
}

int td_layout_check(const td_kv_layout *layout)
{
    for (uint32_t i = 0; i < layout->n_groups; i++) {
        const td_kv_group *g = &layout->groups[i];
        if (g->n_layers == 0 || g->bytes == 0 || g->bytes > TD_KV_FRAME_MAX ||
            g->bytes % g->n_layers || g->bytes / g->n_layers % TD_BLOCK_TOKENS ||
            g->scale_bytes % TD_BLOCK_TOKENS || g->scale_bytes >= g->bytes / g->n_layers ||
            g->offset > layout->block_bytes || g->bytes > layout->block_bytes - g->offset)
            return -ENOTSUP;
    }
    return layout->n_groups && layout->n_groups <= TD_KV_GROUPS_MAX ? 0 : -ENOTSUP;
}
