/* SPDX-License-Identifier: Apache-2.0 */
/* Guards the indexer: key = LayerNorm with mean and bias, rope on the first dims; scores with ReLU
 * before weighting; exact top-k with ties to the lower position; every position when few enough;
 * NaN is an error, not a choice. */
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/checks/inside.h"
#include "kernels/math.h"

#include "base/banned.h"

enum { H = 3, D = 20, R = 6, LEN = 400, TOPK = 50, BLOCKS = LEN / 64 + 1, ROWS = 8 };

typedef struct world {
    td_queue *q;
    td_step st;
    uint32_t *positions, *seq_of, *table;
} world;

static void build(td_check *c, world *w, td_dtype t, uint32_t threads)
{
    *w = (world){.q = td_check_queue(c, TD_F32, threads),
                 .positions = td_check_words(c, ROWS),
                 .seq_of = td_check_words(c, ROWS),
                 .table = td_check_words(c, BLOCKS)};
    memset(w->positions, 0, ROWS * sizeof *w->positions);
    memset(w->seq_of, 0, ROWS * sizeof *w->seq_of);
    for (uint32_t b = 0; b < BLOCKS; b++)
        w->table[b] = (b * 3 + 1) % BLOCKS;
    w->st = (td_step){.n_seqs = 1,
                      .max_context = LEN,
                      .positions = w->positions,
                      .seq_of = w->seq_of,
                      .tables = w->table,
                      .table_stride = BLOCKS,
                      .block_bytes = 64 * D * td_dtype_bytes(t) + 64};
    w->st.kv_base = (uint8_t *)td_check_floats(c, BLOCKS * w->st.block_bytes / 4);
}

static uint8_t *row(const world *w, uint32_t p, td_dtype t)
{
    return w->st.kv_base + w->table[p / 64] * w->st.block_bytes + 64 +
           p % 64 * D * td_dtype_bytes(t);
}

void td_check_keys_are_normed_rotated_and_rounded(td_check *c)
{
    world w;
    build(c, &w, TD_F32, 1);
    w.st.n_rows = 2;
    w.positions[1] = 100;
    float *cs = td_check_floats(c, 4 * (R / 2)), freq[R / 2];
    td_rope_freqs(1e4, R, freq);
    for (uint32_t t = 0; t < 2; t++)
        td_rope_row(freq, R / 2, w.positions[t], cs + t * (R / 2), cs + (2 + t) * (R / 2));
    w.st.rope_cos = cs;
    w.st.rope_sin = cs + 2 * (R / 2);
    float *k = td_check_random(c, 2 * D, 0), *g = td_check_random(c, D, 0),
          *b = td_check_random(c, D, 0), *q = td_check_random(c, 2 * H * D, 0);
    td_tensor *tg = td_check_vector(c, g, D), *tb = td_check_vector(c, b, D);
    td_index_write a = {.k = k,
                        .norm = tg,
                        .bias = tb,
                        .eps = 1e-6f,
                        .q = q,
                        .n_heads = H,
                        .dims = D,
                        .rope = {1, R},
                        .index = TD_F32,
                        .layer_offset = 64};
    c->be->index_write(w.q, &w.st, &a);
    for (uint32_t t = 0; t < 2; t++) {
        double mean = 0, var = 0, y[D];
        const float *got = (const float *)row(&w, w.positions[t], TD_F32);
        for (uint32_t i = 0; i < D; i++)
            mean += (double)k[t * D + i] / D;
        for (uint32_t i = 0; i < D; i++)
            var += ((double)k[t * D + i] - mean) * ((double)k[t * D + i] - mean) / D;
        for (uint32_t i = 0; i < D; i++)
            y[i] = ((double)k[t * D + i] - mean) / sqrt(var + 1e-6) * (double)g[i] + (double)b[i];
        for (uint32_t i = 0; i < D; i++) {
            double angle = w.positions[t] * pow(1e4, -2.0 * (i / 2) / R), want = y[i];
            if (i < R)
                want = i % 2 ? y[i] * cos(angle) + y[i - 1] * sin(angle)
                             : y[i] * cos(angle) - y[i + 1] * sin(angle);
            td_check_near(c, (double)got[i], want, 1e-5, "key", i);
        }
    }
    c->be->weight_free(tg);
    c->be->weight_free(tb);
    c->be->close(w.q);
    td_check_guards(c, 0);
}

typedef struct scored {
    double s;
    uint32_t p;
} scored;

static int by_rank(const void *a, const void *b)
{
    const scored *x = a, *y = b;
    if (x->s != y->s)
        return x->s > y->s ? -1 : 1;
    return x->p < y->p ? -1 : 1;
}

static int by_position(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return x < y ? -1 : x > y;
}

/* Small integers: every score is exact in f32, so ties are real and the answer is unique. */
void td_check_selection_is_the_sort(td_check *c)
{
    static const uint32_t pos[] = {0, TOPK - 2, TOPK - 1, TOPK, TOPK + 1, 63, 64, LEN - 1};
    for (td_dtype type = TD_F32; type <= TD_BF16; type++)
        for (uint32_t threads = 1; threads <= 3; threads++) {
            enum { T = 8 };
            world w;
            build(c, &w, type, threads);
            float keys[LEN][D];
            for (uint32_t p = 0; p < LEN; p++)
                for (uint32_t i = 0; i < D; i++) {
                    keys[p][i] = (float)(int)td_rng_below(&c->rng, 5) - 2.0f;
                    memcpy(row(&w, p, type) + i * td_dtype_bytes(type),
                           (char *)&keys[p][i] + (type == TD_BF16 ? 2 : 0), td_dtype_bytes(type));
                }
            memcpy(w.positions, pos, sizeof pos);
            w.st.n_rows = T;
            float *q = td_check_floats(c, T * H * D), *weights = td_check_floats(c, T * H),
                  *margin = td_check_floats(c, T);
            for (uint32_t i = 0; i < T * H * D; i++)
                q[i] = (float)(int)td_rng_below(&c->rng, 3) - 1.0f;
            for (uint32_t i = 0; i < T * H; i++)
                weights[i] = (float)(int)td_rng_below(&c->rng, 5) - 2.0f; /* may be negative */
            uint32_t *sel = td_check_words(c, T * TOPK), *n = td_check_words(c, T);
            td_index_select a = {.q = q,
                                 .weight = weights,
                                 .scale = 0.5f,
                                 .n_heads = H,
                                 .dims = D,
                                 .topk = TOPK,
                                 .index = type,
                                 .layer_offset = 64,
                                 .selected = sel,
                                 .n_selected = n,
                                 .margin = margin};
            c->be->index_select(w.q, &w.st, &a);
            TD_MUST_EQUAL(c, c->be->finish(w.q), 0);
            for (uint32_t t = 0; t < T; t++) {
                scored s[LEN];
                uint32_t want[LEN], len = pos[t] + 1, k = len < TOPK ? len : TOPK;
                double largest = 0;
                for (uint32_t p = 0; p < len; p++) {
                    s[p] = (scored){0, p};
                    for (uint32_t h = 0; h < H; h++) {
                        double dot = 0;
                        for (uint32_t i = 0; i < D; i++)
                            dot += (double)q[(t * H + h) * D + i] * (double)keys[p][i];
                        s[p].s += (double)weights[t * H + h] * 0.5 * (dot > 0 ? dot : 0);
                    }
                    largest = fabs(s[p].s) > largest ? fabs(s[p].s) : largest;
                }
                qsort(s, len, sizeof *s, by_rank);
                for (uint32_t i = 0; i < k; i++)
                    want[i] = s[i].p;
                qsort(want, k, sizeof *want, by_position);
                TD_MUST_EQUAL(c, n[t], k);
                TD_MUST_MATCH(c, sel + t * TOPK, want, k * sizeof *want);
                if (len > TOPK && largest > 0)
                    td_check_near(c, (double)margin[t], (s[TOPK - 1].s - s[TOPK].s) / largest, 1e-6,
                                  "margin", t);
                else
                    TD_MUST(c, len > TOPK || isinf(margin[t]));
            }
            c->be->close(w.q);
            td_check_guards(c, 0);
        }
}

void td_check_nan_scores_are_refused(td_check *c)
{
    world w;
    build(c, &w, TD_F32, 1);
    for (uint32_t p = 0; p < LEN; p++)
        memset(row(&w, p, TD_F32), 0, D * 4);
    w.positions[0] = LEN - 1;
    w.st.n_rows = 1;
    float *q = td_check_random(c, H * D, 0), *weights = td_check_random(c, H, 0);
    uint32_t *sel = td_check_words(c, TOPK), *n = td_check_words(c, 1);
    td_index_select a = {.q = q,
                         .weight = weights,
                         .scale = 1.0f,
                         .n_heads = H,
                         .dims = D,
                         .topk = TOPK,
                         .index = TD_F32,
                         .layer_offset = 64,
                         .selected = sel,
                         .n_selected = n};
    c->be->index_select(w.q, &w.st, &a);
    TD_MUST_EQUAL(c, c->be->finish(w.q), 0);
    memset(row(&w, 200, TD_F32), 0xff, 4);
    c->be->index_select(w.q, &w.st, &a);
    TD_MUST_EQUAL(c, c->be->finish(w.q), -EIO);
    c->be->close(w.q);
    td_check_guards(c, 0);
}
