/* SPDX-License-Identifier: Apache-2.0 */
/* Replays corpus directories, or single files, through LLVMFuzzerTestOneInput, for builds without
 * libFuzzer. */
#include <dirent.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "base/file.h"
#include "base/banned.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static int replay(const char *path)
{
    char *data;
    size_t n;
    td_err err;
    if (td_file_read(path, 64u << 20, &data, &n, &err)) {
        fprintf(stderr, "%s\n", err.text);
        return 1;
    }
    LLVMFuzzerTestOneInput((const uint8_t *)data, n);
    free(data);
    return 0;
}

/* The files of a directory. Returns their number, -1 when one could not be read. */
static int replay_dir(DIR *d, const char *dir)
{
    int n = 0, failed = 0;
    for (struct dirent *e; (e = readdir(d));) {
        if (e->d_name[0] == '.')
            continue;
        char *path = td_path_join(dir, e->d_name);
        failed |= !path || replay(path);
        free(path);
        n++;
    }
    if (n == 0)
        fprintf(stderr, "%s: an empty corpus tests nothing\n", dir);
    return failed || n == 0 ? -1 : n;
}

int main(int argc, char **argv)
{
    int total = 0;
    for (int i = 1; i < argc; i++) {
        DIR *d = opendir(argv[i]);
        int n = d ? replay_dir(d, argv[i]) : replay(argv[i]) ? -1 : 1;
        if (d)
            closedir(d);
        if (n < 0)
            return 1;
        total += n;
    }
    printf("%d inputs\n", total);
    return total == 0;
}
