/* SPDX-License-Identifier: Apache-2.0 */
/* Guards: a damaged or hostile checkpoint is refused with the file's or tensor's name before
 * anything is read through it (lying lengths, holes, overlaps, duplicates, shards that point
 * elsewhere), and a checkpoint whose tensors do not fit the configuration is never loaded half. */
#include "tests/engine_util.h"

#include <errno.h>
#include <sys/stat.h>

#include "engine/model_files.h"
#include "engine/safetensors.h"
#include "tests/files_util.h"

#define ENTRY(name, dtype, shape, a, b)                                                            \
    "\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":[" shape "],\"data_offsets\":[" #a "," #b "]" \
    "}"

typedef struct file {
    uint8_t bytes[65536];
    size_t n;
} file;

static file make(const char *header, size_t data)
{
    file f = {.n = 8 + strlen(header) + data};
    for (int i = 0; i < 8; i++)
        f.bytes[i] = (uint8_t)(strlen(header) >> (8 * i));
    memcpy(f.bytes + 8, header, strlen(header));
    for (size_t i = 0; i < data; i++)
        f.bytes[8 + strlen(header) + i] = (uint8_t)i;
    return f;
}

static void refused(const char *header, size_t data, const char *named)
{
    file f = make(header, data);
    td_st *st = NULL;
    td_err err = {0};
    int r = td_st_parse(f.bytes, f.n, "x.safetensors", &st, &err);
    td_st_close(st);
    if (r >= 0 || !strstr(err.text, named) || !strstr(err.text, "x.safetensors"))
        fail_msg("%s: result %d, text \"%s\" does not name %s", header, r, err.text, named);
}

static void a_good_file_is_read(void **state)
{
    file f =
        make("{\"__metadata__\":{\"format\":\"pt\"}," ENTRY("b", "BF16", "2,3", 4, 16) "," ENTRY(
                 "a", "F32", "", 0, 4) "," ENTRY("e", "F32", "0,7", 16, 16) "}",
             16);
    td_st *st = NULL;
    td_err err = {0};
    if (td_st_parse(f.bytes, f.n, "x", &st, &err) < 0)
        fail_msg("%s", err.text);
    assert_int_equal(td_st_count(st), 3);
    assert_string_equal(td_st_at(st, 0)->name, "a");
    const td_st_tensor *b = td_st_find(st, "b");
    assert_int_equal(b->dtype, TD_BF16);
    assert_int_equal(b->rank, 2);
    assert_int_equal(b->bytes, 12);
    assert_int_equal(b->data[0], 4);
    assert_null(td_st_find(st, "c"));
    td_st_close(st);
}

static void lying_headers_are_refused(void **state)
{
    refused("{" ENTRY("a", "F32", "2", 0, 8) "}", 4, "4"); /* data cut */
    refused("{" ENTRY("a", "F32", "2", 0, 8) "}", 9, "9"); /* data left over */
    refused("{" ENTRY("a", "F32", "2", 0, 4) "}", 4, "a"); /* size lies */
    refused("{" ENTRY("a", "F32", "1", 0, 4) "," ENTRY("bb", "F32", "1", 2, 6) "}", 6,
            "bb"); /* overlap */
    refused("{" ENTRY("a", "F32", "1", 0, 4) "," ENTRY("bb", "F32", "1", 8, 12) "}", 12,
            "bb");                                         /* hole */
    refused("{" ENTRY("a", "F32", "1", 4, 8) "}", 8, "a"); /* hole at the start */
    refused("{" ENTRY("a", "F32", "1", 0, 4) "," ENTRY("a", "F32", "1", 4, 8) "}", 8,
            "x.safetensors"); /* duplicate */
    refused("{" ENTRY("a", "F99", "1", 0, 4) "}", 4, "dtype");
    refused("{" ENTRY("a", "F32", "-1", 0, 4) "}", 4, "shape");
    refused("{" ENTRY("a", "F32", "1.0", 0, 4) "}", 4, "shape");
    refused("{" ENTRY("a", "F32", "4294967296,4294967296,4", 0, 4) "}", 4, "overflow");
    refused("{" ENTRY("a", "F32", "1,1,1,1,1,1,1,1,1", 0, 4) "}", 4, "shape");
    refused("{" ENTRY("a", "F32", "1", 4, 0) "}", 4, "data_offsets");
    refused("{\"a\":{\"dtype\":\"F32\",\"shape\":[1]}}", 4, "a");
    refused("{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4],\"x\":1}}", 4, "a");
    refused("{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,99999999999999999999]}}",
            4, "x.safetensors");
    refused("{\"__metadata__\":{\"a\":1}," ENTRY("a", "F32", "1", 0, 4) "}", 4, "__metadata__");
    refused("{}", 0, "tensors");
    refused("{\"a\\u0000b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4,
            "x.safetensors");
    refused("{\"\xff\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4,
            "x.safetensors");
    refused("[]", 0, "header");
}

static void names_are_bounded(void **state)
{
    char header[1024], name[300];
    memset(name, 'n', sizeof name);
    name[257] = 0;
    snprintf(header, sizeof header,
             "{\"%s\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", name);
    refused(header, 4, "257");
}

static void a_file_cut_anywhere_is_refused(void **state)
{
    file f = make("{" ENTRY("a", "F32", "2", 0, 8) "}", 8);
    for (size_t n = 0; n < f.n; n++) {
        td_st *st = NULL;
        td_err err = {0};
        assert_true(td_st_parse(f.bytes, n, "x", &st, &err) < 0);
        assert_null(st);
    }
    for (int bit = 0; bit < 64; bit++) { /* a lying header length */
        file g = f;
        g.bytes[bit / 8] ^= (uint8_t)(1 << bit % 8);
        td_st *st = NULL;
        td_err err = {0};
        assert_true(td_st_parse(g.bytes, g.n, "x", &st, &err) < 0);
    }
}

static char dir[64];

static void shards(const char *index, const char *named)
{
    td_st *st = NULL;
    td_err err = {0};
    test_write_file(dir, "model.safetensors.index.json", index, strlen(index));
    int r = td_st_open(dir, &st, &err);
    if (named && (r >= 0 || !strstr(err.text, named)))
        fail_msg("%s: result %d, text \"%s\" does not name %s", index, r, err.text, named);
    if (!named && r < 0)
        fail_msg("%s: %s", index, err.text);
    td_st_close(st);
}

static void an_index_names_its_own_shards_only(void **state)
{
    file a = make("{" ENTRY("a", "F32", "1", 0, 4) "}", 4),
         b = make("{" ENTRY("b", "F32", "1", 0, 4) "}", 4);
    snprintf(dir, sizeof dir, "/tmp/td_test_st_XXXXXX");
    assert_non_null(mkdtemp(dir));
    test_write_file(dir, "one.safetensors", a.bytes, a.n);
    test_write_file(dir, "two.safetensors", b.bytes, b.n);
    shards("{\"weight_map\":{\"a\":\"one.safetensors\",\"b\":\"two.safetensors\"}}", NULL);
    shards("{\"weight_map\":{\"a\":\"one.safetensors\"}}", NULL);
    shards("{\"weight_map\":{\"a\":\"two.safetensors\"}}", "tensor b");
    shards("{\"weight_map\":{\"a\":\"one.safetensors\",\"c\":\"two.safetensors\"}}",
           "two.safetensors");
    shards("{\"weight_map\":{\"a\":\"../one.safetensors\"}}", "tensor a");
    shards("{\"weight_map\":{\"a\":\"/etc/passwd\"}}", "tensor a");
    shards("{\"weight_map\":{\"a\":\"three.safetensors\"}}", "three.safetensors");
    shards("{\"weight_map\":{}}", "weight_map");
    shards("{}", "weight_map");
    char cmd[256];
    snprintf(cmd, sizeof cmd, "%s/link.safetensors", dir);
    assert_int_equal(symlink("one.safetensors", cmd), 0);
    shards("{\"weight_map\":{\"a\":\"link.safetensors\"}}", "link.safetensors"); /* O_NOFOLLOW */
    td_model_files_remove(dir);
}

/* Copies of a good model with one tensor's entry changed by text of the same length. */
static void model_with(const char *from, const char *to, const char *named)
{
    static const char src[] = TD_SOURCE_DIR "/tests/goldens/models/glm-shared";
    size_t n = 0;
    td_err err = {0};
    td_model *m = NULL;
    snprintf(dir, sizeof dir, "/tmp/td_test_st_XXXXXX");
    assert_non_null(mkdtemp(dir));
    test_copy_file(src, dir, "config.json");
    char *bytes = test_read_file(src, "model.safetensors", &n);
    char *at = memmem(bytes, n, from, strlen(from));
    assert_non_null(at);
    assert_int_equal(strlen(from), strlen(to));
    memcpy(at, to, strlen(to));
    test_write_file(dir, "model.safetensors", bytes, n);
    free(bytes);
    td_model_options o = {.isa = "ref",
                          .act = TD_BF16,
                          .kv = TD_BF16,
                          .index = TD_BF16,
                          .n_threads = 1,
                          .n_ranks = 1};
    int r = td_model_open(dir, &o, &m, &err);
    if (r >= 0 || !strstr(err.text, named))
        fail_msg("%s -> %s: result %d, text \"%s\" does not name %s", from, to, r, err.text, named);
    td_model_files_remove(dir);
}

static void tensors_must_fit_the_configuration(void **state)
{
    model_with("layers.0.self_attn.q_b_proj.weight", "layers.0.self_attn.q_b_prox.weight",
               "q_b_proj.weight is missing");
    model_with("layers.1.self_attn.q_b_proj.weight", "layers.9.self_attn.q_b_proj.weight",
               "layers.1.self_attn.q_b_proj");
    /* a shared layer that brings an indexer, a full one that lacks it (layers 0 and 2 are full) */
    model_with("layers.0.self_attn.indexer.wk.weight", "layers.1.self_attn.indexer.wk.weight",
               "layers.0.self_attn.indexer.wk");
    model_with("[160,32]", "[32,160]", "kv_b_proj");
    model_with("model.norm.weight", "model.nora.weight", "model.norm.weight");
    /* the MTP layer is checked too */
    model_with("layers.4.eh_proj.weight", "layers.4.eh_prox.weight", "layers.4.");
    model_with("layers.4.hnorm.weight", "layers.4.hnorx.weight", "layers.4.hnorm.weight");
}

static void quantised_tensors_need_their_scales(void **state)
{
    /* same bytes, read as pairs of U8: the dtype decides, not a list */
    model_with("\"model.layers.0.self_attn.o_proj.weight\":{\"dtype\":\"BF16\",\"shape\":[64,64]",
               "\"model.layers.0.self_attn.o_proj.weight\":{\"dtype\":\"U8\",\"shape\":[64,0128]",
               "model.safetensors");
    model_with("\"model.layers.0.self_attn.o_proj.weight\":{\"dtype\":\"BF16\",\"shape\":[64,64]",
               "\"model.layers.0.self_attn.o_proj.weight\":{\"dtype\":\"U8\",\"shape\":[64,128 ]",
               "two elements a byte");
}

static void ranks_and_words_that_are_not_supported_are_named(void **state)
{
    td_model *m = NULL;
    td_err err = {0};
    const char *d = TD_SOURCE_DIR "/tests/goldens/models/qwen3";
    td_model_options o = {.isa = "ref",
                          .act = TD_BF16,
                          .kv = TD_BF16,
                          .index = TD_BF16,
                          .n_threads = 1,
                          .n_ranks = 2};
    assert_int_equal(td_model_open(d, &o, &m, &err), -ENOTSUP);
    assert_non_null(strstr(err.text, "n_ranks"));
    o.n_ranks = 1;
    o.isa = "avx7";
    assert_int_equal(td_model_open(d, &o, &m, &err), -EINVAL);
    assert_non_null(strstr(err.text, "avx7"));
    o.isa = "ref";
    o.kv = TD_F16;
    assert_int_equal(td_model_open(d, &o, &m, &err), -EINVAL);
    assert_non_null(strstr(err.text, "--kv f16"));
    o.kv = TD_BF16;
    o.index = TD_F8E4M3;
    assert_int_equal(td_model_open(d, &o, &m, &err), -EINVAL);
    assert_non_null(strstr(err.text, "--index fp8"));
}

static void the_model_hash_covers_every_byte(void **state)
{
    td_model *a = NULL, *b = NULL;
    td_err err = {0};
    td_model_options o = {.isa = "ref",
                          .act = TD_BF16,
                          .kv = TD_BF16,
                          .index = TD_BF16,
                          .n_threads = 1,
                          .n_ranks = 1};
    assert_int_equal(td_model_open(TD_SOURCE_DIR "/tests/goldens/models/qwen3", &o, &a, &err), 0);
    assert_int_equal(td_model_open(TD_SOURCE_DIR "/tests/goldens/models/qwen3", &o, &b, &err), 0);
    assert_memory_equal(td_model_get_info(a)->model_hash, td_model_get_info(b)->model_hash, 32);
    assert_memory_equal(td_model_get_info(a)->profile_id, td_model_get_info(b)->profile_id, 16);
    td_model_free(b);
    o.kv = TD_F32;
    assert_int_equal(td_model_open(TD_SOURCE_DIR "/tests/goldens/models/qwen3", &o, &b, &err), 0);
    assert_memory_not_equal(td_model_get_info(a)->profile_id, td_model_get_info(b)->profile_id, 16);
    assert_memory_not_equal(td_model_get_info(a)->kv.hash, td_model_get_info(b)->kv.hash, 16);
    td_model_free(b);
    assert_int_equal(td_model_open(TD_SOURCE_DIR "/tests/goldens/models/qwen3-tied", &o, &b, &err),
                     0);
    assert_memory_not_equal(td_model_get_info(a)->model_hash, td_model_get_info(b)->model_hash, 32);
    td_model_free(a);
    td_model_free(b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_good_file_is_read),
        cmocka_unit_test(lying_headers_are_refused),
        cmocka_unit_test(names_are_bounded),
        cmocka_unit_test(a_file_cut_anywhere_is_refused),
        cmocka_unit_test(an_index_names_its_own_shards_only),
        cmocka_unit_test(tensors_must_fit_the_configuration),
        cmocka_unit_test(quantised_tensors_need_their_scales),
        cmocka_unit_test(ranks_and_words_that_are_not_supported_are_named),
        cmocka_unit_test(the_model_hash_covers_every_byte),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
