/* SPDX-License-Identifier: Apache-2.0 */
/* One Prefill call on its way through the three threads. The loop makes it and frees it; between
 * those the lane owns it.
 *
 * loop -> lane   arrive
 * lane -> mover  open, add ..., then exactly one of commit and drop; none when there is no ticket
 * mover -> lane  pushed, exactly one: after the last of those, when no frame of it is in flight
 * lane -> loop   reply (first tokens; not when the job failed before them), then end, exactly one
 *
 * The flags cancel and drop may be set at any time before end and pushed. */
#ifndef TD_PREFILL_WORKER_JOB_H
#define TD_PREFILL_WORKER_JOB_H

#include <stdatomic.h>
#include <stdint.h>

#include "engine/engine.h"
#include "handoff/push.h"
#include "worker/job.h"

struct Tandem__V1__PrefillRequest;

enum td_prefill_msg {
    TD_PREFILL_OPEN = TD_WORKER_OWN,
    TD_PREFILL_ADD,
    TD_PREFILL_COMMIT,
    TD_PREFILL_DROP,
    TD_PREFILL_PUSHED,
    TD_PREFILL_REPLY
};

typedef struct td_prefill_job td_prefill_job;

/* Rows that are final; heap, freed by the mover. */
typedef struct td_prefill_add {
    td_msg head;
    td_prefill_job *job;
    uint32_t n;
    td_push_block blocks[];
} td_prefill_add;

struct td_prefill_job {
    td_worker_job base;
    td_worker_msg_of open, final, pushed, reply;
    _Atomic uint32_t failed; /* td_code; the push failed already; mover -> lane */

    /* loop */
    struct Tandem__V1__PrefillRequest *message;

    /* lane */
    td_seq *seqs[TD_CHOICES_MAX];
    uint32_t timeline; /* the one that is computed now; n_timelines when all are */
    uint32_t sent;     /* blocks of it that were given to the mover, held ones included */
    uint32_t promised; /* blocks that its later timelines will take */
    int started, attached, opened, closed, replied;
    uint64_t started_us;
    /* result */
    td_sample first[TD_CHOICES_MAX];
    td_finish finish[TD_CHOICES_MAX];
    uint32_t n_first, cached_tokens, sent_blocks;
    td_logprob *prompt_lp; /* [n_prompt], or NULL */
    uint64_t queue_us, prefill_us;

    /* mover */
    td_push *push;
    int push_done, final_seen;
    uint32_t push_code;
    char push_reason[32];
    uint64_t push_deadline_us;
};

#endif
