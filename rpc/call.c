/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/bug.h"
#include "base/clock.h"
#include "rpc/rpc_int.h"
#include "base/banned.h"

enum {
    METHOD_BYTES_MAX = 128,
    METADATA_MAX = 16,
    METADATA_BYTES_MAX = 1024,
    BATCH_FLUSH_BYTES = 1 << 20
};

/* A STATUS whose text outlives the callee's: for calls finished inside a batch. */
typedef struct td_call_end {
    td_status status;
    char error[64], message[500];
} td_call_end;

const char *td_error_of_code(uint32_t code)
{
    switch (code) {
    case TD_CANCELLED:
        return td_error_get(TD_ERROR_CANCELLED)->name;
    case TD_DEADLINE_EXCEEDED:
        return td_error_get(TD_ERROR_DEADLINE)->name;
    case TD_DATA_LOSS:
        return td_error_get(TD_ERROR_DATA_LOSS)->name;
    case TD_INTERNAL:
        return td_error_get(TD_ERROR_INTERNAL)->name;
    default:
        return "";
    }
}

/* ---- outgoing ---- */

static void call_free(td_call *c)
{
    td_list_del(&c->sibling);
    td_list_del(&c->finished);
    free(c->end);
    td_session_unref(c->s);
    free(c);
}

static td_call *call_new(td_session *s)
{
    td_call *c = calloc(1, sizeof *c);
    if (!c)
        return NULL;
    c->s = td_session_ref(s);
    td_list_init(&c->sibling);
    td_list_init(&c->children);
    td_list_init(&c->finished);
    return c;
}

int td_call_start(const td_call_spec *spec, td_call **ret_call)
{
    td_session *s = spec->session;
    TD_BUG_ON(spec->timeout_us == 0 || strlen(spec->method) > METHOD_BYTES_MAX);
    if (!s->rpc || s->pending)
        return -ENOTCONN;
    if (spec->message_bytes > s->rpc->c.max_message_bytes ||
        spec->request_id.len > sizeof((td_call *)0)->request_id)
        return -E2BIG;
    td_stream_event ev = {
        .type = TD_EV_OPEN, .timeout_us = spec->timeout_us, .credit = spec->credit};
    if (spec->parent) { /* a child never outlives its parent */
        uint64_t left = td_call_remaining_us(spec->parent);
        ev.timeout_us = TD_MAX(TD_MIN(ev.timeout_us, left), 1);
    }
    td_call *c = call_new(s);
    if (!c)
        return -ENOBUFS;
    ev.user = c;
    td_stream_out out;
    int r = td_session_step(s, &ev, &(td_body){.spec = spec}, &out);
    if (r < 0) {
        call_free(c);
        return r;
    }
    c->outgoing = 1;
    c->stream = out.stream;
    c->ops = spec->ops;
    c->arg = spec->arg;
    c->manual_credit = spec->manual_credit;
    c->parent = spec->parent;
    if (c->parent)
        td_list_add(&c->parent->children, &c->sibling);
    *ret_call = c;
    if (c->parent && c->parent->cancelled)
        td_call_cancel(c, "the parent call has ended");
    return 0;
}

void td_call_cancel(td_call *c, const char *reason)
{
    td_session_step(c->s, &(td_stream_event){.type = TD_EV_CANCEL, .stream = c->stream},
                    &(td_body){.reason = reason}, NULL);
}

void td_call_consume(td_call *c, uint32_t n)
{
    td_session_step(c->s,
                    &(td_stream_event){.type = TD_EV_CONSUME, .stream = c->stream, .messages = n},
                    NULL, NULL);
}

void td_call_deliver(td_call *c, td_str message)
{
    if (c->ops.on_data)
        c->ops.on_data(c->arg, c, message);
    if (!c->manual_credit)
        td_call_consume(c, 1);
}

static const char *local_text(const td_call *c, uint32_t code)
{
    if (code == TD_UNAVAILABLE)
        return c->s->reason[0] ? c->s->reason : "the peer takes no new calls";
    return code == TD_CANCELLED ? "cancelled" : "ended on this side";
}

void td_call_ended(td_call *c, uint32_t code, int local, const Tandem__V1__Status *m)
{
    char error[64] = "", message[500] = "";
    td_status st = {.code = code, .error = error, .message = message};
    if (m) {
        td_printable(error, sizeof error, m->error.data, m->has_error ? m->error.len : 0);
        td_printable(message, sizeof message, m->message.data, m->has_message ? m->message.len : 0);
        st.retry_after_ms = m->retry_after_ms;
    } else if (local) {
        st.error = td_error_of_code(code);
        st.message = local_text(c, code);
    }
    if (c->ops.on_status)
        c->ops.on_status(c->arg, c, &st);
    call_free(c);
}

/* ---- incoming ---- */

static const char *bad_call(const Tandem__V1__Call *m)
{
    size_t n = 0;
    for (size_t i = 0; i < m->n_metadata; i++)
        n += m->metadata[i]->key.len + m->metadata[i]->value.len;
    if (m->method.len == 0 || m->method.len > METHOD_BYTES_MAX)
        return "CALL.method must have 1 to 128 bytes";
    if (m->request_id.len > sizeof((td_call *)0)->request_id)
        return "CALL.request_id has more than 64 bytes";
    if (m->n_metadata > METADATA_MAX || n > METADATA_BYTES_MAX)
        return "CALL.metadata has more than 16 entries or 1 KiB";
    if (m->traceparent.len > 128 || m->tenant.len > 256)
        return "CALL.traceparent or CALL.tenant is too long";
    return NULL;
}

static void refuse(td_session *s, uint64_t stream, uint32_t code, const char *text)
{
    td_status st = {.code = code, .message = text};
    td_stream_event ev = {.type = TD_EV_FINISH, .stream = stream, .code = code};
    td_session_step(s, &ev, &(td_body){.status = &st}, NULL);
}

void td_call_incoming(td_session *s, uint64_t stream, const Tandem__V1__Call *m)
{
    const char *why = bad_call(m);
    const td_rpc_config *rc = &s->rpc->c;
    if (why || !rc->ops.on_call) {
        refuse(s, stream, why ? TD_INVALID_ARGUMENT : TD_UNIMPLEMENTED,
               why ? why : "this side takes no calls");
        return;
    }
    td_call *c = call_new(s);
    if (!c) {
        refuse(s, stream, TD_RESOURCE_EXHAUSTED, "out of memory");
        return;
    }
    c->stream = stream;
    c->request_id_bytes = (uint32_t)m->request_id.len;
    if (m->request_id.len)
        memcpy(c->request_id, m->request_id.data, m->request_id.len);
    c->attempt = m->attempt;
    td_streams_set_user(s->streams, stream, c);
    rc->ops.on_call(rc->arg, c, (td_str){(const char *)m->method.data, m->method.len},
                    (td_str){(const char *)m->message.data, m->message.len});
}

static void cancel_children(td_call *c, const char *reason)
{
    TD_LIST_FOR (it, &c->children) {
        td_call_cancel(TD_LIST_ENTRY(it, td_call, sibling), reason);
    }
}

void td_call_abort(td_call *c, uint32_t code)
{
    if (c->cancelled)
        return;
    c->cancelled = 1;
    cancel_children(c, td_code_name(code));
    if (c->cancel_fn && !c->finishing)
        c->cancel_fn(c->cancel_arg, c);
}

void td_call_credit(td_call *c)
{
    if (c->credit_fn && !c->finishing)
        c->credit_fn(c->credit_arg, c);
}

td_session *td_call_session(const td_call *c)
{
    return c->s;
}

td_str td_call_request_id(const td_call *c)
{
    return (td_str){c->request_id, c->request_id_bytes};
}

uint32_t td_call_attempt(const td_call *c)
{
    return c->attempt;
}

uint64_t td_call_remaining_us(const td_call *c)
{
    return td_streams_remaining_us(c->s->streams, c->stream, td_now_us());
}

void td_call_on_cancel(td_call *c, void (*fn)(void *arg, td_call *c), void *arg)
{
    c->cancel_fn = fn;
    c->cancel_arg = arg;
    if (c->cancelled && fn)
        fn(arg, c);
}

int td_call_is_cancelled(const td_call *c)
{
    return c->cancelled;
}

void td_call_set_user(td_call *c, void *user)
{
    c->user = user;
}

void *td_call_user(const td_call *c)
{
    return c->user;
}

void td_call_on_credit(td_call *c, void (*fn)(void *arg, td_call *c), void *arg)
{
    c->credit_fn = fn;
    c->credit_arg = arg;
}

int td_call_send(td_call *c, const void *message, size_t n)
{
    if (c->s->batch
            .open) /* its number comes behind those in the batch, so it must travel there too */
        return td_batch_add(c, message, n);
    td_stream_event ev = {.type = TD_EV_SEND, .stream = c->stream, .bytes = n};
    return td_session_step(c->s, &ev, &(td_body){.message = {message, n}}, NULL);
}

static void finish_now(td_call *c, const td_status *status)
{
    static const td_status ok;
    const td_status *st = status ? status : &ok;
    td_stream_event ev = {.type = TD_EV_FINISH, .stream = c->stream, .code = st->code};
    cancel_children(c, "the parent call has ended");
    TD_LIST_FOR (it, &c->children) {
        TD_LIST_ENTRY(it, td_call, sibling)->parent = NULL;
        td_list_del(it);
    }
    td_session_step(c->s, &ev, &(td_body){.status = st}, NULL);
    call_free(c);
}

static td_call_end *end_of(const td_status *status)
{
    td_call_end *e = calloc(1, sizeof *e);
    if (!e)
        return NULL;
    if (status) {
        const char *error = status->error ? status->error : "",
                   *message = status->message ? status->message : "";
        td_printable(e->error, sizeof e->error, error, strlen(error));
        td_printable(e->message, sizeof e->message, message, strlen(message));
        e->status = *status;
    }
    e->status.error = e->error;
    e->status.message = e->message;
    return e;
}

static void batch_flush(td_session *s, const Tandem__V1__Load *load);

void td_call_finish(td_call *c, const td_status *status)
{
    TD_BUG_ON(c->finishing);
    if (c->n_batched == 0) {
        finish_now(c, status);
        return;
    }
    c->finishing = 1;
    c->end = end_of(status);
    if (c->end) {
        td_list_add(&c->s->batch.finished, &c->finished);
        return;
    }
    batch_flush(c->s, NULL); /* no memory to wait in */
    finish_now(c, status);
}

/* ---- batches ---- */

void td_batch_begin(td_session *s, uint64_t step)
{
    TD_BUG_ON(s->batch.open);
    s->batch.open = 1;
    s->batch.step = step;
    td_strbuf_reset(&s->batch.bytes);
}

static int batch_grow(td_batch *b)
{
    if (b->n_items < b->cap_items)
        return 0;
    uint32_t cap = b->cap_items ? b->cap_items * 2 : 64;
    td_batch_item *items = realloc(b->items, cap * sizeof *items);
    b->items = items ? items : b->items;
    Tandem__V1__BatchItem *wire = realloc(b->wire, cap * sizeof *wire);
    b->wire = wire ? wire : b->wire;
    Tandem__V1__BatchItem **ptr = realloc(b->wire_ptr, cap * sizeof *ptr);
    b->wire_ptr = ptr ? ptr : b->wire_ptr;
    if (!items || !wire || !ptr)
        return -ENOMEM;
    b->cap_items = cap;
    return 0;
}

/* After the flush nothing of these calls is behind in the batch. */
static void batch_reset(td_batch *b)
{
    for (uint32_t i = 0; i < b->n_items; i++)
        b->items[i].call->n_batched = 0;
    b->n_items = 0;
    td_strbuf_reset(&b->bytes);
}

static void batch_flush(td_session *s, const Tandem__V1__Load *load)
{
    td_batch *b = &s->batch;
    Tandem__V1__Batch m = TANDEM__V1__BATCH__INIT;
    if (b->n_items == 0 && !load)
        return;
    for (uint32_t i = 0; i < b->n_items; i++) {
        td_batch_item *it = &b->items[i];
        tandem__v1__batch_item__init(&b->wire[i]);
        b->wire[i].stream = it->call->stream;
        b->wire[i].sequence = it->sequence;
        b->wire[i].message =
            (ProtobufCBinaryData){.len = it->n, .data = (uint8_t *)b->bytes.data + it->offset};
        b->wire_ptr[i] = &b->wire[i];
    }
    m.step = b->step;
    m.n_items = b->n_items;
    m.items = b->wire_ptr;
    m.load = (Tandem__V1__Load *)(uintptr_t)load;
    td_session_step(s, &(td_stream_event){.type = TD_EV_BATCH}, &(td_body){.batch = &m}, NULL);
    batch_reset(b);
}

int td_batch_add(td_call *c, const void *message, size_t n)
{
    td_session *s = c->s;
    td_batch *b = &s->batch;
    TD_BUG_ON(!b->open);
    if (n > BATCH_FLUSH_BYTES / 2) { /* large ones travel alone, behind what the batch holds */
        batch_flush(s, NULL);
        td_stream_event ev = {.type = TD_EV_SEND, .stream = c->stream, .bytes = n};
        return td_session_step(s, &ev, &(td_body){.message = {message, n}}, NULL);
    }
    if (b->bytes.len + n > BATCH_FLUSH_BYTES)
        batch_flush(s, NULL);
    size_t offset = b->bytes.len;
    td_strbuf_add(&b->bytes, message, n);
    if (b->bytes.failed || batch_grow(b) < 0) {
        b->bytes.len = offset;
        return -ENOMEM;
    }
    td_stream_out out;
    td_stream_event ev = {.type = TD_EV_SEND, .stream = c->stream, .bytes = n, .batched = 1};
    int r = td_session_step(s, &ev, NULL, &out);
    if (r < 0) {
        b->bytes.len = offset;
        return r;
    }
    c->n_batched++;
    b->items[b->n_items++] =
        (td_batch_item){.call = c, .sequence = out.sequence, .offset = offset, .n = n};
    return 0;
}

void td_batch_end(td_session *s, const Tandem__V1__Load *load)
{
    td_session_ref(s);
    TD_BUG_ON(!s->batch.open);
    batch_flush(s, load);
    s->batch.open = 0;
    TD_LIST_FOR (it, &s->batch.finished) {
        td_call *c = TD_LIST_ENTRY(it, td_call, finished);
        td_list_del(&c->finished);
        finish_now(c, &c->end->status);
    }
    td_session_unref(s);
}

void td_batch_free(td_batch *b)
{
    free(b->items);
    free(b->wire);
    free(b->wire_ptr);
    td_strbuf_done(&b->bytes);
}
