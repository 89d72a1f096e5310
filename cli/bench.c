/* SPDX-License-Identifier: Apache-2.0 */
/* Thin front for the programs in bench/: they lie beside `tandem` in a build tree or in
 * libexec/tandem when installed. */
#include "cli/cli.h"

#include <dirent.h>
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

static const char *const places[] = {"/bench", "/../libexec/tandem"};

/* What there is to run, wherever this program was installed. */
static void list_programs(const char *self, FILE *out)
{
    for (size_t i = 0; i < TD_ARRAY_LEN(places); i++) {
        char path[4400];
        snprintf(path, sizeof path, "%.4200s%s", self, places[i]);
        DIR *d = opendir(path);
        for (struct dirent *e; d && (e = readdir(d)) != NULL;) {
            snprintf(path, sizeof path, "%.4100s%s/%.255s", self, places[i], e->d_name);
            if (strncmp(e->d_name, "bench_", 6) == 0 && access(path, X_OK) == 0)
                fprintf(out, " %s", e->d_name + 6);
        }
        if (d)
            closedir(d);
    }
    fputc('\n', out);
}

int td_cmd_bench(int argc, char **argv)
{
    char self[4096], *args[66] = {0};
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 16);
    self[n > 0 ? n : 0] = 0;
    char *slash = strrchr(self, '/');
    if (slash)
        *slash = 0;
    if (argc < 1 || argc > 64 ||
        strspn(argv[0], "abcdefghijklmnopqrstuvwxyz_") != strlen(argv[0])) {
        fprintf(stderr, "usage: tandem bench NAME [arguments]   NAME:");
        list_programs(self, stderr);
        return TD_EXIT_USAGE;
    }
    for (int i = 0; i < argc; i++)
        args[i] = argv[i];
    int r = -ENOENT;
    for (size_t i = 0; i < TD_ARRAY_LEN(places); i++) {
        char dir[4200];
        snprintf(dir, sizeof dir, "%s%s", self, places[i]);
        r = exec_bench(dir, argv[0], args);
        args[0] = argv[0];
    }
    fprintf(stderr, "tandem bench: no program bench_%s beside %s/tandem: %s; there are:", argv[0],
            self, td_errno_text(r));
    list_programs(self, stderr);
    return TD_EXIT_FAILED;
}
