/* SPDX-License-Identifier: Apache-2.0 */
/* Growable bytes, always NUL-terminated, with a sticky failure; and td_str, a borrowed view. */
#ifndef TD_BASE_STRBUF_H
#define TD_BASE_STRBUF_H

#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* Borrowed bytes; the owner says until when. ptr may be NULL when len is 0. */
typedef struct td_str {
    const char *ptr;
    size_t len;
} td_str;

static inline td_str td_str_of(const char *z)
{
    return (td_str){z, z ? strlen(z) : 0};
}

static inline int td_str_eq(td_str a, const char *z)
{
    size_t n = strlen(z);
    return a.len == n && (n == 0 || memcmp(a.ptr, z, n) == 0);
}

typedef struct td_strbuf {
    char *data; /* never NULL after init */
    size_t len, cap;
    int failed;       /* out of memory or past max_bytes; later appends do nothing */
    size_t max_bytes; /* 0 = no bound */
} td_strbuf;

#define TD_STRBUF_INIT                                                                             \
    {                                                                                              \
        .data = (char *)""                                                                         \
    }

void td_strbuf_init(td_strbuf *b);
void td_strbuf_done(td_strbuf *b);
/* Forget contents and failure, keep memory. */
void td_strbuf_reset(td_strbuf *b);
void td_strbuf_add(td_strbuf *b, const void *bytes, size_t n);
void td_strbuf_adds(td_strbuf *b, const char *z);
void td_strbuf_addc(td_strbuf *b, char c);
void td_strbuf_addf(td_strbuf *b, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
void td_strbuf_addv(td_strbuf *b, const char *fmt, va_list ap)
    __attribute__((format(printf, 2, 0)));
void td_strbuf_add_u64(td_strbuf *b, uint64_t v);
/* JSON string escaping without the quotes; the input must be valid UTF-8 (invalid bytes become
 * U+FFFD). */
void td_strbuf_add_json(td_strbuf *b, const char *s, size_t n);
/* Remove n bytes from the front. */
void td_strbuf_drop(td_strbuf *b, size_t n);
/* Move the heap memory out; the buffer is empty afterwards. Caller frees. NULL on failure. */
char *td_strbuf_take(td_strbuf *b, size_t *ret_len);

/* UTF-8 validity (shortest form, no surrogates, <= U+10FFFF). 1 = valid. */
int td_utf8_valid(const char *s, size_t n);
/* Bytes of the longest prefix that is whole characters, i.e. n minus an incomplete tail of a valid
 * string. Invalid bytes count as whole characters of one byte. */
size_t td_utf8_whole(const char *s, size_t n);
/* Decode one character at s (n > 0). Returns its bytes (1..4), or -EILSEQ. */
int td_utf8_decode(const char *s, size_t n, uint32_t *ret_cp);
/* Encode; returns bytes written to out[4]. cp must be a scalar value. */
int td_utf8_encode(uint32_t cp, char out[4]);

#endif
