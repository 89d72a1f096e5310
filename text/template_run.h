/* SPDX-License-Identifier: Apache-2.0 */
/* Between template.c, which owns templates and budgets, and template_eval.c, which runs the tree.
 */
#ifndef TD_TEXT_TEMPLATE_RUN_H
#define TD_TEXT_TEMPLATE_RUN_H

#include "text/template_value.h"

/* Run the whole tree into r->out. */
void td_tpl_run(td_run *r, const td_nodes *body);
/* A variable of the caller, else a default of the template (bos_token and the like). NULL: none.
 * Borrowed. */
json_t *td_tpl_variable(const td_run *r, td_str name);

#endif
