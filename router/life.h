/* SPDX-License-Identifier: Apache-2.0 */
/* The life of one request (architecture, section 3), pure: step(state, event, now) -> actions. No
 * I/O, clock, allocation. Tokens are not kept here, only counts and each choice's last id: the
 * shell keeps what was delivered and sends it along when a later attempt has to continue.
 *
 * Invariants: index 0 comes from the prefill worker's reply exactly once and D's runs follow from
 * index 1, or all come from a D that prefills by itself (conditional split); each token once, in
 * order, per choice; exactly one TD_LIFE_END; events of an older attempt change nothing; at most
 * TD_LIFE_REDISPATCH_MAX re-dispatches after a failure. */
#ifndef TD_ROUTER_LIFE_H
#define TD_ROUTER_LIFE_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"

enum {
    TD_LIFE_CHOICES_MAX = 16,
    TD_LIFE_ACTIONS_MAX = TD_LIFE_CHOICES_MAX + 8,
    TD_LIFE_REDISPATCH_MAX = 2, /* after a failure */
    TD_LIFE_REFUSED_MAX = 12,   /* "no room" answers before a request that has no token yet ends
                                   OVERLOADED; one that has goes on asking until its deadline */
    TD_LIFE_HELD_MAX = 4096     /* tokens of D that may wait for P's reply */
};

typedef enum td_leg { TD_LEG_PREFILL = 0, TD_LEG_DECODE = 1 } td_leg;

typedef struct td_life_config {
    uint32_t n_choices;   /* 1..16 */
    uint32_t max_tokens;  /* per choice, >= 1 */
    uint64_t deadline_us; /* absolute */
    uint64_t reserve_us;  /* longest wait for a ticket; 0 = 5 s */
    uint64_t stall_us;    /* longest silence of a decoding stream, and longest standstill of the
                             worker whose prefill a request waits for; 0 = 60 s */
    int allow_local;      /* the decode worker was told that it may prefill by itself */
} td_life_config;

/* Consecutive tokens of one choice; index of the first. finish: 0 none, else the choice ends with
 * this run. */
typedef struct td_life_run {
    uint32_t choice, index;
    const uint32_t *ids;
    uint32_t n;
    int finish;
} td_life_run;

typedef enum td_life_event_kind {
    TD_LIFE_EV_START = 1, /* submitted */
    TD_LIFE_EV_PAIR,      /* a pair was chosen (or a prefill worker alone, see td_life_is_alone) */
    TD_LIFE_EV_TICKET,    /* the decode worker granted a ticket */
    TD_LIFE_EV_LOCAL,     /* in its place: it has most of the prompt and prefills the rest itself */
    TD_LIFE_EV_FIRST,   /* the prefill worker's reply: runs[0..n_runs), one id per unfinished choice
                         */
    TD_LIFE_EV_COMMIT,  /* the decode worker holds every block, or has computed them */
    TD_LIFE_EV_RUN,     /* runs[0] from the decode worker */
    TD_LIFE_EV_STATUS,  /* a leg ended: leg, code, error */
    TD_LIFE_EV_BROKEN,  /* a leg sent something malformed; it is still open */
    TD_LIFE_EV_EXPIRED, /* waited too long for a pair: error says why */
    TD_LIFE_EV_CANCEL,  /* the client left, or the router closes: error = CANCELLED or DRAINING */
    TD_LIFE_EV_END_CHOICE, /* the client has enough of `choice` */
    TD_LIFE_EV_TIMER       /* the time of the last TD_LIFE_ARM has come */
} td_life_event_kind;

typedef struct td_life_event {
    td_life_event_kind kind;
    uint32_t attempt; /* TICKET, LOCAL, FIRST, COMMIT, RUN, STATUS, BROKEN: the attempt the leg was
                         started for */
    td_leg leg;
    uint32_t code; /* td_code */
    td_error error;
    uint32_t choice;
    const td_life_run *runs;
    uint32_t n_runs;
    uint64_t progress_us; /* TIMER: when the worker of td_life_prefiller() was last seen to advance;
                             0: unknown */
} td_life_event;

typedef enum td_life_action_kind {
    TD_LIFE_DISPATCH = 1, /* find a pair, not before at_us; answer with PAIR or EXPIRED */
    TD_LIFE_RESERVE,      /* start Reserve on the chosen decode worker, attempt = td_life.attempt */
    TD_LIFE_PREFILL, /* start Prefill on the chosen prefill worker, with the ticket unless alone */
    TD_LIFE_LOCAL,   /* the chosen prefill worker is not needed: let go of it */
    TD_LIFE_CANCEL_LEG, /* cancel `leg` of the attempt that is current before this step's end */
    TD_LIFE_BLAME,      /* the worker of `leg` failed this request: prefer others */
    TD_LIFE_DELIVER,    /* hand runs[run] of this event to the client */
    TD_LIFE_HOLD,       /* keep this event (a RUN, or D's STATUS) until TD_LIFE_RELEASE or
                           TD_LIFE_DROP_HELD */
    TD_LIFE_RELEASE,    /* feed the held events again, in order */
    TD_LIFE_DROP_HELD,  /* forget the held events */
    TD_LIFE_ARM,        /* send TIMER at at_us (replaces the earlier one) */
    TD_LIFE_END         /* the request is over: error (TD_ERROR_NONE = every choice finished) */
} td_life_action_kind;

typedef struct td_life_action {
    td_life_action_kind kind;
    td_leg leg;
    uint32_t run;
    uint64_t at_us;
    td_error error;
} td_life_action;

typedef struct td_life_actions {
    uint32_t n;
    td_life_action v[TD_LIFE_ACTIONS_MAX];
} td_life_actions;

typedef enum td_life_phase {
    TD_LIFE_NEW,
    TD_LIFE_QUEUED,     /* waits for a pair */
    TD_LIFE_RESERVING,  /* waits for the ticket */
    TD_LIFE_PREFILLING, /* waits for P's reply, D's runs are held; or for D's own prefill */
    TD_LIFE_DECODING,   /* index 0 is out, or comes next from a D that has prefilled */
    TD_LIFE_ENDED
} td_life_phase;

typedef struct td_life_choice {
    uint32_t n_emitted, last_id;
    uint8_t finish; /* finished by the workers */
    uint8_t ended;  /* the client has enough: runs are dropped */
} td_life_choice;

typedef struct td_life {
    td_life_config config;
    td_life_phase phase;
    uint32_t attempt;      /* 1 at first; grows with every dispatch */
    uint32_t n_redispatch; /* after failures */
    uint32_t n_refused;    /* after "no room" */
    uint8_t leg_open[2];
    uint8_t committed;
    uint8_t local; /* this attempt has no prefill worker: D prefills */
    uint32_t held; /* tokens, and 1 for a STATUS */
    uint64_t progress_us, armed_us;
    uint64_t n_stale; /* events of older attempts, for a metric */
    td_life_choice choice[TD_LIFE_CHOICES_MAX];
} td_life;

void td_life_init(td_life *l, const td_life_config *config);
/* Advance; actions are to be done in order. Does nothing in phase ENDED. */
void td_life_step(td_life *l, const td_life_event *ev, uint64_t now_us,
                  td_life_actions *ret_actions);

/* 1: this attempt needs no decode worker (one token per choice, nothing emitted yet). */
int td_life_is_alone(const td_life *l);
/* 1: tokens went out, so the next attempt carries them and resamples the last one of each
 * unfinished choice. */
int td_life_is_resume(const td_life *l);
/* Whose prefill the request waits for in phase PREFILLING. */
td_leg td_life_prefiller(const td_life *l);
/* 1: the choice still wants tokens. */
int td_life_choice_is_open(const td_life *l, uint32_t choice);
uint64_t td_life_n_emitted(const td_life *l);

#endif
