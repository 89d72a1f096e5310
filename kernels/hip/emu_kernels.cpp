/* SPDX-License-Identifier: Apache-2.0 */
/* Every kernel compiled for the emulation with TD_EMU lanes in a wave, and their table by name. Two
 * copies meet in one program, so all that depends on the wave size lies in a nameless namespace. */
#include "kernels/hip/args.h"
#include "kernels/hip/emu.hpp"
#include "kernels/kernels.h"
#include "kernels/kplan.h"
#include "kernels/sample.h"

namespace
{
#include "kernels/hip/all.hip"
}

#if TD_EMU == 64
#define EMU_TABLE td_emu_kernels_64
#else
#define EMU_TABLE td_emu_kernels_32
#endif

struct td_emu_kernel {
    const char *name;
    td_emu::kernel_fn fn;
};

extern "C" {
extern const td_emu_kernel EMU_TABLE[];
const td_emu_kernel EMU_TABLE[] = {
#define TD_KERNEL(name) {#name, name},
#if TD_EMU != 64
#define TD_KERNEL_SCALED(name)
#endif
#include "kernels/hip/list.def"
#undef TD_KERNEL
    {nullptr, nullptr}};
}
