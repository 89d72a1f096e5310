/* SPDX-License-Identifier: Apache-2.0 */
/* tandem.v1.Inference and tandem.v1.Health on the client RPC endpoint: how other services use
 * Tandem. Worker methods are never reachable here: the endpoint has its own allow-list. Loop thread
 * only. */
#ifndef TD_ROUTER_INFERENCE_H
#define TD_ROUTER_INFERENCE_H

#include "base/err.h"
#include "net/loop.h"
#include "router/card.h"
#include "router/dispatch.h"
#include "router/text_pool.h"
#include "rpc/link.h"

typedef struct td_inference td_inference;

typedef struct td_inference_config {
    const char *endpoint;
    td_link *link; /* keys; NULL: none, then loopback or ipc. Outlives the endpoint */
    const td_card *card;
    td_dispatch *dispatch;
    td_text_pool *pool;
    const uint8_t *prefix_secret;
    size_t prefix_secret_bytes;
    uint64_t timeout_us;
    int strict;
} td_inference_config;

int td_inference_open(td_loop *l, const td_inference_config *config, td_inference **ret_inference,
                      td_err *reterr_err);
const char *td_inference_endpoint(const td_inference *i);
/* Refuse new calls with UNAVAILABLE; running ones go on. */
void td_inference_drain(td_inference *i);
uint32_t td_inference_running(const td_inference *i);
void td_inference_close(td_inference *i);

#endif
