/* SPDX-License-Identifier: Apache-2.0 */
/* Guards the sampler's law (numerics, "Sampling"): radix selection gives exactly the token that a
 * full sort with the same integer weights gives, for every mixture of parameters; draws follow the
 * distribution; ties go to the lower id. */
#include "tests/engine_util.h"

#include <math.h>

#include "kernels/math.h"
#include "kernels/sample.h"

enum { VOCAB = 777 };

static void *scratch;

static int setup(void **state)
{
    scratch = aligned_alloc(64, td_sampler_scratch_bytes(VOCAB));
    return scratch ? 0 : -1;
}

static int teardown(void **state)
{
    free(scratch);
    return 0;
}

/* The definition, by sorting. */
typedef struct entry {
    uint32_t id;
    float x;
    uint64_t w;
} entry;

static int by_rank(const void *a, const void *b)
{
    const entry *p = a, *q = b;
    if (p->x != q->x)
        return p->x > q->x ? -1 : 1;
    return p->id < q->id ? -1 : 1;
}

static int by_id(const void *a, const void *b)
{
    return ((const entry *)a)->id < ((const entry *)b)->id ? -1 : 1;
}

static uint32_t reference(const float *logits, const td_sampling *s, const uint32_t *ids, size_t n,
                          size_t n_prompt, uint32_t choice)
{
    static entry e[VOCAB];
    uint32_t kept = VOCAB;
    for (uint32_t i = 0; i < VOCAB; i++) {
        float l = logits[i], count = 0;
        int seen = 0;
        for (uint32_t b = 0; b < s->n_bias; b++)
            l += s->bias[b].id == i ? s->bias[b].bias : 0.0f;
        for (size_t k = 0; k < n; k++) {
            seen |= ids[k] == i;
            count += k >= n_prompt && ids[k] == i;
        }
        if (seen && s->repetition_penalty != 1.0f)
            l = l > 0 ? l / s->repetition_penalty : l * s->repetition_penalty;
        if (count > 0) {
            l -= count * s->frequency_penalty;
            l -= s->presence_penalty;
        }
        e[i] = (entry){i, l / s->temperature, 0};
    }
    qsort(e, VOCAB, sizeof *e, by_rank);
    float max = e[0].x;
    for (uint32_t i = 0; i < VOCAB; i++)
        td_exp_weights(&e[i].x, max, &e[i].w, 1);
    if (s->top_k && s->top_k < kept)
        kept = s->top_k;
    unsigned __int128 z = 0, sum = 0;
    for (uint32_t i = 0; i < kept; i++)
        z += e[i].w;
    if (s->top_p < 1.0f) {
        /* ceil(p z), p an exact binary fraction */
        unsigned __int128 p = (uint64_t)((double)s->top_p * 9223372036854775808.0);
        uint64_t target = (uint64_t)((p * (uint64_t)z + (((unsigned __int128)1 << 63) - 1)) >> 63);
        uint32_t i = 0;
        while (i < kept && sum < target)
            sum += e[i++].w;
        kept = i;
    }
    uint64_t least = s->min_p > 0.0f ? (uint64_t)ceil((double)s->min_p * 4294967296.0) : 1;
    uint32_t m = 0;
    for (uint32_t i = 0; i < kept; i++)
        if (e[i].w >= least)
            e[m++] = e[i];
    z = 0;
    for (uint32_t i = 0; i < m; i++)
        z += e[i].w;
    qsort(e, m, sizeof *e, by_id);
    uint64_t at =
        (uint64_t)(((unsigned __int128)td_rand(s->seed, (uint32_t)n, choice, TD_RAND_SAMPLE) *
                    (uint64_t)z) >>
                   64);
    uint32_t i = 0;
    while (at >= e[i].w)
        at -= e[i++].w;
    return e[i].id;
}

static float uniform(td_rng *r)
{
    return (float)(td_rng_next(r) >> 40) / 16777216.0f;
}

static void radix_selection_is_the_sort(void **state)
{
    td_rng r = {3, 0};
    for (int round = 0; round < 400; round++) {
        float logits[VOCAB];
        uint32_t ids[40];
        td_logit_bias bias[5];
        uint32_t grid = 1u << td_rng_below(&r, 12); /* coarse grids make many ties */
        for (int i = 0; i < VOCAB; i++)
            logits[i] = roundf((uniform(&r) - 0.5f) * 20.0f * (float)grid) / (float)grid;
        test_random_ids(td_rng_next(&r), VOCAB, ids, 40);
        for (int i = 0; i < 5; i++)
            bias[i] = (td_logit_bias){(uint32_t)td_rng_below(&r, 100) * 5 + (uint32_t)i,
                                      (uniform(&r) - 0.5f) * 10.0f};
        td_sampling s = {.temperature = 0.1f + uniform(&r) * 2.0f,
                         .top_p = td_rng_below(&r, 2) ? 1.0f : 0.01f + uniform(&r) * 0.98f,
                         .min_p = td_rng_below(&r, 3) ? 0.0f : uniform(&r) * 0.3f,
                         .top_k =
                             td_rng_below(&r, 2) ? 0 : 1 + (uint32_t)td_rng_below(&r, VOCAB + 5),
                         .frequency_penalty = td_rng_below(&r, 2) ? 0.0f : uniform(&r),
                         .presence_penalty = td_rng_below(&r, 2) ? 0.0f : uniform(&r),
                         .repetition_penalty = td_rng_below(&r, 2) ? 1.0f : 1.0f + uniform(&r),
                         .seed = td_rng_next(&r),
                         .bias = bias,
                         .n_bias = td_rng_below(&r, 2) ? 0 : 5};
        td_sample got;
        td_sampler_sample(logits, VOCAB, &s, ids, 40, 25, 3, NULL, 0, scratch, &got);
        uint32_t want = reference(logits, &s, ids, 40, 25, 3);
        if (got.id != want)
            fail_msg("round %d: %u, the sort says %u", round, got.id, want);
    }
}

static void temperature_zero_takes_the_lowest_of_the_best(void **state)
{
    float logits[VOCAB] = {0};
    uint32_t ids[1] = {0}, banned = 5;
    logits[5] = logits[9] = logits[700] = 3.0f;
    td_sampling s = {.top_p = 1.0f, .repetition_penalty = 1.0f};
    td_sample got;
    td_sampler_sample(logits, VOCAB, &s, ids, 1, 1, 0, NULL, 0, scratch, &got);
    assert_int_equal(got.id, 5);
    td_sampler_sample(logits, VOCAB, &s, ids, 1, 1, 0, &banned, 1, scratch, &got);
    assert_int_equal(got.id, 9);
    s.temperature = 1.0f;
    s.top_k = 1;
    td_sampler_sample(logits, VOCAB, &s, ids, 1, 1, 0, &banned, 1, scratch, &got);
    assert_int_equal(got.id, 9);
}

/* 40,000 draws over 8 ids: chi-square with 7 degrees of freedom below 29.9 (p = 1e-4; the seed is
 * fixed). */
static void draws_follow_the_distribution(void **state)
{
    float logits[VOCAB];
    double p[8], z = 0, chi = 0;
    uint32_t count[8] = {0}, ids[1] = {0};
    for (int i = 0; i < VOCAB; i++)
        logits[i] = i < 8 ? (float)i * 0.3f : -50.0f;
    for (int i = 0; i < 8; i++)
        z += p[i] = exp((double)logits[i]);
    td_sampling s = {.temperature = 1.0f, .top_p = 1.0f, .repetition_penalty = 1.0f};
    for (uint64_t i = 0; i < 40000; i++) {
        td_sample got;
        s.seed = i;
        td_sampler_sample(logits, VOCAB, &s, ids, 1, 1, 0, NULL, 0, scratch, &got);
        assert_true(got.id < 8);
        count[got.id]++;
    }
    for (int i = 0; i < 8; i++) {
        double want = 40000 * p[i] / z;
        chi += (count[i] - want) * (count[i] - want) / want;
    }
    assert_true(chi < 29.9);
}

static void logprobs_are_log_softmax(void **state)
{
    float logits[VOCAB];
    td_rng r = {8, 0};
    double z = 0;
    for (int i = 0; i < VOCAB; i++)
        logits[i] = (uniform(&r) - 0.5f) * 30.0f;
    logits[3] = logits[400] = 20.0f;
    for (int i = 0; i < VOCAB; i++)
        z += exp((double)logits[i]);
    for (uint32_t i = 0; i < VOCAB; i += 50) {
        td_logprob lp;
        td_sampler_logprob(logits, VOCAB, i, 20, &lp);
        assert_true(fabs((double)lp.logprob - ((double)logits[i] - log(z))) <
                    2e-6 * (1 + fabs((double)lp.logprob)));
        assert_int_equal(lp.n_top, 20);
        assert_int_equal(lp.top_ids[0], 3);
        assert_int_equal(lp.top_ids[1], 400);
        for (int k = 1; k < 20; k++)
            assert_true(lp.top[k] <= lp.top[k - 1]);
    }
}

/* A seed gives another token at another position or choice, and the same one again. */
static void randomness_is_a_function(void **state)
{
    float logits[VOCAB] = {0};
    uint32_t ids[64] = {0}, same = 0;
    td_sampling s = {.temperature = 1.0f, .top_p = 1.0f, .repetition_penalty = 1.0f, .seed = 12};
    td_sample first, again;
    td_sampler_sample(logits, VOCAB, &s, ids, 10, 5, 0, NULL, 0, scratch, &first);
    td_sampler_sample(logits, VOCAB, &s, ids, 10, 5, 0, NULL, 0, scratch, &again);
    assert_int_equal(first.id, again.id);
    for (uint32_t i = 1; i <= 50; i++) {
        td_sampler_sample(logits, VOCAB, &s, ids, 10, 5, i, NULL, 0, scratch, &again);
        same += again.id == first.id;
        td_sampler_sample(logits, VOCAB, &s, ids, 10 + i, 5, 0, NULL, 0, scratch, &again);
        same += again.id == first.id;
    }
    assert_true(same < 5);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(radix_selection_is_the_sort),
        cmocka_unit_test(temperature_zero_takes_the_lowest_of_the_best),
        cmocka_unit_test(draws_follow_the_distribution),
        cmocka_unit_test(logprobs_are_log_softmax),
        cmocka_unit_test(randomness_is_a_function),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
