/* SPDX-License-Identifier: Apache-2.0 */
#include "rpc/sock.h"

#include <arpa/inet.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>
#include <zmq.h>

#include "base/bug.h"
#include "base/cleanup.h"
#include "rpc/zap.h"
#include "rpc/zmq_ctx.h"
#include "base/banned.h"

/* ---- endpoint rules ---- */

static int check_ipc(const char *endpoint, td_err *err)
{
    const char *path = endpoint + strlen("ipc://");
    size_t max = sizeof((struct sockaddr_un *)0)->sun_path - 1;
    if (path[0] != '/')
        return td_err_set(err, -EINVAL,
                          "%s: an ipc endpoint needs an absolute path (wildcard and abstract "
                          "sockets are refused): write "
                          "ipc:///run/tandem/NAME.sock",
                          endpoint);
    if (strlen(path) > max)
        return td_err_set(
            err, -EINVAL,
            "%s: the path has %zu bytes and a Unix socket allows %zu: use a shorter directory",
            endpoint, strlen(path), max);
    return 0;
}

static int is_loopback(const char *host, int *ret_valid, int *ret_any)
{
    struct in_addr a4;
    struct in6_addr a6;
    *ret_valid = 1;
    if (inet_pton(AF_INET, host, &a4) == 1) {
        *ret_any = a4.s_addr == htonl(INADDR_ANY);
        return (ntohl(a4.s_addr) >> 24) == 127;
    }
    *ret_valid = inet_pton(AF_INET6, host, &a6) == 1;
    *ret_any = *ret_valid && memcmp(&a6, &in6addr_any, sizeof a6) == 0;
    return *ret_valid && memcmp(&a6, &in6addr_loopback, sizeof a6) == 0;
}

static int port_valid(const char *port)
{
    char *end;
    if (port[0] < '0' || port[0] > '9')
        return 0;
    unsigned long v = strtoul(port, &end, 10);
    return *end == 0 && end - port <= 5 && v <= 65535;
}

/* "[::1]" -> "::1" in place. */
static char *unbracket(char *host)
{
    size_t n = strlen(host);
    if (n < 2 || host[0] != '[' || host[n - 1] != ']')
        return host;
    host[n - 1] = 0;
    return host + 1;
}

static int check_tcp(const char *endpoint, int has_keys, td_err *err)
{
    char text[128];
    int valid, any, n = snprintf(text, sizeof text, "%s", endpoint + strlen("tcp://"));
    char *colon = strrchr(text, ':');
    if (n >= (int)sizeof text || !colon || !port_valid(colon + 1))
        return td_err_set(err, -EINVAL,
                          "%.200s: a tcp endpoint is tcp://ADDRESS:PORT with a port of 0 to 65535",
                          endpoint);
    *colon = 0;
    char *host = unbracket(text);
    int bracketed = host != text, loopback = is_loopback(host, &valid, &any);
    if (strcmp(host, "*") == 0 || (valid && any))
        return td_err_set(
            err, -EINVAL,
            "%s: wildcard addresses are refused: name one address, e.g. tcp://127.0.0.1:7070",
            endpoint);
    if (!valid || (strchr(host, ':') != NULL) != bracketed)
        return td_err_set(err, -EINVAL,
                          "%s: the address must be literal (names are not resolved): write e.g. "
                          "tcp://127.0.0.1:7070 or "
                          "tcp://[::1]:7070",
                          endpoint);
    if (!loopback && !has_keys)
        return td_err_set(
            err, -EACCES,
            "%s: an address beyond loopback needs keys, and none are configured: make "
            "them with `tandem keys DIR` and set curve-secret and curve-peers, or use "
            "ipc://, 127.0.0.1 or [::1]",
            endpoint);
    return 0;
}

int td_endpoint_check(const char *endpoint, int has_keys, td_err *err)
{
    if (strncmp(endpoint, "ipc://", 6) == 0)
        return check_ipc(endpoint, err);
    if (strncmp(endpoint, "tcp://", 6) == 0)
        return check_tcp(endpoint, has_keys, err);
    return td_err_set(err, -EINVAL,
                      "%.200s: not an endpoint: write ipc:///PATH or tcp://ADDRESS:PORT", endpoint);
}

/* The address of a checked tcp endpoint must be one of the private network. */
static int check_plain(const char *endpoint, const td_link *l, td_err *err)
{
    char text[128];
    if (endpoint[0] != 't')
        return td_err_set(
            err, -EINVAL,
            "%s: a private KV link is a tcp:// address; for ipc:// use kv-link = curve", endpoint);
    snprintf(text, sizeof text, "%s", endpoint + strlen("tcp://"));
    *strrchr(text, ':') = 0;
    return td_link_check_private(l, unbracket(text), err);
}

/* ---- the ipc file ---- */

/* libzmq unlinks the path before it binds, also under a server that lives: so we look first. */
static int clear_stale(const char *endpoint, td_err *err)
{
    const char *path = endpoint + strlen("ipc://");
    struct stat st;
    if (lstat(path, &st) < 0)
        return errno == ENOENT ? 0
                               : td_err_set(err, -errno, "%s: %s", endpoint, td_errno_text(errno));
    if (!S_ISSOCK(st.st_mode))
        return td_err_set(
            err, -EEXIST,
            "%s: a file that is not a socket lies there: remove it or choose another path",
            endpoint);
    TD_AUTO_CLOSE int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return td_err_set(err, -errno, "%s: socket: %s", endpoint, td_errno_text(errno));
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    memcpy(a.sun_path, path, strlen(path)); /* length checked */
    if (connect(fd, (struct sockaddr *)&a, sizeof a) == 0 || errno == EAGAIN)
        return td_err_set(err, -EADDRINUSE,
                          "%s: another process listens there: stop it or choose another path",
                          endpoint);
    if (errno != ECONNREFUSED)
        return td_err_set(err, -errno, "%s: %s", endpoint, td_errno_text(errno));
    if (unlink(path) < 0 && errno != ENOENT)
        return td_err_set(err, -errno, "%s: cannot remove the stale socket: %s", endpoint,
                          td_errno_text(errno));
    return 0;
}

static int bind_ipc(void *socket, const char *endpoint, td_err *err)
{
    int r = clear_stale(endpoint, err);
    if (r < 0)
        return r;
    mode_t old = umask(0077);
    r = zmq_bind(socket, endpoint) < 0 ? -zmq_errno() : 0;
    umask(old);
    if (r < 0)
        return td_err_set(err, r,
                          "%s: cannot bind: %s: check that the directory exists and is ours",
                          endpoint, zmq_strerror(-r));
    return 0;
}

/* ---- sockets ---- */

static int set_int(void *socket, int option, int value)
{
    return zmq_setsockopt(socket, option, &value, sizeof value) < 0 ? -zmq_errno() : 0;
}

static int configure(void *socket, const char *endpoint, const td_sock_config *c)
{
    const struct {
        int option, value;
    } all[] = {
        {ZMQ_LINGER, 0},           {ZMQ_IMMEDIATE, 1},
        {ZMQ_SNDTIMEO, 0},         {ZMQ_RCVTIMEO, 0},
        {ZMQ_SNDHWM, c->hwm},      {ZMQ_RCVHWM, c->hwm},
        {ZMQ_HANDSHAKE_IVL, 3000}, {ZMQ_RECONNECT_IVL, 50},
        {ZMQ_BACKLOG, 256},        {ZMQ_RECONNECT_IVL_MAX, 1000},
    };
    const struct {
        int option, value;
    } tcp[] = {
        {ZMQ_HEARTBEAT_IVL, 250},
        {ZMQ_HEARTBEAT_TIMEOUT, 1000},
        {ZMQ_HEARTBEAT_TTL, 1000},
        {ZMQ_CONNECT_TIMEOUT, 2000},
        {ZMQ_TCP_MAXRT, 3000},
        {ZMQ_TCP_KEEPALIVE, 1},
        {ZMQ_IPV6, strchr(endpoint, '[') != NULL},
    };
    int r = 0;
    for (size_t i = 0; i < TD_ARRAY_LEN(all) && r == 0; i++)
        r = set_int(socket, all[i].option, all[i].value);
    for (size_t i = 0; i < TD_ARRAY_LEN(tcp) && r == 0 && endpoint[0] == 't'; i++)
        r = set_int(socket, tcp[i].option, tcp[i].value);
    if (r == 0 && c->type == ZMQ_ROUTER)
        r = set_int(socket, ZMQ_ROUTER_MANDATORY, 1); /* the default drops silently */
    int64_t max = (int64_t)c->max_frame_bytes;
    if (r == 0 && zmq_setsockopt(socket, ZMQ_MAXMSGSIZE, &max, sizeof max) < 0)
        r = -zmq_errno();
    return r;
}

static int set_bytes(void *socket, int option, const void *value, size_t n)
{
    return zmq_setsockopt(socket, option, value, n) < 0 ? -zmq_errno() : 0;
}

/* Before bind and connect: from the first byte on nothing is plain. */
static int secure(void *socket, const char *endpoint, const td_sock_config *c, td_err *err)
{
    char domain[TD_ZAP_DOMAIN_BYTES];
    const td_curve_pair *pair = c->plain ? NULL : td_link_keys(c->link);
    TD_BUG_ON(pair && c->dial && !c->server_key);
    int r = td_zap_watch(socket, c->link, c->door, c->dial, c->plain, endpoint, domain);
    if (r < 0)
        return td_err_set(err, r, "%s: cannot watch the socket: %s", endpoint, zmq_strerror(-r));
    if (c->plain && !c->dial) /* asks the handler about addresses */
        r = set_bytes(socket, ZMQ_ZAP_DOMAIN, domain, strlen(domain));
    if (r == 0 && pair)
        r = set_bytes(socket, ZMQ_CURVE_SECRETKEY, pair->secret_key, TD_CURVE_KEY_BYTES);
    if (r == 0 && pair && c->dial) {
        r = set_bytes(socket, ZMQ_CURVE_PUBLICKEY, pair->public_key, TD_CURVE_KEY_BYTES);
        if (r == 0)
            r = set_bytes(socket, ZMQ_CURVE_SERVERKEY, c->server_key, TD_CURVE_KEY_BYTES);
    } else if (r == 0 && pair) {
        r = set_int(socket, ZMQ_CURVE_SERVER, 1);
        if (r == 0)
            r = set_bytes(socket, ZMQ_ZAP_DOMAIN, domain, strlen(domain));
    }
    return r < 0
               ? td_err_set(err, r, "%s: cannot secure the socket: %s", endpoint, zmq_strerror(-r))
               : 0;
}

static int attach(void *socket, const char *endpoint, const td_sock_config *c, td_err *err)
{
    int r = configure(socket, endpoint, c);
    if (r < 0)
        return td_err_set(err, r, "%s: cannot set a socket option: %s", endpoint, zmq_strerror(-r));
    if (c->link && (r = secure(socket, endpoint, c, err)) < 0)
        return r;
    if (!c->dial && endpoint[0] == 'i')
        return bind_ipc(socket, endpoint, err);
    r = c->dial ? zmq_connect(socket, endpoint) : zmq_bind(socket, endpoint);
    if (r < 0)
        return td_err_set(err, -zmq_errno(), "%s: cannot %s: %s", endpoint,
                          c->dial ? "dial" : "bind", zmq_strerror(zmq_errno()));
    return 0;
}

int td_sock_open(const char *endpoint, const td_sock_config *c, void **ret_socket, td_err *err)
{
    int r = td_endpoint_check(endpoint, td_link_keys(c->link) != NULL, err);
    if (r == 0 && c->plain)
        r = check_plain(endpoint, c->link, err);
    if (r < 0)
        return r;
    void *context = td_zmq_context_ref();
    if (!context)
        return td_err_set(err, -ENOMEM, "%s: cannot make a ZeroMQ context", endpoint);
    void *socket = zmq_socket(context, c->type);
    if (!socket) {
        r = td_err_set(err, -zmq_errno(), "%s: cannot make a socket: %s", endpoint,
                       zmq_strerror(zmq_errno()));
        td_zmq_context_unref();
        return r;
    }
    r = attach(socket, endpoint, c, err);
    if (r < 0) {
        td_sock_close(socket, 0);
        return r;
    }
    *ret_socket = socket;
    return 0;
}

void td_sock_close(void *socket, int linger_ms)
{
    if (!socket)
        return;
    td_zap_forget(socket);
    set_int(socket, ZMQ_LINGER, linger_ms);
    zmq_close(socket);
    td_zmq_context_unref();
}

int td_sock_refused(void *socket)
{
    return td_zap_refused(socket);
}

int td_sock_redial(void *socket, const char *endpoint)
{
    (void)zmq_disconnect(socket, endpoint); /* libzmq may have let go of it already */
    return zmq_connect(socket, endpoint) < 0 ? -zmq_errno() : 0;
}

int td_sock_endpoint(void *socket, char *out, size_t out_bytes)
{
    return zmq_getsockopt(socket, ZMQ_LAST_ENDPOINT, out, &out_bytes) < 0 ? -zmq_errno() : 0;
}
