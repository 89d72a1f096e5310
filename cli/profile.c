/* SPDX-License-Identifier: Apache-2.0 */
#include "cli/cli.h"

#include <stdio.h>
#include <string.h>

#include "base/hash.h"
#include "base/options.h"
#include "engine/device.h"
#include "engine/model.h"
#include "base/banned.h"

static td_dtype dtype(const td_options *o, td_opt id)
{
    return (td_dtype)td_row_type(td_opt_str(o, id)); /* the option's words are its words */
}

static void print_model(const td_model *m)
{
    const td_model_info *i = td_model_get_info(m);
    char hex[65];
    printf("%s", i->profile);
    printf("\nprofile_id %s\n", td_hex(i->profile_id, 16, hex));
    printf("model_hash %s\n", td_hex(i->model_hash, 32, hex));
    printf("kv_layout  %s (%llu bytes a block of 64 tokens)\n", td_hex(i->kv.hash, 16, hex),
           (unsigned long long)i->kv.block_bytes);
}

static int print_profile(const td_options *o, const char *dir)
{
    td_err err = {0};
    td_model *m = NULL;
    td_device *device = NULL;
    td_device_spec spec = {.word = td_opt_str(o, TD_OPT_ID_DEVICE),
                           .isa = td_opt_str(o, TD_OPT_ID_ISA),
                           .strict = td_opt_bool(o, TD_OPT_ID_STRICT)};
    if (td_device_open(&spec, &device, &err) < 0) {
        fprintf(stderr, "tandem profile: %s\n", err.text);
        return TD_EXIT_FAILED;
    }
    if (strcmp(spec.word, "cpu") != 0)
        fprintf(stderr, "tandem profile: device %s\n", td_device_text(device));
    td_model_options mo = {.isa = td_opt_str(o, TD_OPT_ID_ISA),
                           .backend = td_device_backend(device),
                           .act = dtype(o, TD_OPT_ID_ACT),
                           .act_i8 = strcmp(td_opt_str(o, TD_OPT_ID_ACT_MXFP4), "i8") == 0,
                           .act_fp8 = strcmp(td_opt_str(o, TD_OPT_ID_ACT_MXFP4), "fp8") == 0,
                           .kv = dtype(o, TD_OPT_ID_KV),
                           .index = dtype(o, TD_OPT_ID_INDEX),
                           .n_threads = (uint32_t)td_opt_int(o, TD_OPT_ID_THREADS),
                           .n_ranks = 1,
                           .strict = td_opt_bool(o, TD_OPT_ID_STRICT)};
    int r = td_model_open(dir, &mo, &m, &err);
    if (r < 0)
        fprintf(stderr, "tandem profile: %s\n", err.text);
    else
        print_model(m);
    td_model_free(m);
    td_device_close(device);
    return r < 0 ? TD_EXIT_FAILED : TD_EXIT_OK;
}

int td_cmd_profile(int argc, char **argv)
{
    td_options o;
    td_err err = {0};
    if (td_options_parse(&o, TD_SEC_PROFILE, argc, argv, &err) < 0 ||
        td_options_at_most(&o, 1, &err) < 0) {
        fprintf(stderr, "tandem profile: %s\n", err.text);
        return TD_EXIT_USAGE;
    }
    int status;
    const char *dir = o.n_positional ? o.positional[0] : td_opt_str(&o, TD_OPT_ID_MODEL);
    if (o.help) {
        td_options_help(&o, "tandem profile MODEL [options]", o.help_word, stdout);
        status = TD_EXIT_OK;
    } else if (!*dir) {
        fprintf(stderr,
                "tandem profile: give a model directory, e.g. tandem profile models/glm-tiny\n");
        status = TD_EXIT_USAGE;
    } else {
        status = print_profile(&o, dir);
    }
    td_options_done(&o);
    return status;
}
