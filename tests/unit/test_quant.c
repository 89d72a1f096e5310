/* SPDX-License-Identifier: Apache-2.0 */
/* Guards: a quantised checkpoint whose tensors, scales or exclude list disagree is refused with the
 * module's name. (A list that was believed instead cost another engine 68 points of GSM8K.) */
#include "tests/engine_util.h"

#include <errno.h>

#include "engine/model_files.h"
#include "engine/quant.h"
#include "tests/files_util.h"

static char dir[64];

/* Copy a file of the model; replace text by text of the same length, when it is there. */
static int copy(const char *model, const char *name, const char *from, const char *to)
{
    char from_dir[512];
    size_t n = 0;
    snprintf(from_dir, sizeof from_dir, "%s/tests/goldens/models/%s", TD_SOURCE_DIR, model);
    char *bytes = test_read_file(from_dir, name, &n);
    char *at = from ? memmem(bytes, n, from, strlen(from)) : NULL;
    if (at) {
        assert_int_equal(strlen(from), strlen(to));
        memcpy(at, to, strlen(to));
    }
    test_write_file(dir, name, bytes, n);
    free(bytes);
    return at != NULL;
}

static td_err opened(const char *model, const char *from, const char *to)
{ /* text empty: it loaded */
    td_model *m = NULL;
    td_err err = {0};
    snprintf(dir, sizeof dir, "/tmp/td_test_quant_XXXXXX");
    assert_non_null(mkdtemp(dir));
    int n = copy(model, "config.json", from, to) + copy(model, "model.safetensors", from, to);
    if (from)
        assert_int_equal(n > 0, 1);
    td_model_options o = {.isa = "ref",
                          .act = TD_BF16,
                          .kv = TD_BF16,
                          .index = TD_BF16,
                          .n_threads = 1,
                          .n_ranks = 1};
    if (td_model_open(dir, &o, &m, &err) >= 0)
        err = (td_err){0};
    td_model_free(m);
    td_model_files_remove(dir);
    return err;
}

static void refused(const char *model, const char *from, const char *to, const char *named)
{
    td_err err = opened(model, from, to);
    if (!strstr(err.text, named))
        fail_msg("%s: %s -> %s: \"%s\" does not name %s", model, from, to, err.text, named);
}

static void good_ones_load(void **state)
{
    static const char *const names[] = {"glm-mxfp4", "qwen3-mxfp4", "glm-fp8", "glm-mxfp4-fp8",
                                        "qwen3-mxfp4-fp8"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        td_err err = opened(names[i], NULL, NULL);
        assert_string_equal(err.text, "");
    }
}

static void scales_are_complete_and_fit(void **state)
{
    refused("qwen3-mxfp4", "model.layers.0.self_attn.k_proj.weight_scale",
            "model.layers.0.self_attn.k_proj.weight_scalf", "k_proj.weight_scale are missing");
    refused("qwen3-mxfp4",
            "layers.1.mlp.down_proj.weight_scale\":{\"dtype\":\"U8\",\"shape\":[64,5]",
            "layers.1.mlp.down_proj.weight_scale\":{\"dtype\":\"U8\",\"shape\":[5,64]",
            "layers.1.mlp.down_proj.weight_scale has shape [5, 64]");
    refused("glm-fp8", "layers.0.self_attn.q_a_proj.weight_scale_inv",
            "layers.0.self_attn.q_a_proj.weight_scale_inw",
            "q_a_proj.weight_scale_inv are missing");
    refused("glm-fp8",
            "layers.1.mlp.shared_experts.up_proj.weight_scale_inv\":{\"dtype\":\"F32\","
            "\"shape\":[1,2]",
            "layers.1.mlp.shared_experts.up_proj.weight_scale_inv\":{\"dtype\":\"F32\","
            "\"shape\":[2,1]",
            "shared_experts.up_proj.weight_scale_inv has shape [2, 1]");
    /* the same four bytes, read as another type */
    refused("glm-fp8", "layers.1.mlp.shared_experts.up_proj.weight_scale_inv\":{\"dtype\":\"F32\"",
            "layers.1.mlp.shared_experts.up_proj.weight_scale_inv\":{\"dtype\":\"I32\"",
            "shared_experts.up_proj.weight_scale_inv has dtype I32");
}

static void an_expert_that_differs_from_the_others_is_named(void **state)
{
    /* gate_proj of expert 1: [32, 64] as 2,048 nibbles; read as [32, 32] F8 it has other scales */
    refused("glm-mxfp4", "model.layers.1.mlp.experts.1.gate_proj.weight\":{\"dtype\":\"U8\"",
            "model.layers.1.mlp.experts.1.gate_proj.weight\":{\"dtype\":\"I8\"",
            "model.layers.1.mlp.experts.1.gate_proj.weight has dtype I8");
}

static void a_list_that_lies_is_an_error_with_the_module(void **state)
{
    /* excluded, but quantised */
    refused("glm-mxfp4", "\"model.layers.4.mlp.experts.3.up_proj\"",
            "\"model.layers.1.mlp.experts.3.up_proj\"",
            "model.layers.1.mlp.experts.3.up_proj is stored as mxfp4");
    /* not excluded, but plain */
    refused("glm-mxfp4", "\"model.layers.0.self_attn.o_proj\"",
            "\"model.layers.9.self_attn.o_proj\"", "model.layers.0.self_attn.o_proj is stored as");
    /* no list at all */
    refused("glm-mxfp4", "\"quantization_config\"", "\"quantization_cinfog\"",
            "has no quantization_config");
    refused("glm-fp8", "\"lm_head\"", "\"mm_head\"", "lm_head is stored as bf16");
}

/* A mixed checkpoint that was believed to be of one format would be read as noise. */
static void a_mixture_that_is_not_the_stated_one_is_an_error_with_the_module(void **state)
{
    refused("glm-mxfp4-fp8", "\"lm_head\": {", "\"mm_head\": {",
            "lm_head is stored as fp8, but quantization_config says mxfp4");
    refused("glm-mxfp4-fp8", "\"model.embed_tokens\": {", "\"model.embed_tokenz\": {",
            "model.embed_tokens is stored as fp8, but quantization_config says mxfp4");
    refused("qwen3-mxfp4-fp8", "\"model.embed_tokens\": {", "\"model.*mlp.up_proj\": {",
            "model.layers.0.mlp.up_proj is stored as mxfp4, but quantization_config says fp8");
    refused("glm-mxfp4-fp8", "[0-3].self_attn.*_proj*", "[0-2].self_attn.*_proj*",
            "model.layers.3.self_attn.q_a_proj is stored as fp8");
    refused("glm-mxfp4-fp8", "lm_head.weight_scale_inv", "lm_head.weight_scale_inw",
            "lm_head.weight_scale_inv are missing");
    refused("qwen3-mxfp4-fp8", "\"model.embed_tokens\": {", "\"model.embed_tokens\"= {",
            "config.json");
}

static void parsed(const char *json, const char *named)
{
    td_quant *q = NULL;
    td_err err = {0};
    int r = td_quant_parse(json, strlen(json), &q, &err);
    td_quant_free(q);
    if (r >= 0 || !strstr(err.text, named))
        fail_msg("%s: result %d, \"%s\" does not name %s", json, r, err.text, named);
}

static void methods_that_are_not_understood_are_named(void **state)
{
#define CONF(x) "{\"quantization_config\": {" x "}}"
#define FP4(x)                                                                                     \
    CONF("\"quant_method\": \"quark\", \"global_quant_config\": {\"weight\": {\"dtype\": \"fp4\"," \
         "\"qscheme\": \"per_group\", \"scale_format\": \"e8m0\", \"group_size\": 32}}" x)
    parsed("{\"quantization_config\": 3}", "must be an object");
    parsed(CONF("\"quant_method\": \"gptq\""), "gptq");
    parsed(CONF(""), "quant_method");
    parsed(CONF("\"quant_method\": \"quark\""), "global_quant_config.weight");
    parsed(CONF("\"quant_method\": \"quark\", \"global_quant_config\": {\"weight\": {\"dtype\": "
                "\"int4\"}}"),
           "int4");
#define LAYER(x) FP4(", \"layer_quant_config\": {\"*self_attn*\": {\"weight\": {" x "}}}")
    parsed(FP4(", \"layer_quant_config\": {\"*self_attn*\": {}}"),
           "layer_quant_config[\"*self_attn*\"]");
    parsed(FP4(", \"layer_quant_config\": [1]"), "layer_quant_config");
    parsed(LAYER("\"dtype\": \"int4\""), "layer_quant_config[\"*self_attn*\"]");
    parsed(LAYER("\"dtype\": \"fp8_e4m3\", \"qscheme\": \"per_channel\""), "per_channel");
    parsed(LAYER("\"dtype\": \"fp8_e4m3\", \"qscheme\": \"per_block\", \"block_size\": [64, 64]"),
           "block_size");
    parsed(FP4(", \"kv_cache_quant_config\": {\"k_proj\": {}}"), "kv_cache_quant_config");
    parsed(FP4(", \"exclude\": \"lm_head\""), "exclude");
    parsed(FP4(", \"exclude\": [\"re:.*\"]"), "exclude[0]");
    parsed(CONF("\"quant_method\": \"fp8\""), "weight_block_size");
    parsed(CONF("\"quant_method\": \"fp8\", \"weight_block_size\": [64, 128]"),
           "weight_block_size");
    parsed(CONF("\"quant_method\": \"fp8\", \"fmt\": \"e5m2\", \"weight_block_size\": [128, 128]"),
           "e5m2");
    parsed(CONF("\"quant_method\": \"fp8\", \"activation_scheme\": \"static\","
                "\"weight_block_size\": [128, 128]"),
           "static");
}

static void names_match_as_globs_prefixes_and_suffixes(void **state)
{
    static const char text[] = FP4(", \"exclude\": [\"lm_head\", \"*self_attn*\", "
                                   "\"model.layers.78\", \"eh_proj\"]");
    td_quant *q = NULL;
    td_err err = {0};
    assert_int_equal(td_quant_parse(text, sizeof text - 1, &q, &err), 0);
    static const char *const out[] = {"lm_head", "model.layers.3.self_attn.o_proj",
                                      "model.layers.78.mlp.up_proj", "model.layers.9.eh_proj"};
    static const char *const in[] = {"model.layers.7.mlp.up_proj", "model.layers.780.mlp.up_proj",
                                     "model.layers.9.xeh_proj"};
    for (size_t i = 0; i < 4; i++) {
        assert_int_equal(td_quant_check(q, out[i], 1, TD_W_BF16, &err), 0);
        assert_int_equal(td_quant_check(q, out[i], 1, TD_W_MXFP4, &err), -EINVAL);
    }
    for (size_t i = 0; i < 3; i++) {
        assert_int_equal(td_quant_check(q, in[i], 1, TD_W_MXFP4, &err), 0);
        assert_int_equal(td_quant_check(q, in[i], 1, TD_W_BF16, &err), -EINVAL);
    }
    td_quant_free(q);
}

static void a_module_has_the_format_of_its_first_glob_unless_excluded(void **state)
{
    static const char text[] =
        FP4(", \"exclude\": [\"b.up\"], \"layer_quant_config\": {"
            "\"*.down\": {\"weight\": {\"dtype\": \"fp4\", \"qscheme\": \"per_group\","
            " \"scale_format\": \"e8m0\", \"group_size\": 32}},"
            "\"b.*\": {\"weight\": {\"dtype\": \"fp8_e4m3\", \"qscheme\": \"per_block\","
            " \"block_size\": [128, 128]}}}");
    static const struct {
        const char *module;
        int linear;
        td_weight_format right, wrong;
    } rows[] = {
        {"a.up", 1, TD_W_MXFP4, TD_W_FP8},   {"b.gate", 1, TD_W_FP8, TD_W_MXFP4},
        {"b.gate", 1, TD_W_FP8, TD_W_BF16},  {"b.down", 1, TD_W_MXFP4, TD_W_FP8},
        {"b.up", 1, TD_W_BF16, TD_W_FP8},    {"b.embed", 0, TD_W_FP8, TD_W_BF16},
        {"c.embed", 0, TD_W_BF16, TD_W_FP8}, {"c.embed", 0, TD_W_MXFP4, TD_W_FP8},
    };
    td_quant *q = NULL;
    td_err err = {0};
    assert_int_equal(td_quant_parse(text, sizeof text - 1, &q, &err), 0);
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        assert_int_equal(td_quant_check(q, rows[i].module, rows[i].linear, rows[i].right, &err), 0);
        assert_int_equal(td_quant_check(q, rows[i].module, rows[i].linear, rows[i].wrong, &err),
                         -EINVAL);
        assert_non_null(strstr(err.text, rows[i].module));
    }
    td_quant_free(q);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(good_ones_load),
        cmocka_unit_test(scales_are_complete_and_fit),
        cmocka_unit_test(an_expert_that_differs_from_the_others_is_named),
        cmocka_unit_test(a_list_that_lies_is_an_error_with_the_module),
        cmocka_unit_test(a_mixture_that_is_not_the_stated_one_is_an_error_with_the_module),
        cmocka_unit_test(methods_that_are_not_understood_are_named),
        cmocka_unit_test(names_match_as_globs_prefixes_and_suffixes),
        cmocka_unit_test(a_module_has_the_format_of_its_first_glob_unless_excluded),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
