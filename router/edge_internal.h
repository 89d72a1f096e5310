/* SPDX-License-Identifier: Apache-2.0 */
/* Shared by the edge's own files only: api.c (routes) and generate.c (chat and completions). */
#ifndef TD_ROUTER_EDGE_INTERNAL_H
#define TD_ROUTER_EDGE_INTERNAL_H

#include "router/edge.h"

struct td_edge {
    td_loop *loop;
    td_edge_config cfg;
    td_http_server *http;
    td_timer *tick;   /* once a second: keep-alive comments */
    td_list requests; /* td_generate.node, running */
    uint32_t n_running;
    int draining;
    /* tokens and times are the dispatcher's figures */
    td_counter *requests_total[8], *ignored_fields, *cancelled, *errors, *refused;
    td_gauge *connections;
};

/* Answer with an error body; the request is dead afterwards. retry_after_ms 0: from the table's
 * retryable flag. */
void td_edge_fail(td_edge *e, td_http_req *req, const char *request_id, td_error error,
                  const char *text, const char *param, uint32_t retry_after_ms);
/* Answer JSON with status 200. */
void td_edge_reply(td_http_req *req, const char *request_id, const td_strbuf *body);
void td_edge_context(const td_edge *e, td_str tenant, td_request_context *ret_ctx);
/* Make "<prefix><24 hex digits>". */
void td_edge_make_id(const char *prefix, char out[48]);

/* Take over a chat or completion request. */
void td_generate_start(td_edge *e, td_http_req *req, td_api api, td_str tenant);
void td_generate_tick(td_edge *e);
void td_generate_abort_all(td_edge *e);

#endif
