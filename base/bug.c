/* SPDX-License-Identifier: Apache-2.0 */
#include "base/bug.h"

#include <stdio.h>
#include <stdlib.h>

#include "base/banned.h"

void td_bug_fail(const char *file, int line, const char *cond)
{
    fprintf(stderr, "<2>bug: %s:%d: %s\n", file, line, cond);
    abort();
}
