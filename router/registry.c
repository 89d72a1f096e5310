/* SPDX-License-Identifier: Apache-2.0 */
#include "router/registry.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bug.h"
#include "base/hash.h"
#include "base/prefix.h"
#include "proto/rpc.pb-c.h"
#include "base/banned.h"

void td_registry_init(td_registry *r)
{
    memset(r, 0, sizeof *r);
}

void td_registry_done(td_registry *r)
{
    while (r->n)
        td_registry_remove(r, r->workers[r->n - 1]);
    free(r->workers);
    free(r->view);
    free(r->profile);
}

/* A hash of the HELLO against ours; the text shows the first 8 bytes of both, as the worker's log
 * does. */
static int check_hash(const char *who, const char *what, const char *whose, int has,
                      const ProtobufCBinaryData *got, const uint8_t *want, size_t n,
                      const char *remedy, td_err *reterr_err)
{
    char a[17], b[17];
    if (!has || got->len != n)
        return td_err_set(reterr_err, -EINVAL,
                          "worker %s: HELLO without a %s (%zu bytes): update the worker", who, what,
                          n);
    if (!want || memcmp(got->data, want, n) == 0)
        return 0;
    return td_err_set(reterr_err, -EPERM, "worker %s: its %s is %s, %s is %s: %s", who, what,
                      td_hex(got->data, 8, a), whose, td_hex(want, 8, b), remedy);
}

static int has_line(td_str text, td_str line)
{
    for (size_t at = 0, n; at < text.len; at += n + 1) {
        const char *end = memchr(text.ptr + at, '\n', text.len - at);
        n = end ? (size_t)(end - text.ptr) - at : text.len - at;
        if (n == line.len && memcmp(text.ptr + at, line.ptr, n) == 0)
            return 1;
    }
    return 0;
}

/* Lines of a that b lacks, as far as they fit: " backend=hip isa=gfx942". They come from a peer. */
static void lines_apart(td_str a, td_str b, char *out, size_t cap)
{
    size_t to = 0, n;
    out[0] = 0;
    for (size_t at = 0; at < a.len; at += n + 1) {
        const char *end = memchr(a.ptr + at, '\n', a.len - at);
        n = end ? (size_t)(end - a.ptr) - at : a.len - at;
        td_str line = {a.ptr + at, n};
        if (n == 0 || has_line(b, line) || to + n + 2 > cap)
            continue;
        out[to++] = ' ';
        for (size_t i = 0; i < n; i++)
            out[to++] = line.ptr[i] > ' ' && line.ptr[i] < 127 ? line.ptr[i] : '?';
        out[to] = 0;
    }
}

/* Hashes tell people nothing: name the kernels, types and formats that two profiles do not share.
 */
static int profiles_differ(const td_registry *r, const char *who, const Tandem__V1__Hello *h,
                           td_err *reterr_err)
{
    char its[96], ours[96];
    td_str a = {(const char *)h->profile.data, h->has_profile ? h->profile.len : 0},
           b = {r->profile, r->profile ? strlen(r->profile) : 0};
    lines_apart(a, b, its, sizeof its);
    lines_apart(b, a, ours, sizeof ours);
    return td_err_set(reterr_err, -EPERM,
                      "worker %s: its profile has%s, the pool's%s: KV blocks of one are not those "
                      "of the other; start all workers with the same --device, --isa, --act, --kv "
                      "and --index",
                      who, its, ours);
}

static int check_hello(const td_registry *r, const char *who, const Tandem__V1__Hello *h,
                       td_err *reterr_err)
{
    static const char same_files[] = "start it with the same model directory as the router";
    static const char same_profile[] =
        "start all workers with the same --device, --isa, --act, --kv and --index";
    int pool = r->n > 0;
    int e = check_hash(who, "config hash", "the router's", h->has_config_hash, &h->config_hash,
                       r->config_hash, 32, same_files, reterr_err);
    if (!e)
        e = check_hash(who, "tokenizer hash", "the router's", h->has_tokenizer_hash,
                       &h->tokenizer_hash, r->tokenizer_hash, 32, same_files, reterr_err);
    if (!e)
        e = check_hash(who, "model hash", "the pool's", h->has_model_hash, &h->model_hash,
                       r->have_model_hash ? r->model_hash : NULL, 32,
                       "give it the same weights, or restart the router", reterr_err);
    if (!e) {
        e = check_hash(who, "profile", "the pool's", h->has_profile_id, &h->profile_id,
                       pool ? r->profile_id : NULL, 16, same_profile, reterr_err);
        if (e == -EPERM && h->has_profile && r->profile)
            e = profiles_differ(r, who, h, reterr_err);
    }
    if (!e)
        e = check_hash(who, "KV layout", "the pool's", h->has_layout_hash, &h->layout_hash,
                       pool ? r->layout_hash : NULL, 16, same_profile, reterr_err);
    if (e)
        return e;
    if (h->role != TANDEM__V1__ROLE__ROLE_PREFILL && h->role != TANDEM__V1__ROLE__ROLE_DECODE)
        return td_err_set(
            reterr_err, -EINVAL,
            "worker %s: role %d is neither prefill nor decode: clients use --rpc-listen", who,
            (int)h->role);
    if (h->epoch.len != 16)
        return td_err_set(reterr_err, -EINVAL,
                          "worker %s: epoch has %zu bytes, 16 expected: update the worker", who,
                          h->epoch.len);
    if (!h->has_block_tokens || h->block_tokens != TD_BLOCK_TOKENS)
        return td_err_set(reterr_err, -EINVAL,
                          "worker %s: blocks of %u tokens, %d expected: update the worker", who,
                          h->block_tokens, TD_BLOCK_TOKENS);
    if (!h->has_kv_blocks || h->kv_blocks == 0)
        return td_err_set(reterr_err, -EINVAL, "worker %s: has no KV blocks: raise --kv-memory",
                          who);
    return 0;
}

static int name_taken(const td_registry *r, const char *name)
{
    for (uint32_t i = 0; i < r->n; i++)
        if (strcmp(r->workers[i]->name, name) == 0)
            return 1;
    return 0;
}

static int grow(td_registry *r)
{
    if (r->n < r->cap)
        return 0;
    uint32_t cap = r->cap ? r->cap * 2 : 8;
    td_worker **workers = realloc(r->workers, cap * sizeof *workers);
    if (workers)
        r->workers = workers;
    const td_sched_worker **view = realloc(r->view, cap * sizeof *view);
    if (view)
        r->view = view;
    if (!workers || !view)
        return -ENOMEM;
    r->cap = cap;
    return 0;
}

static void add_metrics(td_registry *r, td_worker *w)
{
    if (!r->metrics)
        return;
    td_strbuf b;
    td_strbuf_init(&b);
    td_strbuf_addf(&b, "pool=\"%s\",worker=\"", w->sched.is_decode ? "decode" : "prefill");
    td_metrics_label(&b, w->name, strlen(w->name));
    td_strbuf_adds(&b, "\"");
    w->running = td_gauge_new(r->metrics, "worker_requests_running", b.data,
                              "Sequences running on a worker");
    w->waiting_tokens = td_gauge_new(r->metrics, "worker_waiting_tokens", b.data,
                                     "Prompt tokens queued on a worker and not computed");
    w->kv_blocks = td_gauge_new(r->metrics, "worker_kv_blocks", b.data, "KV blocks of a worker");
    w->kv_free = td_gauge_new(r->metrics, "worker_kv_blocks_free", b.data,
                              "KV blocks of a worker, free or evictable");
    w->draining =
        td_gauge_new(r->metrics, "worker_draining", b.data, "1: the worker takes no new requests");
    w->tokens =
        td_counter_new(r->metrics, "worker_tokens_total", b.data, "Tokens computed by a worker");
    td_strbuf_done(&b);
}

static td_worker *new_worker(td_registry *r, td_session *s, const char *who,
                             const Tandem__V1__Hello *h)
{
    td_worker *w = calloc(1, sizeof *w);
    if (!w || grow(r) < 0) {
        free(w);
        return NULL;
    }
    w->session = s;
    w->sched.id = ++r->next_id;
    w->sched.is_decode = h->role == TANDEM__V1__ROLE__ROLE_DECODE;
    memcpy(w->sched.profile_id, h->profile_id.data, 16);
    memcpy(w->sched.layout_hash, h->layout_hash.data, 16);
    memcpy(w->sched.model_hash, h->model_hash.data, 32);
    memcpy(w->epoch, h->epoch.data, 16);
    w->sched.kv_blocks = h->kv_blocks;
    w->seen_kv_free = h->kv_blocks;
    w->sched.max_seqs = h->has_max_seqs ? h->max_seqs : 0;
    w->sched.max_context = h->has_max_context ? h->max_context : 0;
    snprintf(w->name, sizeof w->name, "%s", who);
    if (name_taken(r, w->name)) /* a metric row belongs to one worker */
        snprintf(w->name, sizeof w->name, "%.64s#%llu", who, (unsigned long long)w->sched.id);
    return w;
}

int td_registry_admit(td_registry *r, td_session *s, const struct Tandem__V1__Hello *hello,
                      td_worker **ret_worker, td_err *reterr_err)
{
    const char *who = td_session_name(s);
    int e = check_hello(r, who, hello, reterr_err);
    if (e < 0)
        return e;
    td_worker *w = new_worker(r, s, who, hello);
    if (!w)
        return td_err_set(reterr_err, -ENOMEM, "worker %s: out of memory", who);
    if (!r->n) {
        free(r->profile); /* without it a refusal names hashes only */
        r->profile = hello->has_profile
                         ? strndup((const char *)hello->profile.data, hello->profile.len)
                         : NULL;
        memcpy(r->profile_id, w->sched.profile_id, 16);
        memcpy(r->layout_hash, w->sched.layout_hash, 16);
    }
    if (!r->have_model_hash)
        memcpy(r->model_hash, w->sched.model_hash, 32);
    r->have_model_hash = 1;
    /* the same process on a new connection: its old session is dead, only not found out yet */
    for (uint32_t i = 0; i < r->n; i++)
        if (memcmp(r->workers[i]->epoch, w->epoch, 16) == 0)
            r->workers[i]->sched.ready = 0;
    r->workers[r->n] = w;
    r->view[r->n++] = &w->sched;
    add_metrics(r, w);
    *ret_worker = w;
    return 0;
}

void td_registry_ready(td_registry *r, td_worker *w)
{
    w->sched.ready = 1;
}

void td_registry_remove(td_registry *r, td_worker *w)
{
    for (uint32_t i = 0; i < r->n; i++) {
        if (r->workers[i] != w)
            continue;
        r->n--;
        r->workers[i] = r->workers[r->n];
        r->view[i] = r->view[r->n];
        break;
    }
    if (r->metrics) {
        td_strbuf b;
        td_strbuf_init(&b);
        td_strbuf_adds(&b, ",worker=\"");
        td_metrics_label(&b, w->name, strlen(w->name));
        td_strbuf_adds(&b, "\"");
        td_metrics_drop(r->metrics, b.data);
        td_strbuf_done(&b);
    }
    free(w);
}

void td_registry_load(td_worker *w, const struct Tandem__V1__Load *load, uint64_t now_us)
{
    if (load->has_step && load->step != w->seen_step) {
        w->seen_step = load->step;
        w->progress_us = now_us;
    }
    if (load->has_kv_free)
        w->seen_kv_free = TD_MIN(load->kv_free, w->sched.kv_blocks);
    if (load->has_running)
        w->seen_running = load->running;
    if (load->has_waiting_tokens)
        w->seen_waiting_tokens = load->waiting_tokens;
    /* reserved blocks are taken from the pool when their ticket is granted: kv_free knows */
    td_sched_seen(&w->sched, w->sched.kv_blocks - w->seen_kv_free, w->seen_running,
                  w->seen_waiting_tokens);
    if (load->has_draining)
        w->sched.draining = load->draining;
    if (load->has_tokens_total) {
        if (w->tokens && load->tokens_total > w->seen_tokens_total)
            td_counter_add(w->tokens, load->tokens_total - w->seen_tokens_total);
        w->seen_tokens_total = load->tokens_total;
    }
}

void td_registry_refresh(td_registry *r)
{
    for (uint32_t i = 0; i < r->n; i++)
        r->workers[i]->sched.draining |= td_session_is_draining(r->workers[i]->session);
}

static int takes_new(const td_worker *w)
{
    return w->sched.ready && !w->sched.draining && !td_session_is_draining(w->session);
}

td_worker *td_registry_find(const td_registry *r, uint64_t id)
{
    for (uint32_t i = 0; i < r->n; i++)
        if (r->workers[i]->sched.id == id)
            return r->workers[i];
    return NULL;
}

uint32_t td_registry_count(const td_registry *r, int is_decode)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < r->n; i++)
        n += r->workers[i]->sched.is_decode == is_decode && takes_new(r->workers[i]);
    return n;
}

uint32_t td_registry_max_context(const td_registry *r, uint32_t limit)
{
    uint64_t best[2] = {0, 0};
    for (uint32_t i = 0; i < r->n; i++) {
        const td_sched_worker *w = &r->workers[i]->sched;
        uint64_t c = (uint64_t)w->kv_blocks * TD_BLOCK_TOKENS;
        if (w->max_context)
            c = TD_MIN(c, w->max_context);
        best[w->is_decode] = TD_MAX(best[w->is_decode], c);
    }
    uint64_t c = limit;
    for (int i = 0; i < 2; i++)
        if (best[i])
            c = TD_MIN(c, best[i]);
    return (uint32_t)c;
}

void td_registry_update_metrics(td_registry *r)
{
    for (uint32_t i = 0; i < r->n; i++) {
        const td_worker *w = r->workers[i];
        if (!w->running)
            continue;
        td_gauge_set(w->running, w->seen_running);
        td_gauge_set(w->waiting_tokens, (double)w->seen_waiting_tokens);
        td_gauge_set(w->kv_blocks, w->sched.kv_blocks);
        td_gauge_set(w->kv_free, w->seen_kv_free);
        td_gauge_set(w->draining, !takes_new(w));
    }
}
