/* SPDX-License-Identifier: Apache-2.0 */
#include <stdio.h>
#include <string.h>

#include "base/version.h"
#include "cli/cli.h"
#include "base/banned.h"

static int usage(FILE *out)
{
    fprintf(
        out,
        "tandem %s: serve large language models with prefill and decode on separate processes\n\n"
        "usage: tandem COMMAND [options]\n\n",
        td_version());
    for (const td_command *c = td_commands; c->name; c++)
        fprintf(out, "  %-15s %-18s %s\n", c->name, c->args, c->help);
    fprintf(out,
            "\n`tandem COMMAND --help` shows the options, `--help all` every one, `--help WORD` "
            "those that match.\n"
            "First steps: tandem serve models/glm-tiny, then in another terminal: tandem chat\n");
    return out == stdout ? TD_EXIT_OK : TD_EXIT_USAGE;
}

static unsigned distance(const char *a, const char *b)
{
    unsigned row[64], n = (unsigned)strlen(b);
    if (n >= 63)
        return 99;
    for (unsigned j = 0; j <= n; j++)
        row[j] = j;
    for (unsigned i = 1; a[i - 1]; i++) {
        unsigned diagonal = row[0];
        row[0] = i;
        for (unsigned j = 1; j <= n; j++) {
            unsigned up = row[j], best = diagonal + (a[i - 1] != b[j - 1]);
            best = best < up + 1 ? best : up + 1;
            best = best < row[j - 1] + 1 ? best : row[j - 1] + 1;
            diagonal = up;
            row[j] = best;
        }
    }
    return row[n];
}

static int unknown(const char *name)
{
    const char *nearest = NULL;
    unsigned best = 4;
    for (const td_command *c = td_commands; c->name; c++) {
        unsigned d = strlen(name) < 60 ? distance(name, c->name) : 99;
        if (d < best) {
            best = d;
            nearest = c->name;
        }
    }
    fprintf(stderr, "tandem: no command '%s'%s%s%s\n", name, nearest ? "; did you mean '" : "",
            nearest ? nearest : "", nearest ? "'?" : "; `tandem help` lists them");
    return TD_EXIT_USAGE;
}

/* The commands without options print their one line. */
static int command_help(const td_command *c)
{
    static char *help[] = {(char *)"--help", NULL};
    if (c->sections)
        return c->run(1, help);
    printf("usage: tandem %s %s\n\n%s\n", c->name, c->args, c->help);
    return TD_EXIT_OK;
}

static int is_help(const char *word)
{
    return strcmp(word, "--help") == 0 || strcmp(word, "-h") == 0;
}

int main(int argc, char **argv)
{
    if (argc < 2)
        return usage(stderr);
    const char *name = argv[1];
    int help = is_help(name) || strcmp(name, "help") == 0;
    if (help && argc == 2)
        return usage(stdout);
    if (help)
        name = argv[2];
    else if (argc == 3)
        help = is_help(argv[2]);
    if (strcmp(name, "--version") == 0)
        name = "version";
    for (const td_command *c = td_commands; c->name; c++)
        if (strcmp(c->name, name) == 0)
            return help ? command_help(c) : c->run(argc - 2, argv + 2);
    return unknown(name);
}
