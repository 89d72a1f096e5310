/* SPDX-License-Identifier: Apache-2.0 */
/* The router service: configuration and wiring. */
#ifndef TD_ROUTER_ROUTER_H
#define TD_ROUTER_ROUTER_H

#include "base/options.h"

/* Sections a router takes. */
enum { TD_ROUTER_SECTIONS = TD_SEC_COMMON | TD_SEC_ROUTER };

/* Run until drained; an inherited listening socket (LISTEN_FDS) takes the place of --listen.
 * Returns the process's exit status: 0, 1 runtime failure, 2 configuration. */
int td_router_run(const td_options *options);
/* program: what was typed, for help and errors; argv without it. Parse options, run. */
int td_router_main(const char *program, int argc, char **argv);

#endif
