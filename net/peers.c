/* SPDX-License-Identifier: Apache-2.0 */
#include "net/peers.h"

#include <errno.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>

#include "base/bug.h"
#include "base/banned.h"

/* No client has an IPv6 address that begins with FF: it is for multicast. */
enum { V4_TAG_SHIFT = 56 };

static uint64_t v4_key(uint32_t host_order)
{
    return (uint64_t)0xFF << V4_TAG_SHIFT | host_order;
}

static uint64_t v6_key(const uint8_t a[16])
{
    static const uint8_t mapped[12] = {[10] = 0xFF, [11] = 0xFF};
    uint64_t key = 0;
    if (memcmp(a, mapped, sizeof mapped) == 0)
        return v4_key((uint32_t)a[12] << 24 | (uint32_t)a[13] << 16 | (uint32_t)a[14] << 8 | a[15]);
    for (int i = 0; i < 8; i++)
        key = key << 8 | a[i];
    return key ? key : 1; /* ::1 */
}

uint64_t td_peer_key(const struct sockaddr *addr)
{
    if (addr->sa_family == AF_INET)
        return v4_key(ntohl(((const struct sockaddr_in *)(const void *)addr)->sin_addr.s_addr));
    if (addr->sa_family == AF_INET6)
        return v6_key(((const struct sockaddr_in6 *)(const void *)addr)->sin6_addr.s6_addr);
    return 0;
}

void td_peers_init(td_peers *p)
{
    td_map_init(&p->counts);
}

void td_peers_done(td_peers *p)
{
    uint64_t key;
    void *count;
    for (size_t it = 0; td_map_next(&p->counts, &it, &key, &count);)
        free(count);
    td_map_done(&p->counts);
}

int64_t td_peers_add(td_peers *p, uint64_t key)
{
    if (key == 0)
        return 0;
    uint32_t *count = td_map_get(&p->counts, key);
    if (count)
        return ++*count;
    count = calloc(1, sizeof *count);
    if (!count || td_map_put(&p->counts, key, count, NULL) < 0) {
        free(count);
        return -ENOMEM;
    }
    return *count = 1;
}

void td_peers_drop(td_peers *p, uint64_t key)
{
    if (key == 0)
        return;
    uint32_t *count = td_map_get(&p->counts, key);
    TD_BUG_ON(!count);
    if (--*count == 0)
        free(td_map_del(&p->counts, key));
}
