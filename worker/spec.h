/* SPDX-License-Identifier: Apache-2.0 */
/* From a request to the engine's sequence: one way for both kinds of worker, so that both sample
 * alike. Lane thread. */
#ifndef TD_WORKER_SPEC_H
#define TD_WORKER_SPEC_H

#include "base/err.h"
#include "engine/engine.h"
#include "handoff/request.h"

/* A sequence for timeline t of the request (no blocks yet), sampling as `choice`. Errors as
 * td_seq_new(). */
int td_worker_seq(td_engine *e, const td_request *r, uint32_t timeline, uint32_t choice,
                  td_seq **ret_seq, td_err *reterr_err);

#endif
