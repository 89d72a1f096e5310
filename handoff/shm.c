/* SPDX-License-Identifier: Apache-2.0 */
#include "handoff/shm.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/bug.h"
#include "base/banned.h"

enum { BACKLOG = 64 };

td_kv_transport td_kv_transport_of(const char *word)
{
    if (strcmp(word, "zmq") == 0)
        return TD_KV_ZMQ;
    return strcmp(word, "shm") == 0 ? TD_KV_SHM : TD_KV_AUTO;
}

int td_shm_path(const char *kv_endpoint, const uint8_t nonce[TD_SHM_NONCE_BYTES],
                char ret_path[TD_SHM_PATH_MAX], td_err *reterr_err)
{
    static const char ipc[] = "ipc:///";
    char path[TD_SHM_PATH_MAX];
    int n = 0;
    if (strncmp(kv_endpoint, ipc, sizeof ipc - 1) == 0) {
        n = snprintf(path, sizeof path, "%s.shm", kv_endpoint + sizeof ipc - 2);
    } else {
        n = snprintf(path, sizeof path, "@tandem-kv-");
        for (int i = 0; i < TD_SHM_NONCE_BYTES / 2; i++)
            n += snprintf(path + n, sizeof path - (size_t)n, "%02x", nonce[i]);
    }
    if ((size_t)n >= sizeof path)
        return td_err_set(reterr_err, -ENAMETOOLONG,
                          "%s.shm: longer than the %d bytes of a socket's path; choose a shorter "
                          "--kv-listen",
                          kv_endpoint, TD_SHM_PATH_MAX - 1);
    memcpy(ret_path, path, sizeof path);
    return 0;
}

static int address(const char *path, struct sockaddr_un *ret_addr, socklen_t *ret_len)
{
    size_t n = strlen(path);
    if (n < 2 || n >= sizeof ret_addr->sun_path || (path[0] != '/' && path[0] != '@'))
        return -EINVAL;
    *ret_addr = (struct sockaddr_un){.sun_family = AF_UNIX};
    memcpy(ret_addr->sun_path, path, n);
    if (path[0] == '@')
        ret_addr->sun_path[0] = 0;
    *ret_len = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + n + (path[0] == '/'));
    return 0;
}

int td_shm_listen(const char *path)
{
    struct sockaddr_un a;
    socklen_t len;
    int r = address(path, &a, &len);
    if (r < 0)
        return r;
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return -errno;
    if (path[0] == '/')
        (void)unlink(path); /* of a process that was killed; the KV endpoint beside it is ours */
    /* the mode before bind(): there is no moment at which others may connect */
    if (fchmod(fd, 0600) < 0 || bind(fd, (struct sockaddr *)&a, len) < 0 ||
        listen(fd, BACKLOG) < 0) {
        r = -errno;
        close(fd);
        return r;
    }
    return fd;
}

int td_shm_connect(const char *path)
{
    struct sockaddr_un a;
    socklen_t len;
    int r = address(path, &a, &len);
    if (r < 0)
        return r;
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return -errno;
    if (connect(fd, (struct sockaddr *)&a, len) < 0) {
        r = -errno;
        close(fd);
        return r;
    }
    return fd;
}

int td_shm_peer_uid(int fd, uid_t *ret_uid)
{
    struct ucred c;
    socklen_t n = sizeof c;
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &c, &n) < 0)
        return -errno;
    *ret_uid = c.uid;
    return 0;
}

int td_shm_send(int fd, const void *p, size_t n, const int *fds, unsigned n_fds)
{
    union {
        char bytes[CMSG_SPACE(2 * sizeof(int))];
        struct cmsghdr align;
    } control = {{0}};
    struct iovec v = {(void *)(uintptr_t)p, n};
    struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1};
    TD_BUG_ON(n_fds > 2);
    if (n_fds) {
        m.msg_control = control.bytes;
        m.msg_controllen = CMSG_SPACE(n_fds * sizeof(int));
        struct cmsghdr *h = CMSG_FIRSTHDR(&m);
        h->cmsg_level = SOL_SOCKET;
        h->cmsg_type = SCM_RIGHTS;
        h->cmsg_len = CMSG_LEN(n_fds * sizeof(int));
        memcpy(CMSG_DATA(h), fds, n_fds * sizeof(int));
    }
    ssize_t sent = sendmsg(fd, &m, MSG_NOSIGNAL | MSG_DONTWAIT);
    return sent < 0 ? -errno : (size_t)sent == n ? 0 : -EIO;
}

/* Keep the first two descriptors of a message; close what is beyond them. */
static unsigned take_fds(struct msghdr *m, int fds[2], int *ret_too_many)
{
    unsigned n = 0;
    for (struct cmsghdr *h = CMSG_FIRSTHDR(m); h; h = CMSG_NXTHDR(m, h)) {
        if (h->cmsg_level != SOL_SOCKET || h->cmsg_type != SCM_RIGHTS)
            continue;
        for (size_t i = 0; CMSG_LEN((i + 1) * sizeof(int)) <= h->cmsg_len; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(h) + i * sizeof fd, sizeof fd);
            if (n < 2) {
                fds[n++] = fd;
            } else {
                *ret_too_many = 1;
                close(fd);
            }
        }
    }
    return n;
}

int td_shm_recv(int fd, void *p, size_t cap, int ret_fds[2], unsigned *ret_n_fds)
{
    union {
        char bytes[CMSG_SPACE(4 * sizeof(int))];
        struct cmsghdr align;
    } control;
    struct iovec v = {p, cap};
    struct msghdr m = {.msg_iov = &v,
                       .msg_iovlen = 1,
                       .msg_control = control.bytes,
                       .msg_controllen = sizeof control.bytes};
    int too_many = 0;
    *ret_n_fds = 0;
    ssize_t n = recvmsg(fd, &m, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (n < 0)
        return -errno;
    *ret_n_fds = take_fds(&m, ret_fds, &too_many);
    /* descriptors that did not fit the control buffer were never installed */
    return too_many || (m.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) ? -EPROTO : (int)n;
}
