/* SPDX-License-Identifier: Apache-2.0 */
#include "engine/safetensors_write.h"

#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/file.h"

#include "base/banned.h"

enum { NAME_MAX_BYTES = 64 };

typedef struct entry {
    char *name;
    const char *type;
    uint64_t shape[8], bytes, offset; /* offset within its shard's data */
    uint32_t rank, shard;
} entry;

struct td_st_writer {
    char *dir;
    uint64_t max_shard, left; /* left: bytes of the shard at hand still to come */
    entry *entries;
    size_t n, cap;
    uint32_t n_shards, shard; /* shard: next to open */
    FILE *file;
};

int td_st_writer_new(const char *dir, uint64_t max_shard_bytes, td_st_writer **ret, td_err *err)
{
    td_st_writer *w = calloc(1, sizeof *w);
    if (w)
        w->dir = strdup(dir);
    if (!w || !w->dir) {
        free(w);
        return td_err_set(err, -ENOMEM, "out of memory");
    }
    w->max_shard = max_shard_bytes;
    *ret = w;
    return 0;
}

int td_st_writer_add(td_st_writer *w, const char *name, const char *type, const uint64_t *shape,
                     uint32_t rank, uint64_t bytes, td_err *err)
{
    if (w->n == w->cap) {
        size_t cap = w->cap ? 2 * w->cap : 256;
        entry *p = realloc(w->entries, cap * sizeof *p);
        if (!p)
            return td_err_set(err, -ENOMEM, "out of memory");
        w->entries = p;
        w->cap = cap;
    }
    entry e = {.type = type, .rank = rank, .bytes = bytes, .name = strdup(name)};
    if (!e.name)
        return td_err_set(err, -ENOMEM, "out of memory");
    memcpy(e.shape, shape, rank * sizeof *shape);
    const entry *last = w->n ? &w->entries[w->n - 1] : NULL;
    e.shard = last ? last->shard : 0;
    e.offset = last ? last->offset + last->bytes : 0;
    if (last && e.offset + bytes > w->max_shard) {
        e.shard++;
        e.offset = 0;
    }
    w->n_shards = e.shard + 1;
    w->entries[w->n++] = e;
    return 0;
}

static void shard_name(const td_st_writer *w, uint32_t shard, char out[NAME_MAX_BYTES])
{
    if (w->n_shards == 1)
        snprintf(out, NAME_MAX_BYTES, "model.safetensors");
    else
        snprintf(out, NAME_MAX_BYTES, "model-%05u-of-%05u.safetensors", shard + 1, w->n_shards);
}

/* DIR/NAME with a suffix; heap. */
static char *path_of(const td_st_writer *w, const char *name, const char *suffix)
{
    char full[NAME_MAX_BYTES + 16];
    snprintf(full, sizeof full, "%s%s", name, suffix);
    return td_path_join(w->dir, full);
}

static const char PARTIAL[] = ".partial";

static json_t *describe(const entry *e)
{
    json_t *shape = json_array();
    for (uint32_t i = 0; i < e->rank; i++)
        json_array_append_new(shape, json_integer((json_int_t)e->shape[i]));
    return json_pack("{s:s, s:o, s:[I,I]}", "dtype", e->type, "shape", shape, "data_offsets",
                     (json_int_t)e->offset, (json_int_t)(e->offset + e->bytes));
}

/* Header of a shard, padded with blanks so that data begins at a multiple of 64. */
static int write_header(td_st_writer *w, uint32_t shard, td_err *err)
{
    json_t *o = json_object();
    json_object_set_new(o, "__metadata__", json_pack("{s:s}", "format", "pt"));
    w->left = 0;
    for (size_t i = 0; i < w->n; i++) {
        if (w->entries[i].shard != shard)
            continue;
        json_object_set_new(o, w->entries[i].name, describe(&w->entries[i]));
        w->left += w->entries[i].bytes;
    }
    TD_AUTO_FREE char *text = json_dumps(o, JSON_COMPACT);
    json_decref(o);
    if (!text)
        return td_err_set(err, -ENOMEM, "out of memory");
    size_t n = strlen(text), padded = (8 + n + 63) / 64 * 64 - 8;
    uint8_t length[8];
    for (int i = 0; i < 8; i++)
        length[i] = (uint8_t)((uint64_t)padded >> (8 * i));
    int bad = fwrite(length, 1, 8, w->file) != 8 || fwrite(text, 1, n, w->file) != n;
    for (size_t i = n; !bad && i < padded; i++)
        bad = fputc(' ', w->file) == EOF;
    return bad ? td_err_set(err, -EIO, "%s: header: %s", w->dir, td_errno_text(-errno)) : 0;
}

static int open_shard(td_st_writer *w, td_err *err)
{
    char name[NAME_MAX_BYTES];
    shard_name(w, w->shard, name);
    TD_AUTO_FREE char *path = path_of(w, name, PARTIAL);
    if (!path)
        return td_err_set(err, -ENOMEM, "out of memory");
    w->file = fopen(path, "wxe");
    if (!w->file)
        return td_err_set(err, -errno, "%s: %s", path, td_errno_text(-errno));
    return write_header(w, w->shard++, err);
}

static int close_shard(td_st_writer *w, td_err *err)
{
    int bad = fflush(w->file) != 0 || fsync(fileno(w->file)) < 0;
    bad |= fclose(w->file) != 0;
    w->file = NULL;
    return bad ? td_err_set(err, -EIO, "%s: %s; is the disk full?", w->dir, td_errno_text(-errno))
               : 0;
}

int td_st_writer_data(td_st_writer *w, const void *bytes, size_t n, td_err *err)
{
    const uint8_t *p = bytes;
    while (n) {
        if (!w->file && w->shard == w->n_shards)
            return td_err_set(err, -EINVAL, "%s: more bytes than declared", w->dir);
        int r = w->file ? 0 : open_shard(w, err);
        if (r < 0)
            return r;
        size_t part = n < w->left ? n : (size_t)w->left;
        if (fwrite(p, 1, part, w->file) != part)
            return td_err_set(err, -EIO, "%s: %s; is the disk full?", w->dir,
                              td_errno_text(-errno));
        p += part;
        n -= part;
        w->left -= part;
        if (w->left == 0 && (r = close_shard(w, err)) < 0)
            return r;
    }
    return 0;
}

static int write_index(td_st_writer *w, td_err *err)
{
    json_t *map = json_object();
    uint64_t total = 0;
    for (size_t i = 0; i < w->n; i++) {
        char name[NAME_MAX_BYTES];
        shard_name(w, w->entries[i].shard, name);
        json_object_set_new(map, w->entries[i].name, json_string(name));
        total += w->entries[i].bytes;
    }
    json_t *o =
        json_pack("{s:{s:I}, s:o}", "metadata", "total_size", (json_int_t)total, "weight_map", map);
    TD_AUTO_FREE char *path = path_of(w, "model.safetensors.index.json", "");
    int r = !o || !path ? -ENOMEM : json_dump_file(o, path, JSON_INDENT(1)) < 0 ? -EIO : 0;
    json_decref(o);
    return r < 0 ? td_err_set(err, r, "%s: model.safetensors.index.json: %s", w->dir,
                              td_errno_text(r))
                 : 0;
}

int td_st_writer_finish(td_st_writer *w, td_err *err)
{
    if (w->file || w->shard < w->n_shards)
        return td_err_set(err, -EINVAL, "%s: tensors are incomplete", w->dir);
    for (uint32_t s = 0; s < w->n_shards; s++) {
        char name[NAME_MAX_BYTES];
        shard_name(w, s, name);
        TD_AUTO_FREE char *from = path_of(w, name, PARTIAL);
        TD_AUTO_FREE char *to = path_of(w, name, "");
        if (!from || !to || rename(from, to) < 0)
            return td_err_set(err, -EIO, "%s/%s: %s", w->dir, name, td_errno_text(-errno));
    }
    w->shard = 0; /* nothing partial is left */
    return w->n_shards > 1 ? write_index(w, err) : 0;
}

void td_st_writer_free(td_st_writer *w)
{
    if (!w)
        return;
    if (w->file)
        fclose(w->file);
    for (uint32_t s = 0; s < w->shard; s++) {
        char name[NAME_MAX_BYTES];
        shard_name(w, s, name);
        TD_AUTO_FREE char *path = path_of(w, name, PARTIAL);
        if (path)
            unlink(path);
    }
    for (size_t i = 0; i < w->n; i++)
        free(w->entries[i].name);
    free(w->entries);
    free(w->dir);
    free(w);
}
