/* SPDX-License-Identifier: Apache-2.0 */
#include "rpc/link.h"

#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <zmq.h>

#include "base/bug.h"
#include "base/clock.h"
#include "base/secret.h"
#include "rpc/network.h"
#include "rpc/zap.h"
#include "base/banned.h"

#define QUIET_US (10 * TD_S)

typedef struct tally {
    _Atomic uint64_t n;
    uint64_t told_us, n_told; /* when and how many were told last */
} tally;

struct td_link {
    td_link_config c;
    char *peers_path;
    td_curve_pair pair;
    int has_keys, zap, kv_private;
    td_network network;   /* kv_private */
    pthread_mutex_t lock; /* peers, tallies' told */
    td_peers *peers;
    _Atomic uint32_t generation;
    tally tallies[TD_DOOR_MAX][TD_DENIED_MAX];
};

static const struct {
    const char *name;
    unsigned admits;    /* td_role bits */
    const char *who;    /* them, in words */
    const char *server; /* who binds it */
} doors[TD_DOOR_MAX] = {
    [TD_DOOR_CONTROL] = {"control", TD_ROLE_PREFILL | TD_ROLE_DECODE, "prefill,decode", "router"},
    [TD_DOOR_CLIENT] = {"client", TD_ROLE_CLIENT, "client", "router"},
    [TD_DOOR_KV] = {"kv", TD_ROLE_PREFILL, "prefill", "decode worker"},
};

static const char *const reasons[TD_DENIED_MAX] = {
    [TD_DENIED_KEY] = "unknown_key", [TD_DENIED_ROLE] = "wrong_role",
    [TD_DENIED_ADDRESS] = "address", [TD_DENIED_HANDSHAKE] = "handshake",
    [TD_DENIED_REFUSED] = "refused",
};

const char *td_door_name(td_door door)
{
    return doors[door].name;
}

/* ---- open and close ---- */

static int check_self(const td_link *l, const td_link_config *c, td_err *err)
{
    char text[TD_CURVE_TEXT_BYTES];
    const td_peer *self = td_peers_find(l->peers, l->pair.public_key);
    td_curve_text(l->pair.public_key, text);
    if (!self)
        return td_err_set(err, -EINVAL,
                          "%s: the key of %s is not listed: add the line `%s NAME %s`, in every "
                          "copy of that file",
                          c->peers, c->secret, td_role_name(c->self), text);
    if (self->role != c->self)
        return td_err_set(err, -EINVAL,
                          "%s: %s is the key of %s, a %s, and this process is a %s: give it a key "
                          "of that role",
                          c->peers, c->secret, self->name, td_role_name(self->role),
                          td_role_name(c->self));
    return 0;
}

static int load(td_link *l, const td_link_config *c, td_err *err)
{
    int secret = c->secret && *c->secret, peers = c->peers && *c->peers;
    if (!secret && !peers)
        return 0;
    if (secret != peers)
        return td_err_set(err, -EINVAL,
                          "curve-secret and curve-peers go together: %s is missing; `tandem keys "
                          "DIR` makes both files",
                          secret ? "curve-peers" : "curve-secret");
    int r = td_curve_load(c->secret, &l->pair, err);
    if (r == 0)
        r = td_peers_load(c->peers, &l->peers, err);
    if (r == 0)
        r = check_self(l, c, err);
    if (r == 0 && !(l->peers_path = strdup(c->peers)))
        r = td_err_set(err, -ENOMEM, "%s: out of memory", c->peers);
    l->has_keys = r == 0;
    return r;
}

static int load_private(td_link *l, const td_link_config *c, td_err *err)
{
    if (!c->kv_private)
        return 0;
    if (!*c->kv_private)
        return td_err_set(
            err, -EINVAL,
            "kv-link = private needs kv-private = ADDRESS/BITS: the network on which KV "
            "blocks may travel unencrypted");
    if (!l->has_keys)
        return td_err_set(err, -EINVAL,
                          "kv-link = private needs curve-secret and curve-peers: the key of each "
                          "ticket travels on the control link");
    l->kv_private = 1;
    int r = td_network_parse(c->kv_private, &l->network, err);
    if (r < 0)
        td_err_prefix(err, "kv-private");
    return r;
}

int td_link_open(const td_link_config *config, td_link **ret_link, td_err *reterr_err)
{
    td_link *l = calloc(1, sizeof *l);
    if (!l)
        return td_err_set(reterr_err, -ENOMEM, "link: out of memory");
    (void)mlock(&l->pair, sizeof l->pair); /* a limit on locked memory may forbid it */
    pthread_mutex_init(&l->lock, NULL);
    l->c = *config;
    l->c.secret = l->c.peers = l->c.kv_private = NULL;
    int r = load(l, config, reterr_err);
    if (r == 0)
        r = load_private(l, config, reterr_err);
    if (r == 0) {
        r = td_zap_start(l->has_keys, reterr_err);
        l->zap = r == 0;
    }
    if (r < 0) {
        td_link_close(l);
        return r;
    }
    *ret_link = l;
    return 0;
}

void td_link_close(td_link *l)
{
    if (!l)
        return;
    if (l->zap)
        td_zap_stop();
    td_peers_free(l->peers);
    free(l->peers_path);
    td_secret_wipe(&l->pair, sizeof l->pair);
    (void)munlock(&l->pair, sizeof l->pair);
    pthread_mutex_destroy(&l->lock);
    free(l);
}

int td_link_reload(td_link *l, td_err *reterr_err)
{
    td_peers *fresh;
    if (!l->has_keys)
        return 0;
    int r = td_peers_load(l->peers_path, &fresh, reterr_err);
    if (r < 0)
        return r;
    pthread_mutex_lock(&l->lock);
    td_peers *old = l->peers;
    l->peers = fresh;
    atomic_fetch_add(&l->generation, 1);
    pthread_mutex_unlock(&l->lock);
    td_peers_free(old);
    return 0;
}

/* ---- questions ---- */

const td_curve_pair *td_link_keys(const td_link *l)
{
    return l && l->has_keys ? &l->pair : NULL;
}

uint32_t td_link_generation(const td_link *l)
{
    return atomic_load_explicit(&l->generation, memory_order_relaxed);
}

/* Copies the peer out: the list may be replaced any time. */
static int find(td_link *l, const uint8_t key[TD_CURVE_KEY_BYTES], td_peer *ret_peer)
{
    pthread_mutex_lock(&l->lock);
    const td_peer *p = td_peers_find(l->peers, key);
    if (p)
        *ret_peer = *p;
    pthread_mutex_unlock(&l->lock);
    return p ? 0 : -ENOENT;
}

int td_link_router_key(td_link *l, uint8_t ret_key[TD_CURVE_KEY_BYTES], td_err *reterr_err)
{
    size_t n;
    pthread_mutex_lock(&l->lock);
    const td_peer *p = td_peers_only(l->peers, TD_ROLE_ROUTER, &n);
    if (p)
        memcpy(ret_key, p->key, TD_CURVE_KEY_BYTES);
    pthread_mutex_unlock(&l->lock);
    if (p)
        return 0;
    return td_err_set(reterr_err, -ENOENT,
                      "%s: %zu lines of role router, one is needed: leave that of the router this "
                      "process dials (routers may share a key)",
                      l->peers_path, n);
}

int td_link_identify(td_link *l, const char *user_id, td_peer *ret_peer)
{
    uint8_t key[TD_CURVE_KEY_BYTES];
    if (td_curve_parse(user_id, strlen(user_id), key) < 0)
        return -ENOENT;
    return find(l, key, ret_peer);
}

int td_link_kv_private(const td_link *l)
{
    return l && l->kv_private;
}

int td_link_check_private(const td_link *l, const char *address, td_err *reterr_err)
{
    if (td_network_has(&l->network, address))
        return 0;
    return td_err_set(
        reterr_err, -EACCES,
        "%s: not in the network of kv-private: use an address of it, or kv-link = curve", address);
}

int td_link_is_listed(td_link *l, const uint8_t key[TD_CURVE_KEY_BYTES], td_role role)
{
    td_peer p;
    return find(l, key, &p) == 0 && p.role == role;
}

/* ---- what happens at the doors ---- */

/* Count; 1 when it is time to speak of it. */
static int tell(td_link *l, td_door door, td_denied why, uint64_t *ret_silent)
{
    tally *t = &l->tallies[door][why];
    uint64_t n = atomic_fetch_add_explicit(&t->n, 1, memory_order_relaxed) + 1, now = td_now_us();
    if (!l->c.on_event || (t->n_told && now - t->told_us < QUIET_US))
        return 0;
    *ret_silent = n - t->n_told - 1;
    t->told_us = now;
    t->n_told = n;
    return 1;
}

__attribute__((format(printf, 4, 5))) static void say(td_link *l, const char *name, int is_error,
                                                      const char *fmt, ...)
{
    char text[700];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    l->c.on_event(l->c.arg, &(td_link_event){.is_error = is_error, .name = name, .text = text});
}

static void deny(td_link *l, td_door door, td_denied why, const char *address, const char *key,
                 const td_peer *peer)
{
    uint64_t silent = 0;
    if (!tell(l, door, why, &silent))
        return;
    if (why == TD_DENIED_ROLE)
        say(l, "link_denied", 1,
            "door=%s address=%s reason=%s name=%s role=%s admits=%s before=%llu", doors[door].name,
            address, reasons[why], peer->name, td_role_name(peer->role), doors[door].who,
            (unsigned long long)silent);
    else
        say(l, "link_denied", 1,
            "door=%s address=%s reason=%s key=\"%s\" before=%llu remedy=\"if it is one of ours, "
            "add "
            "its line to curve-peers and send SIGHUP\"",
            doors[door].name, address, reasons[why], key, (unsigned long long)silent);
}

int td_link_decide(td_link *l, td_door door, const char *address, const void *key, size_t n_key,
                   char ret_user_id[TD_CURVE_TEXT_BYTES])
{
    td_peer peer = {0};
    uint8_t k[TD_CURVE_KEY_BYTES];
    if (!l->has_keys || n_key != sizeof k)
        return 0;
    memcpy(k, key, sizeof k);
    td_curve_text(k, ret_user_id);
    int known = find(l, k, &peer) == 0;
    if (known && (doors[door].admits & peer.role))
        return 1;
    deny(l, door, known ? TD_DENIED_ROLE : TD_DENIED_KEY, address, ret_user_id, &peer);
    return 0;
}

int td_link_decide_private(td_link *l, const char *address)
{
    uint64_t silent = 0;
    if (td_network_has(&l->network, address))
        return 1;
    if (tell(l, TD_DOOR_KV, TD_DENIED_ADDRESS, &silent))
        say(l, "link_denied", 1,
            "door=%s address=%s reason=%s before=%llu remedy=\"the KV link is private: only the "
            "network of kv-private may connect\"",
            doors[TD_DOOR_KV].name, address, reasons[TD_DENIED_ADDRESS],
            (unsigned long long)silent);
    return 0;
}

static void failed_at_door(td_link *l, td_door door, const char *address, int event)
{
    uint64_t silent = 0;
    if (event == ZMQ_EVENT_HANDSHAKE_FAILED_AUTH) /* decided here, and counted then */
        return;
    if (!tell(l, door, TD_DENIED_HANDSHAKE, &silent))
        return;
    say(l, "link_denied", event == ZMQ_EVENT_HANDSHAKE_FAILED_PROTOCOL,
        "door=%s latest_address=%s reason=%s before=%llu remedy=\"%s\"", doors[door].name,
        *address ? address : "unknown", reasons[TD_DENIED_HANDSHAKE], (unsigned long long)silent,
        l->has_keys
            ? "it has no keys (curve-secret, curve-peers), or dials with another server key "
              "than ours, or is a foreign program"
            : "it has keys and we have none (curve-secret, curve-peers), or is a foreign "
              "program");
}

static void refused(td_link *l, td_door door, const char *endpoint, int event, uint32_t value)
{
    char key[TD_CURVE_TEXT_BYTES] = "", why[300];
    uint64_t silent = 0;
    const char *who = doors[door].server;
    if (!tell(l, door, TD_DENIED_REFUSED, &silent))
        return;
    if (l->has_keys)
        td_curve_text(l->pair.public_key, key);
    if (event == ZMQ_EVENT_HANDSHAKE_FAILED_AUTH && door == TD_DOOR_KV && l->kv_private)
        snprintf(why, sizeof why,
                 "the %s at %.120s would not have us: its kv-private network does not hold our "
                 "address, or its curve-peers not our key",
                 who, endpoint);
    else if (event == ZMQ_EVENT_HANDSHAKE_FAILED_AUTH)
        snprintf(why, sizeof why,
                 "the %s at %.120s refused our key %s: add our line to its curve-peers", who,
                 endpoint, key);
    else if (event == ZMQ_EVENT_HANDSHAKE_FAILED_PROTOCOL &&
             value == ZMQ_PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH)
        snprintf(why, sizeof why,
                 l->has_keys ? "the %s at %.120s speaks without keys: give it curve-secret and "
                               "curve-peers"
                             : "the %s at %.120s asks for keys: set curve-secret and curve-peers",
                 who, endpoint);
    else
        snprintf(why, sizeof why, "the %s at %.120s broke the handshake off: %s", who, endpoint,
                 l->has_keys
                     ? "its key is not the one we know it by (curve-peers), or it just ended"
                     : "it asks for keys (set curve-secret and curve-peers), or it just ended");
    say(l, "link_refused", 1, "door=%s why=\"%s\" before=%llu", doors[door].name, why,
        (unsigned long long)silent);
}

void td_link_failed(td_link *l, td_door door, int dial, const char *endpoint, const char *address,
                    int event, uint32_t value)
{
    if (dial)
        refused(l, door, endpoint, event, value);
    else
        failed_at_door(l, door, address, event);
}

uint64_t td_link_count(const td_link *l, td_door door, td_denied why)
{
    return atomic_load_explicit(&l->tallies[door][why].n, memory_order_relaxed);
}

void td_link_write_metrics(const td_link *l, td_strbuf *out)
{
    td_strbuf_adds(out, "# HELP tandem_link_denied_total Peers turned away, by door and reason\n"
                        "# TYPE tandem_link_denied_total counter\n");
    for (int d = 0; d < TD_DOOR_MAX; d++)
        for (int w = 0; w < TD_DENIED_REFUSED; w++)
            td_strbuf_addf(out, "tandem_link_denied_total{door=\"%s\",reason=\"%s\"} %llu\n",
                           doors[d].name, reasons[w],
                           (unsigned long long)td_link_count(l, (td_door)d, (td_denied)w));
    td_strbuf_adds(out, "# HELP tandem_link_refused_total Times that the other side would not have "
                        "us, by door\n# TYPE tandem_link_refused_total counter\n");
    for (int d = 0; d < TD_DOOR_MAX; d++)
        td_strbuf_addf(out, "tandem_link_refused_total{door=\"%s\"} %llu\n", doors[d].name,
                       (unsigned long long)td_link_count(l, (td_door)d, TD_DENIED_REFUSED));
}
