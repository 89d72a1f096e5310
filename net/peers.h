/* SPDX-License-Identifier: Apache-2.0 */
/* How many connections each client address holds: one client must not take them all. An IPv4
 * address counts by itself, IPv6 by its /64, which is what one client is given. Local sockets are
 * not counted. Loop thread only. */
#ifndef TD_NET_PEERS_H
#define TD_NET_PEERS_H

#include <stdint.h>
#include <sys/socket.h>

#include "base/map.h"

typedef struct td_peers {
    td_map counts;
} td_peers;

/* What an address counts as; 0: not counted. */
uint64_t td_peer_key(const struct sockaddr *addr);

void td_peers_init(td_peers *p);
void td_peers_done(td_peers *p);
/* One connection more. Returns how many there are now, 0 for key 0, or -ENOMEM (nothing changed).
 */
int64_t td_peers_add(td_peers *p, uint64_t key);
/* One that was added is gone. */
void td_peers_drop(td_peers *p, uint64_t key);

#endif
