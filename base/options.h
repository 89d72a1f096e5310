/* SPDX-License-Identifier: Apache-2.0 */
/* Options from one table (base/options.def): parsing, help, environment, file, completions and docs
 * come from it. Precedence: command line > environment TANDEM_<SECTION>_<KEY> > INI file > default.
 * An unknown key is an error with the nearest name. */
#ifndef TD_BASE_OPTIONS_H
#define TD_BASE_OPTIONS_H

#include <stdint.h>
#include <stdio.h>

#include "base/err.h"

/* A command takes the options of its sections; a section is also an INI section. */
enum td_section {
    TD_SEC_COMMON = 1,
    TD_SEC_ROUTER = 2,
    TD_SEC_PREFILL = 4,
    TD_SEC_DECODE = 8,
    TD_SEC_WORKER = TD_SEC_PREFILL | TD_SEC_DECODE,
    TD_SEC_CHAT = 16,
    TD_SEC_BENCH = 32,
    TD_SEC_SERVE = 64,
    TD_SEC_KEYS = 128,
    TD_SEC_MODEL = 256,
    TD_SEC_QUANTIZE = 512,
    TD_SEC_EVAL = 1024,
    TD_SEC_PACK = 2048,
    TD_SEC_PROFILE = 4096,
    TD_SEC_TUNE = 8192,
    TD_SEC_CHECK = 16384,
    TD_SEC_SELFTEST = 32768,
};

typedef enum td_opt_type {
    TD_OPT_STR,
    TD_OPT_INT,
    TD_OPT_BOOL,
    TD_OPT_NUM,
    TD_OPT_ENUM
} td_opt_type;

typedef enum td_opt {
#define TD_OPTION(id, sections, name, type, def, min, max, arg, help) TD_OPT_ID_##id,
#include "base/options.def"
#undef TD_OPTION
    TD_OPT_ID_MAX
} td_opt;

typedef enum td_origin {
    TD_ORIGIN_DEFAULT,
    TD_ORIGIN_FILE,
    TD_ORIGIN_ENV,
    TD_ORIGIN_CLI
} td_origin;

typedef struct td_options {
    int sections;               /* which options this command takes */
    char *value[TD_OPT_ID_MAX]; /* heap; NULL = default */
    td_origin origin[TD_OPT_ID_MAX];
    const char *positional[8]; /* borrowed from argv */
    int n_positional;
    int help; /* --help, --help all or --help WORD was given */
    const char *help_word;
} td_options;

/* Parse argv (without the command's own name), environment and the INI file (--config, default
 * /etc/tandem/tandem.conf when it exists). 0, -EINVAL, or why the file cannot be read, with text.
 */
int td_options_parse(td_options *o, int sections, int argc, char **argv, td_err *reterr_err);
/* Refuse more than n arguments that are not options: -EINVAL with text, and then o is done, as
 * after a failed td_options_parse(). */
int td_options_at_most(td_options *o, int n, td_err *reterr_err);
void td_options_done(td_options *o);

/* Set one value as if on the command line (used by `serve` to configure its three processes). */
int td_options_set(td_options *o, td_opt id, const char *value, td_err *reterr_err);

/* Typed values; types were checked by the parser. String: "" when the default is empty. */
const char *td_opt_str(const td_options *o, td_opt id);
int64_t td_opt_int(const td_options *o, td_opt id);
double td_opt_num(const td_options *o, td_opt id);
int td_opt_bool(const td_options *o, td_opt id);
int td_opt_is_set(const td_options *o, td_opt id);

/* Help from the table: word NULL = the common ones, "all" = everything, else those that match. */
void td_options_help(const td_options *o, const char *usage, const char *word, FILE *out);
/* Markdown table of every option, for docs/options.md (a test compares). */
void td_options_docs(FILE *out);
/* Bash completion words of one command. */
void td_options_words(int sections, FILE *out);

#endif
