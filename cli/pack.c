/* SPDX-License-Identifier: Apache-2.0 */
/* `tandem pack MODEL OUT`: a copy of a model whose weights lie as the CPU kernels want them. */
#include "cli/cli.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/options.h"
#include "engine/model.h"
#include "engine/model_files.h"

#include "base/banned.h"

static void draw(void *arg, const char *stage, double fraction)
{
    (void)arg;
    if (isatty(STDERR_FILENO))
        fprintf(stderr, "\r%-20s %3.0f %%%s", stage, fraction * 100.0, fraction >= 1.0 ? "\n" : "");
}

static int pack(const td_options *o)
{
    td_err err = {0};
    td_model *m = NULL;
    const char *model = o->positional[0], *out = o->positional[1];
    td_model_options mo = {.isa = td_opt_str(o, TD_OPT_ID_ISA),
                           .act = TD_BF16,
                           .kv = TD_BF16,
                           .index = TD_BF16,
                           .n_threads = (uint32_t)td_opt_int(o, TD_OPT_ID_THREADS),
                           .n_ranks = 1,
                           .pack_to = out,
                           .progress = draw};
    uint64_t start = td_now_us();
    if (mkdir(out, 0755) < 0) {
        fprintf(stderr, "tandem pack: %s: %s; give a directory that does not exist\n", out,
                td_errno_text(-errno));
        return TD_EXIT_FAILED;
    }
    int r = td_model_open(model, &mo, &m, &err);
    r = r < 0 ? r : td_model_files_copy(model, out, 1, &err);
    if (r < 0) {
        td_model_files_remove(out);
        fprintf(stderr, "tandem pack: %s\n", err.text);
    } else {
        printf("%s: %.1f MB of packed weights in %.1f s; use it as any model directory\n", out,
               (double)td_model_get_info(m)->weight_bytes / 1e6,
               (double)(td_now_us() - start) / 1e6);
    }
    td_model_free(m);
    return r < 0 ? TD_EXIT_FAILED : TD_EXIT_OK;
}

int td_cmd_pack(int argc, char **argv)
{
    td_options o;
    td_err err = {0};
    if (td_options_parse(&o, TD_SEC_PACK, argc, argv, &err) < 0) {
        fprintf(stderr, "tandem pack: %s\n", err.text);
        return TD_EXIT_USAGE;
    }
    int status = TD_EXIT_USAGE;
    if (o.help) {
        td_options_help(&o, "tandem pack MODEL OUT [options]", o.help_word, stdout);
        status = TD_EXIT_OK;
    } else if (o.n_positional != 2) {
        fprintf(stderr, "tandem pack: give a model directory and a new directory, e.g. tandem pack "
                        "models/glm-tiny /tmp/glm-tiny-packed\n");
    } else {
        status = pack(&o);
    }
    td_options_done(&o);
    return status;
}
