/* SPDX-License-Identifier: Apache-2.0 */
/* A packed model: weights in a backend's own layout, written once and mapped at every start.
 *
 * DIR/model.tdpack: the tensors' bytes, each at a multiple of 4,096; then a JSON header; then its
 * length as u64 little-endian and the 8 bytes "TDPACK01". The header: layout, model, config and
 * tokenizer hash (hex), formats (per module class), tensors in the order in which the binder asks
 * for them: name, format ("vector" or a weight format), type (a vector's dtype), shape [slabs, n,
 * k], offset, bytes, XXH3-128 of the bytes (hex). Everything in it is checked before use. */
#ifndef TD_ENGINE_PACK_H
#define TD_ENGINE_PACK_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "kernels/kernels.h"
#include "kernels/profile.h"

/* What belongs to the model, not to one tensor. */
typedef struct td_pack_meta {
    char layout[32]; /* td_backend.layout */
    uint8_t model_hash[32], config_hash[32], tokenizer_hash[32];
    uint32_t formats[TD_WEIGHT_CLASSES];
} td_pack_meta;

typedef struct td_pack_entry {
    int is_vector;
    td_weight_format format; /* of a matrix */
    td_dtype type;           /* of a vector */
    uint32_t slabs, n, k;    /* vector: 1, n, 0 */
    const uint8_t *bytes;    /* borrowed from the mapping */
    uint64_t n_bytes;
} td_pack_entry;

typedef struct td_pack td_pack;

/* 1 opened, 0 DIR has no model.tdpack; -EINVAL, -errno name the file and what is wrong. */
int td_pack_open(const char *dir, td_pack **ret, td_err *reterr_err);
const td_pack_meta *td_pack_get_meta(const td_pack *p);
/* Compare every tensor with its hash, n_threads at once. -EBADMSG names the tensor. */
int td_pack_verify(const td_pack *p, uint32_t n_threads, td_err *reterr_err);
/* The next tensor, which must be called name. -EINVAL names both. */
int td_pack_take(td_pack *p, const char *name, td_pack_entry *ret, td_err *reterr_err);
/* All were taken. -EINVAL names the first that was not. */
int td_pack_end(const td_pack *p, td_err *reterr_err);
void td_pack_close(td_pack *p); /* the bytes go with it; NULL is fine */

typedef struct td_pack_writer td_pack_writer;

/* Writes DIR/model.tdpack; it has that name only after finish. */
int td_pack_writer_new(const char *dir, td_pack_writer **ret, td_err *reterr_err);
int td_pack_writer_add(td_pack_writer *w, const char *name, const td_pack_entry *e,
                       td_err *reterr_err);
int td_pack_writer_finish(td_pack_writer *w, const td_pack_meta *meta, td_err *reterr_err);
void td_pack_writer_free(td_pack_writer *w);

#endif
