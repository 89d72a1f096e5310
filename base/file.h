/* SPDX-License-Identifier: Apache-2.0 */
/* Reading files with bounds. */
#ifndef TD_BASE_FILE_H
#define TD_BASE_FILE_H

#include <stddef.h>

#include "base/err.h"

/* Read a regular file of at most max_bytes; caller frees *ret_data (NUL behind it). -EFBIG,
 * -ENOENT, ... with text. */
int td_file_read(const char *path, size_t max_bytes, char **ret_data, size_t *ret_len,
                 td_err *reterr_err);

/* Map a regular file read-only, O_NOFOLLOW. *ret_data NULL for an empty file. */
int td_file_map(const char *path, const void **ret_data, size_t *ret_len, td_err *reterr_err);
/* The same for a file of at most max_bytes that is read once and at once: follows symbolic links,
 * and the pages are there when it returns. Cheaper than td_file_read() from some megabytes on. As
 * with any mapping, whoever shortens the file meanwhile ends this process. */
int td_file_map_whole(const char *path, size_t max_bytes, const void **ret_data, size_t *ret_len,
                      td_err *reterr_err);
void td_file_unmap(const void *data, size_t len);

/* dir + "/" + name, heap. NULL when out of memory. */
char *td_path_join(const char *dir, const char *name);

#endif
