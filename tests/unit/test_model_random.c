/* SPDX-License-Identifier: Apache-2.0 */
/* Guards: what `tandem model random` writes is a checkpoint: the engine loads it (every tensor in
 * its place, none left over), its logits are finite and differ, its tokenizer gives every id a text
 * and every text ids; equal seeds give equal bytes; mistakes name their cause. */
#include "tests/engine_util.h"

#include <ftw.h>
#include <math.h>

#include "base/file.h"
#include "cli/cli.h"
#include "text/tokenizer.h"

static char home[] = "/tmp/td_random_XXXXXX";

static int random_model(const char *config, const char *name, const char *a, const char *b)
{
    char out[64], from[512];
    snprintf(from, sizeof from, "%s/%s", TD_SOURCE_DIR, config);
    snprintf(out, sizeof out, "%s/%s", home, name);
    char *args[] = {(char *)"random", from, out, (char *)a, (char *)b, NULL};
    return td_cmd_model(b ? 5 : 3, args);
}

static test_engine open_model(const char *name)
{
    char dir[64];
    snprintf(dir, sizeof dir, "%s/%s", home, name);
    return test_open((test_setup){
        .dir = dir, .type = TD_BF16, .threads = 1, .max_rows = 16, .max_seqs = 4, .n_blocks = 8});
}

static void runs(const char *config, const char *name, const char *a, const char *b)
{
    assert_int_equal(random_model(config, name, a, b), TD_EXIT_OK);
    test_engine t = open_model(name);
    uint32_t ids[20];
    float *logits = malloc(t.info->vocab_size * sizeof *logits), low = INFINITY, high = -INFINITY;
    test_random_ids(5, t.info->vocab_size, ids, 20);
    td_seq *s = test_seq(&t, ids, 20, 20, (td_sampling){0}, 4);
    test_prefill(&t, s, 16, logits);
    for (uint32_t i = 0; i < t.info->vocab_size; i++) {
        assert_true(isfinite(logits[i]));
        low = logits[i] < low ? logits[i] : low;
        high = logits[i] > high ? logits[i] : high;
    }
    assert_true(high - low > 0.5f && high - low < 50.0f);
    free(logits);
    td_seq_free(s);
    test_close(&t);
}

static void engine_runs_it(void **state)
{
    runs("tests/goldens/models/qwen3", "qwen3", NULL, NULL);
    runs("tests/goldens/models/qwen3-tied/config.json", "tied", NULL, NULL);
    runs("models/glm-tiny", "glm", "--shard", "3"); /* with its MTP layer, in shards */
}

static void seeds_decide(void **state)
{
    uint8_t hash[3][32];
    static const char *const seeds[] = {"1", "1", "2"};
    for (int i = 0; i < 3; i++) {
        char name[8] = {'s', (char)('0' + i), 0};
        assert_int_equal(random_model("tests/goldens/models/qwen3", name, "--seed", seeds[i]), 0);
        test_engine t = open_model(name);
        memcpy(hash[i], t.info->model_hash, 32);
        test_close(&t);
    }
    assert_memory_equal(hash[0], hash[1], 32);
    assert_memory_not_equal(hash[0], hash[2], 32);
}

static void every_id_has_text(void **state)
{
    char dir[64];
    td_tokenizer *t = NULL;
    td_err err = {0};
    td_ids ids = {0};
    td_strbuf text;
    assert_int_equal(random_model("models/glm-tiny", "words", NULL, NULL), 0);
    snprintf(dir, sizeof dir, "%s/words", home);
    if (td_tokenizer_open(dir, 3072, &t, &err) < 0)
        fail_msg("%s", err.text);
    assert_int_equal(td_tokenizer_size(t), 3072);
    for (uint32_t i = 0; i < 3072; i++)
        assert_true(td_tokenizer_bytes(t, i).len > 0);
    static const char given[] = "Gr\xc3\xbc\xc3\x9f\x65, \x01\n ab";
    assert_int_equal(td_tokenizer_encode(t, given, sizeof given - 1, 0, &ids), 0);
    assert_int_equal(ids.n, sizeof given - 1);
    for (size_t i = 0; i < ids.n; i++)
        assert_int_equal(ids.data[i], (uint8_t)given[i]);
    td_strbuf_init(&text);
    assert_int_equal(td_tokenizer_decode(t, ids.data, ids.n, 0, &text), 0);
    assert_int_equal(text.len, sizeof given - 1);
    assert_memory_equal(text.data, given, text.len);
    td_strbuf_done(&text);
    td_ids_done(&ids);
    td_tokenizer_free(t);
}

static void mistakes_fail(void **state)
{
    char *none[] = {NULL}, *other[] = {(char *)"model", (char *)"a", (char *)"b", NULL};
    assert_int_equal(td_cmd_model(0, none), TD_EXIT_USAGE);
    assert_int_equal(td_cmd_model(3, other), TD_EXIT_USAGE);
    assert_int_equal(random_model("no/such.json", "a", NULL, NULL), TD_EXIT_FAILED);
    assert_int_equal(random_model("models/README.md", "a", NULL, NULL), TD_EXIT_FAILED);
    assert_int_equal(random_model("tests/goldens/models/qwen3", "a", "--seed", "x"), TD_EXIT_USAGE);
    assert_int_equal(random_model("tests/goldens/models/qwen3", "once", NULL, NULL), TD_EXIT_OK);
    assert_int_equal(random_model("tests/goldens/models/qwen3", "once", NULL, NULL),
                     TD_EXIT_FAILED); /* nothing is overwritten */
}

static int drop(const char *path, const struct stat *s, int type, struct FTW *at)
{
    (void)s, (void)type, (void)at;
    return remove(path);
}

static int make_home(void **state)
{
    return mkdtemp(home) ? 0 : -1;
}

static int remove_home(void **state)
{
    return nftw(home, drop, 8, FTW_DEPTH | FTW_PHYS);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(engine_runs_it),
        cmocka_unit_test(seeds_decide),
        cmocka_unit_test(every_id_has_text),
        cmocka_unit_test(mistakes_fail),
    };
    return cmocka_run_group_tests(tests, make_home, remove_home);
}
