/* SPDX-License-Identifier: Apache-2.0 */
/* Guards: a config.json that lies, lacks or overreaches is refused with the field's name, never
 * half believed; the traps of the model's specification (head_dim, rope_theta's two places, indexer
 * rule, both spellings) are decided as written. */
#include "tests/engine_util.h"

#include <errno.h>

#include "base/file.h"
#include "base/json.h"
#include "engine/config.h"

static char *text;
static size_t len;

static int load(void **state)
{
    td_err err = {0};
    return td_file_read(TD_SOURCE_DIR "/tests/goldens/models/glm-shared/config.json", 1 << 20,
                        &text, &len, &err);
}

static int unload(void **state)
{
    free(text);
    return 0;
}

/* The good text with the line of one key replaced (NULL: removed). */
static char *with(const char *key, const char *value)
{
    json_error_t e;
    json_t *o = json_loadb(text, len, 0, &e),
           *v = value ? json_loads(value, JSON_DECODE_ANY, &e) : NULL;
    if (value)
        json_object_set_new(o, key, v);
    else
        json_object_del(o, key);
    char *s = json_dumps(o, 0);
    json_decref(o);
    return s;
}

static int parse(const char *s, td_config *c, td_err *err)
{
    return td_config_parse(s, strlen(s), NULL, 0, c, err);
}

static void refused(const char *key, const char *value, const char *named)
{
    td_config c;
    td_err err = {0};
    char *s = with(key, value);
    int r = parse(s, &c, &err);
    if (r >= 0 || !strstr(err.text, named) || !strstr(err.text, "config.json"))
        fail_msg("%s = %s: result %d, text \"%s\" does not name %s", key,
                 value ? value : "(absent)", r, err.text, named);
    free(s);
}

static td_config accepted(const char *key, const char *value)
{
    td_config c;
    td_err err = {0};
    char *s = with(key, value);
    if (parse(s, &c, &err) < 0)
        fail_msg("%s = %s: %s", key, value ? value : "(absent)", err.text);
    free(s);
    return c;
}

static void required_keys_are_required(void **state)
{
    static const char *const keys[] = {"model_type",
                                       "vocab_size",
                                       "hidden_size",
                                       "num_hidden_layers",
                                       "num_attention_heads",
                                       "intermediate_size",
                                       "max_position_embeddings",
                                       "rms_norm_eps",
                                       "q_lora_rank",
                                       "kv_lora_rank",
                                       "qk_nope_head_dim",
                                       "qk_rope_head_dim",
                                       "v_head_dim",
                                       "index_n_heads",
                                       "index_head_dim",
                                       "index_topk",
                                       "n_routed_experts",
                                       "num_experts_per_tok",
                                       "moe_intermediate_size",
                                       "n_shared_experts"};
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
        refused(keys[i], NULL, keys[i]);
}

static void values_out_of_range_are_refused(void **state)
{
    static const char *const bad[][3] = {
        {"vocab_size", "0", "vocab_size"},
        {"vocab_size", "-1", "vocab_size"},
        {"vocab_size", "9223372036854775807", "vocab_size"},
        {"vocab_size", "\"256\"", "vocab_size"},
        {"hidden_size", "0", "hidden_size"},
        {"num_hidden_layers", "100000", "num_hidden_layers"},
        {"rms_norm_eps", "0", "rms_norm_eps"},
        {"qk_rope_head_dim", "7", "qk_"},
        {"index_head_dim", "4", "index_head_dim"},
        {"num_experts_per_tok", "9", "num_experts_per_tok"},
        {"n_group", "3", "n_group"},
        {"n_group", "8", "n_group"},
        {"topk_group", "2", "topk_group"},
        {"num_key_value_heads", "2", "num_key_value_heads"},
        {"eos_token_id", "[0, 256]", "eos_token_id"},
        {"eos_token_id", "\"x\"", "eos_token_id"},
        {"eos_token_id", "[0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16]", "eos_token_id"},
        {"indexer_types", "[\"full\"]", "indexer_types"},
        {"indexer_types", "[\"shared\", \"full\", \"full\", \"full\"]", "indexer_types"},
        {"indexer_types", "[\"full\", \"half\", \"full\", \"full\"]", "indexer_types"},
        {"mlp_layer_types", "[\"dense\", 1, \"dense\", \"dense\"]", "mlp_layer_types"},
        {"qk_head_dim", "24", "qk_head_dim"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        refused(bad[i][0], bad[i][1], bad[i][2]);
}

static void what_is_not_supported_is_named(void **state)
{
    refused("model_type", "\"llama\"", "llama");
    refused("hidden_act", "\"gelu\"", "hidden_act");
    refused("attention_bias", "true", "attention_bias");
    refused("scoring_func", "\"softmax\"", "scoring_func");
    refused("topk_method", "\"greedy\"", "topk_method");
    refused("moe_layer_freq", "2", "moe_layer_freq");
    refused("rope_scaling", "{\"type\": \"yarn\"}", "rope_scaling");
    refused("rope_parameters", "{\"rope_theta\": 10000.0, \"rope_type\": \"yarn\"}", "rope_type");
    refused("q_lora_rank", "null", "q_lora_rank");
}

static void head_dim_is_never_the_width_of_a_head(void **state)
{
    td_config c = accepted("head_dim", "192");
    assert_int_equal(c.nope + c.rope_dims, 32);
}

static void rope_theta_is_found_in_both_places_and_never_guessed(void **state)
{
    assert_true(accepted("rope_parameters", "{\"rope_theta\": 8000000, \"rope_type\": \"default\"}")
                    .rope_theta == 8e6);
    refused("rope_parameters", NULL, "rope_theta");
    refused("rope_theta", "5.0", "rope_theta"); /* contradicts rope_parameters */
    char *s = with("rope_theta", "77.0"), *inner = strstr(s, "\"rope_parameters\"");
    memcpy(inner, "\"rope_parameter_\"", strlen("\"rope_parameter_\""));
    td_config c;
    td_err err = {0};
    assert_int_equal(parse(s, &c, &err), 0);
    assert_true(c.rope_theta == 77.0);
    free(s);
}

static void expect_full(const td_config *c, const char *want)
{
    for (uint32_t i = 0; i < c->n_layers; i++)
        assert_int_equal(c->full[i], want[i] == 'F');
}

/* GLM-5.2's real rule: freq 4, offset 3 gives 0, 1, 2, 6, 10, ..., 74. */
static void indexer_rule_gives_the_published_layers(void **state)
{
    char *s = with("indexer_types", NULL);
    json_error_t e;
    json_t *o = json_loads(s, 0, &e);
    json_object_set_new(o, "num_hidden_layers", json_integer(78));
    json_object_del(o, "mlp_layer_types");
    json_object_set_new(o, "index_topk_freq", json_integer(4));
    json_object_set_new(o, "index_skip_topk_offset", json_integer(3));
    free(s);
    s = json_dumps(o, 0);
    td_config c;
    td_err err = {0};
    assert_int_equal(parse(s, &c, &err), 0);
    assert_int_equal(c.n_full, 21);
    for (uint32_t i = 0; i < 78; i++) {
        assert_int_equal(c.full[i], i < 3 || i % 4 == 2);
        assert_int_equal(c.sparse[i], i >= 3);
    }
    free(s);
    json_decref(o);
    c = accepted("indexer_types", NULL); /* neither list nor rule: every layer is full */
    expect_full(&c, "FFFF");
}

static void generation_config_names_the_eos(void **state)
{
    td_config c;
    td_err err = {0};
    const char *gen = "{\"eos_token_id\": [7, 9]}", *bad = "{\"eos_token_id\": 256}";
    assert_int_equal(td_config_parse(text, len, gen, strlen(gen), &c, &err), 0);
    assert_int_equal(c.n_eos, 2);
    assert_int_equal(c.eos[1], 9);
    assert_int_equal(td_config_parse(text, len, bad, strlen(bad), &c, &err), -EINVAL);
    assert_non_null(strstr(err.text, "generation_config.json"));
}

static void text_that_is_no_object_is_refused(void **state)
{
    static const char *const bad[] = {
        "", "[]", "1", "{", "{\"model_type\":", "\xff\xfe", "{\"a\":1,\"a\":2}"};
    td_config c;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        td_err err = {0};
        assert_true(parse(bad[i], &c, &err) < 0);
        assert_true(err.text[0] != 0);
    }
    for (size_t n = 0; n < len; n += 7) { /* cut anywhere */
        td_err err = {0};
        assert_true(td_config_parse(text, n, NULL, 0, &c, &err) < 0);
    }
}

static void a_missing_directory_is_an_error_with_its_name(void **state)
{
    td_config c;
    td_err err = {0};
    assert_true(td_config_load("/nowhere-at-all", &c, &err) < 0);
    assert_non_null(strstr(err.text, "/nowhere-at-all"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(required_keys_are_required),
        cmocka_unit_test(values_out_of_range_are_refused),
        cmocka_unit_test(what_is_not_supported_is_named),
        cmocka_unit_test(head_dim_is_never_the_width_of_a_head),
        cmocka_unit_test(rope_theta_is_found_in_both_places_and_never_guessed),
        cmocka_unit_test(indexer_rule_gives_the_published_layers),
        cmocka_unit_test(generation_config_names_the_eos),
        cmocka_unit_test(text_that_is_no_object_is_refused),
        cmocka_unit_test(a_missing_directory_is_an_error_with_its_name),
    };
    return cmocka_run_group_tests(tests, load, unload);
}
