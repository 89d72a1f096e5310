/* SPDX-License-Identifier: Apache-2.0 */
/* Messages to and from workers. Ids travel as u32 little-endian, which is this machine's order. */
#include <errno.h>
#include <string.h>

#include "base/bug.h"
#include "router/dispatch_int.h"
#include "base/banned.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "ids are copied as they lie in memory");

static void *scratch_alloc(void *arg, size_t n)
{
    return td_arena_alloc(arg, n);
}

static void scratch_free(void *arg, void *p) {}

ProtobufCAllocator td_wire_allocator(td_dispatch *d)
{
    return (ProtobufCAllocator){scratch_alloc, scratch_free, &d->scratch};
}

static ProtobufCBinaryData bytes_of(const void *p, size_t n)
{
    return (ProtobufCBinaryData){n, (uint8_t *)p};
}

static void fill_sampling(const td_gen_spec *s, Tandem__V1__SamplingParams *m)
{
    tandem__v1__sampling_params__init(m);
    m->has_temperature = m->has_top_p = m->has_min_p = m->has_top_k = 1;
    m->temperature = s->temperature;
    m->top_p = s->top_p;
    m->min_p = s->min_p;
    m->top_k = s->top_k;
    m->has_frequency_penalty = m->has_presence_penalty = m->has_repetition_penalty = 1;
    m->frequency_penalty = s->frequency_penalty;
    m->presence_penalty = s->presence_penalty;
    m->repetition_penalty = s->repetition_penalty;
    m->seed = s->seed;
}

static int fill_bias(td_dispatch *d, const td_gen_spec *s, Tandem__V1__SamplingParams *m)
{
    Tandem__V1__LogitBias *v = td_arena_alloc_array(&d->scratch, s->n_bias, sizeof *v);
    Tandem__V1__LogitBias **p = td_arena_alloc_array(&d->scratch, s->n_bias, sizeof *p);
    if (!v || !p)
        return -ENOMEM;
    for (uint32_t i = 0; i < s->n_bias; i++) {
        tandem__v1__logit_bias__init(&v[i]);
        v[i].id = s->bias[i].id;
        v[i].bias = s->bias[i].bias;
        p[i] = &v[i];
    }
    m->logit_bias = p;
    m->n_logit_bias = s->n_bias;
    return 0;
}

/* Unfinished choices with what was delivered of them. */
static int fill_emitted(td_gen *g, Tandem__V1__Request *m)
{
    td_arena *a = &g->dispatch->scratch;
    if (!td_life_is_resume(&g->life))
        return 0;
    Tandem__V1__Emitted *v = td_arena_alloc_array(a, g->spec.n, sizeof *v);
    Tandem__V1__Emitted **p = td_arena_alloc_array(a, g->spec.n, sizeof *p);
    if (!v || !p)
        return -ENOMEM;
    m->emitted = p;
    for (uint32_t i = 0; i < g->spec.n; i++) {
        if (!td_life_choice_is_open(&g->life, i))
            continue;
        Tandem__V1__Emitted *e = &v[m->n_emitted];
        tandem__v1__emitted__init(e);
        e->choice = i;
        e->ids = bytes_of(g->emitted[i].ids, g->emitted[i].n * sizeof(uint32_t));
        p[m->n_emitted++] = e;
    }
    return 0;
}

static int fill_request(td_gen *g, Tandem__V1__Request *m, Tandem__V1__SamplingParams *sampling)
{
    const td_gen_spec *s = &g->spec;
    tandem__v1__request__init(m);
    fill_sampling(s, sampling);
    if (s->n_bias && fill_bias(g->dispatch, s, sampling) < 0)
        return -ENOMEM;
    m->request_id = bytes_of(s->request_id.ptr, s->request_id.len);
    m->prompt = bytes_of(s->prompt, s->n_prompt * sizeof(uint32_t));
    m->sampling = sampling;
    m->max_tokens = s->max_tokens;
    m->has_min_tokens = m->has_ignore_eos = m->has_n = m->has_logprobs = m->has_top_logprobs = 1;
    m->min_tokens = s->min_tokens;
    m->ignore_eos = s->ignore_eos != 0;
    m->n = s->n;
    m->logprobs = s->logprobs != 0;
    m->top_logprobs = s->top_logprobs;
    m->has_prompt_logprobs = 1;
    m->prompt_logprobs = s->prompt_logprobs && !g->prompt_sent;
    m->has_stop_ids = s->n_stop_ids > 0;
    m->stop_ids = bytes_of(s->stop_ids, s->n_stop_ids * sizeof(uint32_t));
    m->prefix_key = bytes_of(s->prefix_key, sizeof s->prefix_key);
    m->has_tenant = s->tenant.len > 0;
    m->tenant = bytes_of(s->tenant.ptr, s->tenant.len);
    m->has_priority = s->priority != 0;
    m->priority = s->priority;
    return fill_emitted(g, m);
}

static int pack(td_dispatch *d, const ProtobufCMessage *m)
{
    size_t n = protobuf_c_message_get_packed_size(m);
    td_strbuf_reset(&d->pack);
    uint8_t *p = td_arena_alloc(&d->scratch, n);
    if (!p)
        return -ENOMEM;
    protobuf_c_message_pack(m, p);
    td_strbuf_add(&d->pack, p, n);
    return d->pack.failed ? -ENOMEM : 0;
}

int td_wire_pack_reserve(td_gen *g)
{
    Tandem__V1__Request request;
    Tandem__V1__SamplingParams sampling;
    Tandem__V1__ReserveRequest m = TANDEM__V1__RESERVE_REQUEST__INIT;
    int e = fill_request(g, &request, &sampling);
    if (e < 0)
        return e;
    m.request = &request;
    m.attempt = g->life.attempt;
    m.has_local_tokens = g->life.config.allow_local != 0;
    m.local_tokens = m.has_local_tokens ? g->dispatch->config.local_tokens : 0;
    return pack(g->dispatch, &m.base);
}

int td_wire_pack_prefill(td_gen *g)
{
    Tandem__V1__Request request;
    Tandem__V1__SamplingParams sampling;
    Tandem__V1__PrefillRequest m = TANDEM__V1__PREFILL_REQUEST__INIT;
    int e = fill_request(g, &request, &sampling);
    if (e < 0)
        return e;
    m.request = &request;
    m.attempt = g->life.attempt;
    m.ticket = (Tandem__V1__Ticket *)g->ticket;
    return pack(g->dispatch, &m.base);
}

static int is_array(const ProtobufCBinaryData *b, size_t n)
{
    return b->len == n * 4 && ((uintptr_t)b->data & 3) == 0;
}

/* Logprobs become JSON: nothing but numbers up to 0 (and -inf, which has a form there). */
static int are_logprobs(const ProtobufCBinaryData *b, size_t n)
{
    const float *v = (const float *)(const void *)b->data;
    if (!is_array(b, n))
        return 0;
    for (size_t i = 0; i < n; i++)
        if (!(v[i] <= 1e-3f))
            return 0;
    return 1;
}

static int are_ids(const td_dispatch *d, const ProtobufCBinaryData *b, size_t n)
{
    const uint32_t *v = (const uint32_t *)(const void *)b->data;
    if (!is_array(b, n))
        return 0;
    for (size_t i = 0; i < n; i++)
        if (v[i] >= d->config.vocab_size)
            return 0;
    return 1;
}

static const td_gen_top *top_views(const td_gen *g, Tandem__V1__TopLogprob *const *top, size_t n)
{
    td_dispatch *d = g->dispatch;
    td_gen_top *v = td_arena_alloc_array(&d->scratch, n, sizeof *v);
    if (!v)
        return NULL;
    for (size_t i = 0; i < n; i++) {
        size_t k = top[i]->ids.len / 4;
        if (k > g->spec.top_logprobs || !are_ids(d, &top[i]->ids, k) ||
            !are_logprobs(&top[i]->logprobs, k))
            return NULL;
        v[i] = (td_gen_top){(const uint32_t *)(const void *)top[i]->ids.data,
                            (const float *)(const void *)top[i]->logprobs.data, (uint32_t)k};
    }
    return v;
}

int td_wire_run(td_gen *g, const struct Tandem__V1__TokenRun *m, td_life_run *ret_life,
                td_gen_run *ret_run)
{
    size_t n = m->ids.len / 4;
    const uint32_t *ids = (const uint32_t *)(const void *)m->ids.data;
    td_gen_run r = {.choice = m->choice, .index = m->index, .ids = ids, .n = n};
    if (n == 0 || n > g->spec.max_tokens || !are_ids(g->dispatch, &m->ids, n))
        return -EBADMSG;
    if (m->has_finish && m->finish != TANDEM__V1__FINISH__FINISH_NONE) {
        if (m->finish != TANDEM__V1__FINISH__FINISH_STOP &&
            m->finish != TANDEM__V1__FINISH__FINISH_LENGTH)
            return -EBADMSG;
        r.finish = m->finish == TANDEM__V1__FINISH__FINISH_STOP ? 1 : 2;
    }
    if (g->spec.logprobs) {
        if (!m->has_logprobs || !are_logprobs(&m->logprobs, n))
            return -EBADMSG;
        r.logprobs = (const float *)(const void *)m->logprobs.data;
        if (g->spec.top_logprobs) {
            r.top = m->n_top == n ? top_views(g, m->top, n) : NULL;
            if (!r.top)
                return -EBADMSG;
        }
    }
    *ret_life = (td_life_run){m->choice, m->index, ids, (uint32_t)n, r.finish};
    *ret_run = r;
    return 0;
}

int td_wire_prompt(td_gen *g, const struct Tandem__V1__PromptLogprobs *m,
                   const float **ret_logprobs, const td_gen_top **ret_top)
{
    size_t n = g->spec.n_prompt - 1;
    if (!are_logprobs(&m->logprobs, n))
        return -EBADMSG;
    const td_gen_top *top = NULL;
    if (g->spec.top_logprobs) {
        top = m->n_top == n ? top_views(g, m->top, n) : NULL;
        if (!top)
            return -EBADMSG;
    }
    *ret_logprobs = (const float *)(const void *)m->logprobs.data;
    *ret_top = top;
    return 0;
}
