/* SPDX-License-Identifier: Apache-2.0 */
/* What the kernels use of CUDA, over clang's builtins: enough to compile them without the toolkit
 * (test_code_objects.py). nvcc has its own. */
#ifndef TD_TESTS_STATIC_CUDA_SHIM_H
#define TD_TESTS_STATIC_CUDA_SHIM_H

/* clang-format off */
#define __global__            __attribute__((global))
#define __device__            __attribute__((device))
#define __shared__            __attribute__((shared))
#define __forceinline__       inline __attribute__((always_inline))
#define __align__(n)          __attribute__((aligned(n)))
#define __launch_bounds__(n)  __attribute__((launch_bounds(n)))
#define __CUDACC__            1

struct shim_thread {
    struct {
        __device__ operator unsigned() const { return __nvvm_read_ptx_sreg_tid_x(); }
    } x;
};
struct shim_block {
    struct {
        __device__ operator unsigned() const { return __nvvm_read_ptx_sreg_ctaid_x(); }
    } x;
};
static __device__ shim_thread threadIdx;
static __device__ shim_block blockIdx;
#define SHIM static __device__ inline
SHIM void __syncwarp() { __nvvm_bar_warp_sync(~0u); }
SHIM unsigned __shfl_sync(unsigned m, unsigned v, int l) { return __nvvm_shfl_sync_idx_i32(m, v, l, 31); }
SHIM unsigned __ballot_sync(unsigned m, bool p) { return __nvvm_vote_ballot_sync(m, p); }
SHIM unsigned atomicAdd(unsigned *p, unsigned v) { return __nvvm_atom_add_gen_i((int *)p, v); }
SHIM unsigned long long atomicAdd(unsigned long long *p, unsigned long long v) { return __nvvm_atom_add_gen_ll((long long *)p, v); }
SHIM float __fmaf_rn(float a, float b, float c) { return __nvvm_fma_rn_f(a, b, c); }
SHIM float __fsqrt_rn(float a) { return __nvvm_sqrt_rn_f(a); }
SHIM int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
/* clang-format on */

#endif
