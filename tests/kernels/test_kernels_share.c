/* SPDX-License-Identifier: Apache-2.0 */
/* Guards the shares of tensor-parallel ranks on every backend: kernels/checks/share.c says what. */
#include "tests/kernels/checks_util.h"

int main(void)
{
    RUN_CHECKS("share");
}
