/* SPDX-License-Identifier: Apache-2.0 */
#include "base/map.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "base/bug.h"
#include "base/banned.h"

struct td_map_slot {
    uint64_t key;
    void *value; /* NULL: free; &tombstone: deleted */
};

static char tombstone;

static uint64_t mix(uint64_t x)
{
    x ^= x >> 33;
    x *= 0xff51afd7ed558ccdull;
    x ^= x >> 33;
    x *= 0xc4ceb9fe1a85ec53ull;
    return x ^ x >> 33;
}

void td_map_init(td_map *m)
{
    *m = (td_map){0};
}

void td_map_done(td_map *m)
{
    free(m->slots);
    td_map_init(m);
}

static struct td_map_slot *find(const td_map *m, uint64_t key)
{
    if (!m->cap)
        return NULL;
    for (size_t i = mix(key) & (m->cap - 1);; i = (i + 1) & (m->cap - 1)) {
        struct td_map_slot *s = &m->slots[i];
        if (!s->value)
            return NULL;
        if (s->key == key && s->value != &tombstone)
            return s;
    }
}

void *td_map_get(const td_map *m, uint64_t key)
{
    const struct td_map_slot *s = find(m, key);
    return s ? s->value : NULL;
}

static void insert(td_map *m, uint64_t key, void *value)
{
    size_t i = mix(key) & (m->cap - 1);
    while (m->slots[i].value && m->slots[i].value != &tombstone)
        i = (i + 1) & (m->cap - 1);
    m->used += !m->slots[i].value;
    m->n++;
    m->slots[i] = (struct td_map_slot){key, value};
}

static int rehash(td_map *m, size_t cap)
{
    td_map bigger = {.cap = cap, .slots = calloc(cap, sizeof *m->slots)};
    if (!bigger.slots)
        return -ENOMEM;
    for (size_t i = 0; i < m->cap; i++)
        if (m->slots[i].value && m->slots[i].value != &tombstone)
            insert(&bigger, m->slots[i].key, m->slots[i].value);
    free(m->slots);
    *m = bigger;
    return 0;
}

int td_map_put(td_map *m, uint64_t key, void *value, void **ret_old)
{
    TD_BUG_ON(!value);
    struct td_map_slot *s = find(m, key);
    if (ret_old)
        *ret_old = s ? s->value : NULL;
    if (s) {
        s->value = value;
        return 0;
    }
    if ((m->used + 1) * 4 > m->cap * 3) {
        int r = rehash(m, (m->n + 1) * 2 > m->cap ? TD_MAX(m->cap * 2, (size_t)16) : m->cap);
        if (r < 0)
            return r;
    }
    insert(m, key, value);
    return 0;
}

void *td_map_del(td_map *m, uint64_t key)
{
    struct td_map_slot *s = find(m, key);
    if (!s)
        return NULL;
    void *old = s->value;
    s->value = &tombstone;
    m->n--;
    return old;
}

int td_map_next(const td_map *m, size_t *it, uint64_t *ret_key, void **ret_value)
{
    while (*it < m->cap) {
        const struct td_map_slot *s = &m->slots[(*it)++];
        if (!s->value || s->value == &tombstone)
            continue;
        if (ret_key)
            *ret_key = s->key;
        if (ret_value)
            *ret_value = s->value;
        return 1;
    }
    return 0;
}

struct td_strmap_slot {
    const char *key; /* NULL: free */
    uint32_t len, hash;
    uint64_t value;
};

static uint32_t hash_bytes(const char *key, size_t len)
{
    return (uint32_t)XXH3_64bits(key, len);
}

void td_strmap_init(td_strmap *m)
{
    *m = (td_strmap){0};
}

void td_strmap_done(td_strmap *m)
{
    free(m->slots);
    td_strmap_init(m);
}

/* The key's slot, or the free one where it belongs. */
static struct td_strmap_slot *str_slot(const td_strmap *m, const char *key, size_t len,
                                       uint32_t hash)
{
    for (size_t i = hash & (m->cap - 1);; i = (i + 1) & (m->cap - 1)) {
        struct td_strmap_slot *s = &m->slots[i];
        if (!s->key ||
            (s->hash == hash && s->len == len && (len == 0 || memcmp(s->key, key, len) == 0)))
            return s;
    }
}

int td_strmap_reserve(td_strmap *m, size_t n)
{
    size_t cap = m->cap ? m->cap : 16;
    while (n * 4 > cap * 3)
        cap *= 2;
    if (cap == m->cap)
        return 0;
    td_strmap bigger = {.n = m->n, .cap = cap, .slots = calloc(cap, sizeof *m->slots)};
    if (!bigger.slots)
        return -ENOMEM;
    for (size_t i = 0; i < m->cap; i++)
        if (m->slots[i].key)
            *str_slot(&bigger, m->slots[i].key, m->slots[i].len, m->slots[i].hash) = m->slots[i];
    free(m->slots);
    *m = bigger;
    return 0;
}

int td_strmap_put(td_strmap *m, const char *key, size_t len, uint64_t value)
{
    if (len > UINT32_MAX)
        return -E2BIG;
    int r = td_strmap_reserve(m, m->n + 1);
    if (r < 0)
        return r;
    uint32_t hash = hash_bytes(key, len);
    struct td_strmap_slot *s = str_slot(m, key, len, hash);
    if (s->key)
        return -EEXIST;
    *s = (struct td_strmap_slot){len ? key : "", (uint32_t)len, hash, value};
    m->n++;
    return 0;
}

int td_strmap_get(const td_strmap *m, const char *key, size_t len, uint64_t *ret_value)
{
    if (!m->cap || len > UINT32_MAX)
        return 0;
    const struct td_strmap_slot *s = str_slot(m, key, len, hash_bytes(key, len));
    if (s->key && ret_value)
        *ret_value = s->value;
    return s->key != NULL;
}
