/* SPDX-License-Identifier: Apache-2.0 */
/* Guards: an option does what its place says (command line > environment > file > default), a
 * mistyped one is never ignored, and docs/options.md is the table. TD_UPDATE_DOCS=1 writes that
 * file anew. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/file.h"
#include "base/options.h"
#include "base/strbuf.h"
#include "base/banned.h"

enum { ROUTER = TD_SEC_COMMON | TD_SEC_ROUTER, DECODE = TD_SEC_COMMON | TD_SEC_DECODE };

static char path[64], config[80];
static td_err err;

/* The file given by --config holds this text from now on. */
static void file_is(const char *text)
{
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    fputs(text, f);
    fclose(f);
}

static int set_up(void **state)
{
    snprintf(path, sizeof path, "/tmp/td-options-XXXXXX");
    int fd = mkstemp(path);
    if (fd < 0)
        return -1;
    close(fd);
    snprintf(config, sizeof config, "--config=%s", path);
    clearenv();
    return 0;
}

static int tear_down(void **state)
{
    return unlink(path);
}

/* Parse up to five arguments. */
static int parse(td_options *o, int sections, const char *a, const char *b, const char *c,
                 const char *d, const char *e)
{
    const char *given[] = {a, b, c, d, e};
    char *argv[6] = {config};
    int argc = 1;
    for (int i = 0; i < 5 && given[i]; i++)
        argv[argc++] = (char *)(uintptr_t)given[i];
    err = (td_err){0};
    return td_options_parse(o, sections, argc, argv, &err);
}

static void refused(int sections, const char *arg, const char *value, const char *text)
{
    td_options o;
    assert_true(parse(&o, sections, arg, value, NULL, NULL, NULL) < 0);
    if (!strstr(err.text, text))
        fail_msg("'%s' does not say '%s'", err.text, text);
}

static int64_t queue(int sections, const char *arg, td_origin origin)
{
    td_options o;
    if (parse(&o, sections, arg, NULL, NULL, NULL, NULL) < 0)
        fail_msg("%s", err.text);
    int64_t v = td_opt_int(&o, TD_OPT_ID_MAX_QUEUE);
    assert_int_equal(o.origin[TD_OPT_ID_MAX_QUEUE], origin);
    assert_int_equal(td_opt_is_set(&o, TD_OPT_ID_MAX_QUEUE), origin != TD_ORIGIN_DEFAULT);
    td_options_done(&o);
    return v;
}

static void test_precedence(void **state)
{
    file_is("");
    int64_t by_default = queue(ROUTER, NULL, TD_ORIGIN_DEFAULT);
    assert_true(by_default != 1 && by_default != 2 && by_default != 3);
    file_is("# comment\n; another\n\n [router] \r\n max-queue = 1 \r\n");
    assert_int_equal(queue(ROUTER, NULL, TD_ORIGIN_FILE), 1);
    setenv("TANDEM_ROUTER_MAX_QUEUE", "2", 1);
    assert_int_equal(queue(ROUTER, NULL, TD_ORIGIN_ENV), 2);
    assert_int_equal(queue(ROUTER, "--max-queue=3", TD_ORIGIN_CLI), 3);
    /* another command's section does not reach this one */
    assert_int_equal(queue(DECODE, NULL, TD_ORIGIN_DEFAULT), by_default);
    unsetenv("TANDEM_ROUTER_MAX_QUEUE");
    setenv("TANDEM_SERVE_MAX_QUEUE", "9", 1);
    assert_int_equal(queue(ROUTER, NULL, TD_ORIGIN_FILE), 1);
    unsetenv("TANDEM_SERVE_MAX_QUEUE");
}

static void level_is(const char *want)
{
    td_options o;
    assert_int_equal(parse(&o, ROUTER, NULL, NULL, NULL, NULL, NULL), 0);
    assert_string_equal(td_opt_str(&o, TD_OPT_ID_LOG_LEVEL), want);
    td_options_done(&o);
}

/* A service's own section wins over [common], in either order, in the file and in the environment.
 */
static void test_own_section_wins(void **state)
{
    file_is("[common]\nlog-level = warn\n[router]\nlog-level = error\n");
    level_is("error");
    file_is("[router]\nlog-level = error\n[common]\nlog-level = warn\n");
    level_is("error");
    setenv("TANDEM_COMMON_LOG_LEVEL", "warn", 1);
    level_is("warn");
    setenv("TANDEM_ROUTER_LOG_LEVEL", "debug", 1);
    level_is("debug");
    clearenv();
    setenv("TANDEM_ROUTER_LOG_LEVEL", "debug", 1);
    setenv("TANDEM_COMMON_LOG_LEVEL", "warn", 1);
    level_is("debug");
    clearenv();
}

static void test_command_line(void **state)
{
    td_options o;
    file_is("");
    assert_int_equal(parse(&o, ROUTER, "one", "--strict", "--listen", "[::1]:0", "two"), 0);
    assert_int_equal(td_opt_bool(&o, TD_OPT_ID_STRICT), 1);
    assert_string_equal(td_opt_str(&o, TD_OPT_ID_LISTEN), "[::1]:0");
    assert_int_equal(o.n_positional, 2);
    assert_string_equal(o.positional[1], "two");
    td_options_done(&o);
    assert_int_equal(parse(&o, ROUTER, "--strict", "--no-strict", "--", "--listen", NULL), 0);
    assert_int_equal(td_opt_bool(&o, TD_OPT_ID_STRICT), 0);
    assert_string_equal(o.positional[0], "--listen");
    td_options_done(&o);
    assert_int_equal(parse(&o, TD_SEC_CHAT, NULL, NULL, NULL, NULL, NULL),
                     -EINVAL); /* chat has no --config */
    char *argv[] = {(char[]){"--temperature"}, (char[]){"0.25"}};
    assert_int_equal(td_options_parse(&o, TD_SEC_CHAT, 2, argv, &err), 0);
    assert_true(td_opt_num(&o, TD_OPT_ID_TEMPERATURE) == 0.25);
    td_options_done(&o);
}

static void test_mistakes(void **state)
{
    file_is("");
    refused(ROUTER, "--lisen", "x", "did you mean 'listen'");
    refused(ROUTER, "--max_queue=3", NULL, "did you mean 'max-queue'");
    refused(ROUTER, "--kv-blocks=3", NULL, "no option 'kv-blocks'"); /* a worker's */
    refused(ROUTER, "--listen", NULL, "needs a value");
    refused(ROUTER, "--no-listen", NULL, "no option");
    refused(ROUTER, "--no-strict=1", NULL, "takes no value");
    refused(ROUTER, "-x", NULL, "--name");
    refused(ROUTER, "--config=/nonexistent/t.conf", NULL, "/nonexistent/t.conf");
    refused(ROUTER,
            "--qqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqq",
            NULL, "no option");
    td_options o;
    char *argv[] = {(char[]){"1"}, (char[]){"2"}, (char[]){"3"}, (char[]){"4"}, (char[]){"5"},
                    (char[]){"6"}, (char[]){"7"}, (char[]){"8"}, (char[]){"9"}};
    assert_int_equal(td_options_parse(&o, ROUTER, 9, argv, &err), -EINVAL);
}

static void test_ranges(void **state)
{
    static const char *const bad[] = {
        "0", "100001", "-1", "", " 5", "5 ", "5x", "0x10", "1.5", "99999999999999999999", "nan"};
    td_options o;
    char arg[64];
    file_is("");
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        snprintf(arg, sizeof arg, "--max-queue=%s", bad[i]);
        refused(ROUTER, arg, NULL, "between 1 and 100000");
    }
    assert_int_equal(queue(ROUTER, "--max-queue=1", TD_ORIGIN_CLI), 1);
    assert_int_equal(queue(ROUTER, "--max-queue=100000", TD_ORIGIN_CLI), 100000);
    refused(ROUTER, "--log-level=loud", NULL, "error|warn|info|debug");
    refused(ROUTER, "--log-level=error|warn", NULL, "one of");
    refused(ROUTER, "--log-level=", NULL, "one of");
    refused(ROUTER, "--strict=maybe", NULL, "true or false");
    char *nan_arg[] = {(char[]){"--temperature=nan"}};
    assert_int_equal(td_options_parse(&o, TD_SEC_CHAT, 1, nan_arg, &err), -EINVAL);
}

static void test_environment_mistakes(void **state)
{
    file_is("");
    static const struct {
        const char *name, *text;
    } bad[] = {{"TANDEM_ROUTER_LISEN", "did you mean 'listen'"},
               {"TANDEM_DECODE_KV_BLOKS", "did you mean 'kv-blocks'"},
               {"TANDEM_ROUTER_MAX_QUEUE", "TANDEM_ROUTER_MAX_QUEUE"}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        setenv(bad[i].name, "x", 1);
        refused(ROUTER, NULL, NULL, bad[i].text);
        unsetenv(bad[i].name);
    }
    td_options o;
    setenv("TANDEM_TEST_RUN", "x", 1); /* no section of ours: somebody else's variable */
    setenv("TANDEM", "x", 1);
    assert_int_equal(parse(&o, ROUTER, NULL, NULL, NULL, NULL, NULL), 0);
    td_options_done(&o);
    clearenv();
}

static void test_file_mistakes(void **state)
{
    static const struct {
        const char *file, *text;
    } bad[] = {
        {"[router]\nlisen = x\n", ":2: no option 'lisen'; did you mean 'listen'"},
        {"[roter]\n", ":1: no section [roter]; did you mean [router]"},
        {"[completely-else]\n", "there are common, router"},
        {"listen = x\n", "before any [section]"},
        {"[router]\nlisten\n", "key = value"},
        {"[router\n", "[name]"},
        {"[", "[name]"},
        {"[router]\nlisten = a\nlisten = b\n", ":3: listen is set twice"},
        {"[router]\nlisten = a\n[common]\n[router]\nlisten = b\n", ":5: listen is set twice"},
        {"[router]\nmax-queue = many\n", ":2: max-queue must be"},
        {"[decode]\nkv-blocks = many\n",
         ":2: kv-blocks must be"}, /* another service's line is checked too */
        {"[router]\nkv-blocks = 5\n", "no option 'kv-blocks'"},
        {"[router]\n= 5\n", "no option ''"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        file_is(bad[i].file);
        refused(ROUTER, NULL, NULL, bad[i].text);
        assert_non_null(strstr(err.text, path));
    }
    FILE *f = fopen(path, "w");
    fwrite("[router]\n\0\n", 1, 11, f);
    fclose(f);
    refused(ROUTER, NULL, NULL, "NUL");
    file_is("[router]\nlisten = a=b;c # d\n"); /* a value is taken whole */
    td_options o;
    assert_int_equal(parse(&o, ROUTER, NULL, NULL, NULL, NULL, NULL), 0);
    assert_string_equal(td_opt_str(&o, TD_OPT_ID_LISTEN), "a=b;c # d");
    td_options_done(&o);
}

static void test_set(void **state)
{
    td_options o;
    file_is("");
    assert_int_equal(parse(&o, ROUTER, NULL, NULL, NULL, NULL, NULL), 0);
    assert_int_equal(td_options_set(&o, TD_OPT_ID_MAX_QUEUE, "7", &err), 0);
    assert_int_equal(td_opt_int(&o, TD_OPT_ID_MAX_QUEUE), 7);
    assert_int_equal(td_options_set(&o, TD_OPT_ID_MAX_QUEUE, "0", &err), -EINVAL);
    assert_int_equal(td_opt_int(&o, TD_OPT_ID_MAX_QUEUE), 7);
    td_options_done(&o);
}

/* Every default must pass its own check, or a command would start with a value it refuses from a
 * user. */
static void test_defaults_are_valid(void **state)
{
    static const struct {
        const char *name, *def;
        td_opt_type type;
    } rows[] = {
#define TD_OPTION(id, sections, name, type, def, min, max, arg, help) {name, def, type},
#include "base/options.def"
#undef TD_OPTION
    };
    for (int i = 0; i < TD_OPT_ID_MAX; i++) {
        td_options o = {.sections = ROUTER};
        if (rows[i].type == TD_OPT_STR)
            continue;
        if (td_options_set(&o, (td_opt)i, rows[i].def, &err) < 0)
            fail_msg("--%s: default '%s': %s", rows[i].name, rows[i].def, err.text);
        td_options_done(&o);
        for (int k = 0; k < i; k++)
            assert_string_not_equal(rows[i].name, rows[k].name);
    }
}

typedef void writer(const td_options *o, FILE *out);

static char *written(writer *w, const td_options *o, size_t *ret_n)
{
    char *text = NULL;
    FILE *f = open_memstream(&text, ret_n);
    assert_non_null(f);
    w(o, f);
    fclose(f);
    return text;
}

static void help_all(const td_options *o, FILE *out)
{
    td_options_help(o, "tandem router", "all", out);
}

static void help_word(const td_options *o, FILE *out)
{
    td_options_help(o, "tandem router", "queue", out);
}

static void help_nothing(const td_options *o, FILE *out)
{
    td_options_help(o, "tandem router", "zzz", out);
}

static void help_short(const td_options *o, FILE *out)
{
    td_options_help(o, "tandem router", NULL, out);
}

static void words(const td_options *o, FILE *out)
{
    td_options_words(o->sections, out);
}

static void docs(const td_options *o, FILE *out)
{
    td_options_docs(out);
}

static void test_help(void **state)
{
    td_options o;
    size_t n;
    char *argv[] = {(char[]){"--help"}, (char[]){"queue"}};
    assert_int_equal(td_options_parse(&o, ROUTER, 2, argv, &err), 0);
    assert_true(o.help);
    assert_string_equal(o.help_word, "queue");
    char *t = written(help_all, &o, &n);
    assert_int_equal(strncmp(t, "usage: tandem router\n\n[common]\n", 31), 0);
    assert_non_null(strstr(t, "\n[router]\n"));
    assert_non_null(strstr(t, "--max-queue N"));
    assert_null(strstr(t, "--kv-blocks"));
    free(t);
    t = written(help_word, &o, &n);
    assert_non_null(strstr(t, "--max-queue N"));
    assert_null(strstr(t, "--listen"));
    free(t);
    t = written(help_nothing, &o, &n);
    assert_non_null(strstr(t, "no option matches 'zzz'"));
    free(t);
    t = written(help_short, &o, &n);
    assert_non_null(strstr(t, "more: --help all"));
    free(t);
    t = written(words, &o, &n);
    assert_non_null(strstr(t, "--max-queue "));
    free(t);
    td_options_done(&o);
}

static void test_docs(void **state)
{
    size_t n = 0, old_n = 0;
    char *made = written(docs, NULL, &n), *old = NULL;
    const char *file = TD_SOURCE_DIR "/docs/options.md";
    int r = td_file_read(file, 1 << 20, &old, &old_n, &err);
    int same = r == 0 && n == old_n && memcmp(made, old, n) == 0;
    if (!same && getenv("TD_UPDATE_DOCS")) {
        FILE *f = fopen(file, "w");
        assert_non_null(f);
        fwrite(made, 1, n, f);
        same = fclose(f) == 0;
    }
    free(made);
    free(old);
    if (!same)
        fail_msg("%s is stale: run this test with TD_UPDATE_DOCS=1", file);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_docs), /* first: later ones empty the environment */
        cmocka_unit_test_setup_teardown(test_precedence, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_own_section_wins, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_command_line, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_mistakes, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_ranges, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_environment_mistakes, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_file_mistakes, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_set, set_up, tear_down),
        cmocka_unit_test(test_defaults_are_valid),
        cmocka_unit_test_setup_teardown(test_help, set_up, tear_down),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
