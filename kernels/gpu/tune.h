/* SPDX-License-Identifier: Apache-2.0 */
/* Tables of launch plans, kernels/tuned/<arch>.csv: for a shape on a device, the plan that was
 * fastest there. A plan never changes a bit (numerics, rule 2), so a table is only about time.
 * Only products have a choice; every other op, and products of f32 operands, have one plan and
 * no row. A table belongs to one thread. */
#ifndef TD_KERNELS_GPU_TUNE_H
#define TD_KERNELS_GPU_TUNE_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "kernels/kernels.h"

/* By their rows, or always the same: tiles of 16 x 16 or 64 x 32 outputs of a wave. */
typedef enum td_gpu_plan { TD_GPU_PLAN_AUTO, TD_GPU_PLAN_FEW, TD_GPU_PLAN_MANY } td_gpu_plan;

typedef enum td_tune_op { TD_TUNE_GEMM, TD_TUNE_SILU, TD_TUNE_MOE, TD_TUNE_OPS } td_tune_op;

enum { TD_TUNE_ROWS_MAX = 8192 };

/* What a launch is, as far as time goes. Padding is zero: keys are compared as bytes. */
typedef struct td_tune_key {
    uint32_t cus;  /* compute units of the device */
    uint32_t op;   /* td_tune_op */
    uint32_t rows; /* tokens, rounded up to a power of two, at most TD_TUNE_ROWS_MAX */
    uint32_t n, k; /* outputs of a row (all matrices of the launch), reduced width; silu: one of
                      its two matrices; moe: inner width of an expert, hidden width */
    uint32_t heads, slices;
    uint32_t format;         /* td_weight_format */
    uint32_t act_fp8;        /* MXFP4 weights meet e4m3 operands (--act-mxfp4 fp8), not BF16 ones */
    uint32_t experts, top_k; /* moe, else 0 */
    uint32_t tp, ep; /* this is the share of one of so many ranks: heads and widths, or experts */
} td_tune_key;

typedef struct td_tuned_row {
    td_tune_key key;
    td_gpu_plan plan;
    double us,
        error; /* time of the op; largest error against float64, relative to what was summed */
} td_tuned_row;

typedef struct td_tuned {
    char arch[16];
    td_tuned_row *rows; /* sorted by key */
    size_t n, cap;
} td_tuned;

uint32_t td_tune_rows_class(uint32_t rows);
/* "gemm", "gemm_silu", "moe"; "few", "many". */
const char *td_tune_op_name(uint32_t op);
const char *td_gpu_plan_name(td_gpu_plan p);
/* "gemm rows=16 n=2048 k=6144 heads=1 slices=1 dtype=mxfp4 experts=0 top_k=0 share=tp1"; rows 0 is
 * left out; dtype=mxfp4_fp8: with e4m3 operands */
void td_tune_key_text(const td_tune_key *k, char *out, size_t n);

/* The table's text. -EINVAL names file, line and field. Rows of every number of compute units. */
int td_tuned_parse(const char *text, size_t n, const char *file, const char *arch,
                   td_tuned **ret_table, td_err *reterr_err);
/* DIR/<arch>.csv; dir NULL or "": the table that this build holds, or an empty one. -ENOENT,
 * -EINVAL, ... with text. */
int td_tuned_load(const char *dir, const char *arch, td_tuned **ret_table, td_err *reterr_err);
int td_tuned_new(const char *arch, td_tuned **ret_table);
void td_tuned_free(td_tuned *t);
/* Insert, or replace the row of that key. -ENOMEM. */
int td_tuned_put(td_tuned *t, const td_tuned_row *row);
const td_tuned_row *td_tuned_find(const td_tuned *t, const td_tune_key *k);
/* The whole file or the old one: written beside it, then renamed. -errno with the path. */
int td_tuned_write(const td_tuned *t, const char *path, td_err *reterr_err);

/* Plans for launches: rows of a table, and what was asked for and had none. */
typedef struct td_tune_chooser td_tune_chooser;
/* table is read, not kept. -ENOMEM. */
int td_tune_chooser_new(const td_tuned *t, td_tune_chooser **ret_chooser);
void td_tune_chooser_free(td_tune_chooser *c);
/* AUTO: no row, and this shape is noted the first time. The launching thread only. */
td_gpu_plan td_tune_choose(td_tune_chooser *c, const td_tune_key *k);
/* Shapes noted so far; number i of them. Any thread. */
size_t td_tune_untuned(const td_tune_chooser *c);
const td_tune_key *td_tune_untuned_at(const td_tune_chooser *c, size_t i);

#endif
