/* SPDX-License-Identifier: Apache-2.0 */
/* Promise 5 on a nearly full prefill pool: recoveries of several choices need blocks for each of
 * them, and two such that held some and waited for more used to wait for each other until their
 * deadline. Real processes. */
#include "tests/edge/cluster.h"

#define MODEL TD_SOURCE_DIR "/tests/goldens/models/glm-shared"

enum { N = 3, BLOCKS = 20, TOKENS = 8 };

static cluster cl;
static request first[N], again[N];

static void fill(request *r, uint32_t i, uint32_t attempt)
{
    td_rng rng = {.seed = 40 + i};
    memset(r, 0, sizeof *r);
    r->n_prompt = 64 * (BLOCKS - 1) + 10;
    for (size_t k = 0; k < r->n_prompt; k++)
        r->prompt[k] = (uint32_t)td_rng_below(&rng, 250);
    r->max_tokens = TOKENS;
    r->n = 2;
    r->attempt = attempt;
    r->temperature = 0.8f;
    r->repetition_penalty = 1;
    r->seed = i;
    r->timeout_us = 20 * TD_S;
    snprintf(r->id, sizeof r->id, "p%u", i);
}

static void must_have(const request *r, const request *like)
{
    for (uint32_t c = 0; c < 2; c++) {
        assert_int_equal(r->n_tokens[c], TOKENS);
        for (uint32_t e = r->n_emitted[c] ? r->n_emitted[c] - 1 : 0; e < TOKENS; e++)
            assert_memory_equal(&r->tokens[c][e], &like->tokens[c][e], sizeof(token));
    }
}

static void recoveries_of_choices(void **state)
{
    (void)state;
    for (uint32_t i = 0; i < N; i++) {
        fill(&first[i], i, 1);
        request_start(&cl, &first[i]);
        request_wait(&cl, &first[i]);
        request_must_succeed(&first[i]);
    }
    for (uint32_t i = 0; i < N; i++) {
        request *r = &again[i];
        fill(r, i, 2);
        for (uint32_t c = 0; c < 2; c++) {
            r->n_emitted[c] = 2 + i + c;
            for (uint32_t e = 0; e < r->n_emitted[c]; e++)
                r->emitted[c][e] = first[i].tokens[c][e].id;
        }
        request_start(&cl, r);
    }
    for (uint32_t i = 0; i < N; i++) {
        request_wait(&cl, &again[i]);
        request_must_succeed(&again[i]);
        must_have(&again[i], &first[i]);
    }
}

/* One that waits for its promise holds up nobody for ever, also when those in front are cancelled.
 */
static void cancelled_in_the_middle(void **state)
{
    (void)state;
    for (int round = 0; round < 4; round++) {
        for (uint32_t i = 0; i < N; i++) {
            request *r = &again[i];
            fill(r, i, 3 + (uint32_t)round);
            for (uint32_t c = 0; c < 2; c++) {
                r->n_emitted[c] = 3;
                for (uint32_t e = 0; e < 3; e++)
                    r->emitted[c][e] = first[i].tokens[c][e].id;
            }
            request_start(&cl, r);
        }
        for (int k = 0; k < round; k++)
            cluster_turn(&cl);
        if (again[0].call[1])
            td_call_cancel(again[0].call[1], "test");
        for (uint32_t i = 0; i < N; i++)
            request_wait(&cl, &again[i]);
        for (uint32_t i = 1; i < N; i++) {
            request_must_succeed(&again[i]);
            must_have(&again[i], &first[i]);
        }
    }
}

static int setup(void **state)
{
    (void)state;
    char kv[128];
    cluster_open(&cl);
    snprintf(kv, sizeof kv, "ipc://%s/kv.sock", cl.dir);
    start_decode(&cl, MODEL, kv, "200");
    start_prefill(&cl, MODEL, "64", "45"); /* two choices of one request fit, and no third */
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    stop_worker(&cl, 0);
    stop_worker(&cl, 1);
    cluster_close(&cl);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(recoveries_of_choices),
                                       cmocka_unit_test(cancelled_in_the_middle)};
    return cmocka_run_group_tests(tests, setup, teardown);
}
