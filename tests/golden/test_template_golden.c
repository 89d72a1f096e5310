/* SPDX-License-Identifier: Apache-2.0 */
/* Promise: a chat template gives the text that Python's jinja2, set up as transformers does, gives;
 * and fails where that fails. Goldens: tests/goldens/make_templates.py. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/file.h"
#include "base/json.h"
#include "text/template.h"
#include "base/banned.h"

static const char root[] = TD_SOURCE_DIR "/tests/goldens/templates/";

static json_t *load(const char *file)
{
    static const td_json_limits limits = {.max_bytes = 64 << 20, .max_nodes = 1 << 22};
    char path[500];
    td_err err = {0};
    json_t *j = NULL;
    snprintf(path, sizeof path, "%s%s", root, file);
    if (td_json_load(path, &limits, &j, &err) < 0)
        fail_msg("%s", err.text);
    return j;
}

/* Returns 1 on a difference. */
static int differs(const char *what, const char *source, int code, const td_err *err,
                   const td_strbuf *got, const json_t *want)
{
    if (json_is_null(want) && code < 0)
        return 0;
    if (json_is_string(want) && code == 0 && got->len == json_string_length(want) &&
        memcmp(got->data, json_string_value(want), got->len) == 0)
        return 0;
    print_error("%s: %s\n got  %s\n want %s\n", what, source, code < 0 ? err->text : got->data,
                json_is_null(want) ? "(refused)" : json_string_value(want));
    return 1;
}

static int render(const td_template *t, json_t *vars, int64_t now, td_strbuf *out, td_err *err)
{
    td_template_budget budget = {.now_s = now};
    return td_template_render(t, vars, &budget, out, err);
}

static void fixture(const char *name)
{
    char path[500], file[200], *source = NULL;
    size_t n = 0;
    td_err err = {0};
    td_template *t = NULL;
    snprintf(path, sizeof path, "%s%s.jinja", root, name);
    snprintf(file, sizeof file, "%s.json", name);
    if (td_file_read(path, 1 << 20, &source, &n, &err) < 0 ||
        td_template_compile(name, source, n, &t, &err) < 0)
        fail_msg("%s", err.text);
    json_t *golden = load(file), *one;
    size_t i;
    int bad = 0, rendered = 0;
    json_array_foreach(json_object_get(golden, "cases"), i, one)
    {
        td_strbuf out;
        td_strbuf_init(&out);
        int code = render(t, json_array_get(one, 0),
                          json_integer_value(json_object_get(golden, "now_s")), &out, &err);
        char *vars = json_dumps(json_array_get(one, 0), JSON_COMPACT);
        bad += differs(name, vars, code, &err, &out, json_array_get(one, 1));
        rendered += code == 0;
        free(vars);
        td_strbuf_done(&out);
    }
    json_decref(golden);
    td_template_free(t);
    free(source);
    assert_int_equal(bad, 0);
    assert_true(rendered > 20);
}

static void snippets(void **state)
{
    json_t *golden = load("snippets.json"), *one;
    size_t i;
    int bad = 0;
    json_array_foreach(json_object_get(golden, "cases"), i, one)
    {
        const json_t *source = json_array_get(one, 0);
        td_strbuf out;
        td_err err = {0};
        td_template *t = NULL;
        td_strbuf_init(&out);
        int code = td_template_compile("t", json_string_value(source), json_string_length(source),
                                       &t, &err);
        if (code == 0)
            code = render(t, json_object_get(golden, "vars"),
                          json_integer_value(json_object_get(golden, "now_s")), &out, &err);
        bad +=
            differs("snippet", json_string_value(source), code, &err, &out, json_array_get(one, 1));
        td_template_free(t);
        td_strbuf_done(&out);
    }
    json_decref(golden);
    assert_int_equal(bad, 0);
}

#define FIXTURE(name)                                                                              \
    static void fixture_##name(void **state)                                                       \
    {                                                                                              \
        fixture(#name);                                                                            \
    }
FIXTURE(glm45)
FIXTURE(glm47)
FIXTURE(glm5)
FIXTURE(qwen3)
FIXTURE(llama3)
FIXTURE(deepseek3)

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(snippets),          cmocka_unit_test(fixture_glm45),
        cmocka_unit_test(fixture_glm47),     cmocka_unit_test(fixture_glm5),
        cmocka_unit_test(fixture_qwen3),     cmocka_unit_test(fixture_llama3),
        cmocka_unit_test(fixture_deepseek3),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
