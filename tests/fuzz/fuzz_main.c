/* SPDX-License-Identifier: Apache-2.0 */
/* Replays the files of corpus directories through LLVMFuzzerTestOneInput, for builds without
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

int main(int argc, char **argv)
{
    int n = 0, failed = 0;
    for (int i = 1; i < argc; i++) {
        DIR *d = opendir(argv[i]);
        if (!d) {
            perror(argv[i]);
            return 1;
        }
        for (struct dirent *e; (e = readdir(d));) {
            if (e->d_name[0] == '.')
                continue;
            char *path = td_path_join(argv[i], e->d_name);
            failed |= !path || replay(path);
            free(path);
            n++;
        }
        closedir(d);
    }
    printf("%d inputs\n", n);
    return failed || n == 0; /* an empty corpus tests nothing */
}
