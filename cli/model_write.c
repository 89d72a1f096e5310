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
#include "base/strbuf.h"
#include "cli/model.h"
#include "base/banned.h"

enum { BUFFER_VALUES = 1 << 16 };

typedef struct shard {
    size_t first, n; /* tensors */
    char name[64];
} shard;

typedef struct writer {
    const char *dir;
    const td_random_list *list;
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

static int put_tensor(writer *w, int fd, const td_random_tensor *t)
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
        int r = put_all(fd, &buf, len * (t->f32 ? 4 : 2));
        if (r < 0)
            return r;
    }
    w->done += td_random_bytes_of(t);
    if (w->progress)
        w->progress((double)w->done / (double)w->total);
    return 0;
}

/* u64 length, JSON padded with blanks to 8 bytes. */
static int put_header(const writer *w, int fd, const shard *s)
{
    td_strbuf b;
    uint64_t at = 0;
    td_strbuf_init(&b);
    td_strbuf_add(&b, "\0\0\0\0\0\0\0\0", 8);
    td_strbuf_adds(&b, "{\"__metadata__\":{\"format\":\"pt\"}");
    for (size_t i = s->first; i < s->first + s->n; i++) {
        const td_random_tensor *t = &w->list->data[i];
        uint64_t bytes = td_random_bytes_of(t);
        td_strbuf_addf(&b, ",\"%s\":{\"dtype\":\"%s\",\"shape\":[%llu", t->name,
                       t->f32 ? "F32" : "BF16", (unsigned long long)t->n);
        if (t->k)
            td_strbuf_addf(&b, ",%llu", (unsigned long long)t->k);
        td_strbuf_addf(&b, "],\"data_offsets\":[%llu,%llu]}", (unsigned long long)at,
                       (unsigned long long)(at + bytes));
        at += bytes;
    }
    td_strbuf_addc(&b, '}');
    while (b.len % 8 && !b.failed)
        td_strbuf_addc(&b, ' ');
    int r = b.failed ? -ENOMEM : 0;
    for (int i = 0; r >= 0 && i < 8; i++)
        b.data[i] = (char)(uint8_t)((b.len - 8) >> (8 * i));
    r = r < 0 ? r : put_all(fd, b.data, b.len);
    td_strbuf_done(&b);
    return r;
}

static int put_shard(writer *w, const shard *s)
{
    int fd = create(w->dir, s->name, w->err);
    if (fd < 0)
        return fd;
    int r = put_header(w, fd, s);
    for (size_t i = s->first; r >= 0 && i < s->first + s->n; i++)
        r = put_tensor(w, fd, &w->list->data[i]);
    if (close(fd) < 0 && r >= 0)
        r = -errno;
    return r < 0 ? failed(w->err, r, w->dir, s->name) : 0;
}

/* Fill shards in order; returns how many. shards NULL: count only. */
static size_t cut(const td_random_list *l, uint64_t limit, shard *shards)
{
    size_t n = 0;
    uint64_t used = 0;
    for (size_t i = 0; i < l->n; i++) {
        uint64_t bytes = td_random_bytes_of(&l->data[i]);
        if (i == 0 || used + bytes > limit) {
            if (shards)
                shards[n] = (shard){.first = i};
            n++;
            used = 0;
        }
        used += bytes;
        if (shards)
            shards[n - 1].n++;
    }
    return n;
}

static int put_index(const writer *w, const shard *shards, size_t n)
{
    td_strbuf b;
    td_strbuf_init(&b);
    td_strbuf_addf(&b, "{\n  \"metadata\": {\"total_size\": %llu},\n  \"weight_map\": {",
                   (unsigned long long)w->total);
    for (size_t s = 0; s < n; s++)
        for (size_t i = shards[s].first; i < shards[s].first + shards[s].n; i++)
            td_strbuf_addf(&b, "%s\n    \"%s\": \"%s\"", i ? "," : "", w->list->data[i].name,
                           shards[s].name);
    td_strbuf_adds(&b, "\n  }\n}\n");
    int r = b.failed ? td_err_set(w->err, -ENOMEM, "out of memory")
                     : td_model_put(w->dir, "model.safetensors.index.json", b.data, b.len, w->err);
    td_strbuf_done(&b);
    return r;
}

int td_random_write(const char *dir, const td_random_list *l, uint64_t seed, uint64_t shard_bytes,
                    void (*progress)(double fraction), td_err *reterr_err)
{
    writer w = {.dir = dir, .list = l, .seed = seed, .progress = progress, .err = reterr_err};
    for (size_t i = 0; i < l->n; i++)
        w.total += td_random_bytes_of(&l->data[i]);
    size_t n = cut(l, shard_bytes, NULL);
    TD_AUTO_FREE shard *shards = calloc(n ? n : 1, sizeof *shards);
    if (!shards || l->failed)
        return td_err_set(reterr_err, -ENOMEM, "out of memory");
    cut(l, shard_bytes, shards);
    for (size_t s = 0; s < n; s++) {
        if (n == 1)
            snprintf(shards[s].name, sizeof shards[s].name, "model.safetensors");
        else
            snprintf(shards[s].name, sizeof shards[s].name, "model-%05zu-of-%05zu.safetensors",
                     s + 1, n);
        int r = put_shard(&w, &shards[s]);
        if (r < 0)
            return r;
    }
    return n > 1 ? put_index(&w, shards, n) : 0;
}
