/* SPDX-License-Identifier: Apache-2.0 */
/* Guards: one event is one line that a parser can read, whatever the values hold. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <fcntl.h>
#include <jansson.h>
#include <string.h>
#include <unistd.h>

#include "base/log.h"
#include "base/banned.h"

static char line[40000];

/* Run one td_log call with stderr in a pipe (big enough for a line). */
#define CAPTURE(...)                                                                               \
    do {                                                                                           \
        int fd[2], saved = dup(STDERR_FILENO);                                                     \
        assert_int_equal(pipe2(fd, O_NONBLOCK), 0);                                                \
        dup2(fd[1], STDERR_FILENO);                                                                \
        td_log(__VA_ARGS__);                                                                       \
        dup2(saved, STDERR_FILENO);                                                                \
        close(saved);                                                                              \
        close(fd[1]);                                                                              \
        ssize_t n = read(fd[0], line, sizeof line - 1);                                            \
        close(fd[0]);                                                                              \
        line[n > 0 ? n : 0] = 0;                                                                   \
    } while (0)

static void test_levels(void **state)
{
    td_log_level l;
    assert_int_equal(td_log_level_parse("warn", &l), 0);
    assert_int_equal(l, TD_LOG_WARN);
    assert_true(td_log_level_parse("loud", &l) < 0);
    td_log_init(TD_LOG_WARN, TD_LOG_TEXT, "router");
    assert_true(td_log_enabled(TD_LOG_ERROR));
    assert_false(td_log_enabled(TD_LOG_INFO));
    CAPTURE(TD_LOG_INFO, "quiet", "a=%d", 1);
    assert_string_equal(line, "");
}

static void test_text(void **state)
{
    td_log_init(TD_LOG_INFO, TD_LOG_TEXT, "router");
    CAPTURE(TD_LOG_WARN, "queue_full", "request=%s n=%d", "abc", 7);
    assert_int_equal(strncmp(line, "<4>20", 5), 0);
    assert_non_null(strstr(line, "warn router event=queue_full request=abc n=7\n"));
    CAPTURE(TD_LOG_WARN, "forged", "name=a\nb");
    assert_ptr_equal(strchr(line, '\n'), line + strlen(line) - 1);
}

static json_t *parsed(void)
{
    json_t *o = json_loads(line, JSON_REJECT_DUPLICATES, NULL);
    assert_non_null(o);
    return o;
}

static void field(const json_t *o, const char *key, const char *value)
{
    assert_string_equal(json_string_value(json_object_get(o, key)), value);
}

static void test_json(void **state)
{
    td_log_init(TD_LOG_INFO, TD_LOG_JSON, "decode");
    CAPTURE(TD_LOG_ERROR, "worker_lost",
            "peer=tcp://a b=\"two words\" c=\"say \\\"hi\\\" \\\\\" d= e=last");
    json_t *o = parsed();
    field(o, "level", "error");
    field(o, "role", "decode");
    field(o, "event", "worker_lost");
    field(o, "peer", "tcp://a");
    field(o, "b", "two words");
    field(o, "c", "say \"hi\" \\");
    field(o, "d", "");
    field(o, "e", "last");
    json_decref(o);
}

/* Values that break the pair syntax still give one JSON object. */
static void test_json_hostile(void **state)
{
    static const char *const hostile[] = {
        "=",          "==x",        "a=\"open",  "a=\"\\", "lonely words here",
        " = \" = \"", "a=\"b\"c=d", "x=\xff\xfe"};
    td_log_init(TD_LOG_INFO, TD_LOG_JSON, "decode");
    for (size_t i = 0; i < sizeof hostile / sizeof *hostile; i++) {
        CAPTURE(TD_LOG_INFO, "e", "%s", hostile[i]);
        json_t *o = json_loads(line, 0, NULL);
        assert_non_null(o);
        json_decref(o);
    }
    char big[20000];
    memset(big, 'y', sizeof big - 1);
    big[sizeof big - 1] = 0;
    CAPTURE(TD_LOG_INFO, "e", "big=%s", big);
    json_decref(parsed());
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_levels), cmocka_unit_test(test_text),
                                       cmocka_unit_test(test_json),
                                       cmocka_unit_test(test_json_hostile)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
