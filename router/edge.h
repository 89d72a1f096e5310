/* SPDX-License-Identifier: Apache-2.0 */
/* The router's HTTP edge: routes, keys, and the life of an API request between the HTTP server, the
 * text pool and the dispatcher. Loop thread only. */
#ifndef TD_ROUTER_EDGE_H
#define TD_ROUTER_EDGE_H

#include "base/list.h"
#include "net/http.h"
#include "net/metrics.h"
#include "router/card.h"
#include "router/dispatch.h"
#include "router/keys.h"
#include "router/text_pool.h"

typedef struct td_edge td_edge;

typedef struct td_edge_config {
    const char *listen;
    int listen_fd; /* inherited socket when >= 0: listen is then ignored */
    const td_card *card;
    td_dispatch *dispatch;
    td_text_pool *pool;
    td_metrics *metrics;
    const td_keys *keys; /* NULL: open (loopback only) */
    const td_link *link; /* for /metrics */
    const uint8_t *prefix_secret;
    size_t prefix_secret_bytes;
    size_t max_body_bytes;
    uint32_t max_conns, max_conns_per_addr;
    uint32_t keepalive_s; /* 0 = never */
    uint64_t timeout_us;  /* of a request */
    int strict;
    const char *version;
} td_edge_config;

/* config is copied; what it points to must outlive the edge. */
int td_edge_open(td_loop *l, const td_edge_config *config, td_edge **ret_edge, td_err *reterr_err);
const char *td_edge_addr(const td_edge *e);
/* Stop accepting connections and refuse new requests with 503; running ones go on. */
void td_edge_drain(td_edge *e);
/* Requests that have not been answered yet. */
uint32_t td_edge_running(const td_edge *e);
/* Ends what is left with DRAINING errors. */
void td_edge_close(td_edge *e);

#endif
