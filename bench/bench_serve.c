/* SPDX-License-Identifier: Apache-2.0 */
/* Latency and throughput of a whole server: starts `tandem serve` on a free port, runs closed loops
 * at several concurrencies, prints a table and writes bench/results/serve.csv. bench_serve [--model
 * DIR] [--concurrency 1,4,16] [--prompt N] [--tokens N] [--requests N] [--out FILE]
 *               [-- options of serve]
 * --prompt N asks for completions of N token ids of their own instead of a chat. TTFT = first token
 * received - request sent. TPOT = (last token - first token) / (tokens - 1) per request. Tokens are
 * counted from the server's usage, never from chunks. KV figures are differences of the router's
 * counters. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bug.h"
#include "base/clock.h"
#include "base/err.h"
#include "base/strbuf.h"
#include "bench/figures.h"
#include "bench/server.h"
#include "net/http.h"
#include "base/banned.h"

enum { CONCURRENCY_MAX = 64, REQUESTS_MAX = 4096, LEVELS_MAX = 8, PROMPT_MAX = 8192 };

typedef struct bench bench;

typedef struct client {
    bench *b;
    td_http_call *call;
    td_strbuf line, body;
    uint64_t sent_us, first_us, last_us;
    uint64_t tokens;
    int done;
} client;

struct bench {
    const char *model, *out;
    unsigned n_tokens, n_requests, n_prompt; /* n_prompt 0: a chat */
    unsigned levels[LEVELS_MAX], n_levels;
    char **extra;
    bench_server server;
    td_loop *loop;
    client clients[CONCURRENCY_MAX];
    unsigned concurrency, started, finished, failed;
    double ttft[REQUESTS_MAX], tpot[REQUESTS_MAX];
    unsigned n_tpot;
    uint64_t tokens;
    uint64_t begin_us, end_us;
    td_strbuf page;
};

/* ---- one request ---- */

static void next_request(client *c);

static uint64_t number_behind(const char *line, const char *key)
{
    const char *at = strstr(line, key);
    return at ? strtoull(at + strlen(key), NULL, 10) : 0;
}

static void take_line(client *c, const char *line)
{
    uint64_t now = td_now_us();
    if (strncmp(line, "data: ", 6) != 0)
        return;
    if (strstr(line, "\"error\""))
        fprintf(stderr, "bench_serve: %s\n", line);
    if (strcmp(line, "data: [DONE]") == 0)
        c->done = 1;
    else if (strstr(line, "\"choices\":[]"))
        c->tokens = number_behind(line, "\"completion_tokens\":");
    else {
        if (!c->first_us)
            c->first_us = now;
        c->last_us = now;
    }
}

static void on_data(void *arg, const char *data, size_t n)
{
    client *c = arg;
    td_strbuf_add(&c->line, data, n);
    char *end;
    while ((end = memchr(c->line.data, '\n', c->line.len))) {
        *end = 0;
        take_line(c, c->line.data);
        td_strbuf_drop(&c->line, (size_t)(end - c->line.data) + 1);
    }
}

static void on_done(void *arg, const char *error)
{
    client *c = arg;
    bench *b = c->b;
    c->call = NULL;
    if (!c->done || !c->first_us) {
        fprintf(stderr, "bench_serve: request failed: %s %s\n", error ? error : "", c->line.data);
        b->failed++;
    } else {
        b->ttft[b->finished] = (double)(c->first_us - c->sent_us) * 1e-3;
        if (c->tokens > 1)
            b->tpot[b->n_tpot++] =
                (double)(c->last_us - c->first_us) * 1e-3 / (double)(c->tokens - 1);
        b->tokens += c->tokens;
        b->finished++;
    }
    b->end_us = td_now_us();
    if (b->finished + b->failed == b->n_requests)
        td_loop_stop(b->loop);
    else if (b->started < b->n_requests)
        next_request(c);
}

/* A prompt of its own for each: nothing comes from a cache. */
static void add_body(client *c, unsigned k)
{
    const bench *b = c->b;
    unsigned x = k * 7919 + b->concurrency;
    if (b->n_prompt) {
        td_strbuf_addf(&c->body, "{\"prompt\":[");
        for (unsigned i = 0; i < b->n_prompt; i++) {
            x = x * 1664525 + 1013904223;
            td_strbuf_addf(&c->body, i ? ",%u" : "%u", 300 + (x >> 16) % 1024);
        }
        td_strbuf_addf(&c->body, "],");
    } else {
        td_strbuf_addf(&c->body,
                       "{\"messages\":[{\"role\":\"user\",\"content\":\"Number %u. A farmer has %u "
                       "apples and buys %u more, then gives away %u. How many apples are left, and "
                       "what would you do with them?\"}],",
                       x, k % 90 + 10, k % 40 + 3, k % 9 + 1);
    }
    td_strbuf_addf(
        &c->body,
        "\"cache_salt\":\"%u-%u\",\"stream\":true,\"stream_options\":{\"include_usage\":true},"
        "\"ignore_eos\":true,\"max_tokens\":%u,\"seed\":%u}",
        b->concurrency, k, b->n_tokens, k);
}

static void next_request(client *c)
{
    static const td_http_call_ops ops = {.on_data = on_data, .on_done = on_done};
    static const td_http_header headers[] = {{"Content-Type", "application/json"}};
    bench *b = c->b;
    unsigned k = b->started++;
    char url[220];
    td_err err = {0};
    td_strbuf_reset(&c->line);
    td_strbuf_reset(&c->body);
    c->first_us = c->tokens = 0;
    c->done = 0;
    add_body(c, k);
    snprintf(url, sizeof url, "%s/v1/%s", b->server.url,
             b->n_prompt ? "completions" : "chat/completions");
    c->sent_us = td_now_us();
    if (td_http_call_start(b->loop, "POST", url, headers, 1, c->body.data, c->body.len, &ops, c,
                           &c->call, &err) < 0) {
        fprintf(stderr, "bench_serve: %s\n", err.text);
        exit(1);
    }
}

/* ---- figures ---- */

static void page_data(void *arg, const char *data, size_t n)
{
    td_strbuf_add(&((bench *)arg)->page, data, n);
}

static void page_done(void *arg, const char *error)
{
    td_loop_stop(((bench *)arg)->loop);
}

static void fetch_metrics(bench *b)
{
    static const td_http_call_ops ops = {.on_data = page_data, .on_done = page_done};
    char url[220];
    td_http_call *call;
    td_strbuf_reset(&b->page);
    snprintf(url, sizeof url, "%s/metrics", b->server.url);
    if (td_http_call_start(b->loop, "GET", url, NULL, 0, NULL, 0, &ops, b, &call, NULL) == 0)
        td_loop_run(b->loop);
}

static double metric(const bench *b, const char *name)
{
    size_t n = strlen(name);
    for (const char *p = b->page.data; p && *p; p = strchr(p, '\n') ? strchr(p, '\n') + 1 : NULL)
        if (strncmp(p, name, n) == 0 && p[n] == ' ')
            return strtod(p + n, NULL);
    return 0;
}

static void run_level(bench *b, unsigned concurrency, FILE *csv, const char *stamp)
{
    fetch_metrics(b);
    double bytes = metric(b, "tandem_kv_transfer_bytes_total"),
           seconds = metric(b, "tandem_kv_transfer_seconds_sum"),
           count = metric(b, "tandem_kv_transfer_seconds_count");
    b->concurrency = concurrency;
    b->started = b->finished = b->failed = b->n_tpot = 0;
    b->tokens = 0;
    b->begin_us = td_now_us();
    for (unsigned i = 0; i < concurrency; i++)
        next_request(&b->clients[i]);
    td_loop_run(b->loop);
    double wall = (double)(b->end_us - b->begin_us) * 1e-6;
    fetch_metrics(b);
    bytes = metric(b, "tandem_kv_transfer_bytes_total") - bytes;
    seconds = metric(b, "tandem_kv_transfer_seconds_sum") - seconds;
    count = metric(b, "tandem_kv_transfer_seconds_count") - count;
    double t50 = bench_quantile(b->ttft, b->finished, .5),
           t99 = bench_quantile(b->ttft, b->finished, .99);
    double p50 = bench_quantile(b->tpot, b->n_tpot, .5),
           p99 = bench_quantile(b->tpot, b->n_tpot, .99);
    double rate = (double)b->tokens / wall, kv_ms = count > 0 ? seconds / count * 1e3 : 0;
    double kv_gbs = seconds > 0 ? bytes / seconds * 1e-9 : 0,
           kv_each = count > 0 ? bytes / count : 0;
    printf("%11u %8u %7.1f %7.1f %8.2f %8.2f %9.0f %10.0f %8.2f %8.3f\n", concurrency, b->finished,
           t50, t99, p50, p99, rate, kv_each, kv_ms, kv_gbs);
    fprintf(csv, "%s,%u,%u,%u,%.2f,%.2f,%.3f,%.3f,%.1f,%.0f,%.3f,%.4f,%.3f\n", stamp, concurrency,
            b->finished, b->failed, t50, t99, p50, p99, rate, kv_each, kv_ms, kv_gbs,
            b->server.ready_s);
}

static void print_memory(bench *b, FILE *csv)
{
    char cmd[80], path[64], line[200];
    snprintf(cmd, sizeof cmd, "ps -o pid= --ppid %d", (int)b->server.pid);
    FILE *ps = popen(cmd, "r");
    int pid;
    printf("\nresident memory, MiB:");
    while (ps && fscanf(ps, "%d", &pid) == 1) {
        char name[64] = "?";
        long kib = 0;
        snprintf(path, sizeof path, "/proc/%d/cmdline", pid);
        FILE *f = fopen(path, "r");
        size_t n = f ? fread(line, 1, sizeof line - 1, f) : 0;
        line[n] = 0;
        if (f)
            fclose(f);
        if (n > strlen(line) + 1)
            snprintf(name, sizeof name, "%.60s", line + strlen(line) + 1);
        snprintf(path, sizeof path, "/proc/%d/status", pid);
        f = fopen(path, "r");
        while (f && fgets(line, sizeof line, f))
            if (sscanf(line, "VmRSS: %ld", &kib) == 1)
                break;
        if (f)
            fclose(f);
        printf(" %s %.1f", name, (double)kib / 1024);
        fprintf(csv, "# rss_mib %s %.1f\n", name, (double)kib / 1024);
    }
    if (ps)
        pclose(ps);
    putchar('\n');
}

/* "1,4,16" */
static int parse_levels(bench *b, const char *v)
{
    for (b->n_levels = 0; b->n_levels < LEVELS_MAX; v++) {
        char *end;
        unsigned long x = strtoul(v, &end, 10);
        if (end == v || x < 1 || x > CONCURRENCY_MAX)
            return -EINVAL;
        b->levels[b->n_levels++] = (unsigned)x;
        v = end;
        if (!*v)
            return 0;
        if (*v != ',')
            return -EINVAL;
    }
    return -EINVAL;
}

static int parse(bench *b, int argc, char **argv)
{
    for (int i = 1; i < argc; i += 2) {
        const char *v = i + 1 < argc ? argv[i + 1] : NULL;
        if (strcmp(argv[i], "--") == 0) {
            b->extra = argv + i + 1;
            return 0;
        }
        if (!v || strncmp(argv[i], "--", 2) != 0)
            return -EINVAL;
        if (strcmp(argv[i], "--model") == 0)
            b->model = v;
        else if (strcmp(argv[i], "--out") == 0)
            b->out = v;
        else if (strcmp(argv[i], "--tokens") == 0)
            b->n_tokens = (unsigned)strtoul(v, NULL, 10);
        else if (strcmp(argv[i], "--prompt") == 0)
            b->n_prompt = (unsigned)strtoul(v, NULL, 10);
        else if (strcmp(argv[i], "--concurrency") == 0) {
            if (parse_levels(b, v) < 0)
                return -EINVAL;
        } else if (strcmp(argv[i], "--requests") == 0)
            b->n_requests = (unsigned)strtoul(v, NULL, 10);
        else
            return -EINVAL;
    }
    return b->n_tokens >= 2 && b->n_requests >= 1 && b->n_requests <= REQUESTS_MAX &&
                   b->n_prompt <= PROMPT_MAX
               ? 0
               : -EINVAL;
}

int main(int argc, char **argv)
{
    static bench b = {.model = "models/glm-tiny",
                      .out = "bench/results/serve.csv",
                      .n_tokens = 128,
                      .n_requests = 48,
                      .levels = {1, 4, 16},
                      .n_levels = 3};
    char stamp[300];
    if (parse(&b, argc, argv) < 0) {
        fprintf(stderr,
                "usage: bench_serve [--model DIR] [--concurrency 1,4,16] [--prompt N] [--tokens N] "
                "[--requests N] [--out FILE] [-- options of serve]\n");
        return 2;
    }
    FILE *csv = fopen(b.out, "w");
    if (!csv) {
        fprintf(stderr, "bench_serve: %s: %s (--out FILE)\n", b.out, td_errno_text(errno));
        return 1;
    }
    if (bench_server_start(&b.server, b.model, b.extra) < 0) {
        fprintf(stderr, "bench_serve: the server did not start\n");
        bench_server_stop(&b.server);
        return 1;
    }
    td_loop_new(&b.loop);
    for (unsigned i = 0; i < CONCURRENCY_MAX; i++) {
        b.clients[i].b = &b;
        td_strbuf_init(&b.clients[i].line);
        td_strbuf_init(&b.clients[i].body);
    }
    bench_stamp(stamp, sizeof stamp);
    fprintf(csv, "day,commit,machine,concurrency,requests,failed,ttft_p50_ms,ttft_p99_ms,tpot_p50_"
                 "ms,tpot_p99_ms,tokens_per_s,"
                 "kv_bytes_each,kv_ms_each,kv_gb_per_s,ready_s\n");
    printf("%s, start to ready %.2f s, %u tokens a request\n\n", stamp, b.server.ready_s,
           b.n_tokens);
    printf(
        "concurrency requests TTFT p50     p99 TPOT p50      p99  tokens/s   KV bytes    KV ms  KV "
        "GB/s\n"
        "                          ms      ms       ms       ms                 each     each\n");
    for (size_t i = 0; i < b.n_levels; i++)
        run_level(&b, b.levels[i], csv, stamp);
    print_memory(&b, csv);
    fclose(csv);
    bench_server_stop(&b.server);
    return b.failed ? 1 : 0;
}
