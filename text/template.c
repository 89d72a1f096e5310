/* SPDX-License-Identifier: Apache-2.0 */
#include "text/template.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/file.h"
#include "base/json.h"
#include "text/template_ast.h"
#include "text/template_run.h"
#include "base/banned.h"

enum {
    STEPS_DEFAULT = 2000000,
    DEPTH_DEFAULT = 64,
    OUTPUT_DEFAULT = 16 << 20,
    MEMORY_MIN = 64 << 20,
    ARENA_MAX = 256 << 20
};

struct td_template {
    td_arena arena;
    char *name;
    td_nodes body;
    json_t *defaults; /* variables the caller need not give: bos_token and the like; NULL = none */
};

void td_template_free(td_template *t)
{
    if (!t)
        return;
    td_arena_done(&t->arena);
    json_decref(t->defaults);
    free(t->name);
    free(t);
}

static int compile(td_template *t, const char *source, size_t n, td_err *reterr_err)
{
    td_token_t *tokens = NULL;
    size_t n_tokens = 0;
    int r = td_tpl_lex(t->name, source, n, &t->arena, &tokens, &n_tokens, reterr_err);
    if (r == 0)
        r = td_tpl_parse(t->name, tokens, n_tokens, &t->arena, &t->body, reterr_err);
    free(tokens);
    return r;
}

int td_template_compile(const char *name, const char *source, size_t n, td_template **ret_tpl,
                        td_err *reterr_err)
{
    if (n > TD_TPL_SOURCE_MAX)
        return td_err_set(reterr_err, -EFBIG, "%s: a template of more than %d MiB is refused", name,
                          TD_TPL_SOURCE_MAX >> 20);
    if (!td_utf8_valid(source, n))
        return td_err_set(reterr_err, -EINVAL, "%s: not UTF-8; save the template as UTF-8", name);
    td_template *t = calloc(1, sizeof *t);
    if (!t || !(t->name = strdup(name))) {
        free(t);
        return td_err_set(reterr_err, -ENOMEM, "%s: out of memory", name);
    }
    td_arena_init(&t->arena, ARENA_MAX);
    int r = compile(t, source, n, reterr_err);
    if (r < 0) {
        td_template_free(t);
        return r;
    }
    *ret_tpl = t;
    return 0;
}

td_value td_run_fail(td_run *r, int code, const char *fmt, ...)
{
    char text[400];
    va_list ap;
    if (!r->code) {
        r->code = r->arena.failed && code != -E2BIG ? -ENOMEM : code;
        va_start(ap, fmt);
        vsnprintf(text, sizeof text, fmt, ap);
        va_end(ap);
        td_err_set(r->err, r->code, "%s:%u: %s", r->tpl->name, r->line, text);
    }
    return td_v_undefined((td_str){0});
}

int td_run_step(td_run *r, uint64_t n)
{
    if (n >= r->steps_left) {
        r->steps_left = 0;
        td_run_fail(
            r, -E2BIG,
            "the template takes too many steps; it loops, or the conversation is too long for it");
        return 0;
    }
    r->steps_left -= n;
    return 1;
}

json_t *td_tpl_variable(const td_run *r, td_str name)
{
    json_t *v = json_object_getn(r->vars, name.ptr, name.len);
    return v ? v : json_object_getn(r->tpl->defaults, name.ptr, name.len);
}

int td_template_render(const td_template *t, json_t *vars, const td_template_budget *budget,
                       td_strbuf *out, td_err *reterr_err)
{
    static const td_template_budget defaults;
    const td_template_budget *b = budget ? budget : &defaults;
    td_strbuf text;
    td_run r = {.tpl = t, .vars = vars, .err = reterr_err, .out = &text, .line = 1};
    td_strbuf_init(&text);
    text.max_bytes = b->max_output ? b->max_output : OUTPUT_DEFAULT;
    r.steps_left = b->max_steps ? b->max_steps : STEPS_DEFAULT;
    r.max_depth = b->max_depth ? b->max_depth : DEPTH_DEFAULT;
    r.utc = b->now_s != 0;
    r.now = b->now_s ? b->now_s : (int64_t)time(NULL);
    td_arena_init(&r.arena, MEMORY_MIN + text.max_bytes * 4);
    td_tpl_run(&r, &t->body);
    if (r.code == 0)
        td_strbuf_add(out, text.data, text.len);
    td_strbuf_done(&text);
    td_arena_done(&r.arena);
    if (r.code == 0 && out->failed)
        return td_err_set(reterr_err, -ENOMEM, "%s: out of memory", t->name);
    return r.code;
}

/* Special tokens as transformers hands them to templates: strings, or objects with "content". */
static void take_special(json_t *config, json_t *into)
{
    static const char *const keys[] = {"bos_token", "eos_token", "unk_token", "sep_token",
                                       "pad_token", "cls_token", "mask_token"};
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
        json_t *v = json_object_get(config, keys[i]);
        if (json_is_object(v))
            v = json_object_get(v, "content");
        if (json_is_string(v))
            json_object_set(into, keys[i], v);
    }
}

/* "chat_template" is a string, or a list of {name, template} of which "default" is ours. */
static const json_t *find_template(const json_t *config)
{
    json_t *v = json_object_get(config, "chat_template"), *one;
    size_t i;
    if (!json_is_array(v))
        return json_is_string(v) ? v : NULL;
    json_array_foreach(v, i, one)
    {
        const char *name = json_string_value(json_object_get(one, "name"));
        json_t *text = json_object_get(one, "template");
        if (name && strcmp(name, "default") == 0 && json_is_string(text))
            return text;
    }
    return NULL;
}

static int open_config(const char *path, json_t **ret_config, td_err *reterr_err)
{
    static const td_json_limits limits = {.max_bytes = 64 << 20, .max_nodes = 4 << 20};
    *ret_config = NULL;
    return access(path, F_OK) == 0 ? td_json_load(path, &limits, ret_config, reterr_err) : 0;
}

static int open_with(const char *dir, const char *jinja, const char *config_path, json_t *config,
                     td_template **ret_tpl, td_err *reterr_err)
{
    TD_AUTO_FREE char *text = NULL;
    size_t n = 0;
    int r;
    if (access(jinja, F_OK) == 0) {
        r = td_file_read(jinja, TD_TPL_SOURCE_MAX, &text, &n, reterr_err);
        return r < 0 ? r : td_template_compile(jinja, text, n, ret_tpl, reterr_err);
    }
    const json_t *in_config = find_template(config);
    if (!in_config)
        return td_err_set(
            reterr_err, -ENOENT,
            "%s: no chat_template.jinja, and no \"chat_template\" in tokenizer_config.json; "
            "put the model's chat_template.jinja there",
            dir);
    return td_template_compile(config_path, json_string_value(in_config),
                               json_string_length(in_config), ret_tpl, reterr_err);
}

int td_template_open(const char *dir, td_template **ret_tpl, td_err *reterr_err)
{
    TD_AUTO_FREE char *jinja = td_path_join(dir, "chat_template.jinja");
    TD_AUTO_FREE char *config_path = td_path_join(dir, "tokenizer_config.json");
    json_t *config = NULL, *defaults = json_object();
    td_template *t = NULL;
    int r = jinja && config_path && defaults
                ? 0
                : td_err_set(reterr_err, -ENOMEM, "%s: out of memory", dir);
    if (r == 0)
        r = open_config(config_path, &config, reterr_err);
    if (r == 0)
        r = open_with(dir, jinja, config_path, config, &t, reterr_err);
    if (r == 0) {
        take_special(config, defaults);
        t->defaults = TD_TAKE(defaults);
        *ret_tpl = t;
    }
    json_decref(config);
    json_decref(defaults);
    return r;
}
