/* SPDX-License-Identifier: Apache-2.0 */
/* What the benchmarks of whole servers share: a `tandem serve` of the same build on a free port. */
#ifndef TD_BENCH_SERVER_H
#define TD_BENCH_SERVER_H

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/err.h"

enum { BENCH_ARGS_MAX = 40 };

typedef struct bench_server {
    pid_t pid;
    char url[160];
    double ready_s; /* from the start of the process to its word */
} bench_server;

static inline void bench_self_dir(char out[4096])
{
    ssize_t n = readlink("/proc/self/exe", out, 4095);
    out[n > 0 ? n : 0] = 0;
    char *slash = strrchr(out, '/');
    if (slash)
        *slash = 0;
}

/* extra: more arguments of `tandem serve`, up to a NULL; or NULL. 0, or -EIO when it does not come
 * up. */
static inline int bench_server_start(bench_server *b, const char *model, char **extra)
{
    char dir[4096], path[4200], line[200] = "";
    int pipes[2];
    char *args[BENCH_ARGS_MAX] = {(char *)"tandem", (char *)"serve", (char *)(uintptr_t)model,
                                  (char *)"--listen", (char *)"127.0.0.1:0"};
    for (int i = 0; extra && extra[i] && i + 6 < BENCH_ARGS_MAX; i++)
        args[5 + i] = extra[i];
    bench_self_dir(dir);
    snprintf(path, sizeof path, "%s/../tandem", dir);
    if (access(path, X_OK) < 0)
        snprintf(path, sizeof path, "%s/../../bin/tandem", dir);
    if (pipe(pipes) < 0)
        return -errno;
    uint64_t begin = td_now_us();
    b->pid = fork();
    if (b->pid == 0) {
        dup2(pipes[1], STDOUT_FILENO);
        close(pipes[0]);
        execv(path, args);
        fprintf(stderr, "bench: %s: %s\n", path, td_errno_text(errno));
        _exit(127);
    }
    close(pipes[1]);
    FILE *f = fdopen(pipes[0], "r");
    int ok = f && fgets(line, sizeof line, f) && sscanf(line, "ready in %*f s: %150s", b->url) == 1;
    b->ready_s = (double)(td_now_us() - begin) * 1e-6;
    return ok ? 0 : -EIO;
}

static inline void bench_server_stop(bench_server *b)
{
    if (b->pid <= 0)
        return;
    kill(b->pid, SIGTERM);
    waitpid(b->pid, NULL, 0);
}

#endif
