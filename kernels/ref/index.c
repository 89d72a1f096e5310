/* SPDX-License-Identifier: Apache-2.0 */
/* The lightning indexer: keys into the pool, scores, exact top-k. */
#include <errno.h>
#include <math.h>

#include "kernels/ref/ref.h"

#include "base/banned.h"

typedef struct write_job {
    td_queue *q;
    const td_step *s;
    const td_index_write *a;
} write_job;

/* LayerNorm with mean subtraction, weight and bias. */
static void layer_norm(const float *x, const float *w, const float *b, float eps, uint32_t n,
                       float *y)
{
    float mean = ref_sum(x, n) / (float)n;
    for (uint32_t i = 0; i < n; i++)
        y[i] = x[i] - mean;
    float r = 1.0f / sqrtf(ref_dot(y, y, n) / (float)n + eps);
    for (uint32_t i = 0; i < n; i++)
        y[i] = y[i] * r * w[i] + b[i];
}

static void write_item(void *arg, uint32_t t, uint32_t thread)
{
    const write_job *j = arg;
    const td_index_write *a = j->a;
    const float *cos = j->s->rope_cos + (size_t)t * (a->rope.dims / 2);
    const float *sin = j->s->rope_sin + (size_t)t * (a->rope.dims / 2);
    float *buf = ref_scratch(j->q, thread);
    layer_norm(a->k + (size_t)t * a->dims, a->norm->data, a->bias->data, a->eps, a->dims, buf);
    td_ref_rope(buf, a->rope, cos, sin);
    size_t bytes = a->dims * td_dtype_bytes(a->index);
    td_ref_store(ref_kv_row(j->s, t, j->s->positions[t], a->layer_offset, bytes), buf, a->dims,
                 a->index);
    for (uint32_t h = 0; h < a->n_heads; h++)
        td_ref_rope(a->q + ((size_t)t * a->n_heads + h) * a->dims, a->rope, cos, sin);
}

void td_ref_index_write(td_queue *q, const td_step *s, const td_index_write *a)
{
    write_job j = {q, s, a};
    td_pool_run(q->pool, write_item, &j, s->n_rows);
}

/* Rows are taken in groups whose scores fit the buffer: rows [first, first + n) at stride floats
 * each. */
typedef struct select_job {
    td_queue *q;
    const td_step *s;
    const td_index_select *a;
    uint32_t first, n, blocks;
    size_t stride;
} select_job;

/* Scores of one row against one block of 64 keys. Dims in fixed order per head, then heads in
 * order. */
static void score_item(void *arg, uint32_t item, uint32_t thread)
{
    const select_job *j = arg;
    const td_index_select *a = j->a;
    uint32_t t = j->first + item / j->blocks, p0 = item % j->blocks * 64, last = j->s->positions[t];
    if (last < a->topk || p0 > last)
        return; /* everything is selected, or the block lies in the future */
    uint32_t n = last + 1 - p0 < 64 ? last + 1 - p0 : 64;
    float *keys = ref_scratch(j->q, thread), *out = j->q->scores + (t - j->first) * j->stride + p0;
    size_t bytes = a->dims * td_dtype_bytes(a->index);
    td_ref_load(keys, ref_kv_row(j->s, t, p0, a->layer_offset, bytes), n * a->dims, a->index);
    for (uint32_t i = 0; i < n; i++) {
        float sum = 0.0f;
        for (uint32_t h = 0; h < a->n_heads; h++) {
            float dot = ref_dot(a->q + ((size_t)t * a->n_heads + h) * a->dims,
                                keys + (size_t)i * a->dims, a->dims);
            float w = a->weight[(size_t)t * a->n_heads + h] * a->scale;
            sum += w * (dot < 0.0f ? 0.0f : dot); /* NaN stays NaN */
        }
        out[i] = sum + 0.0f; /* -0 equals +0 */
        if (isnan(sum))
            ref_fail(j->q, -EIO);
    }
}

static uint32_t key_of(float f)
{
    uint32_t b;
    memcpy(&b, &f, 4);
    return b & 0x80000000u ? ~b : b | 0x80000000u;
}

static float value_of(uint32_t key)
{
    uint32_t b = key & 0x80000000u ? key & 0x7fffffffu : ~key;
    float f;
    memcpy(&f, &b, 4);
    return f;
}

/* Key of the k-th greatest of n scores by three counting passes (11, 11, 10 bits); *ret_ties = how
 * many with that key. */
static uint32_t kth_key(const float *v, uint32_t n, uint32_t k, uint32_t *ret_ties)
{
    static const uint8_t shifts[3] = {21, 10, 0};
    static const uint16_t sizes[3] = {2048, 2048, 1024};
    uint32_t hist[2048], high = 0, mask = 0;
    for (int d = 0; d < 3; d++) {
        memset(hist, 0, sizeof hist);
        for (uint32_t i = 0; i < n; i++) {
            uint32_t key = key_of(v[i]);
            if ((key & mask) == high)
                hist[key >> shifts[d] & (sizes[d] - 1u)]++;
        }
        uint32_t digit = sizes[d] - 1u;
        while (digit > 0 && hist[digit] < k)
            k -= hist[digit--];
        high |= digit << shifts[d];
        mask |= (sizes[d] - 1u) << shifts[d];
    }
    *ret_ties = k;
    return high;
}

static float margin_of(const float *v, uint32_t n, uint32_t thr, uint32_t ties)
{
    float largest = 0.0f, next = -INFINITY;
    uint32_t equal = 0;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t key = key_of(v[i]);
        largest = fabsf(v[i]) > largest ? fabsf(v[i]) : largest;
        equal += key == thr;
        if (key < thr && v[i] > next)
            next = v[i];
    }
    if (equal > ties)
        next = value_of(thr);
    return largest > 0.0f ? (value_of(thr) - next) / largest : 0.0f;
}

static void select_item(void *arg, uint32_t item, uint32_t thread)
{
    const select_job *j = arg;
    const td_index_select *a = j->a;
    uint32_t t = j->first + item, n = j->s->positions[t] + 1, have = 0;
    uint32_t *out = a->selected + (size_t)t * a->topk;
    const float *v = j->q->scores + item * j->stride;
    if (n <= a->topk) {
        for (; have < n; have++)
            out[have] = have;
        if (a->margin)
            a->margin[t] = INFINITY;
    } else {
        uint32_t ties, thr = kth_key(v, n, a->topk, &ties);
        if (a->margin)
            a->margin[t] = margin_of(v, n, thr, ties);
        for (uint32_t i = 0; i < n && have < a->topk; i++) {
            uint32_t key = key_of(v[i]);
            if (key > thr || (key == thr && ties > 0)) {
                ties -= key == thr;
                out[have++] = i;
            }
        }
    }
    a->n_selected[t] = have;
}

void td_ref_index_select(td_queue *q, const td_step *s, const td_index_select *a)
{
    select_job j = {.q = q, .s = s, .a = a};
    j.stride = ((size_t)s->max_context + 63) / 64 * 64;
    if (j.stride > q->score_floats)
        j.stride = q->score_floats;
    uint32_t group = (uint32_t)(q->score_floats / j.stride);
    j.blocks = s->max_context > a->topk ? (s->max_context + 63) / 64 : 0;
    for (j.first = 0; j.first < s->n_rows; j.first += group) {
        j.n = s->n_rows - j.first < group ? s->n_rows - j.first : group;
        if (j.blocks)
            td_pool_run(q->pool, score_item, &j, j.n * j.blocks);
        td_pool_run(q->pool, select_item, &j, j.n);
    }
}
