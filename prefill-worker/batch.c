/* SPDX-License-Identifier: Apache-2.0 */
#include "prefill-worker/batch.h"

#include "base/bug.h"
#include "base/banned.h"

uint32_t td_prefill_plan(const td_prefill_policy *p, const td_prefill_view *views, uint32_t n,
                         uint64_t blocks_free, td_prefill_pick *ret_picks)
{
    uint32_t n_picks = 0, rows = p->max_rows;
    int full = 0;
    for (uint32_t i = 0; i < n && n_picks < p->max_seqs && rows > 0; i++) {
        const td_prefill_view *v = &views[i];
        if (v->n_left == 0)
            continue;
        if (!v->started) {
            /* Nobody overtakes, but who holds blocks goes on: they may be the ones that are waited
             * for. */
            full |= v->blocks_needed > blocks_free;
            if (full)
                continue;
            blocks_free -= v->blocks_needed;
        }
        uint32_t take = (uint32_t)TD_MIN((uint64_t)rows, v->n_left);
        ret_picks[n_picks++] = (td_prefill_pick){.job = i, .n_tokens = take};
        rows -= take;
    }
    return n_picks;
}
