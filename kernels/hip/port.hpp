/* SPDX-License-Identifier: Apache-2.0 */
/* One kernel source for three compilers: clang for gfx942 and gfx950 (no ROCm headers or device
 * libraries), nvcc for sm_90, g++ for the emulation. Lanes, waves, barriers, LDS, atomics. A block
 * has 4 waves, always. No float atomics: sums are trees that do not depend on arrival. */
#ifndef TD_KERNELS_HIP_PORT_HPP
#define TD_KERNELS_HIP_PORT_HPP

#include "kernels/kernels.h"
#include "kernels/kplan.h"

#if defined(TD_EMU) /* TD_EMU is the wave size: 64 or 32 */

#include "kernels/hip/emu.hpp"
#define K_WAVE TD_EMU
#define K_DEV  static inline
#define K_DEV_MEMBER
#define K_UNROLL
#define K_KEEP_LOOP
/* The emulation calls kernels through one pointer type. */
#define K_KERNEL(name, T)                                                                          \
    static void name##_body(const T &a);                                                           \
    static void name(const void *p)                                                                \
    {                                                                                              \
        name##_body(*static_cast<const T *>(p));                                                   \
    }                                                                                              \
    static void name##_body(const T &a)

K_DEV unsigned k_tid()
{
    return td_emu::tid();
}
K_DEV unsigned k_block()
{
    return td_emu::block_id();
}
K_DEV unsigned k_lane()
{
    return td_emu::tid() % K_WAVE;
}
K_DEV void k_sync()
{
    td_emu::block_sync();
}
template <class T> K_DEV T *k_lds()
{
    return static_cast<T *>(td_emu::lds());
}
struct k_shuffle_in {
    uint32_t value, from;
};
K_DEV void k_shuffle_all(td_emu::wave_table *t)
{
    for (unsigned l = 0; l < K_WAVE; l++) {
        if (!(t->who >> l & 1))
            continue;
        k_shuffle_in in;
        memcpy(&in, t->in[l], sizeof in);
        if (!(t->who >> in.from & 1))
            td_emu::die("shuffle from a lane that takes no part");
        memcpy(t->out[l], t->in[in.from], 4);
    }
}
K_DEV uint32_t k_shuffle_u32(uint32_t v, unsigned from)
{
    k_shuffle_in in = {v, from % K_WAVE};
    td_emu::wave_op(k_shuffle_all, &in, sizeof in, &v, sizeof v);
    return v;
}
K_DEV void k_ballot_all(td_emu::wave_table *t)
{
    uint64_t r = 0;
    for (unsigned l = 0; l < K_WAVE; l++)
        r |= (t->who >> l & 1) && t->in[l][0] ? 1ull << l : 0;
    for (unsigned l = 0; l < K_WAVE; l++)
        memcpy(t->out[l], &r, 8);
}
K_DEV uint64_t k_ballot(bool p)
{
    uint64_t r;
    unsigned char in = p;
    td_emu::wave_op(k_ballot_all, &in, 1, &r, sizeof r);
    return r;
}
K_DEV void k_wave_sync()
{
    k_ballot(true);
}
K_DEV void k_add_u32(uint32_t *p, uint32_t v)
{
    *p += v;
}
K_DEV void k_add_u64(uint64_t *p, uint64_t v)
{
    *p += v;
}
K_DEV float k_fma(float a, float b, float c)
{
    return __builtin_fmaf(a, b, c);
}
K_DEV float k_sqrt(float a)
{
    return __builtin_sqrtf(a);
}
K_DEV unsigned k_popcount(uint64_t v)
{
    return (unsigned)__builtin_popcountll(v);
}

#elif defined(__CUDACC__)

#define K_WAVE            32
#define K_DEV             static __device__ __forceinline__
#define K_DEV_MEMBER      __device__ __forceinline__
#define K_UNROLL          _Pragma("unroll")
#define K_KEEP_LOOP       _Pragma("unroll 1")
#define K_KERNEL(name, T) extern "C" __global__ void __launch_bounds__(4 * K_WAVE) name(const T a)

extern __shared__ __align__(16) unsigned char k_lds_bytes[];

K_DEV unsigned k_tid()
{
    return threadIdx.x;
}
K_DEV unsigned k_block()
{
    return blockIdx.x;
}
K_DEV unsigned k_lane()
{
    return threadIdx.x % K_WAVE;
}
K_DEV void k_sync()
{
    __syncthreads();
}
template <class T> K_DEV T *k_lds()
{
    return reinterpret_cast<T *>(k_lds_bytes);
}
K_DEV uint32_t k_shuffle_u32(uint32_t v, unsigned from)
{
    return __shfl_sync(~0u, v, (int)from);
}
K_DEV uint64_t k_ballot(bool p)
{
    return __ballot_sync(~0u, p);
}
K_DEV void k_wave_sync()
{
    __syncwarp();
}
K_DEV void k_add_u32(uint32_t *p, uint32_t v)
{
    atomicAdd(p, v);
}
K_DEV void k_add_u64(uint64_t *p, uint64_t v)
{
    atomicAdd(reinterpret_cast<unsigned long long *>(p), (unsigned long long)v);
}
K_DEV float k_fma(float a, float b, float c)
{
    return __fmaf_rn(a, b, c);
}
K_DEV float k_sqrt(float a)
{
    return __fsqrt_rn(a);
}
K_DEV unsigned k_popcount(uint64_t v)
{
    return (unsigned)__popcll(v);
}

#else /* amdgcn by clang */

#define K_WAVE       64
#define K_DEV        static __attribute__((device)) inline __attribute__((always_inline))
#define K_DEV_MEMBER __attribute__((device)) __attribute__((always_inline))
#define K_UNROLL     _Pragma("unroll")
#define K_KEEP_LOOP  _Pragma("unroll 1")
#define K_KERNEL(name, T)                                                                          \
    extern "C" __attribute__((global))                                                             \
    __attribute__((amdgpu_flat_work_group_size(4 * K_WAVE, 4 * K_WAVE))) void                      \
    name(const T a)

extern __attribute__((shared)) __attribute__((aligned(16))) unsigned char k_lds_bytes[];

K_DEV unsigned k_tid()
{
    return __builtin_amdgcn_workitem_id_x();
}
K_DEV unsigned k_block()
{
    return __builtin_amdgcn_workgroup_id_x();
}
K_DEV unsigned k_lane()
{
    return __builtin_amdgcn_workitem_id_x() % K_WAVE;
}
/* A bare s_barrier is no fence: the compiler moved it ahead of the LDS waits. */
K_DEV void k_sync()
{
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
    __builtin_amdgcn_s_barrier();
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}
template <class T> K_DEV T *k_lds()
{
    return reinterpret_cast<T *>(k_lds_bytes);
}
K_DEV uint32_t k_shuffle_u32(uint32_t v, unsigned from)
{
    return (uint32_t)__builtin_amdgcn_ds_bpermute((int)(from << 2), (int)v);
}
K_DEV uint64_t k_ballot(bool p)
{
    return __builtin_amdgcn_ballot_w64(p);
}
K_DEV void k_wave_sync()
{
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "wavefront");
    __builtin_amdgcn_wave_barrier();
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "wavefront");
}
K_DEV void k_add_u32(uint32_t *p, uint32_t v)
{
    __hip_atomic_fetch_add(p, v, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
}
K_DEV void k_add_u64(uint64_t *p, uint64_t v)
{
    __hip_atomic_fetch_add(p, v, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
}
K_DEV float k_fma(float a, float b, float c)
{
    return __builtin_fmaf(a, b, c);
}
K_DEV float k_sqrt(float a)
{
    return __builtin_sqrtf(a);
}
K_DEV unsigned k_popcount(uint64_t v)
{
    return (unsigned)__builtin_popcountll(v);
}

#endif

enum { K_WAVES = 4, K_THREADS = K_WAVES * K_WAVE };

/* A pointer that lies in memory: read it as one to device memory, so that loads through it are
 * global ones; the compiler cannot know that it does not point to LDS. */
#if defined(__AMDGCN__)
template <class T> K_DEV T *k_global(T *const &p)
{
    typedef __attribute__((address_space(1))) T *global;
    const void *at = &p;
    return (T *)*static_cast<const global *>(at);
}
#else
template <class T> K_DEV T *k_global(T *p)
{
    return p;
}
#endif

K_DEV unsigned k_wave()
{
    return k_tid() / K_WAVE;
}

K_DEV uint32_t k_bits(float f)
{
    uint32_t u;
    __builtin_memcpy(&u, &f, 4);
    return u;
}

K_DEV float k_float(uint32_t u)
{
    float f;
    __builtin_memcpy(&f, &u, 4);
    return f;
}

K_DEV float k_shuffle(float v, unsigned from)
{
    return k_float(k_shuffle_u32(k_bits(v), from));
}

K_DEV float k_shuffle_xor(float v, unsigned mask)
{
    return k_shuffle(v, k_lane() ^ mask);
}

K_DEV float k_inf()
{
    return k_float(0x7f800000u);
}

/* A tree over the lanes of a wave; every lane gets the same sum. */
K_DEV float k_wave_sum(float v)
{
    K_UNROLL
    for (unsigned o = K_WAVE / 2; o > 0; o /= 2)
        v += k_shuffle_xor(v, o);
    return v;
}

/* Over the block; every thread gets the same sum. room: K_WAVES floats of LDS. */
K_DEV float k_block_sum(float v, float *room)
{
    v = k_wave_sum(v);
    if (k_lane() == 0)
        room[k_wave()] = v;
    k_sync();
    v = (room[0] + room[1]) + (room[2] + room[3]);
    k_sync();
    return v;
}

#endif
