/* SPDX-License-Identifier: Apache-2.0 */
#include "engine/golden.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bug.h"
#include "base/cleanup.h"
#include "base/file.h"
#include "base/json.h"
#include "engine/internal.h"
#include "engine/safetensors.h"

#include "base/banned.h"

enum { PROMPTS_MAX = 64, LAYERS_MAX = 128, IDS_MAX = 1 << 20 };

/* What a kind must keep unless golden.json says otherwise. gap: a greedy id must be the golden's
 * where its logit leads by more. */
static const struct {
    const char *name, *allowed;
    double error, margin, gap;
} kinds[TD_GOLDEN_KINDS] = {{"f32", "injections", 2e-5, 1e-4, 0.0},
                            {"bf16", "injections_bf16", 2e-2, 4e-2, 4e-2},
                            {"bf16 with int8 operands", "injections_i8", 4e-2, 8e-2, 8e-2}};

typedef struct prompt {
    const char *name;
    size_t n_prompt, n_tokens;
    int64_t allowed[TD_GOLDEN_KINDS]; /* -1: not compared */
} prompt;

struct td_golden {
    json_t *doc;
    td_st *st;
    char file[400]; /* golden.safetensors, for errors */
    const char *model;
    char maker[160];
    int only_bf16;
    double error_bf16, margin_bf16; /* 0: the kind's */
    prompt prompts[PROMPTS_MAX];
    size_t n_prompts;
};

/* ---- golden.json ---- */

static int read_prompt(const json_t *o, const char *what, prompt *p, td_err *err)
{
    int64_t n_prompt = 0, n_tokens = 0;
    p->name = "";
    int r = td_json_get_str(o, what, "name", &p->name, err);
    if (r >= 0)
        r = td_json_get_int(o, what, "n_prompt", 1, IDS_MAX, &n_prompt, err);
    if (r > 0)
        r = td_json_get_int(o, what, "n_tokens", 1, IDS_MAX, &n_tokens, err);
    if (r == 0)
        r = td_err_set(err, -EINVAL, "%s: a prompt lacks n_prompt or n_tokens", what);
    p->n_prompt = (size_t)n_prompt;
    p->n_tokens = (size_t)n_tokens;
    for (int k = 0; r >= 0 && k < TD_GOLDEN_KINDS; k++) {
        p->allowed[k] = -1;
        r = td_json_get_int(o, what, kinds[k].allowed, 0, INT32_MAX, &p->allowed[k], err);
    }
    return r < 0 ? r : 0;
}

static void read_maker(td_golden *g, const char *what)
{
    static const char *const who[] = {"transformers", "torch"};
    const json_t *by = json_object_get(g->doc, "made_by");
    td_err ignored = {0};
    for (size_t i = 0; i < TD_ARRAY_LEN(who); i++) {
        const char *version = NULL;
        size_t at = strlen(g->maker);
        if (td_json_get_str(by, what, who[i], &version, &ignored) > 0)
            snprintf(g->maker + at, sizeof g->maker - at, "%s%s %.40s", at ? ", " : "", who[i],
                     version);
    }
}

static int read_doc(td_golden *g, const char *what, td_err *err)
{
    const char *dtype = "f32";
    const json_t *prompts = json_object_get(g->doc, "prompts");
    int r = td_json_get_str(g->doc, what, "model", &g->model, err);
    if (r == 0)
        r = td_err_set(err, -EINVAL, "%s: model is missing", what);
    r = r < 0 ? r : td_json_get_str(g->doc, what, "dtype", &dtype, err);
    r = r < 0 ? r : td_json_get_num(g->doc, what, "error_bf16", 0, 1, &g->error_bf16, err);
    r = r < 0 ? r : td_json_get_num(g->doc, what, "margin_bf16", 0, 1, &g->margin_bf16, err);
    if (r < 0)
        return r;
    if (strcmp(dtype, "f32") != 0 && strcmp(dtype, "bf16") != 0)
        return td_err_set(err, -EINVAL, "%s: dtype is '%.20s', not f32 or bf16", what, dtype);
    g->only_bf16 = dtype[0] == 'b';
    read_maker(g, what);
    g->n_prompts = json_array_size(prompts);
    if (!g->n_prompts || g->n_prompts > PROMPTS_MAX)
        return td_err_set(err, -EINVAL, "%s: prompts is not an array of 1 to %d", what,
                          PROMPTS_MAX);
    for (size_t i = 0; r >= 0 && i < g->n_prompts; i++)
        r = read_prompt(json_array_get(prompts, i), what, &g->prompts[i], err);
    return r < 0 ? r : 0;
}

int td_golden_open(const char *dir, td_golden **ret_golden, td_err *reterr_err)
{
    td_golden *g = calloc(1, sizeof *g);
    TD_AUTO_FREE char *json = td_path_join(dir, "golden.json");
    if (!g || !json) {
        free(g);
        return td_err_set(reterr_err, -ENOMEM, "out of memory");
    }
    snprintf(g->file, sizeof g->file, "%.300s/golden.safetensors", dir);
    int r = td_json_load(json, NULL, &g->doc, reterr_err);
    r = r < 0 ? r : read_doc(g, json, reterr_err);
    r = r < 0 ? r : td_st_open_file(g->file, &g->st, reterr_err);
    if (r < 0) {
        td_golden_close(g);
        return r;
    }
    *ret_golden = g;
    return 0;
}

void td_golden_close(td_golden *g)
{
    if (!g)
        return;
    td_st_close(g->st);
    json_decref(g->doc);
    free(g);
}

const char *td_golden_model(const td_golden *g)
{
    return g->model;
}

const char *td_golden_maker(const td_golden *g)
{
    return g->maker;
}

int td_golden_has(const td_golden *g, td_golden_kind kind)
{
    if (kind == TD_GOLDEN_F32 && g->only_bf16)
        return 0;
    for (size_t i = 0; i < g->n_prompts; i++)
        if (g->prompts[i].allowed[kind] < 0)
            return 0;
    return 1;
}

const char *td_golden_kind_name(td_golden_kind kind)
{
    return kinds[kind].name;
}

size_t td_golden_prompts(const td_golden *g)
{
    return g->n_prompts;
}

const char *td_golden_name(const td_golden *g, size_t i)
{
    return g->prompts[i].name;
}

size_t td_golden_ids(const td_golden *g, size_t i)
{
    return g->prompts[i].n_prompt + g->prompts[i].n_tokens;
}

/* ---- one prompt ---- */

/* What a layer chose, [n][width], with its margins [n]; choices NULL: not in the golden. */
typedef struct choices {
    int32_t *chosen;
    float *margin;
} choices;

typedef struct follower {
    const td_golden *g;
    size_t index; /* of the prompt */
    const td_config *c;
    td_golden_outcome *out;
    double margin, gap;
    int32_t *ids, *rows;
    float *logits, *gaps, *own; /* own: a row of the engine's */
    size_t n_ids, n_rows;
    uint32_t vocab;
    choices selected[LAYERS_MAX], routed[LAYERS_MAX];
    td_err *err;
    int failed; /* sticky */
} follower;

/* A tensor [rows][columns] copied to where it is aligned; columns 0: [rows]. *rows 0: any number,
 * told. NULL: it is missing (an error unless optional) or has another shape or type. */
static void *take(follower *f, const char *what, int layer, const char *type, size_t *rows,
                  size_t columns, int optional)
{
    char name[64], of[16] = "";
    if (layer >= 0)
        snprintf(of, sizeof of, ".%d", layer);
    snprintf(name, sizeof name, "%zu.%s%s", f->index, what, of);
    const td_st_tensor *t = f->failed ? NULL : td_st_find(f->g->st, name);
    if (!t) {
        if (!optional && !f->failed)
            f->failed = td_err_set(f->err, -EINVAL, "%s: tensor %s is missing", f->g->file, name);
        return NULL;
    }
    size_t n = t->rank ? (size_t)t->shape[0] : 0;
    if (strcmp(t->type, type) != 0 || t->rank != (columns ? 2 : 1) || !n || (*rows && *rows != n) ||
        (columns && t->shape[1] != columns)) {
        f->failed = td_err_set(f->err, -EINVAL, "%s: tensor %s is not %s [%zu%s%.0zu]", f->g->file,
                               name, type, *rows, columns ? "][" : "", columns);
        return NULL;
    }
    void *p = malloc(t->bytes);
    if (!p) {
        f->failed = td_err_set(f->err, -ENOMEM, "out of memory");
        return NULL;
    }
    memcpy(p, t->data, t->bytes);
    *rows = n;
    return p;
}

/* Numbers from least to most - 1, or fail. */
static void within(follower *f, const int32_t *v, size_t n, int32_t least, uint32_t most,
                   const char *what)
{
    for (size_t i = 0; v && i < n && !f->failed; i++)
        if (v[i] < least || (v[i] >= 0 && (uint32_t)v[i] >= most))
            f->failed =
                td_err_set(f->err, -EINVAL, "%s: tensor %zu.%s: %d at %zu is out of its range",
                           f->g->file, f->index, what, v[i], i);
}

/* A selection names positions up to its row's own, ascending. */
static void check_selection(follower *f, const int32_t *v, size_t n, uint32_t width)
{
    for (size_t p = 0; v && p < n && !f->failed; p++)
        for (uint32_t i = 0; i < width; i++) {
            int32_t at = v[p * width + i];
            if (at < -1 || at > (int32_t)p || (i && at >= 0 && at <= v[p * width + i - 1])) {
                f->failed = td_err_set(f->err, -EINVAL,
                                       "%s: a selection of prompt %zu names position %d at row %zu",
                                       f->g->file, f->index, at, p);
                return;
            }
        }
}

static void take_choices(follower *f)
{
    size_t n = f->n_ids - 1;
    for (uint32_t l = 0; l < f->c->n_layers && l < LAYERS_MAX && !f->failed; l++) {
        choices *s = &f->selected[l], *r = &f->routed[l];
        if (f->c->arch != TD_ARCH_GLM_MOE_DSA)
            continue;
        s->chosen = take(f, "select", (int)l, "I32", &n, f->c->index_topk, 1);
        if (s->chosen)
            s->margin = take(f, "select_margin", (int)l, "F32", &n, 0, 0);
        check_selection(f, s->chosen, n, f->c->index_topk);
        r->chosen = take(f, "experts", (int)l, "I32", &n, f->c->top_k, 1);
        if (r->chosen)
            r->margin = take(f, "experts_margin", (int)l, "F32", &n, 0, 0);
        within(f, r->chosen, n * f->c->top_k, 0, f->c->n_experts, "experts");
    }
}

static void take_prompt(follower *f)
{
    const prompt *p = &f->g->prompts[f->index];
    size_t n_tokens = p->n_tokens;
    f->n_ids = p->n_prompt + p->n_tokens;
    f->ids = take(f, "ids", -1, "I32", &f->n_ids, 0, 0);
    within(f, f->ids, f->n_ids, 0, f->vocab, "ids");
    f->gaps = take(f, "gap", -1, "F32", &n_tokens, 0, 0);
    f->rows = take(f, "rows", -1, "I32", &f->n_rows, 0, 0);
    within(f, f->rows, f->n_rows, 0, (uint32_t)f->n_ids - 1, "rows");
    for (size_t i = 1; f->rows && i < f->n_rows && !f->failed; i++)
        if (f->rows[i] <= f->rows[i - 1])
            f->failed = td_err_set(f->err, -EINVAL, "%s: tensor %zu.rows does not ascend",
                                   f->g->file, f->index);
    f->logits = take(f, "logits", -1, "F32", &f->n_rows, f->vocab, 0);
    take_choices(f);
    f->own = f->failed ? NULL : malloc(f->vocab * sizeof *f->own);
    if (!f->own && !f->failed)
        f->failed = td_err_set(f->err, -ENOMEM, "out of memory");
}

static void drop_prompt(follower *f)
{
    void *all[] = {f->ids, f->rows, f->logits, f->gaps, f->own};
    for (size_t i = 0; i < TD_ARRAY_LEN(all); i++)
        free(all[i]);
    for (int l = 0; l < LAYERS_MAX; l++) {
        free(f->selected[l].chosen);
        free(f->selected[l].margin);
        free(f->routed[l].chosen);
        free(f->routed[l].margin);
    }
}

/* ---- choices ---- */

static void note_wrong(td_golden_outcome *o, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));

static void note_wrong(td_golden_outcome *o, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    if (o->wrong++ == 0)
        vsnprintf(o->first_wrong, sizeof o->first_wrong, fmt, ap);
    va_end(ap);
}

/* At a safe margin the engine must have chosen what the golden says; else the golden's choice is
 * put in its place, so that everything behind it is still compared. */
static void decide(follower *f, const char *what, uint32_t layer, uint32_t position, double margin)
{
    if (margin >= f->margin)
        note_wrong(f->out, "%s of layer %u at position %u differs at margin %g", what, layer,
                   position, margin);
    f->out->injections++;
}

static void on_selected(void *arg, uint32_t layer, uint32_t position, uint32_t *selected,
                        uint32_t *n, uint32_t topk, float own)
{
    follower *f = arg;
    if (layer >= LAYERS_MAX || !f->selected[layer].chosen || position + 1 >= f->n_ids)
        return;
    const choices *c = &f->selected[layer];
    const int32_t *want = c->chosen + (size_t)position * topk;
    uint32_t n_want = 0;
    while (n_want < topk && want[n_want] >= 0)
        n_want++;
    if (n_want != *n || memcmp(want, selected, n_want * sizeof *want) != 0)
        decide(f, "selection", layer, position, (double)c->margin[position]);
    memcpy(selected, want, n_want * sizeof *want);
    *n = n_want;
}

static int same_set(const int32_t *want, const uint32_t *got, uint32_t k)
{
    for (uint32_t i = 0; i < k; i++) {
        uint32_t j = 0;
        while (j < k && got[j] != (uint32_t)want[i])
            j++;
        if (j == k)
            return 0;
    }
    return 1;
}

static void on_routed(void *arg, uint32_t layer, uint32_t position, const float *scores,
                      uint32_t *experts, float *weights, uint32_t k, float own)
{
    follower *f = arg;
    if (layer >= LAYERS_MAX || !f->routed[layer].chosen || position + 1 >= f->n_ids)
        return;
    const choices *c = &f->routed[layer];
    const int32_t *want = c->chosen + (size_t)position * k;
    if (same_set(want, experts, k))
        return;
    decide(f, "experts", layer, position, (double)c->margin[position]);
    float sum = 0.0f;
    for (uint32_t i = 0; i < k; i++)
        sum += scores[want[i]];
    for (uint32_t i = 0; i < k; i++) {
        experts[i] = (uint32_t)want[i];
        weights[i] = (f->c->norm_topk ? scores[want[i]] / (sum + 1e-20f) : scores[want[i]]) *
                     f->c->routed_scale;
    }
}

/* ---- the walk ---- */

static double row_error(const float *got, const float *want, uint32_t vocab)
{
    double diff = 0, max = 0;
    for (uint32_t i = 0; i < vocab; i++) {
        double d = fabs((double)got[i] - (double)want[i]);
        diff = d > diff || isnan(d) ? d : diff;
        max = fabs((double)want[i]) > max ? fabs((double)want[i]) : max;
    }
    return diff / max;
}

static uint32_t argmax(const float *v, uint32_t n)
{
    uint32_t best = 0;
    for (uint32_t i = 1; i < n; i++)
        if (v[i] > v[best])
            best = i;
    return best;
}

/* Compute up to and including position p; its logits in f->own. */
static int compute_to(follower *f, td_engine *e, td_seq *s, size_t p)
{
    while (td_seq_computed(s) <= p) {
        size_t left = p + 1 - td_seq_computed(s);
        uint32_t n = left < TD_GOLDEN_MAX_ROWS ? (uint32_t)left : TD_GOLDEN_MAX_ROWS;
        td_step_item it = {.seq = s, .n_tokens = n, .want_logits = n == left, .ret_logits = f->own};
        int r = td_engine_step(e, &it, 1, NULL);
        if (r < 0)
            return td_err_set(f->err, r, "prompt '%.60s', position %zu: %s",
                              f->g->prompts[f->index].name, p, td_errno_text(r));
    }
    return 0;
}

static void compare_row(follower *f)
{
    double e = row_error(f->own, f->logits + (size_t)f->vocab * f->out->rows++, f->vocab);
    f->out->error = e > f->out->error || isnan(e) ? e : f->out->error;
}

static void compare_id(follower *f, size_t p)
{
    size_t n_prompt = f->g->prompts[f->index].n_prompt;
    uint32_t id = argmax(f->own, f->vocab);
    if (!((double)f->gaps[p + 1 - n_prompt] > f->gap))
        return;
    f->out->tokens++;
    if (id != (uint32_t)f->ids[p + 1])
        note_wrong(f->out, "token %zu is %u, not %d", p + 1, id, f->ids[p + 1]);
}

/* Prefill the prompt (stopping at the rows whose logits are there), then decode along the golden's
 * ids. */
static int walk(follower *f, td_engine *e, td_seq *s)
{
    size_t n_prompt = f->g->prompts[f->index].n_prompt;
    size_t p = (size_t)f->rows[0] < n_prompt ? (size_t)f->rows[0] : n_prompt - 1;
    while (p + 1 < f->n_ids) {
        uint32_t r = f->out->rows;
        int code = compute_to(f, e, s, p);
        if (code < 0)
            return code;
        if (r < f->n_rows && (size_t)f->rows[r] == p)
            compare_row(f);
        if (p + 1 >= n_prompt) {
            compare_id(f, p);
            td_seq_append(s, (uint32_t)f->ids[p + 1]);
            p++;
        } else {
            r = f->out->rows;
            p = r < f->n_rows && (size_t)f->rows[r] < n_prompt ? (size_t)f->rows[r] : n_prompt - 1;
        }
    }
    return 0;
}

static int new_seq(follower *f, td_engine *e, td_seq **ret_seq)
{
    const prompt *p = &f->g->prompts[f->index];
    td_seq_spec spec = {.ids = (const uint32_t *)f->ids,
                        .n_ids = p->n_prompt,
                        .n_prompt = p->n_prompt,
                        .sampling = {.top_p = 1.0f, .repetition_penalty = 1.0f},
                        .max_tokens = p->n_tokens,
                        .ignore_eos = 1};
    int r = td_seq_new(e, &spec, ret_seq, f->err);
    if (r >= 0 && (r = td_seq_reserve(*ret_seq, f->n_ids)) < 0)
        td_err_set(f->err, r, "prompt '%.60s' of %zu ids: %s", p->name, f->n_ids,
                   r == -ENOSPC ? "the engine has too few KV blocks" : td_errno_text(r));
    return r;
}

int td_golden_follow(const td_golden *g, size_t index, td_golden_kind kind, td_engine *e,
                     td_golden_outcome *ret, td_err *reterr_err)
{
    TD_BUG_ON(index >= g->n_prompts);
    const td_config *c = &e->model->config;
    int own = kind == TD_GOLDEN_BF16 && g->error_bf16 > 0;
    *ret = (td_golden_outcome){
        .bound = own ? g->error_bf16 : kinds[kind].error,
        .allowed =
            (uint32_t)(g->prompts[index].allowed[kind] > 0 ? g->prompts[index].allowed[kind] : 0)};
    follower *f = calloc(1, sizeof *f);
    if (!f)
        return td_err_set(reterr_err, -ENOMEM, "out of memory");
    *f = (follower){
        .g = g, .index = index, .c = c, .out = ret, .vocab = c->vocab, .err = reterr_err};
    f->margin = kind == TD_GOLDEN_BF16 && g->margin_bf16 > 0 ? g->margin_bf16 : kinds[kind].margin;
    f->gap = own ? 2 * g->error_bf16 : kinds[kind].gap; /* two logits may each be off by that */
    take_prompt(f);
    td_seq *s = NULL;
    td_probe probe = {f, on_selected, on_routed};
    int r = f->failed ? f->failed : new_seq(f, e, &s);
    if (r >= 0) {
        td_engine_set_probe(e, &probe);
        r = walk(f, e, s);
        td_engine_set_probe(e, NULL);
    }
    if (r >= 0 && ret->rows != f->n_rows) /* a row that is never compared proves nothing */
        r = td_err_set(reterr_err, -EINVAL, "%s: row %d of prompt '%.60s' is never computed",
                       g->file, f->rows[ret->rows], g->prompts[index].name);
    td_seq_free(s);
    drop_prompt(f);
    free(f);
    return r;
}

int td_golden_agrees(const td_golden_outcome *o, int counted)
{
    return o->error <= o->bound && o->wrong == 0 && (!counted || o->injections <= o->allowed);
}
