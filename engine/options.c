/* SPDX-License-Identifier: Apache-2.0 */
#include "engine/options.h"

#include <string.h>

#include "base/banned.h"

static td_dtype row_type(const td_options *o, td_opt id)
{
    return (td_dtype)td_row_type(td_opt_str(o, id)); /* the option's words are its words */
}

td_device_spec td_device_spec_from(const td_options *o)
{
    return (td_device_spec){.word = td_opt_str(o, TD_OPT_ID_DEVICE),
                            .isa = td_opt_str(o, TD_OPT_ID_ISA),
                            .strict = td_opt_bool(o, TD_OPT_ID_STRICT)};
}

td_model_options td_model_options_from(const td_options *o, const td_device *device)
{
    const char *mxfp4 = td_opt_str(o, TD_OPT_ID_ACT_MXFP4);
    return (td_model_options){.isa = td_opt_str(o, TD_OPT_ID_ISA),
                              .backend = td_device_backend(device),
                              .act = row_type(o, TD_OPT_ID_ACT),
                              .act_i8 = strcmp(mxfp4, "i8") == 0,
                              .act_fp8 = strcmp(mxfp4, "fp8") == 0,
                              .kv = row_type(o, TD_OPT_ID_KV),
                              .index = row_type(o, TD_OPT_ID_INDEX),
                              .n_threads = (uint32_t)td_opt_int(o, TD_OPT_ID_THREADS),
                              .n_ranks = 1,
                              .strict = td_opt_bool(o, TD_OPT_ID_STRICT)};
}
