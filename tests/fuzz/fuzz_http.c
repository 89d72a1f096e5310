/* SPDX-License-Identifier: Apache-2.0 */
/* Any bytes: the head and framing parser neither crashes nor reads past its input, and what it
 * finds does not depend on where the bytes were cut. First byte: the size of the pieces; then a
 * connection's bytes. */
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>

#include "base/bug.h"
#include "net/http_parse.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { HEAD_MAX = 4096, BODY_MAX = 65536 };

/* Whole and in pieces: the same result. */
static int scan(const char *p, size_t n, size_t step)
{
    td_http_bad bad_whole = {0}, bad = {0};
    size_t pos = 0, pos_whole = 0;
    int whole = td_http_scan_head(&pos_whole, p, n, HEAD_MAX, &bad_whole), r = 0;
    for (size_t have = 0; r == 0 && have < n;) {
        have = TD_MIN(n, have + step);
        r = td_http_scan_head(&pos, p, have, HEAD_MAX, &bad);
    }
    TD_BUG_ON(r != whole || bad.status != bad_whole.status);
    return whole;
}

typedef struct result {
    int verdict;
    size_t used;
    uint64_t body_bytes, sum;
} result;

static result unframe(td_http_framer f, const char *p, size_t n, size_t step)
{
    result r = {0};
    for (size_t have = 0;;) {
        size_t used;
        td_str data;
        td_http_bad bad;
        r.verdict = td_http_framer_feed(&f, p + r.used, have - r.used, &used, &data, &bad);
        if (r.verdict < 0) {
            r.used = r.body_bytes = r.sum =
                0; /* what came before a refusal may differ with the pieces */
            return r;
        }
        for (size_t i = 0; i < data.len; i++)
            r.sum = r.sum * 31 + (uint8_t)data.ptr[i];
        r.used += used;
        r.body_bytes += data.len;
        TD_BUG_ON(r.used > have || r.body_bytes > BODY_MAX);
        if (r.verdict || (r.used == have && have == n))
            return r;
        if (r.used == have)
            have = TD_MIN(n, have + step);
    }
}

static size_t one_request(const char *p, size_t n, size_t step)
{
    int len = scan(p, n, step);
    if (len <= 0)
        return 0;
    td_http_head h;
    td_http_bad bad;
    TD_BUG_ON(td_http_parse_response(p, (size_t)len, &h, &bad) == 0 &&
              (h.status < 0 || h.status > 999));
    if (td_http_parse_request(p, (size_t)len, &h, &bad)) {
        TD_BUG_ON(bad.status < 400 || !bad.text);
        return 0;
    }
    TD_BUG_ON(h.chunked && h.content_length >= 0);
    char *path = malloc(h.path.len + 1);
    TD_BUG_ON(!path);
    if (td_http_decode_path(h.path, path) == 0)
        TD_BUG_ON(strlen(path) > h.path.len);
    free(path);
    td_http_framer f;
    td_http_framer_init(&f, &h, BODY_MAX);
    result a = unframe(f, p + len, n - (size_t)len, n),
           b = unframe(f, p + len, n - (size_t)len, step);
    TD_BUG_ON(a.verdict != b.verdict || a.used != b.used || a.body_bytes != b.body_bytes ||
              a.sum != b.sum);
    return a.verdict == 1 ? (size_t)len + a.used : 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 2)
        return 0;
    size_t n = size - 1, step = 1 + data[0] % 64;
    char *copy = malloc(n); /* exactly n bytes, so that ASan sees a read past them */
    TD_BUG_ON(!copy);
    memcpy(copy, data + 1, n);
    for (size_t off = 0, used; off < n && (used = one_request(copy + off, n - off, step)) > 0;)
        off += used;
    free(copy);
    return 0;
}
