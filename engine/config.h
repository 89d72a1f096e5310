/* SPDX-License-Identifier: Apache-2.0 */
/* config.json and generation_config.json, read strictly: every value has a type and a range, every
 * relation is checked, and what this engine does not do is refused by name instead of ignored. Any
 * thread. */
#ifndef TD_ENGINE_CONFIG_H
#define TD_ENGINE_CONFIG_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"

enum { TD_LAYERS_MAX = 256, TD_CONFIG_EOS_MAX = 16 };

typedef enum td_arch { TD_ARCH_GLM_MOE_DSA, TD_ARCH_QWEN3 } td_arch;

typedef struct td_config {
    td_arch arch;
    uint32_t vocab, hidden, n_layers, n_heads, n_kv_heads, inter, max_context;
    float eps;      /* rms_norm_eps */
    float lora_eps; /* q_a and kv_a norms: key "lora_norm_eps", default 1e-6 as transformers
                       (deployed engines differ) */
    int tie;        /* lm_head is embed_tokens */
    double rope_theta;
    uint32_t rope_dims;
    int rope_interleave, index_rope_interleave;
    uint32_t eos[TD_CONFIG_EOS_MAX], n_eos;

    /* qwen3 */
    uint32_t head_dim;

    /* glm_moe_dsa. head_dim of its config is a trap and is not read: heads are nope + rope wide. */
    uint32_t q_lora, kv_lora, nope, v_dims;
    uint32_t index_heads, index_dims, index_topk, n_full;
    uint8_t full[TD_LAYERS_MAX];   /* layer has an indexer of its own; [n_layers] is layer n_layers'
                                      (MTP) and always 1 */
    uint8_t sparse[TD_LAYERS_MAX]; /* layer has experts */
    uint32_t n_experts, top_k, n_shared, moe_inter, n_groups, top_groups, n_mtp;
    int norm_topk;
    float routed_scale;
} td_config;

/* Parse both texts; generation may be NULL. -EINVAL names file and field. */
int td_config_parse(const char *config, size_t n, const char *generation, size_t generation_n,
                    td_config *ret_config, td_err *reterr_err);
/* Read them from a model directory. */
int td_config_load(const char *dir, td_config *ret_config, td_err *reterr_err);
const char *td_arch_name(td_arch a);

#endif
