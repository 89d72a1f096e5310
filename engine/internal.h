/* SPDX-License-Identifier: Apache-2.0 */
/* Shared by the engine's own files: the model's named slots, and the buffers of a step. */
#ifndef TD_ENGINE_INTERNAL_H
#define TD_ENGINE_INTERNAL_H

#include <stdint.h>

#include "engine/config.h"
#include "engine/engine.h"
#include "engine/model.h"
#include "engine/probe.h"
#include "kernels/kernels.h"
#include "kernels/profile.h"

/* Named weight slots of one layer. Absent ones are NULL. */
typedef struct td_layer {
    td_tensor *in_norm, *post_norm;
    /* latent attention */
    td_tensor *q_a, *q_a_norm, *q_b, *kv_a, *kv_a_norm, *w_uk, *w_uv, *o;
    td_tensor *index_q, *index_k, *index_w, *index_norm, *index_bias;
    /* grouped-query attention */
    td_tensor *q, *k, *v, *q_norm, *k_norm;
    /* MLP: dense, or experts with their router and the shared expert */
    td_tensor *gate, *up, *down;
    td_tensor *router, *router_bias, *expert_gate, *expert_up, *expert_down, *shared_gate,
        *shared_up, *shared_down;
    uint64_t kv_offset, index_offset; /* of its rows within a block */
} td_layer;

/* A rank's share of heads and widths; n_ranks = 1 until tensor parallelism lands. */
typedef struct td_shard {
    uint32_t rank, n_ranks;
} td_shard;

struct td_model {
    td_config config;
    td_model_info info;
    const td_backend *backend;
    td_shard shard;
    td_dtype act, kv, index;
    int act_i8, act_fp8;
    uint32_t formats[TD_WEIGHT_CLASSES]; /* of the checkpoint: bit 1 << format per module class */
    uint32_t n_threads, n_cores;
    int *cores;
    char *profile;
    td_tensor *embed, *norm, *head; /* head == embed when tied */
    td_layer *layers;
    td_tensor **owned;    /* every tensor once, for free */
    struct td_pack *pack; /* NULL, or what the tensors' bytes lie in */
    size_t n_owned, cap_owned;
};

/* Buffers of one step; [T] rows each, backend memory. Which exist depends on the architecture. */
typedef struct td_buffers {
    float *x, *delta, *h, *h32, *partial;
    float *q_a, *qr, *q, *kv_a, *q_lat, *o_lat, *o;
    float *index_q, *index_k, *index_w, *index_margin;
    uint32_t *selected, *n_selected;
    float *k, *v;
    float *scores, *route_weights, *route_margin;
    uint32_t *experts;
    float *act;
    float *logits;
} td_buffers;

enum { TD_GRAPH_ROWS = 9, TD_GRAPH_CONTEXTS = 32, TD_GRAPH_CONTEXT_LEAST = 64 }; /* 1 to 256 rows */

/* A step that is begun and not ended. */
typedef struct td_flight_item {
    td_seq *seq; /* NULL: freed since */
    uint32_t n_tokens, n_draws;
    int fed;             /* its last id is one that the step before draws, */
    uint32_t fed_at;     /* there */
    const float *logits; /* NULL, or of its draw: logprobs are wanted */
} td_flight_item;

enum { TD_FLIGHT_LOGITS = 16 }; /* rows of logits that come to the host with a step, at most */

typedef struct td_flight {
    td_flight_item *items; /* [max_seqs] */
    uint32_t n_items;
    uint32_t *dev_ids, *ids; /* [max_seqs] drawn; on the host when the step is ended */
    float *logits;           /* page-locked; [TD_FLIGHT_LOGITS][vocab] */
} td_flight;

struct td_engine {
    td_model *model;
    const td_backend *be;
    td_queue *queue;
    td_engine_limits limits;
    td_kv_pool *pool;
    td_step step;
    td_buffers buf;
    void **mem; /* every backend allocation, for free */
    size_t n_mem;
    float *inv_freq;
    /* host side of the step, copied to the backend's memory */
    uint32_t *ids, *positions, *seq_of, *logit_rows;
    float *rope_cos, *rope_sin;
    uint32_t *dev_ids, *dev_positions, *dev_seq_of, *dev_logit_rows, *dev_tables;
    float *dev_cos, *dev_sin;
    float *host_logits; /* a row, where the host does not follow the backend's memory */
    uint32_t n_seqs_open;
    void *sample_scratch; /* one for each of n_draw_rows that are drawn together */
    size_t sample_scratch_bytes;
    uint32_t n_draw_rows;
    td_flight flights[TD_STEPS_BEGUN_MAX]; /* where steps may be begun ahead */
    uint32_t first_flight, n_flights;
    const td_probe *probe;
    /* decode steps, recorded by the powers of two that hold their rows and contexts */
    void *graphs[TD_GRAPH_ROWS][TD_GRAPH_CONTEXTS];
};

struct td_seq {
    td_engine *engine;
    uint32_t *ids;
    size_t n_ids, cap_ids, n_prompt, n_computed,
        n_indexed;  /* n_indexed: leading blocks already offered to the index */
    size_t n_begun; /* rows in steps that are begun and not ended */
    uint32_t n_drawing,
        draw_at; /* ids that those draw; where the last of them is among its step's */
    td_block *blocks;
    size_t n_blocks, cap_blocks;
    uint8_t *hashes; /* [cap_hashes][16], n_hashes of them known */
    size_t n_hashes, cap_hashes;
    td_sampling sampling;
    td_logit_bias *bias;
    uint32_t choice;
    uint64_t max_tokens, min_tokens;
    int ignore_eos;
    uint32_t *stops; /* eos ids (unless ignored), then stop ids: what may end it, and what
                        min_tokens suppresses */
    uint32_t n_stops;
    uint8_t prefix_key[32];
};

/* layout.c */
void td_kv_layout_make(const td_config *c, td_dtype kv, td_dtype index, td_layer *layers,
                       td_kv_layout *ret_layout);
/* weights.c: bind every tensor of the checkpoint to its slot; hash included. */
int td_weights_load(td_model *m, const char *dir, const td_model_options *o, td_err *reterr_err);
void td_weights_free(td_model *m);
/* One forward pass over the step's rows, up to the normed operand buf.h. */
void td_glm_moe_dsa_forward(td_engine *e);
void td_qwen3_forward(td_engine *e);
/* Shared by both, in glm_moe_dsa.c. A row-parallel product of operand a [T][K]: canonical slices
 * and their tree, into buf.delta. */
void td_row_parallel(td_engine *e, const float *a, uint32_t k, const td_tensor *w);
/* SwiGLU: buf.h -> buf.delta. */
void td_dense_mlp(td_engine *e, const td_layer *l);
/* graph.c: forward pass and logits of a step that is laid out, all of whose n rows are single
 * tokens whose logits are wanted. 1 done, 0 not by a graph, negative errno. */
int td_graph_step(td_engine *e, uint32_t n);
void td_graphs_free(td_engine *e);
/* probe.c */
/* Show what was selected, or routed, and take it back; nothing without a probe. */
void td_probe_selection(td_engine *e, uint32_t layer);
void td_probe_route(td_engine *e, uint32_t layer);
/* step.c */
void td_forward(td_engine *e);
int td_step_check(const td_engine *e, const td_step_item *items, uint32_t n_items);
/* Queue a step up to its draws, whose results go where f has room, and wait for nothing. 0, or
 * negative errno: part of it may be queued. */
int td_step_queue(td_engine *e, const td_step_item *items, uint32_t n_items, const td_flight *f);
/* ahead.c */
/* Ids of sequences that the step begun last draws, into dev_ids of the one that is laid out. */
void td_ahead_feed(td_engine *e, const td_step_item *items, uint32_t n_items);
/* Where the id of s that is not known is drawn; NULL: all are known. */
const uint32_t *td_ahead_drawn(td_engine *e, const td_seq *s);
/* s ends: steps under way have a row that belongs to nobody. */
void td_ahead_forget(td_engine *e, const td_seq *s);
/* seq.c: rows of n more tokens are computed; index the blocks that became full. */
void td_seq_advance(td_seq *s, size_t n);
/* sampler.c: does a draw depend on which ids came before (a penalty)? */
int td_sampler_counts(const td_sampling *s);
/* Fill a row whose edits live in scratch (td_sampler_scratch_bytes). ids: those of the n that are
 * known; read where td_sampler_counts(). */
struct td_sample_row;
void td_sampler_row(const float *logits, uint32_t vocab, const td_sampling *s, const uint32_t *ids,
                    size_t n, size_t n_known, size_t n_prompt, uint32_t choice,
                    const uint32_t *suppress, uint32_t n_suppress, void *scratch,
                    struct td_sample_row *row);

#endif
