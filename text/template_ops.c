/* SPDX-License-Identifier: Apache-2.0 */
/* Operators, attributes, subscripts and slices, as Python's. */
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "text/template_loop.h"
#include "text/template_value.h"
#include "base/bug.h"
#include "base/banned.h"

static td_value is_undefined(td_run *r, td_value v)
{
    return td_run_fail(r, -EINVAL, "'%.*s' is undefined", (int)TD_MIN(v.s.len, (size_t)80),
                       v.s.ptr ? v.s.ptr : "");
}

static td_value overflow(td_run *r)
{
    return td_run_fail(r, -EINVAL, "an integer passes 64 bits");
}

static td_value power(td_run *r, int64_t base, int64_t exponent)
{
    int64_t v = 1;
    if (exponent < 0)
        return td_v_float(pow((double)base, (double)exponent));
    for (; exponent > 0; exponent--) {
        if (__builtin_mul_overflow(v, base, &v))
            return overflow(r);
        if (v == 0 ||
            v == 1) /* 0 and 1 stay; -1 alternates and comes back here every second time */
            return td_v_int(v == 1 && base == -1 && (exponent - 1) % 2 ? -1 : v);
    }
    return td_v_int(v);
}

/* Floor division, the sign of the remainder is the divisor's. */
static td_value divide(td_run *r, char op, int64_t a, int64_t b)
{
    if (b == 0)
        return td_run_fail(r, -EINVAL, "division by zero");
    if (b == -1)
        return op == '%' ? td_v_int(0) : a == INT64_MIN ? overflow(r) : td_v_int(-a);
    int64_t q = a / b, m = a % b;
    if (m && (m < 0) != (b < 0)) {
        q--;
        m += b;
    }
    return td_v_int(op == '%' ? m : q);
}

static td_value integers(td_run *r, td_str op, int64_t a, int64_t b)
{
    int64_t v;
    if (td_str_eq(op, "**"))
        return power(r, a, b);
    if (td_str_eq(op, "//") || td_str_eq(op, "%"))
        return divide(r, op.ptr[0], a, b);
    if (td_str_eq(op, "/"))
        return b ? td_v_float((double)a / (double)b) : td_run_fail(r, -EINVAL, "division by zero");
    int over = op.ptr[0] == '+'   ? __builtin_add_overflow(a, b, &v)
               : op.ptr[0] == '-' ? __builtin_sub_overflow(a, b, &v)
                                  : __builtin_mul_overflow(a, b, &v);
    return over ? overflow(r) : td_v_int(v);
}

static td_value floats(td_run *r, td_str op, double a, double b)
{
    if (b == 0 && (op.ptr[0] == '/' || op.ptr[0] == '%'))
        return td_run_fail(r, -EINVAL, "division by zero");
    if (td_str_eq(op, "**")) {
        double v = pow(a, b);
        if (isinf(v) && !isinf(a) && !isinf(b))
            return td_run_fail(r, -EINVAL, "the result of ** is too large");
        if (isnan(v) && !isnan(a) && !isnan(b))
            return td_run_fail(r, -EINVAL, "** of a negative number to a fraction is complex");
        return td_v_float(v);
    }
    if (td_str_eq(op, "/"))
        return td_v_float(a / b);
    double m = fmod(a, b);
    if (m != 0 && (m < 0) != (b < 0))
        m += b;
    if (td_str_eq(op, "//"))
        return td_v_float(floor((a - m) / b + 0.5));
    if (op.ptr[0] == '%')
        return td_v_float(m == 0 ? copysign(0.0, b) : m);
    return td_v_float(op.ptr[0] == '+' ? a + b : op.ptr[0] == '-' ? a - b : a * b);
}

static td_value concatenate(td_run *r, td_value a, td_value b)
{
    if (a.kind == V_STR) {
        char *p = td_run_alloc(r, a.s.len + b.s.len + 1, 1);
        if (!p)
            return td_v_undefined((td_str){0});
        if (a.s.len)
            memcpy(p, a.s.ptr, a.s.len);
        if (b.s.len)
            memcpy(p + a.s.len, b.s.ptr, b.s.len);
        return td_v_str((td_str){p, a.s.len + b.s.len});
    }
    td_value list = td_v_list(r, a.kind);
    for (size_t i = 0; !r->code && i < td_v_n(a); i++)
        td_v_append(r, list, td_v_at(r, a, i));
    for (size_t i = 0; !r->code && i < td_v_n(b); i++)
        td_v_append(r, list, td_v_at(r, b, i));
    return list;
}

static td_value repeat(td_run *r, td_value v, int64_t times)
{
    if (times < 0)
        times = 0;
    if (v.kind == V_STR) {
        size_t total;
        char *p = __builtin_mul_overflow(v.s.len, (size_t)times, &total)
                      ? td_run_alloc(r, SIZE_MAX, SIZE_MAX)
                      : td_run_alloc(r, total + 1, 1);
        for (int64_t i = 0; p && v.s.len && i < times; i++)
            memcpy(p + (size_t)i * v.s.len, v.s.ptr, v.s.len);
        return p ? td_v_str((td_str){p, v.s.len ? total : 0}) : td_v_undefined((td_str){0});
    }
    td_value list = td_v_list(r, v.kind);
    size_t n = td_v_n(v);
    for (int64_t k = 0; n && !r->code && k < times && td_run_step(r, 1); k++)
        for (size_t i = 0; !r->code && i < n; i++)
            td_v_append(r, list, td_v_at(r, v, i));
    return list;
}

static int is_sequence(td_value v)
{
    return v.kind == V_STR || v.kind == V_LIST || v.kind == V_TUPLE;
}

td_value td_v_binary(td_run *r, td_str op, td_value a, td_value b)
{
    if (r->code)
        return td_v_undefined((td_str){0});
    if (td_str_eq(op, "%") && a.kind == V_STR)
        return td_v_format_percent(r, a.s, b);
    if (a.kind == V_UNDEFINED || b.kind == V_UNDEFINED)
        return is_undefined(r, a.kind == V_UNDEFINED ? a : b);
    if (td_v_is_number(a) && td_v_is_number(b)) {
        if (a.kind == V_FLOAT || b.kind == V_FLOAT)
            return floats(r, op, td_v_double(a), td_v_double(b));
        return integers(r, op, a.i, b.i);
    }
    if (td_str_eq(op, "+") && a.kind == b.kind && is_sequence(a))
        return concatenate(r, a, b);
    if (td_str_eq(op, "*") && is_sequence(a) && (b.kind == V_INT || b.kind == V_BOOL))
        return repeat(r, a, b.i);
    if (td_str_eq(op, "*") && is_sequence(b) && (a.kind == V_INT || a.kind == V_BOOL))
        return repeat(r, b, a.i);
    return td_run_fail(r, -EINVAL, "'%.*s' does not work on %s and %s", (int)op.len, op.ptr,
                       td_v_type(a), td_v_type(b));
}

/* "%s" and "%d" without widths; the rest of printf is refused. */
td_value td_v_format_percent(td_run *r, td_str format, td_value args)
{
    td_strbuf b;
    size_t used = 0, n = args.kind == V_TUPLE ? td_v_n(args) : 1;
    td_run_buffer(r, &b);
    for (size_t i = 0; i < format.len && !r->code; i++) {
        if (format.ptr[i] != '%') {
            td_strbuf_addc(&b, format.ptr[i]);
            continue;
        }
        char c = ++i < format.len ? format.ptr[i] : 0;
        if (c == '%') {
            td_strbuf_addc(&b, '%');
            continue;
        }
        if (!c || !strchr("sdir", c)) {
            td_run_fail(r, -EINVAL, "the format '%%%c' is not supported", c ? c : ' ');
            break;
        }
        if (used >= n) {
            td_run_fail(r, -EINVAL, "not enough arguments for format string");
            break;
        }
        td_value v = args.kind == V_TUPLE ? td_v_at(r, args, used) : args;
        used++;
        if (c == 'd' || c == 'i') {
            if (!td_v_is_number(v))
                td_run_fail(r, -EINVAL, "%%d format: a real number is required, not %s",
                            td_v_type(v));
            else
                td_strbuf_addf(&b, "%lld", (long long)(v.kind == V_FLOAT ? (int64_t)v.f : v.i));
        } else if (c == 'r') {
            td_v_repr(r, v, &b);
        } else {
            td_v_print(r, v, &b);
        }
    }
    int is_mapping = args.kind == V_DICT || args.kind == V_LIST || args.kind == V_RANGE ||
                     args.kind == V_UNDEFINED; /* to Python */
    if (!r->code && used < n && !is_mapping)
        td_run_fail(r, -EINVAL, "not all arguments converted during string formatting");
    return td_v_take(r, &b);
}

static td_value loop_attribute(td_run *r, td_value v, td_str name);

static td_value method(td_run *r, td_value v, td_str name)
{
    int number = td_v_method_number(v, name);
    if (number < 0)
        return td_v_undefined(name);
    td_value *self = td_run_alloc(r, 1, sizeof *self);
    if (!self)
        return td_v_undefined(name);
    *self = v;
    return (td_value){.kind = V_METHOD, .number = (uint32_t)number, .self = self};
}

/* A name that begins with two underscores reaches into Python's objects: refused, as Jinja's
 * sandbox does. */
static int refuse_internal(td_run *r, td_str name)
{
    if (name.len < 2 || memcmp(name.ptr, "__", 2) != 0)
        return 0;
    td_run_fail(r, -EINVAL, "access to attribute '%.*s' is unsafe",
                (int)TD_MIN(name.len, (size_t)60), name.ptr);
    return 1;
}

td_value td_v_attribute(td_run *r, td_value v, td_str name)
{
    td_value found;
    if (r->code)
        return td_v_undefined(name);
    if (v.kind == V_UNDEFINED)
        return is_undefined(r, v);
    if (v.kind == V_LOOP)
        return loop_attribute(r, v, name);
    if (v.kind == V_NAMESPACE)
        return td_v_get(r, v, td_v_str(name), &found) ? found : td_v_undefined(name);
    td_value m = method(r, v, name);
    if (m.kind == V_METHOD)
        return m;
    if (v.kind == V_DICT && td_v_get(r, v, td_v_str(name), &found))
        return found;
    refuse_internal(r, name);
    return td_v_undefined(name);
}

/* Place of the code point number i (negative: from the end) in a string; 0 when outside. */
static int char_at(td_str s, int64_t i, td_str *ret_c)
{
    int64_t n = (int64_t)td_str_chars(s);
    if (i < 0)
        i += n;
    if (i < 0 || i >= n)
        return 0;
    size_t at = 0;
    uint32_t cp;
    for (; i > 0; i--)
        at += (size_t)TD_MAX(td_utf8_decode(s.ptr + at, s.len - at, &cp), 1);
    *ret_c = (td_str){s.ptr + at, (size_t)TD_MAX(td_utf8_decode(s.ptr + at, s.len - at, &cp), 1)};
    return 1;
}

td_value td_v_subscript(td_run *r, td_value v, td_value key)
{
    td_value found;
    td_str c;
    if (r->code)
        return td_v_undefined((td_str){0});
    if (v.kind == V_UNDEFINED)
        return is_undefined(r, v);
    if (v.kind == V_DICT && td_v_get(r, v, key, &found))
        return found;
    if (key.kind == V_STR)
        return v.kind == V_DICT || v.kind == V_LOOP || v.kind == V_NAMESPACE || v.kind == V_STR ||
                       td_v_is_list(v)
                   ? td_v_attribute(r, v, key.s)
                   : td_v_undefined(key.s);
    if (key.kind == V_INT || key.kind == V_BOOL) {
        int64_t i = key.i;
        if (v.kind == V_STR && td_run_step(r, v.s.len / 64) && char_at(v.s, i, &c))
            return td_v_str(c);
        if (v.kind == V_LIST || v.kind == V_TUPLE || v.kind == V_RANGE) {
            int64_t n = (int64_t)td_v_n(v);
            if (i < 0)
                i += n;
            if (i >= 0 && i < n)
                return td_v_at(r, v, (size_t)i);
        }
    }
    return td_v_undefined(td_str_of("element"));
}

/* Python's slice arithmetic. Returns the number of elements. */
static int64_t slice_bounds(int64_t n, const int64_t *start, const int64_t *stop, int64_t step,
                            int64_t *ret_first)
{
    int64_t low = step > 0 ? 0 : -1, high = step > 0 ? n : n - 1, a, b;
    a = start ? (*start < 0 ? *start + n : *start) : step > 0 ? low : high;
    b = stop ? (*stop < 0 ? *stop + n : *stop) : step > 0 ? high : low;
    if (start)
        a = TD_MIN(TD_MAX(a, low), high);
    if (stop)
        b = TD_MIN(TD_MAX(b, low), high);
    *ret_first = a;
    if (step > 0)
        return a < b ? (b - a - 1) / step + 1 : 0;
    return b < a ? (a - b - 1) / -step + 1 : 0;
}

static int slice_index(td_run *r, td_value v, int64_t *ret_i)
{
    if (v.kind != V_INT && v.kind != V_BOOL) {
        td_run_fail(r, -EINVAL, "slice indices must be integers or None");
        return 0;
    }
    *ret_i = TD_MIN(TD_MAX(v.i, -(INT64_MAX / 4)), INT64_MAX / 4);
    return 1;
}

static td_value slice_string(td_run *r, td_value chars, int64_t first, int64_t n, int64_t step)
{
    td_strbuf b;
    td_run_buffer(r, &b);
    for (int64_t i = 0; i < n; i++) {
        td_str c = chars.list->at[first + i * step].s;
        td_strbuf_add(&b, c.ptr, c.len);
    }
    return td_v_take(r, &b);
}

td_value td_v_slice(td_run *r, td_value v, td_value start, td_value stop, td_value step)
{
    int64_t a = 0, b = 0, by = 1, first;
    if (r->code)
        return td_v_undefined((td_str){0});
    if (v.kind == V_UNDEFINED)
        return is_undefined(r, v);
    if (v.kind != V_STR && v.kind != V_LIST && v.kind != V_TUPLE && v.kind != V_RANGE)
        return td_run_fail(r, -EINVAL, "'%s' object cannot be sliced", td_v_type(v));
    if ((step.kind != V_NONE && !slice_index(r, step, &by)) ||
        (start.kind != V_NONE && !slice_index(r, start, &a)) ||
        (stop.kind != V_NONE && !slice_index(r, stop, &b)))
        return td_v_undefined((td_str){0});
    if (by == 0)
        return td_run_fail(r, -EINVAL, "slice step cannot be zero");
    td_value all = v.kind == V_STR ? td_v_iterate(r, v) : v;
    int64_t n = r->code ? 0
                        : slice_bounds((int64_t)td_v_n(all), start.kind == V_NONE ? NULL : &a,
                                       stop.kind == V_NONE ? NULL : &b, by, &first);
    if (v.kind == V_STR)
        return r->code ? td_v_undefined((td_str){0}) : slice_string(r, all, n ? first : 0, n, by);
    td_value out = td_v_list(r, v.kind);
    for (int64_t i = 0; i < n && !r->code; i++)
        td_v_append(r, out, td_v_at(r, all, (size_t)(first + i * by)));
    return out;
}

static td_value loop_attribute(td_run *r, td_value v, td_str name)
{
    const td_loop_state *l = v.loop;
    int64_t i = (int64_t)l->index, n = (int64_t)td_v_n(l->items);
    if (td_str_eq(name, "index"))
        return td_v_int(i + 1);
    if (td_str_eq(name, "index0"))
        return td_v_int(i);
    if (td_str_eq(name, "revindex"))
        return td_v_int(n - i);
    if (td_str_eq(name, "revindex0"))
        return td_v_int(n - i - 1);
    if (td_str_eq(name, "first"))
        return td_v_bool(i == 0);
    if (td_str_eq(name, "last"))
        return td_v_bool(i + 1 == n);
    if (td_str_eq(name, "length"))
        return td_v_int(n);
    if (td_str_eq(name, "depth"))
        return td_v_int(1); /* recursive loops are refused */
    if (td_str_eq(name, "depth0"))
        return td_v_int(0);
    if (td_str_eq(name, "previtem"))
        return i > 0 ? td_v_at(r, l->items, (size_t)i - 1) : td_v_undefined(name);
    if (td_str_eq(name, "nextitem"))
        return i + 1 < n ? td_v_at(r, l->items, (size_t)i + 1) : td_v_undefined(name);
    td_value m = method(r, v, name);
    if (m.kind != V_METHOD)
        refuse_internal(r, name);
    return m.kind == V_METHOD ? m : td_v_undefined(name);
}
