/* SPDX-License-Identifier: Apache-2.0 */
/* `tandem check MODEL`: what a model would meet on a device: shapes without a tuned launch plan. */
#include "cli/cli.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "base/bug.h"
#include "base/options.h"
#include "cli/gpu.h"
#include "engine/shapes.h"

#include "base/banned.h"

/* Compute units of the devices that a build has kernels for. */
static const struct {
    const char *arch, *name;
    uint32_t cus;
    int act_fp8;
} known[] = {{"gfx942", "MI300X", 304, 0}, {"gfx950", "MI355X", 256, 1}, {"sm_90", "H200", 132, 0}};

static int has_row(const td_tuned *t, const td_shape *s, uint32_t cus, uint32_t rows)
{
    td_tune_key k = s->key;
    k.cus = cus;
    k.rows = rows;
    return td_tuned_find(t, &k) != NULL;
}

/* One shape and the numbers of rows that have no row. */
static void print_shape(const td_tuned *t, const td_shape *s, uint32_t cus, uint32_t most)
{
    char text[200];
    int any = 0;
    td_tune_key_text(&s->key, text, sizeof text);
    for (uint32_t rows = 1; rows <= most; rows *= 2) {
        if (has_row(t, s, cus, rows))
            continue;
        if (!any)
            printf("  %s: untuned for rows", text);
        any = 1;
        printf(" %u", rows);
    }
    if (any)
        printf("\n");
}

static int act_fp8(const td_options *o)
{
    return strcmp(td_opt_str(o, TD_OPT_ID_ACT_MXFP4), "fp8") == 0;
}

/* Number of untuned keys, or negative. */
static long check_device(const td_options *o, const td_shapes *s, const char *arch,
                         const char *name, uint32_t cus, td_err *err)
{
    td_tuned *t = NULL;
    uint32_t most = td_tune_rows_class((uint32_t)td_opt_int(o, TD_OPT_ID_ROWS));
    int r = td_tuned_load(td_opt_str(o, TD_OPT_ID_TUNED), arch, &t, err);
    if (r < 0)
        return r;
    size_t n = td_shapes_untuned(s, t, cus, most, NULL, 0);
    printf("%s (%s, %u compute units): %zu launches of up to %u rows without a tuned plan\n", arch,
           name, cus, n, most);
    for (size_t i = 0; i < s->n; i++)
        if (s->data[i].launched)
            print_shape(t, &s->data[i], cus, most);
    td_tuned_free(t);
    return (long)n;
}

static long check_present(const td_options *o, const td_shapes *s, const char *word, td_err *err)
{
    td_gpu *g = NULL;
    const td_backend *be = NULL;
    int r = td_cli_gpu_open(word, &g, &be, err);
    if (r >= 0 && act_fp8(o) && !be->act_fp8)
        r = td_err_set(err, -ENOTSUP, "--act-mxfp4 fp8: %s has no scaled matrix instruction",
                       g->arch);
    long n = r < 0 ? r : check_device(o, s, g->arch, g->name, g->n_cus, err);
    td_cli_gpu_close(g);
    return n;
}

static long check_all(const td_options *o, const td_shapes *s, td_err *err)
{
    long n = 0;
    for (size_t i = 0; i < TD_ARRAY_LEN(known) && n >= 0; i++) {
        if (act_fp8(o) && !known[i].act_fp8) {
            printf("%s (%s): refuses --act-mxfp4 fp8\n", known[i].arch, known[i].name);
            continue;
        }
        long one = check_device(o, s, known[i].arch, known[i].name, known[i].cus, err);
        n = one < 0 ? one : n + one;
    }
    return n;
}

static int run(const td_options *o)
{
    static const uint32_t one[] = {1};
    const char *word = td_opt_str(o, TD_OPT_ID_DEVICE);
    td_shapes s = {0};
    td_err err = {0};
    long n = td_shapes_add(o->positional[0], one, 1, act_fp8(o), &s, &err);
    if (n >= 0)
        n = strcmp(word, "cpu") == 0 ? check_all(o, &s, &err) : check_present(o, &s, word, &err);
    td_shapes_done(&s);
    if (n < 0) {
        fprintf(stderr, "tandem check: %s\n", err.text);
        return TD_EXIT_FAILED;
    }
    if (n)
        printf("These launches choose their plan by the number of rows. tandem tune measures "
               "them.\n");
    return n && td_opt_bool(o, TD_OPT_ID_STRICT) ? TD_EXIT_FAILED : TD_EXIT_OK;
}

int td_cmd_check(int argc, char **argv)
{
    td_options o;
    td_err err = {0};
    if (td_options_parse(&o, TD_SEC_CHECK, argc, argv, &err) < 0) {
        fprintf(stderr, "tandem check: %s\n", err.text);
        return TD_EXIT_USAGE;
    }
    int status = TD_EXIT_USAGE;
    if (o.help) {
        td_options_help(&o, "tandem check MODEL [--device hip|cuda] [options]", o.help_word,
                        stdout);
        status = TD_EXIT_OK;
    } else if (o.n_positional != 1) {
        fprintf(stderr, "tandem check: give a model directory; its config.json is enough\n");
    } else {
        status = run(&o);
    }
    td_options_done(&o);
    return status;
}
