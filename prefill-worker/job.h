/* SPDX-License-Identifier: Apache-2.0 */
/* One Prefill call on its way through the three threads. The loop makes it and frees it; between
 * those the lane owns it.
 *
 * loop -> lane   arrive
 * lane -> mover  open, add ..., then exactly one of commit and drop; none when there is no ticket
 * mover -> lane  pushed, exactly one, after the last of those and when no frame of the job is in
 * flight lane -> loop   reply (first tokens; not when the job failed before them), then end,
 * exactly one The flags cancel and abort may be set at any time before end and pushed. */
#ifndef TD_PREFILL_WORKER_JOB_H
#define TD_PREFILL_WORKER_JOB_H

#include <stdatomic.h>
#include <stdint.h>

#include "base/list.h"
#include "engine/engine.h"
#include "handoff/push.h"
#include "handoff/request.h"
#include "handoff/wait.h"
#include "rpc/rpc.h"

struct Tandem__V1__PrefillRequest;

enum td_job_msg {
    TD_JOB_WAKE, /* td_msg_wake */
    TD_JOB_ARRIVE,
    TD_JOB_OPEN,
    TD_JOB_ADD,
    TD_JOB_COMMIT,
    TD_JOB_DROP,
    TD_JOB_PUSHED,
    TD_JOB_REPLY,
    TD_JOB_END,
    TD_JOB_FLUSH, /* loop -> lane -> loop */
    TD_JOB_DEAD   /* lane -> loop: the engine is beyond use */
};

typedef struct td_job td_job;

typedef struct td_job_msg_of {
    td_msg head;
    td_job *job;
} td_job_msg_of;

/* Rows that are final; heap, freed by the mover. */
typedef struct td_job_add {
    td_msg head;
    td_job *job;
    uint32_t n;
    td_push_block blocks[];
} td_job_add;

typedef struct td_flush {
    td_msg head;
    td_call *call;
    uint32_t blocks;
} td_flush;

struct td_job {
    td_job_msg_of arrive, open, final, pushed, reply, end;
    _Atomic uint32_t cancel; /* td_code; loop -> lane */
    _Atomic uint32_t abort;  /* td_code; lane -> mover */
    _Atomic uint32_t failed; /* the push failed already; mover -> lane */

    /* loop */
    td_list loop_node;
    td_call *call;
    struct Tandem__V1__PrefillRequest *message;
    td_request request;
    uint64_t arrived_us, deadline_us;

    /* lane */
    td_list lane_node;
    td_seq *seqs[TD_CHOICES_MAX];
    uint32_t timeline; /* the one that is computed now; n_timelines when all are */
    uint32_t sent;     /* blocks of it that were given to the mover, held ones included */
    int started, attached, opened, closed, replied;
    uint64_t started_us;
    /* result */
    td_sample first[TD_CHOICES_MAX];
    td_finish finish[TD_CHOICES_MAX];
    uint32_t n_first, cached_tokens, sent_blocks;
    td_logprob *prompt_lp; /* [n_prompt], or NULL */
    uint64_t queue_us, prefill_us;
    uint32_t code; /* td_code at end */
    td_error error;
    char text[200];

    /* mover */
    td_list mover_node;
    td_push *push;
    int push_done, final_seen;
    uint32_t push_code;
    char push_reason[32];
    uint64_t push_deadline_us;
};

#endif
