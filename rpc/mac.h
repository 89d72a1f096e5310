/* SPDX-License-Identifier: Apache-2.0 */
/* Authentication of KV messages on a link that the operator calls private: AES-128-GMAC over every
 * part of a message under a key of its ticket, which travelled on the encrypted control link. Who
 * listens can read; who changes, forges, repeats or swaps a message is found out.
 *
 * On the wire it is one more part at the end, 27 bytes: field 16 of the message, so that the parts
 * behind the preamble stay one valid protobuf message: a counter of 8 bytes, little-endian, and the
 * tag of 16. The nonce is direction and counter. Both ends derive the ticket's key again from the
 * boot epochs, so no two processes ever use one nonce twice. A td_mac belongs to one thread. */
#ifndef TD_RPC_MAC_H
#define TD_RPC_MAC_H

#include <stdint.h>

#include "rpc/bulk.h"

enum { TD_MAC_KEY_BYTES = 16, TD_MAC_PART_BYTES = 27 };

/* The direction: to the decode worker, or back. */
typedef enum td_mac_way { TD_MAC_PUSH = 1, TD_MAC_ACK = 2 } td_mac_way;

typedef struct td_mac td_mac;

/* -ENOMEM, -ENOTSUP (libcrypto without AES-128-GCM) with text. */
int td_mac_new(td_mac **ret_mac, td_err *reterr_err);
void td_mac_free(td_mac *m);

/* The key of one pair of processes for one ticket. */
void td_mac_derive(const uint8_t ticket_key[TD_MAC_KEY_BYTES], const uint8_t prefill_epoch[16],
                   const uint8_t decode_epoch[16], uint8_t ret_key[TD_MAC_KEY_BYTES]);

/* The last part of a message that begins with these. Its counter is larger than that of every
 * message this td_mac, and any before it in this process, has signed. 0, or -EIO. */
int td_mac_sign(td_mac *m, const uint8_t key[TD_MAC_KEY_BYTES], td_mac_way way,
                const td_bulk_part *parts, uint32_t n, uint8_t ret_part[TD_MAC_PART_BYTES]);
/* The message taken last from b, whose last part must be a good one with a counter above
 * *inout_counter, which then becomes that. 0; -EBADMSG. */
int td_mac_check(td_mac *m, const uint8_t key[TD_MAC_KEY_BYTES], td_mac_way way, const td_bulk *b,
                 uint32_t n, uint64_t *inout_counter);

#endif
