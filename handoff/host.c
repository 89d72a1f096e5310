/* SPDX-License-Identifier: Apache-2.0 */
#include "handoff/host.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/file.h"
#include "base/cleanup.h"
#include "base/prefix.h"
#include "base/version.h"
#include "proto/engine.pb-c.h"
#include "proto/inference.pb-c.h"
#include "proto/rpc.pb-c.h"
#include "base/banned.h"

static ProtobufCBinaryData bin(const void *p, size_t n)
{
    return (ProtobufCBinaryData){.len = n, .data = (uint8_t *)(uintptr_t)p};
}

void td_host_id(char *out, size_t cap)
{
    TD_AUTO_FREE char *text = NULL;
    size_t n = 0;
    out[0] = 0;
    if (td_file_read("/proc/sys/kernel/random/boot_id", 256, &text, &n, NULL) < 0)
        return;
    n = strcspn(text, "\n");
    if (n < cap) {
        memcpy(out, text, n);
        out[n] = 0;
    }
}

static void fill_hello(td_host *h, const td_host_config *c)
{
    Tandem__V1__Hello *m = h->hello;
    m->has_build = 1;
    m->build = (ProtobufCBinaryData){strlen(td_build()), (uint8_t *)td_build()};
    const td_model_info *i = c->info;
    m->major = TD_WIRE_MAJOR;
    m->minor = TD_WIRE_MINOR;
    m->role = c->decode ? TANDEM__V1__ROLE__ROLE_DECODE : TANDEM__V1__ROLE__ROLE_PREFILL;
    m->epoch = bin(h->epoch, 16);
    m->has_name = 1;
    m->name = bin(h->name, strlen(h->name));
    m->has_model_hash = m->has_config_hash = m->has_tokenizer_hash = m->has_profile_id =
        m->has_profile = m->has_layout_hash = 1;
    m->model_hash = bin(i->model_hash, 32);
    m->config_hash = bin(i->config_hash, 32);
    m->tokenizer_hash = bin(i->tokenizer_hash, 32);
    m->profile_id = bin(i->profile_id, 16);
    m->profile = bin(i->profile, strlen(i->profile));
    m->layout_hash = bin(i->kv.hash, 16);
    m->has_block_tokens = m->has_kv_blocks = m->has_max_context = m->has_max_seqs = 1;
    m->block_tokens = TD_BLOCK_TOKENS;
    m->kv_blocks = c->kv_blocks;
    m->max_context = c->max_context;
    m->max_seqs = c->max_seqs;
    m->has_kv_endpoint = c->kv_endpoint != NULL;
    m->kv_endpoint = bin(h->kv_endpoint, strlen(h->kv_endpoint));
    m->has_host_id = h->host_id[0] != 0;
    m->host_id = bin(h->host_id, strlen(h->host_id));
}

int td_host_init(td_host *h, const td_host_config *c)
{
    memset(h, 0, sizeof *h);
    h->hello = malloc(sizeof *h->hello);
    if (!h->hello)
        return -ENOMEM;
    tandem__v1__hello__init(h->hello);
    h->info = c->info;
    h->kv_blocks = c->kv_blocks;
    memcpy(h->epoch, c->epoch, sizeof h->epoch);
    if (c->name && *c->name)
        snprintf(h->name, sizeof h->name, "%s", c->name);
    else
        snprintf(h->name, sizeof h->name, "%s-%ld", c->decode ? "decode" : "prefill",
                 (long)getpid());
    snprintf(h->kv_endpoint, sizeof h->kv_endpoint, "%s", c->kv_endpoint ? c->kv_endpoint : "");
    h->kv_private = c->kv_private;
    h->has_kv_key = c->kv_key != NULL;
    if (c->kv_key)
        memcpy(h->kv_key, c->kv_key, sizeof h->kv_key);
    if (c->shm)
        h->shm = *c->shm;
    td_host_id(h->host_id, sizeof h->host_id);
    fill_hello(h, c);
    return 0;
}

void td_host_done(td_host *h)
{
    free(h->hello);
    h->hello = NULL;
}

void td_host_fill_load(td_host *h, Tandem__V1__Load *m)
{
    td_host_load *l = &h->load;
    m->has_step = m->has_running = m->has_waiting = m->has_waiting_tokens = m->has_kv_blocks = 1;
    m->has_kv_free = m->has_kv_reserved = m->has_draining = m->has_tokens_total = 1;
    m->step = atomic_load_explicit(&l->step, memory_order_relaxed);
    m->running = atomic_load_explicit(&l->running, memory_order_relaxed);
    m->waiting = atomic_load_explicit(&l->waiting, memory_order_relaxed);
    m->waiting_tokens = atomic_load_explicit(&l->waiting_tokens, memory_order_relaxed);
    m->kv_blocks = h->kv_blocks;
    m->kv_free = atomic_load_explicit(&l->kv_free, memory_order_relaxed);
    m->kv_reserved = atomic_load_explicit(&l->kv_reserved, memory_order_relaxed);
    m->draining = atomic_load_explicit(&l->draining, memory_order_relaxed) != 0;
    m->tokens_total = atomic_load_explicit(&l->tokens_total, memory_order_relaxed);
}

int td_host_send(td_call *c, const ProtobufCMessage *m)
{
    size_t n = protobuf_c_message_get_packed_size(m);
    TD_AUTO_FREE uint8_t *p = malloc(n + 1);
    if (!p)
        return -ENOMEM;
    protobuf_c_message_pack(m, p);
    return td_call_send(c, p, n);
}

void td_host_fail(td_call *c, uint32_t code, td_error error, const char *text)
{
    const td_error_info *info = td_error_get(error);
    td_status s = {.code = code,
                   .error = error ? info->name : "",
                   .message = text && *text ? text : info->text};
    td_call_finish(c, &s);
}

static void answer(td_call *c, const ProtobufCMessage *m)
{
    int r = td_host_send(c, m);
    if (r < 0)
        td_host_fail(c, td_code_from_errno(r), TD_ERROR_INTERNAL, NULL);
    else
        td_call_finish(c, NULL);
}

static void answer_info(td_host *h, td_call *c)
{
    const td_model_info *i = h->info;
    Tandem__V1__ModelInfoReply m = TANDEM__V1__MODEL_INFO_REPLY__INIT;
    m.model_hash = bin(i->model_hash, 32);
    m.profile = bin(i->profile, strlen(i->profile));
    m.profile_id = bin(i->profile_id, 16);
    m.max_context = i->max_context;
    m.vocab_size = i->vocab_size;
    m.n_eos_ids = i->n_eos;
    m.eos_ids = (uint32_t *)(uintptr_t)i->eos_ids;
    answer(c, &m.base);
}

int td_host_call(td_host *h, td_call *c, td_str method)
{
    if (td_str_eq(method, "tandem.v1.Engine/GetLoads")) {
        Tandem__V1__Load load = TANDEM__V1__LOAD__INIT;
        Tandem__V1__LoadsReply m = TANDEM__V1__LOADS_REPLY__INIT;
        td_host_fill_load(h, &load);
        m.load = &load;
        answer(c, &m.base);
        return 1;
    }
    if (td_str_eq(method, "tandem.v1.Engine/GetModelInfo")) {
        answer_info(h, c);
        return 1;
    }
    if (td_str_eq(method, "tandem.v1.Health/Check")) {
        Tandem__V1__HealthReply m = TANDEM__V1__HEALTH_REPLY__INIT;
        m.status = atomic_load(&h->load.draining) ? TANDEM__V1__HEALTH_REPLY__SERVING__NOT_SERVING
                                                  : TANDEM__V1__HEALTH_REPLY__SERVING__SERVING;
        answer(c, &m.base);
        return 1;
    }
    return 0;
}
