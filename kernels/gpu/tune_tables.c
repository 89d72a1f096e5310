/* SPDX-License-Identifier: Apache-2.0 */
#include "kernels/gpu/tune_tables.h"

#include <string.h>

#include "base/bug.h"

#include "base/banned.h"

#define EMBED(symbol, file)                                                                        \
    __asm__(".section .rodata\n" #symbol ":\n.incbin \"" file "\"\n" #symbol                       \
            "_end:\n.byte 0\n.previous\n");                                                        \
    extern const char symbol[] __attribute__((visibility("hidden")));                              \
    extern const char symbol##_end[] __attribute__((visibility("hidden")))

EMBED(td_tuned_gfx942, "gfx942.csv");
EMBED(td_tuned_gfx950, "gfx950.csv");
EMBED(td_tuned_sm_90, "sm_90.csv");

static const struct {
    const char *arch, *text, *end;
} tables[] = {{"gfx942", td_tuned_gfx942, td_tuned_gfx942_end},
              {"gfx950", td_tuned_gfx950, td_tuned_gfx950_end},
              {"sm_90", td_tuned_sm_90, td_tuned_sm_90_end}};

const char *td_tune_table(const char *arch, size_t *ret_n)
{
    for (size_t i = 0; i < TD_ARRAY_LEN(tables); i++)
        if (strcmp(tables[i].arch, arch) == 0) {
            *ret_n = (size_t)(tables[i].end - tables[i].text);
            return tables[i].text;
        }
    return NULL;
}

const char *td_tune_table_arch(size_t i)
{
    return i < TD_ARRAY_LEN(tables) ? tables[i].arch : NULL;
}
