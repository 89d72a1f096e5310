/* SPDX-License-Identifier: Apache-2.0 */
/* Statements. */
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "text/template_parser.h"
#include "base/banned.h"

void *td_parse_fail(td_parser *p, const char *fmt, ...)
{
    char text[300];
    va_list ap;
    if (p->code)
        return NULL;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    p->code = td_arena_failed(p->arena) ? -ENOMEM : -EINVAL;
    td_err_set(p->err, p->code, "%s:%u: %s; correct the template", p->name, p->t->line, text);
    return NULL;
}

int td_parse_is_op(const td_parser *p, const char *op)
{
    return p->t->kind == TK_OP && td_str_eq(p->t->s, op);
}

int td_parse_is_name(const td_parser *p, const char *name)
{
    return p->t->kind == TK_NAME && td_str_eq(p->t->s, name);
}

void td_parse_next(td_parser *p)
{
    if (p->t->kind != TK_END)
        p->t++;
}

int td_parse_try_op(td_parser *p, const char *op)
{
    if (p->code || !td_parse_is_op(p, op))
        return 0;
    p->t++;
    return 1;
}

int td_parse_try_name(td_parser *p, const char *name)
{
    if (p->code || !td_parse_is_name(p, name))
        return 0;
    p->t++;
    return 1;
}

void td_parse_expect_op(td_parser *p, const char *op)
{
    if (!td_parse_try_op(p, op))
        td_parse_fail(p, "'%s' was expected", op);
}

td_node *td_parse_new(td_parser *p, td_node_kind kind)
{
    td_node *n = p->code ? NULL : td_arena_alloc(p->arena, sizeof *n);
    if (!n)
        return td_parse_fail(p, "out of memory");
    n->kind = kind;
    n->line = p->t->line;
    n->height = 1;
    return n;
}

/* The evaluator recurses as deep as the tree is high. */
static void raise_height(td_parser *p, td_node *n, const td_node *child)
{
    if (child && child->height >= n->height)
        n->height = child->height + 1;
    if (n->height > TD_TPL_HEIGHT_MAX)
        td_parse_fail(p, "an expression or block is nested more than %d deep", TD_TPL_HEIGHT_MAX);
}

td_node *td_parse_link(td_parser *p, td_node *n)
{
    if (p->code || !n)
        return NULL;
    raise_height(p, n, n->a);
    raise_height(p, n, n->b);
    raise_height(p, n, n->c);
    return p->code ? NULL : n;
}

void td_parse_append(td_parser *p, td_node *parent, td_nodes *list, td_node *n)
{
    if (p->code || !n)
        return;
    if ((list->n & (list->n - 1)) == 0) { /* full at each power of two */
        td_node **more = td_arena_alloc_array(p->arena, list->n ? list->n * 2 : 1, sizeof *more);
        if (!more) {
            td_parse_fail(p, "out of memory");
            return;
        }
        if (list->n)
            memcpy(more, list->at, list->n * sizeof *more);
        list->at = more;
    }
    list->at[list->n++] = n;
    if (parent)
        raise_height(p, parent, n);
}

int td_parse_enter(td_parser *p)
{
    if (p->code)
        return 0;
    if (++p->depth > TD_TPL_HEIGHT_MAX)
        td_parse_fail(p, "nested more than %d deep", TD_TPL_HEIGHT_MAX);
    return !p->code;
}

void td_parse_leave(td_parser *p)
{
    p->depth--;
}

static void end_tag(td_parser *p)
{
    if (!p->code && p->t->kind != TK_BLOCK_END)
        td_parse_fail(p, "'%%}' was expected");
    td_parse_next(p);
}

static td_node *parse_statement(td_parser *p);

/* Nodes up to a tag that begins with one of the words; its word is consumed. Returns which, -1 on
 * failure. */
static int parse_body(td_parser *p, td_node *parent, td_nodes *body, const char *const *ends)
{
    while (!p->code) {
        td_node *n = NULL;
        if (p->t->kind == TK_END) {
            if (!ends)
                return 0;
            td_parse_fail(p, "'{%% %s %%}' is missing", ends[0]);
        } else if (p->t->kind == TK_TEXT) {
            n = td_parse_new(p, N_TEXT);
            if (n)
                n->name = p->t->s;
            td_parse_next(p);
        } else if (p->t->kind == TK_VAR_BEGIN) {
            td_parse_next(p);
            n = td_parse_new(p, N_PRINT);
            td_node *e = td_parse_tuple(p, 0);
            if (!p->code && p->t->kind != TK_VAR_END)
                td_parse_fail(p, "'}}' was expected");
            td_parse_next(p);
            if (n)
                n->a = e;
            td_parse_link(p, n);
        } else {
            td_parse_next(p); /* {% */
            for (int i = 0; ends && ends[i]; i++)
                if (td_parse_try_name(p, ends[i]))
                    return i;
            n = parse_statement(p);
        }
        td_parse_append(p, parent, body, n);
    }
    return -1;
}

/* The rest of a tag, the nodes up to {% end %}, and that tag. */
static td_node *parse_block(td_parser *p, td_node *n, const char *end)
{
    const char *const ends[] = {end, NULL};
    end_tag(p);
    parse_body(p, n, &n->body, ends);
    end_tag(p);
    return td_parse_link(p, n);
}

/* The same where break and continue do not reach the loops around it. */
static td_node *parse_own_block(td_parser *p, td_node *n, const char *end)
{
    uint32_t loops = p->loops;
    p->loops = 0;
    n = parse_block(p, n, end);
    p->loops = loops;
    return n;
}

static td_node *parse_if(td_parser *p)
{
    static const char *const ends[] = {"endif", "elif", "else", NULL}, *const last[] = {"endif",
                                                                                        NULL};
    td_node *n = td_parse_new(p, N_IF);
    if (!n)
        return NULL;
    int which = 1;
    while (!p->code && which == 1) {
        td_parse_append(p, n, &n->list, td_parse_tuple(p, 1));
        end_tag(p);
        td_node *body = td_parse_new(p, N_IF); /* holds a branch's nodes */
        if (!body)
            return NULL;
        which = parse_body(p, body, &body->body, ends);
        td_parse_append(p, n, &n->more, body);
    }
    if (which == 2) {
        end_tag(p);
        parse_body(p, n, &n->orelse, last);
    }
    end_tag(p);
    return n;
}

static td_node *parse_for(td_parser *p)
{
    static const char *const ends[] = {"endfor", "else", NULL}, *const last[] = {"endfor", NULL};
    td_node *n = td_parse_new(p, N_FOR);
    td_node *target = td_parse_target(p, 0);
    if (!p->code && !td_parse_try_name(p, "in"))
        td_parse_fail(p, "'in' was expected");
    td_node *iter = td_parse_tuple(p, 1);
    td_node *cond = td_parse_try_name(p, "if") ? td_parse_expression(p) : NULL;
    if (!p->code && td_parse_is_name(p, "recursive"))
        td_parse_fail(p, "recursive loops are not supported");
    end_tag(p);
    if (p->code)
        return NULL;
    n->a = target;
    n->b = iter;
    n->c = cond;
    p->loops++;
    int which = parse_body(p, n, &n->body, ends);
    p->loops--;
    if (which == 1) {
        end_tag(p);
        parse_body(p, n, &n->orelse, last);
    }
    end_tag(p);
    return td_parse_link(p, n);
}

static td_node *parse_set(td_parser *p)
{
    td_node *n = td_parse_new(p, N_SET);
    td_node *target = td_parse_target(p, 1), *value = NULL;
    if (p->code)
        return NULL;
    n->a = target;
    if (td_parse_try_op(p, "=")) {
        value = td_parse_tuple(p, 0);
        n->b = value;
        end_tag(p);
        return td_parse_link(p, n);
    }
    n->kind = N_SET_BLOCK;
    /* a filter's input is the block: its innermost a stays NULL */
    while (td_parse_try_op(p, "|"))
        n->b = td_parse_filter(p, n->b);
    return parse_block(p, n, "endset");
}

static void macro_parameters(td_parser *p, td_node *n)
{
    td_parse_expect_op(p, "(");
    while (!p->code && !td_parse_is_op(p, ")")) {
        td_str *names = td_arena_alloc_array(p->arena, n->n_names + 1, sizeof *names);
        if (!names || p->t->kind != TK_NAME) {
            td_parse_fail(p, "a parameter's name was expected");
            return;
        }
        if (n->n_names)
            memcpy(names, n->names, n->n_names * sizeof *names);
        names[n->n_names++] = p->t->s;
        n->names = names;
        td_parse_next(p);
        if (td_parse_try_op(p, "="))
            td_parse_append(p, n, &n->list, td_parse_expression(p));
        else if (n->list.n)
            td_parse_fail(p, "a parameter without default follows one with default");
        if (!td_parse_try_op(p, ","))
            break;
    }
    td_parse_expect_op(p, ")");
}

static td_node *parse_macro(td_parser *p)
{
    td_node *n = td_parse_new(p, N_MACRO);
    if (!n || p->t->kind != TK_NAME)
        return td_parse_fail(p, "a macro's name was expected");
    n->name = p->t->s;
    td_parse_next(p);
    macro_parameters(p, n);
    return parse_own_block(p, n, "endmacro");
}

static td_node *parse_with(td_parser *p)
{
    td_node *n = td_parse_new(p, N_SCOPE);
    if (!n)
        return NULL;
    while (!p->code && p->t->kind != TK_BLOCK_END) {
        td_parse_append(p, n, &n->list, td_parse_target(p, 0));
        td_parse_expect_op(p, "=");
        td_parse_append(p, n, &n->more, td_parse_expression(p));
        if (!td_parse_try_op(p, ","))
            break;
    }
    return parse_block(p, n, "endwith");
}

/* transformers' own tag: marks what the model wrote, changes nothing in the text. */
static td_node *parse_generation(td_parser *p)
{
    td_node *n = td_parse_new(p, N_SCOPE);
    return n ? parse_own_block(p, n, "endgeneration") : NULL;
}

static td_node *parse_filter_block(td_parser *p)
{
    td_node *n = td_parse_new(p, N_FILTER_BLOCK);
    if (!n)
        return NULL;
    td_node *filter = td_parse_filter(p, NULL);
    while (td_parse_try_op(p, "|"))
        filter = td_parse_filter(p, filter);
    n->b = filter;
    return parse_block(p, n, "endfilter");
}

static td_node *parse_jump(td_parser *p, td_node_kind kind)
{
    td_node *n = td_parse_new(p, kind);
    if (!p->loops)
        return td_parse_fail(p, "break and continue stand in a loop only");
    end_tag(p);
    return n;
}

static td_node *statement(td_parser *p)
{
    if (td_parse_try_name(p, "if"))
        return parse_if(p);
    if (td_parse_try_name(p, "for"))
        return parse_for(p);
    if (td_parse_try_name(p, "set"))
        return parse_set(p);
    if (td_parse_try_name(p, "macro"))
        return parse_macro(p);
    if (td_parse_try_name(p, "with"))
        return parse_with(p);
    if (td_parse_try_name(p, "generation"))
        return parse_generation(p);
    if (td_parse_try_name(p, "filter"))
        return parse_filter_block(p);
    if (td_parse_try_name(p, "break"))
        return parse_jump(p, N_BREAK);
    if (td_parse_try_name(p, "continue"))
        return parse_jump(p, N_CONTINUE);
    if (p->t->kind == TK_NAME)
        return td_parse_fail(p, "the tag '%.*s' is not supported here",
                             (int)(p->t->s.len < 60 ? p->t->s.len : 60), p->t->s.ptr);
    return td_parse_fail(p, "a tag's name was expected");
}

static td_node *parse_statement(td_parser *p)
{
    if (!td_parse_enter(p))
        return NULL;
    td_node *n = statement(p);
    td_parse_leave(p);
    return p->code ? NULL : n;
}

int td_tpl_parse(const char *name, const td_token_t *tokens, size_t n, td_arena *arena,
                 td_nodes *ret_body, td_err *reterr_err)
{
    td_parser p = {.name = name, .t = tokens, .arena = arena, .err = reterr_err};
    td_nodes body = {0};
    if (n == 0)
        return td_err_set(reterr_err, -EINVAL, "%s: empty", name);
    parse_body(&p, NULL, &body, NULL);
    if (p.code < 0)
        return p.code;
    *ret_body = body;
    return 0;
}
