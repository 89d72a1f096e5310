/* SPDX-License-Identifier: Apache-2.0 */
#include "handoff/shm_line.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/arena.h"
#include "base/bug.h"
#include "base/cleanup.h"
#include "handoff/wire.h"
#include "rpc/frame.h"
#include "base/banned.h"

#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif

enum {
    ANSWER_US = 2000000, /* less than TD_OUT_SILENCE_US: pushes wait for it */
    WORD_BYTES = 4096
};

struct td_shm_line {
    int fd;
    uint64_t number, asked_us;
    td_shm_line_state state;
    _Atomic uint32_t *word; /* 1: withdrawn; the peer reads it */
    char why[64];
};

/* A page of our own that the peer can read, neither write nor resize. Its descriptor. */
static int open_word(_Atomic uint32_t **ret_word)
{
    TD_AUTO_CLOSE int fd = memfd_create("tandem-kv-word", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0 || ftruncate(fd, WORD_BYTES) < 0)
        return -errno;
    void *p = mmap(NULL, WORD_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (p == MAP_FAILED)
        return -errno;
    if (fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE) < 0) {
        int r = -errno;
        munmap(p, WORD_BYTES);
        return r;
    }
    *ret_word = p;
    int taken = fd;
    fd = -1;
    return taken;
}

static int lend(td_shm_line *l, const td_shm_line_config *c, uint64_t bytes)
{
    uint8_t out[TD_PREAMBLE_BYTES + TD_POOL_BODY_MAX];
    td_preamble p = {.major = TD_WIRE_MAJOR, .minor = TD_WIRE_MINOR, .type = TD_FRAME_KV_POOL};
    td_wire_pool w = {.pool = c->number, .bytes = bytes};
    memcpy(w.nonce, c->offer->nonce, sizeof w.nonce);
    memcpy(w.prefill_epoch, c->prefill_epoch, 16);
    memcpy(w.decode_epoch, c->decode_epoch, 16);
    memcpy(w.layout_hash, c->layout_hash, 16);
    td_preamble_pack(&p, out);
    int n = td_wire_pack_pool(&w, out + TD_PREAMBLE_BYTES, TD_POOL_BODY_MAX);
    TD_BUG_ON(n < 0);
    TD_AUTO_CLOSE int word_fd = open_word(&l->word);
    if (word_fd < 0)
        return word_fd;
    int fds[2] = {c->pool_fd, word_fd};
    return td_shm_send(l->fd, out, TD_PREAMBLE_BYTES + (size_t)n, fds, 2);
}

static int check_pool(int fd, uint64_t *ret_bytes, td_err *err)
{
    static const int want = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE;
    struct stat st;
    int seals = fcntl(fd, F_GET_SEALS);
    if (seals < 0 || (seals & want) != want || fstat(fd, &st) < 0)
        return td_err_set(err, -ENOTSUP,
                          "the KV pool has not all seals (F_SEAL_FUTURE_WRITE needs Linux 5.1)");
    *ret_bytes = (uint64_t)st.st_size;
    return 0;
}

int td_shm_line_open(const td_shm_line_config *c, uint64_t now_us, td_shm_line **ret_line,
                     td_err *reterr_err)
{
    uint64_t bytes = 0;
    uid_t uid;
    int r = check_pool(c->pool_fd, &bytes, reterr_err);
    if (r < 0)
        return r;
    td_shm_line *l = calloc(1, sizeof *l);
    if (!l)
        return td_err_set(reterr_err, -ENOMEM, "out of memory");
    l->number = c->number;
    l->asked_us = now_us;
    l->fd = td_shm_connect(c->offer->path);
    r = l->fd < 0 ? l->fd : td_shm_peer_uid(l->fd, &uid);
    if (r < 0)
        td_err_set(reterr_err, r, "%s: %s", c->offer->path, td_errno_text(-r));
    else if (uid != c->uid)
        r = td_err_set(reterr_err, -EPERM, "%s: belongs to user %u, not to %u", c->offer->path,
                       (unsigned)uid, (unsigned)c->uid);
    else if ((r = lend(l, c, bytes)) < 0)
        td_err_set(reterr_err, r, "%s: cannot pass the pool: %s", c->offer->path,
                   td_errno_text(-r));
    if (r < 0) {
        td_shm_line_close(l);
        return r;
    }
    *ret_line = l;
    return 0;
}

void td_shm_line_withdraw(td_shm_line *l)
{
    atomic_store_explicit(l->word, 1, memory_order_seq_cst);
    /* nothing that is written to the pool from here on may be seen before it */
    atomic_thread_fence(memory_order_seq_cst);
}

void td_shm_line_close(td_shm_line *l)
{
    if (!l)
        return;
    if (l->word) {
        td_shm_line_withdraw(l);
        munmap((void *)l->word, WORD_BYTES);
    }
    if (l->fd >= 0)
        close(l->fd);
    free(l);
}

static td_shm_line_state refused(td_shm_line *l, const char *why)
{
    snprintf(l->why, sizeof l->why, "%s", why);
    return l->state = l->state == TD_SHM_ASKED ? TD_SHM_REFUSED : TD_SHM_LOST;
}

static td_shm_line_state take_answer(td_shm_line *l, const uint8_t *packet, size_t n)
{
    td_preamble pre;
    td_wire_pool_ack a;
    td_arena scratch;
    if (l->state != TD_SHM_ASKED || n < TD_PREAMBLE_BYTES ||
        td_preamble_unpack(packet, TD_PREAMBLE_BYTES, &pre) < 0 || pre.type != TD_FRAME_KV_POOL_ACK)
        return refused(l, "format");
    td_arena_init(&scratch, 16 << 10);
    int r =
        td_wire_unpack_pool_ack(packet + TD_PREAMBLE_BYTES, n - TD_PREAMBLE_BYTES, &scratch, &a);
    td_arena_done(&scratch);
    if (r < 0)
        return refused(l, "format");
    if (a.code)
        return refused(l, a.reason[0] ? a.reason : "refused");
    return l->state = TD_SHM_READY;
}

td_shm_line_state td_shm_line_run(td_shm_line *l, uint64_t now_us)
{
    uint8_t packet[TD_SHM_PACKET_MAX];
    int fds[2];
    unsigned n_fds;
    if (l->state >= TD_SHM_REFUSED)
        return l->state;
    int n = td_shm_recv(l->fd, packet, sizeof packet, fds, &n_fds);
    while (n_fds)
        close(fds[--n_fds]);
    if (n > 0)
        return take_answer(l, packet, (size_t)n);
    if (n != -EAGAIN && n != -EINTR)
        return refused(l, n == -EPROTO ? "format" : "closed");
    if (l->state == TD_SHM_ASKED && now_us >= l->asked_us + ANSWER_US)
        return refused(l, "timeout");
    return l->state;
}

const char *td_shm_line_why(const td_shm_line *l)
{
    return l->why;
}

int td_shm_line_fd(const td_shm_line *l)
{
    return l->fd;
}

uint64_t td_shm_line_number(const td_shm_line *l)
{
    return l->number;
}

uint64_t td_shm_line_due(const td_shm_line *l)
{
    return l->state == TD_SHM_ASKED ? l->asked_us + ANSWER_US : UINT64_MAX;
}
