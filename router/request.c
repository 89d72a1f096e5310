/* SPDX-License-Identifier: Apache-2.0 */
#include "router/request.h"

#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include "base/bug.h"
#include "base/json.h"
#include "base/prefix.h"
#include "base/rand.h"
#include "base/banned.h"

enum field_type { NUM, INT, BOOL, STR, OWN, ACCEPT, REFUSE };
enum { C = TD_API_CHAT, P = TD_API_COMPLETIONS, T = TD_API_TOKENIZE, D = TD_API_DETOKENIZE };

typedef struct parse {
    const td_request_context *ctx;
    td_api api;
    td_arena *arena;
    td_params *p;
    td_request_error *err;
    /* Raw values kept until all fields are read; borrowed from the body's tree. */
    json_t *messages, *prompt, *tokens, *kwargs;
    int think;          /* -1 not said, 0 off, 1 on */
    int clear_thinking; /* -1 not said */
    int64_t best_of;    /* 0 = not given; compared when n is known */
} parse;

static int fail(parse *s, td_error error, const char *param, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));

static int fail(parse *s, td_error error, const char *param, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(s->err->text, sizeof s->err->text, fmt, ap);
    va_end(ap);
    s->err->error = error;
    s->err->param = param ? td_arena_strndup(s->arena, param, strlen(param)) : NULL;
    return -EINVAL;
}

static int fail_type(parse *s, const char *name, const char *wanted)
{
    return fail(s, TD_ERROR_INVALID_VALUE, name, "%s must be %s", name, wanted);
}

static td_str copy_str(parse *s, const json_t *v)
{
    size_t n = json_string_length(v);
    return (td_str){td_arena_strndup(s->arena, json_string_value(v), n), n};
}

static int read_num(parse *s, const char *name, const json_t *v, double min, double max,
                    double *ret)
{
    if (!json_is_number(v))
        return fail_type(s, name, "a number");
    double x = json_number_value(v);
    if (!(x >= min && x <= max))
        return fail(s, TD_ERROR_INVALID_VALUE, name, "%s must be between %g and %g, not %g", name,
                    min, max, x);
    *ret = x;
    return 0;
}

static int read_int(parse *s, const char *name, const json_t *v, double min, double max,
                    int64_t *ret)
{
    int64_t x;
    if (json_is_integer(v))
        x = json_integer_value(v);
    else if (json_is_real(v) && json_real_value(v) == floor(json_real_value(v)) &&
             fabs(json_real_value(v)) < 1e15)
        x = (int64_t)json_real_value(v); /* 16.0 is what some clients send */
    else
        return fail_type(s, name, "an integer");
    if ((double)x < min || (double)x > max)
        return fail(s, TD_ERROR_INVALID_VALUE, name, "%s must be between %.0f and %.0f, not %lld",
                    name, min, max, (long long)x);
    *ret = x;
    return 0;
}

static int read_bool(parse *s, const char *name, const json_t *v, int *ret)
{
    if (!json_is_boolean(v))
        return fail_type(s, name, "true or false");
    *ret = json_is_true(v);
    return 0;
}

static int read_str(parse *s, const char *name, const json_t *v, double min, double max,
                    const char **ret)
{
    if (!json_is_string(v))
        return fail_type(s, name, "a string");
    size_t n = json_string_length(v);
    if ((double)n < min || (double)n > max || memchr(json_string_value(v), 0, n))
        return fail(s, TD_ERROR_INVALID_VALUE, name, "%s must have %.0f to %.0f bytes and no NUL",
                    name, min, max);
    *ret = copy_str(s, v).ptr;
    return 0;
}

/* Ids of a JSON array, each below the vocabulary. */
static int read_ids(parse *s, const char *name, const json_t *v, size_t max,
                    const uint32_t **ret_ids, uint32_t *ret_n)
{
    size_t n = json_array_size(v);
    if (!json_is_array(v))
        return fail_type(s, name, "a list of token ids");
    if (n > max)
        return fail(s, TD_ERROR_INVALID_VALUE, name, "%s has %zu entries; at most %zu are taken",
                    name, n, max);
    uint32_t *ids = td_arena_alloc_array(s->arena, n ? n : 1, sizeof *ids);
    for (size_t i = 0; ids && i < n; i++) {
        const json_t *e = json_array_get(v, i);
        if (!json_is_integer(e) || json_integer_value(e) < 0 ||
            json_integer_value(e) >= s->ctx->card->vocab_size)
            return fail(s, TD_ERROR_INVALID_VALUE, name,
                        "%s: entry %zu is not a token id (0 to %u)", name, i,
                        s->ctx->card->vocab_size - 1);
        ids[i] = (uint32_t)json_integer_value(e);
    }
    *ret_ids = ids;
    *ret_n = (uint32_t)n;
    return 0;
}

static int own_messages(parse *s, const char *name, json_t *v)
{
    s->messages = v;
    return json_is_array(v) && json_array_size(v)
               ? 0
               : fail_type(s, name, "a list of at least one message");
}

static int own_prompt(parse *s, const char *name, json_t *v)
{
    s->prompt = v;
    return json_is_string(v) || json_is_array(v)
               ? 0
               : fail_type(s, name, "a string, a list of strings, or token ids");
}

static int own_content(parse *s, const char *name, json_t *v)
{
    return own_prompt(s, name, v);
}

static int own_tokens(parse *s, const char *name, json_t *v)
{
    s->tokens = v;
    return json_is_array(v) ? 0 : fail_type(s, name, "a list of token ids");
}

static int own_stream_options(parse *s, const char *name, json_t *v)
{
    if (!json_is_object(v))
        return fail_type(s, name, "an object");
    json_t *e;
    if ((e = json_object_get(v, "include_usage")) && !json_is_null(e) &&
        read_bool(s, "stream_options.include_usage", e, &s->p->include_usage) < 0)
        return -EINVAL;
    if ((e = json_object_get(v, "continuous_usage_stats")) && !json_is_null(e))
        return read_bool(s, "stream_options.continuous_usage_stats", e, &s->p->continuous_usage);
    return 0;
}

static int own_best_of(parse *s, const char *name, json_t *v)
{
    return read_int(s, name, v, 1, 16, &s->best_of);
}

static int own_logit_bias(parse *s, const char *name, json_t *v)
{
    if (!json_is_object(v))
        return fail_type(s, name, "an object of token id to bias");
    size_t n = json_object_size(v), i = 0;
    if (n > 1024)
        return fail(s, TD_ERROR_INVALID_VALUE, name,
                    "logit_bias has %zu entries; at most 1024 are taken", n);
    td_gen_bias *bias = td_arena_alloc_array(s->arena, n ? n : 1, sizeof *bias);
    const char *key;
    json_t *e;
    json_object_foreach(v, key, e)
    {
        char *end;
        errno = 0;
        unsigned long id = strtoul(key, &end, 10);
        double b;
        if (*key < '0' || *key > '9' || *end || errno || id >= s->ctx->card->vocab_size)
            return fail(s, TD_ERROR_INVALID_VALUE, name,
                        "logit_bias: a key is not a token id (0 to %u)",
                        s->ctx->card->vocab_size - 1);
        if (read_num(s, name, e, -100, 100, &b) < 0)
            return -EINVAL;
        if (bias)
            bias[i++] = (td_gen_bias){(uint32_t)id, (float)b};
    }
    s->p->bias = bias;
    s->p->n_bias = (uint32_t)i;
    return 0;
}

static int own_seed(parse *s, const char *name, json_t *v)
{
    if (!json_is_integer(v))
        return fail_type(s, name, "an integer");
    s->p->seed = (uint64_t)json_integer_value(v);
    return 0;
}

static int add_stop(parse *s, const char *name, const json_t *v)
{
    size_t n = json_string_length(v);
    if (!json_is_string(v) || n == 0 || n > TD_STOP_BYTES_MAX)
        return fail(s, TD_ERROR_INVALID_VALUE, name, "each stop must be a string of 1 to %d bytes",
                    TD_STOP_BYTES_MAX);
    if (s->p->n_stops == TD_STOPS_MAX)
        return fail(s, TD_ERROR_INVALID_VALUE, name, "at most %d stops are taken", TD_STOPS_MAX);
    s->p->stops[s->p->n_stops++] = copy_str(s, v);
    return 0;
}

static int own_stop(parse *s, const char *name, json_t *v)
{
    if (json_is_string(v))
        return json_string_length(v) ? add_stop(s, name, v) : 0;
    if (!json_is_array(v))
        return fail_type(s, name, "a string or a list of strings");
    for (size_t i = 0; i < json_array_size(v); i++)
        if (add_stop(s, name, json_array_get(v, i)) < 0)
            return -EINVAL;
    return 0;
}

static int own_stop_token_ids(parse *s, const char *name, json_t *v)
{
    return read_ids(s, name, v, 64, &s->p->stop_ids, &s->p->n_stop_ids);
}

static int own_logprobs(parse *s, const char *name, json_t *v)
{
    if (s->api == TD_API_CHAT)
        return read_bool(s, name, v, &s->p->logprobs);
    if (json_is_boolean(v)) {
        s->p->logprobs = json_is_true(v);
        return 0;
    }
    s->p->logprobs = 1;
    return read_int(s, name, v, 0, 20, &s->p->top_logprobs);
}

static int own_chat_template_kwargs(parse *s, const char *name, json_t *v)
{
    s->kwargs = v;
    if (!json_is_object(v))
        return fail_type(s, name, "an object");
    static const char *const reserved[] = {"messages", "tools", "add_generation_prompt"};
    for (size_t i = 0; i < sizeof reserved / sizeof *reserved; i++)
        if (json_object_get(v, reserved[i]))
            return fail(s, TD_ERROR_INVALID_VALUE, name, "chat_template_kwargs may not set %s",
                        reserved[i]);
    return 0;
}

static int own_thinking(parse *s, const char *name, json_t *v)
{
    const json_t *type = json_object_get(v, "type"), *clear = json_object_get(v, "clear_thinking");
    if (!json_is_object(v) || (type && !json_is_string(type)) || (clear && !json_is_boolean(clear)))
        return fail_type(s, name, "an object with type \"enabled\" or \"disabled\"");
    const char *t = type ? json_string_value(type) : "enabled";
    if (strcmp(t, "enabled") != 0 && strcmp(t, "disabled") != 0)
        return fail_type(s, "thinking.type", "\"enabled\" or \"disabled\"");
    s->think = strcmp(t, "enabled") == 0;
    if (clear)
        s->clear_thinking = json_is_true(clear);
    return 0;
}

static int own_tool_choice(parse *s, const char *name, json_t *v)
{
    const char *t = json_string_value(v);
    if (t && (strcmp(t, "none") == 0 || strcmp(t, "auto") == 0))
        return 0;
    return fail(s, TD_ERROR_UNSUPPORTED, name,
                "tool_choice other than none or auto is not supported");
}

static int own_response_format(parse *s, const char *name, json_t *v)
{
    const char *t = json_string_value(json_object_get(v, "type"));
    if (!t)
        return fail_type(s, name, "an object with a type");
    return strcmp(t, "text") == 0
               ? 0
               : fail(s, TD_ERROR_UNSUPPORTED, name, "response_format %.40s is not supported", t);
}

static int is_nothing(const json_t *v)
{
    return json_is_null(v) || json_is_false(v) ||
           (json_is_string(v) && json_string_length(v) == 0) ||
           (json_is_number(v) && json_number_value(v) == 0) ||
           (json_is_array(v) && json_array_size(v) == 0) ||
           (json_is_object(v) && json_object_size(v) == 0);
}

/* One field of the body. Returns 1 when the table knows it, 0 when not, -EINVAL. */
static int read_field(parse *s, const char *key, json_t *v)
{
    td_params *p = s->p;
    int r = 0;
#define READ_NUM(n, lo, hi, m)    r = read_num(s, n, v, lo, hi, &p->m)
#define READ_INT(n, lo, hi, m)    r = read_int(s, n, v, lo, hi, &p->m)
#define READ_BOOL(n, lo, hi, m)   r = read_bool(s, n, v, &p->m)
#define READ_STR(n, lo, hi, m)    r = read_str(s, n, v, lo, hi, &p->m)
#define READ_OWN(n, lo, hi, m)    r = own_##m(s, n, v)
#define READ_ACCEPT(n, lo, hi, m) r = 0
#define READ_REFUSE(n, lo, hi, m)                                                                  \
    r = is_nothing(v) ? 0                                                                          \
                      : fail(s, TD_ERROR_UNSUPPORTED, n, "%s is not supported by this server", n)
#define TD_FIELD(name, apis, type, lo, hi, member, note)                                           \
    if (((apis)&s->api) && strcmp(key, name) == 0) {                                               \
        if (!json_is_null(v))                                                                      \
            READ_##type(name, lo, hi, member);                                                     \
        return r < 0 ? r : 1;                                                                      \
    }
#include "router/request.def"
#undef TD_FIELD
    return 0;
}

void td_request_docs(FILE *out)
{
    static const char *const types[] = {"number",   "integer",  "boolean", "string",
                                        "see note", "accepted", "refused"};
    fprintf(out, "| field | chat | completions | tokenize | detokenize | type | range | note "
                 "|\n|---|---|---|---|---|---|---|---|\n");
#define TD_FIELD(name, apis, type, lo, hi, member, note)                                           \
    fprintf(out, "| `%s` | %s | %s | %s | %s | %s |", name, (apis)&C ? "✓" : "",                   \
            (apis)&P ? "✓" : "", (apis)&T ? "✓" : "", (apis)&D ? "✓" : "", types[type]);           \
    if (type <= INT)                                                                               \
        fprintf(out, " %.10g to %.10g |", (double)(lo), (double)(hi));                             \
    else                                                                                           \
        fprintf(out, " |");                                                                        \
    fprintf(out, " %s |\n", note);
#include "router/request.def"
#undef TD_FIELD
}

static int read_body(parse *s, json_t *root)
{
    const char *key;
    json_t *v;
    td_strbuf ignored;
    td_strbuf_init(&ignored);
    int r = 0;
    json_object_foreach(root, key, v)
    {
        r = read_field(s, key, v);
        if (r < 0)
            break;
        if (r > 0)
            continue;
        if (s->ctx->strict) {
            r = fail(s, TD_ERROR_INVALID_REQUEST, key,
                     "unknown field %.100s (refused under --strict)", key);
            break;
        }
        if (ignored.len < 400)
            td_strbuf_addf(&ignored, "%s%.60s", ignored.len ? "," : "", key);
        r = 0;
    }
    s->p->ignored = (td_str){td_arena_strndup(s->arena, ignored.data, ignored.len), ignored.len};
    td_strbuf_done(&ignored);
    return r < 0 ? r : 0;
}

/* ---- prompts ---- */

static int add_ids(parse *s, const char *name, const uint32_t *ids, size_t n, td_str text)
{
    if (s->p->n_prompts == TD_PROMPTS_MAX)
        return fail(s, TD_ERROR_INVALID_VALUE, name, "at most %d prompts are taken",
                    TD_PROMPTS_MAX);
    if (n == 0)
        return fail(s, TD_ERROR_INVALID_VALUE, name, "%s is empty: at least one token is needed",
                    name);
    s->p->prompts[s->p->n_prompts++] = (td_prompt){ids, (uint32_t)n, text};
    return 0;
}

static int add_text(parse *s, const char *name, td_str text, int flags)
{
    td_ids ids = {0};
    int r = td_tokenizer_encode(s->ctx->card->tok, text.ptr, text.len, flags, &ids);
    if (r < 0)
        r = fail(s, r == -EILSEQ ? TD_ERROR_INVALID_VALUE : TD_ERROR_INTERNAL, name,
                 r == -EILSEQ ? "%s is not valid UTF-8" : "%s: out of memory", name);
    uint32_t *copy = r < 0 ? NULL : td_arena_alloc_array(s->arena, ids.n ? ids.n : 1, sizeof *copy);
    if (copy && ids.n)
        memcpy(copy, ids.data, ids.n * sizeof *copy);
    if (copy)
        r = add_ids(s, name, copy, ids.n, text);
    td_ids_done(&ids);
    return r;
}

static int add_prompt(parse *s, const char *name, const json_t *v)
{
    if (json_is_string(v))
        return add_text(s, name, copy_str(s, v), s->p->add_special_tokens ? TD_ENCODE_SPECIAL : 0);
    const uint32_t *ids;
    uint32_t n;
    if (read_ids(s, name, v, s->ctx->max_context + 1u, &ids, &n) < 0)
        return -EINVAL;
    return add_ids(s, name, ids, n, (td_str){"", 0});
}

static int read_prompts(parse *s)
{
    const char *name = "prompt";
    if (!s->prompt)
        return fail(s, TD_ERROR_INVALID_REQUEST, name, "prompt is missing");
    const json_t *first = json_array_get(s->prompt, 0);
    if (json_is_string(s->prompt) || json_is_integer(first))
        return add_prompt(s, name, s->prompt);
    if (!first)
        return fail(s, TD_ERROR_INVALID_VALUE, name, "prompt is empty");
    for (size_t i = 0; i < json_array_size(s->prompt); i++)
        if (add_prompt(s, name, json_array_get(s->prompt, i)) < 0)
            return -EINVAL;
    return 0;
}

/* Content parts of type text are joined; other parts are refused: this model reads text only. */
static int flatten_content(parse *s, json_t *message)
{
    json_t *content = json_object_get(message, "content"), *part;
    size_t i;
    if (!json_is_array(content))
        return 0;
    td_strbuf text;
    td_strbuf_init(&text);
    json_array_foreach(content, i, part)
    {
        const char *type = json_string_value(json_object_get(part, "type"));
        const json_t *t = json_object_get(part, "text");
        if (!type || strcmp(type, "text") != 0 || !json_is_string(t)) {
            td_strbuf_done(&text);
            return fail(s, TD_ERROR_INVALID_VALUE, "messages",
                        "a content part is not text: this model reads text only");
        }
        td_strbuf_add(&text, json_string_value(t), json_string_length(t));
    }
    int r = json_object_set_new(message, "content", json_stringn(text.data, text.len));
    td_strbuf_done(&text);
    return r < 0 ? fail(s, TD_ERROR_INTERNAL, NULL, "out of memory") : 0;
}

/* Make each message what templates expect; `developer` becomes `system` (GLM's template drops it
 * silently). */
static int check_message(parse *s, json_t *m, size_t i)
{
    static const char *const roles[] = {"system", "user", "assistant", "tool", "function"};
    const char *role = json_string_value(json_object_get(m, "role"));
    if (!role)
        return fail(s, TD_ERROR_INVALID_VALUE, "messages", "messages[%zu]: role is missing", i);
    if (strcmp(role, "developer") == 0) {
        json_object_set_new(m, "role", json_string("system"));
        role = "system";
    }
    int known = 0;
    for (size_t k = 0; k < sizeof roles / sizeof *roles; k++)
        known |= strcmp(role, roles[k]) == 0;
    if (!known)
        return fail(s, TD_ERROR_INVALID_VALUE, "messages", "messages[%zu]: unknown role %.32s", i,
                    role);
    if (flatten_content(s, m) < 0)
        return -EINVAL;
    const json_t *content = json_object_get(m, "content");
    if (content && !json_is_string(content) && !json_is_null(content))
        return fail(s, TD_ERROR_INVALID_VALUE, "messages",
                    "messages[%zu]: content must be a string or a list of parts", i);
    if ((!content || json_is_null(content)) && strcmp(role, "assistant") != 0)
        return fail(s, TD_ERROR_INVALID_VALUE, "messages", "messages[%zu]: content is missing", i);
    /* vLLM's clients send `reasoning`; templates read reasoning_content */
    json_t *reasoning = json_object_get(m, "reasoning");
    if (json_is_string(reasoning) && !json_object_get(m, "reasoning_content"))
        json_object_set(m, "reasoning_content", reasoning);
    return 0;
}

static int thinking_wanted(const parse *s)
{
    if (s->think >= 0)
        return s->think;
    const char *effort = s->p->reasoning_effort;
    return effort && strcmp(effort, "none") == 0 ? 0 : -1;
}

static json_t *template_vars(parse *s, json_t *messages)
{
    json_t *vars = json_object();
    json_object_set(vars, "messages", messages);
    json_object_set_new(vars, "add_generation_prompt", json_boolean(s->p->add_generation_prompt));
    int think = thinking_wanted(s);
    if (think >= 0)
        json_object_set_new(vars, "enable_thinking", json_boolean(think));
    if (s->clear_thinking >= 0)
        json_object_set_new(vars, "clear_thinking", json_boolean(s->clear_thinking));
    if (s->p->reasoning_effort)
        json_object_set_new(vars, "reasoning_effort", json_string(s->p->reasoning_effort));
    if (s->kwargs) /* explicit variables beat what was derived */
        json_object_update(vars, s->kwargs);
    return vars;
}

static int ends_inside_think(td_str text)
{
    static const char open[] = "<think>";
    size_t n = text.len;
    while (n && (text.ptr[n - 1] == '\n' || text.ptr[n - 1] == ' '))
        n--;
    return n >= sizeof open - 1 &&
           memcmp(text.ptr + n - (sizeof open - 1), open, sizeof open - 1) == 0;
}

static int render_chat(parse *s, json_t *messages)
{
    if (!messages)
        return fail(s, TD_ERROR_INVALID_REQUEST, "messages", "messages is missing");
    if (!s->ctx->card->chat)
        return fail(s, TD_ERROR_UNSUPPORTED, "messages",
                    "model %s has no chat template: use /v1/completions", s->ctx->card->name);
    size_t i;
    json_t *m;
    json_array_foreach(messages, i, m)
    {
        if (check_message(s, m, i) < 0)
            return -EINVAL;
    }
    td_strbuf out;
    td_strbuf_init(&out);
    td_err err = {0};
    json_t *vars = template_vars(s, messages);
    int r = td_template_render(s->ctx->card->chat, vars, NULL, &out, &err);
    json_decref(vars);
    if (r < 0)
        r = fail(s, TD_ERROR_INVALID_VALUE, "messages", "chat template: %s", err.text);
    td_str text = {r < 0 ? "" : td_arena_strndup(s->arena, out.data, out.len), out.len};
    td_strbuf_done(&out);
    if (r < 0)
        return r;
    if (!text.ptr)
        return fail(s, TD_ERROR_INTERNAL, NULL, "out of memory");
    s->p->starts_in_reasoning = ends_inside_think(text);
    return add_text(s, "messages", text, 0); /* the template writes [gMASK]<sop> itself */
}

/* ---- relations between fields ---- */

static int check_lengths(parse *s)
{
    td_params *p = s->p;
    int64_t context = s->ctx->max_context,
            wanted = p->max_completion_tokens >= 0 ? p->max_completion_tokens : p->max_tokens;
    int given = wanted >= 0;
    if (wanted == 0 && !p->echo)
        return fail(s, TD_ERROR_INVALID_VALUE, "max_tokens",
                    "max_tokens must be at least 1 (0 only with echo)");
    if (!given && s->api == TD_API_COMPLETIONS)
        wanted = 16;
    p->drop_generated = wanted == 0;
    int64_t longest = 0;
    for (uint32_t i = 0; i < p->n_prompts; i++)
        longest = TD_MAX(longest, (int64_t)p->prompts[i].n_ids);
    if (longest >= context)
        return fail(s, TD_ERROR_CONTEXT_LENGTH, s->api == TD_API_CHAT ? "messages" : "prompt",
                    "This model's maximum context length is %lld tokens. However, your prompt has "
                    "%lld tokens. "
                    "Shorten the prompt.",
                    (long long)context, (long long)longest);
    int64_t room = context - longest;
    if (given && wanted > room)
        return fail(s, TD_ERROR_CONTEXT_LENGTH, "max_tokens",
                    "This model's maximum context length is %lld tokens. However, you requested "
                    "%lld tokens (%lld in the "
                    "prompt, %lld in the completion). Shorten the prompt or lower max_tokens.",
                    (long long)context, (long long)(longest + wanted), (long long)longest,
                    (long long)wanted);
    p->limit = (uint32_t)(wanted < 0 || wanted > room ? room : TD_MAX(wanted, 1));
    if (p->min_tokens > p->limit)
        return fail(s, TD_ERROR_INVALID_VALUE, "min_tokens",
                    "min_tokens is larger than max_tokens");
    return 0;
}

static int check_relations(parse *s)
{
    td_params *p = s->p;
    if (p->model && strcmp(p->model, s->ctx->card->name) != 0)
        return fail(s, TD_ERROR_MODEL_NOT_FOUND, "model",
                    "model %.100s is not served here; this server has %s", p->model,
                    s->ctx->card->name);
    if (p->top_p <= 0)
        return fail(s, TD_ERROR_INVALID_VALUE, "top_p", "top_p must be above 0");
    if (p->top_logprobs > 0 && !p->logprobs)
        return fail(s, TD_ERROR_INVALID_VALUE, "top_logprobs", "top_logprobs needs logprobs");
    if (p->n * p->n_prompts > TD_CHOICES_MAX)
        return fail(s, TD_ERROR_INVALID_VALUE, "n",
                    "prompts times n is %lld; at most %d choices are taken",
                    (long long)(p->n * p->n_prompts), TD_CHOICES_MAX);
    if (s->best_of && s->best_of != p->n)
        return fail(s, TD_ERROR_UNSUPPORTED, "best_of", "best_of other than n is not supported");
    if (p->echo && p->stream)
        return fail(s, TD_ERROR_UNSUPPORTED, "echo", "echo together with stream is not supported");
    if (p->top_k < 0)
        p->top_k = 0;
    return check_lengths(s);
}

static int detokenize(parse *s)
{
    const uint32_t *ids;
    uint32_t n;
    if (!s->tokens)
        return fail(s, TD_ERROR_INVALID_REQUEST, "tokens", "tokens is missing");
    if (read_ids(s, "tokens", s->tokens, 1u << 22, &ids, &n) < 0)
        return -EINVAL;
    td_strbuf out;
    td_strbuf_init(&out);
    int r = td_tokenizer_decode(s->ctx->card->tok, ids, n, 0, &out);
    s->p->detokenized = (td_str){td_arena_strndup(s->arena, out.data, out.len), out.len};
    td_strbuf_done(&out);
    return r < 0 ? fail(s, TD_ERROR_INVALID_VALUE, "tokens", "tokens holds an id that has no token")
                 : 0;
}

static int finish(parse *s)
{
    int r = 0;
    if (s->api == TD_API_DETOKENIZE)
        return detokenize(s);
    if (s->api == TD_API_CHAT || (s->api == TD_API_TOKENIZE && s->messages))
        r = render_chat(s, s->messages);
    else if (s->p->n_prompts == 0)
        r = read_prompts(s);
    if (r == 0 && s->api != TD_API_TOKENIZE)
        r = check_relations(s);
    td_prefix_key(s->ctx->prefix_secret, s->ctx->prefix_secret_bytes, s->ctx->tenant.ptr,
                  s->ctx->tenant.len, s->p->cache_salt ? s->p->cache_salt : "",
                  s->p->cache_salt ? strlen(s->p->cache_salt) : 0, s->p->prefix_key);
    if (r == 0 && td_arena_failed(s->arena))
        r = fail(s, TD_ERROR_TOO_LARGE, NULL,
                 "the request needs more memory than one request may take");
    return r;
}

void td_params_init(const td_card *card, td_params *p)
{
    *p = (td_params){.n = 1,
                     .max_tokens = -1,
                     .max_completion_tokens = -1,
                     .skip_special_tokens = 1,
                     .add_generation_prompt = 1,
                     .add_special_tokens = 1,
                     .temperature = card->temperature,
                     .top_p = card->top_p,
                     .top_k = card->top_k,
                     .min_p = card->min_p,
                     .repetition_penalty = card->repetition_penalty,
                     .ignored = {"", 0}};
    /* 53 bits: a seed that every JSON reader gives back unchanged */
    td_random_bytes(&p->seed, sizeof p->seed);
    p->seed >>= 11;
}

int td_request_parse(const td_request_context *ctx, td_api api, td_str body, td_arena *arena,
                     td_params *ret_params, td_request_error *ret_error)
{
    parse s = {.ctx = ctx,
               .api = api,
               .arena = arena,
               .p = ret_params,
               .err = ret_error,
               .think = -1,
               .clear_thinking = -1};
    td_params_init(ctx->card, ret_params);
    json_t *root = NULL;
    td_err err = {0};
    int r = td_json_parse(body.ptr, body.len, &(td_json_limits){.max_bytes = body.len + 1}, "body",
                          &root, &err);
    if (r < 0)
        return fail(&s, TD_ERROR_INVALID_JSON, NULL, "%s", err.text);
    if (!json_is_object(root))
        r = fail(&s, TD_ERROR_INVALID_JSON, NULL, "the body must be a JSON object");
    if (r == 0)
        r = read_body(&s, root);
    if (r == 0)
        r = finish(&s);
    json_decref(root);
    return r;
}

int td_request_finish(const td_request_context *ctx, td_api api, json_t *input, td_arena *arena,
                      td_params *params, td_request_error *ret_error)
{
    parse s = {
        .ctx = ctx,
        .api = api,
        .arena = arena,
        .p = params,
        .err = ret_error,
        .messages = json_is_array(input) ? input : NULL,
        .prompt = json_is_string(input) ? input : NULL,
        .think = params->reasoning_effort && strcmp(params->reasoning_effort, "none") == 0 ? 0 : -1,
        .clear_thinking = -1};
    return finish(&s);
}
