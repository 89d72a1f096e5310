/* SPDX-License-Identifier: Apache-2.0 */
/* Guards route and moe on every backend: kernels/checks/moe.c and experts.c say what. */
#include "tests/kernels/checks_util.h"

int main(void)
{
    RUN_CHECKS("moe");
}
