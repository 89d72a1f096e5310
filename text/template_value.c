/* SPDX-License-Identifier: Apache-2.0 */
#include "text/template_value.h"

#include <errno.h>
#include <math.h>
#include <string.h>
#include <unicode/uchar.h>

#include "base/bug.h"
#include "base/banned.h"

td_value td_v_undefined(td_str name)
{
    return (td_value){.kind = V_UNDEFINED, .s = name};
}

td_value td_v_none(void)
{
    return (td_value){.kind = V_NONE};
}

td_value td_v_bool(int b)
{
    return (td_value){.kind = V_BOOL, .i = b != 0};
}

td_value td_v_int(int64_t i)
{
    return (td_value){.kind = V_INT, .i = i};
}

td_value td_v_float(double f)
{
    return (td_value){.kind = V_FLOAT, .f = f};
}

td_value td_v_str(td_str s)
{
    return (td_value){.kind = V_STR, .s = s};
}

void *td_run_alloc(td_run *r, size_t n, size_t size)
{
    void *p = r->code ? NULL : td_arena_alloc_array(&r->arena, n, size);
    if (!p)
        td_run_fail(r, -E2BIG, "the template needs more than %zu MiB of memory",
                    r->arena.limit_bytes >> 20);
    else
        td_run_step(r, n * size / 256); /* clearing and copying is work, too */
    return p;
}

td_value td_v_copy(td_run *r, td_str s)
{
    char *p = td_run_alloc(r, s.len + 1, 1);
    if (!p)
        return td_v_undefined((td_str){0});
    if (s.len)
        memcpy(p, s.ptr, s.len);
    return td_v_str((td_str){p, s.len});
}

td_value td_v_list(td_run *r, td_vkind kind)
{
    td_vlist *l = td_run_alloc(r, 1, sizeof *l);
    return l ? (td_value){.kind = kind, .list = l} : td_v_undefined((td_str){0});
}

void td_v_append(td_run *r, td_value list, td_value v)
{
    if (r->code)
        return;
    td_vlist *l = list.list;
    if (l->n == l->cap) {
        size_t cap = l->cap ? l->cap * 2 : 8;
        td_value *more = td_run_alloc(r, cap, sizeof *more);
        if (!more)
            return;
        if (l->n)
            memcpy(more, l->at, l->n * sizeof *more);
        l->at = more;
        l->cap = cap;
    }
    l->at[l->n++] = v;
}

td_value td_v_dict(td_run *r)
{
    td_vdict *d = td_run_alloc(r, 1, sizeof *d);
    return d ? (td_value){.kind = V_DICT, .dict = d} : td_v_undefined((td_str){0});
}

void td_v_put(td_run *r, td_value dict, td_value key, td_value v)
{
    if (r->code)
        return;
    td_vdict *d = dict.dict;
    td_run_step(r, d->n / 8);
    for (size_t i = 0; i < d->n; i++)
        if (td_v_equal(r, d->keys[i], key)) {
            d->values[i] = v;
            return;
        }
    if (d->n == d->cap) {
        size_t cap = d->cap ? d->cap * 2 : 8;
        td_value *keys = td_run_alloc(r, cap, sizeof *keys),
                 *values = td_run_alloc(r, cap, sizeof *values);
        if (!keys || !values)
            return;
        if (d->n) {
            memcpy(keys, d->keys, d->n * sizeof *keys);
            memcpy(values, d->values, d->n * sizeof *values);
        }
        d->keys = keys;
        d->values = values;
        d->cap = cap;
    }
    d->keys[d->n] = key;
    d->values[d->n++] = v;
}

td_value td_v_json(td_run *r, json_t *j)
{
    switch (json_typeof(j)) {
    case JSON_NULL:
        return td_v_none();
    case JSON_TRUE:
    case JSON_FALSE:
        return td_v_bool(json_is_true(j));
    case JSON_INTEGER:
        return td_v_int(json_integer_value(j));
    case JSON_REAL:
        return td_v_float(json_real_value(j));
    case JSON_STRING:
        return td_v_str((td_str){json_string_value(j), json_string_length(j)});
    case JSON_ARRAY: {
        td_value v = td_v_list(r, V_LIST);
        if (v.kind == V_LIST)
            v.list->json = j;
        return v;
    }
    default: {
        td_value v = td_v_dict(r);
        if (v.kind == V_DICT)
            v.dict->json = j;
        return v;
    }
    }
}

int td_v_is_list(td_value v)
{
    return v.kind >= V_LIST && v.kind <= V_GEN;
}

int td_v_is_number(td_value v)
{
    return v.kind == V_BOOL || v.kind == V_INT || v.kind == V_FLOAT;
}

size_t td_v_n(td_value v)
{
    if (td_v_is_list(v))
        return v.list->json ? json_array_size(v.list->json) : v.list->n;
    if (v.kind == V_DICT || v.kind == V_NAMESPACE)
        return v.dict->json ? json_object_size(v.dict->json) : v.dict->n;
    return 0;
}

td_value td_v_at(td_run *r, td_value list, size_t i)
{
    return list.list->json ? td_v_json(r, json_array_get(list.list->json, i)) : list.list->at[i];
}

/* An object's pairs become two arrays once someone walks over them. */
static void unfold(td_run *r, td_vdict *d)
{
    const char *key;
    size_t len, n = d->json ? json_object_size(d->json) : 0;
    json_t *v, *object = d->json;
    if (!object)
        return;
    td_value *keys = td_run_alloc(r, n, sizeof *keys), *values = td_run_alloc(r, n, sizeof *values);
    if (!keys || !values)
        return;
    json_object_keylen_foreach(object, key, len, v)
    {
        keys[d->n] = td_v_str((td_str){key, len});
        values[d->n++] = td_v_json(r, v);
    }
    d->keys = keys;
    d->values = values;
    d->cap = n;
    d->json = NULL;
}

td_value td_v_key(td_run *r, td_value dict, size_t i)
{
    unfold(r, dict.dict);
    return r->code ? td_v_undefined((td_str){0}) : dict.dict->keys[i];
}

td_value td_v_item(td_run *r, td_value dict, size_t i)
{
    unfold(r, dict.dict);
    return r->code ? td_v_undefined((td_str){0}) : dict.dict->values[i];
}

int td_v_get(td_run *r, td_value dict, td_value key, td_value *ret_v)
{
    td_vdict *d = dict.dict;
    if (d->json) {
        json_t *v = key.kind == V_STR
                        ? json_object_getn(d->json, key.s.ptr ? key.s.ptr : "", key.s.len)
                        : NULL;
        if (v)
            *ret_v = td_v_json(r, v);
        return v != NULL;
    }
    td_run_step(r, d->n / 8);
    for (size_t i = 0; i < d->n && !r->code; i++)
        if (td_v_equal(r, d->keys[i], key)) {
            *ret_v = d->values[i];
            return 1;
        }
    return 0;
}

static td_value characters(td_run *r, td_str s)
{
    td_value list = td_v_list(r, V_LIST);
    uint32_t cp;
    for (size_t at = 0; at < s.len && !r->code;) {
        int len = td_utf8_decode(s.ptr + at, s.len - at, &cp);
        size_t n = len > 0 ? (size_t)len : 1;
        td_v_append(r, list, td_v_str((td_str){s.ptr + at, n}));
        at += n;
    }
    return list;
}

td_value td_v_iterate(td_run *r, td_value v)
{
    if (v.kind == V_STR)
        return characters(r, v.s);
    if (v.kind == V_UNDEFINED)
        return td_v_list(r, V_LIST);
    if (v.kind == V_DICT) {
        td_value keys = td_v_list(r, V_LIST);
        for (size_t i = 0; i < td_v_n(v) && !r->code; i++)
            td_v_append(r, keys, td_v_key(r, v, i));
        return keys;
    }
    if (!td_v_is_list(v))
        return td_run_fail(r, -EINVAL, "'%s' object is not iterable", td_v_type(v));
    td_run_step(r, td_v_n(v));
    if (v.kind != V_GEN)
        return v;
    td_value all = td_v_list(r, V_LIST); /* a generator is empty after one pass */
    if (!r->code) {
        *all.list = *v.list;
        *v.list = (td_vlist){0};
    }
    return all;
}

const char *td_v_type(td_value v)
{
    static const char *const names[] = {
        "Undefined", "NoneType",    "bool",       "int",      "float",     "str",
        "list",      "tuple",       "dict_items", "range",    "generator", "dict",
        "Namespace", "LoopContext", "Macro",      "function", "method"};
    return names[v.kind];
}

int td_v_truth(td_run *r, td_value v)
{
    switch (v.kind) {
    case V_UNDEFINED:
    case V_NONE:
        return 0;
    case V_BOOL:
    case V_INT:
        return v.i != 0;
    case V_FLOAT:
        return v.f != 0;
    case V_STR:
        return v.s.len != 0;
    case V_LIST:
    case V_TUPLE:
    case V_VIEW:
    case V_RANGE:
    case V_DICT:
        return td_v_n(v) != 0;
    default:
        return 1;
    }
}

double td_v_double(td_value v)
{
    return v.kind == V_FLOAT ? v.f : (double)v.i;
}

int64_t td_v_integer(td_value v)
{
    return v.i;
}

static int enter(td_run *r)
{
    if (r->code || !td_run_step(r, 1))
        return 0;
    if (r->depth >= r->max_depth) {
        td_run_fail(r, -E2BIG, "values are nested more than %u deep", r->max_depth);
        return 0;
    }
    r->depth++;
    return 1;
}

static int equal_dicts(td_run *r, td_value a, td_value b)
{
    size_t n = td_v_n(a);
    if (n != td_v_n(b))
        return 0;
    for (size_t i = 0; i < n && !r->code; i++) {
        td_value other;
        if (!td_v_get(r, b, td_v_key(r, a, i), &other) || !td_v_equal(r, td_v_item(r, a, i), other))
            return 0;
    }
    return 1;
}

static int equal_lists(td_run *r, td_value a, td_value b)
{
    size_t n = td_v_n(a);
    if (n != td_v_n(b))
        return 0;
    for (size_t i = 0; i < n && !r->code; i++)
        if (!td_v_equal(r, td_v_at(r, a, i), td_v_at(r, b, i)))
            return 0;
    return 1;
}

static int equal_strings(td_run *r, td_str a, td_str b)
{
    td_run_step(r, a.len / 64);
    return a.len == b.len && (a.len == 0 || memcmp(a.ptr, b.ptr, a.len) == 0);
}

int td_v_equal(td_run *r, td_value a, td_value b)
{
    if (td_v_is_number(a) && td_v_is_number(b))
        return a.kind == V_FLOAT || b.kind == V_FLOAT ? td_v_double(a) == td_v_double(b)
                                                      : a.i == b.i;
    if (a.kind != b.kind)
        return 0;
    if (a.kind == V_STR)
        return equal_strings(r, a.s, b.s);
    if (a.kind == V_NONE || a.kind == V_UNDEFINED)
        return 1;
    if (a.kind == V_FUNCTION)
        return a.i == b.i;
    if (a.kind != V_LIST && a.kind != V_TUPLE && a.kind != V_RANGE && a.kind != V_DICT)
        return a.list == b.list;
    if (!enter(r))
        return 0;
    int same = a.kind == V_DICT ? equal_dicts(r, a, b) : equal_lists(r, a, b);
    r->depth--;
    return same;
}

static int compare_strings(td_str a, td_str b)
{
    size_t n = TD_MIN(a.len, b.len);
    int c = n ? memcmp(a.ptr, b.ptr, n) : 0; /* UTF-8 sorts as its code points do */
    return c ? (c < 0 ? -1 : 1) : a.len < b.len ? -1 : a.len > b.len;
}

static int compare_lists(td_run *r, td_value a, td_value b)
{
    size_t na = td_v_n(a), nb = td_v_n(b);
    for (size_t i = 0; i < na && i < nb && !r->code; i++)
        if (!td_v_equal(r, td_v_at(r, a, i), td_v_at(r, b, i)))
            return td_v_compare(r, td_v_at(r, a, i), td_v_at(r, b, i));
    return na < nb ? -1 : na > nb;
}

int td_v_compare(td_run *r, td_value a, td_value b)
{
    if (td_v_is_number(a) && td_v_is_number(b)) {
        if (a.kind != V_FLOAT && b.kind != V_FLOAT)
            return a.i < b.i ? -1 : a.i > b.i;
        double x = td_v_double(a), y = td_v_double(b);
        return x < y ? -1 : x > y;
    }
    td_run_step(r, 1);
    if (a.kind == V_STR && b.kind == V_STR) {
        td_run_step(r, a.s.len / 64);
        return compare_strings(a.s, b.s);
    }
    if (a.kind == b.kind && (a.kind == V_LIST || a.kind == V_TUPLE) && enter(r)) {
        int c = compare_lists(r, a, b);
        r->depth--;
        return c;
    }
    if (a.kind == V_UNDEFINED || b.kind == V_UNDEFINED) {
        td_str name = a.kind == V_UNDEFINED ? a.s : b.s;
        td_run_fail(r, -EINVAL, "'%.*s' is undefined", (int)TD_MIN(name.len, (size_t)80),
                    name.ptr ? name.ptr : "");
    }
    td_run_fail(r, -EINVAL, "'%s' and '%s' have no order", td_v_type(a), td_v_type(b));
    return 0;
}

int td_v_hashable(td_run *r, td_value v)
{
    int yes = v.kind != V_LIST && v.kind != V_DICT && v.kind != V_VIEW;
    if (v.kind != V_TUPLE || !enter(r))
        return yes;
    for (size_t i = 0; yes && i < td_v_n(v); i++)
        yes = td_v_hashable(r, td_v_at(r, v, i));
    r->depth--;
    return yes;
}

int td_v_contains(td_run *r, td_value container, td_value v)
{
    if (container.kind == V_STR) {
        if (v.kind != V_STR) {
            td_run_fail(r, -EINVAL, "'in <string>' requires string as left operand, not %s",
                        td_v_type(v));
            return 0;
        }
        td_run_step(r, container.s.len / 64);
        return v.s.len == 0 || memmem(container.s.ptr ? container.s.ptr : "", container.s.len,
                                      v.s.ptr, v.s.len) != NULL;
    }
    if (container.kind == V_DICT) {
        td_value unused;
        if (!td_v_hashable(r, v))
            td_run_fail(r, -EINVAL, "unhashable type: '%s'", td_v_type(v));
        return td_v_get(r, container, v, &unused);
    }
    td_value all = td_v_iterate(r, container);
    for (size_t i = 0; !r->code && i < td_v_n(all); i++)
        if (td_v_equal(r, td_v_at(r, all, i), v))
            return 1;
    return 0;
}

int td_is_space(uint32_t cp)
{
    return u_isUWhiteSpace((UChar32)cp) || (cp >= 0x1C && cp <= 0x1F);
}

size_t td_str_chars(td_str s)
{
    size_t n = 0;
    for (size_t i = 0; i < s.len; i++)
        n += ((unsigned char)s.ptr[i] & 0xC0) != 0x80;
    return n;
}

static int strippable(const char *p, size_t n, const td_str *chars)
{
    uint32_t cp = 0;
    if (!chars)
        return td_utf8_decode(p, n, &cp) > 0 && td_is_space(cp);
    return chars->len &&
           memmem(chars->ptr, chars->len, p, n) != NULL; /* whole characters: self-synchronizing */
}

td_str td_str_strip(td_str s, const td_str *chars, int left, int right)
{
    uint32_t cp;
    int len;
    while (left && s.len && (len = td_utf8_decode(s.ptr, s.len, &cp)) > 0 &&
           strippable(s.ptr, (size_t)len, chars)) {
        s.ptr += len;
        s.len -= (size_t)len;
    }
    while (right && s.len) {
        size_t at = s.len - 1;
        while (at && ((unsigned char)s.ptr[at] & 0xC0) == 0x80)
            at--;
        if (!strippable(s.ptr + at, s.len - at, chars))
            break;
        s.len = at;
    }
    return s;
}

td_value td_args_get(const td_args *a, size_t place, const char *name, td_value fallback)
{
    if (place < a->n)
        return a->at[place];
    for (size_t i = 0; i < a->n_named; i++)
        if (td_str_eq(a->names[i], name))
            return a->named[i];
    return fallback;
}

int td_args_has(const td_args *a, size_t place, const char *name)
{
    td_value marker = {.kind = V_FUNCTION, .i = -1}, v = td_args_get(a, place, name, marker);
    return !(v.kind == V_FUNCTION && v.i == -1);
}

int td_args_check(td_run *r, const char *what, const td_args *a, size_t min, size_t max,
                  const char *const *names)
{
    if (a->n > max || a->n + a->n_named < min) {
        td_run_fail(r, -EINVAL, "%s takes %zu to %zu arguments, not %zu", what, min, max,
                    a->n + a->n_named);
        return 0;
    }
    for (size_t i = 0; i < a->n_named; i++) {
        size_t k = 0;
        while (names && names[k] && !td_str_eq(a->names[i], names[k]))
            k++;
        if (!names || !names[k]) {
            td_run_fail(r, -EINVAL, "%s has no parameter '%.*s'", what,
                        (int)TD_MIN(a->names[i].len, (size_t)60), a->names[i].ptr);
            return 0;
        }
    }
    return !r->code;
}
