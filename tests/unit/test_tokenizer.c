/* SPDX-License-Identifier: Apache-2.0 */
/* Promises: a bad tokenizer.json is refused with the file, the field and what to do; merging stays
 * O(n log n); a stream of ids gives the text that decode() gives, whole characters only. */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/bug.h"
#include "base/cleanup.h"
#include "base/file.h"
#include "text/bpe.h"
#include "text/pattern.h"
#include "text/tokenizer.h"
#include "text/tokenizer_load.h"
#include "base/banned.h"

static const char seed[] = TD_SOURCE_DIR "/tests/fuzz/corpus/fuzz_tokenizer/full.json";
static const char glm[] = TD_SOURCE_DIR "/tests/goldens/tokenizers/glm";

/* The good file with one text in it exchanged. */
static char *changed(const char *from, const char *to)
{
    TD_AUTO_FREE char *text = NULL;
    size_t n = 0;
    td_err err = {0};
    if (td_file_read(seed, 1 << 20, &text, &n, &err) < 0)
        fail_msg("%s", err.text);
    char *at = strstr(text, from);
    assert_non_null(at);
    td_strbuf b;
    td_strbuf_init(&b);
    td_strbuf_add(&b, text, (size_t)(at - text));
    td_strbuf_adds(&b, to);
    td_strbuf_adds(&b, at + strlen(from));
    return td_strbuf_take(&b, NULL);
}

static void refused(void **state)
{
    static const struct {
        const char *from, *to, *word; /* word: what the error must name */
    } cases[] = {
        {"\"H i\"", "\"H zz\"", "model.merges: 'zz'"},
        {"\"H i\"", "\"H i x\"", "model.merges"},
        {"\"Hi\": 256", "\"Hi\": 255", "id 255"},
        {"\"Hi\": 256", "\"Hi\": 999999", "vocab_size"},
        {"\"Hi\": 256", "\"he\": 256", "twice"},
        {"\"Hi\": 256", "\"Hi\": -1", "integer"},
        {"\"a\": 97", "\"aa\": 97", "0x61"},
        {"\"id\": 260", "\"id\": 70000", "added_tokens"},
        {"\"content\": \"<|user|>\"", "\"content\": \"Hi\"", "added_tokens"},
        {"\"NFC\"", "\"BertNormalizer\"", "normalizer.type 'BertNormalizer'"},
        {"\"type\": \"Digits\"", "\"type\": \"Metaspace\"", "pre_tokenizer.type 'Metaspace'"},
        {"\"MergedWithNext\"", "\"Sideways\"", "behavior"},
        {"a+b", "(a+b", "pattern"},
        {"a+b", "a*", "empty"},
        {"a+b", "(?<n>a)", "not supported"},
        {"a+b", "[a&&b]", "&&"},
        {"\"TemplateProcessing\"", "\"BertProcessing\"", "post_processor.type"},
        {"\"Fuse\"", "\"WordPiece\"", "decoder"},
        {"\"dropout\": null", "\"dropout\": 0.1", "dropout"},
        {"\"dropout\": null", "\"surprise\": 1", "model.surprise"},
        {"\"type\": \"BPE\"", "\"type\": \"Unigram\"", "Unigram"},
        {"\"truncation\": null", "\"truncation\": {\"max_length\": 5}", "truncation"},
        {"\"truncation\": null", "\"surprise\": null", "surprise"},
        {"\"version\": \"1.0\"", "\"version\": \"9\"", "version"},
    };
    for (size_t i = 0; i < TD_ARRAY_LEN(cases); i++) {
        TD_AUTO_FREE char *text = changed(cases[i].from, cases[i].to);
        td_tokenizer *t = NULL;
        td_err err = {0};
        int r = td_tokenizer_parse("DIR/tokenizer.json", text, strlen(text), NULL, 5000, &t, &err);
        if (r >= 0 || !strstr(err.text, cases[i].word) ||
            strncmp(err.text, "DIR/tokenizer.json", 18) != 0)
            fail_msg("%s: %d '%s'", cases[i].to, r, err.text);
        assert_null(t);
    }
}

static void truncated(void **state)
{
    TD_AUTO_FREE char *text = changed("\"Hi\"", "\"Hi\"");
    size_t n = strlen(text);
    for (size_t k = 0; k < n; k += k < 300 || k + 100 > n ? 1 : 37) {
        td_tokenizer *t = NULL;
        td_err err = {0};
        TD_AUTO_FREE char *part = strndup(text, k); /* the sanitizer sees a read past the end */
        assert_true(td_tokenizer_parse("f", part, k, NULL, 0, &t, &err) < 0);
        assert_true(err.text[0]);
    }
}

static td_tokenizer *open_glm(void)
{
    td_tokenizer *t = NULL;
    td_err err = {0};
    if (td_tokenizer_open(glm, 0, &t, &err) < 0)
        fail_msg("%s", err.text);
    return t;
}

static void past_vocabulary(void **state)
{
    td_tokenizer *t = NULL;
    td_err err = {0};
    assert_true(td_tokenizer_open(glm, 100, &t, &err) < 0);
    assert_non_null(strstr(err.text, "vocab_size"));
    assert_non_null(strstr(err.text, "tokenizer.json"));
    assert_int_equal(td_tokenizer_open("/nonexistent", 0, &t, &err), -ENOENT);
}

static void invalid_text(void **state)
{
    td_tokenizer *t = open_glm();
    td_ids ids = {0};
    td_strbuf out;
    uint32_t none = 100000;
    td_strbuf_init(&out);
    assert_int_equal(td_tokenizer_encode(t, "a\xC3", 2, 0, &ids), -EILSEQ);
    assert_int_equal(ids.n, 0);
    assert_int_equal(td_tokenizer_decode(t, &none, 1, 0, &out), -EINVAL);
    assert_int_equal(out.len, 0);
    td_strbuf_done(&out);
    td_tokenizer_free(t);
}

/* Heap steps for n bytes of one repeated text: doubling n may not much more than double them. */
static uint64_t steps(const char *unit, size_t n)
{
    static td_merge list[40];
    uint32_t byte_id[256];
    td_merges m;
    td_bpe_work w = {0};
    td_ids ids = {0};
    TD_AUTO_FREE char *text = malloc(n);
    assert_non_null(text);
    for (size_t i = 0; i < n; i++)
        text[i] = unit[i % strlen(unit)];
    for (uint32_t i = 0; i < 256; i++)
        byte_id[i] = i;
    /* a a, aa aa, ... : the longest chain of merges there is; and a b, ab ab */
    for (uint32_t i = 0; i < 20; i++)
        list[i] = (td_merge){i ? 299 + i : 'a', i ? 299 + i : 'a', i + 1, 300 + i};
    for (uint32_t i = 0; i < 20; i++)
        list[20 + i] = (td_merge){i ? 399 + i : 'a', i ? 399 + i : 'b', 21 + i, 400 + i};
    assert_int_equal(td_merges_init(&m, list, 40), 0);
    assert_int_equal(td_bpe_encode(&m, byte_id, text, n, &w, &ids), 0);
    uint64_t n_ops = w.n_ops;
    td_bpe_work_done(&w);
    td_merges_done(&m);
    td_ids_done(&ids);
    return n_ops;
}

static void merging_is_n_log_n(void **state)
{
    static const char *const units[] = {"a", "ab", "aab", "ba"};
    for (size_t i = 0; i < TD_ARRAY_LEN(units); i++) {
        uint64_t one = steps(units[i], 100000), two = steps(units[i], 200000);
        if (two * 10 >= one * 26)
            fail_msg("'%s': %llu steps, then %llu", units[i], (unsigned long long)one,
                     (unsigned long long)two);
    }
}

/* Long runs that make split patterns go back and forth; a quadratic one would take minutes. */
static void long_runs(void **state)
{
    static const char *const units[] = {" ", "a", "\n", " \n", "\xF0\x9F\x98\x80", "1", "'", " a"};
    td_tokenizer *t = open_glm();
    for (size_t i = 0; i < TD_ARRAY_LEN(units); i++) {
        td_strbuf b, back;
        td_ids ids = {0};
        td_strbuf_init(&b);
        td_strbuf_init(&back);
        while (b.len < 200000)
            td_strbuf_adds(&b, units[i]);
        assert_int_equal(td_tokenizer_encode(t, b.data, b.len, 0, &ids), 0);
        assert_int_equal(td_tokenizer_decode(t, ids.data, ids.n, 0, &back), 0);
        assert_int_equal(back.len, b.len);
        assert_memory_equal(back.data, b.data, b.len);
        td_ids_done(&ids);
        td_strbuf_done(&b);
        td_strbuf_done(&back);
    }
    td_tokenizer_free(t);
}

static void stream_is_whole(void **state)
{
    td_tokenizer *t = open_glm();
    uint32_t rnd = 7, ids[40];
    for (int round = 0; round < 2000; round++) {
        td_strbuf whole, stream;
        td_detok d;
        td_strbuf_init(&whole);
        td_strbuf_init(&stream);
        td_detok_init(&d, t, round & 1);
        for (size_t i = 0; i < 40; i++) {
            rnd = rnd * 1664525 + 1013904223;
            ids[i] = (rnd >> 8) % (i % 3 ? 256 : td_tokenizer_size(t)); /* mostly single bytes */
            size_t before = stream.len;
            assert_int_equal(td_detok_add(&d, ids[i], &stream), 0);
            assert_true(td_utf8_valid(stream.data + before, stream.len - before));
        }
        td_detok_finish(&d, &stream);
        assert_int_equal(td_tokenizer_decode(t, ids, 40, round & 1, &whole), 0);
        assert_string_equal(stream.data, whole.data);
        td_strbuf_done(&whole);
        td_strbuf_done(&stream);
    }
    td_tokenizer_free(t);
}

static void finds_by_text(void **state)
{
    td_tokenizer *t = open_glm();
    uint32_t id = 0;
    assert_int_equal(td_tokenizer_find(t, "<think>", 7, &id), 0);
    assert_int_equal(td_tokenizer_is_special(t, id), 0);
    assert_int_equal(td_tokenizer_find(t, "<|user|>", 8, &id), 0);
    assert_int_equal(td_tokenizer_is_special(t, id), 1);
    td_str s = td_tokenizer_bytes(t, id);
    assert_int_equal(s.len, 8);
    assert_int_equal(td_tokenizer_find(t, " ", 1, &id), 0);
    assert_int_equal(td_tokenizer_bytes(t, id).ptr[0], ' ');
    assert_int_equal(td_tokenizer_find(t, "no such token", 13, &id), -ENOENT);
    assert_null(td_tokenizer_bytes(t, td_tokenizer_size(t)).ptr);
    td_tokenizer_free(t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(refused),
        cmocka_unit_test(truncated),
        cmocka_unit_test(past_vocabulary),
        cmocka_unit_test(invalid_text),
        cmocka_unit_test(merging_is_n_log_n),
        cmocka_unit_test(long_runs),
        cmocka_unit_test(stream_is_whole),
        cmocka_unit_test(finds_by_text),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
