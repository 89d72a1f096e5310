/* SPDX-License-Identifier: Apache-2.0 */
#include "base/options.h"

#include <ctype.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <unistd.h>

#include "base/bug.h"
#include "base/cleanup.h"
#include "base/file.h"
#include "base/banned.h"

#define DEFAULT_FILE "/etc/tandem/tandem.conf"
enum { FILE_BYTES_MAX = 1 << 20, NAME_MAX_BYTES = 48 };

typedef struct row {
    int sections;
    const char *name;
    td_opt_type type;
    const char *def;
    double min, max;
    const char *arg, *help;
} row;

static const row rows[TD_OPT_ID_MAX] = {
#define TD_OPTION(id, sections, name, type, def, min, max, arg, help)                              \
    [TD_OPT_ID_##id] = {sections, name, type, def, min, max, arg, help},
#include "base/options.def"
#undef TD_OPTION
};

static const struct {
    const char *name;
    int section;
} sections[] = {
    {"common", TD_SEC_COMMON},     {"router", TD_SEC_ROUTER}, {"prefill", TD_SEC_PREFILL},
    {"decode", TD_SEC_DECODE},     {"chat", TD_SEC_CHAT},     {"bench", TD_SEC_BENCH},
    {"serve", TD_SEC_SERVE},       {"keys", TD_SEC_KEYS},     {"model", TD_SEC_MODEL},
    {"quantize", TD_SEC_QUANTIZE}, {"eval", TD_SEC_EVAL},     {"pack", TD_SEC_PACK},
    {"profile", TD_SEC_PROFILE},   {"tune", TD_SEC_TUNE},     {"check", TD_SEC_CHECK},
    {"selftest", TD_SEC_SELFTEST}};

extern char **environ;

/* ---- names ---- */

static unsigned distance(const char *a, const char *b)
{
    unsigned cur[NAME_MAX_BYTES + 1];
    size_t n = strlen(a), m = strlen(b);
    if (n > NAME_MAX_BYTES || m > NAME_MAX_BYTES)
        return NAME_MAX_BYTES;
    for (size_t j = 0; j <= m; j++)
        cur[j] = (unsigned)j;
    for (size_t i = 1; i <= n; i++) {
        unsigned diagonal = cur[0];
        cur[0] = (unsigned)i;
        for (size_t j = 1; j <= m; j++) {
            unsigned best = diagonal + (a[i - 1] != b[j - 1]);
            diagonal = cur[j];
            best = TD_MIN(best, diagonal + 1);
            cur[j] = TD_MIN(best, cur[j - 1] + 1);
        }
    }
    return cur[m];
}

static int find(const char *name, int mask)
{
    for (int i = 0; i < TD_OPT_ID_MAX; i++)
        if ((rows[i].sections & mask) && strcmp(rows[i].name, name) == 0)
            return i;
    return -1;
}

static const char *nearest(const char *name, int mask)
{
    const char *best = NULL;
    unsigned least = 1 + (unsigned)strlen(name) / 2;
    for (int i = 0; i < TD_OPT_ID_MAX; i++) {
        unsigned d = (rows[i].sections & mask) ? distance(name, rows[i].name) : NAME_MAX_BYTES;
        if (d < least) {
            least = d;
            best = rows[i].name;
        }
    }
    return best;
}

static int unknown(const char *where, const char *name, int mask, td_err *reterr_err)
{
    const char *near = nearest(name, mask);
    if (near)
        return td_err_set(reterr_err, -EINVAL, "%s: no option '%.60s'; did you mean '%s'?", where,
                          name, near);
    return td_err_set(reterr_err, -EINVAL, "%s: no option '%.60s'; --help all lists them", where,
                      name);
}

/* ---- values ---- */

static int parse_bool(const char *v)
{
    static const char *const yes[] = {"1", "true", "yes", "on"}, *const no[] = {"0", "false", "no",
                                                                                "off"};
    for (size_t i = 0; i < TD_ARRAY_LEN(yes); i++) {
        if (strcasecmp(v, yes[i]) == 0)
            return 1;
        if (strcasecmp(v, no[i]) == 0)
            return 0;
    }
    return -EINVAL;
}

static int enum_has(const char *words, const char *v)
{
    size_t n = strlen(v);
    for (const char *w = words; *w;) {
        size_t len = strcspn(w, "|");
        if (len == n && memcmp(w, v, n) == 0)
            return 1;
        w += len + (w[len] == '|');
    }
    return 0;
}

static int check_number(const row *r, const char *where, const char *v, td_err *reterr_err)
{
    char *end;
    errno = 0;
    double x = r->type == TD_OPT_INT ? (double)strtoll(v, &end, 10) : strtod(v, &end);
    if (!*v || isspace((unsigned char)*v) || *end || errno || !(x >= r->min && x <= r->max))
        return td_err_set(reterr_err, -EINVAL,
                          "%s: %s must be %s between %.15g and %.15g, not '%.60s'", where, r->name,
                          r->type == TD_OPT_INT ? "an integer" : "a number", r->min, r->max, v);
    return 0;
}

static int check(const row *r, const char *where, const char *v, td_err *reterr_err)
{
    switch (r->type) {
    case TD_OPT_INT:
    case TD_OPT_NUM:
        return check_number(r, where, v, reterr_err);
    case TD_OPT_BOOL:
        if (parse_bool(v) < 0)
            return td_err_set(reterr_err, -EINVAL, "%s: %s must be true or false, not '%.60s'",
                              where, r->name, v);
        return 0;
    case TD_OPT_ENUM:
        if (!enum_has(r->arg, v))
            return td_err_set(reterr_err, -EINVAL, "%s: %s must be one of %s, not '%.60s'", where,
                              r->name, r->arg, v);
        return 0;
    case TD_OPT_STR:
        return 0;
    }
    return 0;
}

static int set(td_options *o, int id, const char *v, td_origin origin, const char *where,
               td_err *reterr_err)
{
    int r = check(&rows[id], where, v, reterr_err);
    if (r < 0)
        return r;
    if (o->value[id] && o->origin[id] > origin)
        return 0;
    char *copy = strdup(v);
    if (!copy)
        return td_err_set(reterr_err, -ENOMEM, "%s: out of memory", where);
    free(o->value[id]);
    o->value[id] = copy;
    o->origin[id] = origin;
    return 0;
}

/* ---- command line ---- */

static int take_help(td_options *o, int *i, int argc, char **argv)
{
    o->help = 1;
    if (*i + 1 < argc && argv[*i + 1][0] != '-')
        o->help_word = argv[++*i];
    return 0;
}

static int take_long(td_options *o, int *i, int argc, char **argv, td_err *reterr_err)
{
    char name[NAME_MAX_BYTES + 1];
    const char *arg = argv[*i] + 2, *value = strchr(arg, '=');
    size_t n = value ? (size_t)(value - arg) : strlen(arg);
    if (n > NAME_MAX_BYTES)
        return td_err_set(reterr_err, -EINVAL, "no option '%.60s'; --help all lists them",
                          argv[*i]);
    memcpy(name, arg, n);
    name[n] = 0;
    if (strcmp(name, "help") == 0 && !value)
        return take_help(o, i, argc, argv);
    int id = find(name, o->sections), negated = 0;
    if (id < 0 && strncmp(name, "no-", 3) == 0) {
        id = find(name + 3, o->sections);
        negated = id >= 0 && rows[id].type == TD_OPT_BOOL;
        if (!negated)
            id = -1;
    }
    if (id < 0)
        return unknown("command line", name, o->sections, reterr_err);
    if (rows[id].type == TD_OPT_BOOL && !value)
        return set(o, id, negated ? "0" : "1", TD_ORIGIN_CLI, "command line", reterr_err);
    if (negated)
        return td_err_set(reterr_err, -EINVAL, "command line: --%s takes no value", name);
    if (!value && *i + 1 >= argc)
        return td_err_set(reterr_err, -EINVAL, "command line: --%s needs a value (%s)", name,
                          rows[id].arg);
    return set(o, id, value ? value + 1 : argv[++*i], TD_ORIGIN_CLI, "command line", reterr_err);
}

static int parse_argv(td_options *o, int argc, char **argv, td_err *reterr_err)
{
    int only_positional = 0;
    for (int i = 0; i < argc; i++) {
        const char *a = argv[i];
        int r = 0;
        if (!only_positional && strcmp(a, "--") == 0)
            only_positional = 1;
        else if (!only_positional && strcmp(a, "-h") == 0)
            r = take_help(o, &i, argc, argv);
        else if (!only_positional && strncmp(a, "--", 2) == 0)
            r = take_long(o, &i, argc, argv, reterr_err);
        else if (!only_positional && a[0] == '-' && a[1])
            r = td_err_set(reterr_err, -EINVAL,
                           "command line: no option '%.60s'; options are spelled --name", a);
        else if (o->n_positional < (int)TD_ARRAY_LEN(o->positional))
            o->positional[o->n_positional++] = a;
        else
            r = td_err_set(reterr_err, -EINVAL, "command line: too many arguments at '%.60s'", a);
        if (r < 0)
            return r;
    }
    return 0;
}

/* ---- environment: TANDEM_<SECTION>_<KEY> ---- */

static int take_variable(td_options *o, const char *entry, td_err *reterr_err)
{
    char where[120], key[NAME_MAX_BYTES + 1];
    const char *eq = strchr(entry, '=');
    size_t n = eq ? (size_t)(eq - entry) : 0;
    if (n <= 7 || n >= sizeof where || strncmp(entry, "TANDEM_", 7) != 0)
        return 0;
    snprintf(where, sizeof where, "environment variable %.*s", (int)TD_MIN(n, sizeof where - 30),
             entry);
    for (size_t s = 0; s < TD_ARRAY_LEN(sections); s++) {
        size_t len = strlen(sections[s].name);
        if (strncasecmp(entry + 7, sections[s].name, len) != 0 || entry[7 + len] != '_')
            continue;
        const char *k = entry + 7 + len + 1;
        size_t kn = (size_t)(eq - k);
        if (kn > NAME_MAX_BYTES)
            return unknown(where, k, sections[s].section, reterr_err);
        for (size_t i = 0; i < kn; i++)
            key[i] = k[i] == '_' ? '-' : (char)tolower((unsigned char)k[i]);
        key[kn] = 0;
        int id = find(key, sections[s].section);
        if (id < 0)
            return unknown(where, key, sections[s].section, reterr_err);
        if (!(o->sections & sections[s].section) || !(rows[id].sections & o->sections))
            return 0; /* another command's */
        /* TANDEM_COMMON_ gives way to the command's own section, whatever the order of the
         * environment */
        if (sections[s].section == TD_SEC_COMMON && o->value[id] && o->origin[id] == TD_ORIGIN_ENV)
            return check(&rows[id], where, eq + 1, reterr_err);
        return set(o, id, eq + 1, TD_ORIGIN_ENV, where, reterr_err);
    }
    return 0;
}

/* ---- INI file ---- */

typedef struct ini {
    td_options *o;
    const char *path;
    int line, section; /* section 0: none yet */
    unsigned char seen[TD_ARRAY_LEN(sections)][TD_OPT_ID_MAX];
    size_t section_index;
    td_err *err;
} ini;

static char *trim(char *s, size_t n)
{
    while (n && isspace((unsigned char)s[n - 1]))
        n--;
    s[n] = 0;
    while (isspace((unsigned char)*s))
        s++;
    return s;
}

static int ini_section(ini *f, char *name)
{
    const char *best = NULL;
    unsigned least = 4;
    for (size_t s = 0; s < TD_ARRAY_LEN(sections); s++) {
        unsigned d = distance(name, sections[s].name);
        if (d == 0) {
            f->section = sections[s].section;
            f->section_index = s;
            return 0;
        }
        if (d < least) {
            least = d;
            best = sections[s].name;
        }
    }
    return td_err_set(f->err, -EINVAL, "%s:%d: no section [%.40s]%s%s%s", f->path, f->line, name,
                      best ? "; did you mean ["
                           : "; there are common, router, prefill, decode, serve, chat, bench",
                      best ? best : "", best ? "]?" : "");
}

static int ini_pair(ini *f, char *key, char *value)
{
    char where[300];
    snprintf(where, sizeof where, "%.260s:%d", f->path, f->line);
    if (!f->section)
        return td_err_set(f->err, -EINVAL, "%s: '%.40s' stands before any [section]", where, key);
    int id = find(key, f->section);
    if (id < 0)
        return unknown(where, key, f->section, f->err);
    if (f->seen[f->section_index][id]++)
        return td_err_set(f->err, -EINVAL, "%s: %s is set twice in this section", where, key);
    if (!(f->o->sections & f->section) || !(rows[id].sections & f->o->sections)) {
        return check(&rows[id], where, value, f->err); /* another service's: still checked */
    }
    /* [common] gives way to a service's own section, whatever their order */
    if (f->section == TD_SEC_COMMON && f->o->value[id] && f->o->origin[id] == TD_ORIGIN_FILE)
        return check(&rows[id], where, value, f->err);
    return set(f->o, id, value, TD_ORIGIN_FILE, where, f->err);
}

static int ini_line(ini *f, char *s, size_t n)
{
    s = trim(s, n);
    n = strlen(s);
    if (!n || *s == '#' || *s == ';')
        return 0;
    if (*s == '[') {
        if (s[n - 1] != ']')
            return td_err_set(f->err, -EINVAL, "%s:%d: a section reads [name]", f->path, f->line);
        return ini_section(f, trim(s + 1, n - 2));
    }
    char *eq = strchr(s, '=');
    if (!eq)
        return td_err_set(f->err, -EINVAL, "%s:%d: a line reads key = value", f->path, f->line);
    char *value = trim(eq + 1, n - (size_t)(eq + 1 - s));
    return ini_pair(f, trim(s, (size_t)(eq - s)), value);
}

static int parse_file(td_options *o, const char *path, td_err *reterr_err)
{
    TD_AUTO_FREE char *text = NULL;
    size_t n = 0;
    int r = td_file_read(path, FILE_BYTES_MAX, &text, &n, reterr_err);
    if (r < 0)
        return r;
    if (memchr(text, 0, n))
        return td_err_set(reterr_err, -EINVAL, "%s: holds a NUL byte; a text file is needed", path);
    ini f = {.o = o, .path = path, .err = reterr_err};
    for (char *line = text; r == 0 && line < text + n;) {
        char *end = memchr(line, '\n', (size_t)(text + n - line));
        size_t len = end ? (size_t)(end - line) : (size_t)(text + n - line);
        f.line++;
        r = ini_line(&f, line, len);
        line += len + 1;
    }
    return r;
}

/* ---- all together ---- */

static int parse_all(td_options *o, int argc, char **argv, td_err *reterr_err)
{
    int r = parse_argv(o, argc, argv, reterr_err);
    if (r < 0 || o->help)
        return r;
    for (char **e = environ; e && *e; e++)
        if ((r = take_variable(o, *e, reterr_err)) < 0)
            return r;
    const char *file = td_opt_str(o, TD_OPT_ID_CONFIG);
    if (!(rows[TD_OPT_ID_CONFIG].sections & o->sections))
        return 0;
    if (*file)
        return parse_file(o, file, reterr_err);
    return access(DEFAULT_FILE, R_OK) == 0 ? parse_file(o, DEFAULT_FILE, reterr_err) : 0;
}

int td_options_parse(td_options *o, int wanted, int argc, char **argv, td_err *reterr_err)
{
    *o = (td_options){.sections = wanted};
    int r = parse_all(o, argc, argv, reterr_err);
    if (r < 0)
        td_options_done(o);
    return r;
}

void td_options_done(td_options *o)
{
    for (int i = 0; i < TD_OPT_ID_MAX; i++) {
        free(o->value[i]);
        o->value[i] = NULL;
    }
}

int td_options_set(td_options *o, td_opt id, const char *value, td_err *reterr_err)
{
    return set(o, (int)id, value, TD_ORIGIN_CLI, "option", reterr_err);
}

const char *td_opt_str(const td_options *o, td_opt id)
{
    return o->value[id] ? o->value[id] : rows[id].def;
}

int64_t td_opt_int(const td_options *o, td_opt id)
{
    TD_BUG_ON(rows[id].type != TD_OPT_INT);
    return strtoll(td_opt_str(o, id), NULL, 10);
}

double td_opt_num(const td_options *o, td_opt id)
{
    TD_BUG_ON(rows[id].type != TD_OPT_NUM);
    return strtod(td_opt_str(o, id), NULL);
}

int td_opt_bool(const td_options *o, td_opt id)
{
    TD_BUG_ON(rows[id].type != TD_OPT_BOOL);
    return parse_bool(td_opt_str(o, id)) == 1;
}

int td_opt_is_set(const td_options *o, td_opt id)
{
    return o->value[id] != NULL;
}

int td_options_at_most(td_options *o, int n, td_err *reterr_err)
{
    if (o->n_positional <= n)
        return 0;
    int r = td_err_set(reterr_err, -EINVAL,
                       "command line: '%.60s' is one argument too many; options are spelled --name",
                       o->positional[n]);
    td_options_done(o);
    return r;
}

/* ---- what is generated from the table ---- */

static const char *shown_default(const row *r)
{
    if (r->type == TD_OPT_BOOL)
        return strcmp(r->def, "1") == 0 ? "on" : "off";
    return *r->def ? r->def : "none";
}

static void help_row(const row *r, FILE *out)
{
    char left[80];
    snprintf(left, sizeof left, "--%s%s %s", r->type == TD_OPT_BOOL ? "[no-]" : "", r->name,
             r->arg);
    fprintf(out, "  %-34s %s", left, r->help);
    if (r->type == TD_OPT_BOOL || *r->def) /* the text says what its absence means */
        fprintf(out, " (%s)", shown_default(r));
    fputc('\n', out);
}

static int help_wants(const row *r, const char *word)
{
    return !word || strcmp(word, "all") == 0 || strstr(r->name, word) || strcasestr(r->help, word);
}

/* An option stands under the first of the command's sections that has it. */
static int home_section(const row *r, int mask)
{
    for (size_t s = 0; s < TD_ARRAY_LEN(sections); s++)
        if (r->sections & mask & sections[s].section)
            return (int)s;
    return -1;
}

/* Rows of one section after its heading; at most *room of them. Returns how many did not fit. */
static int help_section(const td_options *o, int s, const char *word, int *room, FILE *out)
{
    int hidden = 0, n = 0;
    for (int i = 0; i < TD_OPT_ID_MAX; i++) {
        if (home_section(&rows[i], o->sections) != s || !help_wants(&rows[i], word))
            continue;
        if (*room == 0) {
            hidden++;
            continue;
        }
        if (n++ == 0)
            fprintf(out, "[%s]\n", sections[s].name);
        help_row(&rows[i], out);
        --*room;
    }
    return hidden;
}

void td_options_help(const td_options *o, const char *usage, const char *word, FILE *out)
{
    enum { SHORT_ROWS = 15 };
    int room = word ? TD_OPT_ID_MAX : SHORT_ROWS, hidden = 0;
    fprintf(out, "usage: %s\n\n", usage);
    for (size_t s = 0; s < TD_ARRAY_LEN(sections); s++)
        hidden += help_section(o, (int)s, word, &room, out);
    if (room == TD_OPT_ID_MAX)
        fprintf(out, "  no option matches '%s'\n", word);
    if (hidden)
        fprintf(out, "  ... and %d more: --help all, or --help WORD\n", hidden);
    fprintf(
        out,
        "\nEach option can also be set in an INI file (--config) or as TANDEM_<SECTION>_<KEY>;\n"
        "the command line wins over the environment, that over the file.\n");
}

static void section_names(int mask, FILE *out)
{
    int first = 1;
    for (size_t s = 0; s < TD_ARRAY_LEN(sections); s++)
        if (mask & sections[s].section) {
            fprintf(out, "%s%s", first ? "" : ", ", sections[s].name);
            first = 0;
        }
}

void td_options_docs(FILE *out)
{
    fprintf(out, "# Options\n\nOne table (`base/options.def`) gives parsing, help, completions and "
                 "this page. Command line "
                 "`--name`,\nenvironment `TANDEM_<SECTION>_<NAME>`, INI file `[section]` `name = "
                 "value`; the first of these "
                 "that is set wins.\n\n| option | sections | value | default | what it does "
                 "|\n|---|---|---|---|---|\n");
    for (int i = 0; i < TD_OPT_ID_MAX; i++) {
        const row *r = &rows[i];
        fprintf(out, "| `--%s` | ", r->name);
        section_names(r->sections, out);
        fprintf(out, " | ");
        for (const char *p = r->type == TD_OPT_BOOL ? "on or off" : r->arg; *p; p++)
            fputs(*p == '|' ? "\\|" : (char[]){*p, 0}, out);
        fprintf(out, " | `%s` | %s |\n", shown_default(r), r->help);
    }
}

void td_options_words(int mask, FILE *out)
{
    for (int i = 0; i < TD_OPT_ID_MAX; i++)
        if (rows[i].sections & mask)
            fprintf(out, "--%s ", rows[i].name);
}
