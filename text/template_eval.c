/* SPDX-License-Identifier: Apache-2.0 */
/* Running the tree. C recursion is bounded by the tree's height (set by the parser) times the depth
 * of macro calls, and both are counted in td_run.frames. */
#include <errno.h>
#include <string.h>
#include <time.h>

#include "text/template_loop.h"
#include "text/template_run.h"
#include "base/bug.h"
#include "base/banned.h"

enum { FRAMES_MAX = 1200, RANGE_MAX = 100000 };
enum { FN_RAISE, FN_STRFTIME, FN_NAMESPACE, FN_RANGE, FN_DICT, N_FUNCTIONS };
static const char *const functions[N_FUNCTIONS] = {"raise_exception", "strftime_now", "namespace",
                                                   "range", "dict"};

typedef enum td_flow { GO_ON, BREAK, CONTINUE } td_flow;
static td_flow run_body(td_run *r, const td_nodes *body);
static td_value evaluate(td_run *r, const td_node *n);

static td_value undefined(void)
{
    return td_v_undefined((td_str){0});
}

static int same_name(td_str a, td_str b)
{
    return a.len == b.len && memcmp(a.ptr, b.ptr, a.len) == 0;
}

static struct td_variable *find_in(const td_scope *s, td_str name)
{
    struct td_variable *v = s->variables;
    while (v && !same_name(v->name, name))
        v = v->next;
    return v;
}

static td_value lookup(td_run *r, td_str name)
{
    for (const td_scope *s = r->scope; s; s = s->outer) {
        const struct td_variable *v = find_in(s, name);
        if (v)
            return v->value;
    }
    json_t *global = td_tpl_variable(r, name);
    if (global)
        return td_v_json(r, global);
    for (int i = 0; i < N_FUNCTIONS; i++)
        if (td_str_eq(name, functions[i]))
            return (td_value){.kind = V_FUNCTION, .i = i};
    return td_v_undefined(name);
}

static void assign(td_run *r, td_str name, td_value value)
{
    struct td_variable *v = find_in(r->scope, name);
    if (!v) {
        v = td_run_alloc(r, 1, sizeof *v);
        if (!v)
            return;
        v->name = name;
        v->next = r->scope->variables;
        r->scope->variables = v;
    }
    v->value = value;
}

static void push_scope(td_run *r, td_scope *s)
{
    *s = (td_scope){.outer = r->scope};
    r->scope = s;
}

/* A macro may outlive the block that defined it: scopes lie in the arena. */
static td_scope *new_scope(td_run *r)
{
    td_scope *s = td_run_alloc(r, 1, sizeof *s);
    if (s)
        push_scope(r, s);
    return s;
}

static void assign_target(td_run *r, const td_node *target, td_value value)
{
    if (r->code)
        return;
    if (target->kind == N_NAME) {
        assign(r, target->name, value);
        return;
    }
    if (target->kind == N_ATTR) {
        td_value ns = lookup(r, target->a->name);
        if (ns.kind != V_NAMESPACE)
            td_run_fail(r, -EINVAL, "cannot assign attribute on non-namespace object");
        else
            td_v_put(r, ns, td_v_str(target->name), value);
        return;
    }
    td_value all = td_v_iterate(r, value);
    if (!r->code && td_v_n(all) != target->list.n)
        td_run_fail(r, -EINVAL, "%zu values cannot be unpacked into %zu names", td_v_n(all),
                    target->list.n);
    for (size_t i = 0; i < target->list.n && !r->code; i++)
        assign_target(r, target->list.at[i], td_v_at(r, all, i));
}

static td_value constant(const td_node *n)
{
    switch (n->literal.kind) {
    case C_BOOL:
        return td_v_bool((int)n->literal.i);
    case C_INT:
        return td_v_int(n->literal.i);
    case C_FLOAT:
        return td_v_float(n->literal.f);
    case C_STR:
        return td_v_str(n->name);
    default:
        return td_v_none();
    }
}

static td_value build_list(td_run *r, const td_node *n, td_vkind kind)
{
    td_value list = td_v_list(r, kind);
    for (size_t i = 0; i < n->list.n && !r->code; i++)
        td_v_append(r, list, evaluate(r, n->list.at[i]));
    return list;
}

static td_value build_dict(td_run *r, const td_node *n)
{
    td_value d = td_v_dict(r);
    for (size_t i = 0; i < n->list.n && !r->code; i++) {
        td_value key = evaluate(r, n->list.at[i]), value = evaluate(r, n->more.at[i]);
        if (!td_v_hashable(r, key))
            td_run_fail(r, -EINVAL, "unhashable type: '%s'", td_v_type(key));
        td_v_put(r, d, key, value);
    }
    return d;
}

static td_value build_slice(td_run *r, const td_node *n)
{
    td_value of = evaluate(r, n->a), start = n->b ? evaluate(r, n->b) : td_v_none(),
             stop = n->c ? evaluate(r, n->c) : td_v_none();
    td_value step = n->list.n ? evaluate(r, n->list.at[0]) : td_v_none();
    return td_v_slice(r, of, start, stop, step);
}

static void build_args(td_run *r, const td_node *n, td_args *a)
{
    *a = (td_args){.n = n->list.n, .names = n->names, .n_named = n->n_names};
    a->at = a->n ? td_run_alloc(r, a->n, sizeof *a->at) : NULL;
    a->named = a->n_named ? td_run_alloc(r, a->n_named, sizeof *a->named) : NULL;
    for (size_t i = 0; i < a->n && !r->code; i++)
        a->at[i] = evaluate(r, n->list.at[i]);
    for (size_t i = 0; i < a->n_named && !r->code; i++)
        a->named[i] = evaluate(r, n->more.at[i]);
}

static td_value concat(td_run *r, const td_node *n)
{
    td_strbuf b;
    td_run_buffer(r, &b);
    for (size_t i = 0; i < n->list.n && !r->code; i++)
        td_v_print(r, evaluate(r, n->list.at[i]), &b);
    return td_v_take(r, &b);
}

static int compare_one(td_run *r, td_str op, td_value a, td_value b)
{
    if (td_str_eq(op, "=="))
        return td_v_equal(r, a, b);
    if (td_str_eq(op, "!="))
        return !td_v_equal(r, a, b);
    if (td_str_eq(op, "in"))
        return td_v_contains(r, b, a);
    if (td_str_eq(op, "not in"))
        return !td_v_contains(r, b, a);
    int c = td_v_compare(r, a, b);
    return op.ptr[0] == '<' ? (op.len == 2 ? c <= 0 : c < 0) : (op.len == 2 ? c >= 0 : c > 0);
}

static td_value compare(td_run *r, const td_node *n)
{
    td_value left = evaluate(r, n->a);
    for (size_t i = 0; i < n->list.n && !r->code; i++) {
        td_value right = evaluate(r, n->list.at[i]);
        if (!r->code && !compare_one(r, n->names[i], left, right))
            return td_v_bool(0);
        left = right;
    }
    return td_v_bool(1);
}

static td_value sign(td_run *r, const td_node *n)
{
    td_value v = evaluate(r, n->a);
    if (r->code)
        return v;
    if (v.kind == V_UNDEFINED)
        return td_v_binary(r, td_str_of("-"), td_v_int(0), v);
    if (!td_v_is_number(v))
        return td_run_fail(r, -EINVAL, "bad operand type for unary sign: '%s'", td_v_type(v));
    if (v.kind == V_FLOAT)
        return td_v_float(n->kind == N_NEG ? -v.f : v.f);
    return n->kind == N_NEG ? td_v_binary(r, td_str_of("-"), td_v_int(0), v) : td_v_int(v.i);
}

static td_value filter(td_run *r, const td_node *n, td_value input)
{
    td_args a;
    build_args(r, n, &a);
    return td_v_filter(r, n->id, input, &a);
}

static td_value expression(td_run *r, const td_node *n)
{
    td_value v;
    td_args a;
    switch (n->kind) {
    case N_CONST:
        return constant(n);
    case N_NAME:
        return lookup(r, n->name);
    case N_LIST:
        return build_list(r, n, V_LIST);
    case N_TUPLE:
        return build_list(r, n, V_TUPLE);
    case N_DICT:
        return build_dict(r, n);
    case N_ATTR:
        return td_v_attribute(r, evaluate(r, n->a), n->name);
    case N_ITEM:
        v = evaluate(r, n->a);
        return td_v_subscript(r, v, evaluate(r, n->b));
    case N_SLICE:
        return build_slice(r, n);
    case N_CALL:
        v = evaluate(r, n->a);
        build_args(r, n, &a);
        return td_v_call(r, v, &a);
    case N_FILTER:
        return filter(r, n, evaluate(r, n->a));
    case N_TEST:
        v = evaluate(r, n->a);
        build_args(r, n, &a);
        return td_v_bool(td_v_test(r, n->id, v, &a) != n->flag);
    case N_NEG:
    case N_POS:
        return sign(r, n);
    case N_NOT:
        return td_v_bool(!td_v_truth(r, evaluate(r, n->a)));
    case N_AND:
        v = evaluate(r, n->a);
        return td_v_truth(r, v) ? evaluate(r, n->b) : v;
    case N_OR:
        v = evaluate(r, n->a);
        return td_v_truth(r, v) ? v : evaluate(r, n->b);
    case N_COND:
        if (td_v_truth(r, evaluate(r, n->a)))
            return evaluate(r, n->b);
        return n->c ? evaluate(r, n->c) : undefined();
    case N_CONCAT:
        return concat(r, n);
    case N_BINARY:
        v = evaluate(r, n->a);
        return td_v_binary(r, n->name, v, evaluate(r, n->b));
    case N_COMPARE:
        return compare(r, n);
    default:
        return undefined();
    }
}

static td_value evaluate(td_run *r, const td_node *n)
{
    if (r->code || !td_run_step(r, 1))
        return undefined();
    r->line = n->line;
    if (r->frames >= FRAMES_MAX)
        return td_run_fail(r, -E2BIG, "expressions, blocks and macros are nested too deep");
    r->frames++;
    td_value v = expression(r, n);
    r->frames--;
    r->line = n->line;
    return r->code ? undefined() : v;
}

static td_value call_raise(td_run *r, const td_args *a)
{
    td_value text = td_v_to_str(r, td_args_get(a, 0, "message", td_v_str(td_str_of(""))));
    return td_run_fail(r, -EINVAL, "the template refuses this: %.*s",
                       (int)TD_MIN(text.s.len, (size_t)300), text.s.ptr ? text.s.ptr : "");
}

static td_value call_strftime(td_run *r, const td_args *a)
{
    td_value format = td_args_get(a, 0, "format", undefined());
    char z[100], text[400];
    struct tm tm;
    time_t t = (time_t)r->now;
    if (format.kind != V_STR || format.s.len >= sizeof z ||
        (format.s.len && memchr(format.s.ptr, 0, format.s.len)))
        return td_run_fail(r, -EINVAL, "strftime_now: a format of at most 99 bytes is needed");
    memcpy(z, format.s.ptr ? format.s.ptr : "", format.s.len);
    z[format.s.len] = 0;
    if (r->utc ? !gmtime_r(&t, &tm) : !localtime_r(&t, &tm))
        return td_run_fail(r, -EINVAL, "strftime_now: the clock is out of range");
        /* the format is the model's own */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
    size_t n = z[0] ? strftime(text, sizeof text, z, &tm) : 0;
#pragma GCC diagnostic pop
    return td_v_copy(r, (td_str){text, n});
}

/* namespace(a=1) and dict(a=1), either of them from a mapping or pairs, too. */
static td_value call_namespace(td_run *r, const td_args *a, td_vkind kind)
{
    td_value d = td_v_dict(r);
    if (a->n > 1)
        return td_run_fail(r, -EINVAL, "namespace() and dict() take one positional argument");
    if (a->n == 1 && a->at[0].kind == V_DICT) {
        for (size_t i = 0; !r->code && i < td_v_n(a->at[0]); i++)
            td_v_put(r, d, td_v_key(r, a->at[0], i), td_v_item(r, a->at[0], i));
    } else if (a->n == 1) {
        td_value pairs = td_v_iterate(r, a->at[0]);
        for (size_t i = 0; !r->code && i < td_v_n(pairs); i++) {
            td_value pair = td_v_iterate(r, td_v_at(r, pairs, i));
            if (!r->code && td_v_n(pair) != 2)
                td_run_fail(r, -EINVAL, "pairs are needed to build a mapping");
            if (!r->code)
                td_v_put(r, d, td_v_at(r, pair, 0), td_v_at(r, pair, 1));
        }
    }
    for (size_t i = 0; i < a->n_named && !r->code; i++)
        td_v_put(r, d, td_v_str(a->names[i]), a->named[i]);
    d.kind = r->code ? V_UNDEFINED : kind;
    return d;
}

static td_value call_range(td_run *r, const td_args *a)
{
    int64_t v[3] = {0, 0, 1};
    if (!td_args_check(r, "range()", a, 1, 3, NULL))
        return undefined();
    for (size_t i = 0; i < a->n; i++) {
        if (a->at[i].kind != V_INT && a->at[i].kind != V_BOOL)
            return td_run_fail(r, -EINVAL, "range() takes integers, not %s", td_v_type(a->at[i]));
        v[i] = a->at[i].i;
    }
    if (a->n == 1) {
        v[1] = v[0];
        v[0] = 0;
    }
    if (v[2] == 0)
        return td_run_fail(r, -EINVAL, "range() step must not be zero");
    td_value list = td_v_list(r, V_RANGE);
    for (int64_t i = v[0]; !r->code && (v[2] > 0 ? i < v[1] : i > v[1]);) {
        if (td_v_n(list) == RANGE_MAX)
            return td_run_fail(r, -EINVAL, "range() is longer than %d", RANGE_MAX);
        td_v_append(r, list, td_v_int(i));
        if (__builtin_add_overflow(i, v[2], &i))
            break;
    }
    return list;
}

td_value td_v_call(td_run *r, td_value callee, const td_args *a)
{
    if (r->code)
        return undefined();
    if (callee.kind == V_METHOD)
        return td_v_call_method(r, *callee.self, callee.number, a);
    if (callee.kind == V_MACRO)
        return td_macro_call(r, callee.macro, a);
    if (callee.kind == V_UNDEFINED)
        return td_run_fail(r, -EINVAL, "'%.*s' is undefined", (int)TD_MIN(callee.s.len, (size_t)80),
                           callee.s.ptr ? callee.s.ptr : "");
    if (callee.kind != V_FUNCTION)
        return td_run_fail(r, -EINVAL, "'%s' object is not callable", td_v_type(callee));
    switch (callee.i) {
    case FN_RAISE:
        return call_raise(r, a);
    case FN_STRFTIME:
        return call_strftime(r, a);
    case FN_NAMESPACE:
        return call_namespace(r, a, V_NAMESPACE);
    case FN_RANGE:
        return call_range(r, a);
    default:
        return call_namespace(r, a, V_DICT);
    }
}

/* Nesting of macros and blocks, which the caller of render() bounds. */
static int enter(td_run *r)
{
    if (r->code)
        return 0;
    if (r->depth >= r->max_depth || r->frames >= FRAMES_MAX) {
        td_run_fail(r, -E2BIG, "blocks and macros are nested more than %u deep", r->max_depth);
        return 0;
    }
    r->depth++;
    r->frames++;
    return 1;
}

static void leave(td_run *r)
{
    r->depth--;
    r->frames--;
}

/* Run nodes and take what they write. */
static td_value capture(td_run *r, const td_nodes *body)
{
    td_strbuf b, *out = r->out;
    td_run_buffer(r, &b);
    r->out = &b;
    run_body(r, body);
    r->out = out;
    return td_v_take(r, &b);
}

static void bind_parameters(td_run *r, const td_node *n, const td_args *a)
{
    size_t n_required = n->n_names - n->list.n;
    if (a->n > n->n_names)
        td_run_fail(r, -EINVAL, "macro '%.*s' takes not more than %zu argument(s)",
                    (int)TD_MIN(n->name.len, (size_t)80), n->name.ptr, n->n_names);
    for (size_t k = 0; k < a->n_named && !r->code; k++) {
        size_t i = 0;
        while (i < n->n_names && !same_name(n->names[i], a->names[k]))
            i++;
        if (i == n->n_names || i < a->n)
            td_run_fail(r, -EINVAL, "macro '%.*s' has no parameter '%.*s' left",
                        (int)TD_MIN(n->name.len, (size_t)80), n->name.ptr,
                        (int)TD_MIN(a->names[k].len, (size_t)60), a->names[k].ptr);
    }
    for (size_t i = 0; i < n->n_names && !r->code; i++) {
        td_value v = td_v_undefined(n->names[i]);
        size_t k = 0;
        while (k < a->n_named && !same_name(n->names[i], a->names[k]))
            k++;
        if (i < a->n)
            v = a->at[i];
        else if (k < a->n_named)
            v = a->named[k];
        else if (i >= n_required)
            v = evaluate(r, n->list.at[i - n_required]);
        assign(r, n->names[i], v);
    }
}

td_value td_macro_call(td_run *r, const td_macro *m, const td_args *a)
{
    td_scope *caller = r->scope;
    if (!enter(r))
        return undefined();
    r->scope = m->scope;
    td_value v = undefined();
    if (new_scope(r)) {
        bind_parameters(r, m->node, a);
        v = capture(r, &m->node->body);
    }
    r->scope = caller;
    leave(r);
    return v;
}

static td_flow run_if(td_run *r, const td_node *n)
{
    for (size_t i = 0; i < n->list.n; i++) {
        int yes = td_v_truth(r, evaluate(r, n->list.at[i]));
        if (r->code)
            return GO_ON;
        if (yes)
            return run_body(r, &n->more.at[i]->body);
    }
    return run_body(r, &n->orelse);
}

/* Elements that pass the loop's own condition, which sees the target but not `loop`. */
static td_value loop_items(td_run *r, const td_node *n)
{
    td_value all = td_v_iterate(r, evaluate(r, n->b));
    if (!n->c || r->code)
        return all;
    td_value kept = td_v_list(r, V_LIST);
    td_scope *outer = r->scope;
    for (size_t i = 0; !r->code && i < td_v_n(all) && new_scope(r); i++) {
        td_value one = td_v_at(r, all, i);
        assign_target(r, n->a, one);
        if (td_v_truth(r, evaluate(r, n->c)))
            td_v_append(r, kept, one);
        r->scope = outer;
    }
    r->scope = outer;
    return kept;
}

static td_flow run_for(td_run *r, const td_node *n)
{
    td_value items = loop_items(r, n);
    td_loop_state *loop = td_run_alloc(r, 1, sizeof *loop);
    td_scope *outer = r->scope;
    if (r->code)
        return GO_ON;
    *loop = (td_loop_state){.items = items};
    size_t count = td_v_n(items);
    for (size_t i = 0; i < count && !r->code && td_run_step(r, 1) && new_scope(r); i++) {
        loop->index = i;
        assign(r, td_str_of("loop"), (td_value){.kind = V_LOOP, .loop = loop});
        assign_target(r, n->a, td_v_at(r, items, i));
        td_flow flow = run_body(r, &n->body);
        r->scope = outer;
        if (flow == BREAK)
            break;
    }
    r->scope = outer;
    if (count || r->code)
        return GO_ON;
    td_flow flow = new_scope(r) ? run_body(r, &n->orelse) : GO_ON;
    r->scope = outer;
    return flow;
}

/* Filters behind {% set x | f %} and {% filter f %}: the innermost takes the text. */
static td_value apply_filters(td_run *r, const td_node *f, td_value text)
{
    if (!f || r->code)
        return text;
    if (r->frames >= FRAMES_MAX)
        return td_run_fail(r, -E2BIG, "filters are nested too deep");
    r->frames++;
    td_value v = filter(r, f, apply_filters(r, f->a, text));
    r->frames--;
    return v;
}

static td_value capture_scoped(td_run *r, const td_nodes *body)
{
    td_scope *outer = r->scope;
    td_value v = new_scope(r) ? capture(r, body) : undefined();
    r->scope = outer;
    return v;
}

static void run_scope(td_run *r, const td_node *n)
{
    td_scope *outer = r->scope;
    if (!new_scope(r))
        return;
    for (size_t i = 0; i < n->list.n && !r->code; i++) {
        td_scope *inner = r->scope;
        r->scope = outer; /* values of {% with %} do not see each other */
        td_value v = evaluate(r, n->more.at[i]);
        r->scope = inner;
        assign_target(r, n->list.at[i], v);
    }
    run_body(r, &n->body);
    r->scope = outer;
}

static void define_macro(td_run *r, const td_node *n)
{
    td_macro *m = td_run_alloc(r, 1, sizeof *m);
    if (!m)
        return;
    *m = (td_macro){n, r->scope};
    assign(r, n->name, (td_value){.kind = V_MACRO, .macro = m});
}

static td_flow run_node(td_run *r, const td_node *n)
{
    r->line = n->line;
    switch (n->kind) {
    case N_TEXT:
        td_run_step(r, n->name.len / 64);
        td_strbuf_add(r->out, n->name.ptr, n->name.len);
        return GO_ON;
    case N_PRINT:
        td_v_print(r, evaluate(r, n->a), r->out);
        return GO_ON;
    case N_IF:
        return run_if(r, n);
    case N_FOR:
        return run_for(r, n);
    case N_SET:
        assign_target(r, n->a, evaluate(r, n->b));
        return GO_ON;
    case N_SET_BLOCK:
        assign_target(r, n->a, apply_filters(r, n->b, capture_scoped(r, &n->body)));
        return GO_ON;
    case N_FILTER_BLOCK:
        td_v_print(r, apply_filters(r, n->b, capture_scoped(r, &n->body)), r->out);
        return GO_ON;
    case N_SCOPE:
        run_scope(r, n);
        return GO_ON;
    case N_MACRO:
        define_macro(r, n);
        return GO_ON;
    case N_BREAK:
        return BREAK;
    case N_CONTINUE:
        return CONTINUE;
    default:
        return GO_ON;
    }
}

static td_flow run_body(td_run *r, const td_nodes *body)
{
    td_flow flow = GO_ON;
    if (!body->n || !enter(r))
        return GO_ON;
    for (size_t i = 0; i < body->n && flow == GO_ON && !r->code && td_run_step(r, 1); i++) {
        flow = run_node(r, body->at[i]);
        if (r->out->failed)
            td_run_fail(r, -E2BIG, "the template's output passes %zu bytes", r->out->max_bytes);
    }
    leave(r);
    return flow;
}

void td_tpl_run(td_run *r, const td_nodes *body)
{
    if (new_scope(r))
        run_body(r, body);
}
