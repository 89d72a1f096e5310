/* SPDX-License-Identifier: Apache-2.0 */
/* Guards tuning in the emulation, which has no clock: one that is made up here makes large tiles
 * fast from 8 rows on. The list of shapes is what the engine launches; candidates that differ from
 * the default by a bit are refused; the table that was written decides later launches. */
#include <errno.h>

#include "tests/engine_util.h"

#include "base/bug.h"
#include "engine/shapes.h"
#include "kernels/gpu/backend.h"
#include "kernels/gpu/tune_run.h"
#include "kernels/hip/args.h"
#include "kernels/hip/emu_gpu.h"

enum { KERNELS_MAX = 128 };

/* A device whose launches are seen, and whose large tiles may be wrong. */
static td_gpu_ops inner;
static struct {
    void *handle;
    const char *name;
} kernels[KERNELS_MAX];
static size_t n_kernels;
static int last_many, wrong;
static uint32_t timed_rows;

static int see_kernel(td_gpu *g, const char *name, void **ret_kernel)
{
    int r = inner.kernel(g, name, ret_kernel);
    if (r >= 0 && n_kernels < KERNELS_MAX) {
        kernels[n_kernels].handle = *ret_kernel;
        kernels[n_kernels++].name = name;
    }
    return r;
}

static int see_launch(td_gpu *g, void *stream, void *kernel, td_gpu_dim dim, const void *args,
                      size_t args_bytes)
{
    const char *name = "";
    for (size_t i = 0; i < n_kernels; i++)
        if (kernels[i].handle == kernel)
            name = kernels[i].name;
    int product = strncmp(name, "gemm_", 5) == 0 || strncmp(name, "moe_up", 6) == 0 ||
                  strncmp(name, "moe_down", 8) == 0;
    if (product)
        last_many = strstr(name, "_many_") != NULL;
    int r = inner.launch(g, stream, kernel, dim, args, args_bytes);
    if (r >= 0 && wrong && strcmp(name, "gemm_many_bb") == 0) {
        td_k_gemm a;
        memcpy(&a, args, sizeof a);
        inner.stream_wait(g, stream);
        a.out[0][5] += 0.25f;
    }
    return r;
}

static int made_up_ms(td_gpu *g, void *from, void *to, float *ret_ms)
{
    *ret_ms = last_many ? 0.1f : 0.0125f * (float)timed_rows + 0.005f;
    return 0;
}

static td_gpu *open_device(const td_backend **ret_backend)
{
    static td_gpu_ops seen;
    td_err err = {0};
    td_gpu *g = td_emu_gpu_new(64, 0);
    assert_non_null(g);
    inner = *g->ops;
    seen = inner;
    seen.kernel = see_kernel;
    seen.launch = see_launch;
    seen.event_ms = made_up_ms;
    g->ops = &seen;
    n_kernels = 0;
    wrong = 0;
    if (td_gpu_backend_open(g, "emu", ret_backend, &err) < 0)
        fail_msg("%s", err.text);
    return g;
}

static void close_device(td_gpu *g)
{
    td_gpu_backend_close();
    td_gpu_close(g);
}

static td_tune_result measure(td_gpu *g, const td_backend *be, const td_tune_key *key,
                              uint32_t rows)
{
    static const td_tune_settings settings = {.repeats = 3, .flush_bytes = 4096};
    td_tune_bench *b = NULL;
    td_tune_result r;
    td_err err = {0};
    if (td_tune_bench_open(g, be, key, rows, &settings, &b, &err) < 0)
        fail_msg("%s", err.text);
    timed_rows = rows;
    if (td_tune_bench_run(b, rows, &r, &err) < 0)
        fail_msg("%s", err.text);
    td_tune_bench_close(b);
    return r;
}

#define KEY(OP, N, K, HEADS, SLICES, FORMAT, TP)                                                   \
    .op = TD_TUNE_##OP, .n = N, .k = K, .heads = HEADS, .slices = SLICES, .format = TD_W_##FORMAT, \
    .tp = TP, .ep = 1

/* Small ones of each op and format; heads, slices. */
static const td_tune_key keys[] = {
    {KEY(GEMM, 40, 300, 1, 1, BF16, 1)},
    {KEY(GEMM, 24, 64, 3, 1, BF16, 1)},
    {KEY(GEMM, 40, 256, 1, 8, FP8, 1)},
    {KEY(GEMM, 40, 128, 1, 4, MXFP4, 1)},
    {KEY(SILU, 48, 96, 1, 1, MXFP4, 1)},
    {KEY(SILU, 48, 96, 1, 1, FP8, 1)},
    {KEY(MOE, 64, 96, 1, 2, BF16, 1), .experts = 5, .top_k = 2},
    {KEY(MOE, 64, 96, 1, 2, MXFP4, 4), .experts = 9, .top_k = 4},
    {KEY(GEMM, 40, 128, 1, 4, MXFP4, 1), .act_fp8 = 1},
    {KEY(SILU, 48, 96, 1, 1, MXFP4, 1), .act_fp8 = 1},
    {KEY(MOE, 64, 96, 1, 2, MXFP4, 1), .act_fp8 = 1, .experts = 9, .top_k = 4},
};

static void candidates_agree_and_the_fastest_is_chosen(void **state)
{
    const td_backend *be = NULL;
    td_gpu *g = open_device(&be);
    for (size_t i = 0; i < TD_ARRAY_LEN(keys); i++)
        for (uint32_t rows = 1; rows <= 16; rows *= 4) {
            td_tune_result r = measure(g, be, &keys[i], rows);
            assert_string_equal(r.refused[0], "");
            assert_int_equal(r.row.plan, rows >= 8 ? TD_GPU_PLAN_MANY : TD_GPU_PLAN_FEW);
            assert_true(r.us[TD_GPU_PLAN_FEW] > 0 && r.us[TD_GPU_PLAN_MANY] > 0);
            assert_int_equal(r.row.key.rows, rows);
            assert_int_equal(r.row.key.cus, g->n_cus);
            /* sums of BF16 products in f32; experts also round activations */
            if (!(r.row.error <= (keys[i].op == TD_TUNE_MOE ? 1e-3 : 3e-3) && r.row.error >= 0))
                fail_msg("key %zu, %u rows: error %g", i, rows, r.row.error);
            if (keys[i].op == TD_TUNE_GEMM)
                assert_true(r.row.error < 1e-6);
        }
    close_device(g);
}

static void a_wrong_candidate_is_refused(void **state)
{
    const td_backend *be = NULL;
    td_gpu *g = open_device(&be);
    wrong = 1;
    td_tune_result r = measure(g, be, &keys[0], 16);
    assert_non_null(strstr(r.refused[0], "many: output 5 of 640 is "));
    assert_non_null(strstr(r.refused[0], "(error 0.25)"));
    assert_int_equal(r.row.plan, TD_GPU_PLAN_FEW);
    assert_true(r.us[TD_GPU_PLAN_MANY] < 0);
    close_device(g);
}

/* Measure, write, read, launch. */
static void later_launches_follow_the_table(void **state)
{
    const td_backend *be = NULL;
    td_err err = {0};
    td_gpu *g = open_device(&be);
    td_tuned *t = NULL, *back = NULL;
    td_tune_chooser *c = NULL;
    char dir[] = "/tmp/tuned-XXXXXX", path[64];
    assert_non_null(mkdtemp(dir));
    snprintf(path, sizeof path, "%s/emu64.csv", dir);
    assert_int_equal(td_tuned_new(g->arch, &t), 0);
    for (uint32_t rows = 1; rows <= 16; rows *= 16) {
        td_tune_result r = measure(g, be, &keys[0], rows);
        assert_int_equal(td_tuned_put(t, &r.row), 0);
    }
    assert_int_equal(td_tuned_write(t, path, &err), 0);
    assert_int_equal(td_tuned_load(dir, g->arch, &back, &err), 0);
    assert_int_equal(td_tune_chooser_new(back, &c), 0);
    td_gpu_backend_tuned(c);
    td_queue *q = NULL;
    td_backend_options o = {.act = TD_BF16, .n_threads = 1};
    assert_int_equal(be->open(&o, &q, &err), 0);
    td_tensor *w = NULL;
    assert_int_equal(be->weight_new(TD_W_BF16, 1, 40, 300, &w), 0);
    float *a = be->mem_alloc(q, 16 * 300 * sizeof *a), *out = be->mem_alloc(q, 16 * 40 * 4);
    td_gemm m = {.a = a,
                 .a_stride = 300,
                 .n_heads = 1,
                 .n_out = 1,
                 .w = {w},
                 .out = {out},
                 .out_stride = {40}};
    static const struct {
        uint32_t rows;
        int many;
        size_t untuned;
    } want[] = {{1, 0, 0}, {16, 1, 0}, {9, 1, 0}, {2, 0, 1}, {2, 0, 1}, {4, 0, 2}};
    for (size_t i = 0; i < TD_ARRAY_LEN(want); i++) {
        td_step st = {.n_rows = want[i].rows};
        be->gemm(q, &st, &m);
        assert_int_equal(be->finish(q), 0);
        assert_int_equal(last_many, want[i].many);
        assert_int_equal(td_tune_untuned(c), want[i].untuned);
    }
    assert_int_equal(td_tune_untuned_at(c, 0)->rows, 2);
    be->mem_free(q, a);
    be->mem_free(q, out);
    be->weight_free(w);
    be->close(q);
    td_gpu_backend_tuned(NULL);
    td_tune_chooser_free(c);
    td_tuned_free(t);
    td_tuned_free(back);
    unlink(path);
    rmdir(dir);
    close_device(g);
}

/* Every shape that a forward pass asked for is in the list, and the list has no other. */
static void list_is_what_is_launched(int fp8)
{
    static const char *const models[] = {"glm-shared",  "glm-groups",    "glm-mxfp4",
                                         "glm-mixed",   "glm-mxfp4-fp8", "qwen3-mxfp4-fp8",
                                         "qwen3-mxfp4", "glm-mxfp4-all", "glm-fp8",
                                         "qwen3",       "qwen3-tied"};
    static const uint32_t one[] = {1};
    for (size_t i = 0; i < TD_ARRAY_LEN(models); i++) {
        char dir[300];
        if (fp8 && !strstr(models[i], "mxfp4"))
            continue;
        const td_backend *be = NULL;
        td_err err = {0};
        td_shapes s = {0};
        td_tuned *none = NULL;
        td_tune_chooser *c = NULL;
        snprintf(dir, sizeof dir, "%s/tests/goldens/models/%s", TD_SOURCE_DIR, models[i]);
        td_gpu *g = open_device(&be);
        assert_int_equal(td_tuned_new(g->arch, &none), 0);
        assert_int_equal(td_tune_chooser_new(none, &c), 0);
        td_gpu_backend_tuned(c);
        test_engine t = test_open((test_setup){.dir = dir,
                                               .backend = be,
                                               .type = TD_BF16,
                                               .act_fp8 = fp8,
                                               .threads = 1,
                                               .max_rows = 8,
                                               .max_seqs = 1,
                                               .n_blocks = 2});
        uint32_t ids[5];
        test_random_ids(3, t.info->vocab_size, ids, 5);
        td_seq *q = test_seq(&t, ids, 5, 5, (td_sampling){.temperature = 0.0f}, 2);
        test_prefill(&t, q, 8, NULL);
        td_seq_free(q);
        test_close(&t);
        if (td_shapes_add(dir, one, 1, fp8, &s, &err) < 0)
            fail_msg("%s", err.text);
        size_t launched = 0, found = 0, scaled = 0;
        for (size_t j = 0; j < s.n; j++) {
            launched += (size_t)s.data[j].launched;
            scaled += s.data[j].key.act_fp8;
        }
        assert_int_equal(scaled > 0, fp8);
        for (size_t j = 0; j < td_tune_untuned(c); j++) {
            td_tune_key k = *td_tune_untuned_at(c, j);
            char text[200];
            td_tune_key_text(&k, text, sizeof text);
            k.rows = k.cus = 0;
            size_t at = 0;
            while (at < s.n && memcmp(&s.data[at].key, &k, sizeof k) != 0)
                at++;
            if (at == s.n || !s.data[at].launched)
                fail_msg("%s launches %s, which is not in the list", models[i], text);
            found++;
        }
        if (found != launched)
            fail_msg("%s: %zu shapes in the list, %zu launched", models[i], launched, found);
        td_gpu_backend_tuned(NULL);
        td_tune_chooser_free(c);
        td_tuned_free(none);
        td_shapes_done(&s);
        close_device(g);
    }
}

static void the_list_is_what_the_engine_launches(void **state)
{
    list_is_what_is_launched(0);
    list_is_what_is_launched(1);
}

/* By name, before anything is measured. */
static void a_device_without_it_refuses(void **state)
{
    static const td_tune_settings settings = {.repeats = 3};
    const td_backend *be = NULL;
    td_gpu *g = open_device(&be);
    td_backend without = *be;
    td_tune_key key = keys[3];
    td_tune_bench *b = NULL;
    td_err err = {0};
    without.act_fp8 = 0;
    key.act_fp8 = 1;
    assert_int_equal(td_tune_bench_open(g, &without, &key, 16, &settings, &b, &err), -ENOTSUP);
    assert_non_null(strstr(err.text, "has no scaled matrix instruction"));
    close_device(g);
}

/* Rows that were measured with BF16 operands say nothing of FP8 ones. */
static void operands_have_rows_of_their_own(void **state)
{
    const td_backend *be = NULL;
    td_err err = {0};
    td_gpu *g = open_device(&be);
    td_tuned *t = NULL;
    td_tune_chooser *c = NULL;
    assert_int_equal(td_tuned_new(g->arch, &t), 0);
    td_tuned_row row = measure(g, be, &keys[3], 16).row;
    assert_int_equal(row.key.act_fp8, 0);
    assert_int_equal(td_tuned_put(t, &row), 0);
    assert_int_equal(td_tune_chooser_new(t, &c), 0);
    td_gpu_backend_tuned(c);
    for (int act_fp8 = 0; act_fp8 < 2; act_fp8++) {
        td_queue *q = NULL;
        td_backend_options o = {.act = TD_BF16, .act_fp8 = act_fp8, .n_threads = 1};
        assert_int_equal(be->open(&o, &q, &err), 0);
        td_tensor *w = NULL;
        assert_int_equal(be->weight_new(TD_W_MXFP4, 1, 40, 128, &w), 0);
        float *a = be->mem_alloc(q, 16 * 128 * sizeof *a), *out = be->mem_alloc(q, 16 * 40 * 16);
        td_gemm m = {.a = a,
                     .a_stride = 128,
                     .n_heads = 1,
                     .epilogue = TD_EPI_PARTIAL,
                     .n_out = 1,
                     .w = {w},
                     .out = {out},
                     .slices = 4};
        td_step st = {.n_rows = 16};
        be->gemm(q, &st, &m);
        assert_int_equal(be->finish(q), 0);
        assert_int_equal(last_many, !act_fp8); /* 16 rows: few, unless a row says otherwise */
        assert_int_equal(td_tune_untuned(c), act_fp8);
        be->mem_free(q, a);
        be->mem_free(q, out);
        be->weight_free(w);
        be->close(q);
    }
    assert_int_equal(td_tune_untuned_at(c, 0)->act_fp8, 1);
    td_gpu_backend_tuned(NULL);
    td_tune_chooser_free(c);
    td_tuned_free(t);
    close_device(g);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(candidates_agree_and_the_fastest_is_chosen),
        cmocka_unit_test(a_wrong_candidate_is_refused),
        cmocka_unit_test(later_launches_follow_the_table),
        cmocka_unit_test(the_list_is_what_the_engine_launches),
        cmocka_unit_test(operands_have_rows_of_their_own),
        cmocka_unit_test(a_device_without_it_refuses),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
