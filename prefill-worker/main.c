/* SPDX-License-Identifier: Apache-2.0 */
#include "prefill-worker/worker.h"

int main(int argc, char **argv)
{
    return td_prefill_worker_main("tandem-prefill-worker", argc - 1, argv + 1);
}
