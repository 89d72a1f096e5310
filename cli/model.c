/* SPDX-License-Identifier: Apache-2.0 */
/* tandem model random CONFIG OUT_DIR */
#include "cli/model.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/bug.h"
#include "base/cleanup.h"
#include "base/file.h"
#include "base/json.h"
#include "base/options.h"
#include "cli/cli.h"
#include "base/banned.h"

enum { SMALL_FILE_MAX = 64 << 20 };

static const char usage[] = "tandem model random CONFIG OUT_DIR [options]\n\n"
                            "Writes a checkpoint of random BF16 numbers. CONFIG is a config.json "
                            "or a directory that has one.";

static void show(double fraction)
{
    fprintf(stderr, "\rwriting weights %3.0f %%%s", 100.0 * fraction, fraction < 1.0 ? "" : "\n");
}

/* CONFIG as a file, also when its directory was given. Heap. */
static char *config_path(const char *given)
{
    struct stat s;
    int dir = stat(given, &s) == 0 && S_ISDIR(s.st_mode);
    return dir ? td_path_join(given, "config.json") : strdup(given);
}

/* The weights are BF16: a configuration that promises others would make a directory that lies. */
static int refuse_quantised(const char *path, const char *text, size_t n, td_err *err)
{
    json_t *root = NULL;
    int r = td_json_parse(text, n, NULL, path, &root, err);
    const json_t *q = r < 0 ? NULL : json_object_get(root, "quantization_config");
    if (q && !json_is_null(q))
        r = td_err_set(err, -EINVAL,
                       "%s: quantization_config is set, but random weights are BF16; remove it",
                       path);
    json_decref(root);
    return r;
}

static int read_config(const char *path, char **ret_text, size_t *ret_n, td_config *ret_config,
                       td_err *err)
{
    int r = td_file_read(path, 1 << 20, ret_text, ret_n, err);
    if (r < 0)
        return r;
    r = refuse_quantised(path, *ret_text, *ret_n, err);
    r = r < 0 ? r : td_config_parse(*ret_text, *ret_n, NULL, 0, ret_config, err);
    if (r < 0 && !strstr(err->text, path))
        td_err_prefix(err, "%s", path);
    return r;
}

/* tokenizer.json, and the others where they exist. */
static int copy_tokenizer(const char *from, const char *dir, td_err *err)
{
    static const char *const names[] = {"tokenizer.json", "tokenizer_config.json",
                                        "chat_template.jinja", "generation_config.json"};
    for (size_t i = 0; i < TD_ARRAY_LEN(names); i++) {
        TD_AUTO_FREE char *path = td_path_join(from, names[i]);
        TD_AUTO_FREE char *text = NULL;
        size_t n = 0;
        int r = path ? td_file_read(path, SMALL_FILE_MAX, &text, &n, err)
                     : td_err_set(err, -ENOMEM, "out of memory");
        if (r == -ENOENT && i)
            continue;
        r = r < 0 ? r : td_model_put(dir, names[i], text, n, err);
        if (r < 0)
            return r;
    }
    return 0;
}

static int make_directory(const char *dir, td_err *err)
{
    if (mkdir(dir, 0777) == 0)
        return 0;
    if (errno == EEXIST)
        return td_err_set(err, -EEXIST, "%s exists; name a new directory", dir);
    return td_err_set(err, -errno, "%s: %s", dir, td_errno_text(-errno));
}

static int write_model(const td_options *o, const char *config_at, const char *dir, td_err *err)
{
    TD_AUTO_FREE char *path = config_path(config_at);
    TD_AUTO_FREE char *text = NULL;
    size_t n = 0;
    td_config c;
    td_random_list list = {0};
    if (!path)
        return td_err_set(err, -ENOMEM, "out of memory");
    int r = read_config(path, &text, &n, &c, err);
    r = r < 0 ? r : make_directory(dir, err);
    if (r < 0)
        return r;
    const char *tokenizer = td_opt_str(o, TD_OPT_ID_TOKENIZER);
    r = *tokenizer ? copy_tokenizer(tokenizer, dir, err) : td_random_tokenizer(dir, &c, err);
    r = r < 0 ? r : td_model_put(dir, "config.json", text, n, err);
    td_random_tensors(&c, &list);
    r = r < 0 ? r
              : td_random_write(dir, &list, (uint64_t)td_opt_int(o, TD_OPT_ID_SEED),
                                (uint64_t)td_opt_int(o, TD_OPT_ID_SHARD) << 20,
                                isatty(STDERR_FILENO) ? show : NULL, err);
    td_random_list_done(&list);
    return r;
}

static int run(const td_options *o)
{
    td_err err = {0};
    if (o->n_positional != 3 || strcmp(o->positional[0], "random") != 0) {
        fprintf(stderr, "usage: %s\n", usage);
        return TD_EXIT_USAGE;
    }
    if (write_model(o, o->positional[1], o->positional[2], &err) < 0) {
        fprintf(stderr, "tandem model: %s\n", err.text);
        return TD_EXIT_FAILED;
    }
    printf("%s\n", o->positional[2]);
    return TD_EXIT_OK;
}

int td_cmd_model(int argc, char **argv)
{
    td_options o;
    td_err err = {0};
    if (td_options_parse(&o, TD_SEC_MODEL, argc, argv, &err) < 0) {
        fprintf(stderr, "tandem model: %s\n", err.text);
        return TD_EXIT_USAGE;
    }
    int status = TD_EXIT_OK;
    if (o.help)
        td_options_help(&o, usage, o.help_word, stdout);
    else
        status = run(&o);
    td_options_done(&o);
    return status;
}
