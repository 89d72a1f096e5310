/* SPDX-License-Identifier: Apache-2.0 */
/* Guards: docs/api.md tells the truth. Its tables are generated from the request table and the
 * error table. TD_UPDATE_DOCS=1 writes them anew. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/err.h"
#include "base/file.h"
#include "base/strbuf.h"
#include "router/request.h"

static void fields(FILE *out)
{
    td_request_docs(out);
}

static void errors(FILE *out)
{
    fprintf(out, "| code | HTTP | type | retry | meaning | remedy |\n|---|---|---|---|---|---|\n");
    for (int i = 1; i < TD_ERROR_MAX; i++) {
        const td_error_info *e = td_error_get((td_error)i);
        fprintf(out, "| `%s` | %d | %s | %s | %s | %s |\n", e->name, e->http, e->type,
                e->retryable ? "yes" : "no", e->text, e->remedy);
    }
}

static void section(const char *path, const char *begin, const char *end, void (*write)(FILE *out))
{
    char *text = NULL, *made = NULL;
    size_t n = 0, made_n = 0;
    td_err err = {0};
    assert_int_equal(td_file_read(path, 1 << 20, &text, &n, &err), 0);
    char *from = strstr(text, begin), *to = strstr(text, end);
    assert_non_null(from);
    assert_non_null(to);
    from = strchr(from, '\n') + 1;
    FILE *f = open_memstream(&made, &made_n);
    write(f);
    fclose(f);
    int same = (size_t)(to - from) == made_n && memcmp(from, made, made_n) == 0;
    if (!same && getenv("TD_UPDATE_DOCS")) {
        f = fopen(path, "w");
        assert_non_null(f);
        fwrite(text, 1, (size_t)(from - text), f);
        fwrite(made, 1, made_n, f);
        fputs(to, f);
        fclose(f);
        same = 1;
    }
    free(text);
    free(made);
    if (!same)
        fail_msg("%s: the part behind '%s' is stale: run this test with TD_UPDATE_DOCS=1", path,
                 begin);
}

static void test_fields(void **state)
{
    section(TD_SOURCE_DIR "/docs/api.md", "<!-- fields:", "<!-- end of fields", fields);
}

static void test_errors(void **state)
{
    section(TD_SOURCE_DIR "/docs/api.md", "<!-- errors:", "<!-- end of errors", errors);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_fields),
                                       cmocka_unit_test(test_errors)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
