/* SPDX-License-Identifier: Apache-2.0 */
#include "router/shape.h"

#include <math.h>
#include <string.h>

#include "base/banned.h"

static void add_string(td_strbuf *out, const char *s, size_t n)
{
    td_strbuf_addc(out, '"');
    td_strbuf_add_json(out, s, n);
    td_strbuf_addc(out, '"');
}

static void add_z(td_strbuf *out, const char *z)
{
    add_string(out, z, strlen(z));
}

void td_shape_error(td_strbuf *out, td_error error, const char *text, const char *param)
{
    const td_error_info *info = td_error_get(error);
    td_strbuf_adds(out, "{\"error\":{\"message\":");
    add_z(out, text && *text ? text : info->text);
    td_strbuf_adds(out, ",\"type\":");
    add_z(out, info->type);
    td_strbuf_adds(out, ",\"param\":");
    if (param)
        add_z(out, param);
    else
        td_strbuf_adds(out, "null");
    td_strbuf_adds(out, ",\"code\":");
    add_z(out, info->name);
    td_strbuf_adds(out, "}}");
}

/* -inf has no JSON form; -9999 is what OpenAI sends. */
static void add_logprob(td_strbuf *out, float v)
{
    if (isnan(v))
        td_strbuf_adds(out, "null");
    else
        td_strbuf_addf(out, "%.9g", isinf(v) ? -9999.0 : (double)v);
}

static void add_token_text(td_strbuf *out, const td_shape *s, uint32_t id)
{
    td_str b = td_tokenizer_bytes(s->card->tok, id);
    add_string(out, b.ptr, b.len);
}

static void add_token_bytes(td_strbuf *out, const td_shape *s, uint32_t id)
{
    td_str b = td_tokenizer_bytes(s->card->tok, id);
    td_strbuf_addc(out, '[');
    for (size_t i = 0; i < b.len; i++)
        td_strbuf_addf(out, "%s%u", i ? "," : "", (unsigned)(uint8_t)b.ptr[i]);
    td_strbuf_addc(out, ']');
}

static void add_chat_lp(td_strbuf *out, const td_shape *s, uint32_t id, float logprob)
{
    td_strbuf_adds(out, "{\"token\":");
    add_token_text(out, s, id);
    td_strbuf_adds(out, ",\"logprob\":");
    add_logprob(out, logprob);
    td_strbuf_adds(out, ",\"bytes\":");
    add_token_bytes(out, s, id);
}

static void add_chat_logprobs(td_strbuf *out, const td_shape *s, const td_choice *c)
{
    td_strbuf_adds(out, "{\"content\":[");
    for (size_t i = 0; i < c->n_lps; i++) {
        const td_choice_lp *lp = &c->lps[i];
        if (i)
            td_strbuf_addc(out, ',');
        add_chat_lp(out, s, lp->id, lp->logprob);
        td_strbuf_adds(out, ",\"top_logprobs\":[");
        for (uint32_t k = 0; k < lp->n_top; k++) {
            if (k)
                td_strbuf_addc(out, ',');
            add_chat_lp(out, s, lp->top_ids[k], lp->top[k]);
            td_strbuf_addc(out, '}');
        }
        td_strbuf_adds(out, "]}");
    }
    td_strbuf_adds(out, "],\"refusal\":null}");
}

static size_t n_chars(td_str b)
{
    size_t n = 0;
    for (size_t i = 0; i < b.len; i++)
        n += ((uint8_t)b.ptr[i] & 0xC0) != 0x80;
    return n;
}

static void add_completion_tops(td_strbuf *out, const td_shape *s, const td_choice *c)
{
    for (size_t i = 0; i < c->n_lps; i++) {
        const td_choice_lp *lp = &c->lps[i];
        td_strbuf_adds(out, i ? "," : "");
        if (isnan(lp->logprob)) {
            td_strbuf_adds(out, "null");
            continue;
        }
        td_strbuf_addc(out, '{');
        for (uint32_t k = 0; k < lp->n_top; k++) {
            td_strbuf_adds(out, k ? "," : "");
            add_token_text(out, s, lp->top_ids[k]);
            td_strbuf_addc(out, ':');
            add_logprob(out, lp->top[k]);
        }
        td_strbuf_addc(out, '}');
    }
}

static void add_completion_logprobs(td_strbuf *out, const td_shape *s, const td_choice *c)
{
    td_strbuf_adds(out, "{\"tokens\":[");
    for (size_t i = 0; i < c->n_lps; i++) {
        td_strbuf_adds(out, i ? "," : "");
        add_token_text(out, s, c->lps[i].id);
    }
    td_strbuf_adds(out, "],\"token_logprobs\":[");
    for (size_t i = 0; i < c->n_lps; i++) {
        td_strbuf_adds(out, i ? "," : "");
        add_logprob(out, c->lps[i].logprob);
    }
    td_strbuf_adds(out, "],\"top_logprobs\":[");
    add_completion_tops(out, s, c);
    td_strbuf_adds(out, "],\"text_offset\":[");
    size_t at = 0;
    for (size_t i = 0; i < c->n_lps; i++) {
        td_strbuf_addf(out, "%s%zu", i ? "," : "", at);
        at += n_chars(td_tokenizer_bytes(s->card->tok, c->lps[i].id));
    }
    td_strbuf_adds(out, "]}");
}

static void add_logprobs(td_strbuf *out, const td_shape *s, const td_choice *c)
{
    td_strbuf_adds(out, ",\"logprobs\":");
    if (!s->logprobs)
        td_strbuf_adds(out, "null");
    else if (s->chat)
        add_chat_logprobs(out, s, c);
    else
        add_completion_logprobs(out, s, c);
}

static void add_token_ids(td_strbuf *out, const td_choice *c)
{
    td_strbuf_adds(out, ",\"token_ids\":[");
    for (size_t i = 0; i < c->ids.n; i++)
        td_strbuf_addf(out, "%s%u", i ? "," : "", c->ids.data[i]);
    td_strbuf_addc(out, ']');
}

static void add_finish(td_strbuf *out, const char *finish)
{
    td_strbuf_adds(out, ",\"finish_reason\":");
    if (finish)
        add_z(out, finish);
    else
        td_strbuf_adds(out, "null");
}

static void add_usage(td_strbuf *out, const td_usage *u)
{
    td_strbuf_addf(out,
                   "{\"prompt_tokens\":%llu,\"completion_tokens\":%llu,\"total_tokens\":%llu,"
                   "\"prompt_tokens_details\":{\"cached_tokens\":%llu",
                   (unsigned long long)u->prompt, (unsigned long long)u->completion,
                   (unsigned long long)(u->prompt + u->completion), (unsigned long long)u->cached);
    if (u->local)
        td_strbuf_addf(out, ",\"local_prefill_tokens\":%llu", (unsigned long long)u->local);
    td_strbuf_addf(out, "},\"completion_tokens_details\":{\"reasoning_tokens\":%llu}}",
                   (unsigned long long)u->reasoning);
}

static void add_head(td_strbuf *out, const td_shape *s)
{
    td_strbuf_adds(out, "{\"id\":");
    add_z(out, s->id);
    td_strbuf_addf(out, ",\"object\":\"%s\",\"created\":%lld,\"model\":",
                   !s->chat    ? "text_completion"
                   : s->stream ? "chat.completion.chunk"
                               : "chat.completion",
                   (long long)s->created);
    add_z(out, s->model);
    td_strbuf_adds(out, ",\"system_fingerprint\":");
    add_z(out, s->fingerprint);
}

static void add_delta(td_strbuf *out, const td_choice *c)
{
    int comma = 0;
    td_strbuf_adds(out, ",\"delta\":{");
    if (!c->role_sent) {
        td_strbuf_adds(out, "\"role\":\"assistant\"");
        comma = 1;
    }
    if (c->reasoning_text.len) {
        td_strbuf_adds(out, comma ? ",\"reasoning_content\":" : "\"reasoning_content\":");
        add_string(out, c->reasoning_text.data, c->reasoning_text.len);
        comma = 1;
    }
    /* a first chunk without text says content "" so that readers see a string */
    if (c->content_text.len || (!c->role_sent && !c->reasoning_text.len)) {
        td_strbuf_adds(out, comma ? ",\"content\":" : "\"content\":");
        add_string(out, c->content_text.data, c->content_text.len);
    }
    td_strbuf_addc(out, '}');
}

void td_shape_chunk(td_strbuf *out, const td_shape *s, const td_choice *c, const char *finish,
                    const td_usage *usage)
{
    td_strbuf_adds(out, "data: ");
    add_head(out, s);
    td_strbuf_addf(out, ",\"choices\":[{\"index\":%u", c->index);
    if (s->chat) {
        add_delta(out, c);
    } else {
        td_strbuf_adds(out, ",\"text\":");
        add_string(out, c->content_text.data, c->content_text.len);
    }
    add_logprobs(out, s, c);
    if (s->token_ids)
        add_token_ids(out, c);
    add_finish(out, finish);
    td_strbuf_adds(out, "}]");
    if (s->continuous_usage) {
        td_strbuf_adds(out, ",\"usage\":");
        add_usage(out, usage);
    } else if (s->usage_null) {
        td_strbuf_adds(out, ",\"usage\":null");
    }
    td_strbuf_adds(out, "}\n\n");
}

void td_shape_usage_chunk(td_strbuf *out, const td_shape *s, const td_usage *usage)
{
    td_strbuf_adds(out, "data: ");
    add_head(out, s);
    td_strbuf_adds(out, ",\"choices\":[],\"usage\":");
    add_usage(out, usage);
    td_strbuf_adds(out, "}\n\n");
}

void td_shape_done(td_strbuf *out)
{
    td_strbuf_adds(out, "data: [DONE]\n\n");
}

static void add_message(td_strbuf *out, const td_choice *c)
{
    td_strbuf_adds(out, ",\"message\":{\"role\":\"assistant\",\"content\":");
    add_string(out, c->content_text.data, c->content_text.len);
    if (c->reasoning_text.len) {
        td_strbuf_adds(out, ",\"reasoning_content\":");
        add_string(out, c->reasoning_text.data, c->reasoning_text.len);
    }
    td_strbuf_adds(out, ",\"refusal\":null}");
}

void td_shape_reply(td_strbuf *out, const td_shape *s, const td_choice *choices, size_t n,
                    const td_usage *usage)
{
    add_head(out, s);
    td_strbuf_adds(out, ",\"choices\":[");
    for (size_t i = 0; i < n; i++) {
        const td_choice *c = &choices[i];
        td_strbuf_addf(out, "%s{\"index\":%u", i ? "," : "", c->index);
        if (s->chat) {
            add_message(out, c);
        } else {
            td_strbuf_adds(out, ",\"text\":");
            add_string(out, c->content_text.data, c->content_text.len);
        }
        add_logprobs(out, s, c);
        if (s->token_ids)
            add_token_ids(out, c);
        add_finish(out, c->finish);
        td_strbuf_addc(out, '}');
    }
    td_strbuf_adds(out, "],\"usage\":");
    add_usage(out, usage);
    td_strbuf_addf(out, ",\"seed\":%llu}", (unsigned long long)s->seed);
}
