/* SPDX-License-Identifier: Apache-2.0 */
/* Guards promise 1 within attention and indexer: a row's bits do not depend on which rows share its
 * step, nor on threads; and AVX2 and AVX-512 give equal bits. Rows of two sequences, tile and split
 * borders inside a block of rows, dense and sparse lists side by side, ragged dims. */
#include "tests/kernels/kernels_util.h"

#include "kernels/math.h"

enum {
    LEN = 600,
    TILES = LEN / 64 + 1,
    T = 43,
    TOPK = LEN,
    HQ = 6,
    HKV = 3,
    D = 40, /* grouped-query */
    H = 5,
    C = 72,
    R = 24,
    N = 8, /* latent */
    HI = 3,
    DI = 40,
    CHOSEN = 100, /* indexer */
};

typedef struct world {
    uint32_t positions[T], seq_of[T], tables[2][TILES];
    td_step st;
} world;

/* 40 rows of one sequence, across rank 512 and tile borders; three of another. */
static void build(world *w, td_dtype kv, size_t elems)
{
    size_t bytes = elems * td_dtype_bytes(kv);
    *w = (world){0};
    for (uint32_t t = 0; t < T; t++) {
        w->positions[t] = t < 40 ? 490 + t : 62 + t - 40;
        w->seq_of[t] = t >= 40;
    }
    for (uint32_t b = 0; b < TILES; b++)
        for (uint32_t s = 0; s < 2; s++)
            w->tables[s][b] = 2 * TILES - 1 - 2 * b - s;
    w->st = (td_step){.n_rows = T,
                      .n_seqs = 2,
                      .max_context = LEN,
                      .positions = w->positions,
                      .seq_of = w->seq_of,
                      .tables = w->tables[0],
                      .table_stride = TILES,
                      .block_bytes = 64 * bytes};
    w->st.kv_base = (uint8_t *)floats(2 * TILES * w->st.block_bytes / 4);
    for (size_t i = 0; i < 2ul * TILES * 64 * elems; i++) {
        float f = value(1);
        memcpy(w->st.kv_base + i * td_dtype_bytes(kv), (char *)&f + (kv == TD_BF16 ? 2 : 0),
               td_dtype_bytes(kv));
    }
}

/* An op over rows [t, t + st->n_rows) of everything; outputs go to out. */
typedef void (*run_fn)(td_queue *q, const td_step *st, uint32_t t, td_dtype kv, const float *in,
                       const float *in2, const uint32_t *lists, void *out);

static void gqa(td_queue *q, const td_step *st, uint32_t t, td_dtype kv, const float *in,
                const float *in2, const uint32_t *lists, void *out)
{
    td_attend_gqa a = {.q = in + (size_t)t * HQ * D,
                       .scale = 0.3f,
                       .n_heads = HQ,
                       .n_kv_heads = HKV,
                       .dims = D,
                       .kv = kv,
                       .o = (float *)out + (size_t)t * HQ * D};
    under->attend_gqa(q, st, &a);
}

static void mla(td_queue *q, const td_step *st, uint32_t t, td_dtype kv, const float *in,
                const float *in2, const uint32_t *lists, void *out)
{
    td_attend_mla a = {.q_lat = in + (size_t)t * H * C,
                       .q = in2 + (size_t)t * H * (N + R),
                       .scale = 0.2f,
                       .n_heads = H,
                       .latent = C,
                       .nope = N,
                       .rope_dims = R,
                       .kv = kv,
                       .selected = lists + T + (size_t)t * TOPK,
                       .n_selected = lists + t,
                       .topk = TOPK,
                       .o_lat = (float *)out + (size_t)t * H * C};
    under->attend_mla(q, st, &a);
}

/* out: [T][CHOSEN] positions, [T] counts, [T] margins. */
static void choose(td_queue *q, const td_step *st, uint32_t t, td_dtype kv, const float *in,
                   const float *in2, const uint32_t *lists, void *out)
{
    uint32_t *o = out;
    td_index_select a = {.q = in + (size_t)t * HI * DI,
                         .weight = in2 + (size_t)t * HI,
                         .scale = 0.5f,
                         .n_heads = HI,
                         .dims = DI,
                         .topk = CHOSEN,
                         .index = kv,
                         .selected = o + (size_t)t * CHOSEN,
                         .n_selected = o + T * CHOSEN + t,
                         .margin = (float *)(o + T * (CHOSEN + 1)) + t};
    under->index_select(q, st, &a);
}

/* A third of the rows see every other position only. */
static uint32_t *make_lists(const world *w)
{
    uint32_t *lists = words(T + T * TOPK);
    for (uint32_t t = 0; t < T; t++) {
        uint32_t step = t >= 13 && t < 27 ? 2 : 1, n = 0;
        for (uint32_t p = w->positions[t] % step; p <= w->positions[t]; p += step)
            lists[T + t * TOPK + n++] = p;
        lists[t] = n;
    }
    return lists;
}

/* Results of the first vector backend, which the others must give too. */
static uint8_t first[5][T * H * C * 4];
static int have[5];

static void same_bits(run_fn run, td_dtype kv, size_t elems, size_t n_in, size_t n_in2,
                      size_t n_out, int slot)
{
    world w;
    rng = (td_rng){77, 0}; /* equal input for every instruction set */
    build(&w, kv, elems);
    float *in = random_floats(n_in, 0), *in2 = random_floats(n_in2, 0);
    uint32_t *lists = make_lists(&w), *alone = words(n_out), *got = words(n_out);
    for (uint32_t t = 0; t < T; t++) {
        td_queue *q = open_queue(TD_F32, 1);
        td_step one = w.st;
        one.n_rows = 1;
        one.positions += t;
        one.seq_of += t;
        one.max_context = w.positions[t] + 1;
        run(q, &one, t, kv, in, in2, lists, alone);
        assert_int_equal(under->finish(q), 0);
        under->close(q);
    }
    for (uint32_t threads = 1; threads <= 3; threads++) {
        td_queue *q = open_queue(TD_F32, threads);
        memset(got, 0xff, n_out * sizeof *got);
        run(q, &w.st, 0, kv, in, in2, lists, got);
        assert_int_equal(under->finish(q), 0);
        under->close(q);
        assert_memory_equal(alone, got, n_out * sizeof *got);
    }
    if (under != &td_backend_ref) {
        assert_true(n_out * 4 <= sizeof first[0]);
        if (!have[slot])
            memcpy(first[slot], got, n_out * 4);
        have[slot] = 1;
        assert_memory_equal(first[slot], got, n_out * 4);
    }
    check_guards();
}

/* Slots: each type of cache has its own. */
static void grouped_attention(void **state)
{
    for (td_dtype kv = TD_F32; kv <= TD_BF16; kv++)
        same_bits(gqa, kv, 2 * HKV * D, T * HQ * D, 1, T * HQ * D, kv == TD_BF16);
}

static void latent_attention(void **state)
{
    for (td_dtype kv = TD_F32; kv <= TD_BF16; kv++)
        same_bits(mla, kv, C + R, T * H * C, T * H * (N + R), T * H * C, 2 + (kv == TD_BF16));
}

static void indexer(void **state)
{
    same_bits(choose, TD_BF16, DI, T * HI * DI, T * HI, T * (CHOSEN + 2), 4);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(grouped_attention),
        cmocka_unit_test(latent_attention),
        cmocka_unit_test(indexer),
    };
    RUN_FOR_EVERY_ISA(tests);
}
