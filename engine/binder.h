/* SPDX-License-Identifier: Apache-2.0 */
/* How one tensor of a checkpoint, or of a packed copy, becomes a weight: its name is looked up and
 * marked as used, type, shape and scales are checked, values are packed by all threads, and tandem
 * pack gets what was packed. weights.c says which tensors a model has. Errors are sticky: after the
 * first one nothing is done, and its text stays. */
#ifndef TD_ENGINE_BINDER_H
#define TD_ENGINE_BINDER_H

#include "engine/internal.h"
#include "engine/pack.h"
#include "engine/quant.h"
#include "engine/safetensors.h"
#include "kernels/ref/pool.h"

enum { TD_BIND_NAME = 200 }; /* bytes of a tensor's name behind the prefix, and of the prefix */

typedef struct td_binder {
    td_model *m;
    td_st *st;
    const char *dir;
    td_err *err;
    td_quant *quant;     /* what config.json says is quantised */
    td_pack *pack;       /* a packed model: tensors come from it, in the same order */
    td_pack_writer *out; /* tandem pack: each tensor goes there too */
    td_pool *pool;       /* packs weights */
    int failed;          /* sticky: the first error stays in err */
    char prefix[TD_BIND_NAME];
    int check_only; /* MTP layer: names, types and shapes are checked, nothing is kept */
} td_binder;

/* A matrix as the checkpoint holds it. */
typedef struct td_bind_source {
    td_st_tensor *t, *scale; /* t NULL: failed */
    td_weight_format format;
} td_bind_source;

/* The first error, with the model's folder before it. */
void td_bind_fail(td_binder *b, int code, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
/* Matrix prefix + name [n][k], of any format. */
td_bind_source td_bind_find(td_binder *b, const char *name, uint64_t n, uint64_t k);
/* Does config.json agree? Then its format is noted under its module class. */
int td_bind_agree(td_binder *b, const td_bind_source *s, td_weight_class class);
/* Where its elements lie. */
td_weight_src td_bind_view(const td_bind_source *s);
/* The tensor's part of the model hash, once. */
void td_bind_sum(td_st_tensor *t);
/* The model frees w at its end; code: what making it returned. NULL after an error. */
td_tensor *td_bind_own(td_binder *b, td_tensor *w, int code);
/* Fill a slab by all threads. */
void td_bind_fill(td_binder *b, td_tensor *w, uint32_t slab, uint32_t n, const td_bind_source *s);
/* Values of a quantised matrix [n][k], from the heap. NULL after an error. */
float *td_bind_decoded(td_binder *b, const td_bind_source *s, uint32_t n, uint32_t k);

/* Matrix [n][k] and vector [n], as stored: all of the above. */
td_tensor *td_bind_matrix(td_binder *b, td_weight_class class, const char *name, uint32_t n,
                          uint32_t k);
td_tensor *td_bind_vector(td_binder *b, const char *name, uint32_t n);

/* A packed model's matrix, and what tandem pack writes for it. */
td_tensor *td_bind_packed(td_binder *b, const char *name, uint32_t slabs, uint32_t n, uint32_t k);
void td_bind_save(td_binder *b, const char *name, const td_tensor *w, td_weight_format format,
                  uint32_t slabs, uint32_t n, uint32_t k);

#endif
