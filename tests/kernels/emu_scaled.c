/* SPDX-License-Identifier: Apache-2.0 */
/* Guards MXFP4 weights that meet FP8 operands in the scaled matrix instruction (kernels/hip/
 * scaled.hpp): the operand is rounded as the OCP rule says, products match float64 on ragged
 * shapes, neither launch plan nor lane order nor company of rows changes a bit, a rank's slices are
 * those of the whole, experts are right on both plans, NaN stays NaN, a whole model gives the same
 * bytes however its prompt is cut; devices without it refuse. */
#include <errno.h>

#include "tests/engine_util.h"
#include "tests/kernels/kernels_util.h"

#include "base/bug.h"
#include "base/hash.h"
#include "kernels/hip/args.h"

enum { MANY = 70 };

static td_queue *open_fp8(void)
{
    td_queue *q = NULL;
    td_err err = {0};
    td_backend_options o = {.act = TD_BF16, .act_fp8 = 1, .n_threads = 1};
    if (under->open(&o, &q, &err) < 0)
        fail_msg("%s", err.text);
    return q;
}

static td_gemm product(const float *a, uint32_t k, const td_tensor *w, uint32_t n, float *out)
{
    return (td_gemm){
        .a = a, .a_stride = k, .n_heads = 1, .n_out = 1, .w = {w}, .out = {out}, .out_stride = {n}};
}

/* OCP MX 1.0, 6.3, in float64: scale by the exponent of the largest magnitude less 8 (that of
 * 448), elements with 3 bits of mantissa down to 2^-9, ties to even. */
static void round_as_ocp(const float *x, uint32_t k, double *ret)
{
    for (uint32_t g = 0; g < k; g += 32) {
        double most = 0;
        for (uint32_t i = g; i < g + 32; i++)
            most = fmax(most, fabs((double)x[i]));
        int e = most > 0 ? ilogb(most) - 8 : -127;
        e = e < -127 ? -127 : e;
        for (uint32_t i = g; i < g + 32; i++) {
            double v = ldexp((double)x[i], -e), a = fabs(v);
            int step = a < 0x1p-6 ? -9 : ilogb(a) - 3;
            a = fmin(ldexp(nearbyint(ldexp(a, -step)), step), 448);
            ret[i] = ldexp(copysign(a, v), e);
        }
    }
}

/* Rows whose magnitudes differ by far, as activations do. */
static float *operands(uint32_t rows, uint32_t k)
{
    float *a = random_floats((size_t)rows * k, 1);
    for (size_t i = 0; i < (size_t)rows * k; i++)
        a[i] = ldexpf(a[i], (int)td_rng_below(&rng, 12) - (int)(i / 32 % 5) * 4);
    return a;
}

/* A weight row with a single 1 reads the operand back: exactly the rule's values. */
static void operands_are_rounded_by_the_rule(void **state)
{
    enum { K = 256 };
    uint8_t codes[K][K / 2] = {0}, scales[K][K / 32];
    memset(scales, 127, sizeof scales);
    for (uint32_t i = 0; i < K; i++)
        codes[i][i / 2] = i % 2 ? 0x20 : 0x02; /* 1.0 */
    float *a = operands(3, K), *out = floats(3ul * K);
    static const float edges[32] = {464.0f,    -464.0f,  448.0f,   479.9f,    0x1p-9f,   0x1.8p-9f,
                                    0x1p-10f,  17.0f,    19.0f,    -18.0f,    0x1.fp-7f, 0x1.fep-7f,
                                    0x1p-126f, 0x1p-40f, -0x1p-9f, 0x1.8p-10f};
    for (uint32_t i = 0; i < 32; i++) {
        a[i] = edges[i];
        a[32 + i] = 0.0f;
        a[64 + i] = ldexpf(edges[i], 119); /* the largest scale */
        a[96 + i] = ldexpf(edges[i], -116);
        a[128 + i] = i ? 0.0f : 0x1.fffffep+127f;
    }
    td_weight_src src = {
        .dtype = TD_U8, .base = codes, .scales = scales, .n_stride = K / 2, .k_stride = 1};
    td_tensor *w = NULL;
    assert_int_equal(under->weight_new(TD_W_MXFP4, 1, K, K, &w), 0);
    under->weight_fill(w, 0, 0, K, &src);
    td_queue *q = open_fp8();
    td_step st = {.n_rows = 3};
    td_gemm g = product(a, K, w, K, out);
    under->gemm(q, &st, &g);
    assert_int_equal(under->finish(q), 0);
    double want[K];
    for (uint32_t t = 0; t < 3; t++) {
        round_as_ocp(a + t * K, K, want);
        for (uint32_t i = 0; i < K; i++)
            near((double)out[t * K + i], want[i], 0.0, "operand", t * K + i);
    }
    under->weight_free(w);
    under->close(q);
    check_guards();
}

/* A group's sum is rounded once (more on hardware), then K / 32 sums of groups. */
static void matches_float64(uint32_t rows, uint32_t n, uint32_t k)
{
    double *w = malloc(sizeof *w * n * k), *x = malloc(sizeof *x * k);
    float *a = operands(rows, k), *out = floats((size_t)rows * n), *alone = floats(n);
    td_tensor *t = weight_random(TD_W_MXFP4, n, k, w);
    td_queue *q = open_fp8();
    td_step st = {.n_rows = rows};
    td_gemm g = product(a, k, t, n, out);
    under->gemm(q, &st, &g);
    st.n_rows = 1;
    for (uint32_t r = 0; r < rows; r++) {
        round_as_ocp(a + (size_t)r * k, k, x);
        for (uint32_t i = 0; i < n; i++) {
            double want = 0, size = 0;
            for (uint32_t j = 0; j < k; j++) {
                want += x[j] * w[(size_t)i * k + j];
                size += fabs(x[j] * w[(size_t)i * k + j]);
            }
            near((double)out[r * n + i], want, size * 6e-8 * (k / 32 + 4.0), "scaled", r * n + i);
        }
        if (r % 9)
            continue;
        g = product(a + (size_t)r * k, k, t, n, alone);
        under->gemm(q, &st, &g);
        assert_memory_equal(alone, out + (size_t)r * n, n * sizeof *alone);
    }
    under->weight_free(t);
    under->close(q);
    free(w);
    free(x);
    check_guards();
}

static void products_match_float64_and_rows_stand_alone(void **state)
{
    static const uint32_t shapes[][3] = {{1, 1, 32},   {2, 17, 64},   {3, 50, 288}, {5, 33, 320},
                                         {17, 20, 96}, {70, 70, 160}, {40, 33, 416}};
    for (size_t i = 0; i < TD_ARRAY_LEN(shapes); i++)
        matches_float64(shapes[i][0], shapes[i][1], shapes[i][2]);
}

/* Codes of E matrices and what they stand for. */
typedef struct experts {
    td_tensor *t;
    double *w;
} experts;

static experts experts_new(uint32_t e, uint32_t n, uint32_t k)
{
    experts x = {.w = malloc(sizeof *x.w * e * n * k)};
    size_t row = k / 2, groups = k / 32;
    uint8_t *codes = malloc(n * row), *scales = malloc(n * groups);
    assert_true(x.w && codes && scales);
    assert_int_equal(under->weight_new(TD_W_MXFP4, e, n, k, &x.t), 0);
    for (uint32_t s = 0; s < e; s++) {
        for (size_t i = 0; i < n * row; i++)
            codes[i] = (uint8_t)td_rng_next(&rng);
        for (size_t i = 0; i < n * groups; i++)
            scales[i] = (uint8_t)(121 + td_rng_below(&rng, 4));
        for (size_t i = 0; i < (size_t)n * k; i++)
            x.w[(size_t)s * n * k + i] = 0.5 * td_e2m1_doubled[codes[i / 2] >> (i % 2 * 4) & 15] *
                                         ldexp(1, scales[i / 32] - 127);
        td_weight_src src = {
            .dtype = TD_U8, .base = codes, .scales = scales, .n_stride = row, .k_stride = 1};
        under->weight_fill(x.t, s, 0, n, &src);
    }
    free(codes);
    free(scales);
    return x;
}

static void experts_free(experts *x)
{
    under->weight_free(x->t);
    free(x->w);
}

enum { D = 96, E = 5, K = 3, I = 128, SLICES = 4 };

/* One expert's answer for row a, with both operands rounded. slack: what it may be off, as
 * activations that lie near a border may round either way. */
static void expert_answer(const float *a, const experts *gate, const experts *up,
                          const experts *down, uint32_t e, double weight, double *y, double *slack)
{
    double x[D], act[I];
    float half[I];
    round_as_ocp(a, D, x);
    for (uint32_t i = 0; i < I; i++) {
        double g = 0, u = 0;
        for (uint32_t k = 0; k < D; k++) {
            g += x[k] * gate->w[((size_t)e * I + i) * D + k];
            u += x[k] * up->w[((size_t)e * I + i) * D + k];
        }
        half[i] = bf16_of((float)(g / (1 + exp(-g)) * u));
    }
    round_as_ocp(half, I, act);
    for (uint32_t n = 0; n < D; n++)
        for (uint32_t i = 0; i < I; i++) {
            double p = weight * act[i] * down->w[((size_t)e * D + n) * I + i];
            y[n] += p;
            slack[n] += fabs(p) * 1e-3;
        }
}

static void experts_case(uint32_t rows, td_gpu_plan plan, uint8_t ret_digest[16])
{
    rng = (td_rng){11, 0};
    experts gate = experts_new(E, I, D), up = experts_new(E, I, D), down = experts_new(E, D, I),
            sg = experts_new(1, I, D), su = experts_new(1, I, D), sd = experts_new(1, D, I);
    float *a = random_floats((size_t)rows * D, 1), *w = random_floats((size_t)rows * K, 0),
          *partial = floats((size_t)SLICES * rows * D),
          *act = floats(td_moe_act_elems(rows, K, I, I));
    uint32_t *ids = words((size_t)rows * K);
    for (uint32_t i = 0; i < rows * K; i++)
        ids[i] = (i + i / 7) % E;
    td_queue *q = open_fp8();
    td_step st = {.n_rows = rows};
    td_moe m = {.a = a,
                .experts = ids,
                .weights = w,
                .n_experts = E,
                .top_k = K,
                .gate = gate.t,
                .up = up.t,
                .down = down.t,
                .shared_gate = sg.t,
                .shared_up = su.t,
                .shared_down = sd.t,
                .slices = SLICES,
                .act = act,
                .partial = partial};
    td_gpu_backend_plan(plan);
    under->moe(q, &st, &m);
    td_gpu_backend_plan(TD_GPU_PLAN_AUTO);
    assert_int_equal(under->finish(q), 0);
    for (uint32_t t = 0; t < rows; t += 11) {
        double y[D] = {0}, slack[D] = {0};
        for (uint32_t k = 0; k < K; k++)
            expert_answer(a + (size_t)t * D, &gate, &up, &down, ids[t * K + k],
                          (double)w[t * K + k], y, slack);
        expert_answer(a + (size_t)t * D, &sg, &su, &sd, 0, 1.0, y, slack);
        for (uint32_t n = 0; n < D; n++) {
            double got = 0;
            for (uint32_t s = 0; s < SLICES; s++)
                got += (double)partial[((size_t)s * rows + t) * D + n];
            near(got, y[n], slack[n], "expert", t * D + n);
        }
    }
    td_hash h;
    td_hash_init(&h, NULL, 0, 16);
    td_hash_add(&h, partial, sizeof *partial * SLICES * rows * D);
    td_hash_final(&h, ret_digest);
    experts *all[] = {&gate, &up, &down, &sg, &su, &sd};
    for (size_t i = 0; i < TD_ARRAY_LEN(all); i++)
        experts_free(all[i]);
    under->close(q);
    check_guards();
}

/* Bits are also those of the other lane orders. */
static void experts_match_float64_and_plans_keep_every_bit(void **state)
{
    static uint8_t first[2][16];
    static int have;
    for (int r = 0; r < 2; r++)
        for (td_gpu_plan plan = TD_GPU_PLAN_FEW; plan <= TD_GPU_PLAN_MANY; plan++) {
            uint8_t now[16];
            experts_case(r ? MANY : 4, plan, now);
            if (!have && plan == TD_GPU_PLAN_FEW)
                memcpy(first[r], now, sizeof now);
            assert_memory_equal(now, first[r], sizeof now);
        }
    have = 1;
}

static void plain_plans_keep_every_bit(void **state)
{
    enum { N = 100, KK = 416 };
    double *values = malloc(sizeof *values * N * KK);
    float *a = operands(MANY, KK), *few = floats((size_t)MANY * N),
          *many = floats((size_t)MANY * N);
    td_tensor *g0 = weight_random(TD_W_MXFP4, N, KK, values),
              *u0 = weight_random(TD_W_MXFP4, N, KK, values);
    td_queue *q = open_fp8();
    td_step st = {.n_rows = MANY};
    td_gemm g = product(a, KK, g0, N, few);
    for (int silu = 0; silu < 2; silu++) {
        g.epilogue = silu ? TD_EPI_SILU_MUL : TD_EPI_F32;
        g.w[1] = silu ? u0 : NULL;
        g.out[0] = few;
        td_gpu_backend_plan(TD_GPU_PLAN_FEW);
        under->gemm(q, &st, &g);
        g.out[0] = many;
        td_gpu_backend_plan(TD_GPU_PLAN_MANY);
        under->gemm(q, &st, &g);
        assert_memory_equal(few, many, sizeof *few * MANY * N);
    }
    td_gpu_backend_plan(TD_GPU_PLAN_AUTO);
    under->weight_free(g0);
    under->weight_free(u0);
    under->close(q);
    free(values);
    check_guards();
}

/* Numerics, rule 12, with slices of 96 and 32 k: no instruction crosses a slice's end. */
static void a_rank_has_the_slices_of_the_whole(void **state)
{
    enum { N = 24, ROWS = 3, S = 8 };
    for (uint32_t k = 256; k <= 768; k += 512) {
        float *a = operands(ROWS, k), *whole = floats(S * ROWS * N), *part = floats(S * ROWS * N);
        uint8_t *codes = malloc(N * k / 2), *scales = malloc(N * k / 32);
        for (uint32_t i = 0; i < N * k / 2; i++)
            codes[i] = (uint8_t)td_rng_next(&rng);
        for (uint32_t i = 0; i < N * k / 32; i++)
            scales[i] = (uint8_t)(123 + td_rng_below(&rng, 8));
        td_queue *q = open_fp8();
        td_step st = {.n_rows = ROWS};
        for (uint32_t ranks = 1; ranks <= 8; ranks *= 2)
            for (uint32_t r = 0; r < ranks; r++) {
                uint32_t share = k / ranks;
                uint8_t *own = malloc(N * share / 32);
                for (uint32_t n = 0; n < N; n++)
                    memcpy(own + n * share / 32, scales + (n * k + r * share) / 32, share / 32);
                td_weight_src src = {.dtype = TD_U8,
                                     .base = codes + r * share / 2,
                                     .scales = own,
                                     .n_stride = k / 2,
                                     .k_stride = 1};
                td_tensor *t = NULL;
                assert_int_equal(under->weight_new(TD_W_MXFP4, 1, N, share, &t), 0);
                under->weight_fill(t, 0, 0, N, &src);
                td_gemm g = product(a + (size_t)r * share, k, t, N, ranks == 1 ? whole : part);
                g.epilogue = TD_EPI_PARTIAL;
                g.slices = S / ranks;
                under->gemm(q, &st, &g);
                assert_memory_equal(g.out[0], whole + (size_t)r * g.slices * ROWS * N,
                                    sizeof *part * g.slices * ROWS * N);
                under->weight_free(t);
                free(own);
            }
        under->close(q);
        free(codes);
        free(scales);
        check_guards();
    }
}

static void nan_stays_nan(void **state)
{
    enum { N = 20, KK = 160 };
    double *values = malloc(sizeof *values * N * KK);
    float *a = operands(3, KK), *out = floats(3ul * N);
    td_tensor *w = weight_random(TD_W_MXFP4, N, KK, values);
    a[KK + 40] = NAN;
    a[2 * KK + 159] = -INFINITY;
    td_queue *q = open_fp8();
    td_step st = {.n_rows = 3};
    td_gemm g = product(a, KK, w, N, out);
    under->gemm(q, &st, &g);
    for (uint32_t n = 0; n < N; n++)
        assert_true(!isnan(out[n]) && isnan(out[N + n]) && isnan(out[2 * N + n]));
    under->weight_free(w);
    under->close(q);
    free(values);
    check_guards();
}

/* Waves of 32 stand for a device without the instruction. */
static void only_devices_that_have_it_offer_it(void **state)
{
    assert_int_equal(under->act_fp8, emulated->wave == 64);
    assert_string_equal(td_gpu_backend_error(), "");
}

enum { PROMPT = 40, VOCAB = 256 };

/* Logits behind a prompt. */
static void run_model(const td_backend *be, int fp8, uint32_t chunk, float logits[VOCAB])
{
    td_model_options o = {.isa = "auto",
                          .backend = be,
                          .act = TD_BF16,
                          .act_fp8 = fp8,
                          .kv = TD_BF16,
                          .index = TD_BF16,
                          .n_threads = 1,
                          .n_ranks = 1};
    td_engine_limits l = {.max_rows = 64, .max_seqs = 2, .n_blocks = 8};
    test_engine t = {0};
    td_err err = {0};
    if (td_model_open(TD_SOURCE_DIR "/tests/goldens/models/glm-mxfp4", &o, &t.model, &err) < 0 ||
        td_engine_open(t.model, &l, &t.engine, &err) < 0)
        fail_msg("%s", err.text);
    t.info = td_model_get_info(t.model);
    assert_non_null(strstr(t.info->profile, fp8 ? "act.mxfp4=fp8g32\n" : "act.mxfp4=bf16\n"));
    assert_int_equal(t.info->vocab_size, VOCAB);
    uint32_t ids[PROMPT];
    test_random_ids(3, VOCAB, ids, PROMPT);
    td_seq *s = test_seq(&t, ids, PROMPT, PROMPT, (td_sampling){.temperature = 0.0f}, 2);
    test_prefill(&t, s, chunk, logits);
    td_seq_free(s);
    test_close(&t);
}

/* 3 bits of mantissa where BF16 has 7: operands are off by 2^-5 at most, sums of many by less. */
static void a_whole_model_is_near_and_pure(void **state)
{
    static float first[VOCAB];
    static int have;
    float want[VOCAB], whole[VOCAB], cut[VOCAB];
    run_model(&td_backend_ref, 0, PROMPT, want);
    run_model(under, 1, PROMPT, whole);
    run_model(under, 1, 7, cut);
    assert_memory_equal(cut, whole, sizeof whole);
    if (!have)
        memcpy(first, whole, sizeof whole);
    have = 1;
    assert_memory_equal(first, whole, sizeof whole);
    double worst = 0, size = 0;
    for (int i = 0; i < VOCAB; i++) {
        worst = fmax(worst, fabs((double)whole[i] - (double)want[i]));
        size = fmax(size, fabs((double)want[i]));
    }
    if (!(worst / size > 1e-3 && worst / size < 0.1))
        fail_msg("logits are off by %g of the largest", worst / size);
}

static void refuses(td_dtype act, const td_backend *be, const char *how)
{
    td_model_options o = {.isa = "ref", .backend = be, .act = act, .act_fp8 = 1, .n_ranks = 1};
    td_model *m = NULL;
    td_err err = {0};
    o.kv = o.index = TD_F32;
    assert_int_equal(td_model_open(TD_SOURCE_DIR "/tests/goldens/models/glm-mxfp4", &o, &m, &err),
                     -ENOTSUP);
    assert_non_null(strstr(err.text, "--act-mxfp4 fp8"));
    assert_non_null(strstr(err.text, how));
}

static void others_refuse_by_name(void **state)
{
    refuses(TD_BF16, NULL, "bf16 on ref");
    refuses(TD_BF16, under, "bf16 on emu32");
    refuses(TD_F32, under, "f32 on emu32");
}

int main(void)
{
    const struct CMUnitTest all[] = {
        cmocka_unit_test(only_devices_that_have_it_offer_it),
        cmocka_unit_test(operands_are_rounded_by_the_rule),
        cmocka_unit_test(products_match_float64_and_rows_stand_alone),
        cmocka_unit_test(experts_match_float64_and_plans_keep_every_bit),
        cmocka_unit_test(plain_plans_keep_every_bit),
        cmocka_unit_test(a_rank_has_the_slices_of_the_whole),
        cmocka_unit_test(nan_stays_nan),
        cmocka_unit_test(a_whole_model_is_near_and_pure),
    };
    const struct CMUnitTest none[] = {
        cmocka_unit_test(only_devices_that_have_it_offer_it),
        cmocka_unit_test(others_refuse_by_name),
    };
    int failed = 0;
    for (uint32_t order = 0; order < 3; order += EMULATIONS_APART / 2 + 1) {
        open_emulation(64, order, &under);
        failed += cmocka_run_group_tests_name("wave 64", all, NULL, NULL);
        close_emulation();
    }
    open_emulation(32, 0, &under);
    failed += cmocka_run_group_tests_name("wave 32", none, NULL, NULL);
    close_emulation();
    return failed;
}
