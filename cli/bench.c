/* SPDX-License-Identifier: Apache-2.0 */
/* Thin front for the programs in bench/: they lie beside `tandem` in a build tree or in
 * libexec/tandem when installed. */
#include "cli/cli.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "base/bug.h"
#include "base/err.h"
#include "base/banned.h"

static int exec_bench(const char *dir, const char *name, char **argv)
{
    char path[4400];
    snprintf(path, sizeof path, "%.4200s/bench_%.64s", dir, name);
    if (access(path, X_OK) < 0)
        return -errno;
    argv[0] = path;
    execv(path, argv);
    return -errno;
}

int td_cmd_bench(int argc, char **argv)
{
    char self[4096], *args[66] = {0};
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 16);
    if (argc < 1 || argc > 64 ||
        strspn(argv[0], "abcdefghijklmnopqrstuvwxyz_") != strlen(argv[0])) {
        fprintf(stderr, "usage: tandem bench NAME [arguments]   NAME: serve (latency and "
                        "throughput of a whole server), "
                        "engine (one process), tokenizer\n");
        return TD_EXIT_USAGE;
    }
    self[n > 0 ? n : 0] = 0;
    char *slash = strrchr(self, '/');
    if (slash)
        *slash = 0;
    for (int i = 0; i < argc; i++)
        args[i] = argv[i];
    static const char *const places[] = {"/bench", "/../libexec/tandem"};
    int r = -ENOENT;
    for (size_t i = 0; i < TD_ARRAY_LEN(places); i++) {
        char dir[4200];
        snprintf(dir, sizeof dir, "%s%s", self, places[i]);
        r = exec_bench(dir, argv[0], args);
        args[0] = argv[0];
    }
    fprintf(stderr, "tandem bench: no program bench_%s beside %s/tandem: %s\n", argv[0], self,
            td_errno_text(r));
    return TD_EXIT_FAILED;
}
