/* SPDX-License-Identifier: Apache-2.0 */
/* Promises: the same vocabulary and merges give the same ids, however the file writes them (spaces,
 * escapes, pairs or strings, any order of sections and ids), also where the tables are megabytes on
 * pages of their own and no look-up can be guessed. */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <jansson.h>

#include "base/bug.h"
#include "base/strbuf.h"
#include "text/tokenizer.h"
#include "text/tokenizer_load.h"
#include "base/banned.h"

static const char glm[] = TD_SOURCE_DIR "/tests/goldens/tokenizers/glm/tokenizer.json";
static const char sample[] =
    "The quick brown fox, 12345 lazy dogs: it's a test.\n  Größe 你好 <|user|>";

/* How a file is written: white space, escapes, merges as strings, merges first. */
typedef struct layout {
    const char *space;
    int escaped, strings, merges_first;
} layout;

static void put_text(td_strbuf *b, const layout *how, const char *s)
{
    uint32_t cp;
    td_strbuf_adds(b, "\"");
    for (size_t n = strlen(s), len; n; s += len, n -= len) {
        len = (size_t)td_utf8_decode(s, n, &cp);
        if (how->escaped && cp < 0x10000)
            td_strbuf_addf(b, "\\u%04x", cp);
        else if (*s == '"' || *s == '\\')
            td_strbuf_addf(b, "\\%c", *s);
        else
            td_strbuf_add(b, s, len);
    }
    td_strbuf_adds(b, "\"");
}

static void put_vocab(td_strbuf *b, const layout *how, json_t *vocab)
{
    const char *key, *comma = "";
    json_t *id;
    td_strbuf_addf(b, "\"vocab\"%s:%s{", how->space, how->space);
    json_object_foreach(vocab, key, id)
    {
        td_strbuf_addf(b, "%s%s", comma, how->space);
        put_text(b, how, key);
        td_strbuf_addf(b, "%s:%s%d%s", how->space, how->space, (int)json_integer_value(id),
                       how->space);
        comma = ",";
    }
    td_strbuf_adds(b, "}");
}

static void put_merge(td_strbuf *b, const layout *how, const char *left, const char *right)
{
    char both[200];
    if (how->strings) {
        assert_true(snprintf(both, sizeof both, "%s %s", left, right) < (int)sizeof both);
        put_text(b, how, both);
        return;
    }
    td_strbuf_addf(b, "[%s", how->space);
    put_text(b, how, left);
    td_strbuf_addf(b, "%s,%s", how->space, how->space);
    put_text(b, how, right);
    td_strbuf_addf(b, "%s]", how->space);
}

static void put_merges(td_strbuf *b, const layout *how, json_t *merges)
{
    json_t *m;
    size_t i;
    td_strbuf_addf(b, "\"merges\"%s:%s[", how->space, how->space);
    json_array_foreach(merges, i, m)
    {
        td_strbuf_addf(b, "%s%s", i ? "," : "", how->space);
        put_merge(b, how, json_string_value(json_array_get(m, 0)),
                  json_string_value(json_array_get(m, 1)));
        td_strbuf_adds(b, how->space);
    }
    td_strbuf_adds(b, "]");
}

/* The file of root with its model written as how says. */
static void write_as(td_strbuf *b, const layout *how, json_t *root)
{
    json_t *model = json_object_get(root, "model"), *value;
    const char *key;
    td_strbuf_addf(b, "{\"model\":%s{\"type\": \"BPE\",", how->space);
    if (how->merges_first) {
        put_merges(b, how, json_object_get(model, "merges"));
        td_strbuf_adds(b, ",");
    }
    put_vocab(b, how, json_object_get(model, "vocab"));
    if (!how->merges_first) {
        td_strbuf_adds(b, ",");
        put_merges(b, how, json_object_get(model, "merges"));
    }
    td_strbuf_adds(b, "}");
    json_object_foreach(root, key, value)
    {
        if (strcmp(key, "model") == 0)
            continue;
        char *text = json_dumps(value, JSON_ENCODE_ANY);
        td_strbuf_addf(b, ",\"%s\":%s%s", key, how->space, text);
        free(text);
    }
    td_strbuf_adds(b, "}");
}

static td_tokenizer *parse(const td_strbuf *b)
{
    td_tokenizer *t = NULL;
    td_err err = {0};
    char *exact = malloc(b->len); /* the sanitizer sees a read past the end */
    assert_non_null(exact);
    memcpy(exact, b->data, b->len);
    if (td_tokenizer_parse("tokenizer.json", exact, b->len, NULL, 0, &t, &err) < 0)
        fail_msg("%s", err.text);
    free(exact);
    return t;
}

/* Merges as pairs of strings, whichever way the file has them. */
static void split_merges(json_t *root)
{
    json_t *merges = json_object_get(json_object_get(root, "model"), "merges"), *m;
    size_t i;
    json_array_foreach(merges, i, m)
    {
        const char *s = json_string_value(m), *space = s ? strchr(s, ' ') : NULL;
        if (space)
            json_array_set_new(merges, i, json_pack("[s%,s]", s, (size_t)(space - s), space + 1));
    }
}

static void layouts_are_one(void **state)
{
    static const layout ways[] = {{""},
                                  {" "},
                                  {"\n        "},
                                  {"\r\n\t  \t             \n"},
                                  {"", .strings = 1},
                                  {"\n      ", .strings = 1},
                                  {"", .escaped = 1},
                                  {" ", .escaped = 1, .strings = 1},
                                  {"\n  ", .merges_first = 1}};
    json_t *root = json_load_file(glm, 0, NULL);
    td_tokenizer *want_tok = NULL;
    td_err err = {0};
    td_ids want = {0};
    assert_non_null(root);
    split_merges(root);
    assert_int_equal(
        td_tokenizer_open(TD_SOURCE_DIR "/tests/goldens/tokenizers/glm", 0, &want_tok, &err), 0);
    assert_int_equal(td_tokenizer_encode(want_tok, sample, strlen(sample), 0, &want), 0);
    assert_true(want.n > 5 && want.n < strlen(sample));
    for (size_t i = 0; i < TD_ARRAY_LEN(ways); i++) {
        td_strbuf b;
        td_ids got = {0};
        td_strbuf_init(&b);
        write_as(&b, &ways[i], root);
        td_tokenizer *t = parse(&b);
        assert_int_equal(td_tokenizer_encode(t, sample, strlen(sample), 0, &got), 0);
        assert_int_equal(got.n, want.n);
        assert_memory_equal(got.data, want.data, want.n * sizeof *want.data);
        td_ids_done(&got);
        td_tokenizer_free(t);
        td_strbuf_done(&b);
    }
    td_ids_done(&want);
    td_tokenizer_free(want_tok);
    json_decref(root);
}

enum { LETTERS = 20, WORDS = LETTERS * LETTERS * (1 + LETTERS + LETTERS * LETTERS) };

/* Words of 2, 3, 4 letters, the first a capital, so that merging can only go from left to right. */
static void word(uint32_t i, char out[5])
{
    uint32_t n = 2, of_length = LETTERS * LETTERS;
    for (; i >= of_length; of_length *= LETTERS, n++)
        i -= of_length;
    out[n] = 0;
    while (n--) {
        out[n] = (char)((n ? 'a' : 'A') + i % LETTERS);
        i /= LETTERS;
    }
}

/* Its id: no order that could be guessed (7919 has no factor in common with WORDS). */
static uint32_t id_of_word(uint32_t i)
{
    return 256 + (uint32_t)((uint64_t)i * 7919 % WORDS);
}

static void make_large(td_strbuf *b, const char *ignore_merges)
{
    char w[5];
    td_strbuf_addf(b,
                   "{\"version\": \"1.0\", \"model\": {\"type\": \"BPE\", %s\"vocab\": {\"!\": 0",
                   ignore_merges);
    for (uint32_t c = 0, id = 1, next = 0x100; c < 256; c++) {
        int plain = (c > 0x21 && c <= 0x7E) || (c >= 0xA1 && c <= 0xAC) || c >= 0xAE;
        char utf8[4];
        if (c == 0x21)
            continue;
        int n = td_utf8_encode(plain ? c : next++, utf8);
        td_strbuf_addf(b, ", \"%s%.*s\": %u", c == '"' || c == '\\' ? "\\" : "", n, utf8, id++);
    }
    for (uint32_t i = 0; i < WORDS; i++) {
        word(i, w);
        td_strbuf_addf(b, ",\"%s\":%u", w, id_of_word(i));
    }
    td_strbuf_adds(b, "}, \"merges\": [");
    for (uint32_t i = 0; i < WORDS; i++) {
        word(i, w);
        int n = (int)strlen(w);
        td_strbuf_addf(b, "%s[\n\"%.*s\", \"%s\"]", i ? "," : "", n - 1, w, w + n - 1);
    }
    td_strbuf_adds(b, "]}, \"pre_tokenizer\": {\"type\": \"ByteLevel\", \"add_prefix_space\": "
                      "false}, \"decoder\": {\"type\": \"ByteLevel\"}}");
}

static void large_tables(void **state)
{
    static const char *const ways[] = {"\"ignore_merges\": true, ", ""};
    for (size_t k = 0; k < TD_ARRAY_LEN(ways); k++) {
        td_strbuf b;
        td_strbuf_init(&b);
        make_large(&b, ways[k]);
        td_tokenizer *t = parse(&b);
        assert_int_equal(td_tokenizer_size(t), 256 + WORDS);
        for (uint32_t i = 0; i < WORDS; i += 487) {
            td_ids ids = {0};
            char w[5];
            word(i, w);
            assert_int_equal(td_tokenizer_encode(t, w, strlen(w), 0, &ids), 0);
            assert_int_equal(ids.n, 1);
            assert_int_equal(ids.data[0], id_of_word(i));
            td_ids_done(&ids);
        }
        td_tokenizer_free(t);
        td_strbuf_done(&b);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(layouts_are_one),
        cmocka_unit_test(large_tables),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
