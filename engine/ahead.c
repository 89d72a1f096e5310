/* SPDX-License-Identifier: Apache-2.0 */
/* Steps that are begun while the one before still runs. What a sequence has in them is counted in
 * it (n_begun, n_drawing); what is needed to end one lies in its td_flight. */
#include <errno.h>
#include <string.h>

#include "base/bug.h"
#include "engine/internal.h"
#include "kernels/math.h"

#include "base/banned.h"

_Static_assert((int)TD_STEPS_BEGUN_MAX == (int)TD_BEHIND_MAX, "a flight for each sealed step");

static td_flight *flight(td_engine *e, uint32_t i)
{
    return &e->flights[(e->first_flight + i) % TD_STEPS_BEGUN_MAX];
}

int td_engine_runs_behind(const td_engine *e)
{
    return e->be->behind != NULL;
}

uint32_t td_engine_begun(const td_engine *e)
{
    return e->n_flights;
}

/* Ids that have a place and are not known. */
static int is_fed(const td_step_item *it)
{
    const td_seq *s = it->seq;
    return s->n_computed + s->n_begun + it->n_tokens > s->n_ids;
}

void td_ahead_feed(td_engine *e, const td_step_item *items, uint32_t n_items)
{
    if (e->n_flights == 0)
        return;
    const uint32_t *drawn = flight(e, e->n_flights - 1)->dev_ids;
    uint32_t row = 0, from = 0, to = 0, n = 0; /* a run of rows that keep their order */
    for (uint32_t i = 0; i < n_items; i++) {
        row += items[i].n_tokens;
        if (!is_fed(&items[i]))
            continue;
        uint32_t at = items[i].seq->draw_at;
        if (n == 0 || at != from + n || row - 1 != to + n) {
            e->be->copy(e->queue, e->dev_ids + to, drawn + from, n * sizeof *drawn);
            from = at;
            to = row - 1;
            n = 0;
        }
        n++;
    }
    e->be->copy(e->queue, e->dev_ids + to, drawn + from, n * sizeof *drawn);
}

void td_ahead_forget(td_engine *e, const td_seq *s)
{
    for (uint32_t i = 0; i < e->n_flights; i++)
        for (uint32_t k = 0; k < flight(e, i)->n_items; k++)
            if (flight(e, i)->items[k].seq == s)
                flight(e, i)->items[k].seq = NULL;
}

const uint32_t *td_ahead_drawn(td_engine *e, const td_seq *s)
{
    return s->n_drawing ? flight(e, e->n_flights - 1)->dev_ids + s->draw_at : NULL;
}

static int wants_logprobs(const td_step_item *it)
{
    return it->n_samples && it->seq->sampling.logprobs;
}

static int can_begin(const td_engine *e, const td_step_item *items, uint32_t n_items)
{
    uint32_t n_logits = 0;
    if (!e->be->behind || e->probe)
        return 0;
    for (uint32_t i = 0; i < n_items; i++) {
        const td_step_item *it = &items[i];
        if (it->n_samples > 1 || it->want_logits || it->ret_prompt_lp || it->visit)
            return 0;
        n_logits += (uint32_t)wants_logprobs(it);
    }
    return n_logits <= TD_FLIGHT_LOGITS;
}

/* The step is queued: its sequences are so much further. */
static void depart(td_engine *e, td_flight *f, const td_step_item *items, uint32_t n_items)
{
    uint32_t n_draws = 0;
    const float *logits = f->logits;
    f->n_items = n_items;
    for (uint32_t i = 0; i < n_items; i++) {
        td_seq *s = items[i].seq;
        f->items[i] = (td_flight_item){.seq = s,
                                       .n_tokens = items[i].n_tokens,
                                       .n_draws = items[i].n_samples,
                                       .fed = is_fed(&items[i]),
                                       .fed_at = s->draw_at};
        if (wants_logprobs(&items[i])) {
            f->items[i].logits = logits;
            logits += e->model->config.vocab;
        }
    }
    for (uint32_t i = 0; i < n_items; i++) {
        td_seq *s = items[i].seq;
        s->n_begun += items[i].n_tokens;
        s->n_drawing += items[i].n_samples;
        if (items[i].n_samples)
            s->draw_at = n_draws;
        n_draws += items[i].n_samples;
    }
    e->n_flights++;
}

int td_engine_begin(td_engine *e, const td_step_item *items, uint32_t n_items)
{
    TD_BUG_ON(e->n_flights == TD_STEPS_BEGUN_MAX);
    int r = td_step_check(e, items, n_items);
    if (r < 0)
        return r;
    if (!can_begin(e, items, n_items))
        return -EAGAIN;
    td_flight *f = flight(e, e->n_flights);
    uint32_t fp = td_fp_flush(), n_draws = 0;
    for (uint32_t i = 0; i < n_items; i++)
        n_draws += items[i].n_samples;
    r = td_step_queue(e, items, n_items, f);
    td_fp_restore(fp);
    r = r < 0 ? r : e->be->behind->seal(e->queue, f->dev_ids, n_draws);
    if (r < 0) { /* what it left in the queue is no error of the next step */
        (void)e->be->finish(e->queue);
        return r;
    }
    depart(e, f, items, n_items);
    return 0;
}

/* Its sequences are no longer so much further. */
static void land(td_engine *e)
{
    const td_flight *f = flight(e, 0);
    for (uint32_t i = 0; i < f->n_items; i++) {
        td_seq *s = f->items[i].seq;
        if (!s)
            continue;
        s->n_begun -= f->items[i].n_tokens;
        s->n_drawing -= f->items[i].n_draws;
    }
    e->first_flight = (e->first_flight + 1) % TD_STEPS_BEGUN_MAX;
    e->n_flights--;
}

static void drop_all(td_engine *e)
{
    while (e->n_flights) {
        (void)e->be->behind->wait(e->queue, NULL);
        land(e);
    }
}

/* What the host needed not know before. */
static void take_item(td_engine *e, const td_flight_item *it, const uint32_t *ids,
                      const uint32_t *ids_before, td_sample *ret_samples)
{
    td_seq *s = it->seq;
    td_seq_advance(s, it->n_tokens);
    /* the caller appended another one than was drawn, and the rows are wrong */
    TD_BUG_ON(it->fed && s->ids[s->n_computed - 1] != ids_before[it->fed_at]);
    if (it->logits)
        td_sampler_logprob(it->logits, e->model->config.vocab, ids[0], s->sampling.n_top,
                           &ret_samples[0].lp);
}

int td_engine_end(td_engine *e, td_sample *ret_samples)
{
    TD_BUG_ON(e->n_flights == 0);
    const td_flight *f = flight(e, 0), *before = flight(e, TD_STEPS_BEGUN_MAX - 1);
    int r = e->be->behind->wait(e->queue, f->ids);
    land(e);
    if (r < 0) {
        drop_all(e);
        return r;
    }
    uint32_t fp = td_fp_flush();
    const uint32_t *ids = f->ids;
    for (uint32_t i = 0; i < f->n_items; i++) {
        const td_flight_item *it = &f->items[i];
        if (it->n_draws)
            ret_samples->id = ids[0];
        if (it->seq)
            take_item(e, it, ids, before->ids, ret_samples);
        ids += it->n_draws;
        ret_samples += it->n_draws;
    }
    td_fp_restore(fp);
    return 0;
}
