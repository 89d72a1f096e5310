/* SPDX-License-Identifier: Apache-2.0 */
#include "rpc/curve.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <zmq.h>

#include "base/bug.h"
#include "base/cleanup.h"
#include "base/file.h"
#include "base/secret.h"
#include "base/banned.h"

enum { SECRET_FILE_MAX = 256, PEERS_FILE_MAX = 1 << 20 };

static const struct {
    td_role role;
    const char *name;
} roles[] = {{TD_ROLE_ROUTER, "router"},
             {TD_ROLE_PREFILL, "prefill"},
             {TD_ROLE_DECODE, "decode"},
             {TD_ROLE_CLIENT, "client"}};

const char *td_role_name(td_role role)
{
    for (size_t i = 0; i < TD_ARRAY_LEN(roles); i++)
        if (roles[i].role == role)
            return roles[i].name;
    return "unknown";
}

td_role td_role_by_name(const char *name, size_t n)
{
    for (size_t i = 0; i < TD_ARRAY_LEN(roles); i++)
        if (strlen(roles[i].name) == n && memcmp(roles[i].name, name, n) == 0)
            return roles[i].role;
    return 0;
}

/* ---- keys ---- */

void td_curve_text(const uint8_t key[TD_CURVE_KEY_BYTES], char out[TD_CURVE_TEXT_BYTES])
{
    zmq_z85_encode(out, key, TD_CURVE_KEY_BYTES);
}

/* libzmq's decoder is lenient: what it makes must give the same text again. */
int td_curve_parse(const char *text, size_t n, uint8_t ret_key[TD_CURVE_KEY_BYTES])
{
    char copy[TD_CURVE_TEXT_BYTES] = "", again[TD_CURVE_TEXT_BYTES];
    uint8_t key[TD_CURVE_KEY_BYTES];
    int r = -EINVAL;
    if (n != sizeof copy - 1)
        return r;
    for (size_t i = 0; i < n; i++)
        if (text[i] <= ' ' || text[i] > '~')
            return r;
    memcpy(copy, text, n);
    if (zmq_z85_decode(key, copy) && zmq_z85_encode(again, key, sizeof key) &&
        memcmp(copy, again, n) == 0) {
        memcpy(ret_key, key, sizeof key);
        r = 0;
    }
    td_secret_wipe(copy, sizeof copy);
    td_secret_wipe(again, sizeof again);
    td_secret_wipe(key, sizeof key);
    return r;
}

static int have_curve(td_err *err)
{
    if (zmq_has("curve"))
        return 0;
    return td_err_set(err, -ENOTSUP,
                      "this libzmq was built without CURVE: install one with libsodium (Debian's "
                      "libzmq5 has it)");
}

int td_curve_generate(td_curve_pair *ret_pair, td_err *reterr_err)
{
    char pub[TD_CURVE_TEXT_BYTES], sec[TD_CURVE_TEXT_BYTES];
    int r = have_curve(reterr_err);
    if (r < 0)
        return r;
    if (zmq_curve_keypair(pub, sec) < 0)
        r = td_err_set(reterr_err, -zmq_errno(), "cannot make a key: %s",
                       zmq_strerror(zmq_errno()));
    else if (td_curve_parse(pub, sizeof pub - 1, ret_pair->public_key) < 0 ||
             td_curve_parse(sec, sizeof sec - 1, ret_pair->secret_key) < 0)
        r = td_err_set(reterr_err, -EIO, "libzmq made a key that is not Z85");
    td_secret_wipe(sec, sizeof sec);
    return r;
}

/* systemd gives a service its credentials by an access list, whose mask shows as the group's bits.
 */
static mode_t forbidden_bits(const char *path)
{
    const char *dir = getenv("CREDENTIALS_DIRECTORY");
    size_t n = dir ? strlen(dir) : 0;
    return n && strncmp(path, dir, n) == 0 && path[n] == '/' ? 027 : 077;
}

static int check_mode(const char *path, mode_t forbidden, const char *what, const char *remedy,
                      td_err *err)
{
    struct stat st;
    if (stat(path, &st) < 0)
        return td_err_set(err, -errno, "%s: %s; `tandem keys DIR` makes a cluster's keys", path,
                          td_errno_text(errno));
    if (st.st_mode & forbidden)
        return td_err_set(err, -EPERM, "%s: others can %s it (mode %03o): run chmod %s on it", path,
                          what, (unsigned)(st.st_mode & 0777), remedy);
    return 0;
}

static size_t trim(const char **text, size_t n)
{
    const char *s = *text;
    while (n && strchr(" \t\r\n", s[n - 1]))
        n--;
    while (n && strchr(" \t\r\n", *s)) {
        s++;
        n--;
    }
    *text = s;
    return n;
}

static int public_of(const char *path, td_curve_pair *pair, td_err *err)
{
    char pub[TD_CURVE_TEXT_BYTES], sec[TD_CURVE_TEXT_BYTES];
    td_curve_text(pair->secret_key, sec);
    int r = 0;
    if (zmq_curve_public(pub, sec) < 0 || td_curve_parse(pub, sizeof pub - 1, pair->public_key) < 0)
        r = td_err_set(err, -EINVAL, "%s: no public key follows from it: %s", path,
                       zmq_strerror(zmq_errno()));
    td_secret_wipe(sec, sizeof sec);
    return r;
}

int td_curve_load(const char *path, td_curve_pair *ret_pair, td_err *reterr_err)
{
    TD_AUTO_FREE char *text = NULL;
    size_t n = 0;
    td_curve_pair pair;
    int r = have_curve(reterr_err);
    if (r == 0)
        r = check_mode(path, forbidden_bits(path), "read", "600", reterr_err);
    if (r == 0)
        r = td_file_read(path, SECRET_FILE_MAX, &text, &n, reterr_err);
    if (r < 0)
        return r;
    const char *s = text;
    size_t len = trim(&s, n);
    if (td_curve_parse(s, len, pair.secret_key) < 0)
        r = td_err_set(reterr_err, -EINVAL,
                       "%s: not a secret key: %zu characters where Z85 of 40 is needed; `tandem "
                       "keys DIR` makes them",
                       path, len);
    else
        r = public_of(path, &pair, reterr_err);
    if (r == 0)
        *ret_pair = pair;
    td_secret_wipe(&pair, sizeof pair);
    td_secret_wipe(text, n);
    return r;
}

/* ---- the allow-list ---- */

struct td_peers {
    size_t n, cap;
    td_peer *list;
};

/* Next word of a line; 0 at its end. */
static size_t word(const char **at, const char *end)
{
    while (*at < end && strchr(" \t\r", **at))
        (*at)++;
    const char *s = *at;
    while (s < end && !strchr(" \t\r", *s))
        s++;
    return (size_t)(s - *at);
}

static int name_valid(const char *s, size_t n)
{
    if (n == 0 || n > TD_PEER_NAME_MAX)
        return 0;
    for (size_t i = 0; i < n; i++)
        if (!((s[i] >= 'a' && s[i] <= 'z') || (s[i] >= 'A' && s[i] <= 'Z') ||
              (s[i] >= '0' && s[i] <= '9') || s[i] == '-' || s[i] == '_' || s[i] == '.'))
            return 0;
    return 1;
}

static int add_peer(td_peers *p, const char *path, unsigned line, const td_peer *peer, td_err *err)
{
    for (size_t i = 0; i < p->n; i++) {
        if (memcmp(p->list[i].key, peer->key, sizeof peer->key) == 0)
            return td_err_set(err, -EINVAL,
                              "%s:%u: the key of %s is that of %s: a key is one's own", path, line,
                              peer->name, p->list[i].name);
        if (strcmp(p->list[i].name, peer->name) == 0)
            return td_err_set(err, -EINVAL, "%s:%u: the name %s is taken", path, line, peer->name);
    }
    if (p->n == TD_PEERS_MAX)
        return td_err_set(err, -E2BIG, "%s: more than %d peers", path, TD_PEERS_MAX);
    if (p->n == p->cap) {
        size_t cap = p->cap ? 2 * p->cap : 16;
        td_peer *list = reallocarray(p->list, cap, sizeof *list);
        if (!list)
            return td_err_set(err, -ENOMEM, "%s: out of memory", path);
        p->list = list;
        p->cap = cap;
    }
    p->list[p->n++] = *peer;
    return 0;
}

static int parse_line(td_peers *p, const char *path, unsigned line, const char *s, const char *end,
                      td_err *err)
{
    td_peer peer = {0};
    size_t n = word(&s, end);
    if (n == 0 || *s == '#')
        return 0;
    peer.role = td_role_by_name(s, n);
    if (!peer.role)
        return td_err_set(err, -EINVAL, "%s:%u: no role %.*s: router, prefill, decode or client",
                          path, line, (int)TD_MIN(n, (size_t)32), s);
    s += n;
    n = word(&s, end);
    if (!name_valid(s, n))
        return td_err_set(err, -EINVAL,
                          "%s:%u: a name has 1 to %d of A-Z a-z 0-9 - _ . : write `ROLE NAME "
                          "PUBLIC-KEY`",
                          path, line, TD_PEER_NAME_MAX);
    memcpy(peer.name, s, n);
    s += n;
    n = word(&s, end);
    if (td_curve_parse(s, n, peer.key) < 0)
        return td_err_set(err, -EINVAL,
                          "%s:%u: the key of %s is not Z85 of 40 characters: copy it from the "
                          ".public file",
                          path, line, peer.name);
    s += n;
    if (word(&s, end) > 0)
        return td_err_set(err, -EINVAL, "%s:%u: more than `ROLE NAME PUBLIC-KEY`", path, line);
    return add_peer(p, path, line, &peer, err);
}

int td_peers_parse(const char *path, const char *text, size_t n, td_peers **ret_peers,
                   td_err *reterr_err)
{
    td_peers *p = calloc(1, sizeof *p);
    if (!p)
        return td_err_set(reterr_err, -ENOMEM, "%s: out of memory", path);
    int r = 0;
    unsigned line = 0;
    if (memchr(text, 0, n))
        r = td_err_set(reterr_err, -EINVAL, "%s: not text: it holds a NUL byte", path);
    for (size_t at = 0; r == 0 && at < n;) {
        const char *end = memchr(text + at, '\n', n - at);
        size_t len = end ? (size_t)(end - text) - at : n - at;
        r = parse_line(p, path, ++line, text + at, text + at + len, reterr_err);
        at += len + 1;
    }
    if (r == 0 && p->n == 0)
        r = td_err_set(reterr_err, -EINVAL,
                       "%s: nobody is in it; `tandem keys DIR` makes a cluster's keys", path);
    if (r < 0) {
        td_peers_free(p);
        return r;
    }
    *ret_peers = p;
    return 0;
}

int td_peers_load(const char *path, td_peers **ret_peers, td_err *reterr_err)
{
    TD_AUTO_FREE char *text = NULL;
    size_t n = 0;
    int r = check_mode(path, 022, "write", "go-w", reterr_err);
    if (r == 0)
        r = td_file_read(path, PEERS_FILE_MAX, &text, &n, reterr_err);
    return r < 0 ? r : td_peers_parse(path, text, n, ret_peers, reterr_err);
}

void td_peers_free(td_peers *p)
{
    if (!p)
        return;
    free(p->list);
    free(p);
}

const td_peer *td_peers_find(const td_peers *p, const uint8_t key[TD_CURVE_KEY_BYTES])
{
    for (size_t i = 0; i < p->n; i++)
        if (memcmp(p->list[i].key, key, TD_CURVE_KEY_BYTES) == 0)
            return &p->list[i];
    return NULL;
}

const td_peer *td_peers_only(const td_peers *p, td_role role, size_t *ret_n)
{
    const td_peer *found = NULL;
    *ret_n = 0;
    for (size_t i = 0; i < p->n; i++)
        if (p->list[i].role == role && (*ret_n)++ == 0)
            found = &p->list[i];
    return *ret_n == 1 ? found : NULL;
}
