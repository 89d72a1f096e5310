/* SPDX-License-Identifier: Apache-2.0 */
/* The small files of a model directory: tokenizer, template, generation_config, licence. */
#ifndef TD_ENGINE_MODEL_FILES_H
#define TD_ENGINE_MODEL_FILES_H

#include "base/err.h"

/* Copy every regular file of MODEL but weights and their index; config.json too if with_config. OUT
 * exists; a file that it has already is an error. -EFBIG beyond 64 MiB, -errno with the path. */
int td_model_files_copy(const char *model, const char *out, int with_config, td_err *reterr_err);
/* Remove OUT and the files in it: for a directory that the caller has just made itself. */
void td_model_files_remove(const char *out);

#endif
