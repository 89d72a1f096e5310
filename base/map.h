/* SPDX-License-Identifier: Apache-2.0 */
/* Two hash maps, open addressing, grown at 3/4: u64 -> pointer and bytes -> u64. One thread at a
 * time. */
#ifndef TD_BASE_MAP_H
#define TD_BASE_MAP_H

#include <stddef.h>
#include <stdint.h>

/* u64 -> void *. Values may not be NULL. */
typedef struct td_map {
    struct td_map_slot *slots;
    size_t n, cap, used; /* used counts tombstones too */
} td_map;

void td_map_init(td_map *m);
void td_map_done(td_map *m); /* frees the table, not the values */
void *td_map_get(const td_map *m, uint64_t key);
/* Insert or replace. 0, or -ENOMEM (unchanged). ret_old may be NULL. */
int td_map_put(td_map *m, uint64_t key, void *value, void **ret_old);
/* Remove; returns the value or NULL. */
void *td_map_del(td_map *m, uint64_t key);
/* Iterate: *it starts at 0; returns 0 at the end. Deleting the current key while iterating is
 * allowed. */
int td_map_next(const td_map *m, size_t *it, uint64_t *ret_key, void **ret_value);

/* bytes -> u64. Keys are borrowed: they must outlive the map (string table, mapped file, arena). */
typedef struct td_strmap {
    struct td_strmap_slot *slots;
    size_t n, cap;
} td_strmap;

void td_strmap_init(td_strmap *m);
void td_strmap_done(td_strmap *m);
/* Make room for n keys in all. */
int td_strmap_reserve(td_strmap *m, size_t n);
/* 0; -EEXIST if the key is present (unchanged); -ENOMEM. */
int td_strmap_put(td_strmap *m, const char *key, size_t len, uint64_t value);
/* 1 and *ret_value when found, else 0. */
int td_strmap_get(const td_strmap *m, const char *key, size_t len, uint64_t *ret_value);

#endif
