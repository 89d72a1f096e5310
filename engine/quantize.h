/* SPDX-License-Identifier: Apache-2.0 */
/* BF16 checkpoint -> MXFP4 (Quark's layout, configuration and scale rule "even") or FP8 (e4m3 in
 * blocks of 128 x 128, as the published GLM checkpoints), or MXFP4 with some modules in FP8 (named
 * by Quark's layer_quant_config), tensor by tensor, file to file. */
#ifndef TD_ENGINE_QUANTIZE_H
#define TD_ENGINE_QUANTIZE_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "kernels/kernels.h"

/* What was lost in one tensor: ||w - q|| / ||w|| and the largest |w - q|. */
typedef struct td_quantize_row {
    const char *name; /* of the tensor */
    td_weight_format format;
    uint64_t elements;
    double relative, largest;
} td_quantize_row;

typedef struct td_quantize_options {
    td_weight_format format;    /* TD_W_MXFP4 or TD_W_FP8 */
    const char *const *exclude; /* globs of modules that stay as they are */
    size_t n_exclude;
    const char *const *fp8; /* MXFP4 only: globs of modules that become FP8, excluded or not; they
                             * alone may name the embedding */
    size_t n_fp8;
    uint32_t n_threads;                                 /* 0: one per granted core */
    void (*row)(void *arg, const td_quantize_row *row); /* after each quantised tensor; or NULL */
    void (*progress)(void *arg, double fraction);       /* or NULL */
    void *arg;
} td_quantize_options;

/* The globs of the published GLM-5.2 checkpoints for a format: MXFP4 keeps attention, dense MLP,
 * router, head and the MTP layer; FP8 keeps router, head, indexer.weights_proj and eh_proj. What is
 * no linear module (norms, biases) is never quantised, the embedding only by fp8. Globs may name
 * {mtp}: it stands for the MTP layer's number. NULL-terminated. */
const char *const *td_quantize_default_exclude(td_weight_format format);

/* Writes OUT (created; must not exist): weights, config.json with quantization_config, and copies
 * of the other files. -EINVAL names the tensor (already quantised, width no multiple of 32), the
 * router of experts that would not stay plain, the glob that matches nothing, or the path; -errno
 * of files. Nothing is left behind on failure. */
int td_quantize(const char *model, const char *out, const td_quantize_options *o,
                td_err *reterr_err);

#endif
