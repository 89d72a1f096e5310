/* SPDX-License-Identifier: Apache-2.0 */
/* Bounded single-producer single-consumer ring of pointers with an eventfd: how a worker's threads
 * talk. One thread pushes, one pops; nothing else is shared. Ownership of a pointed-to object moves
 * with it. */
#ifndef TD_BASE_RING_H
#define TD_BASE_RING_H

#include <stddef.h>

typedef struct td_ring td_ring;

/* n is rounded up to a power of two. 0, -ENOMEM, or the eventfd's errno. */
int td_ring_new(size_t n, td_ring **ret_ring);
void td_ring_free(td_ring *r);
/* Producer. 0, or -EAGAIN when full. Wakes a consumer that sleeps on the descriptor. */
int td_ring_push(td_ring *r, void *item);
/* Consumer. Next item or NULL when empty. */
void *td_ring_pop(td_ring *r);
/* Consumer: descriptor that becomes readable when items arrive after td_ring_clear().
 * Level-triggered. */
int td_ring_fd(const td_ring *r);
/* Consumer: reset the descriptor; pop until NULL after this, or a wake-up is lost. */
void td_ring_clear(td_ring *r);
/* Either side: items queued (a moment's view). */
size_t td_ring_len(const td_ring *r);
/* Consumer: wait until an item is there or timeout_us passed; spins spin_us first. 1 item, 0
 * timeout. */
int td_ring_wait(td_ring *r, unsigned spin_us, long timeout_us);

#endif
