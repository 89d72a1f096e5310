/* SPDX-License-Identifier: Apache-2.0 */
/* Streams a random checkpoint to disk: safetensors, one buffer of values at a time. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/file.h"
#include "base/hash.h"
#include "cli/model.h"
#include "engine/safetensors_write.h"
#include "base/banned.h"

enum { BUFFER_VALUES = 1 << 16 };

typedef struct writer {
    td_st_writer *out;
    uint64_t seed, done, total;
    void (*progress)(double fraction);
    td_err *err;
} writer;

static int put_all(int fd, const void *bytes, size_t n)
{
    for (const char *p = bytes; n;) {
        ssize_t r = write(fd, p, n);
        if (r < 0 && errno != EINTR)
            return -errno;
        if (r > 0) {
            p += r;
            n -= (size_t)r;
        }
    }
    return 0;
}

static int failed(td_err *err, int code, const char *dir, const char *name)
{
    return td_err_set(err, code, "%s/%s: %s; is there space, and may it be written?", dir, name,
                      td_errno_text(code));
}

static int create(const char *dir, const char *name, td_err *err)
{
    TD_AUTO_FREE char *path = td_path_join(dir, name);
    if (!path)
        return td_err_set(err, -ENOMEM, "out of memory");
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0644);
    return fd < 0 ? failed(err, -errno, dir, name) : fd;
}

int td_model_put(const char *dir, const char *name, const void *bytes, size_t n, td_err *reterr_err)
{
    int fd = create(dir, name, reterr_err);
    if (fd < 0)
        return fd;
    int r = put_all(fd, bytes, n);
    if (close(fd) < 0 && r >= 0)
        r = -errno;
    return r < 0 ? failed(reterr_err, r, dir, name) : 0;
}

static uint64_t mix(uint64_t x) /* splitmix64's finaliser (Steele, Lea, Flood 2014) */
{
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return x ^ x >> 31;
}

/* Nearly normal, variance one: the sum of four uniform 16-bit numbers, from one word. */
static float normal(uint64_t start, uint64_t i)
{
    uint64_t w = mix(start + i * 0x9e3779b97f4a7c15ull);
    uint32_t sum = (uint32_t)((w & 0xffff) + (w >> 16 & 0xffff) + (w >> 32 & 0xffff) + (w >> 48));
    return ((float)sum - 131070.0f) * 2.6429e-5f; /* 1 / (65536 sqrt(4 / 12)) */
}

static uint16_t to_bf16(float f)
{
    uint32_t u;
    memcpy(&u, &f, 4);
    return (uint16_t)((u + 0x7fffu + (u >> 16 & 1)) >> 16);
}

/* A tensor's numbers depend on the seed and its name only, not on what else is in the file. */
static uint64_t stream(const writer *w, const td_random_tensor *t)
{
    uint8_t sum[16];
    uint64_t start;
    td_xxh128(t->name, strlen(t->name), sum);
    memcpy(&start, sum, 8);
    return mix(start + mix(w->seed));
}

static int put_tensor(writer *w, const td_random_tensor *t)
{
    static union {
        uint16_t h[BUFFER_VALUES];
        float f[BUFFER_VALUES];
    } buf;
    uint64_t start = stream(w, t), n = t->n * (t->k ? t->k : 1);
    for (uint64_t at = 0; at < n; at += BUFFER_VALUES) {
        uint64_t len = n - at < BUFFER_VALUES ? n - at : BUFFER_VALUES;
        for (uint64_t i = 0; i < len; i++) {
            float v = t->mean + t->scale * normal(start, at + i);
            if (t->f32)
                buf.f[i] = v;
            else
                buf.h[i] = to_bf16(v);
        }
        int r = td_st_writer_data(w->out, &buf, len * (t->f32 ? 4 : 2), w->err);
        if (r < 0)
            return r;
    }
    w->done += td_random_bytes_of(t);
    if (w->progress)
        w->progress((double)w->done / (double)w->total);
    return 0;
}

static int declare(td_st_writer *out, const td_random_tensor *t, td_err *err)
{
    uint64_t shape[2] = {t->n, t->k};
    return td_st_writer_add(out, t->name, t->f32 ? "F32" : "BF16", shape, t->k ? 2 : 1,
                            td_random_bytes_of(t), err);
}

int td_random_write(const char *dir, const td_random_list *l, uint64_t seed, uint64_t shard_bytes,
                    void (*progress)(double fraction), td_err *reterr_err)
{
    writer w = {.seed = seed, .progress = progress, .err = reterr_err};
    if (l->failed)
        return td_err_set(reterr_err, -ENOMEM, "out of memory");
    int r = td_st_writer_new(dir, shard_bytes, &w.out, reterr_err);
    for (size_t i = 0; r >= 0 && i < l->n; i++) {
        r = declare(w.out, &l->data[i], reterr_err);
        w.total += td_random_bytes_of(&l->data[i]);
    }
    for (size_t i = 0; r >= 0 && i < l->n; i++)
        r = put_tensor(&w, &l->data[i]);
    r = r < 0 ? r : td_st_writer_finish(w.out, reterr_err);
    td_st_writer_free(w.out);
    return r;
}
