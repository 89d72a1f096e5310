/* SPDX-License-Identifier: Apache-2.0 */
/* config.json, then after a zero byte generation_config.json: what is accepted must keep the
 * relations that the engine builds on, down to a KV layout. */
#include <stdlib.h>
#include <string.h>

#include "engine/internal.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check(const td_config *c)
{
    static td_layer layers[TD_LAYERS_MAX];
    td_kv_layout l;
    if (!c->vocab || !c->hidden || !c->n_layers || c->n_layers >= TD_LAYERS_MAX ||
        c->rope_dims % 2 || !c->rope_dims)
        abort();
    if (c->arch == TD_ARCH_GLM_MOE_DSA &&
        (!c->full[0] || c->top_k > c->n_experts || c->index_dims < c->rope_dims))
        abort();
    if (c->arch == TD_ARCH_QWEN3 && c->n_heads % c->n_kv_heads)
        abort();
    for (uint32_t i = 0; i < c->n_eos; i++)
        if (c->eos[i] >= c->vocab)
            abort();
    td_kv_layout_make(c, TD_F32, TD_F32, layers, &l);
    if (l.groups[l.n_groups - 1].offset + l.groups[l.n_groups - 1].bytes != l.block_bytes)
        abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    td_config c;
    td_err err = {0};
    const uint8_t *zero = size ? memchr(data, 0, size) : NULL;
    size_t n = zero ? (size_t)(zero - data) : size;
    const char *gen = zero ? (const char *)zero + 1 : NULL;
    int r = td_config_parse((const char *)data, n, gen, zero ? size - n - 1 : 0, &c, &err);
    if (r >= 0)
        check(&c);
    else if (!err.text[0])
        abort();
    return 0;
}
