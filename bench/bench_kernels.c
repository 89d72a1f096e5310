/* SPDX-License-Identifier: Apache-2.0 */
/* bench_kernels [ISA [CONTEXT [ROWS]]]: attention, indexer and sampler alone, on one thread and by
 * its CPU time. The last ROWS rows of a sequence of CONTEXT positions, BF16 cache. D: 16 heads of
 * 128 over 8; M: 16 heads over latents of 512 + 64, all positions or the 512 that an indexer of 8
 * heads of 128 selected. Sampler: 154,880 logits, nearly normal. Operations are multiplies and adds
 * of scores and values; of a machine that is shared compare only figures of one run. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/rand.h"
#include "kernels/kernels.h"
#include "kernels/math.h"
#include "kernels/sample.h"

enum { HEADS = 16, GROUPS = 8, DIMS = 128, LATENT = 512, ROPE = 64, NOPE = 192, TOPK = 512 };
enum { INDEX_HEADS = 8, VOCAB = 154880 };

typedef struct bench {
    const td_backend *be;
    td_queue *q;
    td_step step;
    float *in, *out, *weight;
    uint32_t *selected, *n_selected;
    td_sample_row row;
} bench;

static double cpu_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void *need(size_t bytes)
{
    void *p = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!p) {
        fprintf(stderr, "bench_kernels: out of memory\n");
        exit(1);
    }
    return p;
}

static float *normal(size_t n, float scale)
{
    td_rng rng = {1, 0};
    float *f = need(n * sizeof *f);
    for (size_t i = 0; i < n; i++) {
        uint64_t w = td_rng_next(&rng);
        uint64_t sum = (w & 0xffff) + (w >> 16 & 0xffff) + (w >> 32 & 0xffff) + (w >> 48);
        f[i] = ((float)sum - 131070.0f) * 2.6429e-5f * scale;
    }
    return f;
}

static void grouped(bench *b)
{
    td_attend_gqa a = {.q = b->in,
                       .scale = 0.088f,
                       .n_heads = HEADS,
                       .n_kv_heads = GROUPS,
                       .dims = DIMS,
                       .kv = TD_BF16,
                       .o = b->out};
    b->step.block_bytes = 64ul * 2 * GROUPS * DIMS * 2;
    b->be->attend_gqa(b->q, &b->step, &a);
}

static void latent(bench *b)
{
    td_attend_mla a = {.q_lat = b->in,
                       .q = b->in,
                       .scale = 0.0625f,
                       .n_heads = HEADS,
                       .latent = LATENT,
                       .nope = NOPE,
                       .rope_dims = ROPE,
                       .kv = TD_BF16,
                       .o_lat = b->out,
                       .selected = b->selected,
                       .n_selected = b->n_selected,
                       .topk = TOPK};
    b->step.block_bytes = 64ul * (LATENT + ROPE) * 2;
    b->be->attend_mla(b->q, &b->step, &a);
}

static void choose(bench *b)
{
    td_index_select a = {.q = b->in,
                         .weight = b->weight,
                         .scale = 0.03f,
                         .n_heads = INDEX_HEADS,
                         .dims = DIMS,
                         .topk = TOPK,
                         .index = TD_BF16,
                         .selected = b->selected,
                         .n_selected = b->n_selected};
    b->step.block_bytes = 64ul * DIMS * 2;
    b->be->index_select(b->q, &b->step, &a);
}

static void draw(bench *b)
{
    b->row.random += 0x9e3779b97f4a7c15ull;
    td_sample_draw(&b->row);
}

/* Best of five: what a shared machine disturbs least. */
static void measure(bench *b, const char *what, void (*run)(bench *b), double operations)
{
    double best = 1e9;
    run(b);
    for (int i = 0; i < 5; i++) {
        int n = 0;
        double start = cpu_s(), t;
        do {
            run(b);
            n++;
        } while ((t = cpu_s() - start) < 0.1);
        best = t / n < best ? t / n : best;
    }
    printf("%-28s %9.3f ms", what, best * 1e3);
    if (operations > 0)
        printf("  %7.1f GF/s", operations / best * 1e-9);
    printf("\n");
}

static void sampler(bench *b)
{
    static const struct {
        const char *name;
        float t, p, min;
        uint32_t k;
    } cases[] = {{"argmax", 0, 1, 0, 0},
                 {"temperature", 1, 1, 0, 0},
                 {"top-p 0.95", 1, 0.95f, 0, 0},
                 {"top-k 20, top-p 0.95", 1, 0.95f, 0, 20},
                 {"min-p 0.05", 1, 1, 0.05f, 0}};
    b->row = (td_sample_row){.logits = normal(VOCAB, 3.0f),
                             .vocab = VOCAB,
                             .repetition_penalty = 1.0f,
                             .scratch = need(td_sample_scratch_bytes(VOCAB))};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        b->row.temperature = cases[i].t;
        b->row.top_p = cases[i].p;
        b->row.min_p = cases[i].min;
        b->row.top_k = cases[i].k;
        measure(b, cases[i].name, draw, 0);
    }
}

static void make(bench *b, uint32_t context, uint32_t rows)
{
    uint32_t blocks = (context + 63) / 64;
    size_t halves = (size_t)blocks * 64 * 2 * GROUPS * DIMS;
    uint16_t *pool = need(halves * 2);
    uint32_t *at = need((2ul * rows + blocks) * sizeof *at);
    float *values = normal(4096, 1.0f);
    for (size_t i = 0; i < halves; i++) {
        uint32_t u;
        memcpy(&u, &values[i % 4093], 4);
        pool[i] = (uint16_t)(u >> 16);
    }
    for (uint32_t i = 0; i < rows; i++) {
        at[i] = context - rows + i;
        at[rows + i] = 0;
    }
    for (uint32_t i = 0; i < blocks; i++)
        at[2 * rows + i] = i;
    b->step = (td_step){.n_rows = rows,
                        .n_seqs = 1,
                        .max_context = context,
                        .positions = at,
                        .seq_of = at + rows,
                        .tables = at + 2ul * rows,
                        .table_stride = blocks,
                        .kv_base = (uint8_t *)pool};
    b->in = normal((size_t)rows * HEADS * LATENT, 0.3f);
    b->out = need((size_t)rows * HEADS * LATENT * sizeof(float));
    b->weight = normal((size_t)rows * INDEX_HEADS, 1.0f);
    b->n_selected = need(rows * sizeof(uint32_t));
}

int main(int argc, char **argv)
{
    const char *isa = argc > 1 ? argv[1] : "auto";
    uint32_t context = argc > 2 ? (uint32_t)strtoul(argv[2], NULL, 10) : 2048;
    uint32_t rows = argc > 3 ? (uint32_t)strtoul(argv[3], NULL, 10) : 128;
    bench b = {.be = td_backend_get(isa)};
    td_err err = {0};
    if (!b.be || rows == 0 || rows > context || context > 1u << 20) {
        fprintf(stderr,
                "usage: bench_kernels [ISA [CONTEXT [ROWS]]]; this machine has no %s, or "
                "ROWS is not 1 to CONTEXT\n",
                isa);
        return 2;
    }
    td_backend_options o = {.act = TD_BF16,
                            .n_threads = 1,
                            .max_rows = rows,
                            .max_context = context,
                            .max_heads = HEADS,
                            .max_row_elems = 2048,
                            .max_round_k = 512};
    td_fp_flush();
    if (b.be->open(&o, &b.q, &err) < 0) {
        fprintf(stderr, "bench_kernels: %s\n", err.text);
        return 1;
    }
    make(&b, context, rows);
    double pairs = 0, seen = (double)rows * (context < TOPK ? context : TOPK);
    for (uint32_t i = 0; i < rows; i++)
        pairs += context - rows + i + 1;
    printf("isa %s  context %u  rows %u\n", b.be->isa, context, rows);
    measure(&b, "attention D", grouped, pairs * HEADS * DIMS * 4);
    measure(&b, "attention M, all", latent, pairs * HEADS * (2.0 * LATENT + ROPE) * 2);
    if (context - rows >= TOPK) {
        b.selected = need((size_t)rows * TOPK * sizeof(uint32_t));
        measure(&b, "indexer", choose, pairs * INDEX_HEADS * DIMS * 2);
        measure(&b, "attention M, selected", latent, seen * HEADS * (2.0 * LATENT + ROPE) * 2);
    }
    sampler(&b);
    b.be->close(b.q);
    return 0;
}
