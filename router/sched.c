/* SPDX-License-Identifier: Apache-2.0 */
#include "router/sched.h"

#include <string.h>

#include "base/bug.h"
#include "base/prefix.h"
#include "base/banned.h"

uint64_t td_sched_blocks(uint32_t n_prompt, uint32_t n_choices, uint32_t max_tokens)
{
    uint64_t shared = n_prompt / TD_BLOCK_TOKENS;
    /* the last token is never computed, so it has no row */
    uint64_t rows = (uint64_t)n_prompt + (max_tokens ? max_tokens - 1 : 0);
    uint64_t all = (rows + TD_BLOCK_TOKENS - 1) / TD_BLOCK_TOKENS;
    return shared + (all - shared) * n_choices;
}

static uint64_t prompt_blocks(const td_sched_need *need)
{
    return td_sched_blocks(need->n_prompt, need->n_choices, 0);
}

static int has_failed(const td_sched_need *need, uint64_t id)
{
    for (uint32_t i = 0; i < need->n_failed; i++)
        if (need->failed[i] == id)
            return 1;
    return 0;
}

static int takes_requests(const td_sched_worker *w, const td_sched_need *need)
{
    return w->ready && !w->draining &&
           (!need->profile_id || memcmp(w->profile_id, need->profile_id, 16) == 0) &&
           (!need->model_hash || memcmp(w->model_hash, need->model_hash, 32) == 0);
}

static int is_pair(const td_sched_worker *d, const td_sched_worker *p)
{
    return memcmp(d->profile_id, p->profile_id, 16) == 0 &&
           memcmp(d->layout_hash, p->layout_hash, 16) == 0 &&
           memcmp(d->model_hash, p->model_hash, 32) == 0;
}

/* Our own part is known exactly and at once; a report is late, so only what it tells beyond our
 * part is kept of it. */
void td_sched_seen(td_sched_worker *w, uint32_t used_blocks, uint32_t n_running,
                   uint64_t waiting_tokens)
{
    uint32_t own = w->is_decode ? w->sent_seqs : w->sent_requests;
    w->other_blocks = used_blocks > w->sent_blocks ? used_blocks - w->sent_blocks : 0;
    w->other_running = n_running > own ? n_running - own : 0;
    w->other_tokens = waiting_tokens > w->sent_tokens ? waiting_tokens - w->sent_tokens : 0;
}

static uint64_t decode_load(const td_sched_worker *w)
{
    return (uint64_t)w->sent_blocks + w->other_blocks;
}

static uint64_t prefill_load(const td_sched_worker *w)
{
    return w->sent_tokens + w->other_tokens;
}

static uint64_t running(const td_sched_worker *w)
{
    return (uint64_t)(w->is_decode ? w->sent_seqs : w->sent_requests) + w->other_running;
}

static int can_ever(const td_sched_worker *w, const td_sched_need *need)
{
    uint64_t length = (uint64_t)need->n_prompt + (w->is_decode ? need->max_tokens : 0);
    uint64_t blocks = w->is_decode
                          ? td_sched_blocks(need->n_prompt, need->n_choices, need->max_tokens)
                          : prompt_blocks(need);
    return blocks <= w->kv_blocks && (!w->max_context || length <= w->max_context) &&
           (!w->is_decode || !w->max_seqs || need->n_choices <= w->max_seqs);
}

static int has_room(const td_sched_worker *w, const td_sched_need *need)
{
    if (!w->is_decode) /* an idle worker takes a prompt of any length */
        return w->sent_requests == 0 || prefill_load(w) + need->n_prompt <= TD_SCHED_PREFILL_TOKENS;
    if (w->max_seqs && running(w) + need->n_choices > w->max_seqs)
        return 0;
    return decode_load(w) + td_sched_blocks(need->n_prompt, need->n_choices, need->max_tokens) <=
           w->kv_blocks;
}

/* 1 when a is the better place. A worker that failed this request comes after every other one. */
static int is_better(const td_sched_worker *a, const td_sched_worker *b, const td_sched_need *need)
{
    int fa = has_failed(need, a->id), fb = has_failed(need, b->id);
    if (fa != fb)
        return fa < fb;
    if (a->is_decode) {
        /* relative to the pool, compared without division: unlike pools fill evenly */
        uint64_t la = decode_load(a) * b->kv_blocks, lb = decode_load(b) * a->kv_blocks;
        if (la != lb)
            return la < lb;
    } else if (prefill_load(a) != prefill_load(b)) {
        return prefill_load(a) < prefill_load(b);
    }
    if (running(a) != running(b))
        return running(a) < running(b);
    return a->id < b->id;
}

typedef struct tally {
    uint32_t n_takes, n_fits; /* take requests; could ever hold this one */
    uint32_t best;            /* UINT32_MAX: none has room */
} tally;

/* peer NULL: any of the role; else only those whose blocks the peer can read. */
static tally look(const td_sched_worker *const *workers, uint32_t n, const td_sched_need *need,
                  int is_decode, const td_sched_worker *peer)
{
    tally t = {.best = UINT32_MAX};
    for (uint32_t i = 0; i < n; i++) {
        const td_sched_worker *w = workers[i];
        if (w->is_decode != is_decode || !takes_requests(w, need) || (peer && !is_pair(w, peer)))
            continue;
        t.n_takes++;
        if (!can_ever(w, need))
            continue;
        t.n_fits++;
        if (has_room(w, need) && (t.best == UINT32_MAX || is_better(w, workers[t.best], need)))
            t.best = i;
    }
    return t;
}

static td_sched_verdict choose_alone(const td_sched_worker *const *workers, uint32_t n,
                                     const td_sched_need *need, uint32_t *ret_prefill)
{
    tally p = look(workers, n, need, 0, NULL);
    if (!p.n_takes)
        return TD_SCHED_NO_PREFILL;
    if (!p.n_fits)
        return TD_SCHED_TOO_LONG;
    if (p.best == UINT32_MAX)
        return TD_SCHED_BUSY;
    *ret_prefill = p.best;
    return TD_SCHED_OK;
}

/* Of the decode workers with room, the best one that has a prefill worker with room. */
static int best_pair(const td_sched_worker *const *workers, uint32_t n, const td_sched_need *need,
                     uint32_t *ret_decode, uint32_t *ret_prefill, int *ret_any_pair)
{
    uint32_t best = UINT32_MAX;
    *ret_any_pair = 0;
    for (uint32_t i = 0; i < n; i++) {
        const td_sched_worker *d = workers[i];
        if (!d->is_decode || !takes_requests(d, need) || !can_ever(d, need))
            continue;
        tally p = look(workers, n, need, 0, d);
        *ret_any_pair |= p.n_takes > 0;
        if (!has_room(d, need) || p.best == UINT32_MAX)
            continue;
        if (best != UINT32_MAX && !is_better(d, workers[best], need))
            continue;
        best = i;
        *ret_prefill = p.best;
    }
    *ret_decode = best;
    return best != UINT32_MAX;
}

td_sched_verdict td_sched_choose(const td_sched_worker *const *workers, uint32_t n,
                                 const td_sched_need *need, uint32_t *ret_decode,
                                 uint32_t *ret_prefill)
{
    uint32_t prefill = 0, decode = UINT32_MAX;
    if (need->alone) {
        td_sched_verdict v = choose_alone(workers, n, need, &prefill);
        if (v != TD_SCHED_OK)
            return v;
    } else {
        tally d = look(workers, n, need, 1, NULL), p = look(workers, n, need, 0, NULL);
        int any_pair;
        if (!d.n_takes)
            return TD_SCHED_NO_DECODE;
        if (!p.n_takes)
            return TD_SCHED_NO_PREFILL;
        if (!d.n_fits || !p.n_fits)
            return TD_SCHED_TOO_LONG;
        if (!best_pair(workers, n, need, &decode, &prefill, &any_pair))
            return any_pair ? TD_SCHED_BUSY : TD_SCHED_NO_PREFILL;
    }
    *ret_decode = decode;
    *ret_prefill = prefill;
    return TD_SCHED_OK;
}
