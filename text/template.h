/* SPDX-License-Identifier: Apache-2.0 */
/* Chat templates: a Jinja subset, compiled once at load, run with budgets of steps, depth and
 * output bytes. Values are jansson trees. A compiled template is immutable; renders may run in
 * parallel. */
#ifndef TD_TEXT_TEMPLATE_H
#define TD_TEXT_TEMPLATE_H

#include <jansson.h>
#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "base/strbuf.h"

typedef struct td_template td_template;

typedef struct td_template_budget {
    uint64_t max_steps; /* 0 = 2,000,000 */
    uint32_t max_depth; /* 0 = 64 */
    size_t max_output;  /* bytes, 0 = 16 MiB */
    int64_t now_s; /* what strftime_now() tells: seconds since 1970, in UTC; 0 = the clock, in local
                      time */
} td_template_budget;

/* Compile. name stands in error texts with line numbers ("chat_template.jinja:12: unknown filter
 * 'x'"). */
int td_template_compile(const char *name, const char *source, size_t n, td_template **ret_tpl,
                        td_err *reterr_err);
void td_template_free(td_template *t);

/* Render with the members of vars (object) as variables (messages, tools, add_generation_prompt,
 * enable_thinking, ...). 0; -EINVAL error in or raised by the template (raise_exception); -E2BIG a
 * budget ran out; -ENOMEM. */
int td_template_render(const td_template *t, json_t *vars, const td_template_budget *budget,
                       td_strbuf *out, td_err *reterr_err);

/* Find the template of a model directory: chat_template.jinja, else "chat_template" in
 * tokenizer_config.json. -ENOENT when the model has none. */
int td_template_open(const char *dir, td_template **ret_tpl, td_err *reterr_err);

#endif
