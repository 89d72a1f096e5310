/* SPDX-License-Identifier: Apache-2.0 */
/* Promise: token ids and decoded text are those of the Python package `tokenizers`, for the split
 * patterns, normalizers and added tokens of the models served. Goldens:
 * tests/goldens/make_tokenizers.py. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/json.h"
#include "text/tokenizer.h"
#include "base/banned.h"

static const char root[] = TD_SOURCE_DIR "/tests/goldens/tokenizers/";
static const td_json_limits limits = {.max_bytes = 64 << 20, .max_nodes = 1 << 22};
static json_t *texts;

static json_t *load(const char *name, const char *file)
{
    char path[500];
    td_err err = {0};
    json_t *j = NULL;
    snprintf(path, sizeof path, "%s%s/%s", root, name, file);
    if (td_json_load(path, &limits, &j, &err) < 0)
        fail_msg("%s", err.text);
    return j;
}

static int same_ids(const td_ids *got, const json_t *want)
{
    if (got->n != json_array_size(want))
        return 0;
    for (size_t i = 0; i < got->n; i++)
        if (got->data[i] != json_integer_value(json_array_get(want, i)))
            return 0;
    return 1;
}

static void show(const char *name, size_t i, const td_ids *got, const json_t *want)
{
    print_error("%s: text %zu: '%s'\n got ", name, i, json_string_value(json_array_get(texts, i)));
    for (size_t k = 0; k < got->n; k++)
        print_error(" %u", got->data[k]);
    char *w = json_dumps(want, JSON_COMPACT);
    print_error("\n want %s\n", w);
    free(w);
}

/* Returns 1 on a difference. */
static int check_encode(const td_tokenizer *t, const char *name, size_t i, int flags,
                        const json_t *want)
{
    const json_t *text = json_array_get(texts, i);
    td_ids ids = {0};
    int r = td_tokenizer_encode(t, json_string_value(text), json_string_length(text), flags, &ids);
    int bad = r < 0 || !same_ids(&ids, want);
    if (bad)
        show(name, i, &ids, want);
    td_ids_done(&ids);
    return bad;
}

static int check_count(const td_tokenizer *t, size_t i, size_t want)
{
    const json_t *text = json_array_get(texts, i);
    td_ids ids = {0};
    int r = td_tokenizer_encode(t, json_string_value(text), json_string_length(text),
                                TD_ENCODE_SPECIAL, &ids);
    int bad = r < 0 || ids.n != want;
    td_ids_done(&ids);
    return bad;
}

static int check_decode(const td_tokenizer *t, const char *name, const json_t *c)
{
    uint32_t ids[64];
    size_t n = json_array_size(json_array_get(c, 0));
    int bad = 0;
    for (size_t i = 0; i < n; i++)
        ids[i] = (uint32_t)json_integer_value(json_array_get(json_array_get(c, 0), i));
    for (int skip = 0; skip < 2; skip++) {
        const json_t *want = json_array_get(c, (size_t)skip + 1);
        td_strbuf out;
        td_strbuf_init(&out);
        int r = td_tokenizer_decode(t, ids, n, skip, &out);
        if (r < 0 || out.len != json_string_length(want) ||
            memcmp(out.data, json_string_value(want), out.len) != 0) {
            print_error("%s: decode: got '%s' want '%s'\n", name, out.data,
                        json_string_value(want));
            bad = 1;
        }
        td_strbuf_done(&out);
    }
    return bad;
}

static void check(const char *name)
{
    char dir[500];
    td_err err = {0};
    td_tokenizer *t = NULL;
    snprintf(dir, sizeof dir, "%s%s", root, name);
    if (td_tokenizer_open(dir, 0, &t, &err) < 0)
        fail_msg("%s", err.text);
    json_t *cases = load(name, "cases.json");
    int bad = 0;
    for (size_t i = 0; i < json_array_size(texts); i++) {
        char key[24];
        json_t *ids = json_array_get(json_object_get(cases, "ids"), i);
        snprintf(key, sizeof key, "%zu", i);
        json_t *plain = json_object_get(json_object_get(cases, "plain"), key);
        bad += check_encode(t, name, i, 0, ids);
        bad += check_encode(t, name, i, TD_ENCODE_NO_PARSE, plain ? plain : ids);
        bad += check_count(
            t, i, (size_t)json_integer_value(json_array_get(json_object_get(cases, "special"), i)));
    }
    td_ids around = {0};
    td_tokenizer_encode(t, "x", 1, TD_ENCODE_SPECIAL, &around);
    bad += !same_ids(&around, json_object_get(cases, "around"));
    td_ids_done(&around);
    json_t *decode = json_object_get(cases, "decode");
    for (size_t i = 0; i < json_array_size(decode); i++)
        bad += check_decode(t, name, json_array_get(decode, i));
    assert_int_equal(td_tokenizer_n_interpreted(t), 0);
    json_decref(cases);
    td_tokenizer_free(t);
    assert_int_equal(bad, 0);
}

#define GOLDEN(name)                                                                               \
    static void golden_##name(void **state)                                                        \
    {                                                                                              \
        check(#name);                                                                              \
    }
GOLDEN(glm)
GOLDEN(llama3)
GOLDEN(qwen)
GOLDEN(gpt2)
GOLDEN(spaced)
GOLDEN(deepseek)
GOLDEN(o200k)
GOLDEN(behaviors)

static int setup(void **state)
{
    texts = load(".", "texts.json");
    return 0;
}

static int teardown(void **state)
{
    json_decref(texts);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(golden_glm),    cmocka_unit_test(golden_llama3),
        cmocka_unit_test(golden_qwen),   cmocka_unit_test(golden_gpt2),
        cmocka_unit_test(golden_spaced), cmocka_unit_test(golden_deepseek),
        cmocka_unit_test(golden_o200k),  cmocka_unit_test(golden_behaviors),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
