/* SPDX-License-Identifier: Apache-2.0 */
/* The prefill worker's end of shared memory: lends its pool to one decode worker. Mover thread
 * only.
 *
 * The pool can be read by the peer from READY until td_shm_line_withdraw(), whatever the peer does:
 * after that a copy that it has not checked yet is void (handoff/shm_door.h), so blocks may be used
 * again at once. Nothing is lent that the peer could write (F_SEAL_FUTURE_WRITE) or that it could
 * be made to lose (F_SEAL_SHRINK). */
#ifndef TD_HANDOFF_SHM_LINE_H
#define TD_HANDOFF_SHM_LINE_H

#include <stdint.h>
#include <sys/types.h>

#include "base/err.h"
#include "handoff/shm.h"

typedef enum td_shm_line_state {
    TD_SHM_ASKED,
    TD_SHM_READY,
    TD_SHM_REFUSED, /* never became ready: td_shm_line_why() */
    TD_SHM_LOST     /* the peer ended the connection, or ended */
} td_shm_line_state;

typedef struct td_shm_line td_shm_line;

typedef struct td_shm_line_config {
    const td_shm_offer *offer; /* of the ticket */
    int pool_fd;               /* memfd, sealed; stays the caller's */
    uint8_t prefill_epoch[16], decode_epoch[16], layout_hash[16];
    uint64_t number; /* of this connection; never twice in one prefill epoch */
    uid_t uid;       /* whose sockets are trusted: geteuid() */
} td_shm_line_config;

/* Connect and pass the pool; the answer comes later. Does not block. -EPERM the socket is another
 * user's; -ENOTSUP the pool is not sealed; -ENOENT, -ECONNREFUSED nobody is there; -errno; with
 * text. */
int td_shm_line_open(const td_shm_line_config *config, uint64_t now_us, td_shm_line **ret_line,
                     td_err *reterr_err);
/* Withdraws first. NULL is fine. */
void td_shm_line_close(td_shm_line *l);
/* Hear the answer, or the end; see the timeout. */
td_shm_line_state td_shm_line_run(td_shm_line *l, uint64_t now_us);
/* Why REFUSED: a refusal's name, "timeout" or "closed". Borrowed. */
const char *td_shm_line_why(const td_shm_line *l);
/* To wait for reading. */
int td_shm_line_fd(const td_shm_line *l);
uint64_t td_shm_line_number(const td_shm_line *l);
/* When td_shm_line_run() has something to do by itself; UINT64_MAX = never. */
uint64_t td_shm_line_due(const td_shm_line *l);
/* Void every copy that the peer has not checked yet. */
void td_shm_line_withdraw(td_shm_line *l);

#endif
