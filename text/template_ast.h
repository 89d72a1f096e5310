/* SPDX-License-Identifier: Apache-2.0 */
/* The inside of a compiled template: tokens and syntax tree. Everything lies in the template's
 * arena. */
#ifndef TD_TEXT_TEMPLATE_AST_H
#define TD_TEXT_TEMPLATE_AST_H

#include <stddef.h>
#include <stdint.h>

#include "base/arena.h"
#include "base/err.h"
#include "base/strbuf.h"

enum {
    TD_TPL_HEIGHT_MAX = 200,     /* of the tree, and of the parser's recursion */
    TD_TPL_SOURCE_MAX = 4 << 20, /* bytes of a template */
};

typedef enum td_tok {
    TK_END, /* of the template */
    TK_TEXT,
    TK_VAR_BEGIN,
    TK_VAR_END,
    TK_BLOCK_BEGIN,
    TK_BLOCK_END,
    TK_NAME,
    TK_STRING,
    TK_INT,
    TK_FLOAT,
    TK_OP /* operator: op is its characters */
} td_tok;

typedef struct td_token_t {
    td_tok kind;
    uint32_t line;
    td_str s; /* text, name, unescaped string, operator */
    int64_t i;
    double f;
} td_token_t;

typedef enum td_node_kind {
    /* statements */
    N_TEXT,
    N_PRINT,
    N_IF,
    N_FOR,
    N_SET,
    N_SET_BLOCK,
    N_MACRO,
    N_SCOPE, /* with, generation */
    N_FILTER_BLOCK,
    N_BREAK,
    N_CONTINUE,
    /* expressions */
    N_CONST,
    N_NAME,
    N_LIST,
    N_TUPLE,
    N_DICT,
    N_ATTR,
    N_ITEM,
    N_SLICE,
    N_CALL,
    N_FILTER,
    N_TEST,
    N_NEG,
    N_POS,
    N_NOT,
    N_AND,
    N_OR,
    N_COND,
    N_CONCAT,
    N_BINARY,
    N_COMPARE
} td_node_kind;

typedef struct td_node td_node;

typedef struct td_nodes {
    td_node **at;
    size_t n;
} td_nodes;

/* Literal of a N_CONST. */
typedef struct td_const {
    enum { C_NONE, C_BOOL, C_INT, C_FLOAT, C_STR } kind;
    int64_t i;
    double f;
} td_const;

struct td_node {
    td_node_kind kind;
    uint32_t line;
    uint32_t height;
    td_str name; /* name, attribute, text, string literal, operator (N_BINARY) */
    int id;      /* filter or test number; N_TEST: negated in flag */
    int flag;    /* N_TEST: is not */
    td_const literal;
    td_node *a, *b,
        *c;        /* operands; N_FOR: target, iterable, condition; N_SLICE: start, stop, step */
    td_nodes list; /* elements, arguments; N_IF: conditions; N_DICT: keys; N_COMPARE: right
                      operands; N_MACRO: defaults */
    td_nodes more; /* N_IF: bodies as N_SCOPE-less blocks; N_DICT: values; N_CALL, N_FILTER: keyword
                      values */
    td_str *names; /* keyword names, macro parameters, comparison operators */
    size_t n_names;
    td_nodes body, orelse;
};

/* Cut the source into tokens. */
int td_tpl_lex(const char *name, const char *source, size_t n, td_arena *arena,
               td_token_t **ret_tokens, size_t *ret_n, td_err *reterr_err);
/* Build the tree. */
int td_tpl_parse(const char *name, const td_token_t *tokens, size_t n, td_arena *arena,
                 td_nodes *ret_body, td_err *reterr_err);

/* Number of a filter or test, or -1. */
int td_tpl_filter_id(td_str name);
int td_tpl_test_id(td_str name);

#endif
