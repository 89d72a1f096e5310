/* SPDX-License-Identifier: Apache-2.0 */
/* The decode worker: dials a router, answers tandem.v1.Engine/Reserve. Three threads: loop
 * (worker.c), lane, mover. */
#ifndef TD_DECODE_WORKER_WORKER_H
#define TD_DECODE_WORKER_WORKER_H

/* Run the service until SIGTERM. program: what was typed to start it, for --help and errors; kept.
 * argv without it; options of the sections
 * common and decode. Ready as soon as the model is loaded, router or not: it is dialled for ever.
 * Returns the exit status. */
int td_decode_worker_main(const char *program, int argc, char **argv);

#endif
