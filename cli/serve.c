/* SPDX-License-Identifier: Apache-2.0 */
/* `tandem serve MODEL`: start a router, prefill workers and decode workers on this machine, watch
 * over them, end them in order. The children are ordinary `tandem router`, `tandem prefill-worker`
 * and `tandem decode-worker` processes; they report progress by the same notify protocol that a
 * service manager reads. */
#include "cli/cli.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/bug.h"
#include "base/cleanup.h"
#include "base/clock.h"
#include "base/file.h"
#include "base/options.h"
#include "net/http.h"
#include "net/listen.h"
#include "net/loop.h"
#include "net/service.h"
#include "base/banned.h"

enum {
    CHILDREN_MAX = 129,
    ARGS_MAX = 2 * TD_OPT_ID_MAX + 16,
    CORES_MAX = 1024,
    RESTART_MAX_US = 5000000
};

typedef enum role { ROUTER, PREFILL, DECODE } role;

typedef struct child {
    struct serve *owner;
    role role;
    unsigned index; /* among its role */
    char name[24], cores[64];
    pid_t pid; /* 0 = not running */
    int ready;
    uint64_t started_us, backoff_us;
    td_timer *restart;
} child;

typedef struct serve {
    td_options opt;
    const char *model;
    td_loop *loop;
    td_http_call *probe;
    td_timer *poll, *deadline;
    td_io *notify_io;
    int notify_fd, listen_fd;
    char dir[108], addr[TD_ADDR_TEXT], stage[160];
    child children[CHILDREN_MAX];
    unsigned n_children, control_port;
    uint64_t started_us, said_us;
    int stopping, ready, failed, tty;
} serve;

static const char *const commands[] = {"router", "prefill-worker", "decode-worker"};

static const struct {
    const char *name;
    int sections;
    td_opt_type type;
} options[TD_OPT_ID_MAX] = {
#define TD_OPTION(id, sections, name, type, def, min, max, arg, help)                              \
    [TD_OPT_ID_##id] = {name, sections, type},
#include "base/options.def"
#undef TD_OPTION
};

/* ---- what the user sees ---- */

static void progress(serve *s, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

static void progress(serve *s, const char *fmt, ...)
{
    char text[sizeof s->stage];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    uint64_t now = td_now_us();
    /* a terminal shows every step in one line; a log gets a line now and then */
    if (strcmp(text, s->stage) == 0 || (!s->tty && s->said_us && now - s->said_us < 10 * TD_S))
        return;
    s->said_us = now;
    snprintf(s->stage, sizeof s->stage, "%s", text);
    fprintf(stderr, s->tty ? "\r\033[K  %s" : "  %s\n", text);
    fflush(stderr);
}

static void announce_ready(serve *s)
{
    double seconds = (double)(td_now_us() - s->started_us) * 1e-6;
    if (s->tty)
        fprintf(stderr, "\r\033[K");
    printf("ready in %.2f s: http://%s\n", seconds, s->addr);
    fflush(stdout);
}

/* ---- children ---- */

/* KV sockets pick a free port themselves and say so in HELLO; workers must know the control
 * socket's beforehand. */
static const char *endpoint(serve *s, char *out, size_t n, const char *name)
{
    if (strcmp(td_opt_str(&s->opt, TD_OPT_ID_LINK), "tcp") == 0)
        snprintf(out, n, "tcp://127.0.0.1:%u", strcmp(name, "control") == 0 ? s->control_port : 0u);
    else
        snprintf(out, n, "ipc://%s/%s.sock", s->dir, name);
    return out;
}

static char *add_arg(char **args, int *n, const char *name, const char *value)
{
    char *text = NULL;
    if (*n + 1 < ARGS_MAX && asprintf(&text, "--%s=%s", name, value) > 0)
        args[(*n)++] = text;
    return text;
}

/* The names that `tandem keys` gives: router, prefill-1, decode-1, ... */
static void add_keys(serve *s, const child *c, char **args, int *n)
{
    static const char *const names[] = {"router", "prefill", "decode"};
    const char *dir = td_opt_str(&s->opt, TD_OPT_ID_KEYS);
    char path[PATH_MAX];
    if (c->role == ROUTER)
        snprintf(path, sizeof path, "%s/router.secret", dir);
    else
        snprintf(path, sizeof path, "%s/%s-%u.secret", dir, names[c->role], c->index + 1);
    add_arg(args, n, "curve-secret", path);
    snprintf(path, sizeof path, "%s/peers", dir);
    add_arg(args, n, "curve-peers", path);
}

/* Every option that was set for `serve` and that the child takes goes on to it. */
static int child_args(serve *s, const child *c, char **args)
{
    static const int sections[] = {TD_SEC_COMMON | TD_SEC_ROUTER, TD_SEC_COMMON | TD_SEC_PREFILL,
                                   TD_SEC_COMMON | TD_SEC_DECODE};
    char text[160];
    int n = 0;
    args[n++] = strdup("tandem");
    args[n++] = strdup(commands[c->role]);
    for (int i = 0; i < TD_OPT_ID_MAX; i++) {
        int own = i == TD_OPT_ID_MODEL || i == TD_OPT_ID_LISTEN || i == TD_OPT_ID_LOG_LEVEL ||
                  i == TD_OPT_ID_CONFIG;
        if (own || !(options[i].sections & sections[c->role]) ||
            !(options[i].sections & TD_SEC_SERVE) || !td_opt_is_set(&s->opt, (td_opt)i))
            continue;
        add_arg(args, &n, options[i].name, td_opt_str(&s->opt, (td_opt)i));
    }
    add_arg(args, &n, "model", s->model);
    add_arg(args, &n, "log-level",
            td_opt_is_set(&s->opt, TD_OPT_ID_LOG_LEVEL) ? td_opt_str(&s->opt, TD_OPT_ID_LOG_LEVEL)
                                                        : "warn");
    add_arg(args, &n, "control", endpoint(s, text, sizeof text, "control"));
    if (c->role == DECODE)
        add_arg(args, &n, "kv-listen", endpoint(s, text, sizeof text, c->name));
    if (*td_opt_str(&s->opt, TD_OPT_ID_KEYS))
        add_keys(s, c, args, &n);
    if (c->role != ROUTER) {
        add_arg(args, &n, "name", c->name);
        if (*c->cores)
            add_arg(args, &n, "cores", c->cores);
    }
    args[n] = NULL;
    return n;
}

static void exec_child(serve *s, child *c, char **args)
{
    char pid[24], path[sizeof s->dir + 16];
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    snprintf(path, sizeof path, "%s/notify.sock", s->dir);
    setenv("NOTIFY_SOCKET", path, 1);
    unsetenv("WATCHDOG_USEC");
    if (c->role ==
        ROUTER) { /* the address was bound before anything else: a port in use is said at once */
        snprintf(pid, sizeof pid, "%d", (int)getpid());
        setenv("LISTEN_PID", pid, 1);
        setenv("LISTEN_FDS", "1", 1);
        if (s->listen_fd != 3)
            dup2(s->listen_fd, 3);
        else
            fcntl(3, F_SETFD, 0);
    }
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    execv("/proc/self/exe", args);
    _exit(127);
}

static void start_child(serve *s, child *c)
{
    char *args[ARGS_MAX];
    int n = child_args(s, c, args);
    c->ready = 0;
    c->started_us = td_now_us();
    pid_t pid = fork();
    if (pid == 0)
        exec_child(s, c, args);
    if (pid < 0)
        fprintf(stderr, "tandem serve: cannot start %s: %s\n", c->name, td_errno_text(errno));
    c->pid = pid > 0 ? pid : 0;
    while (n)
        free(args[--n]);
}

static void restart(void *arg)
{
    child *c = arg;
    td_timer_del(c->restart);
    c->restart = NULL;
    if (!c->owner->stopping)
        start_child(c->owner, c);
}

static void signal_role(serve *s, int is_router, int signo)
{
    for (unsigned i = 0; i < s->n_children; i++)
        if (s->children[i].pid && (s->children[i].role == ROUTER) == is_router)
            kill(s->children[i].pid, signo);
}

static unsigned n_alive(const serve *s)
{
    unsigned n = 0;
    for (unsigned i = 0; i < s->n_children; i++)
        n += s->children[i].pid != 0;
    return n;
}

static void force(void *arg)
{
    serve *s = arg;
    signal_role(s, 1, SIGKILL);
    signal_role(s, 0, SIGKILL);
}

/* The router drains first: its streams still need the workers. */
static void begin_stop(serve *s, int failed)
{
    s->failed |= failed;
    if (s->stopping++) {
        force(s);
        return;
    }
    td_timer_del(s->poll);
    s->poll = NULL;
    if (s->children[0].pid)
        kill(s->children[0].pid, SIGTERM);
    else
        signal_role(s, 0, SIGTERM);
    td_timer_add(s->loop, (uint64_t)(td_opt_int(&s->opt, TD_OPT_ID_DRAIN) + 3) * TD_S, 0, force, s,
                 &s->deadline);
    if (n_alive(s) == 0)
        td_loop_stop(s->loop);
}

static void on_stop_signal(void *arg)
{
    begin_stop(arg, 0);
}

static void child_ended(serve *s, child *c, int status)
{
    c->pid = 0;
    c->ready = 0;
    if (s->stopping) {
        if (c->role == ROUTER)
            signal_role(s, 0, SIGTERM);
        if (n_alive(s) == 0)
            td_loop_stop(s->loop);
        return;
    }
    char how[48];
    if (WIFSIGNALED(status))
        snprintf(how, sizeof how, "signal %d (%s)", WTERMSIG(status), strsignal(WTERMSIG(status)));
    else
        snprintf(how, sizeof how, "status %d", WEXITSTATUS(status));
    int lasted = td_now_us() - c->started_us > 10 * TD_S;
    if (!s->ready &&
        !lasted) { /* a bad model or option ends every try alike: its own line said why */
        fprintf(stderr,
                "%standem serve: %s ended with %s before it was ready; its message is above\n",
                s->tty ? "\n" : "", c->name, how);
        begin_stop(s, 1);
        return;
    }
    c->backoff_us =
        lasted || !c->backoff_us ? 250000 : TD_MIN(c->backoff_us * 2, (uint64_t)RESTART_MAX_US);
    fprintf(stderr, "tandem serve: %s ended with %s; starting it again in %.2f s\n", c->name, how,
            (double)c->backoff_us * 1e-6);
    td_timer_add(s->loop, c->backoff_us, 0, restart, c, &c->restart);
}

static void on_child_signal(void *arg)
{
    serve *s = arg;
    int status;
    pid_t pid;
    while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
        for (unsigned i = 0; i < s->n_children; i++)
            if (s->children[i].pid == pid)
                child_ended(s, &s->children[i], status);
}

/* ---- readiness ---- */

static child *child_of_pid(serve *s, pid_t pid)
{
    for (unsigned i = 0; i < s->n_children; i++)
        if (s->children[i].pid == pid)
            return &s->children[i];
    return NULL;
}

static void on_notify(void *arg, int fd, int events)
{
    serve *s = arg;
    char text[512], control[CMSG_SPACE(sizeof(struct ucred))];
    struct iovec iov = {text, sizeof text - 1};
    struct msghdr m = {
        .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    ssize_t n = recvmsg(fd, &m, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    const struct cmsghdr *h = n > 0 ? CMSG_FIRSTHDR(&m) : NULL;
    if (!h || h->cmsg_type != SCM_CREDENTIALS)
        return;
    struct ucred cred;
    memcpy(&cred, CMSG_DATA(h), sizeof cred);
    text[n] = 0;
    child *c = child_of_pid(s, cred.pid);
    if (!c)
        return;
    if (strstr(text, "READY=1"))
        c->ready = 1;
    char *status = strstr(text, "STATUS=");
    if (status && !s->ready && !s->stopping && c->role != ROUTER) {
        status[strcspn(status, "\n")] = 0;
        progress(s, "%s: %s", c->name, status + 7);
    }
}

static void probe_head(void *arg, int status, const char *(*get)(const void *ctx, const char *name),
                       const void *ctx)
{
    serve *s = arg;
    if (status == 200 && !s->ready) {
        s->ready = 1;
        announce_ready(s);
    }
}

static void probe_done(void *arg, const char *error)
{
    serve *s = arg;
    s->probe = NULL;
    if (s->ready) {
        td_timer_del(s->poll);
        s->poll = NULL;
    }
}

static void poll_health(void *arg)
{
    static const td_http_call_ops ops = {.on_head = probe_head, .on_done = probe_done};
    serve *s = arg;
    char url[TD_ADDR_TEXT + 16];
    if (s->probe || !s->children[0].ready)
        return;
    snprintf(url, sizeof url, "http://%s/health", s->addr);
    td_http_call_start(s->loop, "GET", url, NULL, 0, NULL, 0, &ops, s, &s->probe, NULL);
}

static int open_notify(serve *s, td_err *reterr_err)
{
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    int one = 1;
    snprintf(a.sun_path, sizeof a.sun_path, "%.90s/notify.sock", s->dir);
    s->notify_fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (s->notify_fd < 0 || bind(s->notify_fd, (struct sockaddr *)&a, sizeof a) < 0 ||
        setsockopt(s->notify_fd, SOL_SOCKET, SO_PASSCRED, &one, sizeof one) < 0)
        return td_err_set(reterr_err, -errno, "%s: %s", a.sun_path, td_errno_text(errno));
    return td_io_add(s->loop, s->notify_fd, TD_IO_READ, on_notify, s, &s->notify_io);
}

/* ---- set-up ---- */

static int make_dir(serve *s, td_err *reterr_err)
{
    const char *base = getenv("XDG_RUNTIME_DIR");
    if (!base || strlen(base) > 60 || access(base, W_OK) < 0)
        base = "/tmp";
    snprintf(s->dir, sizeof s->dir, "%.60s/tandem-XXXXXX", base);
    if (!mkdtemp(s->dir)) {
        *s->dir = 0;
        return td_err_set(reterr_err, -errno, "%s: cannot make a directory for sockets: %s", base,
                          td_errno_text(errno));
    }
    return 0;
}

static void add_child(serve *s, role r, unsigned index)
{
    static const char *const names[] = {"router", "prefill", "decode"};
    child *c = &s->children[s->n_children++];
    *c = (child){.owner = s, .role = r, .index = index};
    snprintf(c->name, sizeof c->name, r == ROUTER ? "%s" : "%s-%u", names[r], index);
}

/* Cores granted to us are dealt to the workers in turn; threads that are not pinned may share one
 * core. */
static void deal_cores(serve *s)
{
    int cores[CORES_MAX];
    int n = td_cores_granted(cores, CORES_MAX);
    unsigned workers = s->n_children - 1;
    for (int i = 0; n > 0 && i < TD_MAX(n, (int)workers); i++) {
        child *c = &s->children[1 + (unsigned)i % workers];
        size_t at = strlen(c->cores);
        if (at + 8 < sizeof c->cores)
            snprintf(c->cores + at, sizeof c->cores - at, "%s%d", at ? "," : "", cores[i % n]);
    }
}

static unsigned free_port(void)
{
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t n = sizeof a;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || bind(fd, (struct sockaddr *)&a, n) < 0 ||
        getsockname(fd, (struct sockaddr *)&a, &n) < 0)
        a.sin_port = 0;
    if (fd >= 0)
        close(fd);
    return ntohs(a.sin_port);
}

static int bound_address(serve *s, td_err *reterr_err)
{
    struct sockaddr_storage a;
    socklen_t n = sizeof a;
    if (getsockname(s->listen_fd, (struct sockaddr *)&a, &n) < 0)
        return td_err_set(reterr_err, -errno, "listening socket: %s", td_errno_text(errno));
    td_addr_text((struct sockaddr *)&a, s->addr);
    return 0;
}

/* A mistyped directory is told once here, not by each of the three processes. */
static int check_model(const char *dir, td_err *reterr_err)
{
    static const char *const files[] = {"config.json", "tokenizer.json"};
    struct stat st;
    if (stat(dir, &st) < 0)
        return td_err_set(reterr_err, -errno,
                          "%s: %s; give a model directory, e.g. models/glm-tiny", dir,
                          td_errno_text(errno));
    if (!S_ISDIR(st.st_mode))
        return td_err_set(reterr_err, -ENOTDIR,
                          "%s: not a directory; give the directory of a model", dir);
    for (size_t i = 0; i < TD_ARRAY_LEN(files); i++) {
        TD_AUTO_FREE char *path = td_path_join(dir, files[i]);
        if (path && access(path, R_OK) < 0)
            return td_err_set(reterr_err, -errno,
                              "%s: %s; a model directory holds config.json, tokenizer.json and "
                              "*.safetensors",
                              path, td_errno_text(errno));
    }
    return 0;
}

static int set_up(serve *s, td_err *reterr_err)
{
    int r = check_model(s->model, reterr_err);
    if (r < 0)
        return r;
    r = td_loop_new(&s->loop);
    if (r < 0)
        return td_err_set(reterr_err, r, "event loop: %s", td_errno_text(r));
    r = td_listen_open(td_opt_str(&s->opt, TD_OPT_ID_LISTEN),
                       *td_opt_str(&s->opt, TD_OPT_ID_API_KEYS) != 0, &s->listen_fd, reterr_err);
    if (r == 0)
        r = bound_address(s, reterr_err);
    if (r == 0)
        r = make_dir(s, reterr_err);
    if (r == 0)
        r = open_notify(s, reterr_err);
    if (r < 0)
        return r;
    s->control_port = free_port();
    add_child(s, ROUTER, 0);
    for (unsigned i = 0; i < (unsigned)td_opt_int(&s->opt, TD_OPT_ID_N_PREFILL); i++)
        add_child(s, PREFILL, i);
    for (unsigned i = 0; i < (unsigned)td_opt_int(&s->opt, TD_OPT_ID_N_DECODE); i++)
        add_child(s, DECODE, i);
    deal_cores(s);
    td_signal_add(s->loop, SIGCHLD, on_child_signal, s);
    td_signal_add(s->loop, SIGTERM, on_stop_signal, s);
    td_signal_add(s->loop, SIGINT, on_stop_signal, s);
    td_signal_add(s->loop, SIGHUP, on_stop_signal, s);
    return td_timer_add(s->loop, 5 * TD_MS, 20 * TD_MS, poll_health, s, &s->poll);
}

static void tear_down(serve *s)
{
    char path[sizeof s->dir + 32];
    static const char *const sockets[] = {"notify.sock", "control.sock"};
    for (size_t i = 0; *s->dir && i < TD_ARRAY_LEN(sockets); i++) {
        snprintf(path, sizeof path, "%s/%s", s->dir, sockets[i]);
        unlink(path);
    }
    for (unsigned i = 0; *s->dir && i < s->n_children; i++) {
        snprintf(path, sizeof path, "%s/%s.sock", s->dir, s->children[i].name);
        unlink(path);
        snprintf(path, sizeof path, "%s/%s.sock.shm", s->dir, s->children[i].name);
        unlink(path);
        td_timer_del(s->children[i].restart);
    }
    if (*s->dir)
        rmdir(s->dir);
    if (s->probe)
        td_http_call_cancel(s->probe);
    td_timer_del(s->poll);
    td_timer_del(s->deadline);
    td_io_del(s->notify_io);
    if (s->notify_fd >= 0)
        close(s->notify_fd);
    if (s->listen_fd >= 0)
        close(s->listen_fd);
    td_loop_free(s->loop);
}

static int run(serve *s)
{
    td_err err = {0};
    s->started_us = td_now_us();
    s->notify_fd = s->listen_fd = -1;
    s->tty = isatty(STDERR_FILENO);
    int status = TD_EXIT_FAILED;
    if (set_up(s, &err) < 0) {
        fprintf(stderr, "tandem serve: %s\n", err.text);
    } else {
        progress(s, "starting a router, %u prefill and %u decode workers on %s",
                 (unsigned)td_opt_int(&s->opt, TD_OPT_ID_N_PREFILL),
                 (unsigned)td_opt_int(&s->opt, TD_OPT_ID_N_DECODE), s->model);
        for (unsigned i = 0; i < s->n_children; i++)
            start_child(s, &s->children[i]);
        td_loop_run(s->loop);
        status = s->failed ? TD_EXIT_FAILED : TD_EXIT_OK;
    }
    tear_down(s);
    return status;
}

int td_cmd_serve(int argc, char **argv)
{
    static serve s;
    td_err err = {0};
    if (td_options_parse(&s.opt, TD_SEC_SERVE, argc, argv, &err) < 0 ||
        td_options_at_most(&s.opt, 1, &err) < 0) {
        fprintf(stderr, "tandem serve: %s\n", err.text);
        return TD_EXIT_USAGE;
    }
    int status;
    s.model = s.opt.n_positional ? s.opt.positional[0] : td_opt_str(&s.opt, TD_OPT_ID_MODEL);
    if (s.opt.help) {
        td_options_help(&s.opt, "tandem serve MODEL [options]", s.opt.help_word, stdout);
        status = TD_EXIT_OK;
    } else if (!*s.model) {
        fprintf(stderr,
                "tandem serve: give a model directory, e.g. tandem serve models/glm-tiny\n");
        status = TD_EXIT_USAGE;
    } else {
        status = run(&s);
    }
    td_options_done(&s.opt);
    return status;
}
