/* SPDX-License-Identifier: Apache-2.0 */
/* Guards mla_write, attend_mla, gqa_write, attend_gqa: right against float64 over scattered blocks
 * with several sequences, across tile and split borders, with and without a selection; the absorbed
 * form equals the expanded one; scores of very unequal size neither overflow nor lose the small
 * ones. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/checks/inside.h"
#include "kernels/math.h"

#include "base/banned.h"

enum {
    H = 3,
    C = 24,
    N = 10,
    R = 8,
    ROW = C + R,
    LEN = 700,
    TILES = LEN / 64 + 1,
    BLOCKS = 2 * TILES,
    ROWS = 8
};

typedef struct world {
    td_queue *q;
    td_step st;
    uint32_t *positions, *seq_of, (*tables)[TILES];
    uint64_t layer_offset;
} world;

/* Two sequences whose blocks lie interleaved in reverse order, behind an offset. */
static void build(td_check *c, world *w, td_dtype kv, uint32_t threads, size_t row_bytes)
{
    *w = (world){.q = td_check_queue(c, TD_F32, threads),
                 .positions = td_check_words(c, ROWS),
                 .seq_of = td_check_words(c, ROWS),
                 .layer_offset = 128};
    uint32_t *tables = td_check_words(c, BLOCKS);
    memset(w->positions, 0, ROWS * sizeof *w->positions);
    memset(w->seq_of, 0, ROWS * sizeof *w->seq_of);
    w->tables = (uint32_t(*)[TILES])tables;
    for (uint32_t b = 0; b < TILES; b++)
        for (uint32_t s = 0; s < 2; s++)
            w->tables[s][b] = BLOCKS - 1 - 2 * b - s;
    w->st = (td_step){.n_seqs = 2,
                      .max_context = LEN,
                      .positions = w->positions,
                      .seq_of = w->seq_of,
                      .tables = tables,
                      .table_stride = TILES,
                      .block_bytes = 64 * row_bytes + 256};
    w->st.kv_base = (uint8_t *)td_check_floats(c, BLOCKS * w->st.block_bytes / 4);
}

static float *angles(td_check *c, world *w, uint32_t n, uint32_t pairs)
{
    float *cs = td_check_floats(c, 2ul * n * pairs), freq[64];
    td_rope_freqs(1e4, 2 * pairs, freq);
    for (uint32_t t = 0; t < n; t++)
        td_rope_row(freq, pairs, w->positions[t], cs + t * pairs, cs + (n + t) * pairs);
    w->st.rope_cos = cs;
    w->st.rope_sin = cs + n * pairs;
    return cs;
}

static double rotate(const float *x, uint32_t i, int interleave, uint32_t dims, uint32_t pos)
{
    uint32_t half = dims / 2, pair = interleave ? i / 2 : i % half,
             second = interleave ? i % 2 : i / half;
    double a = (double)x[interleave ? 2 * pair : pair],
           b = (double)x[interleave ? 2 * pair + 1 : pair + half];
    double angle = pos * pow(1e4, -2.0 * pair / dims);
    return second ? b * cos(angle) + a * sin(angle) : a * cos(angle) - b * sin(angle);
}

void td_check_mla_write_matches_float64(td_check *c)
{
    for (td_dtype kv = TD_F32; kv <= TD_BF16; kv++)
        for (int interleave = 0; interleave < 2; interleave++) {
            world w;
            build(c, &w, kv, 1, ROW * td_dtype_bytes(kv));
            enum { T = 3 };
            uint32_t pos[T] = {0, 63, 64};
            memcpy(w.positions, pos, sizeof pos);
            w.seq_of[2] = 1;
            w.st.n_rows = T;
            angles(c, &w, T, R / 2);
            float *kv_a = td_check_random(c, T * ROW, 0), *g = td_check_random(c, C, 0),
                  *q = td_check_random(c, T * H * (N + R), 0),
                  *old = td_check_floats(c, T * H * (N + R));
            memcpy(old, q, T * H * (N + R) * sizeof *q);
            td_tensor *norm = td_check_vector(c, g, C);
            td_mla_write a = {.kv_a = kv_a,
                              .norm = norm,
                              .eps = 1e-6f,
                              .q = q,
                              .n_heads = H,
                              .latent = C,
                              .nope = N,
                              .rope = {interleave, R},
                              .kv = kv,
                              .layer_offset = w.layer_offset};
            c->be->mla_write(w.q, &w.st, &a);
            double tol = kv == TD_BF16 ? 0.005 : 3e-6;
            for (uint32_t t = 0; t < T; t++) {
                const uint8_t *row = w.st.kv_base +
                                     w.tables[w.seq_of[t]][pos[t] / 64] * w.st.block_bytes +
                                     w.layer_offset + pos[t] % 64 * ROW * td_dtype_bytes(kv);
                double ms = 0;
                for (uint32_t i = 0; i < C; i++)
                    ms += (double)kv_a[t * ROW + i] * (double)kv_a[t * ROW + i] / C;
                for (uint32_t i = 0; i < ROW; i++) {
                    uint32_t u = 0;
                    memcpy((char *)&u + (kv == TD_BF16 ? 2 : 0), row + i * td_dtype_bytes(kv),
                           td_dtype_bytes(kv));
                    float got;
                    memcpy(&got, &u, 4);
                    double want = i < C ? (double)kv_a[t * ROW + i] / sqrt(ms + 1e-6) * (double)g[i]
                                        : rotate(kv_a + t * ROW + C, i - C, interleave, R, pos[t]);
                    td_check_near(c, (double)got, want, tol * (1 + fabs(want)), "row", i);
                }
                for (uint32_t i = 0; i < H * (N + R); i++) {
                    uint32_t at = i % (N + R), base = t * H * (N + R) + i - at;
                    double want = at < N ? (double)old[base + at]
                                         : rotate(old + base + N, at - N, interleave, R, pos[t]);
                    td_check_near(c, (double)q[base + at], want, 1e-5, "q", i);
                }
            }
            c->be->weight_free(norm);
            c->be->close(w.q);
            td_check_guards(c, 0);
        }
}

/* Fill every row of both sequences; returns [2][LEN][row] as read back. */
static float *fill_pool(td_check *c, world *w, td_dtype kv, uint32_t row)
{
    float *all = td_check_random(c, 2ul * LEN * row, 1);
    for (uint32_t s = 0; s < 2; s++)
        for (uint32_t p = 0; p < LEN; p++)
            for (uint32_t i = 0; i < row; i++) {
                uint8_t *dst = w->st.kv_base + w->tables[s][p / 64] * w->st.block_bytes +
                               w->layer_offset + (p % 64 * row + i) * td_dtype_bytes(kv);
                memcpy(dst, (char *)&all[(s * LEN + p) * row + i] + (kv == TD_BF16 ? 2 : 0),
                       td_dtype_bytes(kv));
            }
    return all;
}

typedef struct exact {
    const float *q, *keys; /* key of position p at keys + p * stride */
    uint32_t dims, stride, value_at, value_dims;
    double scale;
} exact;

static void softmax_attend(const exact *e, const uint32_t *list, uint32_t n, double *out)
{
    double max = -1e300, z = 0;
    double *s = calloc(n, sizeof *s);
    for (uint32_t i = 0; i < n; i++) {
        for (uint32_t d = 0; d < e->dims; d++)
            s[i] += (double)e->q[d] * (double)e->keys[(size_t)list[i] * e->stride + d];
        s[i] *= e->scale;
        max = s[i] > max ? s[i] : max;
    }
    memset(out, 0, e->value_dims * sizeof *out);
    for (uint32_t i = 0; i < n; i++) {
        double p = exp(s[i] - max);
        z += p;
        for (uint32_t d = 0; d < e->value_dims; d++)
            out[d] += p * (double)e->keys[(size_t)list[i] * e->stride + e->value_at + d];
    }
    for (uint32_t d = 0; d < e->value_dims; d++)
        out[d] /= z;
    free(s);
}

static void mla_case(td_check *c, td_dtype kv, uint32_t threads, uint32_t topk, float gain)
{
    static const uint32_t pos[] = {0, 62, 63, 64, 511, 512, 513, 699};
    enum { T = 8 };
    world w;
    build(c, &w, kv, threads, ROW * td_dtype_bytes(kv));
    float *all = fill_pool(c, &w, kv, ROW);
    memcpy(w.positions, pos, sizeof pos);
    w.seq_of[3] = w.seq_of[7] = 1;
    w.st.n_rows = T;
    float *q_lat = td_check_random(c, T * H * C, 0), *q = td_check_random(c, T * H * (N + R), 0),
          *o = td_check_floats(c, T * H * C), cat[ROW];
    for (size_t i = 0; i < T * H * C; i++)
        q_lat[i] *= gain;
    uint32_t *sel = td_check_words(c, T * (topk ? topk : 1)), *n_sel = td_check_words(c, T),
             list[LEN];
    for (uint32_t t = 0; topk && t < T; t++) { /* every third position, the row's own included */
        uint32_t n = pos[t] + 1 <= topk ? pos[t] + 1 : topk;
        for (uint32_t i = 0; i < n; i++)
            sel[t * topk + i] = pos[t] + 1 <= topk ? i : pos[t] + 1 - (n - i);
        n_sel[t] = n;
    }
    td_attend_mla a = {.q_lat = q_lat,
                       .q = q,
                       .scale = 0.2f,
                       .n_heads = H,
                       .latent = C,
                       .nope = N,
                       .rope_dims = R,
                       .kv = kv,
                       .layer_offset = w.layer_offset,
                       .selected = topk ? sel : NULL,
                       .n_selected = n_sel,
                       .topk = topk,
                       .o_lat = o};
    c->be->attend_mla(w.q, &w.st, &a);
    for (uint32_t t = 0; t < T; t++)
        for (uint32_t h = 0; h < H; h++) {
            double want[C];
            memcpy(cat, q_lat + (t * H + h) * C, C * sizeof *cat);
            memcpy(cat + C, q + (t * H + h) * (N + R) + N, R * sizeof *cat);
            for (uint32_t i = 0; i < ROW; i++)
                cat[i] = td_check_query(c, kv, cat[i]);
            uint32_t n = topk ? n_sel[t] : pos[t] + 1;
            for (uint32_t i = 0; i < n; i++)
                list[i] = topk ? sel[t * topk + i] : i;
            exact e = {cat, all + (size_t)w.seq_of[t] * LEN * ROW, ROW, ROW, 0, C, (double)0.2f};
            softmax_attend(&e, list, n, want);
            for (uint32_t d = 0; d < C; d++)
                td_check_near(c, (double)o[(t * H + h) * C + d], want[d],
                              td_check_attend_bound(c, kv, 2e-6 * (1 + (double)gain)), "o_lat",
                              (t * H + h) * C + d);
        }
    c->be->close(w.q);
    td_check_guards(c, 0);
}

void td_check_latent_attention_matches_float64(td_check *c)
{
    for (td_dtype kv = TD_F32; kv <= TD_BF16; kv++)
        for (uint32_t threads = 1; threads <= 3; threads++) {
            mla_case(c, kv, threads, 0, 1.0f);
            mla_case(c, kv, threads, 100, 1.0f);
        }
    mla_case(c, TD_F32, 1, 0,
             60.0f); /* one position takes nearly all of the weight, others underflow */
}

/* (q_nope W_UK c) = (W_UK^T q_nope) c: the absorbed score is the expanded one. */
void td_check_absorbed_equals_expanded(td_check *c)
{
    enum { K = 40 };
    float *uk = td_check_random(c, N * C, 0), *qn = td_check_random(c, N, 0),
          *lats = td_check_random(c, K * C, 0), *lat = td_check_floats(c, C);
    td_tensor *w = NULL;
    td_weight_src src = {.dtype = TD_F32,
                         .base = uk,
                         .n_stride = 1,
                         .k_stride = C}; /* transposed, as the binder loads it */
    TD_MUST_EQUAL(c, c->be->weight_new(TD_W_F32, 1, C, N, &w), 0);
    c->be->weight_fill(w, 0, 0, C, &src);
    td_queue *q = td_check_queue(c, TD_F32, 1);
    td_step st = {.n_rows = 1};
    td_gemm g = {.a = qn,
                 .a_stride = N,
                 .a_head = N,
                 .a_round = 1,
                 .n_heads = 1,
                 .epilogue = TD_EPI_F32,
                 .n_out = 1,
                 .w = {w},
                 .out = {lat},
                 .out_stride = {C},
                 .out_head = C};
    c->be->gemm(q, &st, &g);
    for (uint32_t p = 0; p < K; p++) {
        double absorbed = 0, expanded = 0;
        for (uint32_t d = 0; d < C; d++)
            absorbed += (double)lat[d] * (double)lats[p * C + d];
        for (uint32_t n = 0; n < N; n++)
            for (uint32_t d = 0; d < C; d++)
                expanded += (double)qn[n] * (double)uk[n * C + d] * (double)lats[p * C + d];
        td_check_near(c, absorbed, expanded, 1e-5, "score", p);
    }
    c->be->weight_free(w);
    c->be->close(q);
    td_check_guards(c, 0);
}

void td_check_grouped_attention_matches_float64(td_check *c)
{
    enum { T = 3, HQ = 6, HKV = 2, D = 20, KV_ROW = 2 * HKV * D };
    static const uint32_t pos[T] = {699, 64, 513};
    for (td_dtype kv = TD_F32; kv <= TD_BF16; kv++) {
        world w;
        build(c, &w, kv, 2, KV_ROW * td_dtype_bytes(kv));
        float *all = fill_pool(c, &w, kv, KV_ROW);
        memcpy(w.positions, pos, sizeof pos);
        w.seq_of[1] = 1;
        w.st.n_rows = T;
        angles(c, &w, T, D / 2);
        float *q = td_check_random(c, T * HQ * D, 0), *k = td_check_random(c, T * HKV * D, 0),
              *v = td_check_random(c, T * HKV * D, 0), *g = td_check_random(c, D, 0),
              *o = td_check_floats(c, T * HQ * D);
        float *raw = td_check_floats(c, T * HQ * D);
        memcpy(raw, q, T * HQ * D * sizeof *q);
        td_tensor *norm = td_check_vector(c, g, D);
        td_gqa_write wr = {.q = q,
                           .k = k,
                           .v = v,
                           .q_norm = norm,
                           .k_norm = norm,
                           .eps = 1e-6f,
                           .n_heads = HQ,
                           .n_kv_heads = HKV,
                           .dims = D,
                           .rope = {0, D},
                           .kv = kv,
                           .layer_offset = w.layer_offset};
        c->be->gqa_write(w.q, &w.st, &wr);
        for (uint32_t t = 0; t < T; t++)
            for (uint32_t h = 0; h < HQ; h++) { /* q: norm, then half-split rope */
                float normed[D];
                double ms = 0;
                for (uint32_t i = 0; i < D; i++)
                    ms += (double)raw[(t * HQ + h) * D + i] * (double)raw[(t * HQ + h) * D + i] / D;
                for (uint32_t i = 0; i < D; i++)
                    normed[i] =
                        (float)((double)raw[(t * HQ + h) * D + i] / sqrt(ms + 1e-6) * (double)g[i]);
                for (uint32_t i = 0; i < D; i++)
                    td_check_near(c, (double)q[(t * HQ + h) * D + i],
                                  rotate(normed, i, 0, D, pos[t]), 2e-4, "q", i);
            }
        for (uint32_t t = 0; t < T;
             t++) /* what was written is part of what is attended: read it back */
            for (uint32_t i = 0; i < KV_ROW; i++) {
                const uint8_t *src =
                    w.st.kv_base + w.tables[w.seq_of[t]][pos[t] / 64] * w.st.block_bytes +
                    w.layer_offset + (pos[t] % 64 * KV_ROW + i) * td_dtype_bytes(kv);
                float *dst = &all[((size_t)w.seq_of[t] * LEN + pos[t]) * KV_ROW + i];
                *dst = 0.0f;
                memcpy((char *)dst + (kv == TD_BF16 ? 2 : 0), src, td_dtype_bytes(kv));
                if (i >= HKV * D)
                    TD_MUST(c, *dst == td_check_rounded(kv, v[t * HKV * D + i - HKV * D]));
            }
        td_attend_gqa a = {.q = q,
                           .scale = 0.3f,
                           .n_heads = HQ,
                           .n_kv_heads = HKV,
                           .dims = D,
                           .kv = kv,
                           .layer_offset = w.layer_offset,
                           .o = o};
        c->be->attend_gqa(w.q, &w.st, &a);
        uint32_t list[LEN];
        for (uint32_t i = 0; i < LEN; i++)
            list[i] = i;
        for (uint32_t t = 0; t < T; t++)
            for (uint32_t h = 0; h < HQ; h++) {
                double want[D];
                float rounded_q[D];
                for (uint32_t d = 0; d < D; d++)
                    rounded_q[d] = td_check_query(c, kv, q[(t * HQ + h) * D + d]);
                exact e = {
                    rounded_q,   all + (size_t)w.seq_of[t] * LEN * KV_ROW + h / (HQ / HKV) * D,
                    D,           KV_ROW,
                    HKV * D,     D,
                    (double)0.3f};
                softmax_attend(&e, list, pos[t] + 1, want);
                for (uint32_t d = 0; d < D; d++)
                    td_check_near(c, (double)o[(t * HQ + h) * D + d], want[d],
                                  td_check_attend_bound(c, kv, 4e-6), "o", (t * HQ + h) * D + d);
            }
        c->be->weight_free(norm);
        c->be->close(w.q);
        td_check_guards(c, 0);
    }
}
