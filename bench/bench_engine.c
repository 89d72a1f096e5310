/* SPDX-License-Identifier: Apache-2.0 */
/* bench_engine DIR [THREADS [ACT]]: tokens per second of the engine alone, prefill by chunk and
 * decode by batch. Prints a table; medians of several runs. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/clock.h"
#include "base/rand.h"
#include "engine/engine.h"

enum { RUNS = 5, CONTEXT = 512, STEPS = 64, BATCH_MAX = 16 };

static void die(const char *what, const td_err *err)
{
    fprintf(stderr, "bench_engine: %s: %s\n", what, err && err->text[0] ? err->text : "failed");
    exit(1);
}

static td_seq *new_seq(td_engine *e, uint32_t n_prompt, uint64_t seed)
{
    const td_model_info *info = td_engine_info(e);
    uint32_t ids[CONTEXT];
    td_rng rng = {seed, 0};
    for (uint32_t i = 0; i < n_prompt; i++)
        ids[i] = (uint32_t)td_rng_below(&rng, info->vocab_size);
    td_seq_spec spec = {.ids = ids,
                        .n_ids = n_prompt,
                        .n_prompt = n_prompt,
                        .max_tokens = info->max_context - n_prompt,
                        .ignore_eos = 1,
                        .sampling = {.top_p = 1.0f, .repetition_penalty = 1.0f}};
    td_seq *s = NULL;
    td_err err = {0};
    if (td_seq_new(e, &spec, &s, &err) < 0)
        die("sequence", &err);
    return s;
}

/* CPU time of the process: what wall time would be with the cores to ourselves. */
static uint64_t cpu_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (uint64_t)t.tv_sec * 1000000u + (uint64_t)t.tv_nsec / 1000u;
}

/* Tokens per second of wall and of CPU time. */
typedef struct rate {
    double wall, cpu;
} rate;

static rate prefill(td_engine *e, uint32_t n, uint32_t chunk, uint64_t seed)
{
    td_seq *s = new_seq(e, n, seed);
    td_sample sample;
    if (td_seq_reserve(s, n) < 0)
        die("blocks", NULL);
    uint64_t start = td_now_us(), cpu = cpu_us();
    for (uint32_t at = 0; at < n; at += chunk) {
        uint32_t len = n - at < chunk ? n - at : chunk;
        td_step_item it = {.seq = s, .n_tokens = len, .n_samples = at + len == n};
        if (td_engine_step(e, &it, 1, &sample) < 0)
            die("step", NULL);
    }
    rate r = {n * 1e6 / (double)(td_now_us() - start), n * 1e6 / (double)(cpu_us() - cpu)};
    td_seq_free(s);
    return r;
}

static rate decode(td_engine *e, uint32_t batch, uint32_t context)
{
    td_seq *s[BATCH_MAX];
    td_step_item items[BATCH_MAX];
    td_sample samples[BATCH_MAX];
    for (uint32_t i = 0; i < batch; i++) {
        s[i] = new_seq(e, context, 1000 + i);
        if (td_seq_reserve(s[i], context + STEPS + 1) < 0)
            die("blocks", NULL);
        td_step_item it = {.seq = s[i], .n_tokens = context, .n_samples = 1};
        if (td_engine_step(e, &it, 1, &samples[i]) < 0)
            die("step", NULL);
    }
    uint64_t start = td_now_us(), cpu = cpu_us();
    for (int k = 0; k < STEPS; k++) {
        for (uint32_t i = 0; i < batch; i++) {
            td_seq_append(s[i], samples[i].id);
            items[i] = (td_step_item){.seq = s[i], .n_tokens = 1, .n_samples = 1};
        }
        if (td_engine_step(e, items, batch, samples) < 0)
            die("step", NULL);
    }
    double n = (double)batch * STEPS * 1e6;
    rate r = {n / (double)(td_now_us() - start), n / (double)(cpu_us() - cpu)};
    for (uint32_t i = 0; i < batch; i++)
        td_seq_free(s[i]);
    return r;
}

static int by_wall(const void *a, const void *b)
{
    double x = ((const rate *)a)->wall, y = ((const rate *)b)->wall;
    return x < y ? -1 : x > y;
}

static void print(const char *what, uint32_t a, const char *at, uint32_t b, rate *v)
{
    qsort(v, RUNS, sizeof *v, by_wall);
    printf("%-8s %4u %s %4u  %9.0f tok/s  (%.0f..%.0f)  %9.0f per CPU second\n", what, a, at, b,
           v[RUNS / 2].wall, v[0].wall, v[RUNS - 1].wall, v[RUNS / 2].cpu);
}

int main(int argc, char **argv)
{
    if (argc < 2) {
        fprintf(stderr, "usage: bench_engine DIR [THREADS [f32|bf16]]\n");
        return 2;
    }
    td_err err = {0};
    td_model *m = NULL;
    td_engine *e = NULL;
    td_dtype act = argc > 3 && strcmp(argv[3], "f32") == 0 ? TD_F32 : TD_BF16;
    td_model_options o = {.isa = "auto", .act = act, .kv = act, .index = act, .n_ranks = 1};
    o.n_threads = argc > 2 ? (uint32_t)strtoul(argv[2], NULL, 10) : 1;
    uint64_t start = td_now_us();
    if (td_model_open(argv[1], &o, &m, &err) < 0)
        die(argv[1], &err);
    double load_ms = (double)(td_now_us() - start) / 1000.0;
    td_engine_limits limits = {
        .max_rows = CONTEXT, .max_seqs = BATCH_MAX, .kv_bytes = 256ull << 20};
    if (td_engine_open(m, &limits, &e, &err) < 0)
        die("engine", &err);
    const td_model_info *info = td_model_get_info(m);
    uint32_t context =
        info->max_context < CONTEXT + STEPS + 2 ? info->max_context - STEPS - 2 : CONTEXT;
    printf("model %s  threads %u  act %s  load %.0f ms  weights %.1f MB\n", argv[1], o.n_threads,
           td_dtype_name(act), load_ms, (double)info->weight_bytes / 1e6);
    rate v[RUNS];
    for (uint32_t chunk = 16; chunk <= context; chunk *= 4) {
        for (int i = 0; i < RUNS; i++)
            v[i] = prefill(e, context, chunk, (uint64_t)i + 1);
        print("prefill", context, "tokens, chunk", chunk, v);
    }
    static const uint32_t batches[] = {1, 2, 4, 8, 16};
    for (size_t b = 0; b < sizeof batches / sizeof *batches; b++) {
        for (int i = 0; i < RUNS; i++)
            v[i] = decode(e, batches[b], context / 2);
        print("decode", batches[b], "sequences, at", context / 2, v);
    }
    td_engine_free(e);
    td_model_free(m);
    return 0;
}
