/* SPDX-License-Identifier: Apache-2.0 */
/* What both kinds of worker say about themselves: HELLO, load, and the calls any worker answers on
 * its loop (GetLoads, GetModelInfo, Health/Check). Loop thread only; td_host_load is written by the
 * lane. */
#ifndef TD_HANDOFF_HOST_H
#define TD_HANDOFF_HOST_H

#include <stdatomic.h>
#include <stdint.h>

#include "engine/kv.h"
#include "handoff/shm.h"
#include "rpc/rpc.h"

/* A moment's picture of the engine. */
typedef struct td_host_load {
    _Atomic uint64_t step, tokens_total, waiting_tokens;
    _Atomic uint32_t running, waiting, kv_free, kv_reserved, draining;
} td_host_load;

typedef struct td_host {
    const td_model_info *info; /* borrowed */
    uint8_t epoch[16];
    uint32_t kv_blocks;
    char name[65], host_id[64];
    char kv_endpoint[256];
    int has_kv_key, kv_private;         /* private: each ticket has a mac key instead */
    uint8_t kv_key[TD_CURVE_KEY_BYTES]; /* of the KV socket, for tickets */
    td_shm_offer shm;                   /* for tickets; path "": none */
    struct Tandem__V1__Hello *hello;    /* for td_rpc_config; refers to this struct */
    td_host_load load;
} td_host;

typedef struct td_host_config {
    int decode;       /* role */
    const char *name; /* "": made from role and process id */
    const td_model_info *info;
    const uint8_t *epoch; /* 16 bytes, drawn at process start */
    uint32_t kv_blocks, max_seqs;
    uint32_t max_context;    /* the model's, or less if the pool is smaller */
    const char *kv_endpoint; /* decode; NULL otherwise */
    int kv_private;          /* decode: the KV link is private */
    const uint8_t *kv_key;   /* decode with keys: the KV socket's public key; NULL otherwise */
    const td_shm_offer *shm; /* decode with a door for shared memory; NULL otherwise */
} td_host_config;

/* Fills HELLO. -ENOMEM. */
int td_host_init(td_host *h, const td_host_config *config);
void td_host_done(td_host *h);

/* Of this host: equal values, one host. "" when the system does not tell, or it does not fit cap.
 */
void td_host_id(char *out, size_t cap);

void td_host_fill_load(td_host *h, struct Tandem__V1__Load *load);
/* Answer a call that every worker answers. 1 answered (the call is finished), 0 not one of them. */
int td_host_call(td_host *h, td_call *c, td_str method);
/* End a call with a row of the error table; text refines it ("" or NULL: the table's). */
void td_host_fail(td_call *c, uint32_t code, td_error error, const char *text);

/* Pack and stream one message. As td_call_send(); -ENOMEM. */
struct ProtobufCMessage;
int td_host_send(td_call *c, const struct ProtobufCMessage *message);

#endif
