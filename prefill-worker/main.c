/* SPDX-License-Identifier: Apache-2.0 */
#include "prefill-worker/worker.h"

int main(int argc, char **argv)
{
    return td_prefill_worker_main(argc - 1, argv + 1);
}
