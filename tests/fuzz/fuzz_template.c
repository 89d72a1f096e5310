/* SPDX-License-Identifier: Apache-2.0 */
/* Promise: no template crashes the compiler or the interpreter, and none outruns its budgets. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "base/json.h"
#include "text/template.h"
#include "base/banned.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const char variables[] = "{\"messages\":[{\"role\":\"user\",\"content\":\"Hi\"},{\"role\":"
                                "\"assistant\",\"content\":null,"
                                "\"tool_calls\":[{\"function\":{\"name\":\"f\",\"arguments\":{"
                                "\"a\":1}}}]}],\"n\":3,\"s\":\"a b\",\"l\":[1,2.5,\"x\"],"
                                "\"d\":{\"k\":\"v\"},\"tools\":null}";

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const td_template_budget budget = {
        .max_steps = 20000, .max_depth = 20, .max_output = 1 << 16, .now_s = 1};
    static json_t *vars;
    td_template *t = NULL;
    td_err err = {0};
    td_strbuf out;
    if (!vars && td_json_parse(variables, sizeof variables - 1, NULL, "vars", &vars, &err) < 0)
        abort();
    if (td_template_compile("fuzz", (const char *)data, size, &t, &err) < 0)
        return 0;
    td_strbuf_init(&out);
    td_template_render(t, vars, &budget, &out, &err);
    td_strbuf_done(&out);
    td_template_free(t);
    return 0;
}
