/* SPDX-License-Identifier: Apache-2.0 */
/* A loaded checkpoint: configuration, weights bound to named slots, numerics profile, KV layout.
 * Immutable after open. Opened by one thread; afterwards used by the lane thread only. No socket,
 * no log. */
#ifndef TD_ENGINE_MODEL_H
#define TD_ENGINE_MODEL_H

#include <stdint.h>

#include "base/err.h"
#include "kernels/kernels.h"

enum { TD_EOS_MAX = 16, TD_KV_GROUPS_MAX = 256 };

/* A contiguous range of every block: what one KV segment carries. kind names the rows. */
typedef enum td_kv_kind { TD_KV_LATENT, TD_KV_INDEX, TD_KV_GQA, TD_KV_MTP } td_kv_kind;

typedef struct td_kv_group {
    td_kv_kind kind;
    uint32_t first_layer,
        n_layers;           /* of the rows of this kind; index groups count full layers only */
    uint64_t offset, bytes; /* within a block */
    uint64_t scale_bytes;   /* of each layer, behind its rows of values: [64][n_scales] f32, or 0 */
} td_kv_group;

/* Block layout (architecture, section 3a): block-major, [group][layer][64][row], a
 * layer's scales behind its rows (kernels/kv_row.h). hash = BLAKE2b-128 of its canonical text. */
typedef struct td_kv_layout {
    uint64_t block_bytes;
    uint32_t n_groups;
    td_kv_group groups[TD_KV_GROUPS_MAX];
    uint8_t hash[16];
} td_kv_layout;

typedef struct td_model td_model;

typedef struct td_model_options {
    const char *isa;           /* a word of td_backend_get */
    const td_backend *backend; /* NULL: by isa; else this one, which outlives the model */
    td_dtype act, kv, index;   /* TD_F32 or TD_BF16; kv also TD_F8E4M3 (kernels/kv_row.h) */
    int act_i8;  /* operands that meet MXFP4 weights: int8 in groups of 32 (act TD_BF16 only) */
    int act_fp8; /* ... e4m3 in groups of 32; -ENOTSUP where the backend cannot */
    uint32_t n_threads; /* engine threads incl. the caller of step; 0 = one per core in the list, or
                           per granted core */
    const int *cores;   /* cores to pin to, borrowed for the call; NULL = do not pin */
    uint32_t n_cores;
    uint32_t rank, n_ranks; /* 0 of 1 is the only value accepted; others -ENOTSUP by name */
    int strict;
    const char *pack_to; /* NULL, or a directory: write model.tdpack there while loading */
    /* Called now and then while loading with a fraction in 0..1; may be NULL. */
    void (*progress)(void *arg, const char *stage, double fraction);
    void *progress_arg;
} td_model_options;

typedef struct td_model_info {
    const char *arch; /* "glm_moe_dsa", "qwen3" */
    uint32_t n_layers, hidden, vocab_size, max_context;
    uint32_t index_topk; /* 0: the architecture has no indexer */
    uint32_t eos_ids[TD_EOS_MAX], n_eos;
    uint8_t model_hash[32], config_hash[32], tokenizer_hash[32];
    const char *profile; /* canonical text, one key=value a line, sorted */
    uint8_t profile_id[16];
    uint64_t weight_bytes;
    td_kv_layout kv;
} td_model_info;

/* Open DIR: config.json, generation_config.json (optional), model.safetensors or the sharded form,
 * or model.tdpack in their place (engine/pack.h), which is mapped for the model's life.
 * Strict: see the checks of the model specification's section 9. On failure nothing is kept and the
 * text names file, tensor or field. */
int td_model_open(const char *dir, const td_model_options *options, td_model **ret_model,
                  td_err *reterr_err);
void td_model_free(td_model *m);
const td_model_info *td_model_get_info(const td_model *m);

#endif
