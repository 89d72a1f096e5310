/* SPDX-License-Identifier: Apache-2.0 */
/* Guards KV blocks in shared memory: what a peer says about its pool is checked before a byte is
 * read, nothing that it does ends this process (SIGBUS), a pool that was withdrawn is never
 * trusted, only our own user with the ticket's nonce comes in, and no descriptor stays behind. */
#include <setjmp.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/arena.h"
#include "base/bug.h"
#include "base/clock.h"
#include "handoff/shm_door.h"
#include "handoff/shm_line.h"
#include "handoff/wire.h"
#include "rpc/frame.h"

#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif

enum { POOL = 1 << 20, PAGE = 4096, KEEP = F_SEAL_SHRINK | F_SEAL_GROW };

static char dir[64], endpoint[128];

static int n_fds(void)
{
    DIR *d = opendir("/proc/self/fd");
    int n = 0;
    while (readdir(d))
        n++;
    closedir(d);
    return n;
}

static int make_memfd(size_t bytes, int seals, uint8_t **ret_map)
{
    int fd = memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    assert_true(fd >= 0);
    assert_int_equal(ftruncate(fd, (off_t)bytes), 0);
    uint8_t *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    assert_true(p != MAP_FAILED);
    for (size_t i = 0; i < bytes; i++)
        p[i] = (uint8_t)(i * 31 + (i >> 8));
    if (ret_map)
        *ret_map = p;
    else
        munmap(p, bytes);
    if (seals)
        assert_int_equal(fcntl(fd, F_ADD_SEALS, seals), 0);
    return fd;
}

typedef struct room {
    td_shm_door *door;
    td_shm_line_config lc;
    uint8_t *pool;
    int fds;
} room;

static void room_open(room *m, const char *kv)
{
    td_err err = {0};
    memset(m, 0, sizeof *m);
    m->fds = n_fds();
    td_shm_door_config dc = {.kv_endpoint = kv, .uid = geteuid()};
    memset(dc.epoch, 0xdd, 16);
    memset(dc.layout_hash, 0x11, 16);
    if (td_shm_door_open(&dc, &m->door, &err) < 0)
        fail_msg("%s", err.text);
    m->lc = (td_shm_line_config){.offer = td_shm_door_offer(m->door),
                                 .pool_fd = make_memfd(POOL, KEEP | F_SEAL_FUTURE_WRITE, &m->pool),
                                 .number = 7,
                                 .uid = geteuid()};
    memset(m->lc.prefill_epoch, 0xaa, 16);
    memset(m->lc.decode_epoch, 0xdd, 16);
    memset(m->lc.layout_hash, 0x11, 16);
}

static void room_close(room *m)
{
    td_shm_door_close(m->door);
    munmap(m->pool, POOL);
    close(m->lc.pool_fd);
    assert_int_equal(n_fds(), m->fds);
}

static uint64_t refused(const room *m, td_shm_refusal why)
{
    return atomic_load(&td_shm_door_get_stats(m->door)->refused[why]);
}

static uint32_t n_pools(const room *m)
{
    return atomic_load(&td_shm_door_get_stats(m->door)->pools);
}

/* Let both ends talk; the clock stands unless it is moved. */
static td_shm_line_state talk(room *m, td_shm_line *l)
{
    td_shm_door_run(m->door, 1000); /* in, */
    td_shm_door_run(m->door, 1000); /* and heard */
    return td_shm_line_run(l, 1000);
}

static td_shm_line *line_open(room *m)
{
    td_err err = {0};
    td_shm_line *l;
    if (td_shm_line_open(&m->lc, 1000, &l, &err) < 0)
        fail_msg("%s", err.text);
    return l;
}

/* ---- the way it goes ---- */

static void lend_and_read(const char *kv)
{
    room m;
    room_open(&m, kv);
    int idle = n_fds();
    td_shm_line *l = line_open(&m);
    assert_int_equal(td_shm_line_run(l, 1000), TD_SHM_ASKED);
    assert_int_equal(talk(&m, l), TD_SHM_READY);
    assert_int_equal(n_fds(), idle + 2); /* a socket at either end: memfds are mapped and closed */
    assert_int_equal(n_pools(&m), 1);
    assert_null(td_shm_door_find(m.door, m.lc.prefill_epoch, 8));
    assert_null(td_shm_door_find(m.door, m.lc.decode_epoch, 7));
    const td_shm_pool *p = td_shm_door_find(m.door, m.lc.prefill_epoch, 7);
    assert_non_null(p);
    assert_memory_equal(td_shm_pool_range(p, 12345, 50000), m.pool + 12345, 50000);
    m.pool[5] ^= 0xff; /* the very memory, not a copy of it */
    assert_int_equal(*td_shm_pool_range(p, 5, 1), m.pool[5]);

    /* ranges that a peer may think of */
    assert_non_null(td_shm_pool_range(p, 0, POOL));
    assert_non_null(td_shm_pool_range(p, POOL, 0));
    assert_null(td_shm_pool_range(p, 0, POOL + 1));
    assert_null(td_shm_pool_range(p, 1, POOL));
    assert_null(td_shm_pool_range(p, POOL + 1, 0));
    assert_null(td_shm_pool_range(p, UINT64_MAX, 2));
    assert_null(td_shm_pool_range(p, 2, UINT64_MAX));

    assert_false(td_shm_pool_is_withdrawn(p));
    td_shm_line_withdraw(l);
    assert_true(td_shm_pool_is_withdrawn(p));
    assert_int_equal(td_shm_line_run(l, 1000), TD_SHM_READY);
    td_shm_line_close(l);
    td_shm_door_run(m.door, 1000); /* the peer has gone, and its mapping with it */
    assert_null(td_shm_door_find(m.door, m.lc.prefill_epoch, 7));
    assert_int_equal(n_pools(&m), 0);
    assert_int_equal(n_fds(), idle);
    room_close(&m);
}

static void test_lend_and_read(void **state)
{
    (void)state;
    lend_and_read(endpoint);
    lend_and_read("tcp://127.0.0.1:9");
}

/* Either end may go first; closing by a line counts as withdrawn for whoever still copies. */
static void test_ends(void **state)
{
    (void)state;
    room m;
    td_err err = {0};
    room_open(&m, endpoint);
    td_shm_line *l = line_open(&m);
    assert_int_equal(talk(&m, l), TD_SHM_READY);
    const td_shm_pool *p = td_shm_door_find(m.door, m.lc.prefill_epoch, 7);
    td_shm_line_close(l);
    assert_true(td_shm_pool_is_withdrawn(p)); /* mapped still: its end is seen in the next run */
    assert_memory_equal(td_shm_pool_range(p, 0, POOL), m.pool, POOL);

    /* the same worker may come back at once, under another number */
    m.lc.number = 8;
    l = line_open(&m);
    assert_int_equal(talk(&m, l), TD_SHM_READY);
    assert_null(td_shm_door_find(m.door, m.lc.prefill_epoch, 7));
    td_shm_offer offer = *td_shm_door_offer(m.door);
    td_shm_door_close(m.door);
    assert_int_equal(td_shm_line_run(l, 1000), TD_SHM_LOST);
    assert_int_equal(td_shm_line_run(l, 1000), TD_SHM_LOST);
    td_shm_line_close(l);
    m.door = NULL;
    m.lc.offer = &offer;
    l = NULL;
    assert_int_equal(td_shm_line_open(&m.lc, 0, &l, &err), -ENOENT); /* the socket is removed */
    assert_non_null(strstr(err.text, offer.path));
    room_close(&m);
}

/* ---- at the door ---- */

typedef struct packet {
    uint8_t bytes[2048];
    size_t n;
    int fds[4];
    unsigned n_fds;
} packet;

static void make_packet(const room *m, packet *k)
{
    td_preamble pre = {.major = 1, .type = TD_FRAME_KV_POOL};
    td_wire_pool w = {.pool = 7, .bytes = POOL};
    memcpy(w.nonce, m->lc.offer->nonce, 32);
    memcpy(w.prefill_epoch, m->lc.prefill_epoch, 16);
    memcpy(w.decode_epoch, m->lc.decode_epoch, 16);
    memcpy(w.layout_hash, m->lc.layout_hash, 16);
    memset(k, 0, sizeof *k);
    td_preamble_pack(&pre, k->bytes);
    k->n = 24 + (size_t)td_wire_pack_pool(&w, k->bytes + 24, 1000);
    k->fds[0] = make_memfd(POOL, KEEP, NULL);
    k->fds[1] = make_memfd(PAGE, KEEP, NULL);
    k->n_fds = 2;
}

static void send_packet(int fd, const packet *k)
{
    union {
        char bytes[CMSG_SPACE(4 * sizeof(int))];
        struct cmsghdr align;
    } c = {{0}};
    struct iovec v = {(void *)(uintptr_t)k->bytes, k->n};
    struct msghdr h = {.msg_iov = &v, .msg_iovlen = 1};
    if (k->n_fds) {
        h.msg_control = c.bytes;
        h.msg_controllen = CMSG_SPACE(k->n_fds * sizeof(int));
        CMSG_FIRSTHDR(&h)->cmsg_level = SOL_SOCKET;
        CMSG_FIRSTHDR(&h)->cmsg_type = SCM_RIGHTS;
        CMSG_FIRSTHDR(&h)->cmsg_len = CMSG_LEN(k->n_fds * sizeof(int));
        memcpy(CMSG_DATA(CMSG_FIRSTHDR(&h)), k->fds, k->n_fds * sizeof(int));
    }
    assert_int_equal(sendmsg(fd, &h, MSG_NOSIGNAL), (ssize_t)k->n);
}

static void packet_done(packet *k)
{
    close(k->fds[0]);
    close(k->fds[1]);
}

/* The door says this, counts it, closes, and keeps nothing. */
static void must_refuse(room *m, packet *k, td_shm_refusal why)
{
    uint8_t got[1024];
    td_wire_pool_ack a;
    td_arena scratch;
    uint64_t before = refused(m, why);
    uint32_t pools = n_pools(m);
    int idle = n_fds(), fd = td_shm_connect(m->lc.offer->path);
    assert_true(fd >= 0);
    send_packet(fd, k);
    td_shm_door_run(m->door, 1000);
    td_shm_door_run(m->door, 1000);
    if (refused(m, why) != before + 1)
        fail_msg("%s was not refused", td_shm_refusal_name(why));
    ssize_t n = recv(fd, got, sizeof got, 0);
    assert_true(n > 24);
    td_arena_init(&scratch, 1 << 16);
    assert_int_equal(td_wire_unpack_pool_ack(got + 24, (size_t)n - 24, &scratch, &a), 0);
    td_arena_done(&scratch);
    assert_true(a.code != 0);
    assert_string_equal(a.reason, td_shm_refusal_name(why));
    assert_int_equal(recv(fd, got, sizeof got, 0), 0);
    close(fd);
    assert_int_equal(n_fds(), idle);
    assert_int_equal(n_pools(m), pools);
    packet_done(k);
}

static void refuse_name(room *m, size_t at, td_shm_refusal why)
{
    packet k;
    make_packet(m, &k);
    k.bytes[24 + at] ^= 1;
    must_refuse(m, &k, why);
}

static void test_names(void **state)
{
    (void)state;
    room m;
    room_open(&m, endpoint);
    /* nonce, prefill_epoch, decode_epoch, layout_hash: each 2 bytes of tag and length before it */
    refuse_name(&m, 2, TD_SHM_BAD_NONCE);
    refuse_name(&m, 33, TD_SHM_BAD_NONCE);
    refuse_name(&m, 34 + 18 + 2, TD_SHM_BAD_EPOCH);
    refuse_name(&m, 34 + 36 + 2, TD_SHM_BAD_LAYOUT);
    refuse_name(&m, 0, TD_SHM_BAD_FORMAT); /* no nonce */
    td_shm_line *l = line_open(&m);
    assert_int_equal(talk(&m, l), TD_SHM_READY);
    packet k;
    make_packet(&m, &k); /* number 7 again */
    must_refuse(&m, &k, TD_SHM_DOUBLE);
    assert_non_null(td_shm_door_find(m.door, m.lc.prefill_epoch, 7));
    td_shm_line_close(l);
    room_close(&m);
}

static void test_form(void **state)
{
    (void)state;
    room m;
    packet k;
    room_open(&m, endpoint);
    make_packet(&m, &k);
    size_t whole = k.n;
    packet_done(&k);
    for (size_t cut = 1; cut < whole; cut += cut < 24 ? 8 : 13) {
        make_packet(&m, &k);
        k.n = cut;
        must_refuse(&m, &k, TD_SHM_BAD_FORMAT);
    }
    make_packet(&m, &k);
    k.bytes[4] = TD_FRAME_KV_ACK;
    must_refuse(&m, &k, TD_SHM_BAD_FORMAT);
    make_packet(&m, &k);
    k.n = sizeof k.bytes; /* longer than any such packet */
    must_refuse(&m, &k, TD_SHM_BAD_FORMAT);
    for (unsigned n = 0; n < 2; n++) {
        make_packet(&m, &k);
        k.n_fds = n;
        must_refuse(&m, &k, TD_SHM_BAD_FDS);
    }
    for (unsigned n = 3; n < 5; n++) {
        make_packet(&m, &k);
        k.fds[2] = k.fds[3] = k.fds[1];
        k.n_fds = n;
        must_refuse(&m, &k, TD_SHM_BAD_FORMAT);
    }
    room_close(&m);
}

/* Bug it would be: a peer that truncates its file ends the reader with SIGBUS. */
static void test_files(void **state)
{
    (void)state;
    static const int weak[] = {0, F_SEAL_SHRINK, F_SEAL_GROW};
    room m;
    packet k;
    room_open(&m, endpoint);
    for (size_t i = 0; i < TD_ARRAY_LEN(weak); i++) {
        for (int which = 0; which < 2; which++) {
            make_packet(&m, &k);
            close(k.fds[which]);
            k.fds[which] = make_memfd(which ? PAGE : POOL, weak[i], NULL);
            must_refuse(&m, &k, TD_SHM_BAD_SEALS);
        }
    }
    make_packet(&m, &k);
    close(k.fds[0]);
    char path[128];
    snprintf(path, sizeof path, "%s/file", dir);
    k.fds[0] = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    assert_int_equal(ftruncate(k.fds[0], POOL), 0);
    unlink(path);
    must_refuse(&m, &k, TD_SHM_BAD_SEALS);
    make_packet(&m, &k);
    close(k.fds[0]);
    k.fds[0] = open("/dev/null", O_RDWR | O_CLOEXEC);
    must_refuse(&m, &k, TD_SHM_BAD_SEALS);
    /* sealed, and not as long as it is said to be */
    for (int less = -1; less <= 1; less += 2) {
        make_packet(&m, &k);
        close(k.fds[0]);
        k.fds[0] = make_memfd((size_t)(POOL + less * PAGE), KEEP, NULL);
        must_refuse(&m, &k, TD_SHM_BAD_SIZE);
    }
    make_packet(&m, &k);
    close(k.fds[1]);
    k.fds[1] = make_memfd(PAGE / 2, KEEP, NULL);
    must_refuse(&m, &k, TD_SHM_BAD_SIZE);
    room_close(&m);
}

/* Huge pages that are not there would end the reader too. */
static void test_huge_pages(void **state)
{
    (void)state;
    room m;
    packet k;
    room_open(&m, endpoint);
    int fd = memfd_create("huge", MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_HUGETLB);
    if (fd < 0 || ftruncate(fd, 2 << 20) < 0 || fcntl(fd, F_ADD_SEALS, KEEP) < 0) {
        printf("SKIP huge pages: this kernel has none\n");
        close(fd);
        room_close(&m);
        skip();
    }
    make_packet(&m, &k);
    close(k.fds[0]);
    k.fds[0] = fd;
    must_refuse(&m, &k, TD_SHM_BAD_SEALS);
    room_close(&m);
}

static void test_manners(void **state)
{
    (void)state;
    room m;
    packet k;
    room_open(&m, endpoint);
    int idle = n_fds();
    /* connected, and silent */
    int fd = td_shm_connect(m.lc.offer->path);
    td_shm_door_run(m.door, 1000);
    assert_int_equal(n_fds(), idle + 2);
    assert_int_equal(td_shm_door_due(m.door), 1000 + 2000000);
    td_shm_door_run(m.door, 1000 + 1999999);
    assert_int_equal(refused(&m, TD_SHM_TIMEOUT), 0);
    td_shm_door_run(m.door, 1000 + 2000000);
    assert_int_equal(refused(&m, TD_SHM_TIMEOUT), 1);
    assert_true(td_shm_door_due(m.door) == UINT64_MAX);
    close(fd);
    /* says more than it has to */
    make_packet(&m, &k);
    fd = td_shm_connect(m.lc.offer->path);
    send_packet(fd, &k);
    td_shm_door_run(m.door, 1000);
    td_shm_door_run(m.door, 1000);
    assert_int_equal(n_pools(&m), 1);
    send_packet(fd, &k);
    td_shm_door_run(m.door, 1000);
    assert_int_equal(n_pools(&m), 0);
    assert_int_equal(refused(&m, TD_SHM_BAD_FORMAT), 1);
    close(fd);
    packet_done(&k);
    assert_int_equal(n_fds(), idle);
    /* too many of them */
    int fds[TD_SHM_POOLS_MAX + 1];
    for (int i = 0; i <= TD_SHM_POOLS_MAX; i++) {
        fds[i] = td_shm_connect(m.lc.offer->path);
        assert_true(fds[i] >= 0);
        td_shm_door_run(m.door, 1000);
    }
    assert_int_equal(refused(&m, TD_SHM_FULL), 1);
    assert_int_equal(n_fds(), idle + 2 * TD_SHM_POOLS_MAX + 1);
    for (int i = 0; i <= TD_SHM_POOLS_MAX; i++)
        close(fds[i]);
    td_shm_door_run(m.door, 1000);
    assert_int_equal(n_fds(), idle);
    room_close(&m);
}

/* ---- whose socket, whose process ---- */

static void test_users(void **state)
{
    (void)state;
    room m;
    td_err err = {0};
    td_shm_line *l = NULL;
    char byte;
    room_open(&m, "tcp://127.0.0.1:9"); /* an abstract socket has no mode that would help */
    m.lc.uid = geteuid() + 1;           /* as if the socket were another's */
    assert_int_equal(td_shm_line_open(&m.lc, 0, &l, &err), -EPERM);
    assert_non_null(strstr(err.text, "belongs to user"));
    td_shm_door_run(m.door, 1000);
    td_shm_door_run(m.door, 1000);
    if (geteuid() != 0) {
        room_close(&m);
        printf("SKIP another user's process: not root\n");
        skip();
    }
    pid_t pid = fork();
    if (pid == 0) {
        if (setresuid(65534, 65534, 65534) < 0)
            _exit(2);
        int fd = td_shm_connect(td_shm_door_offer(m.door)->path);
        _exit(fd < 0 ? 3
              : recv(fd, &byte, 1, MSG_DONTWAIT) == -1 && usleep(300000) == 0 &&
                      recv(fd, &byte, 1, MSG_DONTWAIT) == 0
                  ? 0
                  : 4);
    }
    int status = -1;
    while (waitpid(pid, &status, WNOHANG) == 0) {
        td_shm_door_run(m.door, 1000);
        usleep(1000);
    }
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 0);
    assert_int_equal(refused(&m, TD_SHM_BAD_UID), 1);
    room_close(&m);
}

static void test_socket_file(void **state)
{
    (void)state;
    room m, n;
    struct stat st;
    mode_t mask = umask(0);
    room_open(&m, endpoint);
    umask(mask);
    assert_int_equal(stat(m.lc.offer->path, &st), 0);
    assert_true(S_ISSOCK(st.st_mode));
    assert_int_equal(st.st_mode & 0777, 0600);
    /* one that a killed process left behind is replaced */
    m.fds = n_fds() - 2;
    td_shm_door *old = m.door;
    room_open(&n, endpoint);
    td_shm_line *l = line_open(&n);
    assert_int_equal(talk(&n, l), TD_SHM_READY);
    td_shm_line_close(l);
    td_shm_door_close(n.door);
    n.door = NULL;
    room_close(&n);
    assert_true(stat(m.lc.offer->path, &st) < 0);
    (void)old;
    room_close(&m);
}

static void test_paths(void **state)
{
    (void)state;
    char path[TD_SHM_PATH_MAX], kv[256] = "ipc:///";
    uint8_t nonce[32] = {0xab, 0x01};
    td_err err = {0};
    assert_int_equal(td_shm_path("ipc:///run/tandem/kv.sock", nonce, path, &err), 0);
    assert_string_equal(path, "/run/tandem/kv.sock.shm");
    assert_int_equal(td_shm_path("tcp://10.0.0.1:7000", nonce, path, &err), 0);
    assert_string_equal(path, "@tandem-kv-ab010000000000000000000000000000");
    assert_int_equal(td_shm_path("ipc://@name", nonce, path, &err), 0);
    assert_int_equal(path[0], '@');
    memset(kv + 7, 'x', 102); /* with its slash and .shm: 107 */
    assert_int_equal(td_shm_path(kv, nonce, path, &err), 0);
    kv[7 + 102] = 'x';
    assert_int_equal(td_shm_path(kv, nonce, path, &err), -ENAMETOOLONG);
    assert_non_null(strstr(err.text, "--kv-listen"));
    assert_int_equal(td_shm_connect(""), -EINVAL);
    assert_int_equal(td_shm_connect("@"), -EINVAL);
    assert_int_equal(td_shm_connect("relative"), -EINVAL);
    assert_int_equal(td_shm_connect("@tandem-kv-nobody"), -ECONNREFUSED);
}

/* ---- the lender's end ---- */

static void test_answers(void **state)
{
    (void)state;
    room m;
    td_err err = {0};
    room_open(&m, endpoint);
    td_shm_line *l = line_open(&m);
    assert_int_equal(td_shm_line_due(l), 1000 + 2000000);
    assert_int_equal(td_shm_line_run(l, 1000 + 1999999), TD_SHM_ASKED);
    assert_int_equal(td_shm_line_run(l, 1000 + 2000000), TD_SHM_REFUSED);
    assert_string_equal(td_shm_line_why(l), "timeout");
    assert_true(td_shm_line_due(l) == UINT64_MAX);
    td_shm_line_close(l);
    td_shm_door_run(m.door, 1000);
    m.lc.decode_epoch[0] ^= 1;
    l = line_open(&m);
    assert_int_equal(talk(&m, l), TD_SHM_REFUSED);
    assert_string_equal(td_shm_line_why(l), "epoch");
    td_shm_line_close(l);

    /* a pool that the peer could write or shorten is not lent */
    int fd = m.lc.pool_fd;
    m.lc.pool_fd = make_memfd(POOL, KEEP, NULL);
    assert_int_equal(td_shm_line_open(&m.lc, 0, &l, &err), -ENOTSUP);
    close(m.lc.pool_fd);
    m.lc.pool_fd = fd;
    room_close(&m);
}

/* Whoever listens there may say anything. */
static void test_lying_door(void **state)
{
    (void)state;
    static const struct {
        const char *bytes;
        size_t n;
    } lies[] = {{"x", 1},
                {"TD\1\0\44\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", 24},
                {"TD\1\0\43\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\10\0", 26},
                {"TD\1\0\44\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\20\0", 26}};
    room m;
    char path[128];
    uint8_t got[1024];
    int fds[2];
    unsigned n;
    room_open(&m, endpoint);
    snprintf(path, sizeof path, "%s/liar.sock", dir);
    td_shm_offer offer = *m.lc.offer;
    snprintf(offer.path, sizeof offer.path, "%.100s", path);
    m.lc.offer = &offer;
    int door = td_shm_listen(path);
    assert_true(door >= 0);
    for (size_t i = 0; i < TD_ARRAY_LEN(lies); i++) {
        td_shm_line *l = line_open(&m);
        int fd = accept(door, NULL, NULL);
        assert_true(td_shm_recv(fd, got, sizeof got, fds, &n) > 0 && n == 2);
        /* what the peer got can neither be written nor resized */
        for (unsigned k = 0; k < n; k++) {
            assert_true(write(fds[k], "x", 1) < 0);
            assert_true(ftruncate(fds[k], 1) < 0);
            assert_true(mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fds[k], 0) ==
                        MAP_FAILED);
            close(fds[k]);
        }
        int junk = open("/dev/null", O_RDONLY | O_CLOEXEC);
        assert_int_equal(td_shm_send(fd, lies[i].bytes, lies[i].n, &junk, 1), 0);
        close(junk);
        assert_int_equal(td_shm_line_run(l, 1000), TD_SHM_REFUSED);
        assert_string_equal(td_shm_line_why(l), "format");
        td_shm_line_close(l);
        close(fd);
    }
    td_shm_line *l = line_open(&m);
    close(accept(door, NULL, NULL));
    assert_int_equal(td_shm_line_run(l, 1000), TD_SHM_REFUSED);
    assert_string_equal(td_shm_line_why(l), "closed");
    td_shm_line_close(l);
    close(door);
    unlink(path);
    room_close(&m);
}

static int setup(void **state)
{
    (void)state;
    snprintf(dir, sizeof dir, "/tmp/tandem-test-XXXXXX");
    assert_non_null(mkdtemp(dir));
    snprintf(endpoint, sizeof endpoint, "ipc://%s/kv.sock", dir);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    return rmdir(dir); /* nothing is left in it */
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_lend_and_read), cmocka_unit_test(test_ends),
        cmocka_unit_test(test_names),         cmocka_unit_test(test_form),
        cmocka_unit_test(test_files),         cmocka_unit_test(test_huge_pages),
        cmocka_unit_test(test_manners),       cmocka_unit_test(test_users),
        cmocka_unit_test(test_socket_file),   cmocka_unit_test(test_paths),
        cmocka_unit_test(test_answers),       cmocka_unit_test(test_lying_door),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
