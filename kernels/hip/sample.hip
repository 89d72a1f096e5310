/* SPDX-License-Identifier: Apache-2.0 */
/* One draw from one row of logits: td_sample_draw() on the device, the same id bit for bit. Weights
 * are integers, so sums may be taken in any order; where the order of ids counts, a thread has one
 * run of ids and runs are joined in order. An id that a cut leaves out gets weight 0. */
#include "kernels/hip/math.hpp"
#include "kernels/sample.h"

enum { SAMPLE_BINS = 2048, BINS_EACH = SAMPLE_BINS / K_THREADS };

struct sample_lds {
    uint64_t hist[SAMPLE_BINS], sums[K_THREADS];
    float best[K_WAVES];
    uint32_t ids[K_WAVES], digit;
    uint64_t before;
};

static_assert(sizeof(sample_lds) <= TD_K_LDS_SAMPLE, "the host asks for enough LDS");

K_DEV uint32_t sample_key(float f)
{
    uint32_t b = k_bits(f + 0.0f);
    return b & 0x80000000u ? ~b : b | 0x80000000u;
}

/* High half of a 64 x 64 bit product. */
K_DEV uint64_t high_product(uint64_t a, uint64_t b)
{
    uint64_t a0 = (uint32_t)a, a1 = a >> 32, b0 = (uint32_t)b, b1 = b >> 32;
    uint64_t m = a1 * b0 + (a0 * b0 >> 32), n = a0 * b1 + (uint32_t)m;
    return a1 * b1 + (m >> 32) + (n >> 32);
}

/* ceil(p * z), at least 1; p as a 63-bit fraction. */
K_DEV uint64_t share_of(uint64_t p, uint64_t z)
{
    uint64_t low = p * z, high = high_product(p, z), sum = low + 0x7fffffffffffffffull;
    high += sum < low;
    uint64_t s = high << 1 | sum >> 63;
    return s ? s : 1;
}

/* A thread's run of ids. */
struct id_run {
    uint32_t from, to;
};

K_DEV id_run own_run(uint32_t vocab)
{
    uint32_t each = (vocab + K_THREADS - 1) / K_THREADS, from = k_tid() * each;
    id_run r = {from < vocab ? from : vocab, from + each < vocab ? from + each : vocab};
    return r;
}

/* Sum over the threads before this one; *ret_all: over all. */
K_DEV uint64_t sum_before(sample_lds *l, uint64_t v, uint64_t *ret_all)
{
    l->sums[k_tid()] = v;
    k_sync();
    uint64_t before = 0, all = 0;
    for (uint32_t i = 0; i < K_THREADS; i++) {
        before += i < k_tid() ? l->sums[i] : 0;
        all += l->sums[i];
    }
    k_sync();
    *ret_all = all;
    return before;
}

K_DEV void edit_logit(const td_k_draw &r, const td_logit_edit &e)
{
    float x = r.x[e.id] + e.bias;
    if (e.seen && r.repetition_penalty != 1.0f)
        x = x > 0.0f ? x / r.repetition_penalty : x * r.repetition_penalty;
    if (e.n_emitted) {
        x -= (float)e.n_emitted * r.frequency_penalty;
        x -= r.presence_penalty;
    }
    r.x[e.id] = e.banned ? -k_inf() : x;
}

/* The id that was emitted last may have an edit already; l->digit: it has. */
K_DEV void edit_logits(sample_lds *l, const td_k_draw &r)
{
    uint32_t fed = r.fed ? *r.fed : r.vocab;
    for (uint32_t i = k_tid(); i < r.vocab; i += K_THREADS)
        r.x[i] = r.logits[i];
    if (k_tid() == 0)
        l->digit = 0;
    k_sync();
    for (uint32_t i = k_tid(); i < r.n_edits; i += K_THREADS) {
        td_logit_edit e = r.edits[i];
        if (e.id == fed) {
            e.n_emitted++;
            e.seen = 1;
            l->digit = 1;
        }
        edit_logit(r, e);
    }
    k_sync();
    if (k_tid() == 0 && fed < r.vocab && !l->digit) {
        td_logit_edit e = {fed, 0.0f, 1, 1, 0};
        edit_logit(r, e);
    }
    k_sync();
}

K_DEV uint32_t greatest(sample_lds *l, const td_k_draw &r)
{
    uint32_t id = 0;
    float v = r.x[0];
    for (uint32_t i = k_tid(); i < r.vocab; i += K_THREADS)
        if (r.x[i] > v || (r.x[i] == v && i < id)) {
            v = r.x[i];
            id = i;
        }
    for (uint32_t o = K_WAVE / 2; o > 0; o /= 2) {
        float x = k_shuffle_xor(v, o);
        uint32_t i = k_shuffle_u32(id, k_lane() ^ o);
        if (x > v || (x == v && i < id)) {
            v = x;
            id = i;
        }
    }
    if (k_lane() == 0) {
        l->best[k_wave()] = v;
        l->ids[k_wave()] = id;
    }
    k_sync();
    for (uint32_t w = 0; w < K_WAVES; w++)
        if (l->best[w] > v || (l->best[w] == v && l->ids[w] < id)) {
            v = l->best[w];
            id = l->ids[w];
        }
    k_sync();
    return id;
}

/* First digit from the top at which the measure reaches target; l->before: of the digits above. */
K_DEV void sample_digit(sample_lds *l, uint32_t bins, uint64_t before, uint64_t target)
{
    uint64_t sum = 0;
    for (uint32_t i = 0; i < BINS_EACH; i++)
        sum += l->hist[k_tid() * BINS_EACH + i];
    l->sums[k_tid()] = sum;
    k_sync();
    if (k_tid() == 0) {
        uint32_t group = bins / BINS_EACH - 1;
        while (group > 0 && before + l->sums[group] < target)
            before += l->sums[group--];
        uint32_t digit = group * BINS_EACH + BINS_EACH - 1;
        while (digit > group * BINS_EACH && before + l->hist[digit] < target)
            before += l->hist[digit--];
        l->digit = digit;
        l->before = before;
    }
    k_sync();
}

/* Keep the shortest prefix of (key descending, id ascending) whose measure reaches target. */
K_DEV void cut(sample_lds *l, const td_k_draw &r, uint64_t target, bool counting)
{
    uint32_t high = 0, mask = 0;
    uint64_t before = 0;
    for (int d = 0; d < 3; d++) {
        uint32_t shift = d == 0 ? 21 : d == 1 ? 10 : 0, bins = d == 2 ? 1024 : 2048;
        for (uint32_t i = k_tid(); i < SAMPLE_BINS; i += K_THREADS)
            l->hist[i] = 0;
        k_sync();
        for (uint32_t i = k_tid(); i < r.vocab; i += K_THREADS) {
            uint32_t key = sample_key(r.x[i]);
            if ((key & mask) == high)
                k_add_u64(&l->hist[key >> shift & (bins - 1)], counting ? 1 : r.w[i]);
        }
        k_sync();
        sample_digit(l, bins, before, target);
        before = l->before;
        high |= l->digit << shift;
        mask |= (bins - 1) << shift;
        k_sync();
    }
    id_run run = own_run(r.vocab);
    uint64_t own = 0, all;
    for (uint32_t i = run.from; i < run.to; i++)
        own += sample_key(r.x[i]) == high ? (counting ? 1 : r.w[i]) : 0;
    uint64_t at = before + sum_before(l, own, &all);
    for (uint32_t i = run.from; i < run.to; i++) {
        uint32_t key = sample_key(r.x[i]);
        uint64_t measure = key == high ? (counting ? 1 : r.w[i]) : 0;
        if (key < high || (key == high && at >= target))
            r.w[i] = 0;
        at += measure;
    }
    k_sync();
}

/* The id at which the kept weights, walked in id order, pass the drawn share of their sum. */
K_DEV void walk(sample_lds *l, const td_k_draw &r)
{
    id_run run = own_run(r.vocab);
    uint64_t own = 0, z;
    for (uint32_t i = run.from; i < run.to; i++)
        own += r.w[i] >= r.least ? r.w[i] : 0;
    uint64_t before = sum_before(l, own, &z), at = high_product(r.random, z);
    if (at < before || at >= before + own)
        return;
    at -= before;
    for (uint32_t i = run.from; i < run.to; i++) {
        if (r.w[i] < r.least)
            continue;
        if (at < r.w[i]) {
            *r.id = i;
            return;
        }
        at -= r.w[i];
    }
}

K_KERNEL(sample, td_k_sample)
{
    const td_k_draw &from = a.rows[k_block()];
    td_k_draw r = from;
    r.logits = k_global(from.logits);
    r.edits = k_global(from.edits);
    r.fed = k_global(from.fed);
    r.id = k_global(from.id);
    r.x = k_global(from.x);
    r.w = k_global(from.w);
    sample_lds *l = k_lds<sample_lds>();
    edit_logits(l, r);
    uint32_t best = greatest(l, r);
    if (r.temperature > 0.0f) {
        float max = r.x[best] / r.temperature;
        k_sync();
        for (uint32_t i = k_tid(); i < r.vocab; i += K_THREADS) {
            r.x[i] /= r.temperature;
            r.w[i] = (uint64_t)(int64_t)(k_exp1(r.x[i] - max) * 4294967296.0f);
        }
        if (max > -k_inf() && max < k_inf()) {
            if (k_tid() == 0)
                *r.id = 0;
            k_sync();
            if (r.top_k && r.top_k < r.vocab)
                cut(l, r, r.top_k, true);
            if (r.top_p_bits) {
                uint64_t all, own = 0;
                for (uint32_t i = k_tid(); i < r.vocab; i += K_THREADS)
                    own += r.w[i];
                sum_before(l, own, &all);
                cut(l, r, share_of(r.top_p_bits, all), false);
            }
            walk(l, r);
            return;
        }
    }
    if (k_tid() == 0)
        *r.id = best;
}
