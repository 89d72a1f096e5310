/* SPDX-License-Identifier: Apache-2.0 */
#include "kernels/sample.h"

#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "kernels/math.h"

#include "base/banned.h"

/* Loops over the vocabulary for processors with AVX2, beside the portable ones: equal results. */
#define SIMD __attribute__((target("avx2,fma")))

enum {
    CHUNK = 512,
    BINS = 2048,
};
/* Bins per unit of logit below the greatest: 2048 of them reach down to where weights are 0. */
static const float BINS_PER_UNIT = 92.0f;

/* Ids kept so far: those whose key is above thr, and the first n_ties ids whose key equals it. */
typedef struct cut {
    uint32_t thr, n_ties;
} cut;

typedef struct work {
    uint32_t vocab;
    float *x;    /* edited, tempered logits */
    uint64_t *w; /* integer weights */
} work;

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

static int has_simd(void)
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

SIMD static float greatest_simd(const float *x, uint32_t n)
{
    __m256 m[4];
    float lanes[8], best = -INFINITY;
    uint32_t i = 0;
    for (int k = 0; k < 4; k++)
        m[k] = _mm256_set1_ps(-INFINITY);
    for (; i + 32 <= n; i += 32)
        for (int k = 0; k < 4; k++)
            m[k] = _mm256_max_ps(_mm256_loadu_ps(x + i + 8 * k), m[k]);
    _mm256_storeu_ps(lanes, _mm256_max_ps(_mm256_max_ps(m[0], m[1]), _mm256_max_ps(m[2], m[3])));
    for (int k = 0; k < 8; k++)
        best = lanes[k] > best ? lanes[k] : best;
    for (; i < n; i++)
        best = x[i] > best ? x[i] : best;
    return best;
}

static float greatest(const float *x, uint32_t n)
{
    if (has_simd())
        return greatest_simd(x, n);
    float best = -INFINITY;
    for (uint32_t i = 0; i < n; i++)
        best = x[i] > best ? x[i] : best;
    return best;
}

SIMD static void divide_simd(const float *x, float by, float *y, uint32_t n)
{
    __m256 d = _mm256_set1_ps(by);
    uint32_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(y + i, _mm256_div_ps(_mm256_loadu_ps(x + i), d));
    for (; i < n; i++)
        y[i] = x[i] / by;
}

static void divide(const float *x, float by, float *y, uint32_t n)
{
    if (has_simd()) {
        divide_simd(x, by, y, n);
        return;
    }
    for (uint32_t i = 0; i < n; i++)
        y[i] = x[i] / by;
}

/* How far below the greatest, in bins. A greater logit never has a greater bin: the order of bins
 * is the order of logits, as far as it goes. */
static uint32_t bin_of(float max, float x)
{
    float d = (max - x) * BINS_PER_UNIT;
    return d < (float)(BINS - 1) ? (uint32_t)(int32_t)d : BINS - 1;
}

SIMD static __m256i bins8(__m256 max, const float *x)
{
    __m256 d = _mm256_mul_ps(_mm256_sub_ps(max, _mm256_loadu_ps(x)), _mm256_set1_ps(BINS_PER_UNIT));
    return _mm256_cvttps_epi32(_mm256_min_ps(d, _mm256_set1_ps((float)(BINS - 1))));
}

SIMD static void bins_simd(float max, const float *x, uint32_t *bins, uint32_t n)
{
    uint32_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_si256((__m256i *)(bins + i), bins8(_mm256_set1_ps(max), x + i));
    for (; i < n; i++)
        bins[i] = bin_of(max, x[i]);
}

static void find_bins(float max, const float *x, uint32_t *bins, uint32_t n)
{
    if (has_simd()) {
        bins_simd(max, x, bins, n);
        return;
    }
    for (uint32_t i = 0; i < n; i++)
        bins[i] = bin_of(max, x[i]);
}

/* Ids in order whose bin is first .. last, at most room; returns how many there are. */
SIMD static uint32_t list_simd(float max, const float *x, uint32_t n, uint32_t first, uint32_t last,
                               uint32_t *ids, uint32_t room)
{
    __m256i low = _mm256_set1_epi32((int)first - 1), high = _mm256_set1_epi32((int)last + 1);
    uint32_t have = 0, i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256i b = bins8(_mm256_set1_ps(max), x + i);
        __m256i in = _mm256_and_si256(_mm256_cmpgt_epi32(b, low), _mm256_cmpgt_epi32(high, b));
        uint32_t mask = (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(in));
        for (; mask; mask &= mask - 1, have++)
            if (have < room)
                ids[have] = i + (uint32_t)__builtin_ctz(mask);
    }
    for (; i < n; i++) {
        uint32_t b = bin_of(max, x[i]);
        if (b >= first && b <= last && have++ < room)
            ids[have - 1] = i;
    }
    return have;
}

static uint32_t list_bins(float max, const float *x, uint32_t n, uint32_t first, uint32_t last,
                          uint32_t *ids, uint32_t room)
{
    if (has_simd())
        return list_simd(max, x, n, first, last, ids, room);
    uint32_t have = 0;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t b = bin_of(max, x[i]);
        if (b >= first && b <= last && have++ < room)
            ids[have - 1] = i;
    }
    return have;
}

/* Weights of logits below bound become 0; returns the sum of the others, and in *ret_ties whether
 * some equal bound. */
SIMD static uint64_t drop_simd(const float *x, uint64_t *w, uint32_t n, float bound, int *ret_ties)
{
    __m128 b = _mm_set1_ps(bound), equal = _mm_setzero_ps();
    __m256i sum = _mm256_setzero_si256();
    uint64_t lanes[4], total = 0;
    uint32_t i = 0;
    for (; i + 4 <= n; i += 4) {
        __m128 v = _mm_loadu_ps(x + i);
        __m256i keep = _mm256_cvtepi32_epi64(_mm_castps_si128(_mm_cmp_ps(v, b, _CMP_GE_OQ)));
        __m256i kept = _mm256_and_si256(_mm256_loadu_si256((__m256i *)(w + i)), keep);
        equal = _mm_or_ps(equal, _mm_cmp_ps(v, b, _CMP_EQ_OQ));
        _mm256_storeu_si256((__m256i *)(w + i), kept);
        sum = _mm256_add_epi64(sum, kept);
    }
    _mm256_storeu_si256((__m256i *)lanes, sum);
    total = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
    *ret_ties = _mm_movemask_ps(equal) != 0;
    for (; i < n; i++) {
        w[i] = x[i] >= bound ? w[i] : 0;
        *ret_ties |= x[i] == bound;
        total += w[i];
    }
    return total;
}

static uint64_t drop(const float *x, uint64_t *w, uint32_t n, float bound, int *ret_ties)
{
    if (has_simd())
        return drop_simd(x, w, n, bound, ret_ties);
    uint64_t total = 0;
    *ret_ties = 0;
    for (uint32_t i = 0; i < n; i++) {
        w[i] = x[i] >= bound ? w[i] : 0;
        *ret_ties |= x[i] == bound;
        total += w[i];
    }
    return total;
}

static float edited(const td_sample_row *r, const td_logit_edit *e)
{
    float l = r->logits[e->id] + e->bias;
    if (e->seen && r->repetition_penalty != 1.0f)
        l = l > 0.0f ? l / r->repetition_penalty : l * r->repetition_penalty;
    if (e->n_emitted) {
        l -= (float)e->n_emitted * r->frequency_penalty;
        l -= r->presence_penalty;
    }
    return e->banned ? -INFINITY : l;
}

static uint32_t argmax(const float *x, uint32_t n)
{
    float best = greatest(x, n);
    uint32_t i = 0;
    while (i < n && x[i] != best)
        i++;
    return i < n ? i : 0;
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

static uint64_t sum_weights(const float *x, uint32_t n, float max)
{
    uint64_t w[CHUNK], sum = 0;
    for (uint32_t i = 0; i < n; i += CHUNK)
        sum += td_exp_weights(x + i, max, w, n - i < CHUNK ? n - i : CHUNK);
    return sum;
}

/* ---- the draw ---- */

static float value_of(uint32_t key)
{
    uint32_t b = key & 0x80000000u ? key & 0x7fffffffu : ~key;
    float f;
    memcpy(&f, &b, 4);
    return f;
}

/* Weights of a chunk, 0 for what c does not keep; returns their sum. *ties: equals of the bound so
 * far. */
static uint64_t chunk_weights(const float *x, uint32_t n, float max, cut c, uint32_t *ties,
                              uint64_t w[CHUNK])
{
    uint64_t sum = td_exp_weights(x, max, w, n);
    int some;
    if (!c.thr)
        return sum;
    sum = drop(x, w, n, value_of(c.thr), &some);
    for (uint32_t k = 0; some && k < n; k++)
        if (x[k] == value_of(c.thr) && (*ties)++ >= c.n_ties) {
            sum -= w[k];
            w[k] = 0;
        }
    return sum;
}

/* What c keeps, walked in id order to the random number, a chunk at a time. z: the sum of its
 * weights. */
static uint32_t walk(const td_sample_row *r, const work *wk, float max, cut c, uint64_t z)
{
    uint64_t w[CHUNK], at = (uint64_t)(((unsigned __int128)r->random * z) >> 64);
    for (uint32_t i = 0, ties = 0; i < wk->vocab; i += CHUNK) {
        uint32_t n = wk->vocab - i < CHUNK ? wk->vocab - i : CHUNK;
        if (c.thr && key_of(greatest(wk->x + i, n)) < c.thr)
            continue;
        uint64_t sum = chunk_weights(wk->x + i, n, max, c, &ties, w);
        if (sum <= at) {
            at -= sum;
            continue;
        }
        uint32_t k = 0;
        for (; at >= w[k]; k++)
            at -= w[k];
        return i + k;
    }
    return 0;
}

/* Measure of each bin: weights, or ids when counting. Returns the sum. */
static uint64_t measure(const work *wk, float max, int counting, uint64_t hist[BINS])
{
    uint32_t bins[CHUNK];
    uint64_t w[CHUNK], odd[BINS] = {0}, sum = 0; /* two tables: neighbours may share a bin */
    memset(hist, 0, BINS * sizeof *hist);
    for (uint32_t i = 0; i < wk->vocab; i += CHUNK) {
        uint32_t n = wk->vocab - i < CHUNK ? wk->vocab - i : CHUNK;
        find_bins(max, wk->x + i, bins, n);
        sum += counting ? n : td_exp_weights(wk->x + i, max, w, n);
        for (uint32_t k = 0; k < n; k++)
            (k % 2 ? odd : hist)[bins[k]] += counting ? 1 : w[k];
    }
    for (uint32_t b = 0; b < BINS; b++)
        hist[b] += odd[b];
    return sum;
}

/* The bin in which the prefix of measure target ends; *ret_before: measure of the bins before. */
static uint32_t last_bin(const uint64_t hist[BINS], uint64_t target, uint64_t *ret_before)
{
    uint64_t before = 0;
    uint32_t b = 0;
    while (b + 1 < BINS && before + hist[b] < target)
        before += hist[b++];
    *ret_before = before;
    return b;
}

/* Candidates: their ids in order, logits and weights. They lie where the weights of all ids would,
 * so there is room for half of them. */
typedef struct list {
    work few;
    uint32_t *ids;
} list;

/* Ids of bins first .. last. 0: too many. */
static int make_list(const work *wk, float max, uint32_t first, uint32_t last, list *ret_list)
{
    uint32_t room = wk->vocab / 2;
    list l = {.few.w = wk->w, .few.x = (float *)(wk->w + room)};
    l.ids = (uint32_t *)(l.few.x + room);
    l.few.vocab = list_bins(max, wk->x, wk->vocab, first, last, l.ids, room);
    if (l.few.vocab > room)
        return 0;
    for (uint32_t i = 0; i < l.few.vocab; i++)
        l.few.x[i] = wk->x[l.ids[i]];
    td_exp_weights(l.few.x, max, l.few.w, l.few.vocab);
    *ret_list = l;
    return 1;
}

/* Draw among those kept by c and not lighter than least. */
static uint32_t draw_kept(const td_sample_row *r, const work *wk, cut c, uint64_t least)
{
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

static uint64_t least_weight(const td_sample_row *r)
{
    return r->min_p > 0.0f ? share(r->min_p, 1ull << 32) : 1;
}

/* Every filter, on all ids that wk has. */
static uint32_t draw_all(const td_sample_row *r, const work *wk)
{
    cut c = {0, UINT32_MAX};
    if (r->top_k && r->top_k < r->vocab)
        c = prefix(wk, c, r->top_k, 1);
    if (r->top_p < 1.0f)
        c = prefix(wk, c, share(r->top_p, mass(wk, c, 0)), 0);
    return draw_kept(r, wk, c, least_weight(r));
}

/* Top-k: the bins down to the k-th, then every filter among these. -1: too many. */
static int64_t draw_top_k(const td_sample_row *r, const work *wk, float max)
{
    uint64_t hist[BINS], before;
    list l;
    measure(wk, max, 1, hist);
    uint32_t last = last_bin(hist, r->top_k, &before);
    return make_list(wk, max, 0, last, &l) ? (int64_t)l.ids[draw_all(r, &l.few)] : -1;
}

/* The lightest that min_p keeps lies in this bin or above; two bins for the rounding of exp. */
static uint32_t lightest_bin(uint64_t least)
{
    double bin = td_ln(4294967296.0 / (double)least) * (double)BINS_PER_UNIT + 2.0;
    return bin < (double)(BINS - 1) ? (uint32_t)bin : BINS - 1;
}

/* What c keeps, and min_p where it is on. z: the weights of all that c keeps. -1: too many. */
static int64_t draw_cut(const td_sample_row *r, const work *wk, float max, cut c, uint64_t z)
{
    uint64_t least = least_weight(r);
    list l;
    if (least <= 1)
        return walk(r, wk, max, c, z);
    if (!make_list(wk, max, 0, lightest_bin(least), &l))
        return -1;
    return l.ids[draw_kept(r, &l.few, c, least)];
}

/* Top-p: only the bin in which the prefix ends must be put in order. -1: too many. */
static int64_t draw_top_p(const td_sample_row *r, const work *wk, float max)
{
    uint64_t hist[BINS], before;
    list l;
    uint64_t target = share(r->top_p, measure(wk, max, 0, hist));
    uint32_t last = last_bin(hist, target, &before);
    if (!make_list(wk, max, last, last, &l))
        return -1;
    cut all = {0, UINT32_MAX}, c = prefix(&l.few, all, target - before, 0);
    return draw_cut(r, wk, max, c, before + mass(&l.few, c, 0));
}

static uint32_t draw(const td_sample_row *r, const work *wk, float max)
{
    int64_t id;
    if (r->top_k && r->top_k < r->vocab) {
        id = draw_top_k(r, wk, max);
    } else if (r->top_p < 1.0f) {
        id = draw_top_p(r, wk, max);
    } else {
        uint64_t z = r->min_p > 0.0f ? 0 : sum_weights(wk->x, wk->vocab, max);
        id = draw_cut(r, wk, max, (cut){0, UINT32_MAX}, z);
    }
    if (id >= 0)
        return (uint32_t)id;
    td_exp_weights(wk->x, max, wk->w, wk->vocab);
    return draw_all(r, wk);
}

/* x = edited logits / t. */
static void temper(const td_sample_row *row, float t, float *x)
{
    divide(row->logits, t, x, row->vocab);
    for (uint32_t i = 0; i < row->n_edits; i++)
        x[row->edits[i].id] = edited(row, &row->edits[i]) / t;
}

void td_sample_draw(td_sample_row *row)
{
    work wk = {.vocab = row->vocab, .w = row->scratch};
    wk.x = (float *)(wk.w + ((size_t)row->vocab + 15) / 16 * 16);
    if (row->temperature > 0.0f) {
        temper(row, row->temperature, wk.x);
        float max = greatest(wk.x, row->vocab);
        if (max > -INFINITY && max < INFINITY) {
            row->id = draw(row, &wk, max);
            return;
        }
    }
    temper(row, 1.0f, wk.x); /* a small temperature may have made many infinite */
    row->id = argmax(wk.x, row->vocab);
}

static double log_sum_exp(const float *l, uint32_t vocab, float max)
{
    return td_ln((double)sum_weights(l, vocab, max) / 4294967296.0);
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
