/* SPDX-License-Identifier: Apache-2.0 */
/* Expressions, by Jinja's own grammar and precedence. */
#include <string.h>

#include "text/template_parser.h"
#include "base/banned.h"

static td_node *parse_or(td_parser *p);
static td_node *parse_unary(td_parser *p, int with_filter);

static td_node *binary(td_parser *p, td_node_kind kind, td_str op, td_node *a, td_node *b)
{
    td_node *n = td_parse_new(p, kind);
    if (!n || !a || !b)
        return NULL;
    n->a = a;
    n->b = b;
    n->name = op;
    return td_parse_link(p, n);
}

static td_node *parse_cond(td_parser *p)
{
    td_node *value = parse_or(p);
    while (!p->code && td_parse_try_name(p, "if")) {
        td_node *n = td_parse_new(p, N_COND);
        td_node *test = parse_or(p);
        td_node *other = td_parse_try_name(p, "else") ? parse_cond(p) : NULL;
        if (p->code)
            return NULL;
        n->a = test;
        n->b = value;
        n->c = other;
        value = td_parse_link(p, n);
    }
    return value;
}

td_node *td_parse_expression(td_parser *p)
{
    if (!td_parse_enter(p))
        return NULL;
    td_node *n = parse_cond(p);
    td_parse_leave(p);
    return n;
}

static const char *constant_kind(td_str s, td_const *ret_c)
{
    if (td_str_eq(s, "true") || td_str_eq(s, "True"))
        return *ret_c = (td_const){C_BOOL, .i = 1}, "bool";
    if (td_str_eq(s, "false") || td_str_eq(s, "False"))
        return *ret_c = (td_const){C_BOOL, .i = 0}, "bool";
    if (td_str_eq(s, "none") || td_str_eq(s, "None"))
        return *ret_c = (td_const){C_NONE}, "none";
    return NULL;
}

static td_node *parse_name(td_parser *p)
{
    td_node *n = td_parse_new(p, N_NAME);
    if (!n)
        return NULL;
    n->name = p->t->s;
    if (constant_kind(n->name, &n->literal))
        n->kind = N_CONST;
    td_parse_next(p);
    return n;
}

static td_node *parse_strings(td_parser *p)
{
    td_node *n = td_parse_new(p, N_CONST);
    if (!n)
        return NULL;
    n->literal.kind = C_STR;
    n->name = p->t->s;
    td_parse_next(p);
    while (p->t->kind == TK_STRING) { /* "a" "b" is one string */
        size_t len = n->name.len + p->t->s.len;
        char *both = td_arena_alloc(p->arena, len + 1);
        if (!both)
            return td_parse_fail(p, "out of memory");
        if (n->name.len)
            memcpy(both, n->name.ptr, n->name.len);
        if (p->t->s.len)
            memcpy(both + n->name.len, p->t->s.ptr, p->t->s.len);
        n->name = (td_str){both, len};
        td_parse_next(p);
    }
    return n;
}

static td_node *parse_number(td_parser *p)
{
    td_node *n = td_parse_new(p, N_CONST);
    if (!n)
        return NULL;
    n->literal =
        p->t->kind == TK_INT ? (td_const){C_INT, .i = p->t->i} : (td_const){C_FLOAT, .f = p->t->f};
    td_parse_next(p);
    return n;
}

static td_node *parse_list(td_parser *p)
{
    td_node *n = td_parse_new(p, N_LIST);
    if (!n)
        return NULL;
    td_parse_expect_op(p, "[");
    while (!p->code && !td_parse_is_op(p, "]")) {
        td_parse_append(p, n, &n->list, td_parse_expression(p));
        if (!td_parse_try_op(p, ","))
            break;
    }
    td_parse_expect_op(p, "]");
    return p->code ? NULL : n;
}

static td_node *parse_dict(td_parser *p)
{
    td_node *n = td_parse_new(p, N_DICT);
    if (!n)
        return NULL;
    td_parse_expect_op(p, "{");
    while (!p->code && !td_parse_is_op(p, "}")) {
        td_parse_append(p, n, &n->list, td_parse_expression(p));
        td_parse_expect_op(p, ":");
        td_parse_append(p, n, &n->more, td_parse_expression(p));
        if (!td_parse_try_op(p, ","))
            break;
    }
    td_parse_expect_op(p, "}");
    return p->code ? NULL : n;
}

static int ends_tuple(const td_parser *p)
{
    return p->t->kind == TK_VAR_END || p->t->kind == TK_BLOCK_END || p->t->kind == TK_END ||
           td_parse_is_op(p, ")");
}

static td_node *tuple(td_parser *p, int without_cond, int may_be_empty)
{
    td_node *first = NULL, *n = NULL;
    while (!p->code && !ends_tuple(p) && !(n && without_cond && td_parse_is_name(p, "recursive"))) {
        td_node *e = without_cond ? parse_or(p) : td_parse_expression(p);
        if (n)
            td_parse_append(p, n, &n->list, e);
        else
            first = e;
        if (!td_parse_is_op(p, ","))
            break;
        if (!n) {
            n = td_parse_new(p, N_TUPLE);
            if (!n)
                return NULL;
            td_parse_append(p, n, &n->list, first);
        }
        td_parse_next(p);
    }
    if (p->code)
        return NULL;
    if (n || first)
        return n ? n : first;
    return may_be_empty ? td_parse_new(p, N_TUPLE) : td_parse_fail(p, "an expression is missing");
}

td_node *td_parse_tuple(td_parser *p, int without_cond)
{
    if (!td_parse_enter(p))
        return NULL;
    td_node *n = tuple(p, without_cond, 0);
    td_parse_leave(p);
    return n;
}

static td_node *parse_parenthesis(td_parser *p)
{
    td_parse_expect_op(p, "(");
    if (!td_parse_enter(p))
        return NULL;
    td_node *n = tuple(p, 0, 1);
    td_parse_leave(p);
    td_parse_expect_op(p, ")");
    return n;
}

static td_node *parse_primary(td_parser *p)
{
    if (p->code)
        return NULL;
    switch (p->t->kind) {
    case TK_NAME:
        return parse_name(p);
    case TK_STRING:
        return parse_strings(p);
    case TK_INT:
    case TK_FLOAT:
        return parse_number(p);
    default:
        break;
    }
    if (td_parse_is_op(p, "("))
        return parse_parenthesis(p);
    if (td_parse_is_op(p, "["))
        return parse_list(p);
    if (td_parse_is_op(p, "{"))
        return parse_dict(p);
    return td_parse_fail(p, "an expression was expected");
}

static td_node *slice_part(td_parser *p)
{
    return td_parse_is_op(p, ":") || td_parse_is_op(p, "]") ? NULL : td_parse_expression(p);
}

static td_node *parse_subscript(td_parser *p, td_node *of)
{
    td_parse_expect_op(p, "[");
    td_node *first = slice_part(p);
    td_node *n = td_parse_new(p, td_parse_is_op(p, ":") ? N_SLICE : N_ITEM);
    if (!n || !of)
        return NULL;
    n->a = of;
    n->b = first;
    if (n->kind == N_SLICE) {
        td_parse_next(p);
        td_nodes parts = {0};
        n->c = slice_part(p);
        if (td_parse_try_op(p, ":") && !td_parse_is_op(p, "]"))
            td_parse_append(p, n, &parts, td_parse_expression(p));
        n->list = parts;
    } else if (!first) {
        return td_parse_fail(p, "a subscript is empty");
    }
    td_parse_expect_op(p, "]");
    return p->code ? NULL : td_parse_link(p, n);
}

static td_node *parse_attribute(td_parser *p, td_node *of)
{
    td_parse_next(p);
    td_node *n = td_parse_new(p, N_ATTR);
    if (!n || !of)
        return NULL;
    n->a = of;
    n->name = p->t->s;
    if (p->t->kind == TK_INT) {
        n->kind = N_ITEM;
        n->b = parse_number(p);
    } else if (p->t->kind == TK_NAME) {
        td_parse_next(p);
    } else {
        return td_parse_fail(p, "a name was expected behind '.'");
    }
    return td_parse_link(p, n);
}

static void keyword_argument(td_parser *p, td_node *n)
{
    td_str *names = td_arena_alloc_array(p->arena, n->n_names + 1, sizeof *names);
    if (!names) {
        td_parse_fail(p, "out of memory");
        return;
    }
    if (n->n_names)
        memcpy(names, n->names, n->n_names * sizeof *names);
    names[n->n_names++] = p->t->s;
    n->names = names;
    td_parse_next(p);
    td_parse_next(p);
    td_parse_append(p, n, &n->more, td_parse_expression(p));
}

void td_parse_arguments(td_parser *p, td_node *n)
{
    td_parse_expect_op(p, "(");
    while (!p->code && !td_parse_is_op(p, ")")) {
        if (td_parse_is_op(p, "*") || td_parse_is_op(p, "**"))
            td_parse_fail(p, "'*' and '**' in calls are not supported");
        else if (p->t->kind == TK_NAME && p->t[1].kind == TK_OP && td_str_eq(p->t[1].s, "="))
            keyword_argument(p, n);
        else if (n->n_names)
            td_parse_fail(p, "a positional argument follows a named one");
        else
            td_parse_append(p, n, &n->list, td_parse_expression(p));
        if (!td_parse_try_op(p, ","))
            break;
    }
    td_parse_expect_op(p, ")");
}

static td_node *parse_call(td_parser *p, td_node *callee)
{
    td_node *n = td_parse_new(p, N_CALL);
    if (!n || !callee)
        return NULL;
    n->a = callee;
    td_parse_arguments(p, n);
    return td_parse_link(p, n);
}

static td_node *parse_postfix(td_parser *p, td_node *n)
{
    while (!p->code) {
        if (td_parse_is_op(p, "."))
            n = parse_attribute(p, n);
        else if (td_parse_is_op(p, "["))
            n = parse_subscript(p, n);
        else if (td_parse_is_op(p, "("))
            n = parse_call(p, n);
        else
            break;
    }
    return n;
}

td_node *td_parse_filter(td_parser *p, td_node *input)
{
    td_node *n = td_parse_new(p, N_FILTER);
    if (!n)
        return NULL;
    if (p->t->kind != TK_NAME)
        return td_parse_fail(p, "a filter's name was expected");
    n->a = input;
    n->name = p->t->s;
    n->id = td_tpl_filter_id(n->name);
    if (n->id < 0)
        return td_parse_fail(p, "unknown filter '%.*s'", (int)n->name.len, n->name.ptr);
    td_parse_next(p);
    if (td_parse_is_op(p, "("))
        td_parse_arguments(p, n);
    return td_parse_link(p, n);
}

/* An argument without parentheses: "is divisibleby 3". */
static int begins_test_argument(const td_parser *p)
{
    if (p->t->kind == TK_STRING || p->t->kind == TK_INT || p->t->kind == TK_FLOAT ||
        td_parse_is_op(p, "[") || td_parse_is_op(p, "{"))
        return 1;
    return p->t->kind == TK_NAME && !td_parse_is_name(p, "else") && !td_parse_is_name(p, "or") &&
           !td_parse_is_name(p, "and");
}

static td_node *parse_test(td_parser *p, td_node *input)
{
    td_parse_next(p);
    td_node *n = td_parse_new(p, N_TEST);
    if (!n || !input)
        return NULL;
    n->a = input;
    n->flag = td_parse_try_name(p, "not");
    if (p->t->kind != TK_NAME)
        return td_parse_fail(p, "a test's name was expected");
    n->name = p->t->s;
    n->id = td_tpl_test_id(n->name);
    if (n->id < 0)
        return td_parse_fail(p, "unknown test '%.*s'", (int)n->name.len, n->name.ptr);
    td_parse_next(p);
    if (td_parse_is_op(p, "(")) {
        td_parse_arguments(p, n);
    } else if (begins_test_argument(p)) {
        if (td_parse_is_name(p, "is"))
            return td_parse_fail(p, "tests cannot be chained with 'is'");
        td_parse_append(p, n, &n->list, parse_postfix(p, parse_primary(p)));
    }
    return td_parse_link(p, n);
}

static td_node *parse_filters(td_parser *p, td_node *n)
{
    while (!p->code) {
        if (td_parse_try_op(p, "|"))
            n = td_parse_filter(p, n);
        else if (td_parse_is_name(p, "is"))
            n = parse_test(p, n);
        else if (td_parse_is_op(p, "("))
            n = parse_call(p, n);
        else
            break;
    }
    return n;
}

static td_node *parse_unary(td_parser *p, int with_filter)
{
    td_node *n;
    if (!td_parse_enter(p))
        return NULL;
    if (td_parse_is_op(p, "-") || td_parse_is_op(p, "+")) {
        n = td_parse_new(p, td_parse_is_op(p, "-") ? N_NEG : N_POS);
        td_parse_next(p);
        td_node *of = parse_unary(p, 0);
        if (n && of)
            n->a = of;
        n = p->code ? NULL : td_parse_link(p, n);
    } else {
        n = parse_primary(p);
    }
    td_parse_leave(p);
    n = parse_postfix(p, n);
    return with_filter ? parse_filters(p, n) : n;
}

static td_node *parse_pow(td_parser *p)
{
    td_node *n = parse_unary(p, 1);
    while (!p->code && td_parse_is_op(p, "**")) {
        td_str op = p->t->s;
        td_parse_next(p);
        n = binary(p, N_BINARY, op, n, parse_unary(p, 1));
    }
    return n;
}

static td_node *parse_product(td_parser *p)
{
    td_node *n = parse_pow(p);
    while (!p->code && (td_parse_is_op(p, "*") || td_parse_is_op(p, "/") ||
                        td_parse_is_op(p, "//") || td_parse_is_op(p, "%"))) {
        td_str op = p->t->s;
        td_parse_next(p);
        n = binary(p, N_BINARY, op, n, parse_pow(p));
    }
    return n;
}

static td_node *parse_concat(td_parser *p)
{
    td_node *first = parse_product(p), *n = NULL;
    while (!p->code && td_parse_try_op(p, "~")) {
        if (!n) {
            n = td_parse_new(p, N_CONCAT);
            if (!n)
                return NULL;
            td_parse_append(p, n, &n->list, first);
        }
        td_parse_append(p, n, &n->list, parse_product(p));
    }
    return p->code ? NULL : n ? n : first;
}

static td_node *parse_sum(td_parser *p)
{
    td_node *n = parse_concat(p);
    while (!p->code && (td_parse_is_op(p, "+") || td_parse_is_op(p, "-"))) {
        td_str op = p->t->s;
        td_parse_next(p);
        n = binary(p, N_BINARY, op, n, parse_concat(p));
    }
    return n;
}

static int comparison(td_parser *p, td_str *ret_op)
{
    static const char *const ops[] = {"==", "!=", "<", "<=", ">", ">="};
    for (size_t i = 0; i < sizeof ops / sizeof *ops; i++)
        if (td_parse_is_op(p, ops[i])) {
            *ret_op = p->t->s;
            td_parse_next(p);
            return 1;
        }
    if (td_parse_try_name(p, "in"))
        return *ret_op = td_str_of("in"), 1;
    if (td_parse_is_name(p, "not") && p->t[1].kind == TK_NAME && td_str_eq(p->t[1].s, "in")) {
        td_parse_next(p);
        td_parse_next(p);
        return *ret_op = td_str_of("not in"), 1;
    }
    return 0;
}

static td_node *parse_compare(td_parser *p)
{
    td_node *first = parse_sum(p), *n = NULL;
    td_str ops[16], op;
    while (!p->code && comparison(p, &op)) {
        if (!n) {
            n = td_parse_new(p, N_COMPARE);
            if (!n)
                return NULL;
            n->a = first;
        }
        if (n->n_names == sizeof ops / sizeof *ops)
            return td_parse_fail(p, "more than 16 comparisons in a chain");
        ops[n->n_names++] = op;
        td_parse_append(p, n, &n->list, parse_sum(p));
    }
    if (p->code || !n)
        return p->code ? NULL : first;
    n->names = td_arena_alloc_array(p->arena, n->n_names, sizeof *n->names);
    if (!n->names)
        return td_parse_fail(p, "out of memory");
    memcpy(n->names, ops, n->n_names * sizeof *ops);
    return td_parse_link(p, n);
}

static td_node *parse_not(td_parser *p)
{
    if (!td_parse_is_name(p, "not"))
        return parse_compare(p);
    td_node *n = td_parse_new(p, N_NOT);
    td_parse_next(p);
    if (!td_parse_enter(p))
        return NULL;
    td_node *of = parse_not(p);
    td_parse_leave(p);
    if (!n || !of)
        return NULL;
    n->a = of;
    return td_parse_link(p, n);
}

static td_node *parse_and(td_parser *p)
{
    td_node *n = parse_not(p);
    while (!p->code && td_parse_try_name(p, "and"))
        n = binary(p, N_AND, td_str_of("and"), n, parse_not(p));
    return n;
}

static td_node *parse_or(td_parser *p)
{
    td_node *n = parse_and(p);
    while (!p->code && td_parse_try_name(p, "or"))
        n = binary(p, N_OR, td_str_of("or"), n, parse_and(p));
    return n;
}

static td_node *target_name(td_parser *p, int allow_attribute)
{
    td_const unused;
    if (td_parse_try_op(p, "(")) {
        if (!td_parse_enter(p))
            return NULL;
        td_node *inner = td_parse_target(p, 0);
        td_parse_leave(p);
        td_parse_expect_op(p, ")");
        return inner;
    }
    if (p->t->kind != TK_NAME || constant_kind(p->t->s, &unused))
        return td_parse_fail(p, "a name to assign to was expected");
    td_node *n = td_parse_new(p, N_NAME);
    if (!n)
        return NULL;
    n->name = p->t->s;
    td_parse_next(p);
    return allow_attribute && td_parse_is_op(p, ".") ? parse_attribute(p, n) : n;
}

td_node *td_parse_target(td_parser *p, int allow_attribute)
{
    td_node *first = target_name(p, allow_attribute);
    if (p->code || !td_parse_is_op(p, ","))
        return first;
    td_node *n = td_parse_new(p, N_TUPLE);
    if (!n)
        return NULL;
    td_parse_append(p, n, &n->list, first);
    while (!p->code && td_parse_try_op(p, ",") &&
           (p->t->kind == TK_NAME || td_parse_is_op(p, "(")) && !td_parse_is_name(p, "in"))
        td_parse_append(p, n, &n->list, target_name(p, allow_attribute));
    return n;
}
