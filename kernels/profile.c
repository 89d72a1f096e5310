/* SPDX-License-Identifier: Apache-2.0 */
#include "kernels/profile.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bug.h"
#include "base/hash.h"
#include "base/strbuf.h"
#include "kernels/kplan.h"
#include "kernels/kv_row.h"

#include "base/banned.h"

/* A kernel that changes bits raises its op's revision here (numerics, rule 11). */
static const struct rev {
    const char *op;
    int rev;
} revs[] = {
    {"add_norm", 1},  {"attend_gqa", 1},   {"attend_mla", 2},    {"embed", 1},  {"gemm", 1},
    {"gqa_write", 1}, {"index_select", 1}, {"index_write", 1},   {"logits", 1}, {"math", 1},
    {"mla_write", 1}, {"moe", 1},          {"reduce_slices", 1}, {"route", 1},  {"sample", 1},
};

static const struct dtype_row {
    const char *name;
    size_t bytes;
} dtypes[TD_DTYPES] = {[TD_F32] = {"f32", 4},
                       [TD_BF16] = {"bf16", 2},
                       [TD_F16] = {"f16", 2},
                       [TD_U8] = {"u8", 1},
                       [TD_F8E4M3] = {"f8e4m3", 1}};

const char *td_dtype_name(td_dtype t)
{
    return (unsigned)t < TD_DTYPES ? dtypes[t].name : "?";
}

size_t td_dtype_bytes(td_dtype t)
{
    TD_BUG_ON((unsigned)t >= TD_DTYPES);
    return dtypes[t].bytes;
}

const char *td_row_type_name(td_dtype t)
{
    return t == TD_F8E4M3 ? "fp8" : td_dtype_name(t);
}

int td_row_type(const char *word)
{
    static const td_dtype types[] = {TD_F32, TD_BF16, TD_F8E4M3};
    for (size_t i = 0; i < TD_ARRAY_LEN(types); i++)
        if (strcmp(word, td_row_type_name(types[i])) == 0)
            return (int)types[i];
    return -1;
}

const char *td_weight_format_name(td_weight_format f)
{
    static const char *const names[TD_WEIGHT_FORMATS] = {
        [TD_W_F32] = "f32", [TD_W_BF16] = "bf16", [TD_W_FP8] = "fp8", [TD_W_MXFP4] = "mxfp4"};
    return (unsigned)f < TD_WEIGHT_FORMATS ? names[f] : "?";
}

/* weights.experts=mxfp4; several formats in one class are joined: bf16+mxfp4. */
static void add_weights(td_strbuf *b, const uint32_t *formats)
{
    static const char *const classes[TD_WEIGHT_CLASSES] = {
        [TD_WC_ATTENTION] = "attention", [TD_WC_DENSE] = "dense",   [TD_WC_EMBED] = "embed",
        [TD_WC_EXPERTS] = "experts",     [TD_WC_HEAD] = "head",     [TD_WC_INDEX] = "index",
        [TD_WC_ROUTER] = "router",       [TD_WC_SHARED] = "shared",
    };
    for (unsigned c = 0; c < TD_WEIGHT_CLASSES; c++) {
        const char *before = "=";
        for (unsigned f = 0; f < TD_WEIGHT_FORMATS; f++) {
            if (!(formats[c] >> f & 1u))
                continue;
            if (*before == '=')
                td_strbuf_addf(b, "weights.%s", classes[c]);
            td_strbuf_addf(b, "%s%s", before, td_weight_format_name(f));
            before = "+";
        }
        if (*before == '+')
            td_strbuf_addf(b, "\n");
    }
}

static int has_format(const uint32_t *formats, td_weight_format f)
{
    uint32_t all = 0;
    for (unsigned c = 0; c < TD_WEIGHT_CLASSES; c++)
        all |= formats[c];
    return (int)(all >> f & 1u);
}

char *td_profile_text(const td_profile_spec *spec, uint8_t ret_id[16])
{
    td_strbuf b;
    td_strbuf_init(&b);
    td_strbuf_addf(&b, "act=%s\n", td_dtype_name(spec->act));
    if (has_format(spec->formats, TD_W_MXFP4))
        td_strbuf_addf(&b, "act.mxfp4=%s\n",
                       spec->act_i8    ? "i8g32"
                       : spec->act_fp8 ? "fp8g32"
                                       : td_dtype_name(spec->act));
    td_strbuf_addf(&b, "backend=%s\nep=1\nindex=%s\nisa=%s\n", spec->backend->name,
                   td_dtype_name(spec->index), spec->backend->isa);
    td_strbuf_addf(&b,
                   "kplan.attn_split=%d\nkplan.attn_tile=%d\nkplan.gemm_block=%d\nkplan.norm_lanes="
                   "%d\nkplan.slices=%d\n",
                   TD_KPLAN_ATTN_SPLIT, TD_KPLAN_ATTN_TILE, TD_KPLAN_GEMM_BLOCK,
                   TD_KPLAN_NORM_LANES, TD_KPLAN_SLICES_MAX);
    td_strbuf_addf(&b, "kv=%s\n", td_row_type_name(spec->kv));
    if (spec->kv == TD_F8E4M3)
        td_strbuf_addf(&b, "kv.group=%d\nkv.read=bf16\n", TD_KV_SCALE_GROUP);
    for (size_t i = 0; i < TD_ARRAY_LEN(revs); i++)
        td_strbuf_addf(&b, "rev.%s=%d\n", revs[i].op, revs[i].rev);
    add_weights(&b, spec->formats);
    size_t len;
    char *text = td_strbuf_take(&b, &len);
    if (text) {
        td_hash h;
        td_hash_init(&h, NULL, 0, 16);
        td_hash_add(&h, text, len);
        td_hash_final(&h, ret_id);
    }
    return text;
}
