/* SPDX-License-Identifier: Apache-2.0 */
/* Promises: reasoning and content are the same however the text is cut; nothing but tags and the
 * white space round them is lost; a tag that the answer speaks of is text. And the like for stop
 * strings: nothing of a completed one is ever sent. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/bug.h"
#include "text/reasoning.h"
#include "text/stops.h"
#include "base/banned.h"

static const struct {
    int inside;
    const char *text, *reasoning, *content;
} cases[] = {
    {1, "let me see</think>Answer", "let me see", "Answer"},
    {1, "\nlet me\n see \n</think>\n\nAnswer \n", "let me\n see", "Answer \n"},
    {1, "<think>a</think>b", "a", "b"},
    {1, "never closed", "never closed", ""},
    {1, "a</thin", "a</thin", ""},
    {1, "a < b </ <</think>c", "a < b </ <", "c"},
    {1, "a <think> b</think>c", "a <think> b", "c"},
    {1, "</think>only", "", "only"},
    {1, "a</think>the tags <think> and </think> are text", "a",
     "the tags <think> and </think> are text"},
    {0, "plain <b> text</think>", "", "plain <b> text</think>"},
    {0, "  <think>a</think>b", "a", "b"},
    {0, "  lead", "", "  lead"},
    {0, "x<think>a</think>b", "", "x<think>a</think>b"},
    {0, "<thin", "", "<thin"},
    {0, "", "", ""},
};

static void split_at(size_t k, size_t a, size_t b)
{
    td_reasoning r;
    td_strbuf reasoning, content;
    size_t n = strlen(cases[k].text);
    td_strbuf_init(&reasoning);
    td_strbuf_init(&content);
    td_reasoning_init(&r, cases[k].inside);
    td_reasoning_add(&r, cases[k].text, a, &reasoning, &content);
    td_reasoning_add(&r, cases[k].text + a, b - a, &reasoning, &content);
    td_reasoning_add(&r, cases[k].text + b, n - b, &reasoning, &content);
    td_reasoning_finish(&r, &reasoning, &content);
    assert_string_equal(reasoning.data, cases[k].reasoning);
    assert_string_equal(content.data, cases[k].content);
    td_reasoning_done(&r);
    td_strbuf_done(&reasoning);
    td_strbuf_done(&content);
}

static void reasoning_splits(void **state)
{
    for (size_t k = 0; k < TD_ARRAY_LEN(cases); k++)
        for (size_t a = 0; a <= strlen(cases[k].text); a++)
            for (size_t b = a; b <= strlen(cases[k].text); b++)
                split_at(k, a, b);
}

/* What is right by definition: up to the earliest end of any stop string, the longest of those that
 * end there. */
static size_t cut_of(const char *text, const td_str *stops, size_t n, int *ret_hit)
{
    for (size_t end = 1; end <= strlen(text); end++) {
        size_t longest = 0;
        for (size_t i = 0; i < n; i++)
            if (stops[i].len <= end &&
                memcmp(text + end - stops[i].len, stops[i].ptr, stops[i].len) == 0 &&
                stops[i].len > longest)
                longest = stops[i].len;
        if (longest) {
            *ret_hit = 1;
            return end - longest;
        }
    }
    *ret_hit = 0;
    return strlen(text);
}

static void check_stops(const char *text, const td_str *stops, size_t n, size_t a, size_t b)
{
    td_stops *s = NULL;
    td_strbuf out;
    int want_hit, hit;
    size_t want = cut_of(text, stops, n, &want_hit), len = strlen(text);
    td_strbuf_init(&out);
    assert_int_equal(td_stops_new(stops, n, &s), 0);
    hit = td_stops_add(s, text, a, &out);
    hit |= td_stops_add(s, text + a, b - a, &out);
    hit |= td_stops_add(s, text + b, len - b, &out);
    assert_true(out.len <= want); /* never anything of a stop string, at any time */
    td_stops_finish(s, &out);
    assert_int_equal(hit, want_hit);
    assert_int_equal(out.len, want);
    assert_memory_equal(out.data, text, want);
    td_stops_free(s);
    td_strbuf_done(&out);
}

static void stops_match(void **state)
{
    uint32_t seed = 1;
    for (int round = 0; round < 400; round++) {
        char text[24], words[4][6];
        td_str stops[4];
        seed = seed * 1664525 + 1013904223;
        size_t n = 1 + seed % 4, len = 4 + (seed >> 8) % 16;
        for (size_t i = 0; i < n; i++) {
            stops[i] = (td_str){words[i], 1 + (seed >> (12 + i)) % 5};
            for (size_t k = 0; k < stops[i].len; k++) {
                seed = seed * 1664525 + 1013904223;
                words[i][k] = (char)('a' + (seed >> 20) % 2);
            }
        }
        for (size_t k = 0; k < len; k++) {
            seed = seed * 1664525 + 1013904223;
            text[k] = (char)('a' + (seed >> 20) % 3 % 2 + ((seed >> 24) % 7 == 0));
        }
        text[len] = 0;
        for (size_t a = 0; a <= len; a++)
            for (size_t b = a; b <= len; b += 3)
                check_stops(text, stops, n, a, b);
    }
}

static void stops_limits(void **state)
{
    char long_one[257];
    td_stops *s = NULL;
    td_str many[17], one = {long_one, 256}, empty = {"", 0};
    memset(long_one, 'x', sizeof long_one);
    for (size_t i = 0; i < 17; i++)
        many[i] = (td_str){"a", 1};
    assert_int_equal(td_stops_new(&one, 1, &s), 0);
    td_strbuf out;
    td_strbuf_init(&out);
    assert_int_equal(td_stops_add(s, long_one, 255, &out), 0);
    assert_int_equal(out.len, 0);
    assert_int_equal(td_stops_add(s, long_one, 1, &out), 1);
    assert_int_equal(out.len, 0);
    td_strbuf_done(&out);
    td_stops_free(s);
    one.len = 257;
    assert_true(td_stops_new(&one, 1, &s) < 0);
    assert_true(td_stops_new(many, 17, &s) < 0);
    assert_true(td_stops_new(&empty, 1, &s) < 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(reasoning_splits),
        cmocka_unit_test(stops_match),
        cmocka_unit_test(stops_limits),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
