/* SPDX-License-Identifier: Apache-2.0 */
/* Helpers of the engine's tests. */
#ifndef TD_TESTS_ENGINE_UTIL_H
#define TD_TESTS_ENGINE_UTIL_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/rand.h"
#include "engine/engine.h"
#include "kernels/kernels.h"

typedef struct test_engine {
    td_model *model;
    td_engine *engine;
    const td_model_info *info;
} test_engine;

/* What tests walk; a processor may lack some. */
static const char *const test_isas[] = {"ref", "avx2", "avx512", "avx512bf16vnni"};
enum { TEST_ISAS = 4 };

/* Does this machine run it? What it lacks is named, so that a test that saw less shows it. */
static inline int test_has_isa(const char *isa)
{
    int has = td_backend_get(isa) != NULL;
    if (!has)
        printf("skipped: this processor has no %s\n", isa);
    return has;
}

typedef struct test_setup {
    const char *dir, *isa;     /* NULL: auto */
    const td_backend *backend; /* NULL: by isa */
    td_dtype type;             /* act, kv and index */
    int act_i8, act_fp8, kv_fp8;
    uint32_t threads, max_rows, max_seqs, n_blocks;
} test_setup;

static inline test_engine test_open(test_setup s)
{
    test_engine t = {0};
    td_err err = {0};
    td_model_options o = {.isa = s.isa ? s.isa : "auto",
                          .backend = s.backend,
                          .act = s.type,
                          .act_i8 = s.act_i8,
                          .act_fp8 = s.act_fp8,
                          .kv = s.kv_fp8 ? TD_F8E4M3 : s.type,
                          .index = s.type,
                          .n_threads = s.threads,
                          .n_ranks = 1};
    if (td_model_open(s.dir, &o, &t.model, &err) < 0)
        fail_msg("%s", err.text);
    td_engine_limits l = {.max_rows = s.max_rows, .max_seqs = s.max_seqs, .n_blocks = s.n_blocks};
    if (td_engine_open(t.model, &l, &t.engine, &err) < 0)
        fail_msg("%s", err.text);
    t.info = td_model_get_info(t.model);
    return t;
}

static inline void test_close(test_engine *t)
{
    td_engine_free(t->engine);
    td_model_free(t->model);
    *t = (test_engine){0};
}

static inline td_seq *test_seq(test_engine *t, const uint32_t *ids, size_t n, size_t n_prompt,
                               td_sampling sampling, uint64_t max_tokens)
{
    td_err err = {0};
    td_seq *s = NULL;
    if (sampling.top_p == 0.0f)
        sampling.top_p = 1.0f;
    if (sampling.repetition_penalty == 0.0f)
        sampling.repetition_penalty = 1.0f;
    td_seq_spec spec = {.ids = ids,
                        .n_ids = n,
                        .n_prompt = n_prompt,
                        .sampling = sampling,
                        .max_tokens = max_tokens,
                        .ignore_eos = 1};
    if (td_seq_new(t->engine, &spec, &s, &err) < 0)
        fail_msg("%s", err.text);
    return s;
}

/* Compute everything that is not computed, in chunks; the last step samples one token and may give
 * its logits. */
static inline uint32_t test_prefill(test_engine *t, td_seq *s, uint32_t chunk, float *logits)
{
    size_t n;
    td_sample out = {0};
    td_seq_ids(s, &n);
    assert_int_equal(td_seq_reserve(s, n), 0);
    while (td_seq_computed(s) < n) {
        size_t left = n - td_seq_computed(s);
        uint32_t len = left < chunk ? (uint32_t)left : chunk;
        int last = len == left;
        td_step_item it = {.seq = s,
                           .n_tokens = len,
                           .n_samples = (uint32_t)last,
                           .want_logits = last && logits,
                           .ret_logits = logits};
        assert_int_equal(td_engine_step(t->engine, &it, 1, &out), 0);
    }
    return out.id;
}

static inline void test_random_ids(uint64_t seed, uint32_t vocab, uint32_t *ids, size_t n)
{
    td_rng rng = {seed, 0};
    for (size_t i = 0; i < n; i++)
        ids[i] = (uint32_t)td_rng_below(&rng, vocab);
}

#endif
