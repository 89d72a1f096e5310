/* SPDX-License-Identifier: Apache-2.0 */
/* Guards FP8 rows of the KV pool (numerics, rule 6): what is written is right to the bit, or
 * against float64 where norm and rope come before; what is read is what the bytes say, in equal
 * bits with BF16 rows of the same values (which the checks of attention hold against float64); a
 * NaN never becomes a number. Bytes are counted and decoded here apart from kernels/kv_row.h. */
#include "tests/kernels/kernels_util.h"

#include "kernels/kv_row.h"
#include "kernels/math.h"

enum {
    LEN = 700,
    TILES = LEN / 64 + 1,
    BLOCKS = 2 * TILES,
    LAYER = 128, /* bytes before the layer's range in a block */
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
    uint32_t positions[8], seq_of[8], tables[2][TILES];
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
static void build(world *w, form f, int fp8, uint32_t threads)
{
    *w = (world){.q = open_queue(TD_F32, threads), .f = f};
    for (uint32_t b = 0; b < TILES; b++)
        for (uint32_t s = 0; s < 2; s++)
            w->tables[s][b] = BLOCKS - 1 - 2 * b - s;
    w->st = (td_step){.n_seqs = 2,
                      .max_context = LEN,
                      .positions = w->positions,
                      .seq_of = w->seq_of,
                      .tables = w->tables[0],
                      .table_stride = TILES};
    w->st.block_bytes = 64ul * (fp8 ? f.elems + 4ul * scales_of(&f) : 2ul * f.elems) + 256;
    w->st.kv_base = (uint8_t *)floats(BLOCKS * w->st.block_bytes / 4);
}

static void turn_by(world *w, uint32_t pairs)
{
    uint32_t n = w->st.n_rows;
    float *cs = floats(2ul * n * pairs), freq[128];
    td_rope_freqs(1e4, 2 * pairs, freq);
    for (uint32_t t = 0; t < n; t++)
        td_rope_row(freq, pairs, w->positions[t], cs + t * pairs, cs + (n + t) * pairs);
    w->st.rope_cos = cs;
    w->st.rope_sin = cs + n * pairs;
}

static uint8_t *layer_of(const world *w, uint32_t seq, uint32_t pos)
{
    return w->st.kv_base + w->tables[seq][pos / 64] * w->st.block_bytes + LAYER;
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
    return bf16_of(td_e4m3_to_f32(*code_at(w, seq, pos, elem)) * *scale_at(w, seq, pos, elem));
}

static void bytes_are_counted_as_here(void **state)
{
    static const form forms[] = {{576, 512}, {32, 24}, {240, 200}, {2 * 8 * 128, 128}, {80, 20}};
    for (size_t i = 0; i < sizeof forms / sizeof *forms; i++) {
        const form *f = &forms[i];
        td_kv_row r = i < 3 ? td_kv_row_mla(TD_F8E4M3, f->part, f->elems - f->part)
                            : td_kv_row_gqa(TD_F8E4M3, f->elems / f->part / 2, f->part);
        assert_int_equal(r.n_scales, scales_of(f));
        assert_int_equal(r.bytes, f->elems);
        assert_int_equal(r.scales_at, 64 * f->elems);
        assert_int_equal(r.layer_bytes, 64 * (f->elems + 4 * scales_of(f)));
    }
    td_kv_row half = td_kv_row_gqa(TD_BF16, 8, 128);
    assert_int_equal(half.n_scales, 0);
    assert_int_equal(half.layer_bytes, 64 * 2 * 8 * 128 * 2);
}

/* Values reach the pool untouched by norm and rope, so codes and scales are known to the bit:
 * groups of 128 and short ones, zeros, what only denormal codes hold, ties, the largest. */
static void values_are_written_to_the_bit(void **state)
{
    enum { HKV = 2, D = 136, KEYS = HKV * D };
    world w;
    build(&w, (form){2 * KEYS, D}, 1, 1);
    w.positions[0] = 70;
    w.st.n_rows = 1;
    turn_by(&w, D / 2);
    float *q = random_floats(KEYS, 0), *k = random_floats(KEYS, 0), *v = random_floats(KEYS, 0);
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
    under->gqa_write(w.q, &w.st, &a);
    for (uint32_t i = 0; i < KEYS; i++) {
        float most = 0;
        for (uint32_t o = 0; o < KEYS; o++)
            if (group_of(&w.f, o) == group_of(&w.f, i))
                most = fmaxf(most, fabsf(v[o]));
        float scale = most / 448.0f;
        assert_true(*scale_at(&w, 0, 70, KEYS + i) == scale);
        assert_int_equal(*code_at(&w, 0, 70, KEYS + i),
                         scale > 0 ? td_f32_to_e4m3(v[i] / scale) : 0);
    }
    static const uint8_t known[] = {0x7e, 0x58, 0x5a, 0x80, 0x02}; /* 448, 16, 20, -0, 2^-8 */
    for (uint32_t i = 0; i < sizeof known; i++)
        assert_int_equal(*code_at(&w, 0, 70, KEYS + 5 + i), known[i]);
    under->close(w.q);
    check_guards();
}

/* Half a step of e4m3: 2^-4 of the value, or 2^-10 of the scale where codes are denormal; half a
 * step of BF16; and an f32 value may lie on the other side of a border. */
static void near_row(float got, double want, double most)
{
    double step = fmax(fabs(want) / 16, most / 448 / 1024);
    near((double)got, want, step + fabs(want) / 256 + 1e-5 * most, "row", 0);
}

static void latents_are_written_within_half_a_step(void **state)
{
    enum { C = 200, R = 40, ROW = C + R, T = 3 };
    static const uint32_t pos[T] = {0, 63, 64};
    world w;
    build(&w, (form){ROW, C}, 1, 2);
    memcpy(w.positions, pos, sizeof pos);
    w.seq_of[2] = 1;
    w.st.n_rows = T;
    turn_by(&w, R / 2);
    float *kv_a = random_floats(T * ROW, 0), *g = random_floats(C, 0),
          *q = random_floats(T * (N + R), 0);
    td_tensor *norm = vector(g, C);
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
    under->mla_write(w.q, &w.st, &a);
    for (uint32_t t = 0; t < T; t++) {
        double want[ROW], ms = 0, most[4] = {0};
        const float *x = kv_a + t * ROW;
        for (uint32_t i = 0; i < C; i++)
            ms += (double)x[i] * (double)x[i] / C;
        for (uint32_t i = 0; i < ROW; i++) {
            uint32_t even = i - i % 2; /* C is even: pairs begin at even elements */
            double angle = pos[t] * pow(1e4, -2.0 * ((i - C) / 2) / R);
            double first = (double)x[even], second = (double)x[even + 1];
            want[i] = i < C   ? (double)x[i] / sqrt(ms + 1e-6) * (double)g[i]
                      : i % 2 ? second * cos(angle) + first * sin(angle)
                              : first * cos(angle) - second * sin(angle);
            double *m = &most[group_of(&w.f, i)];
            *m = fmax(*m, fabs(want[i]));
        }
        for (uint32_t i = 0; i < ROW; i++)
            near_row(stored(&w, w.seq_of[t], pos[t], i), want[i], most[group_of(&w.f, i)]);
    }
    under->weight_free(norm);
    under->close(w.q);
    check_guards();
}

/* Random codes and scales in a, and the values they stand for as BF16 rows in b. */
static void fill(world *a, world *b)
{
    for (uint32_t s = 0; s < 2; s++)
        for (uint32_t p = 0; p < LEN; p++)
            for (uint32_t i = 0; i < a->f.elems; i++) {
                uint64_t r = td_rng_next(&rng);
                *code_at(a, s, p, i) = (uint8_t)((r & 0x7f) == 0x7f ? r ^ 1 : r);
                *scale_at(a, s, p, i) = ldexpf(0.002f * fabsf(value(0)), -(int)(r >> 60));
            }
    for (uint32_t s = 0; s < 2; s++)
        for (uint32_t p = 0; p < LEN; p++)
            for (uint32_t i = 0; i < a->f.elems; i++) {
                float f = stored(a, s, p, i);
                memcpy(layer_of(b, s, p) + 2ul * (p % 64 * b->f.elems + i), (char *)&f + 2, 2);
            }
}

typedef void (*attend_fn)(world *w, td_dtype kv, const float *q, const uint32_t *lists, float *o);

enum { LAT = 208, ROPE = 48, HKV = 2, D = 144, T = 5, TOPK = 200 };

static void run_mla(world *w, td_dtype kv, const float *q, const uint32_t *lists, float *o)
{
    td_attend_mla a = {.q_lat = q,
                       .q = q + T * H * LAT,
                       .scale = 0.1f,
                       .n_heads = H,
                       .latent = LAT,
                       .nope = N,
                       .rope_dims = ROPE,
                       .kv = kv,
                       .layer_offset = LAYER,
                       .selected = lists ? lists + T : NULL,
                       .n_selected = lists,
                       .topk = TOPK,
                       .o_lat = o};
    under->attend_mla(w->q, &w->st, &a);
}

static void run_gqa(world *w, td_dtype kv, const float *q, const uint32_t *lists, float *o)
{
    td_attend_gqa a = {.q = q,
                       .scale = 0.1f,
                       .n_heads = H,
                       .n_kv_heads = HKV,
                       .dims = D,
                       .kv = kv,
                       .layer_offset = LAYER,
                       .o = o};
    under->attend_gqa(w->q, &w->st, &a);
}

/* Every vector instruction set gives the bits of the first, by other loops where queries are few.
 */
static float first[3][T * H * LAT];
static int have[3];

static void same_as_first(const float *o, int slot)
{
    if (MATRIX || under == &td_backend_ref)
        return;
    if (have[slot]++)
        assert_memory_equal(first[slot], o, sizeof first[slot]);
    else
        memcpy(first[slot], o, sizeof first[slot]);
}

/* Rows of one sequence side by side, which share tiles, and one of another. */
static void same_as_bf16(form f, attend_fn run, uint32_t threads, int sparse, int slot)
{
    static const uint32_t pos[T] = {510, 511, 512, 699, 64};
    enum { OUT = T * H * LAT };
    world w[2];
    rng = (td_rng){99, 0}; /* equal input for every instruction set */
    float *q = random_floats(T * H * (LAT + N + ROPE), 0), *o[2] = {floats(OUT), floats(OUT)};
    uint32_t *lists = words(T + T * TOPK);
    for (uint32_t t = 0; t < T; t++) {
        uint32_t n = pos[t] + 1 < TOPK ? pos[t] + 1 : TOPK;
        lists[t] = n;
        for (uint32_t i = 0; i < n; i++)
            lists[T + t * TOPK + i] = n < TOPK ? i : i * (pos[t] / TOPK);
    }
    for (int i = 0; i < 2; i++) {
        build(&w[i], f, i == 0, threads);
        memcpy(w[i].positions, pos, sizeof pos);
        w[i].seq_of[4] = 1;
        w[i].st.n_rows = T;
        memset(o[i], 0, OUT * sizeof *o[i]);
    }
    fill(&w[0], &w[1]);
    for (int i = 0; i < 2; i++)
        run(&w[i], i ? TD_BF16 : TD_F8E4M3, q, sparse ? lists : NULL, o[i]);
    assert_memory_equal(o[0], o[1], OUT * sizeof(float));
    same_as_first(o[0], slot);
    assert_true(fabsf(o[0][0]) > 0.0f && fabsf(o[0][0]) < 1.0f);
    for (int i = 0; i < 2; i++)
        under->close(w[i].q);
    check_guards();
}

static void rows_attend_as_the_bf16_rows_they_stand_for(void **state)
{
    for (uint32_t threads = 1; threads <= 3; threads += 2) {
        same_as_bf16((form){LAT + ROPE, LAT}, run_mla, threads, 0, 0);
        same_as_bf16((form){LAT + ROPE, LAT}, run_mla, threads, 1, 1);
        same_as_bf16((form){2 * HKV * D, D}, run_gqa, threads, 0, 2);
    }
}

/* A group with a NaN or an infinity, zeros beside it or not, reads as NaN; so do poisoned bytes. */
static void a_nan_stays_one(void **state)
{
    enum { DIMS = 32 };
    for (int c = 0; c < 4; c++) {
        world w;
        build(&w, (form){2 * DIMS, DIMS}, 1, 1);
        w.st.n_rows = 1;
        turn_by(&w, DIMS / 2);
        float *q = random_floats(DIMS, 0), *k = random_floats(DIMS, 0), *v = random_floats(DIMS, 0),
              *o = floats(DIMS);
        for (uint32_t i = 0; c == 0 && i < DIMS; i++)
            v[i] = 0.0f;
        if (c < 3)
            v[3] = c == 2 ? -INFINITY : NAN;
        td_gqa_write wr = {.q = q,
                           .k = k,
                           .v = v,
                           .n_heads = 1,
                           .n_kv_heads = 1,
                           .dims = DIMS,
                           .rope = {0, DIMS},
                           .kv = TD_F8E4M3,
                           .layer_offset = LAYER};
        under->gqa_write(w.q, &w.st, &wr);
        if (c == 3) {
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
        under->attend_gqa(w.q, &w.st, &a);
        assert_true(isnan(o[3]));
        under->close(w.q);
        check_guards();
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(bytes_are_counted_as_here),
        cmocka_unit_test(values_are_written_to_the_bit),
        cmocka_unit_test(latents_are_written_within_half_a_step),
        cmocka_unit_test(rows_attend_as_the_bf16_rows_they_stand_for),
        cmocka_unit_test(a_nan_stays_one),
    };
    RUN_FOR_EVERY_ISA(tests);
}
