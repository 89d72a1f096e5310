/* SPDX-License-Identifier: Apache-2.0 */
/* One hand-off of KV blocks from one process to another, by the way it takes: shared memory, ZeroMQ
 * over a Unix socket, ZeroMQ over loopback TCP, that as a private link (authenticated), and that
 * with CURVE (encrypted). No engine, no router: two pools of the shape of
 * GLM-5.2 (a group of 13 latent layers, 958,464 bytes a block), a prefill worker's push in a child
 * process, a decode worker's receive here. bench_handoff [--rounds N] [--mib N] [--out FILE]
 *
 * ms = from td_push_begin() to on_done(): checksums, copies, verification, commit and its ack. cpu
 * = what both processes used meanwhile, all threads; other load on the machine does not count
 * there. The ways take turns within a round, so that it meets them alike; compare by ratio. */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/bug.h"
#include "base/clock.h"
#include "base/err.h"
#include "bench/figures.h"
#include "handoff/push.h"
#include "handoff/receive.h"
#include "rpc/link.h"
#include "base/banned.h"

enum { SHM, IPC, TCP, PRIVATE, CURVE, WAYS };
enum { ROUNDS_MAX = 1000, SIZES = 3, WARM = 2, CREDIT = 16 << 20 };
enum { LAYERS = 13, ROW = 1152 };

static const char *const way_names[WAYS] = {"shm", "ipc", "tcp", "private", "curve"};
static const uint8_t mac_key[16] = {1}; /* of every ticket */

typedef struct order {
    uint32_t way, n_blocks, number;
} order;

typedef struct result {
    double ms, cpu_ms;
} result;

typedef struct bench {
    const char *out;
    unsigned rounds, mib;
    char dir[64];
    td_kv_layout layout;
    td_kv_pool *pool;
    td_block *blocks;
    uint32_t n_blocks;
    td_receive *receive[WAYS];
    td_pusher *pusher[WAYS];
    td_link *link[WAYS];
    uint8_t kv_key[TD_CURVE_KEY_BYTES]; /* of the decode worker */
    char endpoint[WAYS][128];
    td_shm_offer offer;
    int done, settled;
    uint32_t code;
    const char *why;
    double ms[WAYS][SIZES][ROUNDS_MAX], cpu[WAYS][SIZES][ROUNDS_MAX];
    uint32_t sizes[SIZES];
} bench;

static void die(const char *what, const char *why)
{
    fprintf(stderr, "bench_handoff: %s: %s\n", what, why);
    exit(1);
}

static double cpu_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

static void open_pool(bench *b)
{
    td_err err = {0};
    uint64_t bytes = (uint64_t)LAYERS * 64 * ROW;
    b->layout = (td_kv_layout){.block_bytes = bytes, .n_groups = 1};
    b->layout.groups[0] = (td_kv_group){.n_layers = LAYERS, .bytes = bytes};
    memset(b->layout.hash, 1, sizeof b->layout.hash);
    b->n_blocks = (uint32_t)(((uint64_t)b->mib << 20) / bytes);
    b->blocks = calloc(b->n_blocks, sizeof *b->blocks);
    if (!b->blocks || td_kv_pool_open(&b->layout, b->n_blocks, &b->pool, &err) < 0)
        die("pool", err.text);
    if (td_kv_alloc(b->pool, b->n_blocks, b->blocks) < 0)
        die("pool", "too small");
    for (uint32_t i = 0; i < b->n_blocks; i++) /* no page is touched for the first time later */
        memset(td_kv_data(b->pool, b->blocks[i]), (int)(i + 1), bytes);
}

/* ---- keys ---- */

static void write_file(bench *b, const char *name, const char *text)
{
    char path[128];
    snprintf(path, sizeof path, "%s/%s", b->dir, name);
    FILE *f = fopen(path, "w");
    if (!f || fchmod(fileno(f), 0600) < 0 || fputs(text, f) < 0 || fclose(f) != 0)
        die(path, td_errno_text(errno));
}

/* A key pair for each side, and the list of both. */
static void make_keys(bench *b)
{
    static const char *const names[] = {"prefill", "decode"};
    char peers[256] = "", text[TD_CURVE_TEXT_BYTES];
    for (int i = 0; i < 2; i++) {
        td_curve_pair pair;
        td_err err = {0};
        size_t n = strlen(peers);
        if (td_curve_generate(&pair, &err) < 0)
            die("keys", err.text);
        td_curve_text(pair.secret_key, text);
        write_file(b, names[i], text);
        td_curve_text(pair.public_key, text);
        snprintf(peers + n, sizeof peers - n, "%s %s %s\n", names[i], names[i], text);
        memcpy(b->kv_key, pair.public_key, sizeof b->kv_key); /* the last is the decode worker's */
    }
    write_file(b, "peers", peers);
}

static void open_links(bench *b, td_role self)
{
    char secret[128], peers[128];
    td_err err = {0};
    snprintf(secret, sizeof secret, "%s/%s", b->dir, td_role_name(self));
    snprintf(peers, sizeof peers, "%s/peers", b->dir);
    for (int w = PRIVATE; w <= CURVE; w++) {
        td_link_config c = {.secret = secret,
                            .peers = peers,
                            .self = self,
                            .kv_private = w == PRIVATE ? "127.0.0.0/8" : NULL};
        if (td_link_open(&c, &b->link[w], &err) < 0)
            die("link", err.text);
    }
}

static void close_links(bench *b)
{
    for (int w = 0; w < WAYS; w++)
        td_link_close(b->link[w]);
}

static void make_id(const order *o, uint8_t id[16])
{
    memset(id, 0, 16);
    memcpy(id, &o->number, sizeof o->number);
    id[15] = 1;
}

/* ---- the prefill worker: a child process that does what it is ordered ---- */

static void on_done(void *arg, void *user, uint32_t code, const char *reason,
                    const td_push_figures *f)
{
    bench *b = arg;
    (void)user;
    (void)f;
    b->done = 1;
    b->code = code;
    b->why = reason;
    if (code)
        die("push", *reason ? reason : "failed");
}

static double push_once(bench *b, const order *o)
{
    td_err err = {0};
    td_push *s;
    td_pusher *p = b->pusher[o->way];
    uint64_t begin = td_now_us();
    td_push_ticket k = {.attempt = 1,
                        .generation = 1,
                        .endpoint = b->endpoint[o->way],
                        .kv_key = o->way == CURVE ? b->kv_key : NULL,
                        .mac_key = o->way == PRIVATE ? mac_key : NULL,
                        .shm = o->way == SHM ? &b->offer : NULL,
                        .host_id = "",
                        .credit_bytes = CREDIT,
                        .deadline_us = begin + 60 * TD_S};
    make_id(o, k.id);
    memset(k.decode_epoch, 0xdd, 16);
    if (td_push_begin(p, &k, begin, &s, &err) < 0)
        die(k.endpoint, err.text);
    for (uint32_t i = 0; i < o->n_blocks; i++) {
        td_push_block block = {.block = b->blocks[i], .index = i, .rows = 64};
        if (td_push_add(s, &block, 1, td_now_us()) < 0)
            die("push", "out of memory");
    }
    uint32_t choice = 0, id = 1;
    td_push_commit(s, o->n_blocks * 64, &choice, &id, 1, td_now_us());
    for (b->done = 0; !b->done;) {
        td_bulk_poll polls[8];
        td_pusher_run(p, td_now_us());
        if (!b->done)
            td_bulk_wait(polls, td_pusher_polls(p, polls, 8), 1000);
    }
    return (double)(td_now_us() - begin) * 1e-3;
}

static void prefill_main(bench *b, int fd)
{
    td_err err = {0};
    order o;
    open_pool(b);
    open_links(b, TD_ROLE_PREFILL);
    for (int w = 0; w < WAYS; w++) {
        td_pusher_config c = {.pool = b->pool,
                              .link = b->link[w],
                              .transport = w == SHM ? TD_KV_SHM : TD_KV_ZMQ,
                              .ops = {.on_done = on_done},
                              .arg = b};
        memset(c.epoch, 0xaa, 16);
        if (td_pusher_open(&c, &b->pusher[w], &err) < 0)
            die("pusher", err.text);
    }
    while (read(fd, &o, sizeof o) == sizeof o) {
        double cpu = cpu_ms();
        result r = {.ms = push_once(b, &o)};
        r.cpu_ms = cpu_ms() - cpu;
        if (write(fd, &r, sizeof r) != sizeof r)
            break;
    }
    for (int w = 0; w < WAYS; w++)
        td_pusher_close(b->pusher[w]);
    close_links(b);
    exit(0);
}

/* ---- the decode worker ---- */

static void on_deliver(void *arg, void *user, const uint32_t *ids, uint32_t n,
                       const td_receive_figures *f)
{
    (void)user;
    (void)ids;
    (void)n;
    (void)f;
    ((bench *)arg)->settled = 1;
}

static void on_release(void *arg, void *user, uint32_t code, td_drop why)
{
    (void)arg;
    (void)user;
    (void)code;
    die("receive", td_drop_name(why));
}

static void open_receivers(bench *b)
{
    td_err err = {0};
    for (int w = 0; w < WAYS; w++) {
        snprintf(b->endpoint[w], sizeof b->endpoint[w], "ipc://%s/%s.sock", b->dir, way_names[w]);
        td_receive_config c = {.endpoint = w >= TCP ? "tcp://127.0.0.1:0" : b->endpoint[w],
                               .pool = b->pool,
                               .link = b->link[w],
                               .transport = w == SHM ? TD_KV_SHM : TD_KV_ZMQ,
                               .ops = {.on_deliver = on_deliver, .on_release = on_release},
                               .arg = b};
        memset(c.epoch, 0xdd, 16);
        if (td_receive_open(&c, &b->receive[w], &err) < 0)
            die("receive", err.text);
        snprintf(b->endpoint[w], sizeof b->endpoint[w], "%s", td_receive_endpoint(b->receive[w]));
    }
    b->offer = *td_shm_door_offer(td_receive_door(b->receive[SHM]));
}

static void grant(bench *b, const order *o)
{
    td_receive_block *blocks = calloc(o->n_blocks, sizeof *blocks);
    td_in_first first = {0};
    td_receive_grant g = {.attempt = 1,
                          .generation = 1,
                          .mac_key = o->way == PRIVATE ? mac_key : NULL,
                          .blocks = blocks,
                          .n_blocks = o->n_blocks,
                          .first = &first,
                          .n_first = 1,
                          .n_tokens = o->n_blocks * 64,
                          .credit_bytes = CREDIT,
                          .deadline_us = td_now_us() + 60 * TD_S};
    if (!blocks)
        die("grant", "out of memory");
    for (uint32_t i = 0; i < o->n_blocks; i++)
        blocks[i] = (td_receive_block){.block = b->blocks[i], .expect = {.rows = 64}};
    make_id(o, g.ticket);
    if (td_receive_grant_add(b->receive[o->way], &g, td_now_us()) < 0)
        die("grant", "refused");
    free(blocks);
}

/* One hand-off; its milliseconds as the prefill worker sees them. */
static result run_once(bench *b, int fd, const order *o)
{
    td_receive *r = b->receive[o->way];
    grant(b, o);
    double cpu = cpu_ms();
    if (write(fd, o, sizeof *o) != sizeof *o)
        die("child", "gone");
    b->settled = 0;
    for (;;) {
        td_bulk_poll polls[80] = {{.fd = fd, .want = TD_BULK_READ}};
        uint32_t n = 1 + td_receive_polls(r, polls + 1, 79);
        int more = td_receive_run(r, td_now_us());
        td_bulk_wait(polls, n, more ? 0 : 100000);
        if (polls[0].ready)
            break;
    }
    result out;
    if (read(fd, &out, sizeof out) != sizeof out || !b->settled)
        die("child", "the hand-off failed");
    out.cpu_ms += cpu_ms() - cpu;
    return out;
}

/* ---- figures ---- */

static void report(bench *b)
{
    char stamp[300];
    FILE *csv = fopen(b->out, "w");
    if (!csv)
        die(b->out, td_errno_text(errno));
    bench_stamp(stamp, sizeof stamp);
    fprintf(csv, "day,commit,machine,way,bytes,rounds,ms_p50,ms_p10,ms_p90,gb_per_s,times_ipc,"
                 "cpu_ms_p50,cpu_times_ipc\n");
    printf("%s, %u rounds\n\n        bytes      way  ms p50     p10     p90    GB/s  times ipc  "
           "cpu ms  "
           "times ipc\n",
           stamp, b->rounds);
    for (int s = 0; s < SIZES; s++) {
        double bytes = (double)b->sizes[s] * (double)b->layout.block_bytes;
        for (int w = 0; w < WAYS; w++) {
            qsort(b->ms[w][s], b->rounds, sizeof(double), bench_by_value);
            qsort(b->cpu[w][s], b->rounds, sizeof(double), bench_by_value);
        }
        for (int w = 0; w < WAYS; w++) {
            const double *v = b->ms[w][s];
            unsigned mid = b->rounds / 2;
            double p10 = v[b->rounds / 10], p90 = v[b->rounds * 9 / 10],
                   gbs = bytes / v[mid] * 1e-6, ratio = b->ms[IPC][s][mid] / v[mid],
                   cpu = b->cpu[w][s][mid], cpu_ratio = b->cpu[IPC][s][mid] / cpu;
            printf("%13.0f  %7s %7.3f %7.3f %7.3f %7.2f %10.2f %7.3f %10.2f\n", bytes, way_names[w],
                   v[mid], p10, p90, gbs, ratio, cpu, cpu_ratio);
            fprintf(csv, "%s,%s,%.0f,%u,%.3f,%.3f,%.3f,%.3f,%.2f,%.3f,%.2f\n", stamp, way_names[w],
                    bytes, b->rounds, v[mid], p10, p90, gbs, ratio, cpu, cpu_ratio);
        }
    }
    fclose(csv);
}

static int parse(bench *b, int argc, char **argv)
{
    for (int i = 1; i + 1 < argc; i += 2) {
        if (strcmp(argv[i], "--rounds") == 0)
            b->rounds = (unsigned)strtoul(argv[i + 1], NULL, 10);
        else if (strcmp(argv[i], "--mib") == 0)
            b->mib = (unsigned)strtoul(argv[i + 1], NULL, 10);
        else if (strcmp(argv[i], "--out") == 0)
            b->out = argv[i + 1];
        else
            return -EINVAL;
    }
    return argc % 2 && b->rounds >= 1 && b->rounds <= ROUNDS_MAX && b->mib >= 8 && b->mib <= 4096
               ? 0
               : -EINVAL;
}

int main(int argc, char **argv)
{
    static bench b = {.out = "bench/results/handoff.csv", .rounds = 40, .mib = 64};
    int fds[2];
    if (parse(&b, argc, argv) < 0) {
        fprintf(stderr, "usage: bench_handoff [--rounds 1..%d] [--mib 8..4096] [--out FILE]\n",
                ROUNDS_MAX);
        return 2;
    }
    snprintf(b.dir, sizeof b.dir, "/tmp/tandem-bench-XXXXXX");
    if (!mkdtemp(b.dir) || socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, fds) < 0)
        die(b.dir, td_errno_text(errno));
    make_keys(&b);
    int gate[2]; /* the child learns the endpoints before libzmq has threads here */
    if (pipe(gate) < 0)
        die("pipe", td_errno_text(errno));
    pid_t child = fork();
    if (child == 0) {
        close(fds[0]);
        close(gate[1]);
        if (read(gate[0], b.endpoint, sizeof b.endpoint) != sizeof b.endpoint ||
            read(gate[0], &b.offer, sizeof b.offer) != sizeof b.offer)
            exit(1);
        prefill_main(&b, fds[1]);
    }
    close(fds[1]);
    open_pool(&b);
    open_links(&b, TD_ROLE_DECODE);
    open_receivers(&b);
    if (write(gate[1], b.endpoint, sizeof b.endpoint) != sizeof b.endpoint ||
        write(gate[1], &b.offer, sizeof b.offer) != sizeof b.offer)
        die("child", "gone");
    b.sizes[0] = 1;
    b.sizes[1] = 8;
    b.sizes[2] = b.n_blocks;
    order o = {0};
    for (unsigned r = 0; r < b.rounds + WARM; r++) {
        for (uint32_t k = 0; k < WAYS * SIZES; k++) {
            uint32_t size = k / WAYS;
            o = (order){.way = k % WAYS, .n_blocks = b.sizes[size], .number = o.number + 1};
            result x = run_once(&b, fds[0], &o);
            if (r >= WARM) {
                b.ms[o.way][size][r - WARM] = x.ms;
                b.cpu[o.way][size][r - WARM] = x.cpu_ms;
            }
        }
    }
    close(fds[0]);
    waitpid(child, NULL, 0);
    for (int w = 0; w < WAYS; w++)
        td_receive_close(b.receive[w]);
    close_links(&b);
    td_kv_pool_free(b.pool);
    free(b.blocks);
    static const char *const left[] = {"shm.sock", "ipc.sock", "prefill", "decode", "peers"};
    for (size_t i = 0; i < TD_ARRAY_LEN(left);
         i++) { /* libzmq removes its sockets too, but later */
        char path[128];
        snprintf(path, sizeof path, "%s/%s", b.dir, left[i]);
        unlink(path);
    }
    rmdir(b.dir);
    report(&b);
    return 0;
}
