/* SPDX-License-Identifier: Apache-2.0 */
/* `tandem quantize MODEL OUT`: a BF16 checkpoint to MXFP4, FP8 or both, with what each module lost.
 */
#include "cli/cli.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "base/options.h"
#include "engine/quantize.h"

#include "base/banned.h"

enum { GLOBS_MAX = 256, KINDS_MAX = 32, KIND_BYTES = 64 };

/* Modules of the same kind (all "mlp.experts.up_proj") and format share a line of the table. */
typedef struct kind {
    char name[KIND_BYTES];
    td_weight_format format;
    uint64_t tensors, elements;
    double squares, worst; /* sum of relative^2 * elements; largest relative loss of a tensor */
} kind;

typedef struct report {
    FILE *csv;
    kind kinds[KINDS_MAX];
    size_t n;
    int bar; /* stderr is a terminal */
} report;

/* "model.layers.3.mlp.experts.7.up_proj.weight" -> "mlp.experts.up_proj". */
static void kind_of(const char *tensor, char out[KIND_BYTES])
{
    const char *p = strncmp(tensor, "model.", 6) == 0 ? tensor + 6 : tensor;
    size_t n = 0;
    if (strncmp(p, "layers.", 7) == 0)
        p += 7;
    while (*p && strcmp(p, ".weight") != 0 && n + 1 < KIND_BYTES) {
        size_t digits = strspn(p, "0123456789");
        if (digits && p[digits] == '.' && (p == tensor || p[-1] == '.'))
            p += digits + 1;
        else
            out[n++] = *p++;
    }
    out[n] = 0;
}

static void add_row(void *arg, const td_quantize_row *row)
{
    report *r = arg;
    char name[KIND_BYTES];
    kind_of(row->name, name);
    size_t i = 0;
    while (i < r->n && (strcmp(r->kinds[i].name, name) != 0 || r->kinds[i].format != row->format))
        i++;
    if (i == r->n && r->n < KINDS_MAX) {
        r->kinds[i] = (kind){.format = row->format};
        memcpy(r->kinds[r->n++].name, name, sizeof name);
    }
    kind *k = &r->kinds[i < KINDS_MAX ? i : KINDS_MAX - 1];
    k->tensors++;
    k->elements += row->elements;
    k->squares += row->relative * row->relative * (double)row->elements;
    k->worst = row->relative > k->worst ? row->relative : k->worst;
    if (r->csv)
        fprintf(r->csv, "%s,%llu,%.6e,%.6e,%s\n", row->name, (unsigned long long)row->elements,
                row->relative, row->largest, td_weight_format_name(row->format));
}

static void draw(void *arg, double fraction)
{
    const report *r = arg;
    static const char full[] = "########################################";
    int n = (int)(fraction * 40.0);
    if (r->bar)
        fprintf(stderr, "\r[%-40.*s] %3.0f %%%s", n, full, fraction * 100.0,
                fraction >= 1.0 ? "\n" : "");
}

static void print_table(const report *r, double seconds)
{
    printf("%-32s %-6s %8s %14s %10s %10s\n", "modules", "format", "tensors", "weights", "loss",
           "worst");
    for (size_t i = 0; i < r->n; i++) {
        const kind *k = &r->kinds[i];
        printf("%-32s %-6s %8llu %14llu %9.3f%% %9.3f%%\n", k->name,
               td_weight_format_name(k->format), (unsigned long long)k->tensors,
               (unsigned long long)k->elements, 100.0 * sqrt(k->squares / (double)k->elements),
               100.0 * k->worst);
    }
    printf("loss: root of the mean square error over that of the weights; %.1f s\n", seconds);
}

/* Comma separated, in place. */
static size_t split(char *text, const char **out)
{
    size_t n = 0;
    char *save = NULL;
    for (char *p = strtok_r(text, ",", &save); p && n < GLOBS_MAX; p = strtok_r(NULL, ",", &save))
        out[n++] = p;
    return n;
}

static int quantize(const td_options *o)
{
    td_err err = {0};
    report r = {.bar = isatty(STDERR_FILENO)};
    const char *globs[GLOBS_MAX], *fp8[GLOBS_MAX];
    const char *csv = td_opt_str(o, TD_OPT_ID_REPORT);
    td_quantize_options q = {
        .format = strcmp(td_opt_str(o, TD_OPT_ID_FORMAT), "fp8") == 0 ? TD_W_FP8 : TD_W_MXFP4,
        .exclude = globs,
        .fp8 = fp8,
        .n_threads = (uint32_t)td_opt_int(o, TD_OPT_ID_THREADS),
        .row = add_row,
        .progress = draw,
        .arg = &r};
    TD_AUTO_FREE char *list = strdup(td_opt_str(o, TD_OPT_ID_EXCLUDE)),
                      *fp8_list = strdup(td_opt_str(o, TD_OPT_ID_FP8));
    if (!list || !fp8_list) {
        fprintf(stderr, "tandem quantize: out of memory\n");
        return TD_EXIT_FAILED;
    }
    q.n_fp8 = split(fp8_list, fp8);
    if (*list)
        q.n_exclude = split(list, globs);
    else
        q.exclude = td_quantize_default_exclude(q.format);
    while (q.exclude != globs && q.exclude[q.n_exclude])
        q.n_exclude++;
    if (*csv && !(r.csv = fopen(csv, "we"))) {
        fprintf(stderr, "tandem quantize: --report %s: %s\n", csv, td_errno_text(errno));
        return TD_EXIT_FAILED;
    }
    if (r.csv)
        fprintf(r.csv, "tensor,weights,relative_loss,largest_error,format\n");
    uint64_t start = td_now_us();
    int code = td_quantize(o->positional[0], o->positional[1], &q, &err);
    if (r.csv && fclose(r.csv) != 0 && code >= 0)
        code = td_err_set(&err, -EIO, "--report %s: %s", csv, td_errno_text(errno));
    if (code < 0) {
        fprintf(stderr, "%standem quantize: %s\n", r.bar ? "\n" : "", err.text);
        return TD_EXIT_FAILED;
    }
    print_table(&r, (double)(td_now_us() - start) / 1e6);
    return TD_EXIT_OK;
}

int td_cmd_quantize(int argc, char **argv)
{
    td_options o;
    td_err err = {0};
    if (td_options_parse(&o, TD_SEC_QUANTIZE, argc, argv, &err) < 0) {
        fprintf(stderr, "tandem quantize: %s\n", err.text);
        return TD_EXIT_USAGE;
    }
    int status = TD_EXIT_USAGE;
    if (o.help) {
        td_options_help(&o, "tandem quantize MODEL OUT --format mxfp4|fp8 [options]", o.help_word,
                        stdout);
        status = TD_EXIT_OK;
    } else if (o.n_positional != 2) {
        fprintf(stderr, "tandem quantize: give a BF16 model directory and a new directory, e.g. "
                        "tandem quantize models/glm-tiny /tmp/glm-tiny-mxfp4\n");
    } else {
        status = quantize(&o);
    }
    td_options_done(&o);
    return status;
}
