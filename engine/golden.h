/* SPDX-License-Identifier: Apache-2.0 */
/* A golden: what other software (transformers) computed for a checkpoint, and how near an engine
 * comes to it. golden.json and golden.safetensors of a folder, tests/goldens/README.md says what is
 * in them; both come from outside, and what is wrong in them is an error that names it. For tests
 * and `tandem selftest`, not for service. One thread. */
#ifndef TD_ENGINE_GOLDEN_H
#define TD_ENGINE_GOLDEN_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "engine/engine.h"

/* Operands, KV rows and index keys of the engine: float32, BF16, or BF16 with int8 operands for
 * MXFP4 weights. Each has bounds of its own. */
typedef enum td_golden_kind {
    TD_GOLDEN_F32,
    TD_GOLDEN_BF16,
    TD_GOLDEN_INT8,
    TD_GOLDEN_KINDS
} td_golden_kind;

enum { TD_GOLDEN_MAX_ROWS = 512 }; /* of a step: the engine's limits allow as many */

typedef struct td_golden td_golden;

typedef struct td_golden_outcome {
    double error, bound; /* of the worst row of logits: difference / largest logit */
    uint32_t rows;       /* that were compared; each of the golden */
    uint32_t tokens;     /* greedy steps whose id had to be the golden's (others were a near tie) */
    uint32_t wrong;      /* ids, selections or experts that differ beyond the margin */
    char first_wrong[160];
    uint32_t injections, allowed; /* choices within the margin that were put right; at most */
} td_golden_outcome;

/* -ENOENT  DIR holds no golden.json   -EINVAL names file and field */
int td_golden_open(const char *dir, td_golden **ret_golden, td_err *reterr_err);
void td_golden_close(td_golden *g);

/* The checkpoint's folder, relative to the root of the tree that the golden is from. */
const char *td_golden_model(const td_golden *g);
/* "transformers 5.16.1, torch 2.9.1" */
const char *td_golden_maker(const td_golden *g);
/* Is it compared with an engine of that kind? */
int td_golden_has(const td_golden *g, td_golden_kind kind);
const char *td_golden_kind_name(td_golden_kind kind);

size_t td_golden_prompts(const td_golden *g);
const char *td_golden_name(const td_golden *g, size_t prompt);
/* Ids of the prompt and its continuation. */
size_t td_golden_ids(const td_golden *g, size_t prompt);

/* Compute a prompt and decode along the golden's ids. Takes the engine's probe. 0, however far
 * apart they are: td_golden_agrees() judges. -EINVAL: the golden does not fit the model;
 * -EIO and the like: a step failed. */
int td_golden_follow(const td_golden *g, size_t prompt, td_golden_kind kind, td_engine *e,
                     td_golden_outcome *ret, td_err *reterr_err);
/* counted: injections too. The committed numbers are of the CPU's kernels; on a device whose BF16
 * sums round otherwise as many other near ties may fall to the other side. */
int td_golden_agrees(const td_golden_outcome *o, int counted);

#endif
