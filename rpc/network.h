/* SPDX-License-Identifier: Apache-2.0 */
/* An address range as an operator writes it: 10.1.0.0/16, fd00:1::/64. Pure; any thread. */
#ifndef TD_RPC_NETWORK_H
#define TD_RPC_NETWORK_H

#include <stdint.h>

#include "base/err.h"

typedef struct td_network {
    uint8_t address[16]; /* IPv4: the first four bytes */
    unsigned bytes;      /* 4 or 16 */
    unsigned bits;       /* of the prefix */
} td_network;

/* -EINVAL with text: not ADDRESS/BITS, bits set behind the prefix, or a prefix shorter than 8. */
int td_network_parse(const char *text, td_network *ret_network, td_err *reterr_err);
/* 1 when the literal address (no port, no brackets) lies in it; 0 also when it is none. */
int td_network_has(const td_network *n, const char *address);

#endif
