/* SPDX-License-Identifier: Apache-2.0 */
/* One Reserve call on its way through the three threads. The loop makes it and frees it; between
 * those the lane owns it.
 *
 * loop -> lane   arrive
 * lane -> mover  grant
 * mover -> lane  settled, exactly one after a grant: delivered or released
 * lane -> loop   ticket, then committed, then steps that name the job, then end, exactly one
 *
 * Where the pool is on a device, blocks enter it as they arrive (engine/kv.h): mover -> lane
 * arrived, any number before settled; those of which the lane does not hear so enter when all are
 * delivered.
 *
 * A local prefill has no grant: the lane computes what its blocks lack. Its ticket message says so.
 *
 * The flags cancel and drop may be set at any time before end and settled. */
#ifndef TD_DECODE_WORKER_JOB_H
#define TD_DECODE_WORKER_JOB_H

#include <stdint.h>

#include "base/strbuf.h"
#include "engine/engine.h"
#include "handoff/receive.h"
#include "rpc/mac.h"
#include "worker/job.h"

struct Tandem__V1__ReserveRequest;

enum td_decode_msg {
    TD_DECODE_GRANT = TD_WORKER_OWN,
    TD_DECODE_ARRIVED,
    TD_DECODE_SETTLED,
    TD_DECODE_TICKET,
    TD_DECODE_COMMITTED,
    TD_DECODE_STEP
};

typedef struct td_decode_job td_decode_job;

/* Blocks of a grant that are whole; heap, freed by the lane. */
typedef struct td_decode_arrived {
    td_msg head;
    td_decode_job *job;
    uint32_t n;
    td_block blocks[];
} td_decode_arrived;

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

/* Tokens of one choice that are not sent yet: at most what the router's credit made wait. */
typedef struct td_decode_pending {
    uint32_t index, n;             /* of the first; how many */
    td_strbuf ids, logprobs, tops; /* u32, f32, td_logprob each */
    td_finish finish;
} td_decode_pending;

struct td_decode_job {
    td_worker_job base;
    td_worker_msg_of grant, settled, ticket, committed;

    /* loop */
    td_list dirty_node;
    struct Tandem__V1__ReserveRequest *message;
    uint32_t local_limit; /* tokens that may be prefilled here; 0: none */
    td_decode_pending pending[TD_CHOICES_MAX];
    int say_committed, ended;
    uint32_t n_sent;

    /* lane */
    td_seq *seqs[TD_CHOICES_MAX]; /* before the commit one a timeline, after it one a choice; NULL:
                                     ended */
    uint32_t n_seqs;
    td_block *spare; /* held for the choices that are forked at the commit */
    uint32_t n_spare, held_blocks, generation;
    int granted, running;
    int entering; /* delivered; its blocks are being copied to the device, until `mark` */
    uint64_t mark;
    td_block *staged; /* [n_staged]; the first n_entered are on their way to the device */
    uint32_t n_staged, n_entered;
    int copying;           /* a copy was asked for */
    int prefilling;        /* here; running when that is done */
    uint32_t local_tokens; /* prefilled here; 0: by a prefill worker */
    uint64_t started_us, prefill_us;
    uint8_t ticket_id[16];
    uint8_t mac_key[TD_MAC_KEY_BYTES]; /* of the ticket, on a private KV link */
    td_receive_block *blocks;
    td_in_first first[TD_CHOICES_MAX];

    /* mover */
    int delivered;
    uint32_t ids[TD_CHOICES_MAX];
    uint32_t settled_code;
    td_drop settled_why;
    td_receive_figures figures;
};

#endif
