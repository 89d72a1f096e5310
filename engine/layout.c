/* SPDX-License-Identifier: Apache-2.0 */
/* The layout of a KV block (architecture, section 3a): groups of at most 1 MiB. For latent
 * attention a group of latents is followed by the index keys of its full layers, so that a prefill
 * worker can send both as soon as those layers are done. The MTP layer owns no rows until it is
 * run: then its group comes last and the layout's hash changes. */
#include <stdio.h>

#include "base/bug.h"
#include "base/hash.h"
#include "base/prefix.h"
#include "engine/internal.h"
#include "kernels/kv_row.h"

#include "base/banned.h"

enum { GROUP_BYTES_MAX = 1 << 20 };

static void add_group(td_kv_layout *l, td_kv_kind kind, uint32_t first, uint32_t n,
                      const td_kv_row *row)
{
    uint64_t bytes = n * row->layer_bytes;
    TD_BUG_ON(l->n_groups == TD_KV_GROUPS_MAX);
    l->groups[l->n_groups++] =
        (td_kv_group){kind, first, n, l->block_bytes, bytes, row->layer_bytes - row->scales_at};
    l->block_bytes += bytes;
}

static uint32_t layers_in_group(uint64_t layer_bytes)
{
    uint64_t n = GROUP_BYTES_MAX / layer_bytes;
    return n < 1 ? 1 : n > TD_LAYERS_MAX ? TD_LAYERS_MAX : (uint32_t)n;
}

/* Index keys of the full layers of [first, first + n); ordinal: full layers before first. Returns
 * how many. */
static uint32_t add_index_group(const td_config *c, td_layer *layers, uint32_t first, uint32_t n,
                                uint32_t ordinal, const td_kv_row *row, td_kv_layout *l)
{
    uint32_t done = 0;
    for (uint32_t i = first; i < first + n; i++)
        if (c->full[i])
            layers[i].index_offset = l->block_bytes + done++ * row->layer_bytes;
    if (done)
        add_group(l, TD_KV_INDEX, ordinal, done, row);
    return done;
}

static void hash_layout(const td_config *c, td_dtype kv, td_dtype index, td_kv_layout *l)
{
    char text[128];
    td_hash h;
    td_hash_init(&h, NULL, 0, sizeof l->hash);
    int n = snprintf(text, sizeof text, "arch=%s block=%d kv=%s index=%s bytes=%llu\n",
                     td_arch_name(c->arch), TD_BLOCK_TOKENS, td_row_type_name(kv),
                     c->arch == TD_ARCH_GLM_MOE_DSA ? td_dtype_name(index) : "-",
                     (unsigned long long)l->block_bytes);
    td_hash_add(&h, text, (size_t)n);
    for (uint32_t i = 0; i < l->n_groups; i++) {
        const td_kv_group *g = &l->groups[i];
        n = snprintf(text, sizeof text, "kind=%d first=%u n=%u offset=%llu bytes=%llu\n",
                     (int)g->kind, g->first_layer, g->n_layers, (unsigned long long)g->offset,
                     (unsigned long long)g->bytes);
        td_hash_add(&h, text, (size_t)n);
        if (g->scale_bytes) {
            n = snprintf(text, sizeof text, "scales=%llu\n", (unsigned long long)g->scale_bytes);
            td_hash_add(&h, text, (size_t)n);
        }
    }
    td_hash_final(&h, l->hash);
}

void td_kv_layout_make(const td_config *c, td_dtype kv, td_dtype index, td_layer *layers,
                       td_kv_layout *ret_layout)
{
    td_kv_layout l = {0};
    int mla = c->arch == TD_ARCH_GLM_MOE_DSA;
    td_kv_row row = mla ? td_kv_row_mla(kv, c->kv_lora, c->rope_dims)
                        : td_kv_row_gqa(kv, c->n_kv_heads, c->head_dim);
    td_kv_row key = mla ? td_kv_row_index(index, c->index_dims) : (td_kv_row){0};
    uint64_t widest = row.layer_bytes > key.layer_bytes ? row.layer_bytes : key.layer_bytes;
    uint32_t per = layers_in_group(widest), ordinal = 0;
    /* a run of layers may bring two groups; very wide rows get groups above 1 MiB instead of too
     * many of them */
    uint32_t least = (c->n_layers + TD_KV_GROUPS_MAX / 2 - 1) / (TD_KV_GROUPS_MAX / 2);
    per = per < least ? least : per;
    for (uint32_t first = 0; first < c->n_layers; first += per) {
        uint32_t n = c->n_layers - first < per ? c->n_layers - first : per;
        add_group(&l, mla ? TD_KV_LATENT : TD_KV_GQA, first, n, &row);
        for (uint32_t i = 0; i < n; i++)
            layers[first + i].kv_offset = l.groups[l.n_groups - 1].offset + i * row.layer_bytes;
        if (mla)
            ordinal += add_index_group(c, layers, first, n, ordinal, &key, &l);
    }
    hash_layout(c, kv, index, &l);
    *ret_layout = l;
}
