/* SPDX-License-Identifier: Apache-2.0 */
/* Writes safetensors as a stream: first every tensor is declared, then their bytes arrive in the
 * order of declaration. Nothing is held but the header. Beyond max_shard_bytes a new shard begins
 * and an index is written. Files appear under their names only when all is complete. One thread. */
#ifndef TD_ENGINE_SAFETENSORS_WRITE_H
#define TD_ENGINE_SAFETENSORS_WRITE_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"

typedef struct td_st_writer td_st_writer;

/* dir exists. -ENOMEM. */
int td_st_writer_new(const char *dir, uint64_t max_shard_bytes, td_st_writer **ret, td_err *err);
/* type as in the file ("BF16", "U8"); bytes = product of shape x its size, checked by the caller.
 * Names must be unique. -ENOMEM. */
int td_st_writer_add(td_st_writer *w, const char *name, const char *type, const uint64_t *shape,
                     uint32_t rank, uint64_t bytes, td_err *err);
/* The next n bytes, which may end within a tensor or span several. -EINVAL: more than declared;
 * else the errno of the file, with its name. */
int td_st_writer_data(td_st_writer *w, const void *bytes, size_t n, td_err *err);
/* Everything has arrived: sync and rename. -EINVAL: bytes are missing. */
int td_st_writer_finish(td_st_writer *w, td_err *err);
/* Without finish the files written so far are removed. NULL is fine. */
void td_st_writer_free(td_st_writer *w);

#endif
