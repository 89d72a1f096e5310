/* SPDX-License-Identifier: Apache-2.0 */
/* Prometheus text format 0.0.4: counters, gauges, fixed-bucket histograms with a few label sets.
 * Registered at start, updated from one thread (the loop) except td_counter_add(), which is atomic.
 */
#ifndef TD_NET_METRICS_H
#define TD_NET_METRICS_H

#include <stdint.h>

#include "base/strbuf.h"

typedef struct td_metrics td_metrics; /* a registry */
typedef struct td_counter td_counter;
typedef struct td_gauge td_gauge;
typedef struct td_histogram td_histogram;

int td_metrics_new(td_metrics **ret_metrics);
void td_metrics_free(td_metrics *m);

/* name without the "tandem_" prefix, which is added; labels like `pool="decode",worker="d1"` or ""
 * (values escaped by td_metrics_label). Metrics of one name share help and type; the same name and
 * labels give the same object. Returned objects live as long as the registry (or until
 * td_metrics_drop). NULL: out of memory; updates ignore NULL. */
td_counter *td_counter_new(td_metrics *m, const char *name, const char *labels, const char *help);
td_gauge *td_gauge_new(td_metrics *m, const char *name, const char *labels, const char *help);
/* bounds: n upper bounds ascending, copied; +Inf is added. */
td_histogram *td_histogram_new(td_metrics *m, const char *name, const char *labels,
                               const char *help, const double *bounds, uint32_t n);
/* Remove every metric whose label text contains this (a worker left). */
void td_metrics_drop(td_metrics *m, const char *labels_part);

void td_counter_add(td_counter *c, uint64_t n);
uint64_t td_counter_get(const td_counter *c);
void td_gauge_set(td_gauge *g, double v);
double td_gauge_get(const td_gauge *g);
void td_histogram_add(td_histogram *h, double v);
/* Estimate by linear interpolation inside the bucket; q in [0, 1]. 0 when empty. */
double td_histogram_quantile(const td_histogram *h, double q);

void td_metrics_write(const td_metrics *m, td_strbuf *out);
/* process_resident_memory_bytes, process_open_fds, process_cpu_seconds_total,
 * process_start_time_seconds. */
void td_metrics_write_process(td_strbuf *out);

/* Escape a label value (backslash, quote, newline) into out. */
void td_metrics_label(td_strbuf *out, const char *value, size_t n);

extern const double td_buckets_ttft[], td_buckets_itl[], td_buckets_request[];
extern const uint32_t td_n_buckets_ttft, td_n_buckets_itl, td_n_buckets_request;

#endif
