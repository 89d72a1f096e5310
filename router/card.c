/* SPDX-License-Identifier: Apache-2.0 */
#include "router/card.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "base/cleanup.h"
#include "base/file.h"
#include "base/identity.h"
#include "base/json.h"
#include "base/banned.h"

static const char *const kept_tokens[] = {
    "<think>",    "</think>",    "<tool_call>",  "</tool_call>",    "<arg_key>",
    "</arg_key>", "<arg_value>", "</arg_value>", "<tool_response>", "</tool_response>"};

static int load(const char *dir, const char *name, json_t **ret_root, td_err *reterr_err)
{
    TD_AUTO_FREE char *path = td_path_join(dir, name);
    if (!path)
        return td_err_set(reterr_err, -ENOMEM, "%s: out of memory", dir);
    return td_json_load(path, NULL, ret_root, reterr_err);
}

static int read_config(td_card *c, td_err *reterr_err)
{
    json_t *root = NULL;
    int r = load(c->dir, "config.json", &root, reterr_err);
    if (r < 0)
        return r;
    int64_t vocab = 0, context = 0;
    r = td_json_get_int(root, "config.json", "vocab_size", 1, 1 << 24, &vocab, reterr_err);
    if (r == 0)
        r = td_err_set(reterr_err, -EINVAL, "%s/config.json: vocab_size is missing", c->dir);
    if (r > 0) {
        r = td_json_get_int(root, "config.json", "max_position_embeddings", 1, 1 << 24, &context,
                            reterr_err);
        if (r == 0)
            r = td_err_set(reterr_err, -EINVAL,
                           "%s/config.json: max_position_embeddings is missing", c->dir);
    }
    json_decref(root);
    c->vocab_size = (uint32_t)vocab;
    c->max_context = (uint32_t)context;
    return r < 0 ? r : 0;
}

static int read_generation(td_card *c, td_err *reterr_err)
{
    static const char what[] = "generation_config.json";
    json_t *root = NULL;
    int r = load(c->dir, what, &root, reterr_err);
    if (r == -ENOENT)
        return 0;
    if (r < 0)
        return r;
    int sample = 1;
    if ((r = td_json_get_num(root, what, "temperature", 0, 100, &c->temperature, reterr_err)) >=
            0 &&
        (r = td_json_get_num(root, what, "top_p", 0, 1, &c->top_p, reterr_err)) >= 0 &&
        (r = td_json_get_num(root, what, "min_p", 0, 1, &c->min_p, reterr_err)) >= 0 &&
        (r = td_json_get_num(root, what, "repetition_penalty", 0.01, 100, &c->repetition_penalty,
                             reterr_err)) >= 0 &&
        (r = td_json_get_int(root, what, "top_k", 0, 1 << 24, &c->top_k, reterr_err)) >= 0)
        r = td_json_get_bool(root, what, "do_sample", &sample, reterr_err);
    json_decref(root);
    if (!sample)
        c->temperature = 0;
    return r < 0 ? r : 0;
}

static char *base_name(const char *dir)
{
    size_t n = strlen(dir);
    while (n > 1 && dir[n - 1] == '/')
        n--;
    size_t at = n;
    while (at > 0 && dir[at - 1] != '/')
        at--;
    return strndup(dir + at, n - at);
}

static void find_kept(td_card *c)
{
    for (size_t i = 0; i < sizeof kept_tokens / sizeof *kept_tokens; i++) {
        uint32_t id;
        if (td_tokenizer_find(c->tok, kept_tokens[i], strlen(kept_tokens[i]), &id) == 0)
            c->kept[c->n_kept++] = id;
    }
}

static int open_text(td_card *c, td_err *reterr_err)
{
    int r = td_identity_read(c->dir, c->config_hash, c->tokenizer_hash, reterr_err);
    if (r < 0)
        return r;
    r = td_tokenizer_open(c->dir, c->vocab_size, &c->tok, reterr_err);
    if (r < 0)
        return r;
    r = td_template_open(c->dir, &c->chat, reterr_err);
    if (r == -ENOENT)
        r = 0; /* completions only; chat answers with a clear error */
    if (r == 0)
        find_kept(c);
    return r;
}

int td_card_open(const char *dir, const char *name, td_card **ret_card, td_err *reterr_err)
{
    if (!dir || !*dir)
        return td_err_set(reterr_err, -EINVAL, "no model: give --model DIR");
    td_card *c = calloc(1, sizeof *c);
    if (!c)
        return td_err_set(reterr_err, -ENOMEM, "%s: out of memory", dir);
    c->temperature = c->top_p = c->repetition_penalty = 1;
    c->dir = strdup(dir);
    c->name = name && *name ? strdup(name) : base_name(dir);
    struct stat st;
    TD_AUTO_FREE char *config = td_path_join(dir, "config.json");
    if (config && stat(config, &st) == 0)
        c->created = st.st_mtime;
    int r = c->dir && c->name ? 0 : td_err_set(reterr_err, -ENOMEM, "%s: out of memory", dir);
    if (r == 0)
        r = read_config(c, reterr_err);
    if (r == 0)
        r = read_generation(c, reterr_err);
    if (r == 0)
        r = open_text(c, reterr_err);
    if (r < 0) {
        td_card_free(c);
        return r;
    }
    *ret_card = c;
    return 0;
}

void td_card_free(td_card *c)
{
    if (!c)
        return;
    td_tokenizer_free(c->tok);
    td_template_free(c->chat);
    free(c->dir);
    free(c->name);
    free(c);
}

int td_card_is_text(const td_card *c, uint32_t id)
{
    if (!td_tokenizer_is_special(c->tok, id))
        return 1;
    for (uint32_t i = 0; i < c->n_kept; i++)
        if (c->kept[i] == id)
            return 1;
    return 0;
}
