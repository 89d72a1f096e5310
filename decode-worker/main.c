/* SPDX-License-Identifier: Apache-2.0 */
#include "decode-worker/worker.h"

int main(int argc, char **argv)
{
    return td_decode_worker_main("tandem-decode-worker", argc - 1, argv + 1);
}
