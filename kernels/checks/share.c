/* SPDX-License-Identifier: Apache-2.0 */
/* Guards tensor parallelism before it exists: a rank's share of a product has the bits of its
 * slices of the whole (numerics, rule 12), and GLM-5.2's heads and widths on 1, 4 and 8 ranks are
 * right against float64. Hidden width and number of rows are cut so that an emulation ends. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/checks/inside.h"
#include "kernels/kplan.h"

#include "base/banned.h"

static void copy_columns(float *to, const float *from, uint32_t n, uint32_t k, uint32_t first,
                         uint32_t share)
{
    for (uint32_t i = 0; i < n; i++)
        memcpy(to + (size_t)i * share, from + (size_t)i * k + first, share * sizeof *to);
}

void td_check_a_rank_has_the_slices_of_the_whole(td_check *c)
{
    enum { K = 512, N = 24, ROWS = 3, S = 8 };
    float *a = td_check_random(c, ROWS * K, 1), *w = td_check_random(c, N * K, 1),
          *whole = td_check_floats(c, S * ROWS * N), *part = td_check_floats(c, S * ROWS * N);
    td_queue *q = td_check_queue(c, TD_BF16, 1);
    td_step st = {.n_rows = ROWS};
    td_tensor *tw = td_check_weight_as(c, TD_W_BF16, w, 1, N, K);
    td_gemm g = {.a = a,
                 .a_stride = K,
                 .n_heads = 1,
                 .epilogue = TD_EPI_PARTIAL,
                 .n_out = 1,
                 .w = {tw},
                 .out = {whole},
                 .slices = S};
    c->be->gemm(q, &st, &g);
    c->be->weight_free(tw);
    for (uint32_t ranks = 2; ranks <= 8; ranks *= 2)
        for (uint32_t r = 0; r < ranks; r++) {
            uint32_t share = K / ranks;
            float *own = td_check_floats(c, (size_t)N * share);
            copy_columns(own, w, N, K, r * share, share);
            td_tensor *tr = td_check_weight_as(c, TD_W_BF16, own, 1, N, share);
            g.w[0] = tr;
            g.a = a + (size_t)r * share;
            g.out[0] = part;
            g.slices = S / ranks;
            c->be->gemm(q, &st, &g);
            TD_MUST_MATCH(c, part, whole + (size_t)r * g.slices * ROWS * N,
                          sizeof *part * g.slices * ROWS * N);
            c->be->weight_free(tr);
        }
    c->be->close(q);
    td_check_guards(c, 0);
}

/* One sequence in scattered blocks whose rows c[C] | k_pe[R] are random. */
enum { C = 512, R = 64, ROW = C + R, POS = 70, BLOCKS = 3 };

static td_step latent_pool(td_check *c, td_dtype kv)
{
    uint32_t *at = td_check_words(c, 2 + BLOCKS);
    td_step st = {.n_rows = 1,
                  .n_seqs = 1,
                  .max_context = POS + 1,
                  .positions = at,
                  .seq_of = at + 1,
                  .tables = at + 2,
                  .table_stride = BLOCKS,
                  .block_bytes = 64ul * ROW * td_dtype_bytes(kv)};
    at[0] = POS;
    at[1] = 0;
    for (uint32_t b = 0; b < BLOCKS; b++)
        at[2 + b] = (b * 2 + 1) % BLOCKS;
    uint8_t *pool = (uint8_t *)td_check_floats(c, BLOCKS * st.block_bytes / sizeof(float));
    for (size_t i = 0; i < BLOCKS * st.block_bytes / td_dtype_bytes(kv); i++) {
        float f = td_check_value(c, 1);
        memcpy(pool + i * td_dtype_bytes(kv), (char *)&f + (kv == TD_BF16 ? 2 : 0),
               td_dtype_bytes(kv));
    }
    st.kv_base = pool;
    return st;
}

/* Keys of positions 0 .. POS as float64. */
static double *latent_keys(const td_step *st, td_dtype kv)
{
    double *keys = calloc((POS + 1) * ROW, sizeof *keys);
    for (uint32_t i = 0; keys && i <= POS; i++)
        for (uint32_t d = 0; d < ROW; d++) {
            float k = 0.0f;
            const uint8_t *at = st->kv_base + st->tables[i / 64] * st->block_bytes +
                                (i % 64 * ROW + d) * td_dtype_bytes(kv);
            memcpy((char *)&k + (kv == TD_BF16 ? 2 : 0), at, td_dtype_bytes(kv));
            keys[i * ROW + d] = (double)k;
        }
    return keys;
}

static void latent_head(td_check *c, const double *keys, const float *lat, const float *q,
                        const float *o, td_dtype kv)
{
    double p[POS + 1], max = -1e300, z = 0;
    for (uint32_t i = 0; i <= POS; i++) {
        p[i] = 0;
        for (uint32_t d = 0; d < ROW; d++)
            p[i] += keys[i * ROW + d] * (double)(d < C ? lat[d] : q[d - C]) * 0.0625;
        max = p[i] > max ? p[i] : max;
    }
    for (uint32_t i = 0; i <= POS; i++)
        z += p[i] = exp(p[i] - max);
    for (uint32_t d = 0; d < C; d++) {
        double v = 0;
        for (uint32_t i = 0; i <= POS; i++)
            v += p[i] / z * keys[i * ROW + d];
        td_check_near(c, (double)o[d], v, kv == TD_BF16 ? 0.004 : 1e-5, "o_lat", d);
    }
}

static void latent_share(td_check *c, uint32_t heads, td_dtype kv)
{
    td_queue *q = td_check_queue(c, TD_BF16, 1);
    td_step st = latent_pool(c, kv);
    float *lat = td_check_random(c, (size_t)heads * C, 1),
          *pe = td_check_random(c, (size_t)heads * R, 1),
          *o = td_check_floats(c, (size_t)heads * C);
    td_attend_mla a = {.q_lat = lat,
                       .q = pe,
                       .scale = 0.0625f,
                       .n_heads = heads,
                       .latent = C,
                       .rope_dims = R,
                       .kv = kv,
                       .o_lat = o};
    c->be->attend_mla(q, &st, &a);
    TD_MUST_EQUAL(c, c->be->finish(q), 0);
    double *keys = latent_keys(&st, kv);
    TD_MUST(c, keys);
    for (uint32_t h = 0; h < heads; h += 5)
        latent_head(c, keys, lat + (size_t)h * C, pe + (size_t)h * R, o + (size_t)h * C, kv);
    free(keys);
    c->be->close(q);
    td_check_guards(c, 0);
}

void td_check_latent_attention_of_a_share(td_check *c)
{
    latent_share(c, 64 / 4, TD_BF16);
    latent_share(c, 64 / 8, TD_BF16);
    latent_share(c, 64 / 8, TD_F32);
}

/* One row of width k meets n outputs; the widest of GLM-5.2, and o_proj's on 1, 4 and 8 ranks. */
static void product(td_check *c, uint32_t n, uint32_t k)
{
    float *a = td_check_random(c, k, 1), *w = td_check_random(c, (size_t)n * k, 1),
          *out = td_check_floats(c, n);
    td_tensor *tw = td_check_weight_as(c, TD_W_BF16, w, 1, n, k);
    td_queue *q = td_check_queue(c, TD_BF16, 1);
    td_step st = {.n_rows = 1};
    td_gemm g = {.a = a,
                 .a_stride = k,
                 .n_heads = 1,
                 .n_out = 1,
                 .w = {tw},
                 .out = {out},
                 .out_stride = {n}};
    c->be->gemm(q, &st, &g);
    for (uint32_t i = 0; i < n; i++) {
        double v = 0, size = 0;
        for (uint32_t j = 0; j < k; j++) {
            v += (double)a[j] * (double)w[(size_t)i * k + j];
            size += fabs((double)a[j] * (double)w[(size_t)i * k + j]);
        }
        td_check_near(c, (double)out[i], v, 1e-6 * size, "product", i);
    }
    c->be->weight_free(tw);
    c->be->close(q);
    td_check_guards(c, 0);
}

void td_check_products_of_a_share(td_check *c)
{
    static const uint32_t widths[] = {6144, 16384, 4096, 2048};
    for (size_t i = 0; i < sizeof widths / sizeof *widths; i++)
        product(c, 20, widths[i]);
}

/* Experts of inner width I whose weights are given; partial is [slices][rows][D]. */
typedef struct experts {
    uint32_t rows, d, inner, n, k, slices;
    const float *a, *weights;
    const uint32_t *ids;
    const float *gate, *up, *down; /* [n][inner][d], [n][inner][d], [n][d][inner] */
} experts;

static void run_experts(td_check *c, const experts *x, float *partial)
{
    td_tensor *g = td_check_weight_as(c, TD_W_BF16, x->gate, x->n, x->inner, x->d),
              *u = td_check_weight_as(c, TD_W_BF16, x->up, x->n, x->inner, x->d),
              *d = td_check_weight_as(c, TD_W_BF16, x->down, x->n, x->d, x->inner);
    td_queue *q = td_check_queue(c, TD_BF16, 1);
    td_step st = {.n_rows = x->rows};
    td_moe m = {.a = x->a,
                .experts = x->ids,
                .weights = x->weights,
                .n_experts = x->n,
                .top_k = x->k,
                .gate = g,
                .up = u,
                .down = d,
                .slices = x->slices,
                .act = td_check_floats(c, td_moe_act_elems(x->rows, x->k, x->inner, 0)),
                .partial = partial};
    c->be->moe(q, &st, &m);
    TD_MUST_EQUAL(c, c->be->finish(q), 0);
    c->be->weight_free(g);
    c->be->weight_free(u);
    c->be->weight_free(d);
    c->be->close(q);
}

/* Activations in float64 are rounded to BF16 as the kernels do, so that what is left are sums: a
 * rounding that falls on the other side costs 2^-8 of its term. */
static void experts_near(td_check *c, const experts *x, const float *partial)
{
    double *act = calloc(x->inner, sizeof *act), *y = calloc(2ul * x->d, sizeof *y);
    TD_MUST(c, act && y);
    for (uint32_t t = 0; t < x->rows; t++) {
        memset(y, 0, 2ul * x->d * sizeof *y);
        for (uint32_t j = 0; j < x->k; j++) {
            size_t e = x->ids[t * x->k + j], base = e * x->inner * x->d;
            for (uint32_t i = 0; i < x->inner; i++) {
                double g = 0, u = 0;
                for (uint32_t k = 0; k < x->d; k++) {
                    g += (double)x->a[t * x->d + k] * (double)x->gate[base + i * x->d + k];
                    u += (double)x->a[t * x->d + k] * (double)x->up[base + i * x->d + k];
                }
                act[i] = (double)td_check_bf16((float)(g / (1 + exp(-g)) * u));
            }
            for (uint32_t n = 0; n < x->d; n++)
                for (uint32_t i = 0; i < x->inner; i++) {
                    double p = (double)x->weights[t * x->k + j] * act[i] *
                               (double)x->down[base + n * x->inner + i];
                    y[n] += p;
                    y[x->d + n] += fabs(p);
                }
        }
        for (uint32_t n = 0; n < x->d; n++) {
            double got = 0;
            for (uint32_t s = 0; s < x->slices; s++)
                got += (double)partial[((size_t)s * x->rows + t) * x->d + n];
            td_check_near(c, got, y[n], 1e-3 * y[x->d + n], "moe", t * x->d + n);
        }
    }
    free(act);
    free(y);
}

static experts draw_experts(td_check *c, uint32_t rows, uint32_t d, uint32_t inner, uint32_t n,
                            uint32_t k)
{
    size_t all = (size_t)n * inner * d;
    uint32_t *ids = td_check_words(c, (size_t)rows * k);
    for (uint32_t i = 0; i < rows * k; i++)
        ids[i] = (i * 29 + i / k) % n;
    return (experts){.rows = rows,
                     .d = d,
                     .inner = inner,
                     .n = n,
                     .k = k,
                     .slices = td_kplan_slices(inner),
                     .a = td_check_random(c, (size_t)rows * d, 1),
                     .weights = td_check_random(c, (size_t)rows * k, 0),
                     .ids = ids,
                     .gate = td_check_random(c, all, 1),
                     .up = td_check_random(c, all, 1),
                     .down = td_check_random(c, all, 1)};
}

/* Rank r's rows of gate and up, and its columns of down. */
static experts share_of(td_check *c, const experts *x, uint32_t r, uint32_t ranks)
{
    experts s = *x;
    s.inner = x->inner / ranks;
    s.slices = x->slices / ranks;
    size_t own = (size_t)s.inner * x->d, all = (size_t)x->inner * x->d;
    float *gate = td_check_floats(c, x->n * own), *up = td_check_floats(c, x->n * own),
          *down = td_check_floats(c, x->n * own);
    for (uint32_t e = 0; e < x->n; e++) {
        memcpy(gate + e * own, x->gate + e * all + r * own, own * sizeof *gate);
        memcpy(up + e * own, x->up + e * all + r * own, own * sizeof *up);
        copy_columns(down + e * own, x->down + e * all, x->d, x->inner, r * s.inner, s.inner);
    }
    s.gate = gate;
    s.up = up;
    s.down = down;
    return s;
}

void td_check_experts_of_a_share(td_check *c)
{
    enum { ROWS = 2, D = 64, I = 2048, N = 3, K = 2 };
    experts whole = draw_experts(c, ROWS, D, I, N, K);
    float *partial = td_check_floats(c, (size_t)whole.slices * ROWS * D),
          *part = td_check_floats(c, (size_t)whole.slices * ROWS * D);
    run_experts(c, &whole, partial);
    experts_near(c, &whole, partial);
    size_t keep = c->n_bufs;
    for (uint32_t ranks = 4; ranks <= 8; ranks *= 2)
        for (uint32_t r = 0; r < ranks; r += ranks - 1) { /* the first and the last */
            experts own = share_of(c, &whole, r, ranks);
            run_experts(c, &own, part);
            size_t n = (size_t)own.slices * ROWS * D;
            TD_MUST_MATCH(c, part, partial + r * n, n * sizeof *part);
            td_check_guards(c, keep);
        }
    td_check_guards(c, 0);
    /* 256 experts, and 257 where the shared one is among them */
    for (uint32_t more = 0; more < 2; more++) {
        experts x = draw_experts(c, 5, 32, 32, 256 + more, 8 + more);
        float *p = td_check_floats(c, (size_t)x.slices * x.rows * x.d);
        run_experts(c, &x, p);
        experts_near(c, &x, p);
        td_check_guards(c, 0);
    }
}
