/* SPDX-License-Identifier: Apache-2.0 */
/* bench_products [ISA [N K]]: one thread's matrix products, out[M][N] = a[M][K] * w[N][K], for
 * every weight format and M from one row to a prefill chunk. Weights come from memory (200 MB of
 * copies, taken in turns). Time is this thread's CPU time, least of many runs: what a quiet core
 * would need; memory that others use at the same time is still missing. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/rand.h"
#include "kernels/kernels.h"
#include "kernels/math.h"

enum { COPIES_MAX = 64, ROWS_MAX = 512, COLD_BYTES = 200 << 20 };

typedef struct product {
    const td_backend *be;
    td_queue *q;
    td_weight_format format;
    uint32_t n, k, n_copies, next;
    td_tensor *w[COPIES_MAX];
    float *a, *out;
} product;

static double cpu_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void *memory(size_t bytes)
{
    void *p = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!p)
        exit(1);
    return p;
}

static void make_weights(product *p)
{
    static const td_dtype types[] = {TD_F32, TD_BF16, TD_F8E4M3, TD_U8};
    uint32_t n = p->n, k = p->k;
    size_t row = p->format == TD_W_MXFP4 ? k / 2 : k * td_dtype_bytes(types[p->format]), size = 0;
    uint8_t *codes = memory(n * row), *scales = memory((size_t)n * k / 32 + 64);
    td_rng rng = {1, 0};
    for (size_t i = 0; i < n * row; i++)
        codes[i] = (uint8_t)(td_rng_next(&rng) & 0x3f); /* small numbers in every format */
    memset(scales, p->format == TD_W_FP8 ? 0x3c : 124, (size_t)n * k / 32 + 64);
    td_weight_src src = {.dtype = types[p->format],
                         .base = codes,
                         .scales = scales,
                         .n_stride = p->format == TD_W_MXFP4 ? k / 2 : k,
                         .k_stride = 1};
    for (p->n_copies = 0; size < COLD_BYTES && p->n_copies < COPIES_MAX; p->n_copies++) {
        td_tensor **w = &p->w[p->n_copies];
        if (p->be->weight_new(p->format, 1, n, k, w) < 0)
            exit(1);
        p->be->weight_fill(*w, 0, 0, n, &src);
        size += p->be->weight_bytes(*w);
    }
    free(codes);
    free(scales);
}

/* Seconds of one product of m rows. */
static double time_of(product *p, uint32_t m)
{
    td_step step = {.n_rows = m};
    td_gemm g = {.a = p->a,
                 .a_stride = p->k,
                 .n_heads = 1,
                 .epilogue = TD_EPI_F32,
                 .n_out = 1,
                 .out = {p->out},
                 .out_stride = {p->n}};
    double best = 1e9;
    int runs = m < 128 ? 25 : 5, inner = m < 6 ? 4 : m < 128 ? 2 : 1;
    for (int r = 0; r < runs; r++) {
        double start = cpu_s();
        for (int i = 0; i < inner; i++) {
            g.w[0] = p->w[p->next++ % p->n_copies];
            p->be->gemm(p->q, &step, &g);
        }
        double t = (cpu_s() - start) / inner;
        best = t < best ? t : best;
    }
    return best;
}

static void table(const td_backend *be, td_weight_format format, int i8, uint32_t n, uint32_t k)
{
    static const uint32_t rows[] = {1, 2, 4, 8, 12, 16, 32, 128, ROWS_MAX};
    td_backend_options o = {.act = TD_BF16, .act_i8 = i8, .n_threads = 1, .max_rows = ROWS_MAX};
    td_err err = {0};
    product p = {.be = be, .format = format, .n = n, .k = k};
    if (be->open(&o, &p.q, &err) < 0)
        exit(1);
    p.a = memory((size_t)ROWS_MAX * k * sizeof(float));
    p.out = memory((size_t)ROWS_MAX * n * sizeof(float));
    td_rng rng = {2, 0};
    for (size_t i = 0; i < (size_t)ROWS_MAX * k; i++)
        p.a[i] = (float)((int)td_rng_below(&rng, 255) - 127) / 128.0f;
    make_weights(&p);
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        double t = time_of(&p, rows[i]), bytes = (double)be->weight_bytes(p.w[0]);
        printf("%s,%s,%s,%u,%u,%u,%.1f,%.1f,%.1f\n", be->isa, td_weight_format_name(format),
               i8 ? "i8" : "bf16", n, k, rows[i], t * 1e6, 2.0 * rows[i] * n * k / t / 1e9,
               bytes / t / 1e9);
    }
    for (uint32_t i = 0; i < p.n_copies; i++)
        be->weight_free(p.w[i]);
    be->close(p.q);
    free(p.a);
    free(p.out);
}

int main(int argc, char **argv)
{
    const td_backend *be = td_backend_get(argc > 1 ? argv[1] : "auto");
    uint32_t n = argc > 3 ? (uint32_t)strtoul(argv[2], NULL, 10) : 3072,
             k = argc > 3 ? (uint32_t)strtoul(argv[3], NULL, 10) : 1024;
    if (!be || n == 0 || k == 0 || k % 32 || n > 1u << 17 || k > 1u << 17) {
        fprintf(stderr, "usage: bench_products [ISA [N K]]   K a multiple of 32\n");
        return 2;
    }
    td_fp_flush();
    printf("isa,weights,operands,n,k,rows,us,gflops,gbytes_s\n");
    table(be, TD_W_BF16, 0, n, k);
    table(be, TD_W_FP8, 0, n, k);
    table(be, TD_W_MXFP4, 0, n, k);
    if (be->act_i8)
        table(be, TD_W_MXFP4, 1, n, k);
    return 0;
}
