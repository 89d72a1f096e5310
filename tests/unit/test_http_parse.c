/* SPDX-License-Identifier: Apache-2.0 */
/* Guards: nothing that a proxy in front could read differently passes (request smuggling),
 * everything is bounded, and heads and bodies cut at any byte are read the same. */
#include "net/http_parse.h"

#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include <cmocka.h>

#include "base/bug.h"

enum { MAX = 16384 };

/* 0 or the status the head is refused with. The copy is exactly n bytes, so that ASan sees a read
 * past it. */
static int verdict_n(const char *text, size_t n, td_http_head *h)
{
    td_http_bad bad = {0};
    size_t pos = 0;
    char *p = malloc(n ? n : 1);
    memcpy(p, text, n);
    int r = td_http_scan_head(&pos, p, n, MAX, &bad);
    if (r > 0)
        r = td_http_parse_request(p, (size_t)r, h, &bad);
    else if (r == 0)
        bad.status = 1; /* incomplete */
    free(p);
    return r == 0 ? bad.status : bad.status ? bad.status : -1;
}

static int verdict(const char *text)
{
    td_http_head h;
    return verdict_n(text, strlen(text), &h);
}

#define GET_HEAD "GET / HTTP/1.1\r\nHost: a\r\n"

static void good_heads_pass(void **state)
{
    static const char *const good[] = {
        GET_HEAD "\r\n",
        "GET / HTTP/1.0\r\n\r\n",
        "POST /v1/chat/completions?x=1&y=%20 HTTP/1.1\r\nHost: [::1]:8080\r\nContent-Length: "
        "12\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: Chunked\r\n\r\n",
        "GET http://example.org/x HTTP/1.1\r\nHost: example.org\r\n\r\n",
        "OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
        GET_HEAD "X:\r\nY: \t v \t\r\n\r\n",
        GET_HEAD "X: caf\xc3\xa9\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-Continue\r\nContent-Length: 0\r\n\r\n",
    };
    for (size_t i = 0; i < TD_ARRAY_LEN(good); i++)
        if (verdict(good[i]))
            fail_msg("refused with %d: %s", verdict(good[i]), good[i]);
}

typedef struct probe {
    const char *name, *head;
    int status;
} probe;

static const probe probes[] = {
    {"space before colon", GET_HEAD "Content-Length : 5\r\n\r\n", 400},
    {"two different Content-Length", GET_HEAD "Content-Length: 5\r\nContent-Length: 6\r\n\r\n",
     400},
    {"two equal Content-Length", GET_HEAD "Content-Length: 5\r\nContent-Length: 5\r\n\r\n", 400},
    {"Content-Length list", GET_HEAD "Content-Length: 5, 5\r\n\r\n", 400},
    {"Content-Length with sign", GET_HEAD "Content-Length: +5\r\n\r\n", 400},
    {"negative Content-Length", GET_HEAD "Content-Length: -1\r\n\r\n", 400},
    {"hexadecimal Content-Length", GET_HEAD "Content-Length: 0x5\r\n\r\n", 400},
    {"empty Content-Length", GET_HEAD "Content-Length:\r\n\r\n", 400},
    {"Content-Length past 64 bits", GET_HEAD "Content-Length: 18446744073709551621\r\n\r\n", 400},
    {"CL and TE", GET_HEAD "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", 400},
    {"TE and CL", GET_HEAD "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n", 400},
    {"TE xchunked", GET_HEAD "Transfer-Encoding: xchunked\r\n\r\n", 400},
    {"TE gzip, chunked", GET_HEAD "Transfer-Encoding: gzip, chunked\r\n\r\n", 400},
    {"TE identity", GET_HEAD "Transfer-Encoding: identity\r\n\r\n", 400},
    {"TE chunked, chunked", GET_HEAD "Transfer-Encoding: chunked, chunked\r\n\r\n", 400},
    {"two TE lines", GET_HEAD "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
     400},
    {"TE with vertical tab",
     GET_HEAD "Transfer-Encoding: \x0b"
              "chunked\r\n\r\n",
     400},
    {"TE in HTTP/1.0", "POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", 400},
    {"bare LF ends the head", "GET / HTTP/1.1\nHost: a\n\n", 400},
    {"bare LF inside", "GET / HTTP/1.1\r\nHost: a\nX: b\r\n\r\n", 400},
    {"bare CR inside", "GET / HTTP/1.1\r\nHost: a\rX: b\r\n\r\n", 400},
    {"obs-fold by blank", GET_HEAD "X: a\r\n b\r\n\r\n", 400},
    {"obs-fold by tab", GET_HEAD "X: a\r\n\tb\r\n\r\n", 400},
    {"blank before the first header", "GET / HTTP/1.1\r\n Host: a\r\n\r\n", 400},
    {"no Host", "GET / HTTP/1.1\r\n\r\n", 400},
    {"two Hosts", GET_HEAD "Host: b\r\n\r\n", 400},
    {"empty Host", "GET / HTTP/1.1\r\nHost:\r\n\r\n", 400},
    {"Host with a slash", "GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", 400},
    {"Host with user", "GET / HTTP/1.1\r\nHost: a@b\r\n\r\n", 400},
    {"header without colon", GET_HEAD "X\r\n\r\n", 400},
    {"header with empty name", GET_HEAD ": x\r\n\r\n", 400},
    {"header name with bytes above 127", GET_HEAD "X\xc3\xa9: 1\r\n\r\n", 400},
    {"header name in brackets", GET_HEAD "(x): 1\r\n\r\n", 400},
    {"DEL in a value", GET_HEAD "X: a\x7f\r\n\r\n", 400},
    {"escape in a value", GET_HEAD "X: \x1b[2J\r\n\r\n", 400},
    {"two Authorization", GET_HEAD "Authorization: a\r\nAuthorization: b\r\n\r\n", 400},
    {"two Content-Type", GET_HEAD "Content-Type: a\r\ncontent-type: b\r\n\r\n", 400},
    {"Expect something else", GET_HEAD "Expect: 200-ok\r\n\r\n", 400},
    {"empty line first", "\r\n" GET_HEAD "\r\n", 400},
    {"two blanks", "GET  / HTTP/1.1\r\nHost: a\r\n\r\n", 400},
    {"tab in the request line", "GET\t/ HTTP/1.1\r\nHost: a\r\n\r\n", 400},
    {"blank at the end of the request line", "GET / HTTP/1.1 \r\nHost: a\r\n\r\n", 400},
    {"no version (HTTP/0.9)", "GET /\r\n\r\n", 400},
    {"no method", " / HTTP/1.1\r\nHost: a\r\n\r\n", 400},
    {"blank in the target", "GET /a b HTTP/1.1\r\nHost: a\r\n\r\n", 400},
    {"raw UTF-8 in the target", "GET /\xc3\xa9 HTTP/1.1\r\nHost: a\r\n\r\n", 400},
    {"fragment in the target", "GET /a#b HTTP/1.1\r\nHost: a\r\n\r\n", 400},
    {"target without slash", "GET a HTTP/1.1\r\nHost: a\r\n\r\n", 400},
    {"asterisk for GET", "GET * HTTP/1.1\r\nHost: a\r\n\r\n", 400},
    {"CONNECT authority", "CONNECT a:443 HTTP/1.1\r\nHost: a\r\n\r\n", 400},
    {"absolute target without path", "GET http://a HTTP/1.1\r\nHost: a\r\n\r\n", 400},
    {"lower case version", "GET / http/1.1\r\nHost: a\r\n\r\n", 400},
    {"version of two digits", "GET / HTTP/1.10\r\nHost: a\r\n\r\n", 400},
    {"HTTP/2 preface", "PRI * HTTP/2.0\r\n\r\n", 505},
    {"HTTP/1.2", "GET / HTTP/1.2\r\nHost: a\r\n\r\n", 505},
    {"TLS ClientHello", "\x16\x03\x01\x02\x01", 400},
    {"incomplete", "GET / HTTP/1.1\r\nHost: a\r\n", 1},
};

static void smuggling_is_refused(void **state)
{
    for (size_t i = 0; i < TD_ARRAY_LEN(probes); i++)
        if (verdict(probes[i].head) != probes[i].status)
            fail_msg("%s: %d instead of %d", probes[i].name, verdict(probes[i].head),
                     probes[i].status);
}

static void nul_bytes_are_refused(void **state)
{
    td_http_head h;
    static const char in_value[] = GET_HEAD "X: a\0b\r\n\r\n",
                      in_path[] = "GET /\0 HTTP/1.1\r\nHost: a\r\n\r\n";
    assert_int_equal(verdict_n(in_value, sizeof in_value - 1, &h), 400);
    assert_int_equal(verdict_n(in_path, sizeof in_path - 1, &h), 400);
}

static void heads_are_bounded(void **state)
{
    td_strbuf b;
    td_strbuf_init(&b);
    td_strbuf_adds(&b, GET_HEAD "X: ");
    while (b.len < 65536)
        td_strbuf_addc(&b, 'a');
    td_strbuf_adds(&b, "\r\n\r\n");
    td_http_head h;
    assert_int_equal(verdict_n(b.data, b.len, &h), 431);
    td_strbuf_reset(&b);
    td_strbuf_adds(&b, GET_HEAD);
    for (int i = 0; i < 100; i++)
        td_strbuf_addf(&b, "X%d: a\r\n", i);
    td_strbuf_adds(&b, "\r\n");
    assert_int_equal(verdict_n(b.data, b.len, &h), 431);
    td_strbuf_done(&b);
}

static void parts_are_found(void **state)
{
    const char *text =
        "POST /v1/a%20b?q=%41 HTTP/1.1\r\nhost: h\r\nX-Y:  v w \r\nContent-Length: 7\r\n"
        "Connection: x, Close\r\n\r\n";
    td_http_head h;
    td_http_bad bad;
    assert_int_equal(td_http_parse_request(text, strlen(text), &h, &bad), 0);
    assert_true(td_str_eq(h.method, "POST"));
    assert_true(td_str_eq(h.path, "/v1/a%20b"));
    assert_true(td_str_eq(h.query, "q=%41"));
    assert_int_equal(h.content_length, 7);
    assert_int_equal(h.keep_alive, 0);
    assert_true(td_str_eq(td_http_head_get(&h, "x-y")->value, "v w"));
    assert_null(td_http_head_get(&h, "x"));
    char path[64];
    assert_int_equal(td_http_decode_path(h.path, path), 0);
    assert_string_equal(path, "/v1/a b");
}

static void paths_decode_or_fail(void **state)
{
    static const char *const bad[] = {"/%", "/%4", "/%zz", "/%00", "/%0a", "/%7f", "/%ff", "/%c3"};
    char out[64];
    for (size_t i = 0; i < TD_ARRAY_LEN(bad); i++)
        assert_int_equal(td_http_decode_path(td_str_of(bad[i]), out), -EBADMSG);
    assert_int_equal(td_http_decode_path(td_str_of("/%C3%a9%2F"), out), 0);
    assert_string_equal(out, "/\xc3\xa9/");
}

static void head_cut_anywhere_reads_the_same(void **state)
{
    const char *text = GET_HEAD "X: y\r\n\r\nrest";
    size_t n = strlen(text), whole = n - 4;
    for (size_t cut = 0; cut < n; cut++) {
        size_t pos = 0;
        td_http_bad bad;
        int r = td_http_scan_head(&pos, text, cut, MAX, &bad);
        assert_int_equal(r, cut >= whole ? (int)whole : 0);
        if (r == 0)
            assert_int_equal(td_http_scan_head(&pos, text, n, MAX, &bad), whole);
    }
}

static void responses(void **state)
{
    td_http_head h;
    td_http_bad bad;
    const char *ok = "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n", *bare = "HTTP/1.0 404\r\n\r\n";
    assert_int_equal(td_http_parse_response(ok, strlen(ok), &h, &bad), 0);
    assert_int_equal(h.status, 200);
    assert_int_equal(h.content_length, 3);
    assert_int_equal(td_http_parse_response(bare, strlen(bare), &h, &bad), 0);
    assert_int_equal(h.status, 404);
    static const char *const wrong[] = {"SSH-2.0-OpenSSH_9.2\r\n\r\n", "HTTP/1.1 20x OK\r\n\r\n",
                                        "HTTP/1.1 2000\r\n\r\n", "HTTP/1.1\r\n\r\n"};
    for (size_t i = 0; i < TD_ARRAY_LEN(wrong); i++)
        assert_int_equal(td_http_parse_response(wrong[i], strlen(wrong[i]), &h, &bad), -EBADMSG);
}

/* Feed in pieces of `step`; 1 and the body, or the status of the refusal. */
static int unframe(const char *in, size_t n, size_t step, uint64_t max, td_strbuf *out,
                   size_t *ret_used)
{
    td_http_head h = {.chunked = 1, .content_length = -1};
    td_http_framer f;
    td_http_framer_init(&f, &h, max);
    size_t off = 0, avail = 0;
    for (;;) {
        size_t used;
        td_str data;
        td_http_bad bad;
        int r = td_http_framer_feed(&f, in + off, avail - off, &used, &data, &bad);
        if (r < 0)
            return bad.status;
        td_strbuf_add(out, data.ptr, data.len);
        off += used;
        *ret_used = off;
        if (r)
            return 1;
        if (off == avail) {
            if (avail == n)
                return 0;
            avail = TD_MIN(n, avail + step);
        }
    }
}

static void chunks_read_the_same_in_any_pieces(void **state)
{
    const char *in =
        "5;ext=\"x\"\r\nhello\r\n00A\r\n, chunked \r\n1\r\n!\r\n0\r\nT: v\r\n\r\nGET /next";
    for (size_t step = 1; step < 80; step++) {
        td_strbuf out;
        td_strbuf_init(&out);
        size_t used;
        assert_int_equal(unframe(in, strlen(in), step, 100, &out, &used), 1);
        assert_string_equal(out.data, "hello, chunked !");
        assert_string_equal(in + used, "GET /next");
        td_strbuf_done(&out);
    }
}

static void bad_chunks_are_refused(void **state)
{
    static const probe bad[] = {
        {"no digits", "\r\n", 400},
        {"sign", "+5\r\nhello\r\n", 400},
        {"0x", "0x5\r\nhello\r\n", 400},
        {"blank before the size", " 5\r\nhello\r\n", 400},
        {"blank behind the size", "5 \r\nhello\r\n", 400},
        {"bare LF", "5\nhello\r\n", 400},
        {"size too small", "4\r\nhello\r\n", 400},
        {"size too large", "6\r\nhello\r\n0\r\n\r\n", 400},
        {"size of 16 digits", "ffffffffffffffff\r\n", 400},
        {"size wraps", "fffffffffffffff\r\n", 413},
        {"control byte in the extension", "5;\x01\r\nhello\r\n", 400},
        {"bare LF in the extension", "5;a\nhello\r\n", 400},
        {"trailer without colon", "0\r\nX\r\n\r\n", 400},
        {"folded trailer", "0\r\nX: a\r\n b\r\n\r\n", 400},
        {"bare LF at the end", "0\r\n\n", 400},
        {"past the limit", "64\r\n", 0},
        {"past the limit by one", "65\r\n", 413},
        {"incomplete", "5\r\nhel", 0},
    };
    for (size_t i = 0; i < TD_ARRAY_LEN(bad); i++) {
        td_strbuf out;
        td_strbuf_init(&out);
        size_t used;
        int r = unframe(bad[i].head, strlen(bad[i].head), 3, 100, &out, &used);
        if (r != bad[i].status)
            fail_msg("%s: %d instead of %d", bad[i].name, r, bad[i].status);
        td_strbuf_done(&out);
    }
}

/* One byte per chunk under long extensions made other servers read 256 bytes for one
 * (CVE-2023-39326). */
static void chunk_framing_is_bounded(void **state)
{
    td_strbuf in, out;
    td_strbuf_init(&in);
    td_strbuf_init(&out);
    for (int i = 0; i < 200; i++)
        td_strbuf_addf(&in, "1;%0200d\r\nx\r\n", 0);
    size_t used;
    assert_int_equal(unframe(in.data, in.len, 4096, 1 << 20, &out, &used), 400);
    td_strbuf_done(&in);
    td_strbuf_done(&out);
}

static void length_and_close_framing(void **state)
{
    td_http_head h = {.content_length = 3};
    td_http_framer f;
    size_t used;
    td_str data;
    td_http_bad bad;
    td_http_framer_init(&f, &h, 100);
    assert_int_equal(td_http_framer_feed(&f, "ab", 2, &used, &data, &bad), 0);
    assert_int_equal(td_http_framer_feed(&f, "cd", 2, &used, &data, &bad), 1);
    assert_int_equal(used, 1);
    assert_int_equal(data.len, 1);
    h.content_length = 0;
    td_http_framer_init(&f, &h, 100);
    assert_int_equal(td_http_framer_feed(&f, "x", 1, &used, &data, &bad), 1);
    assert_int_equal(used, 0);
    td_http_framer_init_close(&f, 3);
    assert_int_equal(td_http_framer_feed(&f, "abc", 3, &used, &data, &bad), 0);
    assert_int_equal(data.len, 3);
    assert_int_equal(td_http_framer_feed(&f, "d", 1, &used, &data, &bad), -EBADMSG);
    assert_int_equal(bad.status, 413);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(good_heads_pass),
        cmocka_unit_test(smuggling_is_refused),
        cmocka_unit_test(nul_bytes_are_refused),
        cmocka_unit_test(heads_are_bounded),
        cmocka_unit_test(parts_are_found),
        cmocka_unit_test(paths_decode_or_fail),
        cmocka_unit_test(head_cut_anywhere_reads_the_same),
        cmocka_unit_test(responses),
        cmocka_unit_test(chunks_read_the_same_in_any_pieces),
        cmocka_unit_test(bad_chunks_are_refused),
        cmocka_unit_test(chunk_framing_is_bounded),
        cmocka_unit_test(length_and_close_framing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
