/* SPDX-License-Identifier: Apache-2.0 */
/* What the statement parser and the expression parser share. Failure is sticky: the first one
 * stands in err and code. */
#ifndef TD_TEXT_TEMPLATE_PARSER_H
#define TD_TEXT_TEMPLATE_PARSER_H

#include "text/template_ast.h"

typedef struct td_parser {
    const char *name;    /* of the template */
    const td_token_t *t; /* present token; the last one is TK_END */
    td_arena *arena;
    td_err *err;
    int code;
    uint32_t depth, loops; /* nesting of the parser; loops around this place */
} td_parser;

/* Set the failure (once), with the present line. Returns NULL. */
void *td_parse_fail(td_parser *p, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* Present token is this operator or keyword. */
int td_parse_is_op(const td_parser *p, const char *op);
int td_parse_is_name(const td_parser *p, const char *name);
/* Consume it if so. */
int td_parse_try_op(td_parser *p, const char *op);
int td_parse_try_name(td_parser *p, const char *name);
void td_parse_expect_op(td_parser *p, const char *op);
void td_parse_next(td_parser *p);
td_node *td_parse_new(td_parser *p, td_node_kind kind);
/* Append; keeps parent's height right. */
void td_parse_append(td_parser *p, td_node *parent, td_nodes *list, td_node *n);
/* Give a node its operands' height. */
td_node *td_parse_link(td_parser *p, td_node *n);
/* Nesting of the parser itself; 0 when too deep. */
int td_parse_enter(td_parser *p);
void td_parse_leave(td_parser *p);

td_node *td_parse_expression(td_parser *p);
/* Expressions separated by commas make a tuple; without_cond: no "x if y" at the top (for ... in).
 */
td_node *td_parse_tuple(td_parser *p, int without_cond);
/* Names, tuples of names, or namespace attributes: the left side of set and for. */
td_node *td_parse_target(td_parser *p, int allow_attribute);
/* Behind a callee or filter name at '(': fills list, more and names. */
void td_parse_arguments(td_parser *p, td_node *n);
/* Behind "|" or the word "filter". */
td_node *td_parse_filter(td_parser *p, td_node *input);

#endif
