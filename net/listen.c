/* SPDX-License-Identifier: Apache-2.0 */
#include "net/listen.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/banned.h"

/* 2,000 clients that connect at once must not wait for SYN retries (measured: 4-7 s with 128). */
enum { BACKLOG = 4096 };

static int parse_port(const char *s, uint16_t *ret_port)
{
    char *end;
    if (*s < '0' || *s > '9')
        return -EINVAL;
    unsigned long v = strtoul(s, &end, 10);
    if (*end || v > 65535)
        return -EINVAL;
    *ret_port = (uint16_t)v;
    return 0;
}

static int parse_v6(const char *host, uint16_t port, struct sockaddr_storage *ret_addr,
                    socklen_t *ret_len)
{
    struct sockaddr_in6 *a = (void *)ret_addr;
    *a = (struct sockaddr_in6){.sin6_family = AF_INET6, .sin6_port = htons(port)};
    *ret_len = sizeof *a;
    return inet_pton(AF_INET6, host, &a->sin6_addr) == 1 ? 0 : -EINVAL;
}

static int parse_v4(const char *host, uint16_t port, struct sockaddr_storage *ret_addr,
                    socklen_t *ret_len)
{
    struct sockaddr_in *a = (void *)ret_addr;
    *a = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons(port)};
    *ret_len = sizeof *a;
    return inet_pton(AF_INET, host, &a->sin_addr) == 1 ? 0 : -EINVAL;
}

int td_addr_parse(const char *text, struct sockaddr_storage *ret_addr, socklen_t *ret_len,
                  td_err *reterr_err)
{
    const char *colon = strrchr(text, ':');
    char host[64];
    uint16_t port;
    size_t n = colon ? (size_t)(colon - text) : 0;
    if (!colon || n >= sizeof host || parse_port(colon + 1, &port))
        return td_err_set(
            reterr_err, -EINVAL,
            "listen address `%.80s`: write ADDRESS:PORT, e.g. 127.0.0.1:8080 or [::1]:8080", text);
    memcpy(host, text, n);
    host[n] = 0;
    if (n == 0 || !strcmp(host, "*"))
        return td_err_set(
            reterr_err, -EINVAL,
            "listen address `%.80s` means every interface: name the one address to listen on, e.g. "
            "127.0.0.1%s",
            text, colon);
    memset(ret_addr, 0, sizeof *ret_addr);
    int r;
    if (host[0] == '[' && host[n - 1] == ']') {
        host[n - 1] = 0;
        r = parse_v6(host + 1, port, ret_addr, ret_len);
    } else {
        r = parse_v4(host, port, ret_addr, ret_len);
    }
    if (r)
        return td_err_set(reterr_err, -EINVAL,
                          "listen address `%.80s`: `%.63s` is not a literal address; names are not "
                          "looked up, write "
                          "e.g. 127.0.0.1%s or [::1]%s",
                          text, host, colon, colon);
    return 0;
}

void td_addr_text(const struct sockaddr *addr, char out[TD_ADDR_TEXT])
{
    char host[INET6_ADDRSTRLEN] = "?";
    if (addr->sa_family == AF_INET) {
        const struct sockaddr_in *a = (const void *)addr;
        inet_ntop(AF_INET, &a->sin_addr, host, sizeof host);
        snprintf(out, TD_ADDR_TEXT, "%s:%u", host, ntohs(a->sin_port));
    } else if (addr->sa_family == AF_INET6) {
        const struct sockaddr_in6 *a = (const void *)addr;
        inet_ntop(AF_INET6, &a->sin6_addr, host, sizeof host);
        snprintf(out, TD_ADDR_TEXT, "[%s]:%u", host, ntohs(a->sin6_port));
    } else {
        snprintf(out, TD_ADDR_TEXT, "unix");
    }
}

static int v4_kind(uint32_t host_order, int *ret_wildcard)
{
    *ret_wildcard = host_order == INADDR_ANY;
    return host_order >> 24 == 127;
}

/* 1 for loopback and local sockets. */
static int is_local(const struct sockaddr *addr, int *ret_wildcard)
{
    *ret_wildcard = 0;
    if (addr->sa_family == AF_INET)
        return v4_kind(ntohl(((const struct sockaddr_in *)(const void *)addr)->sin_addr.s_addr),
                       ret_wildcard);
    if (addr->sa_family != AF_INET6)
        return addr->sa_family == AF_UNIX;
    const struct in6_addr *a = &((const struct sockaddr_in6 *)(const void *)addr)->sin6_addr;
    if (IN6_IS_ADDR_V4MAPPED(a)) {
        uint32_t v4;
        memcpy(&v4, a->s6_addr + 12, sizeof v4);
        return v4_kind(ntohl(v4), ret_wildcard);
    }
    *ret_wildcard = IN6_IS_ADDR_UNSPECIFIED(a);
    return IN6_IS_ADDR_LOOPBACK(a);
}

int td_listen_check(const struct sockaddr *addr, int allow_nonloopback, td_err *reterr_err)
{
    char text[TD_ADDR_TEXT];
    int wildcard, local = is_local(addr, &wildcard);
    td_addr_text(addr, text);
    if (wildcard)
        return td_err_set(
            reterr_err, -EINVAL,
            "listen address %s means every interface: name the one address to listen on", text);
    if (!local && !allow_nonloopback)
        return td_err_set(
            reterr_err, -EPERM,
            "listen address %s is reachable from other machines, and no API keys are set: give "
            "--api-keys FILE, or listen on 127.0.0.1",
            text);
    return 0;
}

static int prepare(int fd, int family)
{
    int one = 1;
    int fl = fcntl(fd, F_GETFL);
    if (fl < 0 || fcntl(fd, F_SETFL, fl | O_NONBLOCK) < 0 || fcntl(fd, F_SETFD, FD_CLOEXEC) < 0)
        return -errno;
    /* without it small answers wait 40 ms for a delayed ACK */
    if (family != AF_UNIX && setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one) < 0)
        return -errno;
    return listen(fd, BACKLOG) < 0 ? -errno : 0;
}

int td_listen_open(const char *text, int allow_nonloopback, int *ret_fd, td_err *reterr_err)
{
    struct sockaddr_storage addr;
    socklen_t len;
    int one = 1;
    int r = td_addr_parse(text, &addr, &len, reterr_err);
    if (!r)
        r = td_listen_check((const struct sockaddr *)&addr, allow_nonloopback, reterr_err);
    if (r)
        return r;
    TD_AUTO_CLOSE int fd = socket(addr.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one) < 0 ||
        (addr.ss_family == AF_INET6 &&
         setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &one, sizeof one) < 0))
        return td_err_set(reterr_err, -errno, "listen on %s: %s", text, td_errno_text(errno));
    r = bind(fd, (const struct sockaddr *)&addr, len) < 0 ? -errno : prepare(fd, addr.ss_family);
    if (r == -EADDRINUSE)
        return td_err_set(
            reterr_err, r,
            "listen on %s: another program has this port; choose another with --listen", text);
    if (r == -EADDRNOTAVAIL)
        return td_err_set(reterr_err, r,
                          "listen on %s: this machine has no such address (see `ip address`)",
                          text);
    if (r)
        return td_err_set(reterr_err, r, "listen on %s: %s", text, td_errno_text(r));
    *ret_fd = fd;
    fd = -1;
    return 0;
}

int td_listen_adopt(int fd, int allow_nonloopback, td_err *reterr_err)
{
    struct sockaddr_storage addr = {0};
    socklen_t len = sizeof addr;
    if (getsockname(fd, (struct sockaddr *)&addr, &len) < 0)
        return td_err_set(reterr_err, -errno, "inherited descriptor %d is not a socket", fd);
    int r = td_listen_check((const struct sockaddr *)&addr, allow_nonloopback, reterr_err);
    if (r)
        return r;
    r = prepare(fd, addr.ss_family);
    return r ? td_err_set(reterr_err, r, "inherited socket %d: %s", fd, td_errno_text(r)) : 0;
}
