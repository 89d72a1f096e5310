/* SPDX-License-Identifier: Apache-2.0 */
/* The kernel tests on the GPU backend in the emulation: every group once for each wave size and
 * lane order. Included by kernels_util.h where TD_TEST_EMU is defined (tests/kernels/gpu.cmake). */
#ifndef TD_TESTS_EMU_UTIL_H
#define TD_TESTS_EMU_UTIL_H

#include "kernels/gpu/backend.h"
#include "kernels/hip/emu_gpu.h"

static td_gpu *emulated;

static inline void open_emulation(uint32_t wave, uint32_t order, const td_backend **ret_backend)
{
    td_err err = {0};
    emulated = td_emu_gpu_new(wave, order);
    assert_non_null(emulated);
    td_emu_gpu_guard(emulated);
    if (td_gpu_backend_open(emulated, "emu", ret_backend, &err) < 0)
        fail_msg("%s", err.text);
}

static inline void close_emulation(void)
{
    td_gpu_backend_close();
    td_gpu_close(emulated);
}

/* Sanitized it is several times slower: each wave size once, in different orders. */
#ifdef TD_SANITIZED
enum { EMULATIONS_APART = 4 };
#else
enum { EMULATIONS_APART = 1 };
#endif

#define RUN_EMULATED(tests)                                                                        \
    do {                                                                                           \
        int failed_ = 0;                                                                           \
        for (uint32_t i_ = 0; i_ < 6; i_ += EMULATIONS_APART) {                                    \
            char name_[64];                                                                        \
            uint32_t wave_ = i_ < 3 ? 64 : 32;                                                     \
            snprintf(name_, sizeof name_, "wave %u, lane order %u", wave_, i_ % 3);                \
            open_emulation(wave_, i_ % 3, &under);                                                 \
            failed_ += cmocka_run_group_tests_name(name_, tests, NULL, NULL);                      \
            close_emulation();                                                                     \
        }                                                                                          \
        return failed_;                                                                            \
    } while (0)

#endif
