/* SPDX-License-Identifier: Apache-2.0 */
/* What a worker may send the router: first byte picks the message, the rest is its body. A worker
 * is no friend: lengths, counts and ids of runs and logprobs are checked before anything reads
 * them. */
#include <stdint.h>
#include <stdlib.h>

#include "base/bug.h"
#include "router/dispatch_int.h"
#include "base/banned.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static uint64_t sink;

/* Touch every byte that a run gives, so that a sanitizer sees a wrong length. */
static void read_run(const td_gen_run *r)
{
    for (size_t i = 0; i < r->n; i++) {
        sink += r->ids[i];
        if (r->logprobs)
            sink += r->logprobs[i] > 0;
        for (uint32_t k = 0; r->top && k < r->top[i].n; k++)
            sink += r->top[i].ids[k] + (r->top[i].logprobs[k] > 0);
    }
}

static void take_runs(td_gen *g, Tandem__V1__TokenRun *const *runs, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        td_life_run life;
        td_gen_run run;
        if (td_wire_run(g, runs[i], &life, &run) < 0)
            continue;
        TD_BUG_ON(run.n < 1 || run.n > g->spec.max_tokens || life.n != run.n);
        read_run(&run);
    }
}

static void take_prompt(td_gen *g, const Tandem__V1__PromptLogprobs *m)
{
    const float *logprobs;
    const td_gen_top *top;
    if (!m || td_wire_prompt(g, m, &logprobs, &top) < 0)
        return;
    for (size_t i = 0; i + 1 < g->spec.n_prompt; i++) {
        sink += logprobs[i] > 0;
        for (uint32_t k = 0; top && k < top[i].n; k++)
            sink += top[i].ids[k];
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    td_dispatch d = {.config.vocab_size = 1000};
    td_gen g = {.dispatch = &d};
    if (size < 1)
        return 0;
    g.spec = (td_gen_spec){.n = 2,
                           .max_tokens = 64,
                           .n_prompt = 3,
                           .logprobs = data[0] >> 1 & 1,
                           .top_logprobs = data[0] >> 2 & 1};
    td_arena_init(&d.scratch, 1 << 24);
    ProtobufCAllocator alloc = td_wire_allocator(&d);
    if (data[0] & 1) {
        Tandem__V1__DecodeEvent *m = tandem__v1__decode_event__unpack(&alloc, size - 1, data + 1);
        if (m)
            take_runs(&g, m->runs, m->n_runs);
    } else {
        Tandem__V1__PrefillReply *m = tandem__v1__prefill_reply__unpack(&alloc, size - 1, data + 1);
        if (m) {
            take_runs(&g, m->first, m->n_first);
            take_prompt(&g, m->prompt);
        }
    }
    td_arena_done(&d.scratch);
    return 0;
}
