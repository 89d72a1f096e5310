/* SPDX-License-Identifier: Apache-2.0 */
/* `tandem keys DIR`: a key pair for each process and client of a cluster, and the list of them. */
#include "cli/cli.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/file.h"
#include "base/options.h"
#include "base/secret.h"
#include "base/strbuf.h"
#include "rpc/curve.h"
#include "base/banned.h"

enum { PEERS_MAX_BYTES = 1 << 20 };

/* A file that was not there before; nobody else sees it half written or with a wider mode. */
static int write_new(const char *path, const char *text, mode_t mode, td_err *err)
{
    TD_AUTO_CLOSE int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, mode);
    size_t n = strlen(text);
    if (fd < 0)
        return td_err_set(err, -errno, "%s: %s%s", path, td_errno_text(errno),
                          errno == EEXIST ? "; a key in use is not replaced: remove it first" : "");
    if (fchmod(fd, mode) < 0 || write(fd, text, n) != (ssize_t)n || fsync(fd) < 0) {
        int e = errno ? errno : EIO;
        unlink(path);
        return td_err_set(err, -e, "%s: %s", path, td_errno_text(e));
    }
    return 0;
}

/* DIR/NAME.secret, DIR/NAME.public and a line for the list. */
static int make_one(const char *dir, const char *role, const char *name, td_strbuf *lines,
                    td_err *err)
{
    char path[PATH_MAX], pub[TD_CURVE_TEXT_BYTES], secret[TD_CURVE_TEXT_BYTES + 1], line[256];
    td_curve_pair pair;
    int r = td_curve_generate(&pair, err);
    if (r < 0)
        return r;
    td_curve_text(pair.public_key, pub);
    td_curve_text(pair.secret_key, secret);
    secret[TD_CURVE_TEXT_BYTES - 1] = '\n';
    secret[TD_CURVE_TEXT_BYTES] = 0;
    snprintf(line, sizeof line, "%s %s %s\n", role, name, pub);
    snprintf(path, sizeof path, "%s/%s.secret", dir, name);
    r = write_new(path, secret, 0600, err);
    if (r == 0) {
        snprintf(path, sizeof path, "%s/%s.public", dir, name);
        r = write_new(path, line, 0644, err);
    }
    td_secret_wipe(&pair, sizeof pair);
    td_secret_wipe(secret, sizeof secret);
    if (r == 0)
        td_strbuf_adds(lines, line);
    return r;
}

static int make_many(const char *dir, const char *role, int64_t n, td_strbuf *lines, td_err *err)
{
    int r = 0;
    for (int64_t i = 1; r == 0 && i <= n; i++) {
        char name[TD_PEER_NAME_MAX + 1];
        snprintf(name, sizeof name, "%s-%lld", role, (long long)i);
        r = make_one(dir, role, name, lines, err);
    }
    return r;
}

/* Replace the list in one step: a process that reads it now sees the old one or the new one. */
static int write_peers(const char *path, const td_strbuf *text, td_err *err)
{
    char fresh[PATH_MAX];
    snprintf(fresh, sizeof fresh, "%s.new", path);
    if (text->failed)
        return td_err_set(err, -ENOMEM, "%s: out of memory", path);
    unlink(fresh);
    int r = write_new(fresh, text->data, 0644, err);
    if (r == 0 && rename(fresh, path) < 0)
        r = td_err_set(err, -errno, "%s: %s", path, td_errno_text(errno));
    return r;
}

static int make_cluster(const td_options *o, const char *dir, const char *peers, td_err *err)
{
    td_strbuf lines;
    td_strbuf_init(&lines);
    td_strbuf_adds(&lines, "# Who may connect: ROLE NAME PUBLIC-KEY. The same file for every "
                           "process; SIGHUP makes them read it again.\n");
    int r = 0;
    if (access(peers, F_OK) == 0)
        r = td_err_set(err, -EEXIST,
                       "%s: is there already; add to it with `tandem keys %s ROLE NAME`", peers,
                       dir);
    if (r == 0)
        r = make_one(dir, "router", "router", &lines, err);
    if (r == 0)
        r = make_many(dir, "prefill", td_opt_int(o, TD_OPT_ID_N_PREFILL), &lines, err);
    if (r == 0)
        r = make_many(dir, "decode", td_opt_int(o, TD_OPT_ID_N_DECODE), &lines, err);
    if (r == 0)
        r = make_many(dir, "client", td_opt_int(o, TD_OPT_ID_N_CLIENT), &lines, err);
    if (r == 0)
        r = write_peers(peers, &lines, err);
    td_strbuf_done(&lines);
    return r;
}

/* The list must stay one that can be read: the new line is tried before anything is written. */
static int check_new(const char *peers, const char *text, const char *role, const char *name,
                     td_err *err)
{
    td_strbuf trial;
    td_peers *p = NULL;
    td_curve_pair pair;
    char pub[TD_CURVE_TEXT_BYTES];
    int r = td_curve_generate(&pair, err);
    if (r < 0)
        return r;
    td_curve_text(pair.public_key, pub);
    td_secret_wipe(&pair, sizeof pair);
    td_strbuf_init(&trial);
    td_strbuf_addf(&trial, "%s%s %s %s\n", text, role, name, pub);
    r = trial.failed ? td_err_set(err, -ENOMEM, "%s: out of memory", peers)
                     : td_peers_parse(peers, trial.data, trial.len, &p, err);
    td_peers_free(p);
    td_strbuf_done(&trial);
    return r;
}

static int add_one(const char *dir, const char *peers, const char *role, const char *name,
                   td_err *err)
{
    TD_AUTO_FREE char *text = NULL;
    size_t n = 0;
    td_strbuf lines;
    int r = td_file_read(peers, PEERS_MAX_BYTES, &text, &n, err);
    if (r == 0)
        r = check_new(peers, text, role, name, err);
    if (r < 0)
        return r;
    td_strbuf_init(&lines);
    td_strbuf_add(&lines, text, n);
    if (n && text[n - 1] != '\n')
        td_strbuf_adds(&lines, "\n");
    r = make_one(dir, role, name, &lines, err);
    if (r == 0)
        r = write_peers(peers, &lines, err);
    td_strbuf_done(&lines);
    return r;
}

static int make_keys(const td_options *o, td_err *err)
{
    char peers[PATH_MAX];
    const char *dir = o->positional[0];
    if (strlen(dir) > PATH_MAX - 128)
        return td_err_set(err, -ENAMETOOLONG, "%.60s...: the path is too long", dir);
    if (mkdir(dir, 0700) < 0 && errno != EEXIST)
        return td_err_set(err, -errno, "%s: %s", dir, td_errno_text(errno));
    snprintf(peers, sizeof peers, "%s/peers", dir);
    if (o->n_positional == 3)
        return add_one(dir, peers, o->positional[1], o->positional[2], err);
    return make_cluster(o, dir, peers, err);
}

int td_cmd_keys(int argc, char **argv)
{
    static const char usage[] = "tandem keys DIR [ROLE NAME] [options]\n"
                                "  DIR             make DIR/NAME.secret and DIR/NAME.public for a "
                                "router, workers and clients, and DIR/peers\n"
                                "  DIR ROLE NAME   add one to DIR/peers; ROLE: router, prefill, "
                                "decode or client";
    td_options o;
    td_err err = {0};
    if (td_options_parse(&o, TD_SEC_KEYS, argc, argv, &err) < 0) {
        fprintf(stderr, "tandem keys: %s\n", err.text);
        return TD_EXIT_USAGE;
    }
    int status = TD_EXIT_OK;
    if (o.help) {
        td_options_help(&o, usage, o.help_word, stdout);
    } else if (o.n_positional != 1 && o.n_positional != 3) {
        fprintf(stderr, "usage: %s\n", usage);
        status = TD_EXIT_USAGE;
    } else if (make_keys(&o, &err) < 0) {
        fprintf(stderr, "tandem keys: %s\n", err.text);
        status = TD_EXIT_FAILED;
    } else {
        printf("%s/peers goes to every machine, each NAME.secret only to where NAME runs\n",
               o.positional[0]);
    }
    td_options_done(&o);
    return status;
}
