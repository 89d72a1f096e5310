/* SPDX-License-Identifier: Apache-2.0 */
/* `tandem tune MODEL`: measure launch plans for a model's shapes on this device, write the table.
 */
#include "cli/cli.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bug.h"
#include "base/cleanup.h"
#include "base/file.h"
#include "base/options.h"
#include "cli/gpu.h"
#include "engine/shapes.h"
#include "kernels/gpu/tune_run.h"

#include "base/banned.h"

enum { RANKS_MAX = 8 };
#define FLUSH_BYTES ((size_t)512 << 20) /* more than any cache on a GPU */

typedef struct tuning {
    td_gpu *gpu;
    const td_backend *backend;
    td_shapes shapes;
    td_tuned *table;
    char *path;
    td_tune_settings settings;
    uint32_t max_rows;
    size_t measured, refused, too_large;
} tuning;

/* "1,4,8" */
static int read_ranks(const char *text, uint32_t *ranks, size_t *ret_n, td_err *err)
{
    size_t n = 0;
    for (const char *p = text; *p; n++) {
        char *end = NULL;
        unsigned long v = strtoul(p, &end, 10);
        if (*p < '1' || *p > '9' || v > 1024 || (*end && (*end != ',' || !end[1])) ||
            n == RANKS_MAX)
            return td_err_set(err, -EINVAL,
                              "--ranks %.40s is not a list of at most %d numbers from 1 to 1024, "
                              "e.g. 1,4,8",
                              text, RANKS_MAX);
        ranks[n] = (uint32_t)v;
        p = *end ? end + 1 : end;
    }
    *ret_n = n;
    return n ? 0 : td_err_set(err, -EINVAL, "--ranks is empty; give e.g. 1,4,8");
}

/* Rows of other shapes and devices stay in the file. */
static int open_table(tuning *t, const char *dir, td_err *err)
{
    char name[64];
    snprintf(name, sizeof name, "%s.csv", t->gpu->arch);
    t->path = td_path_join(dir, name);
    int r = t->path ? td_tuned_load(dir, t->gpu->arch, &t->table, err) : -ENOMEM;
    if (r == -ENOENT)
        r = td_tuned_new(t->gpu->arch, &t->table);
    return r == -ENOMEM ? td_err_set(err, r, "out of memory") : r;
}

static void print_row(const td_tune_result *r)
{
    char text[200];
    td_tune_key_text(&r->row.key, text, sizeof text);
    printf("%s:", text);
    for (td_gpu_plan p = TD_GPU_PLAN_FEW; p <= TD_GPU_PLAN_MANY; p++)
        if (r->us[p] >= 0)
            printf(" %s %.1f us,", td_gpu_plan_name(p), r->us[p]);
    printf(" error %.1e: %s\n", r->row.error, td_gpu_plan_name(r->row.plan));
    fflush(stdout);
}

/* Candidates that differ are faults of kernels: said, counted, never chosen. */
static int keep(tuning *t, const td_tune_result *r, td_err *err)
{
    char text[200];
    td_tune_key_text(&r->row.key, text, sizeof text);
    for (size_t i = 0; i < TD_ARRAY_LEN(r->refused); i++)
        if (r->refused[i][0]) {
            fprintf(stderr, "tandem tune: %s: refused %s\n", text, r->refused[i]);
            t->refused++;
        }
    if (r->row.plan == TD_GPU_PLAN_AUTO)
        return 0;
    print_row(r);
    t->measured++;
    return td_tuned_put(t->table, &r->row) < 0 ? td_err_set(err, -ENOMEM, "out of memory") : 0;
}

static int tune_shape(tuning *t, const td_tune_key *key, td_err *err)
{
    td_tune_bench *b = NULL;
    uint32_t most = td_tune_rows_class(t->max_rows);
    int r = td_tune_bench_open(t->gpu, t->backend, key, most, &t->settings, &b, err);
    if (r == -ENOMEM) {
        fprintf(stderr, "tandem tune: left out: %s\n", err->text);
        t->too_large++;
        return 0;
    }
    for (uint32_t rows = 1; r >= 0 && rows <= most; rows *= 2) {
        td_tune_result result;
        r = td_tune_bench_run(b, rows, &result, err);
        r = r < 0 ? r : keep(t, &result, err);
    }
    td_tune_bench_close(b);
    return r < 0 ? r : td_tuned_write(t->table, t->path, err);
}

static int tune(const td_options *o, tuning *t, td_err *err)
{
    uint32_t ranks[RANKS_MAX];
    size_t n = 0;
    int fp8 = strcmp(td_opt_str(o, TD_OPT_ID_ACT_MXFP4), "fp8") == 0;
    int r = read_ranks(td_opt_str(o, TD_OPT_ID_RANKS), ranks, &n, err);
    r = r < 0 ? r : td_shapes_add(o->positional[0], ranks, n, fp8, &t->shapes, err);
    r = r < 0 ? r : td_cli_gpu_open(td_opt_str(o, TD_OPT_ID_DEVICE), &t->gpu, &t->backend, err);
    if (r >= 0 && fp8 && !t->backend->act_fp8)
        r = td_err_set(err, -ENOTSUP, "--act-mxfp4 fp8: %s has no scaled matrix instruction",
                       t->gpu->arch);
    r = r < 0 ? r : open_table(t, td_opt_str(o, TD_OPT_ID_OUT), err);
    if (r < 0)
        return r;
    printf("%s, %s, %u compute units: %zu shapes of up to %u rows into %s\n", t->gpu->name,
           t->gpu->arch, t->gpu->n_cus, t->shapes.n, td_tune_rows_class(t->max_rows), t->path);
    for (size_t i = 0; r >= 0 && i < t->shapes.n; i++)
        r = tune_shape(t, &t->shapes.data[i].key, err);
    return r;
}

static int run(const td_options *o)
{
    td_err err = {0};
    tuning t = {.settings = {.repeats = (uint32_t)td_opt_int(o, TD_OPT_ID_REPEATS),
                             .flush_bytes = FLUSH_BYTES},
                .max_rows = (uint32_t)td_opt_int(o, TD_OPT_ID_ROWS)};
    if (strcmp(td_opt_str(o, TD_OPT_ID_DEVICE), "cpu") == 0) {
        fprintf(stderr, "tandem tune: the CPU's kernels have one launch plan; give --device hip, "
                        "cuda or auto\n");
        return TD_EXIT_USAGE;
    }
    int r = tune(o, &t, &err);
    if (r < 0)
        fprintf(stderr, "tandem tune: %s\n", err.text);
    else
        printf("%zu rows measured, %zu candidates refused, %zu shapes too large\n", t.measured,
               t.refused, t.too_large);
    td_tuned_free(t.table);
    free(t.path);
    td_shapes_done(&t.shapes);
    td_cli_gpu_close(t.gpu);
    return r < 0 || t.refused || t.too_large ? TD_EXIT_FAILED : TD_EXIT_OK;
}

int td_cmd_tune(int argc, char **argv)
{
    td_options o;
    td_err err = {0};
    if (td_options_parse(&o, TD_SEC_TUNE, argc, argv, &err) < 0) {
        fprintf(stderr, "tandem tune: %s\n", err.text);
        return TD_EXIT_USAGE;
    }
    int status = TD_EXIT_USAGE;
    if (o.help) {
        td_options_help(&o, "tandem tune MODEL --device hip|cuda [options]", o.help_word, stdout);
        status = TD_EXIT_OK;
    } else if (o.n_positional != 1) {
        fprintf(stderr, "tandem tune: give a model directory; its config.json is enough, e.g. "
                        "tandem tune bench/shapes/glm-5.2 --device hip --ranks 1,4,8\n");
    } else {
        status = run(&o);
    }
    td_options_done(&o);
    return status;
}
