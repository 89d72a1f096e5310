/* SPDX-License-Identifier: Apache-2.0 */
/* How long a tokenizer.json of a large model takes to open, in CPU and in wall time, and how fast
 * text becomes ids. Generates a file with 150,000 tokens and 500,000 merges (25.7 MB), or opens the
 * directory given, nine times; `first` is the first of them, whose memory the kernel may have to
 * find. Prints CSV. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/strbuf.h"
#include "text/tokenizer.h"
#include "base/banned.h"

enum { N_TOKENS = 150000, N_MERGES = 500000, RUNS = 9 };

static double now_ms(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec / 1e6;
}

/* Token i: the byte alphabet first, then words in base 12, lowest digit first, so that every split
 * of a word into two is known. */
static void token_text(uint32_t i, char out[16])
{
    static const char letters[] = "etaoinshrdlu";
    size_t n = 0;
    for (i += 12; i; i /= 12)
        out[n++] = letters[i % 12];
    out[n] = 0;
}

static void add_alphabet(td_strbuf *b, uint32_t *id)
{
    for (unsigned c = 0, next = 0x100; c < 256; c++) {
        int plain = (c >= 0x21 && c <= 0x7E) || (c >= 0xA1 && c <= 0xAC) || c >= 0xAE;
        char utf8[4];
        int n = td_utf8_encode(plain ? c : next++, utf8);
        td_strbuf_adds(b, "      \"");
        td_strbuf_add_json(b, utf8, (size_t)n);
        td_strbuf_addf(b, "\": %u,\n", (*id)++);
    }
}

static void generate(td_strbuf *b)
{
    uint32_t id = 0, n_merges = 0;
    char text[16];
    td_strbuf_adds(b, "{\n  \"version\": \"1.0\",\n  \"truncation\": null,\n  \"padding\": null,\n "
                      " \"added_tokens\": [],\n  \"normalizer\": null,\n"
                      "  \"pre_tokenizer\": {\"type\": \"ByteLevel\", \"add_prefix_space\": false, "
                      "\"use_regex\": true},\n"
                      "  \"post_processor\": null,\n  \"decoder\": {\"type\": \"ByteLevel\"},\n  "
                      "\"model\": {\n    \"type\": \"BPE\",\n    \"vocab\": {\n");
    add_alphabet(b, &id);
    for (uint32_t i = 0; id < N_TOKENS; i++) {
        token_text(i, text);
        if (text[1])
            td_strbuf_addf(b, "      \"%s\": %u%s\n", text, id, id + 1 < N_TOKENS ? "," : "");
        id += text[1] != 0;
    }
    td_strbuf_adds(b, "    },\n    \"merges\": [\n");
    for (uint32_t i = 0; n_merges < N_MERGES; i = (i + 1) % (N_TOKENS - 300)) {
        token_text(i, text);
        size_t n = strlen(text), cut = 1 + n_merges / 140000 % (n > 1 ? n - 1 : 1);
        if (cut > 1 && text[cut - 1] == 'e') /* no token ends so: 0 is no leading digit */
            cut = 1;
        if (n < 2)
            continue;
        td_strbuf_addf(b, "      [\n        \"%.*s\",\n        \"%s\"\n      ]%s\n", (int)cut, text,
                       text + cut, ++n_merges < N_MERGES ? "," : "");
    }
    td_strbuf_adds(b, "    ]\n  }\n}\n");
}

static int write_file(const char *dir, const td_strbuf *b)
{
    char path[200];
    snprintf(path, sizeof path, "%s/tokenizer.json", dir);
    TD_AUTO_FCLOSE FILE *f = fopen(path, "w");
    return f && fwrite(b->data, 1, b->len, f) == b->len ? 0 : -1;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static void print_spread(const char *what, double ms[RUNS])
{
    qsort(ms, RUNS, sizeof *ms, by_value);
    printf("%s,%.1f,%.1f,%.1f\n", what, ms[0], ms[RUNS / 2], ms[RUNS - 1]);
}

static int bench_open(const char *dir, td_tokenizer **ret_tok)
{
    double cpu[RUNS], wall[RUNS];
    td_err err = {0};
    for (int i = 0; i < RUNS; i++) {
        td_tokenizer_free(*ret_tok);
        *ret_tok = NULL;
        double cpu_start = now_ms(CLOCK_PROCESS_CPUTIME_ID), start = now_ms(CLOCK_MONOTONIC);
        if (td_tokenizer_open(dir, 0, ret_tok, &err) < 0) {
            fprintf(stderr, "%s\n", err.text);
            return -1;
        }
        cpu[i] = now_ms(CLOCK_PROCESS_CPUTIME_ID) - cpu_start;
        wall[i] = now_ms(CLOCK_MONOTONIC) - start;
    }
    printf("first_open_cpu_ms,%.1f,,\n", cpu[0]);
    print_spread("open_cpu_ms", cpu);
    print_spread("open_wall_ms", wall);
    return 0;
}

static void bench_encode(const td_tokenizer *t)
{
    static const char line[] =
        "The quick brown fox, 12345 lazy dogs: it's a test of throughput in ordinary text.\n";
    td_strbuf b;
    td_strbuf_init(&b);
    while (b.len < 4 << 20)
        td_strbuf_adds(&b, line);
    td_ids ids = {0};
    double start = now_ms(CLOCK_PROCESS_CPUTIME_ID);
    int r = td_tokenizer_encode(t, b.data, b.len, 0, &ids);
    double ms = now_ms(CLOCK_PROCESS_CPUTIME_ID) - start;
    printf("encode_mb_per_cpu_s,%.1f,,\ntokens,%zu,,\n", r < 0 ? 0.0 : (double)b.len / 1e3 / ms,
           ids.n);
    td_ids_done(&ids);
    td_strbuf_done(&b);
}

int main(int argc, char **argv)
{
    char made[] = "/tmp/tandem-bench-XXXXXX", path[200];
    const char *dir = argc > 1 ? argv[1] : mkdtemp(made);
    td_tokenizer *t = NULL;
    int r = dir ? 0 : -1;
    if (r == 0 && argc < 2) {
        td_strbuf b;
        td_strbuf_init(&b);
        generate(&b);
        printf("what,min,median,max\nfile_mb,%.1f,,\n", (double)b.len / 1e6);
        r = write_file(dir, &b);
        td_strbuf_done(&b);
    }
    if (r == 0)
        r = bench_open(dir, &t);
    if (r == 0)
        bench_encode(t);
    td_tokenizer_free(t);
    if (argc < 2 && dir) {
        snprintf(path, sizeof path, "%s/tokenizer.json", dir);
        unlink(path);
        rmdir(dir);
    }
    return r < 0;
}
