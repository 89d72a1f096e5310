/* SPDX-License-Identifier: Apache-2.0 */
#include "router/router.h"

int main(int argc, char **argv)
{
    return td_router_main("tandem-router", argc - 1, argv + 1);
}
