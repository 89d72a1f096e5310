/* SPDX-License-Identifier: Apache-2.0 */
/* Guards tables of launch plans: what is read is what was written, what is wrong is named by file,
 * line and field, the list of shapes comes from a config.json, and a shape without a row is noted
 * once. */
#include <dirent.h>
#include <errno.h>
#include <unistd.h>

#include "tests/kernels/kernels_util.h"

#include "base/bug.h"
#include "base/json.h"
#include "engine/shapes.h"
#include "kernels/gpu/tune.h"
#include "kernels/gpu/tune_tables.h"

#define HEADER "arch,cus,op,rows,n,k,heads,slices,dtype,experts,top_k,share,variant,us,error\n"
#define GEMM   "gfx942,304,gemm,16,2048,6144,1,1,bf16,0,0,tp1,few,12.5,1e-7\n"

static td_tuned *parse(const char *text)
{
    td_tuned *t = NULL;
    td_err err = {0};
    if (td_tuned_parse(text, strlen(text), "x.csv", "gfx942", &t, &err) < 0)
        fail_msg("%s", err.text);
    return t;
}

static void refused(const char *text, const char *why)
{
    td_tuned *t = NULL;
    td_err err = {0};
    assert_int_equal(td_tuned_parse(text, strlen(text), "x.csv", "gfx942", &t, &err), -EINVAL);
    if (strcmp(err.text, why) != 0)
        fail_msg("'%s' is not '%s'", err.text, why);
    assert_null(t);
}

static void what_is_wrong_is_named(void **state)
{
    static const struct {
        const char *row, *why;
    } bad[] = {
        {"gfx950,304,gemm,16,8,8,1,1,bf16,0,0,tp1,few,1,0",
         "field arch: 'gfx950' is not the architecture that names the file"},
        {"gfx942,0,gemm,16,8,8,1,1,bf16,0,0,tp1,few,1,0",
         "field cus: '0' is not a whole number from 1 to 65536"},
        {"gfx942,304,mul,16,8,8,1,1,bf16,0,0,tp1,few,1,0",
         "field op: 'mul' is not one of gemm gemm_silu moe"},
        {"gfx942,304,gemm,12,8,8,1,1,bf16,0,0,tp1,few,1,0",
         "field rows: '12' is not a power of two"},
        {"gfx942,304,gemm,16,-8,8,1,1,bf16,0,0,tp1,few,1,0",
         "field n: '-8' is not a whole number from 1 to 1073741824"},
        {"gfx942,304,gemm,16,8,99999999999999999999,1,1,bf16,0,0,tp1,few,1,0",
         "field k: '99999999999999999999' is not a whole number from 1 to 1073741824"},
        {"gfx942,304,gemm,16,8,8,1,9,bf16,0,0,tp1,few,1,0",
         "field slices: '9' is not a whole number from 1 to 8"},
        {"gfx942,304,gemm,16,8,8,1,1,f32,0,0,tp1,few,1,0",
         "field dtype: 'f32' is not one of bf16 fp8 mxfp4 mxfp4_fp8"},
        {"gfx942,304,gemm,16,8,8,1,1,bf16,4,0,tp1,few,1,0",
         "field experts: '4' is not a whole number from 0 to 0"},
        {"gfx942,304,moe,16,8,8,1,1,bf16,4,5,tp1,few,1,0",
         "field top_k: '5' is not a whole number from 1 to 4"},
        {"gfx942,304,gemm,16,8,8,1,1,bf16,0,0,xp1,few,1,0",
         "field share: 'xp1' is neither tpN nor epN"},
        {"gfx942,304,gemm,16,8,8,1,1,bf16,0,0,tp1,auto,1,0",
         "field variant: 'auto' is not one of few many"},
        {"gfx942,304,gemm,16,8,8,1,1,bf16,0,0,tp1,few,-1,0",
         "field us: '-1' is not a number from 0 on"},
        {"gfx942,304,gemm,16,8,8,1,1,bf16,0,0,tp1,few,1,nan",
         "field error: 'nan' is not a number from 0 on"},
    };
    for (size_t i = 0; i < TD_ARRAY_LEN(bad); i++) {
        char text[600], why[200];
        snprintf(text, sizeof text, HEADER GEMM "%s\n", bad[i].row);
        snprintf(why, sizeof why, "x.csv: line 3, %s", bad[i].why);
        refused(text, why);
    }
    refused("", "x.csv: empty, not even a header");
    refused("arch,cus\n", "x.csv: line 1 is not the header: arch,cus,op,rows,n,k,heads,slices,"
                          "dtype,experts,top_k,share,variant,us,error");
    refused(HEADER "gfx942,304\n",
            "x.csv: line 2 has 2 fields, not 15: arch,cus,op,rows,n,k,heads,slices,dtype,experts,"
            "top_k,share,variant,us,error");
    refused(HEADER GEMM GEMM, "x.csv: line 3 has the key of an earlier line");
    refused(HEADER GEMM "\n", "x.csv: line 3 has 1 fields, not 15: arch,cus,op,rows,n,k,heads,"
                              "slices,dtype,experts,top_k,share,variant,us,error");
}

static void what_is_written_is_read(void **state)
{
    td_tuned *t = parse(HEADER "gfx942,304,moe,64,512,6144,1,2,mxfp4,257,9,tp4,many,99.125,2e-6\n"
                               "gfx942,304,moe,64,512,6144,1,2,mxfp4_fp8,257,9,tp4,few,50,2e-6\n"
                               "gfx942,304,moe,8,2048,6144,1,8,fp8,32,8,ep8,few,7,0\n" GEMM),
             *back = NULL;
    td_err err = {0};
    char dir[] = "/tmp/tuned-XXXXXX", path[64];
    assert_non_null(mkdtemp(dir));
    snprintf(path, sizeof path, "%s/gfx942.csv", dir);
    for (int again = 0; again < 2; again++) { /* a file that is there is replaced */
        assert_int_equal(td_tuned_write(t, path, &err), 0);
        assert_int_equal(td_tuned_load(dir, "gfx942", &back, &err), 0);
        assert_int_equal(back->n, 4);
        for (size_t i = 0; i < 4; i++) {
            assert_memory_equal(&back->rows[i].key, &t->rows[i].key, sizeof t->rows[i].key);
            assert_int_equal(back->rows[i].plan, t->rows[i].plan);
            assert_true(back->rows[i].us == t->rows[i].us &&
                        back->rows[i].error == t->rows[i].error);
        }
        td_tuned_free(back);
    }
    size_t files = 0;
    DIR *d = opendir(dir);
    assert_non_null(d);
    while (readdir(d))
        files++;
    closedir(d);
    assert_int_equal(files, 3); /* ., .., the table: nothing is left of the writing */
    assert_int_equal(td_tuned_load(dir, "gfx950", &back, &err), -ENOENT);
    assert_non_null(strstr(err.text, "gfx950.csv"));
    unlink(path);
    rmdir(dir);
    assert_true(td_tuned_write(t, path, &err) < 0);
    assert_non_null(strstr(err.text, path));
    td_tuned_free(t);
}

/* Nothing was measured yet: they hold a header, which must be the reader's. */
static void built_in_tables_are_read(void **state)
{
    size_t n = 0;
    for (; td_tune_table_arch(n); n++) {
        td_tuned *t = NULL;
        td_err err = {0};
        if (td_tuned_load("", td_tune_table_arch(n), &t, &err) < 0)
            fail_msg("%s", err.text);
        td_tuned_free(t);
    }
    assert_int_equal(n, 3);
}

static void a_shape_without_a_row_is_noted_once(void **state)
{
    td_tuned *t = parse(HEADER GEMM);
    td_tune_chooser *c = NULL;
    assert_int_equal(td_tune_chooser_new(t, &c), 0);
    td_tune_key k = t->rows[0].key;
    assert_int_equal(td_tune_choose(c, &k), TD_GPU_PLAN_FEW);
    assert_int_equal(td_tune_untuned(c), 0);
    for (int i = 0; i < 3; i++)
        for (k.n = 1; k.n <= 1500; k.n++)
            assert_int_equal(td_tune_choose(c, &k), TD_GPU_PLAN_AUTO);
    assert_int_equal(td_tune_untuned(c), 1024); /* bounded */
    assert_int_equal(td_tune_untuned_at(c, 41)->n, 42);
    k.cus = 228; /* the same architecture with other compute units has rows of its own */
    k.n = 2048;
    assert_int_equal(td_tune_choose(c, &k), TD_GPU_PLAN_AUTO);
    td_tune_chooser_free(c);
    td_tuned_free(t);
}

static int has(const td_shapes *s, td_tune_op op, uint32_t n, uint32_t k, uint32_t experts,
               uint32_t top_k, uint32_t tp, td_weight_format f)
{
    for (size_t i = 0; i < s->n; i++) {
        const td_tune_key *key = &s->data[i].key;
        if (key->op == (uint32_t)op && key->n == n && key->k == k && key->experts == experts &&
            key->top_k == top_k && key->tp == tp && key->ep == 1 && key->format == (uint32_t)f)
            return 1 + s->data[i].launched;
    }
    return 0;
}

/* From its config.json: hidden 6144, experts' inner width 2048, 512, 256 on 1, 4, 8 ranks. */
static void shapes_of_glm_5_2(void **state)
{
    static const uint32_t ranks[] = {1, 4, 8};
    static const char dir[] = TD_SOURCE_DIR "/bench/shapes/glm-5.2";
    td_shapes s = {0};
    td_err err = {0};
    if (td_shapes_add(dir, ranks, 3, 0, &s, &err) < 0)
        fail_msg("%s", err.text);
    for (size_t i = 0; i < 3; i++) {
        uint32_t r = ranks[i];
        int own = r == 1 ? 2 : 1; /* on one rank the engine launches it */
        assert_int_equal(has(&s, TD_TUNE_MOE, 2048 / r, 6144, 256, 8, r, TD_W_MXFP4), own);
        assert_int_equal(has(&s, TD_TUNE_MOE, 2048 / r, 6144, 257, 9, r, TD_W_MXFP4), 1);
        assert_int_equal(has(&s, TD_TUNE_SILU, 2048 / r, 6144, 0, 0, r, TD_W_MXFP4), own);
        assert_int_equal(has(&s, TD_TUNE_SILU, 12288 / r, 6144, 0, 0, r, TD_W_BF16), own);
        assert_int_equal(has(&s, TD_TUNE_GEMM, 6144, 16384 / r, 0, 0, r, TD_W_BF16), own);
        assert_int_equal(has(&s, TD_TUNE_GEMM, 154880 / r, 6144, 0, 0, r, TD_W_BF16), own);
    }
    td_tuned *t = parse(HEADER GEMM);
    td_tune_key keys[4];
    size_t n = td_shapes_untuned(&s, t, 304, 256, keys, 4), launched = 0;
    for (size_t i = 0; i < s.n; i++)
        launched += (size_t)s.data[i].launched;
    assert_int_equal(n, launched * 9); /* 1, 2, ... 256 rows */
    td_tuned_row row = {.key = keys[3], .plan = TD_GPU_PLAN_FEW};
    assert_int_equal(td_tuned_put(t, &row), 0);
    assert_int_equal(td_shapes_untuned(&s, t, 304, 256, keys, 4), n - 1);
    td_tuned_free(t);
    td_shapes_done(&s);
    static const uint32_t seven[] = {7};
    assert_int_equal(td_shapes_add(dir, seven, 1, 0, &s, &err), -EINVAL);
    assert_non_null(strstr(err.text, "cannot be shared by 7 ranks"));
    td_shapes_done(&s);
}

/* DIR/config.json: GLM-5.2 in FP8, all but the named module. */
static void write_fp8(const char *path, const char *plain, uint32_t inner)
{
    json_t *c = json_load_file(TD_SOURCE_DIR "/bench/shapes/glm-5.2/config.json", 0, NULL);
    json_t *q = json_pack("{s:s,s:s,s:[i,i],s:[s]}", "quant_method", "fp8", "fmt", "e4m3",
                          "weight_block_size", 128, 128, "modules_to_not_convert", plain);
    assert_true(c && q);
    json_object_set_new(c, "quantization_config", q);
    json_object_set_new(c, "moe_intermediate_size", json_integer(inner));
    assert_int_equal(json_dump_file(c, path, 0), 0);
    json_decref(c);
}

/* Rows and columns of GLM-5.2's shares are whole blocks of 128 but for the head's: 154,880 / 8 is
 * 151.25 blocks. A share whose first element lies within a block has no scales of its own: the list
 * of shapes refuses it by name rather than to measure what cannot be loaded. */
static void fp8_shares_are_whole_blocks(void **state)
{
    static const uint32_t ranks[] = {1, 4, 8}, one[] = {1};
    char dir[] = "/tmp/tune-XXXXXX", path[64];
    td_shapes s = {0};
    td_err err = {0};
    assert_non_null(mkdtemp(dir));
    snprintf(path, sizeof path, "%s/config.json", dir);
    write_fp8(path, "lm_head", 2048);
    if (td_shapes_add(dir, ranks, 3, 0, &s, &err) < 0)
        fail_msg("%s", err.text);
    for (size_t i = 0; i < 3; i++) {
        uint32_t r = ranks[i];
        assert_true(has(&s, TD_TUNE_MOE, 2048 / r, 6144, 256, 8, r, TD_W_FP8) > 0);
        assert_true(has(&s, TD_TUNE_GEMM, 6144, 16384 / r, 0, 0, r, TD_W_FP8) > 0);
        assert_true(has(&s, TD_TUNE_SILU, 12288 / r, 6144, 0, 0, r, TD_W_FP8) > 0);
    }
    td_shapes_done(&s);
    static const struct {
        const char *plain, *says;
        uint32_t inner;
    } wrong[] = {
        {"none", "lm_head is in FP8, and 19360 of its rows or columns for each of 8 ranks", 2048},
        {"lm_head", ".mlp.experts.0.gate_proj is in FP8, and 192 of its", 1536}};
    for (size_t i = 0; i < TD_ARRAY_LEN(wrong); i++) {
        write_fp8(path, wrong[i].plain, wrong[i].inner);
        assert_int_equal(td_shapes_add(dir, ranks + 2, 1, 0, &s, &err), -EINVAL);
        if (!strstr(err.text, wrong[i].says) || !strstr(err.text, "in BF16 or MXFP4"))
            fail_msg("'%s' lacks '%s'", err.text, wrong[i].says);
        td_shapes_done(&s);
        assert_int_equal(td_shapes_add(dir, one, 1, 0, &s, &err), 0);
        td_shapes_done(&s);
    }
    unlink(path);
    rmdir(dir);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_is_wrong_is_named),
        cmocka_unit_test(what_is_written_is_read),
        cmocka_unit_test(built_in_tables_are_read),
        cmocka_unit_test(a_shape_without_a_row_is_noted_once),
        cmocka_unit_test(shapes_of_glm_5_2),
        cmocka_unit_test(fp8_shares_are_whole_blocks),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
