/* SPDX-License-Identifier: Apache-2.0 */
#include "cli/cli.h"

#include <stdio.h>
#include <string.h>

#include "base/bug.h"
#include "base/options.h"
#include "base/banned.h"

static const struct {
    const char *name;
    int sections;
} services[] = {{"router", TD_SEC_COMMON | TD_SEC_ROUTER},
                {"prefill-worker", TD_SEC_COMMON | TD_SEC_PREFILL},
                {"decode-worker", TD_SEC_COMMON | TD_SEC_DECODE}};

static const char *const names[TD_OPT_ID_MAX] = {
#define TD_OPTION(id, sections, name, type, def, min, max, arg, help) [TD_OPT_ID_##id] = name,
#include "base/options.def"
#undef TD_OPTION
};

static void show(const td_options *o, const char *service)
{
    static const char *const origins[] = {"default", "file", "environment", "command line"};
    printf("%s\n", service);
    for (int i = 0; i < TD_OPT_ID_MAX; i++)
        if (td_opt_is_set(o, (td_opt)i))
            printf("  %-20s %-40s (%s)\n", names[i], td_opt_str(o, (td_opt)i),
                   origins[o->origin[i]]);
}

int td_cmd_config(int argc, char **argv)
{
    if (argc != 2 || strcmp(argv[0], "check") != 0) {
        fprintf(stderr, "usage: tandem config check FILE\n");
        return TD_EXIT_USAGE;
    }
    char *args[] = {(char *)"--config", argv[1], NULL};
    for (size_t i = 0; i < TD_ARRAY_LEN(services); i++) {
        td_options o;
        td_err err = {0};
        if (td_options_parse(&o, services[i].sections, 2, args, &err) < 0) {
            fprintf(stderr, "tandem config: %s\n", err.text);
            return TD_EXIT_USAGE;
        }
        show(&o, services[i].name);
        td_options_done(&o);
    }
    return TD_EXIT_OK;
}
