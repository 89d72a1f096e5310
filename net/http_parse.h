/* SPDX-License-Identifier: Apache-2.0 */
/* HTTP/1.x heads and body framing: pure, incremental, strict by construction (RFC 9112 without its
 * leniences). What two implementations could read differently is refused, so that nothing can be
 * smuggled past a proxy: bare LF or CR, folded lines, space before a colon, any framing but one
 * Content-Length of digits or exactly "chunked", repeated Host or Content-Length, Transfer-Encoding
 * in HTTP/1.0, control bytes anywhere. Never allocates; views point into the input. */
#ifndef TD_NET_HTTP_PARSE_H
#define TD_NET_HTTP_PARSE_H

#include <stddef.h>
#include <stdint.h>

#include "base/strbuf.h"

enum { TD_HTTP_MAX_FIELDS = 100 };

/* Why input was refused. */
typedef struct td_http_bad {
    int status; /* 400, 413, 431 or 505 */
    const char *text;
} td_http_bad;

typedef struct td_http_field {
    td_str name, value; /* value without the blanks around it */
} td_http_field;

typedef struct td_http_head {
    td_str method, path,
        query;  /* request: path still encoded, begins with '/' (or is "*"); query without '?' */
    int status; /* response */
    int minor;  /* HTTP/1.minor: 0 or 1 */
    td_http_field fields[TD_HTTP_MAX_FIELDS];
    uint32_t n_fields;
    int64_t content_length; /* -1 when absent */
    int chunked, keep_alive, expect_continue;
} td_http_head;

/* Look for the end of a head in p[0..n).
 * pos      bytes already looked at; 0 at first, kept by the caller between calls (p may move, bytes
 * may not change). Returns the head's length with its empty line, 0 when more bytes are needed,
 * -EBADMSG when no bytes can mend it. */
int td_http_scan_head(size_t *pos, const char *p, size_t n, size_t max_bytes,
                      td_http_bad *reterr_bad);

/* Parse a whole head of n bytes that td_http_scan_head() found. 0 or -EBADMSG. */
int td_http_parse_request(const char *p, size_t n, td_http_head *ret_head, td_http_bad *reterr_bad);
int td_http_parse_response(const char *p, size_t n, td_http_head *ret_head,
                           td_http_bad *reterr_bad);

/* First field of that name (ASCII case ignored), NULL when absent. */
const td_http_field *td_http_head_get(const td_http_head *h, const char *name);

/* Decode %XX of a path into out (at least path.len + 1 bytes, NUL behind). -EBADMSG: bad escape,
 * control byte, not UTF-8. */
int td_http_decode_path(td_str path, char *out);

/* Finds the body's bytes and its end. */
typedef struct td_http_framer {
    int state;
    uint64_t left;             /* of the body or of the chunk */
    uint64_t total, max_bytes; /* body bytes so far and allowed */
    uint64_t overhead;         /* bytes that are not body: chunk lines, trailers */
    uint32_t n_digits;
} td_http_framer;

/* Request or response whose body follows by Content-Length or chunks; none when neither is there.
 */
void td_http_framer_init(td_http_framer *f, const td_http_head *h, uint64_t max_bytes);
/* Response without framing: everything until the connection closes. */
void td_http_framer_init_close(td_http_framer *f, uint64_t max_bytes);

/* Take bytes of p[0..n): *ret_used are consumed, *ret_data is the run of body bytes among them (may
 * be empty). 1 the body is complete; 0 call again with what is left (needs more when *ret_used ==
 * n); -EBADMSG bad framing; both outputs are always set. */
int td_http_framer_feed(td_http_framer *f, const char *p, size_t n, size_t *ret_used,
                        td_str *ret_data, td_http_bad *reterr_bad);

#endif
