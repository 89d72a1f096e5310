/* SPDX-License-Identifier: Apache-2.0 */
/* Promise: a regex class of tokenizer.json matches the characters that the Python package
 * `tokenizers` matches with it, over all of Unicode, though its regex library and ours know
 * different versions. Goldens: tests/goldens/make_classes.py. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#include <cmocka.h>

#include "base/json.h"
#include "text/pattern.h"
#include "base/banned.h"

enum { N_POINTS = 0x110000 };

static unsigned char want[N_POINTS];

static void expect(const json_t *runs)
{
    size_t i;
    json_t *run;
    for (uint32_t c = 0; c < N_POINTS; c++)
        want[c] = 0;
    json_array_foreach(runs, i, run)
    {
        for (json_int_t c = json_integer_value(json_array_get(run, 0));
             c <= json_integer_value(json_array_get(run, 1)); c++)
            want[c] = 1;
    }
}

/* Compares every character; matches of several at once ("+") are what a quick check needs. */
static int compare(const char *class, const td_strbuf *all)
{
    td_strbuf source;
    td_pattern *p = NULL;
    td_err err = {0};
    td_spans spans = {0};
    td_matcher m;
    _Atomic uint64_t n_interpreted = 0;
    int bad = 0;
    td_strbuf_init(&source);
    td_strbuf_addf(&source, "%s+", class);
    if (td_pattern_regex("class", source.data, &p, &err) < 0 ||
        td_matcher_init(&m, &n_interpreted) < 0)
        fail_msg("%s", err.text);
    assert_int_equal(td_pattern_cut(p, &m, all->data, all->len, &spans), 0);
    for (size_t i = 0; i < spans.n; i++)
        for (size_t at = spans.data[i].start; at < spans.data[i].end;) {
            uint32_t cp = 0;
            at += (size_t)td_utf8_decode(all->data + at, spans.data[i].end - at, &cp);
            if (want[cp] != spans.data[i].match && bad++ < 5)
                print_error("%s: U+%04X: got %d\n", class, cp, spans.data[i].match);
        }
    td_spans_done(&spans);
    td_matcher_done(&m);
    td_pattern_free(p);
    td_strbuf_done(&source);
    return bad;
}

static void every_character(void **state)
{
    static const td_json_limits limits = {.max_bytes = 4 << 20, .max_nodes = 1 << 20};
    json_t *golden = NULL, *runs;
    const char *class;
    td_err err = {0};
    td_strbuf all;
    int bad = 0;
    td_strbuf_init(&all);
    for (uint32_t c = 0; c < N_POINTS; c++) {
        char utf8[4];
        if (c < 0xD800 || c >= 0xE000)
            td_strbuf_add(&all, utf8, (size_t)td_utf8_encode(c, utf8));
    }
    if (td_json_load(TD_SOURCE_DIR "/tests/goldens/tokenizers/classes.json", &limits, &golden,
                     &err) < 0)
        fail_msg("%s", err.text);
    json_object_foreach(golden, class, runs)
    {
        expect(runs);
        bad += compare(class, &all);
    }
    json_decref(golden);
    td_strbuf_done(&all);
    assert_int_equal(bad, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(every_character)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
