/* SPDX-License-Identifier: Apache-2.0 */
/* All kernels as one object, so that a driver loads one module. */
#include "kernels/hip/attend.hip"
#include "kernels/hip/gemm.hip"
#include "kernels/hip/index.hip"
#include "kernels/hip/moe.hip"
#include "kernels/hip/norm.hip"
#include "kernels/hip/sample.hip"
