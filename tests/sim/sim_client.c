/* SPDX-License-Identifier: Apache-2.0 */
/* Clients and the oracle: what a client may see is known before it asks. */
#include "sim.h"

#include "base/bug.h"
#include "base/clock.h"
#include "base/banned.h"

/* longer than the longest step of a slow worker, shorter than a stuck one's pause */
enum { STALL_US = 2000000 };

static void on_submit(sim *s, sim_event *e)
{
    sim_router_submit(s, e->p);
}

static void on_leave(sim *s, sim_event *e)
{
    sim_gen *g = e->p;
    if (!g->live || g->ended)
        return;
    td_life_event ev = {.kind = TD_LIFE_EV_CANCEL, .error = TD_ERROR_CANCELLED};
    sim_router_event(s, g, &ev);
}

static void plan_client(sim *s, sim_gen *g, uint64_t at)
{
    if ((s->faults & SIM_F_CANCEL) && sim_below(s, 4) == 0) {
        g->patient = 0;
        sim_at(s, at + sim_below(s, 200 * TD_MS), &(sim_event){.fn = on_leave, .p = g});
    }
    for (uint32_t c = 0; c < g->request.n; c++)
        if ((s->faults & SIM_F_STOP) && sim_below(s, 4) == 0)
            g->stop_after[c] = 1 + (uint32_t)sim_below(s, g->request.max_tokens);
}

void sim_client_start(sim *s, uint32_t n)
{
    static const uint32_t lengths[] = {1, 17, 40, 40, 63, 64, 65, 130, 130, 200, 300};
    sim_router *r = &s->router;
    for (uint32_t i = 0; i < n; i++) {
        sim_gen *g = &r->gens[r->n_gens++];
        uint64_t at = 10 * TD_MS + sim_below(s, 3 * TD_S),
                 timeout = 10 * TD_S + sim_below(s, 2 * TD_S);
        g->patient = 1;
        if ((s->faults & SIM_F_DEADLINE) && sim_below(s, 3) == 0) {
            timeout = TD_MS + sim_below(s, 300 * TD_MS);
            g->patient = 0;
        }
        g->request = (sim_request){
            .id = i,
            .seed = sim_hash(s->seed, i, 77, 0),
            .n_prompt = lengths[sim_below(s, TD_ARRAY_LEN(lengths))],
            .n = sim_below(s, 3) ? 1 : 1 + (uint32_t)sim_below(s, SIM_CHOICES_MAX),
            .max_tokens = sim_below(s, 8) ? 1 + (uint32_t)sim_below(s, SIM_TOKENS_MAX) : 1};
        td_life_config c = {.n_choices = g->request.n,
                            .max_tokens = g->request.max_tokens,
                            .deadline_us = at + timeout,
                            .stall_us = STALL_US,
                            .allow_local = s->local > 0};
        td_life_init(&g->life, &c);
        g->submitted_us = at;
        sim_at(s, at, &(sim_event){.fn = on_submit, .p = g});
        plan_client(s, g, at);
    }
}

/* ---- the oracle: promise 2, and through the tokens promises 1 and 3 ---- */

void sim_client_run(sim *s, sim_gen *g, const sim_run *r)
{
    if (g->ended)
        sim_fail(s, "request %u: tokens after the end", g->request.id);
    if (r->index != g->got[r->choice])
        sim_fail(s, "request %u choice %u: index %u after %u tokens", g->request.id, r->choice,
                 r->index, g->got[r->choice]);
    for (uint32_t i = 0; i < r->n && !s->failed; i++) {
        uint32_t index = r->index + i;
        if (r->ids[i] != sim_token(g->request.seed, r->choice, index))
            sim_fail(s, "request %u choice %u: wrong token %u, attempt %u", g->request.id,
                     r->choice, index, g->life.attempt);
        if (index >= sim_length(&g->request, r->choice))
            sim_fail(s, "request %u choice %u: token %u behind the last", g->request.id, r->choice,
                     index);
    }
    g->got[r->choice] += r->n;
    s->tally->tokens += r->n;
    if (!!r->finish != (g->got[r->choice] == sim_length(&g->request, r->choice)) ||
        (r->finish && r->finish != sim_finish(&g->request, r->choice, g->got[r->choice] - 1)))
        sim_fail(s, "request %u choice %u: finish %u at token %u", g->request.id, r->choice,
                 r->finish, g->got[r->choice]);
    if (r->finish)
        g->finished[r->choice] = 1;
    if (g->stop_after[r->choice] && g->got[r->choice] >= g->stop_after[r->choice] &&
        !g->stopped[r->choice]) {
        g->stopped[r->choice] = 1;
        td_life_event ev = {.kind = TD_LIFE_EV_END_CHOICE, .choice = r->choice};
        sim_router_event(s, g, &ev);
    }
}

/* Which typed errors a world may produce. */
static int is_allowed(const sim *s, const sim_gen *g, td_error error)
{
    uint32_t f = s->faults;
    switch (error) {
    case TD_ERROR_NONE:
        return 1;
    case TD_ERROR_CANCELLED:
        return !g->patient && (f & SIM_F_CANCEL);
    case TD_ERROR_DEADLINE:
        /* Exactly then. A patient client's is seconds after the faults have stopped: it meets it
         * only when a frame vanished or was overtaken without a trace, which no connection-oriented
         * transport does. */
        return s->now == g->life.config.deadline_us &&
               (!g->patient || (f & (SIM_F_DROP | SIM_F_REORDER | SIM_F_MALFORM)));
    case TD_ERROR_INTERNAL: /* a worker broke the protocol: only when its frames are damaged on the
                               way */
        return (f & SIM_F_MALFORM) != 0;
    case TD_ERROR_DATA_LOSS:
        return (f & (SIM_F_DROP | SIM_F_REORDER | SIM_F_KV_DROP | SIM_F_KV_FLIP | SIM_F_MALFORM)) !=
               0;
    case TD_ERROR_OVERLOADED: /* a stream that has begun keeps asking for room */
        return (f & SIM_F_HARM) != 0 && !td_life_is_resume(&g->life);
    case TD_ERROR_WORKER_LOST:
    case TD_ERROR_NO_DECODE:
    case TD_ERROR_NO_PREFILL:
        return (f & SIM_F_HARM) != 0;
    default: /* NONDETERMINISM: the fake model is a function */
        return 0;
    }
}

void sim_client_end(sim *s, sim_gen *g, td_error error)
{
    if (g->ended)
        sim_fail(s, "request %u: a second terminal, %s", g->request.id, td_error_get(error)->name);
    g->ended = 1;
    g->error = error;
    g->end_us = s->now;
    s->tally->errors[error]++;
    s->tally->ok += error == TD_ERROR_NONE;
    if (error == TD_ERROR_NONE && g->life.n_redispatch && td_life_is_resume(&g->life))
        s->tally->resumes_ok++;
    if (s->now > g->life.config.deadline_us)
        sim_fail(s, "request %u: ended %llu us after its deadline", g->request.id,
                 (unsigned long long)(s->now - g->life.config.deadline_us));
    if (!is_allowed(s, g, error))
        sim_fail(s, "request %u: ended with %s, deadline %llu, faults %x", g->request.id,
                 error == TD_ERROR_NONE ? "none" : td_error_get(error)->name,
                 (unsigned long long)g->life.config.deadline_us, s->faults);
    for (uint32_t c = 0; c < g->request.n && error == TD_ERROR_NONE; c++)
        if (!g->finished[c] && !g->stopped[c])
            sim_fail(s, "request %u choice %u: complete after %u of %u tokens", g->request.id, c,
                     g->got[c], sim_length(&g->request, c));
    sim_log(s, "request %u ends: %s attempt %u", g->request.id,
            error == TD_ERROR_NONE ? "none" : td_error_get(error)->name, g->life.attempt);
}

void sim_client_check_end(sim *s)
{
    for (uint32_t i = 0; i < s->router.n_gens; i++)
        if (s->router.gens[i].live && !s->router.gens[i].ended)
            sim_fail(s, "request %u has no end, phase %d attempt %u", i,
                     (int)s->router.gens[i].life.phase, s->router.gens[i].life.attempt);
}
