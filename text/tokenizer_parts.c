/* SPDX-License-Identifier: Apache-2.0 */
/* The small sections of tokenizer.json, by jansson: added tokens, normalizer, pre-tokenizer,
 * post-processor, decoder. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/file.h"
#include "base/json.h"
#include "text/tokenizer_load.h"
#include "base/banned.h"

static const td_json_limits limits = {.max_bytes = 64 << 20, .max_nodes = 4 << 20};

static int parse(td_loader *l, td_str text, json_t **ret_root)
{
    *ret_root = NULL;
    return text.ptr && !td_str_eq(text, "null")
               ? td_json_parse(text.ptr, text.len, &limits, l->what, ret_root, l->err)
               : 0;
}

static int flag(const json_t *o, const char *key)
{
    return json_is_true(json_object_get(o, key));
}

static td_added_token *append_added(td_loader *l, const char *content, size_t n)
{
    td_added_token *more = realloc(l->t->added, (l->t->n_added + 1) * sizeof *more);
    if (!more)
        return NULL;
    l->t->added = more;
    char *copy = malloc(n + 1);
    if (!copy)
        return NULL;
    memcpy(copy, content, n + 1);
    td_added_token *a = &more[l->t->n_added++];
    *a = (td_added_token){.content = {copy, n}};
    return a;
}

static int add_token(td_loader *l, const json_t *o, uint32_t id, const char *field)
{
    const json_t *content = json_object_get(o, "content");
    size_t n = json_string_length(content);
    if (!json_is_string(content))
        return td_err_set(l->err, -EINVAL, "%s: %s: content must be a string; correct the file",
                          l->what, field);
    if (n == 0)
        return 0;
    td_added_token *a = append_added(l, json_string_value(content), n);
    if (!a)
        return td_err_set(l->err, -ENOMEM, "%s: out of memory", l->what);
    a->id = id;
    a->special = (uint8_t)flag(o, "special");
    a->single_word = (uint8_t)flag(o, "single_word");
    a->lstrip = (uint8_t)flag(o, "lstrip");
    a->rstrip = (uint8_t)flag(o, "rstrip");
    const json_t *normalized = json_object_get(o, "normalized");
    a->normalized = (uint8_t)(normalized ? json_is_true(normalized) : !a->special);
    uint32_t in_vocab;
    if (td_load_find(l, a->content.ptr, n, &in_vocab) == 0) {
        if (in_vocab == id)
            return 0;
        return td_err_set(l->err, -EINVAL,
                          "%s: %s: '%.80s' has id %u here and %u in model.vocab; correct the file",
                          l->what, field, a->content.ptr, id, in_vocab);
    }
    return td_load_token(l, a->content, id, field);
}

int td_load_added(td_loader *l)
{
    json_t *root, *o;
    size_t i;
    int r = parse(l, l->added, &root);
    json_array_foreach(root, i, o)
    {
        const json_t *id = json_object_get(o, "id");
        if (!json_is_integer(id) || json_integer_value(id) < 0 ||
            json_integer_value(id) > UINT32_MAX)
            r = td_err_set(l->err, -EINVAL,
                           "%s: added_tokens[%zu].id must be an integer from 0; correct the file",
                           l->what, i);
        else
            r = add_token(l, o, (uint32_t)json_integer_value(id), "added_tokens");
        if (r < 0)
            break;
    }
    json_decref(root);
    return r;
}

/* tokenizer_config.json may add tokens that tokenizer.json lacks; transformers puts them in, so do
 * we. */
int td_load_config_added(td_loader *l, const char *dir)
{
    TD_AUTO_FREE char *path = dir ? td_path_join(dir, "tokenizer_config.json") : NULL;
    json_t *root, *o;
    const char *key;
    if (!path || access(path, F_OK) != 0)
        return 0;
    int r = td_json_load(path, &limits, &root, l->err);
    if (r < 0)
        return r;
    const char *tokenizer_json = l->what;
    l->what = path;
    json_object_foreach(json_object_get(root, "added_tokens_decoder"), key, o)
    {
        char *end;
        unsigned long id = strtoul(key, &end, 10);
        td_str text = td_str_of(json_string_value(json_object_get(o, "content")));
        if (*end || end == key || id > UINT32_MAX)
            r = td_err_set(l->err, -EINVAL,
                           "%s: added_tokens_decoder: '%.40s' is not an id; correct the file", path,
                           key);
        else if (id >= l->n_ids || !l->texts[id].ptr || l->texts[id].len != text.len ||
                 memcmp(l->texts[id].ptr, text.ptr, text.len) != 0)
            r = add_token(l, o, (uint32_t)id, "added_tokens_decoder");
        if (r < 0)
            break;
    }
    l->what = tokenizer_json;
    json_decref(root);
    return r;
}

static int index_added(td_loader *l)
{
    td_tokenizer *t = l->t;
    td_strbuf scratch, text;
    td_matcher m;
    td_strbuf_init(&scratch);
    td_strbuf_init(&text);
    int r = td_matcher_init(&m, &t->n_interpreted);
    for (size_t i = 0; r == 0 && i < t->n_added; i++) {
        const td_added_token *a = &t->added[i];
        if (a->normalized) {
            uint32_t same;
            r = td_normalizers_apply(&t->normalizers, &m, a->content.ptr, a->content.len, &scratch,
                                     &text);
            if (r == 0)
                r = td_added_set_put(&t->normalized, text.data, text.len, (uint32_t)i);
            /* decoding gives the normalized form back */
            char *copy = r == 0 ? td_arena_strndup(&l->arena, text.data, text.len) : NULL;
            if (copy && td_load_find(l, a->content.ptr, a->content.len, &same) < 0)
                l->texts[a->id] = (td_str){copy, text.len};
            else if (!copy && r == 0)
                r = -ENOMEM;
        } else {
            r = td_added_set_put(&t->raw, a->content.ptr, a->content.len, (uint32_t)i);
        }
    }
    td_matcher_done(&m);
    td_strbuf_done(&scratch);
    td_strbuf_done(&text);
    return r < 0 ? td_err_set(l->err, r, "%s: added_tokens: %s", l->what, td_errno_text(r)) : 0;
}

int td_load_pipeline(td_loader *l)
{
    json_t *normalizer, *pretok = NULL;
    int r = parse(l, l->normalizer, &normalizer);
    if (r == 0)
        r = td_normalizers_parse(&l->t->normalizers, normalizer, l->what, l->err);
    if (r == 0)
        r = parse(l, l->pretok, &pretok);
    if (r == 0)
        r = td_pretoks_parse(&l->t->pretoks, pretok, l->what, l->err);
    json_decref(normalizer);
    json_decref(pretok);
    return r < 0 ? r : index_added(l);
}

static const char *type_of(const json_t *o)
{
    const char *type = json_string_value(json_object_get(o, "type"));
    return type ? type : "(none)";
}

/* {"SpecialToken": {"id": name}}: its ids go to out. */
static int template_token(td_loader *l, const json_t *spec, const char *name, td_ids *out)
{
    size_t i;
    json_t *id;
    const json_t *ids =
        json_object_get(json_object_get(json_object_get(spec, "special_tokens"), name), "ids");
    if (!json_is_array(ids))
        return td_err_set(l->err, -EINVAL,
                          "%s: post_processor.special_tokens lacks '%.60s'; correct the file",
                          l->what, name);
    json_array_foreach(ids, i, id)
    {
        if (!json_is_integer(id) || json_integer_value(id) < 0 ||
            json_integer_value(id) >= l->n_ids || !l->texts[json_integer_value(id)].ptr)
            return td_err_set(
                l->err, -EINVAL,
                "%s: post_processor: '%.60s' has an id without a token; correct the file", l->what,
                name);
        td_ids_add(out, (uint32_t)json_integer_value(id));
    }
    return 0;
}

static int template_processing(td_loader *l, const json_t *spec, td_ids *before, td_ids *after)
{
    size_t i;
    json_t *piece;
    int n_sequences = 0, r = 0;
    json_array_foreach(json_object_get(spec, "single"), i, piece)
    {
        const char *name =
            json_string_value(json_object_get(json_object_get(piece, "SpecialToken"), "id"));
        const char *seq =
            json_string_value(json_object_get(json_object_get(piece, "Sequence"), "id"));
        if (seq && strcmp(seq, "A") == 0)
            n_sequences++;
        else if (name)
            r = template_token(l, spec, name, n_sequences ? after : before);
        else
            r = td_err_set(l->err, -EINVAL,
                           "%s: post_processor.single[%zu] is neither SpecialToken nor Sequence A; "
                           "correct the file",
                           l->what, i);
        if (r < 0)
            return r;
    }
    if (n_sequences != 1)
        return td_err_set(l->err, -ENOTSUP,
                          "%s: post_processor.single must hold Sequence A once; correct the file",
                          l->what);
    return 0;
}

/* Later processors go round earlier ones. */
static int post_step(td_loader *l, const json_t *spec)
{
    const char *type = type_of(spec);
    if (strcmp(type, "ByteLevel") == 0)
        return 0; /* offsets only */
    if (strcmp(type, "TemplateProcessing") != 0)
        return td_err_set(l->err, -ENOTSUP,
                          "%s: post_processor.type '%.60s' is not supported; use ByteLevel, "
                          "TemplateProcessing or null",
                          l->what, type);
    td_ids before = {0};
    int r = template_processing(l, spec, &before, &l->t->suffix);
    for (size_t i = 0; i < l->t->prefix.n; i++)
        td_ids_add(&before, l->t->prefix.data[i]);
    td_ids_done(&l->t->prefix);
    l->t->prefix = before;
    if (r == 0 && (before.failed || l->t->suffix.failed))
        r = td_err_set(l->err, -ENOMEM, "%s: out of memory", l->what);
    return r;
}

int td_load_post(td_loader *l)
{
    json_t *root, *step;
    size_t i;
    int r = parse(l, l->post, &root);
    if (root && strcmp(type_of(root), "Sequence") == 0) {
        json_array_foreach(json_object_get(root, "processors"), i, step)
        {
            r = post_step(l, step);
            if (r < 0)
                break;
        }
    } else if (root) {
        r = post_step(l, root);
    }
    json_decref(root);
    return r;
}

int td_load_decoder(td_loader *l)
{
    json_t *root, *step;
    size_t i, n = 0;
    const char *bad = NULL;
    int r = parse(l, l->decoder, &root);
    if (r < 0)
        return r;
    const char *type = type_of(root);
    if (strcmp(type, "Sequence") == 0) {
        json_array_foreach(json_object_get(root, "decoders"), i, step)
        {
            /* ByteLevel gives one string; to fuse it changes nothing */
            if (strcmp(type_of(step), "ByteLevel") == 0 && n == 0)
                n++;
            else if (strcmp(type_of(step), "Fuse") != 0)
                bad = type_of(step);
        }
    } else if (strcmp(type, "ByteLevel") == 0) {
        n++;
    } else {
        bad = type;
    }
    if (bad || n == 0)
        r = td_err_set(l->err, -ENOTSUP, "%s: decoder '%.60s' is not supported; only ByteLevel is",
                       l->what, bad ? bad : type);
    json_decref(root);
    return r;
}
