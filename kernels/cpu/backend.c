/* SPDX-License-Identifier: Apache-2.0 */
/* Life of the CPU backend, and its tables: one for each instruction set. */
#include <cpuid.h>
#include <errno.h>
#include <stdlib.h>

#include "base/bug.h"
#include "kernels/cpu/cpu.h"

#include "base/banned.h"

static int need(cpu_queue *c, void **p, size_t *have, size_t want, size_t times)
{
    if (want <= *have)
        return 0;
    size_t n = (want + want / 8 + 15) / 16 * 16;
    free(*p);
    *p = aligned_alloc(64, n * times * 4);
    *have = *p ? n : 0;
    if (*p)
        return 0;
    ref_fail(&c->q, -ENOMEM);
    return -ENOMEM;
}

int td_cpu_need_work(cpu_queue *c, size_t floats_per_thread)
{
    return need(c, (void **)&c->work, &c->work_floats, floats_per_thread, c->q.o.n_threads);
}

int td_cpu_need_operand(cpu_queue *c, size_t words)
{
    return need(c, (void **)&c->operand, &c->operand_words, words, 1);
}

int td_cpu_need_lists(cpu_queue *c, size_t words)
{
    return need(c, (void **)&c->lists, &c->list_words, words, 1);
}

static void cpu_close(td_queue *q)
{
    cpu_queue *c = cpu_queue_of(q);
    if (!c)
        return;
    td_ref_queue_done(&c->q);
    free(c->operand);
    free(c->work);
    free(c->lists);
    free(c);
}

static int cpu_open(const cpu_kernels *kernels, const td_backend_options *options,
                    td_queue **ret_queue, td_err *reterr_err)
{
    cpu_queue *c = calloc(1, sizeof *c);
    if (!c)
        return td_err_set(reterr_err, -ENOMEM, "out of memory for the kernel queue");
    c->kernels = kernels;
    int r = td_ref_queue_init(&c->q, options, reterr_err);
    if (r >= 0 && td_cpu_need_work(c, CPU_WORK_FLOATS) < 0)
        r = td_err_set(reterr_err, -ENOMEM, "out of memory for the kernel queue");
    if (r < 0) {
        cpu_close(&c->q);
        return r;
    }
    *ret_queue = &c->q;
    return 0;
}

static int open_avx2(const td_backend_options *o, td_queue **ret_queue, td_err *reterr_err)
{
    return cpu_open(&td_cpu_avx2, o, ret_queue, reterr_err);
}

static int open_avx512(const td_backend_options *o, td_queue **ret_queue, td_err *reterr_err)
{
    return cpu_open(&td_cpu_avx512, o, ret_queue, reterr_err);
}

static int open_avx512bf16(const td_backend_options *o, td_queue **ret_queue, td_err *reterr_err)
{
    return cpu_open(&td_cpu_avx512bf16, o, ret_queue, reterr_err);
}

/* What the tables share. The reference's own ops are those whose cost does not show beside a
 * product. */
#define CPU_OPS                                                                                    \
    .name = "cpu", .act_i8 = 1, .sums_slices = 1, .close = cpu_close, .finish = td_ref_finish,     \
    .mem_alloc = td_ref_mem_alloc, .mem_free = td_ref_mem_free, .copy = td_ref_copy,               \
    .weight_new = td_cpu_weight_new, .weight_fill = td_cpu_weight_fill,                            \
    .vector_new = td_cpu_vector_new, .weight_free = td_cpu_weight_free,                            \
    .weight_bytes = td_cpu_weight_bytes, .layout = "cpu-panels-2",                                 \
    .weight_packed = td_cpu_weight_packed, .weight_map = td_cpu_weight_map, .embed = td_cpu_embed, \
    .add_norm = td_cpu_add_norm, .gemm = td_cpu_gemm, .mla_write = td_ref_mla_write,               \
    .index_write = td_ref_index_write, .gqa_write = td_ref_gqa_write, .route = td_cpu_route,       \
    .moe = td_cpu_moe, .reduce_slices = td_ref_reduce_slices, .logits = td_cpu_logits,             \
    .sample = td_ref_sample, .index_select = td_cpu_index_select, .attend_mla = td_cpu_attend_mla, \
    .attend_gqa = td_cpu_attend_gqa

static const td_backend avx2 = {.isa = "avx2", .open = open_avx2, CPU_OPS};
static const td_backend avx512 = {.isa = "avx512", .open = open_avx512, CPU_OPS};
static const td_backend avx512bf16 = {.isa = "avx512bf16vnni", .open = open_avx512bf16, CPU_OPS};

/* What processor and system give: the system must keep the wide registers (XCR0). */
enum { HAS_AVX2 = 1, HAS_AVX512 = 2, HAS_BF16_VNNI = 4 };

static uint64_t xcr0(void)
{
    uint32_t a, d;
    __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    return (uint64_t)d << 32 | a;
}

static unsigned has(void)
{
    uint32_t a, b, c, d, b7, c7, have = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE) || !(c & bit_FMA) || !(c & bit_F16C))
        return 0;
    uint64_t kept = xcr0();
    if (!__get_cpuid_count(7, 0, &a, &b7, &c7, &d) || (kept & 6) != 6 || !(b7 & bit_AVX2))
        return 0;
    have = HAS_AVX2;
    uint32_t wide = bit_AVX512F | bit_AVX512BW | bit_AVX512VL | bit_AVX512DQ;
    if ((b7 & wide) != wide || (kept & 0xe6) != 0xe6)
        return have;
    have |= HAS_AVX512;
    if (c7 & bit_AVX512VNNI && __get_cpuid_count(7, 1, &a, &b, &c, &d) && a & bit_AVX512BF16)
        have |= HAS_BF16_VNNI;
    return have;
}

/* Best last. */
static const struct choice {
    const td_backend *backend;
    unsigned needs;
} choices[] = {
    {&td_backend_ref, 0}, {&avx2, HAS_AVX2}, {&avx512, HAS_AVX512}, {&avx512bf16, HAS_BF16_VNNI}};

int td_backend_known(const char *isa)
{
    for (size_t i = 0; i < TD_ARRAY_LEN(choices); i++)
        if (strcmp(isa, choices[i].backend->isa) == 0)
            return 1;
    return 0;
}

const td_backend *td_backend_get(const char *isa)
{
    int best = !isa || strcmp(isa, "auto") == 0;
    unsigned have = has();
    for (size_t i = TD_ARRAY_LEN(choices); i-- > 0;) {
        const struct choice *c = &choices[i];
        if ((best || strcmp(isa, c->backend->isa) == 0) && (have & c->needs) == c->needs)
            return c->backend;
    }
    return NULL;
}
