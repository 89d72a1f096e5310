/* SPDX-License-Identifier: Apache-2.0 */
/* Run a GPU kernel's source on the CPU: a fiber per lane, blocks one after the other. Barriers and
 * wave operations are rendezvous points; lanes run in one of three orders. What it finds: lanes
 * waiting at different points, wave operations with lanes missing, reads of LDS that nobody wrote
 * (it is filled with NaN), races whose outcome depends on the lane order, and, under ASan, accesses
 * out of bounds. What it does not model: memory ordering. One launch at a time in a thread. */
#ifndef TD_KERNELS_HIP_EMU_HPP
#define TD_KERNELS_HIP_EMU_HPP

#include <stdint.h>
#include <string.h>

namespace td_emu
{

enum { WAVE_MAX = 64, SLOT = 192, LANES_MAX = 256 };

/* What the lanes of a wave bring to an operation, and what they take away. */
struct wave_table {
    uint64_t who; /* lanes that came */
    alignas(16) unsigned char in[WAVE_MAX][SLOT];
    alignas(16) unsigned char out[WAVE_MAX][SLOT];
};

typedef void (*kernel_fn)(const void *args);
typedef void (*wave_fn)(wave_table *t);

struct launch_dim {
    uint32_t grid, block, lds_bytes, wave, order;
};

/* Run a grid to its end. */
void run(kernel_fn fn, const void *args, launch_dim dim);

/* Of the calling lane. */
unsigned tid();
unsigned block_id();
unsigned grid_dim();
void *lds();
void block_sync();
/* Deposit in; when the last live lane has come, fn fills the table's out; each takes its own. */
void wave_op(wave_fn fn, const void *in, size_t in_bytes, void *out, size_t out_bytes);
[[noreturn]] void die(const char *why);

} // namespace td_emu

#endif
