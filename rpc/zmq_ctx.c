/* SPDX-License-Identifier: Apache-2.0 */
#include "rpc/zmq_ctx.h"

#include <pthread.h>
#include <zmq.h>

#include "base/bug.h"
#include "base/banned.h"

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static void *context;
static unsigned n_refs;

void *td_zmq_context_ref(void)
{
    pthread_mutex_lock(&lock);
    if (!context) {
        context = zmq_ctx_new();
        if (context)
            zmq_ctx_set(context, ZMQ_BLOCKY, 0); /* a forgotten LINGER may not hang the exit */
    }
    n_refs += context != NULL;
    void *c = context;
    pthread_mutex_unlock(&lock);
    return c;
}

void td_zmq_context_unref(void)
{
    pthread_mutex_lock(&lock);
    TD_BUG_ON(n_refs == 0);
    void *last = --n_refs == 0 ? context : NULL;
    if (last)
        context = NULL;
    pthread_mutex_unlock(&lock);
    if (last)
        zmq_ctx_term(last);
}
