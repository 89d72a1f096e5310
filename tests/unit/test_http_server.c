/* SPDX-License-Identifier: Apache-2.0 */
/* Guards, on real sockets: strict framing on the wire, bounded everything, disconnects seen at once
 * (a lost client must not keep KV), and answers that arrive whole. Server and clients share one
 * thread and one loop. */
#include "net/http.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/clock.h"
#include "base/bug.h"

typedef struct fixture {
    td_loop *loop;
    td_http_server *server;
    td_http_config cfg;
    int n_fds;
    int n_requests, n_closed, was_slow;
    td_http_req *held; /* by /hold and /stream */
    td_strbuf last;    /* method, path, query and body of the last request */
} fixture;

static int count_fds(void)
{
    int n = 0;
    DIR *d = opendir("/proc/self/fd");
    while (readdir(d))
        n++;
    closedir(d);
    return n;
}

static void on_close(void *arg, td_http_req *r)
{
    fixture *f = arg;
    f->n_closed++;
    f->was_slow = td_http_is_slow(r);
    f->held = NULL;
}

static void on_request(void *arg, td_http_req *r)
{
    fixture *f = arg;
    const char *path = td_http_path(r);
    td_str body = td_http_body(r);
    f->n_requests++;
    td_strbuf_reset(&f->last);
    td_strbuf_addf(&f->last, "%s %s?%s ", td_http_method(r), path, td_http_query(r));
    td_strbuf_add(&f->last, body.ptr, body.len);
    if (!strcmp(path, "/hold") || !strcmp(path, "/stream")) {
        td_http_on_close(r, on_close, f);
        f->held = r;
        if (!strcmp(path, "/stream"))
            td_http_stream_begin(r, 200, &(td_http_header){"Content-Type", "text/event-stream"}, 1);
        return;
    }
    const char *echo = td_http_header_get(r, "x-echo");
    td_http_header h = {"X-Echo", echo ? echo : "none"};
    td_http_reply(r, 200, &h, 1, body.len ? body.ptr : path, body.len ? body.len : strlen(path));
}

static int setup(void **state)
{
    fixture *f = calloc(1, sizeof *f);
    *state = f;
    f->n_fds = count_fds();
    td_strbuf_init(&f->last);
    f->cfg = (td_http_config){
        .listen = "127.0.0.1:0", .on_request = on_request, .arg = f, .max_body_bytes = 100000};
    return td_loop_new(&f->loop);
}

static int teardown(void **state)
{
    fixture *f = *state;
    td_http_server_close(f->server);
    td_loop_free(f->loop);
    td_strbuf_done(&f->last);
    int leaked = count_fds() - f->n_fds;
    free(f);
    return leaked ? -1 : 0;
}

static void serve(fixture *f)
{
    td_err err = {0};
    if (td_http_server_open(f->loop, &f->cfg, &f->server, &err))
        fail_msg("%s", err.text);
}

static struct sockaddr_in address(const fixture *f)
{
    const char *port = strchr(td_http_server_addr(f->server), ':') + 1;
    return (struct sockaddr_in){.sin_family = AF_INET,
                                .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
                                .sin_port = htons((uint16_t)strtoul(port, NULL, 10))};
}

/* From an address of its own: 127.0.0.2 and on are loopback too. */
static int dial_from(fixture *f, const char *from)
{
    struct sockaddr_in to = address(f), a = {.sin_family = AF_INET};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    inet_pton(AF_INET, from, &a.sin_addr);
    assert_int_equal(bind(fd, (struct sockaddr *)&a, sizeof a), 0);
    assert_int_equal(connect(fd, (struct sockaddr *)&to, sizeof to), 0);
    fcntl(fd, F_SETFL, O_NONBLOCK);
    return fd;
}

static int dial(fixture *f)
{
    return dial_from(f, "127.0.0.1");
}

static void turns(fixture *f, int n)
{
    while (n--)
        td_loop_run_once(f->loop, TD_MS);
}

static void put(fixture *f, int fd, const char *data, size_t n)
{
    uint64_t give_up = td_now_us() + 5 * TD_S;
    while (n && td_now_us() < give_up) {
        ssize_t w = send(fd, data, n, MSG_NOSIGNAL);
        if (w < 0 && errno != EAGAIN)
            return;
        data += w > 0 ? w : 0;
        n -= w > 0 ? (size_t)w : 0;
        turns(f, 1);
    }
    assert_int_equal(n, 0);
}

/* Pump the loop until the socket gave `until` (NULL: its end). 1 reached, 0 not within 4 s. */
static int get(fixture *f, int fd, td_strbuf *out, const char *until)
{
    char buf[65536];
    for (uint64_t give_up = td_now_us() + 4 * TD_S; td_now_us() < give_up;) {
        ssize_t n = recv(fd, buf, sizeof buf, 0);
        if (n > 0)
            td_strbuf_add(out, buf, (size_t)n);
        if (until && strstr(out->data, until))
            return 1;
        if (n == 0 || (n < 0 && errno != EAGAIN))
            return until == NULL;
        if (n < 0)
            turns(f, 1);
    }
    return 0;
}

static void status_is(const td_strbuf *out, int status)
{
    char want[16];
    snprintf(want, sizeof want, "HTTP/1.1 %d ", status);
    assert_memory_equal(out->data, want, 13);
}

/* Send, and return everything until the server closes. */
static void exchange(fixture *f, const char *data, size_t n, td_strbuf *out)
{
    int fd = dial(f);
    td_strbuf_reset(out);
    put(f, fd, data, n);
    assert_true(get(f, fd, out, NULL));
    close(fd);
    turns(f, 2);
}

#define H "Host: a\r\n"

static void answers_keep_alive_and_pipelined(void **state)
{
    fixture *f = *state;
    serve(f);
    td_strbuf out;
    td_strbuf_init(&out);
    static const char three[] =
        "GET /a%20b?q HTTP/1.1\r\n" H "X-Echo: hi\r\n\r\n"
        "POST /b HTTP/1.1\r\n" H "Content-Length: 5\r\n\r\nhello"
        "POST /c HTTP/1.1\r\n" H "Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
        "3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n";
    exchange(f, three, sizeof three - 1, &out);
    assert_int_equal(f->n_requests, 3);
    const char *a = strstr(out.data, "\r\n\r\n/a b"), *b = strstr(out.data, "\r\n\r\nhello"),
               *c = strstr(out.data, "\r\n\r\nabcde");
    assert_true(a && b && c && a < b && b < c);
    assert_non_null(strstr(out.data, "X-Echo: hi\r\n"));
    assert_non_null(strstr(out.data, "Content-Length: 4\r\n"));
    assert_non_null(strstr(out.data, "Connection: close\r\n"));
    assert_non_null(strstr(out.data, "Date: "));
    assert_string_equal(f->last.data, "POST /c? abcde");
    td_strbuf_done(&out);
}

static void bytes_one_by_one_read_the_same(void **state)
{
    fixture *f = *state;
    serve(f);
    td_strbuf out;
    td_strbuf_init(&out);
    static const char text[] =
        "POST /x HTTP/1.1\r\n" H "Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
        "3\r\nabc\r\n0\r\n\r\n";
    int fd = dial(f);
    for (size_t i = 0; i + 1 < sizeof text; i++) {
        put(f, fd, text + i, 1);
        turns(f, 1);
    }
    assert_true(get(f, fd, &out, NULL));
    assert_string_equal(f->last.data, "POST /x? abc");
    close(fd);
    td_strbuf_done(&out);
}

static void many_pipelined_requests_are_all_answered(void **state)
{
    fixture *f = *state;
    serve(f);
    td_strbuf in, out;
    td_strbuf_init(&in);
    td_strbuf_init(&out);
    for (int i = 0; i < 500; i++)
        td_strbuf_addf(&in, "GET /%d HTTP/1.1\r\n" H "\r\n", i);
    int fd = dial(f);
    put(f, fd, in.data, in.len);
    shutdown(fd, SHUT_WR); /* and the end of sending must not cut answers off */
    assert_true(get(f, fd, &out, NULL));
    assert_int_equal(f->n_requests, 500);
    assert_non_null(strstr(out.data, "\r\n\r\n/499"));
    close(fd);
    td_strbuf_done(&in);
    td_strbuf_done(&out);
}

/* What the research found other parsers to accept, on the wire: refused, closed, and never a second
 * request. */
static void smuggling_is_answered_400_and_closed(void **state)
{
    static const char *const heads[] = {
        "POST / HTTP/1.1\r\n" H "Content-Length : 5\r\n\r\nhello",
        "POST / HTTP/1.1\r\n" H "Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
        "POST / HTTP/1.1\r\n" H "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "GET / HTTP/1.1\nHost: a\n\n",
        "GET / HTTP/1.1\r\n\r\n",
        "POST / HTTP/1.1\r\n" H "Transfer-Encoding: xchunked\r\n\r\n",
        "GET / HTTP/1.1\r\n" H "X: a\r\n b\r\n\r\n",
        "POST / HTTP/1.1\r\n" H "Content-Length: -1\r\n\r\n",
        "POST / HTTP/1.1\r\n" H "Transfer-Encoding: chunked\r\n\r\n5\nhello\r\n0\r\n\r\n",
        "GET /%zz HTTP/1.1\r\n" H "\r\n",
    };
    fixture *f = *state;
    serve(f);
    td_strbuf in, out;
    td_strbuf_init(&in);
    td_strbuf_init(&out);
    for (size_t i = 0; i < TD_ARRAY_LEN(heads); i++) {
        td_strbuf_reset(&in);
        td_strbuf_addf(&in, "%sGET /smuggled HTTP/1.1\r\n" H "\r\n", heads[i]);
        exchange(f, in.data, in.len, &out);
        if (strncmp(out.data, "HTTP/1.1 400 ", 13))
            fail_msg("probe %zu: %s", i, out.data);
        assert_non_null(strstr(out.data, "Connection: close\r\n"));
        assert_non_null(strstr(out.data, "{\"error\":{\"message\":\""));
        assert_non_null(strstr(
            out.data,
            "\"type\":\"invalid_request_error\",\"param\":null,\"code\":\"invalid_request\"}}"));
        assert_null(strstr(out.data + 13, "HTTP/1.1 "));
    }
    assert_int_equal(f->n_requests, 0);
    assert_int_equal(td_http_server_conns(f->server), 0);
    td_strbuf_done(&in);
    td_strbuf_done(&out);
}

static void too_large_is_told_before_it_is_read(void **state)
{
    fixture *f = *state;
    serve(f);
    td_strbuf in, out;
    td_strbuf_init(&in);
    td_strbuf_init(&out);
    exchange(f, "POST / HTTP/1.1\r\n" H "Content-Length: 100001\r\n\r\n", 53, &out);
    status_is(&out, 413);
    /* a client that sends its whole body first must still be able to read the answer */
    td_strbuf_adds(&in, "POST / HTTP/1.1\r\n" H "Content-Length: 5000000\r\n\r\n");
    for (int i = 0; i < 5000000 / 100; i++)
        td_strbuf_addf(&in, "%0100d", 0);
    exchange(f, in.data, in.len, &out);
    status_is(&out, 413);
    td_strbuf_reset(&in);
    td_strbuf_adds(&in, "POST / HTTP/1.1\r\n" H "Transfer-Encoding: chunked\r\n\r\n186a1\r\n");
    exchange(f, in.data, in.len, &out);
    status_is(&out, 413);
    td_strbuf_reset(&in);
    td_strbuf_adds(&in, "GET / HTTP/1.1\r\n" H "X: ");
    for (int i = 0; i < 20000; i++)
        td_strbuf_addc(&in, 'x');
    exchange(f, in.data, in.len, &out);
    status_is(&out, 431);
    assert_int_equal(f->n_requests, 0);
    td_strbuf_done(&in);
    td_strbuf_done(&out);
}

static void bodies_together_are_bounded(void **state)
{
    fixture *f = *state;
    f->cfg.max_buffered_bytes = 150000;
    serve(f);
    td_strbuf in, out;
    td_strbuf_init(&in);
    td_strbuf_init(&out);
    td_strbuf_adds(&in, "POST /hold HTTP/1.1\r\n" H "Content-Length: 100000\r\n\r\n");
    for (int i = 0; i < 1000; i++)
        td_strbuf_addf(&in, "%0100d", 0);
    int fd = dial(f);
    put(f, fd, in.data, in.len);
    turns(f, 3);
    assert_non_null(f->held);
    exchange(f, in.data, in.len, &out);
    status_is(&out, 503);
    assert_non_null(strstr(out.data, "Retry-After: "));
    td_http_reply(f->held, 200, NULL, 0, "", 0);
    turns(f, 2);
    put(f, fd, in.data, in.len); /* freed with its request: room again */
    turns(f, 3);
    assert_int_equal(f->n_requests, 2);
    td_http_reply(f->held, 200, NULL, 0, "", 0);
    close(fd);
    td_strbuf_done(&in);
    td_strbuf_done(&out);
}

static void slow_head_and_body_time_out(void **state)
{
    fixture *f = *state;
    f->cfg.header_timeout_s = 1;
    serve(f);
    td_strbuf a, b;
    td_strbuf_init(&a);
    td_strbuf_init(&b);
    int head = dial(f), body = dial(f);
    put(f, head, "GET / HT", 8);
    static const char slow[] = "POST / HTTP/1.1\r\n" H "Content-Length: 50\r\n\r\nabc";
    put(f, body, slow, sizeof slow - 1);
    assert_true(get(f, head, &a, NULL));
    assert_true(get(f, body, &b, NULL));
    status_is(&a, 408);
    status_is(&b, 408);
    assert_non_null(strstr(a.data, "\"type\":\"timeout_error\""));
    close(head);
    close(body);
    td_strbuf_done(&a);
    td_strbuf_done(&b);
}

static void idle_connections_are_closed(void **state)
{
    fixture *f = *state;
    f->cfg.idle_timeout_s = 1;
    serve(f);
    td_strbuf out;
    td_strbuf_init(&out);
    int fresh = dial(f), used = dial(f);
    put(f, used, "GET /x HTTP/1.1\r\n" H "\r\n", 28);
    assert_true(get(f, fresh, &out, NULL));
    assert_int_equal(out.len, 0);
    assert_true(get(f, used, &out, NULL));
    assert_null(strstr(out.data, "408"));
    close(fresh);
    close(used);
    td_strbuf_done(&out);
}

static void too_many_connections_are_told(void **state)
{
    fixture *f = *state;
    f->cfg.max_conns = 2;
    serve(f);
    td_strbuf out;
    td_strbuf_init(&out);
    int a = dial(f), b = dial(f);
    turns(f, 2);
    int c = dial(f);
    assert_true(get(f, c, &out, NULL));
    status_is(&out, 503);
    close(a);
    close(b);
    close(c);
    turns(f, 5);
    assert_int_equal(td_http_server_conns(f->server), 0);
    exchange(f, "GET /again HTTP/1.0\r\n\r\n", 23, &out);
    status_is(&out, 200);
    td_strbuf_done(&out);
}

/* One client may not take all connections, and gives back what it had. */
static void one_address_has_its_share(void **state)
{
    fixture *f = *state;
    f->cfg.max_conns_per_peer = 2;
    serve(f);
    td_strbuf out;
    td_strbuf_init(&out);
    int a = dial_from(f, "127.0.0.2"), b = dial_from(f, "127.0.0.2");
    turns(f, 2);
    int c = dial_from(f, "127.0.0.2");
    assert_true(get(f, c, &out, NULL));
    status_is(&out, 429);
    assert_non_null(strstr(out.data, "\r\nRetry-After: "));
    assert_non_null(strstr(out.data, "rate_limit_exceeded"));
    assert_int_equal(td_http_server_refused(f->server), 1);
    int other = dial_from(f, "127.0.0.3");
    put(f, other, "GET /o HTTP/1.0\r\n\r\n", 19);
    td_strbuf_reset(&out);
    assert_true(get(f, other, &out, NULL));
    status_is(&out, 200);
    close(a);
    close(b);
    close(c);
    close(other);
    turns(f, 5);
    assert_int_equal(td_http_server_conns(f->server), 0);
    a = dial_from(f, "127.0.0.2");
    put(f, a, "GET /a HTTP/1.0\r\n\r\n", 19);
    td_strbuf_reset(&out);
    assert_true(get(f, a, &out, NULL));
    status_is(&out, 200);
    close(a);
    td_strbuf_done(&out);
}

static void expect_continue_is_answered(void **state)
{
    fixture *f = *state;
    serve(f);
    td_strbuf out;
    td_strbuf_init(&out);
    int fd = dial(f);
    static const char head[] =
        "POST /e HTTP/1.1\r\n" H "Expect: 100-continue\r\nContent-Length: 2\r\n\r\n";
    put(f, fd, head, sizeof head - 1);
    assert_true(get(f, fd, &out, "HTTP/1.1 100 Continue\r\n\r\n"));
    put(f, fd, "ok", 2);
    assert_true(get(f, fd, &out, "\r\n\r\nok"));
    close(fd);
    td_strbuf_done(&out);
}

static void head_and_options_reach_the_handler(void **state)
{
    fixture *f = *state;
    serve(f);
    td_strbuf out;
    td_strbuf_init(&out);
    exchange(f, "HEAD /h HTTP/1.1\r\n" H "Connection: close\r\n\r\n", 49, &out);
    assert_non_null(strstr(out.data, "Content-Length: 2\r\n"));
    assert_string_equal(out.data + out.len - 4, "\r\n\r\n");
    exchange(f, "OPTIONS * HTTP/1.1\r\n" H "Connection: close\r\n\r\n", 51, &out);
    assert_string_equal(f->last.data, "OPTIONS *? ");
    td_strbuf_done(&out);
}

static void streams_arrive_in_order_and_connection_lives_on(void **state)
{
    fixture *f = *state;
    serve(f);
    td_strbuf out;
    td_strbuf_init(&out);
    int fd = dial(f);
    put(f, fd, "GET /stream HTTP/1.1\r\n" H "\r\n", 33);
    assert_true(
        get(f, fd, &out, "Transfer-Encoding: chunked\r\n\r\n")); /* before the first token */
    assert_int_equal(td_http_stream_write(f->held, "data: 1\n\n", 9), 0);
    assert_int_equal(td_http_stream_write(f->held, "", 0), 0); /* must not end the stream */
    assert_int_equal(td_http_stream_write(f->held, "data: 2\n\n", 9), 0);
    td_http_stream_end(f->held);
    assert_true(get(f, fd, &out, "0\r\n\r\n"));
    assert_non_null(strstr(out.data, "\r\n\r\n9\r\ndata: 1\n\n\r\n9\r\ndata: 2\n\n\r\n0\r\n\r\n"));
    put(f, fd, "GET /next HTTP/1.1\r\n" H "\r\n", 31);
    assert_true(get(f, fd, &out, "\r\n\r\n/next"));
    close(fd);
    turns(f, 3);
    assert_int_equal(f->n_closed, 0);
    td_strbuf_done(&out);
}

static void http10_stream_ends_by_closing(void **state)
{
    fixture *f = *state;
    serve(f);
    td_strbuf out;
    td_strbuf_init(&out);
    int fd = dial(f);
    put(f, fd, "GET /stream HTTP/1.0\r\n\r\n", 24);
    turns(f, 3);
    td_http_stream_write(f->held, "abc", 3);
    td_http_stream_end(f->held);
    assert_true(get(f, fd, &out, NULL));
    assert_null(strstr(out.data, "chunked"));
    assert_non_null(strstr(out.data, "\r\n\r\nabc"));
    close(fd);
    td_strbuf_done(&out);
}

static void aborted_stream_has_no_final_chunk(void **state)
{
    fixture *f = *state;
    serve(f);
    td_strbuf out;
    td_strbuf_init(&out);
    int fd = dial(f);
    put(f, fd, "GET /stream HTTP/1.1\r\n" H "\r\n", 33);
    turns(f, 3);
    td_http_stream_write(f->held, "error", 5);
    td_http_stream_abort(f->held);
    assert_true(get(f, fd, &out, NULL));
    assert_string_equal(out.data + out.len - 10, "5\r\nerror\r\n");
    close(fd);
    td_strbuf_done(&out);
}

/* 0 = closes while the request waits, 1 = while its stream is idle, 2 = by a reset. */
static void leave(fixture *f, const char *request, int reset)
{
    int fd = dial(f), before = f->n_closed;
    put(f, fd, request, strlen(request));
    turns(f, 3);
    assert_non_null(f->held);
    if (reset) {
        struct linger l = {1, 0};
        setsockopt(fd, SOL_SOCKET, SO_LINGER, &l, sizeof l);
    }
    close(fd);
    turns(f, 20);
    assert_int_equal(f->n_closed, before + 1);
    assert_null(f->held);
    assert_int_equal(f->was_slow, 0);
    assert_int_equal(td_http_server_conns(f->server), 0);
}

static void a_client_that_leaves_is_noticed_while_idle(void **state)
{
    fixture *f = *state;
    serve(f);
    leave(f, "GET /hold HTTP/1.1\r\n" H "\r\n", 0);
    leave(f, "GET /hold HTTP/1.1\r\n" H "Connection: close\r\n\r\n", 0);
    leave(f, "GET /hold HTTP/1.1\r\n" H "\r\n", 1);
    leave(f, "GET /stream HTTP/1.1\r\n" H "\r\n", 0);
    leave(f, "GET /stream HTTP/1.1\r\n" H "\r\n", 1);
    /* also behind a pipelined request that nobody has read */
    leave(f, "GET /hold HTTP/1.1\r\n" H "\r\nGET /x HTTP/1.1\r\n" H "\r\n", 0);
}

static void half_closed_client_gets_its_answer(void **state)
{
    fixture *f = *state;
    serve(f);
    td_strbuf out;
    td_strbuf_init(&out);
    static const char *const requests[] = {"GET /hold HTTP/1.1\r\n" H "\r\n",
                                           "GET /hold HTTP/1.0\r\n\r\n",
                                           "GET /hold HTTP/1.1\r\n" H "Connection: close\r\n\r\n"};
    for (size_t i = 0; i < TD_ARRAY_LEN(requests); i++) {
        td_strbuf_reset(&out);
        int fd = dial(f);
        put(f, fd, requests[i], strlen(requests[i]));
        shutdown(fd, SHUT_WR);
        turns(f, 20);
        assert_int_equal(f->n_closed, 0);
        assert_non_null(f->held);
        td_http_reply(f->held, 200, NULL, 0, "late", 4);
        assert_true(get(f, fd, &out, NULL));
        assert_string_equal(out.data + out.len - 8, "\r\n\r\nlate");
        close(fd);
    }
    /* the same for a stream, whose reader then goes for good */
    int fd = dial(f);
    put(f, fd, requests[0], strlen(requests[0]));
    shutdown(fd, SHUT_WR);
    turns(f, 20);
    td_http_stream_begin(f->held, 200, NULL, 0);
    td_http_stream_write(f->held, "tok", 3);
    td_strbuf_reset(&out);
    assert_true(get(f, fd, &out, "3\r\ntok\r\n"));
    close(fd);
    for (int i = 0; i < 10 && f->held; i++) {
        td_http_stream_write(f->held, "tok", 3);
        turns(f, 2);
    }
    assert_int_equal(f->n_closed, 1);
    td_strbuf_done(&out);
}

static void slow_reader_is_closed_and_told_apart(void **state)
{
    fixture *f = *state;
    f->cfg.max_backlog_bytes = 256 * 1024;
    serve(f);
    char chunk[8192];
    memset(chunk, 'x', sizeof chunk);
    int fd = dial(f), r = 0;
    put(f, fd, "GET /stream HTTP/1.1\r\n" H "\r\n", 33);
    turns(f, 3);
    for (int i = 0; i < 4000 && !r; i++) { /* the kernel's buffers take a few MiB first */
        r = td_http_stream_write(f->held, chunk, sizeof chunk);
        assert_true(td_http_stream_backlog(f->held) <= 256 * 1024 + 64);
        if (!r)
            td_loop_run_once(f->loop, 0);
    }
    assert_int_equal(r, -ENOBUFS);
    assert_int_equal(f->n_closed, 0); /* never inside the write */
    turns(f, 3);
    assert_int_equal(f->n_closed, 1);
    assert_int_equal(f->was_slow, 1);
    close(fd);
}

/* A refused last write, then the ordinary end in the same turn: the client must not see a whole
 * answer with a hole in it. */
static void refused_write_never_ends_well(void **state)
{
    fixture *f = *state;
    f->cfg.max_backlog_bytes = 4096;
    serve(f);
    char chunk[3000];
    memset(chunk, 'x', sizeof chunk);
    td_strbuf out;
    td_strbuf_init(&out);
    int fd = dial(f);
    put(f, fd, "GET /stream HTTP/1.1\r\n" H "\r\n", 33);
    turns(f, 3);
    assert_int_equal(td_http_stream_write(f->held, chunk, sizeof chunk), 0);
    assert_int_equal(td_http_stream_write(f->held, chunk, sizeof chunk), -ENOBUFS);
    td_http_on_close(f->held, NULL, NULL);
    td_http_stream_end(f->held);
    f->held = NULL;
    for (int i = 0; i < 50; i++) {
        char buf[4096];
        turns(f, 1);
        ssize_t n = recv(fd, buf, sizeof buf, MSG_DONTWAIT);
        if (n > 0)
            td_strbuf_add(&out, buf, (size_t)n);
        if (n == 0)
            break;
    }
    assert_true(out.len > 3000);
    assert_null(memmem(out.data, out.len, "\r\n0\r\n\r\n", 7));
    td_strbuf_done(&out);
    close(fd);
}

static void reader_that_takes_nothing_is_closed(void **state)
{
    fixture *f = *state;
    f->cfg.idle_timeout_s = 1;
    f->cfg.max_backlog_bytes = 64u << 20;
    serve(f);
    int fd = dial(f);
    put(f, fd, "GET /stream HTTP/1.1\r\n" H "\r\n", 33);
    turns(f, 3);
    char *big = calloc(1, 16u << 20);
    assert_int_equal(td_http_stream_write(f->held, big, 16u << 20), 0);
    for (uint64_t end = td_now_us() + 3 * TD_S; !f->n_closed && td_now_us() < end;)
        turns(f, 1);
    assert_int_equal(f->was_slow, 1);
    free(big);
    close(fd);
}

static void big_answer_arrives_whole(void **state)
{
    fixture *f = *state;
    serve(f);
    td_strbuf out;
    td_strbuf_init(&out);
    size_t n = 20u << 20;
    char *big = malloc(n);
    for (size_t i = 0; i < n; i++)
        big[i] = (char)('a' + i % 23);
    int fd = dial(f);
    put(f, fd, "GET /hold HTTP/1.1\r\n" H "Connection: close\r\n\r\n", 51);
    turns(f, 3);
    td_http_reply(f->held, 200, NULL, 0, big, n);
    char buf[65536];
    size_t got = 0;
    for (ssize_t r = 1; r;) {
        r = recv(fd, buf, sizeof buf, 0);
        if (r > 0 && got == 0)
            r -= (ssize_t)(strstr(buf, "\r\n\r\n") + 4 - buf),
                memmove(buf, strstr(buf, "\r\n\r\n") + 4, (size_t)r);
        if (r > 0) {
            assert_memory_equal(buf, big + got, (size_t)r);
            got += (size_t)r;
        } else if (r < 0) {
            turns(f, 1);
        }
    }
    assert_int_equal(got, n);
    free(big);
    close(fd);
    td_strbuf_done(&out);
}

/* evhttp's own backlog of 128 made this take 4 to 7 seconds. */
static void two_thousand_connects_are_quick(void **state)
{
    enum { N = 2000 };
    fixture *f = *state;
    struct rlimit rl;
    getrlimit(RLIMIT_NOFILE, &rl);
    rl.rlim_cur = rl.rlim_max;
    setrlimit(RLIMIT_NOFILE, &rl);
    if (rl.rlim_cur < 2 * N + 100)
        skip();
    f->cfg.max_conns_per_peer = 4096;
    serve(f);
    struct sockaddr_in a = address(f);
    int *fds = calloc(N, sizeof *fds);
    uint64_t start = td_now_us();
    for (int i = 0; i < N; i++) { /* all at once: nobody accepts meanwhile */
        fds[i] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        connect(fds[i], (struct sockaddr *)&a, sizeof a);
    }
    while (td_http_server_conns(f->server) < N && td_now_us() - start < 5 * TD_S)
        turns(f, 1);
    uint64_t took = td_now_us() - start;
    assert_int_equal(td_http_server_conns(f->server), N);
    int somaxconn = 0;
    FILE *p = fopen("/proc/sys/net/core/somaxconn", "r");
    if (p && fscanf(p, "%d", &somaxconn) == 1 && somaxconn >= N)
        assert_true(took < 900 * TD_MS); /* the first SYN retry comes after 1 s */
    if (p)
        fclose(p);
    for (int i = 0; i < N; i++)
        close(fds[i]);
    turns(f, 20);
    assert_int_equal(td_http_server_conns(f->server), 0);
    free(fds);
}

static void drain_closes_idle_and_finishes_running(void **state)
{
    fixture *f = *state;
    serve(f);
    td_strbuf out;
    td_strbuf_init(&out);
    int idle = dial(f), busy = dial(f);
    put(f, busy, "GET /hold HTTP/1.1\r\n" H "\r\n", 31);
    turns(f, 3);
    td_http_server_stop_listening(f->server);
    assert_true(get(f, idle, &out, NULL));
    td_http_reply(f->held, 200, NULL, 0, "done", 4);
    assert_true(get(f, busy, &out, NULL));
    assert_non_null(strstr(out.data, "Connection: close\r\n"));
    assert_non_null(strstr(out.data, "\r\n\r\ndone"));
    close(idle);
    close(busy);
    td_strbuf_done(&out);
}

/* The last answers of a drained server are larger than a socket buffer: they must not be cut off by
 * its end. */
static void closing_the_server_sends_what_is_complete(void **state)
{
    fixture *f = *state;
    serve(f);
    td_strbuf out;
    td_strbuf_init(&out);
    size_t n = 8u << 20;
    char *big = calloc(1, n);
    int fd = dial(f);
    put(f, fd, "GET /hold HTTP/1.1\r\n" H "\r\n", 31);
    turns(f, 3);
    td_http_reply(f->held, 200, NULL, 0, big, n);
    pid_t reader = fork();
    if (reader == 0) {
        char buf[65536];
        size_t got = 0;
        fcntl(fd, F_SETFL, 0);
        /* the child holds the server's end too: there is no end to wait for */
        alarm(5);
        for (ssize_t r; got <= n && (r = recv(fd, buf, sizeof buf, 0)) > 0;)
            got += (size_t)r;
        _exit(got > n ? 0 : 1);
    }
    td_http_server_close(f->server);
    f->server = NULL;
    int status = -1;
    waitpid(reader, &status, 0);
    assert_int_equal(status, 0);
    free(big);
    close(fd);
    td_strbuf_done(&out);
}

static void closing_the_server_tells_open_requests(void **state)
{
    fixture *f = *state;
    serve(f);
    int fd = dial(f);
    put(f, fd, "GET /hold HTTP/1.1\r\n" H "\r\n", 31);
    turns(f, 3);
    td_http_server_close(f->server);
    f->server = NULL;
    assert_int_equal(f->n_closed, 1);
    close(fd);
}

static void answer_cannot_split_its_head(void **state)
{
    fixture *f = *state;
    serve(f);
    td_strbuf out;
    td_strbuf_init(&out);
    int fd = dial(f);
    put(f, fd, "GET /hold HTTP/1.1\r\n" H "\r\n", 31);
    turns(f, 3);
    td_http_header h = {"X", "a\r\nSet-Cookie: b"};
    td_http_reply(f->held, 200, &h, 1, "z", 1);
    assert_true(get(f, fd, &out, "\r\n\r\nz"));
    assert_null(strstr(out.data, "\nSet-Cookie"));
    close(fd);
    td_strbuf_done(&out);
}

static void wildcards_and_open_addresses_are_refused(void **state)
{
    static const struct {
        const char *listen;
        int code;
        const char *says;
    } bad[] = {
        {"0.0.0.0:8080", -EINVAL, "every interface"},
        {"[::]:8080", -EINVAL, "every interface"},
        {"[::ffff:0.0.0.0]:8080", -EINVAL, "every interface"},
        {"*:8080", -EINVAL, "every interface"},
        {":8080", -EINVAL, "every interface"},
        {"localhost:8080", -EINVAL, "not a literal address"},
        {"127.0.0.1", -EINVAL, "ADDRESS:PORT"},
        {"127.0.0.1:70000", -EINVAL, "ADDRESS:PORT"},
        {"127.0.0.1:80x", -EINVAL, "ADDRESS:PORT"},
        {"192.0.2.1:8080", -EPERM, "--api-keys"},
        {"[2001:db8::1]:8080", -EPERM, "--api-keys"},
    };
    fixture *f = *state;
    for (size_t i = 0; i < TD_ARRAY_LEN(bad); i++) {
        td_err err = {0};
        f->cfg.listen = bad[i].listen;
        assert_int_equal(td_http_server_open(f->loop, &f->cfg, &f->server, &err), bad[i].code);
        if (!strstr(err.text, bad[i].says))
            fail_msg("%s: %s", bad[i].listen, err.text);
    }
    td_err err = {0};
    f->cfg.allow_nonloopback = 1; /* allowed, but TEST-NET is not on this machine */
    f->cfg.listen = "192.0.2.1:8080";
    assert_int_equal(td_http_server_open(f->loop, &f->cfg, &f->server, &err), -EADDRNOTAVAIL);
    f->cfg.listen = "0.0.0.0:8080";
    assert_int_equal(td_http_server_open(f->loop, &f->cfg, &f->server, &err), -EINVAL);
}

static void taken_port_is_named(void **state)
{
    fixture *f = *state;
    td_http_server *second;
    td_err err = {0};
    serve(f);
    f->cfg.listen = td_http_server_addr(f->server);
    assert_int_equal(td_http_server_open(f->loop, &f->cfg, &second, &err), -EADDRINUSE);
    assert_non_null(strstr(err.text, td_http_server_addr(f->server)));
}

static void inherited_socket_serves(void **state)
{
    fixture *f = *state;
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    assert_int_equal(bind(fd, (struct sockaddr *)&a, sizeof a), 0);
    assert_int_equal(listen(fd, 1), 0);
    f->cfg.listen = NULL;
    f->cfg.fd = fd;
    serve(f);
    td_strbuf out;
    td_strbuf_init(&out);
    exchange(f, "GET /fd HTTP/1.0\r\n\r\n", 20, &out);
    assert_non_null(strstr(out.data, "\r\n\r\n/fd"));
    td_strbuf_done(&out);
}

/* ---- client ---- */

typedef struct reply {
    td_http_call *call;
    int status, done, cancel_on_data;
    char type[64], error[256];
    td_strbuf body;
} reply;

static void on_head(void *arg, int status, const char *(*header)(const void *ctx, const char *name),
                    const void *ctx)
{
    reply *r = arg;
    const char *type = header(ctx, "content-type");
    r->status = status;
    snprintf(r->type, sizeof r->type, "%s", type ? type : "");
}

static void on_data(void *arg, const char *data, size_t n)
{
    reply *r = arg;
    td_strbuf_add(&r->body, data, n);
    if (r->cancel_on_data)
        td_http_call_cancel(r->call);
}

static void on_done(void *arg, const char *error)
{
    reply *r = arg;
    r->done++;
    snprintf(r->error, sizeof r->error, "%s", error ? error : "");
}

static const td_http_call_ops ops = {on_head, on_data, on_done};

static void call(fixture *f, reply *r, const char *method, const char *path, const char *body)
{
    char url[256];
    td_err err;
    snprintf(url, sizeof url, "http://%s%s", td_http_server_addr(f->server), path);
    td_strbuf_init(&r->body);
    assert_int_equal(td_http_call_start(f->loop, method, url, NULL, 0, body,
                                        body ? strlen(body) : 0, &ops, r, &r->call, &err),
                     0);
}

static void client_reads_answers_and_streams(void **state)
{
    fixture *f = *state;
    serve(f);
    reply a = {0}, s = {0}, h = {0};
    call(f, &a, "POST", "/x", "hello");
    call(f, &h, "HEAD", "/x", NULL);
    turns(f, 20);
    assert_int_equal(a.done, 1);
    assert_string_equal(a.error, "");
    assert_int_equal(a.status, 200);
    assert_string_equal(a.body.data, "hello");
    assert_int_equal(h.done, 1);
    assert_int_equal(h.body.len, 0);
    call(f, &s, "GET", "/stream", NULL);
    turns(f, 10);
    assert_string_equal(s.type, "text/event-stream");
    td_http_stream_write(f->held, "one ", 4);
    turns(f, 10);
    assert_string_equal(s.body.data, "one ");
    td_http_stream_write(f->held, "two", 3);
    td_http_stream_end(f->held);
    turns(f, 10);
    assert_int_equal(s.done, 1);
    assert_string_equal(s.body.data, "one two");
    td_strbuf_done(&a.body);
    td_strbuf_done(&s.body);
    td_strbuf_done(&h.body);
}

static void client_tells_a_cut_answer_and_a_refused_connection(void **state)
{
    fixture *f = *state;
    serve(f);
    reply s = {0}, n = {0};
    call(f, &s, "GET", "/stream", NULL);
    turns(f, 10);
    td_http_stream_write(f->held, "one", 3);
    td_http_stream_abort(f->held);
    turns(f, 10);
    assert_int_equal(s.done, 1);
    assert_non_null(strstr(s.error, "in the middle of the answer"));
    call(f, &n, "GET", "/x", NULL);
    char addr[64];
    snprintf(addr, sizeof addr, "%s", td_http_server_addr(f->server));
    td_http_server_close(f->server);
    f->server = NULL;
    turns(f, 10);
    assert_int_equal(n.done, 1);
    assert_memory_equal(n.error, addr, strlen(addr));
    td_err err;
    assert_int_equal(
        td_http_call_start(f->loop, "GET", "https://a/", NULL, 0, NULL, 0, &ops, &n, &n.call, &err),
        -EINVAL);
    assert_int_equal(
        td_http_call_start(f->loop, "GET", "http:///x", NULL, 0, NULL, 0, &ops, &n, &n.call, &err),
        -EINVAL);
    assert_int_equal(td_http_call_start(f->loop, "GET", "http://[::1/x", NULL, 0, NULL, 0, &ops, &n,
                                        &n.call, &err),
                     -EINVAL);
    td_strbuf_done(&s.body);
    td_strbuf_done(&n.body);
}

static void client_may_cancel_inside_and_outside(void **state)
{
    fixture *f = *state;
    serve(f);
    reply in = {.cancel_on_data = 1}, out = {0};
    call(f, &in, "GET", "/x", NULL);
    turns(f, 10);
    assert_int_equal(in.body.len, 2);
    assert_int_equal(in.done, 0);
    call(f, &out, "GET", "/hold", NULL);
    turns(f, 10);
    td_http_call_cancel(out.call);
    turns(f, 10);
    assert_int_equal(f->n_closed, 1);
    td_strbuf_done(&in.body);
    td_strbuf_done(&out.body);
}

int main(void)
{
#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
    const struct CMUnitTest tests[] = {
        T(answers_keep_alive_and_pipelined),
        T(bytes_one_by_one_read_the_same),
        T(many_pipelined_requests_are_all_answered),
        T(smuggling_is_answered_400_and_closed),
        T(too_large_is_told_before_it_is_read),
        T(bodies_together_are_bounded),
        T(slow_head_and_body_time_out),
        T(idle_connections_are_closed),
        T(too_many_connections_are_told),
        T(one_address_has_its_share),
        T(expect_continue_is_answered),
        T(head_and_options_reach_the_handler),
        T(streams_arrive_in_order_and_connection_lives_on),
        T(http10_stream_ends_by_closing),
        T(aborted_stream_has_no_final_chunk),
        T(a_client_that_leaves_is_noticed_while_idle),
        T(half_closed_client_gets_its_answer),
        T(slow_reader_is_closed_and_told_apart),
        T(refused_write_never_ends_well),
        T(reader_that_takes_nothing_is_closed),
        T(big_answer_arrives_whole),
        T(two_thousand_connects_are_quick),
        T(drain_closes_idle_and_finishes_running),
        T(closing_the_server_sends_what_is_complete),
        T(closing_the_server_tells_open_requests),
        T(answer_cannot_split_its_head),
        T(wildcards_and_open_addresses_are_refused),
        T(taken_port_is_named),
        T(inherited_socket_serves),
        T(client_reads_answers_and_streams),
        T(client_tells_a_cut_answer_and_a_refused_connection),
        T(client_may_cancel_inside_and_outside),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
