/* SPDX-License-Identifier: Apache-2.0 */
/* `tandem eval MODEL`: perplexity, KL and exact answers, beside a baseline's. */
#include "cli/eval.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/file.h"
#include "cli/cli.h"
#include "engine/options.h"

#include "base/banned.h"

enum { ROWS = 1024, SEQS = 16, TEXT_MAX = 1 << 30 };

int td_eval_open(const char *dir, const td_options *o, const td_device *device, uint32_t rows,
                 td_eval_model *ret, td_err *reterr_err)
{
    td_model_options mo = td_model_options_from(o, device);
    td_engine_limits limits = {.max_rows = rows, .max_seqs = SEQS};
    *ret = (td_eval_model){.rows = rows};
    int r = td_model_open(dir, &mo, &ret->model, reterr_err);
    if (r >= 0) {
        /* room for SEQS sequences of as many tokens as a question and its answer may have */
        limits.n_blocks = SEQS * 4 * rows / 64;
        r = td_engine_open(ret->model, &limits, &ret->engine, reterr_err);
    }
    r = r < 0 ? r
              : td_tokenizer_open(dir, td_model_get_info(ret->model)->vocab_size, &ret->tokenizer,
                                  reterr_err);
    if (r >= 0 && (r = td_template_open(dir, &ret->tpl, reterr_err)) == -ENOENT)
        r = 0;
    if (r < 0)
        td_eval_close(ret);
    return r;
}

void td_eval_close(td_eval_model *m)
{
    td_template_free(m->tpl);
    td_tokenizer_free(m->tokenizer);
    td_engine_free(m->engine);
    td_model_free(m->model);
    *m = (td_eval_model){0};
}

static void draw(double fraction)
{
    if (isatty(STDERR_FILENO))
        fprintf(stderr, "\r%3.0f %%%s", fraction * 100.0, fraction >= 1.0 ? "\r     \r" : "");
}

typedef struct run {
    td_device *device;
    td_eval_model model, base;
    int has_base;
    const td_options *o;
    td_err err;
} run;

static td_eval_model *base_of(run *r)
{
    return r->has_base ? &r->base : NULL;
}

/* Change of the mean and its 95 % interval. */
static void print_change(double mean, double squares, double n, double unit)
{
    double var = squares / n - mean * mean, half = 1.96 * sqrt((var > 0.0 ? var : 0.0) / n);
    printf("  %+9.4f (%+.4f to %+.4f)\n", mean * unit, (mean - half) * unit, (mean + half) * unit);
}

static void print_text(const td_eval_text *t, int has_base)
{
    double n = (double)t->tokens, nll = t->nll / n, base = t->base_nll / n;
    if (!has_base) {
        printf("%-24s %11s %11.4f\n%-24s %11s %11.4f\n", "log loss, nats a token", "", nll,
               "perplexity", "", exp(nll));
        printf("%-24s %11s %11llu\n", "tokens", "", (unsigned long long)t->tokens);
        return;
    }
    printf("%-24s %11.4f %11.4f", "log loss, nats a token", base, nll);
    print_change(nll - base, t->change_squares, n, 1.0);
    printf("%-24s %11.4f %11.4f  %+9.4f\n", "perplexity", exp(base), exp(nll),
           exp(nll) - exp(base));
    printf("%-24s %11s %11.6f  (largest %.4f)\n", "KL, nats a token", "", t->kl / n, t->kl_largest);
    printf("%-24s %11s %10.2f%%  (%llu tokens)\n", "top-1 agreement", "",
           100.0 * (double)t->agree / n, (unsigned long long)t->tokens);
}

static int run_text(run *r, const char *path)
{
    TD_AUTO_FREE char *text = NULL;
    size_t n = 0;
    td_ids ids = {0}, other = {0};
    td_eval_text t;
    int code = td_file_read(path, TEXT_MAX, &text, &n, &r->err);
    if (code >= 0 && (code = td_tokenizer_encode(r->model.tokenizer, text, n, 0, &ids)) < 0)
        td_err_set(&r->err, code, "%s: %s", path, td_errno_text(code));
    if (code >= 0 && r->has_base) {
        code = td_tokenizer_encode(r->base.tokenizer, text, n, 0, &other);
        if (code >= 0 && (other.n != ids.n || memcmp(other.data, ids.data, ids.n * 4) != 0))
            code = td_err_set(&r->err, -EINVAL, "the two models have different tokenizers");
    }
    uint32_t window = (uint32_t)td_opt_int(r->o, TD_OPT_ID_WINDOW),
             context = td_model_get_info(r->model.model)->max_context;
    if (code >= 0 && ids.n < 2)
        code = td_err_set(&r->err, -EINVAL, "%s: too short to predict anything", path);
    if (code >= 0)
        code = td_eval_text_run(&r->model, base_of(r), ids.data, ids.n,
                                window < context ? window : context, draw, &t, &r->err);
    if (code >= 0)
        print_text(&t, r->has_base);
    td_ids_done(&ids);
    td_ids_done(&other);
    return code;
}

/* Right answers of one skill (NULL: of all). */
static void print_skill(const char *skill, const td_eval_set *s, const uint8_t *right,
                        const uint8_t *base, int has_base)
{
    double n = 0, a = 0, b = 0, squares = 0;
    for (size_t i = 0; i < s->n; i++) {
        if (skill && strcmp(s->data[i].skill, skill) != 0)
            continue;
        n++;
        a += right[i];
        b += base[i];
        squares += right[i] != base[i];
    }
    char name[40];
    snprintf(name, sizeof name, "%.16s, %% of %.0f", skill ? skill : "all problems", n);
    if (!has_base) {
        printf("%-24s %11s %11.1f\n", name, "", 100.0 * a / n);
        return;
    }
    printf("%-24s %11.1f %11.1f", name, 100.0 * b / n, 100.0 * a / n);
    print_change((a - b) / n, squares, n, 100.0);
}

static int run_problems(run *r, const char *path)
{
    td_eval_set s;
    int code = td_eval_set_load(path, &s, &r->err);
    if (code < 0)
        return code;
    TD_AUTO_FREE uint8_t *right = calloc(2, s.n);
    if (!right)
        code = td_err_set(&r->err, -ENOMEM, "out of memory");
    code = code < 0 ? code : td_eval_ask(&r->model, &s, draw, right, &r->err);
    if (code >= 0 && r->has_base)
        code = td_eval_ask(&r->base, &s, draw, right + s.n, &r->err);
    for (size_t i = 0; code >= 0 && i < s.n; i++) {
        size_t first = 0;
        while (strcmp(s.data[first].skill, s.data[i].skill) != 0)
            first++;
        if (first == i)
            print_skill(s.data[i].skill, &s, right, right + s.n, r->has_base);
    }
    if (code >= 0)
        print_skill(NULL, &s, right, right + s.n, r->has_base);
    td_eval_set_done(&s);
    return code;
}

static int open_device(run *r)
{
    td_device_spec spec = td_device_spec_from(r->o);
    int code = td_device_open(&spec, &r->device, &r->err);
    if (code >= 0 && strcmp(spec.word, "cpu") != 0)
        fprintf(stderr, "tandem eval: device %s\n", td_device_text(r->device));
    return code;
}

static int evaluate(const td_options *o)
{
    run r = {.o = o};
    const char *base = td_opt_str(o, TD_OPT_ID_BASE), *text = td_opt_str(o, TD_OPT_ID_TEXT),
               *problems = td_opt_str(o, TD_OPT_ID_PROBLEMS);
    r.has_base = *base != 0;
    int code = open_device(&r);
    if (code >= 0)
        code = td_eval_open(o->positional[0], o, r.device, ROWS, &r.model, &r.err);
    if (code >= 0 && r.has_base)
        code = td_eval_open(base, o, r.device, ROWS, &r.base, &r.err);
    if (code >= 0)
        printf("%-24s %11s %11s  %s\n", "", r.has_base ? "baseline" : "", "model",
               r.has_base ? "change (95 % interval, paired)" : "");
    if (code >= 0 && *text)
        code = run_text(&r, text);
    if (code >= 0 && *problems)
        code = run_problems(&r, problems);
    if (code < 0)
        fprintf(stderr, "tandem eval: %s\n", r.err.text);
    td_eval_close(&r.model);
    td_eval_close(&r.base);
    td_device_close(r.device);
    return code < 0 ? TD_EXIT_FAILED : TD_EXIT_OK;
}

int td_cmd_eval(int argc, char **argv)
{
    td_options o;
    td_err err = {0};
    if (td_options_parse(&o, TD_SEC_EVAL, argc, argv, &err) < 0) {
        fprintf(stderr, "tandem eval: %s\n", err.text);
        return TD_EXIT_USAGE;
    }
    int status = TD_EXIT_USAGE;
    if (o.help) {
        td_options_help(&o, "tandem eval MODEL [--base DIR] [--text FILE] [--problems FILE]",
                        o.help_word, stdout);
        status = TD_EXIT_OK;
    } else if (o.n_positional != 1) {
        fprintf(stderr, "tandem eval: give one model directory, e.g. tandem eval models/glm-tiny "
                        "--problems models/eval/heldout.jsonl\n");
    } else if (!*td_opt_str(&o, TD_OPT_ID_TEXT) && !*td_opt_str(&o, TD_OPT_ID_PROBLEMS)) {
        fprintf(stderr, "tandem eval: nothing to do; give --text FILE, --problems FILE or both\n");
    } else {
        status = evaluate(&o);
    }
    td_options_done(&o);
    return status;
}
