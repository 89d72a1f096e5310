/* SPDX-License-Identifier: Apache-2.0 */
#include "kernels/sample.h"

#include <math.h>
#include <string.h>

#include "kernels/math.h"

#include "base/banned.h"

/* Ids kept so far: those whose key is above thr, and the first n_ties ids whose key equals it. */
typedef struct cut {
    uint32_t thr, n_ties;
} cut;

typedef struct work {
    uint32_t vocab;
    float *x;    /* edited, tempered logits */
    uint64_t *w; /* integer weights */
} work;

enum { CHUNK = 512 };

size_t td_sample_scratch_bytes(uint32_t vocab)
{
    size_t v = ((size_t)vocab + 15) / 16 * 16;
    return v * (sizeof(float) + sizeof(uint64_t));
}

/* Order-preserving integer of a float; -0 equals +0. */
static uint32_t key_of(float f)
{
    f += 0.0f;
    uint32_t b;
    memcpy(&b, &f, 4);
    return b & 0x80000000u ? ~b : b | 0x80000000u;
}

static void edit(const td_sample_row *r, float *x)
{
    memcpy(x, r->logits, r->vocab * sizeof *x);
    for (uint32_t i = 0; i < r->n_edits; i++) {
        const td_logit_edit *e = &r->edits[i];
        float l = x[e->id] + e->bias;
        if (e->seen && r->repetition_penalty != 1.0f)
            l = l > 0.0f ? l / r->repetition_penalty : l * r->repetition_penalty;
        if (e->n_emitted) {
            l -= (float)e->n_emitted * r->frequency_penalty;
            l -= r->presence_penalty;
        }
        x[e->id] = e->banned ? -INFINITY : l;
    }
}

static uint32_t argmax(const float *x, uint32_t n)
{
    uint32_t best = 0;
    for (uint32_t i = 1; i < n; i++)
        if (x[i] > x[best])
            best = i;
    return best;
}

/* Walk the ids that are kept by c in id order. */
#define FOR_KEPT(wk, c, i, k)                                                                      \
    for (uint32_t i = 0, ties_ = 0, k; i < (wk)->vocab && (k = key_of((wk)->x[i]), 1); i++)        \
        if (k > (c).thr || (k == (c).thr && ties_++ < (c).n_ties))

/* Shortest prefix of (key descending, id ascending) whose measure reaches target; the measure of an
 * id is its weight, or 1 when counting. Three digits of 11, 11 and 10 bits from the top: a
 * histogram of measure each. */
static cut prefix(const work *wk, cut in, uint64_t target, int counting)
{
    static const uint8_t shifts[3] = {21, 10, 0};
    static const uint16_t sizes[3] = {2048, 2048, 1024};
    uint64_t hist[2048], before = 0;
    uint32_t high = 0, mask = 0;
    for (int d = 0; d < 3; d++) {
        memset(hist, 0, sizeof hist);
        FOR_KEPT(wk, in, i, k)
        if ((k & mask) == high)
            hist[k >> shifts[d] & (sizes[d] - 1u)] += counting ? 1 : wk->w[i];
        uint32_t digit = sizes[d] - 1u;
        while (digit > 0 && before + hist[digit] < target)
            before += hist[digit--];
        high |= digit << shifts[d];
        mask |= (sizes[d] - 1u) << shifts[d];
    }
    cut out = {high, 0};
    FOR_KEPT(wk, in, i, k)
    {
        if (k == high && before < target) {
            before += counting ? 1 : wk->w[i];
            out.n_ties++;
        }
    }
    return out;
}

static uint64_t mass(const work *wk, cut c, uint64_t least)
{
    uint64_t sum = 0;
    FOR_KEPT(wk, c, i, k)
    if (wk->w[i] >= least)
        sum += wk->w[i];
    return sum;
}

/* ceil(p * z) exactly: p in (0, 1] as a 63-bit fraction. */
static uint64_t share(float p, uint64_t z)
{
    unsigned __int128 f = (unsigned __int128)(uint64_t)((double)p * 9223372036854775808.0);
    uint64_t s = (uint64_t)((f * z + (((unsigned __int128)1 << 63) - 1)) >> 63);
    return s ? s : 1;
}

static uint32_t draw(const td_sample_row *r, work *wk)
{
    cut c = {0, UINT32_MAX};
    if (r->top_k && r->top_k < r->vocab)
        c = prefix(wk, c, r->top_k, 1);
    if (r->top_p < 1.0f)
        c = prefix(wk, c, share(r->top_p, mass(wk, c, 0)), 0);
    uint64_t least = r->min_p > 0.0f ? share(r->min_p, 1ull << 32) : 1;
    uint64_t z = mass(wk, c, least);
    uint64_t at = (uint64_t)(((unsigned __int128)r->random * z) >> 64);
    FOR_KEPT(wk, c, i, k)
    {
        if (wk->w[i] < least)
            continue;
        if (at < wk->w[i])
            return i;
        at -= wk->w[i];
    }
    return 0;
}

void td_sample_draw(td_sample_row *row)
{
    work wk = {.vocab = row->vocab, .w = row->scratch};
    wk.x = (float *)(wk.w + ((size_t)row->vocab + 15) / 16 * 16);
    edit(row, wk.x);
    uint32_t best = argmax(wk.x, row->vocab);
    if (row->temperature > 0.0f) {
        for (uint32_t i = 0; i < row->vocab; i++)
            wk.x[i] /= row->temperature;
        float max = wk.x[best];
        if (max > -INFINITY && max < INFINITY) {
            td_exp_weights(wk.x, max, wk.w, row->vocab);
            best = draw(row, &wk);
        }
    }
    row->id = best;
}

static double log_sum_exp(const float *l, uint32_t vocab, float max)
{
    uint64_t w[CHUNK], sum = 0;
    for (uint32_t i = 0; i < vocab; i += CHUNK)
        sum += td_exp_weights(l + i, max, w, vocab - i < CHUNK ? vocab - i : CHUNK);
    return td_ln((double)sum / 4294967296.0);
}

void td_sample_logprob(const float *logits, uint32_t vocab, uint32_t id, uint32_t n_top,
                       float *ret_logprob, uint32_t *ret_top_ids, float *ret_top)
{
    float max = logits[argmax(logits, vocab)];
    double lse = log_sum_exp(logits, vocab, max);
    *ret_logprob = (float)((double)(logits[id] - max) - lse);
    uint32_t n = 0;
    for (uint32_t i = 0; i < vocab && n_top; i++) {
        if (n == n_top && !(logits[i] > logits[ret_top_ids[n - 1]]))
            continue;
        uint32_t at = n < n_top ? n++ : n - 1;
        for (; at > 0 && logits[i] > logits[ret_top_ids[at - 1]]; at--)
            ret_top_ids[at] = ret_top_ids[at - 1];
        ret_top_ids[at] = i;
    }
    for (uint32_t i = 0; i < n; i++)
        ret_top[i] = (float)((double)(logits[ret_top_ids[i]] - max) - lse);
}
