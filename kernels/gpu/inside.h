/* SPDX-License-Identifier: Apache-2.0 */
/* Shared by the files of the GPU backend. */
#ifndef TD_KERNELS_GPU_INSIDE_H
#define TD_KERNELS_GPU_INSIDE_H

#include <stdatomic.h>

#include "kernels/gpu/backend.h"
#include "kernels/hip/args.h"

typedef enum kernel_id {
#define TD_KERNEL(name) K_##name,
#include "kernels/hip/list.def"
#undef TD_KERNEL
    N_KERNELS
} kernel_id;

struct td_tensor {
    td_weight_format format;
    uint32_t slabs, n, k, n_tiles, k_tiles; /* a vector has k = 0 */
    uint32_t scale_cols;                    /* FP8 */
    void *data, *scales;                    /* device memory */
    uint64_t bytes, scale_bytes;
};

/* A step that is queued whole; host is page-locked: its error, then the ids it drew. */
typedef struct sealed {
    void *passed;
    int error; /* of the host's side */
    uint32_t n;
    uint32_t *host;
} sealed;

/* Device memory that grows when an op needs more. */
typedef struct scratch {
    void *p;
    size_t bytes;
} scratch;

struct td_queue {
    td_backend_options o;
    void *stream;
    td_step step;      /* as it lies at dev_step */
    td_step *dev_step; /* fixed address: what captured launches read */
    int *dev_error;
    int error; /* first failure of the host's side, negative errno */
    scratch attend, scores, lists, experts, draws;
    uint64_t moves; /* of scratches: recorded launches hold their addresses */
    enum { TD_GPU_RUN, TD_GPU_DRY, TD_GPU_RECORD } mode;
    /* behind.c */
    char *room; /* page-locked: what uploads leave from, in two halves */
    uint32_t room_half;
    size_t room_at; /* in that half */
    void *room_passed[2];
    uint8_t room_used[2];
    sealed sealed[TD_BEHIND_MAX];
    uint32_t first_sealed, n_sealed;
    /* transfer.c */
    void *copy_stream, *ops_end;
    int in_group; /* the copy stream waits for the ops already */
    uint64_t marks;
    _Atomic uint64_t marks_done;
};

/* The process's device; the calling thread drives it afterwards. */
td_gpu *td_gpu_device(void);
/* AUTO: none was set and the tuned tables have none. cus of k is filled in here. */
td_gpu_plan td_gpu_plan_for(td_tune_key *k);

void td_gpu_fail(td_queue *q, int code);
/* Filling a weight cannot fail by its signature: the next queue does not open instead. */
void td_gpu_load_failed(int code);
/* dev_step equals *s for what is queued from now on, unless launches are recorded. Returns its
 * address. */
const td_step *td_gpu_step(td_queue *q, const td_step *s);
void td_gpu_launch(td_queue *q, kernel_id k, uint64_t blocks, size_t lds_bytes, const void *args,
                   size_t args_bytes);
/* At least bytes of device memory; NULL (and the queue has failed) when there is none. */
void *td_gpu_scratch(td_queue *q, scratch *s, size_t bytes);

/* The pool holds F32 or BF16, KV rows also FP8; other types fail the queue and give 0: -ENOTSUP. */
int td_gpu_pool_type(td_queue *q, td_dtype t, int fp8_too);

static inline td_k_matrix td_gpu_matrix(const td_tensor *w)
{
    return (td_k_matrix){.data = w->data,
                         .scales = w->scales,
                         .n = w->n,
                         .k = w->k,
                         .n_tiles = w->n_tiles,
                         .k_tiles = w->k_tiles,
                         .scale_cols = w->scale_cols,
                         .format = w->format};
}

/* transfer.c */
extern const td_transfer_ops td_gpu_transfer;
int td_gpu_transfer_open(td_queue *q);
void td_gpu_transfer_close(td_queue *q); /* waits for copies under way */

/* behind.c */
extern const td_behind_ops td_gpu_behind;
int td_gpu_behind_open(td_queue *q);
void td_gpu_behind_close(td_queue *q); /* the stream is waited for */
/* Upload in the order of the ops; src has been read when it returns, which does not wait for them.
 * 0, negative errno. */
int td_gpu_send(td_queue *q, void *dst, const void *src, size_t bytes);

/* capture.c */
extern const td_capture_ops td_gpu_capture;

/* weights.c */
int td_gpu_weight_new(td_weight_format format, uint32_t n_slabs, uint32_t n, uint32_t k,
                      td_tensor **ret_w);
void td_gpu_weight_fill(td_tensor *w, uint32_t slab, uint32_t n0, uint32_t n_rows,
                        const td_weight_src *src);
int td_gpu_vector_new(uint32_t n, const td_weight_src *src, td_tensor **ret_w);
void td_gpu_weight_free(td_tensor *w);
uint64_t td_gpu_weight_bytes(const td_tensor *w);

/* rows.c */
void td_gpu_embed(td_queue *q, const td_step *s, const td_tensor *table, float *x);
void td_gpu_add_norm(td_queue *q, const td_step *s, float *x, const float *delta,
                     const td_tensor *w, float eps, uint32_t width, float *out, float *out_f32);
void td_gpu_reduce_slices(td_queue *q, const td_step *s, const float *partial, uint32_t slices,
                          uint32_t n, float *out);
void td_gpu_mla_write(td_queue *q, const td_step *s, const td_mla_write *a);
void td_gpu_index_write(td_queue *q, const td_step *s, const td_index_write *a);
void td_gpu_gqa_write(td_queue *q, const td_step *s, const td_gqa_write *a);
void td_gpu_sample(td_queue *q, struct td_sample_row *rows, uint32_t n);
/* behind.draw; ids NULL: to q->draws. Where they come to lie, NULL: the queue has failed. */
uint32_t *td_gpu_draw(td_queue *q, const struct td_sample_row *rows, uint32_t n, uint32_t *ids);

/* products.c */
void td_gpu_gemm(td_queue *q, const td_step *s, const td_gemm *g);
void td_gpu_route(td_queue *q, const td_step *s, const td_route *a);
void td_gpu_moe(td_queue *q, const td_step *s, const td_moe *a);
void td_gpu_logits(td_queue *q, const td_step *s, const float *h, const td_tensor *head,
                   float *logits);

/* attend.c */
void td_gpu_index_select(td_queue *q, const td_step *s, const td_index_select *a);
void td_gpu_attend_mla(td_queue *q, const td_step *s, const td_attend_mla *a);
void td_gpu_attend_gqa(td_queue *q, const td_step *s, const td_attend_gqa *a);

#endif
