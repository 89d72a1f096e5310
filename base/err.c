/* SPDX-License-Identifier: Apache-2.0 */
#include "base/err.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "base/bug.h"
#include "base/banned.h"

static const td_error_info errors[TD_ERROR_MAX] = {
    [TD_ERROR_NONE] = {"ok", 200, "", 0, 0, "", ""},
#define TD_ERR(id, name, http, type, status, retry, text, remedy)                                  \
    [TD_ERROR_##id] = {name, http, type, status, retry, text, remedy},
#include "base/errors.def"
#undef TD_ERR
};

/* One line of whole UTF-8: control characters become spaces, a character cut by the buffer goes. */
static void tidy(char *text, size_t size)
{
    size_t n = strlen(text);
    for (size_t i = 0; i < n; i++)
        if ((unsigned char)text[i] < 0x20 || text[i] == 0x7f)
            text[i] = ' ';
    if (n + 1 < size)
        return;
    size_t start = n;
    while (start > 0 && n - start < 3 && ((unsigned char)text[start - 1] & 0xc0) == 0x80)
        start--;
    if (start == 0)
        return;
    unsigned char lead = (unsigned char)text[start - 1];
    size_t need = lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : lead >= 0xc0 ? 2 : 1;
    if (need > n - start + 1)
        text[start - 1] = 0;
}

int td_err_set(td_err *err, int code, const char *fmt, ...)
{
    if (!err)
        return code;
    /* an argument may be err->text itself */
    char text[sizeof err->text];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    tidy(text, sizeof text);
    err->code = code;
    memcpy(err->text, text, sizeof text);
    return code;
}

int td_err_prefix(td_err *err, const char *fmt, ...)
{
    if (!err)
        return 0;
    char prefix[sizeof err->text], text[2 * sizeof err->text + 2];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(prefix, sizeof prefix, fmt, ap);
    va_end(ap);
    snprintf(text, sizeof text, "%s: %s", prefix, err->text);
    return td_err_set(err, err->code, "%s", text);
}

const char *td_errno_text(int code)
{
    const char *s = strerrordesc_np(code < 0 ? -code : code);
    return s ? s : "unknown error";
}

const td_error_info *td_error_get(td_error id)
{
    if ((unsigned)id >= TD_ERROR_MAX)
        id = TD_ERROR_INTERNAL;
    return &errors[id];
}

td_error td_error_by_name(const char *name, size_t len)
{
    for (unsigned i = TD_ERROR_NONE + 1; i < TD_ERROR_MAX; i++)
        if (strlen(errors[i].name) == len && memcmp(errors[i].name, name, len) == 0)
            return (td_error)i;
    return TD_ERROR_INTERNAL;
}
