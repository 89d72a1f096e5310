/* SPDX-License-Identifier: Apache-2.0 */
/* API keys: a file of `TENANT KEY` lines; only hashes are kept, compared in constant time.
 * Immutable after load. */
#ifndef TD_ROUTER_KEYS_H
#define TD_ROUTER_KEYS_H

#include "base/err.h"
#include "base/strbuf.h"

typedef struct td_keys td_keys;

/* '#' comments and empty lines are skipped. A file that others can read is refused, keys under 16
 * bytes too. */
int td_keys_load(const char *path, td_keys **ret_keys, td_err *reterr_err);
void td_keys_free(td_keys *k);
/* 1 and the tenant's name (borrowed from k) for "Bearer KEY" or a bare key; 0 otherwise.
 * authorization may be NULL. */
int td_keys_check(const td_keys *k, const char *authorization, td_str *ret_tenant);

#endif
