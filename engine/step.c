/* SPDX-License-Identifier: Apache-2.0 */
/* One step: lay out the rows of all items, run the forward pass, take logits in groups, draw, move
 * the sequences on. */
#include <errno.h>
#include <string.h>

#include "base/bug.h"
#include "base/prefix.h"
#include "engine/internal.h"
#include "kernels/math.h"
#include "kernels/sample.h"

#include "base/banned.h"

int td_step_check(const td_engine *e, const td_step_item *items, uint32_t n_items)
{
    size_t rows = 0;
    if (n_items == 0 || n_items > e->limits.max_seqs)
        return -EINVAL;
    for (uint32_t i = 0; i < n_items; i++) {
        const td_step_item *it = &items[i];
        const td_seq *s = it->seq;
        size_t end = s->n_computed + s->n_begun + it->n_tokens, n_ids = s->n_ids + s->n_drawing;
        if (it->n_tokens == 0 || end > n_ids || end > s->n_blocks * TD_BLOCK_TOKENS)
            return -EINVAL;
        if (it->n_samples && end != n_ids)
            return -EINVAL;
        rows += it->n_tokens;
    }
    return rows <= e->limits.max_rows ? 0 : -EINVAL;
}

static void upload(td_engine *e, void *dst, const void *src, size_t n)
{
    e->be->copy(e->queue, dst, src, n * 4);
}

static void lay_out(td_engine *e, const td_step_item *items, uint32_t n_items)
{
    uint32_t t = 0, pairs = e->model->config.rope_dims / 2;
    td_step *st = &e->step;
    st->max_context = 0;
    for (uint32_t i = 0; i < n_items; i++) {
        const td_seq *s = items[i].seq;
        upload(e, e->dev_tables + (size_t)i * st->table_stride, s->blocks, s->n_blocks);
        for (uint32_t k = 0; k < items[i].n_tokens; k++, t++) {
            uint32_t pos = (uint32_t)(s->n_computed + s->n_begun) + k;
            e->ids[t] = pos < s->n_ids ? s->ids[pos] : 0; /* fed below */
            e->positions[t] = pos;
            e->seq_of[t] = i;
            td_rope_row(e->inv_freq, pairs, pos, e->rope_cos + (size_t)t * pairs,
                        e->rope_sin + (size_t)t * pairs);
            st->max_context = pos + 1 > st->max_context ? pos + 1 : st->max_context;
        }
    }
    st->n_rows = t;
    st->n_seqs = n_items;
    upload(e, e->dev_ids, e->ids, t);
    td_ahead_feed(e, items, n_items);
    upload(e, e->dev_positions, e->positions, t);
    upload(e, e->dev_seq_of, e->seq_of, t);
    upload(e, e->dev_cos, e->rope_cos, (size_t)t * pairs);
    upload(e, e->dev_sin, e->rope_sin, (size_t)t * pairs);
}

/* Logits of the n rows in e->logit_rows. */
static void queue_logits(td_engine *e, uint32_t n)
{
    e->step.n_logits = n;
    upload(e, e->dev_logit_rows, e->logit_rows, n);
    e->be->logits(e->queue, &e->step, e->buf.h, e->model->head, e->buf.logits);
}

static int run_logits(td_engine *e, uint32_t n)
{
    queue_logits(e, n);
    return e->be->finish(e->queue);
}

/* A row of logits where the host reads it, until the next call. */
static const float *on_host(td_engine *e, const float *logits)
{
    if (!e->be->transfer)
        return logits;
    e->be->copy(e->queue, e->host_logits, logits, e->model->config.vocab * sizeof *logits);
    return e->host_logits;
}

/* Logprobs and visits of the rows [at, at + n) of one item. */
static void show_rows(td_engine *e, const td_step_item *it, uint32_t at, uint32_t n)
{
    const td_seq *s = it->seq;
    uint32_t vocab = e->model->config.vocab;
    for (uint32_t i = 0; i < n; i++) {
        const float *logits = on_host(e, e->buf.logits + (size_t)i * vocab);
        size_t position = s->n_computed + at + i;
        if (it->visit)
            it->visit(it->visit_arg, position, logits);
        if (it->ret_prompt_lp && position + 1 < s->n_ids) /* the last id has no follower */
            td_sampler_logprob(logits, vocab, s->ids[position + 1], it->prompt_top,
                               &it->ret_prompt_lp[at + i]);
    }
}

/* Logits of every row of one item, in groups of as many rows as the logits buffer holds. */
static int every_row(td_engine *e, const td_step_item *it, uint32_t first_row)
{
    for (uint32_t at = 0; at < it->n_tokens;) {
        uint32_t left = it->n_tokens - at,
                 n = left < e->limits.max_seqs ? left : e->limits.max_seqs;
        for (uint32_t i = 0; i < n; i++)
            e->logit_rows[i] = first_row + at + i;
        int r = run_logits(e, n);
        if (r < 0)
            return r;
        show_rows(e, it, at, n);
        at += n;
    }
    return 0;
}

/* Draw n rows at a time, one per thread. */
typedef struct draws {
    td_engine *e;
    uint32_t *ids; /* where the next ones go in the backend's memory; NULL: into out, now */
    uint32_t n;
    td_sample_row rows[16];
    td_sample *out[16];
    const td_sampling *sampling[16];
} draws;

static void flush_draws(draws *d)
{
    td_engine *e = d->e;
    if (d->ids) {
        e->be->behind->draw(e->queue, d->rows, d->n, d->ids);
        d->ids += d->n;
        d->n = 0;
        return;
    }
    e->be->sample(e->queue, d->rows, d->n);
    for (uint32_t i = 0; i < d->n; i++) {
        d->out[i]->id = d->rows[i].id;
        if (d->sampling[i]->logprobs)
            td_sampler_logprob(on_host(e, d->rows[i].logits), d->rows[i].vocab, d->rows[i].id,
                               d->sampling[i]->n_top, &d->out[i]->lp);
    }
    d->n = 0;
}

static void draw(draws *d, const td_seq *s, const float *logits, uint32_t choice, td_sample *out)
{
    td_engine *e = d->e;
    uint32_t width =
        e->n_draw_rows < TD_ARRAY_LEN(d->rows) ? e->n_draw_rows : (uint32_t)TD_ARRAY_LEN(d->rows);
    size_t n_ids = s->n_ids + s->n_drawing;
    uint32_t n_suppress = n_ids - s->n_prompt < s->min_tokens ? s->n_stops : 0;
    td_sampler_row(logits, e->model->config.vocab, &s->sampling, s->ids, n_ids, s->n_ids,
                   s->n_prompt, choice, s->stops, n_suppress,
                   (char *)e->sample_scratch + d->n * e->sample_scratch_bytes, &d->rows[d->n]);
    d->rows[d->n].fed = td_ahead_drawn(e, s);
    d->sampling[d->n] = &s->sampling;
    d->out[d->n++] = out;
    if (d->n == width)
        flush_draws(d);
}

/* Logits of the items that sample or want them lie in e->buf.logits, in item order. */
static int draw_all(td_engine *e, const td_step_item *items, uint32_t n_items,
                    td_sample *ret_samples)
{
    uint32_t vocab = e->model->config.vocab;
    draws d = {.e = e};
    const float *logits = e->buf.logits;
    for (uint32_t i = 0; i < n_items; i++) {
        const td_step_item *it = &items[i];
        if (!it->n_samples && !it->want_logits)
            continue;
        if (it->want_logits)
            e->be->copy(e->queue, it->ret_logits, logits, vocab * sizeof *logits);
        for (uint32_t k = 0; k < it->n_samples; k++)
            draw(&d, it->seq, logits, it->seq->choice + k, ret_samples++);
        logits += vocab;
    }
    if (d.n)
        flush_draws(&d);
    return e->be->transfer ? e->be->finish(e->queue) : 0; /* a device may have failed since */
}

/* The same without waiting: ids and the logits that logprobs need go where f has room. */
static void queue_draws(td_engine *e, const td_step_item *items, uint32_t n_items,
                        const td_flight *f)
{
    uint32_t vocab = e->model->config.vocab;
    draws d = {.e = e, .ids = f->dev_ids};
    const float *logits = e->buf.logits;
    float *out = f->logits;
    for (uint32_t i = 0; i < n_items; i++) {
        const td_seq *s = items[i].seq;
        if (!items[i].n_samples)
            continue;
        draw(&d, s, logits, s->choice, NULL);
        if (s->sampling.logprobs) {
            e->be->behind->bring(e->queue, out, logits, vocab * sizeof *out);
            out += vocab;
        }
        logits += vocab;
    }
    if (d.n)
        flush_draws(&d);
}

/* The last row of every item that samples or wants logits: how many. */
static uint32_t find_last_rows(td_engine *e, const td_step_item *items, uint32_t n_items)
{
    uint32_t n = 0, row = 0;
    for (uint32_t i = 0; i < n_items; i++) {
        row += items[i].n_tokens;
        if (items[i].n_samples || items[i].want_logits)
            e->logit_rows[n++] = row - 1;
    }
    return n;
}

static int last_rows(td_engine *e, const td_step_item *items, uint32_t n_items,
                     td_sample *ret_samples)
{
    uint32_t n = find_last_rows(e, items, n_items);
    int r = n ? run_logits(e, n) : 0;
    return r < 0 ? r : draw_all(e, items, n_items, ret_samples);
}

void td_forward(td_engine *e)
{
    (e->model->config.arch == TD_ARCH_GLM_MOE_DSA ? td_glm_moe_dsa_forward : td_qwen3_forward)(e);
}

/* Does every item compute one token and want its logits, once? */
static int is_decode(const td_step_item *items, uint32_t n_items)
{
    for (uint32_t i = 0; i < n_items; i++)
        if (items[i].n_tokens != 1 || (!items[i].n_samples && !items[i].want_logits) ||
            items[i].ret_prompt_lp || items[i].visit)
            return 0;
    return 1;
}

/* A decode step by its graph, up to its logits. As td_graph_step(). */
static int queue_graph(td_engine *e, const td_step_item *items, uint32_t n)
{
    if (!e->be->capture || !is_decode(items, n))
        return 0;
    for (uint32_t i = 0; i < n; i++)
        e->logit_rows[i] = i;
    e->step.n_logits = n;
    upload(e, e->dev_logit_rows, e->logit_rows, n);
    return td_graph_step(e, n);
}

int td_step_queue(td_engine *e, const td_step_item *items, uint32_t n_items, const td_flight *f)
{
    lay_out(e, items, n_items);
    int r = queue_graph(e, items, n_items);
    if (r == 0) {
        td_forward(e);
        uint32_t n = find_last_rows(e, items, n_items);
        if (n)
            queue_logits(e, n);
    }
    if (r < 0)
        return r;
    queue_draws(e, items, n_items, f);
    return 0;
}

static int run(td_engine *e, const td_step_item *items, uint32_t n_items, td_sample *ret_samples)
{
    lay_out(e, items, n_items);
    int r = queue_graph(e, items, n_items);
    if (r != 0) {
        int f = e->be->finish(e->queue);
        r = r < 0 ? r : f;
        return r < 0 ? r : draw_all(e, items, n_items, ret_samples);
    }
    td_forward(e);
    r = e->be->finish(e->queue);
    for (uint32_t i = 0, row = 0; r >= 0 && i < n_items; row += items[i++].n_tokens)
        if (items[i].ret_prompt_lp || items[i].visit)
            r = every_row(e, &items[i], row);
    return r < 0 ? r : last_rows(e, items, n_items, ret_samples);
}

int td_engine_step(td_engine *e, const td_step_item *items, uint32_t n_items,
                   td_sample *ret_samples)
{
    TD_BUG_ON(e->n_flights != 0);
    int r = td_step_check(e, items, n_items);
    if (r < 0)
        return r;
    uint32_t fp = td_fp_flush();
    r = run(e, items, n_items, ret_samples);
    td_fp_restore(fp);
    for (uint32_t i = 0; r >= 0 && i < n_items; i++)
        td_seq_advance(items[i].seq, items[i].n_tokens);
    return r;
}
