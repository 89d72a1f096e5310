/* SPDX-License-Identifier: Apache-2.0 */
/* Guards: a packed model gives the bits of the checkpoint that it was made of, and a damaged or
 * foreign one is refused by name before a weight is used. */
#include "tests/engine_util.h"

#include <errno.h>
#include <sys/stat.h>

#include "base/file.h"
#include "engine/model_files.h"
#include "engine/pack.h"

static const char MODEL[] = TD_SOURCE_DIR "/tests/goldens/models/glm-mxfp4";
static char dir[64];
static char *bytes; /* of the good file */
static size_t n_bytes;

static td_model_options options(void)
{
    return (td_model_options){.isa = "auto",
                              .act = TD_BF16,
                              .kv = TD_BF16,
                              .index = TD_BF16,
                              .n_threads = 2,
                              .n_ranks = 1};
}

static char *path(const char *name, char *buf, size_t n)
{
    snprintf(buf, n, "%s/%s", dir, name);
    return buf;
}

/* 0, or -ENOTSUP on a machine whose only kernels are ref. */
static int make_pack(void **state)
{
    td_err err = {0};
    td_model *m = NULL;
    char p[128];
    td_model_options o = options();
    snprintf(dir, sizeof dir, "/tmp/td_test_pack_XXXXXX");
    if (!mkdtemp(dir))
        return -1;
    o.pack_to = dir;
    if (!td_backend_get("auto")->layout) {
        rmdir(dir);
        dir[0] = 0;
        return 0;
    }
    if (td_model_open(MODEL, &o, &m, &err) < 0) {
        printf("%s\n", err.text);
        return -1;
    }
    td_model_free(m);
    if (td_model_files_copy(MODEL, dir, 1, &err) < 0)
        return -1;
    return td_file_read(path("model.tdpack", p, sizeof p), 1 << 28, &bytes, &n_bytes, &err);
}

static int remove_pack(void **state)
{
    free(bytes);
    if (dir[0])
        td_model_files_remove(dir);
    return 0;
}

static void need_pack(void)
{
    if (!dir[0])
        skip(); /* this machine has no packed kernels */
}

static void write_pack(const char *data, size_t n)
{
    char p[128];
    FILE *f = fopen(path("model.tdpack", p, sizeof p), "w");
    assert_non_null(f);
    assert_int_equal(fwrite(data, 1, n, f), n);
    fclose(f);
}

/* Logits of a prompt that selects. */
static void logits_of(const char *model, float *out)
{
    td_err err = {0};
    test_engine t = {0};
    uint32_t ids[100];
    td_model_options o = options();
    td_engine_limits l = {.max_rows = 100, .max_seqs = 1, .n_blocks = 4};
    if (td_model_open(model, &o, &t.model, &err) < 0 ||
        td_engine_open(t.model, &l, &t.engine, &err) < 0)
        fail_msg("%s", err.text);
    t.info = td_model_get_info(t.model);
    test_random_ids(9, t.info->vocab_size, ids, 100);
    td_seq *s = test_seq(&t, ids, 100, 100, (td_sampling){0}, 1);
    test_prefill(&t, s, 100, out);
    td_seq_free(s);
    test_close(&t);
}

static void a_packed_model_has_the_same_bits(void **state)
{
    static float a[256], b[256];
    need_pack();
    logits_of(MODEL, a);
    logits_of(dir, b);
    assert_memory_equal(a, b, sizeof a);
    td_err err = {0};
    td_model *x = NULL, *y = NULL;
    td_model_options o = options();
    assert_int_equal(td_model_open(MODEL, &o, &x, &err), 0);
    assert_int_equal(td_model_open(dir, &o, &y, &err), 0);
    assert_memory_equal(td_model_get_info(x)->model_hash, td_model_get_info(y)->model_hash, 32);
    assert_memory_equal(td_model_get_info(x)->profile_id, td_model_get_info(y)->profile_id, 16);
    td_model_free(x);
    td_model_free(y);
}

static void refused(const char *data, size_t n, const char *named)
{
    td_err err = {0};
    td_model *m = NULL;
    td_model_options o = options();
    write_pack(data, n);
    int r = td_model_open(dir, &o, &m, &err);
    if (r >= 0 || !strstr(err.text, named))
        fail_msg("result %d, \"%s\" does not name %s", r, err.text, named);
}

static void a_file_cut_anywhere_is_refused(void **state)
{
    need_pack();
    for (size_t n = 0; n < n_bytes; n += n_bytes / 61 + 1)
        refused(bytes, n, "model.tdpack");
    refused(bytes, n_bytes - 1, "cut short");
    write_pack(bytes, n_bytes);
}

/* The good file with text replaced by text of the same length, from the end on. */
static void changed(const char *from, const char *to, const char *named)
{
    char *copy = malloc(n_bytes), *at = NULL;
    assert_non_null(copy);
    memcpy(copy, bytes, n_bytes);
    for (char *p = copy; (p = memmem(p, (size_t)(copy + n_bytes - p), from, strlen(from))); p++)
        at = p;
    assert_non_null(at);
    assert_int_equal(strlen(from), strlen(to));
    memcpy(at, to, strlen(to));
    refused(copy, n_bytes, named);
    free(copy);
    write_pack(bytes, n_bytes);
}

static void what_the_header_says_is_checked(void **state)
{
    need_pack();
    changed("TDPACK01", "TDPACK02", "no packed model");
    changed("\"layout\":\"cpu-panels-2\"", "\"layout\":\"cpu-panels-0\"", "cpu-panels-0");
    changed("\"model.norm.weight\"", "\"model.norn.weight\"", "model.norm.weight");
    changed("self_attn.kv_b_proj.weight:wuv\",\"format\":\"bf16\"",
            "self_attn.kv_b_proj.weight:wuv\",\"format\":\"bf17\"", "impossible entry");
    changed("lm_head.weight\",\"format\":\"bf16\",\"type\":\"f32\",\"shape\":[1,256,64]",
            "lm_head.weight\",\"format\":\"bf16\",\"type\":\"f32\",\"shape\":[1,256,63]",
            "lm_head.weight has not the shape");
    changed("\"config_hash\":\"", "\"config_hasg\":\"", "not understood");
    /* a length that points before the file */
    char *copy = malloc(n_bytes);
    assert_non_null(copy);
    memcpy(copy, bytes, n_bytes);
    memset(copy + n_bytes - 16, 0xff, 8);
    refused(copy, n_bytes, "impossible length");
    free(copy);
    write_pack(bytes, n_bytes);
}

static void every_byte_of_a_weight_is_covered(void **state)
{
    need_pack();
    static const size_t at[] = {0, 4096, 100000, 200001};
    for (size_t i = 0; i < sizeof at / sizeof *at; i++) {
        bytes[at[i]] ^= 1;
        td_err err = {0};
        td_model *m = NULL;
        td_model_options o = options();
        write_pack(bytes, n_bytes);
        int r = td_model_open(dir, &o, &m, &err);
        bytes[at[i]] ^= 1;
        /* bytes between tensors belong to nobody */
        if (r >= 0)
            td_model_free(m);
        if (i == 0)
            assert_int_equal(r, -EBADMSG);
        assert_true(r == 0 || strstr(err.text, "differs from its checksum"));
    }
    write_pack(bytes, n_bytes);
}

static void files_beside_it_must_be_the_same(void **state)
{
    char p[128], *config = NULL;
    size_t n;
    td_err err = {0};
    need_pack();
    assert_int_equal(td_file_read(path("config.json", p, sizeof p), 1 << 20, &config, &n, &err), 0);
    FILE *f = fopen(p, "a");
    assert_non_null(f);
    fputs("\n", f);
    fclose(f);
    refused(bytes, n_bytes, "config.json is not the one");
    f = fopen(p, "w");
    assert_non_null(f);
    fwrite(config, 1, n, f);
    fclose(f);
    free(config);
    td_model *m = NULL;
    td_model_options o = options();
    o.isa = "ref";
    assert_int_equal(td_model_open(dir, &o, &m, &err), -ENOTSUP);
    assert_non_null(strstr(err.text, "unpacked"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_packed_model_has_the_same_bits),
        cmocka_unit_test(a_file_cut_anywhere_is_refused),
        cmocka_unit_test(what_the_header_says_is_checked),
        cmocka_unit_test(every_byte_of_a_weight_is_covered),
        cmocka_unit_test(files_beside_it_must_be_the_same),
    };
    return cmocka_run_group_tests(tests, make_pack, remove_pack);
}
