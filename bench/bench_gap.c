/* SPDX-License-Identifier: Apache-2.0 */
/* What a long prompt does to a stream that runs: starts `tandem serve`, lets one stream decode,
 * sends a prompt of 2,048 tokens into it, and compares the stream's longest gap between two tokens
 * from then until the prompt's first token with the median of all its gaps. bench_gap [--model DIR]
 * [--prompt N] [--rounds N] [--out FILE] [-- options of serve] One prefill and one decode worker on
 * a core of their own each is what `tandem serve` does on two cores. */
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

enum { TOKENS_MAX = 16384, ROUNDS_MAX = 64, PROMPT_MAX = 8192, QUIET = 64, BEHIND = 32 };

typedef struct call {
    struct bench *b;
    td_http_call *call;
    td_strbuf line, body;
    uint64_t at[TOKENS_MAX]; /* when each token came */
    unsigned n;
    int done;
} call;

typedef struct bench {
    const char *model, *out;
    unsigned n_prompt, n_tokens, n_rounds, seed;
    char **extra;
    bench_server server;
    td_loop *loop;
    call stream, prompt;
    uint64_t sent_us;
    unsigned tail; /* tokens of the stream that came behind the prompt's first */
} bench;

static void start(call *c, unsigned n_prompt, unsigned n_tokens);

static void take_line(call *c, const char *line)
{
    bench *b = c->b;
    if (strncmp(line, "data: ", 6) != 0)
        return;
    if (strstr(line, "\"error\""))
        fprintf(stderr, "bench_gap: %s\n", line);
    if (strcmp(line, "data: [DONE]") == 0)
        c->done = 1;
    else if (c->n < TOKENS_MAX)
        c->at[c->n++] = td_now_us();
    if (c == &b->stream && b->stream.n == QUIET && !b->sent_us) {
        b->sent_us = td_now_us();
        start(&b->prompt, b->n_prompt, 2);
    }
    if (c == &b->stream && b->prompt.n && ++b->tail == BEHIND)
        td_loop_stop(b->loop);
}

static void on_data(void *arg, const char *data, size_t n)
{
    call *c = arg;
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
    call *c = arg;
    c->call = NULL;
    if (!c->done)
        fprintf(stderr, "bench_gap: a request failed: %s %s\n", error ? error : "", c->line.data);
    if (!c->done || c == &c->b->stream)
        td_loop_stop(c->b->loop);
}

static void start(call *c, unsigned n_prompt, unsigned n_tokens)
{
    static const td_http_call_ops ops = {.on_data = on_data, .on_done = on_done};
    static const td_http_header headers[] = {{"Content-Type", "application/json"}};
    bench *b = c->b;
    char url[220];
    td_err err = {0};
    td_strbuf_reset(&c->line);
    td_strbuf_reset(&c->body);
    c->n = 0;
    c->done = 0;
    td_strbuf_addf(&c->body, "{\"prompt\":[");
    for (unsigned i = 0; i < n_prompt; i++) {
        b->seed = b->seed * 1664525 + 1013904223;
        td_strbuf_addf(&c->body, i ? ",%u" : "%u", 300 + (b->seed >> 16) % 1024);
    }
    td_strbuf_addf(&c->body, "],\"stream\":true,\"ignore_eos\":true,\"max_tokens\":%u}", n_tokens);
    snprintf(url, sizeof url, "%s/v1/completions", b->server.url);
    if (td_http_call_start(b->loop, "POST", url, headers, 1, c->body.data, c->body.len, &ops, c,
                           &c->call, &err) < 0) {
        fprintf(stderr, "bench_gap: %s\n", err.text);
        exit(1);
    }
}

/* One stream with a prompt in its middle. 0; -EIO: the stream ended before its prompt was answered.
 */
static int run_round(bench *b, unsigned round, FILE *csv, const char *stamp)
{
    static double gaps[TOKENS_MAX];
    double longest = 0;
    unsigned n = 0;
    b->sent_us = b->tail = b->prompt.n = 0;
    start(&b->stream, 128, b->n_tokens);
    td_loop_run(b->loop);
    if (b->tail < BEHIND)
        return -EIO;
    for (unsigned i = 2; i < b->stream.n; i++) {
        double gap = (double)(b->stream.at[i] - b->stream.at[i - 1]) * 1e-3;
        gaps[n++] = gap;
        if (b->stream.at[i] > b->sent_us && b->stream.at[i - 1] < b->prompt.at[0] && gap > longest)
            longest = gap;
    }
    double median = bench_quantile(gaps, n, .5), quiet = bench_quantile(gaps, n, .99);
    double ttft = (double)(b->prompt.at[0] - b->sent_us) * 1e-3;
    printf("%5u %9u %9.2f %9.2f %9.2f %7.2f %12.0f\n", round, n, median, quiet, longest,
           longest / median, ttft);
    fprintf(csv, "%s,%u,%u,%.3f,%.3f,%.3f,%.3f,%.1f\n", stamp, b->n_prompt, n, median, quiet,
            longest, longest / median, ttft);
    if (b->stream.call)
        td_http_call_cancel(b->stream.call);
    if (b->prompt.call)
        td_http_call_cancel(b->prompt.call);
    b->stream.call = b->prompt.call = NULL;
    return 0;
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
        else if (strcmp(argv[i], "--prompt") == 0)
            b->n_prompt = (unsigned)strtoul(v, NULL, 10);
        else if (strcmp(argv[i], "--tokens") == 0)
            b->n_tokens = (unsigned)strtoul(v, NULL, 10);
        else if (strcmp(argv[i], "--rounds") == 0)
            b->n_rounds = (unsigned)strtoul(v, NULL, 10);
        else
            return -EINVAL;
    }
    return b->n_prompt >= 1 && b->n_prompt <= PROMPT_MAX && b->n_tokens >= 1 &&
                   b->n_tokens <= TOKENS_MAX && b->n_rounds >= 1 && b->n_rounds <= ROUNDS_MAX
               ? 0
               : -EINVAL;
}

int main(int argc, char **argv)
{
    static bench b = {.model = "models/glm-tiny",
                      .out = "bench/results/gap.csv",
                      .n_prompt = 1024,
                      .n_tokens = 1536,
                      .n_rounds = 5};
    char stamp[300];
    int r = 0;
    if (parse(&b, argc, argv) < 0) {
        fprintf(
            stderr,
            "usage: bench_gap [--model DIR] [--prompt N] [--tokens N] [--rounds N] [--out FILE] "
            "[-- options of serve]\n");
        return 2;
    }
    FILE *csv = fopen(b.out, "w");
    if (!csv) {
        fprintf(stderr, "bench_gap: %s: %s (--out FILE)\n", b.out, td_errno_text(errno));
        return 1;
    }
    if (bench_server_start(&b.server, b.model, b.extra) < 0) {
        fprintf(stderr, "bench_gap: the server did not start\n");
        bench_server_stop(&b.server);
        return 1;
    }
    td_loop_new(&b.loop);
    call *calls[] = {&b.stream, &b.prompt};
    for (size_t i = 0; i < TD_ARRAY_LEN(calls); i++) {
        calls[i]->b = &b;
        td_strbuf_init(&calls[i]->line);
        td_strbuf_init(&calls[i]->body);
    }
    bench_stamp(stamp, sizeof stamp);
    fprintf(csv,
            "day,commit,machine,prompt_tokens,stream_tokens,gap_median_ms,gap_p99_ms,gap_longest_"
            "ms,longest_over_median,prompt_ttft_ms\n");
    printf("%s, a prompt of %u tokens beside one stream\n\n", stamp, b.n_prompt);
    printf("round    tokens gap median      p99  longest  ratio  prompt TTFT\n");
    for (unsigned i = 0; i < b.n_rounds && r == 0; i++)
        r = run_round(&b, i + 1, csv, stamp);
    if (r < 0)
        fprintf(stderr, "bench_gap: the stream ended before the prompt was answered\n");
    fclose(csv);
    bench_server_stop(&b.server);
    return r < 0;
}
