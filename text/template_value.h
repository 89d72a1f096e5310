/* SPDX-License-Identifier: Apache-2.0 */
/* Values of a running template, with Python's semantics. Everything lies in the run's arena; JSON
 * is wrapped, not copied. Failure is sticky in the run: every function may be called after one and
 * gives undefined. */
#ifndef TD_TEXT_TEMPLATE_VALUE_H
#define TD_TEXT_TEMPLATE_VALUE_H

#include <jansson.h>
#include <stddef.h>
#include <stdint.h>

#include "base/arena.h"
#include "base/err.h"
#include "base/strbuf.h"
#include "text/template_ast.h"

typedef enum td_vkind {
    V_UNDEFINED, /* s: the name that was looked up */
    V_NONE,
    V_BOOL,
    V_INT,
    V_FLOAT,
    V_STR,
    V_LIST,
    V_TUPLE,
    V_VIEW,  /* dict.items() and the like: a list without subscripts */
    V_RANGE, /* a list that prints as range(...) */
    V_GEN,   /* what map, select and the like give: always true, used up by one pass */
    V_DICT,
    V_NAMESPACE,
    V_LOOP,
    V_MACRO,
    V_FUNCTION, /* i: number */
    V_METHOD    /* a string's, list's or dict's method not yet called */
} td_vkind;

typedef struct td_value td_value;
typedef struct td_vlist td_vlist;
typedef struct td_vdict td_vdict;

struct td_value {
    td_vkind kind;
    uint32_t number; /* V_METHOD: its number */
    union {
        int64_t i;
        double f;
        td_str s;
        td_vlist *list;
        td_vdict *dict;
        struct td_loop_state *loop;
        struct td_macro *macro;
        struct td_value *self; /* V_METHOD */
    };
};

struct td_vlist {
    td_value *at;
    size_t n, cap;
    json_t *json; /* elements not yet wrapped; at is NULL then */
};

struct td_vdict {
    td_value *keys, *values;
    size_t n, cap;
    json_t *json; /* an object, not copied; keys is NULL then */
};

/* One rendering. */
typedef struct td_run {
    const struct td_template *tpl;
    td_arena arena;
    uint64_t steps_left;
    uint32_t depth, max_depth; /* of macros, blocks and values */
    uint32_t frames;           /* of the evaluator itself */
    uint32_t line;
    json_t *vars; /* the caller's variables, borrowed */
    int64_t now;  /* strftime_now: seconds since 1970 */
    int utc;      /* ... told in UTC rather than local time */
    int code;     /* sticky */
    td_err *err;
    struct td_scope *scope;
    td_strbuf *out;
} td_run;

/* Set the failure once, with name and line. Returns undefined. */
td_value td_run_fail(td_run *r, int code, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
/* Take steps from the budget. 1 while some are left. */
int td_run_step(td_run *r, uint64_t n);
void *td_run_alloc(td_run *r, size_t n, size_t size);

td_value td_v_undefined(td_str name);
td_value td_v_none(void);
td_value td_v_bool(int b);
td_value td_v_int(int64_t i);
td_value td_v_float(double f);
td_value td_v_str(td_str s);             /* borrowed */
td_value td_v_copy(td_run *r, td_str s); /* copied into the arena */
td_value td_v_json(td_run *r, json_t *j);
td_value td_v_list(td_run *r, td_vkind kind);
void td_v_append(td_run *r, td_value list, td_value v);
td_value td_v_dict(td_run *r);
/* Put or replace. */
void td_v_put(td_run *r, td_value dict, td_value key, td_value v);

int td_v_is_list(td_value v); /* any of the five */
int td_v_is_number(td_value v);
size_t td_v_n(td_value list_or_dict);
td_value td_v_at(td_run *r, td_value list, size_t i);
td_value td_v_key(td_run *r, td_value dict, size_t i);
td_value td_v_item(td_run *r, td_value dict, size_t i);
/* 1 found. */
int td_v_get(td_run *r, td_value dict, td_value key, td_value *ret_v);
/* Everything v gives when iterated, as a list; fails when it cannot be iterated. */
td_value td_v_iterate(td_run *r, td_value v);

const char *td_v_type(td_value v); /* Python's type name */
int td_v_truth(td_run *r, td_value v);
int td_v_equal(td_run *r, td_value a, td_value b);
/* -1, 0, 1; fails when the types do not compare. */
int td_v_compare(td_run *r, td_value a, td_value b);
int td_v_hashable(td_run *r, td_value v); /* may be a key */
int td_v_contains(td_run *r, td_value container, td_value v);
double td_v_double(td_value v);
int64_t td_v_integer(td_value v); /* bool or int */

/* str(v), repr(v) and json.dumps(v). */
void td_v_print(td_run *r, td_value v, td_strbuf *out);
void td_v_repr(td_run *r, td_value v, td_strbuf *out);
typedef struct td_dump {
    int ensure_ascii, sort_keys;
    td_str indent, item_sep, key_sep;
    int has_indent;
} td_dump;
void td_v_dump(td_run *r, td_value v, const td_dump *how, uint32_t level, td_strbuf *out);
td_value td_v_to_str(td_run *r, td_value v);
/* Move a finished buffer into the arena as a string; frees the buffer. */
td_value td_v_take(td_run *r, td_strbuf *b);
/* Temporary buffer that never outgrows the run's memory. */
void td_run_buffer(td_run *r, td_strbuf *b);

/* Arguments of a call, filter or test. */
typedef struct td_args {
    td_value *at;
    size_t n;
    const td_str *names;
    td_value *named;
    size_t n_named;
} td_args;
/* Argument by place or name; fallback when absent. */
td_value td_args_get(const td_args *a, size_t place, const char *name, td_value fallback);
int td_args_has(const td_args *a, size_t place, const char *name);
/* Fail unless the positional arguments number min..max and every name is in the 0-terminated list.
 */
int td_args_check(td_run *r, const char *what, const td_args *a, size_t min, size_t max,
                  const char *const *names);

/* Attribute lookup in the order of Jinja's a.b and a['b']. */
td_value td_v_attribute(td_run *r, td_value v, td_str name);
td_value td_v_subscript(td_run *r, td_value v, td_value key);
td_value td_v_slice(td_run *r, td_value v, td_value start, td_value stop, td_value step);
td_value td_v_binary(td_run *r, td_str op, td_value a, td_value b);
td_value td_v_format_percent(td_run *r, td_str format, td_value args);

td_value td_v_call(td_run *r, td_value callee, const td_args *a);
td_value td_v_call_method(td_run *r, td_value self, uint32_t number, const td_args *a);
int td_v_method_number(td_value v, td_str name);
td_value td_v_filter(td_run *r, int id, td_value input, const td_args *a);
int td_v_test(td_run *r, int id, td_value input, const td_args *a);

/* Text helpers in code points. */
size_t td_str_chars(td_str s);
td_str td_str_strip(td_str s, const td_str *chars, int left, int right);
int td_is_space(uint32_t cp);

#endif
