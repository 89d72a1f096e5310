/* SPDX-License-Identifier: Apache-2.0 */
#include "base/file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "base/cleanup.h"
#include "base/bug.h"
#include "base/banned.h"

static const char *remedy(int e)
{
    switch (e) {
    case ENOENT:
        return "check the path";
    case EACCES:
        return "give this user the right to read it";
    case ELOOP:
        return "a symbolic link is not followed here: name the file itself";
    case EMFILE:
    case ENFILE:
        return "raise the limit of open files";
    default:
        return "check the path and the disk";
    }
}

/* Open a regular file; O_NONBLOCK so that a FIFO named by mistake cannot hang us. */
static int open_regular(const char *path, int flags, int *ret_fd, size_t *ret_len,
                        td_err *reterr_err)
{
    TD_AUTO_CLOSE int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | flags);
    struct stat st;
    if (fd < 0 || fstat(fd, &st) < 0) {
        int e = errno;
        return td_err_set(reterr_err, -e, "%s: %s; %s", path, td_errno_text(e), remedy(e));
    }
    if (S_ISDIR(st.st_mode))
        return td_err_set(reterr_err, -EISDIR, "%s: is a directory; name a file", path);
    if (!S_ISREG(st.st_mode))
        return td_err_set(reterr_err, -EINVAL, "%s: not a regular file; name a file", path);
    *ret_len = (size_t)st.st_size;
    *ret_fd = fd;
    fd = -1;
    return 0;
}

static int too_large(const char *path, size_t size, size_t max_bytes, td_err *reterr_err)
{
    return td_err_set(reterr_err, -EFBIG, "%s: %zu bytes, the limit is %zu", path, size, max_bytes);
}

/* Read until the end or cap bytes; the size from fstat is only a first guess (procfs says 0). */
static int read_all(int fd, const char *path, size_t max_bytes, size_t guess, char **ret_data,
                    size_t *ret_len, td_err *reterr_err)
{
    size_t cap = TD_MIN(guess, max_bytes) + 2, n = 0;
    TD_AUTO_FREE char *data = malloc(cap);
    if (!data)
        return td_err_set(reterr_err, -ENOMEM, "%s: out of memory for %zu bytes", path, cap);
    for (;;) {
        ssize_t r = read(fd, data + n, cap - 1 - n);
        if (r < 0 && errno == EINTR)
            continue;
        if (r < 0) {
            int e = errno;
            return td_err_set(reterr_err, -e, "%s: %s; %s", path, td_errno_text(e), remedy(e));
        }
        n += (size_t)r;
        if (n > max_bytes)
            return td_err_set(reterr_err, -EFBIG, "%s: larger than the limit of %zu bytes", path,
                              max_bytes);
        if (r == 0)
            break;
        if (n + 1 == cap) {
            size_t more = TD_MIN(2 * cap, max_bytes + 2);
            char *p = realloc(data, more);
            if (!p)
                return td_err_set(reterr_err, -ENOMEM, "%s: out of memory for %zu bytes", path,
                                  more);
            data = p;
            cap = more;
        }
    }
    data[n] = 0;
    *ret_len = n;
    *ret_data = TD_TAKE(data);
    return 0;
}

int td_file_read(const char *path, size_t max_bytes, char **ret_data, size_t *ret_len,
                 td_err *reterr_err)
{
    TD_BUG_ON(max_bytes > SIZE_MAX / 4);
    TD_AUTO_CLOSE int fd = -1;
    size_t size = 0;
    int r = open_regular(path, 0, &fd, &size, reterr_err);
    if (r < 0)
        return r;
    if (size > max_bytes)
        return too_large(path, size, max_bytes, reterr_err);
    return read_all(fd, path, max_bytes, size, ret_data, ret_len, reterr_err);
}

static int map(const char *path, size_t max_bytes, int open_flags, int map_flags,
               const void **ret_data, size_t *ret_len, td_err *reterr_err)
{
    TD_AUTO_CLOSE int fd = -1;
    size_t size = 0;
    int r = open_regular(path, open_flags, &fd, &size, reterr_err);
    if (r < 0)
        return r;
    if (size > max_bytes)
        return too_large(path, size, max_bytes, reterr_err);
    void *p = NULL;
    if (size) {
        p = mmap(NULL, size, PROT_READ, MAP_PRIVATE | map_flags, fd, 0);
        if (p == MAP_FAILED) {
            int e = errno;
            return td_err_set(reterr_err, -e, "%s: cannot map %zu bytes: %s", path, size,
                              td_errno_text(e));
        }
    }
    *ret_data = p;
    *ret_len = size;
    return 0;
}

int td_file_map(const char *path, const void **ret_data, size_t *ret_len, td_err *reterr_err)
{
    return map(path, SIZE_MAX, O_NOFOLLOW, 0, ret_data, ret_len, reterr_err);
}

int td_file_map_whole(const char *path, size_t max_bytes, const void **ret_data, size_t *ret_len,
                      td_err *reterr_err)
{
    return map(path, max_bytes, 0, MAP_POPULATE, ret_data, ret_len, reterr_err);
}

void td_file_unmap(const void *data, size_t len)
{
    if (data)
        munmap((void *)(uintptr_t)data, len);
}

char *td_path_join(const char *dir, const char *name)
{
    size_t a = strlen(dir), b = strlen(name);
    int slash = a > 0 && dir[a - 1] != '/';
    char *p = malloc(a + (size_t)slash + b + 1);
    if (!p)
        return NULL;
    memcpy(p, dir, a);
    if (slash)
        p[a] = '/';
    memcpy(p + a + slash, name, b + 1);
    return p;
}
