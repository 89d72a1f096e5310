/* SPDX-License-Identifier: Apache-2.0 */
/* CURVE key pairs and the allow-list of a cluster, as files.
 *
 * A secret file holds one Z85 secret key (40 characters); the public key follows from it. It must
 * be readable by its owner only (files in systemd's credentials directory: also by the group, which
 * is how its access list shows in the mode).
 *
 * The peers file is the allow-list, the same for every process of a cluster: a line
 * `ROLE NAME PUBLIC-KEY` for each process and each client; a line that starts with `#` is a
 * comment. Nobody but its owner may write it. Who is not in it gets in nowhere. */
#ifndef TD_RPC_CURVE_H
#define TD_RPC_CURVE_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"

enum {
    TD_CURVE_KEY_BYTES = 32,
    TD_CURVE_TEXT_BYTES = 41, /* Z85 and NUL */
    TD_PEER_NAME_MAX = 64,
    TD_PEERS_MAX = 4096
};

/* One bit each: a door admits a set. */
typedef enum td_role {
    TD_ROLE_ROUTER = 1,
    TD_ROLE_PREFILL = 2,
    TD_ROLE_DECODE = 4,
    TD_ROLE_CLIENT = 8
} td_role;

const char *td_role_name(td_role role);
/* 0 when there is no such role. */
td_role td_role_by_name(const char *name, size_t n);

typedef struct td_curve_pair {
    uint8_t public_key[TD_CURVE_KEY_BYTES], secret_key[TD_CURVE_KEY_BYTES];
} td_curve_pair;

/* A new key pair. -ENOTSUP with text: this libzmq was built without CURVE. */
int td_curve_generate(td_curve_pair *ret_pair, td_err *reterr_err);
/* Read a secret file. -EPERM others may read it; -EINVAL not a key; ... with text. */
int td_curve_load(const char *path, td_curve_pair *ret_pair, td_err *reterr_err);
/* 40 characters of Z85 and back. -EINVAL: not 40 characters, or not Z85 of 32 bytes. */
void td_curve_text(const uint8_t key[TD_CURVE_KEY_BYTES], char out[TD_CURVE_TEXT_BYTES]);
int td_curve_parse(const char *text, size_t n, uint8_t ret_key[TD_CURVE_KEY_BYTES]);

typedef struct td_peer {
    td_role role;
    char name[TD_PEER_NAME_MAX + 1];
    uint8_t key[TD_CURVE_KEY_BYTES];
} td_peer;

typedef struct td_peers td_peers;

/* Names and keys are unique. -EPERM others may write the file; -EINVAL with file and line. */
int td_peers_load(const char *path, td_peers **ret_peers, td_err *reterr_err);
/* The same from text; path is for messages. */
int td_peers_parse(const char *path, const char *text, size_t n, td_peers **ret_peers,
                   td_err *reterr_err);
void td_peers_free(td_peers *p);
/* NULL: not in the list. */
const td_peer *td_peers_find(const td_peers *p, const uint8_t key[TD_CURVE_KEY_BYTES]);
/* The one peer of this role; NULL when there is none or more than one (*ret_n says how many). */
const td_peer *td_peers_only(const td_peers *p, td_role role, size_t *ret_n);

#endif
