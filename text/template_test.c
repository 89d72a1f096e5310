/* SPDX-License-Identifier: Apache-2.0 */
/* Tests: what stands behind "is". */
#include <errno.h>
#include <string.h>

#include "text/template_value.h"
#include "base/bug.h"
#include "base/banned.h"

typedef int test_fn(td_run *r, td_value v, const td_args *a);

static int t_defined(td_run *r, td_value v, const td_args *a)
{
    return v.kind != V_UNDEFINED;
}

static int t_undefined(td_run *r, td_value v, const td_args *a)
{
    return v.kind == V_UNDEFINED;
}

static int t_none(td_run *r, td_value v, const td_args *a)
{
    return v.kind == V_NONE;
}

static int t_string(td_run *r, td_value v, const td_args *a)
{
    return v.kind == V_STR;
}

static int t_number(td_run *r, td_value v, const td_args *a)
{
    return td_v_is_number(v);
}

static int t_integer(td_run *r, td_value v, const td_args *a)
{
    return v.kind == V_INT;
}

static int t_float(td_run *r, td_value v, const td_args *a)
{
    return v.kind == V_FLOAT;
}

static int t_boolean(td_run *r, td_value v, const td_args *a)
{
    return v.kind == V_BOOL;
}

static int t_true(td_run *r, td_value v, const td_args *a)
{
    return v.kind == V_BOOL && v.i;
}

static int t_false(td_run *r, td_value v, const td_args *a)
{
    return v.kind == V_BOOL && !v.i;
}

static int t_mapping(td_run *r, td_value v, const td_args *a)
{
    return v.kind == V_DICT;
}

static int t_sequence(td_run *r, td_value v, const td_args *a)
{
    /* Jinja asks for a length and subscripts; undefined has both in its way, a dict too */
    return v.kind == V_STR || v.kind == V_LIST || v.kind == V_TUPLE || v.kind == V_RANGE ||
           v.kind == V_DICT || v.kind == V_UNDEFINED;
}

static int t_iterable(td_run *r, td_value v, const td_args *a)
{
    return v.kind == V_STR || td_v_is_list(v) || v.kind == V_DICT || v.kind == V_UNDEFINED ||
           v.kind == V_LOOP;
}

static int t_callable(td_run *r, td_value v, const td_args *a)
{
    return v.kind == V_MACRO || v.kind == V_FUNCTION || v.kind == V_METHOD || v.kind == V_UNDEFINED;
}

static int t_eq(td_run *r, td_value v, const td_args *a)
{
    return td_v_equal(r, v, a->at[0]);
}

static int t_ne(td_run *r, td_value v, const td_args *a)
{
    return !td_v_equal(r, v, a->at[0]);
}

static int t_lt(td_run *r, td_value v, const td_args *a)
{
    return td_v_compare(r, v, a->at[0]) < 0;
}

static int t_le(td_run *r, td_value v, const td_args *a)
{
    return td_v_compare(r, v, a->at[0]) <= 0;
}

static int t_gt(td_run *r, td_value v, const td_args *a)
{
    return td_v_compare(r, v, a->at[0]) > 0;
}

static int t_ge(td_run *r, td_value v, const td_args *a)
{
    return td_v_compare(r, v, a->at[0]) >= 0;
}

static int t_in(td_run *r, td_value v, const td_args *a)
{
    return td_v_contains(r, a->at[0], v);
}

static int remainder_is(td_run *r, td_value v, td_value by, int64_t want)
{
    td_value m = td_v_binary(r, td_str_of("%"), v, by);
    return !r->code && td_v_equal(r, m, td_v_int(want));
}

static int t_odd(td_run *r, td_value v, const td_args *a)
{
    return remainder_is(r, v, td_v_int(2), 1);
}

static int t_even(td_run *r, td_value v, const td_args *a)
{
    return remainder_is(r, v, td_v_int(2), 0);
}

static int t_divisibleby(td_run *r, td_value v, const td_args *a)
{
    return remainder_is(r, v, a->at[0], 0);
}

static int string_is(td_run *r, td_value v, const char *method)
{
    td_args none = {0};
    td_value s = td_v_to_str(r, v);
    return !r->code &&
           td_v_truth(r, td_v_call_method(r, s, (uint32_t)td_v_method_number(s, td_str_of(method)),
                                          &none));
}

static int t_lower(td_run *r, td_value v, const td_args *a)
{
    return string_is(r, v, "islower");
}

static int t_upper(td_run *r, td_value v, const td_args *a)
{
    return string_is(r, v, "isupper");
}

static const struct {
    const char *name;
    test_fn *fn;
    unsigned char n_args;
} tests[] = {
    {"!=", t_ne, 1},
    {"<", t_lt, 1},
    {"<=", t_le, 1},
    {"==", t_eq, 1},
    {">", t_gt, 1},
    {">=", t_ge, 1},
    {"boolean", t_boolean, 0},
    {"callable", t_callable, 0},
    {"defined", t_defined, 0},
    {"divisibleby", t_divisibleby, 1},
    {"eq", t_eq, 1},
    {"equalto", t_eq, 1},
    {"even", t_even, 0},
    {"false", t_false, 0},
    {"float", t_float, 0},
    {"ge", t_ge, 1},
    {"greaterthan", t_gt, 1},
    {"gt", t_gt, 1},
    {"in", t_in, 1},
    {"integer", t_integer, 0},
    {"iterable", t_iterable, 0},
    {"le", t_le, 1},
    {"lessthan", t_lt, 1},
    {"lower", t_lower, 0},
    {"lt", t_lt, 1},
    {"mapping", t_mapping, 0},
    {"ne", t_ne, 1},
    {"none", t_none, 0},
    {"number", t_number, 0},
    {"odd", t_odd, 0},
    {"sequence", t_sequence, 0},
    {"string", t_string, 0},
    {"true", t_true, 0},
    {"undefined", t_undefined, 0},
    {"upper", t_upper, 0},
};

int td_tpl_test_id(td_str name)
{
    for (size_t i = 0; i < TD_ARRAY_LEN(tests); i++)
        if (td_str_eq(name, tests[i].name))
            return (int)i;
    return -1;
}

int td_v_test(td_run *r, int id, td_value input, const td_args *a)
{
    if (r->code || !td_args_check(r, tests[id].name, a, tests[id].n_args, tests[id].n_args, NULL))
        return 0;
    return tests[id].fn(r, input, a) && !r->code;
}
