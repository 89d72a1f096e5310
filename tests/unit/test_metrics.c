/* SPDX-License-Identifier: Apache-2.0 */
/* Guards: the Prometheus text form 0.0.4 to the byte, since scrapers drop a whole page for one bad
 * line; and promtool as the outside judge where it is installed. */
#include "net/metrics.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

static td_metrics *m;
static td_strbuf out;

static int setup(void **state)
{
    td_strbuf_init(&out);
    return td_metrics_new(&m);
}

static int teardown(void **state)
{
    td_strbuf_done(&out);
    td_metrics_free(m);
    return 0;
}

static void text_form(void **state)
{
    const double bounds[] = {.001, .25, 1, 2560};
    td_counter *c = td_counter_new(m, "requests_total", "route=\"/v1/x\"", "Requests.");
    td_gauge *g = td_gauge_new(m, "kv_used_ratio", "", "Part of the KV blocks in use.");
    td_counter *c2 = td_counter_new(m, "requests_total", "route=\"other\"", "Requests.");
    td_histogram *h = td_histogram_new(m, "wait_seconds", "pool=\"decode\"", "Waiting.", bounds, 4);
    td_counter_add(c, 3);
    td_counter_add(c2, 18446744073709551000ull);
    td_gauge_set(g, 0.1);
    td_histogram_add(h, .001); /* a bound belongs to its bucket */
    td_histogram_add(h, .5);
    td_histogram_add(h, 5000);
    td_metrics_write(m, &out);
    assert_string_equal(out.data, "# HELP tandem_requests_total Requests.\n"
                                  "# TYPE tandem_requests_total counter\n"
                                  "tandem_requests_total{route=\"/v1/x\"} 3\n"
                                  "tandem_requests_total{route=\"other\"} 18446744073709551000\n"
                                  "# HELP tandem_kv_used_ratio Part of the KV blocks in use.\n"
                                  "# TYPE tandem_kv_used_ratio gauge\n"
                                  "tandem_kv_used_ratio 0.1\n"
                                  "# HELP tandem_wait_seconds Waiting.\n"
                                  "# TYPE tandem_wait_seconds histogram\n"
                                  "tandem_wait_seconds_bucket{pool=\"decode\",le=\"0.001\"} 1\n"
                                  "tandem_wait_seconds_bucket{pool=\"decode\",le=\"0.25\"} 1\n"
                                  "tandem_wait_seconds_bucket{pool=\"decode\",le=\"1\"} 2\n"
                                  "tandem_wait_seconds_bucket{pool=\"decode\",le=\"2560\"} 2\n"
                                  "tandem_wait_seconds_bucket{pool=\"decode\",le=\"+Inf\"} 3\n"
                                  "tandem_wait_seconds_sum{pool=\"decode\"} 5000.501\n"
                                  "tandem_wait_seconds_count{pool=\"decode\"} 3\n");
}

static void odd_values(void **state)
{
    td_gauge *g = td_gauge_new(m, "a", "", "A.");
    const double v[] = {NAN, INFINITY, -INFINITY, 1e300, 1.0 / 3, 4294967297.0};
    static const char *const text[] = {"NaN",       "+Inf", "-Inf", "1e+300", "0.3333333333333333",
                                       "4294967297"};
    for (int i = 0; i < 6; i++) {
        char want[64];
        td_gauge_set(g, v[i]);
        td_strbuf_reset(&out);
        td_metrics_write(m, &out);
        snprintf(want, sizeof want, "\ntandem_a %s\n", text[i]);
        assert_non_null(strstr(out.data, want));
    }
    td_histogram *h = td_histogram_new(m, "h", "", "H.", v + 3, 1);
    td_histogram_add(h, NAN); /* would make the sum NaN for ever */
    assert_true(td_histogram_quantile(h, .5) == 0);
}

static void same_labels_are_one_object(void **state)
{
    td_counter *a = td_counter_new(m, "x_total", "w=\"1\"", "X.");
    assert_ptr_equal(a, td_counter_new(m, "x_total", "w=\"1\"", "X."));
    assert_ptr_not_equal(a, td_counter_new(m, "x_total", "w=\"2\"", "X."));
    td_counter_add(NULL, 1);
    td_gauge_set(NULL, 1);
    td_histogram_add(NULL, 1);
    assert_int_equal(td_counter_get(NULL), 0);
}

static void a_worker_that_left_is_dropped(void **state)
{
    td_counter *stays = td_counter_new(m, "x_total", "worker=\"d1\"", "X.");
    td_counter_new(m, "x_total", "worker=\"d2\"", "X.");
    td_gauge_new(m, "g", "pool=\"decode\",worker=\"d2\"", "G.");
    td_histogram_new(m, "h", "worker=\"d2\"", "H.", td_buckets_itl, td_n_buckets_itl);
    td_metrics_drop(m, "worker=\"d2\"");
    td_counter_add(stays, 1);
    td_metrics_write(m, &out);
    assert_string_equal(out.data, "# HELP tandem_x_total X.\n# TYPE tandem_x_total counter\n"
                                  "tandem_x_total{worker=\"d1\"} 1\n");
}

static void labels_are_escaped(void **state)
{
    td_metrics_label(&out, "a\"b\\c\nd", 7);
    assert_string_equal(out.data, "a\\\"b\\\\c\\nd");
}

static void quantiles(void **state)
{
    const double bounds[] = {1, 2, 4};
    td_histogram *h = td_histogram_new(m, "q", "", "Q.", bounds, 3);
    assert_true(td_histogram_quantile(h, .5) == 0);
    for (int i = 0; i < 10; i++)
        td_histogram_add(h, 1.5);
    assert_true(fabs(td_histogram_quantile(h, .5) - 1.5) < 1e-9);
    assert_true(fabs(td_histogram_quantile(h, 1) - 2) < 1e-9);
    for (int i = 0; i < 90; i++)
        td_histogram_add(h, 100);
    assert_true(td_histogram_quantile(h, .99) == 4);
}

static void process_tells_the_truth(void **state)
{
    double rss = 0, start = 0, fds = 0, cpu = -1;
    td_metrics_write_process(&out);
    const char *p = out.data;
    assert_int_equal(sscanf(strstr(p, "\nprocess_resident_memory_bytes "), "\n%*s %lf", &rss), 1);
    assert_int_equal(sscanf(strstr(p, "\nprocess_start_time_seconds "), "\n%*s %lf", &start), 1);
    assert_int_equal(sscanf(strstr(p, "\nprocess_open_fds "), "\n%*s %lf", &fds), 1);
    assert_int_equal(sscanf(strstr(p, "\nprocess_cpu_seconds_total "), "\n%*s %lf", &cpu), 1);
    assert_true(rss > 1 << 20);
    assert_true(fabs(start - (double)time(NULL)) < 60);
    assert_true(fds >= 3 && cpu >= 0);
    int fd = dup(1);
    td_strbuf_reset(&out);
    td_metrics_write_process(&out);
    double more = 0;
    assert_int_equal(sscanf(strstr(out.data, "\nprocess_open_fds "), "\n%*s %lf", &more), 1);
    assert_true(more == fds + 1);
    close(fd);
}

static void promtool_is_content(void **state)
{
    if (system("command -v promtool >/dev/null 2>&1") != 0) {
        print_message("SKIP promtool_is_content: promtool is not installed (Debian: prometheus)\n");
        skip();
    }
    td_strbuf label;
    td_strbuf_init(&label);
    td_strbuf_adds(&label, "worker=\"");
    td_metrics_label(&label, "odd \"name\"\\\n", 12);
    td_strbuf_adds(&label, "\"");
    td_counter_add(td_counter_new(m, "tokens_total", label.data, "Tokens."), 7);
    td_gauge_set(td_gauge_new(m, "kv_used_ratio", label.data, "KV in use."), NAN);
    td_histogram_add(td_histogram_new(m, "time_to_first_token_seconds", label.data, "TTFT.",
                                      td_buckets_ttft, td_n_buckets_ttft),
                     .3);
    td_histogram_new(m, "e2e_request_latency_seconds", "", "Whole requests.", td_buckets_request,
                     td_n_buckets_request);
    td_strbuf_done(&label);
    td_metrics_write(m, &out);
    td_metrics_write_process(&out);
    FILE *p = popen("promtool check metrics", "w");
    assert_non_null(p);
    fwrite(out.data, 1, out.len, p);
    assert_int_equal(pclose(p), 0);
}

int main(void)
{
#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
    const struct CMUnitTest tests[] = {
        T(text_form),
        T(odd_values),
        T(same_labels_are_one_object),
        T(a_worker_that_left_is_dropped),
        T(labels_are_escaped),
        T(quantiles),
        T(process_tells_the_truth),
        T(promtool_is_content),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
