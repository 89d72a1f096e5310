/* SPDX-License-Identifier: Apache-2.0 */
/* One Prefill call on its way through the three threads. The loop makes it and frees it; between
 * those the lane owns it.
 *
 * loop -> lane   arrive
 * lane -> mover  open, add ..., then exactly one of commit and drop; none when there is no ticket
 * mover -> lane  pushed, exactly one: after the last of those, when no frame of it is in flight
 * lane -> loop   reply (first tokens; not when the job failed before them), then end, exactly one
 *
 * Where the pool is on a device, add, commit and drop carry a mark (engine/kv.h): the mover acts on
 * them when the copies before it are made, or the job was dropped.
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

/* A message that waits with the mover for its copies. */
typedef struct td_prefill_held {
    td_list node;
    td_msg *msg;
    td_prefill_job *job;
    uint64_t mark; /* set by the lane */
} td_prefill_held;

/* Rows that are final; heap, freed by the mover. */
typedef struct td_prefill_add {
    td_msg head;
    td_prefill_job *job;
    td_prefill_held held;
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
    uint32_t staging;  /* blocks that it may stage */
    td_block *staged;  /* [staging], the first n_staged are */
    uint32_t n_staged;
    uint64_t mark; /* of its last copies */
    int started, attached, opened, closed, replied;
    uint64_t started_us;
    /* result */
    td_sample first[TD_CHOICES_MAX];
    td_finish finish[TD_CHOICES_MAX];
    uint32_t n_first, cached_tokens, sent_blocks;
    td_logprob *prompt_lp; /* [n_prompt], or NULL */
    uint64_t queue_us, prefill_us;

    /* mover */
    td_prefill_held final_held; /* mark and job are set by the lane */
    td_push *push;
    int push_done, final_seen;
    uint32_t push_code;
    char push_reason[32];
    uint64_t push_deadline_us;
};

#endif
