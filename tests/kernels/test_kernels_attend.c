/* SPDX-License-Identifier: Apache-2.0 */
/* Guards mla_write, attend_mla, gqa_write, attend_gqa on every backend: kernels/checks/attend.c
 * says what. */
#include "tests/kernels/checks_util.h"

int main(void)
{
    RUN_CHECKS("attend");
}
