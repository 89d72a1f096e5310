/* SPDX-License-Identifier: Apache-2.0 */
/* Guards the indexer on every backend: kernels/checks/index.c says what. */
#include "tests/kernels/checks_util.h"

int main(void)
{
    RUN_CHECKS("index");
}
