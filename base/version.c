/* SPDX-License-Identifier: Apache-2.0 */
#include "base/version.h"

#include "base/banned.h"

/* TD_VERSION and TD_COMMIT come from CMake, for this file only: a new commit rebuilds nothing else.
 */
const char *td_version(void)
{
    return TD_VERSION;
}

const char *td_commit(void)
{
    return sizeof TD_COMMIT > 1 ? TD_COMMIT : "unknown";
}

const char *td_build(void)
{
    return sizeof TD_COMMIT > 1 ? TD_VERSION "+" TD_COMMIT : TD_VERSION;
}
