/* SPDX-License-Identifier: Apache-2.0 */
/* Guards FP8 rows of the KV pool (numerics, rule 6): what is written is right to the bit, or
 * against float64 where norm and rope come before; what is read is what the bytes say, in equal
 * bits with BF16 rows of the same values (which the checks of attention hold against float64), also
 * where rows are loaded 16 bytes at a time; a NaN never becomes a number. Bytes are counted and
 * decoded here apart from kernels/kv_row.h. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/checks/inside.h"
#include "kernels/formats.h"
#include "kernels/math.h"

#include "base/banned.h"

enum {
    LEN = 700,
    TILES = LEN / 64 + 1,
    BLOCKS = 2 * TILES,
    LAYER = 128, /* bytes before the layer's range in a block */
    ROWS = 8,
    H = 8,
    N = 8,
};

/* Rows of elems elements in parts of part elements (the last may be shorter); groups of 128 begin
 * anew with each part. */
typedef struct form {
    uint32_t elems, part;
} form;

typedef struct world {
    td_queue *q;
    td_step st;
    form f;
    uint32_t *positions, *seq_of, *tables; /* [ROWS], [ROWS], [2][TILES] */
    uint32_t len;                          /* positions that a sequence has room for */
} world;

static uint32_t group_of(const form *f, uint32_t elem)
{
    return elem / f->part * ((f->part + 127) / 128) + elem % f->part / 128;
}

static uint32_t scales_of(const form *f)
{
    return group_of(f, f->elems - 1) + 1;
}

/* Two sequences whose blocks lie interleaved in reverse order. fp8: else BF16. */
static void build(td_check *c, world *w, form f, int fp8, uint32_t len, uint32_t threads)
{
    uint32_t tiles = (len + 63) / 64;
    *w = (world){.q = td_check_queue(c, TD_F32, threads),
                 .f = f,
                 .positions = td_check_words(c, ROWS),
                 .seq_of = td_check_words(c, ROWS),
                 .tables = td_check_words(c, 2ul * tiles),
                 .len = len};
    memset(w->positions, 0, ROWS * sizeof *w->positions);
    memset(w->seq_of, 0, ROWS * sizeof *w->seq_of);
    for (uint32_t b = 0; b < tiles; b++)
        for (uint32_t s = 0; s < 2; s++)
            w->tables[s * tiles + b] = 2 * tiles - 1 - 2 * b - s;
    w->st = (td_step){.n_seqs = 2,
                      .max_context = len,
                      .positions = w->positions,
                      .seq_of = w->seq_of,
                      .tables = w->tables,
                      .table_stride = tiles};
    w->st.block_bytes = 64ul * (fp8 ? f.elems + 4ul * scales_of(&f) : 2ul * f.elems) + 256;
    w->st.kv_base = (uint8_t *)td_check_floats(c, 2ul * tiles * w->st.block_bytes / 4);
}

static void turn_by(td_check *c, world *w, uint32_t pairs)
{
    uint32_t n = w->st.n_rows;
    float *cs = td_check_floats(c, 2ul * n * pairs), freq[128];
    td_rope_freqs(1e4, 2 * pairs, freq);
    for (uint32_t t = 0; t < n; t++)
        td_rope_row(freq, pairs, w->positions[t], cs + t * pairs, cs + (n + t) * pairs);
    w->st.rope_cos = cs;
    w->st.rope_sin = cs + n * pairs;
}

static uint8_t *layer_of(const world *w, uint32_t seq, uint32_t pos)
{
    return w->st.kv_base + w->tables[seq * w->st.table_stride + pos / 64] * w->st.block_bytes +
           LAYER;
}

static uint8_t *code_at(const world *w, uint32_t seq, uint32_t pos, uint32_t elem)
{
    return layer_of(w, seq, pos) + pos % 64 * w->f.elems + elem;
}

static float *scale_at(const world *w, uint32_t seq, uint32_t pos, uint32_t elem)
{
    return (float *)(void *)(layer_of(w, seq, pos) + 64ul * w->f.elems) +
           pos % 64 * scales_of(&w->f) + group_of(&w->f, elem);
}

static float stored(const world *w, uint32_t seq, uint32_t pos, uint32_t elem)
{
    return td_check_bf16(td_e4m3_to_f32(*code_at(w, seq, pos, elem)) *
                         *scale_at(w, seq, pos, elem));
}

/* What the second half of k | v must be, from v. */
static void check_written(td_check *c, const world *w, uint32_t pos, const float *v, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        float most = 0;
        for (uint32_t o = 0; o < n; o++)
            if (group_of(&w->f, o) == group_of(&w->f, i))
                most = fmaxf(most, fabsf(v[o]));
        float scale = most / 448.0f;
        uint8_t code = scale > 0 ? td_f32_to_e4m3(v[i] / scale) : 0;
        if (*scale_at(w, 0, pos, n + i) != scale || *code_at(w, 0, pos, n + i) != code)
            td_check_fail(c, "row[%u] is %02x x %.9g, not %02x x %.9g", n + i,
                          *code_at(w, 0, pos, n + i), (double)*scale_at(w, 0, pos, n + i), code,
                          (double)scale);
    }
}

/* Values reach the pool untouched by norm and rope, so codes and scales are known to the bit:
 * groups of 128 and short ones, zeros, what only denormal codes hold, ties, the largest. */
void td_check_values_are_written_to_the_bit(td_check *c)
{
    enum { HKV = 2, D = 136, KEYS = HKV * D, POS = 70 };
    world w;
    build(c, &w, (form){2 * KEYS, D}, 1, LEN, 1);
    w.positions[0] = POS;
    w.st.n_rows = 1;
    turn_by(c, &w, D / 2);
    float *q = td_check_random(c, KEYS, 0), *k = td_check_random(c, KEYS, 0),
          *v = td_check_random(c, KEYS, 0);
    for (uint32_t i = 0; i < D; i++)
        v[i] = i < 128 ? ldexpf(v[i], -(int)(i % 20)) : 0.0f;
    v[5] = 448.0f; /* so the scale is 1, and halves of a step are ties */
    v[6] = 17.0f;
    v[7] = 19.0f;
    v[8] = -0.0009765625f;
    v[9] = 0.0029296875f;
    td_gqa_write a = {.q = q,
                      .k = k,
                      .v = v,
                      .n_heads = HKV,
                      .n_kv_heads = HKV,
                      .dims = D,
                      .rope = {0, D},
                      .kv = TD_F8E4M3,
                      .layer_offset = LAYER};
    c->be->gqa_write(w.q, &w.st, &a);
    TD_MUST_EQUAL(c, c->be->finish(w.q), 0);
    check_written(c, &w, POS, v, KEYS);
    static const uint8_t known[] = {0x7e, 0x58, 0x5a, 0x80, 0x02}; /* 448, 16, 20, -0, 2^-8 */
    TD_MUST_MATCH(c, code_at(&w, 0, POS, KEYS + 5), known, sizeof known);
    c->be->close(w.q);
    td_check_guards(c, 0);
}

/* Half a step of e4m3: 2^-4 of the value, or 2^-10 of the scale where codes are denormal; half a
 * step of BF16; and an f32 value may lie on the other side of a border. */
static void near_row(td_check *c, float got, double want, double most, size_t at)
{
    double step = fmax(fabs(want) / 16, most / 448 / 1024);
    td_check_near(c, (double)got, want, step + fabs(want) / 256 + 1e-5 * most, "row", at);
}

/* Row c[latent] | k_pe[rope] that mla_write makes of x, in float64; most: largest of each group. */
static void latent_row(const float *x, const float *g, uint32_t latent, uint32_t rope, uint32_t pos,
                       const form *f, double *ret_want, double *ret_most)
{
    double ms = 0;
    for (uint32_t i = 0; i < latent; i++)
        ms += (double)x[i] * (double)x[i] / latent;
    for (uint32_t i = 0; i < latent + rope; i++) {
        uint32_t even = i - i % 2; /* latent is even: pairs begin at even elements */
        double angle = i < latent ? 0 : pos * pow(1e4, -2.0 * ((i - latent) / 2) / rope);
        double first = (double)x[even], second = (double)x[even + 1];
        ret_want[i] = i < latent ? (double)x[i] / sqrt(ms + 1e-6) * (double)g[i]
                      : i % 2    ? second * cos(angle) + first * sin(angle)
                                 : first * cos(angle) - second * sin(angle);
        double *m = &ret_most[group_of(f, i)];
        *m = fmax(*m, fabs(ret_want[i]));
    }
}

void td_check_latents_are_written_within_half_a_step(td_check *c)
{
    enum { C = 200, R = 40, ROW = C + R, T = 3 };
    static const uint32_t pos[T] = {0, 63, 64};
    world w;
    build(c, &w, (form){ROW, C}, 1, LEN, 2);
    memcpy(w.positions, pos, sizeof pos);
    w.seq_of[2] = 1;
    w.st.n_rows = T;
    turn_by(c, &w, R / 2);
    float *kv_a = td_check_random(c, T * ROW, 0), *g = td_check_random(c, C, 0),
          *q = td_check_random(c, T * (N + R), 0);
    td_tensor *norm = td_check_vector(c, g, C);
    td_mla_write a = {.kv_a = kv_a,
                      .norm = norm,
                      .eps = 1e-6f,
                      .q = q,
                      .n_heads = 1,
                      .latent = C,
                      .nope = N,
                      .rope = {1, R},
                      .kv = TD_F8E4M3,
                      .layer_offset = LAYER};
    c->be->mla_write(w.q, &w.st, &a);
    TD_MUST_EQUAL(c, c->be->finish(w.q), 0);
    for (uint32_t t = 0; t < T; t++) {
        double want[ROW], most[4] = {0};
        latent_row(kv_a + t * ROW, g, C, R, pos[t], &w.f, want, most);
        for (uint32_t i = 0; i < ROW; i++)
            near_row(c, stored(&w, w.seq_of[t], pos[t], i), want[i], most[group_of(&w.f, i)],
                     t * ROW + i);
    }
    c->be->weight_free(norm);
    c->be->close(w.q);
    td_check_guards(c, 0);
}

/* Random codes and scales in a, and the values they stand for as BF16 rows in b. */
static void fill(td_check *c, world *a, world *b)
{
    for (uint32_t s = 0; s < 2; s++)
        for (uint32_t p = 0; p < a->len; p++) {
            float *scales = scale_at(a, s, p, 0);
            for (uint32_t i = 0; i < scales_of(&a->f); i++)
                scales[i] =
                    ldexpf(0.002f * fabsf(td_check_value(c, 0)), -(int)td_rng_below(&c->rng, 16));
            for (uint32_t i = 0; i < a->f.elems; i++) {
                uint8_t r = (uint8_t)td_rng_next(&c->rng);
                *code_at(a, s, p, i) = (r & 0x7f) == 0x7f ? r ^ 1 : r;
                float f = stored(a, s, p, i);
                memcpy(layer_of(b, s, p) + 2ul * (p % 64 * b->f.elems + i), (char *)&f + 2, 2);
            }
        }
}

/* How rows attend: latent = 0 is grouped-query attention of HKV heads of dims. */
typedef struct reader {
    uint32_t latent, rope, dims, heads;
    const uint32_t *lists; /* NULL, or the number of each row's positions, then [T][TOPK] of them */
} reader;

enum { LAT = 208, ROPE = 48, HKV = 2, D = 144, T = 5, TOPK = 200 };

static void attend(td_check *c, world *w, const reader *r, td_dtype kv, const float *q, float *o)
{
    td_attend_mla m = {.q_lat = q,
                       .q = q + w->st.n_rows * r->heads * r->latent,
                       .scale = 0.1f,
                       .n_heads = r->heads,
                       .latent = r->latent,
                       .nope = N,
                       .rope_dims = r->rope,
                       .kv = kv,
                       .layer_offset = LAYER,
                       .selected = r->lists ? r->lists + T : NULL,
                       .n_selected = r->lists,
                       .topk = TOPK,
                       .o_lat = o};
    td_attend_gqa g = {.q = q,
                       .scale = 0.1f,
                       .n_heads = r->heads,
                       .n_kv_heads = HKV,
                       .dims = r->dims,
                       .kv = kv,
                       .layer_offset = LAYER,
                       .o = o};
    if (r->latent)
        c->be->attend_mla(w->q, &w->st, &m);
    else
        c->be->attend_gqa(w->q, &w->st, &g);
    TD_MUST_EQUAL(c, c->be->finish(w->q), 0);
}

/* Rows at these positions; the last belongs to the second sequence. */
static void same_as_bf16(td_check *c, form f, const reader *r, const uint32_t *pos, uint32_t rows,
                         uint32_t len, uint32_t threads)
{
    world w[2];
    size_t out = (size_t)rows * r->heads * (r->latent ? r->latent : r->dims);
    float *q = td_check_random(c, (size_t)rows * r->heads * (r->latent + N + r->rope + r->dims), 0),
          *o[2] = {td_check_floats(c, out), td_check_floats(c, out)};
    for (int i = 0; i < 2; i++) {
        build(c, &w[i], f, i == 0, len, threads);
        memcpy(w[i].positions, pos, rows * sizeof *pos);
        w[i].seq_of[rows - 1] = rows > 1;
        w[i].st.n_rows = rows;
    }
    fill(c, &w[0], &w[1]);
    for (int i = 0; i < 2; i++)
        attend(c, &w[i], r, i ? TD_BF16 : TD_F8E4M3, q, o[i]);
    TD_MUST_MATCH(c, o[0], o[1], out * sizeof(float));
    TD_MUST(c, fabsf(o[0][0]) > 0.0f && fabsf(o[0][0]) < 1.0f);
    td_check_bits(c, o[0], out * sizeof(float));
    for (int i = 0; i < 2; i++)
        c->be->close(w[i].q);
}

/* Rows of one sequence side by side, which share tiles, and one of another. */
void td_check_rows_attend_as_the_bf16_rows_they_stand_for(td_check *c)
{
    static const uint32_t pos[T] = {510, 511, 512, 699, 64};
    for (uint32_t threads = 1; threads <= 3; threads += 2) {
        uint32_t *lists = td_check_words(c, T + T * TOPK);
        for (uint32_t t = 0; t < T; t++) {
            uint32_t n = pos[t] + 1 < TOPK ? pos[t] + 1 : TOPK;
            lists[t] = n;
            for (uint32_t i = 0; i < n; i++)
                lists[T + t * TOPK + i] = n < TOPK ? i : i * (pos[t] / TOPK);
        }
        reader whole = {LAT, ROPE, 0, H, NULL}, sparse = {LAT, ROPE, 0, H, lists},
               grouped = {0, 0, D, H, NULL};
        same_as_bf16(c, (form){LAT + ROPE, LAT}, &whole, pos, T, LEN, threads);
        same_as_bf16(c, (form){LAT + ROPE, LAT}, &sparse, pos, T, LEN, threads);
        same_as_bf16(c, (form){2 * HKV * D, D}, &grouped, pos, T, LEN, threads);
        td_check_guards(c, 0);
    }
}

void td_check_shares_attend_as_the_bf16_rows_they_stand_for(td_check *c)
{
    enum { C = 512, R = 64, DH = 128, POS = 100 };
    static const uint32_t pos[] = {POS};
    reader mla = {C, R, 0, 0, NULL}, gqa = {0, 0, DH, 8, NULL};
    for (uint32_t ranks = 4; ranks <= 8; ranks *= 2) {
        mla.heads = 64 / ranks;
        same_as_bf16(c, (form){C + R, C}, &mla, pos, 1, POS + 1, 1);
    }
    same_as_bf16(c, (form){2 * HKV * DH, DH}, &gqa, pos, 1, POS + 1, 1);
    td_check_guards(c, 0);
}

/* A group with a NaN or an infinity, zeros beside it or not, reads as NaN; so do poisoned bytes. */
void td_check_nan_rows_stay_nan(td_check *c)
{
    enum { DIMS = 32 };
    for (int form_of = 0; form_of < 4; form_of++) {
        world w;
        build(c, &w, (form){2 * DIMS, DIMS}, 1, 64, 1);
        w.st.n_rows = 1;
        turn_by(c, &w, DIMS / 2);
        float *q = td_check_random(c, DIMS, 0), *k = td_check_random(c, DIMS, 0),
              *v = td_check_random(c, DIMS, 0), *o = td_check_floats(c, DIMS);
        for (uint32_t i = 0; form_of == 0 && i < DIMS; i++)
            v[i] = 0.0f;
        if (form_of < 3)
            v[3] = form_of == 2 ? -INFINITY : NAN;
        td_gqa_write wr = {.q = q,
                           .k = k,
                           .v = v,
                           .n_heads = 1,
                           .n_kv_heads = 1,
                           .dims = DIMS,
                           .rope = {0, DIMS},
                           .kv = TD_F8E4M3,
                           .layer_offset = LAYER};
        c->be->gqa_write(w.q, &w.st, &wr);
        TD_MUST_EQUAL(c, c->be->finish(w.q), 0);
        if (form_of == 3) {
            memset(scale_at(&w, 0, 0, DIMS), 0xff, sizeof(float));
            *code_at(&w, 0, 0, DIMS + 3) = 0xff;
        }
        td_attend_gqa a = {.q = q,
                           .scale = 0.3f,
                           .n_heads = 1,
                           .n_kv_heads = 1,
                           .dims = DIMS,
                           .kv = TD_F8E4M3,
                           .layer_offset = LAYER,
                           .o = o};
        c->be->attend_gqa(w.q, &w.st, &a);
        (void)c->be->finish(w.q); /* NaN may be told, or not: it may not vanish */
        TD_MUST(c, isnan(o[3]));
        c->be->close(w.q);
        td_check_guards(c, 0);
    }
}
