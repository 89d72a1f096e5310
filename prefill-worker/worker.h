/* SPDX-License-Identifier: Apache-2.0 */
/* The prefill worker: dials a router, answers tandem.v1.Engine/Prefill. Three threads: loop
 * (worker.c), lane, mover. */
#ifndef TD_PREFILL_WORKER_WORKER_H
#define TD_PREFILL_WORKER_WORKER_H

/* Run the service until SIGTERM. program: what was typed to start it, for --help and errors; kept.
 * argv without it; options of the sections
 * common and prefill. Ready as soon as the model is loaded, router or not: it is dialled for ever.
 * Returns the exit status. */
int td_prefill_worker_main(const char *program, int argc, char **argv);

#endif
