/* SPDX-License-Identifier: Apache-2.0 */
/* Inside of `tandem selftest`. */
#ifndef TD_CLI_SELFTEST_H
#define TD_CLI_SELFTEST_H

#include "base/err.h"
#include "kernels/kernels.h"

typedef struct td_golden_result {
    double error, bound; /* of logits, relative to the row's largest */
    int same_bytes;      /* a prompt computed in pieces gave the bytes of the prompt at once */
    char failed[300];    /* why; "" = passed */
} td_golden_result;

/* A model's logits on a backend against the reference kernels, over a random prompt and some tokens
 * more, operands, KV and index keys of a type. -errno with text when it cannot be opened. */
int td_golden_run(const char *dir, const td_backend *be, td_dtype type, td_golden_result *ret,
                  td_err *reterr_err);

/* A random model of hidden 64, 2 layers, 4 experts, vocabulary 256 in a new directory under TMPDIR
 * (/tmp). path: room for its name. */
int td_golden_model(char *path, size_t n, td_err *reterr_err);
void td_golden_model_remove(const char *path);

#endif
