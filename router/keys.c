/* SPDX-License-Identifier: Apache-2.0 */
#include "router/keys.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>

#include "base/cleanup.h"
#include "base/file.h"
#include "base/hash.h"
#include "base/secret.h"
#include "base/banned.h"

enum { KEY_BYTES_MIN = 16, KEYS_MAX = 4096, TENANT_MAX = 64, FILE_MAX = 1 << 20 };

typedef struct key {
    uint8_t hash[32];
    char tenant[TENANT_MAX + 1];
} key;

struct td_keys {
    key *list;
    size_t n;
};

static void hash_key(const char *s, size_t n, uint8_t out[32])
{
    td_hash h;
    td_hash_init(&h, NULL, 0, 32);
    td_hash_add(&h, s, n);
    td_hash_final(&h, out);
}

static int is_space(char c)
{
    return c == ' ' || c == '\t' || c == '\r';
}

static int add_line(td_keys *k, const char *path, int line, const char *s, size_t n,
                    td_err *reterr_err)
{
    while (n && is_space(s[n - 1]))
        n--;
    while (n && is_space(*s)) {
        s++;
        n--;
    }
    if (n == 0 || *s == '#')
        return 0;
    size_t t = 0;
    while (t < n && !is_space(s[t]))
        t++;
    size_t at = t;
    while (at < n && is_space(s[at]))
        at++;
    if (t > TENANT_MAX || n - at < KEY_BYTES_MIN)
        return td_err_set(reterr_err, -EINVAL,
                          "%s:%d: write `TENANT KEY` with a key of at least %d bytes", path, line,
                          KEY_BYTES_MIN);
    if (k->n == KEYS_MAX)
        return td_err_set(reterr_err, -E2BIG, "%s: more than %d keys", path, KEYS_MAX);
    key *e = &k->list[k->n++];
    memcpy(e->tenant, s, t);
    hash_key(s + at, n - at, e->hash);
    return 0;
}

static int check_mode(const char *path, td_err *reterr_err)
{
    struct stat st;
    if (stat(path, &st) < 0)
        return td_err_set(reterr_err, -errno, "%s: %s", path, td_errno_text(errno));
    if (st.st_mode & 077)
        return td_err_set(reterr_err, -EPERM,
                          "%s: others can read it (mode %03o); run chmod 600 on it", path,
                          (unsigned)(st.st_mode & 0777));
    return 0;
}

int td_keys_load(const char *path, td_keys **ret_keys, td_err *reterr_err)
{
    TD_AUTO_FREE char *text = NULL;
    size_t n = 0;
    int r = check_mode(path, reterr_err);
    if (r == 0)
        r = td_file_read(path, FILE_MAX, &text, &n, reterr_err);
    if (r < 0)
        return r;
    td_keys *k = calloc(1, sizeof *k);
    if (k)
        k->list = calloc(KEYS_MAX, sizeof *k->list);
    if (!k || !k->list) {
        td_keys_free(k);
        return td_err_set(reterr_err, -ENOMEM, "%s: out of memory", path);
    }
    int line = 0;
    for (size_t at = 0; r == 0 && at < n;) {
        const char *end = memchr(text + at, '\n', n - at);
        size_t len = end ? (size_t)(end - text) - at : n - at;
        r = add_line(k, path, ++line, text + at, len, reterr_err);
        at += len + 1;
    }
    td_secret_wipe(text, n);
    if (r == 0 && k->n == 0)
        r = td_err_set(reterr_err, -EINVAL, "%s: no key in it; write a line `TENANT KEY`", path);
    if (r < 0) {
        td_keys_free(k);
        return r;
    }
    *ret_keys = k;
    return 0;
}

void td_keys_free(td_keys *k)
{
    if (!k)
        return;
    free(k->list);
    free(k);
}

int td_keys_check(const td_keys *k, const char *authorization, td_str *ret_tenant)
{
    if (!authorization)
        return 0;
    const char *s =
        strncasecmp(authorization, "Bearer ", 7) == 0 ? authorization + 7 : authorization;
    uint8_t hash[32];
    hash_key(s, strlen(s), hash);
    const key *found = NULL;
    for (size_t i = 0; i < k->n; i++) /* every entry: the time tells nothing */
        if (td_secret_equal(hash, k->list[i].hash, sizeof hash))
            found = &k->list[i];
    if (found)
        *ret_tenant = td_str_of(found->tenant);
    return found != NULL;
}
