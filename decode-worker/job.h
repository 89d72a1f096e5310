/* SPDX-License-Identifier: Apache-2.0 */
/* One Reserve call on its way through the three threads. The loop makes it and frees it; between
 * those the lane owns it.
 *
 * loop -> lane   arrive
 * lane -> mover  grant
 * mover -> lane  settled, exactly one after a grant: delivered or released
 * lane -> loop   ticket, then committed, then steps that name the job, then end, exactly one
 * The flags cancel and fence may be set at any time before end and settled. */
#ifndef TD_DECODE_WORKER_JOB_H
#define TD_DECODE_WORKER_JOB_H

#include <stdatomic.h>
#include <stdint.h>

#include "base/list.h"
#include "base/strbuf.h"
#include "engine/engine.h"
#include "handoff/receive.h"
#include "handoff/request.h"
#include "handoff/wait.h"
#include "rpc/rpc.h"

struct Tandem__V1__ReserveRequest;

enum td_decode_msg {
    TD_DECODE_WAKE, /* td_msg_wake */
    TD_DECODE_ARRIVE,
    TD_DECODE_GRANT,
    TD_DECODE_SETTLED,
    TD_DECODE_TICKET,
    TD_DECODE_COMMITTED,
    TD_DECODE_STEP,
    TD_DECODE_END,
    TD_DECODE_FLUSH, /* loop -> lane -> loop */
    TD_DECODE_DEAD   /* lane -> loop: the engine is beyond use */
};

typedef struct td_decode_job td_decode_job;

typedef struct td_decode_msg_of {
    td_msg head;
    td_decode_job *job;
} td_decode_msg_of;

/* One engine step's tokens; heap, freed by the loop. */
typedef struct td_decode_token {
    td_decode_job *job;
    uint32_t at, index; /* which of the job's choices; emitted tokens before this one */
    td_finish finish;
    td_sample sample;
} td_decode_token;

typedef struct td_decode_step {
    td_msg head;
    uint64_t step;
    uint32_t n;
    td_decode_token tokens[];
} td_decode_step;

typedef struct td_decode_flush {
    td_msg head;
    td_call *call;
    uint32_t blocks;
} td_decode_flush;

/* Tokens of one choice that are not sent yet: at most what the router's credit made wait. */
typedef struct td_decode_pending {
    uint32_t index, n;             /* of the first; how many */
    td_strbuf ids, logprobs, tops; /* u32, f32, td_logprob each */
    td_finish finish;
} td_decode_pending;

struct td_decode_job {
    td_decode_msg_of arrive, grant, settled, ticket, committed, end;
    _Atomic uint32_t cancel; /* td_code; loop -> lane */
    _Atomic uint32_t fence;  /* td_code; lane -> mover */

    /* loop */
    td_list loop_node, dirty_node;
    td_call *call;
    struct Tandem__V1__ReserveRequest *message;
    td_request request;
    uint64_t deadline_us;
    td_decode_pending pending[TD_CHOICES_MAX];
    int say_committed, ended;
    uint32_t n_sent;

    /* lane */
    td_list lane_node;
    td_seq *seqs[TD_CHOICES_MAX]; /* before the commit one a timeline, after it one a choice; NULL:
                                     ended */
    uint32_t n_seqs;
    td_block *spare; /* held for the choices that are forked at the commit */
    uint32_t n_spare, held_blocks, generation;
    int granted, running;
    uint8_t ticket_id[16];
    td_receive_block *blocks;
    td_in_first first[TD_CHOICES_MAX];
    uint32_t code;
    td_error error;
    char text[200];

    /* mover */
    td_list mover_node;
    int delivered;
    uint32_t ids[TD_CHOICES_MAX];
    uint32_t settled_code;
    td_drop settled_why;
    td_receive_figures figures;
};

#endif
