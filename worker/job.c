/* SPDX-License-Identifier: Apache-2.0 */
#include "worker/job.h"

#include <stdio.h>

#include "base/banned.h"

void td_worker_job_set_end(td_worker_job *j, uint32_t code, td_error error, const char *text)
{
    if (j->code)
        return;
    j->code = code;
    j->error = error;
    snprintf(j->text, sizeof j->text, "%s", text);
}
