/* SPDX-License-Identifier: Apache-2.0 */
/* How the threads of a worker wait for each other. */
#ifndef TD_HANDOFF_WAIT_H
#define TD_HANDOFF_WAIT_H

#include <stdint.h>

#include "base/ring.h"

/* Messages between threads begin with this; the receiver looks at kind. */
typedef struct td_msg {
    int kind;
} td_msg;

/* Says nothing but "look again": sent where a flag was set. Lost when the ring is full, for then
 * its consumer is awake. */
extern td_msg td_msg_wake;

/* Consumer of two rings: spin for at most spin_us, then sleep until an item is in either or
 * timeout_us passed (< 0: for ever). */
void td_wait_two(td_ring *a, td_ring *b, unsigned spin_us, int64_t timeout_us);

/* Push, waiting while the ring is full. Only towards a consumer that never waits for this producer.
 */
void td_push_wait(td_ring *r, void *item);

#endif
