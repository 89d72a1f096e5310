/* SPDX-License-Identifier: Apache-2.0 */
/* Failure detail for people. Everywhere: 0 or a count is success, negative errno is failure; a
 * td_err accompanies it only where a person must act (checkpoint, configuration, request). The text
 * names the file, field or address, the cause and the remedy. */
#ifndef TD_BASE_ERR_H
#define TD_BASE_ERR_H

#include <stddef.h>

typedef struct td_err {
    int code;       /* negative errno, 0 = none */
    char text[500]; /* NUL-terminated UTF-8, one line */
} td_err;

/* Set code and formatted text; err may be NULL. Returns code, so that `return td_err_set(...)`
 * reads well. */
int td_err_set(td_err *err, int code, const char *fmt, ...) __attribute__((format(printf, 3, 4)));

/* Put "<prefix>: " before the existing text. Returns err->code (or 0 when err is NULL). */
int td_err_prefix(td_err *err, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* Text of an errno, thread-safe; code may be negative. Static storage. */
const char *td_errno_text(int code);

/* The table of errors that cross the API (base/errors.def): one row each. */
typedef enum td_error {
    TD_ERROR_NONE = 0,
#define TD_ERR(id, name, http, type, status, retry, text, remedy) TD_ERROR_##id,
#include "base/errors.def"
#undef TD_ERR
    TD_ERROR_MAX
} td_error;

typedef struct td_error_info {
    const char *name;   /* stable code, e.g. "context_length_exceeded" */
    int http;           /* HTTP status */
    const char *type;   /* OpenAI error type */
    int status;         /* RPC status code, gRPC numbering */
    int retryable;      /* 1: the same request may succeed later */
    const char *text;   /* default message */
    const char *remedy; /* what a person can do */
} td_error_info;

/* Row of an error; never NULL (an id out of range gives the row of TD_ERROR_INTERNAL). */
const td_error_info *td_error_get(td_error id);

/* Row by stable name; TD_ERROR_INTERNAL when unknown. */
td_error td_error_by_name(const char *name, size_t len);

#endif
