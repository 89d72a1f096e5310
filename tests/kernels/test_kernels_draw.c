/* SPDX-License-Identifier: Apache-2.0 */
/* Guards the sampler of each backend on every backend: kernels/checks/sample.c says what. */
#include "tests/kernels/checks_util.h"

int main(void)
{
    RUN_CHECKS("sample");
}
