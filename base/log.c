/* SPDX-License-Identifier: Apache-2.0 */
#include "base/log.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/strbuf.h"
#include "base/banned.h"

enum { LINE_BYTES_MAX = 16384 };

static td_log_level log_level = TD_LOG_INFO;
static td_log_format log_format = TD_LOG_TEXT;
static const char *log_role = "tandem";

void td_log_init(td_log_level level, td_log_format format, const char *role)
{
    log_level = level;
    log_format = format;
    log_role = role;
}

static const struct {
    const char *name;
    td_log_level level;
} levels[] = {
    {"error", TD_LOG_ERROR}, {"warn", TD_LOG_WARN}, {"info", TD_LOG_INFO}, {"debug", TD_LOG_DEBUG}};

int td_log_level_parse(const char *text, td_log_level *ret_level)
{
    for (size_t i = 0; i < sizeof levels / sizeof *levels; i++)
        if (strcmp(levels[i].name, text) == 0) {
            *ret_level = levels[i].level;
            return 0;
        }
    return -EINVAL;
}

static const char *level_name(td_log_level level)
{
    for (size_t i = 0; i < sizeof levels / sizeof *levels; i++)
        if (levels[i].level == level)
            return levels[i].name;
    return "info";
}

int td_log_enabled(td_log_level level)
{
    return level <= log_level;
}

/* One pair at p of `key=value` or `key="two words"`: returns the byte behind it. Outputs are views
 * into p. */
static const char *next_pair(const char *p, td_str *ret_key, td_str *ret_value)
{
    const char *eq = p + strcspn(p, "= ");
    *ret_key = (td_str){p, (size_t)(eq - p)};
    *ret_value = (td_str){eq, 0};
    if (*eq != '=')
        return eq;
    const char *v = eq + 1, *end;
    if (*v == '"') {
        v++;
        for (end = v; *end && *end != '"'; end++)
            if (*end == '\\' && end[1])
                end++;
        *ret_value = (td_str){v, (size_t)(end - v)};
        return *end ? end + 1 : end;
    }
    end = v + strcspn(v, " ");
    *ret_value = (td_str){v, (size_t)(end - v)};
    return end;
}

/* A backslash of the text form guards the byte behind it: drop the backslash, keep the byte. */
static void add_json_value(td_strbuf *b, td_str v)
{
    size_t from = 0;
    td_strbuf_addc(b, '"');
    for (size_t i = 0; i + 1 < v.len; i++) {
        if (v.ptr[i] != '\\')
            continue;
        td_strbuf_add_json(b, v.ptr + from, i - from);
        from = ++i;
    }
    td_strbuf_add_json(b, v.ptr + from, v.len - from);
    td_strbuf_addc(b, '"');
}

static void add_json_pairs(td_strbuf *b, const char *p)
{
    while (*(p += strspn(p, " "))) {
        td_str key, value;
        p = next_pair(p, &key, &value);
        if (key.len == 0) /* a stray '=' */
            continue;
        td_strbuf_adds(b, ",\"");
        td_strbuf_add_json(b, key.ptr, key.len);
        td_strbuf_adds(b, "\":");
        add_json_value(b, value);
    }
}

static void add_time(td_strbuf *b)
{
    struct timespec t;
    struct tm tm;
    char text[32];
    clock_gettime(CLOCK_REALTIME, &t);
    gmtime_r(&t.tv_sec, &tm);
    strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%S", &tm);
    td_strbuf_addf(b, "%s.%03ldZ", text, t.tv_nsec / 1000000);
}

void td_log(td_log_level level, const char *event, const char *fmt, ...)
{
    if (!td_log_enabled(level))
        return;
    char pairs[LINE_BYTES_MAX];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(pairs, sizeof pairs, fmt, ap);
    va_end(ap);
    for (char *p = pairs; *p; p++) /* one record is one line */
        if ((unsigned char)*p < 0x20 || *p == 0x7f)
            *p = ' ';
    td_strbuf b;
    td_strbuf_init(&b);
    if (log_format == TD_LOG_JSON) {
        td_strbuf_adds(&b, "{\"time\":\"");
        add_time(&b);
        td_strbuf_addf(&b, "\",\"level\":\"%s\",\"role\":\"%s\",\"event\":\"%s\"",
                       level_name(level), log_role, event);
        add_json_pairs(&b, pairs);
        td_strbuf_adds(&b, "}\n");
    } else {
        td_strbuf_addf(&b, "<%d>", (int)level);
        add_time(&b);
        td_strbuf_addf(&b, " %s %s event=%s%s%s\n", level_name(level), log_role, event,
                       *pairs ? " " : "", pairs);
    }
    /* one write: lines of several threads never mix; when stderr is gone there is nowhere to say so
     */
    if (!b.failed)
        (void)!write(STDERR_FILENO, b.data, b.len);
    td_strbuf_done(&b);
}
