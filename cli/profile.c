/* SPDX-License-Identifier: Apache-2.0 */
#include "cli/cli.h"

#include <stdio.h>
#include <string.h>

#include "base/hash.h"
#include "base/options.h"
#include "engine/options.h"
#include "base/banned.h"

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
    td_device_spec spec = td_device_spec_from(o);
    if (td_device_open(&spec, &device, &err) < 0) {
        fprintf(stderr, "tandem profile: %s\n", err.text);
        return TD_EXIT_FAILED;
    }
    if (strcmp(spec.word, "cpu") != 0)
        fprintf(stderr, "tandem profile: device %s\n", td_device_text(device));
    td_model_options mo = td_model_options_from(o, device);
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
