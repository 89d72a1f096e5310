/* SPDX-License-Identifier: Apache-2.0 */
/* Listening sockets, closed by default: a literal address, never a wildcard, and beyond loopback
 * only where the caller authenticates. */
#ifndef TD_NET_LISTEN_H
#define TD_NET_LISTEN_H

#include <sys/socket.h>

#include "base/err.h"

/* Room for "[address]:port" of any family. */
enum { TD_ADDR_TEXT = 120 };

/* Parse "127.0.0.1:8080" or "[::1]:8080" (port 0 allowed). -EINVAL with text. */
int td_addr_parse(const char *text, struct sockaddr_storage *ret_addr, socklen_t *ret_len,
                  td_err *reterr_err);
/* The other way; "unix" for local sockets. */
void td_addr_text(const struct sockaddr *addr, char out[TD_ADDR_TEXT]);
/* May this be bound? 0; -EINVAL for a wildcard, -EPERM beyond loopback without allow_nonloopback;
 * with text. */
int td_listen_check(const struct sockaddr *addr, int allow_nonloopback, td_err *reterr_err);

/* Bind and listen, non-blocking, backlog 4096, TCP_NODELAY (accepted sockets inherit it). */
int td_listen_open(const char *text, int allow_nonloopback, int *ret_fd, td_err *reterr_err);
/* Make an inherited socket like one of td_listen_open(), under the same rules. */
int td_listen_adopt(int fd, int allow_nonloopback, td_err *reterr_err);

#endif
