/* SPDX-License-Identifier: Apache-2.0 */
/* `tandem selftest`: every kernel check and a golden on a device, one report to send in. */
#include "cli/selftest.h"

#include <stdio.h>
#include <string.h>
#include <sys/utsname.h>

#include "base/bug.h"
#include "base/hash.h"
#include "base/options.h"
#include "base/version.h"
#include "cli/cli.h"
#include "cli/gpu.h"
#include "engine/golden.h"
#include "kernels/checks/checks.h"
#include "kernels/checks/gpu.h"
#include "kernels/gpu/objects.h"
#include "kernels/gpu/tune_run.h"

#include "base/banned.h"

enum { PROBE_COPIES = 8 };
#define PROBE_BYTES ((size_t)512 << 20)
#define FLUSH_BYTES ((size_t)512 << 20)

typedef struct report {
    td_selftest_golden golden;
    uint32_t passed, failed, absent; /* absent: this device has nothing of it */
} report;

static void result(report *r, int failed)
{
    if (failed)
        r->failed++;
    else
        r->passed++;
}

/* ---- what it runs on ---- */

static void print_cpu_name(void)
{
    char line[256];
    FILE *f = fopen("/proc/cpuinfo", "re");
    while (f && fgets(line, sizeof line, f)) {
        const char *colon = strchr(line, ':');
        if (strncmp(line, "model name", 10) != 0 || !colon)
            continue;
        printf("processor    %s", colon + 2);
        break;
    }
    if (f)
        fclose(f);
}

static void print_head(void)
{
    struct utsname u;
    printf("tandem selftest: version %s, commit %s\n", td_version(), td_commit());
    if (uname(&u) == 0)
        printf("machine      %s %s %s\n", u.sysname, u.release, u.machine);
    print_cpu_name();
}

static void print_gpu(td_gpu *g)
{
    size_t n = 0, free_bytes = 0, total = 0;
    const td_gpu_object *objects = td_gpu_objects(&n);
    char hex[33];
    printf("device       %s\ndriver       %s\narchitecture %s, %u compute units, waves of %u "
           "lanes, %u bytes of LDS\n",
           g->name, g->driver, g->arch, g->n_cus, g->wave, g->lds_bytes);
    if (g->ops->mem_info(g, &free_bytes, &total) == 0)
        printf("memory       %.1f GiB, %.1f GiB free\n", (double)total / (1ul << 30),
               (double)free_bytes / (1ul << 30));
    for (size_t i = 0; i < n; i++) {
        uint8_t sum[16];
        if (strcmp(objects[i].arch, g->arch) != 0)
            continue;
        td_xxh128(objects[i].bytes, objects[i].n_bytes, sum);
        printf("code object  %s, %zu bytes, XXH3-128 %s\n", g->arch, objects[i].n_bytes,
               td_hex(sum, sizeof sum, hex));
    }
}

/* ---- probes: how fast, roughly ---- */

static int time_copies(td_gpu *g, void *stream, void *from, void *to, float *ret_ms)
{
    void *a = NULL, *b = NULL;
    int r = g->ops->event_new(g, &a);
    r = r < 0 ? r : g->ops->event_new(g, &b);
    r = r < 0 ? r : g->ops->copy(g, stream, to, from, PROBE_BYTES);
    r = r < 0 ? r : g->ops->event_record(g, a, stream);
    for (int i = 0; r >= 0 && i < PROBE_COPIES; i++)
        r = g->ops->copy(g, stream, to, from, PROBE_BYTES);
    r = r < 0 ? r : g->ops->event_record(g, b, stream);
    r = r < 0 ? r : g->ops->stream_wait(g, stream);
    r = r < 0 ? r : g->ops->event_ms(g, a, b, ret_ms);
    if (a)
        g->ops->event_free(g, a);
    if (b)
        g->ops->event_free(g, b);
    return r;
}

static void probe_copy(td_gpu *g)
{
    void *from = g->ops->mem_alloc(g, PROBE_BYTES), *to = g->ops->mem_alloc(g, PROBE_BYTES),
         *stream = NULL;
    float ms = 0.0f;
    int r = from && to ? g->ops->stream_new(g, &stream) : -1;
    r = r < 0 ? r : time_copies(g, stream, from, to, &ms);
    if (r < 0)
        printf("probe        copy: not measured: %s\n", g->error);
    else
        printf("probe        copy: %.0f GB/s, read and written\n",
               2.0 * PROBE_COPIES * (double)PROBE_BYTES / 1e6 / (double)ms);
    g->ops->stream_free(g, stream);
    g->ops->mem_free(g, from);
    g->ops->mem_free(g, to);
}

static void probe_product(td_gpu *g, const td_backend *be, td_weight_format f, uint32_t rows,
                          uint32_t n, uint32_t k)
{
    static const td_tune_settings settings = {.repeats = 7, .flush_bytes = FLUSH_BYTES};
    td_tune_key key = {
        .op = TD_TUNE_GEMM, .n = n, .k = k, .heads = 1, .slices = 1, .tp = 1, .ep = 1, .format = f};
    td_tune_bench *b = NULL;
    td_tune_result res;
    td_err err = {0};
    int r = td_tune_bench_open(g, be, &key, rows, &settings, &b, &err);
    r = r < 0 ? r : td_tune_bench_run(b, rows, &res, &err);
    td_tune_bench_close(b);
    if (r < 0) {
        printf("probe        product: not measured: %s\n", err.text);
        return;
    }
    double bytes = (double)n * k * (f == TD_W_BF16 ? 2.0 : 0.53125);
    printf("probe        product %u x %u x %u, BF16 x %s, plan %s: %.1f us, %.1f TFLOP/s, %.0f "
           "GB/s of weights\n",
           rows, n, k, td_weight_format_name(f), td_gpu_plan_name(res.row.plan), res.row.us,
           2e-6 * rows * (double)n * k / res.row.us, bytes / 1e3 / res.row.us);
    for (size_t i = 0; i < TD_ARRAY_LEN(res.refused); i++)
        if (res.refused[i][0])
            printf("             refused %s\n", res.refused[i]);
}

static void probe(td_gpu *g, const td_backend *be)
{
    probe_copy(g);
    probe_product(g, be, TD_W_BF16, 4096, 4096, 4096);
    probe_product(g, be, TD_W_BF16, 1, 16384, 6144);
    probe_product(g, be, TD_W_MXFP4, 1, 16384, 6144);
}

/* ---- checks ---- */

static void print_check(const td_check_case *k, const td_check_result *c)
{
    if (c->skipped)
        printf("%-7s %-62s %10s %10s  not on this device\n", k->group, k->name, "", "");
    else if (c->n || c->failed)
        printf("%-7s %-62s %10.2e %10.2e  %s\n", k->group, k->name, c->error, c->tolerance,
               c->failed ? "FAIL" : "PASS");
    else
        printf("%-7s %-62s %10s %10s  PASS\n", k->group, k->name, "exact", "");
    if (c->failed)
        printf("        %s\n", c->text);
    fflush(stdout);
}

static void run_checks(report *r, const td_check_target *t)
{
    const char *absent = NULL; /* said once, however many checks it is */
    printf("\n%-7s %-62s %10s %10s  %s\n", "checks", t->backend->isa, "error", "tolerance",
           "result");
    for (const td_check_case *k = td_check_cases; k->name; k++) {
        td_check_result c;
        td_check_run(k, t, &c);
        print_check(k, &c);
        if (c.skipped && (!absent || strcmp(absent, k->group) != 0))
            printf("        %s\n", c.text);
        if (c.skipped) {
            absent = k->group;
            r->absent++;
        } else {
            result(r, c.failed);
        }
    }
}

static void print_golden(void *arg, const td_selftest_result *g)
{
    result(arg, g->failed[0] != 0);
    printf("%-7s %-62s %10.2e %10.2e  %s\n", "golden", g->name, g->error, g->bound,
           g->failed[0] ? "FAIL" : "PASS");
    if (g->failed[0])
        printf("        %s\n", g->failed);
    fflush(stdout);
}

static int test_gpu(report *r, const td_options *o, const char *word)
{
    td_gpu *g = NULL;
    td_check_gpu *c = NULL;
    const td_backend *be = NULL;
    td_err err = {0};
    int code = td_cli_gpu_open(word, &g, &be, &err);
    if (code >= 0) {
        print_gpu(g);
        if (td_opt_bool(o, TD_OPT_ID_PROBE))
            probe(g, be);
        code = td_check_gpu_open(g, be, &c, &err);
    }
    if (code >= 0) {
        run_checks(r, td_check_gpu_target(c));
        td_check_gpu_close(c);
        td_selftest_run(&r->golden, be, print_golden, r);
    }
    td_cli_gpu_close(g);
    if (code < 0)
        fprintf(stderr, "tandem selftest: %s\n", err.text);
    return code;
}

static int test_cpu(report *r, const char *isa)
{
    static const char *const all[] = {"ref", "avx2", "avx512", "avx512bf16vnni"};
    int any = strcmp(isa, "auto") == 0;
    printf("device       cpu\n");
    for (size_t i = 0; i < TD_ARRAY_LEN(all); i++) {
        if (!any && strcmp(isa, all[i]) != 0)
            continue;
        td_check_target t = {.backend = td_backend_get(all[i])};
        if (!t.backend && !any) {
            fprintf(stderr, "tandem selftest: --isa %s: this processor lacks it\n", isa);
            return -1;
        }
        if (!t.backend) {
            printf("\nskipped: this processor has no %s\n", all[i]);
            continue;
        }
        run_checks(r, &t);
        td_selftest_run(&r->golden, t.backend, print_golden, r);
    }
    return 0;
}

/* dir NULL: the built-in model, at made. */
static int open_golden(report *r, const char *dir, char *made, size_t n, td_err *err)
{
    int code = dir ? 0 : td_selftest_model(made, n, err);
    code = code < 0 ? code : td_selftest_golden_open(dir ? dir : made, &r->golden, err);
    if (code < 0)
        return code;
    if (r->golden.golden)
        printf("golden       %s, computed by %s\n", r->golden.model,
               td_golden_maker(r->golden.golden));
    else
        printf("golden       %s, against the reference kernels%s\n",
               dir ? dir : "built-in random model", dir ? ": it holds no golden.json" : "");
    return 0;
}

static int selftest(const td_options *o)
{
    char made[256] = "";
    td_err err = {0};
    report r = {0};
    const char *word = td_opt_str(o, TD_OPT_ID_DEVICE);
    print_head();
    int code = open_golden(&r, o->n_positional ? o->positional[0] : NULL, made, sizeof made, &err);
    if (code < 0)
        fprintf(stderr, "tandem selftest: the golden: %s\n", err.text);
    else
        code = strcmp(word, "cpu") == 0 ? test_cpu(&r, td_opt_str(o, TD_OPT_ID_ISA))
                                        : test_gpu(&r, o, word);
    td_selftest_golden_done(&r.golden);
    if (made[0])
        td_selftest_model_remove(made);
    if (code < 0)
        return TD_EXIT_FAILED;
    printf("\n%s: %u passed, %u failed, %u not on this device\n", r.failed ? "FAIL" : "PASS",
           r.passed, r.failed, r.absent);
    return r.failed ? TD_EXIT_FAILED : TD_EXIT_OK;
}

int td_cmd_selftest(int argc, char **argv)
{
    td_options o;
    td_err err = {0};
    if (td_options_parse(&o, TD_SEC_SELFTEST, argc, argv, &err) < 0 ||
        td_options_at_most(&o, 1, &err) < 0) {
        fprintf(stderr, "tandem selftest: %s\n", err.text);
        return TD_EXIT_USAGE;
    }
    int status = TD_EXIT_OK;
    if (o.help)
        td_options_help(&o, "tandem selftest [MODEL] --device cpu|hip|cuda [options]", o.help_word,
                        stdout);
    else
        status = selftest(&o);
    td_options_done(&o);
    return status;
}
