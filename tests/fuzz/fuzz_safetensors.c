/* SPDX-License-Identifier: Apache-2.0 */
/* One safetensors file: whatever parses must lie inside the input. */
#include <stdlib.h>
#include <string.h>

#include "engine/safetensors.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static volatile uint8_t keep; /* the reads may not be optimised away */

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    td_st *st = NULL;
    td_err err = {0};
    uint8_t *copy = malloc(size ? size : 1); /* exact bounds for the sanitizer */
    if (!copy)
        return 0;
    if (size)
        memcpy(copy, data, size);
    if (td_st_parse(copy, size, "fuzz", &st, &err) >= 0)
        for (size_t i = 0; i < td_st_count(st); i++) {
            const td_st_tensor *t = td_st_at(st, i);
            uint8_t sum = 0;
            for (uint64_t b = 0; b < t->bytes; b++)
                sum ^= t->data[b];
            keep = sum;
            if (td_st_find(st, t->name) != t)
                abort();
        }
    else if (!err.text[0])
        abort();
    td_st_close(st);
    free(copy);
    return 0;
}
