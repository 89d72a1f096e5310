/* SPDX-License-Identifier: Apache-2.0 */
#include "engine/safetensors.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/arena.h"
#include "base/bug.h"
#include "base/cleanup.h"
#include "base/file.h"
#include "base/json.h"

#include "base/banned.h"

enum { HEADER_MAX = 100 * 1000 * 1000, NODES_MAX = 8 << 20, FILES_MAX = 4096 };

typedef struct mapping {
    const void *data;
    size_t len;
    char *path;
} mapping;

struct td_st {
    td_arena arena; /* names */
    td_st_tensor *tensors;
    size_t n, cap;
    mapping *maps;
    size_t n_maps, cap_maps;
};

static const struct type_row {
    const char *name;
    int dtype;
    uint32_t bytes;
} types[] = {
    {"F32", TD_F32, 4},
    {"BF16", TD_BF16, 2},
    {"F16", TD_F16, 2},
    {"U8", TD_U8, 1},
    {"F8_E4M3", TD_F8E4M3, 1},
    {"F8_E5M2", -1, 1},
    {"F8_E8M0", -1, 1},
    {"BOOL", -1, 1},
    {"I8", -1, 1},
    {"I16", -1, 2},
    {"U16", -1, 2},
    {"I32", -1, 4},
    {"U32", -1, 4},
    {"F64", -1, 8},
    {"I64", -1, 8},
    {"U64", -1, 8},
};

static const json_t *get(const json_t *o, const char *key)
{
    return json_object_get(o, key);
}

static void free_json(json_t **j)
{
    json_decref(*j);
}
#define AUTO_JSON TD_CLEANUP(free_json) json_t *

static int grow(void **p, size_t *cap, size_t n, size_t size)
{
    if (n < *cap)
        return 0;
    size_t c = *cap ? *cap * 2 : 64;
    void *q = realloc(*p, c * size);
    if (!q)
        return -ENOMEM;
    *p = q;
    *cap = c;
    return 0;
}

/* Where a tensor lies in the data section. */
typedef struct span {
    uint64_t begin, end;
} span;

static int read_shape(const json_t *shape, const char *file, td_st_tensor *t, uint64_t *ret_elems,
                      td_err *err)
{
    if (!json_is_array(shape) || json_array_size(shape) > TD_ST_RANK_MAX)
        return td_err_set(err, -EINVAL,
                          "%s: tensor %s: shape must be an array of at most %d numbers", file,
                          t->name, TD_ST_RANK_MAX);
    *ret_elems = 1;
    t->rank = (uint32_t)json_array_size(shape);
    for (uint32_t i = 0; i < t->rank; i++) {
        const json_t *d = json_array_get(shape, i);
        if (!json_is_integer(d) || json_integer_value(d) < 0)
            return td_err_set(err, -EINVAL, "%s: tensor %s: shape[%u] is not a size", file, t->name,
                              i);
        t->shape[i] = (uint64_t)json_integer_value(d);
        if (__builtin_mul_overflow(*ret_elems, t->shape[i], ret_elems))
            return td_err_set(err, -EINVAL, "%s: tensor %s: shape overflows", file, t->name);
    }
    return 0;
}

static int read_span(const json_t *o, const char *file, const char *name, span *ret, td_err *err)
{
    const json_t *begin = json_array_get(o, 0), *end = json_array_get(o, 1);
    if (json_array_size(o) != 2 || !json_is_integer(begin) || !json_is_integer(end) ||
        json_integer_value(begin) < 0 || json_integer_value(end) < json_integer_value(begin))
        return td_err_set(err, -EINVAL, "%s: tensor %s: data_offsets must be [begin, end]", file,
                          name);
    *ret = (span){(uint64_t)json_integer_value(begin), (uint64_t)json_integer_value(end)};
    return 0;
}

static int read_entry(td_st *st, const char *file, const char *name, const json_t *o,
                      td_st_tensor *t, span *ret, td_err *err)
{
    size_t len = strlen(name);
    if (len == 0 || len > TD_ST_NAME_MAX)
        return td_err_set(err, -EINVAL, "%s: a tensor name has %zu bytes; 1 to %d are allowed",
                          file, len, TD_ST_NAME_MAX);
    if (!json_is_object(o) || json_object_size(o) != 3)
        return td_err_set(err, -EINVAL, "%s: tensor %s: needs exactly dtype, shape, data_offsets",
                          file, name);
    *t = (td_st_tensor){.name = td_arena_strndup(&st->arena, name, len)};
    if (!t->name)
        return td_err_set(err, -ENOMEM, "%s: out of memory", file);
    const char *type = json_string_value(get(o, "dtype"));
    const struct type_row *row = NULL;
    for (size_t i = 0; type && i < TD_ARRAY_LEN(types); i++)
        if (strcmp(type, types[i].name) == 0)
            row = &types[i];
    if (!row)
        return td_err_set(err, -EINVAL, "%s: tensor %s: unknown dtype", file, name);
    t->type = row->name;
    t->dtype = row->dtype;
    uint64_t elems = 0;
    int r = read_shape(get(o, "shape"), file, t, &elems, err);
    r = r < 0 ? r : read_span(get(o, "data_offsets"), file, name, ret, err);
    if (r < 0)
        return r;
    if (__builtin_mul_overflow(elems, (uint64_t)row->bytes, &t->bytes) ||
        t->bytes != ret->end - ret->begin)
        return td_err_set(err, -EINVAL,
                          "%s: tensor %s: %llu bytes of data do not match its shape and dtype",
                          file, name, (unsigned long long)(ret->end - ret->begin));
    return 0;
}

typedef struct placed {
    span at;
    size_t tensor;
} placed;

static int by_offset(const void *a, const void *b)
{
    const placed *x = a, *y = b;
    if (x->at.begin != y->at.begin)
        return x->at.begin < y->at.begin ? -1 : 1;
    return x->at.end < y->at.end ? -1 : x->at.end > y->at.end;
}

/* No hole, no overlap, nothing behind the last tensor. */
static int check_cover(const td_st *st, placed *p, size_t n, uint64_t data_bytes, const char *file,
                       td_err *err)
{
    uint64_t at = 0;
    qsort(p, n, sizeof *p, by_offset);
    for (size_t i = 0; i < n; i++) {
        if (p[i].at.begin != at)
            return td_err_set(err, -EINVAL, "%s: tensor %s %s; the file is damaged: fetch it again",
                              file, st->tensors[p[i].tensor].name,
                              p[i].at.begin < at ? "overlaps another one"
                                                 : "leaves a hole before it");
        at = p[i].at.end;
    }
    if (at != data_bytes)
        return td_err_set(
            err, -EINVAL,
            "%s: header describes %llu bytes of data, the file has %llu; fetch it again", file,
            (unsigned long long)at, (unsigned long long)data_bytes);
    return 0;
}

static int check_metadata(const json_t *meta, const char *file, td_err *err)
{
    const char *key;
    json_t *v;
    if (!json_is_object(meta))
        return td_err_set(err, -EINVAL, "%s: __metadata__ must be an object of strings", file);
    json_object_foreach((json_t *)meta, key, v) if (!json_is_string(v)) return td_err_set(
        err, -EINVAL, "%s: __metadata__ must be an object of strings", file);
    return 0;
}

static int add_header(td_st *st, const json_t *root, const uint8_t *data, uint64_t data_bytes,
                      const char *file, td_err *err)
{
    TD_AUTO_FREE placed *p = calloc(json_object_size(root) + 1, sizeof *p);
    size_t n = 0;
    const char *name;
    json_t *o;
    if (!p)
        return td_err_set(err, -ENOMEM, "%s: out of memory", file);
    json_object_foreach((json_t *)root, name, o)
    {
        int r;
        if (strcmp(name, "__metadata__") == 0) {
            r = check_metadata(o, file, err);
            if (r < 0)
                return r;
            continue;
        }
        if (grow((void **)&st->tensors, &st->cap, st->n, sizeof *st->tensors) < 0)
            return td_err_set(err, -ENOMEM, "%s: out of memory", file);
        r = read_entry(st, file, name, o, &st->tensors[st->n], &p[n].at, err);
        if (r < 0)
            return r;
        p[n++].tensor = st->n++;
    }
    int r = check_cover(st, p, n, data_bytes, file, err);
    for (size_t i = 0; r >= 0 && i < n; i++)
        st->tensors[p[i].tensor].data = data + p[i].at.begin;
    return r;
}

static int add_bytes(td_st *st, const uint8_t *bytes, size_t n, const char *file, td_err *err)
{
    uint64_t len = 0;
    if (n < 8)
        return td_err_set(err, -EINVAL,
                          "%s: %zu bytes are too few for a safetensors file; fetch it again", file,
                          n);
    for (int i = 7; i >= 0; i--)
        len = len << 8 | bytes[i];
    if (len > HEADER_MAX || len > n - 8)
        return td_err_set(
            err, -EINVAL,
            "%s: the header claims %llu bytes, %s; the file is damaged: fetch it again", file,
            (unsigned long long)len,
            len > HEADER_MAX ? "more than 100 MB" : "more than the file has");
    if (len < 2 || bytes[8] != '{')
        return td_err_set(err, -EINVAL, "%s: no safetensors header", file);
    AUTO_JSON root = NULL;
    td_json_limits limits = {.max_bytes = HEADER_MAX, .max_depth = 4, .max_nodes = NODES_MAX};
    int r = td_json_parse((const char *)bytes + 8, len, &limits, file, &root, err);
    if (r < 0)
        return r;
    if (!json_is_object(root))
        return td_err_set(err, -EINVAL, "%s: the header is not a JSON object", file);
    return add_header(st, root, bytes + 8 + len, n - 8 - len, file, err);
}

static int by_name(const void *a, const void *b)
{
    const td_st_tensor *x = a, *y = b;
    return strcmp(x->name, y->name);
}

/* Sort, and refuse a name that two shards hold. */
static int seal(td_st *st, const char *file, td_err *err)
{
    if (st->n == 0)
        return td_err_set(err, -EINVAL, "%s: no tensors", file);
    qsort(st->tensors, st->n, sizeof *st->tensors, by_name);
    for (size_t i = 1; i < st->n; i++)
        if (strcmp(st->tensors[i - 1].name, st->tensors[i].name) == 0)
            return td_err_set(err, -EINVAL, "%s: tensor %s exists twice", file,
                              st->tensors[i].name);
    return 0;
}

static td_st *st_new(void)
{
    td_st *st = calloc(1, sizeof *st);
    if (st)
        td_arena_init(&st->arena, 0);
    return st;
}

static int map_file(td_st *st, const char *path, const uint8_t **ret, size_t *ret_n, td_err *err)
{
    const void *data = NULL;
    size_t len = 0;
    int r = td_file_map(path, &data, &len, err);
    if (r < 0)
        return r;
    char *name = strdup(path);
    if (!name || grow((void **)&st->maps, &st->cap_maps, st->n_maps, sizeof *st->maps) < 0) {
        free(name);
        td_file_unmap(data, len);
        return td_err_set(err, -ENOMEM, "%s: out of memory", path);
    }
    st->maps[st->n_maps++] = (mapping){data, len, name};
    *ret = data;
    *ret_n = len;
    return 0;
}

static int add_file(td_st *st, const char *path, td_err *err)
{
    const uint8_t *bytes = NULL;
    size_t n = 0;
    int r = map_file(st, path, &bytes, &n, err);
    return r < 0 ? r : add_bytes(st, bytes, n, path, err);
}

/* Take ownership of st: hand it out or close it. */
static int finish(td_st *st, int r, td_st **ret)
{
    if (r < 0)
        td_st_close(st);
    else
        *ret = st;
    return r < 0 ? r : 0;
}

int td_st_parse(const void *bytes, size_t n, const char *name, td_st **ret_st, td_err *reterr_err)
{
    td_st *st = st_new();
    if (!st)
        return td_err_set(reterr_err, -ENOMEM, "%s: out of memory", name);
    int r = add_bytes(st, bytes, n, name, reterr_err);
    return finish(st, r < 0 ? r : seal(st, name, reterr_err), ret_st);
}

int td_st_open_file(const char *path, td_st **ret_st, td_err *reterr_err)
{
    td_st *st = st_new();
    if (!st)
        return td_err_set(reterr_err, -ENOMEM, "%s: out of memory", path);
    int r = add_file(st, path, reterr_err);
    return finish(st, r < 0 ? r : seal(st, path, reterr_err), ret_st);
}

/* A shard's name may not leave the directory. */
static int good_shard_name(const char *s)
{
    size_t n = s ? strlen(s) : 0;
    return n > 12 && n < 200 && s[0] != '.' && !strchr(s, '/') &&
           strcmp(s + n - 12, ".safetensors") == 0;
}

/* Map each shard once; names are few, so a linear search will do. */
static int add_shards(td_st *st, const char *dir, const char *index, const json_t *map, td_err *err)
{
    const char *name;
    json_t *v;
    const char *seen[FILES_MAX];
    size_t n = 0;
    json_object_foreach((json_t *)map, name, v)
    {
        const char *file = json_string_value(v);
        if (!good_shard_name(file))
            return td_err_set(err, -EINVAL,
                              "%s: tensor %.100s: not the name of a .safetensors file beside it",
                              index, name);
        size_t i = 0;
        while (i < n && strcmp(seen[i], file) != 0)
            i++;
        if (i < n)
            continue;
        if (n == FILES_MAX)
            return td_err_set(err, -EINVAL, "%s: more than %d shards", index, FILES_MAX);
        seen[n++] = file;
        TD_AUTO_FREE char *path = td_path_join(dir, file);
        size_t first = st->n;
        int r = path ? add_file(st, path, err) : td_err_set(err, -ENOMEM, "out of memory");
        if (r < 0)
            return r;
        for (size_t t = first; t < st->n; t++) {
            const char *want = json_string_value(get(map, st->tensors[t].name));
            if (!want || strcmp(want, file) != 0)
                return td_err_set(err, -EINVAL, "%s: %s holds tensor %s, the index says otherwise",
                                  index, file, st->tensors[t].name);
        }
    }
    if (st->n != json_object_size(map))
        return td_err_set(err, -EINVAL, "%s: names %zu tensors, the shards hold %zu", index,
                          json_object_size(map), st->n);
    return 0;
}

static int open_sharded(td_st *st, const char *dir, const char *index, td_err *err)
{
    AUTO_JSON root = NULL;
    td_json_limits limits = {.max_bytes = HEADER_MAX, .max_depth = 4, .max_nodes = NODES_MAX};
    int r = td_json_load(index, &limits, &root, err);
    if (r < 0)
        return r;
    const json_t *map = get(root, "weight_map");
    if (!json_is_object(map) || json_object_size(map) == 0)
        return td_err_set(err, -EINVAL, "%s: weight_map is missing", index);
    r = add_shards(st, dir, index, map, err);
    return r < 0 ? r : seal(st, index, err);
}

int td_st_open(const char *dir, td_st **ret_st, td_err *reterr_err)
{
    TD_AUTO_FREE char *single = td_path_join(dir, "model.safetensors");
    TD_AUTO_FREE char *index = td_path_join(dir, "model.safetensors.index.json");
    td_st *st = st_new();
    if (!single || !index || !st) {
        td_st_close(st);
        return td_err_set(reterr_err, -ENOMEM, "%s: out of memory", dir);
    }
    int r;
    if (access(single, F_OK) == 0) {
        r = add_file(st, single, reterr_err);
        r = r < 0 ? r : seal(st, single, reterr_err);
    } else if (access(index, F_OK) == 0) {
        r = open_sharded(st, dir, index, reterr_err);
    } else {
        r = td_err_set(reterr_err, -ENOENT,
                       "%s: neither model.safetensors nor model.safetensors.index.json; give a "
                       "model directory",
                       dir);
    }
    return finish(st, r, ret_st);
}

void td_st_give_back(td_st *st)
{
    for (size_t i = 0; i < st->n_maps; i++) {
        const mapping *m = &st->maps[i];
        /* the kernel keeps what is mapped: this process lets go first. All of it is a wish */
        if (m->len)
            madvise((void *)(uintptr_t)m->data, m->len, MADV_DONTNEED);
        int fd = open(m->path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
        if (fd < 0)
            continue;
        posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
        close(fd);
    }
}

void td_st_close(td_st *st)
{
    if (!st)
        return;
    for (size_t i = 0; i < st->n_maps; i++) {
        td_file_unmap(st->maps[i].data, st->maps[i].len);
        free(st->maps[i].path);
    }
    free(st->maps);
    free(st->tensors);
    td_arena_done(&st->arena);
    free(st);
}

size_t td_st_count(const td_st *st)
{
    return st->n;
}

td_st_tensor *td_st_at(const td_st *st, size_t i)
{
    TD_BUG_ON(i >= st->n);
    return &st->tensors[i];
}

td_st_tensor *td_st_find(const td_st *st, const char *name)
{
    td_st_tensor key = {.name = name};
    return bsearch(&key, st->tensors, st->n, sizeof key, by_name);
}
