/* SPDX-License-Identifier: Apache-2.0 */
#include "base/file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/banned.h"

static int open_regular(const char *path, int flags, size_t *ret_len, td_err *reterr_err)
{
    struct stat st;
    int fd = open(path, O_RDONLY | O_CLOEXEC | flags);
    if (fd < 0 && errno == ELOOP)
        return td_err_set(reterr_err, -ELOOP, "%s: is a symbolic link; name the file itself", path);
    if (fd < 0)
        return td_err_set(reterr_err, -errno, "%s: %s", path, td_errno_text(errno));
    if (fstat(fd, &st) < 0 || !S_ISREG(st.st_mode)) {
        close(fd);
        return td_err_set(reterr_err, -EINVAL, "%s: is not a regular file", path);
    }
    *ret_len = (size_t)st.st_size;
    return fd;
}

int td_file_read(const char *path, size_t max_bytes, char **ret_data, size_t *ret_len,
                 td_err *reterr_err)
{
    size_t len = 0, got = 0;
    TD_AUTO_CLOSE int fd = open_regular(path, 0, &len, reterr_err);
    if (fd < 0)
        return fd;
    if (len > max_bytes)
        return td_err_set(reterr_err, -EFBIG, "%s: %zu bytes; at most %zu are read", path, len,
                          max_bytes);
    TD_AUTO_FREE char *data = malloc(len + 1);
    if (!data)
        return td_err_set(reterr_err, -ENOMEM, "%s: out of memory", path);
    while (got < len) {
        ssize_t n = read(fd, data + got, len - got);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return td_err_set(reterr_err, -errno, "%s: %s", path, td_errno_text(errno));
        if (n == 0)
            break; /* it shrank under us: what is there */
        got += (size_t)n;
    }
    data[got] = 0;
    *ret_len = got;
    *ret_data = TD_TAKE(data);
    return 0;
}

int td_file_map(const char *path, const void **ret_data, size_t *ret_len, td_err *reterr_err)
{
    size_t len = 0;
    TD_AUTO_CLOSE int fd = open_regular(path, O_NOFOLLOW, &len, reterr_err);
    if (fd < 0)
        return fd;
    void *p = NULL;
    if (len) {
        p = mmap(NULL, len, PROT_READ, MAP_PRIVATE, fd, 0);
        if (p == MAP_FAILED)
            return td_err_set(reterr_err, -errno, "%s: cannot map: %s", path, td_errno_text(errno));
    }
    *ret_data = p;
    *ret_len = len;
    return 0;
}

void td_file_unmap(const void *data, size_t len)
{
    if (data)
        munmap((void *)data, len);
}

char *td_path_join(const char *dir, const char *name)
{
    size_t n = strlen(dir);
    char *path = NULL;
    const char *slash = n && dir[n - 1] == '/' ? "" : "/";
    return asprintf(&path, "%s%s%s", dir, slash, name) < 0 ? NULL : path;
}
