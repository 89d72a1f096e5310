/* SPDX-License-Identifier: Apache-2.0 */
/* `tandem chat`: a conversation in the terminal, or one prompt (--prompt, or standard input that is
 * no terminal). Streams by the public HTTP API, as any client does. */
#include "cli/cli.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/options.h"
#include "base/strbuf.h"
#include "net/http.h"
#include "base/banned.h"

enum { PROMPT_BYTES_MAX = 1 << 20 };

typedef struct chat {
    td_options opt;
    td_loop *loop;
    td_http_call *call;
    td_io *interrupt_io;
    json_t *messages;
    td_strbuf line, answer, reasoning, body;
    int status;       /* HTTP */
    int in_reasoning; /* the terminal is dim */
    int done, failed, tty;
    uint64_t tokens;
    uint64_t sent_us, first_us;
} chat;

/* ---- the stream ---- */

static void style(chat *c, int reasoning)
{
    if (c->in_reasoning == reasoning)
        return;
    if (c->tty)
        fputs(reasoning ? "\033[2m" : "\033[0m", stdout);
    if (!reasoning)
        fputs("\n", stdout);
    c->in_reasoning = reasoning;
}

/* Control characters from a model never reach the terminal as such. */
static void print_text(const char *s)
{
    for (; *s; s++)
        if ((unsigned char)*s >= 0x20 || *s == '\n' || *s == '\t')
            fputc(*s, stdout);
    fflush(stdout);
}

static void take_error(chat *c, const json_t *root)
{
    const char *text =
        json_string_value(json_object_get(json_object_get(root, "error"), "message"));
    if (!text)
        return;
    style(c, 0);
    fprintf(stderr, "tandem chat: %s\n", text);
    c->failed = 1;
}

static void take_event(chat *c, const char *data, size_t n)
{
    if (n == 6 && memcmp(data, "[DONE]", 6) == 0) {
        c->done = 1;
        return;
    }
    json_t *root = json_loadb(data, n, 0, NULL);
    take_error(c, root);
    const json_t *delta =
        json_object_get(json_array_get(json_object_get(root, "choices"), 0), "delta");
    const char *content = json_string_value(json_object_get(delta, "content"));
    const char *reasoning = json_string_value(json_object_get(delta, "reasoning_content"));
    const json_t *usage = json_object_get(root, "usage");
    if (json_is_object(usage))
        c->tokens = (uint64_t)json_integer_value(json_object_get(usage, "completion_tokens"));
    if (!c->first_us && ((content && *content) || (reasoning && *reasoning)))
        c->first_us = td_now_us();
    if (reasoning && *reasoning) {
        style(c, 1);
        td_strbuf_adds(&c->reasoning, reasoning);
        print_text(reasoning);
    }
    if (content && *content) {
        style(c, 0);
        td_strbuf_adds(&c->answer, content);
        print_text(content);
    }
    json_decref(root);
}

static void on_head(void *arg, int status, const char *(*get)(const void *ctx, const char *name),
                    const void *ctx)
{
    ((chat *)arg)->status = status;
}

static void on_data(void *arg, const char *data, size_t n)
{
    chat *c = arg;
    td_strbuf_add(&c->line, data, n);
    if (c->status != 200)
        return; /* one JSON body: read at the end */
    const char *end;
    while ((end = memchr(c->line.data, '\n', c->line.len))) {
        size_t len = (size_t)(end - c->line.data);
        if (len > 6 && memcmp(c->line.data, "data: ", 6) == 0)
            take_event(c, c->line.data + 6, len - 6);
        td_strbuf_drop(&c->line, len + 1);
    }
}

static void on_done(void *arg, const char *error)
{
    chat *c = arg;
    c->call = NULL;
    if (c->status && c->status != 200) {
        json_t *root = json_loadb(c->line.data, c->line.len, 0, NULL);
        take_error(c, root);
        if (!root)
            fprintf(stderr, "tandem chat: HTTP status %d\n", c->status);
        json_decref(root);
        c->failed = 1;
    } else if (!c->failed && !c->done) {
        style(c, 0);
        fprintf(stderr, "tandem chat: %s\n", error ? error : "the stream ended early");
        if (error && !c->status)
            fprintf(stderr, "Is a server running there? Start one: tandem serve models/glm-tiny\n");
        c->failed = 1;
    }
    td_loop_stop(c->loop);
}

/* Ctrl-C during an answer stops it; at the prompt it gives a fresh line, so the handler must
 * interrupt getline() too. */
static int interrupt_pipe[2];

static void on_sigint(int signo)
{
    (void)signo;
    int saved = errno;
    (void)!write(interrupt_pipe[1], "", 1);
    errno = saved;
}

static int take_interrupt(void)
{
    char buf[16];
    return read(interrupt_pipe[0], buf, sizeof buf) > 0;
}

static void on_interrupt(void *arg, int fd, int events)
{
    chat *c = arg;
    if (!take_interrupt())
        return;
    if (c->call)
        td_http_call_cancel(c->call); /* a disconnect cancels everywhere */
    c->call = NULL;
    td_loop_stop(c->loop);
}

/* ---- one exchange ---- */

static void make_body(chat *c)
{
    json_t *root = json_pack("{s:O, s:b, s:{s:b}}", "messages", c->messages, "stream", 1,
                             "stream_options", "include_usage", 1);
    double temperature = td_opt_num(&c->opt, TD_OPT_ID_TEMPERATURE);
    int64_t max_tokens = td_opt_int(&c->opt, TD_OPT_ID_MAX_TOKENS);
    if (temperature >= 0)
        json_object_set_new(root, "temperature", json_real(temperature));
    if (max_tokens > 0)
        json_object_set_new(root, "max_tokens", json_integer(max_tokens));
    if (!td_opt_bool(&c->opt, TD_OPT_ID_THINK))
        json_object_set_new(root, "chat_template_kwargs", json_pack("{s:b}", "enable_thinking", 0));
    char *text = json_dumps(root, JSON_COMPACT);
    td_strbuf_reset(&c->body);
    td_strbuf_adds(&c->body, text ? text : "");
    free(text);
    json_decref(root);
}

static int start(chat *c, td_err *reterr_err)
{
    static const td_http_call_ops ops = {
        .on_head = on_head, .on_data = on_data, .on_done = on_done};
    const char *url = td_opt_str(&c->opt, TD_OPT_ID_URL), *key = td_opt_str(&c->opt, TD_OPT_ID_KEY);
    char full[600], bearer[600];
    size_t n = strlen(url);
    snprintf(full, sizeof full, "%.*s/v1/chat/completions",
             (int)(n && url[n - 1] == '/' ? n - 1 : n), url);
    snprintf(bearer, sizeof bearer, "Bearer %s", key);
    td_http_header h[2] = {{"Content-Type", "application/json"}, {"Authorization", bearer}};
    return td_http_call_start(c->loop, "POST", full, h, *key ? 2 : 1, c->body.data, c->body.len,
                              &ops, c, &c->call, reterr_err);
}

static void remember(chat *c, const char *role, const td_strbuf *text, const td_strbuf *reasoning)
{
    json_t *m = json_pack("{s:s, s:s%}", "role", role, "content", text->data, text->len);
    if (m && reasoning && reasoning->len)
        json_object_set_new(m, "reasoning_content", json_stringn(reasoning->data, reasoning->len));
    if (m)
        json_array_append_new(c->messages, m);
}

static void print_figures(chat *c)
{
    uint64_t now = td_now_us();
    if (!c->tty || !c->first_us || c->tokens < 2 || now <= c->first_us)
        return;
    printf("\033[2m%llu tokens, first after %.0f ms, then %.0f a second\033[0m\n",
           (unsigned long long)c->tokens, (double)(c->first_us - c->sent_us) * 1e-3,
           (double)(c->tokens - 1) * 1e6 / (double)(now - c->first_us));
}

/* Returns 0 when an answer came. On failure the prompt is forgotten again. */
static int ask(chat *c, const char *prompt, size_t n)
{
    td_err err = {0};
    td_strbuf text;
    td_strbuf_init(&text);
    td_strbuf_add(&text, prompt, n);
    size_t before = json_array_size(c->messages);
    remember(c, "user", &text, NULL);
    td_strbuf_done(&text);
    if (json_array_size(c->messages) == before) {
        fprintf(stderr, "tandem chat: the prompt is not valid UTF-8\n");
        return -EINVAL;
    }
    td_strbuf_reset(&c->line);
    td_strbuf_reset(&c->answer);
    td_strbuf_reset(&c->reasoning);
    c->status = c->in_reasoning = c->done = c->failed = 0;
    c->tokens = c->first_us = 0;
    c->sent_us = td_now_us();
    make_body(c);
    if (start(c, &err) < 0) {
        fprintf(stderr, "tandem chat: %s\n", err.text);
        c->failed = 1;
    } else {
        td_loop_run(c->loop);
    }
    if (c->in_reasoning && c->tty)
        fputs("\033[0m", stdout);
    putchar('\n');
    if (c->failed)
        json_array_remove(c->messages, before);
    else
        remember(c, "assistant", &c->answer, &c->reasoning);
    if (!c->failed)
        print_figures(c);
    return c->failed ? -EIO : 0;
}

/* ---- conversations ---- */

static int read_all(td_strbuf *out)
{
    char buf[4096];
    size_t n;
    while ((n = fread(buf, 1, sizeof buf, stdin)) > 0 && out->len <= PROMPT_BYTES_MAX)
        td_strbuf_add(out, buf, n);
    while (out->len && out->data[out->len - 1] == '\n')
        out->data[--out->len] = 0;
    return out->len <= PROMPT_BYTES_MAX ? 0 : -E2BIG;
}

static int converse(chat *c)
{
    char *line = NULL;
    size_t cap = 0;
    ssize_t n;
    printf("Talking to %s. /new starts over, /quit or Ctrl-D ends, Ctrl-C stops an answer.\n",
           td_opt_str(&c->opt, TD_OPT_ID_URL));
    for (;;) {
        printf("\033[1m> \033[0m");
        fflush(stdout);
        n = getline(&line, &cap, stdin);
        if (n < 0 && errno == EINTR && take_interrupt()) {
            clearerr(stdin);
            putchar('\n');
            continue;
        }
        if (n < 0)
            break;
        while (n && line[n - 1] == '\n')
            n--;
        line[n] = 0;
        if (n == 0)
            continue;
        if (strcmp(line, "/quit") == 0 || strcmp(line, "/exit") == 0)
            break;
        if (strcmp(line, "/new") == 0)
            json_array_clear(c->messages);
        else if (*line == '/')
            printf("/new starts over, /quit ends\n");
        else
            ask(c, line, (size_t)n);
    }
    free(line);
    putchar('\n');
    return TD_EXIT_OK;
}

static int once(chat *c)
{
    td_strbuf text;
    td_strbuf_init(&text);
    const char *prompt = td_opt_str(&c->opt, TD_OPT_ID_PROMPT);
    int r = 0;
    if (td_opt_is_set(&c->opt, TD_OPT_ID_PROMPT))
        td_strbuf_adds(&text, prompt);
    else
        r = read_all(&text);
    if (r == 0 && text.len == 0)
        r = -EINVAL;
    if (r < 0)
        fprintf(stderr, "tandem chat: the prompt is %s\n",
                r == -E2BIG ? "larger than 1 MiB" : "empty");
    else
        r = ask(c, text.data, text.len);
    td_strbuf_done(&text);
    return r < 0 ? TD_EXIT_FAILED : TD_EXIT_OK;
}

static int run(chat *c)
{
    if (td_loop_new(&c->loop) < 0) {
        fprintf(stderr, "tandem chat: event loop: %s\n", td_errno_text(errno));
        return TD_EXIT_FAILED;
    }
    c->messages = json_array();
    td_strbuf *bufs[] = {&c->line, &c->answer, &c->reasoning, &c->body};
    for (size_t i = 0; i < 4; i++)
        td_strbuf_init(bufs[i]);
    c->tty = isatty(STDOUT_FILENO) && isatty(STDIN_FILENO);
    struct sigaction sa = {.sa_handler = on_sigint}; /* no SA_RESTART */
    if (pipe2(interrupt_pipe, O_NONBLOCK | O_CLOEXEC) == 0 &&
        td_io_add(c->loop, interrupt_pipe[0], TD_IO_READ, on_interrupt, c, &c->interrupt_io) == 0)
        sigaction(SIGINT, &sa, NULL);
    int single = !c->tty || td_opt_is_set(&c->opt, TD_OPT_ID_PROMPT);
    int status = single ? once(c) : converse(c);
    for (size_t i = 0; i < 4; i++)
        td_strbuf_done(bufs[i]);
    json_decref(c->messages);
    td_io_del(c->interrupt_io);
    td_loop_free(c->loop);
    return status;
}

int td_cmd_chat(int argc, char **argv)
{
    static chat c;
    td_err err = {0};
    if (td_options_parse(&c.opt, TD_SEC_CHAT, argc, argv, &err) < 0 ||
        td_options_at_most(&c.opt, 0, &err) < 0) {
        fprintf(stderr, "tandem chat: %s\n", err.text);
        return TD_EXIT_USAGE;
    }
    int status = TD_EXIT_OK;
    if (c.opt.help)
        td_options_help(&c.opt, "tandem chat [--url URL] [options]", c.opt.help_word, stdout);
    else
        status = run(&c);
    td_options_done(&c.opt);
    return status;
}
