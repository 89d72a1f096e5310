/* SPDX-License-Identifier: Apache-2.0 */
/* Promises: no template outruns its budgets of steps, depth, output and memory; a mistake is named
 * with its line; nothing reaches into the interpreter; a template is found in either place a model
 * keeps it. */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/bug.h"
#include "base/cleanup.h"
#include "text/template.h"
#include "base/banned.h"

static int run(const char *source, const char *json, const td_template_budget *budget,
               td_strbuf *out, td_err *err)
{
    td_template *t = NULL;
    json_t *vars = json_loads(json, 0, NULL);
    int r = td_template_compile("chat_template.jinja", source, strlen(source), &t, err);
    if (r == 0)
        r = td_template_render(t, vars, budget, out, err);
    td_template_free(t);
    json_decref(vars);
    return r;
}

static void budgets(void **state)
{
    static const char *const sources[] = {
        "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{% for a in range(90000) %}{{ 'x' * 1000 }}{% endfor %}",
        "{{ 'x' * 100000000000 }}",
        "{{ [1] * 100000000000 }}",
        "{% set ns = namespace(s='x') %}{% for a in range(90000) %}{% set ns.s = ns.s ~ ns.s %}{% "
        "endfor %}",
        "{% set ns = namespace(l=[]) %}{% for a in range(90000) %}{% set ns.l = [ns.l] %}{% endfor "
        "%}{{ ns.l }}",
        "{% set ns = namespace(l=[]) %}{% for a in range(90000) %}{% set ns.l = [ns.l, ns.l] %}{% "
        "endfor %}{{ ns.l == ns.l }}",
        "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}",
        "{{ 'a,' * 3000000 }}{{ ('a,' * 3000000).split(',')|join }}",
        "{% set ns = namespace(d={}) %}{% for a in range(90000) %}{% set ns.d = dict(ns.d, **{'a': "
        "1}) %}{% endfor %}",
        "{% for a in range(3000) %}{% set x = range(90000)|list|sort|reverse|list %}{% endfor %}",
    };
    for (size_t i = 0; i < TD_ARRAY_LEN(sources); i++) {
        td_err err = {0};
        td_strbuf out;
        td_strbuf_init(&out);
        int r = run(sources[i], "{}", NULL, &out, &err);
        if (r != -E2BIG && r != -EINVAL)
            fail_msg("%s: %d", sources[i], r);
        assert_int_equal(out.len, 0);
        assert_non_null(strstr(err.text, "chat_template.jinja:1: "));
        td_strbuf_done(&out);
    }
}

static void small_budgets(void **state)
{
    static const td_template_budget few = {.max_steps = 50}, brief = {.max_output = 10},
                                    flat = {.max_depth = 4};
    td_err err = {0};
    td_strbuf out;
    td_strbuf_init(&out);
    assert_int_equal(run("{% for i in range(100) %}{{ i }}{% endfor %}", "{}", &few, &out, &err),
                     -E2BIG);
    assert_int_equal(run("{{ 'x' * 11 }}", "{}", &brief, &out, &err), -E2BIG);
    assert_int_equal(run("{{ 'x' * 10 }}", "{}", &brief, &out, &err), 0);
    assert_int_equal(run("{{ a|tojson }}", "{\"a\":[[[[[[1]]]]]]}", &flat, &out, &err), -E2BIG);
    assert_int_equal(run("{{ a|tojson }}", "{\"a\":[[1]]}", &flat, &out, &err), 0);
    assert_string_equal(out.data, "xxxxxxxxxx[[1]]");
    td_strbuf_done(&out);
}

/* Nesting in the source must not become recursion in the parser or the interpreter. */
static void deep_sources(void **state)
{
    static const char *const units[][3] = {{"{{ ", "(", "1"},
                                           {"{{ ", "[", "1"},
                                           {"{{ ", "-", "1 }}"},
                                           {"{{ ", "not ", "1 }}"},
                                           {"{{ 1", "+1", " }}"},
                                           {"{{ x", ".y", " }}"},
                                           {"{{ x", "|string", " }}"},
                                           {"{{ x", "[0]", " }}"},
                                           {"", "{% if x %}", ""},
                                           {"", "{% for a in x %}", ""},
                                           {"{{ x", " if x else y", " }}"},
                                           {"{{ x", " is defined", " }}"},
                                           {"{{ {'a': ", "{'a': ", "1"},
                                           {"{% set x", " | string", " %}{% endset %}"},
                                           {"{{ 2", "**2", " }}"}};
    for (size_t i = 0; i < TD_ARRAY_LEN(units); i++) {
        td_strbuf source, out;
        td_err err = {0};
        td_strbuf_init(&source);
        td_strbuf_init(&out);
        td_strbuf_adds(&source, units[i][0]);
        for (int k = 0; k < 5000; k++)
            td_strbuf_adds(&source, units[i][1]);
        td_strbuf_adds(&source, units[i][2]);
        int r = run(source.data, "{}", NULL, &out, &err);
        assert_true(r < 0);
        assert_true(strlen(err.text) > 10);
        td_strbuf_done(&source);
        td_strbuf_done(&out);
    }
}

static void errors_name_the_line(void **state)
{
    static const struct {
        const char *source, *want;
    } cases[] = {
        {"a\nb {{ x|nosuch }}", ":2: unknown filter 'nosuch'"},
        {"a\n\n{% if x is nosuch %}", ":3: unknown test 'nosuch'"},
        {"\n{% include 'x' %}", ":2: the tag 'include'"},
        {"\n\n{{ x.y.z }}", ":3: 'x' is undefined"},
        {"{% for i in 5 %}{% endfor %}", ":1: 'int' object is not iterable"},
        {"{% if true %}\n", "endif"},
        {"\n{{ raise_exception('only two roles') }}",
         ":2: the template refuses this: only two roles"},
        {"{{ ''.__class__ }}", "unsafe"},
        {"{{ [].append(1) }}", "cannot be changed"},
        {"{{ 9223372036854775807 + 1 }}", "64 bits"},
        {"{{ range(10000000) }}", "range()"},
        {"\xC3", "UTF-8"},
    };
    for (size_t i = 0; i < TD_ARRAY_LEN(cases); i++) {
        td_err err = {0};
        td_strbuf out;
        td_strbuf_init(&out);
        int r = run(cases[i].source, "{}", NULL, &out, &err);
        if (r >= 0 || !strstr(err.text, cases[i].want) ||
            strncmp(err.text, "chat_template.jinja", 19) != 0)
            fail_msg("%s: %d '%s'", cases[i].source, r, err.text);
        td_strbuf_done(&out);
    }
}

static void write_file(const char *dir, const char *name, const char *text)
{
    char path[300];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    TD_AUTO_FCLOSE FILE *f = fopen(path, "w");
    assert_non_null(f);
    fputs(text, f);
}

static void render_dir(const char *dir, const char *want)
{
    td_template *t = NULL;
    td_err err = {0};
    td_strbuf out;
    json_t *vars = json_object();
    td_strbuf_init(&out);
    if (td_template_open(dir, &t, &err) < 0 || td_template_render(t, vars, NULL, &out, &err) < 0)
        fail_msg("%s", err.text);
    assert_string_equal(out.data, want);
    td_template_free(t);
    td_strbuf_done(&out);
    json_decref(vars);
}

static void found_in_both_places(void **state)
{
    char dir[] = "/tmp/tandem-test-XXXXXX", path[300];
    static const char *const names[] = {"tokenizer_config.json", "chat_template.jinja"};
    td_template *t = NULL;
    td_err err = {0};
    assert_non_null(mkdtemp(dir));
    assert_int_equal(td_template_open(dir, &t, &err), -ENOENT);
    write_file(dir, names[0],
               "{\"bos_token\": {\"content\": \"<s>\"}, \"eos_token\": \"</s>\", "
               "\"chat_template\": \"{{ bos_token }}one\"}");
    render_dir(dir, "<s>one");
    write_file(dir, names[1], "two{{ eos_token }}\n");
    render_dir(dir, "two</s>");
    for (size_t i = 0; i < 2; i++) {
        snprintf(path, sizeof path, "%s/%s", dir, names[i]);
        unlink(path);
    }
    rmdir(dir);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(budgets),
        cmocka_unit_test(small_budgets),
        cmocka_unit_test(deep_sources),
        cmocka_unit_test(errors_name_the_line),
        cmocka_unit_test(found_in_both_places),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
