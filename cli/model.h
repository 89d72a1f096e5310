/* SPDX-License-Identifier: Apache-2.0 */
/* Inside of `tandem model random`: a checkpoint of random numbers with the shape of a config.json,
 * for benches and tests. Equal arguments write equal bytes on every machine. */
#ifndef TD_CLI_MODEL_H
#define TD_CLI_MODEL_H

#include <stdint.h>

#include "base/err.h"
#include "engine/config.h"

/* How a tensor's values are drawn: mean + scale * normal. */
typedef struct td_random_tensor {
    char *name;    /* heap */
    uint64_t n, k; /* k = 0: a vector of n */
    float mean, scale;
    int f32; /* else BF16 */
} td_random_tensor;

typedef struct td_random_list {
    td_random_tensor *data;
    size_t n, cap;
    int failed; /* out of memory; sticky */
} td_random_list;

/* Every tensor that the engine and transformers ask of a checkpoint with this configuration. Scales
 * keep activations near one: 1 / sqrt(K) for a matrix, less by sqrt(2 layers) for what adds to the
 * residual. */
void td_random_tensors(const td_config *c, td_random_list *ret_list);
void td_random_list_done(td_random_list *l);
uint64_t td_random_bytes_of(const td_random_tensor *t);

/* Write DIR/model.safetensors, or shards of at most shard_bytes (one tensor at least each) with
 * their index. progress: NULL, or called with a fraction. -errno with text. */
int td_random_write(const char *dir, const td_random_list *l, uint64_t seed, uint64_t shard_bytes,
                    void (*progress)(double fraction), td_err *reterr_err);

/* Write a byte-level tokenizer.json without merges, tokenizer_config.json and a template that puts
 * the messages one after another. Ids from 256 on decode to made-up words. -EINVAL: vocab < 256. */
int td_random_tokenizer(const char *dir, const td_config *c, td_err *reterr_err);

/* One small file, whole or not at all. */
int td_model_put(const char *dir, const char *name, const void *bytes, size_t n,
                 td_err *reterr_err);

#endif
