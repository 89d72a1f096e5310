/* SPDX-License-Identifier: Apache-2.0 */
/* One timeline: ids, blocks, hashes, and when it ends. */
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/bug.h"
#include "base/prefix.h"
#include "engine/internal.h"

#include "base/banned.h"

enum { BLOCK = TD_BLOCK_TOKENS };

static int check_range(const char *name, float v, float min, float max, td_err *err)
{
    if (v >= min && v <= max)
        return 0; /* false for NaN */
    return td_err_set(err, -EINVAL, "%s is %g; it must lie between %g and %g", name, (double)v,
                      (double)min, (double)max);
}

static int check_sampling(const td_sampling *s, uint32_t vocab, td_err *err)
{
    int r = check_range("temperature", s->temperature, 0.0f, 100.0f, err);
    r = r < 0 ? r : check_range("top_p", s->top_p, 1e-9f, 1.0f, err);
    r = r < 0 ? r : check_range("min_p", s->min_p, 0.0f, 1.0f, err);
    r = r < 0 ? r : check_range("frequency_penalty", s->frequency_penalty, -100.0f, 100.0f, err);
    r = r < 0 ? r : check_range("presence_penalty", s->presence_penalty, -100.0f, 100.0f, err);
    r = r < 0 ? r : check_range("repetition_penalty", s->repetition_penalty, 1e-3f, 100.0f, err);
    if (r < 0)
        return r;
    if (s->n_top > TD_TOP_LOGPROBS_MAX)
        return td_err_set(err, -EINVAL, "top_logprobs is %u; at most %d", s->n_top,
                          TD_TOP_LOGPROBS_MAX);
    if (s->n_bias > TD_LOGIT_BIAS_MAX)
        return td_err_set(err, -EINVAL, "logit_bias has %u entries; at most %d", s->n_bias,
                          TD_LOGIT_BIAS_MAX);
    for (uint32_t i = 0; i < s->n_bias; i++) {
        if (s->bias[i].id >= vocab)
            return td_err_set(err, -EINVAL, "logit_bias: id %u is not below the vocabulary's %u",
                              s->bias[i].id, vocab);
        r = check_range("logit_bias", s->bias[i].bias, -1000.0f, 1000.0f, err);
        if (r < 0)
            return r;
    }
    return 0;
}

static int check_spec(const td_model_info *info, const td_seq_spec *s, td_err *err)
{
    if (s->n_prompt < 1 || s->n_prompt > s->n_ids)
        return td_err_set(err, -EINVAL, "the prompt is empty");
    if (s->max_tokens < 1)
        return td_err_set(err, -EINVAL, "max_tokens is 0; it must be at least 1");
    if (s->n_ids > info->max_context || s->max_tokens > info->max_context - s->n_prompt)
        return td_err_set(
            err, -EINVAL,
            "prompt %zu + max_tokens %llu is longer than the model's context of %u tokens",
            s->n_prompt, (unsigned long long)s->max_tokens, info->max_context);
    for (size_t i = 0; i < s->n_ids; i++)
        if (s->ids[i] >= info->vocab_size)
            return td_err_set(err, -EINVAL, "id %u at %zu is not below the vocabulary's %u",
                              s->ids[i], i, info->vocab_size);
    if (s->n_stop_ids > TD_STOP_IDS_MAX)
        return td_err_set(err, -EINVAL, "%u stop ids; at most %d", s->n_stop_ids, TD_STOP_IDS_MAX);
    for (uint32_t i = 0; i < s->n_stop_ids; i++)
        if (s->stop_ids[i] >= info->vocab_size)
            return td_err_set(err, -EINVAL, "stop id %u is not below the vocabulary's %u",
                              s->stop_ids[i], info->vocab_size);
    return check_sampling(&s->sampling, info->vocab_size, err);
}

static void *copy_of(const void *src, size_t n, size_t size)
{
    void *p = malloc(n ? n * size : 1);
    if (p && n)
        memcpy(p, src, n * size);
    return p;
}

static int copy_spec(td_seq *s, const td_seq_spec *spec)
{
    const td_model_info *info = &s->engine->model->info;
    s->cap_ids = spec->n_ids + 64;
    s->ids = malloc(s->cap_ids * sizeof *s->ids);
    s->bias = copy_of(spec->sampling.bias, spec->sampling.n_bias, sizeof *s->bias);
    s->stops = malloc((info->n_eos + spec->n_stop_ids + 1) * sizeof *s->stops);
    if (!s->ids || !s->bias || !s->stops)
        return -ENOMEM;
    memcpy(s->ids, spec->ids, spec->n_ids * sizeof *s->ids);
    for (uint32_t i = 0; i < info->n_eos && !spec->ignore_eos; i++)
        s->stops[s->n_stops++] = info->eos_ids[i];
    for (uint32_t i = 0; i < spec->n_stop_ids; i++)
        s->stops[s->n_stops++] = spec->stop_ids[i];
    s->sampling.bias = s->bias;
    return 0;
}

int td_seq_new(td_engine *e, const td_seq_spec *spec, td_seq **ret_seq, td_err *reterr_err)
{
    int r = check_spec(&e->model->info, spec, reterr_err);
    if (r < 0)
        return r;
    td_seq *s = calloc(1, sizeof *s);
    if (!s)
        return td_err_set(reterr_err, -ENOMEM, "out of memory for a sequence");
    *s = (td_seq){.engine = e,
                  .n_ids = spec->n_ids,
                  .n_prompt = spec->n_prompt,
                  .sampling = spec->sampling,
                  .choice = spec->choice,
                  .max_tokens = spec->max_tokens,
                  .min_tokens = spec->min_tokens,
                  .ignore_eos = spec->ignore_eos};
    memcpy(s->prefix_key, spec->prefix_key, sizeof s->prefix_key);
    e->n_seqs_open++;
    r = copy_spec(s, spec);
    if (r < 0) {
        td_seq_free(s);
        return td_err_set(reterr_err, r, "out of memory for a sequence");
    }
    *ret_seq = s;
    return 0;
}

void td_seq_free(td_seq *s)
{
    if (!s)
        return;
    if (s->n_begun)
        td_ahead_forget(s->engine, s);
    for (size_t i = 0; i < s->n_blocks; i++)
        td_kv_unref(s->engine->pool, s->blocks[i]);
    s->engine->n_seqs_open--;
    free(s->ids);
    free(s->blocks);
    free(s->hashes);
    free(s->bias);
    free(s->stops);
    free(s);
}

static int want_blocks(td_seq *s, size_t n)
{
    if (n <= s->cap_blocks)
        return 0;
    size_t cap = n + 16;
    td_block *p = realloc(s->blocks, cap * sizeof *p);
    if (!p)
        return -ENOMEM;
    s->blocks = p;
    s->cap_blocks = cap;
    return 0;
}

const uint8_t *td_seq_hashes(td_seq *s, size_t *ret_n)
{
    size_t n = s->n_ids / BLOCK;
    if (n > s->cap_hashes) {
        uint8_t *p = realloc(s->hashes, (n + 16) * TD_PREFIX_HASH_BYTES);
        if (p) {
            s->hashes = p;
            s->cap_hashes = n + 16;
        }
        n = p ? n : s->n_hashes; /* out of memory: the tail is not shared, nothing else is lost */
    }
    for (; s->n_hashes < n; s->n_hashes++) {
        uint8_t *h = s->hashes + s->n_hashes * TD_PREFIX_HASH_BYTES;
        td_prefix_next(s->prefix_key, s->n_hashes ? h - TD_PREFIX_HASH_BYTES : NULL,
                       s->ids + s->n_hashes * BLOCK, h);
    }
    *ret_n = n;
    return s->hashes;
}

size_t td_seq_attach_prefix(td_seq *s)
{
    TD_BUG_ON(s->n_blocks != 0);
    size_t n;
    const uint8_t *hashes = td_seq_hashes(s, &n);
    size_t most =
        (s->n_ids - 1) / BLOCK; /* the last id is always computed: its logits are needed */
    n = n < most ? n : most;
    if (n == 0 || want_blocks(s, n) < 0)
        return 0;
    s->n_blocks = td_kv_lookup(s->engine->pool, hashes, (uint32_t)n, s->blocks);
    s->n_indexed = s->n_blocks;
    s->n_computed = s->n_blocks * BLOCK;
    return s->n_computed;
}

int td_seq_reserve(td_seq *s, size_t n_tokens)
{
    size_t n = (n_tokens + BLOCK - 1) / BLOCK;
    if (n <= s->n_blocks)
        return 0;
    if (n > UINT32_MAX || want_blocks(s, n) < 0)
        return -ENOSPC;
    int r = td_kv_alloc(s->engine->pool, (uint32_t)(n - s->n_blocks), s->blocks + s->n_blocks);
    if (r >= 0)
        s->n_blocks = n;
    return r;
}

/* A block whose content another block already stands for stays out of the index. */
static void index_full_blocks(td_seq *s)
{
    size_t n, full = s->n_computed / BLOCK;
    const uint8_t *hashes = td_seq_hashes(s, &n);
    for (; s->n_indexed < full && s->n_indexed < n; s->n_indexed++)
        td_kv_index(s->engine->pool, s->blocks[s->n_indexed],
                    hashes + s->n_indexed * TD_PREFIX_HASH_BYTES);
}

void td_seq_set_computed(td_seq *s, size_t n_tokens)
{
    TD_BUG_ON(n_tokens > s->n_ids || n_tokens > s->n_blocks * BLOCK);
    s->n_computed = n_tokens;
    index_full_blocks(s);
}

void td_seq_advance(td_seq *s, size_t n)
{
    td_seq_set_computed(s, s->n_computed + n);
}

int td_seq_fork(td_seq *s, uint32_t choice, td_seq **ret_seq)
{
    td_engine *e = s->engine;
    td_seq_spec spec = {.ids = s->ids,
                        .n_ids = s->n_ids,
                        .n_prompt = s->n_prompt,
                        .sampling = s->sampling,
                        .choice = choice,
                        .max_tokens = s->max_tokens,
                        .min_tokens = s->min_tokens,
                        .ignore_eos = 1, /* stops holds the eos ids already */
                        .stop_ids = s->stops,
                        .n_stop_ids = s->n_stops};
    td_seq *f = calloc(1, sizeof *f);
    if (!f)
        return -ENOMEM;
    *f = (td_seq){.engine = e,
                  .n_ids = s->n_ids,
                  .n_prompt = s->n_prompt,
                  .sampling = s->sampling,
                  .choice = choice,
                  .max_tokens = s->max_tokens,
                  .min_tokens = s->min_tokens,
                  .ignore_eos = s->ignore_eos};
    memcpy(f->prefix_key, s->prefix_key, sizeof f->prefix_key);
    e->n_seqs_open++;
    size_t full = s->n_computed / BLOCK, part = s->n_computed % BLOCK;
    td_block copy = 0;
    int r = copy_spec(f, &spec);
    r = r < 0 ? r : want_blocks(f, full + 1);
    r = r < 0 || !part ? r : td_kv_alloc(e->pool, 1, &copy);
    if (r < 0) {
        td_seq_free(f);
        return r;
    }
    for (; f->n_blocks < full; f->n_blocks++) {
        f->blocks[f->n_blocks] = s->blocks[f->n_blocks];
        td_kv_ref(e->pool, f->blocks[f->n_blocks]);
    }
    if (part) {
        e->be->copy(e->queue, td_kv_at(e->pool, copy), td_kv_at(e->pool, s->blocks[full]),
                    e->model->info.kv.block_bytes);
        f->blocks[f->n_blocks++] = copy;
    }
    f->n_computed = s->n_computed;
    f->n_indexed = full;
    *ret_seq = f;
    return 0;
}

td_finish td_seq_append(td_seq *s, uint32_t id)
{
    TD_BUG_ON(id >= s->engine->model->info.vocab_size);
    uint64_t emitted = s->n_ids - s->n_prompt;
    if (s->n_ids == s->cap_ids) {
        uint32_t *p = realloc(s->ids, 2 * s->cap_ids * sizeof *p);
        TD_BUG_ON(!p); /* a few kilobytes; admission bounds ids by the context */
        s->ids = p;
        s->cap_ids *= 2;
    }
    s->ids[s->n_ids++] = id;
    for (uint32_t i = 0; emitted >= s->min_tokens && i < s->n_stops; i++)
        if (s->stops[i] == id)
            return TD_FINISH_STOP;
    return emitted + 1 >= s->max_tokens ? TD_FINISH_LENGTH : TD_FINISH_NONE;
}

int td_seq_is_last(const td_seq *s)
{
    return s->n_ids - s->n_prompt + s->n_drawing >= s->max_tokens;
}

const uint32_t *td_seq_ids(const td_seq *s, size_t *ret_n)
{
    *ret_n = s->n_ids;
    return s->ids;
}

size_t td_seq_computed(const td_seq *s)
{
    return s->n_computed;
}

size_t td_seq_n_prompt(const td_seq *s)
{
    return s->n_prompt;
}

const td_block *td_seq_blocks(const td_seq *s, size_t *ret_n)
{
    *ret_n = s->n_blocks;
    return s->blocks;
}
