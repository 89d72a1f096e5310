/* SPDX-License-Identifier: Apache-2.0 */
/* Log lines of services: `<priority>ts level event key=value ...` to stderr, or JSON. Libraries do
 * not log. Prompt text is never logged. Any thread. */
#ifndef TD_BASE_LOG_H
#define TD_BASE_LOG_H

typedef enum td_log_level {
    TD_LOG_ERROR = 3,
    TD_LOG_WARN = 4,
    TD_LOG_INFO = 6,
    TD_LOG_DEBUG = 7
} td_log_level;
typedef enum td_log_format { TD_LOG_TEXT, TD_LOG_JSON } td_log_format;

/* Set level and form for the process; once, before threads start. `role` (static or kept) is a
 * field of each line. */
void td_log_init(td_log_level level, td_log_format format, const char *role);

/* Parse "error", "warn", "info", "debug". -EINVAL for others. */
int td_log_level_parse(const char *text, td_log_level *ret_level);

/* Write one line: event is a short snake_case word, fmt gives `key=value key2="two words"` pairs.
 */
void td_log(td_log_level level, const char *event, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

/* 1 when a line of this level would be written. */
int td_log_enabled(td_log_level level);

#endif
