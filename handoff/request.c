/* SPDX-License-Identifier: Apache-2.0 */
#include "handoff/request.h"

#include <errno.h>
#include <string.h>

#include "handoff/shm.h"
#include "proto/engine.pb-c.h"
#include "base/banned.h"

enum { REQUEST_ID_MAX = 64, STOP_IDS_MAX = 64, TOP_MAX = 20, BIAS_MAX = 1024, ENDPOINT_MAX = 256 };

/* Ids as they lie in the message: protobuf-c allocates bytes aligned. */
static int read_ids(const ProtobufCBinaryData *b, const char *field, uint32_t vocab,
                    const uint32_t **ret_ids, size_t *ret_n, td_err *reterr_err)
{
    if (b->len % 4)
        return td_err_set(reterr_err, -EINVAL, "%s: %zu bytes are not whole ids of 4", field,
                          b->len);
    const uint32_t *ids = (const uint32_t *)(const void *)b->data;
    size_t n = b->len / 4;
    for (size_t i = 0; i < n; i++) {
        if (ids[i] >= vocab)
            return td_err_set(reterr_err, -EINVAL,
                              "%s: id %u at %zu is not below the vocabulary's %u", field, ids[i], i,
                              vocab);
    }
    *ret_ids = ids;
    *ret_n = n;
    return 0;
}

static int read_choices(td_request *r, uint32_t vocab, td_err *reterr_err)
{
    const Tandem__V1__Request *m = r->message;
    r->recovery = m->n_emitted > 0;
    r->n_choices = r->recovery ? (uint32_t)m->n_emitted : r->n;
    if (m->n_emitted > r->n)
        return td_err_set(reterr_err, -EINVAL, "emitted: %zu entries for n %u", m->n_emitted, r->n);
    for (uint32_t i = 0; i < r->n_choices; i++) {
        r->choices[i] = r->recovery ? m->emitted[i]->choice : i;
        if (!r->recovery)
            continue;
        int e = read_ids(&m->emitted[i]->ids, "emitted", vocab, &r->emitted[i], &r->n_emitted[i],
                         reterr_err);
        if (e < 0)
            return e;
        if (r->n_emitted[i] >= r->max_tokens)
            return td_err_set(reterr_err, -EINVAL,
                              "emitted: choice %u has %zu ids of max_tokens %u already",
                              r->choices[i], r->n_emitted[i], r->max_tokens);
    }
    return 0;
}

static int read_limits(td_request *r, td_err *reterr_err)
{
    const Tandem__V1__Request *m = r->message;
    if (m->request_id.len == 0 || m->request_id.len > REQUEST_ID_MAX)
        return td_err_set(reterr_err, -EINVAL, "request_id: %zu bytes, 1 to %d are allowed",
                          m->request_id.len, REQUEST_ID_MAX);
    if (r->n < 1 || r->n > TD_CHOICES_MAX)
        return td_err_set(reterr_err, -EINVAL, "n: %u is not in 1..%d", r->n, TD_CHOICES_MAX);
    if (r->max_tokens < 1)
        return td_err_set(reterr_err, -EINVAL, "max_tokens: at least 1");
    if (r->n_top > TOP_MAX)
        return td_err_set(reterr_err, -EINVAL, "top_logprobs: %u is more than %d", r->n_top,
                          TOP_MAX);
    if (m->prefix_key.len != 32)
        return td_err_set(reterr_err, -EINVAL, "prefix_key: %zu bytes instead of 32",
                          m->prefix_key.len);
    if (m->sampling->n_logit_bias > BIAS_MAX)
        return td_err_set(reterr_err, -EINVAL, "logit_bias: more than %d entries", BIAS_MAX);
    return 0;
}

int td_request_read(const Tandem__V1__Request *m, uint32_t vocab, uint32_t max_context,
                    td_request *ret_request, td_err *reterr_err)
{
    td_request r = {.message = m,
                    .sampling = m->sampling,
                    .n = m->has_n ? m->n : 1,
                    .max_tokens = m->max_tokens,
                    .min_tokens = m->has_min_tokens ? m->min_tokens : 0,
                    .ignore_eos = m->has_ignore_eos && m->ignore_eos,
                    .logprobs = m->has_logprobs && m->logprobs,
                    .n_top = m->has_top_logprobs ? m->top_logprobs : 0,
                    .prompt_logprobs = m->has_prompt_logprobs && m->prompt_logprobs,
                    .prefix_key = m->prefix_key.data};
    size_t n_stop = 0;
    int e = read_limits(&r, reterr_err);
    if (e == 0)
        e = read_ids(&m->prompt, "prompt", vocab, &r.prompt, &r.n_prompt, reterr_err);
    if (e == 0 && m->has_stop_ids)
        e = read_ids(&m->stop_ids, "stop_ids", vocab, &r.stop_ids, &n_stop, reterr_err);
    if (e == 0)
        e = read_choices(&r, vocab, reterr_err);
    if (e < 0)
        return e;
    if (r.n_prompt < 1)
        return td_err_set(reterr_err, -EINVAL, "prompt: empty");
    if (n_stop > STOP_IDS_MAX)
        return td_err_set(reterr_err, -EINVAL, "stop_ids: more than %d", STOP_IDS_MAX);
    r.n_stop_ids = (uint32_t)n_stop;
    if ((uint64_t)r.n_prompt + r.max_tokens > max_context)
        return td_err_set(reterr_err, -ERANGE,
                          "prompt of %zu tokens and max_tokens %u exceed the context of %u",
                          r.n_prompt, r.max_tokens, max_context);
    e = td_plan_init(&r.plan, r.n_prompt, r.n, r.choices, r.n_emitted,
                     r.recovery ? r.n_choices : 0);
    if (e < 0)
        return td_err_set(reterr_err, -EINVAL,
                          "emitted: choices must be ascending, below n, with at least one id each");
    *ret_request = r;
    return 0;
}

void td_request_ids(const td_request *r, uint32_t timeline, uint32_t *out)
{
    memcpy(out, r->prompt, r->n_prompt * sizeof *out);
    if (r->recovery && r->n_emitted[timeline] > 1)
        memcpy(out + r->n_prompt, r->emitted[timeline], (r->n_emitted[timeline] - 1) * sizeof *out);
}

int td_ticket_message_check(const Tandem__V1__Ticket *t, td_err *reterr_err)
{
    if (t->id.len != 16 || t->decode_epoch.len != 16 || t->layout_hash.len != 16 ||
        t->profile_id.len != 16 || t->model_hash.len != 32)
        return td_err_set(reterr_err, -EINVAL, "ticket: an id, epoch or hash has a wrong length");
    if (t->endpoint.len == 0 || t->endpoint.len >= ENDPOINT_MAX ||
        memchr(t->endpoint.data, 0, t->endpoint.len))
        return td_err_set(reterr_err, -EINVAL,
                          "ticket: endpoint has %zu bytes, 1 to %d are allowed", t->endpoint.len,
                          ENDPOINT_MAX - 1);
    if (t->has_kv_key && t->kv_key.len != 32)
        return td_err_set(reterr_err, -EINVAL, "ticket: kv_key has %zu bytes, not 32",
                          t->kv_key.len);
    if (t->has_mac_key && t->mac_key.len != 16)
        return td_err_set(reterr_err, -EINVAL, "ticket: mac_key has %zu bytes, not 16",
                          t->mac_key.len);
    int has_shm = t->has_shm_path && t->has_shm_nonce;
    if (t->has_shm_path != t->has_shm_nonce ||
        (has_shm &&
         (t->shm_path.len < 2 || t->shm_path.len >= TD_SHM_PATH_MAX ||
          memchr(t->shm_path.data, 0, t->shm_path.len) || t->shm_nonce.len != TD_SHM_NONCE_BYTES)))
        return td_err_set(reterr_err, -EINVAL,
                          "ticket: shm_path (2 to %d bytes) and shm_nonce (%d) belong together",
                          TD_SHM_PATH_MAX - 1, TD_SHM_NONCE_BYTES);
    if (t->deadline_ms == 0)
        return td_err_set(reterr_err, -EINVAL, "ticket: no time left");
    return 0;
}
