/* SPDX-License-Identifier: Apache-2.0 */
#include "kernels/gpu/tune.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/bug.h"
#include "base/cleanup.h"
#include "base/file.h"
#include "kernels/gpu/tune_tables.h"

#include "base/banned.h"

enum { FILE_MAX = 16 << 20, LINE_MAX_BYTES = 512 };

static const char header[] =
    "arch,cus,op,rows,n,k,heads,slices,dtype,experts,top_k,share,variant,us,error";
static const char *const fields[] = {"arch",  "cus",   "op",      "rows",  "n",
                                     "k",     "heads", "slices",  "dtype", "experts",
                                     "top_k", "share", "variant", "us",    "error"};
enum field {
    F_ARCH,
    F_CUS,
    F_OP,
    F_ROWS,
    F_N,
    F_K,
    F_HEADS,
    F_SLICES,
    F_DTYPE,
    F_EXPERTS,
    F_TOP_K,
    F_SHARE,
    F_VARIANT,
    F_US,
    F_ERROR,
    FIELDS
};

static const char *const ops[TD_TUNE_OPS] = {"gemm", "gemm_silu", "moe"};
static const char *const plans[] = {"auto", "few", "many"};

uint32_t td_tune_rows_class(uint32_t rows)
{
    uint32_t c = 1;
    while (c < rows && c < TD_TUNE_ROWS_MAX)
        c *= 2;
    return c;
}

const char *td_tune_op_name(uint32_t op)
{
    return op < TD_TUNE_OPS ? ops[op] : "?";
}

const char *td_gpu_plan_name(td_gpu_plan p)
{
    return (unsigned)p < TD_ARRAY_LEN(plans) ? plans[p] : "?";
}

/* MXFP4 weights have rows for each form of their operands. */
static const char *dtype_text(const td_tune_key *k)
{
    return k->act_fp8 ? "mxfp4_fp8" : td_weight_format_name((td_weight_format)k->format);
}

static void share_text(const td_tune_key *k, char *out, size_t n)
{
    snprintf(out, n, "%s%u", k->ep > 1 ? "ep" : "tp", k->ep > 1 ? k->ep : k->tp);
}

void td_tune_key_text(const td_tune_key *k, char *out, size_t n)
{
    char share[16], rows[24] = "";
    share_text(k, share, sizeof share);
    if (k->rows)
        snprintf(rows, sizeof rows, " rows=%u", k->rows);
    snprintf(out, n, "%s%s n=%u k=%u heads=%u slices=%u dtype=%s experts=%u top_k=%u share=%s",
             td_tune_op_name(k->op), rows, k->n, k->k, k->heads, k->slices, dtype_text(k),
             k->experts, k->top_k, share);
}

/* ---- table ---- */

int td_tuned_new(const char *arch, td_tuned **ret_table)
{
    td_tuned *t = calloc(1, sizeof *t);
    if (!t)
        return -ENOMEM;
    snprintf(t->arch, sizeof t->arch, "%s", arch);
    *ret_table = t;
    return 0;
}

void td_tuned_free(td_tuned *t)
{
    if (t)
        free(t->rows);
    free(t);
}

/* Where key is, or would be; *ret_found tells which. */
static size_t place_of(const td_tuned *t, const td_tune_key *k, int *ret_found)
{
    size_t low = 0, high = t->n;
    while (low < high) {
        size_t mid = low + (high - low) / 2;
        const uint32_t *a = &t->rows[mid].key.cus, *b = &k->cus;
        size_t i = 0;
        while (i < sizeof *k / sizeof *a && a[i] == b[i])
            i++;
        if (i == sizeof *k / sizeof *a) {
            *ret_found = 1;
            return mid;
        }
        if (a[i] < b[i])
            low = mid + 1;
        else
            high = mid;
    }
    *ret_found = 0;
    return low;
}

const td_tuned_row *td_tuned_find(const td_tuned *t, const td_tune_key *k)
{
    int found;
    size_t at = place_of(t, k, &found);
    return found ? &t->rows[at] : NULL;
}

int td_tuned_put(td_tuned *t, const td_tuned_row *row)
{
    int found;
    size_t at = place_of(t, &row->key, &found);
    if (found) {
        t->rows[at] = *row;
        return 0;
    }
    if (t->n == t->cap) {
        size_t cap = t->cap ? 2 * t->cap : 64;
        td_tuned_row *rows = realloc(t->rows, cap * sizeof *rows);
        if (!rows)
            return -ENOMEM;
        t->rows = rows;
        t->cap = cap;
    }
    memmove(t->rows + at + 1, t->rows + at, (t->n - at) * sizeof *t->rows);
    t->rows[at] = *row;
    t->n++;
    return 0;
}

/* ---- text ---- */

typedef struct reader {
    const char *file, *arch;
    size_t line;
    char *value[FIELDS];
    td_err *err;
    int failed; /* sticky */
} reader;

static void refuse(reader *r, enum field f, const char *why)
{
    if (!r->failed)
        r->failed = td_err_set(r->err, -EINVAL, "%s: line %zu, field %s: '%.40s' %s", r->file,
                               r->line, fields[f], r->value[f], why);
}

static uint32_t number(reader *r, enum field f, uint32_t least, uint32_t most)
{
    const char *s = r->value[f];
    uint64_t v = 0;
    size_t n = strspn(s, "0123456789");
    for (size_t i = 0; i < n && v <= most; i++)
        v = 10 * v + (uint64_t)(s[i] - '0');
    if (!n || s[n] || n > 10 || v < least || v > most) {
        char why[80];
        snprintf(why, sizeof why, "is not a whole number from %u to %u", least, most);
        refuse(r, f, why);
        return 0;
    }
    return (uint32_t)v;
}

static double quantity(reader *r, enum field f)
{
    char *end = NULL;
    const char *s = r->value[f];
    double v = strtod(s, &end);
    if (!strchr("0123456789.", s[0]) || !*s || *end || !isfinite(v) || v < 0.0)
        refuse(r, f, "is not a number from 0 on");
    return v;
}

static uint32_t word(reader *r, enum field f, const char *const *words, uint32_t first, uint32_t n)
{
    char why[80] = "is not one of";
    for (uint32_t i = first; i < n; i++) {
        if (strcmp(r->value[f], words[i]) == 0)
            return i;
        size_t at = strlen(why);
        snprintf(why + at, sizeof why - at, " %s", words[i]);
    }
    refuse(r, f, why);
    return first;
}

static void read_share(reader *r, td_tune_key *k)
{
    char *s = r->value[F_SHARE];
    int tp = strncmp(s, "tp", 2) == 0;
    k->tp = k->ep = 1;
    if (!tp && strncmp(s, "ep", 2) != 0) {
        refuse(r, F_SHARE, "is neither tpN nor epN");
        return;
    }
    r->value[F_SHARE] = s + 2;
    uint32_t ranks = number(r, F_SHARE, tp ? 1 : 2, 1024);
    *(tp ? &k->tp : &k->ep) = ranks;
}

static void read_row(reader *r, td_tuned_row *ret)
{
    static const char *const formats[] = {"f32", "bf16", "fp8", "mxfp4", "mxfp4_fp8"};
    td_tune_key k = {0};
    if (strcmp(r->value[F_ARCH], r->arch) != 0)
        refuse(r, F_ARCH, "is not the architecture that names the file");
    k.cus = number(r, F_CUS, 1, 1u << 16);
    k.op = word(r, F_OP, ops, 0, TD_TUNE_OPS);
    k.rows = number(r, F_ROWS, 1, TD_TUNE_ROWS_MAX);
    if (!r->failed && td_tune_rows_class(k.rows) != k.rows)
        refuse(r, F_ROWS, "is not a power of two");
    k.n = number(r, F_N, 1, 1u << 30);
    k.k = number(r, F_K, 1, 1u << 30);
    k.heads = number(r, F_HEADS, 1, 1u << 16);
    k.slices = number(r, F_SLICES, 1, 8);
    k.format = word(r, F_DTYPE, formats, TD_W_BF16, TD_ARRAY_LEN(formats));
    if (k.format > TD_W_MXFP4) {
        k.format = TD_W_MXFP4;
        k.act_fp8 = 1;
    }
    int moe = k.op == TD_TUNE_MOE;
    k.experts = number(r, F_EXPERTS, moe ? 1 : 0, moe ? 1u << 16 : 0);
    k.top_k = number(r, F_TOP_K, moe ? 1 : 0, moe ? k.experts : 0);
    read_share(r, &k);
    *ret = (td_tuned_row){.key = k};
    ret->plan = (td_gpu_plan)word(r, F_VARIANT, plans, TD_GPU_PLAN_FEW, TD_ARRAY_LEN(plans));
    ret->us = quantity(r, F_US);
    ret->error = quantity(r, F_ERROR);
}

/* Cut a line, in place. */
static int split(reader *r, char *line)
{
    size_t n = 0;
    for (char *p = line; p; n++) {
        char *comma = strchr(p, ',');
        if (comma)
            *comma = 0;
        if (n < FIELDS)
            r->value[n] = p;
        p = comma ? comma + 1 : NULL;
    }
    if (n == FIELDS)
        return 0;
    return r->failed = td_err_set(r->err, -EINVAL, "%s: line %zu has %zu fields, not %d: %s",
                                  r->file, r->line, n, FIELDS, header);
}

static int add_line(reader *r, char *line, td_tuned *t)
{
    td_tuned_row row;
    if (split(r, line) < 0)
        return r->failed;
    read_row(r, &row);
    if (r->failed)
        return r->failed;
    if (td_tuned_find(t, &row.key))
        return td_err_set(r->err, -EINVAL, "%s: line %zu has the key of an earlier line", r->file,
                          r->line);
    if (td_tuned_put(t, &row) < 0)
        return td_err_set(r->err, -ENOMEM, "%s: out of memory", r->file);
    return 0;
}

static int read_lines(reader *r, const char *text, size_t n, td_tuned *t)
{
    for (size_t at = 0; at < n;) {
        const char *end = memchr(text + at, '\n', n - at);
        size_t len = end ? (size_t)(end - text) - at : n - at;
        char line[LINE_MAX_BYTES];
        r->line++;
        if (len >= sizeof line || memchr(text + at, 0, len))
            return td_err_set(r->err, -EINVAL, "%s: line %zu is no line of a table", r->file,
                              r->line);
        memcpy(line, text + at, len);
        line[len] = 0;
        int code = 0;
        if (r->line > 1)
            code = add_line(r, line, t);
        else if (strcmp(line, header) != 0)
            code = td_err_set(r->err, -EINVAL, "%s: line 1 is not the header: %s", r->file, header);
        if (code < 0)
            return code;
        at += len + 1;
    }
    return r->line ? 0 : td_err_set(r->err, -EINVAL, "%s: empty, not even a header", r->file);
}

int td_tuned_parse(const char *text, size_t n, const char *file, const char *arch,
                   td_tuned **ret_table, td_err *reterr_err)
{
    reader r = {.file = file, .arch = arch, .err = reterr_err};
    td_tuned *t = NULL;
    if (td_tuned_new(arch, &t) < 0)
        return td_err_set(reterr_err, -ENOMEM, "%s: out of memory", file);
    int code = read_lines(&r, text, n, t);
    if (code < 0) {
        td_tuned_free(t);
        return code;
    }
    *ret_table = t;
    return 0;
}

static int load_builtin(const char *arch, td_tuned **ret_table, td_err *reterr_err)
{
    char name[64];
    size_t n = 0;
    const char *text = td_tune_table(arch, &n);
    if (!text)
        return td_tuned_new(arch, ret_table) < 0 ? td_err_set(reterr_err, -ENOMEM, "out of memory")
                                                 : 0;
    snprintf(name, sizeof name, "%s.csv (built in)", arch);
    return td_tuned_parse(text, n, name, arch, ret_table, reterr_err);
}

int td_tuned_load(const char *dir, const char *arch, td_tuned **ret_table, td_err *reterr_err)
{
    char name[64];
    if (!dir || !*dir)
        return load_builtin(arch, ret_table, reterr_err);
    snprintf(name, sizeof name, "%s.csv", arch);
    TD_AUTO_FREE char *path = td_path_join(dir, name);
    TD_AUTO_FREE char *text = NULL;
    size_t n = 0;
    if (!path)
        return td_err_set(reterr_err, -ENOMEM, "out of memory");
    int r = td_file_read(path, FILE_MAX, &text, &n, reterr_err);
    return r < 0 ? r : td_tuned_parse(text, n, path, arch, ret_table, reterr_err);
}

static int write_rows(const td_tuned *t, FILE *f)
{
    fprintf(f, "%s\n", header);
    for (size_t i = 0; i < t->n; i++) {
        const td_tuned_row *row = &t->rows[i];
        const td_tune_key *k = &row->key;
        char share[16];
        share_text(k, share, sizeof share);
        fprintf(f, "%s,%u,%s,%u,%u,%u,%u,%u,%s,%u,%u,%s,%s,%.3f,%.3e\n", t->arch, k->cus,
                td_tune_op_name(k->op), k->rows, k->n, k->k, k->heads, k->slices, dtype_text(k),
                k->experts, k->top_k, share, td_gpu_plan_name(row->plan), row->us, row->error);
    }
    if (fflush(f) != 0 || ferror(f) || fsync(fileno(f)) != 0)
        return errno ? -errno : -EIO;
    return 0;
}

int td_tuned_write(const td_tuned *t, const char *path, td_err *reterr_err)
{
    char temp[4096];
    if (snprintf(temp, sizeof temp, "%s.new-%d", path, (int)getpid()) >= (int)sizeof temp)
        return td_err_set(reterr_err, -ENAMETOOLONG, "%.200s...: path too long", path);
    errno = 0;
    FILE *f = fopen(temp, "wxe");
    if (!f)
        return td_err_set(reterr_err, -errno, "%s: %s", temp, td_errno_text(-errno));
    int r = write_rows(t, f);
    if (fclose(f) != 0 && r >= 0)
        r = -errno;
    if (r >= 0 && rename(temp, path) != 0)
        r = -errno;
    if (r >= 0)
        return 0;
    unlink(temp);
    return td_err_set(reterr_err, r, "%s: %s", path, td_errno_text(r));
}

/* ---- chooser ---- */

enum { UNTUNED_MAX = 1024 };

typedef struct slot {
    td_tune_key key; /* rows 0: empty */
    td_gpu_plan plan;
} slot;

struct td_tune_chooser {
    slot *slots;
    size_t mask;
    td_tune_key untuned[UNTUNED_MAX];
    atomic_size_t n_untuned;
};

static slot *slot_of(const td_tune_chooser *c, const td_tune_key *k)
{
    const uint32_t *p = &k->cus;
    uint64_t h = 0;
    for (size_t i = 0; i < sizeof *k / sizeof *p; i++)
        h = (h ^ p[i]) * 0x9e3779b97f4a7c15u;
    for (size_t at = (size_t)(h >> 32) & c->mask;; at = (at + 1) & c->mask) {
        slot *s = &c->slots[at];
        if (s->key.rows == 0 || memcmp(&s->key, k, sizeof *k) == 0)
            return s;
    }
}

int td_tune_chooser_new(const td_tuned *t, td_tune_chooser **ret_chooser)
{
    td_tune_chooser *c = calloc(1, sizeof *c);
    size_t n = 1024;
    while (n < 2 * (t->n + UNTUNED_MAX))
        n *= 2;
    if (c)
        c->slots = calloc(n, sizeof *c->slots);
    if (!c || !c->slots) {
        free(c);
        return -ENOMEM;
    }
    c->mask = n - 1;
    for (size_t i = 0; i < t->n; i++)
        *slot_of(c, &t->rows[i].key) = (slot){t->rows[i].key, t->rows[i].plan};
    *ret_chooser = c;
    return 0;
}

void td_tune_chooser_free(td_tune_chooser *c)
{
    if (c)
        free(c->slots);
    free(c);
}

td_gpu_plan td_tune_choose(td_tune_chooser *c, const td_tune_key *k)
{
    slot *s = slot_of(c, k);
    if (s->key.rows)
        return s->plan;
    size_t n = atomic_load_explicit(&c->n_untuned, memory_order_relaxed);
    if (n == UNTUNED_MAX) /* the first thousand say enough; the map stays half empty */
        return TD_GPU_PLAN_AUTO;
    *s = (slot){*k, TD_GPU_PLAN_AUTO};
    c->untuned[n] = *k;
    atomic_store_explicit(&c->n_untuned, n + 1, memory_order_release);
    return TD_GPU_PLAN_AUTO;
}

size_t td_tune_untuned(const td_tune_chooser *c)
{
    return atomic_load_explicit(&c->n_untuned, memory_order_acquire);
}

const td_tune_key *td_tune_untuned_at(const td_tune_chooser *c, size_t i)
{
    TD_BUG_ON(i >= td_tune_untuned(c));
    return &c->untuned[i];
}
