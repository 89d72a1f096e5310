/* SPDX-License-Identifier: Apache-2.0 */
#include "cli/cli.h"

#include <stdio.h>
#include <string.h>

#include "base/options.h"
#include "base/version.h"
#include "decode-worker/worker.h"
#include "prefill-worker/worker.h"
#include "router/router.h"
#include "rpc/frame.h"
#include "base/banned.h"

static int router(int argc, char **argv)
{
    return td_router_main("tandem router", argc, argv);
}

static int prefill_worker(int argc, char **argv)
{
    return td_prefill_worker_main("tandem prefill-worker", argc, argv);
}

static int decode_worker(int argc, char **argv)
{
    return td_decode_worker_main("tandem decode-worker", argc, argv);
}

const td_command td_commands[] = {
    {"serve", "MODEL", "start router, prefill and decode workers on this machine", TD_SEC_SERVE,
     td_cmd_serve},
    {"chat", "", "talk to a server in the terminal", TD_SEC_CHAT, td_cmd_chat},
    {"router", "", "run a router", TD_ROUTER_SECTIONS, router},
    {"prefill-worker", "", "run a prefill worker", TD_SEC_COMMON | TD_SEC_PREFILL, prefill_worker},
    {"decode-worker", "", "run a decode worker", TD_SEC_COMMON | TD_SEC_DECODE, decode_worker},
    {"keys", "DIR", "make the keys of a cluster: links between processes and machines", TD_SEC_KEYS,
     td_cmd_keys},
    {"model", "random CONFIG OUT", "write a random checkpoint of a config.json's shape",
     TD_SEC_MODEL, td_cmd_model},
    {"quantize", "MODEL OUT", "write a BF16 checkpoint as MXFP4 or FP8", TD_SEC_QUANTIZE,
     td_cmd_quantize},
    {"pack", "MODEL OUT", "write a copy whose weights are mapped at once at every start",
     TD_SEC_PACK, td_cmd_pack},
    {"eval", "MODEL", "what a checkpoint knows, and lost against another", TD_SEC_EVAL,
     td_cmd_eval},
    {"profile", "MODEL", "print the numerics profile of a model on this machine", TD_SEC_PROFILE,
     td_cmd_profile},
    {"check", "MODEL", "shapes of a model that have no tuned launch plan on a GPU", TD_SEC_CHECK,
     td_cmd_check},
    {"tune", "MODEL", "measure launch plans for a model's shapes on this GPU", TD_SEC_TUNE,
     td_cmd_tune},
    {"selftest", "[MODEL]", "check every kernel on a device: one report to send in",
     TD_SEC_SELFTEST, td_cmd_selftest},
    {"config", "check FILE", "check a configuration file and say where each value comes from", 0,
     td_cmd_config},
    {"bench", "NAME", "run a benchmark program (serve, engine, ...)", 0, td_cmd_bench},
    {"completion", "bash", "print shell completions", 0, td_cmd_completion},
    {"version", "", "print version, commit and wire version", 0, td_cmd_version},
    {0},
};

int td_cmd_version(int argc, char **argv)
{
    if (argc > 0) {
        fprintf(stderr, "tandem version: takes no arguments, not '%.60s'\n", argv[0]);
        return TD_EXIT_USAGE;
    }
    printf("tandem %s (commit %s, wire tandem.v%d.%d)\n", td_version(), td_commit(), TD_WIRE_MAJOR,
           TD_WIRE_MINOR);
    return TD_EXIT_OK;
}

static void command_words(const td_command *c)
{
    printf("        %s) words=\"", c->name);
    fflush(stdout);
    td_options_words(c->sections, stdout);
    printf("\" ;;\n");
}

int td_cmd_completion(int argc, char **argv)
{
    if (argc != 1 || strcmp(argv[0], "bash") != 0) {
        fprintf(stderr, "usage: tandem completion bash   (source <(tandem completion bash))\n");
        return TD_EXIT_USAGE;
    }
    printf("_tandem() {\n    local words cur=${COMP_WORDS[COMP_CWORD]}\n    if [ \"$COMP_CWORD\" = "
           "1 ]; then\n        words=\"");
    for (const td_command *c = td_commands; c->name; c++)
        printf("%s ", c->name);
    printf("\"\n    else\n        case ${COMP_WORDS[1]} in\n");
    for (const td_command *c = td_commands; c->name; c++)
        if (c->sections)
            command_words(c);
    printf("        esac\n    fi\n    COMPREPLY=($(compgen -W \"$words\" -f -- "
           "\"$cur\"))\n}\ncomplete -F _tandem tandem\n");
    return TD_EXIT_OK;
}
