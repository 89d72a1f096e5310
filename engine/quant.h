/* SPDX-License-Identifier: Apache-2.0 */
/* config.json's quantization_config: what the checkpoint's author says is quantised. Tensors decide
 * by their dtype; this list is only compared with them, because a list that lies means that the
 * checkpoint was damaged or converted wrongly. Understood: quant_method "fp8" (e4m3, blocks of 128
 * x 128) and "quark" (MXFP4, groups of 32 with e8m0 scales; layer_quant_config: globs of modules
 * that have one of the two formats; what excludes a module goes first). Any thread. */
#ifndef TD_ENGINE_QUANT_H
#define TD_ENGINE_QUANT_H

#include <stddef.h>

#include "base/err.h"
#include "kernels/kernels.h"

typedef struct td_quant td_quant;

/* From the text of config.json. Without the key: *ret = NULL and 0. -EINVAL, -ENOTSUP name the
 * key; -ENOMEM. */
int td_quant_parse(const char *config, size_t n, td_quant **ret, td_err *reterr_err);
/* From DIR/config.json. */
int td_quant_load(const char *dir, td_quant **ret, td_err *reterr_err);
void td_quant_free(td_quant *q);

/* Does format of the weight of module ("model.layers.3.self_attn.o_proj") agree with the list?
 * q NULL: nothing may be quantised. linear 0: an embedding or a router, which need not be excluded
 * to be plain. -EINVAL with a text that names the module. */
int td_quant_check(const td_quant *q, const char *module, int linear, td_weight_format format,
                   td_err *reterr_err);

#endif
