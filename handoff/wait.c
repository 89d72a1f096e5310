/* SPDX-License-Identifier: Apache-2.0 */
#include "handoff/wait.h"

#include <limits.h>
#include <poll.h>
#include <unistd.h>

#include "base/bug.h"
#include "base/clock.h"
#include "base/banned.h"

td_msg td_msg_wake;

static int any(const td_ring *a, const td_ring *b)
{
    return td_ring_len(a) > 0 || td_ring_len(b) > 0;
}

void td_wait_two(td_ring *a, td_ring *b, unsigned spin_us, int64_t timeout_us)
{
    for (uint64_t end = td_now_us() + spin_us; td_now_us() < end;) {
        if (any(a, b))
            return;
        __builtin_ia32_pause();
    }
    td_ring_clear(a);
    td_ring_clear(b);
    if (any(a, b)) /* came between the look and the clear */
        return;
    struct pollfd fds[2] = {{.fd = td_ring_fd(a), .events = POLLIN},
                            {.fd = td_ring_fd(b), .events = POLLIN}};
    (void)poll(fds, 2,
               timeout_us < 0 ? -1 : (int)TD_MIN((timeout_us + 999) / 1000, (int64_t)INT_MAX));
}

void td_push_wait(td_ring *r, void *item)
{
    while (td_ring_push(r, item) < 0)
        usleep(50);
}
