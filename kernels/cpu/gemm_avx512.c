/* SPDX-License-Identifier: Apache-2.0 */
/* The register tiles, compiled for avx512 (CMake gives the flags by the file's name). */
#define CPU_TABLE td_cpu_avx512
#define CPU_ISA   "avx512"
#include "kernels/cpu/gemm_body.inc"

#include "base/banned.h"
