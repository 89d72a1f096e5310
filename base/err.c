/* SPDX-License-Identifier: Apache-2.0 */
#include "base/err.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "base/bug.h"
#include "base/banned.h"

int td_err_set(td_err *err, int code, const char *fmt, ...)
{
    if (err) {
        va_list ap;
        va_start(ap, fmt);
        err->code = code;
        vsnprintf(err->text, sizeof err->text, fmt, ap);
        va_end(ap);
    }
    return code;
}

int td_err_prefix(td_err *err, const char *fmt, ...)
{
    if (!err)
        return 0;
    char old[sizeof err->text];
    memcpy(old, err->text, sizeof old);
    va_list ap;
    va_start(ap, fmt);
    int n = vsnprintf(err->text, sizeof err->text, fmt, ap);
    va_end(ap);
    if (n >= 0 && (size_t)n < sizeof err->text)
        snprintf(err->text + n, sizeof err->text - (size_t)n, ": %.490s", old);
    return err->code;
}

const char *td_errno_text(int code)
{
    const char *text = strerrordesc_np(code < 0 ? -code : code); /* static, unlike strerror() */
    return text ? text : "unknown error";
}

static const td_error_info table[TD_ERROR_MAX] = {
    [TD_ERROR_NONE] = {"ok", 200, "", 0, 0, "", ""},
#define TD_ERR(id, name, http, type, status, retry, text, remedy)                                  \
    [TD_ERROR_##id] = {name, http, type, status, retry, text, remedy},
#include "base/errors.def"
#undef TD_ERR
};

const td_error_info *td_error_get(td_error id)
{
    return (unsigned)id < TD_ERROR_MAX ? &table[id] : &table[TD_ERROR_INTERNAL];
}

td_error td_error_by_name(const char *name, size_t len)
{
    for (int i = 1; i < TD_ERROR_MAX; i++)
        if (strlen(table[i].name) == len && memcmp(table[i].name, name, len) == 0)
            return (td_error)i;
    return TD_ERROR_INTERNAL;
}
