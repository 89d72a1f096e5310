/* SPDX-License-Identifier: Apache-2.0 */
/* What this machine can do at this moment, measured beside each run: bytes read from memory and
 * operations of the widest multiply-add that a profile uses. A roof to divide by; on a shared
 * machine it moves from second to second. */
#ifndef TD_BENCH_ROOF_H
#define TD_BENCH_ROOF_H

#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "base/clock.h"

typedef enum td_roof_kind {
    TD_ROOF_FMA256,
    TD_ROOF_FMA512,
    TD_ROOF_BF16,
    TD_ROOF_INT8
} td_roof_kind;

enum { TD_ROOF_BYTES = 128 << 20, TD_ROOF_THREADS = 64, TD_ROOF_LOOPS = 1 << 20 };

/* 12 independent chains of one instruction; operands are zero, time is the same. */
#define TD_ROOF_ASM(name, isa, op, reg)                                                            \
    __attribute__((target(isa))) static inline void name(uint64_t n)                               \
    {                                                                                              \
        __asm__ volatile("vpxor %%xmm0, %%xmm0, %%xmm0\n"                                          \
                         "1:\n" op " %%" reg "0,%%" reg "0,%%" reg "1\n" op " %%" reg "0,%%" reg   \
                         "0,%%" reg "2\n" op " %%" reg "0,%%" reg "0,%%" reg "3\n" op " %%" reg    \
                         "0,%%" reg "0,%%" reg "4\n" op " %%" reg "0,%%" reg "0,%%" reg "5\n" op   \
                         " %%" reg "0,%%" reg "0,%%" reg "6\n" op " %%" reg "0,%%" reg "0,%%" reg  \
                         "7\n" op " %%" reg "0,%%" reg "0,%%" reg "8\n" op " %%" reg "0,%%" reg    \
                         "0,%%" reg "9\n" op " %%" reg "0,%%" reg "0,%%" reg "10\n" op " %%" reg   \
                         "0,%%" reg "0,%%" reg "11\n" op " %%" reg "0,%%" reg "0,%%" reg "12\n"    \
                         "dec %0\njnz 1b\nvzeroupper\n"                                            \
                         : "+r"(n)                                                                 \
                         :                                                                         \
                         : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", \
                           "xmm9", "xmm10", "xmm11", "xmm12", "cc");                               \
    }
TD_ROOF_ASM(td_roof_fma256, "avx2,fma", "vfmadd231ps", "ymm")
TD_ROOF_ASM(td_roof_fma512, "avx512f", "vfmadd231ps", "zmm")
TD_ROOF_ASM(td_roof_bf16, "avx512f", "vdpbf16ps", "zmm")
TD_ROOF_ASM(td_roof_int8, "avx512f", "vpdpbusd", "zmm")

static const struct {
    void (*run)(uint64_t n);
    const char *name;
    unsigned operations; /* of one instruction: multiplies and adds */
} td_roof_kinds[] = {[TD_ROOF_FMA256] = {td_roof_fma256, "f32", 16},
                     [TD_ROOF_FMA512] = {td_roof_fma512, "f32", 32},
                     [TD_ROOF_BF16] = {td_roof_bf16, "bf16", 64},
                     [TD_ROOF_INT8] = {td_roof_int8, "int8", 128}};

typedef struct td_roof_job {
    td_roof_kind kind;
    const uint8_t *memory; /* NULL: operations */
    uint64_t sum;
} td_roof_job;

static inline void *td_roof_thread(void *arg)
{
    typedef uint64_t v2 __attribute__((vector_size(16)));
    td_roof_job *j = arg;
    if (!j->memory) {
        td_roof_kinds[j->kind].run(TD_ROOF_LOOPS);
        return NULL;
    }
    v2 s[8] = {{0}};
    for (size_t i = 0; i < TD_ROOF_BYTES; i += sizeof s)
        for (int k = 0; k < 8; k++)
            s[k] ^= *(const v2 *)(j->memory + i + 16ul * (unsigned)k);
    for (int k = 0; k < 8; k++)
        j->sum += s[k][0] ^ s[k][1];
    return NULL;
}

/* Seconds until n threads have done their part. */
static inline double td_roof_time(td_roof_job *jobs, uint32_t n)
{
    pthread_t t[TD_ROOF_THREADS];
    uint64_t start = td_now_us();
    for (uint32_t i = 1; i < n; i++)
        if (pthread_create(&t[i], NULL, td_roof_thread, &jobs[i]) != 0)
            exit(1);
    td_roof_thread(&jobs[0]);
    for (uint32_t i = 1; i < n; i++)
        pthread_join(t[i], NULL);
    return (double)(td_now_us() - start) / 1e6;
}

/* GB/s that n threads read, each its own 128 MiB in huge pages. */
static inline double td_roof_read(uint32_t n)
{
    static uint8_t *memory[TD_ROOF_THREADS];
    td_roof_job jobs[TD_ROOF_THREADS] = {0};
    n = n < TD_ROOF_THREADS ? n : TD_ROOF_THREADS;
    for (uint32_t i = 0; i < n; i++) {
        if (!memory[i]) {
            memory[i] = aligned_alloc(2 << 20, TD_ROOF_BYTES);
            if (!memory[i])
                exit(1);
            madvise(memory[i], TD_ROOF_BYTES, MADV_HUGEPAGE);
            memset(memory[i], 1, TD_ROOF_BYTES);
        }
        jobs[i].memory = memory[i];
    }
    return (double)n * TD_ROOF_BYTES / td_roof_time(jobs, n) / 1e9;
}

/* Billions of multiplies and adds a second of n threads. */
static inline double td_roof_operations(td_roof_kind kind, uint32_t n)
{
    td_roof_job jobs[TD_ROOF_THREADS] = {0};
    n = n < TD_ROOF_THREADS ? n : TD_ROOF_THREADS;
    for (uint32_t i = 0; i < n; i++)
        jobs[i].kind = kind;
    return 12.0 * TD_ROOF_LOOPS * td_roof_kinds[kind].operations * n / td_roof_time(jobs, n) / 1e9;
}

#endif
