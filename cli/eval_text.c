/* SPDX-License-Identifier: Apache-2.0 */
/* Perplexity, KL divergence and agreement over a text. */
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "cli/eval.h"

#include "base/banned.h"

/* One window at work: the baseline's logits of every row are kept, the model's are compared row by
 * row as they come. */
typedef struct window {
    const uint32_t *ids;
    uint32_t n, vocab;
    float *base; /* [n][vocab], or NULL */
    td_eval_text *sum;
} window;

static void keep_row(void *arg, size_t position, const float *logits)
{
    window *w = arg;
    memcpy(w->base + position * w->vocab, logits, w->vocab * sizeof *logits);
}

/* log of the sum of exp(x), and where the largest is. */
static double log_sum(const float *x, uint32_t n, uint32_t *ret_top)
{
    uint32_t top = 0;
    for (uint32_t i = 1; i < n; i++)
        if (x[i] > x[top])
            top = i;
    double sum = 0.0;
    for (uint32_t i = 0; i < n; i++)
        sum += exp((double)x[i] - (double)x[top]);
    *ret_top = top;
    return (double)x[top] + log(sum);
}

static void compare_row(void *arg, size_t position, const float *logits)
{
    window *w = arg;
    td_eval_text *s = w->sum;
    if (position + 1 >= w->n)
        return;
    uint32_t next = w->ids[position + 1], top, base_top;
    double lse = log_sum(logits, w->vocab, &top), nll = lse - (double)logits[next];
    s->tokens++;
    s->nll += nll;
    if (!w->base)
        return;
    const float *b = w->base + position * w->vocab;
    double base_lse = log_sum(b, w->vocab, &base_top), base_nll = base_lse - (double)b[next];
    double kl = 0.0;
    for (uint32_t i = 0; i < w->vocab; i++)
        kl += exp((double)b[i] - base_lse) * ((double)b[i] - base_lse - (double)logits[i] + lse);
    s->base_nll += base_nll;
    s->change_squares += (nll - base_nll) * (nll - base_nll);
    s->kl += kl;
    s->kl_largest = kl > s->kl_largest ? kl : s->kl_largest;
    s->agree += top == base_top;
}

static int run_window(td_eval_model *m, const uint32_t *ids, uint32_t n,
                      void (*visit)(void *arg, size_t position, const float *logits), void *arg,
                      td_err *err)
{
    td_seq_spec spec = {.ids = ids,
                        .n_ids = n,
                        .n_prompt = n,
                        .max_tokens = 1,
                        .sampling = {.top_p = 1.0f, .repetition_penalty = 1.0f}};
    td_seq *s = NULL;
    int r = td_seq_new(m->engine, &spec, &s, err);
    if (r < 0)
        return r;
    r = td_seq_reserve(s, n);
    td_step_item it = {.seq = s, .n_tokens = n, .visit = visit, .visit_arg = arg};
    r = r < 0 ? r : td_engine_step(m->engine, &it, 1, NULL);
    td_seq_free(s);
    return r < 0 ? td_err_set(err, r, "a step of %u tokens failed: %s", n, td_errno_text(r)) : 0;
}

int td_eval_text_run(td_eval_model *m, td_eval_model *base, const uint32_t *ids, size_t n,
                     uint32_t window_ids, void (*progress)(double fraction), td_eval_text *ret,
                     td_err *reterr_err)
{
    uint32_t vocab = td_model_get_info(m->model)->vocab_size;
    window w = {.vocab = vocab, .sum = ret};
    *ret = (td_eval_text){0};
    TD_AUTO_FREE float *kept = base ? malloc((size_t)window_ids * vocab * sizeof *kept) : NULL;
    if (base && !kept)
        return td_err_set(reterr_err, -ENOMEM, "out of memory for %u rows of logits", window_ids);
    w.base = kept;
    for (size_t at = 0; at + 2 <= n; at += window_ids) {
        w.ids = ids + at;
        w.n = n - at < window_ids ? (uint32_t)(n - at) : window_ids;
        int r = base ? run_window(base, w.ids, w.n, keep_row, &w, reterr_err) : 0;
        r = r < 0 ? r : run_window(m, w.ids, w.n, compare_row, &w, reterr_err);
        if (r < 0)
            return r;
        if (progress)
            progress((double)(at + w.n) / (double)n);
    }
    return 0;
}
