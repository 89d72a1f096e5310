/* SPDX-License-Identifier: Apache-2.0 */
/* What `loop`, a macro and a scope are while a template runs. */
#ifndef TD_TEXT_TEMPLATE_LOOP_H
#define TD_TEXT_TEMPLATE_LOOP_H

#include "text/template_value.h"

typedef struct td_loop_state {
    td_value items;
    size_t index;
    td_value changed; /* last arguments of loop.changed() */
    int has_changed;
} td_loop_state;

/* Names of one block, the inner ones first. Names are few: a list. */
typedef struct td_scope {
    struct td_scope *outer;
    struct td_variable {
        td_str name;
        td_value value;
        struct td_variable *next;
    } * variables;
} td_scope;

typedef struct td_macro {
    const td_node *node;
    td_scope *scope; /* where it was defined */
} td_macro;

td_value td_macro_call(td_run *r, const td_macro *m, const td_args *a);

#endif
