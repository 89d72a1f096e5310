/* SPDX-License-Identifier: Apache-2.0 */
/* bench_engine DIR [THREADS [ACT [CONTEXT ... | busy]]]: tokens per second of the engine alone.
 * Without contexts: prefill of 512 tokens by chunk, decode by batch. With contexts: prefill of so
 * many tokens in chunks of 512, and decode of one and, up to 1,024, of 8 sequences that are as
 * long. Prints a table; medians of several runs, the runs of a table in turns, so that a noisy
 * minute falls on all of its rows. ACT: f32, bf16, or i8 (bf16, and int8 where weights are MXFP4:
 * the default). Beside each run the machine's roof is measured: what it reads from memory and
 * multiplies. A row ends with the products' bytes and operations a second, and the part of the roof
 * that they are (the larger of the two; attention is not counted). The line below says where its
 * time went; of one thread, its CPU time. busy: threads are pinned, each to a core; prefill and
 * decode alone, then beside a stranger that never rests on the first core, then on the last, in
 * turns. n threads share n cores with it: the floor of the slowdown is n / (n - 1/2). */
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/clock.h"
#include "base/rand.h"
#include "bench/count.h"
#include "bench/roof.h"
#include "engine/engine.h"
#include "net/service.h"

enum { RUNS = 5, CONTEXT = 512, STEPS = 64, BATCH_MAX = 16, ROWS_MAX = 32 };
enum { MANY_CONTEXT = 1024 }; /* longer ones are measured with one sequence: patience */

static void die(const char *what, const td_err *err)
{
    fprintf(stderr, "bench_engine: %s: %s\n", what, err && err->text[0] ? err->text : "failed");
    exit(1);
}

static td_seq *new_seq(td_engine *e, uint32_t n_prompt, uint64_t seed)
{
    const td_model_info *info = td_engine_info(e);
    uint32_t *ids = malloc(n_prompt * sizeof *ids);
    td_rng rng = {seed, 0};
    if (!ids)
        die("memory", NULL);
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
    free(ids);
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
    double gbytes, gops; /* of the products, each second of wall time */
    double read, peak;   /* the roof just before */
    double us[TD_COUNT_OPS], all_us;
} rate;

typedef struct stopwatch {
    uint64_t wall, cpu;
    td_count count;
} stopwatch;

static stopwatch start_watch(void)
{
    return (stopwatch){td_now_us(), cpu_us(), td_counted};
}

static rate rate_of(const stopwatch *w, double tokens)
{
    double us = (double)(td_now_us() - w->wall), cpu = (double)(cpu_us() - w->cpu);
    rate r = {.wall = tokens * 1e6 / us,
              .cpu = tokens * 1e6 / cpu,
              .gbytes = (td_counted.bytes - w->count.bytes) / us / 1e3,
              .gops = (td_counted.operations - w->count.operations) / us / 1e3,
              .all_us = td_count_by_cpu ? cpu : us};
    for (int i = 0; i < TD_COUNT_OPS; i++)
        r.us[i] = td_counted.us[i] - w->count.us[i];
    return r;
}

static void fill(td_seq *s, td_engine *e, uint32_t n, uint32_t chunk, td_sample *ret_sample)
{
    for (uint32_t at = 0; at < n; at += chunk) {
        uint32_t len = n - at < chunk ? n - at : chunk;
        td_step_item it = {.seq = s, .n_tokens = len, .n_samples = at + len == n};
        if (td_engine_step(e, &it, 1, ret_sample) < 0)
            die("step", NULL);
    }
}

static rate prefill(td_engine *e, uint32_t n, uint32_t chunk, uint64_t seed)
{
    td_seq *s = new_seq(e, n, seed);
    td_sample sample;
    if (td_seq_reserve(s, n) < 0)
        die("blocks", NULL);
    stopwatch w = start_watch();
    fill(s, e, n, chunk, &sample);
    rate r = rate_of(&w, n);
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
        fill(s[i], e, context, CONTEXT, &samples[i]);
    }
    stopwatch w = start_watch();
    for (int k = 0; k < STEPS; k++) {
        for (uint32_t i = 0; i < batch; i++) {
            td_seq_append(s[i], samples[i].id);
            items[i] = (td_step_item){.seq = s[i], .n_tokens = 1, .n_samples = 1};
        }
        if (td_engine_step(e, items, batch, samples) < 0)
            die("step", NULL);
    }
    rate r = rate_of(&w, (double)batch * STEPS);
    for (uint32_t i = 0; i < batch; i++)
        td_seq_free(s[i]);
    return r;
}

static int by_wall(const void *a, const void *b)
{
    double x = ((const rate *)a)->wall, y = ((const rate *)b)->wall;
    return x < y ? -1 : x > y;
}

/* One row of the table. batch 0: prefill of context tokens by chunk. */
typedef struct row {
    uint32_t batch, context, chunk;
    rate v[RUNS];
} row;

/* Milliseconds of a step of decode, or of a prefill. */
static void print_parts(const rate *m, double steps)
{
    double rest = m->all_us;
    printf("        ms%s: %.2f =", td_count_by_cpu ? " of CPU time" : "", m->all_us / steps / 1e3);
    for (int i = 0; i < TD_COUNT_OPS; i++) {
        rest -= m->us[i];
        if (m->us[i] > 0)
            printf(" %s %.2f +", td_count_names[i], m->us[i] / steps / 1e3);
    }
    printf(" rest %.2f\n", rest / steps / 1e3);
}

static void print(row *r)
{
    qsort(r->v, RUNS, sizeof *r->v, by_wall);
    if (r->batch)
        printf("decode   %4u sequences, at %4u   ", r->batch, r->context);
    else
        printf("prefill  %4u tokens, chunk %4u   ", r->context, r->chunk);
    const rate *m = &r->v[RUNS / 2];
    double by_bytes = m->gbytes / m->read, by_ops = m->gops / m->peak;
    printf("%9.1f tok/s  (%.1f..%.1f)  %9.1f per CPU second  %6.1f of %5.1f GB/s  %6.1f of %6.1f "
           "G/s  roof %3.0f %%\n",
           m->wall, r->v[0].wall, r->v[RUNS - 1].wall, m->cpu, m->gbytes, m->read, m->gops, m->peak,
           100 * (by_bytes > by_ops ? by_bytes : by_ops));
    print_parts(m, r->batch ? STEPS : 1);
}

/* The widest multiply-add that this profile's products use. */
static td_roof_kind kind_of(const td_model_info *info)
{
    const char *text = info->profile;
    if (!strstr(text, "isa=avx512"))
        return TD_ROOF_FMA256;
    if (!strstr(text, "isa=avx512bf16vnni") || strstr(text, "act=f32"))
        return TD_ROOF_FMA512;
    return strstr(text, "act.mxfp4=i8g32") ? TD_ROOF_INT8 : TD_ROOF_BF16;
}

static void run(td_engine *e, td_roof_kind kind, uint32_t threads, row *rows, uint32_t n)
{
    for (int i = 0; i < RUNS; i++)
        for (row *r = rows; r < rows + n; r++) {
            double read = td_roof_read(threads), peak = td_roof_operations(kind, threads);
            r->v[i] = r->batch ? decode(e, r->batch, r->context)
                               : prefill(e, r->context, r->chunk, (uint64_t)i + 1);
            r->v[i].read = read;
            r->v[i].peak = peak;
        }
    for (row *r = rows; r < rows + n; r++)
        print(r);
}

static void pin(int core)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET((size_t)core, &set);
    pthread_setaffinity_np(pthread_self(), sizeof set, &set);
}

typedef struct stranger {
    pthread_t thread;
    int core;
    _Atomic int stop;
} stranger;

static void *never_rests(void *arg)
{
    stranger *s = arg;
    pin(s->core);
    while (!atomic_load_explicit(&s->stop, memory_order_relaxed))
        ;
    return NULL;
}

/* rows[0] prefill, rows[1] decode; core < 0: alone. */
static void run_beside(td_engine *e, int core, int turn, row *rows)
{
    stranger s = {.core = core};
    if (core >= 0 && pthread_create(&s.thread, NULL, never_rests, &s) != 0)
        die("thread", NULL);
    rows[0].v[turn] = prefill(e, rows[0].context, rows[0].chunk, (uint64_t)turn + 1);
    rows[1].v[turn] = decode(e, rows[1].batch, rows[1].context);
    if (core < 0)
        return;
    atomic_store(&s.stop, 1);
    pthread_join(s.thread, NULL);
}

static void run_busy(td_engine *e, const int *cores, uint32_t threads, const row *usual)
{
    const int beside[] = {-1, cores[0], cores[threads - 1]};
    row rows[3][2];
    for (int b = 0; b < 3; b++)
        memcpy(rows[b], usual, sizeof rows[b]);
    for (int turn = 0; turn < RUNS; turn++)
        for (int b = 0; b < 3; b++)
            run_beside(e, beside[b], turn, rows[b]);
    for (int b = 0; b < 3; b++) {
        double of[2];
        for (int i = 0; i < 2; i++) {
            qsort(rows[b][i].v, RUNS, sizeof(rate), by_wall);
            of[i] = rows[b][i].v[RUNS / 2].wall;
        }
        char where[32] = "alone";
        if (b)
            snprintf(where, sizeof where, "stranger on core %d", beside[b]);
        printf("%-20s prefill %u %9.1f tok/s (%.2f times slower)   decode %9.1f tok/s (%.2f times "
               "slower)\n",
               where, usual[0].context, of[0], rows[0][0].v[RUNS / 2].wall / of[0], of[1],
               rows[0][1].v[RUNS / 2].wall / of[1]);
    }
    if (threads > 1)
        printf("floor                %.2f times slower\n", threads / (threads - 0.5));
}

/* Chunks and batches at one context. */
static uint32_t usual_rows(uint32_t max_context, row *rows)
{
    uint32_t context = max_context < CONTEXT + STEPS + 2 ? max_context - STEPS - 2 : CONTEXT, n = 0;
    for (uint32_t chunk = 16; chunk <= context; chunk *= 4)
        rows[n++] = (row){.context = context, .chunk = chunk};
    for (uint32_t batch = 1; batch <= BATCH_MAX; batch *= 2)
        rows[n++] = (row){.batch = batch, .context = context / 2};
    return n;
}

static uint32_t context_rows(char **words, uint32_t max_context, row *rows)
{
    uint32_t n = 0;
    for (; *words && n + 3 <= ROWS_MAX; words++) {
        uint32_t context = (uint32_t)strtoul(*words, NULL, 10);
        if (context == 0 || context + STEPS + 2 > max_context) {
            fprintf(stderr, "bench_engine: context %s: the model has %u positions\n", *words,
                    max_context);
            exit(2);
        }
        rows[n++] = (row){.context = context, .chunk = CONTEXT};
        rows[n++] = (row){.batch = 1, .context = context};
        if (context <= MANY_CONTEXT)
            rows[n++] = (row){.batch = 8, .context = context};
    }
    return n;
}

int main(int argc, char **argv)
{
    if (argc < 2) {
        fprintf(stderr, "usage: bench_engine DIR [THREADS [f32|bf16|i8 [CONTEXT ... | busy]]]\n");
        return 2;
    }
    td_err err = {0};
    td_model *m = NULL;
    td_engine *e = NULL;
    const char *word = argc > 3 ? argv[3] : "i8";
    td_dtype act = strcmp(word, "f32") == 0 ? TD_F32 : TD_BF16;
    td_model_options o = {.backend = td_count_on(td_backend_get("auto")),
                          .act = act,
                          .act_i8 = strcmp(word, "i8") == 0,
                          .kv = act,
                          .index = act,
                          .n_ranks = 1};
    o.n_threads = argc > 2 ? (uint32_t)strtoul(argv[2], NULL, 10) : 1;
    td_count_by_cpu = o.n_threads == 1;
    int busy = argc > 4 && strcmp(argv[4], "busy") == 0, cores[TD_ROOF_THREADS];
    if (busy) {
        int granted = td_cores_granted(cores, TD_ROOF_THREADS);
        if (o.n_threads < 1 || granted < (int)o.n_threads)
            die("busy: threads must be as many as the cores granted, or fewer", NULL);
        o.cores = cores;
        o.n_cores = o.n_threads;
    }
    uint64_t start = td_now_us();
    if (td_model_open(argv[1], &o, &m, &err) < 0)
        die(argv[1], &err);
    double load_ms = (double)(td_now_us() - start) / 1000.0;
    const td_model_info *info = td_model_get_info(m);
    row rows[ROWS_MAX];
    char *busy_words[] = {"512", NULL};
    uint32_t n = busy       ? context_rows(busy_words, info->max_context, rows)
                 : argc > 4 ? context_rows(argv + 4, info->max_context, rows)
                            : usual_rows(info->max_context, rows);
    td_engine_limits limits = {.max_rows = CONTEXT, .max_seqs = BATCH_MAX};
    for (uint32_t i = 0; i < n; i++) { /* blocks of the largest row */
        uint32_t blocks =
            (rows[i].batch ? rows[i].batch : 1) * ((rows[i].context + STEPS) / 64 + 2);
        limits.n_blocks = blocks > limits.n_blocks ? blocks : limits.n_blocks;
    }
    if (td_engine_open(m, &limits, &e, &err) < 0)
        die("engine", &err);
    printf("model %s  threads %u  act %s  load %.0f ms  weights %.1f MB\n", argv[1], o.n_threads,
           word, load_ms, (double)info->weight_bytes / 1e6);
    td_roof_kind kind = kind_of(info);
    printf(
        "roof: reads of %u and of 1 threads %.1f and %.1f GB/s, %s multiplies and adds %.0f G/s\n",
        o.n_threads, td_roof_read(o.n_threads), td_roof_read(1), td_roof_kinds[kind].name,
        td_roof_operations(kind, o.n_threads));
    if (busy)
        run_busy(e, cores, o.n_threads, rows);
    else
        run(e, kind, o.n_threads, rows, n);
    td_engine_free(e);
    td_model_free(m);
    return 0;
}
