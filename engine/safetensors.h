/* SPDX-License-Identifier: Apache-2.0 */
/* safetensors, single file or shards, mapped read-only. The reference's rules, strictly: header at
 * most 100 MB and JSON without duplicate keys; tensors cover the data from 0 to its end with no
 * hole and no overlap; bytes = shape x dtype; names at most 256 bytes; rank at most 8. An index may
 * name files of its own directory only, and must agree with them exactly. A file that another
 * process truncates while it is mapped raises SIGBUS on access: the worker then dies by design
 * rather than reading wrong weights; the mapping lives only while weights are loaded. */
#ifndef TD_ENGINE_SAFETENSORS_H
#define TD_ENGINE_SAFETENSORS_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "kernels/kernels.h"

enum { TD_ST_RANK_MAX = 8, TD_ST_NAME_MAX = 256 };

typedef struct td_st_tensor {
    const char *name; /* NUL-terminated, owned by the set */
    const char *type; /* as in the file: "BF16", "F8_E4M3", "I32" ... static */
    int dtype;        /* td_dtype, or -1 for types that no weight has */
    uint32_t rank;
    uint64_t shape[TD_ST_RANK_MAX];
    const uint8_t *data; /* borrowed from the mapping, 1-byte aligned */
    uint64_t bytes;
    int used;        /* for the binder: every tensor must be used */
    int has_sum;     /* the same: sum is there */
    uint8_t sum[16]; /* XXH3-128 of the bytes */
} td_st_tensor;

typedef struct td_st td_st;

/* Open DIR/model.safetensors, or DIR/model.safetensors.index.json and its shards. */
int td_st_open(const char *dir, td_st **ret_st, td_err *reterr_err);
/* Open one file. */
int td_st_open_file(const char *path, td_st **ret_st, td_err *reterr_err);
/* Parse one file's bytes (borrowed until close). name is used in errors. */
int td_st_parse(const void *bytes, size_t n, const char *name, td_st **ret_st, td_err *reterr_err);
void td_st_close(td_st *st);
/* Give the files' pages in memory back to the system: the bytes were copied, so they would only
 * stand in the way of the copy. The data stay readable (from disk again), pages that another
 * process maps stay. A file system that lives in memory keeps them. */
void td_st_give_back(td_st *st);

/* Sorted by name (bytes). */
size_t td_st_count(const td_st *st);
td_st_tensor *td_st_at(const td_st *st, size_t i);
td_st_tensor *td_st_find(const td_st *st, const char *name);

#endif
