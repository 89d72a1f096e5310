/* SPDX-License-Identifier: Apache-2.0 */
/* Guards: the sampler's short ways (bins, lists, walks by chunks) draw what a full sort of every id
 * draws, for every mixture of filters, with ties and without; and the loops for AVX2 give what the
 * portable ones give. Includes the source to reach both. */
#include "tests/kernels/kernels_util.h"

#include "kernels/sample.c"

enum { VOCAB_MAX = 5000 };

typedef struct ranked {
    float x;
    uint32_t id;
    uint64_t w;
} ranked;

static int by_rank(const void *a, const void *b)
{
    const ranked *x = a, *y = b;
    return x->x != y->x ? (x->x < y->x ? 1 : -1) : x->id < y->id ? -1 : 1;
}

static int by_id(const void *a, const void *b)
{
    return ((const ranked *)a)->id < ((const ranked *)b)->id ? -1 : 1;
}

/* numerics, "Sampling", word for word. */
static uint32_t by_sorting(const td_sample_row *r)
{
    static ranked e[VOCAB_MAX];
    uint32_t n = r->vocab;
    for (uint32_t i = 0; i < n; i++)
        e[i] = (ranked){r->logits[i] / r->temperature, i, 0};
    qsort(e, n, sizeof *e, by_rank);
    uint64_t z = 0, part = 0;
    for (uint32_t i = 0; i < n; i++)
        e[i].w = (uint64_t)((double)td_exp(e[i].x - e[0].x) * 4294967296.0);
    n = r->top_k && r->top_k < n ? r->top_k : n;
    for (uint32_t i = 0; i < n; i++)
        z += e[i].w;
    if (r->top_p < 1.0f) {
        uint64_t target = share(r->top_p, z);
        uint32_t i = 0;
        for (; i < n && part < target; i++)
            part += e[i].w;
        n = i;
    }
    uint64_t least = r->min_p > 0.0f ? share(r->min_p, 1ull << 32) : 1;
    qsort(e, n, sizeof *e, by_id);
    z = 0;
    for (uint32_t i = 0; i < n; i++)
        z += e[i].w >= least ? e[i].w : 0;
    uint64_t at = (uint64_t)(((unsigned __int128)r->random * z) >> 64);
    for (uint32_t i = 0; i < n; i++) {
        if (e[i].w < least)
            continue;
        if (at < e[i].w)
            return e[i].id;
        at -= e[i].w;
    }
    return 0;
}

static float pick_float(const float *from, size_t n)
{
    return from[td_rng_below(&rng, n)];
}

static void draws_what_a_sort_draws(void **state)
{
    static const float temperatures[] = {0.2f, 0.7f, 1.0f, 2.0f}, gains[] = {0.3f, 4.0f, 40.0f},
                       ps[] = {1.0f, 1.0f, 0.999f, 0.9f, 0.3f, 1e-6f},
                       mins[] = {0.0f, 0.0f, 0.02f, 0.5f, 1e-9f};
    static const uint32_t vocabs[] = {1, 2, 7, 64, 511, 513, 1000, VOCAB_MAX};
    for (int round = 0; round < 2500; round++) {
        uint32_t v = vocabs[td_rng_below(&rng, 8)];
        float *l = floats(v), gain = pick_float(gains, 3);
        void *scratch = floats((td_sample_scratch_bytes(v) + 63) / 64 * 16);
        for (uint32_t i = 0; i < v; i++) {
            l[i] = value(0) * gain + value(0) * gain;
            if (round % 3 == 0)
                l[i] = floorf(l[i] * 2.0f) / 2.0f; /* many ties, and -0 */
            if (round % 5 == 0 && td_rng_below(&rng, 4) == 0)
                l[i] = -INFINITY;
        }
        l[td_rng_below(&rng, v)] = 2.0f * gain;
        td_sample_row r = {.logits = l,
                           .vocab = v,
                           .temperature = pick_float(temperatures, 4),
                           .top_p = pick_float(ps, 6),
                           .min_p = pick_float(mins, 5),
                           .repetition_penalty = 1.0f,
                           .random = td_rng_next(&rng),
                           .scratch = scratch};
        if (round % 2)
            r.top_k = 1 + (uint32_t)td_rng_below(&rng, v + 5);
        td_sample_draw(&r);
        uint32_t want = by_sorting(&r);
        if (r.id != want)
            fail_msg("round %d: vocab %u T %g k %u p %g min %g: %u, a sort gives %u", round, v,
                     (double)r.temperature, r.top_k, (double)r.top_p, (double)r.min_p, r.id, want);
        check_guards();
    }
}

/* Divided by a tiny temperature many logits are infinite; the greatest is still the greatest. */
static void a_tiny_temperature_is_argmax(void **state)
{
    float l[] = {1.0f, 3.0f, 2.0f, 3.0f}, scratch[64] __attribute__((aligned(64)));
    td_sample_row r = {.logits = l,
                       .vocab = 4,
                       .temperature = 1e-38f,
                       .top_p = 1.0f,
                       .repetition_penalty = 1.0f,
                       .scratch = scratch};
    for (r.random = 0; r.random < 3; r.random++) {
        td_sample_draw(&r);
        assert_int_equal(r.id, 1);
    }
}

static void simd_loops_equal_the_portable_ones(void **state)
{
    enum { N = 61 };
    if (!has_simd())
        skip();
    for (int round = 0; round < 5000; round++) {
        float x[N], y[N];
        uint32_t bins[N], ids[N];
        uint64_t w[N];
        int ties;
        for (uint32_t i = 0; i < N; i++) {
            x[i] = round % 2 ? value(0) * 20.0f : floorf(value(0) * 9.0f);
            w[i] = td_rng_next(&rng) >> 31;
        }
        float best = -INFINITY, bound = x[td_rng_below(&rng, N)];
        for (uint32_t i = 0; i < N; i++)
            best = x[i] > best ? x[i] : best;
        assert_true(greatest_simd(x, N) == best);
        divide_simd(x, 0.37f, y, N);
        bins_simd(best, x, bins, N);
        uint32_t n = list_simd(best, x, N, 100, 900, ids, 9), have = 0;
        uint64_t sum = 0;
        for (uint32_t i = 0; i < N; i++) {
            assert_true(y[i] == x[i] / 0.37f);
            assert_int_equal(bins[i], bin_of(best, x[i]));
            if (bins[i] >= 100 && bins[i] <= 900 && have++ < 9)
                assert_int_equal(ids[have - 1], i);
            sum += x[i] >= bound ? w[i] : 0;
        }
        assert_int_equal(n, have);
        assert_int_equal(drop_simd(x, w, N, bound, &ties), sum);
        assert_true(ties);
        for (uint32_t i = 0; i < N; i++)
            assert_true(x[i] >= bound || w[i] == 0);
        assert_int_equal(drop_simd(x, w, N, 100.0f, &ties), 0);
        assert_false(ties);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(draws_what_a_sort_draws),
        cmocka_unit_test(a_tiny_temperature_is_argmax),
        cmocka_unit_test(simd_loops_equal_the_portable_ones),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
