/* SPDX-License-Identifier: Apache-2.0 */
/* The `tandem` command: one program, a file per subcommand. Each returns the exit status: 0, 1
 * runtime failure, 2 usage. */
#ifndef TD_CLI_CLI_H
#define TD_CLI_CLI_H

enum { TD_EXIT_OK = 0, TD_EXIT_FAILED = 1, TD_EXIT_USAGE = 2 };

/* argv without the program and command names. */
int td_cmd_serve(int argc, char **argv);
int td_cmd_chat(int argc, char **argv);
int td_cmd_keys(int argc, char **argv);
int td_cmd_model(int argc, char **argv);
int td_cmd_quantize(int argc, char **argv);
int td_cmd_eval(int argc, char **argv);
int td_cmd_pack(int argc, char **argv);
int td_cmd_profile(int argc, char **argv);
int td_cmd_check(int argc, char **argv);
int td_cmd_tune(int argc, char **argv);
int td_cmd_selftest(int argc, char **argv);
int td_cmd_config(int argc, char **argv);
int td_cmd_bench(int argc, char **argv);
int td_cmd_version(int argc, char **argv);
int td_cmd_completion(int argc, char **argv);

typedef struct td_command {
    const char *name, *args, *help;
    int sections; /* of the option table */
    int (*run)(int argc, char **argv);
} td_command;

/* All commands, ended by a row without a name. */
extern const td_command td_commands[];

#endif
