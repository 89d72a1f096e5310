/* SPDX-License-Identifier: Apache-2.0 */
/* The register tiles, compiled for avx512bf16vnni (CMake gives the flags by the file's name). */
#define CPU_TABLE td_cpu_avx512bf16
#define CPU_ISA   "avx512bf16vnni"
#include "kernels/cpu/gemm_body.inc"

#include "base/banned.h"
