/* SPDX-License-Identifier: Apache-2.0 */
#include "rpc/network.h"

#include <arpa/inet.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/banned.h"

enum { BITS_MIN = 8 };

/* Bytes of the address, 0 when it is none. */
static unsigned parse_address(const char *text, uint8_t out[16])
{
    memset(out, 0, 16);
    if (inet_pton(AF_INET, text, out) == 1)
        return 4;
    return inet_pton(AF_INET6, text, out) == 1 ? 16 : 0;
}

static int bits_equal(const uint8_t *a, const uint8_t *b, unsigned bits)
{
    unsigned whole = bits / 8, rest = bits % 8;
    if (memcmp(a, b, whole) != 0)
        return 0;
    return !rest || (a[whole] ^ b[whole]) >> (8 - rest) == 0;
}

static int parse_bits(const char *text, unsigned max, unsigned *ret_bits)
{
    char *end;
    if (text[0] < '0' || text[0] > '9')
        return -EINVAL;
    unsigned long v = strtoul(text, &end, 10);
    *ret_bits = (unsigned)v;
    return *end == 0 && v <= max ? 0 : -EINVAL;
}

int td_network_parse(const char *text, td_network *ret_network, td_err *reterr_err)
{
    td_network n = {.bytes = 0};
    char copy[64];
    const char *slash = strchr(text, '/');
    int len = snprintf(copy, sizeof copy, "%.*s", slash ? (int)(slash - text) : 0, text);
    if (slash && len > 0 && len < (int)sizeof copy)
        n.bytes = parse_address(copy, n.address);
    if (!n.bytes || parse_bits(slash + 1, n.bytes * 8, &n.bits) < 0)
        return td_err_set(reterr_err, -EINVAL,
                          "%.80s: not a network: write ADDRESS/BITS, e.g. 10.1.0.0/16", text);
    if (n.bits < BITS_MIN)
        return td_err_set(reterr_err, -EINVAL,
                          "%.80s: more than a network of one's own: at least /%d", text, BITS_MIN);
    for (unsigned i = n.bits; i < n.bytes * 8; i++)
        if (n.address[i / 8] & (0x80 >> i % 8))
            return td_err_set(reterr_err, -EINVAL,
                              "%.80s: bits are set behind the prefix: write the network's address",
                              text);
    *ret_network = n;
    return 0;
}

int td_network_has(const td_network *n, const char *address)
{
    uint8_t a[16];
    return parse_address(address, a) == n->bytes && bits_equal(a, n->address, n->bits);
}
