/* SPDX-License-Identifier: Apache-2.0 */
#include "kernels/gpu/objects.h"

#include "base/banned.h"

/* A code object wants its own pages: drivers map it. */
#define EMBED(symbol, file)                                                                        \
    __asm__(".section .rodata\n.balign 4096\n" #symbol ":\n.incbin \"" file "\"\n" #symbol         \
            "_end:\n.byte 0\n.previous\n");                                                        \
    extern const char symbol[] __attribute__((visibility("hidden")));                              \
    extern const char symbol##_end[] __attribute__((visibility("hidden")))

#ifdef TD_GFX942
EMBED(td_object_gfx942, "kernels.gfx942.hsaco");
#endif
#ifdef TD_GFX950
EMBED(td_object_gfx950, "kernels.gfx950.hsaco");
#endif
#ifdef TD_SM_90
EMBED(td_object_sm_90, "kernels.sm_90.cubin");
#endif

const td_gpu_object *td_gpu_objects(size_t *ret_n)
{
    static td_gpu_object all[4];
    size_t n = 0;
#ifdef TD_GFX942
    all[n++] = (td_gpu_object){"gfx942", td_object_gfx942,
                               (size_t)(td_object_gfx942_end - td_object_gfx942)};
#endif
#ifdef TD_GFX950
    all[n++] = (td_gpu_object){"gfx950", td_object_gfx950,
                               (size_t)(td_object_gfx950_end - td_object_gfx950)};
#endif
#ifdef TD_SM_90
    all[n++] =
        (td_gpu_object){"sm_90", td_object_sm_90, (size_t)(td_object_sm_90_end - td_object_sm_90)};
#endif
    *ret_n = n;
    return all;
}
