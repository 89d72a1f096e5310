/* SPDX-License-Identifier: Apache-2.0 */
#include "engine/model_files.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/file.h"

#include "base/banned.h"

enum { SMALL_FILE_MAX = 64 << 20 };

/* tokenizer, template, generation_config, licence: everything but weights, index and config. */
static int is_companion(const char *name, int with_config)
{
    const char *dot = strrchr(name, '.');
    return name[0] != '.' && (with_config || strcmp(name, "config.json") != 0) &&
           strcmp(name, "model.safetensors.index.json") != 0 &&
           !(dot && (strcmp(dot, ".safetensors") == 0 || strcmp(dot, ".tdpack") == 0));
}

static int copy_file(const char *from, const char *to, td_err *err)
{
    TD_AUTO_FREE char *bytes = NULL;
    size_t n = 0;
    int r = td_file_read(from, SMALL_FILE_MAX, &bytes, &n, err);
    if (r < 0)
        return r;
    FILE *f = fopen(to, "wxe");
    int bad = !f || fwrite(bytes, 1, n, f) != n;
    if (f)
        bad |= fclose(f) != 0;
    return bad ? td_err_set(err, -EIO, "%s: %s", to, td_errno_text(-errno)) : 0;
}

int td_model_files_copy(const char *model, const char *out, int with_config, td_err *reterr_err)
{
    DIR *d = opendir(model);
    int r = d ? 0 : td_err_set(reterr_err, -errno, "%s: %s", model, td_errno_text(-errno));
    for (struct dirent *e; r >= 0 && d && (e = readdir(d));) {
        struct stat s;
        TD_AUTO_FREE char *from = td_path_join(model, e->d_name);
        TD_AUTO_FREE char *to = td_path_join(out, e->d_name);
        if (!from || !to)
            r = td_err_set(reterr_err, -ENOMEM, "out of memory");
        else if (is_companion(e->d_name, with_config) && stat(from, &s) == 0 && S_ISREG(s.st_mode))
            r = copy_file(from, to, reterr_err);
    }
    if (d)
        closedir(d);
    return r;
}

void td_model_files_remove(const char *out)
{
    DIR *d = opendir(out);
    for (struct dirent *e; d && (e = readdir(d));)
        if (strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0)
            unlinkat(dirfd(d), e->d_name, 0);
    if (d)
        closedir(d);
    rmdir(out);
}
