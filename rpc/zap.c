/* SPDX-License-Identifier: Apache-2.0 */
#include "rpc/zap.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>
#include <zmq.h>

#include "base/bug.h"
#include "base/list.h"
#include "base/rand.h"
#include "rpc/curve.h"
#include "rpc/zmq_ctx.h"
#include "base/banned.h"

enum {
    REQUEST_PARTS = 7,    /* version, id, domain, address, routing id, mechanism, key (CURVE) */
    PART_BYTES_MAX = 256, /* what libzmq sends is shorter; a routing id has up to 255 */
    EVENTS_BUDGET = 64,   /* of one socket in one go */
    SELF_TEST_MS = 3000,
    MONITORED = ZMQ_EVENT_ACCEPTED | ZMQ_EVENT_HANDSHAKE_FAILED_NO_DETAIL |
                ZMQ_EVENT_HANDSHAKE_FAILED_PROTOCOL | ZMQ_EVENT_HANDSHAKE_FAILED_AUTH
};

typedef struct watch {
    td_list node;
    void *socket; /* NULL: forgotten; the thread closes the pair */
    void *pair;   /* the monitor's other end; the thread's own */
    td_link *link;
    td_door door;
    int dial, plain, refused;
    unsigned number;
    char domain[TD_ZAP_DOMAIN_BYTES], endpoint[256], address[INET6_ADDRSTRLEN];
} watch;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* all below */
static pthread_mutex_t start_lock = PTHREAD_MUTEX_INITIALIZER;
static unsigned n_refs, next_number;
static int stopping, tested;
static void *context, *handler;
static int wake_fd = -1;
static pthread_t thread;
static td_list watches = {&watches, &watches};

static void wake(void)
{
    uint64_t one = 1;
    (void)!write(wake_fd, &one, sizeof one);
}

/* ---- authentication requests ---- */

typedef struct request {
    char part[REQUEST_PARTS][PART_BYTES_MAX + 1]; /* NUL behind each */
    size_t bytes[REQUEST_PARTS];
    unsigned n;
    int bad; /* a part too long, or too many */
} request;

static int recv_request(request *q)
{
    *q = (request){.n = 0};
    for (int more = 1; more;) {
        zmq_msg_t m;
        zmq_msg_init(&m);
        if (zmq_msg_recv(&m, handler, ZMQ_DONTWAIT) < 0) {
            zmq_msg_close(&m);
            return -1;
        }
        size_t n = zmq_msg_size(&m);
        more = zmq_msg_more(&m);
        if (q->n == REQUEST_PARTS || n > PART_BYTES_MAX) {
            q->bad = 1;
        } else {
            memcpy(q->part[q->n], zmq_msg_data(&m), n);
            q->bytes[q->n++] = n;
        }
        zmq_msg_close(&m);
    }
    return 0;
}

static void reply(const request *q, const char *status, const char *text, const char *user_id)
{
    zmq_send(handler, "1.0", 3, ZMQ_SNDMORE);
    zmq_send(handler, q->part[1], q->bytes[1], ZMQ_SNDMORE);
    zmq_send(handler, status, strlen(status), ZMQ_SNDMORE);
    zmq_send(handler, text, strlen(text), ZMQ_SNDMORE);
    zmq_send(handler, user_id, strlen(user_id), ZMQ_SNDMORE);
    zmq_send(handler, "", 0, 0);
}

static int decide(const request *q, char user_id[TD_CURVE_TEXT_BYTES])
{
    int admit = 0;
    if (q->bad || q->n < REQUEST_PARTS - 1 || strcmp(q->part[0], "1.0") != 0)
        return 0;
    int curve = q->n == REQUEST_PARTS && strcmp(q->part[5], "CURVE") == 0;
    int null = q->n == REQUEST_PARTS - 1 && strcmp(q->part[5], "NULL") == 0;
    pthread_mutex_lock(&lock);
    TD_LIST_FOR (it, &watches) {
        watch *w = TD_LIST_ENTRY(it, watch, node);
        if (!w->socket || strcmp(w->domain, q->part[2]) != 0)
            continue;
        if (w->plain && null)
            admit = td_link_decide_private(w->link, q->part[3]);
        else if (!w->plain && curve)
            admit = td_link_decide(w->link, w->door, q->part[3], q->part[6], q->bytes[6], user_id);
    }
    pthread_mutex_unlock(&lock);
    return admit;
}

/* Whatever is not admitted is denied: an unknown domain, another mechanism, a bad request. */
static void serve_request(void)
{
    request q;
    char user_id[TD_CURVE_TEXT_BYTES] = "";
    if (recv_request(&q) < 0)
        return;
    if (decide(&q, user_id))
        reply(&q, "200", "OK", user_id);
    else
        reply(&q, "400", "key not admitted here", "");
}

/* ---- handshakes ---- */

/* Who was accepted last; best effort, the connection may be gone. */
static void note_address(watch *w, int fd)
{
    struct sockaddr_storage a;
    socklen_t n = sizeof a;
    *w->address = 0;
    if (getpeername(fd, (struct sockaddr *)&a, &n) < 0)
        return;
    if (a.ss_family == AF_INET)
        inet_ntop(AF_INET, &((struct sockaddr_in *)&a)->sin_addr, w->address, sizeof w->address);
    else if (a.ss_family == AF_INET6)
        inet_ntop(AF_INET6, &((struct sockaddr_in6 *)&a)->sin6_addr, w->address, sizeof w->address);
    else
        snprintf(w->address, sizeof w->address, "local");
}

static void on_event(watch *w, uint16_t event, uint32_t value)
{
    pthread_mutex_lock(&lock);
    if (!w->socket) {
        /* forgotten meanwhile */
    } else if (event == ZMQ_EVENT_ACCEPTED) {
        note_address(w, (int)value);
    } else {
        if (w->dial && event != ZMQ_EVENT_HANDSHAKE_FAILED_NO_DETAIL)
            w->refused = 1;
        td_link_failed(w->link, w->door, w->dial, w->endpoint, w->address, event, value);
    }
    pthread_mutex_unlock(&lock);
}

/* Two frames: event and value packed without a gap, the address. */
static int recv_event(void *pair, uint16_t *ret_event, uint32_t *ret_value)
{
    uint8_t head[6], rest[256];
    int more = 0;
    size_t n = sizeof more;
    if (zmq_recv(pair, head, sizeof head, ZMQ_DONTWAIT) != (int)sizeof head)
        return -1;
    while (zmq_getsockopt(pair, ZMQ_RCVMORE, &more, &n) == 0 && more)
        if (zmq_recv(pair, rest, sizeof rest, ZMQ_DONTWAIT) < 0)
            break;
    memcpy(ret_event, head, 2);
    memcpy(ret_value, head + 2, 4);
    return 0;
}

static void serve_watch(watch *w)
{
    uint16_t event;
    uint32_t value;
    for (int i = 0; i < EVENTS_BUDGET && recv_event(w->pair, &event, &value) == 0; i++)
        on_event(w, event, value);
}

/* ---- the thread ---- */

typedef struct turn {
    zmq_pollitem_t *items;
    watch **who; /* of items[2 + i] */
    size_t n, cap;
    int stop;
} turn;

static int grow(turn *t, size_t n)
{
    if (n <= t->cap)
        return 0;
    size_t cap = 2 * n;
    void *items = reallocarray(t->items, cap, sizeof *t->items);
    if (items)
        t->items = items;
    void *who = reallocarray(t->who, cap, sizeof *t->who);
    if (who)
        t->who = who;
    if (!items || !who)
        return -ENOMEM;
    t->cap = cap;
    return 0;
}

/* Who is to be watched now; forgotten ones go. A watch is freed here only, so that the thread may
 * use its pair without the lock. */
static void look_round(turn *t)
{
    size_t n = 2;
    pthread_mutex_lock(&lock);
    TD_LIST_FOR (it, &watches) {
        watch *w = TD_LIST_ENTRY(it, watch, node);
        if (!w->socket) {
            td_list_del(&w->node);
            zmq_close(w->pair);
            free(w);
        } else if (grow(t, n + 1) == 0) {
            t->items[n] = (zmq_pollitem_t){.socket = w->pair, .events = ZMQ_POLLIN};
            t->who[n++] = w;
        }
    }
    t->stop = stopping && td_list_empty(&watches);
    pthread_mutex_unlock(&lock);
    t->items[0] = (zmq_pollitem_t){.socket = handler, .events = ZMQ_POLLIN};
    t->items[1] = (zmq_pollitem_t){.fd = wake_fd, .events = ZMQ_POLLIN};
    t->n = n;
}

static void *zap_main(void *arg)
{
    turn t = *(turn *)arg;
    free(arg);
    for (look_round(&t); !t.stop; look_round(&t)) {
        uint64_t count;
        if (zmq_poll(t.items, (int)t.n, -1) < 0 && zmq_errno() != EINTR)
            break; /* the context ended */
        if (t.items[1].revents)
            (void)!read(wake_fd, &count, sizeof count);
        if (t.items[0].revents)
            serve_request();
        for (size_t i = 2; i < t.n; i++)
            if (t.items[i].revents)
                serve_watch(t.who[i]);
    }
    free(t.items);
    free(t.who);
    return NULL;
}

/* ---- start and stop ---- */

static void release(void)
{
    if (handler)
        zmq_close(handler);
    handler = NULL;
    if (wake_fd >= 0)
        close(wake_fd);
    wake_fd = -1;
    if (context)
        td_zmq_context_unref();
    context = NULL;
}

/* Signals are the loop's: this thread takes none. */
static int spawn(void)
{
    sigset_t all, old;
    turn *first = calloc(1, sizeof *first);
    if (!first || grow(first, 8) < 0) {
        if (first) {
            free(first->items);
            free(first->who);
        }
        free(first);
        return -ENOMEM;
    }
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    int r = -pthread_create(&thread, NULL, zap_main, first);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (r < 0) {
        free(first->items);
        free(first->who);
        free(first);
    }
    return r;
}

static int start_thread(td_err *err)
{
    int linger = 0, r;
    stopping = 0;
    context = td_zmq_context_ref();
    if (!context)
        return td_err_set(err, -ENOMEM, "link: cannot make a ZeroMQ context");
    handler = zmq_socket(context, ZMQ_REP);
    wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (!handler || wake_fd < 0 ||
        zmq_setsockopt(handler, ZMQ_LINGER, &linger, sizeof linger) < 0 ||
        zmq_bind(handler, "inproc://zeromq.zap.01") < 0) {
        r = td_err_set(err, -errno, "link: no authentication handler: %s", zmq_strerror(errno));
    } else if ((r = spawn()) < 0) {
        td_err_set(err, r, "link: cannot start a thread: %s", td_errno_text(r));
    }
    if (r < 0)
        release();
    return r;
}

static void stop_thread(void)
{
    pthread_mutex_lock(&lock);
    TD_LIST_FOR (it, &watches)
        TD_BUG_ON(TD_LIST_ENTRY(it, watch, node)->socket != NULL);
    stopping = 1;
    pthread_mutex_unlock(&lock);
    wake();
    pthread_join(thread, NULL);
    release();
}

/* ---- self-test ---- */

static int set_key(void *socket, int option, const void *value, size_t n)
{
    return zmq_setsockopt(socket, option, value, n) < 0 ? -zmq_errno() : 0;
}

/* A door that admits nobody, and somebody who knocks. */
static int knock(void *door, void *guest, void *ear, uint16_t *ret_event)
{
    td_curve_pair a, b;
    int one = 1, r, linger = 0;
    uint64_t random;
    char endpoint[64];
    uint32_t value;
    td_random_bytes(&random, sizeof random);
    /* abstract: no file to leave behind, and nobody is admitted there */
    snprintf(endpoint, sizeof endpoint, "ipc://@tandem-self-test-%llx", (unsigned long long)random);
    if ((r = td_curve_generate(&a, NULL)) < 0 || (r = td_curve_generate(&b, NULL)) < 0)
        return r;
    if ((r = set_key(door, ZMQ_CURVE_SERVER, &one, sizeof one)) < 0 ||
        (r = set_key(door, ZMQ_CURVE_SECRETKEY, a.secret_key, 32)) < 0 ||
        (r = set_key(door, ZMQ_ZAP_DOMAIN, "self-test", 9)) < 0 ||
        (r = set_key(door, ZMQ_LINGER, &linger, sizeof linger)) < 0 ||
        (r = set_key(guest, ZMQ_LINGER, &linger, sizeof linger)) < 0 ||
        (r = set_key(ear, ZMQ_LINGER, &linger, sizeof linger)) < 0 ||
        (r = set_key(guest, ZMQ_CURVE_SERVERKEY, a.public_key, 32)) < 0 ||
        (r = set_key(guest, ZMQ_CURVE_PUBLICKEY, b.public_key, 32)) < 0 ||
        (r = set_key(guest, ZMQ_CURVE_SECRETKEY, b.secret_key, 32)) < 0)
        return r;
    if (zmq_socket_monitor(guest, "inproc://tandem.self-test",
                           MONITORED | ZMQ_EVENT_HANDSHAKE_SUCCEEDED) < 0 ||
        zmq_connect(ear, "inproc://tandem.self-test") < 0 || zmq_bind(door, endpoint) < 0 ||
        zmq_connect(guest, endpoint) < 0)
        return -zmq_errno();
    zmq_pollitem_t item = {.socket = ear, .events = ZMQ_POLLIN};
    if (zmq_poll(&item, 1, SELF_TEST_MS) <= 0)
        return -ETIMEDOUT;
    return recv_event(ear, ret_event, &value);
}

static int self_test(td_err *err)
{
    uint16_t event = 0;
    void *door = zmq_socket(context, ZMQ_ROUTER), *guest = zmq_socket(context, ZMQ_DEALER),
         *ear = zmq_socket(context, ZMQ_PAIR);
    int r = door && guest && ear ? knock(door, guest, ear, &event) : -zmq_errno();
    if (guest)
        zmq_socket_monitor(guest, NULL, 0);
    if (ear)
        zmq_close(ear);
    if (guest)
        zmq_close(guest);
    if (door)
        zmq_close(door);
    if (r < 0)
        return td_err_set(err, r, "link: the self-test of CURVE did not run: %s", td_errno_text(r));
    if (event != ZMQ_EVENT_HANDSHAKE_FAILED_AUTH)
        return td_err_set(err, -EACCES,
                          "link: this libzmq did not turn an unknown key away (event %#x): do not "
                          "use it; Debian's 4.3.4 does",
                          event);
    return 0;
}

int td_zap_start(int test, td_err *reterr_err)
{
    pthread_mutex_lock(&start_lock);
    int r = n_refs ? 0 : start_thread(reterr_err);
    n_refs += r == 0;
    if (r == 0 && test && !tested) {
        r = self_test(reterr_err);
        tested = r == 0;
        if (r < 0 && --n_refs == 0)
            stop_thread();
    }
    pthread_mutex_unlock(&start_lock);
    return r;
}

void td_zap_stop(void)
{
    pthread_mutex_lock(&start_lock);
    TD_BUG_ON(n_refs == 0);
    if (--n_refs == 0)
        stop_thread();
    pthread_mutex_unlock(&start_lock);
}

/* ---- sockets ---- */

/* The pair is connected before the socket can have an event: libzmq's monitor would block its I/O
 * thread on an event that nobody can take. */
static int open_pair(void *socket, unsigned number, void **ret_pair)
{
    char name[64];
    int linger = 0, r;
    void *pair = zmq_socket(context, ZMQ_PAIR);
    if (!pair)
        return -zmq_errno();
    snprintf(name, sizeof name, "inproc://tandem.watch.%u", number);
    if (zmq_setsockopt(pair, ZMQ_LINGER, &linger, sizeof linger) < 0 ||
        zmq_socket_monitor(socket, name, MONITORED) < 0 || zmq_connect(pair, name) < 0) {
        r = -zmq_errno();
        zmq_socket_monitor(socket, NULL, 0);
        zmq_close(pair);
        return r;
    }
    *ret_pair = pair;
    return 0;
}

int td_zap_watch(void *socket, td_link *l, td_door door, int dial, int plain, const char *endpoint,
                 char ret_domain[TD_ZAP_DOMAIN_BYTES])
{
    watch *w = calloc(1, sizeof *w);
    if (!w)
        return -ENOMEM;
    *w = (watch){.socket = socket, .link = l, .door = door, .dial = dial, .plain = plain};
    snprintf(w->endpoint, sizeof w->endpoint, "%s", endpoint);
    pthread_mutex_lock(&lock);
    w->number = ++next_number;
    pthread_mutex_unlock(&lock);
    snprintf(w->domain, sizeof w->domain, "td%u", w->number);
    int r = open_pair(socket, w->number, &w->pair);
    if (r < 0) {
        free(w);
        return r;
    }
    memcpy(ret_domain, w->domain, sizeof w->domain);
    pthread_mutex_lock(&lock);
    td_list_add(&watches, &w->node);
    pthread_mutex_unlock(&lock);
    wake();
    return 0;
}

static watch *find(void *socket)
{
    TD_LIST_FOR (it, &watches) {
        watch *w = TD_LIST_ENTRY(it, watch, node);
        if (w->socket == socket)
            return w;
    }
    return NULL;
}

void td_zap_forget(void *socket)
{
    pthread_mutex_lock(&lock);
    watch *w = find(socket);
    pthread_mutex_unlock(&lock);
    if (!w) /* only the socket's owner forgets it: nobody can come between */
        return;
    zmq_socket_monitor(socket, NULL, 0);
    pthread_mutex_lock(&lock);
    w->socket = NULL;
    pthread_mutex_unlock(&lock);
    wake();
}

int td_zap_refused(void *socket)
{
    pthread_mutex_lock(&lock);
    watch *w = find(socket);
    int refused = w && w->refused;
    if (w)
        w->refused = 0;
    pthread_mutex_unlock(&lock);
    return refused;
}
