/* SPDX-License-Identifier: Apache-2.0 */
/* Threads that turn request bodies into ids, so that the loop never parses a body. Bounded: full
 * says full. submit and the done callbacks: loop thread. */
#ifndef TD_ROUTER_TEXT_POOL_H
#define TD_ROUTER_TEXT_POOL_H

#include "net/loop.h"
#include "router/request.h"

typedef struct td_text_pool td_text_pool;

typedef struct td_text_job {
    td_api api;
    td_request_context ctx;
    char *body; /* owned; parsed when rpc is 0 */
    size_t body_len;
    int rpc;       /* parameters were filled from the client RPC; finish them with input */
    json_t *input; /* owned; an array of messages, a prompt string, or NULL */
    td_arena arena;
    td_params params;
    td_request_error error;
    int result;                                       /* 0, or -EINVAL with error */
    void (*done)(void *arg, struct td_text_job *job); /* on the loop; the callee frees the job */
    void *arg;
    struct td_text_job *next;
} td_text_job;

/* Arena limited to a multiple of max_body_bytes. max_jobs: waiting and running together. */
int td_text_pool_new(td_loop *l, uint32_t n_threads, uint32_t max_jobs, td_text_pool **ret_pool,
                     td_err *reterr_err);
/* Waits for running jobs; every job that is left ends with done() and the error DRAINING. */
void td_text_pool_free(td_text_pool *p);
/* 0 (done follows), or -EAGAIN when full: the job stays the caller's. */
int td_text_pool_submit(td_text_pool *p, td_text_job *job);

/* New job with an arena; body is copied. NULL: out of memory. */
td_text_job *td_text_job_new(td_api api, const td_request_context *ctx, td_str body);
void td_text_job_free(td_text_job *job);

#endif
