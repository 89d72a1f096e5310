/* SPDX-License-Identifier: Apache-2.0 */
#include "net/metrics.h"

#include <dirent.h>
#include <errno.h>
#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "base/bug.h"
#include "base/cleanup.h"
#include "base/list.h"
#include "base/banned.h"

/* The conventional bounds of LLM servers (vLLM's, so that boards carry over), with finer steps for
 * fast decoding. */
const double td_buckets_ttft[] = {.001, .005, .01, .02, .04, .06, .08, .1, .25, .5,  .75,
                                  1,    2.5,  5,   7.5, 10,  20,  40,  80, 160, 640, 2560};
const uint32_t td_n_buckets_ttft = TD_ARRAY_LEN(td_buckets_ttft);
const double td_buckets_itl[] = {.001, .0025, .005, .01, .025, .05, .075, .1, .15, .2, .3,
                                 .4,   .5,    .75,  1,   2.5,  5,   7.5,  10, 20,  40, 80};
const uint32_t td_n_buckets_itl = TD_ARRAY_LEN(td_buckets_itl);
const double td_buckets_request[] = {.3, .5, .8, 1,  1.5, 2,   2.5, 5,   10,   15,  20,
                                     30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680};
const uint32_t td_n_buckets_request = TD_ARRAY_LEN(td_buckets_request);

enum type { COUNTER, GAUGE, HISTOGRAM };

/* One name and label set; first member of each kind. */
typedef struct series {
    td_list node;
    char *labels;
} series;

struct td_counter {
    series s;
    _Atomic uint64_t value;
};

struct td_gauge {
    series s;
    double value;
};

struct td_histogram {
    series s;
    double sum;
    uint32_t n_bounds;
    uint64_t *counts; /* n_bounds + 1, the last above all bounds; not cumulative */
    double bounds[];
};

typedef struct family {
    td_list node, series;
    enum type type;
    char *name, *help;
} family;

struct td_metrics {
    td_list families;
};

int td_metrics_new(td_metrics **ret_metrics)
{
    td_metrics *m = malloc(sizeof *m);
    if (!m)
        return -ENOMEM;
    td_list_init(&m->families);
    *ret_metrics = m;
    return 0;
}

static void series_free(series *s, enum type type)
{
    td_list_del(&s->node);
    if (type == HISTOGRAM)
        free(((td_histogram *)s)->counts);
    free(s->labels);
    free(s);
}

static void family_free(family *f)
{
    TD_LIST_FOR (it, &f->series)
        series_free(TD_LIST_ENTRY(it, series, node), f->type);
    td_list_del(&f->node);
    free(f->name);
    free(f->help);
    free(f);
}

void td_metrics_free(td_metrics *m)
{
    if (!m)
        return;
    TD_LIST_FOR (it, &m->families)
        family_free(TD_LIST_ENTRY(it, family, node));
    free(m);
}

static family *family_get(td_metrics *m, const char *name, const char *help, enum type type)
{
    TD_LIST_FOR (it, &m->families) {
        family *f = TD_LIST_ENTRY(it, family, node);
        if (strcmp(f->name, name))
            continue;
        TD_BUG_ON(f->type != type);
        return f;
    }
    family *f = calloc(1, sizeof *f);
    if (!f)
        return NULL;
    td_list_init(&f->series);
    td_list_add(&m->families, &f->node);
    f->type = type;
    f->name = strdup(name);
    f->help = strdup(help);
    if (f->name && f->help)
        return f;
    family_free(f);
    return NULL;
}

/* The series of that name and labels, made with `bytes` (zeroed) when new. */
static void *series_get(td_metrics *m, const char *name, const char *labels, const char *help,
                        enum type type, size_t bytes)
{
    family *f = family_get(m, name, help, type);
    if (!f)
        return NULL;
    TD_LIST_FOR (it, &f->series) {
        series *s = TD_LIST_ENTRY(it, series, node);
        if (!strcmp(s->labels, labels))
            return s;
    }
    series *s = calloc(1, bytes);
    if (!s)
        return NULL;
    if (!(s->labels = strdup(labels))) {
        free(s);
        return NULL;
    }
    td_list_add(&f->series, &s->node);
    return s;
}

td_counter *td_counter_new(td_metrics *m, const char *name, const char *labels, const char *help)
{
    return series_get(m, name, labels, help, COUNTER, sizeof(td_counter));
}

td_gauge *td_gauge_new(td_metrics *m, const char *name, const char *labels, const char *help)
{
    return series_get(m, name, labels, help, GAUGE, sizeof(td_gauge));
}

td_histogram *td_histogram_new(td_metrics *m, const char *name, const char *labels,
                               const char *help, const double *bounds, uint32_t n)
{
    td_histogram *h =
        series_get(m, name, labels, help, HISTOGRAM, sizeof(td_histogram) + n * sizeof *bounds);
    if (!h || h->counts)
        return h;
    if (!(h->counts = calloc((size_t)n + 1, sizeof *h->counts))) {
        series_free(&h->s, HISTOGRAM);
        return NULL;
    }
    h->n_bounds = n;
    memcpy(h->bounds, bounds, n * sizeof *bounds);
    for (uint32_t i = 1; i < n; i++)
        TD_BUG_ON(bounds[i] <= bounds[i - 1]);
    return h;
}

void td_metrics_drop(td_metrics *m, const char *labels_part)
{
    TD_LIST_FOR (fit, &m->families) {
        family *f = TD_LIST_ENTRY(fit, family, node);
        TD_LIST_FOR (it, &f->series) {
            series *s = TD_LIST_ENTRY(it, series, node);
            if (strstr(s->labels, labels_part))
                series_free(s, f->type);
        }
    }
}

void td_counter_add(td_counter *c, uint64_t n)
{
    if (c)
        atomic_fetch_add_explicit(&c->value, n, memory_order_relaxed);
}

uint64_t td_counter_get(const td_counter *c)
{
    return c ? atomic_load_explicit(&((td_counter *)c)->value, memory_order_relaxed) : 0;
}

void td_gauge_set(td_gauge *g, double v)
{
    if (g)
        g->value = v;
}

double td_gauge_get(const td_gauge *g)
{
    return g ? g->value : 0;
}

void td_histogram_add(td_histogram *h, double v)
{
    if (!h || isnan(v))
        return;
    uint32_t lo = 0, hi = h->n_bounds; /* first bound >= v: `le` is inclusive */
    while (lo < hi) {
        uint32_t mid = (lo + hi) / 2;
        if (h->bounds[mid] < v)
            lo = mid + 1;
        else
            hi = mid;
    }
    h->counts[lo]++;
    h->sum += v;
}

static uint64_t count_of(const td_histogram *h)
{
    uint64_t n = 0;
    for (uint32_t i = 0; i <= h->n_bounds; i++)
        n += h->counts[i];
    return n;
}

double td_histogram_quantile(const td_histogram *h, double q)
{
    uint64_t total = h ? count_of(h) : 0;
    if (!total)
        return 0;
    double rank = q * (double)total, seen = 0;
    for (uint32_t i = 0; i < h->n_bounds; i++) {
        double n = (double)h->counts[i];
        if (n > 0 && seen + n >= rank) {
            double from = i ? h->bounds[i - 1] : 0;
            return from + (h->bounds[i] - from) * ((rank - seen) / n);
        }
        seen += n;
    }
    return h->n_bounds ? h->bounds[h->n_bounds - 1]
                       : 0; /* above all bounds: the last is all we know */
}

/* ---- text ---- */

/* Shortest decimal that reads back the same. */
static void add_double(td_strbuf *out, double v)
{
    char text[40];
    if (isnan(v)) {
        td_strbuf_adds(out, "NaN");
    } else if (isinf(v)) {
        td_strbuf_adds(out, v > 0 ? "+Inf" : "-Inf");
    } else {
        for (int digits = 6; digits <= 17; digits++) {
            snprintf(text, sizeof text, "%.*g", digits, v);
            if (strtod(text, NULL) == v)
                break;
        }
        td_strbuf_adds(out, text);
    }
}

/* `tandem_<name><suffix>{labels,le="..."} ` */
static void add_name(td_strbuf *out, const char *name, const char *suffix, const char *labels,
                     const double *le)
{
    td_strbuf_addf(out, "tandem_%s%s", name, suffix);
    if (*labels || le) {
        td_strbuf_addf(out, "{%s%s", labels, *labels && le ? "," : "");
        if (le) {
            td_strbuf_adds(out, "le=\"");
            add_double(out, *le);
            td_strbuf_addc(out, '"');
        }
        td_strbuf_addc(out, '}');
    }
    td_strbuf_addc(out, ' ');
}

static void add_u64_line(td_strbuf *out, uint64_t v)
{
    td_strbuf_add_u64(out, v);
    td_strbuf_addc(out, '\n');
}

static void add_double_line(td_strbuf *out, double v)
{
    add_double(out, v);
    td_strbuf_addc(out, '\n');
}

static void write_histogram(const char *name, const td_histogram *h, td_strbuf *out)
{
    uint64_t n = 0;
    for (uint32_t i = 0; i <= h->n_bounds; i++) {
        double le = i < h->n_bounds ? h->bounds[i] : INFINITY;
        n += h->counts[i];
        add_name(out, name, "_bucket", h->s.labels, &le);
        add_u64_line(out, n);
    }
    add_name(out, name, "_sum", h->s.labels, NULL);
    add_double_line(out, h->sum);
    add_name(out, name, "_count", h->s.labels, NULL);
    add_u64_line(out, n);
}

static void write_series(const family *f, const series *s, td_strbuf *out)
{
    if (f->type == HISTOGRAM) {
        write_histogram(f->name, (const td_histogram *)s, out);
        return;
    }
    add_name(out, f->name, "", s->labels, NULL);
    if (f->type == COUNTER)
        add_u64_line(out, td_counter_get((const td_counter *)s));
    else
        add_double_line(out, ((const td_gauge *)s)->value);
}

void td_metrics_write(const td_metrics *m, td_strbuf *out)
{
    static const char *const types[] = {"counter", "gauge", "histogram"};
    TD_LIST_FOR (fit, &m->families) {
        const family *f = TD_LIST_ENTRY(fit, family, node);
        if (td_list_empty(&f->series))
            continue;
        td_strbuf_addf(out, "# HELP tandem_%s %s\n# TYPE tandem_%s %s\n", f->name, f->help, f->name,
                       types[f->type]);
        TD_LIST_FOR (it, &f->series)
            write_series(f, TD_LIST_ENTRY(it, series, node), out);
    }
}

void td_metrics_label(td_strbuf *out, const char *value, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        if (value[i] == '\\' || value[i] == '"')
            td_strbuf_addc(out, '\\');
        if (value[i] == '\n')
            td_strbuf_adds(out, "\\n");
        else
            td_strbuf_addc(out, value[i]);
    }
}

/* ---- the process ---- */

static void add_process(td_strbuf *out, const char *name, const char *type, const char *help,
                        double v)
{
    td_strbuf_addf(out, "# HELP process_%s %s\n# TYPE process_%s %s\nprocess_%s ", name, help, name,
                   type, name);
    add_double_line(out, v);
}

static double count_fds(void)
{
    DIR *d = opendir("/proc/self/fd");
    double n = -3; /* ".", ".." and the directory itself */
    if (!d)
        return 0;
    while (readdir(d))
        n++;
    closedir(d);
    return n;
}

/* Seconds since 1970 at which the machine started. Not from /proc/stat: hardened units and
 * containers hide it. */
static double boot_time(void)
{
    struct timespec real, boot;
    clock_gettime(CLOCK_REALTIME, &real);
    clock_gettime(CLOCK_BOOTTIME, &boot);
    return (double)(real.tv_sec - boot.tv_sec) + (double)(real.tv_nsec - boot.tv_nsec) / 1e9;
}

void td_metrics_write_process(td_strbuf *out)
{
    TD_AUTO_FCLOSE FILE *f = fopen("/proc/self/stat", "re");
    char line[1024];
    unsigned long utime, stime;
    unsigned long long start;
    long rss;
    const char *p =
        f && fgets(line, sizeof line, f) ? strrchr(line, ')') : NULL; /* the name may hold blanks */
    if (!p || sscanf(p + 1,
                     " %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %lu %lu %*d %*d %*d %*d %*d %*d "
                     "%llu %*u %ld",
                     &utime, &stime, &start, &rss) != 4)
        return;
    double hz = (double)sysconf(_SC_CLK_TCK);
    add_process(out, "cpu_seconds_total", "counter",
                "Total user and system CPU time spent in seconds.", (double)(utime + stime) / hz);
    add_process(out, "resident_memory_bytes", "gauge", "Resident memory size in bytes.",
                (double)rss * (double)sysconf(_SC_PAGESIZE));
    add_process(out, "open_fds", "gauge", "Number of open file descriptors.", count_fds());
    add_process(out, "start_time_seconds", "gauge",
                "Start time of the process since unix epoch in seconds.",
                boot_time() + (double)start / hz);
}
