/* SPDX-License-Identifier: Apache-2.0 */
/* The emulation as a td_gpu: device memory is the host's, launches run at once. arch "emu64" or
 * "emu32". For tests and for reading kernels in a debugger; not linked into any program. */
#ifndef TD_KERNELS_HIP_EMU_GPU_H
#define TD_KERNELS_HIP_EMU_GPU_H

#include "kernels/gpu/gpu.h"

#ifdef __cplusplus
extern "C" {
#endif

/* wave 64 or 32; order 0 forward, 1 backward, 2 shuffled: in which the lanes of a block run. NULL:
 * out of memory. */
td_gpu *td_emu_gpu_new(uint32_t wave, uint32_t order);

/* From now on the host may not touch device memory: under AddressSanitizer an access outside
 * launches and copies is an error; elsewhere nothing changes. */
void td_emu_gpu_guard(td_gpu *g);

/* From now on a stream runs what it holds only when somebody waits for it, or another stream does:
 * who reads a result without waiting reads something else. */
void td_emu_gpu_defer(td_gpu *g);

/* Kernels, copies and fills that ran so far. */
uint64_t td_emu_gpu_ran(td_gpu *g);

/* Graphs launched so far. */
uint64_t td_emu_gpu_graphs(td_gpu *g);

#ifdef __cplusplus
}
#endif

#endif
