/* SPDX-License-Identifier: Apache-2.0 */
/* Guards the GPU backend where the kernel tests of all backends do not look: neither launch plan
 * nor lane order nor batch changes a bit; captured launches read the step anew; what it cannot do
 * is refused. */
#include <errno.h>

#include "tests/kernels/kernels_util.h"

#include "base/bug.h"
#include "base/hash.h"
#include "kernels/hip/args.h"

enum { LEN = 600, BLOCKS = LEN / 64 + 1, T = 70 };

/* One sequence in scattered blocks whose rows are random. */
typedef struct world {
    td_queue *q;
    td_step st;
    uint32_t positions[T], seq_of[T], table[BLOCKS];
} world;

static void build(world *w, td_dtype act, td_dtype kv, uint32_t row_elems, uint32_t rows)
{
    *w = (world){.q = open_queue(act, 1)};
    for (uint32_t b = 0; b < BLOCKS; b++)
        w->table[b] = (b * 3 + 1) % BLOCKS;
    w->st = (td_step){.n_rows = rows,
                      .n_seqs = 1,
                      .max_context = LEN,
                      .positions = w->positions,
                      .seq_of = w->seq_of,
                      .tables = w->table,
                      .table_stride = BLOCKS,
                      .block_bytes = 64ul * row_elems * td_dtype_bytes(kv)};
    float *pool = random_floats(BLOCKS * w->st.block_bytes / 4, 0);
    for (size_t i = 0; kv == TD_BF16 && i < BLOCKS * w->st.block_bytes / 2; i++) {
        float f = value(1);
        memcpy((char *)pool + 2 * i, (char *)&f + 2, 2);
    }
    w->st.kv_base = (uint8_t *)pool;
}

static td_tensor *random_weight(uint32_t slabs, uint32_t n, uint32_t k)
{
    float *f = random_floats((size_t)slabs * n * k, 1);
    return weight_as(TD_W_BF16, f, slabs, n, k);
}

/* Everything with a launch plan or a reduction, into one digest. */
static void digest_products(td_hash *h, uint32_t rows)
{
    enum { D = 300, N = 100, H = 2, E = 5, K = 3, I = 64 };
    float *a = random_floats(T * D, 1), *out = floats(T * N), *act = floats(T * N),
          *partial = floats(8 * T * D), *heads = floats(T * H * N),
          *work = floats(td_moe_act_elems(T, K, I, I)), *w = random_floats(T * K, 0);
    uint32_t *ids = words(T * K);
    for (uint32_t i = 0; i < T * K; i++)
        ids[i] = (i + i / 7) % E;
    td_tensor *wn = random_weight(1, N, D), *wu = random_weight(1, N, D),
              *wh = random_weight(H, N, D / H), *gate = random_weight(E, I, D),
              *up = random_weight(E, I, D), *down = random_weight(E, D, I),
              *sg = random_weight(1, I, D), *su = random_weight(1, I, D),
              *sd = random_weight(1, D, I);
    td_queue *q = open_queue(TD_BF16, 1);
    td_step st = {.n_rows = rows};
    td_gemm plain = {.a = a,
                     .a_stride = D,
                     .n_heads = 1,
                     .n_out = 1,
                     .w = {wn, wu},
                     .out = {out},
                     .out_stride = {N}};
    under->gemm(q, &st, &plain);
    plain.epilogue = TD_EPI_SILU_MUL;
    plain.out[0] = act;
    under->gemm(q, &st, &plain);
    td_gemm head = {.a = a,
                    .a_stride = D,
                    .a_head = D / H,
                    .a_round = 1,
                    .n_heads = H,
                    .n_out = 1,
                    .w = {wh},
                    .out = {heads},
                    .out_stride = {H * N},
                    .out_head = N};
    under->gemm(q, &st, &head);
    td_moe moe = {.a = a,
                  .experts = ids,
                  .weights = w,
                  .n_experts = E,
                  .top_k = K,
                  .gate = gate,
                  .up = up,
                  .down = down,
                  .shared_gate = sg,
                  .shared_up = su,
                  .shared_down = sd,
                  .slices = td_kplan_slices(I),
                  .act = work,
                  .partial = partial};
    under->moe(q, &st, &moe);
    assert_int_equal(under->finish(q), 0);
    td_hash_add(h, out, sizeof(float) * rows * N);
    td_hash_add(h, act, sizeof(float) * rows * N);
    td_hash_add(h, heads, sizeof(float) * rows * H * N);
    td_hash_add(h, partial, sizeof(float) * moe.slices * rows * D);
    td_tensor *all[] = {wn, wu, wh, gate, up, down, sg, su, sd};
    for (size_t i = 0; i < TD_ARRAY_LEN(all); i++)
        under->weight_free(all[i]);
    under->close(q);
    check_guards();
}

static void digest_attention(td_hash *h)
{
    enum { H = 3, C = 32, R = 32, Q = 100, HI = 4, DI = 32, ROWS = 4 };
    static const uint32_t pos[ROWS] = {5, 200, 64, LEN - 1};
    world w;
    build(&w, TD_BF16, TD_BF16, C + R, ROWS);
    memcpy(w.positions, pos, sizeof pos);
    float *lat = random_floats(ROWS * H * C, 0), *q = random_floats(ROWS * H * R, 0),
          *o = floats(ROWS * H * C), *iq = random_floats(ROWS * HI * DI, 0),
          *iw = random_floats(ROWS * HI, 0), *g = floats(ROWS * H * C);
    uint32_t *sel = words(ROWS * Q), *n = words(ROWS);
    memset(sel, 0, ROWS * Q * sizeof *sel);
    td_index_select select = {.q = iq,
                              .weight = iw,
                              .scale = 0.1f,
                              .n_heads = HI,
                              .dims = DI,
                              .topk = Q,
                              .index = TD_BF16,
                              .selected = sel,
                              .n_selected = n};
    under->index_select(w.q, &w.st, &select);
    td_attend_mla a = {.q_lat = lat,
                       .q = q,
                       .scale = 0.2f,
                       .n_heads = H,
                       .latent = C,
                       .rope_dims = R,
                       .kv = TD_BF16,
                       .selected = sel,
                       .n_selected = n,
                       .topk = Q,
                       .o_lat = o};
    under->attend_mla(w.q, &w.st, &a);
    td_attend_gqa ga = {
        .q = lat, .scale = 0.2f, .n_heads = H, .n_kv_heads = 1, .dims = C, .kv = TD_BF16, .o = g};
    under->attend_gqa(w.q, &w.st, &ga);
    assert_int_equal(under->finish(w.q), 0);
    td_hash_add(h, sel, sizeof(uint32_t) * ROWS * Q);
    td_hash_add(h, o, sizeof(float) * ROWS * H * C);
    td_hash_add(h, g, sizeof(float) * ROWS * H * C);
    under->close(w.q);
    check_guards();
}

static void digest(td_gpu_plan plan, uint8_t out[16])
{
    td_hash h;
    td_hash_init(&h, NULL, 0, 16);
    rng = (td_rng){7, 0};
    td_gpu_backend_plan(plan);
    digest_products(&h, T);
    digest_products(&h, 3);
    digest_attention(&h);
    td_gpu_backend_plan(TD_GPU_PLAN_AUTO);
    td_hash_final(&h, out);
}

static void plans_and_lane_orders_keep_every_bit(void **state)
{
    static uint8_t first[2][16];
    static int have[2];
    uint32_t wave = emulated->wave == 64;
    for (td_gpu_plan plan = TD_GPU_PLAN_AUTO; plan <= TD_GPU_PLAN_MANY; plan++) {
        uint8_t now[16];
        digest(plan, now);
        if (!have[wave])
            memcpy(first[wave], now, sizeof now);
        have[wave] = 1;
        assert_memory_equal(now, first[wave], sizeof now);
    }
}

static void a_row_alone_has_the_bits_of_a_row_in_a_batch(void **state)
{
    enum { D = 544, N = 40, H = 2, C = 32, R = 32 };
    float *a = random_floats(T * D, 1), *out = floats(T * N), *one = floats(N);
    td_tensor *w = random_weight(1, N, D);
    td_queue *q = open_queue(TD_BF16, 1);
    td_step st = {.n_rows = T};
    td_gemm g = {
        .a = a, .a_stride = D, .n_heads = 1, .n_out = 1, .w = {w}, .out = {out}, .out_stride = {N}};
    under->gemm(q, &st, &g);
    st.n_rows = 1;
    g.out[0] = one;
    for (uint32_t t = 0; t < T; t += 23) {
        g.a = a + (size_t)t * D;
        under->gemm(q, &st, &g);
        assert_memory_equal(one, out + (size_t)t * N, N * sizeof *one);
    }
    under->weight_free(w);
    under->close(q);

    world b;
    build(&b, TD_BF16, TD_BF16, C + R, 3);
    for (uint32_t t = 0; t < 3; t++)
        b.positions[t] = 70 * t + 500 * (t == 2);
    b.positions[2] = LEN - 1;
    float *lat = random_floats(3ul * H * C, 0), *pe = random_floats(3ul * H * R, 0),
          *o = floats(3ul * H * C), *alone = floats(H * C);
    td_attend_mla m = {.q_lat = lat,
                       .q = pe,
                       .scale = 0.2f,
                       .n_heads = H,
                       .latent = C,
                       .rope_dims = R,
                       .kv = TD_BF16,
                       .o_lat = o};
    under->attend_mla(b.q, &b.st, &m);
    b.st.n_rows = 1;
    b.positions[0] = LEN - 1;
    m.q_lat = lat + 2ul * H * C;
    m.q = pe + 2ul * H * R;
    m.o_lat = alone;
    under->attend_mla(b.q, &b.st, &m);
    assert_memory_equal(alone, o + 2ul * H * C, H * C * sizeof *o);
    under->close(b.q);
    check_guards();
}

/* What a decode step as a graph needs: the rows come from the step, not from the launch. */
static void a_captured_launch_reads_the_step_anew(void **state)
{
    enum { N = 20, ROWS = 3 };
    const td_gpu_ops *o = emulated->ops;
    float *partial = random_floats(2ul * ROWS * N, 0), *out = floats(ROWS * N);
    memset(out, 0, ROWS * N * sizeof *out);
    td_step *step = o->mem_alloc(emulated, sizeof *step);
    void *stream = NULL, *kernel = NULL, *graph = NULL;
    assert_int_equal(o->stream_new(emulated, &stream), 0);
    assert_int_equal(o->kernel(emulated, "reduce_slices", &kernel), 0);
    td_k_reduce a = {step, partial, 1, N, out};
    td_step now = {.n_rows = 1};
    assert_int_equal(o->graph_begin(emulated, stream), 0);
    td_gpu_dim dim = {ROWS, 4 * emulated->wave, 0};
    assert_int_equal(o->launch(emulated, stream, kernel, dim, &a, sizeof a), 0);
    assert_int_equal(o->graph_end(emulated, stream, &graph), 0);
    assert_true(out[0] == 0.0f);
    for (now.n_rows = 1; now.n_rows <= ROWS; now.n_rows++) {
        assert_int_equal(o->upload(emulated, stream, step, &now, sizeof now), 0);
        assert_int_equal(o->graph_launch(emulated, stream, graph), 0);
        for (uint32_t i = 0; i < ROWS * N; i++)
            assert_true(out[i] == (i < now.n_rows * N ? partial[i] : 0.0f));
    }
    o->graph_free(emulated, graph);
    o->stream_free(emulated, stream);
    o->mem_free(emulated, step);
    check_guards();
}

static int no_upload(td_gpu *g, void *stream, void *dst, const void *src, size_t bytes)
{
    snprintf(g->error, sizeof g->error, "emu: upload: cable pulled");
    return -EIO;
}

static void weights_that_do_not_arrive_open_no_queue(void **state)
{
    const td_gpu_ops *whole = emulated->ops;
    td_gpu_ops broken = *whole;
    broken.upload = no_upload;
    emulated->ops = &broken;
    td_tensor *w = random_weight(1, 20, 40);
    emulated->ops = whole;
    td_queue *q = NULL;
    td_err err = {0};
    td_backend_options o = {.act = TD_BF16, .n_threads = 1};
    assert_int_equal(under->open(&o, &q, &err), -EIO);
    assert_string_equal(err.text, "weights did not reach the device: emu: upload: cable pulled");
    assert_null(q);
    under->weight_free(w);
    check_guards();
    td_gpu_backend_close(); /* the failure belongs to this opening */
    assert_int_equal(td_gpu_backend_open(emulated, "emu", &under, &err), 0);
}

static void what_it_cannot_do_is_refused(void **state)
{
    const td_backend *second = NULL;
    td_err err = {0};
    assert_int_equal(td_gpu_backend_open(emulated, "emu", &second, &err), -EBUSY);
    /* values wider than the accumulators of one wave */
    td_queue *q = open_queue(TD_F32, 1);
    td_step st = {.n_rows = 1, .max_context = 1};
    td_attend_gqa a = {.n_heads = 1, .n_kv_heads = 1, .dims = 1024, .kv = TD_F32};
    under->attend_gqa(q, &st, &a);
    assert_int_equal(under->finish(q), -E2BIG);
    assert_int_equal(under->finish(q), 0);
    td_index_select x = {.n_heads = 1, .dims = 32, .topk = 1, .index = TD_F8E4M3};
    under->index_select(q, &st, &x); /* no kernel reads such keys: refused, not misread */
    assert_int_equal(under->finish(q), -ENOTSUP);
    under->close(q);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(plans_and_lane_orders_keep_every_bit),
        cmocka_unit_test(a_row_alone_has_the_bits_of_a_row_in_a_batch),
        cmocka_unit_test(a_captured_launch_reads_the_step_anew),
        cmocka_unit_test(weights_that_do_not_arrive_open_no_queue),
        cmocka_unit_test(what_it_cannot_do_is_refused),
    };
    RUN_FOR_EVERY_ISA(tests);
}
