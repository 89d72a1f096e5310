/* SPDX-License-Identifier: Apache-2.0 */
/* Attention's inner loops, compiled for avx512 (CMake gives the flags by the file's name). */
#define CPU_TABLE td_cpu_attend_avx512
#include "kernels/cpu/attend_body.inc"

#include "base/banned.h"
