/* SPDX-License-Identifier: Apache-2.0 */
#include "engine/pack.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/bug.h"
#include "base/cleanup.h"
#include "base/file.h"
#include "base/hash.h"
#include "base/json.h"
#include "kernels/ref/pool.h"

#include "base/banned.h"

enum { ALIGN = 4096, HEADER_MAX = 256 << 20, TAIL = 16, TENSORS_MAX = 1 << 20 };

static const char FILE_NAME[] = "model.tdpack", PARTIAL[] = "model.tdpack.partial",
                  MAGIC[] = "TDPACK01";

typedef struct item {
    const char *name; /* borrowed from the header */
    td_pack_entry e;
    uint8_t sum[16];
} item;

struct td_pack {
    char *path;
    const uint8_t *map;
    size_t len;
    json_t *header;
    td_pack_meta meta;
    item *items;
    size_t n, next;
};

static int bad(const td_pack *p, td_err *err, const char *what)
{
    return td_err_set(err, -EINVAL, "%s: %s; write it again with tandem pack", p->path, what);
}

static uint64_t number(const json_t *a, size_t i)
{
    json_int_t v = json_integer_value(json_array_get(a, i));
    return v < 0 ? UINT64_MAX : (uint64_t)v;
}

static int hex_field(const json_t *o, const char *key, void *out, size_t n)
{
    const char *s = json_string_value(json_object_get(o, key));
    return s && strlen(s) == 2 * n && td_unhex(s, out, n) == 0;
}

static int format_by_name(const char *s, td_weight_format *ret)
{
    for (unsigned f = 0; s && f < TD_WEIGHT_FORMATS; f++)
        if (strcmp(s, td_weight_format_name(f)) == 0) {
            *ret = f;
            return 1;
        }
    return 0;
}

static int dtype_by_name(const char *s, td_dtype *ret)
{
    for (unsigned t = TD_F32; s && t <= TD_F16; t++)
        if (strcmp(s, td_dtype_name(t)) == 0) {
            *ret = t;
            return 1;
        }
    return 0;
}

/* One row of the header; data ends at limit. */
static int read_item(const json_t *o, const uint8_t *map, uint64_t limit, item *it)
{
    const json_t *shape = json_object_get(o, "shape"), *at = json_object_get(o, "at");
    const char *format = json_string_value(json_object_get(o, "format"));
    uint64_t offset = number(at, 0), bytes = number(at, 1);
    it->name = json_string_value(json_object_get(o, "name"));
    it->e = (td_pack_entry){.is_vector = format && strcmp(format, "vector") == 0,
                            .slabs = (uint32_t)number(shape, 0),
                            .n = (uint32_t)number(shape, 1),
                            .k = (uint32_t)number(shape, 2),
                            .n_bytes = bytes};
    for (size_t i = 0; i < 3; i++)
        if (number(shape, i) > UINT32_MAX)
            return 0;
    if (!it->name || json_array_size(shape) != 3 || json_array_size(at) != 2 || offset % ALIGN ||
        offset > limit || bytes > limit - offset || !hex_field(o, "xxh128", it->sum, 16))
        return 0;
    it->e.bytes = map + offset;
    if (!it->e.is_vector)
        return format_by_name(format, &it->e.format);
    return dtype_by_name(json_string_value(json_object_get(o, "type")), &it->e.type) &&
           bytes == (uint64_t)it->e.n * td_dtype_bytes(it->e.type);
}

static int read_meta(const json_t *o, td_pack_meta *m)
{
    const char *layout = json_string_value(json_object_get(o, "layout"));
    const json_t *formats = json_object_get(o, "formats");
    if (!layout || strlen(layout) >= sizeof m->layout ||
        json_array_size(formats) != TD_WEIGHT_CLASSES)
        return 0;
    memcpy(m->layout, layout, strlen(layout) + 1);
    for (size_t i = 0; i < TD_WEIGHT_CLASSES; i++) {
        uint64_t f = number(formats, i);
        if (f >= 1u << TD_WEIGHT_FORMATS)
            return 0;
        m->formats[i] = (uint32_t)f;
    }
    return hex_field(o, "model_hash", m->model_hash, 32) &&
           hex_field(o, "config_hash", m->config_hash, 32) &&
           hex_field(o, "tokenizer_hash", m->tokenizer_hash, 32);
}

static int read_header(td_pack *p, td_err *err)
{
    uint64_t n = 0, body;
    if (p->len < TAIL || memcmp(p->map + p->len - 8, MAGIC, 8) != 0)
        return bad(p, err, "is no packed model, or is cut short");
    for (int i = 0; i < 8; i++)
        n |= (uint64_t)p->map[p->len - TAIL + (size_t)i] << (8 * i);
    if (n > HEADER_MAX || n > p->len - TAIL)
        return bad(p, err, "has a header of an impossible length");
    body = p->len - TAIL - n;
    td_json_limits limits = {.max_bytes = HEADER_MAX, .max_nodes = 16ul * TENSORS_MAX};
    int r = td_json_parse((const char *)p->map + body, n, &limits, p->path, &p->header, err);
    if (r < 0)
        return r;
    const json_t *list = json_object_get(p->header, "tensors");
    p->n = json_array_size(list);
    if (!read_meta(p->header, &p->meta) || p->n == 0 || p->n > TENSORS_MAX)
        return bad(p, err, "has a header that is not understood");
    p->items = calloc(p->n, sizeof *p->items);
    if (!p->items)
        return td_err_set(err, -ENOMEM, "out of memory");
    for (size_t i = 0; i < p->n; i++)
        if (!read_item(json_array_get(list, i), p->map, body, &p->items[i]))
            return td_err_set(err, -EINVAL,
                              "%s: tensor %zu (%s) has an impossible entry; write it again with "
                              "tandem pack",
                              p->path, i, p->items[i].name ? p->items[i].name : "?");
    return 0;
}

int td_pack_open(const char *dir, td_pack **ret, td_err *reterr_err)
{
    td_pack *p = calloc(1, sizeof *p);
    const void *map = NULL;
    if (p)
        p->path = td_path_join(dir, FILE_NAME);
    if (!p || !p->path) {
        free(p);
        return td_err_set(reterr_err, -ENOMEM, "out of memory");
    }
    if (access(p->path, F_OK) != 0) {
        td_pack_close(p);
        return 0;
    }
    int r = td_file_map(p->path, &map, &p->len, reterr_err);
    p->map = map;
    r = r < 0 ? r : read_header(p, reterr_err);
    if (r < 0) {
        td_pack_close(p);
        return r;
    }
    *ret = p;
    return 1;
}

const td_pack_meta *td_pack_get_meta(const td_pack *p)
{
    return &p->meta;
}

typedef struct check {
    const td_pack *p;
    _Atomic size_t bad; /* 1 + index of one that differs */
} check;

static void check_item(void *arg, uint32_t i, uint32_t thread)
{
    (void)thread;
    check *c = arg;
    const item *it = &c->p->items[i];
    uint8_t sum[16];
    td_xxh128(it->e.bytes, it->e.n_bytes, sum);
    if (memcmp(sum, it->sum, sizeof sum) != 0)
        c->bad = (size_t)i + 1;
}

int td_pack_verify(const td_pack *p, uint32_t n_threads, td_err *reterr_err)
{
    check c = {.p = p};
    td_pool *pool = NULL;
    int r = td_pool_open(n_threads, NULL, 0, &pool);
    if (r < 0)
        return td_err_set(reterr_err, r, "threads: %s", td_errno_text(r));
    td_pool_run(pool, check_item, &c, (uint32_t)p->n);
    td_pool_close(pool);
    if (c.bad)
        return td_err_set(reterr_err, -EBADMSG,
                          "%s: tensor %s differs from its checksum; write the file again with "
                          "tandem pack",
                          p->path, p->items[c.bad - 1].name);
    return 0;
}

int td_pack_take(td_pack *p, const char *name, td_pack_entry *ret, td_err *reterr_err)
{
    if (p->next == p->n || strcmp(p->items[p->next].name, name) != 0)
        return td_err_set(reterr_err, -EINVAL,
                          "%s: holds %s where config.json asks for %s; write it again with tandem "
                          "pack",
                          p->path, p->next < p->n ? p->items[p->next].name : "nothing more", name);
    *ret = p->items[p->next++].e;
    return 0;
}

int td_pack_end(const td_pack *p, td_err *reterr_err)
{
    if (p->next == p->n)
        return 0;
    return td_err_set(reterr_err, -EINVAL, "%s: tensor %s has no place in this model", p->path,
                      p->items[p->next].name);
}

void td_pack_close(td_pack *p)
{
    if (!p)
        return;
    if (p->map)
        td_file_unmap(p->map, p->len);
    json_decref(p->header);
    free(p->items);
    free(p->path);
    free(p);
}

struct td_pack_writer {
    char *partial, *path;
    FILE *file;
    uint64_t at;
    json_t *tensors;
};

int td_pack_writer_new(const char *dir, td_pack_writer **ret, td_err *reterr_err)
{
    td_pack_writer *w = calloc(1, sizeof *w);
    if (!w)
        return td_err_set(reterr_err, -ENOMEM, "out of memory");
    w->path = td_path_join(dir, FILE_NAME);
    w->partial = td_path_join(dir, PARTIAL);
    w->tensors = json_array();
    if (!w->path || !w->partial || !w->tensors) {
        td_pack_writer_free(w);
        return td_err_set(reterr_err, -ENOMEM, "out of memory");
    }
    w->file = fopen(w->partial, "wxe");
    if (!w->file) {
        int r = td_err_set(reterr_err, -errno, "%s: %s", w->partial, td_errno_text(-errno));
        td_pack_writer_free(w);
        return r;
    }
    *ret = w;
    return 0;
}

static int put(td_pack_writer *w, const void *bytes, size_t n, td_err *err)
{
    if (fwrite(bytes, 1, n, w->file) != n)
        return td_err_set(err, -EIO, "%s: %s; is the disk full?", w->partial,
                          td_errno_text(-errno));
    w->at += n;
    return 0;
}

int td_pack_writer_add(td_pack_writer *w, const char *name, const td_pack_entry *e,
                       td_err *reterr_err)
{
    static const uint8_t zero[ALIGN];
    uint8_t sum[16];
    char hex[33];
    int r = put(w, zero, (ALIGN - w->at % ALIGN) % ALIGN, reterr_err);
    td_xxh128(e->bytes, e->n_bytes, sum);
    json_t *o =
        json_pack("{s:s, s:s, s:s, s:[I,I,I], s:[I,I], s:s}", "name", name, "format",
                  e->is_vector ? "vector" : td_weight_format_name(e->format), "type",
                  td_dtype_name(e->is_vector ? e->type : TD_F32), "shape", (json_int_t)e->slabs,
                  (json_int_t)e->n, (json_int_t)e->k, "at", (json_int_t)w->at,
                  (json_int_t)e->n_bytes, "xxh128", td_hex(sum, 16, hex));
    if (r >= 0 && (!o || json_array_append_new(w->tensors, o) < 0))
        r = td_err_set(reterr_err, -ENOMEM, "out of memory");
    return r < 0 ? r : put(w, e->bytes, e->n_bytes, reterr_err);
}

static json_t *header_of(td_pack_writer *w, const td_pack_meta *m)
{
    char model[65], config[65], tokenizer[65];
    json_t *formats = json_array();
    for (size_t i = 0; i < TD_WEIGHT_CLASSES; i++)
        json_array_append_new(formats, json_integer(m->formats[i]));
    return json_pack("{s:s, s:s, s:s, s:s, s:o, s:O}", "layout", m->layout, "model_hash",
                     td_hex(m->model_hash, 32, model), "config_hash",
                     td_hex(m->config_hash, 32, config), "tokenizer_hash",
                     td_hex(m->tokenizer_hash, 32, tokenizer), "formats", formats, "tensors",
                     w->tensors);
}

int td_pack_writer_finish(td_pack_writer *w, const td_pack_meta *meta, td_err *reterr_err)
{
    json_t *header = header_of(w, meta);
    TD_AUTO_FREE char *text = header ? json_dumps(header, JSON_COMPACT) : NULL;
    json_decref(header);
    if (!text)
        return td_err_set(reterr_err, -ENOMEM, "out of memory");
    uint8_t length[8];
    for (int i = 0; i < 8; i++)
        length[i] = (uint8_t)((uint64_t)strlen(text) >> (8 * i));
    int r = put(w, text, strlen(text), reterr_err);
    r = r < 0 ? r : put(w, length, 8, reterr_err);
    r = r < 0 ? r : put(w, MAGIC, 8, reterr_err);
    if (r < 0)
        return r;
    int failed = fflush(w->file) != 0 || fsync(fileno(w->file)) < 0;
    failed |= fclose(w->file) != 0;
    w->file = NULL;
    if (failed || rename(w->partial, w->path) < 0)
        return td_err_set(reterr_err, -EIO, "%s: %s", w->path, td_errno_text(-errno));
    return 0;
}

void td_pack_writer_free(td_pack_writer *w)
{
    if (!w)
        return;
    if (w->file)
        fclose(w->file);
    if (w->partial)
        unlink(w->partial); /* nothing, after finish */
    json_decref(w->tensors);
    free(w->partial);
    free(w->path);
    free(w);
}
