/* SPDX-License-Identifier: Apache-2.0 */
/* Inside of `tandem selftest`. */
#ifndef TD_CLI_SELFTEST_H
#define TD_CLI_SELFTEST_H

#include "base/err.h"
#include "kernels/kernels.h"

typedef struct td_selftest_result {
    char name[96];       /* of what was compared */
    double error, bound; /* of logits, relative to the row's largest */
    char failed[300];    /* why; "" = passed */
} td_selftest_result;

/* Called for each comparison. */
typedef void (*td_selftest_report)(void *arg, const td_selftest_result *r);

/* What a model is compared with: a golden of other software where its folder holds one, else the
 * reference kernels. */
typedef struct td_selftest_golden {
    char model[1024];
    struct td_golden *golden; /* NULL: the reference kernels */
} td_selftest_golden;

/* dir: a checkpoint, with or without golden.json and golden.safetensors; or a folder with these
 * alone, whose checkpoint lies at the path that they name in the tree around it. -EINVAL and the
 * like with text. */
int td_selftest_golden_open(const char *dir, td_selftest_golden *ret, td_err *reterr_err);
void td_selftest_golden_done(td_selftest_golden *g);

/* A backend's logits and greedy ids beside the golden's, for each type of operands that it states
 * bounds for; or logits against the reference kernels, over a random prompt and some tokens more,
 * and a prompt in pieces against the prompt at once, in f32 and BF16. */
void td_selftest_run(const td_selftest_golden *g, const td_backend *be, td_selftest_report report,
                     void *arg);

/* A random model of hidden 64, 2 layers, 4 experts, vocabulary 256 in a new directory under TMPDIR
 * (/tmp). path: room for its name. */
int td_selftest_model(char *path, size_t n, td_err *reterr_err);
void td_selftest_model_remove(const char *path);

#endif
